//! ICMP errors, RFC 4301 section 6: those about our own outer packets are told to control; those about inner packets
//! belong to the tunnel of the packet that they quote, whoever sent them.

use pmd::Frame;
use sa_store::drops::{Consumed, DropReason};
use sa_store::flow::{FlowKey, L4};
use sa_store::pmtu::TooBig;
use sa_store::runtime::TunnelIdx;
use sa_store::sa::Vrf;
use sa_store::snapshot::Snapshot;
use sa_store::spd::{Action, InboundVerdict, PolicyIdx, SelectorSet, Verdict};

use super::core::{Shared, dst_of, mapped};
use super::lane::Info;
use crate::wire::quote::{Quoted, QuotingError};
use crate::wire::{Family, proto};

impl Shared {
    /// Takes an ICMP error that says that an outer packet of ours was too big. Gives back anything else.
    #[cold]
    #[inline(never)]
    pub(super) fn outer_too_big(
        &mut self,
        snapshot: &Snapshot,
        frame: Frame,
        info: &Info,
    ) -> Option<Frame> {
        let Some(error) = QuotingError::read(frame.data(), &info.p) else {
            return Some(frame);
        };
        let (Some(mtu), Some((spi, seq))) = (error.too_big, error.quoted.esp) else {
            return Some(frame);
        };
        let (q, vrf) = (error.quoted, self.vrf(info.port));
        let (src, dst) = (mapped(q.family, q.src), mapped(q.family, q.dst));
        // It must have come to the sender of what it quotes.
        let ours = src == dst_of(&info.p) && snapshot.locals.contains(vrf, src);
        if !ours || !QuotingError::checksum_ok(frame.data(), &info.p) {
            self.drop(frame, DropReason::IcmpImplausible);
            return None;
        }
        let udp = match q.l4 {
            L4::Ports { src, dst } if q.proto == proto::UDP => Some((src, dst)),
            _ => None,
        };
        let told = self.reports.too_big(
            self.now,
            TooBig {
                vrf,
                src,
                dst,
                spi,
                seq,
                udp,
                mtu,
            },
        );
        if told {
            self.consume(frame, Consumed::PathMtu);
        } else {
            self.drop(frame, DropReason::IcmpImplausible);
        }
        None
    }
}

/// The tunnel for an ICMP error that no outbound policy covers: that of the packets which answer the quoted one, for those
/// and the quoted one belong together.
#[cold]
#[inline(never)]
pub(super) fn tunnel_of_error(
    snapshot: &Snapshot,
    verdict: Verdict,
    frame: &Frame,
    info: &Info,
    vrf: Vrf,
) -> Option<TunnelIdx> {
    // An explicit discard is the operator's word.
    if verdict.policy != PolicyIdx::DEFAULT {
        return None;
    }
    let key = quoted_key(frame, info, vrf)?;
    match snapshot.spd_out.lookup(&key).action {
        Action::Protect { tunnel } => Some(tunnel),
        _ => None,
    }
}

/// Whether an ICMP error from a tunnel, which policies do not let in as such, is about a packet that went into it.
#[cold]
#[inline(never)]
pub(super) fn error_may_enter(
    snapshot: &Snapshot,
    frame: &Frame,
    info: &Info,
    vrf: Vrf,
    via: Option<TunnelIdx>,
) -> bool {
    quoted_key(frame, info, vrf).is_some_and(|key| {
        let verdict = snapshot.spd_in.lookup(&key).inbound(via);
        matches!(verdict, InboundVerdict::Accept { .. })
    })
}

/// The same for an SA with selectors of its own.
#[cold]
#[inline(never)]
pub(super) fn error_matches(selectors: &SelectorSet, frame: &Frame, info: &Info, vrf: Vrf) -> bool {
    quoted_key(frame, info, vrf).is_some_and(|key| selectors.matches(&key))
}

/// Selectors of the packets that answer what an ICMP error quotes. The error must be on its way to the quoted packet's
/// sender.
fn quoted_key(frame: &Frame, info: &Info, vrf: Vrf) -> Option<FlowKey> {
    let quoted = QuotingError::read(frame.data(), &info.p)?.quoted;
    (quoted.src == info.p.dst).then(|| key(&quoted.answered(), vrf))
}

fn key(q: &Quoted, vrf: Vrf) -> FlowKey {
    let key = match q.family {
        #[allow(
            clippy::cast_possible_truncation,
            reason = "IPv4 addresses sit in the low 32 bits"
        )]
        Family::V4 => FlowKey::v4((q.src as u32).into(), (q.dst as u32).into(), q.proto, q.l4),
        Family::V6 => FlowKey::v6(q.src.into(), q.dst.into(), q.proto, q.l4),
    };
    key.with_vrf(vrf)
}
