//! Configurations at random: what is written reads back equal, and no text makes the reader panic.

use super::*;
use crate::sa::{Df, IfId, Limits, OffloadMode, SaKeys, Spi, UdpEncap, Vrf};
use crate::suite::Suite;
use proptest::prelude::*;
use std::net::IpAddr;
use zeroize::Zeroizing;

fn limits() -> impl Strategy<Value = Limits> {
    let some = || prop::option::of(1u64..=u64::MAX / 2);
    (some(), some(), some()).prop_map(|(packets, bytes, seconds)| Limits {
        packets,
        bytes,
        seconds,
    })
}

fn range() -> impl Strategy<Value = (AddrRange, AddrRange)> {
    let v4 = (any::<[u32; 4]>()).prop_map(|a| {
        let r = |x: u32, y: u32| {
            AddrRange::new(IpAddr::V4(x.min(y).into()), IpAddr::V4(x.max(y).into())).unwrap()
        };
        (r(a[0], a[1]), r(a[2], a[3]))
    });
    let v6 = (any::<[u128; 2]>(), 0u8..=128).prop_map(|(a, len)| {
        let p = |x: u128| AddrRange::prefix(IpAddr::V6(x.into()), len).unwrap();
        (p(a[0]), p(a[1]))
    });
    prop_oneof![v4, v6]
}

fn selector() -> impl Strategy<Value = Selector> {
    let upper = prop_oneof![
        (prop::option::of(any::<u8>())).prop_map(|p| (p, Ports::Any)),
        Just((None, Ports::Opaque)),
        (any::<[u16; 4]>()).prop_map(|p| (
            Some(6),
            Ports::Range {
                src: p[0].min(p[1])..=p[0].max(p[1]),
                dst: p[2].min(p[3])..=p[2].max(p[3]),
            }
        )),
        any::<(u8, u8)>().prop_map(|(k, c)| (
            Some(58),
            Ports::Icmp {
                kind: k..=255,
                code: 0..=c,
            }
        )),
    ];
    (range(), upper).prop_map(|((src, dst), (proto, ports))| Selector {
        src,
        dst,
        proto,
        ports,
    })
}

fn settings() -> impl Strategy<Value = Settings> {
    let a = (
        any::<bool>(),
        5u32..=20,
        limits(),
        prop::option::of(any::<[u16; 2]>()),
    );
    let b = (
        prop_oneof![Just(Dscp::Copy), (0u8..64).prop_map(Dscp::Fixed)],
        prop_oneof![Just(Df::Copy), Just(Df::Set), Just(Df::Clear)],
        any::<bool>(),
        1u8..,
        prop::option::of(1280u16..),
        (any::<u16>(), 0u16..=10_000).prop_map(|(p, d)| Tfc::of(p, d)),
        any::<bool>(),
    );
    let c = (
        prop_oneof![
            Just((OffloadMode::Software, None)),
            Just((OffloadMode::Crypto, None)),
            Just((OffloadMode::Packet, Some("soe0".to_owned()))),
        ],
        prop::collection::vec(selector(), 0..3),
    );
    (a, b, c).prop_map(
        |((esn, w, soft, ports), b, (offload, selectors))| Settings {
            esn,
            window: 1 << w,
            soft,
            hard: Limits {
                packets: soft.packets.map(|p| p + 1),
                bytes: soft.bytes,
                seconds: None,
            },
            encap: ports.map(|[s, d]| UdpEncap {
                sport: s.max(1),
                dport: d.max(1),
            }),
            dscp: b.0,
            df: b.1,
            ecn: b.2,
            ttl: b.3,
            pmtu: b.4,
            tfc: b.5,
            mss_clamp: b.6,
            offload: offload.0,
            engine: offload.1,
            selectors,
        },
    )
}

fn config() -> impl Strategy<Value = Config> {
    let suite = prop::sample::select(Suite::all());
    let sa = (
        suite,
        any::<bool>(),
        settings(),
        any::<[u8; 32]>(),
        any::<bool>(),
    );
    let sas = prop::collection::vec(sa, 0..4);
    let head = (any::<bool>(), any::<u16>(), any::<u32>(), settings());
    let policies = prop::collection::vec(
        (
            any::<u32>(),
            any::<bool>(),
            0u8..3,
            prop::collection::vec(selector(), 1..3),
        ),
        0..3,
    );
    (head, sas, policies).prop_map(|((transport, vrf, if_id, base), sas, policies)| {
        let mut t = Tunnel::new(
            "t",
            "192.0.2.1".parse().unwrap(),
            "192.0.2.2".parse().unwrap(),
        );
        t.mode = if transport {
            Mode::Transport
        } else {
            Mode::Tunnel
        };
        (t.vrf, t.if_id) = (Vrf(vrf), IfId(if_id));
        t.suite = sas.first().map(|s| s.0);
        t.settings = base;
        let mut c = Config::default();
        for (i, (suite, out, settings, seed, named)) in (0u32..).zip(sas) {
            let spi = Spi::new(0x100 + i).unwrap();
            let direction = if out { Direction::Out } else { Direction::In };
            let bytes = |n: usize, salt: u8| {
                let mix = |j: usize| {
                    seed[j % 32]
                        ^ salt.wrapping_mul(u8::try_from(j).unwrap())
                        ^ u8::try_from(i).unwrap()
                };
                Zeroizing::new((0..n).map(mix).collect::<Vec<u8>>())
            };
            let id = SaIdentity {
                name: if named {
                    format!("sa-{i}")
                } else {
                    default_sa_name("t", direction, spi)
                },
                direction,
                spi,
                suite,
                keys: SaKeys {
                    enc: bytes(suite.enc_key_len(), 1),
                    auth: bytes(suite.auth_key_len(), 7),
                },
                first_use: named,
            };
            c.sas.push(t.sa(id, &settings));
        }
        for (i, (priority, out, action, selectors)) in policies.into_iter().enumerate() {
            c.policies.push(crate::policy::Policy {
                name: format!("p{i}"),
                direction: if out { Direction::Out } else { Direction::In },
                priority,
                selectors,
                action: match action {
                    0 => Action::Protect { tunnel: "t".into() },
                    1 => Action::Bypass,
                    _ => Action::Discard,
                },
                vrf: t.vrf,
                if_id: t.if_id,
            });
        }
        c.tunnels.push(t);
        c
    })
}

proptest! {
    #[test]
    fn whatever_is_written_reads_back_equal(c in config()) {
        let text = to_toml(&c).unwrap();
        let back = one(&text).map_err(|p| TestCaseError::fail(format!("{p}\n{}", text.as_str())))?;
        prop_assert_eq!(back, c);
    }

    #[test]
    fn arbitrary_text_never_panics(text in "(\\PC|\n){0,300}") {
        fuzz_parse(text.as_bytes());
    }

    #[test]
    fn damaged_files_never_panic(at in any::<prop::sample::Index>(), with in "\\PC{0,3}") {
        let text = std::fs::read_to_string(EXAMPLE).unwrap();
        let mut cut = at.index(text.len());
        while !text.is_char_boundary(cut) { cut -= 1; }
        let next = text[cut..].chars().next().map_or(0, char::len_utf8);
        fuzz_parse(format!("{}{with}{}", &text[..cut], &text[cut + next..]).as_bytes());
    }
}
