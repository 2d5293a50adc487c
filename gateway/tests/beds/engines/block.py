"""Ports of the EN7581's Ethernet block: two gateways whose only ports are those of a block each, a model in a program of its own
with TAPs behind its MACs, between hosts with a real kernel stack.

    host ---- TAP [GDM 1  block, gateway  GDM 2] TAP ---- bridge ---- TAP [GDM 2  block, gateway  GDM 1] TAP ---- host
"""

import json
import secrets

from gateway import Gateway
from netns import Failed, address, end, private_file, sh, wait_for
from pair import OTHER, OUTER, both_ways, tunnel

SUITE = "aes-128-cbc+hmac-sha2-256-128"
NETS = {"left": "10.1", "right": "10.2"}
# Room for the outer headers on the way, so that a host's packets travel whole.
MTU = 1400
PINGS = 200
SECONDS = 2


def ethernet(side, gdm):
    """Address of a port."""
    return f"02:00:00:00:0{gdm}:0{list(OUTER).index(side) + 1}"


class Site:
    """A block with TAPs, its host, and the gateway that owns the block."""

    def __init__(self, world, bed, program, name, side, cable, bridge, keys, engine):
        self.side, self.engine, own, far = side, engine, NETS[side], NETS[OTHER[side]]
        self.host = world.namespace(f"{name}-{side}-host")
        lan, wan, path = f"lan-{side}", f"wan-{side}", world.dir / f"{name}-{side}.sock"
        self.log = world.dir / f"{name}-{side}-model.log"
        taps = ("--tap", f"1={lan}", "--tap", f"2={wan}")
        self.model = world.start(bed.model, "soe", "--socket", path, *taps, namespace=cable, log=self.log.name)
        wait_for("the model's socket", path.exists)
        sh("ip", "link", "set", wan, "master", bridge, "up", namespace=cable)
        sh("ip", "link", "set", lan, "netns", self.host, namespace=cable)
        sh("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", namespace=self.host)
        sh("ip", "link", "set", lan, "mtu", MTU, "address", "02:00:00:00:00:01", "up", namespace=self.host)
        address(self.host, lan, f"{own}.0.2/16")
        sh("ip", "route", "add", f"{far}.0.0/16", "via", f"{own}.0.1", namespace=self.host)
        sh("ip", "neigh", "add", f"{own}.0.1", "lladdr", ethernet(side, 1), "dev", lan, "nud", "permanent", namespace=self.host)
        there = world.dir / f"{name}-{side}"
        there.mkdir()
        private_file(there / "sa.toml", self.sas(keys))
        self.gateway = Gateway(world, program, world.namespace(f"{name}-{side}"), there, self.config(path), f"{name}-{side}.log")

    def sas(self, keys):
        """The tunnel, on the block's engine or not."""
        more = 'df = "clear"\nwindow = 64\n'
        if self.engine:
            more += 'offload = "packet"\nengine = "soe0"\n'
        text = tunnel("t", self.side, [key for key, _ in keys], 0x3000, more, suite=SUITE, esn=False)
        for key, auth in keys:
            text = text.replace(f'key = "{key}"\n', f'key = "{key}"\nauth_key = "{auth}"\n')
        return text + both_ways("t", f"{NETS[self.side]}.0.0/16", f"{NETS[OTHER[self.side]]}.0.0/16", "t")

    def config(self, path):
        """Ports of the block, and its engine."""
        own, far = NETS[self.side], NETS[OTHER[self.side]]
        text = "[workers]\ncount = 1\n[memory]\nframes = 8192\n"
        for name, side, where, gdm in (("lan", "inside", f"{own}.0.1/16", 1), ("wan", "outside", f"{OUTER[self.side]}/24", 2)):
            text += f'[[port]]\nname = "{name}"\nkind = "airoha"\nside = "{side}"\naddresses = ["{where}"]\nmac = "{ethernet(self.side, gdm)}"\n'
            text += f'[port.airoha]\nsocket = "{path}"\ngdm = {gdm}\nexperimental = true\n'
        text += f'[[route]]\nto = "{far}.0.0/16"\nvia = "{OUTER[OTHER[self.side]]}"\n'
        text += f'[[neighbour]]\nip = "{OUTER[OTHER[self.side]]}"\nmac = "{ethernet(OTHER[self.side], 2)}"\nport = "wan"\n'
        text += f'[[neighbour]]\nip = "{own}.0.2"\nmac = "02:00:00:00:00:01"\nport = "lan"\n'
        if self.engine:
            text += f'[[engine]]\nname = "soe0"\nkind = "soe"\nsocket = "{path}"\n'
        return text

    def sum(self, counter):
        """Of all workers."""
        return sum(worker[counter] for worker in self.gateway.ask("stats")["workers"])


