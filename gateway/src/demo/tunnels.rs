//! The tunnels of the demo: several suites, modes and families, and their rekeys.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sa_store::file::{Config, SaIdentity, Tunnel};
use sa_store::policy::{Action, AddrRange, Policy, Ports, Selector};
use sa_store::sa::{Direction, IfId, Mode, SaKeys, Spi, UdpEncap, Vrf};
use sa_store::suite::Suite;
use zeroize::Zeroizing;

/// One of the two sites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Site {
    A,
    B,
}

impl Site {
    pub(super) fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// Outer address.
    pub(super) fn outer(self, v6: bool) -> IpAddr {
        let last = self.number();
        if v6 {
            Ipv6Addr::new(0x2001, 0xdb8, 0xff, 0, 0, 0, 0, u16::from(last)).into()
        } else {
            Ipv4Addr::new(198, 51, 100, last).into()
        }
    }

    /// A host behind the site, of a tunnel's network.
    pub(super) fn host(self, tunnel: usize, v6: bool) -> IpAddr {
        let t = u8::try_from(tunnel).unwrap_or(u8::MAX);
        if v6 {
            Ipv6Addr::new(
                0xfd00,
                u16::from(self.number()),
                u16::from(t),
                0,
                0,
                0,
                0,
                7,
            )
            .into()
        } else {
            Ipv4Addr::new(10, t + if self == Self::A { 0 } else { 128 }, 0, 7).into()
        }
    }

    /// 1 or 2.
    pub(super) fn number(self) -> u8 {
        match self {
            Self::A => 1,
            Self::B => 2,
        }
    }
}

/// What one tunnel is like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    pub(super) name: &'static str,
    suite: &'static str,
    mode: Mode,
    /// Outer family; transport mode has none of its own.
    outer_v6: bool,
    pub(super) inner_v6: bool,
    esn: bool,
    nat_t: bool,
}

const fn kind(
    name: &'static str,
    suite: &'static str,
    mode: Mode,
    outer_v6: bool,
    inner_v6: bool,
    esn: bool,
    nat_t: bool,
) -> Kind {
    Kind {
        name,
        suite,
        mode,
        outer_v6,
        inner_v6,
        esn,
        nat_t,
    }
}

/// All tunnels.
pub(super) const KINDS: [Kind; 8] = [
    kind(
        "gcm-4in4",
        "aes-128-gcm-16",
        Mode::Tunnel,
        false,
        false,
        false,
        false,
    ),
    kind(
        "gcm-6in6-esn",
        "aes-256-gcm-16",
        Mode::Tunnel,
        true,
        true,
        true,
        false,
    ),
    kind(
        "chacha-4in6",
        "chacha20-poly1305",
        Mode::Tunnel,
        true,
        false,
        false,
        false,
    ),
    kind(
        "cbc-6in4-esn",
        "aes-256-cbc+hmac-sha2-256-128",
        Mode::Tunnel,
        false,
        true,
        true,
        false,
    ),
    kind(
        "gcm-4in4-natt",
        "aes-128-gcm-16",
        Mode::Tunnel,
        false,
        false,
        false,
        true,
    ),
    kind(
        "ctr-transport4",
        "aes-192-ctr+hmac-sha2-384-192",
        Mode::Transport,
        false,
        false,
        false,
        false,
    ),
    kind(
        "gmac-transport6-esn",
        "aes-256-gmac",
        Mode::Transport,
        true,
        true,
        true,
        false,
    ),
    kind(
        "cbc-4in4-natt",
        "aes-128-cbc+hmac-sha2-512-256",
        Mode::Tunnel,
        false,
        false,
        false,
        true,
    ),
];

/// Keys of both directions of a tunnel for one generation.
struct Generation {
    number: u32,
    keys: [SaKeys; 2],
}

/// The tunnels with their present and next keys.
pub(super) struct Tunnels {
    /// Oldest first; at most two.
    generations: Vec<Vec<Generation>>,
    next: u32,
}

impl Tunnels {
    /// With fresh keys.
    pub(super) fn new() -> Result<Self, getrandom::Error> {
        let mut t = Self {
            generations: Vec::new(),
            next: 0,
        };
        t.add()?;
        Ok(t)
    }

    /// New keys for every tunnel; the old ones stay until [`retire`](Self::retire).
    pub(super) fn add(&mut self) -> Result<(), getrandom::Error> {
        let mut fresh = Vec::with_capacity(KINDS.len());
        for k in KINDS {
            let suite = suite_of(&k);
            fresh.push(Generation {
                number: self.next,
                keys: [random_keys(suite)?, random_keys(suite)?],
            });
        }
        self.next += 1;
        self.generations.push(fresh);
        Ok(())
    }

    /// Forgets all but the newest keys.
    pub(super) fn retire(&mut self) {
        let old = self.generations.len().saturating_sub(1);
        self.generations.drain(..old);
    }

