"""Two gateways between hosts of the Linux kernel, over af_xdp.

    host ---- lan [left gateway] wan ---- wan [right gateway] lan ---- host

    routes   tunnels as next hops: no policy protects anything, routes decide, in both directions and both families
    vlans    two VLANs of one interface, each with its own tunnel; what carries another tag is not taken
    workers  two workers on interfaces of two queues: packets are handed to the owner of their SA, and every one that
             is sent comes out, in order within its flow
"""

import argparse
import re
import secrets
import socket
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "peers/lib"))

from netns import Failed, World, mac, run_cases, sh, wait_for
from packets import raw_socket, udp_frame
from pair import OTHER, OUTER, Pair, both_ways, tunnel

SOL_PACKET = 263
PACKET_AUXDATA = 8
PACKET_OUTGOING = 4
ETH_P_ALL = 3
TP_STATUS_VLAN_VALID = 1 << 4
PINGS = 50
TUNNELS = 16
FLOWS = 256
PACKETS = 60_000
UNDER_WAY = 400


def ping(namespace, address):
    """All of them must come back."""
    out = sh("ping", "-q", "-i", "0.02", "-c", PINGS, "-W", "2", address, namespace=namespace)
    if f"{PINGS} received" not in out:
        raise Failed(f"ping {address}: {out.strip()[-200:]}")


def routes(world, program):
    """No policy, but routes into tunnels."""
    pair = Pair(world, program, "routes")
    keys = [secrets.token_hex(20) for _ in range(2)]
    nets = {"left": ("10.1.0", "fd01::"), "right": ("10.2.0", "fd02::")}
    for side, (v4, v6) in nets.items():
        ns, far = pair.host(side), nets[OTHER[side]]
        sh("ip", "addr", "add", f"{v4}.2/24", "dev", "eth0", namespace=ns)
        sh("ip", "addr", "add", f"{v6}2/64", "dev", "eth0", "nodad", namespace=ns)
        sh("ip", "neigh", "add", f"{v4}.1", "lladdr", pair.mac[side, "lan"], "dev", "eth0", namespace=ns)
        sh("ip", "neigh", "add", f"{v6}1", "lladdr", pair.mac[side, "lan"], "dev", "eth0", namespace=ns)
        sh("ip", "route", "add", f"{far[0]}.0/24", "via", f"{v4}.1", namespace=ns)
        sh("ip", "-6", "route", "add", f"{far[1]}/64", "via", f"{v6}1", namespace=ns)
        host = mac(ns, "eth0")
        config = pair.wan(side) + (
            f'[[port]]\nname = "lan"\nkind = "af_xdp"\nside = "inside"\naddresses = ["{v4}.1/24", "{v6}1/64"]\n'
            f'af_xdp = {{ steer_destinations = ["{far[0]}.0/24", "{far[1]}/64"] }}\n'
            f'[[neighbour]]\nip = "{v4}.2"\nmac = "{host}"\nport = "lan"\n'
            f'[[neighbour]]\nip = "{v6}2"\nmac = "{host}"\nport = "lan"\n'
            f'[[route]]\nto = "{far[0]}.0/24"\ntunnel = "road"\n[[route]]\nto = "{far[1]}/64"\ntunnel = "road"\n'
        )
        pair.start(side, config, tunnel("road", side, keys, 0x3000, "if_id = 7\n"))
    for side in OUTER:
        ping(pair.host(side), f"{nets[OTHER[side]][0]}.2")
        ping(pair.host(side), f"{nets[OTHER[side]][1]}2")
    counts = [pair.gateways[s].ask("stats")["tunnels"][0] for s in OUTER]
    drops = pair.drops()
    pair.stop()
    # Two families, two directions, requests and answers.
    if any(c["out_packets"] != 4 * PINGS or c["in_packets"] != 4 * PINGS for c in counts) or any(drops.values()):
        raise Failed(f"tunnels {counts}, drops {drops}")
    return f"{4 * PINGS} pings answered through a tunnel that only routes name, IPv4 and IPv6, from both ends"


