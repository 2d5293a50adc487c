"""Routing daemons on the kernels of gateways that own their ports, as on any Linux router."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "vfio"))

import guest
from netns import Failed, address, sh, veth, wait_for
from topology import FLOOD, Bed, Flood, ping

# Beyond the street, and beyond the right gateway's host.
FAR, BEHIND = "198.51.100.1", "10.2.5.1"
# BIRD, and the libraries that a host need not have; nothing is installed.
BIRD = (
    "bird2 libssh-gcrypt-4 libgcrypt20 libgpg-error0 libgssapi-krb5-2 libkrb5-3 libk5crypto3 libkrb5support0 libcom-err2 libkeyutils1 zlib1g"
).split()
KERNEL = "[kernel]\nroutes = true\nneighbours = true\n"
DEVICES = """
log stderr all;
debug protocols {{ states }};
router id {id};
protocol device {{ scan time 1; }}
protocol kernel {{ learn; scan time 5; ipv4 {{ import all; export where source != RTS_INHERIT; }}; }}
"""
OSPF = """
protocol bfd {{ interface "{interface}" {{ interval 200 ms; multiplier 5; }}; }}
protocol ospf v2 street {{
  ipv4 {{ import all; export none; }};
  area 0 {{
    interface "{interface}" {{ type ptp; hello 1; dead 10; bfd on; }};
    interface "{stub}" {{ stub; }};
  }};
}}
"""
BGP = """
protocol bgp {name} {{
  local {local} as {own}; neighbor {peer} as {far};
  connect retry time 1; connect delay time 1; error wait time 1, 2;
  {more}
  ipv4 {{ import all; export where source = RTS_STATIC || source = RTS_BGP; next hop self; }};
}}
"""


class Bird:
    """One daemon in a namespace."""

    def __init__(self, world, namespace, name, text):
        at = guest.fetch("bird", lambda _: BIRD)
        self.namespace, self.socket, self.control = namespace, world.dir / f"{name}.ctl", at / "usr/sbin/birdcl"
        config = world.dir / f"{name}.conf"
        config.write_text(text)
        libraries = ":".join(str(p) for d in ("usr/lib", "lib") for p in at.glob(f"{d}/*-linux-gnu"))
        command = (at / "usr/sbin/bird", "-f", "-c", config, "-s", self.socket, "-P", world.dir / f"{name}.pid")
        self.process = world.start(*command, namespace=namespace, log=f"{name}.log", env={"LD_LIBRARY_PATH": libraries})
        self.log = world.dir / f"{name}.log"
        wait_for(f"BIRD of {name}", self.socket.exists)

    def ask(self, *command):
        """An answer of its."""
        return sh(self.control, "-s", self.socket, *command, namespace=self.namespace)

    def is_up(self, protocol, state):
        """Whether a protocol is up and where it should be."""
        line = next(row for row in self.ask("show", "protocols").splitlines() if row.startswith(protocol))
        return " up " in line and state in line

    def changes(self):
        """How often its sessions came up or went down, by its log."""
        return sum("changed" in row for row in self.log.read_text().splitlines())


def policies(side):
    """OSPF and BFD with the street, in clear; what lies beyond the street; BGP's networks through the tunnel."""
    if side == "right":
        return policy("behind", "in", "10.1.0.0/24", "10.2.5.0/24", TUNNEL) + policy("behind", "out", "10.2.5.0/24", "10.1.0.0/24", TUNNEL)
    us, street, clear = "192.0.2.1/32", "192.0.2.9/32", 'action = "bypass"\n'
    text = policy("behind", "out", "10.1.0.0/24", "10.2.5.0/24", TUNNEL) + policy("behind", "in", "10.2.5.0/24", "10.1.0.0/24", TUNNEL)
    for to in (street, "224.0.0.5/32"):
        text += policy(f"ospf-{to[:3]}", "out", us, to, clear + "proto = 89\n")
    for to in (us, "224.0.0.5/32"):
        text += policy(f"ospf-{to[:3]}", "in", street, to, clear + "proto = 89\n")
    for direction, src, dst in (("out", us, street), ("in", street, us)):
        text += policy("bfd", direction, src, dst, clear + "proto = 17\ndst_port = 3784\n")
    text += policy("far", "out", "10.1.0.0/24", "198.51.100.0/24", clear)
    return text + policy("far", "in", "198.51.100.0/24", "10.1.0.0/24", clear)


TUNNEL = 'action = "protect"\ntunnel = "t"\n'


