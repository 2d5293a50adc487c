//! Which SAs and policies of the kernel's are taken.

use sa_store::sa::{IfId, OffloadMode, Vrf};

use super::message::{KernelSa, PolicyKey};

/// Settings of the mirror.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// What is taken: whatever one of these fits. Empty: all without a mark.
    pub take: Vec<Take>,
    /// Routing table of the packets.
    pub vrf: Vrf,
    /// How the SAs are carried.
    pub offload: OffloadMode,
    /// Engine to use; none: the best one.
    pub engine: Option<String>,
    /// Bytes that the kernel may queue for us; at least some kilobytes.
    pub receive_buffer: usize,
    /// A test's: each netlink message is looked at this much later, milliseconds.
    pub delay_ms: u64,
}

/// A description of SAs and policies; what is absent does not matter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Take {
    /// Value and mask of the mark, as `ip xfrm state` shows it.
    pub mark: Option<(u32, u32)>,
    /// Interface id of an xfrm interface.
    pub if_id: Option<IfId>,
    /// First and last request id.
    pub reqid: Option<(u32, u32)>,
    /// Whether the daemon asked for hardware offload (`hw_offload`), on any interface.
    pub offload: Option<bool>,
    /// Index of the interface of that offload, or of the policy's selector.
    pub interface: Option<i32>,
}

impl Settings {
    /// Whether the SA is ours to take.
    pub(super) fn takes_sa(&self, sa: &KernelSa) -> bool {
        if self.take.is_empty() {
            return sa.key.mark == (0, 0);
        }
        self.take.iter().any(|t| {
            t.fits(sa.key.mark, sa.if_id)
                && t.reqid.is_none_or(|(a, b)| (a..=b).contains(&sa.reqid))
                && t.offload
                    .is_none_or(|wanted| wanted == sa.offload.is_some())
                && t.interface
                    .is_none_or(|i| sa.offload.is_some_and(|(o, _)| o == i))
        })
    }

    /// Whether a policy that protects nothing is taken. One that protects follows its SAs.
    pub(super) fn takes_policy(&self, key: &PolicyKey, reqid: Option<u32>) -> bool {
        if self.take.is_empty() {
            return key.mark == (0, 0) && key.interface == 0;
        }
        self.take.iter().any(|t| {
            t.fits(key.mark, key.if_id)
                && (key.interface == 0 || t.interface == Some(key.interface))
                && t.reqid
                    .is_none_or(|(a, b)| reqid.is_some_and(|r| (a..=b).contains(&r)))
        })
    }
}

impl Take {
    fn fits(&self, mark: (u32, u32), if_id: IfId) -> bool {
        self.mark.unwrap_or((0, 0)) == mark && self.if_id.is_none_or(|wanted| wanted == if_id)
    }
}
