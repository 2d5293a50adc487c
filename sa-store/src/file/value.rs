//! Notations of single values: how an address range, a duration, a DSCP, a key are written and read.

use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use zeroize::Zeroizing;

use crate::policy::AddrRange;
use crate::sa::{Df, Direction, Dscp, Mode, OffloadMode};
use crate::suite::Suite;

use super::fault::{Fault, nearest};
use super::model::MIRROR_PREFIX;

/// Longest name of a tunnel or policy, bytes.
pub(crate) const MAX_NAME: usize = 63;
/// Longest name of an SA: the tunnel's with direction and SPI behind it fits.
pub(crate) const MAX_SA_NAME: usize = 80;

/// Closed set of words with their meanings.
pub(crate) type Words<T> = &'static [(&'static str, T)];

pub(crate) const DIRECTIONS: Words<Direction> = &[("in", Direction::In), ("out", Direction::Out)];
pub(crate) const MODES: Words<Mode> = &[("tunnel", Mode::Tunnel), ("transport", Mode::Transport)];
pub(crate) const DFS: Words<Df> = &[("copy", Df::Copy), ("set", Df::Set), ("clear", Df::Clear)];
pub(crate) const OFFLOADS: Words<OffloadMode> = &[
    ("software", OffloadMode::Software),
    ("crypto", OffloadMode::Crypto),
    ("packet", OffloadMode::Packet),
];
/// DSCP names of RFC 2474, 2597, 3246, 5865 and 8622.
pub(crate) const DSCPS: Words<u8> = &[
    ("cs0", 0),
    ("le", 1),
    ("cs1", 8),
    ("af11", 10),
    ("af12", 12),
    ("af13", 14),
    ("cs2", 16),
    ("af21", 18),
    ("af22", 20),
    ("af23", 22),
    ("cs3", 24),
    ("af31", 26),
    ("af32", 28),
    ("af33", 30),
    ("cs4", 32),
    ("af41", 34),
    ("af42", 36),
    ("af43", 38),
    ("cs5", 40),
    ("voice-admit", 44),
    ("ef", 46),
    ("cs6", 48),
    ("cs7", 56),
];
/// Upper-layer protocols by their IANA keywords.
pub(crate) const PROTOS: Words<u8> = &[
    ("icmp", 1),
    ("igmp", 2),
    ("ipip", 4),
    ("tcp", 6),
    ("udp", 17),
    ("dccp", 33),
    ("ipv6", 41),
    ("gre", 47),
    ("esp", 50),
    ("ah", 51),
    ("icmpv6", 58),
    ("ospf", 89),
    ("pim", 103),
    ("vrrp", 112),
    ("l2tp", 115),
    ("sctp", 132),
    ("mobility", 135),
    ("udplite", 136),
];

pub(crate) const ICMP: u8 = 1;
pub(crate) const ICMP6: u8 = 58;

/// Whether the protocol has ports that a selector can name.
pub(crate) fn has_ports(proto: u8) -> bool {
    matches!(proto, 6 | 17 | 33 | 132 | 136)
}

/// The meaning of a word of a closed set.
pub(crate) fn word<T: Copy>(key: &str, got: &str, words: Words<T>) -> Result<T, Fault> {
    words
        .iter()
        .find(|(w, _)| *w == got)
        .map(|(_, t)| *t)
        .ok_or_else(|| Fault::BadValue {
            key: key.into(),
            got: shown(got),
            suggestion: nearest(got, words.iter().map(|(w, _)| *w)),
            want: quoted(words.iter().map(|(w, _)| *w)),
        })
}

/// The word for a value of a closed set.
pub(crate) fn word_for<T: Copy + PartialEq>(v: T, words: Words<T>) -> Option<&'static str> {
    words.iter().find(|(_, t)| *t == v).map(|(w, _)| *w)
}

/// `"a", "b", "c"`.
pub(crate) fn quoted<'a>(words: impl Iterator<Item = &'a str>) -> String {
    let mut s = String::new();
    for w in words {
        if !s.is_empty() {
            s.push_str(", ");
        }
        s.push('"');
        s.push_str(w);
        s.push('"');
    }
    s
}

