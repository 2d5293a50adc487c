#!/usr/bin/env python3
"""IKE in charge: strongSwan with the kernel's own XFRM on the gateway's side, strongSwan and the kernel's own ESP on the peer's, in a
QEMU guest with Debian's kernel. The gateway takes its SAs from the kernel of its namespace.

    main.py --gateway FILE [--only CASE,…] [--rekeys N] [--rate PACKETS] [--tunnels N]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "vfio"))

import guest

PLUGINS = Path("/usr/lib/ipsec/plugins")
WANTED = "random nonce openssl kdf aes sha1 sha2 hmac gcm kernel-netlink socket-default vici".split()
MODULES = (
    "veth tun xfrm_user xfrm_algo esp4 esp6 xfrm_interface gcm ccm ctr cbc ghash_generic aesni_intel ghash_clmulni_intel seqiv echainiv "
    "authenc authencesn sha256_ssse3 sha1_ssse3 hmac cryptd crypto_null"
).split()
TOOLS = "ip ping swanctl charon-systemd ethtool tcpdump perl".split()


# libreswan and the libraries that a host need not have, from Debian; nothing is installed.
LIBRESWAN = (
    "libreswan libnss3 libnspr4 libnss3-tools libevent-core-2.1-7 libevent-pthreads-2.1-7 libldns3 libunbound8 libcurl3-nss libldap-2.5-0 "
    "libsasl2-2 libnghttp2-14 librtmp1 libssh2-1 libhiredis0.14 libprotobuf-c1 libaudit1 libcap-ng0 libpam0g libpsl5 libbrotli1 libidn2-0 "
    "libevent-2.1-7"
).split()


def libreswan(work):
    """pluto, what it needs, and an empty NSS database, as HOST:GUEST."""
    at = guest.fetch("libreswan", lambda _: LIBRESWAN)
    libraries = [p for d in ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu") for p in (at / d).glob("*.so*")]
    path = ":".join(sorted({str(p.parent) for p in libraries}))
    subprocess.run(
        [at / "usr/bin/certutil", "-N", "-d", f"sql:{work}", "--empty-password"], env={"LD_LIBRARY_PATH": path}, check=True
    )
    files = [f"{p}:/opt/libreswan/{p.name}" for p in libraries]
    files += [f"{at}/usr/libexec/ipsec/{p}:/usr/libexec/ipsec/{p}" for p in ("pluto", "addconn", "whack")]
    return files + [f"{p}:/bin/nss/{p.name}" for p in Path(work).iterdir()]


def boot(program, script, arguments, timeout, out, more=()):
    options = guest.parser().parse_args([])
    options.program = [str(program), *map(str, arguments)]
    options.script = str(HERE / script)
    options.tool = TOOLS
    options.module = MODULES
    options.file = [f"{HERE}/{f}:/bin/{f}" for f in ("site.sh", "flood.pl", "nat.pl")]
    options.file += [f"{PLUGINS}/libstrongswan-{p}.so:{PLUGINS}/libstrongswan-{p}.so" for p in WANTED]
    options.file += more
    library = next(p for p in map(Path, ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu")) if (p / "libgcc_s.so.1").exists())
    options.file.append(f"{library}/libgcc_s.so.1:{library}/libgcc_s.so.1")
    options.memory, options.huge, options.timeout, options.silence = 1536, 64, timeout, 60
    return guest.boot(options, output=out)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gateway", required=True, type=Path)
    p.add_argument("--only", default="")
    p.add_argument("--rekeys", type=int, default=60)
    p.add_argument("--rate", type=int, default=200)
    p.add_argument("--tunnels", type=int, default=60)
    p.add_argument("--timeout", type=int, default=240)
    p.add_argument("--verbose", action="store_true")
    options = p.parse_args()
    cases = {
        "rekeys": ("rekeys.sh", [options.rekeys, options.rate, 0]),
        "delayed": ("rekeys.sh", [max(options.rekeys // 3, 12), options.rate, 50]),
        "life": ("life.sh", []),
        "roads": ("roads.sh", []),
        "nat": ("nat.sh", []),
        "libreswan": ("libreswan.sh", []),
        "many": ("many.sh", [options.tunnels]),
    }
    wanted = [c for c in options.only.split(",") if c] or list(cases)
    bad = 0
    for name in wanted:
        script, arguments = cases[name]
        began = time.monotonic()
        out = sys.stdout if options.verbose else None
        with tempfile.TemporaryDirectory(prefix="bed-nss-") as work:
            more = libreswan(work) if name == "libreswan" else ()
            status, lines = boot(options.gateway, script, arguments, options.timeout, out, more)
        verdict = "PASS" if status == 0 and "PASSED" in lines else "FAIL"
        bad += verdict != "PASS"
        if verdict == "FAIL" and not options.verbose:
            start = next((i for i, line in enumerate(lines) if line.startswith("FAILED")), len(lines) - 80)
            print("\n".join(line for line in lines[max(start - 5, 0) : start + 120] if line != "."))
        told = "; ".join(line.strip() for line in lines if line.startswith("  "))
        print(f"{verdict}  {name}: {told} ({time.monotonic() - began:.1f} s)", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
