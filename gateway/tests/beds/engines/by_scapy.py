"""Every suite of every engine in every mode and direction, held against scapy's IPsec layer."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "peers/scapy"))

from netns import Failed, mac
from packets import raw_socket
from pair import OUTER, Pair
from scapy.layers.inet import IP, UDP
from scapy.layers.ipsec import ESP, SecurityAssociation
from scapy.packet import Raw
from suites import all_suites

SIZES = (0, 1, 37, 512, 1300)
# What each engine carries: kind, mode, ciphers.
CARRIED = (("eip93", "crypto", ("cbc", "ctr")), ("eip93", "packet", ("cbc",)), ("soe", "packet", ("cbc",)))


def tunnels(kind):
    """Mode and suite of each tunnel that the engine is given."""
    macs = ("hmac-sha1-96", "hmac-sha2-256-128")
    for k, mode, ciphers in CARRIED:
        for s in all_suites() if k == kind else ():
            if s.name.endswith(macs) and any(f"-{c}+" in s.name for c in ciphers):
                yield mode, s


class Peer:
    """One tunnel as scapy sees it."""

    def __init__(self, number, suite, spi, material):
        self.number, self.net = suite, number
        self.sas = {}
        for n, sender in enumerate(OUTER):
            far = OUTER["right" if sender == "left" else "left"]
            self.sas[sender] = SecurityAssociation(
                ESP,
                spi=spi + n,
                crypt_algo=suite.crypt,
                crypt_key=bytes.fromhex(material[n][0]),
                auth_algo=suite.auth,
                auth_key=bytes.fromhex(material[n][1]),
                tunnel_header=IP(src=OUTER[sender], dst=far),
            )

    def inner(self, sender, size):
        """A packet from one side's host to the other's."""
        own, far = (1, 2) if sender == "left" else (2, 1)
        body = bytes((self.net + n) & 0xFF for n in range(size))
        return IP(src=f"10.{own}.{self.net}.2", dst=f"10.{far}.{self.net}.2") / UDP(sport=4000, dport=9) / Raw(body)


def listen(sock, wanted, count, patience=10):
    """So many packets that are wanted, without their Ethernet headers."""
    sock.settimeout(0.2)
    got, deadline = [], time.monotonic() + patience
    while len(got) < count and time.monotonic() < deadline:
        try:
            frame = sock.recv(2048)
        except TimeoutError:
            continue
        packet = IP(frame[14:])
        packet = IP(bytes(packet)[: packet.len])
        if wanted(packet):
            got.append(packet)
    return got


def interop(world, program, bed, kind, made):
    """One engine. `made` is the bed's module, whose helpers make configurations."""
    pair = Pair(world, program, f"scapy{kind}")
    path = bed.serve(world, kind, f"scapy-{kind}")[1]
    text, peers = "", []
    for n, (mode, suite) in enumerate(tunnels(kind)):
        of = (suite.name, suite.key, suite.auth_key)
        material, spi = made.keys(of), 0x3000 + 16 * n
        text += made.sas("left", of, material, spi, (kind, mode), f"t{n}") + made.policies("left", f"t{n}", str(n))
        peers.append(Peer(n, suite, spi, material))
    pair.start("left", made.config(pair, "left", path, kind, len(peers)), text)
    host, wire = raw_socket(pair.host("left"), "eth0"), raw_socket(pair.ns["right"], "wan")
    to_gateway = bytes.fromhex(pair.mac["left", "lan"].replace(":", "")) + bytes(6) + b"\x08\x00"
    to_wan = bytes.fromhex(pair.mac["left", "wan"].replace(":", "")) + bytes.fromhex(mac(pair.ns["right"], "wan").replace(":", "")) + b"\x08\x00"
    for peer in peers:
        sent = [peer.inner("left", size) for size in SIZES]
        for packet in sent:
            host.send(to_gateway + bytes(packet))
        spi = peer.sas["left"].spi
        sealed = listen(wire, lambda p, spi=spi: p.proto == 50 and p[ESP].spi == spi, len(sent))
        opened = [peer.sas["left"].decrypt(p) for p in sealed]
        if [bytes(p[UDP]) for p in opened] != [bytes(p[UDP]) for p in sent]:
            raise Failed(f"{kind}, {peer.number.name}: {len(sent)} sent, {len(sealed)} sealed, which scapy opens to something else; {pair.drops()}")
        sent = [peer.inner("right", size) for size in SIZES]
        for packet in sent:
            wire.send(to_wan + bytes(peer.sas["right"].encrypt(packet)))
        source = sent[0].src
        opened = listen(host, lambda p, source=source: p.src == source, len(sent))
        if [bytes(p[UDP]) for p in opened] != [bytes(p[UDP]) for p in sent]:
            raise Failed(f"{kind}, {peer.number.name}: of {len(sent)} packets that scapy sealed {len(opened)} came, or others; {pair.drops()}")
    told, drops = pair.gateways["left"].ask("engines")[0], pair.drops()["left"]
    pair.stop()
    if told["state"] != "serving" or drops or told["submitted"] < 2 * len(SIZES) * len(peers):
        raise Failed(f"{kind}: {told}, drops {drops}")
    return f"{kind} {len(peers)} tunnels"