def policy(name, direction, src, dst, more):
    """One table of an SA file."""
    return f'[[policy]]\nname = "{name}-{direction}"\ndirection = "{direction}"\npriority = 1\nsrc = "{src}"\ndst = "{dst}"\n{more}'


def case(world, program):
    """All of it."""
    bed = Bed(world, program, "routing", lambda _: KERNEL, policies)
    host, street = bed.host["left"], bed.street
    veth(street, "far", street, "beyond")
    address(street, "far", f"{FAR}/24")
    address(bed.host["right"], "lo", f"{BEHIND}/32")
    for to in (FAR, BEHIND):
        sh("ip", "route", "add", to, "via", "10.1.0.1", namespace=host)
    ibgp = "multihop;"
    left = Bird(world, bed.ns["left"], "bird-left", DEVICES.format(id="192.0.2.1") + OSPF.format(interface="tap-wan", stub="tap-lan")
                + BGP.format(name="tunnel", local="10.1.0.1", own=65001, peer="10.2.0.1", far=65001, more=ibgp))  # fmt: skip
    right = Bird(world, bed.ns["right"], "bird-right", DEVICES.format(id="192.0.2.2")
                 + BGP.format(name="tunnel", local="10.2.0.1", own=65001, peer="10.1.0.1", far=65001, more=ibgp)
                 + BGP.format(name="host", local="10.2.0.1", own=65001, peer="10.2.0.2", far=65002, more=""))  # fmt: skip
    beyond = Bird(world, bed.host["right"], "bird-host", DEVICES.format(id="10.2.0.2")
                  + 'protocol static behind { ipv4; route 10.2.5.0/24 via "lo"; }\n'
                  + BGP.format(name="uplink", local="10.2.0.2", own=65002, peer="10.2.0.1", far=65001, more=""))  # fmt: skip
    far = Bird(world, street, "bird-street", DEVICES.format(id="192.0.2.9") + OSPF.format(interface="street", stub="far"))
    began = time.monotonic()
    for bird, protocol, state in (
        (left, "street", "Running"), (far, "street", "Running"), (left, "tunnel", "Established"),
        (right, "tunnel", "Established"), (right, "host", "Established"),
    ):  # fmt: skip
        wait_for(f"{protocol}: {bird.socket.stem}", lambda b=bird, p=protocol, s=state: b.is_up(p, s), 30)
    wait_for("BFD", lambda: " Up " in left.ask("show", "bfd", "sessions"), 15)
    came_up = time.monotonic() - began
    arrives(host, FAR, "by OSPF")
    arrives(host, BEHIND, "by BGP")
    wait_for("the tunnel's BGP to bring a route", lambda: "10.2.5.0/24" in sh("ip", "route", namespace=bed.ns["left"]))

    # Under a flood for the kernel, sessions stay as they are.
    sessions, flood = (left, right, far), Flood(bed)
    before = [s.changes() for s in sessions]
    took = flood.pour(2 * FLOOD, lambda: False)
    after = [s.changes() for s in sessions]
    bed_drops = bed.drops()
    if before != after or not min(before) or not bed_drops.get("punt_limit"):
        raise Failed(f"sessions changed in a flood: {before}, {after}: {left.log.read_text()[-800:]}; drops {bed_drops}")

    # What daemons take back is not followed any more, and what they bring again is.
    beyond.ask("disable", "behind")
    stays_away(host, BEHIND)
    beyond.ask("enable", "behind")
    arrives(host, BEHIND, "announced again")
    sh("ip", "link", "set", "far", "down", namespace=street)
    wait_for("the route to go", lambda: "198.51.100.0/24" not in sh("ip", "route", namespace=bed.ns["left"]))
    stays_away(host, FAR)
    sh("ip", "link", "set", "far", "up", namespace=street)
    arrives(host, FAR, "up again")
    bed.stop()
    return f"up in {came_up:.1f} s; {flood.sent} frames in {took:.1f} s changed no session; routes taken back and brought again"


def arrives(namespace, to, what):
    """Waits for an answer, then all of ten must come."""

    def answered():
        try:
            ping(namespace, to, 1)
            return True
        except Failed:
            return False

    wait_for(f"an answer from {to}, {what}", answered, 20)
    ping(namespace, to, 10)


def stays_away(namespace, to):
    """Waits until nothing answers."""

    def silent():
        try:
            sh("ping", "-q", "-c", 1, "-W", "0.5", to, namespace=namespace)
            return False
        except Failed:
            return True

    wait_for(f"{to} to fall silent", silent, 20)
