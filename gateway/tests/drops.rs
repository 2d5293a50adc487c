//! Every reason for a drop is provoked at least once, and the ledger balances each time.

mod common;

use std::collections::BTreeSet;
use std::sync::Mutex;

use common::{Bed, GCM, Plan, bed, udp, with_byte};
use gateway::crypto::Fixed;
use gateway::crypto::rustcrypto::RustCrypto;
use gateway::esp::reassembly::ReassemblyConfig;
use pmd::engine::{Capabilities, EspEngine, EspJob, JobStatus, Refusal};
use sa_store::cipher::{CipherFactory, CipherJob};
use sa_store::drops::DropReason::{self, *};
use sa_store::runtime::{SaEntry, Start};
use sa_store::sa::*;
use sa_store::snapshot::Snapshot;

/// Reasons seen by the tests of this file.
static SEEN: Mutex<BTreeSet<DropReason>> = Mutex::new(BTreeSet::new());

fn expect(bed: &Bed, left: bool, want: &[(DropReason, u64)]) {
    assert_eq!(bed.dropped(left), want);
    SEEN.lock().unwrap().extend(want.iter().map(|(r, _)| *r));
}

fn packet() -> Vec<u8> {
    udp("10.1.0.1", "10.2.0.1", 64, b"payload")
}

/// Frames of `n` protected packets as they cross the wire, not delivered.
fn on_wire(bed: &mut Bed, n: usize) -> Vec<Vec<u8>> {
    bed.cut = true;
    let before = bed.wire.len();
    bed.send_left(&vec![packet(); n]);
    bed.settle();
    bed.wire[before..].to_vec()
}

/// An ESP packet with a right ICV around any body (payload, padding, pad length, next header).
fn sealed(bed: &Bed, seq: u32, body: &[u8]) -> Vec<u8> {
    let snapshot = bed.left.gw.store.current();
    let entry = snapshot
        .sas
        .iter()
        .flatten()
        .find(|e| e.fixed.direction == Direction::Out)
        .unwrap();
    let cipher = Fixed(RustCrypto)
        .make(
            entry.spec.suite,
            &entry.spec.keys,
            entry.spec.esn,
            Direction::Out,
        )
        .unwrap();
    let mut esp = Vec::new();
    esp.extend(entry.fixed.spi.to_be_bytes());
    esp.extend(seq.to_be_bytes());
    esp.extend([0, 0, 0, 0]);
    esp.extend(seq.to_be_bytes());
    esp.extend(body);
    esp.extend([0; 16]);
    let mut jobs = [CipherJob {
        ctx: &*cipher,
        esp: &mut esp,
        seq_hi: 0,
        ok: false,
    }];
    cipher.seal(&mut jobs);
    assert!(jobs[0].ok);
    let mut frame = Vec::new();
    etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 1, 1], [2, 0, 0, 0, 1, 0])
        .ipv4([192, 0, 2, 1], [192, 0, 2, 2], 64)
        .write(&mut frame, etherparse::IpNumber(50), &esp)
        .unwrap();
    frame
}

#[test]
fn every_reason_has_a_cause() {
    malformed_frames();
    inbound_esp();
    after_decryption();
    limits();
    policy_and_routes();
    fragments();
    queues_and_memory();
    exception_path();
    engines();
    shutdown();
    let seen = SEEN.lock().unwrap();
    let missing: Vec<_> = DropReason::ALL
        .iter()
        .filter(|r| !seen.contains(r))
        .collect();
    assert!(missing.is_empty(), "not provoked: {missing:?}");
}

/// An echo request of the left host to its gateway.
fn ping() -> Vec<u8> {
    let mut out = Vec::new();
    etherparse::PacketBuilder::ethernet2(common::MAC_HOST, [2, 0, 0, 0, 1, 1])
        .ipv4([10, 1, 0, 1], [10, 1, 0, 254], 64)
        .icmpv4_echo_request(1, 1)
        .write(&mut out, &[0; 56])
        .unwrap();
    out
}

