"""What belongs to the kernel of a gateway that owns its ports.

    host ---- lan [left gateway] wan ---- street ---- wan [right gateway] lan ---- host
                  kernel: tap-lan, tap-wan                kernel: the same

The gateways know their neighbours from their configuration; hosts and the street ask the kernels, through the TAPs.

    reach    hosts, the street and the far side reach the gateway's own addresses: ARP, ND, ping, TCP, as far as policies let
    own      what the gateway's kernel sends to the far side leaves encrypted; in clear nothing leaves without a policy
    flood    ARP, ICMP and UDP floods to the gateway disturb neither forwarding nor IKE
    routing  BIRD on the gateways' kernels: OSPF and BFD with the street, BGP with a host and through the tunnel; packets follow
             what it learns, and its sessions bear a flood
"""

import json
import socket
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "peers/lib"))

import routing
from netns import Failed, end, mac, run_bed, sh, wait_for
from packets import raw_socket, setns
from topology import BGP, FLOOD, SSH, Bed, Flood, ping

IKE = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("", 500))
while True:
    data, peer = s.recvfrom(2048)
    s.sendto(data, peer)
"""


def reach(world, program):
    """From everywhere."""
    bed = Bed(world, program, "reach")
    bed.serve(BGP, SSH)
    left, right = bed.host["left"], bed.host["right"]
    for namespace, to in (
        (left, ("10.1.0.1", "fd01::1", "10.2.0.1", "fd02::1")),
        (right, ("10.1.0.1", "fd01::1", "10.1.0.2", "fd01::2")),
        (bed.street, ("192.0.2.1", "fd0f::1", "192.0.2.2")),
    ):
        for a in to:
            ping(namespace, a)
    for namespace, to, port, there in (
        (left, "10.1.0.1", SSH, True),
        (left, "fd01::1", SSH, True),
        (right, "10.1.0.1", SSH, True),
        (right, "fd01::1", SSH, True),
        (bed.street, "192.0.2.1", BGP, True),
        (bed.street, "192.0.2.1", SSH, False),
    ):
        if bed.connects(namespace, to, port) != there:
            raise Failed(f"TCP from {namespace} to {to} port {port}: expected {'an' if there else 'no'} answer")
    conf = sh("sysctl", "-n", "net.ipv4.conf.tap-wan.disable_xfrm", "net.ipv4.conf.tap-wan.disable_policy", namespace=bed.ns["left"])
    if conf.split() != ["1", "1"] or mac(bed.ns["left"], "tap-wan") != bed.wan["left"].mac:
        raise Failed(f"the TAP's settings: {conf}")
    drops = bed.drops()
    bed.stop()
    if any(drops.get(reason) for reason in ("punt_limit", "punt_full", "not_for_us")):
        raise Failed(f"drops {drops}")
    return "11 pings and 5 of 6 TCP connections (the last one no policy allows)"


def own(world, program):
    """The kernel's own traffic."""
    bed = Bed(world, program, "own")
    seen, done = [], threading.Event()
    listen = raw_socket(bed.street, bed.wan["left"].name, 3)

    def watch():
        while not done.is_set():
            try:
                seen.append(listen.recv(2048))
            except TimeoutError:
                pass

    thread = threading.Thread(target=watch)
    thread.start()
    ns = bed.ns["left"]
    for to in ("10.2.0.1", "10.2.0.2", "fd02::1", "fd02::2"):
        ping(ns, to)
    # TTL 1 is enough for a neighbour through a tunnel, as BGP wants it.
    ping(ns, "10.2.0.1", 5, "-t", "1")
    # Too large for the tunnel: the kernel learns what fits.
    ping(ns, "10.2.0.2", 5, "-s", "3000")
    sh("ip", "route", "add", "198.51.100.0/24", "via", "192.0.2.9", "dev", "tap-wan", namespace=ns)
    try:
        ping(ns, "198.51.100.1")
        raise Failed("a ping without a policy was answered")
    except Failed as e:
        if "without a policy" in str(e):
            raise
    time.sleep(0.5)
    done.set()
    thread.join()
    drops = bed.drops()
    bed.stop()
    inner = [f for f in seen if f[12:14] == b"\x08\x00" and f[23] != 50 and (f[26] == 10 or f[30] == 10 or f[30:33] == b"\xc6\x33\x64")]
    esp = sum(f[12:14] == b"\x08\x00" and f[23] == 50 for f in seen)
    if inner or esp < 50:
        raise Failed(f"{esp} ESP packets, {len(inner)} packets in clear: {inner[:1]}")
    if not drops.get("policy_discard"):
        raise Failed(f"drops {drops}")
    return f"{esp} ESP packets seen on the street, nothing of the kernel's in clear but ARP and ND"


