//! News that are taken in one by one come to the same as a dump of the end.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use proptest::prelude::*;

use super::message::{Change, KernelAction, KernelPolicy, SaKey};
use super::picture::Picture;
use super::settings::Settings;
use super::table::Table;
use super::tests::{heard, policy_of, sa_of};
use super::translate::Seized;
use crate::common::{Plane, control};
use crate::core::Control;
use sa_store::sa::Direction;

const OURS: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

/// One piece of news: of an SA, of a policy, or the moment when the news so far are published.
#[derive(Clone, Debug)]
enum News {
    Sa {
        n: u32,
        out: bool,
        generation: u32,
    },
    SaGone {
        n: u32,
        out: bool,
        generation: u32,
    },
    Policy {
        n: u32,
        way: u8,
        priority: u32,
        blocks: bool,
    },
    PolicyGone {
        n: u32,
        way: u8,
    },
    Flushed,
    Publish,
}

fn news() -> impl Strategy<Value = News> {
    let (n, generation) = (0..4_u32, 0..3_u32);
    prop_oneof![
        6 => (n.clone(), any::<bool>(), generation.clone())
            .prop_map(|(n, out, generation)| News::Sa { n, out, generation }),
        3 => (n.clone(), any::<bool>(), generation)
            .prop_map(|(n, out, generation)| News::SaGone { n, out, generation }),
        6 => (n.clone(), 0..3_u8, 1..3_u32, any::<bool>())
            .prop_map(|(n, way, priority, blocks)| News::Policy { n, way, priority, blocks }),
        3 => (n, 0..3_u8).prop_map(|(n, way)| News::PolicyGone { n, way }),
        1 => Just(News::Flushed),
        6 => Just(News::Publish),
    ]
}

/// Two request ids at each of two peers.
fn peer(n: u32) -> IpAddr {
    Ipv4Addr::from(0xc000_0202 + n / 2).into()
}

fn spi(n: u32, out: bool, generation: u32) -> u32 {
    0x1000 + n * 16 + generation * 2 + u32::from(out)
}

fn policy(n: u32, way: u8, priority: u32, blocks: bool) -> KernelPolicy {
    let Change::Policy(mut p) = heard(policy_of(way, peer(n), n + 1)) else {
        panic!("a policy");
    };
    p.priority = priority;
    if blocks {
        p.action = KernelAction::Block;
    }
    *p
}

impl News {
    fn change(&self) -> Option<Change> {
        Some(match *self {
            Self::Sa { n, out, generation } => {
                heard(sa_of(out, peer(n), n + 1, spi(n, out, generation)))
            }
            Self::SaGone { n, out, generation } => Change::SaGone(SaKey {
                dst: if out { peer(n) } else { OURS },
                spi: spi(n, out, generation),
                mark: (0, 0),
            }),
            Self::Policy {
                n,
                way,
                priority,
                blocks,
            } => Change::Policy(Box::new(policy(n, way, priority, blocks))),
            Self::PolicyGone { n, way } => Change::PolicyGone(policy(n, way, 1, false).key),
            Self::Flushed => Change::PoliciesFlushed,
            Self::Publish => return None,
        })
    }
}

struct Gateway {
    picture: Picture,
    control: Control,
}

impl Gateway {
    fn new() -> Self {
        let plane = Arc::new(Plane::default());
        Self {
            picture: Picture::default(),
            control: control(&plane, Vec::new()),
        }
    }

    fn publish(&mut self, table: &mut Table) {
        let ours = |a: IpAddr| a == OURS;
        let touched = table.take_touched();
        self.picture.regroup(&touched, table, &ours);
        self.draw(table);
    }

    fn draw(&mut self, table: &Table) {
        let ours = |a: IpAddr| a == OURS;
        let all = |_: &SaKey| Some(Seized::Ours { first_use: true });
        let drawn = self.picture.draw(table, &Settings::default(), &ours, &all);
        let outcome = self.control.mirror_parts(drawn.parts);
        assert_eq!(outcome.left_out, []);
        self.control.tick();
    }

    /// SAs, senders, and policies in the order of look-up.
    fn state(&self) -> (BTreeSet<String>, BTreeSet<String>, [Vec<String>; 2]) {
        let store = self.control.store();
        let snapshot = store.current();
        let sas = snapshot.sas.iter().flatten();
        let names = sas.map(|e| e.spec.name.clone()).collect();
        let tunnels = store.tunnels().iter();
        let senders = tunnels.filter_map(|t| {
            let idx = store.find_tunnel(&t.name)?;
            Some(snapshot.outbound(idx)?.spec.name.clone())
        });
        let list = |d| {
            let spd = match d {
                Direction::Out => &snapshot.spd_out,
                Direction::In => &snapshot.spd_in,
            };
            let of =
                |p: &sa_store::policy::Policy| format!("{} {} {:?}", p.priority, p.name, p.action);
            spd.policies().map(|(_, p)| of(p)).collect()
        };
        (
            names,
            senders.collect(),
            [list(Direction::In), list(Direction::Out)],
        )
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn taken_in_one_by_one_or_at_once_it_comes_to_the_same(news in proptest::collection::vec(news(), 1..60)) {
        let mut table = Table::default();
        let mut follower = Gateway::new();
        for n in &news {
            match n.change() {
                Some(change) => table.apply(change),
                None => follower.publish(&mut table),
            }
        }
        follower.publish(&mut table);
        let mut fresh = Gateway::new();
        fresh.picture.regroup_all(&table, &|a| a == OURS);
        fresh.draw(&table);
        prop_assert_eq!(follower.state(), fresh.state());
    }
}
