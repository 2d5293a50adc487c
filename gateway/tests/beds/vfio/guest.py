#!/usr/bin/env python3
"""Boots a QEMU guest with an IOMMU, gives NICs to vfio-pci and runs a program in it.

    guest.py --nic e1000e PROGRAM ARGUMENT …
        PROGRAM runs in the guest (with the libraries that ldd finds). VFIO_DEVICES holds the PCI addresses of the
        devices that are bound to vfio-pci, in the order of the options. The exit status is the program's.

    --nic MODEL[,PROPERTY=VALUE…][@HUB]
        A NIC bound to vfio-pci: e1000e, igb, vmxnet3, virtio-net-pci (gets disable-legacy=on,iommu_platform=on).
        NICs with the same HUB (a small number) see each other's frames; the default is a hub of its own. `@tap:NAME`
        joins a TAP of the host instead, made before in the network namespace of this program or of `--netns`. `@bare:NAME` too, but
        without checksums and segments left to do, and `@queues:NAME` with two queues.
    --device MODEL[,PROPERTY=VALUE…]   any other device bound to vfio-pci: edu, virtio-crypto-pci,cryptodev=…
    --peer HUB        a virtio NIC that the guest's kernel drives, on that hub (or tap:NAME, bare:NAME): eth0, eth1, … in the order
                      of the options
    --netns NAME      network namespace for QEMU
    --script FILE     a shell script (busybox) that is run instead of PROGRAM; "$@" are PROGRAM and its arguments
    --file HOST:GUEST --tool NAME   files and programs of the host (with their libraries) to take along
    --module NAME     kernel modules to load besides those of VFIO
    --unit-tests CRATE FILTER       instead of PROGRAM: the crate's ignored unit tests that match FILTER, one at a time
    --huge N          2 MiB pages reserved in the guest (default 64)   --memory MIB   --cpus N   --timeout SECONDS
    --silence SECONDS after which a guest that says nothing is booted again, twice at most (default 90)
    --qemu 7|10       QEMU of Debian 12 with Linux 6.1, or of its backports with Linux 6.12 (default; igb needs it)
    --shell           what to run is a shell on the console

What the guest prints as "BED: monitor COMMAND" at the end of a line is given to QEMU's monitor: set_link dev1 off (the first
NIC loses its link), set_link vn1 off (its cable is cut, which some models do not see), device_del dev1.

Unit tests of a driver that need a device look like this, and run with `guest.py --nic igb --unit-tests pmd nic::igb`:

    #[test]
    #[ignore = "needs a device: gateway/tests/beds/vfio/guest.py"]
    fn link_comes_up() { let bdf = std::env::var("VFIO_DEVICES").unwrap(); … }

Needs busybox-static, cpio and, for --qemu 7, qemu-system-x86. The other QEMU and the kernels are fetched with apt-get into
the cache (target/beds, or $BED_CACHE), with package lists of their own; nothing is installed. No root, no KVM: about 4 s a boot.
"""

import argparse
import ctypes
import json
import lzma
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[3]
CACHE = Path(os.environ.get("BED_CACHE", ROOT / "target/beds"))
MODULES = ["vfio", "vfio_iommu_type1", "vfio_pci", "virtio_net", "af_packet"]
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
MIRROR = "http://deb.debian.org"


def run(*command, **options):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout


# --- QEMU and kernel ---------------------------------------------------------------------------------------


def fetch(name, packages):
    """Unpacks Debian packages, chosen by `packages(apt-cache)`, in the cache; installs nothing."""
    target = CACHE / name
    if target.is_dir():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    apt = CACHE / "apt"
    for d in ("lists/partial", "cache/archives/partial"):
        (apt / d).mkdir(parents=True, exist_ok=True)
    sources = apt / "debian.sources"
    sources.write_text(
        f"Types: deb\nURIs: {MIRROR}/debian\nSuites: bookworm bookworm-updates bookworm-backports\n"
        f"Components: main\nSigned-By: {KEYRING}\n\n"
        f"Types: deb\nURIs: {MIRROR}/debian-security\nSuites: bookworm-security\nComponents: main\nSigned-By: {KEYRING}\n"
    )
    options = [
        "-qq", "-o", f"Dir::Etc::sourcelist={sources}", "-o", "Dir::Etc::sourceparts=-",
        "-o", f"Dir::State::lists={apt}/lists", "-o", f"Dir::Cache={apt}/cache", "-o", "APT::Sandbox::User=root",
    ]  # fmt: skip
    print(f"bed: fetching {name}", file=sys.stderr)
    run("apt-get", *options, "update")
    with tempfile.TemporaryDirectory(dir=CACHE) as t:
        run("apt-get", *options, "download", *packages(lambda *a: run("apt-cache", *options, *a)), cwd=t)
        for deb in Path(t).glob("*.deb"):
            run("dpkg", "-x", str(deb), f"{t}/out")
        shutil.move(f"{t}/out", target)
    return target


