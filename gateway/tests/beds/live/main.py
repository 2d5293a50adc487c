"""What must not disturb a running gateway, and what must not make it unsafe; over af_xdp, with its real lease store.

    reload   all keys of 10 000 SAs are changed, several times, while packets flow through them: none is lost
    kill     SIGKILL at random moments while it sends, and a new start each time: no nonce is seen twice outside
    user     it starts as root, becomes another user for good, and goes on working as that user: reload, leases, restart
    hook     started with ambient capabilities, as a service manager does, it gives none of them to the hook
    seed     a test seed, which makes nonces repeat, is refused
"""

import argparse
import multiprocessing
import pwd
import random
import secrets
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "peers/lib"))

from gateway import COMMON, Gateway
from netns import Failed, World, address, mac, private_file, run_cases, sh, veth, wait_for
from packets import raw_socket, udp_frame

CONFIG = """
[workers]
count = 1
[[port]]
name = "lan"
kind = "af_xdp"
side = "inside"
addresses = ["10.1.0.1/24"]
af_xdp = {{ steer_destinations = ["10.32.0.0/11"] }}
[[port]]
name = "wan"
kind = "af_xdp"
side = "outside"
addresses = ["192.0.2.1/24"]
[[route]]
to = "10.32.0.0/11"
via = "192.0.2.2"
[[neighbour]]
ip = "192.0.2.2"
mac = "{peer}"
port = "wan"
"""
TUNNELS = 5000
RELOADS = 4
# Tunnels that carry packets, spread over all of them.
BUSY = 100
KILLS = 30
USER = "nobody"
ESP = 14 + 20


def network(n):
    """The address behind tunnel `n`."""
    return f"10.{32 + (n >> 16)}.{n >> 8 & 255}.{n & 255}"


def sa_file(tunnels, generation, first_use=True):
    """Tunnels with one SA in each direction, whose keys and SPIs are new in each generation."""
    text = []
    for n in range(tunnels):
        text.append(f'[[tunnel]]\nname = "t{n}"\nlocal = "192.0.2.1"\nremote = "192.0.2.2"\nsuite = "aes-128-gcm-16"')
        for k, direction in enumerate(("out", "in")):
            spi = 0x1000_0000 + (generation << 20) + 2 * n + k
            text.append(f'[[tunnel.sa]]\ndirection = "{direction}"\nspi = {spi}\nkey = "{secrets.token_hex(20)}"')
            text += ["first_use = true"] if first_use else []
        for direction, src, dst in (("out", "10.1.0.0/24", network(n)), ("in", network(n), "10.1.0.0/24")):
            text.append(
                f'[[policy]]\nname = "t{n}-{direction}"\ndirection = "{direction}"\npriority = 1\n'
                f'action = "protect"\ntunnel = "t{n}"\nsrc = "{src}"\ndst = "{dst}"'
            )
    return "\n".join(text) + "\n"


class Sender:
    """Sends to the given destinations in turn, from a process of its own, at a steady rate."""

    def __init__(self, namespace, to, destinations, rate):
        self.count = multiprocessing.Value("Q", 0)
        self.stopped = multiprocessing.Event()
        frames = [udp_frame(to, "10.1.0.2", d, n) for n, d in enumerate(destinations)]
        work = (raw_socket(namespace, "eth0"), frames, rate)
        self.process = multiprocessing.Process(target=self.work, args=work, daemon=True)
        self.process.start()

    def work(self, sock, frames, rate):
        """Sends in small bursts, as many as the clock says are due."""
        sent, began = 0, time.monotonic()
        while not self.stopped.is_set():
            due = int((time.monotonic() - began) * rate)
            for _ in range(min(due - sent, 32)):
                sock.send(frames[sent % len(frames)])
                sent += 1
            self.count.value = sent
            time.sleep(0.0005)

    def stop(self):
        """Ends it; returns how many were sent."""
        self.stopped.set()
        self.process.join(5)
        return self.count.value


class Receiver:
    """Remembers SPI, sequence number and IV of each ESP packet that comes out."""

    def __init__(self, namespace):
        self.socket = raw_socket(namespace, "eth0")
        self.seen = []
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
            if frame[23] == 50:
                self.seen.append(frame[ESP : ESP + 16])

    def so_far(self):
        """All that came until now: SPI, sequence number, IV."""
        return [struct.unpack("!IIQ", s) for s in list(self.seen)]

    def stop(self):
        """All that came."""
        self.stopped = True
        self.thread.join()
        return self.so_far()


