//! Which provider serves which suite: decided once at start, by known answers, CPU features and a measurement.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use sa_store::cipher::{CipherError, CipherFactory, SaCipher};
use sa_store::sa::{Direction, SaKeys};
use sa_store::suite::{Cipher, Suite};
use tracing::{error, info, warn};

use super::awslc::AwsLc;
use super::cpu::CpuFeatures;
use super::ipsecmb::IpsecMb;
use super::known::{self, KnownAnswerError};
use super::measure::{BATCH, Rig};
use super::provider::{Provider, ProviderId, UnknownProvider, check_keys};
use super::ring_provider::Ring;
use super::rustcrypto::RustCrypto;

/// Longest time that the measurement at start may take.
const BUDGET: Duration = Duration::from_millis(80);
/// Packet bodies that are measured, and how often each occurs in the mix that decides.
const MIX: [(usize, f64); 3] = [(64, 7.0), (512, 4.0), (1420, 1.0)];
/// A provider must be this much cheaper than one that is preferred to it: less is noise.
const MARGIN: f64 = 0.97;

/// The operator's choice of provider: `crypto = "auto"` or a provider's name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The fastest.
    #[default]
    Auto,
    /// This one for every suite that it offers, the fastest for others.
    Provider(ProviderId),
}

impl FromStr for Choice {
    type Err = UnknownProvider;

    fn from_str(s: &str) -> Result<Self, UnknownProvider> {
        match s {
            "auto" => Ok(Self::Auto),
            name => name.parse().map(Self::Provider),
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Provider(p) => f.write_str(p.name()),
        }
    }
}

/// How providers are compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compare {
    /// By a measurement of at most 80 ms.
    #[default]
    Measure,
    /// By CPU features alone: the same choice every time, for offline use and tests.
    Features,
}

/// Why no selection could be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectError {
    /// The operator forces a provider that this build or CPU does not have.
    #[error("crypto provider {provider} was asked for, but {why}")]
    Unavailable {
        /// The provider.
        provider: ProviderId,
        /// The reason.
        why: String,
    },
}

/// What serves one suite.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The suite.
    pub suite: Suite,
    /// Its provider.
    pub provider: ProviderId,
    /// Nanoseconds per packet (mean of sealing and opening, in batches), when measured.
    pub cost: Option<Cost>,
}

/// Nanoseconds per packet by body size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// 64 bytes.
    pub ns_64: f64,
    /// 512 bytes.
    pub ns_512: f64,
    /// 1420 bytes.
    pub ns_1420: f64,
}

impl Cost {
    fn of_mix(&self) -> f64 {
        let ns = [self.ns_64, self.ns_512, self.ns_1420];
        MIX.iter().zip(ns).map(|((_, share), ns)| share * ns).sum()
    }
}

/// A provider that failed a known answer; it does not serve the suite.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// The provider.
    pub provider: ProviderId,
    /// The suite.
    pub suite: Suite,
    /// What went wrong.
    pub why: KnownAnswerError,
}

/// The choice made: a factory of contexts, and a table to show.
pub struct Selection {
    providers: Vec<Box<dyn Provider>>,
    rows: Vec<Row>,
    rejected: Vec<Rejected>,
    features: CpuFeatures,
    took: Duration,
}

impl Selection {
    /// Tests every provider, compares those that passed, and chooses.
    pub fn new(choice: Choice, compare: Compare) -> Result<Self, SelectError> {
        if let Choice::Provider(provider) = choice {
            require(provider)?;
        }
        Ok(Self::among(available(), choice, compare))
    }

    fn among(providers: Vec<Box<dyn Provider>>, choice: Choice, compare: Compare) -> Self {
        let start = Instant::now();
        let features = CpuFeatures::detect();
        let (mut rows, mut rejected) = (Vec::new(), Vec::new());
        for suite in Suite::all() {
            let mut fit: Vec<&dyn Provider> = Vec::new();
            for id in preference(suite, &features, choice) {
                let Some(provider) = providers.iter().find(|p| p.id() == id) else {
                    continue;
                };
                match known::check(&**provider, suite) {
                    None => {}
                    Some(Ok(())) => fit.push(&**provider),
                    Some(Err(why)) => rejected.push(Rejected {
                        provider: id,
                        suite,
                        why,
                    }),
                }
            }
            let measure = compare == Compare::Measure && start.elapsed() < BUDGET;
            rows.extend(choose(suite, &fit, choice, measure));
        }
        Self {
            providers,
            rows,
            rejected,
            features,
            took: start.elapsed(),
        }
    }

