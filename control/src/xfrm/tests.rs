//! Messages as the kernel encodes them, and what becomes of them.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use netlink_packet_core::{NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_xfrm::constants::XFRM_MSG_MIGRATE;
use netlink_packet_xfrm::policy::ModifyMessage as PolicyMessage;
use netlink_packet_xfrm::state::ModifyMessage as SaMessage;
use netlink_packet_xfrm::{
    AlgAead, EncapTmpl, Replay, UserPolicyInfo, UserSaInfo, UserTemplate, XfrmAttrs, XfrmMessage,
};
use sa_store::file::Config;
use sa_store::policy::Action;
use sa_store::sa::{Direction, UdpEncap};

use super::message::{Change, KernelSa, SaKey, change};
use super::picture::Picture;
use super::seize::{Past, last_number, past};
use super::settings::{Settings, Take};
use super::socket::{Decoded, decode};
use super::table::Table;
use super::translate::Seized;

const OURS: &str = "192.0.2.1";
const PEER: &str = "192.0.2.2";

fn ip(s: &str) -> IpAddr {
    s.parse().expect("an address")
}

fn sa_message(src: &str, dst: &str, spi: u32, more: Vec<XfrmAttrs>) -> XfrmMessage {
    let mut info = UserSaInfo {
        reqid: 7,
        mode: 1,
        replay_window: 32,
        ..UserSaInfo::default()
    };
    info.source(&ip(src));
    info.destination(&ip(dst));
    info.id.spi = spi;
    info.id.proto = 50;
    let mut name = [0; 64];
    name[..17].copy_from_slice(b"rfc4106(gcm(aes))");
    let mut nlas = vec![XfrmAttrs::EncryptionAlgAead(AlgAead {
        alg_name: name,
        alg_key_len: 160,
        alg_icv_len: 128,
        alg_key: (0..20).map(|i| i ^ spi.to_le_bytes()[0]).collect(),
    })];
    nlas.extend(more);
    XfrmMessage::AddSa(SaMessage {
        user_sa_info: info,
        nlas,
    })
}

fn policy_message(direction: u8, src: &str, dst: &str, ends: (&str, &str)) -> XfrmMessage {
    let mut info = UserPolicyInfo {
        direction,
        priority: 100,
        ..UserPolicyInfo::default()
    };
    info.selector.source_prefix(&ip(src), 24);
    info.selector.destination_prefix(&ip(dst), 24);
    let mut template = UserTemplate::default();
    template.source(&ip(ends.0));
    template.destination(&ip(ends.1));
    template.protocol(50);
    template.mode(1);
    template.reqid(7);
    XfrmMessage::AddPolicy(PolicyMessage {
        user_policy_info: info,
        nlas: vec![XfrmAttrs::Template(vec![template])],
    })
}

/// An SA of a request id of its own, out to a peer or in from it.
pub(super) fn sa_of(out: bool, peer: IpAddr, reqid: u32, spi: u32) -> XfrmMessage {
    let peer = peer.to_string();
    let (src, dst) = if out { (OURS, &*peer) } else { (&*peer, OURS) };
    let XfrmMessage::AddSa(mut m) = sa_message(src, dst, spi, Vec::new()) else {
        panic!("an SA");
    };
    m.user_sa_info.reqid = reqid;
    for a in &mut m.nlas {
        if let XfrmAttrs::EncryptionAlgAead(a) = a {
            a.alg_key[..4].copy_from_slice(&spi.to_le_bytes());
        }
    }
    XfrmMessage::AddSa(m)
}

/// The policy of that request id, for one peer address behind it.
pub(super) fn policy_of(way: u8, peer: IpAddr, reqid: u32) -> XfrmMessage {
    let peer = peer.to_string();
    let far = std::net::Ipv4Addr::from(0x0a02_0000 + reqid).to_string();
    let near = "10.1.0.0";
    let (src, dst, ends) = match way {
        1 => (near, &*far, (OURS, &*peer)),
        _ => (&*far, near, (&*peer, OURS)),
    };
    let XfrmMessage::AddPolicy(mut m) = policy_message(way, src, dst, ends) else {
        panic!("a policy");
    };
    let s = &mut m.user_policy_info.selector;
    if way == 1 {
        s.prefixlen_d = 32;
    } else {
        s.prefixlen_s = 32;
    }
    for a in &mut m.nlas {
        if let XfrmAttrs::Template(t) = a {
            t[0].reqid(reqid);
        }
    }
    XfrmMessage::AddPolicy(m)
}

