"""What goes on beside the traffic: changes that must cost nothing, and input that must not be believed.

Each is a class with a method `step`, called again and again in a thread of its own, and `pause`, seconds between two calls.
"""

import json
import os
import signal
import socket
import struct
import subprocess
import threading
import time

from keys import OUTER, SIDES, TUNNELS, bad, others, replace
from netns import Failed, private_file, sh
from packets import inside, raw_socket
from traffic import PORT, checksum, ipv4

ROUTERS = 8
# Followers and idle clients at a time: the API has room for 16 connections.
FOLLOWERS = 4


class Api:
    """The gateway's socket, without a process for each question."""

    def __init__(self, path):
        self.path = str(path)

    def connect(self):
        """A connection."""
        s = socket.socket(socket.AF_UNIX)
        s.settimeout(30)
        s.connect(self.path)
        return s

    def ask(self, cmd, **fields):
        """An answer's data."""
        with self.connect() as s:
            s.sendall(json.dumps({"v": 1, "cmd": cmd, **fields}).encode() + b"\n")
            answer = json.loads(s.makefile().readline())
        if not answer["ok"]:
            raise Failed(f"{cmd}: {answer['error']}")
        return answer["data"]


class Worker(threading.Thread):
    """Steps until it is stopped. What it fails with ends the run."""

    def __init__(self, trouble, traffic):
        super().__init__(daemon=True)
        self.trouble, self.traffic = trouble, traffic
        self.stopped = threading.Event()
        self.failure = None

    def run(self):
        try:
            while not self.stopped.wait(self.trouble.pause):
                # A machine that does not keep up is not helped by more.
                if not self.traffic.full():
                    self.trouble.step()
        except Exception as e:  # noqa: BLE001
            if not self.stopped.is_set():
                self.failure = e


class Successors:
    """Rekeys by files alone."""

    pause = 4

    def __init__(self, keys):
        self.keys = keys

    def step(self):
        self.keys.by_files()


class Reloads:
    """SA files that come, change and go; bad ones are refused."""

    pause = 1.5

    def __init__(self, rng, side, directory, api, process):
        self.rng, self.dir, self.api, self.process = rng, directory, api, process
        self.side, self.generation, self.bad, self.good = side, 0, 0, 0

    def step(self):
        self.generation += 1
        {0: self.refused, 1: self.changed, 2: self.gone}[self.generation % 3]()

    def refused(self):
        """A file that nobody could want, for a moment shorter than a peer waits."""
        path, now = self.dir / "bad.toml", self.api.ask("sa_list")
        text, mode = bad(self.rng, (self.dir / f"t{self.rng.randrange(TUNNELS)}.toml").read_text())
        new = self.dir / ".bad.new"
        private_file(new, "")
        new.write_bytes(text)
        new.chmod(mode)
        new.rename(path)
        try:
            answer = self.api.ask("reload")
        finally:
            path.unlink()
        if answer["ok"] or not answer["problems"]:
            raise Failed(f"{self.side}: a bad SA file was taken: {answer}, {text[:2000]!r}")
        kept = {s["name"] for s in self.api.ask("sa_list")}
        # What a rekey has put aside, or the next one does before it, may go meanwhile.
        in_use = (s for s in now if s["rekey"] == "steady" and s["state"] != "standby")
        missing = [s["name"] for s in in_use if s["name"] not in kept]
        if missing:
            raise Failed(f"{self.side}: a refused file removed {missing}")
        answer = self.api.ask("reload")
        if not answer["ok"]:
            raise Failed(f"{self.side}: good SA files were refused: {answer}")
        self.bad += 1

    def changed(self):
        """A hundred tunnels, all new."""
        replace(self.dir / "others.toml", others(self.rng, self.generation))
        if self.rng.random() < 0.5:
            self.process.send_signal(signal.SIGHUP)
        self.good += 1

    def gone(self):
        """And they go again."""
        (self.dir / "others.toml").unlink()
        if not self.api.ask("reload")["ok"]:
            raise Failed(f"{self.side}: the files without others.toml were refused")
        self.good += 1


