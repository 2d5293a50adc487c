"""A gateway whose routes, addresses and neighbours are the kernel's.

    host ---- lan [gateway] wan1 ---- first
                            wan2 ---- second

    follow      `ip route` in every way that the mirror knows: what the host sends comes out where the kernel says, or not at all
    neighbours  the kernel finds those that nobody knows, forgets those that are gone, and is asked about stale ones
    addresses   own addresses come and go while it runs
    churn       thousands of changes under traffic: no packet of other flows is lost, and the tables agree afterwards
    overrun     the kernel's messages come faster than they are read: everything is read again, and the tables agree
    ordinary    all the same without any right, as an ordinary user
"""

import argparse
import ipaddress
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "peers/lib"))

from gateway import Gateway
from netns import Failed, World, address, mac, private_file, run_cases, sh, veth, wait_for
from packets import raw_socket, udp_frame

POLICIES = "".join(
    f'[[policy]]\nname = "{d}{n}"\ndirection = "{d}"\npriority = {n}\naction = "bypass"\nsrc = "{a}"\ndst = "{a}"\n'
    for d in ("out", "in")
    for n, a in ((1, "0.0.0.0/0"), (2, "::/0"))
)
TAKEN = '["10.8.0.0/14", "10.100.0.0/14", "fd09::/16"]'
CHANGES = 6000
FLOWS = 64
UNDER_WAY = 200


