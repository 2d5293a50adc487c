use std::net::IpAddr;

use proptest::prelude::*;

use super::*;
use crate::drops::DropReason;
use crate::flow::L4;
use crate::policy::{self, AddrRange, Ports, Selector};
use crate::sa::{IfId, Vrf};

pub(super) fn tunnel(name: &str) -> Option<TunnelIdx> {
    name.strip_prefix('t')?.parse().ok().map(TunnelIdx)
}

fn range(text: &str) -> AddrRange {
    if let Some((a, len)) = text.split_once('/') {
        let len = len.parse().expect("length");
        return AddrRange::prefix(a.parse().expect("address"), len).expect("prefix");
    }
    let (a, b) = text.split_once('-').unwrap_or((text, text));
    AddrRange::new(a.parse().expect("first"), b.parse().expect("last")).expect("range")
}

fn sel(src: &str, dst: &str, proto: Option<u8>, ports: Ports) -> Selector {
    Selector {
        src: range(src),
        dst: range(dst),
        proto,
        ports,
    }
}

fn dport(p: u16) -> Ports {
    Ports::Range {
        src: 0..=u16::MAX,
        dst: p..=p,
    }
}

fn pol(name: &str, priority: u32, s: Selector, action: policy::Action) -> Policy {
    Policy {
        name: name.into(),
        direction: Direction::Out,
        priority,
        selectors: vec![s],
        action,
        vrf: Vrf(0),
        if_id: IfId(0),
    }
}

fn protect(t: &str) -> policy::Action {
    policy::Action::Protect { tunnel: t.into() }
}

fn key(src: &str, dst: &str, proto: u8, l4: L4) -> FlowKey {
    FlowKey::new(
        src.parse().expect("source"),
        dst.parse().expect("destination"),
        proto,
        l4,
    )
    .expect("one family")
}

fn tcp(src: &str, dst: &str, d: u16) -> FlowKey {
    key(src, dst, 6, L4::Ports { src: 40000, dst: d })
}

fn build(policies: &[Policy]) -> Spd {
    Spd::build(Direction::Out, policies, tunnel).expect("valid policies")
}

fn action(policies: &[Policy], k: &FlowKey) -> Action {
    build(policies).lookup(k).action
}

const T1: Action = Action::Protect {
    tunnel: TunnelIdx(1),
};

const ANY: &str = "0.0.0.0/0";

#[test]
fn an_empty_spd_discards_by_default() {
    let v = Spd::empty(Direction::Out).lookup(&tcp("1.2.3.4", "5.6.7.8", 80));
    assert_eq!(v, Verdict::DEFAULT);
}

#[test]
fn the_lower_priority_number_wins_and_file_order_breaks_ties() {
    let wide = |n: &str, prio, a| pol(n, prio, sel(ANY, ANY, None, Ports::Any), a);
    let k = tcp("10.0.0.1", "10.0.0.2", 80);
    let narrow = pol(
        "n",
        10,
        sel("10.0.0.1", "10.0.0.2", Some(6), dport(80)),
        protect("t1"),
    );
    let list = [wide("w", 5, policy::Action::Bypass), narrow.clone()];
    assert_eq!(action(&list, &k), Action::Bypass);
    let list = [wide("w", 10, policy::Action::Bypass), narrow.clone()];
    assert_eq!(action(&list, &k), Action::Bypass);
    let list = [narrow, wide("w", 10, policy::Action::Bypass)];
    assert_eq!(action(&list, &k), T1);
}

#[test]
fn address_ranges_hold_exactly_their_addresses() {
    let list = [pol(
        "r",
        1,
        sel("10.0.0.3-10.0.1.77", "2.0.0.0/7", None, Ports::Any),
        protect("t1"),
    )];
    let spd = build(&list);
    for (src, dst, inside) in [
        ("10.0.0.3", "2.0.0.0", true),
        ("10.0.1.77", "3.255.255.255", true),
        ("10.0.0.2", "2.0.0.0", false),
        ("10.0.1.78", "2.0.0.0", false),
        ("10.0.1.0", "4.0.0.0", false),
        ("10.0.1.0", "1.255.255.255", false),
    ] {
        let got = spd.lookup(&tcp(src, dst, 1)).action;
        assert_eq!(got == T1, inside, "{src} {dst}");
    }
}

