"""Runs the gateway over capture files: one pcap in and one out on each side, one process for everything."""

import json
import random
import subprocess
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.ipsec import ESP, SecurityAssociation
from scapy.utils import RawPcapReader, RawPcapWriter

from suites import Suite

LOCAL = {4: "192.0.2.1", 6: "2001:db8:ffff::1"}
CONFIG = """
sa_files = ["sa.toml"]
[workers]
count = 1
[memory]
frames = 8192
huge = "never"
lock = false
[leases]
path = "leases"
[metrics]
enabled = false
[api]
enabled = false
[log]
level = "warn"
[reassembly]
enabled = {reassembly}
[[port]]
name = "lan"
kind = "pcap"
side = "inside"
mtu = 1500
addresses = ["10.0.0.1/24", "fd00::1/64"]
pcap = {{ read = "lan-in.pcap", write = "lan-out.pcap" }}
[[port]]
name = "wan"
kind = "pcap"
side = "outside"
mtu = 1500
addresses = ["192.0.2.1/24", "2001:db8:ffff::1/64"]
pcap = {{ read = "wan-in.pcap", write = "wan-out.pcap" }}
[[route]]
to = "10.1.0.0/16"
via = "10.0.0.254"
[[route]]
to = "fd01::/64"
via = "fd00::fe"
[[route]]
to = "198.18.0.0/15"
via = "192.0.2.254"
[[route]]
to = "2001:db8:eeee::/64"
via = "2001:db8:ffff::fe"
[[neighbour]]
ip = "10.0.0.254"
mac = "02:00:00:00:01:fe"
port = "lan"
[[neighbour]]
ip = "fd00::fe"
mac = "02:00:00:00:01:fe"
port = "lan"
[[neighbour]]
ip = "192.0.2.254"
mac = "02:00:00:00:02:fe"
port = "wan"
[[neighbour]]
ip = "2001:db8:ffff::fe"
mac = "02:00:00:00:02:fe"
port = "wan"
"""


def ip_class(version):
    """Scapy's header of that version."""
    return IP if version == 4 else IPv6


@dataclass
class Tunnel:
    """One tunnel of the gateway with an SA in each direction, and scapy's ends of both."""

    number: int
    suite: Suite
    mode: str = "tunnel"
    outer: int = 4
    inner: int = 4
    esn: bool = False
    nat_t: bool = False
    extra: str = ""
    keys: dict = field(default_factory=dict)

    def __post_init__(self):
        n = self.number
        rng = random.Random(n)
        for direction in ("out", "in"):
            self.keys[direction] = (rng.randbytes(self.suite.key), rng.randbytes(self.suite.auth_key))
        host = {4: ("10.1.{}.{}", "10.2.{}.{}"), 6: ("fd01::{:x}:{:x}", "fd02::{:x}:{:x}")}
        far = {4: "198.18.{}.{}", 6: "2001:db8:eeee::{:x}:{:x}"}
        number = divmod(n + 1, 256)
        # The networks behind the gateway and behind the peer, and the two ends of the tunnel.
        self.near, self.remote_host = (str(ip_address(h.format(*number))) for h in host[self.inner])
        self.remote = str(ip_address(far[self.outer].format(*number)))
        self.local = LOCAL[self.outer]
        if self.mode == "transport":
            self.local, self.remote_host = self.near, self.remote

    @property
    def name(self):
        """Says in a failure which combination it was."""
        parts = [self.suite.name, self.mode, f"v{self.inner}-in-v{self.outer}"]
        parts += ["esn"] * self.esn + ["nat-t"] * self.nat_t
        return " ".join(parts)

    def spi(self, direction):
        """SPI of the gateway's SA of that direction."""
        return (0x1000_0000 if direction == "out" else 0x2000_0000) + self.number

    def toml(self):
        """The tunnel, its SAs and its policies in the gateway's own format."""
        lines = [
            "[[tunnel]]",
            f'name = "t{self.number}"',
            f'local = "{self.local}"',
            f'remote = "{self.remote}"',
            f'mode = "{self.mode}"',
            f'suite = "{self.suite.name}"',
            f"esn = {str(self.esn).lower()}",
            f"nat_t = {str(self.nat_t).lower()}",
            f"allow_weak = {str(self.suite.weak).lower()}",
            self.extra,
        ]
        for direction in ("out", "in"):
            key, auth = self.keys[direction]
            lines += ["[[tunnel.sa]]", f'direction = "{direction}"', f"spi = {self.spi(direction)}"]
            lines += [f'key = "{key.hex()}"'] if key else []
            lines += [f'auth_key = "{auth.hex()}"'] if auth else []
            lines += ["first_use = true"]
        ends = {"out": (self.near, self.remote_host), "in": (self.remote_host, self.near)}
        for direction, (src, dst) in ends.items():
            lines += [
                "[[policy]]",
                f'name = "t{self.number}-{direction}"',
                f'direction = "{direction}"',
                "priority = 10",
                'action = "protect"',
                f'tunnel = "t{self.number}"',
                f'src = "{src}"',
                f'dst = "{dst}"',
            ]
        return "\n".join(lines) + "\n"

    def peer(self, direction):
        """Scapy's SA for what the gateway sends ("out") or receives ("in")."""
        ends = {"out": (self.local, self.remote), "in": (self.remote, self.local)}
        src, dst = ends[direction]
        key, auth = self.keys[direction]
        header = ip_class(self.outer)(src=src, dst=dst) if self.mode == "tunnel" else None
        return SecurityAssociation(
            ESP,
            spi=self.spi(direction),
            crypt_algo=self.suite.crypt,
            crypt_key=key or None,
            auth_algo=self.suite.auth,
            auth_key=auth or None,
            tunnel_header=header,
            nat_t_header=UDP(sport=4500, dport=4500) if self.nat_t else None,
            esn_en=self.esn,
        )


