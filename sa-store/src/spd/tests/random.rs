//! Random policies over a small universe, so that packets meet many of them, against the linear reference.

use std::net::IpAddr;

use proptest::prelude::*;

use super::*;

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
