//! A kernel in miniature that tells what the real one tells, and keeps silent where the real one does.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::super::model::KernelHop;
use super::*;

/// What stands in the socket's queue, in its order.
#[derive(Clone, Debug)]
enum Told {
    Change(Update),
    /// With the number of the dump.
    Part(u32, Vec<Update>),
    Done(u32),
    Lost,
}

#[derive(Default)]
struct Kernel {
    truth: Tables,
    queue: VecDeque<Told>,
    dump: Option<(Class, Option<RouteKey>)>,
    /// A part that was filled but is not in the queue yet.
    filled: Option<Vec<Update>>,
    /// Numbers of the last dump that was asked for, and of the one that the kernel makes.
    asked: u32,
    making: u32,
}

#[derive(Clone, Debug)]
enum Step {
    Add {
        key: RouteKey,
        hop: KernelHop,
        change: Change,
    },
    Remove {
        key: RouteKey,
        which: usize,
    },
    Down(u32),
    Up(u32),
    Neighbour(u8, Option<u8>),
    Own(u8, bool),
    /// The kernel fills a part of the dump that runs.
    Fill(usize),
    /// It puts it into the queue.
    Queue,
    /// The mirror reads what stands first.
    Read(usize),
    /// The mirror asks for the next dump that it wants.
    Ask,
    /// The queue runs over.
    Overrun,
}

fn unicast(hop: KernelHop) -> KernelRoute {
    KernelRoute {
        kind: RouteKind::Unicast,
        protocol: 4,
        hops: Hops::One(hop),
    }
}

fn neighbour(n: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, n])
}

impl Kernel {
    fn tell(&mut self, u: Update) {
        self.queue.push_back(Told::Change(u));
    }

    fn add(&mut self, key: RouteKey, hop: KernelHop, change: Change) {
        if !self.truth.links.get(&hop.oif).is_some_and(|l| l.up) {
            return;
        }
        let v6 = key.addr.is_ipv6();
        let list = self.truth.routes.entry(key).or_default();
        let mut route = unicast(hop);
        match change {
            Change::Replace if !list.is_empty() => {
                if list.iter().any(|r| r.same(&route)) {
                    return;
                }
                list[0] = route.clone();
            }
            _ if v6 && !list.is_empty() => {
                // One route of several routers.
                let mut hops = list[0].hops.list().to_vec();
                if change != Change::Append || hops.contains(&hop) {
                    return;
                }
                hops.push(hop);
                route.hops = Hops::new(&hops);
                list[0] = route.clone();
            }
            _ if list.iter().any(|r| r.same(&route)) => return,
            Change::Append => list.push(route.clone()),
            _ => list.insert(0, route.clone()),
        }
        self.tell(Update::Route(key, route, change));
    }

    fn remove(&mut self, key: RouteKey, which: usize) {
        let Some(list) = self.truth.routes.get_mut(&key) else {
            return;
        };
        let i = which % list.len();
        let gone = if key.addr.is_ipv6() && list[i].hops.list().len() > 1 && which.is_multiple_of(2)
        {
            let mut hops = list[i].hops.list().to_vec();
            let hop = hops.remove(which / 2 % hops.len());
            list[i].hops = Hops::new(&hops);
            unicast(hop)
        } else {
            list.remove(i)
        };
        if list.is_empty() {
            self.truth.routes.remove(&key);
        }
        self.tell(Update::RouteGone(key, gone));
    }

    fn link(&mut self, index: u32, up: bool) {
        let link = Link {
            name: format!("eth{index}"),
            up,
            carrier: up,
            mtu: 1500,
            ..Link::default()
        };
        self.truth.links.insert(index, link.clone());
        self.tell(Update::Link(index, link));
        if up {
            return;
        }
        // Silently.
        for list in self.truth.routes.values_mut() {
            list.retain(|r| r.hops.list().iter().all(|h| h.oif != index));
        }
        self.truth.routes.retain(|_, list| !list.is_empty());
    }

