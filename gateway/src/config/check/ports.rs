//! Rules of ports: what each kind needs, and what two of them cannot share.

use std::collections::HashMap;
use std::path::PathBuf;

use super::Checker;
use crate::config::port::{Fault, Nic, PortConfig, PortKind, PortKindName, Repeat, Steer};
use crate::config::port_table::{AfXdpTable, PortTable};

impl Checker<'_, '_> {
    pub(super) fn ports(&mut self) -> Option<Vec<PortConfig>> {
        if !self.d.ports_complete {
            return None;
        }
        let tables = &self.d.file.port;
        if tables.is_empty() {
            self.problems
                .push(None, "no [[port]]; a gateway needs at least one");
            return None;
        }
        let mut by_name: HashMap<&str, usize> = HashMap::new();
        for (i, t) in tables.iter().enumerate() {
            let at = i.to_string();
            let fine = (1..=32).contains(&t.name.len())
                && t.name
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"._:-".contains(&b));
            self.require(fine, &["port", &at, "name"], || {
                format!(
                    "\"{}\" is no name: 1 to 32 of the characters A-Z a-z 0-9 . _ : - are",
                    t.name
                )
            });
            if by_name.insert(&t.name, i).is_some() {
                self.wrong(
                    &["port", &at, "name"],
                    format!("there are two ports \"{}\"", t.name),
                );
            }
        }
        let ports: Vec<_> = tables
            .iter()
            .enumerate()
            .map(|(i, t)| self.port(i, t, &by_name))
            .collect();
        self.shared_interfaces(tables);
        ports.into_iter().collect()
    }

    fn port(
        &mut self,
        i: usize,
        t: &PortTable,
        by_name: &HashMap<&str, usize>,
    ) -> Option<PortConfig> {
        let at = i.to_string();
        for (key, given, of) in [
            ("af_xdp", t.af_xdp.is_some(), PortKindName::AfXdp),
            ("pcap", t.pcap.is_some(), PortKindName::Pcap),
            ("memory", t.memory.is_some(), PortKindName::Memory),
            (
                "vhost-user",
                t.vhost_user.is_some(),
                PortKindName::VhostUser,
            ),
            ("vfio", t.vfio.is_some(), PortKindName::Vfio),
            ("airoha", t.airoha.is_some(), PortKindName::Airoha),
        ] {
            self.require(!given || t.kind == of, &["port", &at, key], || {
                format!("\"{key}\" settings on a port of another kind")
            });
        }
        self.require(
            t.queues.is_none_or(|q| (1..=256).contains(&q)),
            &["port", &at, "queues"],
            || "\"queues\" must lie in 1 to 256".into(),
        );
        self.require(
            t.vlan.is_none_or(|v| (1..=4094).contains(&v)),
            &["port", &at, "vlan"],
            || "\"vlan\" must lie in 1 to 4094".into(),
        );
        let has_v6 = t.addresses.iter().any(|a| a.addr().is_ipv6());
        let least = if has_v6 { 1280 } else { 576 };
        self.require(
            t.mtu.is_none_or(|m| m >= least),
            &["port", &at, "mtu"],
            || format!("\"mtu\" must be at least {least}"),
        );
        let room = self.d.file.memory.stride.saturating_sub(192 + 64 + 18);
        self.require(
            u32::from(t.mtu.unwrap_or(0)) <= room,
            &["port", &at, "mtu"],
            || {
                format!(
                    "frames of {} bytes hold packets of {room}; raise memory.stride",
                    self.d.file.memory.stride
                )
            },
        );
        for (n, a) in t.addresses.iter().enumerate() {
            let n = n.to_string();
            let host = !(a.addr().is_unspecified() || a.addr().is_multicast());
            self.require(host, &["port", &at, "addresses", &n], || {
                format!("{a} is not the address of a host")
            });
        }
        if let Some(f) = &t.fault {
            self.fault(&at, f);
        }
        Some(PortConfig {
            name: t.name.clone(),
            side: t.side,
            kind: self.port_kind(&at, t, by_name)?,
            queues: t.queues,
            vlan: t.vlan,
            mac: t.mac,
            mtu: t.mtu,
            addresses: t.addresses.clone(),
            vrf: t.vrf,
            tap: self.tap(&at, t),
            fault: t.fault.clone(),
        })
    }

    fn tap(&mut self, at: &str, t: &PortTable) -> Option<String> {
        let name = t.tap.clone()?;
        self.require(is_interface(&name), &["port", at, "tap"], || {
            no_interface(&name)
        });
        let tables = &self.d.file.port;
        let same = |p: &&PortTable| p.tap.as_ref() == Some(&name);
        let twice = tables.iter().filter(same).count() > 1;
        let taken = tables.iter().any(|p| {
            matches!(p.kind, PortKindName::AfXdp | PortKindName::Tap)
                && p.interface.as_ref().unwrap_or(&p.name) == &name
        });
        self.require(!twice && !taken, &["port", at, "tap"], || {
            format!("\"{name}\" is already another port's interface")
        });
        Some(name)
    }

    fn port_kind(
        &mut self,
        at: &str,
        t: &PortTable,
        by_name: &HashMap<&str, usize>,
    ) -> Option<PortKind> {
        let interface = t.interface.clone().unwrap_or_else(|| t.name.clone());
        let named = matches!(t.kind, PortKindName::AfXdp | PortKindName::Tap);
        let live = !matches!(t.kind, PortKindName::Pcap | PortKindName::Memory);
        self.require(
            named || t.interface.is_none(),
            &["port", at, "interface"],
            || "\"interface\" is for af_xdp and tap ports".into(),
        );
        self.require(
            !named || is_interface(&interface),
            &["port", at, "interface"],
            || no_interface(&interface),
        );
        let seeded = self.d.file.test.seed.is_some();
        self.require(!(live && seeded), &["test", "seed"], || {
            format!(
                "a seed makes nonces repeat, so it is refused with live ports such as \"{}\"",
                t.name
            )
        });
        match t.kind {
            PortKindName::AfXdp => {
                let x = t.af_xdp.clone().unwrap_or_default();
                self.require(
                    x.ring.is_power_of_two() && (64..=32_768).contains(&x.ring),
                    &["port", at, "af_xdp", "ring"],
                    || {
                        format!(
                            "\"ring\" is {}; it must be a power of two in 64 to 32768",
                            x.ring
                        )
                    },
                );
                self.require(
                    (1..=8).contains(&x.steer_udp_ports.len()),
                    &["port", at, "af_xdp", "steer_udp_ports"],
                    || "\"steer_udp_ports\" has 1 to 8 ports".into(),
                );
                Some(PortKind::AfXdp {
                    interface,
                    mode: x.mode,
                    ring: x.ring,
                    steer: steer(x),
                })
            }
            PortKindName::Tap => Some(PortKind::Tap { interface }),
            PortKindName::Pcap => {
                let p = t.pcap.clone().unwrap_or_default();
                self.require(
                    p.read.is_some() || p.repeat.is_none(),
                    &["port", at, "pcap", "loop"],
                    || "\"loop\" needs \"read\"".into(),
                );
                let repeat = match p.repeat {
                    Some(0) => Repeat::Forever,
                    n => Repeat::Times(n.unwrap_or(1)),
                };
                let resolve = |p: Option<PathBuf>| p.map(|p| self.dir.join(p));
                Some(PortKind::Pcap {
                    read: resolve(p.read),
                    write: resolve(p.write),
                    repeat,
                })
            }
            PortKindName::Memory => self.memory_port(at, t, by_name),
            PortKindName::VhostUser => self.vhost_user_port(at, t),
            PortKindName::Vfio => self.vfio_port(at, t),
            PortKindName::Airoha => self.airoha_port(at, t),
        }
    }

    fn vhost_user_port(&mut self, at: &str, t: &PortTable) -> Option<PortKind> {
        let Some(v) = &t.vhost_user else {
            self.wrong(
                &["port", at],
                "a vhost-user port needs [port.vhost-user] with \"socket\"",
            );
            return None;
        };
        self.require(
            t.queues
                .is_none_or(|q| usize::from(q) <= pmd::virtio::vhost::MAX_PAIRS),
            &["port", at, "queues"],
            || {
                format!(
                    "a vhost-user port has at most {} queues",
                    pmd::virtio::vhost::MAX_PAIRS
                )
            },
        );
        let mode = u32::from_str_radix(&v.mode, 8).ok().filter(|m| *m <= 0o777);
        self.require(mode.is_some(), &["port", at, "vhost-user", "mode"], || {
            format!(
                "\"{}\" is no access mode; write for example \"0660\"",
                v.mode
            )
        });
        Some(PortKind::VhostUser {
            socket: self.dir.join(&v.socket),
            role: v.role,
            mode: mode?,
        })
    }

    fn memory_port(
        &mut self,
        at: &str,
        t: &PortTable,
        by_name: &HashMap<&str, usize>,
    ) -> Option<PortKind> {
        let Some(m) = &t.memory else {
            self.wrong(
                &["port", at],
                "a memory port needs [port.memory] with \"peer\"",
            );
            return None;
        };
        let Some(&peer) = by_name.get(m.peer.as_str()) else {
            self.wrong(
                &["port", at, "memory", "peer"],
                format!("there is no port \"{}\"", m.peer),
            );
            return None;
        };
        let other = self.d.file.port.get(peer)?;
        let back = other.memory.as_ref().is_some_and(|o| o.peer == t.name);
        self.require(
            back && other.name != t.name,
            &["port", at, "memory", "peer"],
            || {
                format!(
                    "port \"{}\" does not name \"{}\" as its peer",
                    m.peer, t.name
                )
            },
        );
        self.require(
            (64..=65_536).contains(&m.ring),
            &["port", at, "memory", "ring"],
            || format!("\"ring\" is {}; it must lie in 64 to 65536", m.ring),
        );
        Some(PortKind::Memory {
            peer,
            ring: usize::try_from(m.ring).unwrap_or(usize::MAX),
        })
    }

    fn vfio_port(&mut self, at: &str, t: &PortTable) -> Option<PortKind> {
        let Some(v) = &t.vfio else {
            self.wrong(
                &["port", at],
                "a vfio port needs [port.vfio] with \"device\"",
            );
            return None;
        };
        let address = pmd::device::pci::Address::parse(&v.device);
        self.require(address.is_some(), &["port", at, "vfio", "device"], || {
            format!("\"{}\" is no PCI address such as 0000:01:00.0", v.device)
        });
        for (key, ring) in [("rx_ring", v.rx_ring), ("tx_ring", v.tx_ring)] {
            let fine = ring.is_none_or(|n| n.is_power_of_two() && (32..=32_768).contains(&n));
            self.require(fine, &["port", at, "vfio", key], || {
                format!("\"{key}\" must be a power of two in 32 to 32768")
            });
        }
        Some(PortKind::Vfio(Nic {
            device: address?.to_string(),
            // The device knows its own address only.
            promiscuous: v.promiscuous || t.mac.is_some(),
            rx_ring: v.rx_ring,
            tx_ring: v.tx_ring,
            no_iommu: v.no_iommu,
            experimental: v.experimental,
        }))
    }

    fn fault(&mut self, at: &str, f: &Fault) {
        for (key, rate) in [
            ("drop", f.drop),
            ("duplicate", f.duplicate),
            ("reorder", f.reorder),
            ("flip", f.flip),
        ] {
            self.require(
                (0.0..=1.0).contains(&rate),
                &["port", at, "fault", key],
                || format!("\"{key}\" is a probability: 0.0 to 1.0"),
            );
        }
    }

    /// Ports may share an interface when each has its own tag.
    fn shared_interfaces(&mut self, tables: &[PortTable]) {
        let mut seen: HashMap<(String, Option<u16>), &str> = HashMap::new();
        for (i, t) in tables.iter().enumerate() {
            let interface = match t.kind {
                PortKindName::AfXdp | PortKindName::Tap => {
                    t.interface.as_ref().unwrap_or(&t.name).clone()
                }
                PortKindName::Vfio => match &t.vfio {
                    Some(v) => v.device.clone(),
                    None => continue,
                },
                PortKindName::Airoha => match &t.airoha {
                    Some(a) => {
                        let socket = a.socket.as_ref().map(|p| p.display().to_string());
                        let device = a.device.clone().or(socket).unwrap_or_default();
                        format!("GDM {} of {device}", a.gdm)
                    }
                    None => continue,
                },
                PortKindName::Pcap | PortKindName::Memory | PortKindName::VhostUser => continue,
            };
            if let Some(other) = seen.insert((interface.clone(), t.vlan), &t.name) {
                let at = i.to_string();
                let what = format!(
                    "interface {interface} is already port \"{other}\"; ports that share it need different \"vlan\""
                );
                self.wrong(&["port", &at], what);
            }
        }
    }
}

/// Whether the kernel would take the name.
fn is_interface(name: &str) -> bool {
    let short = (1..16).contains(&name.len());
    let bad = |b: u8| b == b'/' || b.is_ascii_whitespace();
    short && !name.bytes().any(bad) && name != "." && name != ".."
}

fn no_interface(name: &str) -> String {
    format!("\"{name}\" is no interface name: 1 to 15 characters, no slash, no space")
}

fn steer(x: AfXdpTable) -> Steer {
    Steer {
        udp_ports: x.steer_udp_ports,
        destinations: x.steer_destinations,
        all: x.steer_all,
    }
}
