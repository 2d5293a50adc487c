"""What the gateway needs to run in the guest: a configuration, SA files, traffic and a script beside it.

Inside it reads a capture for ever, outside it sends with AF_XDP through the guest's network card. Beside it a
script swaps the SA file several times a second, so that keys go out of use and come back: their leases end at
exact numbers and are claimed again, and every start of a boot claims all that were in use at the cut.
"""

import secrets
import socket
import struct
from pathlib import Path

GATEWAY = """
sa_files = ["sa.toml"]
[workers]
count = 1
[memory]
frames = 4096
huge = "never"
[[port]]
name = "lan"
kind = "pcap"
side = "inside"
pcap = { read = "in.pcap", loop = 0 }
addresses = ["10.1.0.1/24"]
[[port]]
name = "wan"
kind = "af_xdp"
side = "outside"
interface = "eth0"
addresses = ["192.0.2.1/24"]
af_xdp = { ring = 512 }
[[route]]
to = "10.2.0.0/16"
via = "192.0.2.2"
[[neighbour]]
ip = "192.0.2.2"
mac = "52:54:00:00:00:02"
port = "wan"
[sas]
max = 64
[crypto]
provider = "aws-lc"
[leases]
path = "/data/leases"
[api]
enabled = false
[metrics]
enabled = false
[log]
level = "warn"
"""
SWAP = """
while true; do
    for next in b a; do
        sleep 0.$((RANDOM % 3))$((RANDOM % 10))
        cp /etc/$next.toml /etc/next.toml
        mv /etc/next.toml /etc/sa.toml
    done
done
"""
# Tunnel by tunnel: the counter-mode suites, whose security ends with the first nonce used twice.
SUITES = [("aes-128-gcm-16", 20), ("aes-256-gcm-16", 36), ("chacha20-poly1305", 36), ("aes-128-ctr+hmac-sha2-256-128", 20)]
# Which SA each tunnel sends with in the two SA files: the first two take turns, the others stay.
TURNS = {"a": [0, 1, 2, 3], "b": [4, 5, 2, 3]}


def sa_file(keys, turn):
    """Outbound SAs and their policies."""
    text = []
    for tunnel, sa in enumerate(turn):
        suite, _ = SUITES[tunnel]
        key, auth = keys[sa]
        text.append(f'[[tunnel]]\nname = "t{tunnel}"\nlocal = "192.0.2.1"\nremote = "192.0.2.2"\nsuite = "{suite}"')
        text.append(f'[[tunnel.sa]]\ndirection = "out"\nspi = {0x1000 + sa}\nfirst_use = true\nkey = "{key}"')
        text += [f'auth_key = "{auth}"'] if "hmac" in suite else []
        text.append(
            f'[[policy]]\nname = "p{tunnel}"\ndirection = "out"\npriority = 1\naction = "protect"\n'
            f'tunnel = "t{tunnel}"\nsrc = "10.1.0.0/24"\ndst = "10.2.{tunnel}.0/24"'
        )
    return "\n".join(text) + "\n"


def frame(tunnel, size):
    """A UDP packet from inside to the network behind a tunnel."""
    ends = socket.inet_aton("10.1.0.2") + socket.inet_aton(f"10.2.{tunnel}.2")
    udp = struct.pack("!4H", 40000, 9, size, 0) + bytes(size - 8)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + size, 0, 0, 64, 17, 0) + ends
    total = sum(struct.unpack("!10H", head))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    head = head[:10] + struct.pack("!H", ~total & 0xFFFF) + head[12:]
    return bytes(12) + b"\x08\x00" + head + udp


def capture():
    """A classic pcap file with a few packets to each tunnel."""
    out = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)
    for size in (26, 200, 900):
        for tunnel in range(len(SUITES)):
            f = frame(tunnel, size)
            out += struct.pack("<IIII", 0, 0, len(f), len(f)) + f
    return out


def site(work):
    """Writes everything to `work` with new keys. Returns the program's arguments, files for the guest, the script."""
    keys = {}
    for turn in TURNS.values():
        for tunnel, sa in enumerate(turn):
            keys.setdefault(sa, (secrets.token_hex(SUITES[tunnel][1]), secrets.token_hex(32)))
    contents = {"gateway.toml": GATEWAY.encode(), "in.pcap": capture()}
    contents |= {f"{name}.toml": sa_file(keys, turn).encode() for name, turn in TURNS.items()}
    contents["sa.toml"] = contents["a.toml"]
    files = []
    for name, content in contents.items():
        path = Path(work, name)
        path.touch(mode=0o600)
        path.write_bytes(content)
        files.append((str(path), f"/etc/{name}"))
    return ["run", "--config", "/etc/gateway.toml"], files, SWAP
