//! Engines that misbehave, under a whole gateway: ports, worker loop, snapshot. Every knob of both models, in every mode, under
//! light load and under more than the engine takes.
//!
//! One gateway has the engine and sends and receives through it; the other has the CPU alone. Whatever the engine does, no
//! wrong packet leaves or is delivered, none comes twice or out of order, the ledger balances, frames come home, and once the
//! engine behaves again traffic goes on.

mod common;

use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::models::{self, Modelled};
use common::{Bed, Plan, bed, udp};
use esplanade_model::Knobs;
use gateway::app::OpenEngines;
use gateway::crypto::ProviderId;
use gateway::crypto::select::{Choice, Compare, Selection};
use gateway::engine::Park;
use gateway::engine::trust::{EngineState, EngineWatch};
use pmd::PortQueue;
use sa_store::drops::DropReason;
use sa_store::runtime::{Start, event};
use sa_store::sa::*;
use sa_store::suite::{AesBits, Cipher, Hmac, Suite};

const CBC: Suite = Suite::CipherHmac(Cipher::Cbc(AesBits::B128), Hmac::Sha256_128);
/// A result that is not there by then is lost.
const DEADLINE: Duration = Duration::from_millis(500);
/// From the end of the mischief to the engine's return to service: the rest of a deadline of driver and watch, a reset with
/// known answers, and a pause of one second for a first attempt that met the mischief still; busy machines take their time.
const RECOVERY: Duration = Duration::from_secs(6);
/// Packets each way under light load: one every millisecond.
const LIGHT: u32 = 100;
/// Packets each way at once: with both directions' more than wait for an engine.
const HEAVY: u32 = 900;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Load {
    Light,
    Saturating,
}

/// What a knob leads to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ends {
    /// The engine is taken out of service.
    Out,
    /// It may be, when packets get lost by it.
    Either,
    /// It is not: nothing is wrong with what it does.
    In,
}

