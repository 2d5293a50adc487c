//! Two gateways back to back, one of them with an engine: its packets are what the other's CPU makes and takes, every frame is
//! accounted for, and an engine that is full stops nothing.

mod common;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::models::{self, Modelled};
use common::{Bed, Plan, bed, payload_of, udp, with_byte};
use gateway::engine::{Desk, SoftwareEngine, WAITING};
use pmd::engine::{Capabilities, EspEngine, EspJob, Refusal};
use sa_store::drops::DropReason;
use sa_store::runtime::SaEntry;
use sa_store::sa::*;
use sa_store::snapshot::Snapshot;
use sa_store::suite::{AesBits, Cipher, Hmac, Suite};

const CBC: Suite = Suite::CipherHmac(Cipher::Cbc(AesBits::B128), Hmac::Sha256_128);

/// Which site has the engine.
#[derive(Clone, Copy, Debug, PartialEq)]
enum At {
    Left,
    Right,
}

/// A bed whose engines live as long as it does.
struct Rig {
    bed: Bed,
    desk: Arc<Desk>,
    _models: Arc<Vec<Modelled>>,
}

fn rig(
    at: At,
    model: Modelled,
    suite: Suite,
    offload: OffloadMode,
    change: impl Fn(&mut SaSpec) + 'static,
    workers: usize,
) -> Rig {
    let name = model.config.name.clone();
    let models = Arc::new(vec![model]);
    let kept = Arc::new(Mutex::new(Vec::new()));
    let (m, k) = (Arc::clone(&models), Arc::clone(&kept));
    let mut bed = bed(&Plan {
        suite,
        workers,
        sa: Box::new(move |s| {
            s.esn = false;
            s.replay_window = if offload == OffloadMode::Packet {
                32
            } else {
                256
            };
            s.offload = offload;
            s.engine = Some(name.clone());
            change(s);
        }),
        engines: Box::new(move |arena, left| {
            if left == (at == At::Left) {
                models::open(&m, arena, &k)
            } else {
                Vec::new()
            }
        }),
        ..Plan::default()
    });
    let desk = Arc::clone(&kept.lock().unwrap()[0].desks[0]);
    bed.kept = Some(Box::new(kept));
    Rig {
        bed,
        desk,
        _models: models,
    }
}

/// Sends packets of both families and many lengths, and wants them at the other end in order.
fn cross(rig: &mut Rig, families: &[(&str, &str)]) {
    for round in 0..4_u8 {
        let sent: Vec<Vec<u8>> = (0..48_usize)
            .map(|i| {
                let (src, dst) = families[i % families.len()];
                udp(src, dst, 64, &vec![round.wrapping_add(1); 28 * i])
            })
            .collect();
        rig.bed.send_left(&sent);
        let (l, r) = rig.bed.settle();
        assert!(l.is_empty());
        let (out, inb) = (rig.bed.dropped(true), rig.bed.dropped(false));
        assert_eq!(r.len(), sent.len(), "{out:?} {inb:?}");
        for (a, b) in sent.iter().zip(&r) {
            assert_eq!(payload_of(a), payload_of(b));
        }
    }
    // Only one of the SAs carries packets, and the engine has it.
    let begin = Instant::now();
    let given = || rig.desk.stats().unwrap().submitted.value();
    // Some engines bring their counters up to date now and then.
    while given() < 4 * 48 {
        assert!(begin.elapsed() < Duration::from_secs(5), "{}", given());
        rig.bed.settle();
    }
}

const BOTH: [(&str, &str); 2] = [("10.1.0.1", "10.2.0.1"), ("fd01::1", "fd02::1")];

fn natt(s: &mut SaSpec) {
    s.encap = Some(UdpEncap {
        sport: 4500,
        dport: 4500,
    });
}

#[test]
fn an_eip93_in_crypto_mode_seals_and_opens_what_the_cpu_does() {
    for suite in [
        CBC,
        Suite::CipherHmac(Cipher::Cbc(AesBits::B256), Hmac::Sha1_96),
        Suite::CipherHmac(Cipher::Ctr(AesBits::B128), Hmac::Sha256_128),
    ] {
        for at in [At::Left, At::Right] {
            let mut r = rig(at, models::eip93(), suite, OffloadMode::Crypto, |_| {}, 1);
            cross(&mut r, &BOTH);
        }
    }
}

