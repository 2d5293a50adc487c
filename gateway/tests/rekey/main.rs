//! Two gateways with their control threads, traffic both ways, and hundreds of rekeys by packets, bytes and time: nothing
//! is lost, nothing is a replay, no number is used twice under a key.
//!
//! Successors come from a hook, a shell script that makes keys and writes both sides' SA files by renaming, or from
//! files alone. Each side's files come 50 ms after the other's, and each control thread is held up for 50 ms again and
//! again.

mod bed;
mod hook;
mod site;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bed::Bed;
use hook::{make, prepare};

const TUNNELS: usize = 48;
const HOST: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn config(hook: Option<PathBuf>) -> control::rekey::Config {
    control::rekey::Config {
        jitter_percent: 20,
        // The other side's files come later, are noticed after a pause, and its control thread is held up.
        switch_delay: Duration::from_millis(4000),
        overlap: Duration::from_millis(6000),
        quiet: Duration::from_millis(500),
        hook,
        hook_timeout: Duration::from_secs(20),
        hook_parallel: 6,
        retry: Duration::from_secs(8),
        ..control::rekey::Config::default()
    }
}

/// Holds control threads up for 50 ms, again and again, until it is dropped.
struct HoldUp(Arc<AtomicBool>, Option<std::thread::JoinHandle<()>>);

impl HoldUp {
    fn start(bed: &Bed) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let sites = bed.sites.each_ref().map(|s| Arc::clone(&s.running));
        let until = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                for site in &sites {
                    let control = site.control();
                    std::thread::sleep(Duration::from_millis(50));
                    drop(control);
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        });
        Self(stop, Some(thread))
    }
}

impl Drop for HoldUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        if let Some(t) = self.1.take() {
            let _ = t.join();
        }
    }
}

/// One at a time: how long the other side's files take is part of what is tried.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn hundreds_of_rekeys_through_the_hook_lose_nothing() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let hook = prepare(dir.path());
    for t in 0..TUNNELS {
        make(&hook, t, "0");
    }
    let mut bed = Bed::start(dir.path(), [config(Some(hook)), config(None)]);
    let held_up = HoldUp::start(&bed);
    let began = Instant::now();
    bed.run(Duration::from_secs(150), |b| {
        b.sites.iter().all(|s| {
            let rekeys = s.rekeys();
            rekeys.iter().sum::<u64>() >= 150 && rekeys.iter().all(|n| *n >= 2)
        })
    });
    let took = began.elapsed();
    drop(held_up);
    let rekeys: Vec<u64> = bed.sites.iter().map(|s| s.rekeys().iter().sum()).collect();
    let attempts = {
        let metrics = bed.sites[0].running.scrape().unwrap();
        let text = String::from_utf8(metrics).unwrap();
        let done = "esplanade_rekey_hook_runs_total{result=\"done\"} ";
        let line = text.lines().find_map(|l| l.strip_prefix(done)).unwrap();
        line.parse::<u64>().unwrap()
    };
    assert!(attempts >= 100, "{attempts} runs of the hook");
    let (sent, seen) = bed.finish();
    assert_eq!(sent, seen as u64, "one ESP packet for each");
    eprintln!(
        "{rekeys:?} rekeys by {attempts} runs of the hook in {took:?}, {sent} packets, none lost"
    );
}

#[test]
fn rekeys_through_files_alone_lose_nothing() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let hook = prepare(dir.path());
    for t in 0..TUNNELS {
        make(&hook, t, "0");
    }
    let quick = || control::rekey::Config {
        switch_delay: Duration::from_millis(3500),
        overlap: Duration::from_millis(5000),
        ..config(None)
    };
    let mut bed = Bed::start(dir.path(), [quick(), quick()]);
    let held_up = HoldUp::start(&bed);
    let mut rounds = 0_u64;
    let mut next = Instant::now();
    bed.run(Duration::from_secs(150), |b| {
        let now = Instant::now();
        // The next generation of all tunnels once this one sends everywhere, as an operator's own key management does.
        let ready = b
            .sites
            .iter()
            .all(|s| s.rekeys().iter().all(|n| *n >= rounds));
        if ready && rounds == 4 {
            return true;
        }
        if ready && now >= next {
            rounds += 1;
            next = now + Duration::from_millis(500);
            let (hook, from) = (
                hook.clone(),
                b.sites.each_ref().map(|s| Arc::clone(&s.running)),
            );
            std::thread::spawn(move || {
                for t in 0..TUNNELS {
                    make(&hook, t, "0.002");
                }
                // Without waiting for the watch, one side 50 ms after the other.
                for site in from {
                    site.reload();
                    std::thread::sleep(Duration::from_millis(50));
                }
            });
        }
        false
    });
    drop(held_up);
    let rekeys: Vec<u64> = bed.sites.iter().map(|s| s.rekeys().iter().sum()).collect();
    let (sent, seen) = bed.finish();
    assert_eq!(sent, seen as u64, "one ESP packet for each");
    eprintln!("{rekeys:?} rekeys by files, {sent} packets, none lost");
}