/// A knob and how far it is turned, in parts per million under light and saturating load; of `hang`, jobs.
type Knob = (&'static str, fn(&Knobs, u32), [u32; 2], Ends);

fn set(of: fn(&Knobs) -> &AtomicU32, knobs: &Knobs, rate: u32) {
    of(knobs).store(rate, Relaxed);
}

const LOSE: fn(&Knobs, u32) = |k, n| set(|k| &k.lose, k, n);
const DUPLICATE: fn(&Knobs, u32) = |k, n| set(|k| &k.duplicate, k, n);
const DELAY: fn(&Knobs, u32) = |k, n| set(|k| &k.delay, k, n);
const CORRUPT: fn(&Knobs, u32) = |k, n| set(|k| &k.corrupt, k, n);
const REORDER: fn(&Knobs, u32) = |k, n| set(|k| &k.reorder, k, n);
const SPURIOUS: fn(&Knobs, u32) = |k, n| set(|k| &k.spurious, k, n);
const GARBLE: fn(&Knobs, u32) = |k, n| set(|k| &k.garble, k, n);
const TEAR: fn(&Knobs, u32) = |k, n| set(|k| &k.tear, k, n);
const HANG: fn(&Knobs, u32) = |k, n| k.hang.store(n.into(), Relaxed);

const OFTEN: [u32; 2] = [200_000, 50_000];

const OF_EIP93: [Knob; 9] = [
    ("lose", LOSE, OFTEN, Ends::Out),
    ("duplicate", DUPLICATE, OFTEN, Ends::Out),
    ("delay", DELAY, OFTEN, Ends::In),
    ("corrupt", CORRUPT, OFTEN, Ends::Out),
    ("reorder", REORDER, OFTEN, Ends::Out),
    ("spurious", SPURIOUS, OFTEN, Ends::Out),
    ("garble", GARBLE, OFTEN, Ends::Out),
    ("tear", TEAR, OFTEN, Ends::In),
    ("hang", HANG, [1, 1], Ends::Out),
];

/// Its descriptors are the QDMA's: they are neither garbled nor torn.
const OF_SOE: [Knob; 7] = [
    ("lose", LOSE, OFTEN, Ends::Out),
    // Results that come twice are told apart.
    ("duplicate", DUPLICATE, OFTEN, Ends::In),
    ("delay", DELAY, OFTEN, Ends::Either),
    ("corrupt", CORRUPT, OFTEN, Ends::Out),
    // Of two that change places the first is taken for lost.
    ("reorder", REORDER, OFTEN, Ends::Either),
    ("spurious", SPURIOUS, OFTEN, Ends::Out),
    ("hang", HANG, [1, 1], Ends::Out),
];

/// A gateway whose engine is a model, and its peer.
struct Rig {
    bed: Bed,
    model: Arc<Modelled>,
    watch: EngineWatch,
    next: u32,
    /// What the hosts got since the last look: left, right.
    got: [Vec<Vec<u8>>; 2],
    /// Numbers of the packets that came, and the last, of each host.
    seen: [(HashSet<u32>, u32); 2],
    /// Packets that are not what was sent.
    wrong: [usize; 2],
}

fn rig(mut model: Modelled, mode: OffloadMode, verify: f64, canary: Duration) -> Rig {
    model.config.verify = verify;
    model.config.canary = canary;
    model.config.deadline = DEADLINE;
    let name = model.config.name.clone();
    let model = Arc::new(model);
    let kept = Arc::new(Mutex::new(Vec::<OpenEngines>::new()));
    let (m, k) = (Arc::clone(&model), Arc::clone(&kept));
    let mut bed = bed(&Plan {
        suite: CBC,
        frames: 8192,
        sa: Box::new(move |s| {
            s.esn = false;
            s.replay_window = 64;
            s.df = Df::Copy;
            s.offload = mode;
            s.engine = Some(name.clone());
        }),
        engines: Box::new(move |arena, left| match left {
            true => models::open(std::slice::from_ref(&*m), arena, &k),
            false => Vec::new(),
        }),
        ..Plan::default()
    });
    let watch = kept.lock().unwrap()[0].watches[0].clone();
    bed.kept = Some(Box::new(kept));
    Rig {
        bed,
        model,
        watch,
        next: 1,
        got: Default::default(),
        seen: Default::default(),
        wrong: [0; 2],
    }
}

/// What packet `n` carries: as long and as full as its number says.
fn content(n: u32) -> Vec<u8> {
    let fill = n.to_le_bytes().into_iter().cycle();
    let len = usize::try_from(n % 40 * 31).unwrap();
    n.to_be_bytes().into_iter().chain(fill.take(len)).collect()
}

impl Rig {
    /// Packets each way.
    fn send(&mut self, n: u32) {
        for (host, src, dst) in [
            (&mut self.bed.left.host, "10.1.0.1", "10.2.0.1"),
            (&mut self.bed.right.host, "10.2.0.1", "10.1.0.1"),
        ] {
            let mut frames = Vec::new();
            for n in self.next..self.next + n {
                let mut frame = self.bed.pool.get().unwrap();
                assert!(frame.set_data(&udp(src, dst, 64, &content(n))));
                frames.push(frame);
            }
            let sent = host.tx_burst(&mut self.bed.pool, &mut frames);
            assert!(frames.is_empty(), "{sent}");
        }
        self.next += n;
    }

    /// Some rounds, whatever is under way.
    fn turn(&mut self) {
        self.bed.settle_holding();
        for (side, host) in [&mut self.bed.left.host, &mut self.bed.right.host]
            .into_iter()
            .enumerate()
        {
            let mut frames = Vec::new();
            host.rx_burst(&mut self.bed.pool, &mut frames, 1024);
            for f in frames {
                self.got[side].push(f.data().to_vec());
                self.bed.pool.put(f);
            }
        }
    }

    /// Until nothing is under way: the ledger balances, and nothing is inside.
    fn settle(&mut self) {
        let (left, right) = self.bed.settle();
        self.got[0].extend(left);
        self.got[1].extend(right);
    }

    /// Looks at what came: each packet as it was sent, once, in order. How many came to left and right.
    fn look(&mut self) -> [usize; 2] {
        let mut counts = [0; 2];
        for (side, count) in counts.iter_mut().enumerate() {
            for frame in std::mem::take(&mut self.got[side]) {
                match number_of(&frame).filter(|n| *n < self.next) {
                    Some(n) => {
                        let (seen, last) = &mut self.seen[side];
                        assert!(seen.insert(n), "packet {n} came twice");
                        assert!(n > *last, "packet {n} came behind {last}");
                        *last = n;
                        *count += 1;
                    }
                    None => self.wrong[side] += 1,
                }
            }
        }
        counts
    }

    fn out_of_service(&self) -> u64 {
        self.watch.trust.quarantines.value()
    }

    /// Sends under this load until the engine is out of service, for so long at most.
    fn load(&mut self, load: Load, most: Duration) {
        let begin = Instant::now();
        while self.out_of_service() == 0 && begin.elapsed() < most {
            match load {
                Load::Light => {
                    for _ in 0..LIGHT {
                        self.send(1);
                        self.turn();
                        if self.out_of_service() != 0 {
                            break;
                        }
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
                Load::Saturating => {
                    self.send(HEAVY);
                    self.turn();
                }
            }
            if self.out_of_service() == 0 {
                self.settle();
            }
            self.look();
        }
    }

    /// Until the engine serves.
    fn recover(&mut self, limit: Duration) -> Duration {
        let begin = Instant::now();
        while self.watch.trust.state() != EngineState::Serving {
            assert!(
                begin.elapsed() < limit,
                "{:?} {:?} after {limit:?}",
                self.watch.trust.state(),
                self.watch.trust.reason()
            );
            self.turn();
            std::thread::sleep(Duration::from_millis(1));
        }
        begin.elapsed()
    }

    /// The sender of the left gateway.
    fn sender(&self) -> Arc<sa_store::runtime::SaEntry> {
        let store = &self.bed.left.gw.store;
        let tunnel = store.find_tunnel("t").unwrap();
        Arc::clone(store.current().outbound(tunnel).unwrap())
    }

    /// A successor of the left gateway's sender, on the same engine.
    fn rekey(&mut self) {
        let old = self.sender();
        let ciphers =
            Selection::new(Choice::Provider(ProviderId::RustCrypto), Compare::Features).unwrap();
        let mut spec = SaSpec::clone(&old.spec);
        spec.name = "successor".into();
        spec.spi = Spi::new(0x1003).unwrap();
        spec.keys.enc = vec![9; CBC.enc_key_len()].into();
        let start = Start {
            next_seq: 1,
            lease_end: u64::from(u32::MAX),
            window_top: 0,
        };
        let mut add = |left: bool, direction, place| {
            let site = if left {
                &mut self.bed.left
            } else {
                &mut self.bed.right
            };
            let spec = SaSpec {
                direction,
                ..spec.clone()
            };
            let store = &mut site.gw.store;
            let mut draft = store.draft();
            let id = store
                .add_sa_on(&mut draft, Arc::new(spec), &ciphers, start, place, 0)
                .unwrap();
            (Arc::clone(draft.snapshot().sa(id).unwrap()), draft)
        };
        let (_, draft) = add(false, Direction::In, sa_store::runtime::Place::CPU);
        let (entry, mine) = add(true, Direction::Out, old.fixed.place);
        self.bed.right.gw.store.publish(draft);
        let kept = self.bed.kept.as_ref().unwrap();
        let kept: &Arc<Mutex<Vec<OpenEngines>>> = kept.downcast_ref().unwrap();
        let desks = kept.lock().unwrap()[0].desks.clone();
        let park = Park::new(
            desks,
            Arc::clone(&self.bed.left.gw.wakers),
            gateway::engine::choice::Choice::default(),
        );
        // The worker, which is this thread, answers.
        let asked = std::thread::spawn(move || park.install(&entry));
        while !asked.is_finished() {
            self.turn();
        }
        asked.join().unwrap().unwrap();
        self.bed.left.gw.store.publish(mine);
    }
}

/// The number of a packet that is whole.
fn number_of(frame: &[u8]) -> Option<u32> {
    let packet = etherparse::SlicedPacket::from_ethernet(frame).ok()?;
    let Some(etherparse::TransportSlice::Udp(udp)) = packet.transport else {
        return None;
    };
    let n = u32::from_be_bytes(*udp.payload().first_chunk()?);
    (udp.payload() == content(n)).then_some(n)
}

/// Packets that came through an engine that is not there, full, or lost them.
const FAIR: [DropReason; 5] = [
    DropReason::EngineError,
    DropReason::EngineBusy,
    DropReason::SaDisabled,
    DropReason::NoOutboundSa,
    // Of an SA that is stopped because its numbers were the engine's.
    DropReason::SequenceExhausted,
];

fn cell(make: fn() -> Modelled, mode: OffloadMode, load: Load, (name, knob, rates, ends): Knob) {
    let what = format!("{name} {mode:?} {load:?}");
    let mut r = rig(make(), mode, 1.0, Duration::from_millis(100));
    let bare = r.sender().fixed.place.outer_headers;
    r.send(8);
    r.settle();
    assert_eq!(r.look(), [8, 8], "{what}: before");
    let rate = rates[usize::from(load == Load::Saturating)];
    knob(&r.model.knobs, rate);
    // Loss is judged over a second.
    let most = if ends == Ends::In { 600 } else { 2500 };
    r.load(load, Duration::from_millis(most));
    knob(&r.model.knobs, 0);
    let took = r.recover(RECOVERY);
    r.settle();
    r.look();
    let stopped = r.out_of_service() != 0;
    let reason = r.watch.trust.reason();
    match ends {
        Ends::Out => assert!(stopped, "{what}"),
        Ends::In => assert!(!stopped, "{what}: {reason:?}"),
        Ends::Either => {}
    }
    println!("{what}: {reason:?}, back after {took:?}");
    assert_eq!(r.wrong, [0, 0], "{what}: wrong packets delivered");
    assert_eq!(r.bed.dropped(false), [], "{what}: wrong packets left");
    for (why, n) in r.bed.dropped(true) {
        assert!(FAIR.contains(&why), "{what}: {n} {why:?}");
    }
    // Whoever lost count of an SA's numbers sends nothing more under its key, and says so.
    let lost = bare && stopped;
    r.turn();
    let events = r.sender().events();
    assert_eq!(events & event::ENGINE_LOST != 0, lost, "{what}");
    if lost {
        r.send(4);
        r.settle();
        assert_eq!(r.look(), [4, 0], "{what}: until the rekey");
        r.rekey();
    }
    r.send(24);
    r.settle();
    assert_eq!(r.look(), [24, 24], "{what}: afterwards");
    assert_eq!(r.sender().fixed.place.mode, mode);
    assert!(r.watch.trust.state() == EngineState::Serving, "{what}");
}

fn all(make: fn() -> Modelled, mode: OffloadMode, knobs: &[Knob]) {
    for knob in knobs {
        for load in [Load::Light, Load::Saturating] {
            cell(make, mode, load, *knob);
        }
    }
}

#[test]
fn an_eip93_in_crypto_mode_that_misbehaves_harms_nobody() {
    all(models::eip93, OffloadMode::Crypto, &OF_EIP93);
}

#[test]
fn an_eip93_in_packet_mode_that_misbehaves_harms_nobody() {
    all(models::eip93, OffloadMode::Packet, &OF_EIP93);
}

#[test]
fn an_soe_that_misbehaves_harms_nobody() {
    all(models::soe, OffloadMode::Packet, &OF_SOE);
}

/// With one packet in 16 verified, and no canaries, all wrong packets leave until the first that is drawn: at the latest the
/// 32nd of its direction.
#[test]
fn wrong_packets_are_noticed_within_the_number_that_sampling_promises() {
    const ONE_IN: u32 = 16;
    for (make, mode) in [
        (models::eip93 as fn() -> Modelled, OffloadMode::Crypto),
        (models::eip93, OffloadMode::Packet),
        (models::soe, OffloadMode::Packet),
    ] {
        let mut r = rig(make(), mode, 1.0 / f64::from(ONE_IN), Duration::ZERO);
        CORRUPT(&r.model.knobs, 1_000_000);
        let mut sent = 0;
        while r.out_of_service() == 0 {
            assert!(sent < 2 * ONE_IN, "{mode:?}: {sent} wrong packets");
            r.send(1);
            sent += 1;
            r.settle();
        }
        r.look();
        let left: u64 = r.bed.dropped(false).iter().map(|(_, n)| n).sum();
        println!(
            "{} {mode:?}: after {sent} packets each way; {left} wrong ones left, {} were delivered",
            r.model.config.name, r.wrong[0]
        );
        assert!(left < u64::from(2 * ONE_IN) && r.wrong[0] < 2 * ONE_IN as usize);
        CORRUPT(&r.model.knobs, 0);
        r.recover(RECOVERY);
    }
}