#[test]
fn an_eip93_in_packet_mode_frames_and_trims_what_the_cpu_does() {
    for at in [At::Left, At::Right] {
        let mut r = rig(at, models::eip93(), CBC, OffloadMode::Packet, |_| {}, 1);
        cross(&mut r, &BOTH);
        let mut r = rig(at, models::eip93(), CBC, OffloadMode::Packet, natt, 1);
        cross(&mut r, &BOTH);
    }
}

#[test]
fn an_soe_makes_and_takes_whole_packets() {
    let as_it_can = |s: &mut SaSpec| {
        s.replay_window = 64;
        s.df = Df::Copy;
    };
    for at in [At::Left, At::Right] {
        let mut r = rig(at, models::soe(), CBC, OffloadMode::Packet, as_it_can, 1);
        cross(&mut r, &BOTH);
        let with_udp = move |s: &mut SaSpec| {
            as_it_can(s);
            natt(s);
        };
        let mut r = rig(at, models::soe(), CBC, OffloadMode::Packet, with_udp, 1);
        cross(&mut r, &BOTH);
    }
}

#[test]
fn another_workers_sa_reaches_the_engine_by_rings() {
    for at in [At::Left, At::Right] {
        let mut model = models::eip93();
        // The only tunnel belongs to worker 0.
        model.config.worker = 1;
        let mut r = rig(at, model, CBC, OffloadMode::Crypto, |_| {}, 2);
        cross(&mut r, &BOTH);
    }
}

#[test]
fn a_hard_limit_is_exact_on_every_engine() {
    for (model, offload) in [
        (models::eip93(), OffloadMode::Crypto),
        (models::eip93(), OffloadMode::Packet),
        (models::soe(), OffloadMode::Packet),
    ] {
        let name = model.config.name.clone();
        let limited = |s: &mut SaSpec| {
            if s.name == "l2r" {
                s.hard.packets = Some(100);
            }
            if s.engine.as_deref() == Some("soe0") {
                s.replay_window = 64;
            }
        };
        let mut r = rig(At::Left, model, CBC, offload, limited, 1);
        let burst: Vec<_> = (0..50)
            .map(|i| udp("10.1.0.1", "10.2.0.1", 64, &[i; 100]))
            .collect();
        let mut got = 0;
        for _ in 0..3 {
            r.bed.send_left(&burst);
            got += r.bed.settle().1.len();
        }
        assert_eq!(got, 100, "{name} {offload:?}");
        assert_eq!(r.bed.dropped(true), [(DropReason::HardPackets, 50)]);
    }
}

#[test]
fn fragments_are_refused_in_packet_mode() {
    let mut r = rig(
        At::Left,
        models::eip93(),
        CBC,
        OffloadMode::Packet,
        |_| {},
        1,
    );
    let whole = udp("10.1.0.1", "10.2.0.1", 64, &[1; 64]);
    let more_fragments = whole[20] | 0x20;
    r.bed.send_left(&[with_byte(whole, 20, more_fragments)]);
    assert!(r.bed.settle().1.is_empty());
    assert_eq!(r.bed.dropped(true), [(DropReason::EngineRefused, 1)]);
}

/// An engine that takes nothing until it is opened.
struct Gate {
    can: Capabilities,
    open: Arc<AtomicBool>,
}

impl EspEngine for Gate {
    fn capabilities(&self) -> &Capabilities {
        &self.can
    }
    fn install(&mut self, _: &SaEntry) -> Result<(), Refusal> {
        Ok(())
    }
    fn remove(&mut self, _: SaId) {}
    fn submit(&mut self, view: &Snapshot, jobs: &mut Vec<EspJob>, done: &mut Vec<EspJob>) {
        if self.open.load(Relaxed) {
            SoftwareEngine::default().submit(view, jobs, done);
        }
    }
    fn poll(&mut self, _: &mut Vec<EspJob>) {}
    fn in_flight(&self) -> usize {
        0
    }
}

