"""Divides what callgrind counted inside of an engine's watch: driver, its register accesses through a socket, the rest.

    callgrind_split.py OUT KIND PACKETS
"""

import re
import sys
from collections import Counter

DRIVER = re.compile(r"(Eip93Engine|SoeEngine|Housed|Split).*::(submit|poll)$")
SOCKET = re.compile(r"Messages as .*RegisterSpace>::")
INSTALL = re.compile(r"::(install|remove)$")


def load(path):
    """Instructions of each function itself, and with all below for each pair of caller and callee; calls of each pair."""
    names, own, below, calls = {}, Counter(), Counter(), Counter()

    def name(text):
        number, _, given = text.partition(" ")
        return names.setdefault(number, given.split("'")[0])

    caller = callee = None
    called = 0
    for line in open(path, errors="replace"):
        if line.startswith("fn="):
            caller = name(line[3:].strip())
        elif line.startswith("cfn="):
            callee = name(line[4:].strip())
        elif line.startswith("calls="):
            called = int(line[6:].split()[0])
        elif found := re.match(r"(?:[+-]?\d+|\*) (\d+)$", line):
            if called:
                below[caller, callee] += int(found[1])
                calls[caller, callee] += called
                called = 0
            else:
                own[caller] += int(found[1])
    return own, below, calls


def main():
    path, kind, packets = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if packets == 0:
        sys.exit(f"{kind}: nothing counted")
    own, below, calls = load(path)

    def into(pattern, counts):
        return sum(n for (a, b), n in counts.items() if pattern.search(b) and not pattern.search(a)) / packets

    everything = sum(own.values()) / packets
    driver, socket, install = into(DRIVER, below), into(SOCKET, below), into(INSTALL, below)
    print(
        f"{kind}: {packets} packets, instructions per packet: driver {driver - socket:.0f}, watch {everything - driver - install:.0f}; "
        f"in the socket {socket:.0f}, installing {install:.0f}; {into(DRIVER, calls):.2f} calls of the driver per packet"
    )


if __name__ == "__main__":
    main()
