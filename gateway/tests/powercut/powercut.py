#!/usr/bin/env python3
"""Cuts the power of a QEMU guest while it sends, again and again, and looks for a nonce used twice.

The guest boots Linux, mounts an ext4 disk and runs a program that keeps its sequence leases there and sends.
Everything it sends is captured outside. At a random moment QEMU is killed, and the disk, which is this
program's own NBD server, forgets what the guest had written but not flushed: of the unflushed writes a random
part survives, sector by sector, in any order, as on a disk with a volatile cache. Then the guest boots again on
what is left. Over all cuts no (key, number) pair may be seen twice.

    powercut.py --cuts 200 --jobs 2                        the lease store's own sender
    powercut.py --cuts 3 --lying-disk                      control: the bed must notice
    powercut.py --cuts 200 --jobs 2 --gateway target/release/esplanade
                                                           the gateway, see gateway_site.py: its ESP frames are captured
    powercut.py --capture frames --program FILE --args '…' --file HOST:GUEST …
                                                           any program that sends ESP

Needs qemu-system-x86_64, busybox (static), cpio, mkfs.ext4 and dpkg; a kernel is fetched with
`apt-get download` and unpacked, not installed. No root, no KVM.
"""

import argparse
import os
import random
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from gateway_site import site

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SECTOR = 512
MODULES = ["virtio_pci", "virtio_blk", "virtio_console", "virtio_net", "crc32c_generic", "crc32c_intel", "ext4"]


# --- The disk ----------------------------------------------------------------------------------------------


class Disk:
    """An NBD export with a volatile cache. `durable` is what a power cut cannot take."""

    OPT_MAGIC = 0x49484156454F5054
    REP_MAGIC = 0x3E889045565A9
    FLAGS = 1 | 4 | 8  # has flags, FLUSH, FUA

    def __init__(self, image: bytes, path: str, rng: random.Random, lying: bool):
        self.rng = rng
        self.lying = lying
        self.durable = bytearray(image)
        self.seen = bytearray(image)
        self.pending = []
        self.flushes = 0
        self.lost_sectors = 0
        self.lock = threading.Lock()
        self.connection = None
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(1)
        threading.Thread(target=self._accept, daemon=True).start()

    def freeze(self):
        """From now on nothing becomes durable and nothing is answered."""
        with self.lock:
            if self.connection is not None:
                self.connection.close()
                self.connection = None

    def cut(self, rng):
        """Loses a random part of what was not flushed. A lying disk loses all that it said was flushed."""
        with self.lock:
            keep = 0.0 if self.lying else rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])
            writes = self.pending
            rng.shuffle(writes)
            for offset, data in writes:
                for at in range(0, len(data), SECTOR):
                    piece = data[at : at + SECTOR]
                    if rng.random() < keep:
                        self.durable[offset + at : offset + at + len(piece)] = piece
                    else:
                        self.lost_sectors += 1
            self.pending = []
            self.seen = bytearray(self.durable)

    def close(self):
        self.listener.close()

    def _accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with self.lock:
                self.connection = connection
            try:
                self._negotiate(connection)
                self._serve(connection)
            except (ConnectionError, OSError, struct.error):
                pass
            connection.close()

    def _negotiate(self, c):
        c.sendall(struct.pack(">QQH", 0x4E42444D41474943, self.OPT_MAGIC, 3))
        receive(c, 4)
        while True:
            _, option, length = struct.unpack(">QII", receive(c, 16))
            receive(c, length)
            if option == 7:  # GO
                info = struct.pack(">HQH", 0, len(self.durable), self.FLAGS)
                c.sendall(struct.pack(">QIII", self.REP_MAGIC, option, 3, len(info)) + info)
                c.sendall(struct.pack(">QIII", self.REP_MAGIC, option, 1, 0))
                return
            if option == 1:  # EXPORT_NAME
                c.sendall(struct.pack(">QH", len(self.durable), self.FLAGS))
                return
            if option == 2:  # ABORT
                raise ConnectionError
            c.sendall(struct.pack(">QIII", self.REP_MAGIC, option, 0x80000001, 0))

    def _serve(self, c):
        while True:
            magic, flags, kind, handle, offset, length = struct.unpack(">IHHQQI", receive(c, 28))
            if magic != 0x25609513:
                raise ConnectionError
            data = receive(c, length) if kind == 1 else b""
            reply, error = b"", 0
            if kind == 3:  # a flush takes its time, and the power may go meanwhile
                time.sleep(self.rng.uniform(0.0, 0.02))
            with self.lock:
                if self.connection is not c:
                    return  # cut
                if kind == 0:
                    reply = bytes(self.seen[offset : offset + length])
                elif kind == 1:
                    self.seen[offset : offset + length] = data
                    if flags & 1 and not self.lying:  # FUA: this write alone is durable
                        self.durable[offset : offset + length] = data
                    else:
                        self.pending.append((offset, data))
                elif kind == 2:
                    return
                elif kind == 3:
                    if not self.lying:
                        for at, old in self.pending:
                            self.durable[at : at + len(old)] = old
                        self.pending = []
                    self.flushes += 1
                else:
                    error = 22
            c.sendall(struct.pack(">IIQ", 0x67446698, error, handle) + reply)


