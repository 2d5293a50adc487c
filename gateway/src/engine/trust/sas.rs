//! The SAs that were given to the engine, and who carries them now.

use sa_store::cipher::SaCipher;
use sa_store::runtime::{SaEntry, event};
use sa_store::sa::{Direction, OffloadMode, SaId};
use sa_store::snapshot::Snapshot;
use sa_store::suite::{Cipher, Suite};

use super::outer::Outer;

/// Who ciphers an SA's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Carrier {
    /// The engine; while it is out of service the CPU, where that may be.
    Engine,
    /// The CPU, where that may be, until the engine has taken the SA.
    Waiting,
    /// The CPU, until the SA's end: the engine does not take it again.
    Cpu,
    /// Nobody: its numbers were the engine's.
    Nobody,
}

/// One SA.
pub(super) struct Carried {
    pub(super) id: SaId,
    pub(super) suite: Suite,
    pub(super) sizes: Sizes,
    pub(super) mode: OffloadMode,
    pub(super) direction: Direction,
    pub(super) spi: [u8; 4],
    /// What is in front of ESP in an outer packet that the engine makes.
    pub(super) outer: Outer,
    pub(super) carrier: Carrier,
    /// Outbound packet mode: opens what the engine sealed.
    pub(super) opener: Option<Box<dyn SaCipher>>,
    /// The last number that left, and its IV.
    pub(super) last_seq: u64,
    pub(super) last_iv: [u8; 16],
    /// Jobs given to the engine so far, and the last of them that came back done.
    pub(super) given: u64,
    pub(super) landed: u64,
    in_flight: u32,
    /// Jobs that the engine takes at once, as far as it has shown: so many went in when it left one. It may take more the
    /// next time: with each that comes back one more is tried.
    most: u32,
    going: bool,
    /// Its SA knows that nobody carries it.
    told: bool,
}

impl Carried {
    pub(super) fn new(
        entry: &SaEntry,
        carrier: Carrier,
        opener: Option<Box<dyn SaCipher>>,
    ) -> Carried {
        let spec = &entry.spec;
        Carried {
            id: entry.fixed.id,
            suite: spec.suite,
            sizes: Sizes::of(spec.suite),
            mode: spec.offload,
            direction: spec.direction,
            spi: entry.fixed.spi.to_be_bytes(),
            outer: Outer::of(spec),
            carrier,
            opener,
            last_seq: entry.next_seq().saturating_sub(1),
            last_iv: [0; 16],
            given: 0,
            landed: 0,
            in_flight: 0,
            most: u32::MAX,
            going: false,
            told: false,
        }
    }

    /// Outbound in packet mode: the engine makes the numbers.
    pub(super) fn is_numbered_elsewhere(&self) -> bool {
        self.mode == OffloadMode::Packet && self.direction == Direction::Out
    }

    /// A job of the SA goes into the engine; its place in the SA's line.
    #[inline]
    pub(super) fn departed(&mut self) -> u64 {
        self.in_flight += 1;
        self.given += 1;
        self.given
    }

    /// Whether it is worth while to offer the engine another job of the SA.
    #[inline]
    pub(super) fn has_room(&self) -> bool {
        self.in_flight < self.most.max(1)
    }

    /// A job of the SA is not in the engine any more; true when the SA is to be forgotten.
    #[inline]
    pub(super) fn home(&mut self) -> bool {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.most = self.most.saturating_add(1);
        self.going && self.in_flight == 0
    }
}

/// What is asked of a suite for every packet.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) iv: usize,
    pub(super) icv: usize,
    pub(super) pad_align: usize,
    pub(super) is_counter_mode: bool,
    /// The ciphertext differs from the plaintext.
    pub(super) hides: bool,
}

impl Sizes {
    fn of(suite: Suite) -> Sizes {
        Sizes {
            iv: suite.iv_len(),
            icv: suite.icv_len(),
            pad_align: suite.pad_align(),
            is_counter_mode: suite.is_counter_mode(),
            hides: !matches!(suite, Suite::Gmac(_) | Suite::CipherHmac(Cipher::Null, _)),
        }
    }
}

/// All of them.
#[derive(Default)]
pub(super) struct Sas {
    list: Vec<Option<Carried>>,
    free: Vec<u32>,
    /// Place of each SA by its index, plus 1.
    index: Vec<u32>,
    /// SAs that wait to be installed or to be told.
    unsettled: usize,
}

/// Installations tried in one call.
const AT_ONCE: usize = 4;

impl Sas {
    /// Adds an SA; the one that had its index before is dropped.
    pub(super) fn insert(&mut self, sa: Carried) -> Option<SaId> {
        let at = sa.id.index as usize;
        if self.index.len() <= at {
            self.index.resize(at + 1, 0);
        }
        let before = self.at(sa.id.index).map(|s| s.id);
        if let Some(id) = before {
            self.remove(id);
        }
        self.unsettled += usize::from(sa.carrier == Carrier::Waiting);
        let place = self.free.pop().unwrap_or_else(|| {
            self.list.push(None);
            u32::try_from(self.list.len() - 1).unwrap_or(u32::MAX)
        });
        if let Some(slot) = self.list.get_mut(place as usize) {
            *slot = Some(sa);
        }
        self.index[at] = place + 1;
        before
    }

    fn at(&self, index: u32) -> Option<&Carried> {
        let place = self.index.get(index as usize)?.checked_sub(1)?;
        self.list.get(place as usize)?.as_ref()
    }