/// What a message may repeat of a value: short, and without control characters.
pub(crate) fn shown(got: &str) -> String {
    let mut s: String = got.chars().take(48).flat_map(char::escape_debug).collect();
    if got.chars().count() > 48 {
        s.push('…');
    }
    s
}

fn bad(key: &str, got: &str, want: impl Into<String>) -> Fault {
    Fault::BadValue {
        key: key.into(),
        got: shown(got),
        suggestion: None,
        want: want.into(),
    }
}

/// A name of at most `max` bytes, not one of the IKE daemon's.
pub(crate) fn name(got: &str, max: usize) -> Result<String, Fault> {
    let ok = |b: u8| b.is_ascii_alphanumeric() || b"._:@+/-".contains(&b);
    if got.is_empty() || got.len() > max || !got.bytes().all(ok) {
        return Err(Fault::BadName {
            name: shown(got),
            max,
        });
    }
    if got.starts_with(MIRROR_PREFIX) {
        return Err(Fault::ReservedName(shown(got)));
    }
    Ok(got.to_owned())
}

/// A suite by its name.
pub(crate) fn suite(got: &str) -> Result<Suite, Fault> {
    if let Ok(s) = got.parse() {
        return Ok(s);
    }
    let bare = got.strip_suffix("+none").unwrap_or(got);
    let encrypts_only = bare == "null"
        || ["cbc", "ctr"]
            .iter()
            .any(|m| bare.starts_with("aes-") && bare.ends_with(m));
    if encrypts_only {
        return Err(Fault::NoIntegrity(shown(got)));
    }
    let names: Vec<String> = Suite::all().iter().map(ToString::to_string).collect();
    let suggestion = names
        .iter()
        .rfind(|n| got.len() >= 8 && n.starts_with(got))
        .cloned()
        .or_else(|| nearest(got, names.iter().map(String::as_str)));
    Err(Fault::UnknownSuite {
        got: shown(got),
        suggestion,
        known: SUITES,
    })
}

/// All suites in short.
pub(crate) const SUITES: &str = "aes-{128,192,256}-gcm-{8,12,16}, aes-{128,192,256}-gmac, \
    chacha20-poly1305, {null,aes-N-cbc,aes-N-ctr}+hmac-{sha1-96,sha2-256-128,sha2-384-192,sha2-512-256}";

/// A host address.
pub(crate) fn address(key: &str, got: &str) -> Result<IpAddr, Fault> {
    got.parse().map_err(|_| {
        bad(
            key,
            got,
            "an IPv4 or IPv6 address, for example 192.0.2.1 or 2001:db8::1",
        )
    })
}

/// A prefix `10.0.0.0/8`, an address, or a range `10.0.0.1-10.0.0.9`.
pub(crate) fn addr_range(key: &str, got: &str) -> Result<AddrRange, Fault> {
    let want = "a prefix (10.1.0.0/16), an address or a range (10.1.0.1-10.1.0.9)";
    if let Some((addr, len)) = got.split_once('/') {
        let addr: IpAddr = addr.parse().map_err(|_| bad(key, got, want))?;
        let len: u8 = len.parse().map_err(|_| bad(key, got, want))?;
        let range = AddrRange::prefix(addr, len).ok_or_else(|| {
            let max = if addr.is_ipv4() { 32 } else { 128 };
            bad(key, got, format!("a prefix length of 0 to {max}"))
        })?;
        if range.first() != addr {
            return Err(Fault::BadValue {
                key: key.into(),
                got: shown(got),
                suggestion: Some(format!("{}/{len}", range.first())),
                want: String::new(),
            });
        }
        return Ok(range);
    }
    if let Some((first, last)) = got.split_once('-') {
        let first: IpAddr = first.trim().parse().map_err(|_| bad(key, got, want))?;
        let last: IpAddr = last.trim().parse().map_err(|_| bad(key, got, want))?;
        return AddrRange::new(first, last).ok_or_else(|| {
            if first.is_ipv4() == last.is_ipv4() {
                Fault::BadValue {
                    key: key.into(),
                    got: shown(got),
                    suggestion: Some(format!("{last}-{first}")),
                    want: String::new(),
                }
            } else {
                Fault::FamilyMismatch {
                    a: first.to_string(),
                    b: last.to_string(),
                }
            }
        });
    }
    let addr: IpAddr = got.parse().map_err(|_| bad(key, got, want))?;
    AddrRange::new(addr, addr).ok_or_else(|| bad(key, got, want))
}