def receive(connection, length):
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(length - len(parts))
        if not part:
            raise ConnectionError
        parts += part
    return bytes(parts)


# --- The capture -------------------------------------------------------------------------------------------


class Seen:
    """Every (key, number) pair of all boots: a byte for each number, in pages, as whole blocks are skipped."""

    PAGE = 1 << 12

    def __init__(self):
        self.pages = {}
        self.pairs = 0
        self.twice = []
        self.boot = 0

    def add(self, key, number):
        self.pairs += 1
        page, at = divmod(number, self.PAGE)
        seen = self.pages.get((key, page))
        if seen is None:
            seen = self.pages[key, page] = bytearray(self.PAGE)
        if seen[at]:
            self.twice.append((key, number))
        seen[at] = 1
        self.boot += 1

    def keys(self):
        """How many keys were used."""
        return len({key for key, _ in self.pages})


class SerialCapture:
    """Records of 12 bytes on a virtio serial port: 0xe5, key, 0, key ^ 0xff, number (8, little-endian)."""

    def __init__(self, work, seen):
        self.path = f"{work}/capture.sock"
        self.seen = seen
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(self.path)
        self.server.listen(1)

    def arguments(self):
        return [
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=cap,path={self.path}",
            "-device", "virtserialport,chardev=cap,nr=1,name=capture",
        ]  # fmt: skip

    def start(self):
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self):
        connection, _ = self.server.accept()
        rest = b""
        while True:
            try:
                data = connection.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                return
            data = rest + data
            whole = len(data) - len(data) % 12
            for mark, key, zero, check, number in struct.iter_unpack("<BBBBQ", data[:whole]):
                if mark != 0xE5 or zero != 0 or key ^ check != 0xFF:
                    raise SystemExit("the capture lost step with the sender")
                self.seen.add(key, number)
            rest = data[whole:]

    def finish(self):
        """Whatever left the machine before the cut is read."""
        self.thread.join(30)
        if self.thread.is_alive():
            raise SystemExit("the capture did not end")


class FrameCapture:
    """ESP frames, also in UDP, that the guest's network card sends: key is the SPI, number is the 8-byte IV."""

    def __init__(self, work, seen):
        self.local, self.remote = f"{work}/net.host", f"{work}/net.qemu"
        self.seen = seen

    def arguments(self):
        return [
            "-netdev", "dgram,id=n0,"
            f"local.type=unix,local.path={self.remote},remote.type=unix,remote.path={self.local}",
            "-device", "virtio-net-pci,netdev=n0,mac=52:54:00:00:00:01",
        ]  # fmt: skip

    def start(self):
        for path in (self.local, self.remote):
            Path(path).unlink(missing_ok=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self.socket.bind(self.local)
        self.socket.settimeout(0.2)
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self):
        while True:
            try:
                frame = self.socket.recv(65536)
            except TimeoutError:
                if self.done.is_set():
                    return
                continue
            esp = esp_of(frame)
            if esp is not None and len(esp) >= 16:
                spi, _, iv = struct.unpack_from(">IIQ", esp)
                self.seen.add(spi, iv)

    def finish(self):
        self.done.set()
        self.thread.join(30)
        self.socket.close()


def esp_of(frame):
    kind = int.from_bytes(frame[12:14], "big")
    if kind == 0x0800:
        proto, start = frame[23], 14 + 4 * (frame[14] & 15)
    elif kind == 0x86DD:
        proto, start = frame[20], 54
    else:
        return None
    if proto == 50:
        return frame[start:]
    udp = proto == 17 and 4500 in struct.unpack_from(">HH", frame, start)
    return frame[start + 8 :] if udp and frame[start + 8 : start + 12] != bytes(4) else None


# --- The guest ---------------------------------------------------------------------------------------------


def run(*command, **options):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout


def kernel(cache):
    """A Debian cloud kernel, unpacked in the cache: (vmlinuz, module directory)."""
    unpacked = cache / "kernel"
    if not list(unpacked.glob("boot/vmlinuz-*")):
        depends = run("apt-cache", "depends", "linux-image-cloud-amd64")
        package = re.search(r"Depends: (linux-image-\S+-cloud-amd64)", depends)[1]
        with tempfile.TemporaryDirectory(dir=cache) as t:
            run("apt-get", "-qq", "download", package, cwd=t)
            run("dpkg", "-x", str(next(Path(t).glob("*.deb"))), f"{t}/k")
            Path(t, "k").rename(unpacked)
    vmlinuz = next(unpacked.glob("boot/vmlinuz-*"))
    return vmlinuz, unpacked / "lib/modules" / vmlinuz.name.removeprefix("vmlinuz-")


