"""The gateway against scapy's IPsec layer, an implementation of ESP that shares nothing with it.

    main.py --gateway target/release/esplanade

Captures go in and out of the real program, `run --exit-when-idle`; nothing is mocked and nothing needs root.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import matrix
import refusals

CASES = [
    ("every suite, shape and direction", matrix.run),
    ("one seed, one output", matrix.determinism),
    ("refused on the way in", refusals.inbound),
    ("fragmented on the way in", refusals.fragments),
    ("refused on the way out", refusals.outbound),
]
SHOWN = 10


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gateway", type=Path, required=True, help="program to test")
    parser.add_argument("--keep", type=Path, help="leave configurations and captures in this new directory")
    args = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory(prefix="esplanade-scapy-") as temporary:
        directory = args.keep or Path(temporary)
        for name, case in CASES:
            began = time.monotonic()
            failures, told = case(args.gateway.resolve(), directory)
            bad += bool(failures)
            verdict = "FAIL" if failures else "PASS"
            print(f"{verdict}  {name}: {told} ({time.monotonic() - began:.1f} s)", flush=True)
            for f in failures[:SHOWN]:
                print(f"      {f}")
            if len(failures) > SHOWN:
                print(f"      … and {len(failures) - SHOWN} more")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
