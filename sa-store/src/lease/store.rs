//! The lease store: which number each key may go on from.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::file::MIRROR_PREFIX;
use crate::sa::{Direction, SaSpec};

use super::error::LeaseError;
use super::media::{DiskMedia, Media, io_error};
use super::page::{
    BLOCK, Kind, PAGES, Record, TABLE, decode_header, encode_header, extent, file_len,
};
use super::retired::{self, Retired};
use super::stage::{Page, Stage};
use super::sweep::Idle;

/// Keyed hash of an SA's key material and direction.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyId(pub(super) [u8; 32]);

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({:02x}{:02x}..)", self.0[0], self.0[1])
    }
}

/// A claimed record. It names nothing any more once the record is released.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseHandle {
    pub(super) slot: u32,
    /// Tells the claims of one slot apart.
    pub(super) claim: u32,
}

/// Where an SA goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resume {
    /// For further calls.
    pub handle: LeaseHandle,
    /// Outbound: the first number that may be sent once a lease covers it (1 on first use); no number is
    /// covered yet. Inbound: the highest number that counts as seen (0 on first use); nothing above it may
    /// be accepted before a higher edge is committed.
    pub value: u64,
}

/// One change for [`LeaseStore::commit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Update {
    /// Outbound: numbers below `value` may be used. Inbound: numbers up to `value` may be accepted. A
    /// value that is not above the present one changes nothing.
    Advance {
        /// Whose.
        handle: LeaseHandle,
        /// First number not covered, or new edge.
        value: u64,
    },
    /// Inbound only: numbers above `value` are no longer accepted, and no higher one was. A value that is not
    /// below the present edge changes nothing.
    Lower {
        /// Whose.
        handle: LeaseHandle,
        /// New edge.
        value: u64,
    },
    /// The SA stopped cleanly: `value` is the next unused number, or the highest accepted one. The record
    /// stays for a later claim; the handle ends.
    Release {
        /// Whose.
        handle: LeaseHandle,
        /// The exact number; never above what was committed.
        value: u64,
    },
}

#[derive(Clone, Copy, Default)]
pub(super) struct Claim {
    pub(super) number: u32,
    pub(super) held: bool,
}

/// The records of all keys, one process at a time.
pub struct LeaseStore<M: Media = DiskMedia> {
    pub(super) media: M,
    pub(super) path: PathBuf,
    store_key: Zeroizing<[u8; 32]>,
    pub(super) pages: Vec<Page>,
    /// Its first record counts the finished extents.
    pub(super) table: Page,
    pub(super) claims: Vec<Claim>,
    pub(super) index: HashMap<(KeyId, bool), u32>,
    pub(super) free: Vec<u32>,
    /// Extents in use that are not on disk, nor staged.
    pub(super) blank: Vec<usize>,
    pub(super) retired: Retired<M>,
    /// In the order of their time.
    pub(super) idle: VecDeque<Idle>,
    /// Since the store was opened, as the last sweep was told.
    pub(super) now: Duration,
    pub(super) failed: bool,
    commits: u64,
}

impl<M: Media> fmt::Debug for LeaseStore<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaseStore")
            .field("path", &self.path)
            .field("records", &self.index.len())
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}

impl LeaseStore {
    /// Opens the store in directory `path`, which is created with mode 0700 when it does not exist, and
    /// locks it against other processes until dropped.
    ///
    /// # Errors
    /// See [`LeaseError`].
    pub fn open(path: &Path) -> Result<Self, LeaseError> {
        let header = encode_header(&*random_key(path)?);
        let media = DiskMedia::open(path, &header)?;
        let retired = Retired::load(DiskMedia::open_retired(path)?, retired::PAGES, path)?;
        Self::load(media, retired, path)
    }

