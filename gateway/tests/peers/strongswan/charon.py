"""strongSwan instances beside each other: own configuration, own control socket, own log."""

import re

from netns import Failed, sh, wait_for

CONFIG = """
charon-systemd {{
  load = random nonce openssl kdf aes sha1 sha2 hmac gcm kernel-libipsec kernel-netlink socket-default vici
  journal {{ default = -1 }}
  filelog {{ log {{ path = {dir}/charon.log
    default = 1
    chd = 4
    flush_line = yes }} }}
  plugins {{ vici {{ socket = unix://{dir}/vici }} }}
}}
"""
CONNECTION = """
connections {{ peer {{
  version = 2
  local_addrs = {local}
  remote_addrs = {remote}
  proposals = aes128-sha256-modp2048
  encap = yes
  mobike = no
  local {{ auth = psk
    id = {local} }}
  remote {{ auth = psk
    id = {remote} }}
  children {{ {children} }}
}} }}
secrets {{ ike-1 {{ secret = "{secret}" }} }}
"""
CHILD = "{name} {{ local_ts = {local}\n remote_ts = {remote}\n esp_proposals = {esp}\n rekey_time = 0 }}\n"


class Charon:
    """One instance. `children`: (name, own network, the peer's network, ESP proposal)."""

    def __init__(self, world, namespace, name, ends, children, secret):
        self.dir = world.dir / name
        self.dir.mkdir()
        self.namespace = namespace
        (self.dir / "strongswan.conf").write_text(CONFIG.format(dir=self.dir))
        text = "".join(CHILD.format(name=n, local=a, remote=b, esp=esp) for n, a, b, esp in children)
        local, remote = ends
        connection = CONNECTION.format(local=local, remote=remote, children=text, secret=secret)
        (self.dir / "swanctl.conf").write_text(connection)
        env = {"STRONGSWAN_CONF": str(self.dir / "strongswan.conf")}
        self.process = world.start("charon-systemd", namespace=namespace, log=f"{name}/stdout", env=env)
        wait_for("charon's control socket", self.is_loaded)

    def is_loaded(self):
        """Whether it has taken its connections; fails when it has ended. The socket is there before anybody listens."""
        if self.process.poll() is not None:
            raise Failed(f"charon ended: {(self.dir / 'stdout').read_text()[-1000:]}")
        try:
            self.control("--load-all", "--file", self.dir / "swanctl.conf")
            return True
        except Failed:
            return False

    def control(self, *command):
        """swanctl."""
        env = ("env", f"STRONGSWAN_CONF={self.dir / 'strongswan.conf'}")
        return sh(*env, "swanctl", *command, "--uri", f"unix://{self.dir}/vici", namespace=self.namespace)

    def keys(self, child):
        """SPIs and keys of a child SA that this side has initiated, out of the log."""
        log = (self.dir / "charon.log").read_text()
        up = re.search(rf"CHILD_SA {child}{{\d+}} established with SPIs (\w+)_i (\w+)_o", log)
        if not up:
            raise Failed(f"{child} is not established: {log[-1500:]}")
        # The dumps of a child come before the line that says that it is up; the last ones are its own.
        before = log[: up.start()]
        found = {}
        dump = r"(encryption|integrity) (initiator|responder) key => (\d+) bytes @ \S+\n((?:.*?\d+: (?:[0-9A-F]{2} ?)+.*\n)+)"
        for kind, side, length, lines in re.findall(dump, before):
            digits = "".join(re.search(r"\d+: ((?:[0-9A-F]{2} ?)+)", line)[1] for line in lines.splitlines())
            key = bytes.fromhex(digits)
            if len(key) != int(length):
                raise Failed(f"the {kind} key of {child} in the log has {len(key)} of {length} bytes")
            found[kind, side] = key
        keys = {d: (found["encryption", s], found.get(("integrity", s), b"")) for d, s in DIRECTIONS.items()}
        return {"in": (int(up[1], 16), *keys["in"]), "out": (int(up[2], 16), *keys["out"])}


DIRECTIONS = {"out": "initiator", "in": "responder"}