class Site:
    """Namespaces, cables and the gateway between them."""

    def __init__(self, world, program, name, kernel="", more="", user=None):
        self.world, self.name = world, name
        self.gw = world.namespace(f"{name}-gw")
        self.ends = {}
        for port, other, net in (("lan", "host", "10.1.0"), ("wan1", "first", "192.0.2"), ("wan2", "second", "198.51.100")):
            ns = world.namespace(f"{name}-{other}")
            veth(self.gw, port, ns, "eth0")
            address(self.gw, port, f"{net}.1/24", f"fd0{'lan wan1 wan2'.split().index(port)}::1/64")
            address(ns, "eth0", f"{net}.2/24", f"{net}.3/24", f"fd0{'lan wan1 wan2'.split().index(port)}::2/64")
            self.ends[other] = ns
        self.mac = mac(self.gw, "lan")
        there = world.dir / name
        there.mkdir()
        private_file(there / "sa.toml", POLICIES)
        if user:
            # The directory belongs to the user that the gateway becomes; the way to it must be open.
            os.chmod(world.dir, 0o755)
            for path in (there, there / "sa.toml"):
                shutil.chown(path, user)
        config = (
            '[[port]]\nname = "lan"\nkind = "af_xdp"\nside = "inside"\n'
            f"af_xdp = {{ steer_destinations = {TAKEN} }}\n"
            '[[port]]\nname = "wan1"\nkind = "af_xdp"\nside = "outside"\n'
            '[[port]]\nname = "wan2"\nkind = "af_xdp"\nside = "outside"\n'
            f"{more}[kernel]\nroutes = true\nneighbours = true\naddresses = true\n{kernel}"
        )
        if user:
            config += f'[privileges]\nuser = "{user}"\n'
        self.gateway = Gateway(world, program, self.gw, there, config, f"{name}.log")
        self.out = raw_socket(self.ends["host"], "eth0")
        self.sinks = {n: raw_socket(self.ends[n], "eth0", 3) for n in ("first", "second")}
        for s in self.sinks.values():
            s.setblocking(False)
        self.number = 0

    def ip(self, *command):
        """Changes the kernel's tables."""
        sh("ip", *command, namespace=self.gw)

    def batch(self, lines):
        """Many changes at once, in the background."""
        path = self.world.dir / f"{self.name}.batch"
        path.write_text("\n".join(lines) + "\n")
        return subprocess.Popen(["ip", "-n", self.gw, "-batch", path], stderr=subprocess.PIPE)

    def taken(self):
        """Numbers of UDP packets that arrived since the last time, by end."""
        got = {}
        for name, sink in self.sinks.items():
            got[name] = []
            while True:
                try:
                    f = sink.recv(2048)
                except OSError:
                    # Nothing more, or the device has just gone down.
                    break
                if len(f) < 66:
                    # Empty datagrams are what an ordinary user resolves neighbours with.
                    continue
                if f[12:14] == b"\x08\x00" and f[23] == 17 and f[36:38] == b"\x00\x09":
                    got[name].append(struct.unpack_from("!I", f, 42)[0])
                elif f[12:14] == b"\x86\xdd" and f[20] == 17 and f[56:58] == b"\x00\x09":
                    got[name].append(struct.unpack_from("!I", f, 62)[0])
        return got

    def probe(self, dst):
        """Sends one packet; the end at which it comes out within a moment."""
        self.number += 1
        frame = udp_frame(self.mac, "10.1.0.2", dst, self.number) if ":" not in dst else udp6(self.mac, "fd00::2", dst, self.number)
        self.out.send(frame)
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline:
            for name, numbers in self.taken().items():
                if self.number in numbers:
                    return name
            time.sleep(0.001)
        return None

    def goes(self, dst, where, patience=8):
        """Waits until packets come out there: a name, several, or None for nowhere. Milliseconds that it took."""
        began, allowed = time.monotonic(), where if isinstance(where, tuple) else (where,)
        while True:
            sent = time.monotonic()
            got = self.probe(dst)
            if got in allowed:
                return (sent - began) * 1e3
            if time.monotonic() - began > patience:
                seen = self.gateway.ask("routes", dst)["routes"]
                raise Failed(f"packets to {dst} come out at {got}, not {where}; routes {seen}, drops {self.drops()}, neighbours {self.gateway.ask('neighbours')}")

    def drops(self):
        """By reason."""
        return {d["reason"]: d["frames"] for d in self.gateway.ask("stats")["drops"]}

    def kernel(self):
        """How the mirror stands."""
        return self.gateway.ask("routes", "--limit", "1")["kernel"]

    def agree(self, net):
        """Whether gateway and kernel have the same IPv4 routes below `net`, and how many."""
        inside = ipaddress.ip_network(net)

        def below(prefix):
            return ipaddress.ip_network(prefix, strict=False).subnet_of(inside)

        theirs = {}
        for r in json.loads(sh("ip", "-j", "route", "show", "root", net, namespace=self.gw) or "[]"):
            dst = r["dst"] if "/" in r["dst"] else r["dst"] + "/32"
            if below(dst):
                hops = [h.get("gateway") or h.get("via", {}).get("host") for h in r.get("nexthops", [r])]
                theirs[dst] = {h for h in hops if h}
        ours = {}
        for r in self.gateway.ask("routes", "--limit", "1000000")["routes"]:
            if ":" not in r["to"] and below(r["to"]):
                ours.setdefault(r["to"], set()).update(r["path"].split()[1:2] if r["path"].startswith("via") else ())
        return ours == theirs, len(ours), {k: (ours.get(k), theirs.get(k)) for k in {*ours, *theirs} if ours.get(k) != theirs.get(k)}

    def settle(self, net):
        """Waits until they agree; how many routes."""
        last = {}

        def agreed():
            last["answer"] = self.agree(net)
            return last["answer"][0]

        try:
            wait_for("agreement", agreed, 30)
        except Failed as e:
            different = list(last["answer"][2].items())[:5]
            raise Failed(f"gateway and kernel do not agree about {net}: {different}, {self.kernel()}") from e
        return last["answer"][1]

    def stop(self):
        """Ends it; it fails when an account does not balance."""
        self.gateway.stop()


def udp6(to, src, dst, number):
    """An Ethernet frame with an IPv6 UDP packet."""
    payload = struct.pack("!I", number) + bytes(60)
    ends = ipaddress.ip_address(src).packed + ipaddress.ip_address(dst).packed
    udp = struct.pack("!3H", 40000, 9, 8 + len(payload))
    total = sum(struct.unpack(f"!{len(ends) // 2}H", ends)) + 17 + 2 * (8 + len(payload)) + 40000 + 9
    total += sum(struct.unpack(f"!{len(payload) // 2}H", payload))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    udp += struct.pack("!H", ~total & 0xFFFF) + payload
    head = struct.pack("!IHBB", 6 << 28, len(udp), 17, 64) + ends
    return bytes.fromhex(to.replace(":", "")) + bytes(6) + b"\x86\xdd" + head + udp