    /// What a site is to run: all keys inbound; outbound those before the newest, or the newest.
    pub(super) fn config(&self, site: Site, send_on_newest: bool) -> Config {
        let mut c = Config::default();
        let newest = self.generations.len() - 1;
        for (i, k) in KINDS.iter().enumerate() {
            let tunnel = tunnel_of(site, i, k);
            for (g, all) in self.generations.iter().enumerate() {
                let g_of = &all[i];
                let sending = if send_on_newest { g == newest } else { g == 0 };
                c.sas.push(sa(&tunnel, site, i, k, g_of, Direction::In));
                if sending {
                    c.sas.push(sa(&tunnel, site, i, k, g_of, Direction::Out));
                }
            }
            for direction in [Direction::Out, Direction::In] {
                let (from, to) = if direction == Direction::Out {
                    (site, site.other())
                } else {
                    (site.other(), site)
                };
                c.policies.push(policy(i, k, direction, from, to));
            }
            c.tunnels.push(tunnel);
        }
        c
    }
}

fn suite_of(k: &Kind) -> Suite {
    k.suite.parse().unwrap_or(Suite::ChaCha20Poly1305)
}

fn random_keys(suite: Suite) -> Result<SaKeys, getrandom::Error> {
    let material = |n: usize| {
        let mut bytes = Zeroizing::new(vec![0; n]);
        getrandom::fill(&mut bytes).map(|()| bytes)
    };
    Ok(SaKeys {
        enc: material(suite.enc_key_len())?,
        auth: material(suite.auth_key_len())?,
    })
}

fn tunnel_of(site: Site, i: usize, k: &Kind) -> Tunnel {
    let end = |s: Site| match k.mode {
        Mode::Tunnel => s.outer(k.outer_v6),
        // Transport mode protects traffic between these two hosts; the gateways stand in for them.
        Mode::Transport => s.host(i, k.inner_v6),
    };
    let mut t = Tunnel::new(k.name, end(site), end(site.other()));
    t.mode = k.mode;
    t.settings.esn = k.esn;
    t.settings.encap = k.nat_t.then_some(UdpEncap {
        sport: 4500,
        dport: 4500,
    });
    t
}

fn sa(
    tunnel: &Tunnel,
    site: Site,
    i: usize,
    k: &Kind,
    g: &Generation,
    direction: Direction,
) -> sa_store::sa::SaSpec {
    // The key of the traffic from A is the first, whichever end looks at it.
    let from_a = (direction == Direction::Out) == (site == Site::A);
    let way = u32::from(!from_a);
    let tunnel_number = u32::try_from(i).unwrap_or(0);
    let raw = 0x1000_0000 + (g.number << 8) + (tunnel_number << 1) + way;
    let name = match direction {
        Direction::Out => format!("{}-out-{}", k.name, g.number),
        Direction::In => format!("{}-in-{}", k.name, g.number),
    };
    let identity = SaIdentity {
        name,
        direction,
        spi: Spi::new(raw).unwrap_or_else(|| unreachable!("above the reserved values")),
        suite: suite_of(k),
        keys: g.keys[usize::from(!from_a)].clone(),
        first_use: true,
    };
    tunnel.sa(identity, &tunnel.settings)
}

fn policy(i: usize, k: &Kind, direction: Direction, from: Site, to: Site) -> Policy {
    let net = |s: Site| {
        let host = s.host(i, k.inner_v6);
        let len = if host.is_ipv4() { 16 } else { 48 };
        AddrRange::prefix(host, len).unwrap_or_else(|| unreachable!("the length fits the family"))
    };
    let way = if direction == Direction::Out {
        "out"
    } else {
        "in"
    };
    Policy {
        name: format!("{}-{way}", k.name),
        direction,
        priority: 100,
        selectors: vec![Selector {
            src: net(from),
            dst: net(to),
            proto: None,
            ports: Ports::Any,
        }],
        action: Action::Protect {
            tunnel: k.name.into(),
        },
        vrf: Vrf(0),
        if_id: IfId(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_suite_of_the_demo_exists() {
        for k in KINDS {
            assert!(k.suite.parse::<Suite>().is_ok(), "{}", k.suite);
        }
    }

    #[test]
    fn both_ends_hold_the_same_keys_the_other_way_round() {
        let mut t = Tunnels::new().unwrap();
        t.add().unwrap();
        for newest in [false, true] {
            let (a, b) = (t.config(Site::A, newest), t.config(Site::B, newest));
            for out in a.sas.iter().filter(|s| s.direction == Direction::Out) {
                let peer = b
                    .sas
                    .iter()
                    .find(|s| s.direction == Direction::In && s.spi == out.spi)
                    .expect("its peer");
                assert!(peer.keys == out.keys && peer.dst == out.dst && peer.src == out.src);
            }
        }
    }
}
