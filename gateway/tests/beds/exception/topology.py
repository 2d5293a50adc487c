"""Two gateways that own their ports, the street between them, and hosts behind them."""

import secrets
import socket
import struct
import sys
import time

from netns import Failed, address, mac, sh
from owned import Owner, Port, neighbour, route
from packets import raw_socket, udp_frame

SIDES = ("left", "right")
STREET = {"4": "192.0.2.9", "6": "fd0f::9"}
BGP, SSH = 179, 22
FLOOD = 40_000
# Frames per second: what a busy machine still moves through a TAP.
RATE = 15_000
SERVER = """
import socket, sys, threading
def serve(family, port):
    s = socket.create_server(("", port), family=family, dualstack_ipv6=True)
    while True:
        c, _ = s.accept()
        c.sendall(b"gateway\\n")
        c.close()
for port in map(int, sys.argv[1:]):
    threading.Thread(target=serve, args=(socket.AF_INET6, port), daemon=True).start()
threading.Event().wait()
"""
CLIENT = """
import socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=2)
assert s.recv(64) == b"gateway\\n"
"""


def addresses(side):
    """Own number, addresses inside and outside."""
    n = 1 + SIDES.index(side)
    return n, [f"10.{n}.0.1/24", f"fd0{n}::1/64"], [f"192.0.2.{n}/24", f"fd0f::{n}/64"]


def sa_file(side, keys):
    """The tunnel, and in clear ping, BGP with the street."""
    own, far = (1, 2) if side == "left" else (2, 1)
    text = f'[[tunnel]]\nname = "t"\nlocal = "192.0.2.{own}"\nremote = "192.0.2.{far}"\nsuite = "aes-128-gcm-16"\n'
    for n, key in enumerate(keys):
        direction = "out" if n == own - 1 else "in"
        text += f'[[tunnel.sa]]\ndirection = "{direction}"\nspi = {0x1001 + n}\nkey = "{key}"\nfirst_use = true\n'

    def policy(name, direction, src, dst, action, more=""):
        return (
            f'[[policy]]\nname = "{name}-{direction}"\ndirection = "{direction}"\npriority = 1\nsrc = "{src}"\ndst = "{dst}"\n'
            f'action = "{action}"\n{more}'
        )

    for v, mine, theirs in (("4", f"10.{own}.0.0/24", f"10.{far}.0.0/24"), ("6", f"fd0{own}::/64", f"fd0{far}::/64")):
        text += policy(f"net{v}", "out", mine, theirs, "protect", 'tunnel = "t"\n')
        text += policy(f"net{v}", "in", theirs, mine, "protect", 'tunnel = "t"\n')
    for v, us, icmp in (("4", f"192.0.2.{own}/32", 1), ("6", f"fd0f::{own}/128", 58)):
        street = f"{STREET[v]}/{32 if v == '4' else 128}"
        text += policy(f"ping{v}", "out", us, street, "bypass", f"proto = {icmp}\n")
        text += policy(f"ping{v}", "in", street, us, "bypass", f"proto = {icmp}\n")
    text += policy("bgp", "out", f"192.0.2.{own}/32", "192.0.2.9/32", "bypass", f'proto = 6\nsrc_port = {BGP}\n')
    text += policy("bgp", "in", "192.0.2.9/32", f"192.0.2.{own}/32", "bypass", f'proto = 6\ndst_port = {BGP}\n')
    return text


