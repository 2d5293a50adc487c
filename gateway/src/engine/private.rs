//! SAs of the gateway's own, with which engines are measured and checked. No packet of theirs ever leaves.

use std::net::Ipv4Addr;
use std::sync::Arc;

use sa_store::cipher::SaCipher;
use sa_store::runtime::{Install, Place, SaEntry, Start, TunnelIdx};
use sa_store::sa::{Direction, OffloadMode, SaId, SaKeys, SaSpec, Spi};
use sa_store::suite::Suite;

/// Documentation addresses, RFC 5737.
pub(super) const HERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub(super) const THERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

/// What such SAs differ in.
pub(super) struct Private {
    pub(super) name: &'static str,
    pub(super) id: SaId,
    pub(super) spi: Spi,
    pub(super) suite: Suite,
    pub(super) keys: SaKeys,
    pub(super) direction: Direction,
    pub(super) offload: OffloadMode,
    pub(super) place: Place,
    pub(super) cipher: Box<dyn SaCipher>,
    pub(super) provider: &'static str,
}

impl Private {
    /// The SA: an IPv4 tunnel that every engine can carry.
    pub(super) fn entry(self) -> Arc<SaEntry> {
        let spec = SaSpec {
            src: HERE.into(),
            dst: THERE.into(),
            offload: self.offload,
            ..SaSpec::plain(self.name, self.direction, self.spi, self.suite, self.keys)
        };
        let install = Install {
            id: self.id,
            tunnel: TunnelIdx(self.id.index),
            owner: 0,
            cipher: self.cipher,
            provider: self.provider,
            start: Start {
                lease_end: u64::MAX,
                ..Start::default()
            },
            place: self.place,
            now: 0,
        };
        Arc::new(SaEntry::new(Arc::new(spec), install))
    }
}
