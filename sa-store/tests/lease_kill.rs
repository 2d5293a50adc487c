//! Kills a sending process thousands of times and looks for a number that left it twice under one key.
//!
//! The parent starts this program again as a child. The child claims its SAs and "sends": every number
//! that its leases cover goes out through a pipe, the write being the moment of use. The parent kills it
//! with SIGKILL after a random time, drains the pipe, and checks that each key's numbers only ever rise.
//! Between runs it sometimes garbles the older copies of all pages, which is what a commit that was torn
//! half-way leaves; sometimes the child stops cleanly, and then nothing may be skipped.
//!
//! `LEASE_KILLS=20000 cargo test -p sa-store --test lease_kill` runs longer.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sa_store::file::{SaIdentity, Settings, Tunnel};
use sa_store::lease::policy::{Blocks, Renewal, end_of_numbers};
use sa_store::lease::{Lease, LeaseStore, LeaseWriter, Release};
use sa_store::sa::{Direction, SaKeys, SaSpec, Spi};

const SAS: usize = 6;
const RECORD: usize = 9;
const CHILD: &str = "ESPLANADE_LEASE_CHILD";
const CLEAN: &str = "ESPLANADE_LEASE_CLEAN";

fn main() {
    match std::env::var_os(CHILD) {
        Some(dir) => child(Path::new(&dir)),
        None => parent(),
    }
}

/// SAs 0 to 3 send, 4 and 5 receive. All say `first_use`, as a careless operator would leave it.
fn specs() -> Vec<SaSpec> {
    let t = Tunnel::new("t", [192, 0, 2, 1].into(), [192, 0, 2, 2].into());
    let one = |n: u8| SaIdentity {
        name: format!("sa-{n}"),
        direction: if n < 4 { Direction::Out } else { Direction::In },
        spi: Spi::new(0x100 + u32::from(n)).expect("above 255"),
        suite: "aes-128-gcm-16".parse().expect("a suite"),
        keys: SaKeys {
            enc: vec![n + 1; 20].into(),
            auth: Vec::new().into(),
        },
        first_use: true,
    };
    let settings = Settings {
        esn: true,
        ..Settings::default()
    };
    (0..6).map(|n| t.sa(one(n), &settings)).collect()
}

struct Sender {
    lease: Arc<Lease>,
    renewal: Renewal,
    out: bool,
    /// Outbound: next to send. Inbound: next to accept.
    next: u64,
}

fn child(dir: &Path) {
    let clean_after: Option<u32> = std::env::var(CLEAN).ok().and_then(|v| v.parse().ok());
    let store = LeaseStore::open(dir).expect("the store opens");
    let writer = LeaseWriter::start(store, Box::new(|e| panic!("{e}"))).expect("a thread");
    let blocks = Blocks {
        min: 16,
        first: 32,
        resumed: 32,
        max: 256,
        target: Duration::from_micros(200),
    };
    let claims = writer.claim(specs());
    let mut senders: Vec<Sender> = claims
        .into_iter()
        .zip(specs())
        .map(|(lease, sa)| {
            let lease = lease.expect("a record");
            let out = sa.direction == Direction::Out;
            Sender {
                next: lease.resume() + u64::from(!out),
                renewal: Renewal::new(blocks, end_of_numbers(sa.direction, true), true),
                lease,
                out,
            }
        })
        .collect();
    let start = Instant::now();
    let mut pipe = std::io::stdout();
    let mut rounds = 0;
    while clean_after.is_none_or(|n| rounds < n) {
        let mut burst = Vec::with_capacity(SAS * 8 * RECORD);
        for (i, s) in (0u8..).zip(&mut senders) {
            let limit = s.lease.limit();
            for _ in 0..8 {
                let covered = if s.out {
                    s.next < limit
                } else {
                    s.next <= limit
                };
                if !covered {
                    break;
                }
                burst.push(i);
                burst.extend(s.next.to_le_bytes());
                s.next += 1;
            }
            let used = if s.out { s.next } else { s.next - 1 };
            if let Some(more) = s.renewal.poll(used, limit, start.elapsed()) {
                writer.advance(&s.lease, more).expect("the thread runs");
            }
        }
        if burst.is_empty() {
            std::thread::yield_now();
            continue;
        }
        if pipe.write_all(&burst).and_then(|()| pipe.flush()).is_err() {
            return;
        }
        rounds += 1;
    }
    let ends = senders.iter().map(|s| {
        let exact = if s.out { s.next } else { s.next - 1 };
        (s.lease.clone(), Release::At(exact))
    });
    writer.release_many(ends.collect()).expect("a clean stop");
}

