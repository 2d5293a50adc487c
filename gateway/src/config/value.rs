//! Values written as strings.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error;
use serde::{Deserialize, Deserializer};

/// An address with the length of its network, `192.0.2.1/24`. Host bits may be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Prefix {
    addr: IpAddr,
    len: u8,
}

impl Prefix {
    /// `None` when `len` is too long for the family.
    pub fn new(addr: IpAddr, len: u8) -> Option<Self> {
        (len <= if addr.is_ipv4() { 32 } else { 128 }).then_some(Self { addr, len })
    }

    /// The address as written.
    pub fn addr(&self) -> IpAddr {
        self.addr
    }

    /// Length of the network part in bits.
    pub fn len(&self) -> u8 {
        self.len
    }

    /// Whether it covers a whole family.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether `a` lies in the network.
    pub fn contains(&self, a: IpAddr) -> bool {
        self.range().is_some_and(|r| r.contains(a))
    }

    /// The network as a range of addresses.
    pub fn range(&self) -> Option<sa_store::policy::AddrRange> {
        sa_store::policy::AddrRange::prefix(self.addr, self.len)
    }

    /// Whether only network bits are set, as a route must have it.
    pub fn is_network(&self) -> bool {
        self.range().is_some_and(|r| r.first() == self.addr)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.len)
    }
}

impl FromStr for Prefix {
    type Err = String;

    /// A bare address is the network of that one address.
    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || {
            format!(
                "\"{s}\" is not an address or network; write for example 192.0.2.0/24 or 2001:db8::/32"
            )
        };
        let (addr, len) = match s.split_once('/') {
            Some((a, l)) => (a, Some(l.parse::<u8>().map_err(|_| bad())?)),
            None => (s, None),
        };
        let addr: IpAddr = addr.parse().map_err(|_| bad())?;
        let most = if addr.is_ipv4() { 32 } else { 128 };
        let len = len.unwrap_or(most);
        Self::new(addr, len)
            .ok_or_else(|| format!("\"{s}\": the length of the network is at most {most}"))
    }
}

/// An Ethernet address, `02:00:5e:10:00:01`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl From<Mac> for pmd::port::MacAddr {
    fn from(mac: Mac) -> Self {
        Self(mac.0)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        pmd::port::MacAddr(self.0).fmt(f)
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let bad =
            || format!("\"{s}\" is not an Ethernet address; write for example 02:00:5e:10:00:01");
        let mut mac = [0; 6];
        let mut parts = s.split(':');
        for byte in &mut mac {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            return Err(bad());
        }
        if mac[0] & 1 == 1 || mac == [0; 6] {
            return Err(format!("\"{s}\" is not the address of one station"));
        }
        Ok(Self(mac))
    }
}

macro_rules! from_text {
    ($type:ident, $name:literal, $pattern:literal, $about:literal) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                Cow::<str>::deserialize(d)?.parse().map_err(D::Error::custom)
            }
        }

        impl JsonSchema for $type {
            fn schema_name() -> Cow<'static, str> {
                $name.into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string", "pattern": $pattern, "description": $about })
            }
        }
    };
}

from_text!(
    Prefix,
    "Prefix",
    "^[0-9a-fA-F:.]+(/[0-9]{1,3})?$",
    "An address with the length of its network, 192.0.2.1/24."
);
from_text!(
    Mac,
    "Mac",
    "^([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}$",
    "An Ethernet address, 02:00:5e:10:00:01."
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_know_their_hosts() {
        let p: Prefix = "10.1.2.3/16".parse().unwrap();
        assert!(p.contains("10.1.255.1".parse().unwrap()));
        assert!(!p.contains("10.2.0.0".parse().unwrap()));
        assert!(!p.is_network());
        assert!("::/0".parse::<Prefix>().unwrap().is_network());
        assert_eq!("192.0.2.7".parse::<Prefix>().unwrap().len(), 32);
        for bad in ["10.0.0.0/33", "::/129", "10.0.0/8", "10.0.0.0/", "x"] {
            assert!(bad.parse::<Prefix>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ethernet_addresses_of_groups_are_refused() {
        assert_eq!(
            "02:00:5e:10:00:0a".parse::<Mac>().unwrap().to_string(),
            "02:00:5e:10:00:0a"
        );
        for bad in [
            "ff:ff:ff:ff:ff:ff",
            "01:00:5e:00:00:01",
            "00:00:00:00:00:00",
            "2:0:5e:10:0:1",
            "02:00:5e:10:00",
            "02:00:5e:10:00:01:02",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }
}