/// Through the wire format and back.
pub(super) fn heard(message: XfrmMessage) -> Change {
    let mut whole = NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::from(message));
    whole.finalize();
    let mut bytes = vec![0; whole.buffer_len()];
    whole.serialize(&mut bytes);
    let mut got = None;
    decode(&bytes, &mut |m| match m {
        Decoded::Message(m) => got = change(*m),
        _ => panic!("not a message"),
    });
    got.expect("news")
}

fn sa(message: XfrmMessage) -> KernelSa {
    match heard(message) {
        Change::Sa(sa) => *sa,
        other => panic!("{other:?}"),
    }
}

fn table(messages: Vec<XfrmMessage>) -> Table {
    let mut table = Table::default();
    for m in messages {
        table.apply(heard(m));
    }
    table
}

/// All parts as if they were one.
#[derive(Default)]
struct Whole {
    config: Config,
    senders: HashMap<String, String>,
    left: BTreeMap<String, String>,
}

fn translated(table: &Table, settings: &Settings) -> Whole {
    let ours = |a: IpAddr| a == ip(OURS);
    let all = |_: &SaKey| Some(Seized::Ours { first_use: true });
    let mut picture = Picture::default();
    picture.regroup_all(table, &ours);
    let drawn = picture.draw(table, settings, &ours, &all);
    let mut whole = Whole {
        left: drawn.left.into_iter().collect(),
        ..Whole::default()
    };
    for (_, part) in drawn.parts {
        whole.config.tunnels.extend(part.config.tunnels);
        whole.config.sas.extend(part.config.sas);
        whole.config.policies.extend(part.config.policies);
        whole.senders.extend(part.senders);
    }
    whole
}

fn pair() -> Vec<XfrmMessage> {
    vec![
        sa_message(OURS, PEER, 0x1001, Vec::new()),
        sa_message(PEER, OURS, 0x2001, Vec::new()),
        policy_message(1, "10.1.0.0", "10.2.0.0", (OURS, PEER)),
        policy_message(0, "10.2.0.0", "10.1.0.0", (PEER, OURS)),
        policy_message(2, "10.2.0.0", "10.1.0.0", (PEER, OURS)),
    ]
}

#[test]
fn a_pair_of_sas_and_its_policies_become_a_tunnel_with_two_policies() {
    let t = translated(&table(pair()), &Settings::default());
    assert!(t.left.is_empty(), "{:?}", t.left);
    let [tunnel] = &t.config.tunnels[..] else {
        panic!("{:?}", t.config.tunnels);
    };
    assert_eq!(tunnel.name, "ike:7@192.0.2.2");
    let [out, inbound] = &t.config.sas[..] else {
        panic!("two SAs");
    };
    assert_eq!(
        (out.direction, inbound.direction),
        (Direction::Out, Direction::In)
    );
    assert_eq!((out.src, out.dst), (ip(OURS), ip(PEER)));
    assert_eq!((inbound.src, inbound.dst), (ip(PEER), ip(OURS)));
    assert_eq!(out.suite.to_string(), "aes-128-gcm-16");
    // Of the policies for received and for forwarded packets, one is enough.
    let [a, b] = &t.config.policies[..] else {
        panic!("{:?}", t.config.policies);
    };
    let protect = Action::Protect {
        tunnel: tunnel.name.clone(),
    };
    assert_eq!((&a.action, &b.action), (&protect, &protect));
    assert_ne!(a.direction, b.direction);
    assert_eq!(t.senders[&tunnel.name], out.name);
}

#[test]
fn the_latest_outbound_sa_sends_whatever_the_order_of_a_later_dump() {
    let mut messages = pair();
    messages.push(sa_message(OURS, PEER, 0x1002, Vec::new()));
    let mut table = table(messages);
    let sender = |t: &Table| translated(t, &Settings::default()).senders["ike:7@192.0.2.2"].clone();
    assert!(sender(&table).ends_with("out-00001002"));
    // The hash of SPIs decides the order of the kernel's dump.
    let mut sas: Vec<KernelSa> = table.sas().cloned().collect();
    sas.sort_by_key(|s| std::cmp::Reverse(s.key));
    let policies = table.policies().cloned().collect();
    table.replace(sas, policies);
    assert!(sender(&table).ends_with("out-00001002"));
}

