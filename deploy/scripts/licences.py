#!/usr/bin/env python3
"""Refuses dependencies whose licence is not on the list or that do not come from crates.io."""
import json
import re
import subprocess
import sys

ALLOWED = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0",
    "ISC", "MIT", "MIT-0", "MPL-2.0", "OpenSSL", "Unicode-3.0", "Unlicense", "Zlib",
}
REGISTRY = "registry+https://github.com/rust-lang/crates.io-index"


def fits(expression: str) -> bool:
    """SPDX: an OR needs one allowed side, an AND all of them."""
    text = expression.replace("/", " OR ")
    tokens = re.findall(r"\(|\)|AND|OR|[A-Za-z0-9.+-]+(?: WITH [A-Za-z0-9.+-]+)?", text)
    position = 0

    def either() -> bool:
        nonlocal position
        value = both()
        while position < len(tokens) and tokens[position] == "OR":
            position += 1
            right = both()
            value = value or right
        return value

    def both() -> bool:
        nonlocal position
        value = one()
        while position < len(tokens) and tokens[position] == "AND":
            position += 1
            right = one()
            value = value and right
        return value

    def one() -> bool:
        nonlocal position
        token = tokens[position]
        position += 1
        if token == "(":
            value = either()
            position += 1
            return value
        return token in ALLOWED

    return bool(tokens) and either() and position == len(tokens)


def main() -> int:
    out = subprocess.run(
        ["cargo", "metadata", "--locked", "--format-version", "1"], check=True, capture_output=True, text=True
    ).stdout
    packages = [p for p in json.loads(out)["packages"] if p["source"] is not None]
    bad = []
    for p in packages:
        name = f'{p["name"]} {p["version"]}'
        if p["source"] != REGISTRY:
            bad.append(f'{name}: comes from {p["source"]}')
        if not fits(p.get("license") or ""):
            bad.append(f'{name}: licence {p.get("license")!r} is not on the list')
    for line in bad:
        print(line, file=sys.stderr)
    print(f"{len(packages)} dependencies looked at, {len(bad)} refused")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