@dataclass
class Outcome:
    """What a run of the gateway left behind."""

    code: int
    stderr: str
    lan: list
    wan: list
    stats: dict

    def ended(self):
        """Frames dropped, by reason."""
        return {d["reason"]: d["frames"] for d in self.stats.get("drops", [])}

    def consumed(self):
        """Frames that ended for a good reason, by kind."""
        return {c["kind"]: c["frames"] for c in self.stats.get("consumed", [])}


class Bed:
    """A directory with the gateway's configuration and captures."""

    def __init__(self, gateway: Path, directory: Path, tunnels, more="", reassembly=True):
        self.gateway = gateway
        self.dir = directory
        self.dir.mkdir(parents=True)
        (self.dir / "gateway.toml").write_text(CONFIG.format(reassembly=str(reassembly).lower()))
        keys = self.dir / "sa.toml"
        keys.touch(mode=0o600)
        keys.write_text("".join(t.toml() for t in tunnels) + more)

    def run(self, lan=(), wan=(), seed=1) -> Outcome:
        """Feeds IP packets to both sides, returns what came out as IP packets."""
        write(self.dir / "lan-in.pcap", lan)
        write(self.dir / "wan-in.pcap", wan)
        command = [self.gateway, "run", "--config", self.dir / "gateway.toml", "--exit-when-idle"]
        command += ["--json"] if seed is None else ["--json", "--test-seed", str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        stats = json.loads(done.stdout) if done.stdout.strip() else {}
        out = [read(self.dir / f"{side}-out.pcap") for side in ("lan", "wan")]
        return Outcome(done.returncode, done.stderr, *out, stats)

    def outputs(self):
        """The bytes of the captures that the gateway wrote."""
        return [(self.dir / f"{side}-out.pcap").read_bytes() for side in ("lan", "wan")]


MACS = bytes.fromhex("02000000000c 0200000000fe")


def write(path, packets):
    """Writes IP packets (or whole frames, when they are tuples) as Ethernet."""
    writer = RawPcapWriter(str(path), linktype=1)
    writer.write_header(None)
    for p in packets:
        if isinstance(p, tuple):
            frame = p[0]
        else:
            frame = MACS + (b"\x08\x00" if p[0] >> 4 == 4 else b"\x86\xdd") + p
        writer.write_packet(frame)
    writer.close()


def read(path):
    """The IP packets of a capture; their Ethernet headers must be right."""
    if not path.exists():
        return []
    packets = []
    with RawPcapReader(str(path)) as reader:
        for frame, _ in reader:
            side = 1 if path.name.startswith("lan") else 2
            assert frame[:6] == bytes([2, 0, 0, 0, side, 0xFE]), f"link address {frame[:6].hex()}"
            want = b"\x08\x00" if frame[14] >> 4 == 4 else b"\x86\xdd"
            assert frame[12:14] == want, "ethertype"
            packets.append(frame[14:])
    return packets


def forwarded(packet: bytes) -> bytes:
    """The packet one hop later."""
    version = packet[0] >> 4
    p = ip_class(version)(packet)
    if version == 4:
        p.ttl -= 1
        del p.chksum
    else:
        p.hlim -= 1
    return bytes(p)