def follow(world, program):
    """Each kind of route."""
    site = Site(world, program, "follow", more='[[route]]\nto = "10.11.0.0/16"\nblackhole = true\n')
    ip, took = site.ip, []

    def change(*command, dst, where):
        ip(*command)
        took.append(site.goes(dst, where))

    ip("route", "add", "10.8.0.0/16", "via", "192.0.2.2")
    ip("route", "add", "10.9.0.0/16", "via", "198.51.100.2")
    # Routers are looked for without a packet.
    site.goes("10.8.0.1", "first")
    site.goes("10.9.0.1", "second")
    change("route", "replace", "10.8.0.0/16", "via", "198.51.100.2", dst="10.8.0.1", where="second")
    change("route", "add", "10.8.1.0/24", "via", "192.0.2.2", dst="10.8.1.1", where="first")
    change("route", "add", "blackhole", "10.8.1.128/25", dst="10.8.1.129", where=None)
    change("route", "del", "10.8.1.128/25", dst="10.8.1.129", where="first")
    change("route", "add", "unreachable", "10.8.1.129", dst="10.8.1.129", where=None)
    change("route", "del", "10.8.1.129", dst="10.8.1.129", where="first")
    # Metrics: the lowest wins, and the next one waits.
    change("route", "add", "10.10.0.0/16", "via", "192.0.2.2", "metric", "20", dst="10.10.0.1", where="first")
    change("route", "add", "10.10.0.0/16", "via", "198.51.100.2", "metric", "10", dst="10.10.0.1", where="second")
    change("route", "del", "10.10.0.0/16", "via", "198.51.100.2", "metric", "10", dst="10.10.0.1", where="first")
    # On the link, and by a router of the other family.
    change("route", "add", "10.8.2.0/24", "dev", "wan1", dst="10.8.1.1", where="first")
    ip("neigh", "add", "10.8.2.1", "lladdr", mac(site.ends["first"], "eth0"), "dev", "wan1")
    took.append(site.goes("10.8.2.1", "first"))
    change("route", "add", "10.8.3.0/24", "via", "inet6", "fd02::2", "dev", "wan2", dst="10.8.3.1", where="second")
    # IPv6.
    change("-6", "route", "add", "fd09::/32", "via", "fd01::2", dst="fd09::1", where="first")
    change("-6", "route", "replace", "fd09::/32", "via", "fd02::2", dst="fd09::1", where="second")
    change("-6", "route", "del", "fd09::/32", dst="fd09::1", where=None)
    # Equal paths, with weights, in both families.
    hops = ("nexthop", "via", "192.0.2.2", "weight", "3", "nexthop", "via", "198.51.100.2", "weight", "1")
    change("route", "add", "10.8.4.0/22", *hops, dst="10.8.4.1", where=("first", "second"))
    split = spread(site)
    if not 0.6 < split < 0.9:
        raise Failed(f"weights 3 and 1, but {split:.2f} of the flows took the first path")
    shares = {r["path"]: r["share"] for r in paths(site, "10.8.4.1", "10.8.4.0/22")}
    if sorted(shares.values()) != [1, 3]:
        raise Failed(f"shares {shares}")
    ip("-6", "route", "add", "fd09:1::/32", "nexthop", "via", "fd01::2", "nexthop", "via", "fd02::2")
    wait_for("two IPv6 paths", lambda: len(paths(site, "fd09:1::1", "fd09:1::/32")) == 2)
    # A next-hop object.
    ip("nexthop", "add", "id", "7", "via", "198.51.100.2", "dev", "wan2")
    change("route", "add", "10.8.8.0/24", "nhid", "7", dst="10.8.8.1", where="second")
    change("nexthop", "replace", "id", "7", "via", "192.0.2.2", "dev", "wan1", dst="10.8.8.1", where="first")
    # The configuration wins at equal length, and only there.
    ip("route", "add", "10.11.0.0/16", "via", "192.0.2.2")
    change("route", "add", "10.11.1.0/24", "via", "192.0.2.2", dst="10.11.1.1", where="first")
    site.goes("10.11.2.1", None)
    # A device that goes down takes its routes along, silently for IPv4; the other path stays.
    change("link", "set", "wan1", "down", dst="10.8.4.1", where="second")
    wait_for("the path over wan1 to go", lambda: len(paths(site, "10.8.4.1", "10.8.4.0/22")) == 1)
    if spread(site) != 0 or site.probe("10.8.1.1") != "second":
        raise Failed("packets go out of a device that is down")
    ip("link", "set", "wan1", "up")
    change("route", "replace", "10.8.1.0/24", "via", "192.0.2.2", dst="10.8.1.1", where="first")
    # Its MTU is the port's, up to what the port was opened with.
    for mtu, ours in ((1300, 1300), (1500, 1500)):
        ip("link", "set", "wan1", "mtu", str(mtu))
        wait_for(f"an MTU of {ours}", lambda n=ours: [p["mtu"] for p in site.gateway.ask("ports") if p["name"] == "wan1"] == [n])
    # What is said of a packet names the route.
    why = site.gateway.ask("explain", "--src", "10.1.0.2", "--dst", "10.8.1.1", "--proto", "udp")["why"]
    if not any("10.8.1.0/24" in w and "table main" in w for w in why):
        raise Failed(f"explain: {why}")
    n = site.settle("10.8.0.0/15")
    k = site.kernel()
    site.stop()
    took.sort()
    return (
        f"{len(took)} changes followed, median {took[len(took) // 2]:.0f} ms, longest {took[-1]:.0f} ms from `ip` to the packet; "
        f"{n} IPv4 routes agree; {k['publications']} publications, {k['resyncs']} resyncs"
    )