/// Prints what [`addr_range`] reads, in the shortest notation.
pub(crate) struct ShownRange(pub(crate) AddrRange);

impl fmt::Display for ShownRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, last) = (self.0.first(), self.0.last());
        let max = if first.is_ipv4() { 32 } else { 128 };
        match (0..=max).find(|l| AddrRange::prefix(first, *l) == Some(self.0)) {
            Some(len) => write!(f, "{first}/{len}"),
            None => write!(f, "{first}-{last}"),
        }
    }
}

/// `80` or `1024-65535`, for ports and ICMP types and codes.
pub(crate) fn number_range<T>(key: &str, got: &str) -> Result<RangeInclusive<T>, Fault>
where
    T: std::str::FromStr + PartialOrd + Copy,
{
    let want = "a number or a range, for example 443 or \"1024-65535\"";
    let number = |s: &str| s.trim().parse::<T>().map_err(|_| bad(key, got, want));
    let (first, last) = match got.split_once('-') {
        Some((a, b)) => (number(a)?, number(b)?),
        None => (number(got)?, number(got)?),
    };
    if first > last {
        return Err(bad(key, got, "the smaller number first"));
    }
    Ok(first..=last)
}

/// `90s`, `50m`, `8h`, `7d`, `1h30m`, in seconds.
pub(crate) fn duration(key: &str, got: &str) -> Result<u64, Fault> {
    let units: [(char, u64); 4] = [('d', 86_400), ('h', 3600), ('m', 60), ('s', 1)];
    parse_units(got, &units).ok_or_else(|| {
        bad(
            key,
            got,
            "seconds as a number, or a duration such as \"8h\", \"1h30m\", \"90s\", \"7d\"",
        )
    })
}

fn parse_units(got: &str, units: &[(char, u64)]) -> Option<u64> {
    let mut total: u64 = 0;
    let mut rest = got;
    let mut left = units;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest.get(..digits)?.parse().ok()?;
        let unit = rest.get(digits..)?.chars().next()?;
        let at = left.iter().position(|(u, _)| *u == unit)?;
        total = total.checked_add(number.checked_mul(left.get(at)?.1)?)?;
        left = left.get(at + 1..)?;
        rest = rest.get(digits + unit.len_utf8()..)?;
    }
    (!got.is_empty()).then_some(total)
}

/// `100GiB`, `64 MB`, in bytes.
pub(crate) fn bytes(key: &str, got: &str) -> Result<u64, Fault> {
    const UNITS: [(&str, u64); 11] = [
        ("", 1),
        ("B", 1),
        ("kB", 1000),
        ("KiB", 1 << 10),
        ("MB", 1_000_000),
        ("MiB", 1 << 20),
        ("GB", 1_000_000_000),
        ("GiB", 1 << 30),
        ("TB", 1_000_000_000_000),
        ("TiB", 1 << 40),
        ("PiB", 1 << 50),
    ];
    let parse = || {
        let digits = got.find(|c: char| !c.is_ascii_digit()).unwrap_or(got.len());
        let number: u64 = got.get(..digits)?.parse().ok()?;
        let unit = got.get(digits..)?.trim_start();
        let (_, scale) = UNITS.iter().find(|(u, _)| *u == unit)?;
        number.checked_mul(*scale)
    };
    parse().ok_or_else(|| {
        bad(
            key,
            got,
            "bytes as a number, or an amount such as \"100GiB\", \"64MiB\", \"1TB\"",
        )
    })
}

