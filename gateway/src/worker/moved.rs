//! Peers behind a NAT whose mapping changes: authentic ESP in UDP comes from another address or port (RFC 3948, RFC 7296 section 2.23).
//!
//! Only who negotiated the SA may answer to that. So it is told: control hears of it, and an IKE daemon gets what it looks
//! for. It believes its kernel alone, which sees the change in an authentic packet; so one packet a second goes to the
//! kernel, which holds the same SA, instead of being opened here.

use pmd::Frame;
use sa_store::file::MIRROR_PREFIX;
use sa_store::plan::OuterFamily;
use sa_store::runtime::SaEntry;

use super::core::{Shared, src_of};
use super::lane::Info;

/// Looks where an authentic packet came from. `packet` begins with the outer IP header, whose ESP header is at `esp_off`.
#[inline]
pub(super) fn follow(entry: &SaEntry, packet: &[u8], esp_off: u16, shared: &mut Shared) {
    let Some(from) = source(entry, packet, esp_off) else {
        return;
    };
    if is_expected(entry, from) {
        if entry.has_moved() {
            entry.settled();
        }
    } else if entry.tell_moved(shared.now) {
        shared.reports.moved(entry.fixed.id, from);
    }
}

/// Whether the packet, not opened yet, is to go to the kernel for a daemon to hear of the peer's new mapping.
#[inline]
pub(super) fn is_for_daemon(
    entry: &SaEntry,
    frame: &Frame,
    info: &Info,
    shared: &mut Shared,
) -> bool {
    entry.fixed.encap.is_some() && entry.has_moved() && is_due(entry, frame, info, shared)
}

#[cold]
#[inline(never)]
fn is_due(entry: &SaEntry, frame: &Frame, info: &Info, shared: &mut Shared) -> bool {
    let from = source(
        entry,
        frame.data(),
        info.p.esp_off().try_into().unwrap_or(0),
    );
    let Some(from) = from.filter(|f| !is_expected(entry, *f)) else {
        return false;
    };
    let due = entry.spec.name.starts_with(MIRROR_PREFIX)
        && shared.taps.mac(info.port).is_some()
        && entry.tell_moved(shared.now);
    if due {
        debug_assert_eq!(from.0, src_of(&info.p));
        shared.reports.moved(entry.fixed.id, from);
    }
    due
}

fn is_expected(entry: &SaEntry, from: (u128, u16)) -> bool {
    let port = entry.fixed.encap.map_or(0, |e| e.sport);
    from == (entry.fixed.src, port)
}

/// Source address, IPv4 as IPv4-mapped, and UDP port.
#[inline]
fn source(entry: &SaEntry, packet: &[u8], esp_off: u16) -> Option<(u128, u16)> {
    let udp = usize::from(esp_off).checked_sub(8)?;
    let port = u16::from_be_bytes(*packet.get(udp..)?.first_chunk()?);
    let src = match entry.fixed.inb.as_ref()?.family {
        OuterFamily::V4 => {
            u128::from(u32::from_be_bytes(*packet.get(12..)?.first_chunk()?)) | 0xffff << 32
        }
        OuterFamily::V6 => u128::from_be_bytes(*packet.get(8..)?.first_chunk()?),
    };
    Some((src, port))
}