def with_dependencies(names, directory):
    """Module files in the order in which to load them. What is built in has no file."""
    files = {p.name.split(".ko")[0].replace("-", "_"): p for p in directory.rglob("*.ko*")}
    order = []

    def visit(name):
        path = files.get(name)
        if path is None or path in order:
            return
        found = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for needed in filter(None, (found[1].decode() if found else "").split(",")):
            visit(needed.replace("-", "_"))
        order.append(path)

    for name in names:
        visit(name)
    return order


def initramfs(work, directory, program, arguments, files, beside):
    root = Path(work, "root")
    for d in ("bin", "dev", "proc", "sys", "data", "modules", "tmp", "etc"):
        (root / d).mkdir(parents=True, exist_ok=True)
    shutil.copy(shutil.which("busybox"), root / "bin/busybox")
    shutil.copy(program, root / "bin/program")
    for library in re.findall(r"(/\S+)", run("ldd", program)):
        target = root / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)
    for host, guest in files:
        target = root / guest.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(host, target)
    loads = []
    for m in with_dependencies(MODULES, directory):
        shutil.copy(m, root / "modules" / m.name)
        loads.append(f"b insmod /modules/{m.name}")
    # Applets by their own names, for the script that runs beside the program.
    for applet in ("sh", "sleep", "cp", "mv"):
        (root / "bin" / applet).symlink_to("busybox")
    (root / "bin/beside").write_text(beside)
    init = root / "init"
    init.write_text(
        "\n".join(
            [
                "#!/bin/busybox sh",
                "b() { /bin/busybox \"$@\"; }",
                "b mount -t proc none /proc; b mount -t sysfs none /sys; b mount -t devtmpfs none /dev",
                *loads,
                "b mount -t ext4 -o noatime /dev/vda /data || { echo POWERCUT: mount failed; b poweroff -f; }",
                "b ip link set lo up 2>/dev/null; b ip link set eth0 up 2>/dev/null",
                "echo POWERCUT: started",
                "PATH=/bin b sh /bin/beside &",
                f"/bin/program {' '.join(shlex.quote(a) for a in arguments)}",
                "echo POWERCUT: program ended $?",
                "b poweroff -f",
                "",
            ]
        )
    )
    init.chmod(0o755)
    archive = f"{work}/initramfs"
    names = "\0".join(sorted(str(p.relative_to(root)) for p in root.rglob("*")))
    with open(archive, "wb") as out:
        subprocess.run(
            ["cpio", "--quiet", "-0", "-o", "-H", "newc"],
            input=names.encode(), stdout=out, cwd=root, check=True,
        )  # fmt: skip
    return archive


def blank_disk(work, size):
    path = f"{work}/disk"
    with open(path, "wb") as f:
        f.truncate(size)
    run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0", path)
    return Path(path).read_bytes()


# --- The test ----------------------------------------------------------------------------------------------


