//! Routes and next hops: longest prefix match per VRF, equal-cost paths, neighbours.
//!
//! ```text
//!   (VRF, destination) ─▶ LC-trie ─▶ group of targets ─▶ neighbour (port, link address)
//! ```
//!
//! A [`Fib`] is immutable and part of the snapshot. Link addresses are atomics in a table that tables of routes
//! share, so that learning one needs no publication.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use hashbrown::HashMap;
use iptrie::{
    IpPrefix, Ipv4LCTrieMap, Ipv4Prefix, Ipv4RTrieMap, Ipv6LCTrieMap, Ipv6Prefix, Ipv6RTrieMap,
};

use crate::runtime::mapped;
use crate::sa::Vrf;
use crate::spd::TunnelIdx;

/// Where a route leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RouteTo {
    /// To a gateway on a port.
    Via {
        /// Port number.
        port: u16,
        /// Address of the next hop.
        gateway: IpAddr,
    },
    /// Destinations are neighbours on the port.
    OnLink {
        /// Port number.
        port: u16,
    },
    /// Into a route-based tunnel.
    Tunnel(TunnelIdx),
    /// To the gateway itself.
    Local,
    /// Nowhere.
    Blackhole,
}

/// One route. Several with the same VRF and prefix share the load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Route {
    /// VRF.
    pub vrf: Vrf,
    /// Destination; bits behind the prefix are ignored.
    pub addr: IpAddr,
    /// Prefix length.
    pub len: u8,
    /// Where it leads.
    pub to: RouteTo,
}

/// Why routes were refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FibError {
    /// The prefix is longer than the address.
    #[error("route to {addr}/{len}: the prefix is longer than the address")]
    PrefixLength {
        /// Destination.
        addr: IpAddr,
        /// Length given.
        len: u8,
    },
}

/// Number of a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HopIdx(pub u32);

/// What a look-up answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hop {
    /// Send on the neighbour's port to its link address.
    Neighbour(HopIdx),
    /// Into this tunnel.
    Tunnel(TunnelIdx),
    /// To the gateway itself.
    Local,
    /// A port, but no neighbour known for the destination.
    Unresolved {
        /// The port.
        port: u16,
    },
    /// No route, or a black hole.
    None,
}

const KNOWN: u64 = 1 << 48;

/// A neighbour: where it is and its link address once known.
#[derive(Debug)]
struct Neighbour {
    port: u16,
    addr: u128,
    mac: AtomicU64,
}

/// All neighbours. Numbers stay valid until [`retain`](Self::retain) gives them anew.
#[derive(Clone, Debug, Default)]
pub struct Neighbours {
    list: Vec<Arc<Neighbour>>,
    by_addr: HashMap<(u16, u128), HopIdx, foldhash::fast::RandomState>,
}

impl Neighbours {
    /// The neighbour's number, given on first mention. Its link address is unknown until [`learn`](Self::learn).
    pub fn add(&mut self, port: u16, addr: IpAddr) -> HopIdx {
        let key = (port, mapped(addr));
        if let Some(hop) = self.by_addr.get(&key) {
            return *hop;
        }
        let hop = HopIdx(u32::try_from(self.list.len()).unwrap_or(u32::MAX));
        self.list.push(Arc::new(Neighbour {
            port,
            addr: key.1,
            mac: AtomicU64::new(0),
        }));
        self.by_addr.insert(key, hop);
        hop
    }

    /// Sets a link address. Seen by workers at once.
    pub fn learn(&self, hop: HopIdx, mac: [u8; 6]) {
        if let Some(n) = self.list.get(hop.0 as usize) {
            let [a, b, c, d, e, f] = mac;
            n.mac.store(
                u64::from_be_bytes([0, 0, a, b, c, d, e, f]) | KNOWN,
                Relaxed,
            );
        }
    }

    /// Forgets a link address.
    pub fn forget(&self, hop: HopIdx) {
        if let Some(n) = self.list.get(hop.0 as usize) {
            n.mac.store(0, Relaxed);
        }
    }