    fn step(&mut self, mirror: &mut Mirror, step: &Step) {
        match step {
            Step::Add { key, hop, change } => self.add(*key, *hop, *change),
            Step::Remove { key, which } => self.remove(*key, *which),
            Step::Down(index) => self.link(*index, false),
            Step::Up(index) => self.link(*index, true),
            Step::Neighbour(n, mac) => {
                let reach = mac.map(|m| Reach {
                    mac: [2, 0, 0, 0, 0, m],
                    stale: false,
                });
                let key = (1, neighbour(*n));
                match reach {
                    Some(r) => drop(self.truth.neighbours.insert(key, r)),
                    None => drop(self.truth.neighbours.remove(&key)),
                }
                self.tell(Update::Neighbour(1, key.1, reach));
            }
            Step::Own(n, there) => {
                let (key, a) = (
                    (1, neighbour(*n)),
                    Address {
                        len: 24,
                        valid: true,
                    },
                );
                if *there {
                    self.truth.addresses.insert(key, a);
                    self.tell(Update::Address(1, key.1, a));
                } else if self.truth.addresses.remove(&key).is_some() {
                    self.tell(Update::AddressGone(1, key.1));
                }
            }
            Step::Fill(n) => self.fill(*n),
            Step::Queue => {
                if let Some(part) = self.filled.take() {
                    self.queue.push_back(Told::Part(self.making, part));
                    if self.dump.is_none() {
                        self.queue.push_back(Told::Done(self.making));
                    }
                }
            }
            Step::Read(n) => {
                for _ in 0..*n {
                    self.read(mirror);
                }
            }
            Step::Ask => self.ask(mirror),
            Step::Overrun => {
                // What stood in the queue is lost, and the dump that runs with it.
                self.queue.clear();
                self.dump = None;
                self.filled = None;
                self.queue.push_back(Told::Lost);
            }
        }
    }

    fn ask(&mut self, mirror: &mut Mirror) {
        let busy = self.dump.is_some() || self.filled.is_some() || mirror.dumping().is_some();
        if let (false, Some(class)) = (busy, mirror.wanted()) {
            mirror.begin(class);
            self.asked += 1;
            self.making = self.asked;
            self.dump = Some((class, None));
        }
    }

    /// The next entries of the dump, in the order of keys; what changed meanwhile is as it is now.
    fn fill(&mut self, n: usize) {
        let (Some((class, after)), None) = (self.dump, &self.filled) else {
            return;
        };
        let mut part = Vec::new();
        match class {
            Class::Links => {
                for (i, l) in &self.truth.links {
                    part.push(Update::Link(*i, l.clone()));
                }
            }
            Class::Addresses => {
                for ((i, a), v) in &self.truth.addresses {
                    part.push(Update::Address(*i, *a, *v));
                }
            }
            Class::Neighbours => {
                for ((i, a), v) in &self.truth.neighbours {
                    part.push(Update::Neighbour(*i, *a, Some(*v)));
                }
            }
            Class::Routes4 | Class::Routes6 => {
                let v6 = class == Class::Routes6;
                let rest = self
                    .truth
                    .routes
                    .iter()
                    .filter(|(k, _)| k.addr.is_ipv6() == v6 && after.is_none_or(|a| **k > a));
                let mut last = None;
                for (k, list) in rest.take(n) {
                    last = Some(*k);
                    for r in list {
                        part.push(Update::Route(*k, r.clone(), Change::Create));
                    }
                }
                if let Some(last) = last {
                    self.dump = Some((class, Some(last)));
                    self.filled = Some(part);
                    return;
                }
            }
        }
        self.dump = None;
        self.filled = Some(part);
    }

    fn read(&mut self, mirror: &mut Mirror) {
        match self.queue.pop_front() {
            Some(Told::Change(u)) => mirror.event(u),
            Some(Told::Part(n, part)) if n == self.asked => {
                part.into_iter().for_each(|u| mirror.dumped(u));
            }
            Some(Told::Done(n)) if n == self.asked => mirror.end(false),
            // Of a dump that was given up.
            Some(Told::Part(..) | Told::Done(_)) => {}
            Some(Told::Lost) => mirror.lose(),
            None => {}
        }
    }

