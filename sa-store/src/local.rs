//! The gateway's own addresses.

use std::net::{IpAddr, Ipv6Addr};

use hashbrown::HashSet;

use crate::runtime::mapped;
use crate::sa::Vrf;

/// The gateway's own addresses by VRF. Part of the snapshot, so that they can change while it runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Locals(HashSet<(u16, u128), rustc_hash::FxBuildHasher>);

impl Locals {
    /// From addresses with their VRF.
    pub fn new(addresses: impl IntoIterator<Item = (Vrf, IpAddr)>) -> Self {
        Self(
            addresses
                .into_iter()
                .map(|(v, a)| (v.0, mapped(a)))
                .collect(),
        )
    }

    /// Whether `addr` (IPv4 as IPv4-mapped) is ours in `vrf`.
    #[inline]
    pub fn contains(&self, vrf: Vrf, addr: u128) -> bool {
        self.0.contains(&(vrf.0, addr))
    }

    /// Some own address of the family, for the source of ICMP errors. Those that routers can answer to are preferred
    /// to link-local and loopback ones.
    pub fn any(&self, vrf: Vrf, v6: bool) -> Option<IpAddr> {
        let own = self
            .0
            .iter()
            .filter(|(v, _)| *v == vrf.0)
            .map(|(_, a)| Ipv6Addr::from(*a).to_canonical());
        own.filter(|a| a.is_ipv6() == v6)
            .min_by_key(|a| (is_confined(*a), *a))
    }

    /// All, in order.
    pub fn list(&self) -> Vec<(Vrf, IpAddr)> {
        let mut all: Vec<_> = self
            .0
            .iter()
            .map(|(v, a)| (Vrf(*v), Ipv6Addr::from(*a).to_canonical()))
            .collect();
        all.sort_unstable();
        all
    }
}

/// Whether an address means nothing beyond its link.
fn is_confined(addr: IpAddr) -> bool {
    addr.is_loopback()
        || match addr {
            IpAddr::V4(a) => a.is_link_local(),
            IpAddr::V6(a) => a.is_unicast_link_local(),
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn an_address_is_ours_in_its_own_vrf_only() {
        let locals = Locals::new([(Vrf(1), ip("192.0.2.1"))]);
        assert!(locals.contains(Vrf(1), mapped(ip("192.0.2.1"))));
        assert!(!locals.contains(Vrf(0), mapped(ip("192.0.2.1"))));
        assert!(!locals.contains(Vrf(1), mapped(ip("192.0.2.2"))));
    }

    #[test]
    fn errors_come_from_an_address_that_means_something_beyond_the_link() {
        let locals = Locals::new(
            ["127.0.0.1", "203.0.113.1", "fe80::1", "::1", "fd00::1"].map(|a| (Vrf(0), ip(a))),
        );
        assert_eq!(locals.any(Vrf(0), false), Some(ip("203.0.113.1")));
        assert_eq!(locals.any(Vrf(0), true), Some(ip("fd00::1")));
        assert_eq!(locals.any(Vrf(1), true), None);
        let confined = Locals::new([(Vrf(0), ip("fe80::1"))]);
        assert_eq!(confined.any(Vrf(0), true), Some(ip("fe80::1")));
    }
}
