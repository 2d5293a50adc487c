"""Raw sockets inside namespaces, and the frames for them."""

import ctypes
import os
import socket
import struct
from contextlib import contextmanager

SO_TIMESTAMPNS = 35
SO_RCVBUFFORCE = 33
ETH_P_IP = 0x0800
CLONE_NEWNET = 0x4000_0000
LIBC = ctypes.CDLL(None, use_errno=True)


def setns(fd):
    """setns(2), which Python has only since 3.12."""
    if LIBC.setns(fd, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


@contextmanager
def inside(namespace):
    """This thread, in a namespace."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/var/run/netns/{namespace}", os.O_RDONLY)
    try:
        setns(there)
        yield
    finally:
        setns(own)
        os.close(own)
        os.close(there)


def raw_socket(namespace, interface, protocol=ETH_P_IP):
    """Frames as they are, with the time at which the kernel saw them. Of one protocol the kernel takes VLAN tags off."""
    with inside(namespace):
        s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(protocol))
        s.bind((interface, protocol))
    s.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 28)
    s.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    s.settimeout(0.5)
    return s


def udp_frame(to, src, dst, number):
    """An Ethernet frame with a UDP packet."""
    payload = struct.pack("!I", number) + bytes(60)
    udp = struct.pack("!4H", 40000, 9, 8 + len(payload), 0) + payload
    ends = (socket.inet_aton(src), socket.inet_aton(dst))
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), number & 0xFFFF, 0, 64, 17, 0, *ends)
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    total = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    head = head[:10] + struct.pack("!H", total) + head[12:]
    return bytes.fromhex(to.replace(":", "")) + bytes(6) + struct.pack("!H", ETH_P_IP) + head + udp
