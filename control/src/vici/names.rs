//! Which names SAs and tunnels have in the daemon's configuration. They are for display alone.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sa_store::runtime::TunnelIdx;
use serde::{Deserialize, Serialize};

use super::sas::Child;

/// SAs whose names are known, at most: a daemon that tells of more is not believed.
const MOST: usize = 1 << 18;
/// Names of SAs that do not run are kept so many beyond those that do.
const SPARE: usize = 1024;
/// The daemon may name an SA before the kernel tells of it.
const EARLY: Duration = Duration::from_secs(60);
/// Longest name, characters.
const LONGEST: usize = 128;

/// Names of a connection and its child SA in the daemon's configuration: short, and without anything that a terminal would obey.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// Connection.
    pub ike: String,
    /// Child SA.
    pub child: String,
}

/// How names are got, and how many SAs have one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamesReport {
    /// The daemon's socket.
    pub socket: String,
    /// Whether the daemon tells.
    pub connected: bool,
    /// Why it does not.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub problem: Option<String>,
    /// SAs with a name.
    pub named: usize,
    /// SAs taken from the kernel of which the daemon says nothing.
    pub unnamed: usize,
    /// Times that the daemon could not be asked, or stopped answering.
    pub failures: u64,
}

/// An SA of the mirror's that runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Runs {
    pub(crate) tunnel: TunnelIdx,
    pub(crate) dst: IpAddr,
    pub(crate) spi: u32,
    /// Whether its tunnel sends with it.
    pub(crate) sends: bool,
}

/// All names.
#[derive(Debug, Default)]
pub(crate) struct Names {
    by_sa: HashMap<(IpAddr, u32), Known>,
    by_tunnel: HashMap<TunnelIdx, Arc<Label>>,
    pub(super) report: NamesReport,
}

#[derive(Debug)]
struct Known {
    label: Arc<Label>,
    since: Instant,
}

impl Names {
    /// Names of an SA.
    pub(crate) fn of_sa(&self, dst: IpAddr, spi: u32) -> Option<&Label> {
        let known = self.by_sa.get(&(dst.to_canonical(), spi));
        known.map(|k| &*k.label)
    }

    /// Names of a tunnel: those of the SA on which it sends, or did last.
    pub(crate) fn of_tunnel(&self, tunnel: TunnelIdx) -> Option<&Label> {
        self.by_tunnel.get(&tunnel).map(|l| &**l)
    }

    pub(crate) fn report(&self) -> &NamesReport {
        &self.report
    }

    /// The daemon says so.
    pub(super) fn learn(&mut self, child: &Child<'_>, now: Instant) {
        let mut label = None;
        for key in child.sas.into_iter().flatten() {
            let label = label.get_or_insert_with(|| Arc::new(Label::of(child)));
            if let Some(known) = self.by_sa.get_mut(&key) {
                if known.label != *label {
                    known.label = Arc::clone(label);
                }
                known.since = now;
            } else if self.by_sa.len() < MOST {
                let label = Arc::clone(label);
                self.by_sa.insert(key, Known { label, since: now });
            }
        }
    }

    /// Compares with what runs: names tunnels, counts the SAs without a name, forgets names that nothing has. `anew`: all names
    /// were just told, so tunnels of which no SA is named are not what they were.
    pub(super) fn look_over(&mut self, runs: &[Runs], anew: bool, now: Instant) {
        let mut named = 0;
        let mut seen = HashSet::new();
        for sa in runs {
            let Some(known) = self.by_sa.get(&(sa.dst.to_canonical(), sa.spi)) else {
                continue;
            };
            named += 1;
            if seen.insert(sa.tunnel) || sa.sends {
                self.by_tunnel.insert(sa.tunnel, Arc::clone(&known.label));
            }
        }
        self.report.named = named;
        self.report.unnamed = runs.len() - named;
        if anew || self.by_tunnel.len() > 2 * seen.len() + SPARE {
            self.by_tunnel.retain(|t, _| seen.contains(t));
        }
        if self.by_sa.len() > 2 * runs.len() + SPARE {
            let live: HashSet<_> = runs
                .iter()
                .map(|sa| (sa.dst.to_canonical(), sa.spi))
                .collect();
            self.by_sa
                .retain(|key, k| live.contains(key) || now.duration_since(k.since) < EARLY);
        }
    }
}

