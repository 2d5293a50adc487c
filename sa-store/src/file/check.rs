//! Rules between values: what SAs inherit from tunnels, key lengths, weak settings, duplicates.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::Path;

use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::policy::{Action, Policy};
use crate::sa::{Direction, IfId, Limits, Mode, OffloadMode, SaKeys, SaSpec, Spi, Tfc, Vrf};
use crate::suite::{AeadIcv, Cipher, Suite};

use super::decode::{
    KeySource, Parent, RawAction, RawFile, RawPolicy, RawSa, RawSettings, RawTunnel,
};
use super::fault::{Fault, Location, Problems, Weakness, nearest};
use super::fields::At;
use super::keyfile::read_key;
use super::model::{Config, SaIdentity, Settings, Tunnel, default_sa_name};
use super::value::quoted;

/// Joins the files of one load into one configuration.
#[derive(Default)]
pub(crate) struct Assembler {
    config: Config,
    /// Places of the tunnels' settings, for messages, index by index with the tunnels.
    inherited: Vec<Inherited>,
    tunnel_index: HashMap<String, usize>,
    sas: Vec<Pending>,
    policies: Vec<RawPolicy>,
    registry: Registry,
}

/// An SA whose tunnel is not looked up yet.
struct Pending {
    raw: RawSa,
    nested: Option<usize>,
}

#[derive(Default)]
struct Inherited {
    allow_weak: bool,
    window: Option<Location>,
    hard: Option<Location>,
}

impl Assembler {
    /// Adds what one file says.
    pub(crate) fn add(&mut self, file: RawFile, problems: &mut Problems) {
        let mut indices = Vec::with_capacity(file.tunnels.len());
        for t in file.tunnels {
            indices.push(self.add_tunnel(t, problems));
        }
        for raw in file.sas {
            let nested = match &raw.parent {
                Some(Parent::Nested(i)) => match indices.get(*i) {
                    Some(Some(index)) => Some(*index),
                    // The tunnel itself is wrong and reported; its SAs cannot be judged.
                    _ => continue,
                },
                Some(Parent::Named(_)) => None,
                None => continue,
            };
            self.sas.push(Pending { raw, nested });
        }
        self.policies.extend(file.policies);
    }

    /// Checks everything that needs the whole.
    pub(crate) fn finish(mut self, problems: &mut Problems) -> Config {
        for p in std::mem::take(&mut self.sas) {
            let tunnel = match (&p.raw.parent, p.nested) {
                (_, Some(i)) => Some(i),
                (Some(Parent::Named(n)), None) => self.find_tunnel(n, problems),
                _ => None,
            };
            if let Some(t) = tunnel {
                self.add_sa(p.raw, t, problems);
            }
        }
        for p in std::mem::take(&mut self.policies) {
            self.add_policy(p, problems);
        }
        self.config
    }

    fn add_tunnel(&mut self, raw: RawTunnel, problems: &mut Problems) -> Option<usize> {
        let (name, local, remote) = (raw.name?, raw.local?, raw.remote?);
        if local.v.is_ipv4() != remote.v.is_ipv4() {
            problems.push(
                &remote.at,
                Fault::FamilyMismatch {
                    a: local.v.to_string(),
                    b: remote.v.to_string(),
                },
            );
            return None;
        }
        if local.v == remote.v {
            problems.push(&remote.at, Fault::SameEnds(local.v));
        }
        self.registry.name("tunnel", &name, problems);
        let mut tunnel = Tunnel::new(name.v, local.v, remote.v);
        tunnel.mode = raw.mode.unwrap_or(Mode::Tunnel);
        tunnel.vrf = Vrf(raw.vrf.unwrap_or(0));
        tunnel.if_id = IfId(raw.if_id.unwrap_or(0));
        tunnel.suite = raw.settings.suite.as_ref().map(|s| s.v);
        check_mtu(&raw.settings, local.v, problems);
        self.inherited.push(Inherited {
            allow_weak: raw.settings.allow_weak.as_ref().is_some_and(|a| a.v),
            window: place(&raw.settings.window),
            hard: place(&raw.settings.hard),
        });
        tunnel.settings = merge(Settings::default(), raw.settings, problems);
        let at = place_or(self.inherited.last().and_then(|i| i.hard.as_ref()), &raw.at);
        check_limits(&tunnel.settings, at, problems);
        let index = self.config.tunnels.len();
        self.tunnel_index
            .entry(tunnel.name.clone())
            .or_insert(index);
        self.config.origins.tunnels.push(raw.at);
        self.config.tunnels.push(tunnel);
        Some(index)
    }

