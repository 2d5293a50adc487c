"""The gateway in the place of one of two strongSwans.

Two strongSwans negotiate two tunnels with IKE. The keys that one of them has are put into an SA file, and the
gateway takes over that side's packets: ESP in UDP from its outside interface, clear text from its inside one,
while IKE goes on to strongSwan. The other side never learns of it: its own user-space ESP encrypts, decrypts
and refuses replays.

    host ---- lan [left: gateway, strongSwan] wan ---- wan [right: strongSwan] lan

First over af_xdp on both sides, then, restarted, with look-aside engines (models) that seal and open the packets of one
tunnel, in crypto and in packet mode, then with a tap interface inside: the restarted gateway goes on with the sequence
numbers after those it has used, or the peer would take its packets for replays.
"""

import argparse
import json
import re
import secrets
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "lib"))

from charon import Charon
from gateway import Gateway
from netns import Failed, World, address, end, mac, private_file, sh, veth, wait_for

LEFT, RIGHT = "192.0.2.1", "192.0.2.2"
# Child SA, third octet of its networks on both sides, proposal of IKE, suite of the gateway.
CHILDREN = [
    ("gcm", 0, "aes128gcm16", "aes-128-gcm-16"),
    ("cbc", 1, "aes256-sha256", "aes-256-cbc+hmac-sha2-256-128"),
]
PINGS = 20
WAN = """
[[port]]
name = "wan"
kind = "af_xdp"
side = "outside"
addresses = ["192.0.2.1/24"]
[[route]]
to = "10.2.0.0/16"
via = "192.0.2.2"
[[neighbour]]
ip = "192.0.2.2"
mac = "{peer}"
port = "wan"
"""
LAN = """
[[port]]
name = "lan"
kind = "{kind}"
side = "inside"
{mac}
addresses = ["10.1.0.1/24", "10.1.1.1/24"]
"""
HOST = """
[[neighbour]]
ip = "{ip}"
mac = "{mac}"
port = "lan"
"""
TAP_MAC = "02:00:5e:10:00:01"


def sa_file(left, offload=None):
    """What IKE gave to the left side, in the gateway's format; the tunnel that engines can carry on one, or not."""
    text = ""
    for name, net, _, suite in CHILDREN:
        text += f'[[tunnel]]\nname = "{name}"\nlocal = "{LEFT}"\nremote = "{RIGHT}"\nsuite = "{suite}"\nnat_t = true\n'
        if offload and name == "cbc":
            text += f'window = 32\noffload = "{offload}"\nengine = "eip0"\n'
        for direction, (spi, key, auth) in left.keys(name).items():
            text += f'[[tunnel.sa]]\ndirection = "{direction}"\nspi = {spi}\nkey = "{key.hex()}"\nfirst_use = true\n'
            text += f'auth_key = "{auth.hex()}"\n' if auth else ""
        for direction, src, dst in (("out", 1, 2), ("in", 2, 1)):
            text += (
                f'[[policy]]\nname = "{name}-{direction}"\ndirection = "{direction}"\npriority = 1\n'
                f'action = "protect"\ntunnel = "{name}"\nsrc = "10.{src}.{net}.0/24"\ndst = "10.{dst}.{net}.0/24"\n'
            )
    return text


def ping(host, net):
    """All echoes come back."""
    out = sh("ping", "-n", "-q", "-c", PINGS, "-i", "0.05", "-W", "2", "-I", f"10.1.{net}.2", f"10.2.{net}.1", namespace=host)
    if not re.search(rf"{PINGS} packets transmitted, {PINGS} received, 0% packet loss", out):
        raise Failed(out)
    return re.search(r"= [\d.]+/([\d.]+)/", out)[1]


def iperf(host, net, *options):
    """Seconds of TCP through the tunnel, Mbit/s that arrived."""
    command = ("iperf3", "-J", "-t", "2", "-B", f"10.1.{net}.2", "-c", f"10.2.{net}.1", "-M", "1200", *options)
    result = json.loads(sh(*command, namespace=host))
    return result["end"]["sum_received"]["bits_per_second"] / 1e6


