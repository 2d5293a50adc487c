"""The ten cases of the Linux kernel's selftest for ICMP over ESP tunnels, with this gateway as s1 and s2.

    a -- r1 -- [s1] -- r2 -- [s2] -- r3 -- b        "default": networks 1 to 6
    a -- r1 -- [s1] -- r2 -- [s2] -- b              "x": the gateway itself makes the error; networks 1 to 5

Network n is 10.1.n.0/24 and fc00:n::/64; the left end has address 1, the right end 2. Only networks 1 and the last are
in policies. r2 has no routes to them: what crosses it is ESP, and no error from beyond s2 could come any other way.

One number differs from the kernel's. Where the path of the tunnel is narrower than 1280 bytes and more, the kernel tells
an IPv6 sender less than 1280, which RFC 8201 lets it ignore; this gateway tells 1280 and sends such packets in outer fragments
(RFC 2473 section 7.1). The case asks for that, for the packet of 1280 bytes to arrive, and for the exact number on a wider path.
"""

import re
import secrets
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "peers/lib"))

from netns import Failed, address, run_bed, sh, veth, within
from owned import Owner, Port, neighbour, route

SPI = {"there": 0x1001, "back": 0x1002}


def net(v6, n):
    """Network number n."""
    return f"fc00:{n}::/64" if v6 else f"10.1.{n}.0/24"


def addr(v6, n, end):
    """Address of one end of network n."""
    return f"fc00:{n}::{end}" if v6 else f"10.1.{n}.{end}"


def sa_file(v6, first, last, keys, own):
    """Tunnel between s1 and s2; `own` is 0 on s1."""
    ends = (addr(v6, 3, 1), addr(v6, 4, 2))
    text = f'[[tunnel]]\nname = "t"\nlocal = "{ends[own]}"\nremote = "{ends[1 - own]}"\nsuite = "aes-128-gcm-12"\n'
    for n, (name, key) in enumerate(zip(SPI, keys)):
        direction = "out" if n == own else "in"
        text += f'[[tunnel.sa]]\ndirection = "{direction}"\nspi = {SPI[name]}\nkey = "{key}"\nfirst_use = true\n'
    nets = (net(v6, first), net(v6, last))
    for direction, src, dst in (("out", nets[own], nets[1 - own]), ("in", nets[1 - own], nets[own])):
        text += (
            f'[[policy]]\nname = "{direction}"\ndirection = "{direction}"\npriority = 1\naction = "protect"\ntunnel = "t"\n'
            f'src = "{src}"\ndst = "{dst}"\n'
        )
    return text


class Chain:
    """The whole topology, started. `x`: b is s2's neighbour. `mtu`: of s2's inside port."""

    def __init__(self, world, program, name, v6, x, mtu=None):
        self.v6 = v6
        self.last = 5 if x else 6
        names = ["a", "r1", "s1", "r2", "s2", *([] if x else ["r3"]), "b"]
        self.ns = {n: world.namespace(f"{name}-{n}") for n in names}
        for ns in self.ns.values():
            sh("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1", namespace=ns)
            sh("sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0", namespace=ns)
        width = 64 if v6 else 24
        at = lambda n, end: f"{addr(v6, n, end)}/{width}"
        veth(self.ns["a"], "right", self.ns["r1"], "left")
        address(self.ns["a"], "right", at(1, 1))
        address(self.ns["r1"], "left", at(1, 2))
        behind = "b" if x else "r3"
        if not x:
            veth(self.ns["r3"], "right", self.ns["b"], "left")
            address(self.ns["r3"], "right", at(6, 1))
            address(self.ns["b"], "left", at(6, 2))
        keys = [secrets.token_hex(20) for _ in SPI]
        # s1: networks 2 and 3; s2: networks 4 and 5.
        more = f"mtu = {mtu}\n" if mtu else ""
        for own, (inside, outside, in_end, near, far) in enumerate(((2, 3, 2, "r1", "r2"), (5, 4, 1, behind, "r2"))):
            lan = Port(f"lan{own}", "inside", "tap-lan", 2 * own + 1, self.ns[near], [at(inside, 3 - in_end)])
            wan = Port(f"wan{own}", "outside", "tap-wan", 2 * own + 2, self.ns[far], [at(outside, in_end)])
            mine = {lan: at(inside, in_end), wan: at(outside, 3 - in_end)}
            config = lan.config([mine[lan]], more if own else "") + wan.config([mine[wan]])
            config += neighbour(addr(v6, inside, 3 - in_end), lan.far_mac, lan.name)
            config += neighbour(addr(v6, outside, in_end), wan.far_mac, wan.name)
            for n in range(1, self.last + 1):
                if n not in (inside, outside):
                    beyond = (n < inside) if own == 0 else (n > inside)
                    via = addr(v6, inside, 3 - in_end) if beyond else addr(v6, outside, in_end)
                    config += route(net(v6, n), via)
            ports = [(lan, [mine[lan]]), (wan, [mine[wan]])]
            name_of = f"{name}-s{own + 1}"
            sa = sa_file(v6, 1, self.last, keys, own)
            owner = Owner(world, program, self.ns[f"s{own + 1}"], name_of, ports, config, sa)
            setattr(self, f"s{own + 1}", owner)
        self.routes("a", addr(v6, 1, 2), range(2, self.last + 1))
        self.routes("r1", addr(v6, 2, 2), range(3, self.last + 1))
        # Between s1 and s2 only their own networks are known.
        if not x:
            self.routes("r3", addr(v6, 5, 1), range(1, 5))
            self.routes("b", addr(v6, 6, 1), range(1, 6))
        else:
            self.routes("b", addr(v6, 5, 1), range(1, 5))
        self.b = addr(v6, self.last, 2)
        self.ping(self.b, must=True)

    def routes(self, name, via, nets):
        """All these networks are behind a neighbour."""
        for n in nets:
            sh("ip", "route", "add", net(self.v6, n), "via", via, namespace=self.ns[name])

    def ping(self, to, *options, must=False):
        """What ping says; it goes on for four seconds until an answer or an error comes."""
        command = within(self.ns["a"], ["ping", *options, "-W", "5", "-w", "4", "-c", "1", to])
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={"LC_ALL": "C", "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"})
        if must and done.returncode:
            raise Failed(f"ping {to}: {(done.stdout + done.stderr).strip()[-300:]}")
        return done.stdout + done.stderr

    def narrow(self, mtu):
        """r2 passes no packet that is larger."""
        for n, interface, src in ((3, "wan0", addr(self.v6, 3, 2)), (4, "wan1", addr(self.v6, 4, 1))):
            metric = ("metric", "256") if self.v6 else ()
            sh("ip", "route", "replace", net(self.v6, n), "dev", interface, *metric, "src", src, "mtu", mtu, namespace=self.ns["r2"])

    def stop(self):
        """Both gateways; it fails when an account does not balance."""
        self.s1.gateway.stop()
        self.s2.gateway.stop()