    fn find_tunnel(&self, name: &At<String>, problems: &mut Problems) -> Option<usize> {
        let found = self.tunnel_index.get(&name.v).copied();
        if found.is_none() {
            let names = || self.config.tunnels.iter().map(|t| t.name.as_str());
            problems.push(
                &name.at,
                Fault::UnknownTunnel {
                    name: name.v.clone(),
                    suggestion: nearest(&name.v, names()),
                    known: quoted(names().take(8)),
                },
            );
        }
        found
    }

    fn add_sa(&mut self, mut raw: RawSa, tunnel: usize, problems: &mut Problems) {
        let (Some(t), Some(inherited)) =
            (self.config.tunnels.get(tunnel), self.inherited.get(tunnel))
        else {
            return;
        };
        let at = raw.at.clone();
        let own = raw.settings.suite.as_ref().map(|s| s.v);
        let suite = own.or(t.suite);
        if suite.is_none() && !raw.suite_given {
            problems.push(
                &at,
                Fault::Missing {
                    table: format!("the SA (and its tunnel \"{}\")", t.name),
                    key: "suite",
                    example: "suite = \"aes-256-gcm-16\"",
                },
            );
        }
        let window_at = place(&raw.settings.window).or_else(|| inherited.window.clone());
        let hard_at = place(&raw.settings.hard).or_else(|| inherited.hard.clone());
        let consent = match &raw.settings.allow_weak {
            Some(a) => a.v,
            None => inherited.allow_weak,
        };
        check_mtu(&raw.settings, t.local, problems);
        let settings = merge(
            t.settings.clone(),
            std::mem::take(&mut raw.settings),
            problems,
        );
        check_limits(&settings, place_or(hard_at.as_ref(), &at), problems);
        let key_at = place(&raw.key).or_else(|| place(&raw.auth_key));
        let keys = suite.and_then(|s| load_keys(&mut raw, s, problems));
        let (Some(suite), Some(keys), Some(spi), Some(direction)) =
            (suite, keys, raw.spi.as_ref(), raw.direction)
        else {
            return;
        };
        if direction == Direction::In && settings.esn && settings.window == 0 {
            problems.push(place_or(window_at.as_ref(), &at), Fault::EsnNeedsWindow);
        }
        let name = match raw.name {
            Some(n) => n,
            None => At {
                v: default_sa_name(&t.name, direction, spi.v),
                at: at.clone(),
            },
        };
        self.registry.name("SA", &name, problems);
        let sa = t.sa(
            SaIdentity {
                name: name.v,
                direction,
                spi: spi.v,
                suite,
                keys,
                first_use: raw.first_use,
            },
            &settings,
        );
        self.registry.spi(&sa, &spi.at, problems);
        self.registry
            .key(&sa, place_or(key_at.as_ref(), &at), problems);
        if !consent {
            for w in weaknesses(&sa) {
                let where_ = match w {
                    Weakness::NoAntiReplay => window_at.as_ref(),
                    Weakness::ShortIcv => None,
                    Weakness::ConstantKey | Weakness::SharedKey => key_at.as_ref(),
                };
                problems.push(place_or(where_, &at), Fault::Weak(w));
            }
        }
        self.config.origins.sas.push(at);
        self.config.sas.push(sa);
    }

    fn add_policy(&mut self, raw: RawPolicy, problems: &mut Problems) {
        if let Some(n) = &raw.name {
            self.registry.name("policy", n, problems);
        }
        let Some(action) = raw.action else { return };
        let action = match (action.v, raw.tunnel) {
            (RawAction::Protect, Some(t)) => match self.find_tunnel(&t, problems) {
                Some(_) => Action::Protect { tunnel: t.v },
                None => return,
            },
            (RawAction::Protect, None) => {
                problems.push(
                    &action.at,
                    Fault::Missing {
                        table: "a policy that protects".into(),
                        key: "tunnel",
                        example: "tunnel = \"berlin\"",
                    },
                );
                return;
            }
            (_, Some(t)) => {
                let (key, need) = ("tunnel", "action = \"protect\"");
                problems.push(&t.at, Fault::Needs { key, need });
                return;
            }
            (RawAction::Bypass, None) => Action::Bypass,
            (RawAction::Discard, None) => Action::Discard,
        };
        let (Some(name), Some(direction), Some(priority)) = (raw.name, raw.direction, raw.priority)
        else {
            return;
        };
        self.config.origins.policies.push(raw.at);
        self.config.policies.push(Policy {
            name: name.v,
            direction,
            priority,
            selectors: raw.selectors,
            action,
            vrf: Vrf(raw.vrf.unwrap_or(0)),
            if_id: IfId(raw.if_id.unwrap_or(0)),
        });
    }
}

