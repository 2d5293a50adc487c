//! The SPD as RFC 4301 words it, one policy after the other: what the compiled form is tested against.

use super::{Action, TunnelIdx};
use crate::flow::{FlowKey, L4};
use crate::policy::{self, Policy, Ports, Selector};
use crate::sa::Direction;

/// How a selector relates to a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fit {
    No,
    /// It would depend on fields that a fragment hides.
    Hidden,
    Yes,
    /// Yes, and it is meant for packets with hidden ports.
    Opaque,
}

/// Action and name of the deciding policy.
pub(super) fn lookup<'a>(
    policies: &'a [Policy],
    direction: Direction,
    key: &FlowKey,
    tunnel: impl Fn(&str) -> Option<TunnelIdx>,
) -> (Action, Option<&'a str>) {
    let mut order: Vec<&Policy> = policies
        .iter()
        .filter(|p| p.direction == direction)
        .collect();
    order.sort_by_key(|p| p.priority);
    let mut passed_over: Vec<(Action, &str)> = Vec::new();
    for p in order {
        if p.vrf != key.vrf() || p.if_id.0 != 0 && p.if_id != key.if_id() {
            continue;
        }
        let action = match &p.action {
            policy::Action::Bypass => Action::Bypass,
            policy::Action::Discard => Action::Discard,
            policy::Action::Protect { tunnel: name } => Action::Protect {
                tunnel: tunnel(name).expect("tunnel of the test"),
            },
        };
        let fits: Vec<Fit> = p.selectors.iter().map(|s| fit(s, key)).collect();
        if fits.contains(&Fit::Opaque) {
            return (action, Some(&p.name));
        }
        if fits.contains(&Fit::Yes) {
            let conflict = passed_over.iter().find(|(a, _)| match action {
                Action::Discard => false,
                Action::Bypass => *a != Action::Bypass,
                _ => *a != Action::Bypass && *a != action,
            });
            return match conflict {
                Some((_, name)) => (Action::FragmentPolicy, Some(name)),
                None => (action, Some(&p.name)),
            };
        }
        if fits.contains(&Fit::Hidden) {
            passed_over.push((action, &p.name));
        }
    }
    match passed_over.first() {
        Some((_, name)) => (Action::FragmentPolicy, Some(name)),
        None => (Action::Discard, None),
    }
}

fn fit(s: &Selector, k: &FlowKey) -> Fit {
    if !s.src.contains(k.src()) || !s.dst.contains(k.dst()) {
        return Fit::No;
    }
    let l4 = k.l4();
    if l4 == L4::FragmentUnknown {
        return match (s.proto, &s.ports) {
            (None, Ports::Any) => Fit::Yes,
            (None, Ports::Opaque) => Fit::Opaque,
            _ => Fit::Hidden,
        };
    }
    if s.proto.is_some_and(|p| p != k.proto()) {
        return Fit::No;
    }
    let carries_ports = [6, 17, 33, 132, 136].contains(&k.proto());
    let carries_icmp = [1, 58].contains(&k.proto());
    let yes = |b: bool| if b { Fit::Yes } else { Fit::No };
    match (&s.ports, l4) {
        (Ports::Any, _) => Fit::Yes,
        (Ports::Opaque, L4::Fragment) => Fit::Opaque,
        (Ports::Opaque, _) => Fit::No,
        (Ports::Range { src, dst }, L4::Ports { src: s, dst: d }) => {
            yes(src.contains(&s) && dst.contains(&d))
        }
        (Ports::Range { src, dst }, L4::Fragment) if carries_ports => {
            let all = *src == (0..=u16::MAX) && *dst == (0..=u16::MAX) && s.proto.is_some();
            if all { Fit::Yes } else { Fit::Hidden }
        }
        (Ports::Icmp { kind, code }, L4::Icmp { kind: t, code: c }) => {
            yes(kind.contains(&t) && code.contains(&c))
        }
        (Ports::Icmp { kind, code }, L4::Fragment) if carries_icmp => {
            let all = *kind == (0..=u8::MAX) && *code == (0..=u8::MAX) && s.proto.is_some();
            if all { Fit::Yes } else { Fit::Hidden }
        }
        _ => Fit::No,
    }
}
