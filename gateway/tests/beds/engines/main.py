"""Look-aside engines behind af_xdp ports, driven by the ordinary worker loop. The engines are models, behind vfio-user sockets.

    through   both directions through an engine of one gateway, the other with its CPU or another engine: every packet comes out,
              in order within its flow, and every frame is accounted for
    scapy     every suite, mode and direction of each engine against scapy's IPsec layer
    rekey     keys change while packets flow through an engine, the new SA first inbound, then outbound: none is lost
    restart   SIGKILL while an engine seals, and a new start each time: no nonce is seen twice outside. An SA whose numbers the
              engine keeps stands still after it, and says so, until it has a successor
    gone      SIGKILL for the engine itself, in full flight: what it had is lost, the tunnel goes on with the CPU, and the
              engine comes back to service when it is there again
    ports     gateways whose ports are those of an EN7581's block too, hosts with a kernel's stack behind its MACs: echoes and TCP
              through a tunnel on the CPU, and on the engine of the same block
"""

import argparse
import random
import secrets
import socket
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "peers/lib"))

import block
import by_scapy
from gateway import Gateway
from netns import Failed, World, end, mac, private_file, run_cases, wait_for
from packets import raw_socket, udp_frame
from pair import OTHER, OUTER, Pair, both_ways, tunnel

CBC = ("aes-128-cbc+hmac-sha2-256-128", 16, 32)
CTR = ("aes-128-ctr+hmac-sha2-256-128", 20, 32)
NETS = {"left": "10.1", "right": "10.2"}
FLOWS = 64
# Fewer under way than any ring holds, however slow the machine is: whatever is lost is the gateway's fault.
UNDER_WAY = 300
KILLS = 5
REKEYS = 6
ESP = 14 + 20

# What the engines of the gateways are: kind, mode. None: the CPU.
COUPLES = {
    "EIP-93 crypto - CPU": (("eip93", "crypto"), None),
    "EIP-93 packet - CPU": (("eip93", "packet"), None),
    "SOE - CPU": (("soe", "packet"), None),
    "EIP-93 packet - SOE": (("eip93", "packet"), ("soe", "packet")),
}


class Bed:
    """What all cases need."""

    def __init__(self, model, packets, seed):
        self.model, self.packets, self.seed = model, packets, seed

    def serve(self, world, kind, name):
        """A model; the path of its socket."""
        path = world.dir / f"{name}.sock"
        path.unlink(missing_ok=True)
        process = world.start(self.model, kind, "--socket", path, log=f"{name}.log")
        wait_for("the model's socket", path.exists)
        return process, path


def keys(suite):
    """Key material of a tunnel's two SAs."""
    return [(secrets.token_hex(suite[1]), secrets.token_hex(suite[2])) for _ in OUTER]


def sas(side, suite, material, spi, engine, name="t"):
    """One side's SAs, put on an engine or not."""
    esn = False
    more = 'window = 64\n' if engine and engine[1] == "packet" and engine[0] == "soe" else ""
    if engine and engine == ("eip93", "packet"):
        more = "window = 32\n"
    if engine:
        more += f'offload = "{engine[1]}"\nengine = "e0"\n'
    if engine and engine[0] == "soe":
        more += 'df = "clear"\n'
    text = tunnel(name, side, [k for k, _ in material], spi, more, suite=suite[0], esn=esn)
    for key, auth in material:
        text = text.replace(f'key = "{key}"\n', f'key = "{key}"\nauth_key = "{auth}"\n')
    return text


def policies(side, name="t", third=""):
    """Of a tunnel between the two networks."""
    own, far = NETS[side], NETS[OTHER[side]]
    return both_ways(name, f"{own}.{third or '0'}.0/24", f"{far}.{third or '0'}.0/24", name)


