use super::*;
use crate::cipher::{CipherJob, SaCipher};
use crate::fib::{Neighbours, Route};
use crate::sa::*;
use crate::snapshot::Reader;
use crate::suite::{AeadIcv, AesBits, Suite};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Stands for expanded keys; counts those alive. No packet is ciphered here.
struct Keys(Arc<AtomicUsize>);

impl Drop for Keys {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl SaCipher for Keys {
    fn lane(&self) -> u16 {
        0
    }
    fn prefetch(&self) {}
    fn seal(&self, _: &mut [CipherJob<'_>]) {}
    fn open(&self, _: &mut [CipherJob<'_>]) {}
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

#[derive(Default)]
struct Factory(Arc<AtomicUsize>);

impl CipherFactory for Factory {
    fn make(
        &self,
        _: Suite,
        _: &SaKeys,
        _: bool,
        _: Direction,
    ) -> Result<Box<dyn SaCipher>, CipherError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(Keys(Arc::clone(&self.0))))
    }
    fn provider_for(&self, _: Suite) -> Option<&'static str> {
        Some("test")
    }
}

/// With a hard limit of three packets and ten seconds.
fn spec(name: &str, direction: Direction, spi: u32) -> Arc<SaSpec> {
    let suite = Suite::Gcm(AesBits::B128, AeadIcv::L16);
    let keys = SaKeys {
        enc: vec![1; 20].into(),
        auth: Vec::new().into(),
    };
    Arc::new(SaSpec {
        tunnel: "t".into(),
        esn: true,
        hard: Limits {
            packets: Some(3),
            bytes: None,
            seconds: Some(10),
        },
        ..SaSpec::plain(name, direction, Spi::new(spi).unwrap(), suite, keys)
    })
}

fn add(
    store: &mut Store,
    draft: &mut Draft,
    factory: &Factory,
    (name, direction, spi): (&str, Direction, u32),
) -> Result<SaId, StoreError> {
    store.add_sa(draft, spec(name, direction, spi), factory, start(), 0)
}

fn start() -> Start {
    Start {
        next_seq: 1,
        lease_end: 1000,
        window_top: 0,
    }
}

#[test]
fn keys_of_a_removed_sa_live_until_every_worker_has_moved_on() {
    let factory = Factory::default();
    let mut store = Store::new(2, 16);
    let mut readers = [0, 1].map(|w| Reader::new(Arc::clone(store.shared()), w));
    let mut draft = store.draft();
    let id = add(
        &mut store,
        &mut draft,
        &factory,
        ("a", Direction::In, 0x1000),
    )
    .unwrap();
    store.publish(draft);
    for r in &mut readers {
        assert!(r.load().sa(id).is_some());
    }
    let mut draft = store.draft();
    assert!(draft.remove_sa(id));
    store.publish(draft);
    assert!(readers[0].load().sa(id).is_none());
    assert!(store.reap().is_empty(), "worker 1 may still use it");
    assert_eq!(factory.0.load(Ordering::Relaxed), 1);
    readers[1].park();
    assert_eq!(store.reap(), [id]);
    assert_eq!(factory.0.load(Ordering::Relaxed), 0, "keys wiped");
    let mut draft = store.draft();
    let next = add(
        &mut store,
        &mut draft,
        &factory,
        ("b", Direction::In, 0x1000),
    )
    .unwrap();
    assert_eq!(next.index, id.index);
    assert_ne!(next.generation, id.generation);
}

#[test]
fn a_discarded_draft_changes_nothing() {
    let factory = Factory::default();
    let mut store = Store::new(1, 1);
    let mut draft = store.draft();
    add(
        &mut store,
        &mut draft,
        &factory,
        ("a", Direction::Out, 0x1000),
    )
    .unwrap();
    assert!(matches!(
        add(
            &mut store,
            &mut draft,
            &factory,
            ("b", Direction::Out, 0x1001)
        ),
        Err(StoreError::Full { limit: 1, .. })
    ));
    store.discard(draft);
    assert_eq!(store.current().epoch, 1);
    let mut draft = store.draft();
    assert!(
        add(
            &mut store,
            &mut draft,
            &factory,
            ("c", Direction::Out, 0x1000)
        )
        .is_ok()
    );
}

#[test]
fn a_taken_spi_names_the_sa_that_has_it() {
    let factory = Factory::default();
    let mut store = Store::new(1, 4);
    let mut draft = store.draft();
    add(
        &mut store,
        &mut draft,
        &factory,
        ("a", Direction::In, 0x1000),
    )
    .unwrap();
    let err = add(
        &mut store,
        &mut draft,
        &factory,
        ("b", Direction::In, 0x1000),
    )
    .unwrap_err();
    assert_eq!(
        err.to_string(),
        "SA \"b\": SPI 0x00001000 at 192.0.2.2 is already in use by SA \"a\""
    );
}

#[test]
fn packet_n_passes_and_the_next_is_refused_by_name() {
    let factory = Factory::default();
    let mut store = Store::new(1, 4);
    let mut draft = store.draft();
    let out = add(
        &mut store,
        &mut draft,
        &factory,
        ("o", Direction::Out, 0x1000),
    )
    .unwrap();
    let inb = add(
        &mut store,
        &mut draft,
        &factory,
        ("i", Direction::In, 0x1001),
    )
    .unwrap();
    store.publish(draft);
    let snap = store.current();
    let o = snap.sa(out).unwrap();
    let i = snap.sa(inb).unwrap();
    for n in 1..=3 {
        assert_eq!(o.next_out(100, 0), Ok(n));
        assert_eq!(i.account_in(100, 0), Ok(()));
    }
    use crate::drops::DropReason::*;
    assert_eq!(o.next_out(100, 0), Err(HardPackets));
    assert_eq!(i.account_in(100, 0), Err(HardPackets));
    assert_eq!(i.admit_in(0), Err(HardPackets));
    assert_eq!(
        o.events() & crate::runtime::event::HARD,
        crate::runtime::event::HARD
    );
    assert_eq!(o.live.counters.packets.value(), 3);
    assert_eq!(i.admit_in(10_000_000_000), Err(HardTime));
}

#[test]
fn tunnel_totals_go_on_when_an_sa_is_replaced() {
    let factory = Factory::default();
    let mut store = Store::new(1, 4);
    let mut draft = store.draft();
    let a = add(
        &mut store,
        &mut draft,
        &factory,
        ("a", Direction::Out, 0x1000),
    )
    .unwrap();
    store.publish(draft);
    store.current().sa(a).unwrap().next_out(100, 0).unwrap();
    let mut draft = store.draft();
    let b = add(
        &mut store,
        &mut draft,
        &factory,
        ("b", Direction::Out, 0x1001),
    )
    .unwrap();
    draft.remove_sa(a);
    store.publish(draft);
    assert_eq!(store.totals()[0].0.packets, 1, "while retiring");
    store.reap();
    let tunnel = store.find_tunnel("t").unwrap();
    assert_eq!(store.current().outbound(tunnel).unwrap().fixed.id, b);
    store.current().sa(b).unwrap().next_out(50, 0).unwrap();
    assert_eq!(
        store.totals()[0].0,
        Totals {
            packets: 2,
            bytes: 150,
            ..Totals::default()
        }
    );
    assert_eq!(store.tunnels()[0].rekeys, 1);
}

#[test]
fn forgotten_tunnels_leave_no_name_and_their_index_to_nobody() {
    let mut store = Store::new(0, 100);
    let mut draft = store.draft();
    let a = store
        .add_sa(
            &mut draft,
            spec("a", Direction::Out, 0x1000),
            &Factory::default(),
            start(),
            0,
        )
        .unwrap();
    let idle = store.tunnel("idle");
    let routed = store.tunnel("routed");
    let route = Route {
        vrf: Vrf(0),
        addr: [10, 0, 0, 0].into(),
        len: 8,
        to: RouteTo::Tunnel(routed),
    };
    draft.set_fib(Arc::new(
        Fib::build(&[route], Neighbours::default()).unwrap(),
    ));
    store.publish(draft);
    store.forget_tunnels(&HashSet::from(["idle"]));
    assert_eq!(store.named_tunnels(), 3, "with an SA, a route, a wish");
    store.forget_tunnels(&HashSet::new());
    assert_eq!(
        (store.named_tunnels(), store.find_tunnel("idle")),
        (2, None)
    );
    assert_eq!(store.tunnels()[idle.0 as usize].name, "");
    assert!(store.tunnel("idle") > routed, "an index of its own");
    let mut draft = store.draft();
    draft.remove_sa(a);
    store.publish(draft);
    store.forget_tunnels(&HashSet::new());
    assert!(store.find_tunnel("t").is_some(), "while its SA retires");
    store.reap();
    store.forget_tunnels(&HashSet::new());
    assert_eq!(store.named_tunnels(), 1);
    assert_eq!(store.find_tunnel("routed"), Some(routed));
}

#[test]
fn nothing_is_sent_beyond_the_lease() {
    let factory = Factory::default();
    let mut store = Store::new(1, 4);
    let mut draft = store.draft();
    let lease = Start {
        next_seq: 7,
        lease_end: 8,
        window_top: 0,
    };
    let mut s = SaSpec::clone(&spec("a", Direction::Out, 0x1000));
    s.hard = Limits::default();
    let id = store
        .add_sa(&mut draft, Arc::new(s), &factory, lease, 0)
        .unwrap();
    let e = draft.snapshot().sa(id).unwrap().clone();
    assert_eq!(e.next_out(1, 0), Ok(7));
    assert_eq!(
        e.next_out(1, 0),
        Err(crate::drops::DropReason::LeaseExhausted)
    );
    e.extend_lease(10, 9);
    assert_eq!(e.next_out(1, 0), Ok(8));
    assert_eq!(e.events() & crate::runtime::event::LEASE_LOW, 0);
    assert_eq!(e.next_out(1, 0), Ok(9));
    assert_ne!(e.events() & crate::runtime::event::LEASE_LOW, 0);
}