    /// A store in a directory of its own under the system's temporary one, which has no name any more. For the demo,
    /// for offline runs over captures and for tests: keys used with it must not be used elsewhere.
    ///
    /// # Errors
    /// See [`LeaseError`].
    pub fn throw_away() -> Result<Self, LeaseError> {
        let tag = u64::from_le_bytes(random()?);
        let path = std::env::temp_dir().join(format!("esplanade-leases-{tag:016x}"));
        let store = Self::open(&path);
        // The open file is all that is needed: nothing stays behind, however the process ends.
        let _ = std::fs::remove_dir_all(&path);
        store
    }
}

impl<M: Media> LeaseStore<M> {
    /// The beginning of a new store's file.
    #[cfg(test)]
    pub(super) fn new_header() -> Result<Vec<u8>, LeaseError> {
        Ok(encode_header(&*random_key(Path::new("new"))?).to_vec())
    }

    /// Reads the store of `media`, and the keys that were retired from it.
    pub(super) fn load(mut media: M, retired: Retired<M>, path: &Path) -> Result<Self, LeaseError> {
        // A killed predecessor may have left writes that are visible but not durable. They must be durable
        // before the other copy of the same page is overwritten.
        media.sync().map_err(io_error("sync", path))?;
        let mut block = Box::new([0u8; BLOCK]);
        let damaged = |what: String| LeaseError::Damaged {
            path: path.to_owned(),
            what,
        };
        let len = media.len().map_err(io_error("read", path))?;
        if len < file_len(0) {
            return Err(damaged("it is cut off".into()));
        }
        media
            .read_at(&mut block[..], 0)
            .map_err(io_error("read", path))?;
        let store_key = decode_header(&block).map_err(|e| damaged(e.into()))?;
        let mut store = Self {
            media,
            path: path.to_owned(),
            store_key: Zeroizing::new(store_key),
            pages: Vec::new(),
            table: Page::blank(),
            claims: Vec::new(),
            index: HashMap::new(),
            free: Vec::new(),
            blank: Vec::new(),
            retired,
            idle: VecDeque::new(),
            now: Duration::ZERO,
            failed: false,
            commits: 0,
        };
        store.table = store.read_page(TABLE, &mut block)?;
        // What lies behind the counted extents was still growing when the power went.
        let extents = store.extents();
        if len < file_len(extents) {
            return Err(damaged("it is cut off".into()));
        }
        for page in 0..extents * PAGES {
            let page = store.read_page(page, &mut block)?;
            store.add_page(page);
        }
        if store.has_retired() && store.retired.is_empty() {
            return Err(damaged("the file of its retired keys is gone".into()));
        }
        Ok(store)
    }

    /// The hash under which the SA's record is kept.
    pub fn key_id(&self, sa: &SaSpec) -> KeyId {
        // A counter-mode nonce space belongs to cipher key and salt alone: a new integrity key or another
        // ICV length does not make it new.
        let auth: &[u8] = if sa.suite.is_counter_mode() {
            &[]
        } else {
            &sa.keys.auth
        };
        let direction = match sa.direction {
            Direction::Out => b'o',
            Direction::In => b'i',
        };
        let mut mac = match Hmac::<Sha256>::new_from_slice(self.store_key.as_slice()) {
            Ok(m) => m,
            Err(_) => unreachable!("HMAC takes keys of any length"),
        };
        mac.update(b"esplanade lease 1");
        mac.update(&[direction]);
        let len = u32::try_from(sa.keys.enc.len()).unwrap_or(u32::MAX);
        mac.update(&len.to_le_bytes());
        mac.update(&sa.keys.enc);
        mac.update(auth);
        KeyId(mac.finalize().into_bytes().into())
    }