#[test]
fn icmp_selectors_look_at_type_and_code_and_at_no_other_protocol() {
    let icmp = Ports::Icmp {
        kind: 8..=8,
        code: 0..=0,
    };
    let list = [pol("p", 1, sel(ANY, ANY, None, icmp), protect("t1"))];
    let spd = build(&list);
    let ping = |kind, code| key("1.1.1.1", "2.2.2.2", 1, L4::Icmp { kind, code });
    assert_eq!(spd.lookup(&ping(8, 0)).action, T1);
    assert_eq!(spd.lookup(&ping(0, 0)).action, Action::Discard);
    assert_eq!(spd.lookup(&ping(8, 1)).action, Action::Discard);
    let udp = key("1.1.1.1", "2.2.2.2", 17, L4::Ports { src: 8, dst: 0 });
    assert_eq!(spd.lookup(&udp).action, Action::Discard);
}

#[test]
fn ports_without_protocol_mean_any_protocol_that_has_ports() {
    let list = [pol("p", 1, sel(ANY, ANY, None, dport(53)), protect("t1"))];
    let spd = build(&list);
    for proto in [6, 17, 132] {
        let k = key("1.1.1.1", "2.2.2.2", proto, L4::Ports { src: 9, dst: 53 });
        assert_eq!(spd.lookup(&k).action, T1);
    }
    let gre = key("1.1.1.1", "2.2.2.2", 47, L4::None);
    assert_eq!(spd.lookup(&gre).action, Action::Discard);
}

#[test]
fn vrf_and_interface_keep_policies_apart() {
    let mut p = pol("p", 1, sel(ANY, ANY, None, Ports::Any), protect("t1"));
    p.vrf = Vrf(3);
    p.if_id = IfId(9);
    let spd = build(&[p]);
    let k = tcp("1.1.1.1", "2.2.2.2", 1);
    assert_eq!(spd.lookup(&k).action, Action::Discard);
    assert_eq!(spd.lookup(&k.with_vrf(Vrf(3))).action, Action::Discard);
    assert_eq!(spd.lookup(&k.with_if_id(IfId(9))).action, Action::Discard);
    let k = k.with_vrf(Vrf(3)).with_if_id(IfId(9));
    assert_eq!(spd.lookup(&k).action, T1);
}

#[test]
fn a_fragment_is_not_bypassed_past_a_policy_that_may_protect_it() {
    let https = pol(
        "https",
        1,
        sel(ANY, "9.0.0.0/8", Some(6), dport(443)),
        protect("t1"),
    );
    let rest = pol(
        "rest",
        2,
        sel(ANY, ANY, None, Ports::Any),
        policy::Action::Bypass,
    );
    let spd = build(&[https, rest]);
    let frag = |dst, proto| key("1.1.1.1", dst, proto, L4::Fragment);
    let v = spd.lookup(&frag("9.1.1.1", 6));
    assert_eq!(v.action, Action::FragmentPolicy);
    assert_eq!(spd.policy(v.policy).map(|p| p.name.as_str()), Some("https"));
    assert_eq!(spd.lookup(&frag("9.1.1.1", 17)).action, Action::Bypass);
    assert_eq!(spd.lookup(&frag("8.1.1.1", 6)).action, Action::Bypass);
    let hidden = key("1.1.1.1", "9.1.1.1", 60, L4::FragmentUnknown);
    assert_eq!(spd.lookup(&hidden).action, Action::FragmentPolicy);
}

#[test]
fn a_fragment_may_fall_to_protection_from_a_bypass_with_ports() {
    let ike = pol(
        "ike",
        1,
        sel(ANY, ANY, Some(17), dport(500)),
        policy::Action::Bypass,
    );
    let rest = pol("rest", 2, sel(ANY, ANY, None, Ports::Any), protect("t1"));
    let k = key("1.1.1.1", "2.2.2.2", 17, L4::Fragment);
    assert_eq!(action(&[ike.clone(), rest], &k), T1);
    // Without it the fragment would have to be bypassed unchecked: RFC 4301 section 7.4.
    assert_eq!(action(&[ike], &k), Action::FragmentPolicy);
}

