//! Netlink messages to [`Update`]s.

mod link;
mod route;

use std::net::IpAddr;

use netlink_packet_core::{
    DecodeError, ErrorMessage, NLM_F_APPEND, NLM_F_DUMP_INTR, NLM_F_REPLACE, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};

use super::model::{Address, Change, Reach, Update};
use link::{is_device, link};
use route::route;

/// A message of the kernel.
#[derive(Debug, PartialEq)]
pub enum Message {
    /// Something about the tables.
    Update(Update),
    /// Something that does not matter here.
    Nothing,
    /// End of a dump: number of the error, 0 for none.
    Done(i32),
    /// A request was refused: number of the error, 0 for none.
    Error(i32),
    /// Messages were lost.
    Overrun,
}

/// A message with what its header says.
#[derive(Debug)]
pub struct Received {
    /// The message; its fault when it is not understood.
    pub message: Result<Message, DecodeError>,
    /// Socket that asked for it or made the change; 0: the kernel itself.
    pub port: u32,
    /// That socket's number of its request.
    pub sequence: u32,
    /// The dump that it belongs to may be incomplete.
    pub interrupted: bool,
}

/// Cuts a datagram into messages. What is left behind a broken header is one broken message.
pub fn messages(datagram: &[u8]) -> impl Iterator<Item = Received> + '_ {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let broken = |why: &str| Received {
            message: Err(DecodeError::from(why.to_owned())),
            port: 0,
            sequence: 0,
            interrupted: false,
        };
        let length = rest.first_chunk::<4>().map(|l| u32::from_ne_bytes(*l));
        let length = length.and_then(|l| usize::try_from(l).ok()).unwrap_or(0);
        let Some(one) = rest.get(..length).filter(|m| m.len() >= 16) else {
            rest = &[];
            return Some(broken("a message is longer than its datagram"));
        };
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(
            match NetlinkMessage::<RouteNetlinkMessage>::deserialize(one) {
                Ok(m) => {
                    let (header, payload) = m.into_parts();
                    Received {
                        message: Ok(message(&header, payload)),
                        port: header.port_number,
                        sequence: header.sequence_number,
                        interrupted: header.flags & NLM_F_DUMP_INTR != 0,
                    }
                }
                Err(e) => {
                    let number = |at: usize| {
                        let bytes = one.get(at..).and_then(|s| s.first_chunk::<4>());
                        bytes.map_or(0, |b| u32::from_ne_bytes(*b))
                    };
                    Received {
                        message: Err(e),
                        port: number(12),
                        sequence: number(8),
                        interrupted: false,
                    }
                }
            },
        )
    })
}

fn message(header: &NetlinkHeader, payload: NetlinkPayload<RouteNetlinkMessage>) -> Message {
    use RouteNetlinkMessage as M;
    let update = match payload {
        NetlinkPayload::Done(done) => return Message::Done(done.code),
        NetlinkPayload::Error(ErrorMessage { code, .. }) => {
            return Message::Error(code.map_or(0, |c| c.get()));
        }
        NetlinkPayload::Overrun(_) => return Message::Overrun,
        NetlinkPayload::InnerMessage(m) => match m {
            M::NewLink(l) => link(&l).map(|link| Update::Link(l.header.index, link)),
            M::DelLink(l) => is_device(&l).then_some(Update::LinkGone(l.header.index)),
            M::NewAddress(a) => address(&a).map(|(at, v)| Update::Address(a.header.index, at, v)),
            M::DelAddress(a) => address(&a).map(|(at, _)| Update::AddressGone(a.header.index, at)),
            M::NewNeighbour(n) => {
                neighbour(&n).map(|(at, reach)| Update::Neighbour(n.header.ifindex, at, reach))
            }
            M::DelNeighbour(n) => {
                neighbour(&n).map(|(at, _)| Update::NeighbourGone(n.header.ifindex, at))
            }
            M::NewRoute(r) => {
                let change = if header.flags & NLM_F_REPLACE != 0 {
                    Change::Replace
                } else if header.flags & NLM_F_APPEND != 0 {
                    Change::Append
                } else {
                    Change::Create
                };
                route(&r).map(|(key, r)| Update::Route(key, r, change))
            }
            M::DelRoute(r) => route(&r).map(|(key, r)| Update::RouteGone(key, r)),
            _ => None,
        },
        _ => None,
    };
    update.map_or(Message::Nothing, Message::Update)
}