/// The weak settings of an SA, which need the operator's consent.
pub(crate) fn weaknesses(sa: &SaSpec) -> Vec<Weakness> {
    let mut found = Vec::new();
    let constant = |k: &[u8]| k.first().is_some_and(|f| k.iter().all(|b| b == f));
    let (enc, auth) = (cipher_key(sa), sa.keys.auth.as_slice());
    if constant(enc) || constant(auth) {
        found.push(Weakness::ConstantKey);
    }
    if !enc.is_empty() && auth.starts_with(enc) {
        found.push(Weakness::SharedKey);
    }
    if matches!(sa.suite, Suite::Gcm(_, AeadIcv::L8)) {
        found.push(Weakness::ShortIcv);
    }
    if sa.direction == Direction::In && sa.replay_window == 0 {
        found.push(Weakness::NoAntiReplay);
    }
    found
}

/// The encryption key without its salt or nonce.
fn cipher_key(sa: &SaSpec) -> &[u8] {
    let salt = match sa.suite {
        Suite::CipherHmac(Cipher::Null | Cipher::Cbc(_), _) => 0,
        _ => 4,
    };
    let all = sa.keys.enc.as_slice();
    all.get(..all.len().saturating_sub(salt)).unwrap_or(all)
}

/// What was already used: names, SPIs, keys.
#[derive(Default)]
pub(crate) struct Registry {
    names: HashMap<(&'static str, String), Location>,
    spis: HashMap<(Spi, IpAddr, Vrf), Location>,
    keys: HashMap<[u8; 32], Location>,
}

impl Registry {
    pub(crate) fn name(&mut self, kind: &'static str, name: &At<String>, problems: &mut Problems) {
        let key = (kind, name.v.clone());
        if let Some(first) = self.names.get(&key) {
            problems.push(
                &name.at,
                Fault::DuplicateName {
                    kind,
                    name: key.1,
                    first: first.clone(),
                },
            );
        } else {
            self.names.insert(key, name.at.clone());
        }
    }

    pub(crate) fn spi(&mut self, sa: &SaSpec, at: &Location, problems: &mut Problems) {
        let key = (sa.spi, sa.dst, sa.vrf);
        if let Some(first) = self.spis.get(&key) {
            problems.push(
                at,
                Fault::DuplicateSpi {
                    spi: sa.spi,
                    dst: sa.dst,
                    first: first.clone(),
                },
            );
        } else {
            self.spis.insert(key, at.clone());
        }
    }