#[test]
fn a_fragment_is_not_moved_to_another_tunnel_nor_out_of_a_discard() {
    let rest = pol("rest", 9, sel(ANY, ANY, None, Ports::Any), protect("t1"));
    let k = key("1.1.1.1", "2.2.2.2", 6, L4::Fragment);
    for first in [protect("t2"), policy::Action::Discard] {
        let web = pol("web", 1, sel(ANY, ANY, Some(6), dport(80)), first);
        assert_eq!(action(&[web, rest.clone()], &k), Action::FragmentPolicy);
    }
    let web = pol("web", 1, sel(ANY, ANY, Some(6), dport(80)), protect("t1"));
    assert_eq!(action(&[web, rest], &k), T1);
}

#[test]
fn a_policys_selector_for_hidden_ports_decides_before_its_others() {
    let narrow = pol(
        "first",
        1,
        sel(ANY, ANY, None, dport(80)),
        policy::Action::Discard,
    );
    let any = sel(ANY, "2.2.2.2", None, Ports::Any);
    let opaque = sel("1.1.1.1", ANY, None, Ports::Opaque);
    let k = key("1.1.1.1", "2.2.2.2", 6, L4::Fragment);
    for selectors in [
        vec![any.clone(), opaque.clone()],
        vec![opaque.clone(), any.clone()],
    ] {
        let mut both = pol("second", 2, any.clone(), protect("t1"));
        both.selectors = selectors;
        let list = [narrow.clone(), both];
        let protected = Action::Protect {
            tunnel: TunnelIdx(1),
        };
        assert_eq!(action(&list, &k), protected);
        assert_eq!(
            reference::lookup(&list, Direction::Out, &k, tunnel).0,
            protected
        );
    }
}

#[test]
fn a_policy_for_opaque_ports_decides_on_fragments_alone() {
    let web = pol("web", 1, sel(ANY, ANY, Some(6), dport(80)), protect("t2"));
    let frags = pol(
        "frags",
        2,
        sel(ANY, ANY, Some(6), Ports::Opaque),
        protect("t1"),
    );
    let spd = build(&[web, frags]);
    let frag = key("1.1.1.1", "2.2.2.2", 6, L4::Fragment);
    assert_eq!(spd.lookup(&frag).action, T1);
    let whole = tcp("1.1.1.1", "2.2.2.2", 443);
    assert_eq!(spd.lookup(&whole).action, Action::Discard);
}

#[test]
fn a_full_port_range_of_a_protocol_takes_its_fragments() {
    let all = Ports::Range {
        src: 0..=u16::MAX,
        dst: 0..=u16::MAX,
    };
    let list = [pol("p", 1, sel(ANY, ANY, Some(6), all), protect("t1"))];
    let k = key("1.1.1.1", "2.2.2.2", 6, L4::Fragment);
    assert_eq!(action(&list, &k), T1);
}

#[test]
fn inbound_clear_text_that_must_be_protected_is_refused() {
    let p = pol(
        "p",
        1,
        sel("10.0.0.0/8", ANY, None, Ports::Any),
        protect("t1"),
    );
    let clear = pol(
        "c",
        2,
        sel("11.0.0.0/8", ANY, None, Ports::Any),
        policy::Action::Bypass,
    );
    let deny = pol(
        "d",
        3,
        sel("12.0.0.0/8", ANY, None, Ports::Any),
        policy::Action::Discard,
    );
    let spd = build(&[p, clear, deny]);
    let check = |src, via| match spd.check_inbound(&tcp(src, "1.1.1.1", 1), via) {
        InboundVerdict::Accept { .. } => None,
        InboundVerdict::Drop { reason, .. } => Some(reason),
    };
    let (t1, t2) = (Some(TunnelIdx(1)), Some(TunnelIdx(2)));
    assert_eq!(check("10.1.1.1", None), Some(DropReason::PolicyMustProtect));
    assert_eq!(check("10.1.1.1", t1), None);
    assert_eq!(check("10.1.1.1", t2), Some(DropReason::SelectorMismatch));
    assert_eq!(check("11.1.1.1", None), None);
    assert_eq!(check("11.1.1.1", t1), Some(DropReason::SelectorMismatch));
    assert_eq!(check("12.1.1.1", t1), Some(DropReason::PolicyDiscard));
    assert_eq!(check("13.1.1.1", t1), Some(DropReason::SelectorMismatch));
    assert_eq!(check("13.1.1.1", None), Some(DropReason::PolicyDiscard));
}