def traffic(gateway, host, full=False):
    """Ping and TCP in both directions through both tunnels; the gateway's counters must tell the same. TCP may fill an engine."""
    for name, net, *_ in CHILDREN:
        try:
            rtt = ping(host, net)
        except Failed as e:
            raise Failed(f"{name}: {e}\n{json.dumps(gateway.ask('stats'), indent=1)}") from e
        there, back = iperf(host, net), iperf(host, net, "-R")
        tunnel = next(t for t in gateway.ask("stats")["tunnels"] if t["name"] == name)
        sas = {s["direction"]: s for s in gateway.ask("sa", "list", "--tunnel", name)}
        print(f"      {name}: ping {rtt} ms, TCP {there:.0f} Mbit/s out, {back:.0f} Mbit/s in, {tunnel['out_packets']} and {tunnel['in_packets']} packets")
        if min(there, back) < 1:
            raise Failed(f"{name}: TCP stands still")
        if (tunnel["errors"] or tunnel["lost"]) and not full:
            raise Failed(f"{name}: {tunnel}")
        least = PINGS + (there + back) * 2e6 / 8 / 1300
        if min(tunnel["out_packets"], tunnel["in_packets"]) < PINGS or tunnel["out_packets"] + tunnel["in_packets"] < least:
            raise Failed(f"{name}: less went through the gateway than arrived: {tunnel}")
        if sas["in"]["icv_failed"] or sas["in"]["replays"]:
            raise Failed(f"{name}: {sas['in']}")


def finish(gateway, allowed=frozenset()):
    """Every frame is accounted for: by the gateway itself, and between its tunnels and its ports."""
    stats = gateway.ask("stats")
    drops = {d["reason"]: d["frames"] for d in stats["drops"]}
    print(f"      drops: {drops or 'none'}; {sum(w['received'] for w in stats['workers'])} frames received")
    if drops.keys() - allowed:
        raise Failed(f"drops: {drops}")
    sent = {p["name"]: sum(q["tx_packets"] for q in p["queues"]) for p in stats["ports"]}
    carried = {port: sum(t[f"{way}_packets"] for t in stats["tunnels"]) for port, way in (("wan", "out"), ("lan", "in"))}
    if sent != carried:
        raise Failed(f"the tunnels carried {carried}, the ports sent {sent}")
    gateway.stop()