    pub(crate) fn key(&mut self, sa: &SaSpec, at: &Location, problems: &mut Problems) {
        // A digest, so that no second copy of the key is kept. With a cipher, the nonce space is that of
        // the cipher's key and salt; the integrity key does not widen it.
        let (material, why) = if sa.keys.enc.is_empty() {
            (
                &sa.keys.auth,
                "packets of one would pass as packets of the other",
            )
        } else if sa.suite.is_counter_mode() {
            (
                &sa.keys.enc,
                "the same nonce would be used twice, which reveals traffic",
            )
        } else {
            (
                &sa.keys.enc,
                "packets of one would pass as packets of the other",
            )
        };
        let digest: [u8; 32] = Sha256::digest(material.as_slice()).into();
        if let Some(first) = self.keys.get(&digest) {
            problems.push(
                at,
                Fault::KeyReused {
                    first: first.clone(),
                    why,
                },
            );
        } else {
            self.keys.insert(digest, at.clone());
        }
    }
}

fn merge(base: Settings, raw: RawSettings, problems: &mut Problems) -> Settings {
    fn or<T>(own: Option<At<T>>, base: T) -> T {
        own.map_or(base, |a| a.v)
    }
    let offload = or(raw.offload, base.offload);
    if offload == OffloadMode::Software
        && let Some(At { v: Some(_), at }) = &raw.engine
    {
        let (key, need) = ("engine", "offload = \"crypto\" or \"packet\"");
        problems.push(at, Fault::Needs { key, need });
    }
    let inherited = base.engine.filter(|_| offload != OffloadMode::Software);
    Settings {
        esn: or(raw.esn, base.esn),
        window: or(raw.window, base.window),
        soft: or(raw.soft, base.soft),
        hard: or(raw.hard, base.hard),
        encap: or(raw.encap, base.encap),
        dscp: or(raw.dscp, base.dscp),
        df: or(raw.df, base.df),
        ecn: or(raw.ecn, base.ecn),
        ttl: or(raw.ttl, base.ttl),
        pmtu: or(raw.pmtu, base.pmtu),
        tfc: Tfc::of(
            or(raw.tfc, base.tfc.pad_to()),
            or(raw.dummies, base.tfc.dummies()),
        ),
        mss_clamp: or(raw.mss_clamp, base.mss_clamp),
        offload,
        engine: or(raw.engine, inherited),
        selectors: or(raw.selectors, base.selectors),
    }
}

fn check_mtu(raw: &RawSettings, local: IpAddr, problems: &mut Problems) {
    const MIN_V6: u16 = 1280;
    if let Some(At { v: Some(mtu), at }) = &raw.pmtu
        && local.is_ipv6()
        && *mtu < MIN_V6
    {
        problems.push(
            at,
            Fault::OutOfRange {
                key: "pmtu".into(),
                got: mtu.to_string(),
                min: u64::from(MIN_V6),
                max: u64::from(u16::MAX),
            },
        );
    }
}

fn check_limits(s: &Settings, at: &Location, problems: &mut Problems) {
    let Limits {
        packets,
        bytes,
        seconds,
    } = s.hard;
    for (what, hard, soft) in [
        ("packets", packets, s.soft.packets),
        ("bytes", bytes, s.soft.bytes),
        ("time", seconds, s.soft.seconds),
    ] {
        if let (Some(hard), Some(soft)) = (hard, soft)
            && hard < soft
        {
            problems.push(at, Fault::HardBelowSoft { what, hard, soft });
        }
    }
}

fn load_keys(raw: &mut RawSa, suite: Suite, problems: &mut Problems) -> Option<SaKeys> {
    let enc = load_key(
        raw.key.take(),
        raw.key_given,
        &raw.at,
        suite,
        ("key", suite.enc_key_len()),
        problems,
    );
    let auth = load_key(
        raw.auth_key.take(),
        raw.auth_key_given,
        &raw.at,
        suite,
        ("auth_key", suite.auth_key_len()),
        problems,
    );
    Some(SaKeys {
        enc: enc?,
        auth: auth?,
    })
}

fn load_key(
    source: Option<At<KeySource>>,
    given: bool,
    sa_at: &Location,
    suite: Suite,
    (key, want): (&'static str, usize),
    problems: &mut Problems,
) -> Option<Zeroizing<Vec<u8>>> {
    let Some(source) = source else {
        if want == 0 && !given {
            return Some(Zeroizing::default());
        }
        if !given {
            problems.push(
                sa_at,
                Fault::Missing {
                    table: format!("the SA with {suite}"),
                    key,
                    example: if key == "key" {
                        "key = \"<hex>\" or key_file = \"<path>\""
                    } else {
                        "auth_key = \"<hex>\" or auth_key_file = \"<path>\""
                    },
                },
            );
        }
        return None;
    };
    if want == 0 {
        problems.push(&source.at, Fault::KeyUnwanted { key, suite });
        return None;
    }
    let material = match source.v {
        KeySource::Inline(k) => k,
        KeySource::File(path) => {
            let base = source.at.file.parent().unwrap_or(Path::new(""));
            match read_key(&base.join(path), key) {
                Ok(k) => k,
                Err(fault) => {
                    problems.push(&source.at, fault);
                    return None;
                }
            }
        }
    };
    if let Some(fault) = wrong_length(key, suite, want, material.len()) {
        problems.push(&source.at, fault);
        return None;
    }
    Some(material)
}

/// The fault of key material that is not `want` bytes long.
pub(crate) fn wrong_length(
    key: &'static str,
    suite: Suite,
    want: usize,
    got: usize,
) -> Option<Fault> {
    let salted = key == "key" && matches!(want, 20 | 28 | 36);
    let detail = match (salted, got + 4 == want) {
        (true, true) => format!("a {got}-byte key, then the 4-byte salt, which is lacking"),
        (true, false) => format!("a {}-byte key, then its 4-byte salt", want - 4),
        (false, _) => format!("{} hexadecimal digits", want * 2),
    };
    (got != want).then_some(Fault::KeyLength {
        key,
        suite,
        want,
        got,
        detail,
    })
}

fn place<T>(a: &Option<At<T>>) -> Option<Location> {
    a.as_ref().map(|a| a.at.clone())
}

fn place_or<'a>(a: Option<&'a Location>, or: &'a Location) -> &'a Location {
    a.unwrap_or(or)
}