def carry(world, program, bed, name, engines):
    """Echoes of all sizes, then TCP both ways."""
    cable = world.namespace(f"{name}-cable")
    sh("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1", namespace=cable)
    sh("ip", "link", "add", "cable", "type", "bridge", "mcast_snooping", "0", namespace=cable)
    sh("ip", "link", "set", "cable", "up", namespace=cable)
    keys = [(secrets.token_hex(16), secrets.token_hex(32)) for _ in OUTER]
    sites = {s: Site(world, bed, program, name, s, cable, "cable", keys, e) for s, e in zip(OUTER, engines)}
    left, right = sites["left"], sites["right"]
    for size in (0, 56, 777, MTU - 28):
        count = PINGS // 4
        out = sh("ping", "-q", "-i", "0.01", "-c", count, "-W", "5", "-s", size, f'{NETS["right"]}.0.2', namespace=left.host)
        if f"{count} received" not in out:
            raise Failed(f"{name}: echoes of {size} bytes: {out.strip()[-200:]}")
    spare(name, sites, ())
    told = [speed(world, name, left, right, *way) for way in ((), ("--reverse",))]
    # TCP finds out how much is too much.
    spare(name, sites, ("tx_full", "engine_busy"))
    sealed = {s: site.sum("encrypted") for s, site in sites.items()}
    for side, site in sites.items():
        if site.engine:
            said = site.gateway.ask("engines")[0]
            if said["state"] != "serving" or said["submitted"] < sealed[side]:
                raise Failed(f"{name}: the {side} engine says {said}, {sealed[side]} packets were sealed")
        # The account of all frames is checked at the end.
        site.gateway.stop()
        end(site.model)
        if "the driver broke a rule" in site.log.read_text():
            raise Failed(f"{name}: {site.log.read_text()[-1000:]}")
    return f"{name}: {PINGS} echoes, TCP {told[0]} and {told[1]}, {sum(sealed.values())} packets sealed"


def spare(name, sites, allowed):
    """Fails when a gateway has dropped anything but for the reasons allowed."""
    for side, site in sites.items():
        drops = {d["reason"]: d["frames"] for d in site.gateway.ask("stats")["drops"]}
        if set(drops) - set(allowed):
            raise Failed(f"{name}: the {side} gateway dropped {drops}")


def speed(world, name, left, right, *way):
    """What iperf3 measures, one way."""
    server = world.start("iperf3", "--server", "--one-off", namespace=right.host, log=f"{name}-iperf3.log")
    wait_for("iperf3 to listen", lambda: ":5201 " in sh("ss", "-Hltn", namespace=right.host))
    out = sh("iperf3", "--json", "--client", f'{NETS["right"]}.0.2', "--time", SECONDS, *way, namespace=left.host)
    end(server)
    received = json.loads(out)["end"]["sum_received"]
    if received["bytes"] < 1_000_000:
        raise Failed(f"{name}: iperf3 {way} brought {received['bytes']} bytes")
    return f"{received['bits_per_second'] / 1e6:.0f} Mbit/s"


def both(world, program, bed):
    """Ciphers on the CPU, then on the engine of the block whose rings also carry the ports' frames."""
    return "; ".join(carry(world, program, bed, name, engines) for name, engines in (("cpu", (False, False)), ("soe", (True, False))))
