//! What the kernel is asked: dumps of its tables, and to find a neighbour.

use std::net::IpAddr;

use netlink_packet_core::{
    NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage,
};
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::model::Class;

/// The request for a dump.
pub(super) fn dump_request(class: Class, sequence: u32) -> Vec<u8> {
    let inner = match class {
        Class::Links => RouteNetlinkMessage::GetLink(LinkMessage::default()),
        Class::Addresses => RouteNetlinkMessage::GetAddress(AddressMessage::default()),
        Class::Neighbours => RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()),
        Class::Routes4 | Class::Routes6 => {
            let mut m = RouteMessage::default();
            m.header.address_family = if class == Class::Routes4 {
                AddressFamily::Inet
            } else {
                AddressFamily::Inet6
            };
            RouteNetlinkMessage::GetRoute(m)
        }
    };
    finish(inner, NLM_F_REQUEST | NLM_F_DUMP, sequence)
}

/// Asks the kernel to find a neighbour, or to make sure of it, as if it had a packet for it. Needs `CAP_NET_ADMIN`.
pub(super) fn use_request(index: u32, addr: IpAddr, sequence: u32) -> Vec<u8> {
    let mut m = NeighbourMessage::default();
    m.header.family = match addr {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    m.header.ifindex = index;
    m.header.flags = NeighbourFlags::Use;
    m.attributes
        .push(NeighbourAttribute::Destination(match addr {
            IpAddr::V4(a) => NeighbourAddress::Inet(a),
            IpAddr::V6(a) => NeighbourAddress::Inet6(a),
        }));
    finish(
        RouteNetlinkMessage::NewNeighbour(m),
        NLM_F_REQUEST | NLM_F_CREATE,
        sequence,
    )
}

/// The bytes of a request.
pub(super) fn finish(inner: RouteNetlinkMessage, flags: u16, sequence: u32) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = sequence;
    let mut m = NetlinkMessage::new(header, NetlinkPayload::from(inner));
    m.finalize();
    let mut bytes = vec![0; m.buffer_len()];
    m.serialize(&mut bytes);
    bytes
}
