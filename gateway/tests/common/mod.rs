//! Two gateways back to back over memory ports, with the wire between them in the test's hand.

#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "each test binary uses its part"
)]

mod assembly;
mod bed;
pub mod models;
mod packets;

use std::net::IpAddr;
use std::sync::Arc;

use gateway::app::AssemblyConfig;
use gateway::engine::Desk;
use pmd::memory::MemoryQueue;
use pmd::{Arena, PortQueue};
use sa_store::policy::{Action, AddrRange, Policy, Ports, Selector};
use sa_store::runtime::Start;
use sa_store::sa::*;
use sa_store::suite::{AeadIcv, AesBits, Suite};

pub use assembly::bed;
pub use bed::{Bed, Site};
pub use packets::{icmp_error, payload_of, too_big, udp, with_byte};

pub const MAC_HOST: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const GCM: Suite = Suite::Gcm(AesBits::B128, AeadIcv::L16);

pub fn ip(s: &str) -> IpAddr {
    s.parse().unwrap()
}

pub fn prefix(s: &str) -> AddrRange {
    let (a, l) = s.split_once('/').unwrap();
    AddrRange::prefix(ip(a), l.parse().unwrap()).unwrap()
}

pub fn any(src: &str, dst: &str) -> Selector {
    Selector {
        src: prefix(src),
        dst: prefix(dst),
        proto: None,
        ports: Ports::Any,
    }
}

pub fn sa(name: &str, direction: Direction, spi: u32, a: &str, b: &str, suite: Suite) -> SaSpec {
    SaSpec {
        tunnel: "t".into(),
        src: ip(a),
        dst: ip(b),
        esn: true,
        replay_window: 1024,
        ..SaSpec::plain(
            name,
            direction,
            Spi::new(spi).unwrap(),
            suite,
            SaKeys {
                enc: (1..).take(suite.enc_key_len()).collect::<Vec<u8>>().into(),
                auth: (100..)
                    .take(suite.auth_key_len())
                    .collect::<Vec<u8>>()
                    .into(),
            },
        )
    }
}

pub fn policy(
    name: &str,
    direction: Direction,
    selectors: Vec<Selector>,
    action: Action,
) -> Policy {
    Policy {
        name: name.into(),
        direction,
        priority: 10,
        selectors,
        action,
        vrf: Vrf(0),
        if_id: IfId(0),
    }
}

/// Discards UDP to one port: what a fragment hides decides.
pub fn discard_one_port() -> Policy {
    let ports = Ports::Range {
        src: 0..=65535,
        dst: 2000..=2000,
    };
    let selector = Selector {
        proto: Some(17),
        ports,
        ..any("10.1.0.0/16", "10.2.0.0/16")
    };
    Policy {
        priority: 1,
        ..policy("port", Direction::Out, vec![selector], Action::Discard)
    }
}

/// Changes the assembly of a site; true for the left one.
pub type ConfigChange = Box<dyn Fn(&mut AssemblyConfig, bool)>;

/// What a bed is to look like.
pub struct Plan {
    pub workers: usize,
    pub suite: Suite,
    pub mtu: u16,
    /// Changes the SAs before they are installed: `l2r` and `r2l`, as outbound SAs.
    pub sa: Box<dyn Fn(&mut SaSpec)>,
    /// Changes each site's assembly; true for the left one.
    pub config: ConfigChange,
    /// Where numbering starts.
    pub start: Start,
    pub frames: u32,
    pub ring: usize,
    /// The engines of each site; true for the left one.
    pub engines: Engines,
    /// Entries of the left site's TAPs; none without.
    pub taps: Option<usize>,
    /// Puts something around the port from which the left gateway sends to the right one.
    pub around: Around,
}

/// Opens engines that work on frames of the arena.
pub type Engines = Box<dyn Fn(&Arc<Arena>, bool) -> Vec<Arc<Desk>>>;

/// See [`Plan::around`].
pub type Around = fn(MemoryQueue) -> Box<dyn PortQueue>;

impl Default for Plan {
    fn default() -> Self {
        Self {
            workers: 1,
            suite: GCM,
            mtu: 1500,
            sa: Box::new(|_| {}),
            config: Box::new(|_, _| {}),
            start: Start {
                next_seq: 1,
                lease_end: u64::from(u32::MAX),
                window_top: 0,
            },
            frames: 4096,
            ring: 1024,
            engines: Box::new(|_, _| Vec::new()),
            taps: None,
            around: |queue| Box::new(queue),
        }
    }
}