#[test]
fn a_full_engine_costs_packets_and_no_numbers() {
    let open = Arc::new(AtomicBool::new(false));
    let gate = Arc::clone(&open);
    let mut bed = bed(&Plan {
        suite: CBC,
        sa: Box::new(|s| {
            s.esn = false;
            s.offload = OffloadMode::Crypto;
            s.engine = Some("gate".into());
        }),
        engines: Box::new(move |_, left| {
            let can = Capabilities {
                name: "gate",
                crypto: vec![CBC],
                slots: 16,
                ..Capabilities::default()
            };
            let open = Arc::clone(&gate);
            let engine = Box::new(Gate { can, open });
            left.then(|| Desk::new("gate", 0, engine))
                .into_iter()
                .collect()
        }),
        ..Plan::default()
    });
    let more = 100;
    for n in 0..WAITING + more {
        bed.send_left(&[udp("10.1.0.1", "10.2.0.1", 64, &n.to_be_bytes())]);
        bed.settle_left();
    }
    assert_eq!(
        bed.dropped(true),
        [(DropReason::EngineBusy, more as u64)],
        "what finds no room is dropped"
    );
    let view = bed.left.gw.store.current();
    let tunnel = bed.left.gw.store.find_tunnel("t").unwrap();
    let sender = view.outbound(tunnel).unwrap();
    assert_eq!(sender.next_seq(), WAITING as u64 + 1);
    open.store(true, Relaxed);
    let got = bed.settle().1;
    let order: Vec<Vec<u8>> = got.iter().map(|p| payload_of(p)).collect();
    let sent: Vec<Vec<u8>> = (0..WAITING).map(|n| n.to_be_bytes().to_vec()).collect();
    assert_eq!(order, sent);
}

#[test]
fn what_an_engine_cannot_carry_is_refused_with_the_reason() {
    let arena = pmd::Arena::new(pmd::ArenaConfig {
        frames: 1024,
        lock: false,
        ..pmd::ArenaConfig::default()
    })
    .unwrap();
    let kept = Mutex::new(Vec::new());
    let models = [models::eip93(), models::soe()];
    let desks = models::open(&models, &arena, &kept);
    let park = gateway::engine::Park::new(
        desks,
        Arc::from([]),
        gateway::engine::choice::Choice::default(),
    );
    let spec = |change: &dyn Fn(&mut SaSpec)| {
        let mut s = common::sa("a", Direction::Out, 256, "192.0.2.1", "192.0.2.2", CBC);
        s.esn = false;
        s.offload = OffloadMode::Packet;
        s.engine = Some("soe0".into());
        change(&mut s);
        s
    };
    let why = |change: &dyn Fn(&mut SaSpec)| park.place(&spec(change), None, false).unwrap_err();
    assert_eq!(
        why(&|s| s.esn = true),
        "engine \"soe0\": it has no 64-bit sequence numbers"
    );
    assert_eq!(
        why(&|s| s.offload = OffloadMode::Crypto),
        "engine \"soe0\": it has no crypto mode"
    );
    assert_eq!(
        why(&|s| s.suite = Suite::ChaCha20Poly1305),
        "engine \"soe0\": it has no chacha20-poly1305 in packet mode"
    );
    assert_eq!(
        why(&|s| s.tfc = Tfc::PadTo(1000)),
        "engine \"soe0\": it makes no dummy packets and no traffic-flow padding"
    );
    assert_eq!(
        why(&|s| {
            s.direction = Direction::In;
            s.replay_window = 1024;
        }),
        "engine \"soe0\": its replay window has 256 packets, 1024 are asked for"
    );
    assert_eq!(
        why(&|s| s.engine = Some("none".into())),
        "there is no engine \"none\"; the engines are eip0, soe0"
    );
    let place = park.place(&spec(&|_| {}), None, false).unwrap();
    assert_eq!((place.engine, place.outer_headers), (2, true));
    // With the choice left to the gateway, what no engine carries is the CPU's.
    let auto = park
        .place(
            &spec(&|s| {
                s.engine = None;
                s.esn = true;
            }),
            None,
            false,
        )
        .unwrap();
    assert_eq!(auto.engine, 0);
}
