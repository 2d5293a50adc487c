//! What the kernel tells, as far as it matters here, in types of our own.

use std::net::IpAddr;

/// Ethernet address.
pub type Mac = [u8; 6];

/// The local table, `ip route show table local`.
pub const TABLE_LOCAL: u32 = 255;
/// The main table.
pub const TABLE_MAIN: u32 = 254;

/// What a device is, as far as it matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum LinkKind {
    /// Nothing special.
    #[default]
    Plain,
    /// The loopback device.
    Loopback,
    /// `xfrm`: packets routed to it belong to SAs with this number.
    Xfrm {
        /// Number.
        if_id: u32,
    },
    /// `vrf`: its routes are in a table of their own.
    Vrf {
        /// Table.
        table: u32,
    },
    /// `vlan` on another device.
    Vlan {
        /// The other device.
        parent: u32,
        /// Tag.
        id: u16,
    },
}

/// A device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// Whether it is up for the administrator.
    pub up: bool,
    /// Whether it has a carrier.
    pub carrier: bool,
    /// Largest packet, bytes.
    pub mtu: u32,
    /// The device that it belongs to: a VRF, a bridge, …
    pub controller: Option<u32>,
    /// What it is.
    pub kind: LinkKind,
}

/// An address of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// Length of its network's prefix.
    pub len: u8,
    /// False while duplicate address detection runs or after it has failed.
    pub valid: bool,
}

/// What tells a route from others. The order is that of look-ups: metrics of one prefix stand together, lowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouteKey {
    /// Table.
    pub table: u32,
    /// Destination; bits behind the prefix are 0.
    pub addr: IpAddr,
    /// Prefix length.
    pub len: u8,
    /// Metric; the lowest wins.
    pub metric: u32,
}

/// What a route does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteKind {
    /// Forwards.
    Unicast,
    /// Delivers to the host.
    Local,
    /// Drops: `blackhole`, `unreachable`, `prohibit`.
    Drop,
    /// Broadcast address of a network.
    Broadcast,
    /// Goes on with the next table, or something else that is not understood.
    Other(u8),
}

/// A next hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelHop {
    /// Device; 0 when there is none.
    pub oif: u32,
    /// Router, of either family.
    pub via: Option<IpAddr>,
    /// Share among the next hops of the route, 1 to 256.
    pub weight: u16,
    /// Whether packets are to be wrapped in something (MPLS, tunnels without a device): not done here.
    pub wrapped: bool,
}

/// Next hops of a route; most have one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hops {
    /// The only one.
    One(KernelHop),
    /// Several, or none.
    Many(Box<[KernelHop]>),
}

impl Hops {
    /// From a list.
    pub fn new(list: &[KernelHop]) -> Self {
        match list {
            [one] => Self::One(*one),
            many => Self::Many(many.into()),
        }
    }

    /// As a list.
    pub fn list(&self) -> &[KernelHop] {
        match self {
            Self::One(hop) => std::slice::from_ref(hop),
            Self::Many(list) => list,
        }
    }
}

/// A route, apart from its [`RouteKey`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelRoute {
    /// What it does.
    pub kind: RouteKind,
    /// Who made it: number of the routing protocol.
    pub protocol: u8,
    /// Where it leads.
    pub hops: Hops,
}

impl KernelRoute {
    /// Whether both lead the same way; who made them does not matter, as in the kernel.
    pub(super) fn same(&self, other: &Self) -> bool {
        self.kind == other.kind && self.hops == other.hops
    }
}

/// How a new route stands to others with its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Before them.
    Create,
    /// Behind them.
    Append,
    /// Instead of the first.
    Replace,
}

/// Something that the kernel tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Update {
    /// A device is new or has changed.
    Link(u32, Link),
    /// A device is no more.
    LinkGone(u32),
    /// A device has an address.
    Address(u32, IpAddr, Address),
    /// It has it no more.
    AddressGone(u32, IpAddr),
    /// What is known of a neighbour on a device; `None`: nothing that can be used.
    Neighbour(u32, IpAddr, Option<Reach>),
    /// Nothing is known of it any more.
    NeighbourGone(u32, IpAddr),
    /// A route is new.
    Route(RouteKey, KernelRoute, Change),
    /// A route, or some of its next hops, are no more.
    RouteGone(RouteKey, KernelRoute),
}

/// A neighbour that can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// Its link address.
    pub mac: Mac,
    /// Whether the kernel has not heard of it for a while and waits for a use of it to ask again.
    pub stale: bool,
}

/// What is dumped at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Devices.
    Links,
    /// Addresses.
    Addresses,
    /// Neighbours.
    Neighbours,
    /// IPv4 routes.
    Routes4,
    /// IPv6 routes.
    Routes6,
}

impl Class {
    /// All, in the order in which they are needed.
    pub const ALL: [Self; 5] = [
        Self::Links,
        Self::Addresses,
        Self::Neighbours,
        Self::Routes4,
        Self::Routes6,
    ];
}

impl Update {
    /// The dump in which it would be seen.
    pub fn class(&self) -> Class {
        match self {
            Self::Link(..) | Self::LinkGone(_) => Class::Links,
            Self::Address(..) | Self::AddressGone(..) => Class::Addresses,
            Self::Neighbour(..) | Self::NeighbourGone(..) => Class::Neighbours,
            Self::Route(key, ..) | Self::RouteGone(key, _) => {
                if key.addr.is_ipv4() {
                    Class::Routes4
                } else {
                    Class::Routes6
                }
            }
        }
    }
}