    /// The neighbour's number, if it was mentioned.
    pub fn find(&self, port: u16, addr: IpAddr) -> Option<HopIdx> {
        self.by_addr.get(&(port, mapped(addr))).copied()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// All: port, address, link address when known.
    pub fn iter(&self) -> impl Iterator<Item = (u16, IpAddr, Option<[u8; 6]>)> + '_ {
        self.list.iter().map(|n| {
            let addr = Ipv6Addr::from(n.addr).to_canonical();
            (n.port, addr, link_address(n.mac.load(Relaxed)))
        })
    }

    /// Forgets all but some. The others keep their link addresses, and get new numbers: for a table that is built
    /// anew, never for one that shares its routes with another.
    pub fn retain(&mut self, keep: impl Fn(u16, IpAddr) -> bool) {
        self.list
            .retain(|n| keep(n.port, Ipv6Addr::from(n.addr).to_canonical()));
        self.by_addr = self
            .list
            .iter()
            .zip(0..)
            .map(|(n, i)| ((n.port, n.addr), HopIdx(i)))
            .collect();
    }
}

/// What the trie holds: a range of [`Fib::targets`].
#[derive(Clone, Copy, Debug, Default)]
struct Group {
    first: u32,
    count: u32,
}

/// Routes of one VRF.
struct Table {
    v4: Ipv4LCTrieMap<Group>,
    v6: Ipv6LCTrieMap<Group>,
}

/// Compiled routes.
pub struct Fib {
    compiled: Arc<Compiled>,
    neighbours: Neighbours,
    generation: u32,
}

/// What does not change when a neighbour is added.
#[derive(Default)]
struct Compiled {
    vrfs: HashMap<Vrf, Table, rustc_hash::FxBuildHasher>,
    targets: Vec<Target>,
    routes: Vec<Route>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Target {
    Hop(HopIdx),
    OnLink(u16),
    Tunnel(TunnelIdx),
    Local,
    Blackhole,
}

/// Over all tables of the process: a cached answer can never be taken for one of a later table.
static GENERATION: AtomicU32 = AtomicU32::new(0);

impl Default for Fib {
    fn default() -> Self {
        Self {
            compiled: Arc::default(),
            neighbours: Neighbours::default(),
            generation: next_generation(),
        }
    }
}

fn next_generation() -> u32 {
    GENERATION.fetch_add(1, Relaxed).wrapping_add(1)
}

/// Where routes of one prefix are put together: VRF, family, network, length.
type Key = (Vrf, bool, u128, u8);

fn key(r: &Route) -> Result<Key, FibError> {
    let v6 = r.addr.is_ipv6();
    let wide = if v6 { 128 } else { 32 };
    if r.len > wide {
        return Err(FibError::PrefixLength {
            addr: r.addr,
            len: r.len,
        });
    }
    let bits = u32::from(wide - r.len);
    let base = mapped(r.addr) & u128::MAX.checked_shl(bits).unwrap_or(0);
    Ok((r.vrf, v6, base, r.len))
}

impl Fib {
    /// As [`from_routes`](Self::from_routes), with a copy of the routes.
    ///
    /// # Errors
    /// See [`FibError`].
    pub fn build(routes: &[Route], neighbours: Neighbours) -> Result<Self, FibError> {
        Self::from_routes(routes.to_vec(), neighbours)
    }

