"""Every suite in every shape, both directions, in one run of the gateway."""

import itertools
import time

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, PadN
from scapy.layers.ipsec import ESP
from scapy.packet import Raw

from bed import Bed, Tunnel, forwarded, ip_class
from suites import all_suites

# Modes with the families of the outer and the inner packet.
SHAPES = [("tunnel", o, i) for o in (4, 6) for i in (4, 6)] + [("transport", 4, 4), ("transport", 6, 6)]
# Sequence numbers that the peer uses, high half and low half: out of order, then into the second subspace.
PLAIN = [(0, 1), (0, 5), (0, 3), (0, 900), (0, 2)]
EXTENDED = [(0, 1), (0, 0xF000_0000), (0, 0xFFFF_FFFF), (1, 4), (1, 0)]
# Before the packet with this index: a number beyond the edge on disk, which is refused once and moves the edge.
HERALDS = {1: (0, 0xEFFF_FFFF)}


def tunnels():
    """All combinations."""
    combinations = itertools.product(all_suites(), SHAPES, (False, True), (False, True))
    for n, (suite, (mode, outer, inner), esn, nat_t) in enumerate(combinations):
        yield Tunnel(n, suite, mode, outer, inner, esn, nat_t)


def clear_packets(t, src, dst):
    """Five packets between two hosts: lengths around every block size, several protocols, DSCP, ECN, DF."""
    n = t.number
    head = {"src": src, "dst": dst}
    kinds = [
        (UDP(sport=1000 + n % 2000, dport=7), n % 17),
        (TCP(sport=2000, dport=80, seq=n, flags="PA"), 1 + n % 33),
        (UDP(sport=3000, dport=9), 1150 + n % 16),
        (TCP(sport=2000, dport=443, flags="S", options=[("MSS", 1460)]), 0),
        (UDP(sport=5000, dport=5001), 40 + n % 64),
    ]
    for k, (upper, length) in enumerate(kinds):
        tos = (0, 0xB8, 1, 0x2A, 0)[k]
        filler = Raw(bytes((n * 7 + k + i) & 255 for i in range(length)))
        if t.inner == 4:
            ip = IP(**head, id=(n * 5 + k) & 0xFFFF, tos=tos, ttl=2 + n % 200, flags="DF" if k % 2 else 0)
            if k == 4:
                upper = ICMP(type=8, id=n & 0xFFFF, seq=k)
        else:
            ip = IPv6(**head, tc=tos, hlim=2 + n % 200, fl=n)
            if k == 4 and not t.nat_t:
                ip = ip / IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(4))])
        yield bytes(ip / upper / filler)


def expected_drops(all_tunnels):
    """The heralds, and nothing else."""
    return {"window_edge": len(HERALDS) * sum(t.esn for t in all_tunnels)}


def inbound(all_tunnels):
    """What scapy sends, and what must come out of the gateway."""
    sent, wanted = [], []
    ends = [(t, t.peer("in"), list(clear_packets(t, t.remote_host, t.near))) for t in all_tunnels]
    # One packet of each tunnel after the other: the high half of a number is told from what was authenticated
    # before, so a jump across half the space must not come in the same burst.
    for k, (plain, extended) in enumerate(zip(PLAIN, EXTENDED)):
        for t, peer, clear in ends:
            if t.esn and k in HERALDS:
                high, peer.seq_num = HERALDS[k]
                sent.append(bytes(peer.encrypt(ip_class(t.inner)(clear[k]), seq_num=peer.seq_num, esn=high)))
        for t, peer, clear in ends:
            high, low = extended if t.esn else plain
            # Scapy takes a 0 given to encrypt() for "none".
            peer.seq_num = low
            sent.append(bytes(peer.encrypt(ip_class(t.inner)(clear[k]), seq_num=low, esn=high)))
            wanted.append((t.name, forwarded(clear[k])))
    return sent, wanted


def outbound(all_tunnels):
    """What the gateway gets from inside, tunnel by tunnel."""
    return [(t, p) for t in all_tunnels for p in clear_packets(t, t.near, t.remote_host)]


def check_header(t, packet, clear):
    """The outer header of RFC 4301 section 5.1.2, and of RFC 3948 where it applies."""
    ip = ip_class(t.outer)(packet)
    inner = ip_class(t.inner)(clear)
    assert (ip.src, ip.dst) == (t.local, t.remote), f"addresses {ip.src} > {ip.dst}"
    tos = inner.tos if t.inner == 4 else inner.tc
    assert (ip.tos if t.outer == 4 else ip.tc) == tos, "DSCP or ECN"
    if t.outer == 4:
        assert ip.len == len(packet), "total length"
        again = ip.copy()
        del again.chksum
        assert ip.chksum == IP(bytes(again)).chksum, "header checksum"
        df = inner.flags.DF if t.inner == 4 else True
        assert ip.flags.DF == df, "DF"
    else:
        assert ip.plen == len(packet) - 40, "payload length"
    hops = (ip.ttl if t.outer == 4 else ip.hlim)
    was = (inner.ttl if t.inner == 4 else inner.hlim)
    assert hops == (64 if t.mode == "tunnel" else was - 1), f"TTL {hops}"
    assert bool(ip.haslayer(UDP)) == t.nat_t, "UDP encapsulation"
    if t.nat_t:
        udp = ip[UDP]
        assert (udp.sport, udp.dport) == (4500, 4500), "UDP ports"
        if t.outer == 4:
            assert udp.chksum == 0, "UDP checksum over IPv4"
        else:
            again = IPv6(packet)
            again[UDP].chksum = None
            assert udp.chksum == IPv6(bytes(again))[UDP].chksum, "UDP checksum over IPv6"