    /// Takes the record of the SA's key, or makes one when [`SaSpec::first_use`] says so and there is none.
    /// Nothing is written: a record comes to disk with its first commit, before which nothing is sent.
    ///
    /// # Errors
    /// [`LeaseError::NoRecord`], [`LeaseError::InUse`], [`LeaseError::Failed`], or the file cannot grow.
    pub fn claim(&mut self, sa: &SaSpec) -> Result<Resume, LeaseError> {
        if self.failed {
            return Err(LeaseError::Failed);
        }
        let out = sa.direction == Direction::Out;
        let key = self.key_id(sa);
        let slot = match self.index.get(&(key, out)) {
            Some(slot) => *slot,
            None if sa.first_use && self.retired.contains(&key) => {
                return Err(LeaseError::Retired {
                    sa: sa.name.clone(),
                });
            }
            None if sa.first_use => {
                let (kind, value) = if out { (Kind::Out, 1) } else { (Kind::In, 0) };
                let passing = is_passing(sa);
                self.insert(Record {
                    key,
                    kind,
                    value,
                    passing,
                })?
            }
            None => {
                return Err(LeaseError::NoRecord {
                    sa: sa.name.clone(),
                });
            }
        };
        let index = usize::try_from(slot).unwrap_or(usize::MAX);
        let claim = self.claims.get_mut(index).ok_or(LeaseError::Ended)?;
        if claim.held {
            return Err(LeaseError::InUse {
                sa: sa.name.clone(),
            });
        }
        claim.held = true;
        claim.number = claim.number.wrapping_add(1);
        let handle = LeaseHandle {
            slot,
            claim: claim.number,
        };
        let (dirty, record) = self.slot_mut(handle)?;
        if record.passing && !is_passing(sa) {
            // Now a file has it, and may have it again at any time.
            record.passing = false;
            *dirty = true;
        }
        let value = record.value;
        Ok(Resume { handle, value })
    }

    /// Makes all updates durable with one sync. Only after `Ok` may numbers under them be used.
    ///
    /// # Errors
    /// [`LeaseError::Ended`] and [`LeaseError::Overrun`] change nothing. After an I/O error the store takes
    /// no more changes.
    pub fn commit(&mut self, updates: &[Update]) -> Result<(), LeaseError> {
        if self.failed {
            return Err(LeaseError::Failed);
        }
        for u in updates {
            self.check(u)?;
        }
        for u in updates {
            self.apply(u)?;
        }
        let written = self.write_dirty();
        self.judge(written)
    }

    /// Takes a change in, in memory: later claims see it, and it is durable once what is staged after it is settled.
    ///
    /// # Errors
    /// As [`commit`](Self::commit).
    pub(super) fn take(&mut self, u: &Update) -> Result<(), LeaseError> {
        if self.failed {
            return Err(LeaseError::Failed);
        }
        self.check(u)?;
        self.apply(u)
    }

    /// All that has changed, to be written and synced by whoever has the time; `None` when nothing has, or after a failure. Until
    /// [`settle`](Self::settle) nothing further may be staged, committed or swept.
    pub(super) fn stage(&mut self) -> Option<Stage> {
        if self.failed {
            return None;
        }
        let blank = self.blank.drain(..).flat_map(extent).collect();
        let pages = self.pages.iter_mut().enumerate();
        let stage = Stage {
            retired: self.retired.stage(),
            blank,
            table: self.table.stage(TABLE),
            pages: pages.filter_map(|(n, page)| page.stage(n)).collect(),
        };
        (!stage.is_empty()).then_some(stage)
    }

    /// What became of what was staged.
    ///
    /// # Errors
    /// The disk's; the store takes no more changes then.
    pub(super) fn settle(&mut self, written: io::Result<()>) -> Result<(), LeaseError> {
        if written.is_ok() {
            self.written();
        }
        self.judge(written)
    }

    fn judge(&mut self, written: io::Result<()>) -> Result<(), LeaseError> {
        written.map_err(|source| {
            self.failed = true;
            io_error("commit to", &self.path)(source)
        })
    }

    /// How many keys have records.
    pub fn records(&self) -> usize {
        self.index.len()
    }

    /// How many commits were synced since the store was opened.
    pub fn commits(&self) -> u64 {
        self.commits
    }

