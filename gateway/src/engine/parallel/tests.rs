use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pmd::engine::{EspEngine, EspJob, JobKind, JobStatus};
use pmd::{Arena, ArenaConfig, BURST, HugePolicy, Pool};
use proptest::prelude::*;
use sa_store::ledger::WorkerCounters;
use sa_store::runtime::Start;
use sa_store::sa::{Direction, Mode, OffloadMode, SaId, Spi};
use sa_store::snapshot::Snapshot;
use sa_store::store::Store;
use sa_store::suite::Suite;

use super::*;
use crate::crypto::differential::clear_packet;
use crate::crypto::select::{Choice, Compare, Selection};
use crate::engine::SoftwareEngine;
use crate::esp::fuzz::spec;
use crate::wire::Family;

const FRAMES: u32 = 4096;
const BEFORE_ESP: usize = 20;

/// A store with SAs, and frames for their packets.
struct Bed {
    arena: Arc<Arena>,
    pool: Pool,
    store: Store,
    suites: Vec<Suite>,
    sas: Vec<SaId>,
    made: u64,
}

impl Bed {
    fn new(suites: &[&str], direction: Direction) -> Bed {
        let arena = Arena::new(ArenaConfig {
            frames: FRAMES,
            stride: 2048,
            huge: HugePolicy::Never,
            name: "parallel".into(),
            ..ArenaConfig::default()
        })
        .unwrap();
        let mut store = Store::new(1, 64);
        let factory = Selection::new(Choice::Auto, Compare::Features).unwrap();
        let suites: Vec<Suite> = suites.iter().map(|s| s.parse().unwrap()).collect();
        let mut draft = store.draft();
        for (n, suite) in (0..).zip(&suites) {
            let mut spec = spec(*suite, Mode::Tunnel, Family::V4, false);
            spec.name = format!("s{n}");
            spec.tunnel = format!("t{n}");
            spec.spi = Spi::new(0x1000 + n).unwrap();
            spec.direction = direction;
            store.tunnel(&spec.tunnel);
            let start = Start {
                lease_end: 1 << 32,
                ..Start::default()
            };
            store
                .add_sa(&mut draft, Arc::new(spec), &factory, start, 0)
                .unwrap();
        }
        store.publish(draft);
        let snapshot = store.current();
        let sas = (0..64).filter_map(|n| snapshot.sa_at(n).map(|e| e.fixed.id));
        let sas: Vec<SaId> = sas.collect();
        assert_eq!(sas.len(), suites.len());
        Bed {
            pool: Pool::new(&arena, 64),
            arena,
            store,
            suites,
            sas,
            made: 0,
        }
    }

    /// A job to seal, numbered across all SAs by its tag.
    fn job(&mut self, at: usize, body: usize) -> EspJob {
        let suite = self.suites[at];
        let packet = clear_packet(suite, body, u8::try_from(self.made % 251).unwrap());
        let mut frame = self.pool.get().unwrap();
        frame.append(BEFORE_ESP + packet.len()).unwrap().fill(0);
        frame.data_mut()[BEFORE_ESP..].copy_from_slice(&packet);
        self.made += 1;
        EspJob {
            esp_end: u16::try_from(frame.len()).unwrap(),
            frame,
            sa: self.sas[at],
            seq: self.made,
            tag: self.made,
            note: 7,
            esp_off: u16::try_from(BEFORE_ESP).unwrap(),
            next_header: 4,
            kind: JobKind::Seal,
            mode: OffloadMode::Software,
            status: JobStatus::Pending,
        }
    }

    fn burst(&mut self, at: usize, count: usize) -> Vec<EspJob> {
        (0..count).map(|_| self.job(at, 1000)).collect()
    }

