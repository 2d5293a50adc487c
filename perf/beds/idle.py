#!/usr/bin/env python3
"""Idle cost and wake-up latency of the gateway over af_xdp ports: a measurement, printed, not a test.

    idle.py --gateway target/release/esplanade [--seconds 10] [--pings 2000] [--json]

The gateway forwards between two veth cables in network namespaces. CPU time is read from /proc while nothing
arrives. Then packets come one by one, far enough apart that the worker sleeps before each: the time from the
sender's sendto() to the receiver's kernel time stamp, less the same for packets that the kernel forwards
over the same two cables, is what waking up, deciding, sealing or opening, and sending cost. Needs root.
"""

import argparse
import json
import os
import secrets
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "gateway/tests/peers/lib"))

from gateway import Gateway
from netns import World, address, mac, private_file, sh, veth, wait_for
from packets import SO_TIMESTAMPNS, raw_socket, udp_frame

SUITE = "aes-128-gcm-16"
LAN, WAN = "10.1.0", "192.0.2"
CONFIG = """
[workers]
count = 1
[[port]]
name = "lan"
kind = "af_xdp"
side = "inside"
addresses = ["10.1.0.1/24"]
[[port]]
name = "wan"
kind = "af_xdp"
side = "outside"
addresses = ["192.0.2.1/24"]
[[route]]
to = "10.2.0.0/24"
via = "192.0.2.2"
[[neighbour]]
ip = "192.0.2.2"
mac = "{peer}"
port = "wan"
"""


def sa_file():
    """A tunnel that everything to 10.2.0.0/24 goes into."""
    key = secrets.token_hex(20)
    return (
        f'[[tunnel]]\nname = "t"\nlocal = "{WAN}.1"\nremote = "{WAN}.2"\nsuite = "{SUITE}"\n'
        f'[[tunnel.sa]]\ndirection = "out"\nspi = 4096\nkey = "{key}"\nfirst_use = true\n'
        '[[policy]]\nname = "out"\ndirection = "out"\npriority = 1\naction = "protect"\ntunnel = "t"\n'
        'src = "10.1.0.0/24"\ndst = "10.2.0.0/24"\n'
    )


def latencies(sender, receiver, to, dst, count, gap, wanted):
    """Microseconds from sendto() to the arrival at the far end of the second cable, one packet at a time."""
    found, lost = [], 0
    for n in range(count):
        time.sleep(gap)
        frame = udp_frame(to, f"{LAN}.2", dst, n)
        sent = time.clock_gettime_ns(time.CLOCK_REALTIME)
        sender.send(frame)
        while True:
            try:
                data, extra, *_ = receiver.recvmsg(2048, 256)
            except TimeoutError:
                lost += 1
                break
            if not wanted(data):
                continue
            stamp = next(struct.unpack("qq", d[:16]) for _, kind, d in extra if kind == SO_TIMESTAMPNS)
            found.append((stamp[0] * 10**9 + stamp[1] - sent) / 1000)
            break
    return sorted(found), lost


def cpu_seconds(pid):
    """CPU time that the process and each of its threads have used."""
    by_thread = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        # In nanoseconds, where stat has ticks of 10 ms.
        name = (task / "comm").read_text().strip()
        by_thread[name] = by_thread.get(name, 0) + int((task / "schedstat").read_text().split()[0]) / 1e9
    return by_thread


def percentile(values, share):
    """Of a sorted list."""
    return values[min(len(values) - 1, int(len(values) * share))] if values else float("nan")


def summary(values):
    """The percentiles that are reported."""
    return {f"p{p:g}": round(percentile(values, p / 100), 1) for p in (50, 90, 99, 99.9)}


def measure(args, world):
    """Returns everything that was measured."""
    host, middle, far = (world.namespace(n) for n in ("host", "gateway", "far"))
    veth(host, "eth0", middle, "lan")
    veth(middle, "wan", far, "eth0")
    sh("sysctl", "-qw", "net.ipv4.ip_forward=1", namespace=middle)
    for ns in (host, middle, far):
        sh("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", namespace=ns)
    address(middle, "lan", f"{LAN}.1/24")
    address(middle, "wan", f"{WAN}.1/24")
    sh("ip", "route", "add", "10.3.0.0/24", "via", f"{WAN}.2", namespace=middle)
    sh("ip", "neigh", "add", f"{WAN}.2", "lladdr", mac(far, "eth0"), "dev", "wan", namespace=middle)
    private_file(world.dir / "sa.toml", sa_file())
    config = CONFIG.format(peer=mac(far, "eth0"))
    gateway = Gateway(world, args.gateway.resolve(), middle, world.dir, config, "gateway.log")
    sender = raw_socket(host, "eth0")
    receiver = raw_socket(far, "eth0")
    to = mac(middle, "lan")

    def protected(data):
        return data[23] == 50

    def plain(data):
        return data[23] == 17

    # Caches warm, rings filled.
    wait_for("the first packets", lambda: latencies(sender, receiver, to, "10.2.0.1", 20, 0.001, protected)[0])
    time.sleep(0.5)
    before = cpu_seconds(gateway.process.pid)
    stats = gateway.ask("stats")["workers"][0]
    began = time.monotonic()
    time.sleep(args.seconds)
    took = time.monotonic() - began
    after = cpu_seconds(gateway.process.pid)
    later = gateway.ask("stats")["workers"][0]
    idle = {name: 100 * (after[name] - before.get(name, 0)) / took for name in after}
    through_kernel, lost_kernel = latencies(sender, receiver, to, "10.3.0.1", args.pings, args.gap, plain)
    through_gateway, lost = latencies(sender, receiver, to, "10.2.0.1", args.pings, args.gap, protected)
    gateway.stop()
    base = percentile(through_kernel, 0.5)
    return {
        "idle_cpu_percent": {"total": round(sum(idle.values()), 3), **{k: round(v, 3) for k, v in idle.items()}},
        "idle_rounds_per_second": round((later["idle_polls"] - stats["idle_polls"]) / took, 1),
        "sleeps_per_second": round((later["sleeps"] - stats["sleeps"]) / took, 1),
        "packets": args.pings,
        "lost": lost + lost_kernel,
        "kernel_forwarding_us": summary(through_kernel),
        "gateway_us": summary(through_gateway),
        "wake_up_us": summary([v - base for v in through_gateway]),
        "load": os.getloadavg()[0],
        "cpus": os.cpu_count(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gateway", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=10, help="of idling")
    parser.add_argument("--pings", type=int, default=2000, help="packets for each latency")
    parser.add_argument("--gap", type=float, default=0.003, help="seconds between packets; the worker sleeps in less")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with World("esplanade-idle") as world:
        r = measure(args, world)
    if args.json:
        print(json.dumps(r))
        return
    threads = ", ".join(f"{k} {v} %" for k, v in r["idle_cpu_percent"].items() if k != "total")
    print(f"idle CPU         {r['idle_cpu_percent']['total']} % of one CPU ({threads})        bar: below 2 %")
    print(f"idle rounds      {r['idle_rounds_per_second']}/s in {r['sleeps_per_second']} sleeps/s")
    for title, key in (("kernel forwards", "kernel_forwarding_us"), ("gateway seals", "gateway_us"), ("wake-up", "wake_up_us")):
        print(f"{title:17}" + "  ".join(f"{p} {v} µs" for p, v in r[key].items()))
    print(f"bar: wake-up p99 below 200 µs; {r['packets']} packets each, {r['lost']} lost, load {r['load']:.1f} on {r['cpus']} CPUs")


if __name__ == "__main__":
    main()
