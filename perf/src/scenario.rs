//! One measured configuration, and the SAs, policies and routes that it asks for.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use gateway::worker::gateway_now;
use sa_store::cipher::CipherFactory;
use sa_store::fib::{Fib, Neighbours, Route, RouteTo};
use sa_store::policy::{Action, AddrRange, Policy, Ports, Selector};
use sa_store::runtime::Start;
use sa_store::sa::{Direction, IfId, SaKeys, SaSpec, Spi, Vrf};
use sa_store::spd::Spd;
use sa_store::store::Store;
use sa_store::suite::Suite;
use serde::Serialize;

use crate::traffic::{FIRST_DESTINATION, Mix};

/// Anti-replay window of inbound SAs, packets.
pub const WINDOW: u32 = 1024;
/// Peers live in 198.18.0.0/15, each SA its own.
pub const FIRST_PEER: u32 = 0xc612_0000;
/// The gateway's outer address.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// Which worker gets a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Spread {
    /// The owner of its SA.
    Owner,
    /// Any worker, as with a NIC that cannot hash by SPI: (n - 1) / n of the packets are handed over.
    Any,
    /// The one SA's owner; the others help it to cipher.
    Help,
}

/// What is measured.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Algorithms.
    pub suite: Suite,
    /// Sealing or opening.
    pub direction: Direction,
    /// SAs, each of its own tunnel.
    pub sas: u32,
    /// Flows, spread evenly over policies and SAs; at least as many as SAs.
    pub flows: u32,
    /// Policies, each for one block of addresses.
    pub policies: u32,
    /// Workers.
    pub workers: usize,
    /// Who gets a packet when there are several workers.
    pub spread: Spread,
    /// Packet sizes.
    pub mix: Mix,
    /// Frames that cycle, per worker.
    pub frames: usize,
}

impl Scenario {
    /// Checks that the numbers go together.
    ///
    /// # Errors
    /// Says which do not.
    pub fn check(&self) -> Result<()> {
        if self.sas == 0 || self.sas > 1 << 17 {
            bail!("{} SAs: 1 to {} are possible", self.sas, 1 << 17);
        }
        if self.policies < self.sas || self.flows < self.sas {
            bail!(
                "{} SAs need as many policies ({}) and flows ({})",
                self.sas,
                self.policies,
                self.flows
            );
        }
        if self.spread == Spread::Help && self.sas != 1 {
            bail!("workers help with one SA, not with {}", self.sas);
        }
        if self.workers == 0 || self.frames < pmd::BURST {
            bail!("at least one worker and {} frames are needed", pmd::BURST);
        }
        Ok(())
    }

    /// Addresses that the policies cover.
    fn addresses(&self) -> u64 {
        u64::from(self.policies.max(self.flows))
    }

    /// Destination of a flow.
    pub fn destination(&self, flow: u32) -> u32 {
        FIRST_DESTINATION + narrow(u64::from(flow) * self.addresses() / u64::from(self.flows))
    }

    /// SA, and so tunnel, that carries a flow.
    pub fn sa_of(&self, flow: u32) -> u32 {
        let address = u64::from(self.destination(flow) - FIRST_DESTINATION);
        self.tunnel_of(narrow(
            address * u64::from(self.policies) / self.addresses(),
        ))
    }

    fn tunnel_of(&self, policy: u32) -> u32 {
        narrow(u64::from(policy) * u64::from(self.sas) / u64::from(self.policies))
    }

    /// The policies of one direction.
    pub fn policy_list(&self, direction: Direction) -> Vec<Policy> {
        let block = |policy: u32| {
            let first = (u64::from(policy) * self.addresses()).div_ceil(u64::from(self.policies));
            FIRST_DESTINATION + narrow(first)
        };
        (0..self.policies)
            .map(|policy| {
                let (first, last) = (block(policy), block(policy + 1) - 1);
                let action = Action::Protect {
                    tunnel: tunnel_name(self.tunnel_of(policy)),
                };
                block_policy(format!("p{policy}"), direction, first, last, action)
            })
            .collect()
    }

    /// Fills a store with the SAs for which `want` holds, all policies, and the routes between ports 0 (where
    /// packets come from) and 1.
    ///
    /// # Errors
    /// What the store refuses.
    pub fn install(
        &self,
        store: &mut Store,
        direction: Direction,
        factory: &dyn CipherFactory,
        clock: &quanta::Clock,
        want: impl Fn(u32) -> bool,
    ) -> Result<()> {
        let mut draft = store.draft();
        let start = Start {
            next_seq: 1,
            lease_end: 1 << 32,
            window_top: 0,
        };
        for sa in 0..self.sas {
            // Every tunnel has its number, so that owners agree whatever is wanted here.
            store.tunnel(&tunnel_name(sa));
            if want(sa) {
                let spec = Arc::new(self.sa(sa, direction));
                store.add_sa(&mut draft, spec, factory, start, gateway_now(clock))?;
            }
        }
        let out = if direction == Direction::Out {
            self.spd(store, Direction::Out, &self.policy_list(Direction::Out))?
        } else {
            Spd::empty(Direction::Out)
        };
        let inbound = if direction == Direction::In {
            self.spd(store, Direction::In, &self.policy_list(Direction::In))?
        } else {
            Spd::empty(Direction::In)
        };
        draft.set_spd(Arc::new(out), Arc::new(inbound));
        draft.set_fib(Arc::new(routes()?));
        store.publish(draft);
        store.reap();
        Ok(())
    }