def flood(world, program):
    """More than the kernel should have to bear."""
    bed = Bed(world, program, "flood")
    ping(bed.host["left"], "10.2.0.2")
    ping(bed.street, "192.0.2.1")
    responder = world.start(sys.executable, "-c", IKE, namespace=bed.ns["left"], log="ike.log")
    # Before that nobody answers, which no counter tells.
    wait_for("the IKE responder", lambda: sh("ss", "-Hlun", "sport = :500", namespace=bed.ns["left"]).strip())
    poured = Flood(bed)
    # IKE while the flood goes on, each with an answer of its own.
    ike = socket_in(bed.street)
    answered, late, stop = [0, 0], [0], threading.Event()

    def negotiate():
        while not stop.is_set() and answered[1] < 50:
            number = str(answered[0]).encode()
            ike.sendto(number, ("192.0.2.1", 500))
            answered[0] += 1
            try:
                while ike.recv(2048) != number:
                    late[0] += 1
                answered[1] += 1
            except TimeoutError:
                pass
            time.sleep(0.02)

    kernel = [lost_by_kernel(bed)]
    through = world.start("ping", "-q", "-i", "0.01", "-c", "300", "-W", "2", "10.2.0.2", namespace=bed.host["left"], log="through.log")
    thread = threading.Thread(target=negotiate)
    thread.start()
    took = poured.pour(3 * FLOOD, lambda: through.poll() is None)
    wait_for("IKE answers", lambda: answered[1] >= 50)
    stop.set()
    thread.join()
    wait_for("the pings to end", lambda: through.poll() is not None, 30)
    result = (world.dir / "through.log").read_text()
    kernel.append(lost_by_kernel(bed))
    drops = bed.drops()
    punts = {p["class"]: p for p in bed.gateway().ask("stats")["punts"]}
    bed.stop()
    end(responder)
    if "300 received" not in result:
        raise Failed(f"forwarding: {result.strip()[-200:]}; drops {drops}")
    # The flood fills the queues of this machine's own kernel too. What it loses it counts; the rest would be the gateway's.
    lost, counted = answered[0] - answered[1] - late[0], kernel[1] - kernel[0]
    told = f"{answered[0]} IKE packets, {answered[1]} answers and {late[0]} late; the kernel counts {counted} lost; {punts}; drops {drops}"
    if late[0] or lost > counted or punts["ike"]["turned_away"]:
        raise Failed(told)
    limited = drops.get("punt_limit", 0)
    if not limited:
        raise Failed(f"{poured.sent} frames sent, {limited} turned away; drops {drops}")
    return f"{poured.sent} frames in {took:.1f} s, {limited} turned away; 300 of 300 pings through the tunnel, {answered[1]} of {answered[0]} IKE answers meanwhile"


def lost_by_kernel(bed):
    """Packets that the kernel dropped on IKE's way between the street and the gateway's kernel, by its own counters."""
    total = 0
    for namespace, interface in ((bed.street, bed.wan["left"].name), (bed.ns["left"], "tap-wan")):
        link = json.loads(sh("ip", "-s", "-j", "link", "show", interface, namespace=namespace))[0]["stats64"]
        total += link["rx"]["dropped"] + link["tx"]["dropped"]
        total += int(sh("nstat", "-asz", "UdpRcvbufErrors", namespace=namespace).split()[-2])
    # Frames that did not fit a CPU's backlog.
    return total + sum(int(line.split()[1], 16) for line in Path("/proc/net/softnet_stat").read_text().splitlines())


def socket_in(namespace):
    """A UDP socket of that namespace, with IKE's port."""
    with open("/proc/self/ns/net") as own, open(f"/var/run/netns/{namespace}") as there:
        try:
            setns(there.fileno())
            s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            s.bind(("", 500))
        finally:
            setns(own.fileno())
    s.settimeout(2)
    return s


CASES = {"reach": reach, "own": own, "flood": flood, "routing": routing.case}


if __name__ == "__main__":
    run_bed("esplanade-exception", __doc__, CASES)