    /// What the CPU alone makes of the same jobs: bytes and status by tag.
    fn expected(&mut self, view: &Snapshot, jobs: &[EspJob]) -> Vec<(u64, JobStatus, Vec<u8>)> {
        let mut copies = Vec::new();
        for job in jobs {
            let mut frame = self.pool.get().unwrap();
            let bytes = job.frame.data();
            frame.append(bytes.len()).unwrap().copy_from_slice(bytes);
            copies.push(EspJob { frame, ..*job });
        }
        let mut done = Vec::new();
        SoftwareEngine::default().submit(view, &mut copies, &mut done);
        let outcome = |job: &EspJob| (job.tag, job.status, job.frame.data().to_vec());
        let expected = done.iter().map(outcome).collect();
        self.take_home(&mut done);
        expected
    }

    fn take_home(&mut self, jobs: &mut Vec<EspJob>) {
        for job in jobs.drain(..) {
            self.pool.put(job.frame);
        }
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        // A pool brings its stock home when it is dropped.
        drop(std::mem::replace(&mut self.pool, Pool::new(&self.arena, 1)));
        if !thread::panicking() {
            assert_eq!(self.arena.outstanding(), 0, "frames are missing");
        }
    }
}

fn wakers(workers: usize) -> Arc<[Waker]> {
    (0..workers).map(|_| Waker::new().unwrap()).collect()
}

/// Makes an engine ask for help.
fn heat(bed: &mut Bed, engine: &mut ParallelEngine, view: &Snapshot) {
    let mut done = Vec::new();
    for _ in 0..8 {
        let mut jobs = bed.burst(0, BURST);
        engine.submit(view, &mut jobs, &mut done);
        assert!(jobs.is_empty());
        engine.drain(Duration::from_millis(1), &mut done);
    }
    bed.take_home(&mut done);
}

/// Helpers on threads of their own, each late at random.
fn with_helpers(helpers: Vec<CryptoHelper>, delays: bool, act: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for (n, mut helper) in (1_u64..).zip(helpers) {
            let stop = &stop;
            scope.spawn(move || {
                let mut state = n;
                while !stop.load(Ordering::Relaxed) {
                    let did = helper.assist();
                    state = state
                        .wrapping_mul(0x5851_f42d_4c95_7f2d)
                        .wrapping_add(1442695);
                    if delays && state >> 60 == 0 {
                        thread::sleep(Duration::from_micros(state >> 55 & 0xff));
                    } else if did == 0 {
                        thread::yield_now();
                    }
                }
            });
        }
        // Also when an assertion fails, so that the threads end.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _stop = Stop(&stop);
        act();
    });
}

fn is_rising(tags: impl Iterator<Item = u64>) -> bool {
    let tags: Vec<u64> = tags.collect();
    tags.windows(2).all(|pair| pair[0] < pair[1])
}

#[test]
fn small_loads_stay_on_the_worker_and_complete_at_once() {
    let mut bed = Bed::new(&["aes-128-gcm-16"], Direction::Out);
    let view = bed.store.current();
    let mut crew = crew(&wakers(2), &[]);
    let (mut engine, _) = crew.remove(0);
    let mut done = Vec::new();
    for _ in 0..100 {
        let mut jobs = bed.burst(0, BURST / 4);
        engine.submit(&view, &mut jobs, &mut done);
        assert_eq!((jobs.len(), done.len()), (0, BURST / 4));
        bed.take_home(&mut done);
        engine.poll(&mut done);
    }
    assert_eq!(engine.stats().unwrap().submitted.value(), 0);
}

#[test]
fn alone_it_is_the_software_engine() {
    let mut bed = Bed::new(&["aes-128-gcm-16"], Direction::Out);
    let view = bed.store.current();
    let (mut engine, mut helper) = crew(&wakers(1), &[]).remove(0);
    heat(&mut bed, &mut engine, &view);
    let mut jobs = bed.burst(0, BURST);
    let expected = bed.expected(&view, &jobs);
    let mut done = Vec::new();
    engine.submit(&view, &mut jobs, &mut done);
    assert_eq!(engine.in_flight(), 0);
    let got: Vec<_> = done
        .iter()
        .map(|job| (job.tag, job.status, job.frame.data().to_vec()))
        .collect();
    assert_eq!(got, expected);
    assert!(!helper.is_wanted());
    assert_eq!(helper.assist(), 0);
    bed.take_home(&mut done);
}