fn exception_path() {
    let mut b = bed(&Plan {
        taps: Some(64),
        config: Box::new(|c, _| c.punt.rates[3] = 1),
        ..Plan::default()
    });
    b.send_left(&vec![ping(); 20]);
    b.settle();
    // What may come at once, and what has grown meanwhile.
    assert_eq!(b.kernel_got(0).len(), 16);
    expect(&b, true, &[(PuntLimit, 4)]);

    // A kernel that takes nothing.
    let mut b = bed(&Plan {
        taps: Some(2),
        config: Box::new(|c, _| c.punt.rates[3] = 100_000),
        ..Plan::default()
    });
    b.send_left(&vec![ping(); 300]);
    b.settle_left();
    b.settle_left();
    b.settle_left();
    let full = b.dropped(true);
    assert!(matches!(full[..], [(PuntFull, n)] if n > 100), "{full:?}");
    SEEN.lock().unwrap().insert(PuntFull);
    while !b.kernel_got(0).is_empty() {
        b.settle_left();
    }
    b.settle();

    // Nobody sent what it quotes.
    let mut b = bed(&Plan::default());
    let mut wire = on_wire(&mut b, 1).remove(0);
    wire[14 + 12] ^= 1;
    b.inject_left(&[common::too_big(&wire, [192, 0, 2, 1], 1400)]);
    b.settle();
    expect(&b, true, &[(IcmpImplausible, 1)]);
}

fn malformed_frames() {
    let mut b = bed(&Plan::default());
    b.send_left(&[vec![2; 10]]);
    let mut cut = packet();
    cut.truncate(30);
    b.send_left(&[cut]);
    let mut sum = packet();
    sum[24] ^= 1;
    b.send_left(&[sum]);
    let mut arp = packet();
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    b.send_left(&[arp, udp("10.1.0.1", "10.2.0.1", 1, b"x")]);
    b.settle();
    expect(
        &b,
        true,
        &[
            (L2Malformed, 1),
            (IpMalformed, 1),
            (IpChecksum, 1),
            (TtlExpired, 1),
            (NotForUs, 1),
        ],
    );
}

fn inbound_esp() {
    let mut b = bed(&Plan {
        sa: Box::new(|s| s.replay_window = 64),
        ..Plan::default()
    });
    let w = on_wire(&mut b, 200);
    b.inject_right(&[w[199].clone(), w[199].clone(), w[0].clone()]);
    let mut forged = w[198].clone();
    *forged.last_mut().unwrap() ^= 1;
    let mut unknown = w[197].clone();
    unknown[34] ^= 0x40;
    let mut zero = w[196].clone();
    zero[38..42].fill(0);
    b.inject_right(&[forged, unknown, zero, sealed(&b, 300, &[0; 3])]);
    b.settle();
    expect(
        &b,
        false,
        &[
            (EspTooShort, 1),
            (SaNotFound, 1),
            (ReplayDuplicate, 1),
            (ReplayOld, 1),
            (SequenceInvalid, 1),
            (IcvMismatch, 1),
        ],
    );

    let natt = Some(UdpEncap {
        sport: 4500,
        dport: 4500,
    });
    let mut b = bed(&Plan {
        sa: Box::new(move |s| s.encap = natt),
        ..Plan::default()
    });
    let plain = sealed(&b, 1, &[1, 2, 2, 59]);
    b.inject_right(&[plain]);
    b.settle();
    expect(&b, false, &[(EncapMismatch, 1)]);
}

