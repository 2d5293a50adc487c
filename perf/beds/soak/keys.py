"""The tunnels of the soak: both sides' SA files, and successors for their SAs."""

import hashlib
import os
import secrets
import threading
import time

from netns import private_file

SIDES = ("left", "right")
TUNNELS = 24
# Outer addresses of a side, which its tunnels share; each is reached over a router of its own.
OUTER = {"left": [f"198.51.100.{k}" for k in range(1, 9)], "right": [f"203.0.113.{k}" for k in range(1, 9)]}
# With lengths of key and authentication key, bytes.
SUITES = (
    ("aes-128-gcm-16", 20, 0),
    ("chacha20-poly1305", 36, 0),
    ("aes-256-cbc+hmac-sha2-256-128", 32, 32),
    ("aes-256-gcm-16", 36, 0),
    ("aes-128-ctr+hmac-sha2-256-128", 20, 32),
)
# How long an SA is used, seconds: by time, or by what is sent in that time.
LIFE = 15
MEAN_BYTES = 750
# The first of the tunnels without soft limits, of which every fourth is one: a thread of the test rekeys them.
BY_FILES = 3

# Sets of tunnels that carry nothing, and what their keys are made of.
POOLS = 16
SECRET = secrets.token_bytes(32)

HOOK = """#!/bin/sh
# Asks the test for a successor; one time in ten it fails.
[ "$(od -An -N1 -tu1 /dev/urandom)" -ge 26 ] || {{ echo "no answer" >&2; exit 1; }}
printf '%s %s\\n' "$1" "$2" > {fifo}
"""


def spi(tunnel, generation, direction):
    """Tells tunnel, generation and direction: 0 is from left to right."""
    return (tunnel + 1) << 20 | generation << 1 | direction


def of_spi(number):
    """Tunnel, generation and direction."""
    return (number >> 20) - 1, number >> 1 & 0x7FFFF, number & 1


def inner(side, tunnel):
    """The network of a side that a tunnel protects."""
    return f"10.{SIDES.index(side) + 1}.{tunnel}.0/24"


def limits(tunnel, rate):
    """Soft limits of a tunnel, at so many packets per second; hard ones that a rekey must come before."""
    packets = rate / TUNNELS * LIFE
    kind = tunnel % 4
    if kind == 0:
        return f"soft = {{ packets = {int(packets)} }}\nhard = {{ packets = {int(packets * 20)} }}\n"
    if kind == 1:
        return f"soft = {{ bytes = {int(packets * MEAN_BYTES)} }}\n"
    return f"soft = {{ time = {LIFE} }}\nhard = {{ time = {LIFE * 20} }}\n" if kind == 2 else ""


class Keys:
    """Makes SA files. Each pair of SAs has keys and SPIs of its own, in all of the run."""

    def __init__(self, dirs, rate, rng):
        self.dirs, self.rate, self.rng = dirs, rate, rng
        self.generation = [0] * TUNNELS
        self.pairs = [[] for _ in range(TUNNELS)]
        self.lock = threading.Lock()
        self.made = self.asked = 0
        self.turn = TUNNELS
        for d in dirs.values():
            d.mkdir(parents=True)
        for t in range(TUNNELS):
            self.renew(t, slowly=False)

    def renew(self, tunnel, slowly=True, old=None):
        """A successor: one side's file first, the other's soon after. With `old`: only for the generation of that SA."""
        with self.lock:
            if old is not None and old != f"t{tunnel}-{self.generation[tunnel]}":
                return
            self.generation[tunnel] += 1
            g, (_, key, auth) = self.generation[tunnel], SUITES[tunnel % len(SUITES)]
            pair = [(spi(tunnel, g, d), secrets.token_hex(key), secrets.token_hex(auth)) for d in (0, 1)]
            # Now and then the old pair is named too.
            both = self.rng.random() < 0.3
            self.pairs[tunnel] = [*(self.pairs[tunnel][-1:] if both else []), (g, pair)]
            self.made += 1
            for side in self.rng.sample(SIDES, 2):
                replace(self.dirs[side] / f"t{tunnel}.toml", self.text(side, tunnel))
                if slowly:
                    time.sleep(self.rng.uniform(0, 0.2))

    def text(self, side, tunnel):
        """One side's file of a tunnel."""
        n, other = SIDES.index(side), SIDES[1 - SIDES.index(side)]
        k = tunnel % len(OUTER[side])
        text = (
            f'[[tunnel]]\nname = "t{tunnel}"\nlocal = "{OUTER[side][k]}"\nremote = "{OUTER[other][k]}"\n'
            f'suite = "{SUITES[tunnel % len(SUITES)][0]}"\nesn = {str(tunnel % 2 == 0).lower()}\n'
            f"nat_t = {str(tunnel % 3 == 0).lower()}\n{limits(tunnel, self.rate)}"
        )
        for g, pair in self.pairs[tunnel]:
            for d, (number, key, auth) in enumerate(pair):
                way = "out" if d == n else "in"
                text += f'[[tunnel.sa]]\nname = "t{tunnel}-{g}-{way}"\ndirection = "{way}"\nspi = {number}\nkey = "{key}"\n'
                text += f'auth_key = "{auth}"\n' if auth else ""
                text += "first_use = true\n"
        for way, src, dst in (("out", side, other), ("in", other, side)):
            text += (
                f'[[policy]]\nname = "t{tunnel}-{way}"\ndirection = "{way}"\npriority = 10\naction = "protect"\n'
                f'tunnel = "t{tunnel}"\nsrc = "{inner(src, tunnel)}"\ndst = "{inner(dst, tunnel)}"\n'
            )
        return text

    def hook(self, path, fifo):
        """The hook program, and a thread that answers it."""
        os.mkfifo(fifo, 0o600)
        path.write_text(HOOK.format(fifo=fifo))
        path.chmod(0o755)
        # Open for writing too: it must not end between two callers.
        requests = os.fdopen(os.open(fifo, os.O_RDWR), "r")
        threading.Thread(target=self.answer, args=(requests,), daemon=True).start()

    def answer(self, requests):
        """A successor for each SA that is asked for, once."""
        for line in requests:
            tunnel, sa = line.split()
            self.asked += 1
            self.renew(int(tunnel[1:]), old=sa.rsplit("-", 1)[0])
            if self.rng.random() < 0.05:
                # One more before the first one sends.
                self.renew(int(tunnel[1:]))

    def by_files(self):
        """A successor for one of the tunnels that have no soft limit, in turn."""
        self.turn = BY_FILES if self.turn + 4 >= TUNNELS else self.turn + 4
        self.renew(self.turn)