def config(pair, side, socket_path=None, kind=None, networks=1):
    """A gateway, with an engine or without."""
    own, far = NETS[side], NETS[OTHER[side]]
    text = "[memory]\nframes = 32768\n" + pair.wan(side)
    text += f'[[port]]\nname = "lan"\nkind = "af_xdp"\nside = "inside"\naddresses = ["{own}.0.1/16"]\n'
    text += f'[[route]]\nto = "{far}.0.0/16"\nvia = "{OUTER[OTHER[side]]}"\n'
    for third in range(networks):
        text += f'[[neighbour]]\nip = "{own}.{third}.2"\nmac = "{mac(pair.host(side), "eth0")}"\nport = "lan"\n'
    if kind:
        text += f'[[engine]]\nname = "e0"\nkind = "{kind}"\nsocket = "{socket_path}"\n'
    return text


class Flow:
    """Packets from one host to the other, counted and held against their order."""

    def __init__(self, pair, side, third=0):
        own, far = (f"{NETS[s]}.{third}.2" for s in (side, OTHER[side]))
        frame = udp_frame(pair.mac[side, "lan"], own, far, 0)
        self.frames = [frame[:34] + struct.pack("!H", 20000 + n) + frame[36:] for n in range(FLOWS)]
        self.source = socket.inet_aton(own)
        self.out = raw_socket(pair.host(side), "eth0")
        self.sink = raw_socket(pair.host(OTHER[side]), "eth0")
        self.sink.setblocking(False)
        self.sent, self.got, self.lost, self.disorder, self.last = 0, 0, 0, 0, [-1] * FLOWS

    def send(self):
        """One more."""
        frame = self.frames[self.sent % FLOWS]
        self.out.send(frame[:42] + struct.pack("!I", self.sent) + frame[46:])
        self.sent += 1

    def take(self):
        """What has come."""
        while True:
            try:
                frame = self.sink.recv(2048)
            except (BlockingIOError, TimeoutError):
                return
            if frame[23] != 17 or frame[26:30] != self.source:
                continue
            flow = int.from_bytes(frame[34:36], "big") - 20000
            (number,) = struct.unpack_from("!I", frame, 42)
            self.got += 1
            self.disorder += number <= self.last[flow]
            self.last[flow] = number

    def pace(self):
        """Waits while too many are under way. Those that do not come in time are lost, and not waited for again."""
        deadline = time.monotonic() + 2
        while self.sent - self.got - self.lost >= UNDER_WAY:
            if time.monotonic() > deadline:
                self.lost = self.sent - self.got
            self.take()

    def run(self, packets=0, until=lambda: False):
        """So many more packets, or until something has happened."""
        goal = self.sent + packets if packets else None
        while not until() and self.sent != goal:
            self.send()
            self.pace()

    def settle(self, patience=3):
        """Waits for the last ones."""
        deadline = time.monotonic() + patience
        while self.got < self.sent and time.monotonic() < deadline:
            self.take()

    def whole(self):
        """Fails unless all came, in order."""
        self.settle()
        if self.got != self.sent or self.disorder:
            raise Failed(f"{self.sent} sent, {self.got} arrived, {self.disorder} out of order")


def engine_of(gateway):
    """What the gateway says of its engine."""
    return gateway.ask("engines")[0]