fn after_decryption() {
    let mut b = bed(&Plan::default());
    let inner = packet()[14..].to_vec();
    let body = |inner: &[u8], next: u8| {
        let mut v = inner.to_vec();
        let pad = (4 - (v.len() + 2) % 4) % 4;
        v.extend((1..).take(pad));
        v.extend([u8::try_from(pad).unwrap(), next]);
        v
    };
    let mut bad_padding = inner.clone();
    bad_padding.extend([9; 7]);
    while !(bad_padding.len() + 2).is_multiple_of(4) {
        bad_padding.push(9);
    }
    bad_padding.extend([4, 4]);
    let stranger = udp("10.9.0.1", "10.1.0.1", 64, b"x")[14..].to_vec();
    let frames = [
        sealed(&b, 1, &bad_padding),
        sealed(&b, 2, &body(&inner, 99)),
        sealed(&b, 3, &body(&inner[..15], 4)),
        sealed(&b, 4, &body(&stranger, 4)),
        with_byte(sealed(&b, 5, &body(&inner, 4)), 15, 3),
    ];
    b.inject_right(&frames);
    b.settle();
    expect(
        &b,
        false,
        &[
            (BadPadding, 1),
            (BadNextHeader, 1),
            (InnerMalformed, 1),
            (SelectorMismatch, 1),
            (EcnInvalid, 1),
        ],
    );
}

fn limits() {
    let limited = |hard: Limits| {
        let mut b = bed(&Plan {
            sa: Box::new(move |s| s.hard = hard),
            ..Plan::default()
        });
        b.send_left(&[packet(), packet(), packet()]);
        b.settle();
        b
    };
    let inner = (packet().len() - 14) as u64;
    expect(
        &limited(Limits {
            packets: Some(2),
            ..Limits::default()
        }),
        true,
        &[(HardPackets, 1)],
    );
    expect(
        &limited(Limits {
            bytes: Some(2 * inner),
            ..Limits::default()
        }),
        true,
        &[(HardBytes, 1)],
    );
    expect(
        &limited(Limits {
            seconds: Some(0),
            ..Limits::default()
        }),
        true,
        &[(HardTime, 3)],
    );

    let last = Start {
        next_seq: u64::from(u32::MAX),
        lease_end: 1 << 32,
        window_top: 0,
    };
    let mut b = bed(&Plan {
        sa: Box::new(|s| s.esn = false),
        start: last,
        ..Plan::default()
    });
    b.send_left(&[packet(), packet()]);
    b.settle();
    expect(&b, true, &[(SequenceExhausted, 1)]);

    let mut b = bed(&Plan {
        start: Start {
            next_seq: 5,
            lease_end: 6,
            window_top: 0,
        },
        ..Plan::default()
    });
    b.send_left(&[packet(), packet()]);
    b.settle();
    expect(&b, true, &[(LeaseExhausted, 1)]);

    // The edge on disk covers one number; the next one is refused, told to the keeper of leases, and not taken for seen.
    let mut b = bed(&Plan::default());
    let snapshot = b.right.gw.store.current();
    let mut entries = snapshot.sas.iter().flatten();
    let inbound = entries.find(|e| e.fixed.spi == 0x1001).unwrap();
    inbound.extend_lease(2, 1);
    b.send_left(&[packet(), packet()]);
    b.settle();
    expect(&b, false, &[(WindowEdge, 1)]);
    assert_eq!((inbound.live.window.top(), inbound.reached()), (1, 2));
    let refused = b.wire.last().unwrap().clone();
    inbound.extend_lease(3, 2);
    b.inject_right(&[refused]);
    let (_, host) = b.settle();
    assert_eq!(host.len(), 1);
    assert_eq!((inbound.live.window.top(), inbound.reached()), (2, 2));

    let mut b = bed(&Plan::default());
    for entry in b.left.gw.store.current().sas.iter().flatten() {
        entry.set_disabled(true);
    }
    b.send_left(&[packet()]);
    b.settle();
    expect(&b, true, &[(SaDisabled, 1)]);
}

