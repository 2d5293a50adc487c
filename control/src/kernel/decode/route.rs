//! Routes.

use std::net::IpAddr;

use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteNextHop, RouteType, RouteVia,
};

use crate::kernel::derive::network;
use crate::kernel::model::{Hops, KernelHop, KernelRoute, RouteKey, RouteKind};

pub(super) fn route(m: &RouteMessage) -> Option<(RouteKey, KernelRoute)> {
    let header = &m.header;
    let v6 = match header.address_family {
        AddressFamily::Inet => false,
        AddressFamily::Inet6 => true,
        _ => return None,
    };
    // Cached answers, routes by type of service and by source are no routes of the table.
    if header.flags.contains(RouteFlags::Cloned)
        || header.tos != 0
        || header.source_prefix_length != 0
    {
        return None;
    }
    let mut addr = if v6 {
        IpAddr::from([0_u16; 8])
    } else {
        IpAddr::from([0_u8; 4])
    };
    let (mut table, mut metric) = (u32::from(header.table), 0);
    let mut hop = KernelHop {
        oif: 0,
        via: None,
        weight: 1,
        wrapped: false,
    };
    let mut many = None;
    for a in &m.attributes {
        match a {
            RouteAttribute::Destination(d) => addr = ip(d)?,
            RouteAttribute::Table(t) => table = *t,
            RouteAttribute::Priority(p) => metric = *p,
            RouteAttribute::MultiPath(list) => {
                many = Some(list.iter().map(next_hop).collect::<Vec<_>>());
            }
            other => hop_attribute(&mut hop, other),
        }
    }
    let wide = if v6 { 128 } else { 32 };
    let len = header.destination_prefix_length;
    if addr.is_ipv6() != v6 || len > wide {
        return None;
    }
    let kind = match header.kind {
        RouteType::Unicast => RouteKind::Unicast,
        RouteType::Local | RouteType::Anycast => RouteKind::Local,
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit => RouteKind::Drop,
        RouteType::Broadcast => RouteKind::Broadcast,
        other => RouteKind::Other(other.into()),
    };
    let hops = match many {
        Some(list) => Hops::new(&list),
        // IPv6 gives its drop routes the loopback device in some messages and none in others.
        None if hop.oif == 0 || kind == RouteKind::Drop => Hops::Many(Box::default()),
        None => Hops::One(hop),
    };
    let key = RouteKey {
        table,
        addr: network(addr, len),
        len,
        metric,
    };
    let protocol = header.protocol.into();
    Some((
        key,
        KernelRoute {
            kind,
            protocol,
            hops,
        },
    ))
}

fn next_hop(n: &RouteNextHop) -> KernelHop {
    let mut hop = KernelHop {
        oif: n.interface_index,
        via: None,
        weight: u16::from(n.hops) + 1,
        wrapped: false,
    };
    for a in &n.attributes {
        hop_attribute(&mut hop, a);
    }
    hop
}

fn hop_attribute(hop: &mut KernelHop, a: &RouteAttribute) {
    match a {
        RouteAttribute::Oif(index) => hop.oif = *index,
        RouteAttribute::Gateway(a) => match ip(a) {
            Some(addr) => hop.via = Some(addr),
            None => hop.wrapped = true,
        },
        RouteAttribute::Via(RouteVia::Inet(a)) => hop.via = Some(IpAddr::V4(*a)),
        RouteAttribute::Via(RouteVia::Inet6(a)) => hop.via = Some(IpAddr::V6(*a)),
        RouteAttribute::Via(_)
        | RouteAttribute::EncapType(_)
        | RouteAttribute::Encap(_)
        | RouteAttribute::NewDestination(_) => hop.wrapped = true,
        _ => {}
    }
}

fn ip(a: &RouteAddress) -> Option<IpAddr> {
    match a {
        RouteAddress::Inet(a) => Some(IpAddr::V4(*a)),
        RouteAddress::Inet6(a) => Some(IpAddr::V6(*a)),
        _ => None,
    }
}
