//! What an IKE daemon's SAs and policies, mirrored from the kernel, bring into the running state.

use std::collections::{HashMap, HashSet};

use sa_store::file::{Config, MIRROR_PREFIX};

use crate::install::{Applied, LeftOut};

/// Names a part of the mirror; whoever mirrors gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PartId(pub u64);

/// A part of the mirror: tunnels with their SAs, and policies. It takes the place of what the part was before. Names
/// of tunnels, SAs and policies begin with [`MIRROR_PREFIX`].
#[derive(Clone, Debug, Default)]
pub struct Mirrored {
    /// Tunnels, SAs and policies.
    pub config: Config,
    /// The SA on which each tunnel sends, tunnel to SA. A tunnel that is not named goes on with the SA that sends
    /// now, if that stays, and else sends nothing.
    pub senders: HashMap<String, String>,
    /// Where each policy stands among those of its priority in all parts, policy by policy; empty: as they are listed.
    pub places: Vec<u64>,
}

/// What became of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MirrorOutcome {
    /// What was changed.
    pub applied: Applied,
    /// SAs and policies of these parts that are not installed, each with the reason. They are tried again with every
    /// change.
    pub left_out: Vec<LeftOut>,
}

impl Mirrored {
    /// Whether it brings nothing.
    pub(crate) fn is_empty(&self) -> bool {
        let c = &self.config;
        c.tunnels.is_empty() && c.sas.is_empty() && c.policies.is_empty()
    }

    /// Takes out what can never be installed: strange names, names that repeat or that another part `owns`, SAs without
    /// their tunnel. Gives policies their places.
    pub(crate) fn sift(&mut self, owns: &dyn Fn(Kind, &str) -> bool) -> Vec<LeftOut> {
        let mut out = Vec::new();
        let mut keep = |name: &str, seen: &mut HashSet<String>, kind: Kind| {
            let why = if !name.starts_with(MIRROR_PREFIX) {
                format!("the mirror's names begin with \"{MIRROR_PREFIX}\"")
            } else if !owns(kind, name) && seen.insert(name.to_owned()) {
                return true;
            } else {
                format!("another {} has its name", kind.word())
            };
            out.push((name.to_owned(), why));
            false
        };
        let config = &mut self.config;
        let (mut tunnels, mut sas) = (HashSet::new(), HashSet::new());
        // One policy of a name in each direction.
        let (mut policies_in, mut policies_out) = (HashSet::new(), HashSet::new());
        config
            .tunnels
            .retain(|t| keep(&t.name, &mut tunnels, Kind::Tunnel));
        config.sas.retain(|s| keep(&s.name, &mut sas, Kind::Sa));
        let listed = 0..u64::MAX;
        let places = std::mem::take(&mut self.places).into_iter();
        let policies = std::mem::take(&mut config.policies);
        for (p, (place, at)) in policies
            .into_iter()
            .zip(places.map(Some).chain(std::iter::repeat(None)).zip(listed))
        {
            let kind = Kind::policy(p.direction);
            let seen = match kind {
                Kind::PolicyOut => &mut policies_out,
                _ => &mut policies_in,
            };
            if keep(&p.name, seen, kind) {
                self.places.push(place.unwrap_or(at));
                config.policies.push(p);
            }
        }
        config.sas.retain(|s| {
            let known = tunnels.contains(&s.tunnel);
            if !known {
                out.push((s.name.clone(), format!("there is no tunnel {}", s.tunnel)));
            }
            known
        });
        // Places in files: there are none.
        config.origins = sa_store::file::Origins::default();
        out
    }
}

/// What has a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Tunnel,
    Sa,
    PolicyIn,
    PolicyOut,
}

impl Kind {
    pub(crate) fn policy(direction: sa_store::sa::Direction) -> Self {
        match direction {
            sa_store::sa::Direction::In => Self::PolicyIn,
            sa_store::sa::Direction::Out => Self::PolicyOut,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Tunnel => "tunnel",
            Self::Sa => "SA",
            Self::PolicyIn | Self::PolicyOut => "policy",
        }
    }
}
