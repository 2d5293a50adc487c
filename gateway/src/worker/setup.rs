//! What a worker is made of; assembled by [`crate::app`] before the worker's thread starts.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use hashbrown::HashSet;
use pmd::port::MacAddr;
use pmd::{Pool, PortQueue};
use rtrb::Producer;
use sa_store::counters::Counter;
use sa_store::ledger::WorkerCounters;
use sa_store::report::Report;
use sa_store::runtime::mapped;
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

/// The gateway's own addresses.
#[derive(Clone, Debug, Default)]
pub struct Locals(HashSet<(u16, u128), rustc_hash::FxBuildHasher>);

impl Locals {
    /// From addresses with their VRF.
    pub fn new(addresses: impl IntoIterator<Item = (Vrf, IpAddr)>) -> Self {
        Self(
            addresses
                .into_iter()
                .map(|(v, a)| (v.0, mapped(a)))
                .collect(),
        )
    }

    /// Whether `addr` (IPv4 as IPv4-mapped) is ours in `vrf`.
    #[inline]
    pub fn contains(&self, vrf: Vrf, addr: u128) -> bool {
        self.0.contains(&(vrf.0, addr))
    }

    /// Some own address of the family, for the source of ICMP errors.
    pub fn any(&self, vrf: Vrf, v6: bool) -> Option<IpAddr> {
        let own = self
            .0
            .iter()
            .filter(|(v, _)| *v == vrf.0)
            .map(|(_, a)| Ipv6Addr::from(*a).to_canonical());
        own.filter(|a| a.is_ipv6() == v6).min()
    }
}

/// Settings that all workers share.
#[derive(Clone, Debug)]
pub struct PipelineConfig {
    /// Ports by number.
    pub ports: Vec<PortSetup>,
    /// Own addresses.
    pub locals: Locals,
    /// UDP port, beside 4500, on which NAT-T is expected.
    pub natt_port: u16,
    /// Bounds for fragments of ESP packets; `None` drops fragments.
    pub reassembly: Option<ReassemblyConfig>,
    /// Idling.
    pub idle: IdlePolicy,
    /// Flow cache entries per worker.
    pub flow_entries: usize,
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