    /// What serves each suite, in the order of [`Suite::all`]; suites that nobody serves are missing.
    pub fn table(&self) -> &[Row] {
        &self.rows
    }

    /// Providers that failed a known answer.
    pub fn rejected(&self) -> &[Rejected] {
        &self.rejected
    }

    /// What the CPU offers.
    pub fn features(&self) -> &CpuFeatures {
        &self.features
    }

    /// Writes the choice to the log: an error for each failed known answer, a line for each suite.
    pub fn log(&self) {
        for r in &self.rejected {
            error!(provider = r.provider.name(), suite = %r.suite, "known-answer test failed, provider not used for the suite: {}", r.why);
        }
        match IpsecMb::new() {
            Ok(p) => info!("ipsec-mb {}", p.describe()),
            Err(why) => info!("ipsec-mb: {why}"),
        }
        info!(cpu = %self.features, took_ms = self.took.as_millis(), "crypto providers chosen");
        for row in &self.rows {
            let (suite, provider) = (row.suite, row.provider.name());
            match row.cost {
                Some(c) => info!(
                    %suite,
                    provider,
                    "{:.0} ns at 64 B, {:.0} ns at 1420 B",
                    c.ns_64,
                    c.ns_1420
                ),
                None => info!(%suite, provider, "not measured"),
            }
        }
        if self.rows.len() < Suite::all().len() {
            warn!("some suites have no provider; SAs that use them will be refused");
        }
    }

    fn row(&self, suite: Suite) -> Option<&Row> {
        self.rows.iter().find(|row| row.suite == suite)
    }
}

impl fmt::Debug for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Selection")
            .field("rows", &self.rows)
            .field("rejected", &self.rejected)
            .finish_non_exhaustive()
    }
}

impl CipherFactory for Selection {
    fn make(
        &self,
        suite: Suite,
        keys: &SaKeys,
        esn: bool,
        direction: Direction,
    ) -> Result<Box<dyn SaCipher>, CipherError> {
        check_keys(suite, keys)?;
        let none = CipherError::Unsupported(suite);
        let Some(row) = self.row(suite) else {
            return Err(none);
        };
        let provider = self.providers.iter().find(|p| p.id() == row.provider);
        provider
            .and_then(|p| p.make(suite, keys, esn, direction))
            .ok_or(none)
    }

    fn provider_for(&self, suite: Suite) -> Option<&'static str> {
        self.row(suite).map(|row| row.provider.name())
    }
}

/// The providers that this build has and this CPU supports.
pub fn available() -> Vec<Box<dyn Provider>> {
    let mut providers: Vec<Box<dyn Provider>> = Vec::new();
    if let Ok(p) = IpsecMb::new() {
        providers.push(Box::new(p));
    }
    providers.push(Box::new(AwsLc));
    providers.push(Box::new(Ring));
    providers.push(Box::new(RustCrypto));
    providers
}

/// Fails when `provider` is not [`available`].
fn require(provider: ProviderId) -> Result<(), SelectError> {
    match provider {
        ProviderId::IpsecMb => match IpsecMb::new() {
            Ok(_) => Ok(()),
            Err(why) => Err(SelectError::Unavailable {
                provider,
                why: format!("intel-ipsec-mb: {why}"),
            }),
        },
        ProviderId::AwsLc | ProviderId::Ring | ProviderId::RustCrypto => Ok(()),
    }
}