#[test]
fn tiny_packets_are_not_worth_the_way() {
    let mut bed = Bed::new(&["aes-128-gcm-16"], Direction::Out);
    let view = bed.store.current();
    let mut crew = crew(&wakers(2), &[]);
    let mut done = Vec::new();
    for _ in 0..20 {
        let mut jobs: Vec<_> = (0..BURST).map(|_| bed.job(0, 64)).collect();
        crew[0].0.submit(&view, &mut jobs, &mut done);
        assert_eq!(done.len(), BURST);
        bed.take_home(&mut done);
    }
    assert!(!crew[1].1.is_wanted());
}

#[test]
fn bytes_and_order_are_those_of_the_cpu_alone_however_late_helpers_are() {
    let suites = [
        "aes-128-gcm-16",
        "aes-256-cbc+hmac-sha2-256-128",
        "chacha20-poly1305",
    ];
    let mut bed = Bed::new(&suites, Direction::Out);
    let view = bed.store.current();
    let mut crew = crew(&wakers(3), &[]);
    let helpers: Vec<_> = crew.drain(1..).map(|(_, helper)| helper).collect();
    let (mut engine, _) = crew.remove(0);
    with_helpers(helpers, true, || {
        let mut done = Vec::new();
        let mut expected = Vec::new();
        let mut seen = Vec::new();
        let mut next = 1_u64;
        for round in 0..400 {
            // A helper whose CPU is taken away holds up more than there are frames.
            while engine.in_flight() > FRAMES as usize / 2 {
                engine.poll(&mut done);
                std::thread::yield_now();
            }
            let mut jobs: Vec<_> = (0..BURST)
                .map(|n| {
                    next = next.wrapping_mul(6364136223846793005).wrapping_add(99);
                    // Mostly one SA; the others now and then.
                    let at = if next >> 61 == 0 {
                        (round + n) % 3
                    } else {
                        round / 50 % 3
                    };
                    bed.job(at, usize::try_from(next >> 53).unwrap() % 1000 + 400)
                })
                .collect();
            expected.extend(bed.expected(&view, &jobs));
            while !jobs.is_empty() {
                engine.submit(&view, &mut jobs, &mut done);
                engine.poll(&mut done);
            }
            seen.extend(
                done.iter()
                    .map(|j| (j.sa, j.tag, j.status, j.frame.data().to_vec())),
            );
            bed.take_home(&mut done);
        }
        assert!(engine.drain(Duration::from_secs(10), &mut done));
        seen.extend(
            done.iter()
                .map(|j| (j.sa, j.tag, j.status, j.frame.data().to_vec())),
        );
        bed.take_home(&mut done);
        for sa in &bed.sas {
            let of_sa = seen.iter().filter(|s| s.0 == *sa);
            assert!(is_rising(of_sa.map(|s| s.1)), "reordered");
        }
        let mut by_tag: Vec<_> = seen.into_iter().map(|(_, tag, s, b)| (tag, s, b)).collect();
        by_tag.sort_by_key(|s| s.0);
        expected.sort_by_key(|s| s.0);
        assert!(by_tag == expected, "other bytes than the CPU makes");
        let stats = engine.stats().unwrap();
        assert!(stats.submitted.value() > 0, "nobody helped");
        assert_eq!(stats.submitted.value(), stats.completed.value());
    });
}

