"""Two gateways joined by vhost-user ports alone; testpmd's virtio-user drivers are the wires.

    capture -> [1] -> gateway a: encrypt -> [2] io [3] -> gateway b: decrypt -> [4] -> capture

Each packet that testpmd gave away must be in the last capture, in order, byte for byte but for what a router changes; the
counters of both gateways must tell the same story. Then testpmd is killed and started again: the gateways live on.
"""

import argparse
import secrets
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "peers/lib"))

from gateway import Gateway
from netns import World, Failed, private_file, wait_for
from testpmd import Testpmd, read_capture, write_capture

PACKETS = 30_000
RINGS = [f"packed_vq={packed},mrg_rxbuf={merge}" for packed in (0, 1) for merge in (1, 0)]
MAC = {"lan": "02:00:00:00:00:01", "wan": "02:00:00:00:00:02"}
CONFIG = """
[workers]
count = 1
[memory]
huge = "never"
lock = false
[[port]]
name = "lan"
kind = "vhost-user"
side = "inside"
mac = "02:00:00:00:00:01"
addresses = ["10.{n}.0.1/24"]
vhost-user = {{ socket = "lan.sock" }}
[[port]]
name = "wan"
kind = "vhost-user"
side = "outside"
mac = "02:00:00:00:00:02"
mtu = 1600
addresses = ["192.0.2.{n}/24"]
vhost-user = {{ socket = "wan.sock" }}
[[route]]
to = "10.{n}.0.0/16"
via = "10.{n}.0.2"
[[route]]
to = "10.{m}.0.0/16"
via = "192.0.2.{m}"
[[neighbour]]
ip = "10.{n}.0.2"
mac = "02:00:00:00:01:01"
port = "lan"
[[neighbour]]
ip = "192.0.2.{m}"
mac = "02:00:00:00:00:02"
port = "wan"
"""


def sa_file(n, m, out, into):
    """The tunnel between gateways n and m."""
    text = f'[[tunnel]]\nname = "t"\nlocal = "192.0.2.{n}"\nremote = "192.0.2.{m}"\nsuite = "aes-128-gcm-16"\n'
    for direction, (spi, key) in (("out", out), ("in", into)):
        text += f'[[tunnel.sa]]\ndirection = "{direction}"\nspi = {spi}\nkey = "{key}"\nfirst_use = true\n'
    for direction, src, dst in (("out", n, m), ("in", m, n)):
        text += (
            f'[[policy]]\nname = "{direction}"\ndirection = "{direction}"\npriority = 1\naction = "protect"\n'
            f'tunnel = "t"\nsrc = "10.{src}.0.0/16"\ndst = "10.{dst}.0.0/16"\n'
        )
    return text


def checksum(header):
    """RFC 1071."""
    total = sum(struct.unpack(f"!{len(header) // 2}H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ipv4(ttl, number, length, payload=None):
    """An IPv4 packet of `length` bytes from behind gateway 1 to behind gateway 2."""
    payload = payload if payload is not None else struct.pack("!I", number).ljust(length - 28, bytes([number & 0xFF]))
    udp = struct.pack("!4H", 4000 + number % 100, 9, 8 + len(payload), 0) + payload
    ends = bytes([10, 1, 0, 2, 10, 2, 0x40 | number >> 8 & 0x3F, number & 0xFF])
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), number & 0xFFFF, 0, ttl, 17, 0) + ends
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + udp


def length_of(number):
    """All sizes from the smallest to the largest."""
    return 32 + number * 37 % (1501 - 32)


def ether(to, sender, packet):
    """An Ethernet frame."""
    address = lambda m: bytes.fromhex(m.replace(":", ""))
    return address(to) + address(sender) + b"\x08\x00" + packet


def gateways(world, args):
    """Both, each with a directory of its own."""
    keys = [(0x1001, secrets.token_hex(20)), (0x2001, secrets.token_hex(20))]
    both = []
    for n, m in ((1, 2), (2, 1)):
        place = world.dir / f"g{n}"
        place.mkdir()
        out, into = keys if n == 1 else keys[::-1]
        private_file(place / "sa.toml", sa_file(n, m, out, into))
        both.append(Gateway(world, args.gateway, None, place, CONFIG.format(n=n, m=m), f"g{n}.log"))
    return both


def port_counters(gateway, name):
    """Received and sent packets of a port."""
    ports = gateway.ask("stats")["ports"]
    found = next(p for p in ports if p["name"] == name)
    return tuple(sum(queue[f"{way}_packets"] for queue in found["queues"]) for way in ("rx", "tx"))


