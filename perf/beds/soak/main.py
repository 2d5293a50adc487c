#!/usr/bin/env python3
"""A pair of gateways under everything at once, for minutes or hours. `perf soak` starts it. Needs root.

    host ---- lan [left gateway] wan ---- wire ---- wan [right gateway] lan ---- host

Numbered packets with known contents go both ways. Meanwhile SAs are replaced (soft limits by packets, bytes and time with a
hook that fails now and then, and files alone), SA files are changed, broken and mended, the kernel's routes and neighbours
move, frames and ESP packets come mutated, cut off, forged and replayed from both sides, clients of the API and of the metrics
misbehave, and programs follow the events, stand still and are killed. The wire between the gateways is watched.

It fails when a good packet is lost, changed or doubled, a number or nonce is used twice under a key, anything in clear passes,
an account of frames does not balance, memory or descriptors grow, an event is missing, or the log has an error that nobody caused.
"""

import argparse
import contextlib
import json
import random
import secrets
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "gateway/tests/peers/lib"))

from gateway import Gateway
from keys import OUTER, SIDES, TUNNELS, Keys
from netns import Failed, World, address, mac, sh, wait_for
from pair import cable
from traffic import Traffic
from troubles import (
    ROUTERS,
    Api,
    Followers,
    Garbage,
    Junk,
    Kernel,
    Listener,
    Reloads,
    Scrapes,
    Successors,
    Worker,
    from_host,
    from_wire,
    memory,
)

METRICS = 9550
COMMON = f"""
sa_files = ["sa.d"]
[workers]
count = 2
[memory]
frames = 16384
huge = "never"
[kernel]
routes = true
neighbours = true
addresses = true
[leases]
path = "leases"
[api]
socket = "api.sock"
[metrics]
listen = "127.0.0.1:{METRICS}"
max_sas = 100
[log]
format = "json"
[reassembly]
timeout_ms = 500
"""
# The other side's files come later, are seen after a pause, and a bad file holds all others up for a moment.
REKEY = """
[rekey]
switch_delay_ms = 6000
overlap_ms = 7000
quiet_ms = 500
jitter_percent = 20
retry_ms = 2000
retry_max_ms = 4000
hook_parallel = 4
hook = "{hook}"
"""
PORT = '[[port]]\nname = "{name}"\nkind = "af_xdp"\nside = "{side}"\naf_xdp = {{ steer_all = true, ring = 1024 }}\n'
# Seconds until memory is compared, and by how much it may grow: what allocators keep, not what leaks.
WARM_UP = 60
GROWTH = 12 << 20
# At least one rekey of each tunnel in so many seconds.
REKEY_EVERY = 60


class Bed:
    """Namespaces, cables, gateways."""

    def __init__(self, world, program, rate, rng):
        self.world, self.program = world, program
        self.wire = self.namespace("wire")
        self.host = {s: self.namespace(f"{s}-host") for s in SIDES}
        self.ns = {s: self.namespace(s) for s in SIDES}
        sh("ip", "link", "add", "name", "switch", "type", "bridge", "stp_state", 0, "mcast_snooping", 0, namespace=self.wire)
        for n, s in enumerate(SIDES):
            cable(self.host[s], "eth0", self.ns[s], "lan", 2)
            cable(self.ns[s], "wan", self.wire, s, 2)
            sh("ip", "link", "set", s, "master", "switch", namespace=self.wire)
            address(self.ns[s], "lan", f"192.168.{n}.1/24")
            address(self.host[s], "eth0", f"192.168.{n}.2/24")
            address(self.ns[s], "wan", *(f"192.0.2.{n * 100 + 101 + k}/24" for k in range(ROUTERS)))
            address(self.ns[s], "lo", *(f"{a}/32" for a in OUTER[s]))
            sh("ip", "route", "add", f"10.{n + 1}.0.0/16", "via", f"192.168.{n}.2", namespace=self.ns[s])
        sh("ip", "link", "set", "switch", "up", namespace=self.wire)
        self.dirs = {s: world.dir / s for s in SIDES}
        self.keys = Keys({s: d / "sa.d" for s, d in self.dirs.items()}, rate, rng)
        hook = world.dir / "hook"
        self.keys.hook(hook, world.dir / "requests")
        self.gateways, self.apis = {}, {}
        for s in SIDES:
            config = PORT.format(name="lan", side="inside") + PORT.format(name="wan", side="outside") + REKEY.format(hook=hook)
            self.gateways[s] = Gateway(world, program, self.ns[s], self.dirs[s], config, f"{s}.log", COMMON)
            self.apis[s] = Api(self.gateways[s].socket)

    def namespace(self, name):
        """Without IPv6, whose routers and listeners would be heard."""
        ns = self.world.namespace(name)
        sh("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1", "net.ipv6.conf.all.disable_ipv6=1", namespace=ns)
        return ns

    def neighbours_known(self):
        """Whether all routers and hosts are."""
        return all(len(a.ask("neighbours")) > ROUTERS for a in self.apis.values())


