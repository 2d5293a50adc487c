"""Network namespaces and the programs in them; everything is gone at the end, also after a failure."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path


class Failed(Exception):
    """A step did not give what it must."""


class World:
    """A scratch directory, namespaces and background programs. Use as a context."""

    def __init__(self, name, keep=None):
        self.prefix = f"{name}-{os.getpid()}"
        self.stack = ExitStack()
        self.keep = keep
        self.running = []

    def __enter__(self):
        # Ended from outside: clean up all the same.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: sys.exit(1))
        self.dir = Path(self.keep or tempfile.mkdtemp(prefix=f"{self.prefix}-"))
        self.dir.mkdir(parents=True, exist_ok=True)
        if not self.keep:
            self.stack.callback(shutil.rmtree, self.dir, ignore_errors=True)
        return self

    def __exit__(self, *_):
        for p in reversed(self.running):
            end(p)
        self.stack.close()

    def namespace(self, name):
        """A new namespace with its loopback up. Returns its full name."""
        full = f"{self.prefix}-{name}"
        sh("ip", "netns", "add", full)
        self.stack.callback(subprocess.run, ["ip", "netns", "del", full], stderr=subprocess.DEVNULL, check=False)
        sh("ip", "-n", full, "link", "set", "lo", "up")
        return full

    def start(self, *command, namespace=None, log=None, env=None):
        """A program in the background; ended with the world."""
        command = within(namespace, command)
        out = open(self.dir / log, "wb") if log else subprocess.DEVNULL
        p = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})})
        if log:
            out.close()
        self.running.append(p)
        return p


def end(process, patience=10):
    """Asks a program to end, insists after a while. Returns its exit code."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def within(namespace, command):
    """The command, run inside a namespace."""
    command = [str(c) for c in command]
    return ["ip", "netns", "exec", namespace, *command] if namespace else command


def sh(*command, namespace=None, timeout=60):
    """Runs a command that must succeed; returns its output."""
    command = within(namespace, command)
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise Failed(f"{' '.join(command)} ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-1500:]}")
    return done.stdout


def veth(a, name_a, b, name_b, mtu=1500):
    """A cable between two namespaces. Without offloads: what arrives is what would be on a wire."""
    sh("ip", "link", "add", name_a, "netns", a, "type", "veth", "peer", "name", name_b, "netns", b)
    for ns, name in ((a, name_a), (b, name_b)):
        offloads = ("tx", "off", "rx", "off", "tso", "off", "gso", "off", "gro", "off", "sg", "off")
        sh("ethtool", "-K", name, *offloads, namespace=ns)
        sh("ip", "link", "set", name, "mtu", mtu, "up", namespace=ns)
        # Router solicitations and the like are not part of any test.
        sh("sysctl", "-qw", f"net.ipv6.conf.{name}.router_solicitations=0", namespace=ns)


def address(namespace, interface, *addresses):
    """Adds addresses."""
    for a in addresses:
        sh("ip", "addr", "add", a, "dev", interface, *(["nodad"] if ":" in a else []), namespace=namespace)


def mac(namespace, interface):
    """Ethernet address of an interface."""
    return json.loads(sh("ip", "-j", "link", "show", interface, namespace=namespace))[0]["address"]


def wait_for(what, condition, patience=15):
    """Polls until the condition gives something true; returns that."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        got = condition()
        if got:
            return got
        time.sleep(0.05)
    raise Failed(f"{what}: not within {patience} s")


def private_file(path, text):
    """A file with keys in it."""
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(text)


def run_cases(world, program, cases):
    """Runs `case(world, program)` for each name, says what each told. How many failed."""
    bad = 0
    for name, case in cases.items():
        began = time.monotonic()
        try:
            told, verdict = case(world, program), "PASS"
        except Failed as e:
            told, verdict = str(e), "FAIL"
            bad += 1
        print(f"{verdict}  {name}: {told} ({time.monotonic() - began:.1f} s)", flush=True)
    return bad


def run_bed(name, about, cases):
    """The whole program of a bed whose cases need the gateway alone; ends with 1 when one has failed."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--gateway", type=Path, required=True, help="program to test")
    parser.add_argument("--keep", type=Path, help="leave configurations and logs in this new directory")
    parser.add_argument("--only", choices=cases, help="one case")
    args = parser.parse_args()
    chosen = {n: c for n, c in cases.items() if args.only in (None, n)}
    with World(name, args.keep) as world:
        bad = run_cases(world, args.gateway.resolve(), chosen)
    sys.exit(1 if bad else 0)