/// `copy`, a name such as `ef` or `af41`; plain numbers come as numbers.
pub(crate) fn dscp(key: &str, got: &str) -> Result<Dscp, Fault> {
    if got == "copy" {
        return Ok(Dscp::Copy);
    }
    word(key, got, DSCPS).map(Dscp::Fixed).map_err(|_| {
        let all = DSCPS.iter().map(|(w, _)| *w).chain(["copy"]);
        Fault::BadValue {
            key: key.into(),
            got: shown(got),
            suggestion: nearest(got, all),
            want: "\"copy\", a number of 0 to 63, or a name such as \"ef\", \"cs6\", \"af41\""
                .into(),
        }
    })
}

/// A protocol by number or keyword.
pub(crate) fn proto(key: &str, got: &str) -> Result<u8, Fault> {
    if let Ok(n) = got.parse() {
        return Ok(n);
    }
    word(key, got, PROTOS)
}

/// Key material of hexadecimal digits, with or without `0x`; bytes may be set apart by `:` or blanks.
pub(crate) fn hex(key: &'static str, got: &str) -> Result<Zeroizing<Vec<u8>>, Fault> {
    let got = got.trim();
    let (skip, digits) = match got.strip_prefix("0x").or_else(|| got.strip_prefix("0X")) {
        Some(rest) => (2, rest),
        None => (0, got),
    };
    let mut out = Zeroizing::new(Vec::with_capacity(digits.len() / 2 + 1));
    let mut high: Option<u8> = None;
    for (i, c) in digits.chars().enumerate() {
        let wrong = Fault::KeyNotHex {
            key,
            position: skip + i + 1,
        };
        match c.to_digit(16).and_then(|d| u8::try_from(d).ok()) {
            Some(d) => match high.take() {
                Some(h) => out.push(h << 4 | d),
                None => high = Some(d),
            },
            None if high.is_none() && (c == ':' || c.is_ascii_whitespace()) => {}
            None => return Err(wrong),
        }
    }
    if high.is_some() {
        return Err(Fault::KeyNotHex {
            key,
            position: skip + digits.chars().count() + 1,
        });
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_ranges_read_back_as_printed() {
        for text in [
            "10.1.0.0/16",
            "0.0.0.0/0",
            "192.0.2.7/32",
            "2001:db8::/32",
            "::/0",
            "10.0.0.1-10.0.0.9",
        ] {
            let r = addr_range("src", text).unwrap();
            assert_eq!(ShownRange(r).to_string(), text);
        }
    }

    #[test]
    fn prefixes_with_host_bits_are_refused_with_the_right_prefix() {
        let e = addr_range("src", "10.1.2.3/16").unwrap_err();
        assert!(
            e.to_string().contains("did you mean \"10.1.0.0/16\""),
            "{e}"
        );
    }

    #[test]
    fn durations_and_amounts_know_their_units() {
        assert_eq!(duration("t", "1h30m"), Ok(5400));
        assert_eq!(duration("t", "7d"), Ok(604_800));
        assert!(duration("t", "30m1h").is_err());
        assert!(duration("t", "5").is_err());
        assert!(duration("t", "").is_err());
        assert_eq!(bytes("b", "100GiB"), Ok(100 << 30));
        assert_eq!(bytes("b", "64 MB"), Ok(64_000_000));
        assert!(bytes("b", "99999999PiB").is_err());
    }

    #[test]
    fn keys_read_with_prefix_and_separators_and_tell_where_they_are_wrong() {
        assert_eq!(hex("key", "0xDEad").unwrap().as_slice(), [0xde, 0xad]);
        assert_eq!(
            hex("key", "de:ad be").unwrap().as_slice(),
            [0xde, 0xad, 0xbe]
        );
        assert_eq!(
            hex("key", "0xdeag"),
            Err(Fault::KeyNotHex {
                key: "key",
                position: 6
            })
        );
        assert_eq!(
            hex("key", "dea"),
            Err(Fault::KeyNotHex {
                key: "key",
                position: 4
            })
        );
    }

    #[test]
    fn ciphers_without_integrity_are_refused_by_name() {
        for s in ["null", "aes-128-cbc", "aes-256-ctr", "null+none"] {
            assert!(matches!(suite(s), Err(Fault::NoIntegrity(_))), "{s}");
        }
        let e = suite("aes-128-gcm").unwrap_err().to_string();
        assert!(e.contains("did you mean \"aes-128-gcm-16\""), "{e}");
    }
}
