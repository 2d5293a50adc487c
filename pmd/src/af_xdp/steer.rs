//! Which packets the gateway takes from an interface: the XDP program and the prefixes that it asks.
//!
//! With [`Steering::Ipsec`] these go to the sockets, everything else (ARP, ND, IKE, ICMP, ssh) to the kernel:
//!
//! - ESP (protocol 50) over IPv4 and IPv6, any fragment of it;
//! - UDP to a NAT-traversal port whose payload begins with four bytes that are not all zero, and keep-alives of one byte 0xff
//!   (RFC 3948); all zero is IKE's marker;
//! - packets whose destination lies in a prefix of the [`SteerMap`]: traffic to protect.
//!
//! Up to two VLAN tags are looked through, and in IPv6 up to four extension headers (hop-by-hop, routing, destination,
//! fragment). Later fragments of UDP show no ports: they go to the kernel unless their destination is in the map.
//!
//! A VLAN tag that the interface strips (`rxvlan` offload) is not seen by XDP: switch that off where tags matter.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, PoisonError};

use super::asm::{Asm, AsmError, Cond, Insn, Reg, Width};
use super::bpf::{MAP_NO_PREALLOC, MAP_TYPE_LPM_TRIE, Map};

/// What the gateway takes from an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Steering {
    /// ESP, ESP in UDP to one of these ports, and traffic to protect.
    Ipsec {
        /// NAT-traversal ports, at most 8; usually 4500.
        udp_ports: Vec<u16>,
    },
    /// All IP packets but neighbour discovery: for an interface that the gateway has to itself.
    All,
}

impl Default for Steering {
    fn default() -> Self {
        Steering::Ipsec {
            udp_ports: vec![4500],
        }
    }
}

/// Most prefixes of one family that a [`SteerMap`] holds.
pub const MAX_PREFIXES: u32 = 65_536;

/// The destination prefixes of traffic to protect, of one port. Changes are seen by the next packet; clones share one map.
#[derive(Debug, Clone)]
pub struct SteerMap {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    v4: Map,
    v6: Map,
    present: Mutex<HashSet<(IpAddr, u8)>>,
}

/// Why a prefix was not taken.
#[derive(Debug, thiserror::Error)]
pub enum SteerError {
    /// The prefix is longer than the address.
    #[error("prefix {0}/{1} is longer than the address")]
    Length(IpAddr, u8),
    /// The kernel refused (no room: see [`MAX_PREFIXES`]).
    #[error("prefix {0}/{1}: {2}")]
    Kernel(IpAddr, u8, io::Error),
}

impl SteerMap {
    pub(super) fn new() -> io::Result<SteerMap> {
        let map = |name, key| {
            Map::new(
                name,
                MAP_TYPE_LPM_TRIE,
                key,
                1,
                MAX_PREFIXES,
                MAP_NO_PREALLOC,
            )
        };
        Ok(SteerMap {
            inner: Arc::new(Inner {
                v4: map("protect_v4", 8)?,
                v6: map("protect_v6", 20)?,
                present: Mutex::default(),
            }),
        })
    }

    /// Takes packets to `addr/len` from now on (bits behind the length are ignored). Twice is as once.
    ///
    /// # Errors
    /// See [`SteerError`].
    pub fn insert(&self, addr: IpAddr, len: u8) -> Result<(), SteerError> {
        let prefix = canonical(addr, len)?;
        let mut present = self
            .inner
            .present
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.add(&mut present, prefix)
    }

    /// Takes packets to exactly this prefix no more; nothing happens when it was not there.
    ///
    /// # Errors
    /// See [`SteerError`].
    pub fn remove(&self, addr: IpAddr, len: u8) -> Result<(), SteerError> {
        let prefix = canonical(addr, len)?;
        let mut present = self
            .inner
            .present
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.delete(&mut present, prefix)
    }

    /// Makes `prefixes` the whole content. New ones are added before old ones go, so what is in both is never missed.
    ///
    /// # Errors
    /// See [`SteerError`]; then the content is what was there and what could be added.
    pub fn replace(&self, prefixes: &[(IpAddr, u8)]) -> Result<(), SteerError> {
        let wanted = prefixes
            .iter()
            .map(|&(addr, len)| canonical(addr, len))
            .collect::<Result<HashSet<_>, _>>()?;
        let mut present = self
            .inner
            .present
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for &prefix in &wanted {
            self.add(&mut present, prefix)?;
        }
        let old: Vec<_> = present.difference(&wanted).copied().collect();
        for prefix in old {
            self.delete(&mut present, prefix)?;
        }
        Ok(())
    }

    pub(super) fn maps(&self) -> (RawFd, RawFd) {
        (self.inner.v4.raw(), self.inner.v6.raw())
    }

    fn add(
        &self,
        present: &mut HashSet<(IpAddr, u8)>,
        prefix: (IpAddr, u8),
    ) -> Result<(), SteerError> {
        if !present.contains(&prefix) {
            let (map, key) = self.entry(prefix);
            map.insert(&key, &[1])
                .map_err(|e| SteerError::Kernel(prefix.0, prefix.1, e))?;
            present.insert(prefix);
        }
        Ok(())
    }