#[test]
fn faulty_policies_are_refused_by_name() {
    let err = |list: &[Policy]| {
        Spd::build(Direction::Out, list, tunnel)
            .map(drop)
            .expect_err("refused")
    };
    let ok = pol("a", 1, sel(ANY, ANY, None, Ports::Any), protect("t1"));
    assert!(matches!(
        err(&[ok.clone(), ok.clone()]),
        SpdError::DuplicateName { policy } if policy == "a"
    ));
    let mut p = ok.clone();
    p.action = protect("x");
    assert!(matches!(err(&[p]), SpdError::UnknownTunnel { tunnel, .. } if tunnel == "x"));
    let mut p = ok.clone();
    p.selectors.push(sel(ANY, "::/0", None, Ports::Any));
    assert!(matches!(
        err(&[p]),
        SpdError::MixedFamilies { index: 1, .. }
    ));
    let mut p = ok.clone();
    #[allow(clippy::reversed_empty_ranges, reason = "the fault under test")]
    let empty = 10..=5;
    p.selectors[0].ports = Ports::Range {
        src: 0..=9,
        dst: empty,
    };
    assert!(matches!(err(&[p]), SpdError::EmptyRange { index: 0, .. }));
    // A name that repeats that of an unchanged policy, in an update.
    let spd = build(std::slice::from_ref(&ok));
    let mut twin = ok.clone();
    twin.priority = 2;
    assert!(matches!(
        spd.updated(&[ok, twin], tunnel),
        Err(SpdError::DuplicateName { .. })
    ));
}

#[test]
fn an_edit_of_what_is_not_there_changes_nothing() {
    let p = pol("a", 1, sel(ANY, ANY, None, Ports::Any), protect("t1"));
    let spd = build(std::slice::from_ref(&p));
    let gone = crate::spd::Edit::Remove("b".into());
    let err = spd.edited(&[gone], tunnel).err();
    assert_eq!(err, Some(SpdError::NoSuchPolicy { policy: "b".into() }));
    let same = crate::spd::Edit::Put(p.clone());
    let other = crate::spd::Edit::Put(Policy {
        direction: Direction::In,
        ..p
    });
    let (_, changes) = spd.edited(&[same, other], tunnel).expect("valid");
    assert_eq!(changes, Changes::default());
}

#[test]
fn numbers_of_policies_survive_updates_by_name() {
    let p = |n: &str, prio| pol(n, prio, sel(ANY, ANY, None, Ports::Any), protect("t1"));
    let a = build(&[p("a", 1), p("b", 2), p("c", 3)]);
    let id = |s: &Spd, n: &str| s.policies().find(|(_, p)| p.name == n).map(|(i, _)| i);
    let (b, changes) = a
        .updated(&[p("d", 0), p("c", 1), p("a", 2)], tunnel)
        .expect("valid");
    assert_eq!(id(&a, "a"), id(&b, "a"));
    assert_eq!(id(&a, "c"), id(&b, "c"));
    assert_eq!(changes.removed, [id(&a, "b").expect("b")]);
    assert_eq!(changes.added, [id(&b, "d").expect("d")]);
    assert!(changes.added[0].index() < b.policy_slots());
    assert_ne!(
        id(&b, "d"),
        id(&a, "b"),
        "a number rests before it is given again"
    );
}

// Random policies over a small universe, so that packets meet many of them.

