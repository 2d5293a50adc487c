//! What must not be pulled away from under the machine: interfaces with addresses or the default route.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::Path;

/// Addresses and default routes of the machine's interfaces.
#[derive(Debug, Clone, Default)]
pub struct Interfaces {
    /// Addresses, link-local ones left out: every interface that is up has one.
    pub addresses: BTreeMap<String, Vec<IpAddr>>,
    /// Interfaces of default routes.
    pub default_routes: BTreeSet<String>,
}

impl Interfaces {
    /// Those of the network namespace that this process is in.
    ///
    /// # Errors
    /// The system does not tell.
    pub fn here() -> std::io::Result<Interfaces> {
        let mut found = Interfaces::default();
        for i in nix::ifaddrs::getifaddrs()? {
            let address = i.address.and_then(|a| {
                let v4 = a.as_sockaddr_in().map(|s| IpAddr::V4(s.ip()));
                v4.or_else(|| a.as_sockaddr_in6().map(|s| IpAddr::V6(s.ip())))
            });
            if let Some(address) = address.filter(|a| !is_link_local(a)) {
                found
                    .addresses
                    .entry(i.interface_name)
                    .or_default()
                    .push(address);
            }
        }
        found.default_routes = default_routes(Path::new("/proc/net"));
        Ok(found)
    }
}

fn is_link_local(a: &IpAddr) -> bool {
    match a {
        IpAddr::V4(a) => a.is_link_local(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    }
}

/// From the kernel's tables: IPv4 has destination and mask in columns 2 and 8, IPv6 destination and length in 1 and 2.
fn default_routes(proc_net: &Path) -> BTreeSet<String> {
    let read = |name| fs::read_to_string(proc_net.join(name)).unwrap_or_default();
    let mut found = BTreeSet::new();
    for line in read("route").lines().skip(1) {
        let f: Vec<_> = line.split_whitespace().collect();
        if let [name, "00000000", _, _, _, _, _, "00000000", ..] = f[..] {
            found.insert(name.to_owned());
        }
    }
    for line in read("ipv6_route").lines() {
        let f: Vec<_> = line.split_whitespace().collect();
        // The kernel keeps a rejecting default route on lo.
        if let [destination, "00", .., name] = f[..]
            && destination.bytes().all(|b| b == b'0')
            && name != "lo"
        {
            found.insert(name.to_owned());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_routes_are_found_in_both_tables() {
        let dir = tempfile::tempdir().unwrap();
        let v4 = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n\
                  eth0\t00000000\t010011AC\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                  eth1\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n\
                  eth2\t00000000\t010011AC\t0003\t0\t0\t0\t00000080\t0\t0\t0\n";
        let zero = "0".repeat(32);
        let v6 = format!(
            "{zero} 00 {zero} 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003 eth3\n\
             {zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200 lo\n\
             fe80{} 40 {zero} 00 {zero} 00000100 00000001 00000000 00000001 eth4\n",
            "0".repeat(28)
        );
        fs::write(dir.path().join("route"), v4).unwrap();
        fs::write(dir.path().join("ipv6_route"), v6).unwrap();
        let found: Vec<_> = default_routes(dir.path()).into_iter().collect();
        assert_eq!(found, ["eth0", "eth3"]);
        assert!(default_routes(Path::new("/nowhere")).is_empty());
    }

    #[test]
    fn this_machines_addresses_are_told() {
        let here = Interfaces::here().unwrap();
        assert!(here.addresses.values().flatten().all(|a| !is_link_local(a)));
    }
}