/// The providers, best first as far as CPU features tell; a forced one in front.
fn preference(suite: Suite, features: &CpuFeatures, choice: Choice) -> Vec<ProviderId> {
    use ProviderId::{AwsLc, IpsecMb, Ring, RustCrypto};
    let wide = features.has_wide_gcm();
    let mut order = match suite {
        // Without 512-bit registers ring's GCM is ahead, and ipsec-mb's behind.
        Suite::Gcm(..) if !wide => vec![Ring, AwsLc, IpsecMb, RustCrypto],
        Suite::Gmac(_) if !wide => vec![AwsLc, IpsecMb, Ring, RustCrypto],
        Suite::ChaCha20Poly1305 if !wide => vec![AwsLc, Ring, IpsecMb, RustCrypto],
        Suite::CipherHmac(Cipher::Null | Cipher::Cbc(_) | Cipher::Ctr(_), _)
        | Suite::Gcm(..)
        | Suite::Gmac(_)
        | Suite::ChaCha20Poly1305 => vec![IpsecMb, AwsLc, Ring, RustCrypto],
    };
    if let Choice::Provider(forced) = choice {
        order.retain(|p| *p != forced);
        order.insert(0, forced);
    }
    order
}

/// The cheapest of the providers that are fit, which come in order of preference.
fn choose(suite: Suite, fit: &[&dyn Provider], choice: Choice, measure: bool) -> Option<Row> {
    let mut best: Option<Row> = None;
    for provider in fit {
        let rival = best.as_ref().and_then(|best| best.cost);
        let cost = measure.then(|| cost(*provider, suite, rival)).flatten();
        let row = Row {
            suite,
            provider: provider.id(),
            cost,
        };
        let better = match &best {
            None => true,
            Some(best) => match (&row.cost, &best.cost) {
                (Some(new), Some(old)) => new.of_mix() < old.of_mix() * MARGIN,
                _ => false,
            },
        };
        if better {
            best = Some(row);
        }
        if choice == Choice::Provider(provider.id()) {
            break;
        }
    }
    best
}

/// Rounds that a provider is timed at each size.
const ROUNDS: usize = 4;

/// Times a provider. The best round counts: others were disturbed, or met cold caches. One that is far behind its
/// rival after two rounds gets no more.
fn cost(provider: &dyn Provider, suite: Suite, rival: Option<Cost>) -> Option<Cost> {
    let rival = rival.map_or([f64::MAX; 3], |c| [c.ns_64, c.ns_512, c.ns_1420]);
    let mut ns = [f64::MAX; 3];
    for (((body, _), ns), rival) in MIX.iter().zip(&mut ns).zip(rival) {
        let mut rig = Rig::new(provider, suite, 1, *body).ok()?;
        for round in 0..ROUNDS {
            let (sealed, opened) = rig.round_trip()?;
            *ns = ns.min((sealed + opened).as_secs_f64() * 1e9 / (2.0 * BATCH as f64));
            if round > 0 && *ns > 2.0 * rival {
                break;
            }
        }
    }
    let [ns_64, ns_512, ns_1420] = ns;
    Some(Cost {
        ns_64,
        ns_512,
        ns_1420,
    })
}

#[cfg(test)]
mod tests {
    use sa_store::cipher::CipherJob;

    use super::super::differential::{clear_packet, keys, run};
    use super::super::provider::RawAead;
    use super::*;

    /// Suites that `id` offers, of those in `of`.
    fn offered(id: ProviderId, of: &[Suite]) -> usize {
        let provider = available().into_iter().find(|p| p.id() == id);
        let Some(provider) = provider else { return 0 };
        let offers = |s: &&Suite| {
            let keys = keys(**s, 1);
            provider.make(**s, &keys, true, Direction::Out).is_some()
        };
        of.iter().filter(offers).count()
    }

    #[test]
    fn providers_offer_what_their_libraries_can() {
        let all = Suite::all();
        assert_eq!(offered(ProviderId::RustCrypto, &all), all.len());
        assert_eq!(offered(ProviderId::AwsLc, &all), 3 + 3 + 1);
        assert_eq!(offered(ProviderId::Ring, &all), 2 + 2 + 1);
        let ipsec_mb = offered(ProviderId::IpsecMb, &all);
        match IpsecMb::new() {
            Ok(p) => {
                assert_eq!(ipsec_mb, all.len());
                println!("ipsec-mb {}", p.describe());
            }
            Err(why) => {
                assert_eq!(ipsec_mb, 0);
                println!("ipsec-mb: {why}");
            }
        }
    }