impl Label {
    fn of(child: &Child<'_>) -> Self {
        Self {
            ike: shown(child.ike),
            child: shown(child.child),
        }
    }
}

/// Letters, digits, ASCII's signs and spaces; what else there is becomes a question mark.
fn shown(name: &[u8]) -> String {
    let text = String::from_utf8_lossy(name);
    let harmless = |c: char| c == ' ' || c.is_ascii_graphic() || c.is_alphanumeric();
    let mut shown: String = text
        .chars()
        .take(LONGEST)
        .map(|c| if harmless(c) { c } else { '?' })
        .collect();
    if text.chars().nth(LONGEST).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));

    fn child(name: &'static str, spi_in: u32, spi_out: u32) -> Child<'static> {
        Child {
            ike: b"gw",
            child: name.as_bytes(),
            sas: [Some((US, spi_in)), Some((PEER, spi_out))],
        }
    }

    fn runs(tunnel: u32, dst: IpAddr, spi: u32, sends: bool) -> Runs {
        let tunnel = TunnelIdx(tunnel);
        Runs {
            tunnel,
            dst,
            spi,
            sends,
        }
    }

    fn name_of(names: &Names, tunnel: u32) -> Option<&str> {
        names.of_tunnel(TunnelIdx(tunnel)).map(|l| l.child.as_str())
    }

    #[test]
    fn a_tunnel_has_the_name_of_the_sa_that_sends_and_keeps_it() {
        let (mut names, now) = (Names::default(), Instant::now());
        names.learn(&child("a", 1, 2), now);
        names.learn(&child("b", 3, 4), now);
        assert_eq!(names.of_sa(US, 1).unwrap().child, "a");
        assert_eq!(names.of_sa(PEER, 1), None);
        let both = [
            runs(0, PEER, 2, false),
            runs(0, PEER, 4, true),
            runs(0, US, 1, false),
            runs(0, US, 9, false),
        ];
        names.look_over(&both, false, now);
        assert_eq!(name_of(&names, 0), Some("b"));
        assert_eq!((names.report.named, names.report.unnamed), (3, 1));
        // It is down: its name is what an alarm needs.
        names.look_over(&[], false, now);
        assert_eq!(name_of(&names, 0), Some("b"));
        // A daemon that began anew may have given its request id to another.
        names.look_over(&[], true, now);
        assert_eq!(name_of(&names, 0), None);
    }

    #[test]
    fn a_name_that_comes_late_shows_up_later() {
        let (mut names, now) = (Names::default(), Instant::now());
        let sas = [runs(5, PEER, 2, true)];
        names.look_over(&sas, true, now);
        assert_eq!((name_of(&names, 5), names.report.unnamed), (None, 1));
        names.learn(&child("late", 1, 2), now);
        names.look_over(&sas, false, now);
        assert_eq!(
            (name_of(&names, 5), names.report.unnamed),
            (Some("late"), 0)
        );
    }

    #[test]
    fn a_daemon_that_tells_without_end_takes_bounded_memory() {
        let (mut names, now) = (Names::default(), Instant::now());
        for spi in 0..u32::try_from(MOST).unwrap() {
            names.learn(&child("x", 2 * spi + 1, 2 * spi + 2), now);
        }
        assert_eq!(names.by_sa.len(), MOST);
        // Fresh names may be of SAs to come; old ones are not.
        let live = [runs(0, US, 1, false)];
        names.look_over(&live, false, now);
        assert_eq!(names.by_sa.len(), MOST);
        names.look_over(&live, false, now + EARLY);
        assert_eq!(names.by_sa.len(), 1);
        assert_eq!(names.of_sa(US, 1).unwrap().child, "x");
        for tunnel in 0..3000 {
            names.look_over(&[runs(tunnel, US, 1, false)], false, now);
        }
        assert!(names.by_tunnel.len() <= SPARE + 3);
    }

    #[test]
    fn names_are_harmless() {
        assert_eq!(shown(b"branch office.7-a_b"), "branch office.7-a_b");
        assert_eq!(shown("büro-東京".as_bytes()), "büro-東京");
        assert_eq!(shown(b"a\x1b[31m\n\0b\xff"), "a?[31m??b?");
        assert_eq!(shown("a\u{202e}b\u{200b}".as_bytes()), "a?b?");
        let long = shown(&[b'x'; 255]);
        assert_eq!(long.chars().count(), LONGEST + 1);
        assert!(long.ends_with('…'));
    }
}
