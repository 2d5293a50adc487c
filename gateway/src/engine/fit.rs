//! Whether an engine can carry an SA, as far as its capabilities tell. The driver has the last word when the SA is installed.

use pmd::engine::Capabilities;
use sa_store::sa::{Direction, OffloadMode, SaSpec};

/// Why an engine with these capabilities cannot carry the SA as it asks; `None`: it can.
pub(super) fn refusal(can: &Capabilities, spec: &SaSpec) -> Option<String> {
    let packet = spec.offload == OffloadMode::Packet;
    let suites = match spec.offload {
        OffloadMode::Software => return Some("the SA is the CPU's".into()),
        OffloadMode::Crypto => &can.crypto,
        OffloadMode::Packet => &can.packet,
    };
    let mode = if packet { "packet" } else { "crypto" };
    if suites.is_empty() {
        return Some(format!("it has no {mode} mode"));
    }
    if !suites.contains(&spec.suite) {
        return Some(format!("it has no {} in {mode} mode", spec.suite));
    }
    if spec.esn && !can.esn {
        return Some("it has no 64-bit sequence numbers".into());
    }
    if spec.encap.is_some() && !can.nat_t {
        return Some("it has no UDP encapsulation".into());
    }
    if packet && spec.direction == Direction::In && spec.replay_window > can.window {
        return Some(format!(
            "its replay window has {} packets, {} are asked for",
            can.window, spec.replay_window
        ));
    }
    if packet && can.outer_headers && (spec.tfc.dummies() != 0 || spec.tfc.pad_to() != 0) {
        return Some("it makes no dummy packets and no traffic-flow padding".into());
    }
    None
}