    fn delete(
        &self,
        present: &mut HashSet<(IpAddr, u8)>,
        prefix: (IpAddr, u8),
    ) -> Result<(), SteerError> {
        if present.contains(&prefix) {
            let (map, key) = self.entry(prefix);
            map.remove(&key)
                .map_err(|e| SteerError::Kernel(prefix.0, prefix.1, e))?;
            present.remove(&prefix);
        }
        Ok(())
    }

    /// The map of the family, and the key: length in host order, then the address.
    fn entry(&self, (addr, len): (IpAddr, u8)) -> (&Map, Vec<u8>) {
        let mut key = u32::from(len).to_ne_bytes().to_vec();
        match addr {
            IpAddr::V4(a) => {
                key.extend(a.octets());
                (&self.inner.v4, key)
            }
            IpAddr::V6(a) => {
                key.extend(a.octets());
                (&self.inner.v6, key)
            }
        }
    }
}

fn canonical(addr: IpAddr, len: u8) -> Result<(IpAddr, u8), SteerError> {
    sa_store::policy::AddrRange::prefix(addr, len)
        .map(|range| (range.first(), len))
        .ok_or(SteerError::Length(addr, len))
}

// The program's registers: context, cursor in the packet, end of the packet, whether this is a later fragment.
const CTX: Reg = Reg::R6;
const AT: Reg = Reg::R7;
const END: Reg = Reg::R8;
const LATER: Reg = Reg::R9;
const PROTO: Reg = Reg::R5;
/// Stack places of the look-up keys, from the frame pointer.
const KEY_V4: i16 = -8;
const KEY_V6: i16 = -32;

const HELPER_MAP_LOOKUP: i32 = 1;
const HELPER_REDIRECT_MAP: i32 = 51;
const XDP_PASS: i32 = 2;

/// Assembles the program; `protect` are the two prefix maps.
pub(super) fn program(
    steering: &Steering,
    sockets: RawFd,
    protect: (RawFd, RawFd),
) -> Result<Vec<Insn>, AsmError> {
    let mut a = Asm::default();
    a.mov(CTX, Reg::R1);
    a.load(Width::B4, AT, CTX, 0);
    a.load(Width::B4, END, CTX, 4);
    need(&mut a, 14, "pass");
    a.load(Width::B2, Reg::R3, AT, 12);
    a.be16(Reg::R3);
    a.add_imm(AT, 14);
    for (tagged, done) in [("tag 1", "no tag 1"), ("tag 2", "no tag 2")] {
        a.jump_if_imm(Reg::R3, Cond::Eq, 0x8100, tagged);
        a.jump_if_imm(Reg::R3, Cond::Ne, 0x88a8, done);
        a.label(tagged);
        need(&mut a, 4, "pass");
        a.load(Width::B2, Reg::R3, AT, 2);
        a.be16(Reg::R3);
        a.add_imm(AT, 4);
        a.label(done);
    }
    a.mov_imm(LATER, 0);
    a.jump_if_imm(Reg::R3, Cond::Eq, 0x0800, "v4");
    a.jump_if_imm(Reg::R3, Cond::Eq, 0x86dd, "v6");
    a.jump("pass");
    match steering {
        Steering::All => all(&mut a),
        Steering::Ipsec { udp_ports } => {
            ipv4(&mut a);
            upper(&mut a, udp_ports, ["v4 port", "v4 content", "v4 other"]);
            a.label("v4 other");
            lookup(&mut a, protect.0, KEY_V4);
            ipv6(&mut a);
            upper(&mut a, udp_ports, ["v6 port", "v6 content", "v6 other"]);
            a.label("v6 other");
            lookup(&mut a, protect.1, KEY_V6);
        }
    }
    a.label("redirect");
    a.load_map(Reg::R1, sockets);
    a.load(Width::B4, Reg::R2, CTX, 16);
    // The action when no socket serves this receive queue.
    a.mov_imm(Reg::R3, XDP_PASS);
    a.call(HELPER_REDIRECT_MAP);
    a.exit();
    a.label("pass");
    a.mov_imm(Reg::R0, XDP_PASS);
    a.exit();
    a.finish()
}

/// Jumps to `short` unless `n` bytes lie at the cursor.
fn need(a: &mut Asm, n: i32, short: &'static str) {
    a.mov(Reg::R2, AT);
    a.add_imm(Reg::R2, n);
    a.jump_if(Reg::R2, Cond::Gt, END, short);
}

/// Notes the destination, leaves the protocol in `PROTO` and the cursor behind the header.
fn ipv4(a: &mut Asm) {
    a.label("v4");
    need(a, 20, "pass");
    a.store_imm(Width::B4, Reg::Fp, KEY_V4, 32);
    a.load(Width::B4, Reg::R3, AT, 16);
    a.store(Width::B4, Reg::Fp, KEY_V4 + 4, Reg::R3);
    a.load(Width::B2, LATER, AT, 6);
    a.be16(LATER);
    a.and_imm(LATER, 0x1fff);
    a.load(Width::B1, PROTO, AT, 9);
    a.load(Width::B1, Reg::R3, AT, 0);
    a.and_imm(Reg::R3, 0x0f);
    a.jump_if_imm(Reg::R3, Cond::Lt, 5, "pass");
    a.shift_left(Reg::R3, 2);
    a.add(AT, Reg::R3);
}

