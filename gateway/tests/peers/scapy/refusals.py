"""What must not pass, each with its reason: forged, replayed, malformed and misplaced packets."""

from scapy.layers.inet import IP, UDP, fragment
from scapy.layers.inet6 import IPv6
from scapy.layers.ipsec import ESP, NAT_KEEPALIVE, NON_ESP, _ESPPlain
from scapy.packet import Raw

from bed import LOCAL, Bed, Tunnel, forwarded, ip_class
from suites import all_suites

SUITES = [
    "aes-128-gcm-8",
    "aes-256-gcm-16",
    "aes-192-gmac",
    "chacha20-poly1305",
    "aes-128-cbc+hmac-sha1-96",
    "aes-256-cbc+hmac-sha2-512-256",
    "aes-128-ctr+hmac-sha2-256-128",
    "null+hmac-sha2-384-192",
]


class Script:
    """Packets in order, with what is to become of each."""

    def __init__(self):
        self.packets = []
        self.delivered = []
        self.ended = {}
        self.consumed = {}

    def passes(self, packet, clear):
        """Must come out as `clear`."""
        self.packets.append(bytes(packet))
        self.delivered.append(clear)

    def dropped(self, packet, reason):
        """Must be counted under `reason`."""
        self.packets.append(packet if isinstance(packet, tuple) else bytes(packet))
        self.ended[reason] = self.ended.get(reason, 0) + 1

    def eaten(self, packet, kind, frames=1):
        """Must be consumed."""
        if packet is not None:
            self.packets.append(bytes(packet))
        self.consumed[kind] = self.consumed.get(kind, 0) + frames


class Peer:
    """One tunnel's far end, able to lie."""

    def __init__(self, tunnel):
        self.t = tunnel
        self.sa = tunnel.peer("in")
        self.seq = 0

    def clear(self, length=60, src=None, dst=None, **fields):
        """A packet from the peer's network to ours."""
        head = ip_class(self.t.inner)(src=src or self.t.remote_host, dst=dst or self.t.near, **fields)
        return bytes(head / UDP(sport=1, dport=2) / Raw(bytes(range(length))))

    def seal(self, clear, seq=None):
        """As scapy does it; the next number when none is given."""
        if seq is None:
            self.seq += 1
            seq = self.seq
        self.sa.seq_num = seq
        return self.sa.encrypt(ip_class(self.t.inner)(clear), seq_num=seq)

    def craft(self, payload, next_header, padding=None, pad_len=None, outer=None):
        """Properly signed, but with any payload, padding and next header."""
        self.seq += 1
        algo = self.sa.crypt_algo
        esp = _ESPPlain(spi=self.sa.spi, seq=self.seq, iv=algo.generate_iv())
        esp.data = Raw(payload)
        esp.nh = next_header
        if padding is None:
            algo.pad(esp)
        else:
            esp.padding = padding
            esp.padlen = len(padding) if pad_len is None else pad_len
        if pad_len is not None:
            esp.padlen = pad_len
        body = algo.encrypt(self.sa, esp, self.sa.crypt_key, self.sa.crypt_icv_size)
        self.sa.auth_algo.sign(body, self.sa.auth_key)
        return ip_class(self.t.outer)(bytes((outer or self.sa.tunnel_header) / body))


def flipped(packet, at):
    """One bit of the ESP packet inverted; the IP header stays right."""
    data = bytearray(bytes(packet))
    data[at] ^= 0x10
    return bytes(data)


def rebuilt(packet, data):
    """The packet with another ESP payload of any length."""
    p = packet.copy()
    p[ESP].data = data
    if p.version == 4:
        del p.len, p.chksum
    else:
        del p.plen
    return bytes(p)


def forged(s, peer):
    """Authenticity: RFC 4303 section 3.4.4."""
    head = 20 if peer.t.outer == 4 else 40
    for where in ("sequence number", "body", "icv"):
        good = peer.seal(peer.clear())
        at = {"sequence number": head + 6, "body": head + 30, "icv": len(bytes(good)) - 1}[where]
        s.dropped(flipped(good, at), "icv_mismatch")
    far = peer.seal(peer.clear(), seq=0x7FFF_0000)
    s.dropped(flipped(far, len(bytes(far)) - 3), "icv_mismatch")
    # The forged packet far ahead has not moved the window: the next number is still new.
    clear = peer.clear()
    s.passes(peer.seal(clear), forwarded(clear))