    fn spd(&self, store: &Store, direction: Direction, policies: &[Policy]) -> Result<Spd> {
        Spd::build(direction, policies, |name| store.find_tunnel(name)).context("policies")
    }

    fn sa(&self, sa: u32, direction: Direction) -> SaSpec {
        // Sealer and opener of a measurement agree on who sends.
        let peer = Ipv4Addr::from_bits(FIRST_PEER + sa);
        let (src, dst) = match self.direction {
            Direction::Out => (GATEWAY, peer),
            Direction::In => (peer, GATEWAY),
        };
        SaSpec {
            tunnel: tunnel_name(sa),
            src: src.into(),
            dst: dst.into(),
            replay_window: match direction {
                Direction::In => WINDOW,
                Direction::Out => 0,
            },
            ..SaSpec::plain(
                &format!("sa{sa}"),
                direction,
                spi(sa),
                self.suite,
                keys(self.suite, sa),
            )
        }
    }
}

/// A policy for packets to a block of addresses.
pub fn block_policy(
    name: String,
    direction: Direction,
    first: u32,
    last: u32,
    action: Action,
) -> Policy {
    let v4 = |a| IpAddr::V4(Ipv4Addr::from_bits(a));
    let range = |first, last| AddrRange::new(v4(first), v4(last)).expect("first is not above last");
    Policy {
        name,
        direction,
        priority: 100,
        selectors: vec![Selector {
            src: range(0xac10_0000, 0xac1f_ffff),
            dst: range(first, last),
            proto: None,
            ports: Ports::Any,
        }],
        action,
        vrf: Vrf(0),
        if_id: IfId(0),
    }
}

/// Everything goes out of port 1, by one of two routes.
fn routes() -> Result<Fib> {
    let gateway = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1));
    let to = |addr: Ipv4Addr, len| Route {
        vrf: Vrf(0),
        addr: addr.into(),
        len,
        to: RouteTo::Via { port: 1, gateway },
    };
    let mut neighbours = Neighbours::default();
    let hop = neighbours.add(1, gateway);
    neighbours.learn(hop, [0x02, 0, 0, 0, 0xff, 2]);
    let list = [
        to(Ipv4Addr::new(10, 0, 0, 0), 8),
        to(Ipv4Addr::from_bits(FIRST_PEER), 15),
        to(GATEWAY, 32),
    ];
    Fib::build(&list, neighbours).context("routes")
}

/// Name of a tunnel.
pub fn tunnel_name(sa: u32) -> String {
    format!("t{sa}")
}

/// Spread over the lower half of the number space, as SPIs chosen at random are. ipsec-secgw compares them as signed
/// numbers and loses some when they differ by more.
pub fn spi(sa: u32) -> Spi {
    let mixed = (sa + 1).wrapping_mul(0x85eb_ca6b) & 0x7fff_ffff;
    Spi::new(mixed).unwrap_or_else(|| Spi::new(mixed | 1 << 30).expect("above the reserved values"))
}

/// Keys that differ from SA to SA. They guard nothing but generated packets.
pub fn keys(suite: Suite, sa: u32) -> SaKeys {
    let mut state = (u64::from(sa) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut make = |len: usize| {
        (0..len)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()[4]
            })
            .collect::<Vec<u8>>()
            .into()
    };
    SaKeys {
        enc: make(suite.enc_key_len()),
        auth: make(suite.auth_key_len()),
    }
}

/// Addresses, policies and SAs are all counted by `u32`.
fn narrow(n: u64) -> u32 {
    u32::try_from(n).expect("a quotient of two u32 products that is below one of them")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn scenario(sas: u32, flows: u32, policies: u32) -> Scenario {
        Scenario {
            suite: "aes-128-gcm-16".parse().unwrap(),
            direction: Direction::Out,
            sas,
            flows,
            policies,
            workers: 1,
            spread: Spread::Owner,
            mix: "64".parse().unwrap(),
            frames: 1024,
        }
    }

    #[test]
    fn flows_reach_every_sa_through_the_policy_that_covers_them() {
        for (sas, flows, policies) in [(1, 10, 1), (7, 10, 7), (3, 10, 1000), (5, 1000, 77)] {
            let s = scenario(sas, flows, policies);
            let list = s.policy_list(Direction::Out);
            assert_eq!(list.len(), policies as usize);
            let mut used = HashSet::new();
            for flow in 0..flows {
                let to = IpAddr::V4(Ipv4Addr::from_bits(s.destination(flow)));
                let hits: Vec<_> = list
                    .iter()
                    .filter(|p| p.selectors[0].dst.contains(to))
                    .collect();
                assert_eq!(hits.len(), 1);
                let tunnel = tunnel_name(s.sa_of(flow));
                assert_eq!(hits[0].action, Action::Protect { tunnel });
                used.insert(s.sa_of(flow));
            }
            assert_eq!(used.len(), sas as usize);
        }
    }

    #[test]
    fn spis_and_keys_differ() {
        let spis: HashSet<_> = (0..100_000).map(spi).collect();
        assert_eq!(spis.len(), 100_000);
        let suite = "aes-256-cbc-hmac-sha2-256-128".parse();
        let suite: Suite = suite.unwrap_or_else(|_| "aes-128-gcm-16".parse().unwrap());
        assert!(keys(suite, 1) != keys(suite, 2));
    }
}