#[test]
fn a_helper_that_does_nothing_costs_order_and_memory_no_more_than_is_bounded() {
    let mut bed = Bed::new(&["aes-128-gcm-16", "aes-256-gcm-16"], Direction::Out);
    let view = bed.store.current();
    let counters = [Arc::<WorkerCounters>::default(), Arc::default()];
    let mut crew = crew(&wakers(2), &counters);
    let (_, mut helper) = crew.remove(1);
    let (mut engine, _) = crew.remove(0);
    let [owner, other] = counters.each_ref().map(|c| &c.parallel);
    heat_with(&mut bed, &mut engine, &view, &mut helper);
    let given = owner.given.value();
    assert!(given > 0 && owner.waiting.value() == 0);
    assert_eq!(
        (owner.returned.value(), other.assisted.value()),
        (given, given)
    );
    engine.unmade = 100;
    let (mut done, mut left) = (Vec::new(), 0);
    for _ in 0..64 {
        let mut jobs = bed.burst(0, BURST);
        let last = jobs.last().map(|j| j.tag);
        engine.submit(&view, &mut jobs, &mut done);
        if !jobs.is_empty() {
            assert_eq!(jobs.last().map(|j| j.tag), last);
            assert!(
                is_rising(jobs.iter().map(|j| j.tag)),
                "what is left is in order"
            );
        }
        left += jobs.len();
        bed.take_home(&mut jobs);
        engine.poll(&mut done);
    }
    assert!(done.is_empty(), "the head of the line is at the helper");
    assert!(left > 0 && engine.in_flight() <= engine.capabilities().in_flight);
    assert_eq!(owner.waiting.value(), engine.in_flight() as u64);
    assert_eq!(owner.refused.value(), left as u64);
    assert!(owner.kept.value() > 0 && owner.held_up.value() > 0);
    // Another SA is not held up.
    let mut jobs: Vec<_> = (0..4).map(|_| bed.job(1, 1000)).collect();
    engine.submit(&view, &mut jobs, &mut done);
    assert_eq!((jobs.len(), done.len()), (0, 4));
    bed.take_home(&mut done);
    // And when it comes back, everything does, in order.
    while helper.assist() != 0 {
        engine.poll(&mut done);
    }
    assert!(engine.drain(Duration::from_secs(1), &mut done));
    assert!(is_rising(done.iter().map(|j| j.tag)));
    assert!(done.iter().all(|j| j.status == JobStatus::Done));
    bed.take_home(&mut done);
}

/// As [`heat`], with a helper on this thread.
fn heat_with(
    bed: &mut Bed,
    engine: &mut ParallelEngine,
    view: &Snapshot,
    helper: &mut CryptoHelper,
) {
    let mut done = Vec::new();
    for _ in 0..24 {
        let mut jobs = bed.burst(0, BURST);
        engine.submit(view, &mut jobs, &mut done);
        assert!(jobs.is_empty());
        while helper.assist() != 0 {}
        engine.poll(&mut done);
        bed.take_home(&mut done);
    }
    while engine.in_flight() != 0 {
        helper.assist();
        engine.poll(&mut done);
    }
    bed.take_home(&mut done);
}

#[test]
fn what_a_helper_leaves_behind_the_owner_ciphers() {
    let mut bed = Bed::new(&["aes-128-gcm-16"], Direction::Out);
    let view = bed.store.current();
    let mut crew = crew(&wakers(2), &[]);
    let (_, mut helper) = crew.remove(1);
    let (mut engine, _) = crew.remove(0);
    heat_with(&mut bed, &mut engine, &view, &mut helper);
    let mut jobs = bed.burst(0, BURST);
    let mut expected = bed.expected(&view, &jobs);
    let mut done = Vec::new();
    engine.submit(&view, &mut jobs, &mut done);
    assert!(helper.is_wanted() && done.is_empty());
    drop(helper);
    // Also what is put down before the owner notices.
    let mut more = bed.burst(0, BURST);
    expected.extend(bed.expected(&view, &more));
    engine.submit(&view, &mut more, &mut done);
    assert!(engine.drain(Duration::from_secs(1), &mut done));
    let got: Vec<_> = done
        .iter()
        .map(|job| (job.tag, job.status, job.frame.data().to_vec()))
        .collect();
    assert!(got == expected);
    bed.take_home(&mut done);
}

