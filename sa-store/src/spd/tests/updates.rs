//! What an update changes, and what it leaves: numbers of policies, generations of destinations.

use super::*;

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
