//! What a worker is made of; assembled by [`crate::app`] before the worker's thread starts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};

use pmd::port::MacAddr;
use pmd::{Pool, PortQueue};
use rtrb::Producer;
use sa_store::counters::Counter;
use sa_store::ledger::{Punt, WorkerCounters};
use sa_store::report::Report;
use sa_store::sa::Vrf;
use sa_store::snapshot::Reader;
use sa_store::spd::Verdict;

use super::handover::Handover;
use super::idle::IdlePolicy;
use crate::engine::Bank;
use crate::engine::parallel::CryptoHelper;
use crate::esp::reassembly::ReassemblyConfig;

/// On which side of the protection boundary a port lies, RFC 4301 section 3.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Protected: what arrives goes through the outbound SPD.
    Inside,
    /// Unprotected: ESP, and clear text that the inbound SPD must allow.
    Outside,
}

/// A port as the pipeline sees it.
#[derive(Clone, Debug)]
pub struct PortSetup {
    /// Name, for logs.
    pub name: String,
    /// Side.
    pub side: Side,
    /// VRF of packets that arrive here.
    pub vrf: Vrf,
    /// VLAN that the port belongs to; frames with another tag are not ours.
    pub vlan: Option<u16>,
    /// Source address of what we send.
    pub mac: MacAddr,
    /// Largest IP packet to send, bytes.
    pub mtu: u16,
    /// The port whose queues this one shares; the two differ in their VLAN. It must come earlier in the list.
    pub shares: Option<u16>,
}

/// Largest IP packet of each port at present, bytes. The kernel may lower that of an interface while it runs, and raise it
/// again up to what the port was opened with.
#[derive(Clone, Debug)]
pub struct Mtus(Arc<[(u16, AtomicU16)]>);

impl Mtus {
    /// Smallest that is taken over: what every host must be able to receive, RFC 791.
    const LEAST: u16 = 576;

    /// Those that the ports were opened with.
    pub fn new(ports: &[PortSetup]) -> Self {
        let all = ports.iter().map(|p| (p.mtu, AtomicU16::new(p.mtu)));
        Self(all.collect())
    }

    /// A port's.
    #[inline]
    pub fn get(&self, port: usize) -> u16 {
        self.0.get(port).map_or(0, |(_, now)| now.load(Relaxed))
    }

    /// The kernel has another for a port's interface.
    pub fn set(&self, port: u16, mtu: u32) {
        if let Some((opened, now)) = self.0.get(usize::from(port)) {
            let wanted = u16::try_from(mtu).unwrap_or(u16::MAX);
            now.store(wanted.max(Self::LEAST).min(*opened), Relaxed);
        }
    }
}

/// Settings that all workers share.
#[derive(Clone, Debug)]
pub struct PipelineConfig {
    /// Ports by number.
    pub ports: Vec<PortSetup>,
    /// Their largest packets.
    pub mtus: Mtus,
    /// UDP port, beside 4500, on which NAT-T is expected.
    pub natt_port: u16,
    /// How long an ESP packet with an unknown SPI waits for its SA, nanoseconds; `None`: not at all.
    pub hold_unknown: Option<u64>,
    /// Bounds for fragments of ESP packets; `None` drops fragments.
    pub reassembly: Option<ReassemblyConfig>,
    /// Idling.
    pub idle: IdlePolicy,
    /// Flow cache entries per worker.
    pub flow_entries: usize,
    /// Bounds of what goes to the kernel.
    pub punt: PuntLimits,
}

/// Bounds of what one worker gives to the kernel by one port's TAP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PuntLimits {
    /// Frames per second by class, in the order of [`Punt::ALL`].
    pub rates: [u32; Punt::COUNT],
    /// Frames that a worker writes in one poll round, over all ports: each is a system call.
    pub per_round: u16,
}

impl Default for PuntLimits {
    fn default() -> Self {
        Self {
            rates: [2000, 5000, 1000, 1000, 10_000],
            per_round: 16,
        }
    }
}

/// Parts of one worker.
pub struct WorkerParts {
    /// Number, from 0.
    pub id: usize,
    /// CPU to run on; `None`: wherever the system puts it.
    pub cpu: Option<usize>,
    /// Way to the snapshots.
    pub reader: Reader,
    /// Frames.
    pub pool: Pool,
    /// This worker's queues of each port, by port number. It receives from all and sends on the first. None: frames for
    /// the port go through another worker.
    pub queues: Vec<Vec<Box<dyn PortQueue>>>,
    /// For each port, a worker that has a queue of it.
    pub queue_owner: Vec<usize>,
    /// This worker's queue of each port's TAP, by port number.
    pub taps: Vec<Option<Box<dyn PortQueue>>>,
    /// What ciphers.
    pub bank: Bank,
    /// Ciphers for other workers, where workers help each other.
    pub helper: Option<CryptoHelper>,
    /// Rings to and from the other workers.
    pub handover: Handover,
    /// Counters.
    pub counters: Arc<WorkerCounters>,
    /// Hits per policy number: outbound, inbound. Fixed length; larger numbers share the last place.
    pub policy_hits: Arc<PolicyHits>,
    /// What control is told beside counters.
    pub reports: Producer<Report>,
    /// Settings.
    pub config: Arc<PipelineConfig>,
}

/// Hit counters of one worker by policy number. Under load they are behind by up to about a second, for packets are
/// first counted by flow.
#[derive(Debug)]
pub struct PolicyHits {
    /// Outbound SPD.
    pub out: Box<[Counter]>,
    /// Inbound SPD.
    pub inbound: Box<[Counter]>,
}

impl PolicyHits {
    /// Room for `policies` in each direction.
    pub fn new(policies: usize) -> Self {
        let make = || (0..policies.max(1)).map(|_| Counter::default()).collect();
        Self {
            out: make(),
            inbound: make(),
        }
    }

    /// A way to count packets of verdicts on `counters`.
    #[inline]
    pub(crate) fn count(counters: &[Counter]) -> impl Fn(Verdict, u32) {
        move |verdict, packets| {
            let own = counters.get(verdict.policy.index());
            if let Some(c) = own.or_else(|| counters.last()) {
                c.add(u64::from(packets));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_lowers_a_port_s_mtu_and_raises_it_up_to_what_it_was_opened_with() {
        let port = PortSetup {
            name: "wan".into(),
            side: Side::Outside,
            vrf: Vrf(0),
            vlan: None,
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
            mtu: 1500,
            shares: None,
        };
        let mtus = Mtus::new(&[port]);
        for (kernel, ours) in [(1400, 1400), (9000, 1500), (68, 576), (70_000, 1500)] {
            mtus.set(0, kernel);
            assert_eq!(mtus.get(0), ours, "{kernel}");
        }
        mtus.set(7, 1400);
        assert_eq!(mtus.get(7), 0);
    }
}