    /// Whether a write failed, so that nothing can be committed any more.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    fn check(&self, u: &Update) -> Result<(), LeaseError> {
        match u {
            Update::Advance { handle, .. } => self.record(*handle).map(|_| ()),
            Update::Lower { handle, .. } => match self.record(*handle)?.kind {
                Kind::In => Ok(()),
                // Numbers that were leased may have been sent.
                Kind::Out => Err(LeaseError::Overrun),
            },
            Update::Release { handle, value } => {
                if *value > self.record(*handle)?.value {
                    return Err(LeaseError::Overrun);
                }
                Ok(())
            }
        }
    }

    fn apply(&mut self, u: &Update) -> Result<(), LeaseError> {
        match *u {
            Update::Advance { handle, value } => {
                let (dirty, r) = self.slot_mut(handle)?;
                if value > r.value {
                    r.value = value;
                    *dirty = true;
                }
            }
            Update::Lower { handle, value } => {
                let (dirty, r) = self.slot_mut(handle)?;
                if value < r.value {
                    r.value = value;
                    *dirty = true;
                }
            }
            Update::Release { handle, value } => {
                let (dirty, r) = self.slot_mut(handle)?;
                // One batch may advance and then release: the later word stands.
                if value < r.value {
                    r.value = value;
                    *dirty = true;
                }
                let index = usize::try_from(handle.slot).unwrap_or(usize::MAX);
                if let Some(c) = self.claims.get_mut(index) {
                    c.held = false;
                }
                self.has_ended(handle);
            }
        }
        Ok(())
    }

    fn write_dirty(&mut self) -> io::Result<()> {
        let Some(stage) = self.stage() else {
            return Ok(());
        };
        stage.write(&mut self.media, self.retired.media())?;
        self.written();
        Ok(())
    }

    fn written(&mut self) {
        self.commits += 1;
        self.table.written();
        self.pages.iter_mut().for_each(Page::written);
        self.retired.written();
    }
}

impl LeaseStore {
    /// The store's files, of the records and of the retired keys, for a thread that writes what is staged.
    pub(super) fn media_again(&mut self) -> Result<(DiskMedia, DiskMedia), LeaseError> {
        let again = io_error("open once more", &self.path);
        let both = self.media.again().and_then(|records| {
            let retired = self.retired.media().again()?;
            Ok((records, retired))
        });
        both.map_err(again)
    }
}

/// An IKE daemon negotiates a key once.
fn is_passing(sa: &SaSpec) -> bool {
    sa.name.starts_with(MIRROR_PREFIX)
}

fn random_key(path: &Path) -> Result<Zeroizing<[u8; 32]>, LeaseError> {
    let mut key = Zeroizing::new([0u8; 32]);
    getrandom::fill(&mut key[..])
        .map_err(|e| io_error("draw a random key for", path)(io::Error::other(e.to_string())))?;
    Ok(key)
}

fn random() -> Result<[u8; 8], LeaseError> {
    let mut b = [0u8; 8];
    let path = Path::new("a throw-away store");
    getrandom::fill(&mut b)
        .map_err(|e| io_error("draw a random name for", path)(io::Error::other(e.to_string())))?;
    Ok(b)
}

/// See [`super::fuzz_store`].
pub(super) fn fuzz(data: &[u8]) {
    let path = Path::new("fuzz");
    // These bytes for the one, and for the other.
    let _ = Retired::load(data.to_vec(), 8, path);
    let Ok(none) = Retired::load(Vec::new(), 8, path) else {
        return;
    };
    let Ok(mut store) = LeaseStore::load(data.to_vec(), none, path) else {
        return;
    };
    let key = KeyId([1; 32]);
    let record = Record {
        key,
        kind: Kind::Out,
        value: 1,
        passing: true,
    };
    if store.insert(record).is_ok() {
        let _ = store.write_dirty();
    }
}