class Kernel:
    """Routes and neighbours of the outer packets move; routes that nobody uses come and go."""

    pause = 0.7

    def __init__(self, rng, side, namespace, scratch):
        self.rng, self.namespace, self.script = rng, namespace, scratch / f"{side}.ip"
        n = SIDES.index(side)
        self.routers = [f"192.0.2.{(1 - n) * 100 + 101 + k}" for k in range(ROUTERS)]
        self.over = list(range(ROUTERS))
        self.far = OUTER[SIDES[1 - n]]
        self.changes = 0
        self.run([f"route add {dst} via {via}" for dst, via in zip(self.far, self.routers)])

    def run(self, lines):
        """Changes, in one call."""
        self.script.write_text("\n".join(lines) + "\n")
        sh("ip", "-force", "-batch", self.script, namespace=self.namespace)
        self.changes += len(lines)

    def step(self):
        a, b = self.rng.sample(range(ROUTERS), 2)
        self.over[a], self.over[b] = self.over[b], self.over[a]
        lines = [f"route replace {self.far[k]} via {self.routers[self.over[k]]}" for k in (a, b)]
        router = self.rng.choice(self.routers)
        if self.rng.random() < 0.3:
            lines.append(f"neigh flush to {router} dev wan")
        elif self.rng.random() < 0.3:
            # Asked for again, and found where it is.
            lines.append(f"neigh flush to {router} dev wan nud stale")
        net = self.rng.randrange(256)
        for k in range(40):
            to = f"172.{16 + k % 8}.{net}.0/24"
            kind = self.rng.choice(("via", "blackhole", "flush"))
            if kind == "via":
                lines.append(f"route replace {to} via {self.rng.choice(self.routers)}")
            elif kind == "blackhole":
                lines.append(f"route replace blackhole {to}")
            else:
                lines.append(f"route flush {to}")
        self.run(lines)


class Junk:
    """Frames that no gateway should pass on, or that are none."""

    pause = 0.02
    burst = 4

    def __init__(self, rng, namespace, interface, to, makers):
        self.rng, self.to, self.makers = rng, to, makers
        self.socket = raw_socket(namespace, interface)
        self.sent = 0

    def step(self):
        for _ in range(self.rng.randrange(1, 2 * self.burst)):
            frame = self.rng.choice(self.makers)(self.rng, self.to)
            # A frame of the good flows or with the mark of clear text would spoil the count.
            if not frame or (len(frame) > 38 and (frame[29], frame[33]) in ((9, 9), (77, 77)) and not frame[-1:] == b"\x77"):
                continue
            try:
                self.socket.send(frame[:1514].ljust(14, b"\0"))
            except OSError:
                # The kernel does not send everything either.
                continue
            self.sent += 1


def noise(rng, to):
    """A link header, and chance."""
    kind = rng.choice((b"\x08\x00", b"\x86\xdd", b"\x81\x00", b"\x88\xa8", rng.randbytes(2)))
    dst = rng.choice((to, to, to, b"\xff" * 6, b"\x01\x00\x5e\x00\x00\x01"))
    return dst + b"\x02" + rng.randbytes(5) + kind + rng.randbytes(rng.randrange(0, 1400))


def host_frame(rng, to, side):
    """Something that a host of this side might send: mostly into the tunnels."""
    n = SIDES.index(side)
    t = rng.randrange(TUNNELS + 4)
    src = bytes((10, 1 + n, t, 66))
    dst = rng.choice((bytes((10, 2 - n, t, 66)), bytes((10, 2 - n, t, 66)), bytes((192, 0, 2, 1)), rng.randbytes(4)))
    proto = rng.choice((17, 6, 1, 58, 4, 50, rng.randrange(256)))
    data = rng.randbytes(rng.randrange(0, 1480))
    return ipv4(to, src, dst, proto, data, ttl=rng.choice((64, 1, 0)), flags=rng.choice((0, 0, 0x4000, 0x2000, 0x2003, 0x1FFF)))


