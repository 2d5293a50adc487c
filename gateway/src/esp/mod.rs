//! The ESP core: RFC 4303 encapsulation and decapsulation in place, and what belongs to it on the way (ECN,
//! ICMP errors, fragments, MSS). No clock and no I/O: time, sequence numbers and randomness are arguments.
//!
//! Every function here works on frames whose data starts at the IP header and ends with the IP packet; see
//! [`strip_l2`]. The usual course outbound is [`encap::encap`], a cipher job over `frame.data_mut()[esp_off..]`,
//! [`encap::finish`]; inbound [`decap::pre`], replay check, a cipher job over the same range, [`decap::post`].

pub mod decap;
pub mod ecn;
pub mod encap;
pub mod fragment;
#[doc(hidden)]
pub mod fuzz;
pub mod icmp;
pub mod iv;
pub mod mss;
pub mod rate;
pub mod reassembly;
#[cfg(test)]
mod roundtrip;
#[cfg(test)]
pub(crate) mod testing;

use pmd::Frame;

use crate::wire::Parsed;

/// Cuts an Ethernet frame to the IP packet that `p` describes: header off, padding off. False, with the frame
/// unchanged or partly cut, only when `p` was not parsed from this frame.
#[inline]
pub fn strip_l2(frame: &mut Frame, p: &Parsed) -> bool {
    if !frame.trim_front(usize::from(p.l2_len)) {
        return false;
    }
    match frame.len().checked_sub(usize::from(p.l3_len)) {
        Some(0) => true,
        Some(padding) => frame.trim_back(padding),
        None => false,
    }
}