def test(world, program, tools):
    """The whole story; raises on the first thing that is wrong."""
    host, left, right = (world.namespace(n) for n in ("host", "left", "right"))
    veth(host, "eth0", left, "lan", mtu=1400)
    veth(left, "wan", right, "wan")
    veth(right, "lan", right, "far")
    address(left, "wan", f"{LEFT}/24")
    address(right, "wan", f"{RIGHT}/24")
    address(left, "lan", "10.1.0.1/24", "10.1.1.1/24")
    address(host, "eth0", "10.1.0.2/24", "10.1.1.2/24")
    address(right, "lan", "10.2.0.1/24", "10.2.1.1/24")
    sh("ip", "route", "add", "10.2.0.0/16", "via", "10.1.0.1", namespace=host)

    secret = secrets.token_hex(16)
    nets = [(name, f"10.1.{n}.0/24", f"10.2.{n}.0/24", esp) for name, n, esp, _ in CHILDREN]
    swapped = [(name, b, a, esp) for name, a, b, esp in nets]
    Charon(world, right, "right", (RIGHT, LEFT), swapped, secret)
    initiator = Charon(world, left, "left", (LEFT, RIGHT), nets, secret)
    for name, *_ in CHILDREN:
        initiator.control("--initiate", "--child", name, "--timeout", "10")
    # From here on the left side's packets are the gateway's business.
    sh("ip", "route", "flush", "table", "220", namespace=left)
    print("PASS  IKE has negotiated both tunnels", flush=True)

    directory = world.dir / "gateway"
    directory.mkdir()
    private_file(directory / "sa.toml", sa_file(initiator))
    world.start("iperf3", "-s", "-B", "10.2.0.1", namespace=right)
    world.start("iperf3", "-s", "-B", "10.2.1.1", namespace=right)
    wan = WAN.format(peer=mac(right, "wan"))
    hosts = [f"10.1.{n}.2" for _, n, *_ in CHILDREN]

    neighbours = "".join(HOST.format(ip=ip, mac=mac(host, "eth0")) for ip in hosts)
    config = wan + LAN.format(kind="af_xdp", mac="") + neighbours
    gateway = Gateway(world, program, left, directory, config, "gateway-1.log")
    traffic(gateway, host)
    finish(gateway)
    print("PASS  ping and TCP through both tunnels, af_xdp outside and inside", flush=True)

    engine = f'[[engine]]\nname = "eip0"\nkind = "eip93"\nsocket = "{world.dir / "eip0.sock"}"\nverify = 1.0\n'
    for offload in ("crypto", "packet"):
        model = world.start(tools, "eip93", "--socket", world.dir / "eip0.sock", log=f"eip0-{offload}.log")
        wait_for("the model's socket", (world.dir / "eip0.sock").exists)
        private_file(directory / "sa.toml", sa_file(initiator, offload))
        gateway = Gateway(world, program, left, directory, config + engine, f"gateway-{offload}.log")
        traffic(gateway, host, full=True)
        told = gateway.ask("engines")[0]
        finish(gateway, {"engine_busy"})
        end(model)
        (world.dir / "eip0.sock").unlink(missing_ok=True)
        if told["state"] != "serving" or told["samples"] < 1000 or told["samples_failed"]:
            raise Failed(f"the engine: {told}")
        print(f"PASS  restarted, an EIP-93 in {offload} mode carries one tunnel: {told['submitted']} packets, {told['samples']} verified", flush=True)
    private_file(directory / "sa.toml", sa_file(initiator))

    # Now the hosts' addresses are on the tap interface, in the gateway's own namespace.
    sh("ip", "link", "del", "lan", namespace=left)
    # The kernel's own multicast would be dropped by policy, and counted.
    sh("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1", namespace=left)
    neighbours = "".join(HOST.format(ip=ip, mac="02:00:5e:10:00:02") for ip in hosts)
    config = wan + LAN.format(kind="tap", mac=f'interface = "esp0"\nmtu = 1400\nmac = "{TAP_MAC}"') + neighbours
    gateway = Gateway(world, program, left, directory, config, "gateway-2.log")
    sh("ip", "link", "set", "esp0", "address", "02:00:5e:10:00:02", "up", namespace=left)
    address(left, "esp0", *(f"{ip}/24" for ip in hosts))
    sh("ip", "neigh", "add", "10.1.0.1", "lladdr", TAP_MAC, "dev", "esp0", namespace=left)
    sh("ip", "route", "add", "10.2.0.0/16", "via", "10.1.0.1", "dev", "esp0", namespace=left)
    traffic(gateway, left)
    finish(gateway)
    print("PASS  restarted, ping and TCP through both tunnels, tap inside; the peer saw no replay", flush=True)

    log = (world.dir / "right" / "charon.log").read_text()
    bad = [line for line in log.splitlines() if re.search(r"replay|verif|decrypt\w* failed|invalid", line, re.I) and "ESP" in line]
    if bad:
        raise Failed(f"the peer complains: {bad[:3]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gateway", type=Path, required=True, help="program to test")
    parser.add_argument("--model", type=Path, required=True, help="program that models engines")
    parser.add_argument("--keep", type=Path, help="leave configurations and logs in this new directory")
    args = parser.parse_args()
    began = time.monotonic()
    with World("esplanade-swan", args.keep) as world:
        try:
            test(world, args.gateway.resolve(), args.model.resolve())
        except Failed as e:
            print(f"FAIL  {e}")
            sys.exit(1)
    print(f"PASS  strongSwan, {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
