"""Two gateways between two hosts, each in a namespace of its own.

    host ---- lan [left gateway] wan ---- wan [right gateway] lan ---- host
"""

from gateway import Gateway
from netns import mac, private_file, sh

OUTER = {"left": "192.0.2.1", "right": "192.0.2.2"}
OTHER = {"left": "right", "right": "left"}


def cable(a, name_a, b, name_b, queues=1):
    """A veth pair with so many queues and without offloads: what arrives is what would be on a wire."""
    number = ("numrxqueues", queues, "numtxqueues", queues)
    sh("ip", "link", "add", name_a, "netns", a, *number, "type", "veth", "peer", "name", name_b, "netns", b, *number)
    for ns, name in ((a, name_a), (b, name_b)):
        offloads = ("tx", "rx", "tso", "gso", "gro", "sg", "txvlan", "rxvlan")
        sh("ethtool", "-K", name, *(w for o in offloads for w in (o, "off")), namespace=ns)
        sh("ip", "link", "set", name, "up", namespace=ns)


class Pair:
    """Hosts and gateways, connected; nothing configured yet."""

    def __init__(self, world, program, name, queues=1):
        self.world, self.program, self.name = world, program, name
        names = ("left-host", "left", "right", "right-host")
        self.ns = {n: world.namespace(f"{name}-{n}") for n in names}
        for ns in self.ns.values():
            sh("sysctl", "-qw", "net.ipv6.conf.default.router_solicitations=0", namespace=ns)
        for side in OUTER:
            cable(self.ns[f"{side}-host"], "eth0", self.ns[side], "lan", queues)
        cable(self.ns["left"], "wan", self.ns["right"], "wan", queues)
        self.mac = {(side, port): mac(self.ns[side], port) for side in OUTER for port in ("lan", "wan")}
        self.gateways = {}

    def host(self, side):
        """Namespace of the host."""
        return self.ns[f"{side}-host"]

    def start(self, side, config, sa):
        """A gateway of one side."""
        there = self.world.dir / f"{self.name}-{side}"
        there.mkdir()
        private_file(there / "sa.toml", sa)
        log = f"{self.name}-{side}.log"
        self.gateways[side] = Gateway(self.world, self.program, self.ns[side], there, config, log)

    def wan(self, side):
        """Configuration of the outside."""
        peer = OTHER[side]
        return (
            f'[[port]]\nname = "wan"\nkind = "af_xdp"\nside = "outside"\naddresses = ["{OUTER[side]}/24"]\n'
            f'[[neighbour]]\nip = "{OUTER[peer]}"\nmac = "{self.mac[peer, "wan"]}"\nport = "wan"\n'
        )

    def stop(self):
        """Ends both; it fails when an account does not balance."""
        for g in self.gateways.values():
            g.stop()

    def drops(self):
        """Reasons and numbers of both."""
        return {side: {d["reason"]: d["frames"] for d in g.ask("stats")["drops"]} for side, g in self.gateways.items()}


def tunnel(name, side, keys, spi, more="", sa_more="", suite="aes-128-gcm-16", esn=True):
    """One side's SAs of a tunnel."""
    text = [
        f'[[tunnel]]\nname = "{name}"\nlocal = "{OUTER[side]}"\nremote = "{OUTER[OTHER[side]]}"\n'
        f'suite = "{suite}"\nesn = {str(esn).lower()}\n{more}'
    ]
    for n, sender in enumerate(OUTER):
        direction = "out" if sender == side else "in"
        text.append(f'[[tunnel.sa]]\ndirection = "{direction}"\nspi = {spi + n}\nkey = "{keys[n]}"\nfirst_use = true\n{sa_more}')
    return "\n".join(text) + "\n"


def both_ways(name, own, far, tunnel_name):
    """Policies of a tunnel."""
    text = ""
    for direction, src, dst in (("out", own, far), ("in", far, own)):
        text += (
            f'[[policy]]\nname = "{name}-{direction}"\ndirection = "{direction}"\npriority = 1\n'
            f'action = "protect"\ntunnel = "{tunnel_name}"\nsrc = "{src}"\ndst = "{dst}"\n'
        )
    return text