#[test]
fn a_policy_without_sas_is_a_trap_and_protects() {
    let t = translated(
        &table(vec![policy_message(
            1,
            "10.1.0.0",
            "10.2.0.0",
            (OURS, PEER),
        )]),
        &Settings::default(),
    );
    assert_eq!(t.config.policies.len(), 1);
    assert_eq!(t.config.tunnels.len(), 1);
    assert!(t.config.sas.is_empty());
}

#[test]
fn a_trap_that_names_no_ends_is_taken_as_libreswan_sets_it() {
    let XfrmMessage::AddPolicy(mut m) =
        policy_message(1, "10.1.0.0", "10.2.0.0", ("0.0.0.0", "0.0.0.0"))
    else {
        panic!("a policy");
    };
    for a in &mut m.nlas {
        if let XfrmAttrs::Template(t) = a {
            t[0].mode(0);
            t[0].reqid(0);
        }
    }
    let t = translated(
        &table(vec![XfrmMessage::AddPolicy(m)]),
        &Settings::default(),
    );
    assert!(t.left.is_empty(), "{:?}", t.left);
    let protect = Action::Protect {
        tunnel: "ike:trap".into(),
    };
    assert_eq!(t.config.policies[0].action, protect);
}

#[test]
fn what_is_not_the_gateways_stays_with_the_kernel_and_is_named() {
    let t = translated(
        &table(vec![
            sa_message("198.51.100.1", "198.51.100.2", 0x3001, Vec::new()),
            policy_message(1, "10.1.0.0", "10.2.0.0", ("198.51.100.1", "198.51.100.2")),
        ]),
        &Settings::default(),
    );
    assert!(t.config.sas.is_empty() && t.config.policies.is_empty());
    assert_eq!(t.left.len(), 2, "{:?}", t.left);
    assert!(t.left["SA 0x00003001 to 198.51.100.2"].contains("gateway's"));
}

#[test]
fn only_what_a_rule_fits_is_taken() {
    let settings = Settings {
        take: vec![Take {
            reqid: Some((8, 9)),
            ..Take::default()
        }],
        ..Settings::default()
    };
    let t = translated(&table(pair()), &settings);
    assert!(t.config.sas.is_empty());
    assert!(t.left.values().any(|why| why.contains("configuration")));
}

#[test]
fn a_policy_of_one_interface_is_taken_only_by_a_rule_for_it() {
    let rule = |interface| Settings {
        take: vec![Take {
            interface,
            ..Take::default()
        }],
        ..Settings::default()
    };
    let Change::Policy(policy) = heard(policy_message(1, "10.1.0.0", "10.2.0.0", (OURS, PEER)))
    else {
        panic!("a policy");
    };
    let mut key = policy.key;
    assert!(rule(None).takes_policy(&key, None));
    key.interface = 3;
    assert!(!Settings::default().takes_policy(&key, None));
    assert!(!rule(None).takes_policy(&key, None));
    assert!(!rule(Some(2)).takes_policy(&key, None));
    assert!(rule(Some(3)).takes_policy(&key, None));
}

#[test]
fn an_xfrm_interfaces_sas_carry_what_its_own_policies_say() {
    let on = |if_id, m: XfrmMessage| match m {
        XfrmMessage::AddSa(mut m) => {
            m.nlas.push(XfrmAttrs::IfId(if_id));
            XfrmMessage::AddSa(m)
        }
        XfrmMessage::AddPolicy(mut m) => {
            m.nlas.push(XfrmAttrs::IfId(if_id));
            XfrmMessage::AddPolicy(m)
        }
        other => other,
    };
    let mut messages: Vec<_> = pair().into_iter().map(|m| on(5, m)).collect();
    messages.push(on(6, sa_message(OURS, PEER, 0x1006, Vec::new())));
    messages.push(on(
        6,
        policy_message(1, "10.1.0.0", "10.6.0.0", (OURS, PEER)),
    ));
    let t = translated(&table(messages), &Settings::default());
    assert!(t.config.policies.is_empty(), "routes lead there");
    let carries = |spi| {
        let sa = t.config.sas.iter().find(|s| s.spi.value() == spi);
        let [one] = &sa.expect("the SA").selectors[..] else {
            panic!("one selector");
        };
        one.dst.first()
    };
    assert_eq!(carries(0x1001), ip("10.2.0.0"));
    assert_eq!(carries(0x1006), ip("10.6.0.0"));
}

