//! Taking an SA from the kernel: it must never send with a key that we send with.
//!
//! An outbound SA of the kernel's gets the largest sequence number there is, so that whatever the kernel would send with it
//! overflows. An SA that the kernel has sent with is not taken, for its numbers and IVs are used: the daemon is asked
//! for a new one. The same marks tell after a restart of the gateway that a key is not new, whatever became of the
//! lease store.

use netlink_packet_xfrm::ExpireMessage;
use netlink_packet_xfrm::state::DelGetMessage;
use netlink_packet_xfrm::{
    Address, AsyncEventId, Lifetime, Mark, NewAsyncEventMessage, Replay, ReplayEsn, UserExpire,
    UserSaId, UserSaInfo, XfrmAttrs, XfrmMessage,
};
use sa_store::sa::{Direction, Mode};

use super::message::{Carried, KernelSa, SaKey};

/// What an SA in the kernel tells of its past.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Past {
    /// Nobody used its key.
    Fresh,
    /// A gateway had taken it: the lease store knows how far it came.
    Taken,
    /// The kernel itself has used it.
    Used,
}

/// The largest number of an SA.
pub(super) const fn last_number(sa: &KernelSa) -> u64 {
    if sa.esn { u64::MAX } else { u32::MAX as u64 }
}

/// What became of it so far.
pub(super) fn past(sa: &KernelSa, direction: Direction) -> Past {
    match direction {
        Direction::Out if sa.sent == last_number(sa) => Past::Taken,
        Direction::Out if sa.sent == 0 && sa.carried.packets == 0 => Past::Fresh,
        // The mark is the time of its first use: the kernel sets it with the first packet only.
        Direction::In if sa.carried.use_time == 0 && sa.received == 0 => Past::Fresh,
        // Whatever it was, only the lease store can tell how far the window is.
        Direction::In => Past::Taken,
        Direction::Out => Past::Used,
    }
}

/// Marks the SA in the kernel as ours. What it counts is given back as it was read.
pub(super) fn mark_taken(sa: &KernelSa, direction: Direction, now: u64) -> XfrmMessage {
    let mut carried = sa.carried;
    if carried.use_time == 0 {
        carried.use_time = now;
    }
    // Nothing was sent before, else it is not taken: the counters stay out, so that a packet that slips through shows.
    let lifetime = (direction == Direction::In).then_some(carried);
    report(sa, direction, sa.received, lifetime)
}

/// Gives counters and replay state to the kernel.
pub(super) fn report(
    sa: &KernelSa,
    direction: Direction,
    received: u64,
    carried: Option<Carried>,
) -> XfrmMessage {
    let sent = match direction {
        Direction::Out => last_number(sa),
        Direction::In => sa.sent,
    };
    let low = |n: u64| u32::try_from(n & u64::from(u32::MAX)).unwrap_or(u32::MAX);
    let mut nlas = mark(&sa.key);
    nlas.push(match sa.bitmap_words {
        // What lies below the top counts as seen: the kernel is not to open anything.
        Some(words) => XfrmAttrs::ReplayStateEsn(ReplayEsn {
            bmp_len: words,
            oseq: low(sent),
            seq: low(received),
            oseq_hi: low(sent >> 32),
            seq_hi: low(received >> 32),
            replay_window: sa.window,
            bmp: vec![u32::MAX; usize::try_from(words).unwrap_or(0)],
        }),
        None => XfrmAttrs::ReplayState(Replay {
            oseq: low(sent),
            seq: low(received),
            bitmap: u32::MAX,
        }),
    });
    if let Some(c) = carried {
        nlas.push(XfrmAttrs::LifetimeBytes(Lifetime {
            bytes: c.bytes,
            packets: c.packets,
            add_time: c.add_time,
            use_time: c.use_time,
        }));
    }
    XfrmMessage::NewAsyncEvent(NewAsyncEventMessage {
        id: AsyncEventId {
            sa_id: id(&sa.key),
            saddr: Address::from_ip(&sa.src),
            flags: 0,
            reqid: sa.reqid,
        },
        nlas,
    })
}

/// Asks the kernel for the SA as it is now.
pub(super) fn read(key: &SaKey) -> XfrmMessage {
    XfrmMessage::GetSa(DelGetMessage {
        user_sa_id: id(key),
        nlas: mark(key),
    })
}

/// Tells the kernel, which tells the daemon, that a limit of the SA is reached. A hard one also ends it there.
pub(super) fn expire(sa: &KernelSa, hard: bool) -> XfrmMessage {
    let mut state = UserSaInfo {
        seq: 0,
        reqid: sa.reqid,
        mode: u8::from(sa.mode == Some(Mode::Tunnel)),
        ..UserSaInfo::default()
    };
    state.source(&sa.src);
    state.destination(&sa.key.dst);
    state.id.spi = sa.key.spi;
    state.id.proto = 50;
    XfrmMessage::Expire(ExpireMessage {
        expire: UserExpire {
            state,
            hard: hard.into(),
        },
    })
}

fn id(key: &SaKey) -> UserSaId {
    let mut id = UserSaId {
        spi: key.spi,
        proto: 50,
        ..UserSaId::default()
    };
    id.destination(&key.dst);
    id
}

fn mark(key: &SaKey) -> Vec<XfrmAttrs> {
    let (value, mask) = key.mark;
    if (value, mask) == (0, 0) {
        return Vec::new();
    }
    vec![XfrmAttrs::Mark(Mark { value, mask })]
}
