"""The gateway as a program in a namespace."""

import json
import subprocess

from netns import Failed, end, sh, wait_for

COMMON = """
sa_files = ["sa.toml"]
# Peers are changed by the test itself: nothing waits for them.
rekey = { switch_delay_ms = 0, overlap_ms = 0, quiet_ms = 0, jitter_percent = 0 }
[leases]
path = "leases"
[api]
socket = "api.sock"
[metrics]
enabled = false
"""


class Gateway:
    """Starts in `directory`, where it finds `sa.toml` and keeps its leases."""

    def __init__(self, world, program, namespace, directory, config, log, common=COMMON):
        self.program, self.dir, self.log = program, directory, world.dir / log
        (directory / "gateway.toml").write_text(common + config)
        self.socket = directory / "api.sock"
        command = (program, "run", "--config", directory / "gateway.toml")
        self.process = world.start(*command, namespace=namespace, log=log)
        wait_for("the gateway to answer", self.ready)

    def ready(self):
        """Whether it answers; fails when it has ended."""
        if self.process.poll() is not None:
            raise Failed(f"the gateway ended with {self.process.returncode}: {self.log.read_text()[-2000:]}")
        command = [self.program, "status", "--json", "--socket", self.socket]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode == 0 and json.loads(done.stdout).get("ready")

    def ask(self, *command):
        """An answer of the API, decoded."""
        return json.loads(sh(self.program, *command, "--json", "--socket", self.socket))

    def kill(self):
        """SIGKILL: it has no chance to put anything in order."""
        self.process.kill()
        self.process.wait()

    def stop(self):
        """An orderly end. It fails when the account of frames does not balance."""
        code = end(self.process)
        if code != 0:
            raise Failed(f"the gateway ended with {code}: {self.log.read_text()[-2000:]}")