def job(number, cuts, options, vmlinuz, modules, report):
    rng = random.Random(f"{options.seed}/{number}")
    seen = Seen()
    with tempfile.TemporaryDirectory(prefix="powercut-") as work:
        arguments, files, beside = options.args, options.file, ""
        if options.gateway:
            arguments, files, beside = site(work)
        archive = initramfs(work, modules, options.program, arguments, files, beside)
        disk = Disk(blank_disk(work, 32 << 20), f"{work}/disk.sock", random.Random(rng.random()), options.lying_disk)
        capture = (SerialCapture if options.capture == "serial" else FrameCapture)(work, seen)
        done = idle = 0
        while done < cuts:
            seen.boot = 0
            capture.start()
            console = open(f"{work}/console", "wb")
            qemu = subprocess.Popen(
                [
                    "qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-cpu", "max", "-m", "256",
                    "-smp", "1", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
                    "-kernel", str(vmlinuz), "-initrd", archive, "-serial", "stdio",
                    "-append", "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check",
                    "-blockdev", f"driver=nbd,node-name=d,server.type=unix,server.path={work}/disk.sock",
                    "-device", "virtio-blk-pci,drive=d,write-cache=on",
                    *capture.arguments(),
                ],
                stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT,
            )  # fmt: skip
            flushes = disk.flushes
            try:
                # One cut in ten comes at any time, also while booting; the others while the guest sends.
                early = rng.random() < 0.1
                deadline = time.monotonic() + (rng.uniform(0.5, 5) if early else 120)
                while not (early or seen.boot) and qemu.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.01)
                if early:
                    while qemu.poll() is None and time.monotonic() < deadline:
                        time.sleep(0.01)
                elif seen.boot:
                    time.sleep(rng.uniform(0.0, options.longest))
                    # Half of them strike while something is written: that is when it hurts.
                    deadline = time.monotonic() + (1 if rng.random() < 0.5 else 0)
                    while not disk.pending and time.monotonic() < deadline:
                        time.sleep(0.0005)
                alive = qemu.poll() is None
            finally:
                disk.freeze()
                qemu.kill()
                qemu.wait()
            disk.cut(rng)
            capture.finish()
            console.close()
            text = Path(work, "console").read_bytes().decode(errors="replace")
            if not alive or "POWERCUT: program ended" in text or not (early or seen.boot):
                report.fail(f"job {number}, cut {done}: the guest did not send\n{text[-2000:]}")
                return
            done += 1
            idle += seen.boot == 0
            report.line(
                f"job {number}: cut {done}/{cuts}, {seen.boot} sent, {disk.flushes - flushes} flushes, "
                f"{disk.lost_sectors} sectors lost so far, {seen.pairs} pairs, {len(seen.twice)} twice"
            )
            if seen.twice:
                key, what = seen.twice[0]
                report.fail(f"job {number}, cut {done}: key {key:#x} used number {what} twice")
                return
        disk.close()
        # Cuts while booting are one in ten: of a few, most may be.
        if idle > (cuts // 2 if cuts >= 10 else cuts - 1):
            report.fail(f"job {number}: only {done - idle} of {done} boots sent anything")
        if cuts >= 5 and disk.lost_sectors == 0:
            report.fail(f"job {number}: no cut lost a write, so nothing was tested")
        report.total(done, seen.pairs, seen.keys(), disk.lost_sectors)


class Report:
    def __init__(self):
        self.lock = threading.Lock()
        self.failures = []
        self.cuts = self.pairs = self.keys = self.lost = 0

    def line(self, text):
        with self.lock:
            print(text, flush=True)

    def fail(self, text):
        self.line(f"FAILED: {text}")
        self.failures.append(text)

    def total(self, cuts, pairs, keys, lost):
        with self.lock:
            self.cuts += cuts
            self.pairs += pairs
            self.keys += keys
            self.lost += lost


def sender():
    """The default program: the lease store's own sender."""
    run("cargo", "build", "--quiet", "--release", "-p", "sa-store", "--example", "lease_sender", cwd=ROOT)
    target = os.environ.get("CARGO_TARGET_DIR", ROOT / "target")
    return str(Path(target, "release/examples/lease_sender"))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cuts", type=int, default=6, help="power cuts in all")
    p.add_argument("--jobs", type=int, default=1, help="guests at a time, each with its own disk and keys")
    p.add_argument("--longest", type=float, default=2.0, help="longest time of sending before a cut, seconds")
    p.add_argument("--seed", default=str(random.randrange(1 << 32)), help="for the moments and the losses")
    p.add_argument("--gateway", help="this gateway is the program, with a site of its own")
    p.add_argument("--program", help="what the guest runs; its libraries go with it")
    p.add_argument("--args", type=shlex.split, default="/data/leases /dev/vport1p1", help="its arguments")
    p.add_argument("--capture", choices=["serial", "frames"], default="serial")
    p.add_argument("--file", action="append", default=[], type=lambda s: tuple(s.split(":")), help="HOST:GUEST")
    p.add_argument("--lying-disk", action="store_true", help="control: flushes do nothing; numbers must come twice")
    p.add_argument("--cache", type=Path, default=ROOT / "target/powercut", help="where the kernel is kept")
    options = p.parse_args()
    if isinstance(options.args, str):
        options.args = shlex.split(options.args)
    options.cache.mkdir(parents=True, exist_ok=True)
    if options.gateway:
        options.program, options.capture = options.gateway, "frames"
    options.program = options.program or sender()
    vmlinuz, modules = kernel(options.cache)
    print(f"{options.cuts} power cuts, {options.jobs} guests, seed {options.seed}, {vmlinuz.name}")
    report = Report()
    shares = [options.cuts // options.jobs + (i < options.cuts % options.jobs) for i in range(options.jobs)]
    threads = [
        threading.Thread(target=job, args=(i, share, options, vmlinuz, modules, report))
        for i, share in enumerate(shares)
        if share
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if options.lying_disk:
        found = report.failures and all("twice" in f for f in report.failures)
        print("as it must be with such a disk" if found else "the bed did not notice a disk that lies")
        return 0 if found else 1
    if report.failures or report.cuts != options.cuts:
        print("\n".join(report.failures) or "a job died", file=sys.stderr)
        return 1
    print(
        f"{report.cuts} cuts, {report.pairs} (key, number) pairs of {report.keys} keys, "
        f"{report.lost} sectors lost: no pair twice"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
