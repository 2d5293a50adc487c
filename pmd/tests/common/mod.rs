//! Network namespaces and raw sockets for tests; both clean up after themselves.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file includes this module and uses a part of it"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Whether this process may make namespaces; says so loudly if not.
pub fn privileged(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED, NOT PASSED: {test} needs root (network namespaces, BPF)");
    }
    root
}

/// A network namespace of this test alone; deleted on drop, and with it every interface in it.
pub struct Netns {
    name: String,
}

impl Netns {
    pub fn new() -> Netns {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "pmd-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        run(&["netns", "add", &name]);
        let ns = Netns { name };
        // No router solicitations or duplicate address detection between the test's own packets.
        ns.enter(|| std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").ok());
        ns
    }

    /// Runs `ip` in the namespace.
    pub fn ip(&self, args: &[&str]) {
        let mut all = vec!["-n", &self.name];
        all.extend(args);
        run(&all);
    }

    /// Runs `work` on a thread inside the namespace; what it opens stays there.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    let ns = File::open(format!("/var/run/netns/{}", self.name)).unwrap();
                    nix::sched::setns(&ns, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                    work()
                })
                .join()
                .unwrap()
        })
    }

    /// Joins two namespaces by a veth pair, both ends up.
    pub fn veth(&self, a: &str, other: &Netns, b: &str, queues: usize) {
        let queues = queues.to_string();
        let queues = ["numrxqueues", &queues, "numtxqueues", &queues];
        let mut args = vec!["link", "add", a];
        args.extend(queues);
        args.extend(["type", "veth", "peer", "name", b, "netns", &other.name]);
        args.extend(queues);
        self.ip(&args);
        self.ip(&["link", "set", a, "up"]);
        other.ip(&["link", "set", b, "up"]);
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
    }
}

fn run(args: &[&str]) {
    let status = Command::new("ip").args(args).status().unwrap();
    assert!(status.success(), "ip {}", args.join(" "));
}

/// An AF_PACKET socket: the kernel's own view of one interface.
pub struct Raw(OwnedFd);

impl Raw {
    /// Opens it on an interface of the calling thread's namespace.
    pub fn open(interface: &str) -> Raw {
        let all = u16::try_from(libc::ETH_P_ALL).unwrap().to_be();
        // SAFETY: no pointers are passed.
        let fd = unsafe {
            libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
                i32::from(all),
            )
        };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: all-zero is a valid sockaddr_ll: it is plain integers.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
        address.sll_protocol = all;
        address.sll_ifindex =
            i32::try_from(nix::net::if_::if_nametoindex(interface).unwrap()).unwrap();
        // SAFETY: the address and its length describe a live sockaddr_ll.
        let result = unsafe {
            libc::bind(
                fd.as_raw_fd(),
                (&raw const address).cast(),
                u32::try_from(size_of_val(&address)).unwrap(),
            )
        };
        assert!(result == 0, "{}", io::Error::last_os_error());
        Raw(fd)
    }

    pub fn send(&self, frame: &[u8]) {
        let until = Instant::now() + Duration::from_secs(5);
        loop {
            match nix::unistd::write(&self.0, frame) {
                Ok(n) => return assert_eq!(n, frame.len()),
                Err(nix::errno::Errno::ENOBUFS | nix::errno::Errno::EAGAIN) => {
                    assert!(Instant::now() < until);
                    std::thread::yield_now();
                }
                Err(e) => panic!("send: {e}"),
            }
        }
    }

    /// The next frame that is waiting.
    pub fn receive(&self) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 9216];
        match nix::unistd::read(&self.0, &mut buffer) {
            Ok(n) => {
                buffer.truncate(n);
                Some(buffer)
            }
            Err(_) => None,
        }
    }

    /// Waits up to a second for a frame that holds `mark`.
    pub fn wait_for(&self, mark: &[u8]) -> Option<Vec<u8>> {
        let until = Instant::now() + Duration::from_secs(1);
        while Instant::now() < until {
            match self.receive() {
                Some(frame) if holds(&frame, mark) => return Some(frame),
                Some(_) => {}
                None => std::thread::sleep(Duration::from_micros(200)),
            }
        }
        None
    }
}

pub fn holds(frame: &[u8], mark: &[u8]) -> bool {
    frame.windows(mark.len()).any(|w| w == mark)
}