class Soak:
    """The run, and what is found."""

    def __init__(self, world, program, seed, rate):
        def rng(name):
            return random.Random(f"{seed} {name}")

        self.bed = bed = Bed(world, program, rate, rng("keys"))
        kernels = [Kernel(rng(f"kernel {s}"), s, bed.ns[s], world.dir) for s in SIDES]
        wait_for("routers and hosts to be found", bed.neighbours_known, 30)
        self.listeners = {s: Listener(bed.apis[s]) for s in SIDES}
        for listener in self.listeners.values():
            listener.start()
        macs = {(s, port): bytes.fromhex(mac(bed.ns[s], port).replace(":", "")) for s in SIDES for port in ("lan", "wan")}
        self.traffic = Traffic(bed.host, bed.wire, {s: macs[s, "lan"] for s in SIDES}, seed, rate)
        self.junk, self.reloads, self.scrapes, self.followers, self.garbage = [], [], {}, [], []
        for n, s in enumerate(SIDES):
            directory, process = bed.dirs[s] / "sa.d", bed.gateways[s].process
            self.reloads.append(Reloads(rng(f"reloads {s}"), s, directory, bed.apis[s], process))
            self.scrapes[s] = Scrapes(bed.ns[s], METRICS)
            self.followers.append(Followers(rng(f"followers {s}"), world, program, bed.gateways[s].socket))
            self.garbage.append(Garbage(rng(f"garbage {s}"), bed.apis[s], bed.ns[s], METRICS))
            self.junk.append(Junk(rng(f"host {s}"), bed.host[s], "eth0", macs[s, "lan"], from_host(s)))
            towards = from_wire(s, self.traffic.wires[1 - n], self.traffic.flows[1 - n])
            self.junk.append(Junk(rng(f"wire {s}"), bed.wire, s, macs[s, "wan"], towards))
        self.kernels = kernels
        troubles = [Successors(bed.keys), *self.reloads, *kernels, *self.followers, *self.garbage, *self.junk, *self.scrapes.values()]
        self.workers = [Worker(t, self.traffic) for t in troubles]
        self.samples = {s: [] for s in SIDES}
        self.breaches = []
        self.began = time.monotonic()

    def run(self, seconds):
        """Until the time is over, or something is wrong."""
        for w in self.workers:
            w.start()
        minute = 1
        while (now := time.monotonic() - self.began) < seconds and not self.look(now):
            time.sleep(1)
            if now >= minute * 60:
                print(f"minute {minute}: {self.line()}", flush=True)
                minute += 1
        for w in self.workers:
            w.stopped.set()
        for w in self.workers:
            w.join(60)
        for f in self.followers:
            f.stop()
        self.traffic.finish()
        self.look(seconds)
        self.at_rest()
        self.traffic.stop()
        self.grown()

    def breach(self, text):
        """Something that must not be."""
        if text not in self.breaches:
            self.breaches.append(text)

    def look(self, now):
        """Whether anything is wrong."""
        t = self.traffic
        for s, flow in zip(SIDES, t.flows):
            for what in ("lost", "wrong", "twice", "leaked"):
                if n := getattr(flow, what):
                    self.breach(f"from the {s}: packets {what}: {n}")
            if flow.wrong_frame:
                self.breach(f"from the {s}: {flow.wrong_frame.hex()}")
        for s, wire in zip(SIDES, t.wires):
            for fault in wire.faults[:3]:
                self.breach(f"{s}'s wire: {fault}")
        if t.missed:
            self.breach(f"the test itself missed {t.missed} frames: its sockets overran")
        failures = [t.failure, *(w.failure for w in self.workers)]
        for failure in filter(None, failures):
            self.breach(f"{type(failure).__name__}: {failure}")
        for s, gateway in self.bed.gateways.items():
            if gateway.process.poll() is not None:
                self.breach(f"the {s} gateway ended with {gateway.process.returncode}")
                continue
            for fault in self.listeners[s].faults:
                self.breach(f"{s}: {fault}")
            self.samples[s].append((now, *memory(gateway.process.pid)))
        return self.breaches

    def rekeys(self):
        """Of each side, by tunnel."""
        prefix = 'esplanade_tunnel_rekeys_total{tunnel="t'
        return {s: [int(v) for k, v in x.last.items() if k.startswith(prefix)] for s, x in self.scrapes.items()}

    def drops(self, side):
        """By reason."""
        found = {}
        for name, value in self.scrapes[side].last.items():
            if name.startswith("esplanade_dropped_frames_total{") and value:
                reason = name.partition('reason="')[2].partition('"')[0]
                found[reason] = found.get(reason, 0) + int(value)
        return found

    def line(self):
        """How it stands."""
        flows = self.traffic.flows
        total = {what: sum(getattr(f, what) for f in flows) for what in ("sent", "got", "lost", "wrong", "twice")}
        rekeys = " + ".join(str(sum(r)) for r in self.rekeys().values())
        size = ", ".join(f"{x[-1][1] >> 20} MiB {x[-1][2]} fds" for x in self.samples.values() if x)
        return (
            f"{total['sent']} sent, {total['got']} arrived, {sum(len(f.under_way) for f in flows)} under way, {total['lost']} lost, "
            f"{total['wrong']} wrong, {total['twice']} twice; {rekeys} rekeys; {sum(r.good for r in self.reloads)} reloads and "
            f"{sum(r.bad for r in self.reloads)} bad files; {sum(k.changes for k in self.kernels)} changes of routes and neighbours; "
            f"{sum(j.sent for j in self.junk)} bad frames; {sum(g.said for g in self.garbage)} bad clients, "
            f"{sum(f.started for f in self.followers)} followers; {size}"
        )

    def at_rest(self):
        """Accounts, once nothing is under way."""
        for s in SIDES:
            if self.bed.gateways[s].process.poll() is not None:
                continue

            def of(name, s=s):
                return sum(v for k, v in self.scrapes[s].last.items() if k.partition("{")[0] == f"esplanade_{name}")

            def settled(s=s, of=of):
                self.scrapes[s].step()
                return of("worker_waiting_frames") + of("worker_in_flight_frames") + of("sas_retiring") == 0

            with contextlib.suppress(Failed):
                wait_for("frames to come to rest", settled, 10)
            came = of("worker_received_frames_total") + of("worker_handed_in_frames_total") + of("worker_generated_frames_total")
            went = sum(of(f"worker_{w}_frames_total") for w in ("sent", "handed_out", "punted", "consumed"))
            went += of("dropped_frames_total")
            inside = of("worker_waiting_frames") + of("worker_in_flight_frames")
            if came != went or inside:
                self.breach(f"{s}: {came:.0f} frames came, {went:.0f} ended, {inside:.0f} are inside")
            if of("sas_retiring"):
                self.breach(f"{s}: {of('sas_retiring'):.0f} removed SAs are still there")
            if of("leases_failed"):
                self.breach(f"{s}: leases failed")
            # Two pairs of each tunnel while it is rekeyed, one more in its overlap, and one for a bad moment.
            if of("sas") > TUNNELS * 2 * 4 + 2 * 150:
                self.breach(f"{s}: {of('sas'):.0f} SAs for {TUNNELS} tunnels")

    def grown(self):
        """Compares memory and descriptors."""
        self.compared = {}
        for s, all_samples in self.samples.items():
            samples = [x for x in all_samples if x[0] >= min(WARM_UP, all_samples[-1][0] / 3)]
            part = max(len(samples) // 5, 1)
            before, after = ([statistics.median(x[i] for x in p) for i in (1, 2, 3)] for p in (samples[:part], samples[-part:]))
            self.compared[s] = (before, after)
            if after[0] - before[0] > GROWTH:
                self.breach(f"{s}: memory grew from {before[0] / 2**20:.1f} to {after[0] / 2**20:.1f} MiB")
            for i, what in ((1, "descriptors"), (2, "threads")):
                if after[i] > before[i] + 8:
                    self.breach(f"{s}: {before[i]:.0f} {what} became {after[i]:.0f}")

    def end(self, seconds):
        """Ends the gateways; what they say then, and what their logs have said."""
        for s, gateway in self.bed.gateways.items():
            try:
                gateway.stop()
            except Failed as e:
                self.breach(f"{s}: {e}")
            said = {}
            for line in gateway.log.read_text(errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    self.breach(f"{s}: a line of the log that is none: {line[:300]}")
                    continue
                message = entry["fields"].get("message", "")
                said[entry["level"], message] = said.get((entry["level"], message), 0) + 1
                # A bad file is an error, and names itself.
                if entry["level"] == "ERROR" and "bad.toml" not in message and "configuration refused" not in message:
                    self.breach(f"{s}: log: {json.dumps(entry['fields'])[:500]}")
            self.said = said
        for s, rekeys in self.rekeys().items():
            least = min(rekeys, default=0)
            if len(rekeys) != TUNNELS or least < seconds / REKEY_EVERY - 1:
                self.breach(f"{s}: {len(rekeys)} tunnels, the slowest with {least} rekeys in {seconds:.0f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gateway", type=Path, required=True, help="program to test")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--rate", type=float, default=400, help="good packets per second in each direction")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="of all that is chosen by chance")
    parser.add_argument("--keep", type=Path, help="leave configurations and logs in this new directory")
    args = parser.parse_args()
    print(f"soak: {args.minutes:g} minutes, {args.rate:g} packets/s each way through {TUNNELS} tunnels, seed {args.seed}", flush=True)
    with World("esplanade-soak", args.keep) as world:
        soak = Soak(world, args.gateway.resolve(), args.seed, args.rate)
        soak.run(args.minutes * 60)
        took = time.monotonic() - soak.began
        soak.end(args.minutes * 60 if not soak.breaches else 0)
        print(f"end, after {took:.0f} s: {soak.line()}")
        for s in SIDES:
            before, after = soak.compared[s]
            print(
                f"{s}: memory {before[0] / 2**20:.1f} -> {after[0] / 2**20:.1f} MiB, descriptors {before[1]:.0f} -> {after[1]:.0f}; "
                f"{soak.bed.keys.asked} successors asked for, {soak.bed.keys.made} made; drops {soak.drops(s)}; events {soak.listeners[s].kinds}"
            )
        for s, wire in zip(SIDES, soak.traffic.wires):
            print(f"{s} sent {wire.packets} ESP packets, no number or nonce twice" if not wire.faults else f"{s}: {len(wire.faults)} faults on the wire")
        if soak.breaches:
            print(f"FAIL  soak, seed {args.seed}:")
            for text in soak.breaches[:20]:
                print(f"  {text}")
            sys.exit(1)
        print(f"PASS  soak, seed {args.seed}")


if __name__ == "__main__":
    main()