fn parent() {
    let kills: u32 = std::env::var("LEASE_KILLS").map_or(2000, |v| v.parse().expect("a number"));
    let dir = tempfile::tempdir().expect("a directory");
    let mut rng = Rng(0x9e37_79b9_7f4a_7c15);
    let mut highest = [0u64; SAS];
    let mut exact = false;
    let (mut numbers, mut productive, mut garbled) = (0u64, 0u32, 0u64);
    for run in 0..kills {
        let clean = rng.below(20) == 0;
        let mut child = start(dir.path(), clean);
        let stdout = child.stdout.take().expect("a pipe");
        let (began, has_begun) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || drain(stdout, &began));
        if !clean {
            // Most are killed while they send, however slow the machine; the others at any time, also at birth.
            if rng.below(4) != 0 {
                let _ = has_begun.recv_timeout(Duration::from_secs(5));
            }
            std::thread::sleep(Duration::from_micros(rng.below(6000)));
            child.kill().expect("a kill");
        }
        let status = child.wait().expect("a status");
        assert!(status.success() == clean, "run {run}: {status}");
        let sent = reader.join().expect("a reader");
        numbers += u64::try_from(sent.len()).expect("small");
        productive += u32::from(!sent.is_empty());
        let mut first_seen = [false; SAS];
        for (i, n) in sent {
            assert!(
                n > highest[i],
                "run {run}: SA {i} used {n} again, it had reached {}",
                highest[i]
            );
            if exact && !first_seen[i] {
                assert_eq!(
                    n,
                    highest[i] + 1,
                    "run {run}: SA {i} skipped after a clean stop"
                );
            }
            first_seen[i] = true;
            highest[i] = n;
        }
        // A run that was killed before its first commit leaves the exact numbers of the one before.
        exact = clean;
        if rng.below(4) == 0 {
            garbled += garble_older_copies(&dir.path().join("leases"), &mut rng);
        }
    }
    println!(
        "{kills} runs, {productive} of them sent, {numbers} numbers, {garbled} torn pages: no number twice"
    );
    assert!(
        productive > kills / 4,
        "most children were killed before they sent"
    );
    assert!(
        garbled > u64::from(kills) / 16,
        "torn writes were not simulated"
    );
}

fn start(dir: &Path, clean: bool) -> Child {
    let me: PathBuf = std::env::current_exe().expect("our own path");
    let mut c = Command::new(me);
    c.env(CHILD, dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    if clean {
        c.env(CLEAN, "40");
    }
    c.spawn().expect("a child")
}

/// Whole records only: a record cut by the kill was never whole on the wire.
fn drain(mut pipe: impl Read, began: &std::sync::mpsc::Sender<()>) -> Vec<(usize, u64)> {
    let mut all = vec![0; 1];
    match pipe.read(&mut all).expect("a readable pipe") {
        0 => all.clear(),
        _ => {
            // The parent no longer listens when it chose not to wait.
            let _ = began.send(());
            pipe.read_to_end(&mut all).expect("a readable pipe");
        }
    }
    let record = |r: &[u8]| {
        let n = <[u8; 8]>::try_from(&r[1..]).expect("eight bytes");
        (usize::from(r[0]), u64::from_le_bytes(n))
    };
    all.chunks_exact(RECORD).map(record).collect()
}

/// Overwrites a random part of the copy that the next commit would write, in every page that was written
/// twice. Offsets are those of the store's documented layout.
fn garble_older_copies(file: &Path, rng: &mut Rng) -> u64 {
    const BLOCK: usize = 4096;
    const PAGES: usize = 32;
    const FIRST: usize = 3;
    // The first children may have been killed before they made it.
    let Ok(mut bytes) = std::fs::read(file) else {
        return 0;
    };
    let mut done = 0;
    let extents = (bytes.len() / BLOCK - FIRST) / (2 * PAGES);
    for page in 0..extents * PAGES {
        let at = |copy: usize| (FIRST + (page / PAGES * 2 + copy) * PAGES + page % PAGES) * BLOCK;
        let generation = |copy: usize| {
            let o = at(copy) + 16;
            u64::from_le_bytes(bytes[o..o + 8].try_into().expect("eight bytes"))
        };
        let (a, b) = (generation(0), generation(1));
        if a == 0 || b == 0 || a.abs_diff(b) != 1 {
            continue;
        }
        let older = at(usize::from(a > b));
        let from = usize::try_from(rng.below(4000)).expect("small");
        let len = usize::try_from(1 + rng.below(96)).expect("small");
        for x in &mut bytes[older + from..older + from + len] {
            *x ^= 0xa5;
        }
        done += 1;
    }
    std::fs::write(file, bytes).expect("the store");
    done
}

/// xorshift64*: the runs' timing is random anyway.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % n
    }
}