#[test]
fn jobs_of_an_sa_that_is_removed_meanwhile_come_back_done_and_its_keys_go_with_the_last() {
    let mut bed = Bed::new(&["aes-128-gcm-16"], Direction::Out);
    let view = bed.store.current();
    let mut crew = crew(&wakers(2), &[]);
    let (_, mut helper) = crew.remove(1);
    let (mut engine, _) = crew.remove(0);
    heat_with(&mut bed, &mut engine, &view, &mut helper);
    let sa = bed.sas[0];
    let mut jobs = bed.burst(0, BURST);
    let expected = bed.expected(&view, &jobs);
    let mut done = Vec::new();
    engine.submit(&view, &mut jobs, &mut done);
    let entry = Arc::downgrade(view.sa(sa).unwrap());
    drop(view);
    let mut draft = bed.store.draft();
    assert!(draft.remove_sa(sa));
    bed.store.publish(draft);
    assert!(bed.store.current().sa(sa).is_none());
    assert_eq!(bed.store.reap(), [sa]);
    assert!(entry.upgrade().is_some(), "jobs of it are in flight");
    while engine.in_flight() != 0 {
        helper.assist();
        engine.poll(&mut done);
    }
    let got: Vec<_> = done
        .iter()
        .map(|job| (job.tag, job.status, job.frame.data().to_vec()))
        .collect();
    assert!(got == expected);
    bed.take_home(&mut done);
    assert!(entry.upgrade().is_none(), "nobody needs its keys");
}

#[test]
fn two_workers_under_pressure_do_not_ask_each_other() {
    let mut bed = Bed::new(&["aes-128-gcm-16"], Direction::Out);
    let view = bed.store.current();
    let mut crew = crew(&wakers(2), &[]);
    let (mut second, mut of_second) = crew.remove(1);
    let (mut first, mut of_first) = crew.remove(0);
    heat_with(&mut bed, &mut first, &view, &mut of_second);
    assert!(first.stats().unwrap().submitted.value() > 0);
    heat_with(&mut bed, &mut second, &view, &mut of_first);
    let given = |e: &ParallelEngine| e.stats().unwrap().submitted.value();
    let before = (given(&first), given(&second));
    let mut done = Vec::new();
    for _ in 0..20 {
        for engine in [&mut first, &mut second] {
            let mut jobs = bed.burst(0, BURST);
            engine.submit(&view, &mut jobs, &mut done);
            assert!(jobs.is_empty());
            engine.poll(&mut done);
        }
        bed.take_home(&mut done);
    }
    assert!(first.drain(Duration::from_secs(1), &mut done));
    assert!(second.drain(Duration::from_secs(1), &mut done));
    bed.take_home(&mut done);
    assert_eq!((given(&first), given(&second)), before);
}

#[test]
fn a_sleeping_helper_is_woken() {
    let mut bed = Bed::new(&["aes-128-gcm-16"], Direction::Out);
    let view = bed.store.current();
    let wakers = wakers(2);
    let mut crew = crew(&wakers, &[]);
    let (_, mut helper) = crew.remove(1);
    let (mut engine, _) = crew.remove(0);
    heat_with(&mut bed, &mut engine, &view, &mut helper);
    wakers[1].announce_sleep();
    assert!(!helper.is_wanted());
    let mut done = Vec::new();
    engine.submit(&view, &mut bed.burst(0, BURST), &mut done);
    let fd = wakers[1].fd();
    let mut fds = [nix::poll::PollFd::new(
        std::os::fd::AsFd::as_fd(&fd),
        nix::poll::PollFlags::POLLIN,
    )];
    assert_eq!(nix::poll::poll(&mut fds, 1000_u16), Ok(1));
    wakers[1].announce_awake();
    while helper.assist() != 0 {}
    assert!(engine.drain(Duration::from_secs(1), &mut done));
    bed.take_home(&mut done);
}