fn policy_and_routes() {
    let mut b = bed(&Plan::default());
    b.inject_right(&[udp("10.1.0.1", "10.2.0.1", 64, b"in the clear")]);
    b.settle();
    expect(&b, false, &[(PolicyMustProtect, 1)]);
    b.send_left(&[
        udp("10.1.0.1", "198.51.100.1", 64, b"x"),
        udp("10.1.0.1", "203.0.113.200", 64, b"x"),
    ]);
    b.settle();
    expect(&b, true, &[(PolicyDiscard, 1)]);

    // A later fragment of a flow whose ports decide.
    let mut b = bed(&Plan::default());
    b.set_left_policies(|p| p.insert(0, common::discard_one_port()));
    let fragment = with_byte(packet(), 21, 5);
    b.send_left(&[fragment]);
    b.settle();
    expect(&b, true, &[(FragmentPolicy, 1)]);

    let mut b = bed(&Plan::default());
    let mut draft = b.left.gw.store.draft();
    let snapshot = b.left.gw.store.current();
    let out = snapshot
        .sas
        .iter()
        .flatten()
        .find(|e| e.fixed.direction == Direction::Out)
        .unwrap();
    assert!(draft.remove_sa(out.fixed.id));
    b.left.gw.store.publish(draft);
    b.send_left(&[packet()]);
    b.settle();
    expect(&b, true, &[(NoOutboundSa, 1)]);

    let mut b = bed(&Plan::default());
    b.forget_left_peer();
    b.send_left(&[packet()]);
    b.give_up_neighbours();
    b.settle();
    expect(&b, true, &[(NoNeighbour, 1)]);
    b.set_left_routes(&[]);
    b.send_left(&[packet()]);
    b.settle();
    expect(&b, true, &[(NoRoute, 1), (NoNeighbour, 1)]);

    let mut b = bed(&Plan {
        sa: Box::new(|s| s.df = Df::Set),
        ..Plan::default()
    });
    b.send_left(&[udp("10.1.0.1", "10.2.0.1", 64, &[0; 1472])]);
    b.settle();
    expect(&b, true, &[(TooBig, 1)]);

    let mut b = bed(&Plan::default());
    b.send_without_tailroom();
    b.settle();
    expect(&b, true, &[(NoRoom, 1)]);
}

fn fragments() {
    let off = |c: &mut gateway::app::AssemblyConfig, _: bool| c.reassembly = None;
    let mut b = bed(&Plan {
        config: Box::new(off),
        ..Plan::default()
    });
    let whole = on_wire(&mut b, 1).remove(0);
    let first = with_byte(whole.clone(), 20, 0x20);
    b.inject_right(std::slice::from_ref(&first));
    b.settle();
    expect(&b, false, &[(FragmentOff, 1)]);

    let tight = |c: &mut gateway::app::AssemblyConfig, _: bool| {
        c.reassembly = Some(ReassemblyConfig {
            datagrams: 1,
            timeout: 1_000_000,
            ..ReassemblyConfig::default()
        });
    };
    let mut b = bed(&Plan {
        config: Box::new(tight),
        ..Plan::default()
    });
    b.inject_right(&[first.clone(), first.clone()]);
    b.settle_holding();
    assert!(
        b.dropped(false).iter().any(|(r, _)| *r == FragmentInvalid),
        "{:?}",
        b.dropped(false)
    );
    let mut b = bed(&Plan {
        config: Box::new(tight),
        ..Plan::default()
    });
    b.inject_right(&[
        with_byte(first.clone(), 19, 7),
        with_byte(first.clone(), 19, 8),
    ]);
    b.settle_holding();
    std::thread::sleep(std::time::Duration::from_millis(3));
    b.settle();
    let got = b.dropped(false);
    assert_eq!(got, [(FragmentTimeout, 1), (FragmentMemory, 1)]);
    SEEN.lock()
        .unwrap()
        .extend([FragmentInvalid, FragmentTimeout, FragmentMemory]);
}