    /// Compiles routes. Gateways become neighbours if they are not yet. A path that is given twice gets twice the share.
    ///
    /// # Errors
    /// See [`FibError`].
    pub fn from_routes(routes: Vec<Route>, mut neighbours: Neighbours) -> Result<Self, FibError> {
        let mut order: Vec<(Key, u32)> = Vec::with_capacity(routes.len());
        for (r, i) in routes.iter().zip(0..) {
            order.push((key(r)?, i));
        }
        order.sort_unstable();
        let mut targets = Vec::new();
        // Most prefixes lead to the same few groups of gateways: each is kept once.
        let mut known: HashMap<Vec<Target>, Group, foldhash::fast::RandomState> =
            HashMap::default();
        let mut tries: Vec<(Vrf, Ipv4RTrieMap<Group>, Ipv6RTrieMap<Group>)> = Vec::new();
        let mut list = Vec::new();
        for same in order.chunk_by(|(a, _), (b, _)| a == b) {
            let Some(((vrf, v6, base, len), _)) = same.first().copied() else {
                continue;
            };
            list.clear();
            let given = same.iter().filter_map(|(_, i)| routes.get(*i as usize));
            list.extend(given.map(|r| match r.to {
                RouteTo::Via { port, gateway } => Target::Hop(neighbours.add(port, gateway)),
                RouteTo::OnLink { port } => Target::OnLink(port),
                RouteTo::Tunnel(t) => Target::Tunnel(t),
                RouteTo::Local => Target::Local,
                RouteTo::Blackhole => Target::Blackhole,
            }));
            let group = match known.get(&list) {
                Some(group) => *group,
                None => {
                    let group = Group {
                        first: u32::try_from(targets.len()).unwrap_or(u32::MAX),
                        count: u32::try_from(list.len()).unwrap_or(u32::MAX),
                    };
                    targets.extend_from_slice(&list);
                    known.insert(list.clone(), group);
                    group
                }
            };
            if tries.last().is_none_or(|(v, ..)| *v != vrf) {
                tries.push((
                    vrf,
                    Ipv4RTrieMap::with_root(Group::default()),
                    Ipv6RTrieMap::with_root(Group::default()),
                ));
            }
            let Some((_, t4, t6)) = tries.last_mut() else {
                continue;
            };
            let bad = |_| FibError::PrefixLength {
                addr: IpAddr::V6(base.into()),
                len,
            };
            if v6 {
                t6.insert(Ipv6Prefix::new(base.into(), len).map_err(bad)?, group);
            } else {
                t4.insert(
                    Ipv4Prefix::new(low32(base).into(), len).map_err(bad)?,
                    group,
                );
            }
        }
        let vrfs = tries
            .into_iter()
            .map(|(vrf, v4, v6)| {
                (
                    vrf,
                    Table {
                        v4: v4.compress(),
                        v6: v6.compress(),
                    },
                )
            })
            .collect();
        Ok(Self {
            compiled: Arc::new(Compiled {
                vrfs,
                targets,
                routes,
            }),
            neighbours,
            generation: next_generation(),
        })
    }

    /// The same routes with more neighbours. Those of this table must be among them under their numbers.
    pub fn with_neighbours(&self, neighbours: Neighbours) -> Self {
        debug_assert!(
            self.neighbours
                .by_addr
                .iter()
                .all(|(k, hop)| neighbours.by_addr.get(k) == Some(hop))
        );
        Self {
            compiled: Arc::clone(&self.compiled),
            neighbours,
            generation: next_generation(),
        }
    }

    /// Where a packet to `dst` (IPv4 as IPv4-mapped) goes. `hash` chooses among equal paths.
    pub fn lookup(&self, vrf: Vrf, dst: u128, hash: u32) -> Hop {
        self.choose(self.group(vrf, dst), dst, hash)
    }

    /// The paths of the longest prefix; none for an unrouted destination.
    fn group(&self, vrf: Vrf, dst: u128) -> Group {
        let Some(table) = self.compiled.vrfs.get(&vrf) else {
            return Group::default();
        };
        if dst >> 32 == 0xffff {
            let addr: std::net::Ipv4Addr = low32(dst).into();
            *table.v4.lookup(&addr).1
        } else {
            let addr: std::net::Ipv6Addr = dst.into();
            *table.v6.lookup(&addr).1
        }
    }

    fn choose(&self, group: Group, dst: u128, hash: u32) -> Hop {
        if group.count == 0 {
            return Hop::None;
        }
        // Multiply-shift: even for any count.
        let pick = (u64::from(hash.wrapping_mul(0x9e37_79b1)) * u64::from(group.count)) >> 32;
        let index = u64::from(group.first) + pick;
        let target = usize::try_from(index)
            .ok()
            .and_then(|i| self.compiled.targets.get(i));
        match target {
            Some(Target::Hop(hop)) => Hop::Neighbour(*hop),
            Some(Target::OnLink(port)) => match self.neighbours.by_addr.get(&(*port, dst)) {
                Some(hop) => Hop::Neighbour(*hop),
                None => Hop::Unresolved { port: *port },
            },
            Some(Target::Tunnel(t)) => Hop::Tunnel(*t),
            Some(Target::Local) => Hop::Local,
            Some(Target::Blackhole) | None => Hop::None,
        }
    }

