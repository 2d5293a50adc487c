"""No inbound number is accepted twice, whatever happens in between; and what a new SA is sent at once gets through.

    burst    a new SA gets all packets of a file as fast as they can be read: not one is refused
    kill     SIGKILL at random moments while bursts arrive, each time followed by a replay of everything that was
             ever sent: the host behind the gateway sees no packet twice, and new packets get through again

The ESP packets are made here, with keys that the gateway shares.
"""

import argparse
import random
import re
import secrets
import shutil
import socket
import struct
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "peers/lib"))

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from gateway import Gateway
from netns import Failed, World, address, mac, private_file, run_cases, sh, veth, wait_for
from packets import raw_socket, udp_frame

BURST = 200_000
KILLS = 12
# Packets of one life, at most.
LIFE = 12_000
SAS = 2
PCAP = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)
FROM_FILE = """
[[port]]
name = "wan"
kind = "pcap"
side = "outside"
pcap = {{ read = "esp.pcap" }}
addresses = ["192.0.2.1/24"]
[[port]]
name = "lan"
kind = "pcap"
side = "inside"
addresses = ["10.1.0.1/24"]
[[neighbour]]
ip = "10.1.0.2"
mac = "{host}"
port = "lan"
"""
LIVE = """
[[port]]
name = "wan"
kind = "af_xdp"
side = "outside"
addresses = ["192.0.2.1/24"]
[[port]]
name = "lan"
kind = "af_xdp"
side = "inside"
addresses = ["10.1.0.1/24"]
[[neighbour]]
ip = "10.1.0.2"
mac = "{host}"
port = "lan"
"""


class Peer:
    """The other ends of the SAs: makes numbered packets, each SA with its own sequence numbers."""

    def __init__(self, esn, to):
        self.esn, self.to = esn, to
        self.keys = [secrets.token_bytes(20) for _ in range(SAS)]
        self.ciphers = [AESGCM(key[:16]) for key in self.keys]
        self.next = [1] * SAS
        self.number = 0

    def sa_file(self, first_use):
        """The gateway's ends."""
        text = []
        for n, key in enumerate(self.keys):
            text.append(
                f'[[tunnel]]\nname = "t{n}"\nlocal = "192.0.2.1"\nremote = "192.0.2.2"\nsuite = "aes-128-gcm-16"\n'
                f"esn = {str(self.esn).lower()}\nwindow = 4096\n"
                f'[[tunnel.sa]]\ndirection = "in"\nspi = {0x2000 + n}\nkey = "{key.hex()}"\n'
                f"{'first_use = true' if first_use else ''}\n"
                f'[[policy]]\nname = "p{n}"\ndirection = "in"\npriority = 1\naction = "protect"\n'
                f'tunnel = "t{n}"\nsrc = "10.2.{n}.0/24"\ndst = "10.1.0.0/24"'
            )
        return "\n".join(text) + "\n"

    def frame(self):
        """The next packet of the SA whose turn it is."""
        sa = self.number % SAS
        inner = udp_frame(self.to, f"10.2.{sa}.2", "10.1.0.2", self.number)[14:]
        inner += bytes([1, 2][: -(len(inner) + 2) % 4]) + bytes([-(len(inner) + 2) % 4, 4])
        seq = self.next[sa]
        self.next[sa] = seq + 1
        self.number += 1
        iv = struct.pack("!Q", seq)
        head = struct.pack("!II", 0x2000 + sa, seq & 0xFFFF_FFFF)
        aad = struct.pack("!IQ", 0x2000 + sa, seq) if self.esn else head
        esp = head + iv + self.ciphers[sa].encrypt(self.keys[sa][16:] + iv, inner, aad)
        outer = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(esp), 0, 0, 64, 50, 0)
        outer += socket.inet_aton("192.0.2.2") + socket.inet_aton("192.0.2.1")
        total = sum(struct.unpack("!10H", outer))
        total = (total & 0xFFFF) + (total >> 16)
        outer = outer[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + outer[12:]
        return bytes.fromhex(self.to.replace(":", "")) + bytes(6) + b"\x08\x00" + outer + esp

    def go_on_above(self, edges):
        """Numbers that count as seen are of no use any more."""
        for spi, edge in edges.items():
            self.next[spi - 0x2000] = max(self.next[spi - 0x2000], edge + 1)


def total(gateway, counter):
    """A counter of all workers."""
    return sum(w[counter] for w in gateway.ask("stats")["workers"])


def edges(gateway):
    """Highest number that counts as seen, by SPI."""
    return {int(str(sa["spi"]), 0): sa["sequence"] for sa in gateway.ask("sa", "list")}


def burst(world, program):
    """Everything at once on new SAs."""
    here = world.dir / "burst"
    here.mkdir()
    peer = Peer(True, "02:00:00:00:00:01")
    with open(here / "esp.pcap", "wb") as f:
        f.write(PCAP)
        for _ in range(BURST):
            frame = peer.frame()
            f.write(struct.pack("<IIII", 0, 0, len(frame), len(frame)) + frame)
    private_file(here / "sa.toml", peer.sa_file(True))
    config = FROM_FILE.format(host="02:00:00:00:00:02")
    g = Gateway(world, program, world.namespace("burst"), here, config, "burst.log")

    def ended():
        accepted, drops = total(g, "decrypted"), g.ask("stats")["drops"]
        return (accepted, drops) if accepted + sum(d["frames"] for d in drops) >= BURST else None

    accepted, drops = wait_for("the burst to end", ended, 60)
    g.stop()
    if accepted != BURST or drops:
        raise Failed(f"{accepted} of {BURST} were accepted; drops {drops}")
    return f"{BURST} packets at once on {SAS} new SAs: all accepted"


class Host:
    """Counts how often each numbered packet arrives."""

    def __init__(self, namespace):
        self.socket = raw_socket(namespace, "eth0")
        self.seen = {}
        self.twice = 0
        self.stopped = False
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self):
        """Until stopped and empty."""
        while True:
            try:
                frame = self.socket.recv(2048)
            except TimeoutError:
                if self.stopped:
                    return
                continue
            except OSError:
                return  # The namespace is gone: a step failed.
            if frame[23] == 17:
                number = frame[42:46]
                self.twice += number in self.seen
                self.seen[number] = True

    def stop(self):
        """Waits for what is under way."""
        self.stopped = True
        self.thread.join()


