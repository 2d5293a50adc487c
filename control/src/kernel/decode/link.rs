//! Devices.

use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVlan, InfoVrf, InfoXfrm, LinkAttribute, LinkFlags, LinkInfo,
    LinkMessage,
};

use crate::kernel::model::{Link, LinkKind};

/// Bridges tell of their ports in messages that look like those about devices.
pub(super) fn is_device(m: &LinkMessage) -> bool {
    m.header.interface_family == AddressFamily::Unspec
}

pub(super) fn link(m: &LinkMessage) -> Option<Link> {
    if !is_device(m) {
        return None;
    }
    let flags = m.header.flags;
    let mut link = Link {
        up: flags.contains(LinkFlags::Up),
        carrier: flags.contains(LinkFlags::LowerUp),
        ..Link::default()
    };
    let (mut parent, mut whole) = (0, false);
    for a in &m.attributes {
        match a {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => (link.mtu, whole) = (*mtu, true),
            LinkAttribute::Link(index) => parent = *index,
            LinkAttribute::Controller(index) => link.controller = Some(*index).filter(|i| *i != 0),
            LinkAttribute::LinkInfo(infos) => link.kind = kind(infos),
            _ => {}
        }
    }
    match &mut link.kind {
        LinkKind::Vlan { parent: p, .. } => *p = parent,
        kind @ LinkKind::Plain if flags.contains(LinkFlags::Loopback) => {
            *kind = LinkKind::Loopback;
        }
        _ => {}
    }
    // Some events of wireless devices tell of nothing else.
    whole.then_some(link)
}

fn kind(infos: &[LinkInfo]) -> LinkKind {
    let is = |kind| {
        infos
            .iter()
            .any(|i| matches!(i, LinkInfo::Kind(k) if *k == kind))
    };
    let data = infos.iter().find_map(|i| match i {
        LinkInfo::Data(d) => Some(d),
        _ => None,
    });
    match data {
        Some(InfoData::Xfrm(list)) => LinkKind::Xfrm {
            if_id: list
                .iter()
                .find_map(|x| match x {
                    InfoXfrm::IfId(id) => Some(*id),
                    _ => None,
                })
                .unwrap_or(0),
        },
        Some(InfoData::Vrf(list)) => list
            .iter()
            .find_map(|v| match v {
                InfoVrf::TableId(table) => Some(LinkKind::Vrf { table: *table }),
                _ => None,
            })
            .unwrap_or_default(),
        Some(InfoData::Vlan(list)) => list
            .iter()
            .find_map(|v| match v {
                InfoVlan::Id(id) => Some(LinkKind::Vlan { parent: 0, id: *id }),
                _ => None,
            })
            .unwrap_or_default(),
        // An xfrm device without a number never reaches a tunnel, and is not mistaken for an ordinary one.
        _ if is(InfoKind::Xfrm) => LinkKind::Xfrm { if_id: 0 },
        _ => LinkKind::Plain,
    }
}