    #[test]
    fn every_suite_is_served_and_no_answer_was_wrong() {
        for compare in [Compare::Measure, Compare::Features] {
            let selection = Selection::new(Choice::Auto, compare).expect("auto always works");
            assert_eq!(selection.rejected(), []);
            println!("{compare:?} took {} ms", selection.took.as_millis());
            let served: Vec<Suite> = selection.table().iter().map(|row| row.suite).collect();
            assert_eq!(served, Suite::all());
            for suite in Suite::all() {
                let made = selection.make(suite, &keys(suite, 4), true, Direction::In);
                assert!(made.is_ok(), "{suite}");
            }
        }
    }

    #[test]
    fn a_forced_provider_serves_what_it_offers() {
        let choice = "ring".parse().expect("a provider");
        let selection = Selection::new(choice, Compare::Features).expect("always built");
        let provider = |s: &str| selection.provider_for(s.parse().expect("a suite"));
        assert_eq!(provider("aes-128-gcm-16"), Some("ring"));
        assert_eq!(provider("chacha20-poly1305"), Some("ring"));
        assert_ne!(provider("aes-192-gcm-16"), Some("ring"));
        let rust = Choice::Provider(ProviderId::RustCrypto);
        let selection = Selection::new(rust, Compare::Features).expect("always built");
        let all_rust = |row: &Row| row.provider == ProviderId::RustCrypto;
        assert!(selection.table().iter().all(all_rust));
    }

    #[test]
    fn choice_by_features_is_the_same_every_time() {
        let table = || {
            let selection = Selection::new(Choice::Auto, Compare::Features);
            selection.expect("auto always works").table().to_vec()
        };
        assert_eq!(table(), table());
    }

    /// Claims success and leaves the packet as it is.
    struct Broken;

    impl Provider for Broken {
        fn id(&self) -> ProviderId {
            ProviderId::AwsLc
        }

        fn make(&self, _: Suite, _: &SaKeys, _: bool, _: Direction) -> Option<Box<dyn SaCipher>> {
            Some(Box::new(Self))
        }

        fn raw_aead(&self, _: Suite, _: &[u8]) -> Option<Box<dyn RawAead>> {
            None
        }
    }

    impl SaCipher for Broken {
        fn lane(&self) -> u16 {
            0
        }

        fn prefetch(&self) {}

        fn seal(&self, jobs: &mut [CipherJob<'_>]) {
            jobs.iter_mut().for_each(|j| j.ok = true);
        }

        fn open(&self, jobs: &mut [CipherJob<'_>]) {
            jobs.iter_mut().for_each(|j| j.ok = true);
        }

        fn as_any(&self) -> &dyn std::any::Any {
            self
        }
    }

    #[test]
    fn a_provider_that_fails_a_known_answer_is_not_used_even_when_forced() {
        let providers: Vec<Box<dyn Provider>> = vec![Box::new(Broken), Box::new(RustCrypto)];
        let choice = Choice::Provider(ProviderId::AwsLc);
        let selection = Selection::among(providers, choice, Compare::Features);
        assert_eq!(selection.rejected().len(), Suite::all().len());
        let all_rust = |row: &Row| row.provider == ProviderId::RustCrypto;
        assert!(selection.table().iter().all(all_rust));
        assert_eq!(selection.table().len(), Suite::all().len());

        let suite: Suite = "aes-256-gcm-12".parse().expect("a suite");
        let ctx = selection
            .make(suite, &keys(suite, 1), false, Direction::Out)
            .expect("served by the reference");
        let clear = clear_packet(suite, 64, 1);
        let mut packets = [clear.clone()];
        assert_eq!(run(&[&*ctx], &mut packets, &[0], Direction::Out), [true]);
        assert_ne!(packets[0], clear);
    }
}