def check_trailer(t, peer, packet, number):
    """Sequence number and padding, which scapy reads without judging."""
    esp = ip_class(t.outer)(packet)[ESP]
    assert esp.seq == number, f"sequence number {esp.seq}"
    icv = peer.crypt_icv_size or peer.crypt_algo.icv_size or peer.auth_algo.icv_size
    plain = peer.crypt_algo.decrypt(peer, esp, peer.crypt_key, icv, esn_en=t.esn, esn=0)
    assert plain.padding == bytes(range(1, plain.padlen + 1)), f"padding {plain.padding.hex()}"
    assert plain.padlen < max(peer.crypt_algo.block_size, 4), f"{plain.padlen} bytes of padding"
    if t.mode == "tunnel":
        assert plain.nh == {4: 4, 6: 41}[t.inner], f"next header {plain.nh}"


def check_outbound(given, got):
    """Decrypts with scapy what the gateway sent."""
    failures = []
    numbers, nonces = {}, set()
    for (t, clear), packet in zip(given, got):
        number = numbers[t.number] = numbers.get(t.number, 0) + 1
        peer = t.peer("out")
        try:
            check_header(t, packet, clear)
            check_trailer(t, peer, packet, number)
            opened = bytes(peer.decrypt(ip_class(t.outer)(packet)))
            assert opened == forwarded(clear), f"\n  sent {forwarded(clear).hex()}\n  got  {opened.hex()}"
        except Exception as e:  # scapy raises anything on bytes it cannot read: all of it is a failure
            failures.append(f"{t.name}, packet {number}: {type(e).__name__}: {e}")
            continue
        if peer.crypt_algo.iv_size:
            esp = ip_class(t.outer)(packet)[ESP]
            iv = (t.number, esp.data[: peer.crypt_algo.iv_size])
            if iv in nonces:
                failures.append(f"{t.name}, packet {number}: IV used before")
            nonces.add(iv)
    if len(given) != len(got):
        failures.append(f"{len(given)} packets from inside, {len(got)} sent")
    return failures


def check_inbound(wanted, got):
    """Compares what the gateway decrypted with what scapy encrypted, in order."""
    came = set(got)
    failures = [f"{name}: did not come out: {want.hex()}" for name, want in wanted if want not in came]
    due = {want for _, want in wanted}
    failures += [f"nobody sent {p.hex()}" for p in got if p not in due]
    if not failures and [want for _, want in wanted] != got:
        failures.append("out of order")
    return failures


def run(gateway, directory):
    """Returns failures and a line that says what was covered."""
    all_tunnels = list(tunnels())
    sent, wanted = inbound(all_tunnels)
    given = outbound(all_tunnels)
    bed = Bed(gateway, directory / "matrix", all_tunnels)
    began = time.monotonic()
    got = bed.run(lan=[p for _, p in given], wan=sent)
    took = time.monotonic() - began
    failures = []
    if got.code != 0:
        failures.append(f"the gateway ended with {got.code}: {got.stderr[-2000:]}")
    if got.ended() != expected_drops(all_tunnels):
        failures.append(f"drops: {got.ended()}")
    failures += check_inbound(wanted, got.lan) + check_outbound(given, got.wan)
    suites = len({t.suite for t in all_tunnels})
    return failures, (
        f"{len(all_tunnels)} tunnels ({suites} suites x 6 shapes x ESN x NAT-T), {len(wanted)} packets decrypted, "
        f"{len(given)} encrypted, in one run of {took:.1f} s"
    )


def determinism(gateway, directory):
    """The same seed gives the same bytes; another seed gives other CBC IVs and nothing else."""
    chosen = [t for t in tunnels() if t.esn and t.suite.name.endswith(("-16", "-256-128"))]
    lan = [p for _, p in outbound(chosen)]
    wan, _ = inbound(chosen)
    results = {}
    for name, seed in (("first", 7), ("again", 7), ("other", 8)):
        bed = Bed(gateway, directory / f"seed-{name}", chosen)
        done = bed.run(lan=lan, wan=wan, seed=seed)
        if done.code != 0:
            return [f"the gateway ended with {done.code}: {done.stderr[-2000:]}"], ""
        results[name] = (bed.outputs(), done)
    failures = [f"drops: {done.ended()}" for _, done in results.values() if done.ended() != expected_drops(chosen)]
    if results["first"][0] != results["again"][0]:
        failures.append("two runs under one seed differ")
    first, other = results["first"][1], results["other"][1]
    if first.lan != other.lan:
        failures.append("the seed changes what is decrypted")
    given = outbound(chosen)
    for (t, _), a, b in zip(given, first.wan, other.wan):
        if (a == b) == ("cbc" in t.suite.name):
            failures.append(f"{t.name}: {'the IV does not depend on the seed' if a == b else 'the seed changes it'}")
    if len(first.wan) != len(given):
        failures.append(f"{len(given)} packets from inside, {len(first.wan)} sent")
    return failures, f"{len(chosen)} tunnels, {len(given) + len(wan)} packets, three runs"
