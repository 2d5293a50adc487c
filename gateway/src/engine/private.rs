//! SAs of the gateway's own, with which engines are measured and checked. No packet of theirs ever leaves.

use std::net::Ipv4Addr;
use std::sync::Arc;

use sa_store::cipher::SaCipher;
use sa_store::runtime::{Install, Place, SaEntry, Start, TunnelIdx};
use sa_store::sa::{
    Df, Direction, Dscp, IfId, Limits, Mode, OffloadMode, SaId, SaKeys, SaSpec, Spi, Tfc, Vrf,
};
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
            name: self.name.into(),
            tunnel: self.name.into(),
            direction: self.direction,
            spi: self.spi,
            src: HERE.into(),
            dst: THERE.into(),
            mode: Mode::Tunnel,
            suite: self.suite,
            keys: self.keys,
            encap: None,
            esn: false,
            replay_window: 64,
            first_use: true,
            soft: Limits::default(),
            hard: Limits::default(),
            dscp: Dscp::Copy,
            df: Df::Copy,
            ecn: true,
            ttl: 64,
            pmtu: None,
            tfc: Tfc::Off,
            mss_clamp: false,
            vrf: Vrf::default(),
            if_id: IfId::default(),
            selectors: Vec::new(),
            offload: self.offload,
            engine: None,
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