    /// Everything that is under way comes to its end; how many dumps that took.
    fn settle(&mut self, mirror: &mut Mirror) -> usize {
        let mut dumps = 0;
        loop {
            self.step(mirror, &Step::Fill(100));
            self.step(mirror, &Step::Queue);
            while !self.queue.is_empty() {
                self.read(mirror);
            }
            if self.dump.is_some() || self.filled.is_some() {
                continue;
            }
            if mirror.wanted().is_none() {
                return dumps;
            }
            dumps += 1;
            assert!(dumps < 30, "dumps without end");
            self.ask(mirror);
        }
    }
}

fn key() -> impl Strategy<Value = RouteKey> {
    (0..3_u8, prop::bool::ANY, 0..2_u32).prop_map(|(n, v6, metric)| RouteKey {
        table: 254,
        addr: if v6 {
            IpAddr::from([0x2001, 0xdb8, u16::from(n), 0, 0, 0, 0, 0])
        } else {
            IpAddr::from([10, n, 0, 0])
        },
        len: if v6 { 48 } else { 16 },
        metric,
    })
}

fn step() -> impl Strategy<Value = Step> {
    let change = prop_oneof![
        Just(Change::Create),
        Just(Change::Append),
        Just(Change::Replace)
    ];
    let hop = (1..3_u32, 0..3_u8);
    prop_oneof![
        6 => (key(), hop, change).prop_map(|(key, (oif, n), change)| {
            let via = if key.addr.is_ipv6() {
                IpAddr::from([0xfe80, 0, 0, 0, 0, 0, 0, u16::from(n)])
            } else {
                IpAddr::from([192, 0, 2, n])
            };
            Step::Add { key, hop: KernelHop { oif, via: Some(via), weight: 1, wrapped: false }, change }
        }),
        5 => (key(), 0..6_usize).prop_map(|(key, which)| Step::Remove { key, which }),
        1 => (1..3_u32).prop_map(Step::Down),
        1 => (1..3_u32).prop_map(Step::Up),
        2 => (0..3_u8, prop::option::of(0..3_u8)).prop_map(|(n, m)| Step::Neighbour(n, m)),
        1 => (0..3_u8, prop::bool::ANY).prop_map(|(n, t)| Step::Own(n, t)),
        3 => (1..4_usize).prop_map(Step::Fill),
        3 => Just(Step::Queue),
        5 => (1..4_usize).prop_map(Step::Read),
        3 => Just(Step::Ask),
        1 => Just(Step::Overrun),
    ]
}

fn started() -> (Kernel, Mirror) {
    let (mut kernel, mut mirror) = (Kernel::default(), Mirror::default());
    kernel.link(1, true);
    kernel.link(2, true);
    mirror.lose();
    (kernel, mirror)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// Changes of both families between, before and behind the parts of dumps, parts that the queue gets late, overruns.
    #[test]
    fn any_interleaving_of_dumps_and_changes_ends_as_a_fresh_dump_would(
        steps in prop::collection::vec(step(), 0..120)
    ) {
        let (mut kernel, mut mirror) = started();
        for s in &steps {
            kernel.step(&mut mirror, s);
        }
        kernel.settle(&mut mirror);
        prop_assert!(mirror.is_complete());
        prop_assert_eq!(mirror.tables(), &kernel.truth);
    }

    /// Once it has caught up, changes alone keep it so, and it asks for no dump but where the kernel is silent.
    #[test]
    fn changes_alone_keep_it_in_step(steps in prop::collection::vec(step(), 0..80)) {
        let (mut kernel, mut mirror) = started();
        kernel.settle(&mut mirror);
        let plain = steps.iter().filter(|s| {
            matches!(s, Step::Add { .. } | Step::Neighbour(..) | Step::Read(_))
                || matches!(s, Step::Remove { key, .. } if key.addr.is_ipv4())
        });
        for s in plain {
            kernel.step(&mut mirror, s);
        }
        while !kernel.queue.is_empty() {
            kernel.read(&mut mirror);
        }
        prop_assert_eq!(mirror.tables(), &kernel.truth);
    }
}