fn addr(v6: bool) -> impl Strategy<Value = IpAddr> {
    let bits = prop_oneof![0u32..16, Just(0x0a00_0000), Just(0x0aff_ffff), any::<u32>()];
    (bits, 0u32..3).prop_map(move |(low, high)| {
        if v6 {
            IpAddr::V6((u128::from(high) << 125 | 0x2001 << 64 | u128::from(low)).into())
        } else {
            IpAddr::V4((high << 30 | low).into())
        }
    })
}

fn addresses(v6: bool) -> impl Strategy<Value = AddrRange> {
    let bits = if v6 { 128u8 } else { 32 };
    prop_oneof![
        (addr(v6), 0..=bits).prop_map(|(a, n)| AddrRange::prefix(a, n).expect("prefix")),
        (addr(v6), Just(bits)).prop_map(|(a, n)| AddrRange::prefix(a, n).expect("prefix")),
        (addr(v6), addr(v6)).prop_map(|(a, b)| AddrRange::new(a.min(b), a.max(b)).expect("range")),
    ]
}

fn span<T: Copy + Ord + std::fmt::Debug>(
    v: impl Strategy<Value = T> + Clone,
) -> impl Strategy<Value = std::ops::RangeInclusive<T>> {
    (v.clone(), v).prop_map(|(a, b)| a.min(b)..=a.max(b))
}

fn port() -> impl Strategy<Value = u16> + Clone {
    prop_oneof![
        0u16..4,
        Just(1023),
        Just(1024),
        Just(u16::MAX),
        any::<u16>()
    ]
}

fn byte() -> impl Strategy<Value = u8> + Clone {
    prop_oneof![0u8..3, Just(u8::MAX)]
}

fn ports() -> impl Strategy<Value = Ports> {
    prop_oneof![
        3 => Just(Ports::Any),
        1 => Just(Ports::Opaque),
        3 => (span(port()), span(port())).prop_map(|(src, dst)| Ports::Range { src, dst }),
        1 => Just(Ports::Range { src: 0..=u16::MAX, dst: 0..=u16::MAX }),
        1 => (span(byte()), span(byte())).prop_map(|(kind, code)| Ports::Icmp { kind, code }),
    ]
}

fn proto() -> impl Strategy<Value = u8> {
    prop_oneof![Just(6u8), Just(17), Just(1), Just(58), Just(47)]
}

fn selector() -> impl Strategy<Value = Selector> {
    any::<bool>().prop_flat_map(|v6| {
        (
            addresses(v6),
            addresses(v6),
            prop::option::of(proto()),
            ports(),
        )
            .prop_map(|(src, dst, proto, ports)| Selector {
                src,
                dst,
                proto,
                ports,
            })
    })
}

fn policy_of(name: usize) -> impl Strategy<Value = Policy> {
    let action = prop_oneof![
        (0u32..3).prop_map(|t| protect(&format!("t{t}"))),
        Just(policy::Action::Bypass),
        Just(policy::Action::Discard),
    ];
    (
        0u32..4,
        prop::collection::vec(selector(), 1..4),
        action,
        prop::bool::weighted(0.9),
        0u16..2,
        0u32..2,
    )
        .prop_map(
            move |(priority, selectors, action, out, vrf, if_id)| Policy {
                name: format!("p{name}"),
                direction: if out { Direction::Out } else { Direction::In },
                priority,
                selectors,
                action,
                vrf: Vrf(vrf),
                if_id: IfId(if_id),
            },
        )
}

fn policies() -> impl Strategy<Value = Vec<Policy>> {
    (0usize..24).prop_flat_map(|n| (0..n).map(policy_of).collect::<Vec<_>>())
}

fn l4() -> impl Strategy<Value = L4> {
    prop_oneof![
        4 => (port(), port()).prop_map(|(src, dst)| L4::Ports { src, dst }),
        1 => (byte(), byte()).prop_map(|(kind, code)| L4::Icmp { kind, code }),
        1 => Just(L4::None),
        2 => Just(L4::Fragment),
        1 => Just(L4::FragmentUnknown),
    ]
}