def paths(site, dst, prefix):
    """Paths of one of the routes that cover a destination."""
    return [r for r in site.gateway.ask("routes", dst)["routes"] if r["to"] == prefix]


def spread(site, flows=400):
    """Part of so many flows to 10.8.4.0/22 that comes out at the first."""
    site.taken()
    for n in range(flows):
        f = udp_frame(site.mac, "10.1.0.2", f"10.8.{random.randint(4, 7)}.{random.randint(1, 254)}", n)
        site.out.send(f[:34] + struct.pack("!H", random.randint(1024, 65535)) + f[36:])
        if n % 20 == 19:
            time.sleep(0.005)
    time.sleep(0.3)
    got = {name: len(numbers) for name, numbers in site.taken().items()}
    if sum(got.values()) != flows:
        raise Failed(f"{flows} packets to 10.8.4.0/22, but {got} arrived; drops {site.drops()}")
    return got["first"] / flows


def state(site, device, addr):
    """The kernel's word about a neighbour."""
    found = json.loads(sh("ip", "-j", "neigh", "show", addr, "dev", device, namespace=site.gw) or "[]")
    return found[0]["state"][0] if found else None


def neighbours(world, program):
    """Found, forgotten, looked after."""
    site = Site(world, program, "neighbours")
    for dev in ("wan1", "wan2"):
        for family in ("ipv4", "ipv6"):
            base = f"net.{family}.neigh.{dev}"
            sh("sysctl", "-qw", f"{base}.delay_first_probe_time=1", f"{base}.retrans_time_ms=200", namespace=site.gw)
    site.ip("route", "add", "10.8.0.0/16", "via", "192.0.2.2")
    site.ip("-6", "route", "add", "fd09::/32", "via", "fd02::2")
    found = (site.goes("10.8.0.1", "first"), site.goes("fd09::1", "second"))
    # A router that moves: the gateway follows its new address.
    sh("ip", "link", "set", "eth0", "address", "02:00:00:00:00:99", namespace=site.ends["first"])
    site.ip("neigh", "flush", "dev", "wan1")
    began = time.monotonic()

    def known():
        return {n["addr"]: n["mac"] for n in site.gateway.ask("neighbours")}.get("192.0.2.2")

    wait_for("its new address", lambda: known() == "02:00:00:00:00:99")
    moved = (time.monotonic() - began) * 1e3
    site.goes("10.8.0.1", "first")
    # Nothing is sent through it, but it is made sure of again and again.
    site.ip("neigh", "change", "192.0.2.2", "lladdr", known(), "dev", "wan1", "nud", "stale")
    wait_for("a stale router to be asked again", lambda: state(site, "wan1", "192.0.2.2") == "REACHABLE", 40)
    # Forgotten again and again, each time just after it was asked for: it is asked for again at once.
    began = time.monotonic()
    for _ in range(5):
        site.ip("neigh", "flush", "dev", "wan1")
        # The change is a moment on its way.
        time.sleep(0.05)
        site.goes("10.8.0.1", "first")
    again = time.monotonic() - began
    if again > 3:
        raise Failed(f"five times forgotten, it took {again:.1f} s to find it")
    # It dies: forgotten, and found when it is back.
    sh("ip", "link", "set", "eth0", "down", namespace=site.ends["first"])
    site.ip("link", "set", "wan1", "up")
    site.ip("neigh", "flush", "dev", "wan1")
    wait_for("it to be forgotten", lambda: known() is None)
    sh("ip", "link", "set", "eth0", "up", namespace=site.ends["first"])
    back = site.goes("10.8.0.1", "first", 40)
    k = site.kernel()
    site.stop()
    return (
        f"routers found in {found[0]:.0f} ms (IPv4) and {found[1]:.0f} ms (IPv6), one that moved in {moved:.0f} ms, one that was gone "
        f"in {back:.0f} ms, one that was forgotten five times in {again:.1f} s; stale ones asked again; {k['requests']} requests, {k['requests_failed']} failed"
    )