fn v4(n: u8) -> RouteKey {
    RouteKey {
        table: 254,
        addr: IpAddr::from([10, n, 0, 0]),
        len: 16,
        metric: 0,
    }
}

fn via(n: u8) -> KernelHop {
    KernelHop {
        oif: 1,
        via: Some(IpAddr::from([192, 0, 2, n])),
        weight: 1,
        wrapped: false,
    }
}

#[test]
fn what_a_dump_does_not_show_is_gone_and_what_came_meanwhile_stays() {
    let (mut kernel, mut mirror) = started();
    kernel.add(v4(1), via(1), Change::Create);
    kernel.add(v4(2), via(1), Change::Create);
    kernel.settle(&mut mirror);
    // Lost: one removed, one added.
    kernel.remove(v4(1), 0);
    kernel.queue.clear();
    mirror.lose();
    while mirror.wanted() != Some(Class::Routes4) {
        kernel.ask(&mut mirror);
        kernel.step(&mut mirror, &Step::Fill(9));
        kernel.step(&mut mirror, &Step::Queue);
        while !kernel.queue.is_empty() {
            kernel.read(&mut mirror);
        }
    }
    kernel.ask(&mut mirror);
    kernel.step(&mut mirror, &Step::Fill(9));
    kernel.step(&mut mirror, &Step::Queue);
    // Behind where the dump has been.
    kernel.add(v4(0), via(2), Change::Create);
    assert!(
        mirror.tables().routes.contains_key(&v4(1)),
        "old one in use"
    );
    kernel.settle(&mut mirror);
    let left: Vec<_> = mirror.tables().routes.keys().copied().collect();
    assert_eq!(left, [v4(0), v4(2)]);
}

#[test]
fn routes_that_vanish_with_their_device_are_asked_for_again() {
    let (mut kernel, mut mirror) = started();
    kernel.add(v4(1), via(1), Change::Create);
    kernel.settle(&mut mirror);
    kernel.link(1, false);
    kernel.read(&mut mirror);
    assert_eq!(mirror.wanted(), Some(Class::Routes4));
    kernel.settle(&mut mirror);
    assert!(mirror.tables().routes.is_empty());
}

#[test]
fn a_removal_of_what_is_not_known_so_asks_for_a_dump() {
    let (mut kernel, mut mirror) = started();
    kernel.add(v4(1), via(1), Change::Create);
    kernel.settle(&mut mirror);
    mirror.event(Update::RouteGone(v4(1), unicast(via(9))));
    assert_eq!(mirror.wanted(), Some(Class::Routes4));
    // Of a key that nothing is known of there is nothing to lose.
    let (_, mut mirror) = started();
    mirror.event(Update::RouteGone(v4(1), unicast(via(9))));
    assert_eq!(mirror.wanted(), Some(Class::Links));
}

#[test]
fn news_that_say_nothing_new_change_nothing() {
    let (mut kernel, mut mirror) = started();
    kernel.step(&mut mirror, &Step::Neighbour(1, Some(1)));
    kernel.settle(&mut mirror);
    mirror.take_changed();
    let reach = Reach {
        mac: [2, 0, 0, 0, 0, 1],
        stale: false,
    };
    mirror.event(Update::Neighbour(1, neighbour(1), Some(reach)));
    mirror.event(Update::Link(1, kernel.truth.links[&1].clone()));
    assert_eq!(mirror.take_changed(), Changed::default());
    // A dump that shows what is known changes nothing either.
    mirror.lose();
    kernel.settle(&mut mirror);
    assert_eq!(mirror.take_changed(), Changed::default());
}