#[test]
fn wrong_icvs_and_bad_bounds_are_told_apart_wherever_they_are_judged() {
    let mut bed = Bed::new(&["aes-128-gcm-16"], Direction::Out);
    let view = bed.store.current();
    let opener = Bed::new(&["aes-128-gcm-16"], Direction::In);
    let opening = opener.store.current();
    let mut crew = crew(&wakers(2), &[]);
    let (_, mut helper) = crew.remove(1);
    let (mut engine, _) = crew.remove(0);
    let mut done = Vec::new();
    for round in 0..20 {
        let mut jobs = bed.burst(0, BURST);
        SoftwareEngine::default().submit(&view, &mut jobs, &mut done);
        jobs.append(&mut done);
        for (n, job) in jobs.iter_mut().enumerate() {
            job.kind = JobKind::Open;
            job.status = JobStatus::Pending;
            job.sa = opener.sas[0];
            if n % 7 == 3 {
                *job.frame.data_mut().last_mut().unwrap() ^= 1;
            }
            if n % 31 == 5 {
                job.esp_end += 1;
            }
        }
        engine.submit(&opening, &mut jobs, &mut done);
        while engine.in_flight() != 0 {
            helper.assist();
            engine.poll(&mut done);
        }
        assert_eq!(done.len(), BURST, "round {round}");
        for (n, job) in done.iter().enumerate() {
            let want = match n {
                _ if n % 31 == 5 => JobStatus::Failed,
                _ if n % 7 == 3 => JobStatus::IcvMismatch,
                _ => JobStatus::Done,
            };
            assert_eq!(job.status, want, "round {round}, job {n}");
        }
        bed.take_home(&mut done);
    }
    assert!(engine.stats().unwrap().submitted.value() > 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Any interleaving of bursts, helper rounds and polls keeps the order of each SA and every frame.
    #[test]
    fn any_interleaving_keeps_order_and_frames(
        steps in prop::collection::vec((0_u8..4, 0_usize..3, 1_usize..=BURST), 1..120),
    ) {
        let mut bed = Bed::new(&["aes-128-gcm-16", "aes-256-gcm-16", "aes-192-gcm-16"], Direction::Out);
        let view = bed.store.current();
        let mut crew = crew(&wakers(3), &[]);
        let mut helpers: Vec<_> = crew.drain(1..).map(|(_, helper)| helper).collect();
        let (mut engine, mut own) = crew.remove(0);
        let mut done = Vec::new();
        let mut seen: Vec<(SaId, u64)> = Vec::new();
        let mut taken = 0;
        for (what, at, count) in steps {
            match what {
                0 | 1 => {
                    // Full bursts often enough that help is asked for.
                    let count = if what == 0 { BURST } else { count };
                    let mut jobs: Vec<_> = (0..count).map(|n| bed.job(if n % 9 == 8 { 2 - at } else { at }, 900)).collect();
                    engine.submit(&view, &mut jobs, &mut done);
                    taken += count - jobs.len();
                    bed.take_home(&mut jobs);
                }
                2 => engine.poll(&mut done),
                _ => {
                    let n = at % helpers.len().max(1);
                    if let Some(helper) = helpers.get_mut(n) {
                        helper.assist();
                    }
                    if count == BURST && !helpers.is_empty() {
                        helpers.remove(n);
                    }
                }
            }
            seen.extend(done.iter().map(|j| (j.sa, j.tag)));
            prop_assert!(done.iter().all(|j| j.status == JobStatus::Done));
            bed.take_home(&mut done);
        }
        let begin = Instant::now();
        while engine.in_flight() != 0 {
            prop_assert!(begin.elapsed() < Duration::from_secs(10), "stuck");
            helpers.iter_mut().for_each(|h| { h.assist(); });
            engine.poll(&mut done);
        }
        seen.extend(done.iter().map(|j| (j.sa, j.tag)));
        bed.take_home(&mut done);
        prop_assert_eq!(seen.len(), taken);
        for sa in &bed.sas {
            prop_assert!(is_rising(seen.iter().filter(|s| s.0 == *sa).map(|s| s.1)));
        }
        prop_assert_eq!(own.assist(), 0);
    }
}