def replayed(s, peer):
    """The window: RFC 4303 section 3.4.3. The default one holds 1024 packets."""
    clear = peer.clear()
    first = peer.seal(clear)
    s.passes(first, forwarded(clear))
    s.dropped(first, "replay_duplicate")
    s.dropped(peer.seal(clear, seq=0), "sequence_invalid")
    top = peer.seq + 5000
    for number, verdict in [
        (top, None),
        (top - 1024, "replay_old"),
        (top - 1023, None),
        (top - 1023, "replay_duplicate"),
        (top, "replay_duplicate"),
        (peer.seq, "replay_old"),
    ]:
        packet = peer.seal(clear, seq=number)
        if verdict:
            s.dropped(packet, verdict)
        else:
            s.passes(packet, forwarded(clear))
    peer.seq = top


def padded(s, peer):
    """Padding, dummies, traffic-flow confidentiality: RFC 4303 sections 2.4, 2.6, 2.7."""
    clear = peer.clear()
    nh = {4: 4, 6: 41}[peer.t.inner]
    block = max(peer.sa.crypt_algo.block_size, 4)
    pad = -(len(clear) + 2) % block
    long = bytes(i + 1 for i in range(pad + block * (200 // block)))
    s.passes(peer.craft(clear, nh, padding=long), forwarded(clear))
    s.dropped(peer.craft(clear, nh, padding=bytes(len(long))), "bad_padding")
    s.dropped(peer.craft(clear, nh, padding=long[:-1] + b"\xff"), "bad_padding")
    s.dropped(peer.craft(clear, nh, padding=b"\x02" + long[1:]), "bad_padding")
    s.dropped(peer.craft(clear, nh, padding=long[:pad], pad_len=255), "bad_padding")
    # Whoever claims less padding than there is makes the rest part of the payload: harmless TFC padding.
    s.passes(peer.craft(clear + bytes(64), nh), forwarded(clear))
    s.passes(peer.craft(clear + b"\xa5" * 301, nh), forwarded(clear))
    s.eaten(peer.craft(bytes(40), 59), "dummy")
    s.eaten(peer.craft(b"", 59), "dummy")


def misshapen(s, peer):
    """Authentic, but not what a tunnel carries."""
    t = peer.t
    clear = peer.clear()
    nh, other = (4, 41) if t.inner == 4 else (41, 4)
    s.dropped(peer.craft(clear, 6), "bad_next_header")
    s.dropped(peer.craft(clear, 255), "bad_next_header")
    s.dropped(peer.craft(clear, other), "inner_malformed")
    s.dropped(peer.craft(clear[:10], nh), "inner_malformed")
    s.dropped(peer.craft(b"", nh), "inner_malformed")
    s.dropped(peer.craft(clear[:-8], nh), "inner_malformed")
    # Not what the SA was negotiated for.
    foreign = {4: "10.3.3.3", 6: "fd03::3"}[t.inner]
    s.dropped(peer.seal(peer.clear(src=foreign)), "selector_mismatch")
    # Congestion was experienced on the way, but the inner packet's sender does not understand the mark.
    mark = {4: "tos", 6: "tc"}
    outer = peer.sa.tunnel_header.copy()
    setattr(outer, mark[t.outer], 3)
    s.dropped(peer.craft(clear, nh, outer=outer), "ecn_invalid")
    capable = peer.clear(**{mark[t.inner]: 2})
    marked = peer.clear(**{mark[t.inner]: 3})
    s.passes(peer.craft(capable, nh, outer=outer), forwarded(marked))


def cut(s, peer):
    """Lengths that no key is needed to judge."""
    good = peer.seal(peer.clear())
    data = good[ESP].data
    s.dropped(rebuilt(good, data[:6]), "esp_too_short")
    s.dropped(rebuilt(good, data[:-1]), "esp_too_short")
    s.dropped(rebuilt(good, data + b"\0"), "esp_too_short")
    # A multiple of the block less: the ICV is not where it was.
    block = max(peer.sa.crypt_algo.block_size, 4)
    s.dropped(rebuilt(good, data[:-block]), "icv_mismatch")


def misplaced(s, peers):
    """Outside of any SA."""
    peer = peers[0]
    t = peer.t
    clear = peer.clear()
    unknown = peer.seal(clear)
    unknown[ESP].spi ^= 0xFFFF
    s.dropped(unknown, "sa_not_found")
    reserved = peer.seal(clear)
    reserved[ESP].spi = 200
    s.dropped(reserved, "sa_not_found")
    # Plain ESP on an SA behind NAT, and the reverse.
    behind = next(p for p in peers if p.t.nat_t)
    bare = behind.seal(behind.clear())
    s.dropped(IP(src=bare.src, dst=bare.dst, proto=50) / bytes_of_esp(bare), "encap_mismatch")
    plain = peer.seal(clear)
    s.dropped(IP(src=plain.src, dst=plain.dst) / UDP(sport=4500, dport=4500) / bytes_of_esp(plain), "encap_mismatch")
    # UDP 4500 carries more than ESP: RFC 3948 section 2.
    behind_nat = IP(src=t.remote, dst=LOCAL[4])
    s.eaten(behind_nat / UDP(sport=4500, dport=4500) / NAT_KEEPALIVE(), "nat_keepalive")
    s.dropped(behind_nat / UDP(sport=4500, dport=4500) / NON_ESP() / Raw(bytes(28)), "not_for_us")
    s.dropped(behind_nat / UDP(sport=500, dport=500) / Raw(bytes(28)), "not_for_us")
    # Clear text that must come protected, and clear text that no policy knows.
    s.dropped(clear, "policy_must_protect")
    s.dropped(IP(src="198.18.200.1", dst="10.1.250.1") / UDP(sport=1, dport=2), "policy_discard")
    # Broken before ESP is reached.
    broken = bytearray(bytes(peer.seal(clear)))
    broken[8] ^= 1
    s.dropped(bytes(broken), "ip_checksum")
    s.dropped(bytes(peer.seal(clear))[:-9], "ip_malformed")
    s.dropped((b"\x02\0\0\0\0\x0c",), "l2_malformed")


def bytes_of_esp(packet):
    """The ESP packet alone."""
    return Raw(bytes(packet[ESP]))


def inbound_script(peers):
    """Everything that a peer can do wrong."""
    s = Script()
    for peer in peers:
        if not peer.t.nat_t:
            for case in (forged, replayed, padded, misshapen, cut):
                case(s, peer)
    misplaced(s, peers)
    for peer in peers:
        clear = peer.clear()
        s.passes(peer.seal(clear), forwarded(clear))
    return s


def tunnels():
    """The suites in mixed families, and one behind NAT."""
    by_name = {s.name: s for s in all_suites()}
    families = [(4, 4), (4, 6), (6, 4), (6, 6)]
    made = [Tunnel(n, by_name[name], "tunnel", *families[n % 4]) for n, name in enumerate(SUITES)]
    made.append(Tunnel(len(made), by_name["aes-128-gcm-16"], nat_t=True))
    return made


def compare(script, got, delivered):
    """Exact: what came out, what was counted, and that the account balances."""
    failures = []
    if got.code != 0:
        failures.append(f"the gateway ended with {got.code}: {got.stderr[-2000:]}")
    if delivered != script.delivered:
        lost = [p.hex() for p in script.delivered if p not in delivered]
        extra = [p.hex() for p in delivered if p not in script.delivered]
        failures.append(f"{len(delivered)} delivered, {len(script.delivered)} wanted; lost {lost[:3]}; extra {extra[:3]}")
    for what, want, have in (("drops", script.ended, got.ended()), ("consumed", script.consumed, got.consumed())):
        if want != have:
            wrong = {k: (want.get(k, 0), have.get(k, 0)) for k in want | have if want.get(k, 0) != have.get(k, 0)}
            failures.append(f"{what} (wanted, counted): {wrong}")
    return failures


def inbound(gateway, directory):
    """Packets that a gateway must refuse."""
    made = tunnels()
    script = inbound_script([Peer(t) for t in made])
    got = Bed(gateway, directory / "refusals", made).run(wan=script.packets)
    return compare(script, got, got.lan), (
        f"{sum(script.ended.values())} packets dropped for {len(script.ended)} reasons, "
        f"{len(script.delivered)} between them delivered"
    )


def fragments(gateway, directory):
    """ESP packets that a router on the way has fragmented."""
    by_name = {s.name: s for s in all_suites()}
    failures, told = [], []
    for reassembly in (True, False):
        # The gateway's end must be its own address: only then are the fragments its business.
        t = Tunnel(0, by_name["aes-256-gcm-16"])
        peer = Peer(t)
        s = Script()
        for _ in range(8):
            clear = bytes(IP(src=t.remote_host, dst=t.near) / UDP(sport=1, dport=2) / Raw(bytes(1300)))
            pieces = [bytes(f) for f in fragment(peer.seal(clear), fragsize=480)]
            # Last piece first: order must not matter.
            for piece in reversed(pieces):
                if reassembly:
                    s.packets.append(piece)
                else:
                    s.dropped(piece, "fragment_off")
            if reassembly:
                # One frame goes on with the whole packet, the others are merged into it.
                s.eaten(None, "reassembled", len(pieces) - 1)
                s.delivered.append(forwarded(clear))
        got = Bed(gateway, directory / f"fragments-{reassembly}", [t], reassembly=reassembly).run(wan=s.packets)
        failures += compare(s, got, got.lan)
        told.append(f"{len(s.packets)} fragments {'reassembled' if reassembly else 'refused'}")
    return failures, ", ".join(told)


def outbound(gateway, directory):
    """Limits and policy on the way out."""
    by_name = {s.name: s for s in all_suites()}
    t = Tunnel(0, by_name["aes-256-gcm-16"], extra="hard = { packets = 10 }")
    free = Tunnel(1, by_name["aes-256-gcm-16"], extra='df = "clear"')
    strict = Tunnel(2, by_name["aes-256-gcm-16"])
    s = Script()

    def clear(tunnel, n, length=100, **fields):
        return bytes(IP(src=tunnel.near, dst=tunnel.remote_host, id=n, **fields) / UDP(sport=1, dport=2) / Raw(bytes(length)))

    # Packet 10 passes, packet 11 is the first that does not: the limit is exact.
    for n in range(15):
        packet = clear(t, n)
        if n < 10:
            s.passes(packet, forwarded(packet))
        else:
            s.dropped(packet, "hard_packets")
    s.dropped(bytes(IP(src=t.near, dst="10.9.9.9") / UDP(sport=1, dport=2)), "policy_discard")
    s.dropped(bytes(IPv6(src="fd01::1", dst="fd09::1") / UDP(sport=1, dport=2)), "policy_discard")
    s.dropped(clear(strict, 1, ttl=1), "ttl_expired")
    s.dropped(clear(strict, 2, length=1450, flags="DF"), "too_big")
    whole = clear(free, 3, length=1440)
    s.packets.append(whole)
    got = Bed(gateway, directory / "outbound", [t, free, strict]).run(lan=s.packets)
    if got.code != 0:
        return [f"the gateway ended with {got.code}: {got.stderr[-2000:]}"], ""
    opened, pieces = [], []
    for packet in got.wan:
        p = IP(packet)
        if p.flags.MF or p.frag:
            pieces.append(p)
        else:
            opened.append(bytes(t.peer("out").decrypt(p)))
    failures = compare(s, got, opened)
    # The packet that is too big leaves in fragments of its outer packet, because DF is clear.
    body = b"".join(bytes(p.payload) for p in sorted(pieces, key=lambda p: p.frag))
    joined = IP(src=free.local, dst=free.remote, proto=50) / Raw(body)
    if bytes(free.peer("out").decrypt(IP(bytes(joined)))) != forwarded(whole):
        failures.append("the fragments do not make up the packet")
    # Whoever sent what was dropped is told: time exceeded, and too big with an MTU that does fit.
    told = [IP(p) for p in got.lan]
    kinds = sorted((p.src, p.dst, p.payload.type, p.payload.code) for p in told)
    if kinds != [("10.0.0.1", strict.near, 3, 4), ("10.0.0.1", strict.near, 11, 0)]:
        failures.append(f"ICMP errors: {kinds}")
    mtus = [p.payload.nexthopmtu for p in told if p.payload.type == 3]
    probes = [clear(strict, 4, length=m - 28 + more, flags="DF") for m in mtus for more in (0, 1)]
    fits = Bed(gateway, directory / "fits", [strict]).run(lan=probes)
    if len(fits.wan) != len(mtus) or fits.ended() != {"too_big": len(mtus)}:
        failures.append(f"of MTU {mtus} and one byte more, {len(fits.wan)} fit, drops {fits.ended()}")
    return failures, f"{len(s.packets)} packets from inside; exact hard limit, ICMP errors, fragmentation after encryption"