fn packet() -> impl Strategy<Value = FlowKey> {
    any::<bool>()
        .prop_flat_map(|v6| (addr(v6), addr(v6), proto(), l4(), 0u16..2, 0u32..2))
        .prop_map(|(s, d, proto, l4, vrf, if_id)| {
            let k = FlowKey::new(s, d, proto, l4).expect("one family");
            k.with_vrf(Vrf(vrf)).with_if_id(IfId(if_id))
        })
}

fn assert_equals_reference(spd: &Spd, list: &[Policy], k: &FlowKey) -> Result<(), TestCaseError> {
    let v = spd.lookup(k);
    let (action, name) = reference::lookup(list, Direction::Out, k, tunnel);
    let decided = spd.policy(v.policy).map(|p| p.name.as_str());
    prop_assert_eq!((v.action, decided), (action, name), "{:?}", k);
    Ok(())
}

/// One step of an operator's work on the file.
#[derive(Clone, Debug)]
enum Edit {
    Insert(usize, Policy),
    Remove(usize),
    Replace(usize, Policy),
    Move(usize, usize),
}

fn edit() -> impl Strategy<Value = Edit> {
    prop_oneof![
        (any::<usize>(), policy_of(0)).prop_map(|(i, p)| Edit::Insert(i, p)),
        any::<usize>().prop_map(Edit::Remove),
        (any::<usize>(), policy_of(0)).prop_map(|(i, p)| Edit::Replace(i, p)),
        (any::<usize>(), any::<usize>()).prop_map(|(a, b)| Edit::Move(a, b)),
    ]
}

