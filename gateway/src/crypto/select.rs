//! Which provider serves which suite.

use super::awslc::AwsLc;
use super::ipsecmb::IpsecMb;
use super::provider::Provider;
use super::ring_provider::Ring;
use super::rustcrypto::RustCrypto;

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

#[cfg(test)]
mod tests {
    use sa_store::sa::Direction;
    use sa_store::suite::Suite;

    use super::super::differential::keys;
    use super::super::provider::ProviderId;
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
}
