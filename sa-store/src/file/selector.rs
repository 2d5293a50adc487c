//! Traffic selectors of policies, tunnels and SAs.

use std::ops::RangeInclusive;

use crate::policy::{Ports, Selector};

use super::fault::{Fault, Problems};
use super::fields::{Fields, Scalar};
use super::value::{ICMP, ICMP6, ShownRange, addr_range, has_ports, number_range, proto, word};

/// Keys of a selector: by direction of travel in policies, from our side in tunnels and SAs.
pub(crate) struct SelectorNames {
    pub(crate) table: &'static str,
    src: &'static str,
    dst: &'static str,
    src_port: &'static str,
    dst_port: &'static str,
}

pub(crate) const TRAVEL: SelectorNames = SelectorNames {
    table: "policy.selectors",
    src: "src",
    dst: "dst",
    src_port: "src_port",
    dst_port: "dst_port",
};
pub(crate) const SIDED: SelectorNames = SelectorNames {
    table: "selectors",
    src: "local",
    dst: "remote",
    src_port: "local_port",
    dst_port: "remote_port",
};
pub(crate) const TRAVEL_KEYS: &[&str] = &[
    "src",
    "dst",
    "proto",
    "src_port",
    "dst_port",
    "icmp_type",
    "icmp_code",
    "ports",
];
pub(crate) const SIDED_KEYS: &[&str] = &[
    "local",
    "remote",
    "proto",
    "local_port",
    "remote_port",
    "icmp_type",
    "icmp_code",
    "ports",
];

/// Reads one selector; `None` when something in it is wrong.
pub(crate) fn selector(
    f: &Fields<'_, '_>,
    names: &SelectorNames,
    problems: &mut Problems,
) -> Option<Selector> {
    let before = problems.len();
    for key in [names.src, names.dst] {
        if !f.has(key) {
            let example = "an address prefix, 0.0.0.0/0 or ::/0 for any";
            f.missing(key, example, problems);
        }
    }
    let src = f.text(names.src, problems, |v| addr_range(names.src, v));
    let dst = f.text(names.dst, problems, |v| addr_range(names.dst, v));
    if let (Some(s), Some(d)) = (&src, &dst)
        && s.v.first().is_ipv4() != d.v.first().is_ipv4()
    {
        problems.push(
            &d.at,
            Fault::FamilyMismatch {
                a: ShownRange(s.v).to_string(),
                b: ShownRange(d.v).to_string(),
            },
        );
    }
    let proto = f.scalar("proto", "a string or a number", problems, |v| match v {
        Scalar::Text(s) => proto("proto", s),
        Scalar::Number(n) => u8::try_from(n).map_err(|_| Fault::OutOfRange {
            key: "proto".into(),
            got: n.to_string(),
            min: 0,
            max: 255,
        }),
    });
    let ports = ports(f, names, proto.as_ref().map(|p| p.v), problems);
    let (src, dst) = (src?, dst?);
    (problems.len() == before).then(|| Selector {
        src: src.v,
        dst: dst.v,
        proto: proto.map(|p| p.v),
        ports,
    })
}

fn ports(
    f: &Fields<'_, '_>,
    names: &SelectorNames,
    proto: Option<u8>,
    problems: &mut Problems,
) -> Ports {
    let range16 = |key: &'static str, problems: &mut Problems| {
        f.scalar(key, "a number or a string \"a-b\"", problems, |v| {
            range(key, v, u16::MAX)
        })
    };
    let range8 = |key: &'static str, problems: &mut Problems| {
        f.scalar(key, "a number or a string \"a-b\"", problems, |v| {
            range(key, v, u8::MAX)
        })
    };
    let src = range16(names.src_port, problems);
    let dst = range16(names.dst_port, problems);
    let kind = range8("icmp_type", problems);
    let code = range8("icmp_code", problems);
    let opaque = f.text("ports", problems, |v| {
        word("ports", v, &[("opaque", true), ("any", false)])
    });
    let with_ports = [(names.src_port, &src), (names.dst_port, &dst)];
    for (key, v) in with_ports {
        if let Some(v) = v
            && !proto.is_some_and(has_ports)
        {
            let need = "proto = \"tcp\", \"udp\", \"sctp\", \"dccp\" or \"udplite\"";
            problems.push(&v.at, Fault::Needs { key, need });
        }
    }
    for (key, v) in [("icmp_type", &kind), ("icmp_code", &code)] {
        if let Some(v) = v
            && !matches!(proto, Some(ICMP | ICMP6))
        {
            let need = "proto = \"icmp\" or \"icmpv6\"";
            problems.push(&v.at, Fault::Needs { key, need });
        }
    }
    let any_range = src.is_some() || dst.is_some() || kind.is_some() || code.is_some();
    if let (Some(o), true) = (&opaque, any_range) {
        problems.push(
            &o.at,
            Fault::Conflict {
                a: "ports",
                b: "port or ICMP ranges",
            },
        );
    }
    if opaque.is_some_and(|o| o.v) {
        Ports::Opaque
    } else if src.is_some() || dst.is_some() {
        Ports::Range {
            src: src.map_or(0..=u16::MAX, |a| a.v),
            dst: dst.map_or(0..=u16::MAX, |a| a.v),
        }
    } else if kind.is_some() || code.is_some() {
        Ports::Icmp {
            kind: kind.map_or(0..=u8::MAX, |a| a.v),
            code: code.map_or(0..=u8::MAX, |a| a.v),
        }
    } else {
        Ports::Any
    }
}

fn range<T>(key: &str, v: Scalar<'_>, max: T) -> Result<RangeInclusive<T>, Fault>
where
    T: std::str::FromStr + PartialOrd + Copy + TryFrom<u64> + Into<u64>,
{
    match v {
        Scalar::Text(s) => number_range(key, s),
        Scalar::Number(n) => T::try_from(n)
            .map(|n| n..=n)
            .map_err(|_| Fault::OutOfRange {
                key: key.into(),
                got: n.to_string(),
                min: 0,
                max: max.into(),
            }),
    }
}