class Tagged:
    """A host's end of a trunk: sends tagged frames, receives packets with their tag."""

    def __init__(self, namespace):
        self.socket = raw_socket(namespace, "eth0", ETH_P_ALL)
        self.socket.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)

    def send(self, frame, tag):
        """With a tag, or without."""
        self.socket.send(frame if tag is None else frame[:12] + struct.pack("!HH", 0x8100, tag) + frame[12:])

    def receive(self):
        """Tag, source, destination and number of the next UDP packet; None when there is none."""
        while True:
            try:
                frame, more, _, source = self.socket.recvmsg(2048, 256)
            except TimeoutError:
                return None
            # status, length, snapped length, offsets of the headers, tag, its protocol
            aux = [struct.unpack("=IIIHHHH", data) for _, kind, data in more if kind == PACKET_AUXDATA]
            tag = next((a[5] & 0xFFF for a in aux if a[0] & TP_STATUS_VLAN_VALID), None)
            if source[2] != PACKET_OUTGOING and frame[12:14] == b"\x08\x00" and frame[23] == 17:
                return tag, frame[26:30], frame[30:34], frame[42:46]


def vlans(world, program):
    """Two ports on one interface."""
    pair = Pair(world, program, "vlans")
    tags = (10, 20)
    keys = {t: [secrets.token_hex(20) for _ in range(2)] for t in tags}
    number = {"left": 1, "right": 2}
    for side in OUTER:
        own, far = number[side], number[OTHER[side]]
        config, sa = pair.wan(side), ""
        for tag in tags:
            config += (
                f'[[port]]\nname = "lan{tag}"\nkind = "af_xdp"\nside = "inside"\ninterface = "lan"\nvlan = {tag}\n'
                f'addresses = ["10.{own}.{tag}.1/24"]\n'
                f'[[neighbour]]\nip = "10.{own}.{tag}.2"\nmac = "{mac(pair.host(side), "eth0")}"\nport = "lan{tag}"\n'
                f'[[route]]\nto = "10.{far}.{tag}.0/24"\nvia = "{OUTER[OTHER[side]]}"\n'
            )
            sa += tunnel(f"v{tag}", side, keys[tag], 0x3000 + tag)
            sa += both_ways(f"v{tag}", f"10.{own}.{tag}.0/24", f"10.{far}.{tag}.0/24", f"v{tag}")
        pair.start(side, config, sa)
    ends = {side: Tagged(pair.host(side)) for side in OUTER}
    for n in range(PINGS):
        for side in OUTER:
            for tag in tags:
                src, dst = f"10.{number[side]}.{tag}.2", f"10.{number[OTHER[side]]}.{tag}.2"
                ends[side].send(udp_frame(pair.mac[side, "lan"], src, dst, n), tag)
                want = (tag, socket.inet_aton(src), socket.inet_aton(dst), struct.pack("!I", n))
                got = ends[OTHER[side]].receive()
                if got != want:
                    raise Failed(f"packet {n} from the {side}: sent {want}, got {got}, drops {pair.drops()}")
    counts = {t["name"]: (t["out_packets"], t["in_packets"]) for t in pair.gateways["left"].ask("stats")["tunnels"]}
    if counts != {f"v{tag}": (PINGS, PINGS) for tag in tags} or any(pair.drops().values()):
        raise Failed(f"tunnels {counts}, drops {pair.drops()}")
    # Another tag, and none, to an address that would be protected: neither port's.
    for tag in (None, 30):
        ends["left"].send(udp_frame(pair.mac["left", "lan"], "10.1.10.2", "10.2.10.2", 0), tag)
    wait_for("drops", lambda: pair.drops()["left"] == {"not_for_us": 2}, 5)
    pair.stop()
    return f"{4 * PINGS} packets over two VLANs of one interface, each in its tunnel, tags right; other tags refused"