fn address(m: &AddressMessage) -> Option<(IpAddr, Address)> {
    let mut flags =
        AddressFlags::from_bits_retain(u32::from(AddressHeaderFlags::bits(&m.header.flags)));
    let (mut own, mut peer) = (None, None);
    for a in &m.attributes {
        match a {
            AddressAttribute::Local(addr) => own = Some(*addr),
            AddressAttribute::Address(addr) => peer = Some(*addr),
            AddressAttribute::Flags(f) => flags = *f,
            _ => {}
        }
    }
    let checking =
        flags.contains(AddressFlags::Tentative) && !flags.contains(AddressFlags::Optimistic);
    let valid = !checking && !flags.contains(AddressFlags::Dadfailed);
    // Where both are given, the one called "address" is the far end's.
    let len = m.header.prefix_len;
    Some((own.or(peer)?, Address { len, valid }))
}

fn neighbour(m: &NeighbourMessage) -> Option<(IpAddr, Option<Reach>)> {
    if m.header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let (mut addr, mut mac) = (None, None);
    for a in &m.attributes {
        match a {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(a)) => {
                addr = Some(IpAddr::V4(*a));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(a)) => {
                addr = Some(IpAddr::V6(*a));
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = <[u8; 6]>::try_from(bytes.as_slice()).ok();
            }
            _ => {}
        }
    }
    // Neither a group's address nor none at all can be a neighbour's.
    let mac = mac.filter(|m| m[0] & 1 == 0 && *m != [0; 6]);
    let usable = matches!(
        m.header.state,
        NeighbourState::Reachable
            | NeighbourState::Stale
            | NeighbourState::Delay
            | NeighbourState::Probe
            | NeighbourState::Permanent
            | NeighbourState::Noarp
    );
    let stale = m.header.state == NeighbourState::Stale;
    let reach = mac.filter(|_| usable).map(|mac| Reach { mac, stale });
    Some((addr?, reach))
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::AddressFamily;
    use netlink_packet_route::link::{
        InfoData, InfoKind, InfoXfrm, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
    };
    use netlink_packet_route::route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteNextHop, RouteType, RouteVia,
    };

    use super::*;
    use crate::kernel::model::LinkKind;
    use crate::kernel::request::finish;

    fn decoded(inner: RouteNetlinkMessage, flags: u16) -> Vec<Received> {
        let bytes = finish(inner, flags, 7);
        messages(&bytes).collect()
    }

    fn only(inner: RouteNetlinkMessage, flags: u16) -> Message {
        let mut all = decoded(inner, flags);
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].sequence, 7);
        all.remove(0).message.unwrap()
    }

    fn default_route() -> RouteMessage {
        let mut m = RouteMessage::default();
        m.header.address_family = AddressFamily::Inet;
        m.header.table = 254;
        m.header.kind = RouteType::Unicast;
        m
    }

    #[test]
    fn a_route_with_two_weighted_routers_of_both_families_is_understood() {
        let mut m = default_route();
        m.header.destination_prefix_length = 9;
        let mut first = RouteNextHop::default();
        first.interface_index = 3;
        first.hops = 2;
        first.attributes = vec![RouteAttribute::Gateway(RouteAddress::Inet(
            [192, 0, 2, 1].into(),
        ))];
        let mut second = RouteNextHop::default();
        second.interface_index = 4;
        second.attributes = vec![RouteAttribute::Via(RouteVia::Inet6(
            "fe80::1".parse().unwrap(),
        ))];
        m.attributes = vec![
            RouteAttribute::Table(70_000),
            RouteAttribute::Destination(RouteAddress::Inet([10, 129, 0, 0].into())),
            RouteAttribute::Priority(20),
            RouteAttribute::MultiPath(vec![first, second]),
        ];
        let Message::Update(Update::Route(key, route, change)) =
            only(RouteNetlinkMessage::NewRoute(m), NLM_F_REPLACE)
        else {
            panic!("a route")
        };
        assert_eq!(change, Change::Replace);
        assert_eq!(
            (key.table, key.addr, key.len, key.metric),
            (70_000, IpAddr::from([10, 128, 0, 0]), 9, 20)
        );
        let hops: Vec<_> = route
            .hops
            .list()
            .iter()
            .map(|h| (h.oif, h.via.map(|v| v.to_string()), h.weight))
            .collect();
        assert_eq!(
            hops,
            [
                (3, Some("192.0.2.1".into()), 3),
                (4, Some("fe80::1".into()), 1)
            ]
        );
    }

    #[test]
    fn routes_by_source_or_service_and_cached_answers_are_left_out() {
        let mut by_tos = default_route();
        by_tos.header.tos = 16;
        let mut cached = default_route();
        cached.header.flags = RouteFlags::Cloned;
        let mut by_source = default_route();
        by_source.header.address_family = AddressFamily::Inet6;
        by_source.header.source_prefix_length = 64;
        for m in [by_tos, cached, by_source] {
            assert_eq!(only(RouteNetlinkMessage::NewRoute(m), 0), Message::Nothing);
        }
    }

    #[test]
    fn only_states_with_a_link_address_make_a_neighbour_usable() {
        for (state, usable) in [
            (NeighbourState::Reachable, true),
            (NeighbourState::Stale, true),
            (NeighbourState::Delay, true),
            (NeighbourState::Probe, true),
            (NeighbourState::Permanent, true),
            (NeighbourState::Noarp, true),
            (NeighbourState::Failed, false),
            (NeighbourState::Incomplete, false),
            (NeighbourState::None, false),
        ] {
            for mac in [vec![2, 0, 0, 0, 0, 9], vec![], vec![1, 0, 0, 0, 0, 9]] {
                let unicast = mac.first() == Some(&2);
                let mut m = NeighbourMessage::default();
                m.header.family = AddressFamily::Inet;
                m.header.ifindex = 5;
                m.header.state = state;
                m.attributes = vec![
                    NeighbourAttribute::Destination(NeighbourAddress::Inet([10, 0, 0, 1].into())),
                    NeighbourAttribute::LinkLayerAddress(mac),
                ];
                let Message::Update(Update::Neighbour(5, addr, reach)) =
                    only(RouteNetlinkMessage::NewNeighbour(m), 0)
                else {
                    panic!("a neighbour")
                };
                assert_eq!(addr, IpAddr::from([10, 0, 0, 1]));
                assert_eq!(reach.is_some(), usable && unicast, "{state}");
                assert_eq!(
                    reach.is_some_and(|r| r.stale),
                    unicast && state == NeighbourState::Stale
                );
            }
        }
    }

    #[test]
    fn an_address_that_is_still_checked_is_not_valid() {
        let mut m = AddressMessage::default();
        m.header.family = AddressFamily::Inet6;
        m.header.prefix_len = 64;
        m.header.index = 2;
        m.attributes = vec![
            AddressAttribute::Address("2001:db8::1".parse().unwrap()),
            AddressAttribute::Flags(AddressFlags::Tentative),
        ];
        let Message::Update(Update::Address(2, _, a)) = only(RouteNetlinkMessage::NewAddress(m), 0)
        else {
            panic!("an address")
        };
        assert_eq!((a.len, a.valid), (64, false));
    }

    #[test]
    fn an_xfrm_device_is_known_by_its_number() {
        let mut m = LinkMessage::default();
        m.header.index = 9;
        m.header.flags = LinkFlags::Up | LinkFlags::LowerUp;
        m.attributes = vec![
            LinkAttribute::IfName("ipsec0".into()),
            LinkAttribute::Mtu(1400),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Xfrm),
                LinkInfo::Data(InfoData::Xfrm(vec![InfoXfrm::Link(1), InfoXfrm::IfId(42)])),
            ]),
        ];
        let Message::Update(Update::Link(9, link)) = only(RouteNetlinkMessage::NewLink(m), 0)
        else {
            panic!("a device")
        };
        assert_eq!(link.kind, LinkKind::Xfrm { if_id: 42 });
        assert_eq!((link.up, link.carrier, link.mtu), (true, true, 1400));
    }

    #[test]
    fn broken_datagrams_end_with_an_error_and_never_loop() {
        let whole = finish(RouteNetlinkMessage::NewRoute(default_route()), 0, 1);
        for cut in 1..whole.len() {
            let all: Vec<_> = messages(&whole[..cut]).collect();
            assert_eq!(all.len(), 1, "cut at {cut}");
            assert!(all[0].message.is_err());
        }
        let mut zero = whole.clone();
        zero[..4].fill(0);
        assert!(messages(&zero).all(|r| r.message.is_err()));
        let two = [whole.clone(), whole].concat();
        assert_eq!(messages(&two).count(), 2);
    }
}