def replace(path, text):
    """A file with keys, changed in one moment."""
    new = path.with_name(f".{path.name}.new")
    private_file(new, text)
    new.rename(path)


def others(rng, generation):
    """Tunnels that carry nothing: a hundred or so, all other than before. After a while they come again: the lease store
    remembers each key for good, and is not what is to grow here."""
    text, pool = [], generation % POOLS
    for n in range(rng.randrange(50, 150)):
        text.append(f'[[tunnel]]\nname = "x{n}"\nlocal = "198.51.100.1"\nremote = "203.0.113.1"\nsuite = "aes-128-gcm-16"\n')
        for k, way in enumerate(("in", "out")):
            number = 0x1000_0000 + (pool << 12) + 2 * n + k
            key = hashlib.blake2b(number.to_bytes(4, "big"), key=SECRET, digest_size=20).hexdigest()
            text.append(f'[[tunnel.sa]]\ndirection = "{way}"\nspi = {number}\nkey = "{key}"\nfirst_use = true\n')
    return "".join(text)


def bad(rng, good):
    """An SA file that must be refused: text or bytes, and its mode."""
    tunnel = '[[tunnel]]\nname = "bad"\nlocal = "198.51.100.1"\nremote = "203.0.113.1"\nsuite = "{}"\n'
    sa = '[[tunnel.sa]]\ndirection = "in"\nspi = {}\nkey = "{}"\nfirst_use = true\n'
    mutated = bytearray(good.encode())
    for _ in range(rng.randrange(1, 20)):
        mutated[rng.randrange(len(mutated))] = rng.randrange(256)
    kinds = (
        lambda: ("[[tunnel]\n", 0o600),
        lambda: (rng.randbytes(rng.randrange(1, 4096)) + b"\xff", 0o600),
        # A second tunnel of a name that is taken: whole, cut off, mutated.
        lambda: (good, 0o600),
        lambda: (good[: rng.randrange(40, len(good))], 0o600),
        lambda: (bytes(mutated) + good.encode(), 0o600),
        lambda: (tunnel.format("aes-512-gcm"), 0o600),
        lambda: (tunnel.format("aes-128-gcm-16") + sa.format(4096, "00" * 19), 0o600),
        lambda: (tunnel.format("aes-128-gcm-16") + sa.format(7, secrets.token_hex(20)), 0o600),
        # Readable by all.
        lambda: (tunnel.format("aes-128-gcm-16") + sa.format(4096, secrets.token_hex(20)), 0o644),
        lambda: ('[[policy]]\nname = "bad"\ndirection = "out"\npriority = 1\naction = "protect"\ntunnel = "nobody"\n', 0o600),
    )
    text, mode = rng.choice(kinds)()
    return text.encode() if isinstance(text, str) else text, mode