def workers(world, program):
    """Hand-over and exact accounting."""
    pair = Pair(world, program, "workers", queues=2)
    keys = [[secrets.token_hex(20) for _ in range(2)] for _ in range(TUNNELS)]
    for side in OUTER:
        own, far = ("10.1", "10.2") if side == "left" else ("10.2", "10.1")
        host = mac(pair.host(side), "eth0")
        config = '[workers]\ncount = 2\n[memory]\nframes = 32768\n' + pair.wan(side)
        config += f'[[port]]\nname = "lan"\nkind = "af_xdp"\nside = "inside"\naddresses = ["{own}.0.1/16"]\n'
        config += f'[[route]]\nto = "{far}.0.0/16"\nvia = "{OUTER[OTHER[side]]}"\n'
        sa = ""
        for n in range(TUNNELS):
            config += f'[[neighbour]]\nip = "{own}.{n}.2"\nmac = "{host}"\nport = "lan"\n'
            sa += tunnel(f"t{n}", side, keys[n], 0x3000 + 2 * n)
            sa += both_ways(f"t{n}", f"{own}.{n}.0/24", f"{far}.{n}.0/24", f"t{n}")
        pair.start(side, config, sa)
    out = raw_socket(pair.host("left"), "eth0")
    sink = raw_socket(pair.host("right"), "eth0")
    sink.setblocking(False)
    frames = []
    for flow in range(FLOWS):
        f = udp_frame(pair.mac["left", "lan"], f"10.1.{flow % TUNNELS}.2", f"10.2.{flow % TUNNELS}.2", 0)
        # The flow in the source port, which also spreads it over the queues.
        frames.append(f[:34] + struct.pack("!H", 20000 + flow) + f[36:])
    got, last, disorder = 0, [-1] * FLOWS, 0

    def take():
        nonlocal got, disorder
        while True:
            try:
                f = sink.recv(2048)
            except (BlockingIOError, TimeoutError):
                return
            if f[23] != 17:
                continue
            flow = int.from_bytes(f[34:36], "big") - 20000
            (number,) = struct.unpack_from("!I", f, 42)
            got += 1
            disorder += number <= last[flow]
            last[flow] = number

    for n in range(PACKETS):
        f = frames[n % FLOWS]
        out.send(f[:42] + struct.pack("!I", n) + f[46:])
        # Fewer under way than any ring holds, however slow the machine is: whatever is lost is the gateway's fault.
        deadline = time.monotonic() + 2
        while n - got >= UNDER_WAY and time.monotonic() < deadline:
            take()
    sink.settimeout(1.5)
    take()
    drops = pair.drops()
    stats = {side: g.ask("stats")["workers"] for side, g in pair.gateways.items()}
    ports = pair.gateways["left"].ask("stats")["ports"]
    queues = [q["rx_packets"] for p in ports if p["name"] == "lan" for q in p["queues"]]
    modes = {p["name"]: p["mode"] for p in ports}
    pair.stop()
    if got != PACKETS or any(drops.values()) or disorder:
        raise Failed(f"{PACKETS} sent, {got} arrived, {disorder} out of order; drops {drops}, queues {queues}")
    handed = {side: [w["handed_out"] for w in ws] for side, ws in stats.items()}
    # A queue of one gateway's outside is joined to the same of the other's, so ESP arrives where it is owned.
    if min(queues) == 0 or min(handed["left"]) == 0:
        raise Failed(f"not all queues or workers took part: queues {queues}, handed over {handed}")
    if not all(re.fullmatch(r"zero-copy|native copy|generic copy", m) for m in modes.values()):
        raise Failed(f"modes {modes}")
    encrypted = [w["encrypted"] for w in stats["left"]]
    decrypted = [w["decrypted"] for w in stats["right"]]
    if (sum(encrypted), sum(decrypted)) != (PACKETS, PACKETS):
        raise Failed(f"encrypted {encrypted}, decrypted {decrypted}")
    return (
        f"{PACKETS} packets of {FLOWS} flows in {TUNNELS} tunnels over 2 queues {queues}, two workers, handed over "
        f"{handed}: all arrived in order ({modes['lan']})"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gateway", type=Path, required=True, help="program to test")
    parser.add_argument("--keep", type=Path, help="leave configurations and logs in this new directory")
    args = parser.parse_args()
    program = args.gateway.resolve()
    with World("esplanade-roads", args.keep) as world:
        bad = run_cases(world, program, {c.__name__: c for c in (routes, vlans, workers)})
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
