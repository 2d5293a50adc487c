//! Fragments hide their ports: which policy decides on them.

use super::*;

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