class Bed:
    """Both gateways and their surroundings."""

    def __init__(self, world, program, name, config=lambda side: "", sa=lambda side: ""):
        self.world = world
        self.street = world.namespace(f"{name}-street")
        self.ns = {s: world.namespace(f"{name}-{s}") for s in SIDES}
        self.host = {s: world.namespace(f"{name}-{s}-host") for s in SIDES}
        for ns in (self.street, *self.ns.values(), *self.host.values()):
            sh("sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0", "net.ipv6.conf.default.router_solicitations=0", namespace=ns)
        keys = [secrets.token_hex(20) for _ in SIDES]
        self.owner, self.wan, self.lan = {}, {}, {}
        more, more_sa = config, sa
        for side in SIDES:
            n, inner, outer = addresses(side)
            far = 3 - n
            hosts = [f"10.{n}.0.2/24", f"fd0{n}::2/64"]
            lan = Port("lan", "inside", "tap-lan", 2 * n, self.host[side], hosts)
            wan = Port(f"wan{n}", "outside", "tap-wan", 2 * n + 1, self.street)
            far_wan = Port("", "", "", 2 * far + 1, "")
            config = lan.config(inner) + wan.config(outer)
            for v in (0, 1):
                config += neighbour(hosts[v].split("/")[0], lan.far_mac, "lan")
                config += neighbour((f"192.0.2.{far}", f"fd0f::{far}")[v], far_wan.mac, wan.name)
                config += route((f"10.{far}.0.0/24", f"fd0{far}::/64")[v], (f"192.0.2.{far}", f"fd0f::{far}")[v])
            ports = [(lan, inner), (wan, outer)]
            self.owner[side] = Owner(world, program, self.ns[side], f"{name}-{side}", ports, config + more(side), sa_file(side, keys) + more_sa(side))
            self.wan[side], self.lan[side] = wan, lan
            for to, gate in ((f"10.{far}.0.0/24", f"10.{n}.0.1"), (f"fd0{far}::/64", f"fd0{n}::1")):
                sh("ip", "route", "add", to, "via", gate, namespace=self.host[side])
            # The kernel's own way to the far side, from its inner address.
            for to, gate, src in (
                (f"10.{far}.0.0/24", f"192.0.2.{far}", f"10.{n}.0.1"),
                (f"fd0{far}::/64", f"fd0f::{far}", f"fd0{n}::1"),
            ):
                sh("ip", "route", "add", to, "via", gate, "dev", "tap-wan", "src", src, namespace=self.ns[side])
        sh("ip", "link", "add", "street", "type", "bridge", namespace=self.street)
        sh("ip", "link", "set", "street", "up", namespace=self.street)
        for side in SIDES:
            sh("ip", "link", "set", self.wan[side].name, "master", "street", namespace=self.street)
        address(self.street, "street", "192.0.2.9/24", "fd0f::9/64")

    def gateway(self):
        """The left one, which is looked at."""
        return self.owner["left"].gateway

    def drops(self):
        """Of the left gateway by reason."""
        return {d["reason"]: d["frames"] for d in self.gateway().ask("stats")["drops"]}

    def serve(self, *ports):
        """A server in the left gateway's kernel."""
        self.world.start(sys.executable, "-c", SERVER, *ports, namespace=self.ns["left"], log="server.log")
        time.sleep(0.5)

    def connects(self, namespace, to, port):
        """Whether a TCP connection brings an answer."""
        try:
            sh(sys.executable, "-c", CLIENT, to, port, namespace=namespace)
            return True
        except Failed:
            return False

    def stop(self):
        """Both; it fails when an account does not balance."""
        for side in SIDES:
            self.owner[side].gateway.stop()


class Flood:
    """ARP, ICMP and UDP from the left host to its gateway's kernel."""

    def __init__(self, bed):
        host, to = bed.host["left"], bed.lan["left"].mac
        self.wire = raw_socket(host, "lan")
        own_mac = bytes.fromhex(mac(host, "lan").replace(":", ""))
        arp = bytes.fromhex("ff" * 6) + own_mac + struct.pack("!HHHBBH", 0x806, 1, 0x800, 6, 4, 1)
        arp += own_mac + socket.inet_aton("10.1.0.2") + bytes(6) + socket.inet_aton("10.1.0.1")
        self.frames = (arp.ljust(60, b"\0"), udp_frame(to, "10.1.0.2", "10.1.0.1", 1), icmp_frame(to, "10.1.0.2", "10.1.0.1"))
        self.sent = 0
        # What the wire's own queue loses says nothing about the gateway.
        sh("ip", "link", "set", "lan", "txqueuelen", 20_000, namespace=host)

    def pour(self, at_least, more):
        """So many frames, and further ones while `more()`, at most for 30 s. Seconds."""
        began = time.monotonic()
        while self.sent < at_least or (more() and time.monotonic() - began < 30):
            for frame in self.frames:
                for _ in range(16):
                    self.wire.send(frame)
                    self.sent += 1
            time.sleep(max(0.0, began + self.sent / RATE - time.monotonic()))
        return time.monotonic() - began


def ping(namespace, to, count=5, *more):
    """All of them must come back."""
    out = sh("ping", "-q", "-i", "0.05", "-c", count, "-W", "2", *more, to, namespace=namespace)
    if f"{count} received" not in out:
        raise Failed(f"ping {to}: {out.strip()[-200:]}")


def icmp_frame(to, src, dst):
    """An echo request."""
    frame = bytearray(udp_frame(to, src, dst, 0))
    frame[23] = 1
    message = bytearray(struct.pack("!BBHHH", 8, 0, 0, 7, 1) + bytes(64))
    total = sum(struct.unpack("!36H", message))
    total = (total & 0xFFFF) + (total >> 16)
    message[2:4] = struct.pack("!H", ~total & 0xFFFF)
    frame[24:26] = b"\0\0"
    total = sum(struct.unpack("!10H", frame[14:34]))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    frame[24:26] = struct.pack("!H", ~total & 0xFFFF)
    return bytes(frame[:34] + message)