def through_the_tunnel(world, both, ring, round_):
    """All packets, with virtio-user rings of one kind."""
    a, b = both
    source, sink = world.dir / "in.pcap", world.dir / f"out-{round_}.pcap"
    write_capture(source, (ether(MAC["lan"], "02:00:00:00:01:01", ipv4(64, n, length_of(n))) for n in range(PACKETS)))
    before = [port_counters(g, p) for g, p in ((a, "lan"), (a, "wan"), (b, "wan"), (b, "lan"))]
    user = lambda i, g, p, size: f"net_virtio_user{i},path={g.dir / p}.sock,queues=1,queue_size={size},{ring}"
    null = world.dir / f"null-{round_}.pcap"
    devices = [
        f"net_pcap0,rx_pcap={source},tx_pcap={null}",
        # What goes in waits in small rings, what comes out finds room in large ones.
        user(0, a, "lan", 256),
        user(1, a, "wan", 1024),
        user(2, b, "wan", 256),
        user(3, b, "lan", 1024),
        f"net_pcap1,tx_pcap={sink}",
    ]
    pmd = Testpmd(world, f"wires-{round_}", devices)
    # What a ring has no room for is tried again: the source must wait for the gateway.
    pmd.command("set fwd io retry")
    pmd.command("set burst tx delay 50 retry 100000")
    pmd.command("start")
    last = None

    def quiet():
        nonlocal last
        time.sleep(0.3)
        now = pmd.counters()[1]
        same, last = now == last, now
        return same and now[0]["RX-packets"] == PACKETS

    wait_for("all packets to pass", quiet, 60)
    ports = last
    given = ports[1]["TX-packets"]
    moved = [port_counters(g, p) for g, p in ((a, "lan"), (a, "wan"), (b, "wan"), (b, "lan"))]
    rx = [now[0] - old[0] for now, old in zip(moved, before)]
    tx = [now[1] - old[1] for now, old in zip(moved, before)]
    steps = {
        "given to a": (given, rx[0]),
        "encrypted": (tx[1], ports[2]["RX-packets"]),
        "given to b": (ports[3]["TX-packets"], rx[2]),
        "decrypted": (tx[3], ports[4]["RX-packets"]),
    }
    for what, (one, other) in steps.items():
        if one != other:
            raise Failed(f"{ring}: {what}: {one} by one account, {other} by the other ({steps})")
    if rx[0] != tx[1] or rx[2] != tx[3]:
        drops = [g.ask("stats")["drops"] for g in both]
        raise Failed(f"{ring}: a gateway lost packets: {steps}, drops {drops}")
    pmd.stop()
    got = read_capture(sink)
    if len(got) != tx[3] or tx[3] != PACKETS:
        drops = [g.ask("stats")["drops"] for g in both]
        raise Failed(f"{ring}: {len(got)} packets came out of {PACKETS}: {steps}, drops {drops}")
    number = -1
    for frame in got:
        n = int.from_bytes(frame[42:46], "big")
        if n <= number or n >= PACKETS or frame != ether("02:00:00:00:01:01", MAC["lan"], ipv4(62, n, length_of(n))):
            raise Failed(f"{ring}: packet {n} after {number} is not as it was sent")
        number = n
    if number != PACKETS - 1:
        raise Failed(f"{ring}: the last packet is {number}")
    print(f"  {ring}: {given} packets went in, {len(got)} came out unchanged and in order")


def sudden_death(world, both):
    """testpmd is killed while packets flow; the gateways notice and take the next one."""
    a = both[0]
    source = world.dir / "again.pcap"
    write_capture(source, [ether(MAC["lan"], "02:00:00:00:01:01", ipv4(64, n, 64)) for n in range(256)])
    devices = [f"net_pcap0,rx_pcap={source},infinite_rx=1", f"net_virtio_user0,path={a.dir / 'lan'}.sock"]
    for _ in range(3):
        before = port_counters(a, "lan")[0]
        pmd = Testpmd(world, "victim", devices)
        pmd.command("start")
        wait_for("packets", lambda: port_counters(a, "lan")[0] > before + 1000)
        pmd.process.kill()
        pmd.process.wait()
    print("  3 peers killed under load: the gateway served the next one each time")


def main():
    """All of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gateway", required=True)
    args = parser.parse_args()
    with World("vhost") as world:
        both = gateways(world, args)
        for round_, ring in enumerate(RINGS):
            through_the_tunnel(world, both, ring, round_)
        sudden_death(world, both)
        for g in both:
            g.stop()
    print("vhost-user: passed")


if __name__ == "__main__":
    main()