def addresses(world, program):
    """Own addresses."""
    site = Site(world, program, "addresses")

    def own(addr):
        paths = site.gateway.ask("routes", addr)["routes"]
        return bool(paths) and paths[-1]["path"] == "local" and paths[-1]["to"] in (f"{addr}/32", f"{addr}/128")

    for addr, length in (("10.1.7.1", 24), ("203.0.113.9", 32), ("fd00:7::1", 64)):
        dev = "lo" if length == 32 else "lan"
        nodad = ("nodad",) if ":" in addr else ()
        site.ip("addr", "add", f"{addr}/{length}", "dev", dev, *nodad)
        wait_for(f"{addr} to be ours", lambda a=addr: own(a))
        site.ip("addr", "del", f"{addr}/{length}", "dev", dev)
        wait_for(f"{addr} to be ours no more", lambda a=addr: not own(a))
    # Errors come from an address that is ours then.
    heard = raw_socket(site.ends["host"], "eth0")

    def error_from():
        frame = bytearray(udp_frame(site.mac, "10.1.0.2", "10.8.0.1", 1))
        frame[22] = 1
        frame[24:26] = bytes(2)
        total = sum(struct.unpack("!10H", frame[14:34]))
        total = (total & 0xFFFF) + (total >> 16)
        frame[24:26] = struct.pack("!H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF)
        site.out.send(bytes(frame))
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            try:
                f = heard.recv(2048)
            except TimeoutError:
                break
            if f[23] == 1 and f[34] == 11:
                return ".".join(str(b) for b in f[26:30])
        return None

    site.ip("route", "add", "10.8.0.0/16", "via", "192.0.2.2")
    site.goes("10.8.0.1", "first")
    sh("ping", "-c", "1", "-W", "2", "10.1.0.1", namespace=site.ends["host"])
    first = wait_for("an error", error_from)
    site.ip("addr", "add", "10.0.0.1/32", "dev", "lo")
    wait_for("an error from the new address", lambda: error_from() == "10.0.0.1")
    site.ip("addr", "del", "10.0.0.1/32", "dev", "lo")
    wait_for("an error from the old address", lambda: error_from() == first)
    site.stop()
    return f"3 addresses came and went; time exceeded came from {first}, then 10.0.0.1, then {first}"


class Load:
    """Packets of many flows, with fewer under way than any ring holds."""

    def __init__(self, site):
        self.site, self.sent, self.got = site, 0, 0
        self.frames = [udp_frame(site.mac, "10.1.0.2", f"10.9.{n}.1", 0) for n in range(FLOWS)]

    def take(self):
        """Counts what has arrived."""
        self.got += sum(len(numbers) for numbers in self.site.taken().values())

    def step(self):
        """Some more packets."""
        for _ in range(32):
            f = self.frames[self.sent % FLOWS]
            self.site.out.send(f[:42] + struct.pack("!I", self.sent) + f[46:])
            self.sent += 1
        deadline = time.monotonic() + 2
        self.take()
        while self.sent - self.got >= UNDER_WAY and time.monotonic() < deadline:
            self.take()

    def lost(self):
        """What has not arrived in the end."""
        deadline = time.monotonic() + 2
        while self.got < self.sent and time.monotonic() < deadline:
            self.take()
        return self.sent - self.got


def changes(count):
    """Routes that come, change and go; what is left of them."""
    lines = []
    for n in range(count):
        net = f"10.{100 + n % 3}.{n // 3 % 250}.0/24"
        kind = (n // 750 + 3) % 4
        if kind == 3:
            lines.append(f"route flush {net}")
        else:
            via = ("192.0.2.2", "198.51.100.2", "192.0.2.3")[kind]
            lines.append(f"route replace {net} via {via}")
    return lines


def churn(world, program):
    """Changes under traffic."""
    site = Site(world, program, "churn")
    site.ip("route", "add", "10.9.0.0/16", "via", "192.0.2.2")
    site.goes("10.9.0.1", "first")
    before, dropped = site.kernel()["publications"], site.drops()
    load, began = Load(site), time.monotonic()
    running = site.batch(changes(CHANGES))
    while running.poll() is None or time.monotonic() - began < 6:
        load.step()
        if running.poll() is not None and time.monotonic() - began > 2:
            if running.returncode:
                raise Failed(f"ip -batch: {running.stderr.read().decode()[-300:]}")
            if time.monotonic() - began < 5:
                running = site.batch(changes(CHANGES))
    running.wait()
    seconds = time.monotonic() - began
    lost, drops = load.lost(), site.drops()
    n = site.settle("10.100.0.0/14")
    k = site.kernel()
    site.stop()
    if lost or drops != dropped:
        raise Failed(f"{lost} of {load.sent} packets lost, drops {drops} after {dropped}")
    return (
        f"{load.sent} packets of {FLOWS} flows in {seconds:.1f} s, 0 lost, while routes changed in batches of {CHANGES}; "
        f"{k['publications'] - before} publications, {k['overruns']} overruns; {n} routes agree"
    )


def overrun(world, program):
    """Far too small a queue."""
    site = Site(world, program, "overrun", kernel="receive_buffer = 2304\n")
    site.ip("route", "add", "10.9.0.0/16", "via", "192.0.2.2")
    site.goes("10.9.0.1", "first", 20)
    load, dropped = Load(site), site.drops()
    pid = site.gateway.process.pid
    for _ in range(3):
        # While it is stopped nobody reads; nothing is sent meanwhile.
        os.kill(pid, signal.SIGSTOP)
        running = site.batch(changes(CHANGES))
        running.wait()
        os.kill(pid, signal.SIGCONT)
        until = time.monotonic() + 1
        while time.monotonic() < until:
            load.step()
        if load.lost():
            break
    lost, drops = load.lost(), site.drops()
    n = site.settle("10.100.0.0/14")
    k = site.kernel()
    # In step again: the next change is followed.
    site.ip("route", "replace", "10.9.0.0/16", "via", "198.51.100.2")
    site.goes("10.9.0.1", "second", 30)
    events = [e["text"] for e in site.gateway.ask("events") if e["kind"] == "kernel_resync"]
    site.stop()
    if not k["overruns"] or not k["resyncs"] or not events:
        raise Failed(f"nothing was overrun: {k}, events {events}")
    if lost or drops != dropped:
        raise Failed(f"{lost} of {load.sent} packets lost, drops {drops}")
    return f"{k['overruns']} overruns, {k['resyncs']} resyncs with {len(events)} events; {load.sent} packets, 0 lost; {n} routes agree"


def ordinary(world, program):
    """Without any right."""
    site = Site(world, program, "ordinary", user="nobody")
    who = Path(f"/proc/{site.gateway.process.pid}/status").read_text()
    if "CapEff:\t0000000000000000" not in who:
        raise Failed("it has rights")
    site.ip("route", "add", "10.8.0.0/16", "via", "192.0.2.2")
    site.ip("-6", "route", "add", "fd09::/32", "via", "fd02::2")
    took = site.goes("10.8.0.1", "first"), site.goes("fd09::1", "second")
    events = [e["kind"] for e in site.gateway.ask("events")]
    site.stop()
    if "kernel_unprivileged" not in events:
        raise Failed(f"it does not say that it has no right: {events}")
    return f"as nobody: routers found in {took[0]:.0f} ms (IPv4) and {took[1]:.0f} ms (IPv6)"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gateway", type=Path, required=True, help="program to test")
    parser.add_argument("--only", nargs="*", help="cases to run")
    parser.add_argument("--keep", type=Path, help="leave configurations and logs in this new directory")
    args = parser.parse_args()
    program = args.gateway.resolve()
    cases = {c.__name__: c for c in (follow, neighbours, addresses, churn, overrun, ordinary)}
    with World("esplanade-routes", args.keep) as world:
        bad = run_cases(world, program, {n: c for n, c in cases.items() if not args.only or n in args.only})
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