def kernel_package(series):
    def choose(cache):
        names = re.findall(rf"^(linux-image-{re.escape(series)}\.\S*-cloud-amd64) ", cache("search", "linux-image.*cloud-amd64"), re.M)
        versions = [(int_parts(n), n) for n in names]
        if not versions:
            raise SystemExit(f"bed: no kernel {series} to be had")
        return [max(versions)[1]]

    return choose


def int_parts(name):
    return [int(n) for n in re.findall(r"\d+", name)]


def machine(which):
    """(QEMU command with its data, vmlinuz, module directory): pairs that work together."""
    if which == "10":
        k = fetch("linux-6.12", kernel_package("6.12"))
        q = fetch(
            "qemu-10",
            lambda _: [f"{p}/bookworm-backports" for p in ("qemu-system-x86", "qemu-system-data", "qemu-system-common", "seabios")]
            + ["ipxe-qemu"],
        )
        firmware = [f"-L{q}/usr/share/{d}" for d in ("qemu", "seabios")]
        firmware.append(f"-L{q}/usr/lib/ipxe/qemu")
        qemu = [str(q / "usr/bin/qemu-system-x86_64"), *(x for f in firmware for x in ("-L", f[2:]))]
    else:
        k = fetch("linux-6.1", kernel_package("6.1"))
        qemu = ["qemu-system-x86_64"]
    vmlinuz = next(k.glob("boot/vmlinuz-*"))
    modules = k / "lib/modules" / vmlinuz.name.removeprefix("vmlinuz-")
    return qemu, vmlinuz, modules


def module_bytes(path):
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def with_dependencies(names, directory):
    """(name, content) of modules in the order in which to load them. What is built in has no file."""
    files = {p.name.split(".ko")[0].replace("-", "_"): p for p in directory.rglob("*.ko*")}
    order = {}

    def visit(name):
        path = files.get(name)
        if path is None or name in order:
            return
        data = module_bytes(path)
        found = re.search(rb"\0depends=([^\0]*)\0", data)
        for needed in filter(None, (found[1].decode() if found else "").split(",")):
            visit(needed.replace("-", "_"))
        order[name] = data

    for name in names:
        visit(name.replace("-", "_"))
    return order


# --- The guest's file system -------------------------------------------------------------------------------


def take(root, host, guest=None):
    """Copies a file and, of programs, their libraries."""
    target = root / (guest or host).lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(host, target)
    listed = subprocess.run(["ldd", host], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for library in re.findall(r"(/\S+) \(0x", listed.stdout):
        place = root / library.lstrip("/")
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, place)


INIT = """\
#!/bin/busybox sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp
busybox mount -t proc none /proc; busybox mount -t sysfs none /sys; busybox mount -t devtmpfs none /dev
mkdir -p /dev/shm /dev/pts /dev/hugepages /run; mount -t tmpfs none /tmp; mount -t tmpfs none /run
for m in $(cat /modules/order); do busybox insmod /modules/$m || echo "BED: module $m"; done
echo {huge} > /proc/sys/vm/nr_hugepages
mount -t hugetlbfs none /dev/hugepages
ip link set lo up
# The devices behind the root ports named in /ports, in that order.
devices=
for port in $(cat /ports); do
    bdf=$(ls -d /sys/bus/pci/devices/0000:00:$port/0000:*:00.0) || {{ echo "BED: no device behind $port"; continue; }}
    bdf=$(basename $bdf)
    d=/sys/bus/pci/devices/$bdf
    echo vfio-pci > $d/driver_override
    [ -e $d/driver ] && echo $bdf > $d/driver/unbind
    echo $bdf > /sys/bus/pci/drivers_probe
    [ "$(basename $(readlink $d/driver))" = vfio-pci ] || echo "BED: $bdf is not bound"
    devices="$devices $bdf"
done
export VFIO_DEVICES="${{devices# }}"
export RUST_BACKTRACE=1
echo "BED: devices $VFIO_DEVICES"
{main}
echo "BED: exit $?"
busybox poweroff -f
"""


