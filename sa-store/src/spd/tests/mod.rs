mod fragments;
mod random;
mod updates;

use super::*;
use crate::drops::DropReason;
use crate::flow::L4;
use crate::policy::{self, AddrRange, Ports, Selector};
use crate::sa::{IfId, Vrf};

fn tunnel(name: &str) -> Option<TunnelIdx> {
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