def couple(world, bed, program, name, left, right):
    """Packets both ways between two gateways."""
    short = name.lower().replace(" ", "").replace("-", "")
    pair = Pair(world, program, short)
    material = keys(CBC)
    for side, engine in zip(OUTER, (left, right)):
        path = bed.serve(world, engine[0], f"{short}-{side}")[1] if engine else None
        text = sas(side, CBC, material, 0x3000, engine) + policies(side)
        pair.start(side, config(pair, side, path, engine and engine[0]), text)
    flows = [Flow(pair, side) for side in OUTER]
    began = time.monotonic()
    for _ in range(bed.packets // 100):
        for flow in flows:
            flow.run(50)
    for flow in flows:
        flow.settle()
    took = time.monotonic() - began
    drops = pair.drops()
    engines = {s: engine_of(pair.gateways[s]) for s, e in zip(OUTER, (left, right)) if e}
    # The account of all frames, engines included, is checked at the end of each.
    pair.stop()
    if any(drops.values()):
        raise Failed(f"{name}: drops {drops}")
    for flow in flows:
        flow.whole()
    sent = sum(flow.sent for flow in flows)
    for side, e in engines.items():
        if e["submitted"] < sent or e["state"] != "serving":
            raise Failed(f"{name}: {sent} packets, the {side} engine says {e}")
    return f"{name} {sent} in {took:.0f} s"


def through(world, program, bed):
    """All couples."""
    told = [couple(world, bed, program, name, *ends) for name, ends in COUPLES.items()]
    return "; ".join(told) + ": all arrived in order, none dropped"


def scapy(world, program, bed):
    """An independent implementation."""
    told = [by_scapy.interop(world, program, bed, kind, sys.modules[__name__]) for kind in ("eip93", "soe")]
    return ", ".join(told) + f", {len(by_scapy.SIZES)} packets each way: scapy opens what they seal, they open what scapy seals"


def rekey(world, program, bed):
    """Make before break, by SA files."""
    pair = Pair(world, program, "rekey")
    engine = ("eip93", "packet")
    _, path = bed.serve(world, engine[0], "rekey")
    generations = [keys(CBC)]

    def text(side, inbound, outbound):
        """SAs of some generations: which may come in, and which sends."""
        who = engine if side == "left" else None
        made = ""
        for n in sorted({*inbound, outbound}):
            both = sas(side, CBC, generations[n], 0x3000 + 16 * n, who)
            head, first, second = both.split("[[tunnel.sa]]")
            made = made or head
            for sa in (first, second):
                wanted = n == outbound if 'direction = "out"' in sa else n in inbound
                made += "[[tunnel.sa]]" + sa if wanted else ""
        return made + policies(side)

    for side in OUTER:
        kind = engine[0] if side == "left" else None
        pair.start(side, config(pair, side, path, kind), text(side, [0], 0))
    flows = [Flow(pair, side) for side in OUTER]

    def run(packets):
        for _ in range(packets // 20):
            for flow in flows:
                flow.run(10)

    def load(side, inbound, outbound):
        gateway = pair.gateways[side]
        before = gateway.ask("status")["last_reload"]["epoch"]
        private_file(gateway.dir / "new.toml", text(side, inbound, outbound))
        (gateway.dir / "new.toml").rename(gateway.dir / "sa.toml")

        def loaded():
            last = gateway.ask("status")["last_reload"]
            if not last["ok"]:
                raise Failed(f"{side}: {last['problems'][:2]}")
            run(40)
            return last["epoch"] != before

        wait_for("the reload", loaded)

    run(400)
    for n in range(REKEYS):
        generations.append(keys(CBC))
        for inbound, outbound in (([n, n + 1], n), ([n, n + 1], n + 1), ([n + 1], n + 1)):
            for side in OUTER:
                load(side, inbound, outbound)
            for flow in flows:
                flow.settle()
    for flow in flows:
        flow.whole()
    drops = pair.drops()
    pair.stop()
    if any(drops.values()):
        raise Failed(f"drops {drops}")
    return f"{REKEYS} rekeys on an EIP-93 in packet mode, {sum(f.sent for f in flows)} packets meanwhile, none lost"


def restart(world, program, bed):
    """Killed in full flight."""
    rng = random.Random(bed.seed)
    pair = Pair(world, program, "restart")
    _, path = bed.serve(world, "eip93", "restart")
    material = keys(CTR)
    there = world.dir / "restart-left"
    there.mkdir()
    first = sas("left", CTR, material, 0x3000, ("eip93", "crypto")) + policies("left")
    private_file(there / "sa.toml", first)
    # No gateway at the other end: it would take the packets before they can be seen.
    tap = raw_socket(pair.ns["right"], "wan")
    tap.setblocking(False)
    seen = []

    def hear():
        while True:
            try:
                frame = tap.recv(2048)
            except (BlockingIOError, TimeoutError):
                return
            if frame[23] == 50 and frame[26:30] == socket.inet_aton(OUTER["left"]):
                seen.append(frame[ESP : ESP + 16])

    flow = Flow(pair, "left")
    # Nothing arrives, so nothing is waited for.
    flow.pace = lambda: time.sleep(0.0002)
    for life in range(KILLS + 1):
        gateway = Gateway(world, program, pair.ns["left"], there, config(pair, "left", path, "eip93"), "restart-left.log")
        before, deadline = len(seen), time.monotonic() + rng.uniform(0.2, 0.8)
        while time.monotonic() < deadline or len(seen) == before:
            flow.run(20)
            hear()
            if time.monotonic() > deadline + 10:
                raise Failed(f"life {life}: nothing comes out; {gateway.ask('stats')['drops']}")
        if life == 0:
            private_file(there / "next.toml", first.replace("first_use = true\n", ""))
            (there / "next.toml").rename(there / "sa.toml")
            time.sleep(0.5)
        if life < KILLS:
            gateway.kill()
    hear()
    gateway.stop()
    nonces = [struct.unpack("!I4xQ", s) for s in seen]
    if len(set(nonces)) != len(nonces):
        raise Failed(f"seed {bed.seed}: {len(nonces) - len(set(nonces))} of {len(nonces)} nonces were used twice")
    stopped = standing_still(world, program, bed)
    return f"{KILLS} times killed, {len(nonces)} packets sealed by an EIP-93, no nonce twice; {stopped}"


def standing_still(world, program, bed):
    """An SOE begins at number 1: after a restart its outbound SA must not."""
    pair = Pair(world, program, "stands")
    _, path = bed.serve(world, "soe", "stands")
    material, engine = keys(CBC), ("soe", "packet")
    pair.start("right", config(pair, "right"), sas("right", CBC, material, 0x3000, None) + policies("right"))
    first = sas("left", CBC, material, 0x3000, engine) + policies("left")
    pair.start("left", config(pair, "left", path, "soe"), first)
    flow = Flow(pair, "left")
    flow.run(500)
    flow.settle()
    left = pair.gateways["left"]
    private_file(left.dir / "next.toml", first.replace("first_use = true\n", ""))
    (left.dir / "next.toml").rename(left.dir / "sa.toml")
    time.sleep(0.5)
    left.kill()
    got = flow.got
    left = Gateway(world, program, pair.ns["left"], left.dir, config(pair, "left", path, "soe"), "stands-again.log")
    pair.gateways["left"] = left
    flow.run(100)
    flow.settle(1)
    if flow.got != got:
        raise Failed("an SA whose numbers the engine keeps went on after a restart")
    if "engine_lost" not in str(left.ask("sa", "list")):
        raise Failed(f"nobody says that the SA wants a successor: {left.ask('sa', 'list')}")
    material = keys(CBC)
    for side, who in (("right", None), ("left", engine)):
        gateway = pair.gateways[side]
        private_file(gateway.dir / "new.toml", sas(side, CBC, material, 0x4000, who) + policies(side))
        (gateway.dir / "new.toml").rename(gateway.dir / "sa.toml")
    sent = flow.sent

    def again():
        flow.run(1)
        flow.settle(0.2)
        return flow.got - got >= 10

    wait_for("packets under the new key", again)
    pair.stop()
    return f"an SOE's SA stood still after a restart and went on with a new key ({flow.sent - sent} packets)"


def gone(world, program, bed):
    """The engine dies and comes back."""
    pair = Pair(world, program, "gone")
    process, path = bed.serve(world, "eip93", "gone")
    material = keys(CBC)
    pair.start("right", config(pair, "right"), sas("right", CBC, material, 0x3000, None) + policies("right"))
    pair.start("left", config(pair, "left", path, "eip93"), sas("left", CBC, material, 0x3000, ("eip93", "crypto")) + policies("left"))
    flow, left = Flow(pair, "left"), pair.gateways["left"]
    flow.run(2000)
    flow.settle()
    flow.whole()
    process.kill()
    process.wait()
    began = time.monotonic()
    got = flow.got
    flow.run(until=lambda: flow.got > got + 1000 or time.monotonic() > began + 20)
    flow.settle()
    lost = flow.sent - flow.got
    if flow.got <= got + 1000 or lost > UNDER_WAY + engine_of(left)["refused"]:
        raise Failed(f"the tunnel does not go on without its engine: {flow.sent} sent, {flow.got} arrived; {engine_of(left)}")
    without = time.monotonic() - began
    if engine_of(left)["state"] == "serving":
        raise Failed(f"{engine_of(left)}")
    bed.serve(world, "eip93", "gone")
    wait_for("the engine to come back", lambda: engine_of(left)["state"] == "serving", 60)
    before = engine_of(left)["submitted"]
    flow.run(2000)
    flow.settle()
    if flow.sent - flow.got != lost or engine_of(left)["submitted"] < before + 2000:
        raise Failed(f"{flow.sent} sent, {flow.got} arrived, {lost} lost before; {engine_of(left)}")
    end(left.process)
    pair.gateways["right"].stop()
    numbers = gone_with_numbers(world, program, bed)
    return f"{lost} packets lost with the engine, 1000 more came with the CPU after {without:.1f} s, and it came back to service; {numbers}"


def gone_with_numbers(world, program, bed):
    """An SOE takes its SAs' numbers with it: nobody else may go on under their keys."""
    pair = Pair(world, program, "numbers")
    process, path = bed.serve(world, "soe", "numbers")
    material, engine = keys(CBC), ("soe", "packet")
    pair.start("right", config(pair, "right"), sas("right", CBC, material, 0x3000, None) + policies("right"))
    pair.start("left", config(pair, "left", path, "soe"), sas("left", CBC, material, 0x3000, engine) + policies("left"))
    flow, left = Flow(pair, "left"), pair.gateways["left"]
    flow.run(2000)
    flow.settle()
    flow.whole()
    process.kill()
    process.wait()
    flow.run(1)
    wait_for("the engine to be missed", lambda: engine_of(left)["state"] != "serving")
    got = flow.got
    flow.run(100)
    flow.settle(0.5)
    if flow.got != got or "engine_lost" not in str(left.ask("sa", "list")):
        raise Failed(f"{flow.got - got} packets went on under a key whose numbers are lost; {left.ask('sa', 'list')}")
    bed.serve(world, "soe", "numbers")
    wait_for("the engine to come back", lambda: engine_of(left)["state"] == "serving", 60)
    material = keys(CBC)
    for side, who in (("right", None), ("left", engine)):
        gateway = pair.gateways[side]
        private_file(gateway.dir / "new.toml", sas(side, CBC, material, 0x4000, who) + policies(side))
        (gateway.dir / "new.toml").rename(gateway.dir / "sa.toml")
    before = engine_of(left)["submitted"]

    def again():
        flow.run(1)
        flow.settle(0.2)
        return flow.got - got >= 10

    wait_for("packets under the new key", again)
    wait_for("the engine's counts", lambda: engine_of(left)["submitted"] >= before + 10)
    end(left.process)
    pair.gateways["right"].stop()
    return "an SOE's SA stopped with it and had a successor"


def ports(world, program, bed):
    """No other port than a block's."""
    return block.both(world, program, bed)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gateway", type=Path, required=True, help="program to test")
    parser.add_argument("--model", type=Path, required=True, help="program that models the engines")
    parser.add_argument("--packets", type=int, default=20_000, help="packets of each couple in `through`")
    parser.add_argument("--only", help="one case")
    parser.add_argument("--keep", type=Path, help="leave configurations and logs in this new directory")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="of the moments of death")
    args = parser.parse_args()
    bed = Bed(args.model.resolve(), args.packets, args.seed)
    cases = {c.__name__: lambda w, p, c=c: c(w, p, bed) for c in (through, scapy, rekey, restart, gone, ports)}
    if args.only:
        cases = {args.only: cases[args.only]}
    with World("esplanade-engines", args.keep) as world:
        bad = run_cases(world, args.gateway.resolve(), cases)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
