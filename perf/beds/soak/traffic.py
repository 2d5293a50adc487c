"""Numbered, verified packets both ways, and an eye on the wire between the gateways."""

import collections
import hashlib
import socket
import struct
import threading
import time

from keys import SIDES, SUITES, TUNNELS, of_spi
from packets import raw_socket

# Packets under way in one direction: fewer than any ring holds, so that a machine that stalls loses nothing.
UNDER_WAY = 300
# A packet that has not come for this long, seconds, is lost.
PATIENCE = 30
PORT = 2000
SOL_PACKET, PACKET_STATISTICS, PACKET_IGNORE_OUTGOING = 263, 6, 23
ETH_P_ALL = 3
# The oldest generations of a tunnel whose SAs may still send.
SENDING = 4


def checksum(header):
    """Of an IPv4 header whose own field is zero."""
    total = sum(struct.unpack(f"!{len(header) // 2}H", header))
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


def ipv4(to, src, dst, proto, payload, ttl=64, number=0, flags=0):
    """A frame; addresses as bytes."""
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), number & 0xFFFF, flags, ttl, proto, 0, src, dst)
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    return to + bytes(6) + b"\x08\x00" + head + payload


class Flow:
    """One direction: what is under way, and what became of the rest."""

    def __init__(self, seed, way, to):
        self.key, self.way, self.to = struct.pack("!QB", seed, way), way, to
        self.sent = self.got = self.late = self.lost = self.wrong = self.twice = self.leaked = 0
        self.under_way = {}
        self.wrong_frame = None

    def contents(self, n):
        """What packet `n` carries: nothing else has the same."""
        block = hashlib.blake2b(struct.pack("!Q", n), key=self.key).digest()
        size = 16 + struct.unpack_from("!H", block)[0] % 1385
        return struct.pack("!QH", n, size) + (block * (size // 64 + 1))[: size - 10]

    def frame(self, n, to=None):
        """Packet `n`, as its host sends it."""
        t = n % TUNNELS
        src, dst = (bytes((10, 1 + s, t, 9)) for s in (self.way, 1 - self.way))
        data = self.contents(n)
        udp = struct.pack("!4H", 1000 + t, PORT, 8 + len(data), 0) + data
        return ipv4(to or self.to, src, dst, 17, udp, number=n)

    def take(self, frame):
        """A frame came to the far host."""
        if len(frame) < 52 or frame[12:14] != b"\x08\x00":
            return
        if frame[29] == frame[33] == 77:
            # Sent in clear on the wire.
            self.leaked += 1
        if frame[23] != 17 or frame[29] != 9 or frame[33] != 9 or frame[36:38] != struct.pack("!H", PORT):
            return
        n = struct.unpack_from("!Q", frame, 42)[0]
        total = struct.unpack_from("!H", frame, 16)[0]
        own = self.frame(n) if n < self.sent else b""
        # Hop limit, checksum and link header are the gateways' to change.
        if frame[26 : 14 + total] != own[26:]:
            self.wrong += 1
            self.wrong_frame = self.wrong_frame or frame
        elif n in self.under_way:
            del self.under_way[n]
            self.got += 1
        else:
            self.twice += 1

    def expire(self, now):
        """Those that will not come any more."""
        for n in [n for n, at in self.under_way.items() if now - at > PATIENCE]:
            del self.under_way[n]
            self.lost += 1


class Wire:
    """What one gateway sends: no number and no nonce twice under a key, and no key that is out of use."""

    def __init__(self, way):
        self.way, self.packets = way, 0
        self.newest = [0] * TUNNELS
        self.seen = {}
        self.faults = []
        self.recent = collections.deque(maxlen=512)

    def see(self, frame):
        """A frame on its way to the other gateway."""
        at = 34
        if frame[12:14] != b"\x08\x00" or struct.unpack_from("!H", frame, 20)[0] & 0x1FFF:
            # Not IPv4, or the later part of an ESP packet that was too long.
            return
        if frame[23] == 17 and frame[36:38] == b"\x11\x94":
            at = 42
        elif frame[23] != 50:
            # Clear text, or the kernels' own.
            if frame[23] == 17 and frame[26] == 10:
                self.faults.append(f"clear text on the wire: {frame.hex()}")
            return
        number, sequence, iv = struct.unpack_from("!II8s", frame, at)
        tunnel, generation, way = of_spi(number)
        if not 0 <= tunnel < TUNNELS or way != self.way:
            self.faults.append(f"an unknown SPI {number:08x} on the wire")
            return
        self.packets += 1
        self.recent.append(frame)
        if generation > self.newest[tunnel]:
            self.newest[tunnel] = generation
            self.seen.pop((tunnel, generation - SENDING), None)
        if generation <= self.newest[tunnel] - SENDING:
            self.faults.append(f"tunnel {tunnel} sends on generation {generation}, after {self.newest[tunnel]}")
            return
        numbers, ivs = self.seen.setdefault((tunnel, generation), (set(), set()))
        if sequence in numbers or iv in ivs:
            self.faults.append(f"number {sequence}, IV {iv.hex()} twice under SPI {number:08x} ({SUITES[tunnel % len(SUITES)][0]})")
        numbers.add(sequence)
        ivs.add(iv)


class Traffic:
    """Sends and receives in a thread of its own."""

    def __init__(self, hosts, wire, macs, seed, rate):
        """`hosts`: namespaces by side. `wire`: namespace whose interfaces are named by the side that they lead to."""
        self.rate = rate
        self.flows = [Flow(seed, way, macs[side]) for way, side in enumerate(SIDES)]
        self.wires = [Wire(way) for way in (0, 1)]
        self.hosts = [raw_socket(hosts[side], "eth0") for side in SIDES]
        self.taps = []
        for side in SIDES:
            tap = raw_socket(wire, side, ETH_P_ALL)
            tap.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
            self.taps.append(tap)
        for s in self.hosts + self.taps:
            s.setblocking(False)
        self.sending = self.running = True
        self.missed = 0
        self.failure = None
        self.thread = threading.Thread(target=self.guarded, daemon=True)
        self.thread.start()

    def full(self):
        """Whether the gateways are behind: others should not send more either."""
        return any(len(f.under_way) > UNDER_WAY // 2 for f in self.flows)

    def guarded(self):
        """The thread. Its failure is the run's."""
        try:
            self.work()
        except Exception as e:  # noqa: BLE001
            self.failure = e

    def work(self):
        """Sends what is due, takes what has come."""
        last, due, looked = time.monotonic(), 0.0, 0.0
        while self.running:
            now = time.monotonic()
            due = min(due + (now - last) * self.rate, 64.0)
            last = now
            for _ in range(int(due) if self.sending else 0):
                due -= 1
                for flow, host in zip(self.flows, self.hosts):
                    if len(flow.under_way) < UNDER_WAY:
                        frame = flow.frame(flow.sent)
                        flow.under_way[flow.sent] = now
                        flow.sent += 1
                        host.send(frame)
            for flow, host in zip(self.flows, reversed(self.hosts)):
                drain(host, flow.take)
            for wire, tap in zip(self.wires, self.taps):
                drain(tap, wire.see)
            if now - looked > 1:
                looked = now
                for flow in self.flows:
                    flow.expire(now)
                for s in self.hosts + self.taps:
                    self.missed += struct.unpack("II", s.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))[1]
            time.sleep(0.004)

    def finish(self):
        """Waits for what is under way."""
        self.sending = False
        deadline = time.monotonic() + PATIENCE + 5
        while any(f.under_way for f in self.flows) and time.monotonic() < deadline and self.thread.is_alive():
            time.sleep(0.1)

    def stop(self):
        """Ends the thread."""
        self.running = False
        self.thread.join()


def drain(sock, take):
    """All that has come, some hundred at a time."""
    for _ in range(256):
        try:
            frame = sock.recv(2048, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        take(frame)