class Wire:
    """What the gateway gets, at a rate that its rings take."""

    def __init__(self, namespace):
        self.socket = raw_socket(namespace, "eth0")
        self.sent = []

    def send(self, frames):
        """In bursts."""
        for n, frame in enumerate(frames):
            self.socket.send(frame)
            if n % 64 == 63:
                time.sleep(0.0007)


def kill(world, program, seed, forget):
    """Death in the middle of bursts, and replays of everything."""
    rng = random.Random(seed)
    host_ns, middle, far = (world.namespace(f"kill-{n}") for n in ("host", "gateway", "far"))
    for ns in (host_ns, middle, far):
        sh("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1", namespace=ns)
    veth(host_ns, "eth0", middle, "lan")
    veth(middle, "wan", far, "eth0")
    address(middle, "lan", "10.1.0.1/24")
    address(middle, "wan", "192.0.2.1/24")
    here = world.dir / "kill"
    here.mkdir()
    peer = Peer(bool(seed % 2), mac(middle, "wan"))
    private_file(here / "sa.toml", peer.sa_file(True))
    config = LIVE.format(host=mac(host_ns, "eth0"))
    host, wire = Host(host_ns), Wire(far)
    replayed, gains = 0, []
    for life in range(KILLS + 1):
        g = Gateway(world, program, middle, here, config, "kill.log")
        if life == 0 and not forget:
            # The consent to a new key is for its first use.
            private_file(here / "next.toml", peer.sa_file(False))
            (here / "next.toml").rename(here / "sa.toml")
        peer.go_on_above(edges(g))
        # Everything that was ever sent, once more.
        wire.send(wire.sent)
        replayed += len(wire.sent)
        wait_for("the replays", lambda: total(g, "received") >= len(wire.sent) * 0.98)
        if host.twice:
            raise Failed(f"seed {seed}, life {life}: {host.twice} of {len(wire.sent)} replayed packets were accepted")
        # A burst that begins without warning, and death somewhere in it.
        before = len(host.seen)
        new = [peer.frame() for _ in range(rng.randrange(500, LIFE))]
        wire.sent += new
        death = rng.randrange(len(new))
        if life < KILLS:
            wire.send(new[:death])
            g.kill()
        else:
            # All of these must come through, so none may be lost in a ring before the gateway has seen it.
            for at in range(0, len(new), 256):
                wire.send(new[at : at + 256])
                due = before + min(at + 256, len(new))
                wait_for(f"{due} packets", lambda: len(host.seen) >= due)
        gains.append(len(host.seen) - before)
        if forget:
            shutil.rmtree(here / "leases")
    g.stop()
    host.stop()
    if host.twice:
        raise Failed(f"seed {seed}: {host.twice} packets were accepted twice")
    log = (world.dir / "kill.log").read_text()
    # With ESN a number left of the window stands for one of the next subspace, which no ICV agrees with.
    if not re.search(r"audit: reason=(replay_\w+|icv_mismatch) spi=0x0000200\d seq=\d+ src=192.0.2.2 dst=192.0.2.1 proto=50", log):
        raise Failed("replays are not in the audit log")
    if sum(gains) < len(wire.sent) // 8:
        raise Failed(f"of {len(wire.sent)} packets only {sum(gains)} were ever accepted")
    return (
        f"{KILLS} times killed in a burst, {sum(gains)} packets accepted, {replayed} replayed over {KILLS} lives, "
        f"none accepted twice; {gains[-1]} of {gains[-1]} in the last life"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gateway", type=Path, required=True, help="program to test")
    parser.add_argument("--keep", type=Path, help="leave configurations and logs in this new directory")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="of the moments of death; odd: with ESN")
    parser.add_argument("--forget", action="store_true", help="control: delete the leases at each death; this must fail")
    args = parser.parse_args()
    program = args.gateway.resolve()
    with World("esplanade-replay", args.keep) as world:
        bad = run_cases(world, program, {"burst": burst, "kill": lambda w, p: kill(w, p, args.seed, args.forget)})
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