fn queues_and_memory() {
    // Nobody empties the wire.
    let mut b = bed(&Plan {
        ring: 64,
        frames: 8192,
        ..Plan::default()
    });
    for _ in 0..16 {
        b.send_left(&vec![packet(); 64]);
        for w in &mut b.left.gw.workers {
            w.round();
        }
    }
    assert!(
        b.dropped(true).iter().any(|(r, _)| *r == TxFull),
        "{:?}",
        b.dropped(true)
    );
    b.settle();

    let tiny = |c: &mut gateway::app::AssemblyConfig, _: bool| c.handover_slots = 4;
    let mut b = bed(&Plan {
        workers: 2,
        config: Box::new(tiny),
        ..Plan::default()
    });
    // The tunnel belongs to worker 0, the outside port to worker 1: only the right gateway's inbound path crosses.
    b.send_left(&vec![packet(); 64]);
    b.settle();
    let both = [b.dropped(true), b.dropped(false)].concat();
    assert!(both.iter().any(|(r, _)| *r == HandoverFull), "{both:?}");

    let mut b = bed(&Plan {
        sa: Box::new(|s| s.df = Df::Clear),
        frames: 700,
        ..Plan::default()
    });
    let taken = b.starve();
    b.send_frame_left(taken.1, &udp("10.1.0.1", "10.2.0.1", 64, &[0; 1472]));
    b.settle_left();
    assert!(
        b.dropped(true).iter().any(|(r, _)| *r == PoolExhausted),
        "{:?}",
        b.dropped(true)
    );
    b.feed(taken.0);
    b.settle();
    SEEN.lock()
        .unwrap()
        .extend([TxFull, HandoverFull, PoolExhausted]);
}

/// An engine that answers every job with the same failure.
struct Broken(Capabilities, JobStatus);

impl EspEngine for Broken {
    fn capabilities(&self) -> &Capabilities {
        &self.0
    }
    fn install(&mut self, _: &SaEntry) -> Result<(), Refusal> {
        Ok(())
    }
    fn remove(&mut self, _: SaId) {}
    fn submit(&mut self, _: &Snapshot, jobs: &mut Vec<EspJob>, done: &mut Vec<EspJob>) {
        done.extend(jobs.drain(..).map(|j| EspJob {
            status: self.1,
            ..j
        }));
    }
    fn poll(&mut self, _: &mut Vec<EspJob>) {}
    fn in_flight(&self) -> usize {
        0
    }
}

/// An engine that takes nothing.
struct Full(Capabilities);

impl EspEngine for Full {
    fn capabilities(&self) -> &Capabilities {
        &self.0
    }
    fn install(&mut self, _: &SaEntry) -> Result<(), Refusal> {
        Ok(())
    }
    fn remove(&mut self, _: SaId) {}
    fn submit(&mut self, _: &Snapshot, _: &mut Vec<EspJob>, _: &mut Vec<EspJob>) {}
    fn poll(&mut self, _: &mut Vec<EspJob>) {}
    fn in_flight(&self) -> usize {
        0
    }
}

fn caps() -> Capabilities {
    Capabilities {
        name: "test",
        in_flight: 1,
        synchronous: true,
        ..Capabilities::default()
    }
}

fn engines() {
    let broken = |c: &mut gateway::app::AssemblyConfig, _: bool| {
        c.engine = || Box::new(Broken(caps(), JobStatus::Failed));
    };
    let mut b = bed(&Plan {
        config: Box::new(broken),
        suite: GCM,
        ..Plan::default()
    });
    b.send_left(&[packet()]);
    b.settle();
    expect(&b, true, &[(EngineError, 1)]);
    let picky = |c: &mut gateway::app::AssemblyConfig, _: bool| {
        c.engine = || Box::new(Broken(caps(), JobStatus::Malformed));
    };
    let mut b = bed(&Plan {
        config: Box::new(picky),
        ..Plan::default()
    });
    b.send_left(&[packet()]);
    b.settle();
    expect(&b, true, &[(EngineRefused, 1)]);
    let full = |c: &mut gateway::app::AssemblyConfig, _: bool| c.engine = || Box::new(Full(caps()));
    let mut b = bed(&Plan {
        config: Box::new(full),
        ..Plan::default()
    });
    b.send_left(&[packet()]);
    b.settle();
    expect(&b, true, &[(EngineBusy, 1)]);
}

fn shutdown() {
    let mut b = bed(&Plan {
        ring: 64,
        ..Plan::default()
    });
    for _ in 0..2 {
        b.send_left(&vec![packet(); 64]);
        for w in &mut b.left.gw.workers {
            w.round();
        }
    }
    for w in std::mem::take(&mut b.left.gw.workers) {
        w.shut_down();
    }
    expect(&b, true, &[(Shutdown, 64)]);
}
