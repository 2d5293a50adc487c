//! What a rekey costs among many tunnels, from the kernel's news to the publication:
//! `cargo test --release -p control --lib xfrm::scale -- --ignored --nocapture`.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::message::{Change, SaKey};
use super::picture::Picture;
use super::settings::Settings;
use super::table::Table;
use super::tests::{heard, policy_of, sa_of};
use super::translate::Seized;
use crate::common::{Plane, control};
use crate::core::Control;

const OURS: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));

/// A gateway with one peer and a tunnel for each request id.
struct Site {
    table: Table,
    picture: Picture,
    control: Control,
    next_spi: u32,
    /// SPIs by tunnel.
    spis: Vec<[u32; 2]>,
}

impl Site {
    fn new(tunnels: u32) -> Self {
        let plane = Arc::new(Plane::default());
        let mut site = Self {
            table: Table::default(),
            picture: Picture::default(),
            control: control(&plane, Vec::new()),
            next_spi: 0x1000,
            spis: Vec::new(),
        };
        for n in 0..tunnels {
            site.spis.push([0; 2]);
            site.add_pair(n);
            for way in 0..3 {
                site.table.apply(heard(policy_of(way, PEER, n + 1)));
            }
        }
        site.publish();
        site
    }

    /// Seconds of translation and of publication, and parts touched.
    fn publish(&mut self) -> (Duration, Duration, usize) {
        let ours = |a: IpAddr| a == OURS;
        let all = |_: &SaKey| Some(Seized::Ours { first_use: true });
        let began = Instant::now();
        let touched = self.table.take_touched();
        self.picture.regroup(&touched, &self.table, &ours);
        let drawn = self
            .picture
            .draw(&self.table, &Settings::default(), &ours, &all);
        let parts = drawn.parts.len();
        let translated = Instant::now();
        let outcome = self.control.mirror_parts(drawn.parts);
        assert_eq!(outcome.left_out, []);
        (translated - began, translated.elapsed(), parts)
    }

    fn add_pair(&mut self, n: u32) -> [u32; 2] {
        let pair = [self.next_spi, self.next_spi + 1];
        self.next_spi += 2;
        for (out, spi) in [true, false].into_iter().zip(pair) {
            self.table.apply(heard(sa_of(out, PEER, n + 1, spi)));
        }
        std::mem::replace(&mut self.spis[n as usize], pair)
    }

    fn remove_pair(&mut self, pair: [u32; 2]) {
        for (dst, spi) in [PEER, OURS].into_iter().zip(pair) {
            let mark = (0, 0);
            self.table.apply(Change::SaGone(SaKey { dst, spi, mark }));
        }
    }
}

#[test]
fn a_rekey_touches_its_own_tunnel_alone() {
    let mut site = Site::new(50);
    assert_eq!(site.control.mirrored_counts(), (100, 100));
    let epoch = site.control.store().current().epoch;
    let old = site.add_pair(7);
    assert_eq!(site.publish().2, 1);
    assert_eq!(site.control.mirrored_counts(), (102, 100));
    site.remove_pair(old);
    assert_eq!(site.publish().2, 1);
    assert_eq!(site.control.mirrored_counts(), (100, 100));
    // One publication for each batch of news.
    assert_eq!(site.control.store().current().epoch, epoch + 2);
}

#[test]
#[ignore = "a measurement"]
fn time_of_a_publication_by_number_of_tunnels() {
    for tunnels in [10, 100, 1000, 4000] {
        let mut site = Site::new(tunnels);
        let rekeys = 100;
        let (mut translated, mut published) = (Duration::ZERO, Duration::ZERO);
        let mut ticks = Duration::ZERO;
        for i in 0..rekeys {
            let old = site.add_pair(i * 7 % tunnels);
            for step in 0..2 {
                if step == 1 {
                    site.remove_pair(old);
                }
                let (t, p, _) = site.publish();
                translated += t;
                published += p;
                let began = Instant::now();
                site.control.tick();
                ticks += began.elapsed();
            }
        }
        let each = |d: Duration| d.as_micros() / u128::from(2 * rekeys);
        println!(
            "{tunnels} tunnels: {} µs to translate, {} µs to publish, {} µs a tick",
            each(translated),
            each(published),
            each(ticks)
        );
    }
}