def initramfs(work, options, modules, devices):
    root = Path(work, "root")
    for d in ("bin", "sbin", "usr/bin", "usr/sbin", "dev", "proc", "sys", "modules", "tmp", "etc", "run", "var"):
        (root / d).mkdir(parents=True, exist_ok=True)
    busybox = shutil.which("busybox") or sys.exit("bed: busybox-static is missing")
    shutil.copy(busybox, root / "bin/busybox")
    for applet in run(busybox, "--list").split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    # Tools of the host come before busybox's in the path.
    for tool in options.tool:
        take(root, shutil.which(tool) or sys.exit(f"bed: {tool} is missing"), f"/usr/bin/{tool}")
    for pair in options.file:
        host, _, guest = pair.partition(":")
        take(root, host, guest)
    loads = with_dependencies([*MODULES, *options.module], modules)
    for name, data in loads.items():
        (root / "modules" / name).write_bytes(data)
    (root / "modules/order").write_text("\n".join(loads))
    (root / "ports").write_text("\n".join(f"{slot:02x}.0" for slot in devices))
    words = []
    if options.program:
        take(root, options.program[0], "/bin/program")
        words = ["/bin/program", *options.program[1:]]
    if options.script:
        shutil.copy(options.script, root / "bin/script")
        words = ["busybox", "sh", "/bin/script", *words]
    main = "setsid cttyhack sh" if options.shell else " ".join(map(shlex.quote, words)) or "true"
    (root / "init").write_text(INIT.format(huge=options.huge, main=main))
    (root / "init").chmod(0o755)
    archive = f"{work}/initramfs"
    names = "\0".join(sorted(str(p.relative_to(root)) for p in root.rglob("*")))
    with open(archive, "wb") as out:
        subprocess.run(
            ["cpio", "--quiet", "-0", "-o", "-H", "newc"], input=names.encode(), stdout=out, cwd=root, check=True
        )
    return archive


# --- The machine -------------------------------------------------------------------------------------------


class Machine:
    """Arguments for QEMU's devices. What is bound to vfio-pci sits alone behind a root port: a group of its own."""

    def __init__(self):
        self.arguments = ["-device", "intel-iommu,intremap=on,caching-mode=on"]
        self.slots = []
        self.count = 0

    def vfio(self, model):
        self.count += 1
        n, slot = self.count, 0x10 + self.count
        self.arguments += ["-device", f"pcie-root-port,id=rp{n},chassis={n},addr={slot:#x}.0"]
        self.arguments += ["-device", f"{model},bus=rp{n},id=dev{n}"]
        self.slots.append(slot)

    def nic(self, text):
        model, _, where = text.partition("@")
        n = self.count + 1
        if model.split(",")[0].startswith("virtio-net"):
            model += ",disable-legacy=on,iommu_platform=on"
        if "mac=" not in model:
            model += f",mac=52:54:00:00:01:{n:02x}"
        self.backend(f"vn{n}", where or str(100 + n))
        self.vfio(f"{model},netdev=vn{n}")

    def peer(self, hub, n):
        self.backend(f"pn{n}", hub)
        # Behind the IOMMU too, as it translates for all.
        self.arguments += [
            "-device",
            f"virtio-net-pci,netdev=pn{n},mac=52:54:00:00:02:{n:02x},addr={0x8 + n:#x}.0,disable-legacy=on,iommu_platform=on",
        ]

    def backend(self, name, where):
        kind, _, tap = where.partition(":")
        if kind in ("tap", "bare", "queues"):
            header = {"tap": "", "bare": ",vnet_hdr=off", "queues": ",queues=2"}[kind]
            self.arguments += ["-netdev", f"tap,id={name},ifname={tap},script=no,downscript=no{header}"]
        else:
            self.arguments += ["-netdev", f"hubport,id={name},hubid={int(where)}"]


def unit_tests(crate):
    """The crate's unit-test binary, built as `./test` does: the crate alone would be built anew with other features."""
    out = run("cargo", "test", "--locked", "--workspace", "--lib", "--no-run", "--message-format=json", cwd=ROOT)
    for line in out.splitlines():
        message = json.loads(line)
        is_test = message.get("executable") and message.get("profile", {}).get("test")
        if is_test and message["target"]["name"] == crate:
            return message["executable"]
    raise SystemExit(f"bed: no unit tests in {crate}")