    /// Port of a neighbour.
    #[inline]
    pub fn port(&self, hop: HopIdx) -> Option<u16> {
        self.neighbours.list.get(hop.0 as usize).map(|n| n.port)
    }

    /// Address of a neighbour, IPv4 as IPv4-mapped.
    pub fn address(&self, hop: HopIdx) -> Option<u128> {
        self.neighbours.list.get(hop.0 as usize).map(|n| n.addr)
    }

    /// Link address of a neighbour, when known.
    #[inline]
    pub fn mac(&self, hop: HopIdx) -> Option<[u8; 6]> {
        let neighbour = self.neighbours.list.get(hop.0 as usize)?;
        link_address(neighbour.mac.load(Relaxed))
    }

    /// The prefix that decides about a destination (IPv4 as IPv4-mapped): network and length.
    pub fn prefix(&self, vrf: Vrf, dst: u128) -> Option<(IpAddr, u8)> {
        let table = self.compiled.vrfs.get(&vrf)?;
        if dst >> 32 == 0xffff {
            let (prefix, group) = table.v4.lookup(&std::net::Ipv4Addr::from(low32(dst)));
            (group.count > 0).then(|| (prefix.network().into(), prefix.len()))
        } else {
            let (prefix, group) = table.v6.lookup(&Ipv6Addr::from(dst));
            (group.count > 0).then(|| (prefix.network().into(), prefix.len()))
        }
    }

    /// Changes with every table; never reused.
    #[inline]
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// The neighbours, to build the next table with.
    pub fn neighbours(&self) -> &Neighbours {
        &self.neighbours
    }

    /// The routes as they were given.
    pub fn routes(&self) -> &[Route] {
        &self.compiled.routes
    }
}

impl std::fmt::Debug for Fib {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fib")
            .field("routes", &self.compiled.routes.len())
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

#[inline]
fn link_address(word: u64) -> Option<[u8; 6]> {
    let [_, _, a, b, c, d, e, f] = word.to_be_bytes();
    (word & KNOWN != 0).then_some([a, b, c, d, e, f])
}

fn low32(a: u128) -> u32 {
    #[allow(
        clippy::cast_possible_truncation,
        reason = "the low half of an IPv4-mapped address"
    )]
    let low = a as u32;
    low
}

/// A worker's cache of look-ups, direct-mapped; void when the table changes. Its hash is seeded, so that
/// nobody outside can choose destinations that displace each other.
#[derive(Debug)]
pub struct RouteCache {
    slots: Box<[(u128, u32, Vrf, Hop)]>,
    seed: [u64; 2],
}

const CACHE_BITS: u32 = 12;

impl Default for RouteCache {
    fn default() -> Self {
        let random = RandomState::default();
        Self {
            slots: vec![(0, 0, Vrf(0), Hop::None); 1 << CACHE_BITS].into_boxed_slice(),
            seed: [random.hash_one(0_u64), random.hash_one(1_u64)],
        }
    }
}

impl RouteCache {
    /// As [`Fib::lookup`]. Equal paths are not cached, for they depend on the flow.
    #[inline]
    pub fn lookup(&mut self, fib: &Fib, vrf: Vrf, dst: u128, hash: u32) -> Hop {
        let [high, low] = crate::flow::halves(dst);
        let h = crate::spd::fold(high ^ u64::from(vrf.0) ^ self.seed[0], low ^ self.seed[1]);
        let slot = usize::try_from(h >> (64 - CACHE_BITS)).unwrap_or(0);
        let Some(slot) = self.slots.get_mut(slot) else {
            return fib.lookup(vrf, dst, hash);
        };
        if slot.0 == dst && slot.1 == fib.generation && slot.2 == vrf {
            return slot.3;
        }
        let group = fib.group(vrf, dst);
        let hop = fib.choose(group, dst, hash);
        if group.count <= 1 {
            *slot = (dst, fib.generation, vrf, hop);
        }
        hop
    }
}

#[cfg(test)]
mod tests;