/// As [`ipv4`], through the extension headers.
fn ipv6(a: &mut Asm) {
    a.label("v6");
    need(a, 40, "pass");
    a.store_imm(Width::B4, Reg::Fp, KEY_V6, 128);
    for word in 0..4 {
        a.load(Width::B4, Reg::R3, AT, 24 + 4 * word);
        a.store(Width::B4, Reg::Fp, KEY_V6 + 4 + 4 * word, Reg::R3);
    }
    a.load(Width::B1, PROTO, AT, 6);
    a.add_imm(AT, 40);
    for [long, fragment, next] in [
        ["long 1", "fragment 1", "next 1"],
        ["long 2", "fragment 2", "next 2"],
        ["long 3", "fragment 3", "next 3"],
        ["long 4", "fragment 4", "next 4"],
    ] {
        // Behind the header of a later fragment lies payload, whatever its number says.
        a.jump_if_imm(LATER, Cond::Ne, 0, next);
        for header in [0, 43, 60] {
            a.jump_if_imm(PROTO, Cond::Eq, header, long);
        }
        a.jump_if_imm(PROTO, Cond::Eq, 44, fragment);
        a.jump(next);
        a.label(fragment);
        need(a, 8, "pass");
        a.load(Width::B1, PROTO, AT, 0);
        a.load(Width::B2, LATER, AT, 2);
        a.be16(LATER);
        a.and_imm(LATER, 0xfff8);
        a.add_imm(AT, 8);
        a.jump(next);
        a.label(long);
        need(a, 8, "pass");
        a.load(Width::B1, PROTO, AT, 0);
        a.load(Width::B1, Reg::R3, AT, 1);
        a.add_imm(Reg::R3, 1);
        a.shift_left(Reg::R3, 3);
        a.add(AT, Reg::R3);
        a.label(next);
    }
}

/// ESP and ESP in UDP are redirected, IKE passed; jumps to `other` (or falls through) for the rest.
fn upper(a: &mut Asm, udp_ports: &[u16], [port, content, other]: [&'static str; 3]) {
    a.jump_if_imm(PROTO, Cond::Eq, 50, "redirect");
    a.jump_if_imm(PROTO, Cond::Ne, 17, other);
    a.jump_if_imm(LATER, Cond::Ne, 0, other);
    need(a, 8, other);
    a.load(Width::B2, Reg::R3, AT, 2);
    a.be16(Reg::R3);
    for &udp_port in udp_ports {
        a.jump_if_imm(Reg::R3, Cond::Eq, i32::from(udp_port), port);
    }
    a.jump(other);
    a.label(port);
    need(a, 12, content);
    a.load(Width::B4, Reg::R3, AT, 8);
    a.jump_if_imm(Reg::R3, Cond::Ne, 0, "redirect");
    a.jump("pass");
    // Too short for a marker: only a keep-alive is ours.
    a.label(content);
    need(a, 9, "pass");
    a.load(Width::B1, Reg::R3, AT, 8);
    a.jump_if_imm(Reg::R3, Cond::Eq, 0xff, "redirect");
    a.jump("pass");
}

/// Redirects when the key on the stack is in the map, else passes.
fn lookup(a: &mut Asm, map: RawFd, key: i16) {
    a.load_map(Reg::R1, map);
    a.mov(Reg::R2, Reg::Fp);
    a.add_imm(Reg::R2, i32::from(key));
    a.call(HELPER_MAP_LOOKUP);
    a.jump_if_imm(Reg::R0, Cond::Ne, 0, "redirect");
    a.jump("pass");
}

/// Everything but router and neighbour discovery (ICMPv6 types 133 to 137).
fn all(a: &mut Asm) {
    a.label("v6");
    need(a, 41, "redirect");
    a.load(Width::B1, PROTO, AT, 6);
    a.jump_if_imm(PROTO, Cond::Ne, 58, "redirect");
    a.load(Width::B1, Reg::R3, AT, 40);
    a.jump_if_imm(Reg::R3, Cond::Lt, 133, "redirect");
    a.jump_if_imm(Reg::R3, Cond::Gt, 137, "redirect");
    a.jump("pass");
    a.label("v4");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_programs_assemble() {
        for steering in [Steering::default(), Steering::All] {
            assert!(program(&steering, 3, (4, 5)).unwrap().len() > 30);
        }
    }

    #[test]
    fn a_prefix_is_stored_without_its_host_bits() {
        let a: IpAddr = "10.1.2.3".parse().unwrap();
        assert_eq!(canonical(a, 8).unwrap(), ("10.0.0.0".parse().unwrap(), 8));
        assert!(matches!(canonical(a, 33), Err(SteerError::Length(..))));
    }
}