def mutate(rng, frame):
    """Flips bits behind the link header, cuts off, adds; half of the time the header's checksum is right again."""
    f = bytearray(frame)
    for _ in range(rng.randrange(0, 4)):
        at = rng.randrange(14, min(len(f), 14 + 64)) if rng.random() < 0.7 else rng.randrange(14, len(f))
        f[at] ^= 1 << rng.randrange(8)
    if rng.random() < 0.3:
        f = f[: rng.randrange(14, len(f))]
    elif rng.random() < 0.1:
        f += rng.randbytes(rng.randrange(1, 64))
    size = (f[14] & 15) * 4 if len(f) > 34 else 0
    if rng.random() < 0.5 and 20 <= size <= len(f) - 14:
        f[24:26] = b"\0\0"
        f[24:26] = struct.pack("!H", checksum(bytes(f[14 : 14 + size])))
    return bytes(f)


def from_host(side):
    """Makers of frames that come from a host."""
    return (noise, lambda r, to: host_frame(r, to, side), lambda r, to: mutate(r, host_frame(r, to, side)))


def from_wire(side, wire, flow):
    """Makers of frames that somebody on the wire sends to the gateway of this side, which `wire` shows the ESP of."""
    far, near = SIDES[1 - SIDES.index(side)], side

    def seen(rng):
        return rng.choice(wire.recent) if wire.recent else b""

    def replay(rng, _):
        return seen(rng)

    def forged(rng, _):
        return mutate(rng, seen(rng) or bytes(64))

    def number(rng, _):
        # A number far ahead must not move the window.
        f = bytearray(seen(rng))
        if f:
            at = 34 if f[23] == 50 else 42
            f[at + 4 : at + 8] = struct.pack("!I", rng.choice((0, 1, 0xFFFFFFFF, 0x7FFFFFFF, rng.getrandbits(32))))
        return bytes(f)

    def stranger(rng, to):
        src, dst = (socket.inet_aton(rng.choice(OUTER[s])) for s in (far, near))
        esp = struct.pack("!II", rng.choice((rng.getrandbits(32), 0, 255)), rng.getrandbits(32)) + rng.randbytes(rng.randrange(0, 200))
        return ipv4(to, src, dst, 50, esp)

    def encapsulated(rng, to):
        src, dst = (socket.inet_aton(rng.choice(OUTER[s])) for s in (far, near))
        data = rng.choice((b"\xff", b"", bytes(4) + rng.randbytes(40), rng.randbytes(rng.randrange(0, 300))))
        length = rng.choice((8 + len(data), 8 + len(data), rng.getrandbits(16)))
        return ipv4(to, src, dst, 17, struct.pack("!4H", 4500, 4500, length, rng.choice((0, 0, 7))) + data)

    def fragment(rng, to):
        f = seen(rng)
        if not f:
            return f
        cut, data = rng.randrange(1, 8) * 8, f[34:]
        offset, part = rng.choice(((0, data[:cut]), (cut // 8, data[cut:]), (1, data[cut:])))
        more = rng.choice((0, 0x2000))
        return ipv4(to, f[26:30], f[30:34], f[23], part, number=rng.randrange(8), flags=more | offset)

    def clear(rng, to):
        # What policy wants protected, without protection. The mark is at the end of the payload, too.
        n, t = SIDES.index(far), rng.randrange(TUNNELS)
        src, dst = bytes((10, 1 + n, t, 77)), bytes((10, 2 - n, t, 77))
        return ipv4(to, src, dst, 17, struct.pack("!4H", 1, PORT + 1, 24, 0) + rng.randbytes(15) + b"\x77")

    def copy(rng, to):
        # A good packet once more, in clear.
        return (flow.frame(rng.randrange(flow.sent), to)[:-1] + b"\x77") if flow.sent else b""

    return (noise, replay, replay, forged, forged, number, stranger, encapsulated, fragment, clear, copy)


class Garbage:
    """Clients of the API and of the metrics that do not keep to the protocol."""

    pause = 0.3

    def __init__(self, rng, api, namespace, port):
        self.rng, self.api, self.namespace, self.port = rng, api, namespace, port
        self.idle = []
        self.said = 0

    def connect_http(self):
        """A connection to the metrics."""
        with inside(self.namespace):
            s = socket.socket()
        s.settimeout(5)
        s.connect(("127.0.0.1", self.port))
        return s

    def step(self):
        rng = self.rng
        api = rng.random() < 0.5
        said = rng.choice(
            (
                rng.randbytes(rng.randrange(1, 3000)),
                rng.randbytes(rng.randrange(1, 3000)) + b"\n",
                b'{"v":1,"cmd":"sa_show","name":"' + b"x" * rng.randrange(0, 80_000) + b'"}\n',
                b'{"v":1,"cmd":"explain","src":"10.1.0.9","dst":7}\n' * rng.randrange(1, 50),
                b"[" * rng.randrange(1, 70_000) + b"\n",
                b'{"v":1,"cmd":"stats"}',
                b"",
            )
            if api
            else (
                rng.randbytes(rng.randrange(1, 3000)),
                b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * rng.randrange(1, 100) + b"\r\n",
                b"GET /" + b"x" * rng.randrange(1, 60_000) + b" HTTP/1.1\r\n\r\n",
                b"POST /metrics HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n" + rng.randbytes(2000),
                b"GET /metrics HTTP/1.1\r\n\r\n" * rng.randrange(1, 5),
                b"GET /metr",
                b"",
            )
        )
        s = self.api.connect() if api else self.connect_http()
        try:
            s.sendall(said)
            if rng.random() < 0.5:
                s.settimeout(0.2)
                s.recv(100)
        except OSError:
            # It is let go, or not answered: both are right.
            pass
        self.said += 1
        self.idle.append(s)
        while len(self.idle) > rng.randrange(FOLLOWERS):
            self.idle.pop(0).close()


class Followers:
    """Programs that follow the events, stand still, and go."""

    pause = 1

    def __init__(self, rng, world, program, path):
        self.rng, self.world, self.command = rng, world, (program, "events", "--follow", "--json", "--socket", path)
        self.running = []
        self.started = 0

    def step(self):
        if len(self.running) < FOLLOWERS:
            p = subprocess.Popen([str(c) for c in self.command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self.world.running.append(p)
            self.running.append(p)
            self.started += 1
        p = self.rng.choice(self.running)
        p.send_signal(self.rng.choice((signal.SIGSTOP, signal.SIGCONT, signal.SIGKILL, signal.SIGTERM)))
        for p in list(self.running):
            if p.poll() is not None:
                self.running.remove(p)
                self.world.running.remove(p)

    def stop(self):
        """Ends those that are left."""
        for p in self.running:
            p.kill()
            p.wait()


class Listener(threading.Thread):
    """Follows the events all the time: none may be missing."""

    def __init__(self, api):
        super().__init__(daemon=True)
        self.stream = api.connect()
        self.stream.settimeout(None)
        self.stream.sendall(b'{"v":1,"cmd":"follow","since":0}\n')
        self.kinds, self.last, self.faults = {}, 0, []

    def run(self):
        for line in self.stream.makefile():
            batch = json.loads(line)["data"]
            if batch["missed"]:
                self.faults.append(f"{batch['missed']} events were missed")
            for event in batch["events"]:
                if event["number"] != self.last + 1:
                    self.faults.append(f"event {event['number']} follows {self.last}")
                self.last = event["number"]
                self.kinds[event["kind"]] = self.kinds.get(event["kind"], 0) + 1
            self.last = batch["last"]


class Scrapes:
    """Metrics: always there, counters never fall."""

    pause = 2

    def __init__(self, namespace, port):
        self.namespace, self.port = namespace, port
        self.last, self.count = {}, 0

    def step(self):
        self.last = self.read()

    def read(self):
        """All metrics of now, by name with labels."""
        with inside(self.namespace):
            s = socket.socket()
        with s:
            s.settimeout(30)
            s.connect(("127.0.0.1", self.port))
            s.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: s.recv(65536), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise Failed(f"metrics: {head[:200]!r}")
        now = {}
        for line in body.decode().splitlines():
            if line and line[0] != "#":
                name, _, value = line.rpartition(" ")
                now[name] = float(value)
        for name, value in now.items():
            if name.partition("{")[0].endswith("_total") and value < self.last.get(name, 0):
                raise Failed(f"metrics: {name} fell from {self.last[name]} to {value}")
        if now.get("esplanade_healthy") != 1:
            raise Failed("metrics: a worker makes no progress")
        self.count += 1
        return now


def memory(pid):
    """Resident bytes, descriptors and threads of a process."""
    status = dict(line.split(":", 1) for line in open(f"/proc/{pid}/status").read().splitlines())
    return int(status["VmRSS"].split()[0]) * 1024, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])