fn apply(list: &mut Vec<Policy>, edit: Edit, fresh: usize) {
    let n = list.len();
    match edit {
        Edit::Insert(i, mut p) => {
            p.name = format!("new{fresh}");
            list.insert(i % (n + 1), p);
        }
        Edit::Remove(i) if n > 0 => {
            list.remove(i % n);
        }
        Edit::Replace(i, mut p) if n > 0 => {
            p.name.clone_from(&list[i % n].name);
            list[i % n] = p;
        }
        Edit::Move(a, b) if n > 0 => {
            let p = list.remove(a % n);
            list.insert(b % n, p);
        }
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn look_up_equals_the_linear_reference(
        list in policies(),
        keys in prop::collection::vec(packet(), 40),
    ) {
        let spd = build(&list);
        for k in &keys {
            assert_equals_reference(&spd, &list, k)?;
        }
    }

    #[test]
    fn a_verdict_of_an_unmoved_generation_equals_a_fresh_look_up(
        mut list in policies(),
        edits in prop::collection::vec(prop::collection::vec(edit(), 1..4), 1..8),
        keys in prop::collection::vec(packet(), 40),
    ) {
        let mut spd = build(&list);
        let mut cache: Vec<_> = keys.iter().map(|k| (spd.lookup(k), spd.generation(k))).collect();
        for (n, step) in edits.into_iter().enumerate() {
            for (m, e) in step.into_iter().enumerate() {
                apply(&mut list, e, n * 10 + m);
            }
            spd = spd.updated(&list, tunnel).expect("valid policies").0;
            for (k, (verdict, generation)) in keys.iter().zip(&mut cache) {
                assert_equals_reference(&spd, &list, k)?;
                if spd.generation(k) == *generation {
                    prop_assert_eq!(spd.lookup(k), *verdict, "{:?}", k);
                } else {
                    (*verdict, *generation) = (spd.lookup(k), spd.generation(k));
                }
            }
        }
    }

    #[test]
    fn single_edits_decide_like_the_whole_list_and_leave_no_outdated_verdict(
        mut list in policies(),
        edits in prop::collection::vec((any::<usize>(), policy_of(0), any::<bool>()), 1..12),
        keys in prop::collection::vec(packet(), 40),
    ) {
        list.retain(|p| p.direction == Direction::Out);
        let mut spd = build(&list);
        let mut cache: Vec<_> = keys.iter().map(|k| (spd.lookup(k), spd.generation(k))).collect();
        for (n, (at, mut p, remove)) in edits.into_iter().enumerate() {
            // Every third policy is new.
            let at = at % (list.len() + list.len() / 2 + 1);
            p.direction = Direction::Out;
            p.name = list.get(at).map_or(format!("new{n}"), |old| old.name.clone());
            let edit = if remove && at < list.len() {
                list.remove(at);
                crate::spd::Edit::Remove(p.name)
            } else {
                match list.get_mut(at) {
                    Some(old) if old.priority == p.priority => *old = p.clone(),
                    old => {
                        if old.is_some() {
                            list.remove(at);
                        }
                        list.push(p.clone());
                    }
                }
                crate::spd::Edit::Put(p)
            };
            spd = spd.edited(&[edit], tunnel).expect("valid edit").0;
            prop_assert_eq!(spd.len(), list.len());
            for (k, (verdict, generation)) in keys.iter().zip(&mut cache) {
                assert_equals_reference(&spd, &list, k)?;
                if spd.generation(k) == *generation {
                    prop_assert_eq!(spd.lookup(k), *verdict, "{:?}", k);
                } else {
                    (*verdict, *generation) = (spd.lookup(k), spd.generation(k));
                }
            }
        }
        // The file that says the same finds nothing to do.
        let (_, changes) = spd.updated(&list, tunnel).expect("valid policies");
        prop_assert_eq!(changes, Changes::default());
    }

    #[test]
    fn a_selector_set_accepts_what_some_selector_accepts(
        selectors in prop::collection::vec(selector(), 0..30),
        keys in prop::collection::vec(packet(), 40),
    ) {
        let set = SelectorSet::new(&selectors);
        prop_assert_eq!(set.is_empty(), selectors.is_empty());
        for k in &keys {
            let one = |s: &Selector| {
                let mut p = pol("p", 0, s.clone(), policy::Action::Bypass);
                (p.vrf, p.if_id) = (k.vrf(), k.if_id());
                reference::lookup(&[p], Direction::Out, k, tunnel).0 == Action::Bypass
            };
            prop_assert_eq!(set.matches(k), selectors.iter().any(one), "{:?}", k);
        }
    }
}

#[test]
fn an_update_elsewhere_leaves_the_generation_of_a_destination() {
    let p = |n: &str, dst| pol(n, 5, sel(ANY, dst, None, Ports::Any), protect("t1"));
    let mut list = vec![p("a", "10.1.0.0/16"), p("b", "10.2.0.0/16")];
    let spd = build(&list);
    let (near, far) = (tcp("1.1.1.1", "10.2.3.4", 1), tcp("1.1.1.1", "10.1.3.4", 1));
    list.insert(0, p("c", "10.2.3.0/24"));
    let (next, changes) = spd.updated(&list, tunnel).expect("valid");
    assert!(!changes.voids_all);
    assert_eq!(next.generation(&far), spd.generation(&far));
    assert_ne!(next.generation(&near), spd.generation(&near));
    list.insert(0, p("d", ANY));
    let (wide, changes) = next.updated(&list, tunnel).expect("valid");
    assert!(changes.voids_all);
    assert_ne!(wide.generation(&far), next.generation(&far));
    let (same, changes) = wide.updated(&list, tunnel).expect("valid");
    assert_eq!(changes, Changes::default());
    assert_eq!(same.generation(&far), wide.generation(&far));
}

#[test]
fn order_and_unrelated_generations_survive_when_a_gap_is_used_up() {
    let p = |n: String, dst: &str| pol(&n, 5, sel(ANY, dst, None, Ports::Any), protect("t1"));
    let mut list = vec![p("a".into(), "10.1.0.0/16"), p("z".into(), "10.2.0.0/16")];
    let mut spd = build(&list);
    let far = tcp("1.1.1.1", "10.1.3.4", 1);
    let generation = spd.generation(&far);
    for n in 0..100 {
        list.insert(1, p(format!("n{n}"), "10.2.3.0/24"));
        spd = spd.updated(&list, tunnel).expect("valid").0;
        let v = spd.lookup(&tcp("1.1.1.1", "10.2.3.4", 1));
        let first = spd.policy(v.policy).map(|p| p.name.clone());
        assert_eq!(first, Some(format!("n{n}")));
    }
    assert_eq!(spd.generation(&far), generation);
}