class Road:
    """host -- gateway -- far, and what is needed to start a gateway in the middle."""

    def __init__(self, world, program, name):
        self.world, self.program = world, program
        self.host, self.middle, self.far = (world.namespace(f"{name}-{n}") for n in ("host", "gateway", "far"))
        for ns in (self.host, self.middle, self.far):
            sh("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1", namespace=ns)
        veth(self.host, "eth0", self.middle, "lan")
        veth(self.middle, "wan", self.far, "eth0")
        address(self.middle, "lan", "10.1.0.1/24")
        address(self.middle, "wan", "192.0.2.1/24")
        self.to = mac(self.middle, "lan")
        self.dir = world.dir / name
        self.dir.mkdir()
        self.config = CONFIG.format(peer=mac(self.far, "eth0"))

    def gateway(self, log):
        """A new life."""
        return Gateway(self.world, self.program, self.middle, self.dir, self.config, log)


def duplicates(seen):
    """(SPI, IV) pairs that occur more than once: with counter-mode ciphers the end of all secrets."""
    nonces = [(spi, iv) for spi, _, iv in seen]
    return len(nonces) - len(set(nonces))


def reload(world, program):
    """Changes every SA while packets flow."""
    road = Road(world, program, "reload")
    private_file(road.dir / "sa.toml", sa_file(TUNNELS, 0))
    gateway = road.gateway("reload.log")
    receiver = Receiver(road.far)
    busy = [network(n) for n in range(0, TUNNELS, TUNNELS // BUSY)]
    sender = Sender(road.host, road.to, busy, 8000)
    wait_for("packets", lambda: len(receiver.seen) > 1000)
    times = []
    epoch = gateway.ask("stats")["epoch"]
    for generation in range(1, RELOADS + 1):
        new = road.dir / "new.toml"
        private_file(new, sa_file(TUNNELS, generation))
        # The gateway watches its files: a rename is all it takes.
        new.rename(road.dir / "sa.toml")

        def loaded():
            last = gateway.ask("status")["last_reload"]
            if not last["ok"]:
                raise Failed(f"reload {generation} was refused: {last['problems'][:2]}")
            return last if last["epoch"] > epoch else None

        last = wait_for(f"reload {generation}", loaded, 60)
        epoch = last["epoch"]
        if (last["added"], last["removed"], last["kept"]) != (2 * TUNNELS, 2 * TUNNELS, 0):
            raise Failed(f"reload {generation}: {last}")
        times.append(last)
        time.sleep(0.5)
    sent = sender.stop()
    time.sleep(1)
    stats = gateway.ask("stats")
    seen = receiver.stop()
    gateway.stop()
    generations = {(spi - 0x1000_0000) >> 20 for spi, _, _ in seen}
    if len(seen) != sent or stats["drops"]:
        raise Failed(f"{sent} packets sent, {len(seen)} came out; drops {stats['drops']}")
    if generations != set(range(RELOADS + 1)):
        raise Failed(f"packets of generations {generations} only")
    if duplicates(seen):
        raise Failed(f"{duplicates(seen)} nonces were used twice")
    took = ", ".join(str(t["millis"]) for t in times)
    return f"{RELOADS} reloads of all {2 * TUNNELS} SAs ({took} ms), {sent} packets meanwhile, none lost"


def kill(world, program, seed, forget):
    """Kills and starts again, while it sends."""
    rng = random.Random(seed)
    road = Road(world, program, "kill")
    private_file(road.dir / "sa.toml", sa_file(4, 0))
    receiver = Receiver(road.far)
    sender = Sender(road.host, road.to, [network(n) for n in range(4)], 12000)
    lives = []
    for life in range(KILLS + 1):
        before = len(receiver.seen)
        gateway = road.gateway("kill.log")
        wait_for(f"packets of life {life}", lambda: len(receiver.seen) > before)
        if life == 0 and not forget:
            # The consent to a new key is for its first use.
            text = (road.dir / "sa.toml").read_text().replace("first_use = true\n", "")
            private_file(road.dir / "next.toml", text)
            (road.dir / "next.toml").rename(road.dir / "sa.toml")
        time.sleep(rng.uniform(0, 0.4))
        if life < KILLS:
            gateway.kill()
        if forget:
            shutil.rmtree(road.dir / "leases")
        lives.append(len(receiver.seen) - before)
    gateway.stop()
    sender.stop()
    seen = receiver.stop()
    if duplicates(seen):
        raise Failed(f"seed {seed}: {duplicates(seen)} of {len(seen)} nonces were used twice")
    skipped = max(iv for _, _, iv in seen) - len(seen) // 4
    return f"{KILLS} times killed, {len(seen)} packets in {len(lives)} lives, no nonce twice, {skipped} numbers skipped for each key"


def as_user(world, program):
    """Without root's rights: what comes later must not need them."""
    road = Road(world, program, "user")
    road.config += f'[privileges]\nuser = "{USER}"\n'
    world.dir.chmod(0o711)

    def give(generation, name):
        private_file(road.dir / name, sa_file(2, generation))
        shutil.chown(road.dir / name, USER, -1)

    give(0, "sa.toml")
    shutil.chown(road.dir, USER, -1)
    receiver = Receiver(road.far)
    sender = Sender(road.host, road.to, [network(n) for n in range(2)], 2000)
    for life in range(2):
        before = len(receiver.seen)
        gateway = road.gateway("user.log")
        wait_for(f"packets of life {life}", lambda: len(receiver.seen) > before + 100)
        status = dict(line.split(":", 1) for line in Path(f"/proc/{gateway.process.pid}/status").read_text().splitlines())
        uids, groups = {int(n) for n in status["Uid"].split()}, status["Groups"].split()
        if uids != {pwd.getpwnam(USER).pw_uid} or int(status["CapEff"], 16) or int(status["CapPrm"], 16) or "0" in groups:
            raise Failed(f"users {uids}, groups {groups}, capabilities {status['CapEff']}")
        if life == 0:
            give(1, "new.toml")
            (road.dir / "new.toml").rename(road.dir / "sa.toml")
            new = 0x1000_0000 + (1 << 20)
            wait_for("packets under new keys", lambda: any(spi >= new for spi, _, _ in receiver.so_far()))
            text = (road.dir / "sa.toml").read_text().replace("first_use = true\n", "")
            private_file(road.dir / "next.toml", text)
            shutil.chown(road.dir / "next.toml", USER, -1)
            (road.dir / "next.toml").rename(road.dir / "sa.toml")
            time.sleep(1)
        if life == 1:
            sender.stop()
        gateway.stop()
    seen = receiver.stop()
    if duplicates(seen):
        raise Failed(f"{duplicates(seen)} of {len(seen)} nonces were used twice")
    return f"reload, leases and restart as {USER}, {len(seen)} packets, no nonce twice"


RIGHTS = "+net_admin,+net_raw,+bpf,+ipc_lock"
OFFLINE = """
[[port]]
name = "lan"
kind = "memory"
side = "inside"
memory = { peer = "wan" }
[[port]]
name = "wan"
kind = "memory"
side = "outside"
memory = { peer = "lan" }
"""


def hook(world, program):
    """What it runs has none of its capabilities."""
    there = world.dir / "hook"
    there.mkdir()
    world.dir.chmod(0o711)
    # As the unit in deploy/systemd has it started.
    wrapper = there / "esplanade"
    # Where that user may go.
    program = shutil.copy(program, there / "program")
    started = f"setpriv --reuid={USER} --clear-groups --inh-caps={RIGHTS} --ambient-caps={RIGHTS}"
    wrapper.write_text(f'#!/bin/sh\nexec {started} {program} "$@"\n')
    (there / "rekey").write_text(f"#!/bin/sh\ngrep Cap /proc/self/status > {there}/new && mv {there}/new {there}/caps\n")
    for path in (wrapper, there / "rekey"):
        path.chmod(0o755)
    private_file(there / "sa.toml", sa_file(1, 0).replace("[[tunnel.sa]]", "soft = { time = 1 }\n[[tunnel.sa]]", 1))
    for path in (there, there / "sa.toml"):
        shutil.chown(path, USER, -1)
    common = COMMON.replace("jitter_percent = 0", f'jitter_percent = 0, hook = "{there}/rekey"')
    gateway = Gateway(world, wrapper, None, there, OFFLINE, "hook.log", common)

    def caps(text):
        return {k: int(v, 16) for k, v in (line.split(":") for line in text.splitlines() if line.startswith("Cap"))}

    own = caps(Path(f"/proc/{gateway.process.pid}/status").read_text())
    wait_for("the hook", (there / "caps").exists)
    its = caps((there / "caps").read_text())
    gateway.stop()
    if not own["CapEff"] or not own["CapPrm"]:
        raise Failed(f"the gateway itself has no rights: {own}")
    if any(its[c] for c in ("CapInh", "CapPrm", "CapEff", "CapAmb")):
        raise Failed(f"the hook has rights: {its}")
    return f"the gateway has {own['CapEff'].bit_count()} capabilities, its hook none"


def seed_refused(world, program):
    """Repeatable nonces never leave on a live port."""
    (world.dir / "seed.toml").write_text(CONFIG.format(peer="02:00:00:00:00:01"))
    command = [program, "run", "--config", world.dir / "seed.toml", "--test-seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    if done.returncode != 3 or "seed" not in done.stderr:
        raise Failed(f"it ended with {done.returncode}: {done.stderr[-500:]}")
    return "a test seed is refused with af_xdp ports"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gateway", type=Path, required=True, help="program to test")
    parser.add_argument("--keep", type=Path, help="leave configurations and logs in this new directory")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="of the moments of death")
    parser.add_argument("--forget", action="store_true", help="control: delete the leases at each death; this must fail")
    args = parser.parse_args()
    program = args.gateway.resolve()
    with World("esplanade-live", args.keep) as world:
        cases = {"seed": seed_refused, "reload": reload, "user": as_user, "hook": hook, "kill": lambda w, p: kill(w, p, args.seed, args.forget)}
        bad = run_cases(world, program, cases)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