def end_with_parent():
    """Whatever ends this program ends the guest."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def boot(options, output=sys.stdout):
    """Runs the guest; returns the program's exit status and all that the console said.

    A guest under TCG now and then stands still because a CPU lost its timer's interrupt, and QEMU itself ends by an assertion of its
    own (`iotlb_to_section`). The first is told by its silence, or by what its kernel says of that CPU, the second by QEMU's exit
    status; both are booted again: a program that hangs every time fails all the same.
    """
    for last in (False, False, True):
        status, lines, trouble = boot_once(options, output)
        if last or not trouble:
            return status, lines
        print(f"bed: {trouble}; once more", file=sys.stderr, flush=True)


def boot_once(options, output):
    """One boot: status, lines, and what befell the machine itself."""
    if options.unit_tests:
        crate, pattern = options.unit_tests
        options.program = [unit_tests(crate), "--ignored", "--test-threads=1", "--nocapture", pattern]
    qemu, vmlinuz, modules = machine(options.qemu)
    m = Machine()
    for kind, text in options.devices:
        m.nic(text) if kind == "nic" else m.vfio(text)
    for n, hub in enumerate(options.peer):
        m.peer(hub, n)
    with tempfile.TemporaryDirectory(prefix="bed-") as work:
        archive = initramfs(work, options, modules, m.slots)
        command = [
            *(["ip", "netns", "exec", options.netns] if options.netns else []),
            *qemu, "-accel", "tcg,thread=multi", "-machine", "q35,kernel-irqchip=split", "-cpu", "max",
            "-smp", str(options.cpus), "-m", str(options.memory), "-nodefaults", "-no-user-config", "-display", "none",
            "-no-reboot", "-kernel", str(vmlinuz), "-initrd", archive,
            "-append", "console=ttyS0 quiet panic=-1 intel_iommu=on iommu=nopt tsc=reliable no_timer_check "
            # A tick that comes again and again: TCG now and then loses the interrupt of a timer that is set once.
            "nohz=off highres=off net.ifnames=0",
            *m.arguments,
        ]  # fmt: skip
        monitor, far = socket.socketpair()
        command += ["-chardev", f"socket,id=mon,fd={far.fileno()}", "-mon", "chardev=mon"]
        # Not QEMU's standard output, where its device models talk in the middle of the guest's lines.
        console, end = socket.socketpair()
        command += ["-chardev", f"socket,id=con,fd={end.fileno()}", "-serial", "stdio" if options.shell else "chardev:con"]
        guest = subprocess.Popen(
            command, stdin=None if options.shell else subprocess.DEVNULL, stdout=None if options.shell else subprocess.DEVNULL,
            preexec_fn=end_with_parent, pass_fds=[far.fileno(), end.fileno()],
        )  # fmt: skip
        far.close()
        end.close()
        console = console.makefile("r", errors="replace", newline="\n")
        watchdog = threading.Timer(options.timeout, guest.kill)
        watchdog.start()
        lines, status = [], None
        silence = Silence(options.silence, guest.kill)
        try:
            for line in console:
                silence.broken()
                line = line.rstrip("\r\n")
                lines.append(line)
                if "Possible timer handling issue on cpu" in line:
                    silence.end_it()
                if output:
                    print(line, file=output, flush=True)
                if found := re.search(r"BED: exit (\d+)", line):
                    status = int(found[1])
                    # A kernel that waits for a device does not power off.
                    watchdog.cancel()
                    watchdog = threading.Timer(5, guest.kill)
                    watchdog.start()
                if found := re.search(r"BED: monitor (.*)", line):
                    monitor.sendall(found[1].encode() + b"\n")
            guest.wait()
            aborted = guest.returncode == -signal.SIGABRT
        finally:
            watchdog.cancel()
            silence.over()
            guest.kill()
            guest.wait()
    trouble = None
    if status is None:
        trouble = "the guest stands still" if silence.too_long else "QEMU has ended itself" if aborted else None
        print(f"bed: the guest ended without a result (limit {options.timeout} s)", file=sys.stderr)
        status = 124
    return status, lines, trouble


class Silence:
    """Calls `end` once nothing was heard for that many seconds."""

    def __init__(self, seconds, end):
        self.seconds, self.end, self.too_long = seconds, end, False
        self.heard, self.done = time.monotonic(), threading.Event()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        while not self.done.wait(1):
            if time.monotonic() - self.heard > self.seconds:
                self.end_it()
                return

    def end_it(self):
        self.too_long = True
        self.end()

    def broken(self):
        self.heard = time.monotonic()

    def over(self):
        self.done.set()


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    class Ordered(argparse.Action):
        def __call__(self, _p, namespace, value, option=None):
            namespace.devices = [*namespace.devices, (self.dest, value)]

    p.set_defaults(devices=[])
    p.add_argument("--nic", action=Ordered)
    p.add_argument("--device", action=Ordered)
    p.add_argument("--peer", action="append", default=[])
    p.add_argument("--netns")
    p.add_argument("--script")
    p.add_argument("--file", action="append", default=[])
    p.add_argument("--tool", action="append", default=[])
    p.add_argument("--module", action="append", default=[])
    p.add_argument("--unit-tests", nargs=2, metavar=("CRATE", "FILTER"))
    p.add_argument("--huge", type=int, default=64)
    p.add_argument("--memory", type=int, default=768)
    p.add_argument("--cpus", type=int, default=2)
    p.add_argument("--timeout", type=int, default=120)
    p.add_argument("--silence", type=int, default=90)
    p.add_argument("--qemu", choices=["7", "10"], default="10")
    p.add_argument("--shell", action="store_true")
    p.add_argument("program", nargs=argparse.REMAINDER)
    return p


if __name__ == "__main__":
    sys.exit(boot(parser().parse_args())[0])
