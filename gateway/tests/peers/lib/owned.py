"""A gateway that owns its ports, with the kernel behind exception TAPs.

A port is a TAP whose kernel side is moved into the namespace of whoever is at the other end of the wire, so nothing but the
gateway sees its frames, as with a NIC of its own.
"""

from gateway import Gateway
from netns import address, private_file, sh


class Port:
    """One port: `far` is the namespace at the other end, where the interface is called like the port."""

    def __init__(self, name, side, tap, number, far, far_addresses=()):
        self.name, self.side, self.tap, self.far, self.far_addresses = name, side, tap, far, far_addresses
        self.mac = f"02:00:00:00:{number:02x}:01"
        self.far_mac = f"02:00:00:00:{number:02x}:02"

    def config(self, addresses, more=""):
        """Its table in the gateway's configuration."""
        listed = ", ".join(f'"{a}"' for a in addresses)
        return (
            f'[[port]]\nname = "{self.name}"\nkind = "tap"\nside = "{self.side}"\nmac = "{self.mac}"\n'
            f'tap = "{self.tap}"\naddresses = [{listed}]\n{more}'
        )


class Owner:
    """Starts the gateway, connects its ports, gives the kernel its addresses."""

    def __init__(self, world, program, namespace, name, ports, config, sa):
        self.namespace, self.ports = namespace, [port for port, _ in ports]
        there = world.dir / name
        there.mkdir()
        private_file(there / "sa.toml", sa)
        self.gateway = Gateway(world, program, namespace, there, config, f"{name}.log")
        for port, addresses in ports:
            sh("ip", "link", "set", port.name, "netns", port.far, namespace=namespace)
            sh("ip", "link", "set", port.name, "address", port.far_mac, "up", namespace=port.far)
            address(port.far, port.name, *port.far_addresses)
            address(namespace, port.tap, *addresses)


def neighbour(ip, mac, port):
    """A neighbour that the gateway knows."""
    return f'[[neighbour]]\nip = "{ip}"\nmac = "{mac}"\nport = "{port}"\n'


def route(to, via):
    """A static route."""
    return f'[[route]]\nto = "{to}"\nvia = "{via}"\n'
