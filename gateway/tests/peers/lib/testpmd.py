"""DPDK's testpmd as a program that nobody here wrote: virtual devices, moved by its own drivers."""

import os
import re
import struct
import subprocess
import time

from netns import Failed, wait_for


class Testpmd:
    """Runs until the world ends. Ports are numbered in the order of `devices`; each pair of them forwards to each other."""

    def __init__(self, world, name, devices, memory=("--no-huge", "--no-shconf", "-m", "256"), lcores="(0,1)@0", args=()):
        self.commands = 0
        self.log = world.dir / f"{name}.log"
        vdevs = [f"--vdev={d}" for d in devices]
        eal = ["--no-pci", "--single-file-segments", "--no-telemetry", *memory, "--lcores", lcores, f"--file-prefix={name}-{os.getpid()}"]
        own = ["-i", "--forward-mode=io", "--total-num-mbufs=16384", "--no-mlockall", "--no-flush-rx", *args]
        with open(self.log, "wb") as out:
            # By lines: in a file its statistics would otherwise come in pieces, later than the prompt behind them.
            self.process = subprocess.Popen(
                ["stdbuf", "-oL", "dpdk-testpmd", *eal, *vdevs, "--", *own],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "XDG_RUNTIME_DIR": str(world.dir)},
            )
        world.running.append(self.process)
        wait_for("testpmd's prompt", lambda: "testpmd>" in self.text(), 60)

    def text(self):
        """All that it has said."""
        if self.process.poll() is not None:
            raise Failed(f"testpmd ended with {self.process.returncode}: {self.log.read_text()[-2000:]}")
        return self.log.read_text(errors="replace")

    def command(self, line):
        """Gives it a command; what it says until the next prompt."""
        before = len(self.text())
        # The prompt may come early: the end is what it says to a command that it does not know.
        self.commands += 1
        mark = f"end-{self.commands}"
        self.process.stdin.write(f"{line}\n{mark}\n".encode())
        self.process.stdin.flush()
        done = re.compile(rf"{mark}.*Bad arguments|{mark}.*Command not found", re.S)
        wait_for(f"testpmd to do {line}", lambda: done.search(self.text(), before), 60)
        return self.text()[before:]

    def counters(self):
        """Time, and for each port what it received, sent and missed."""
        said = self.command("show port stats all")
        now = time.monotonic()
        blocks = re.findall(r"NIC statistics for port (\d+)\s+#+\n(.*?)\n\s*####", said, re.S)
        ports = {}
        for number, block in blocks:
            fields = re.findall(r"(RX|TX)-(packets|missed|errors|dropped|bytes):\s*(\d+)", block)
            ports[int(number)] = {f"{way}-{what}": int(n) for way, what, n in fields}
        return now, ports

    def stop(self):
        """An orderly end."""
        self.process.stdin.write(b"stop\nquit\n")
        self.process.stdin.close()
        self.process.wait(30)


def write_capture(path, frames):
    """A pcap file with these frames."""
    with open(path, "wb") as f:
        f.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1))
        for i, frame in enumerate(frames):
            f.write(struct.pack("<IIII", i // 1000, i % 1000, len(frame), len(frame)) + frame)


def read_capture(path):
    """The frames of a pcap file."""
    data = path.read_bytes()
    frames, at = [], 24
    while at + 16 <= len(data):
        length = struct.unpack_from("<I", data, at + 8)[0]
        frames.append(data[at + 16 : at + 16 + length])
        at += 16 + length
    return frames