#[test]
fn sas_that_migrate_are_heard_of_although_nobody_decodes_how() {
    let mut bytes = vec![0; 16 + 64];
    bytes[..4].copy_from_slice(&80_u32.to_ne_bytes());
    bytes[4..6].copy_from_slice(&XFRM_MSG_MIGRATE.to_ne_bytes());
    let mut moved = 0;
    decode(&bytes, &mut |m| match m {
        Decoded::Migrated => moved += 1,
        _ => panic!("something else"),
    });
    assert_eq!(moved, 1);
}

#[test]
fn ports_of_udp_encapsulation_are_those_of_the_sas_own_direction() {
    let udp = |sport, dport| {
        vec![XfrmAttrs::EncapsulationTemplate(EncapTmpl {
            encap_type: 2,
            encap_sport: sport,
            encap_dport: dport,
            ..EncapTmpl::default()
        })]
    };
    let t = translated(
        &table(vec![
            sa_message(OURS, PEER, 0x1001, udp(4500, 61000)),
            sa_message(PEER, OURS, 0x2001, udp(61000, 4500)),
        ]),
        &Settings::default(),
    );
    let encap = |sport, dport| Some(UdpEncap { sport, dport });
    assert_eq!(t.config.sas[0].encap, encap(4500, 61000));
    assert_eq!(t.config.sas[1].encap, encap(61000, 4500));
}

#[test]
fn an_sa_that_the_kernel_has_sent_with_is_told_from_one_that_a_gateway_had() {
    let with = |oseq| {
        sa(sa_message(
            OURS,
            PEER,
            0x1001,
            vec![XfrmAttrs::ReplayState(Replay {
                oseq,
                seq: 0,
                bitmap: 0,
            })],
        ))
    };
    assert_eq!(past(&with(0), Direction::Out), Past::Fresh);
    assert_eq!(past(&with(1), Direction::Out), Past::Used);
    assert_eq!(past(&with(u32::MAX), Direction::Out), Past::Taken);
    assert_eq!(last_number(&with(0)), u64::from(u32::MAX));
    let mut counted = with(0);
    counted.carried.packets = 1;
    assert_eq!(past(&counted, Direction::Out), Past::Used);
    // Inbound, the mark is the time of first use.
    assert_eq!(past(&with(0), Direction::In), Past::Fresh);
    let mut marked = with(0);
    marked.carried.use_time = 1;
    assert_eq!(past(&marked, Direction::In), Past::Taken);
}

#[test]
fn keys_are_not_in_debug_output() {
    let text = format!("{:?}", sa(sa_message(OURS, PEER, 0x1001, Vec::new())));
    assert!(text.contains("SaKeys(..)"), "{text}");
}

#[test]
fn an_ended_sa_is_gone_by_deletion_expiry_and_flush() {
    let key = SaKey {
        dst: ip(PEER),
        spi: 0x1001,
        mark: (0, 0),
    };
    for end in [
        Change::SaGone(key),
        Change::SaExpired {
            dst: key.dst,
            spi: key.spi,
        },
        Change::SasFlushed,
    ] {
        let mut t = table(pair());
        t.take_touched();
        t.apply(end.clone());
        assert!(t.take_touched().ended.contains(&key), "{end:?}");
        assert!(t.sa(&key).is_none());
        t.apply(end);
        assert!(t.take_touched().is_empty(), "a second time nothing changes");
    }
}

#[test]
fn no_datagram_makes_the_decoder_fail() {
    // Cut short anywhere, and with any byte changed.
    let mut whole = NetlinkMessage::new(
        NetlinkHeader::default(),
        NetlinkPayload::from(sa_message(OURS, PEER, 0x1001, Vec::new())),
    );
    whole.finalize();
    let mut bytes = vec![0; whole.buffer_len()];
    whole.serialize(&mut bytes);
    let look = |bytes: &[u8]| {
        decode(bytes, &mut |m| {
            if let Decoded::Message(m) = m {
                let _ = change(*m);
            }
        });
    };
    for n in 0..bytes.len() {
        look(&bytes[..n]);
        let mut other = bytes.clone();
        for value in [0, 1, 0x7f, 0xff] {
            other[n] = value;
            look(&other);
        }
    }
    for kind in 0..0x40_u8 {
        let mut other = bytes.clone();
        other[4] = kind;
        for n in (0..other.len()).step_by(4) {
            other[..4].copy_from_slice(&u32::try_from(n).expect("small").to_ne_bytes());
            look(&other);
        }
    }
}