def expect(said, pattern):
    """The line that must be there."""
    found = re.search(pattern, said)
    if not found:
        raise Failed(f"not said: {pattern!r}, but: {said.strip()[-500:]}")
    return found.group(0)


def unreachable(v6, x):
    """Nobody has the address: r3 says so, or s2 itself."""

    def case(world, program):
        chain = Chain(world, program, f"u{6 if v6 else 4}{'x' if x else ''}", v6, x)
        said = chain.ping(addr(v6, chain.last, 3))
        told = expect(said, rf"From {addr(v6, 4 if x else 5, 2)} icmp_seq.* Destination.*")
        chain.stop()
        return told

    return case


def too_big_r2(v6):
    """The path between the gateways is narrow."""

    def case(world, program):
        chain = Chain(world, program, f"r2{6 if v6 else 4}", v6, False)
        if v6:
            chain.narrow(1400)
            told = expect(chain.ping(chain.b, "-M", "do", "-s", "1350"), r"From fc00:2::2 icmp_seq=.* Packet too big: mtu=1330")
            chain.narrow(1300)
            # 1300 bytes of the 1348 that ping sends now, then as much as every path must carry.
            sh("ip", "-6", "route", "flush", "cache", namespace=chain.ns["a"])
            told += "; " + expect(chain.ping(chain.b, "-M", "do", "-s", "1270"), r"From fc00:2::2 icmp_seq=.* Packet too big: mtu=1280")
            chain.ping(chain.b, "-M", "do", "-s", "1232", must=True)
            told += "; 1280 bytes pass"
        else:
            chain.narrow(1300)
            told = expect(chain.ping(chain.b, "-M", "do", "-s", "1300"), r"From 10.1.2.2 icmp_seq=.* Frag needed and DF set \(mtu = 1250\)")
            sh("ip", "route", "flush", "cache", namespace=chain.ns["a"])
            chain.ping(chain.b, "-M", "do", "-s", "1222", must=True)
            told += "; 1250 bytes pass"
        chain.stop()
        return told

    return case


def too_big_s2(v6):
    """The far gateway's inside is narrow."""

    def case(world, program):
        chain = Chain(world, program, f"s2{6 if v6 else 4}", v6, True, mtu=1300)
        said = chain.ping(chain.b, "-M", "do", "-s", "1350")
        told = expect(said, r"From fc00:4::2.*Packet too big: mtu=1300" if v6 else r"From 10.1.4.2.*Frag needed and DF set \(mtu = 1300\)")
        chain.stop()
        return told

    return case


def too_big_r3(v6):
    """A router behind the far gateway is narrow."""

    def case(world, program):
        chain = Chain(world, program, f"r3{6 if v6 else 4}", v6, False)
        metric = ("metric", "256") if v6 else ()
        sh("ip", "route", "replace", net(v6, 6), "dev", "right", *metric, "mtu", 1300, namespace=chain.ns["r3"])
        said = chain.ping(chain.b, "-M", "do", "-s", "1300" if v6 else "1350")
        told = expect(said, r"From fc00:5::2 .*Packet too big: mtu=1300" if v6 else r"From 10.1.5.2 .*Frag needed and DF set \(mtu = 1300\)")
        chain.stop()
        return told

    return case


CASES = {}
for number, six in ((4, False), (6, True)):
    CASES[f"unreachable_ipv{number}"] = unreachable(six, False)
    CASES[f"unreachable_gw_ipv{number}"] = unreachable(six, True)
    CASES[f"mtu_ipv{number}_s2"] = too_big_s2(six)
    CASES[f"mtu_ipv{number}_r2"] = too_big_r2(six)
    CASES[f"mtu_ipv{number}_r3"] = too_big_r3(six)


if __name__ == "__main__":
    run_bed("esplanade-icmp", __doc__, CASES)