    /// The SA, for new jobs.
    #[inline]
    pub(super) fn find(&mut self, id: SaId) -> Option<&mut Carried> {
        let place = self.index.get(id.index as usize)?.checked_sub(1)?;
        let sa = self.list.get_mut(place as usize)?.as_mut()?;
        (sa.id == id).then_some(sa)
    }

    /// No new jobs of the SA; it is forgotten once none is in the engine. False when it was not known.
    pub(super) fn remove(&mut self, id: SaId) -> bool {
        let Some(sa) = self.find(id) else {
            return false;
        };
        sa.going = true;
        if sa.in_flight == 0 {
            self.forget(id);
        } else if let Some(place) = self.index.get_mut(id.index as usize) {
            *place = 0;
        }
        true
    }

    /// Drops an SA with no job in the engine.
    pub(super) fn forget(&mut self, id: SaId) {
        let place = self
            .list
            .iter()
            .position(|s| s.as_ref().is_some_and(|s| s.id == id));
        let Some(place) = place else { return };
        self.list[place] = None;
        let number = u32::try_from(place).unwrap_or(u32::MAX);
        self.free.push(number);
        if let Some(at) = self.index.get_mut(id.index as usize)
            && *at == number + 1
        {
            *at = 0;
        }
        self.count_unsettled();
    }

    /// The SA of a job that came back, which may be on its way out. [`Carried::home`] or [`Sas::landed`] is to follow.
    #[inline]
    pub(super) fn returning(&mut self, id: SaId) -> Option<&mut Carried> {
        let place = self.index.get(id.index as usize)?.checked_sub(1);
        let usual = place
            .and_then(|p| self.list.get(p as usize))
            .and_then(Option::as_ref)
            .is_some_and(|s| s.id == id);
        if usual {
            return self.list.get_mut(place? as usize)?.as_mut();
        }
        self.list.iter_mut().flatten().find(|s| s.id == id)
    }

    /// A job of the SA is not in the engine any more.
    pub(super) fn landed(&mut self, id: SaId) {
        if self.returning(id).is_some_and(Carried::home) {
            self.forget(id);
        }
    }

    /// The engine did not take a job of the SA.
    pub(super) fn left(&mut self, id: SaId) {
        let Some(sa) = self.returning(id) else { return };
        sa.in_flight = sa.in_flight.saturating_sub(1);
        sa.most = sa.in_flight;
        if sa.going && sa.in_flight == 0 {
            self.forget(id);
        }
    }

    /// The engine was taken out of service, and its SAs with it unless it `keeps` them; `forever` when it will not be back.
    pub(super) fn suspend(&mut self, keeps: bool, forever: bool) {
        for sa in self.list.iter_mut().flatten() {
            if sa.carrier == Carrier::Nobody {
                continue;
            }
            let lives_there = sa.mode == OffloadMode::Packet && !keeps;
            if sa.is_numbered_elsewhere() && (lives_there || forever) {
                sa.carrier = Carrier::Nobody;
            } else if forever {
                sa.carrier = Carrier::Cpu;
            } else if lives_there && sa.carrier == Carrier::Engine {
                sa.carrier = Carrier::Waiting;
            }
        }
        self.count_unsettled();
    }

    /// The engine knows none of them any more: all that it is to carry wait to be installed.
    pub(super) fn reinstall(&mut self) {
        for sa in self.list.iter_mut().flatten() {
            if sa.carrier == Carrier::Engine {
                sa.carrier = Carrier::Waiting;
            }
        }
        self.count_unsettled();
    }

    fn count_unsettled(&mut self) {
        let open = |s: &&Carried| match s.carrier {
            Carrier::Waiting => true,
            Carrier::Nobody => !s.told,
            Carrier::Engine | Carrier::Cpu => false,
        };
        self.unsettled = self.list.iter().flatten().filter(open).count();
    }

    /// Tells SAs that nobody carries them, and has `install` install those that wait, a few at a time. SAs that are not in
    /// the snapshot any more are left to whoever removes them.
    pub(super) fn follow(
        &mut self,
        view: &Snapshot,
        mut install: Option<impl FnMut(&SaEntry) -> Carrier>,
    ) {
        if self.unsettled == 0 {
            return;
        }
        let mut tried = 0;
        for sa in self.list.iter_mut().flatten().filter(|s| !s.going) {
            let Some(entry) = view.sa(sa.id) else {
                continue;
            };
            match (sa.carrier, &mut install) {
                (Carrier::Nobody, _) if !sa.told => {
                    entry.set_disabled(true);
                    entry.raise(event::ENGINE_LOST);
                    tracing::warn!(sa = %entry.spec.name, "stopped: the engine that numbered its packets was lost; it needs a rekey");
                    sa.told = true;
                }
                (Carrier::Waiting, Some(install)) if tried < AT_ONCE => {
                    tried += 1;
                    sa.carrier = match install(entry) {
                        Carrier::Cpu if sa.is_numbered_elsewhere() => Carrier::Nobody,
                        carrier => carrier,
                    };
                }
                _ => {}
            }
        }
        self.count_unsettled();
    }

    /// Suites and modes in use.
    pub(super) fn kinds(&self) -> impl Iterator<Item = (Suite, OffloadMode)> {
        let live = self.list.iter().flatten().filter(|s| !s.going);
        live.map(|s| (s.suite, s.mode))
    }
}
