//! The lease store: which number each key may go on from.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::sa::{Direction, SaSpec};

use super::media::{DiskMedia, Media, io_error};
use super::page::{
    BLOCK, Found, Kind, PAGES, RECORDS, Record, Records, TABLE, decode_header, decode_page,
    encode_header, encode_page, file_len, offset,
};

/// Keyed hash of an SA's key material and direction.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyId(pub(super) [u8; 32]);

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({:02x}{:02x}..)", self.0[0], self.0[1])
    }
}

/// A claimed record. It names nothing any more once the record is released or retired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseHandle {
    slot: u32,
    /// Tells the claims of one slot apart.
    claim: u32,
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
    /// The key will never be used again: forget it. The handle ends.
    Retire {
        /// Whose.
        handle: LeaseHandle,
    },
}

/// Why the store did not do it. Numbers that were not committed must not be used.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// The operating system refused. The operator is to look at disk and permissions.
    #[error("cannot {action} {}: {source}", .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Another gateway runs with this store.
    #[error("lease store {} is in use by another process", .0.display())]
    Locked(PathBuf),
    /// Others could set the counters back.
    #[error("lease store {} (mode {mode:04o}, user {uid}) must be a directory of ours or root's that nobody else can write", .path.display())]
    NotPrivate {
        /// The directory.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// Its owner.
        uid: u32,
    },
    /// Not a store, or damaged beyond what a power cut can do. The operator is to restore nothing: give all
    /// SAs new keys and start a new store.
    #[error("lease store {}: {what}; give all SAs new keys, then remove it", .path.display())]
    Damaged {
        /// The store.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// No record: the store was lost or changed, or the key is new and the operator did not say so.
    #[error(
        "no lease record for the key of SA \"{sa}\": give it a new key, or write first_use = true if it never sent or received a packet"
    )]
    NoRecord {
        /// The SA.
        sa: String,
    },
    /// Two SAs of one key.
    #[error("the key of SA \"{sa}\" is in use by another SA")]
    InUse {
        /// The SA.
        sa: String,
    },
    /// The handle was released or retired. A fault of ours.
    #[error("the lease handle has ended")]
    Ended,
    /// An exact number above what was committed. A fault of ours.
    #[error("a number was used that no lease covered")]
    Overrun,
    /// A write or sync failed before; what is on disk is not known any more. The operator is to restart
    /// the gateway on a disk that works.
    #[error("the lease store failed earlier and takes no more changes")]
    Failed,
    /// The thread that writes is gone.
    #[error("the lease writer has stopped")]
    Stopped,
}

struct Page {
    records: Box<Records>,
    generation: u64,
    /// The copy that holds `generation`.
    live: usize,
    dirty: bool,
}

impl Page {
    fn blank() -> Self {
        Self {
            records: Box::new([None; RECORDS]),
            generation: 0,
            live: 1,
            dirty: false,
        }
    }

    /// Writes the older copy.
    fn write(&self, number: usize, media: &mut impl Media) -> io::Result<()> {
        let bytes = encode_page(number, self.generation + 1, &self.records);
        media.write_at(&bytes[..], offset(number, 1 - self.live))
    }

    /// What was written is durable.
    fn written(&mut self) {
        self.dirty = false;
        self.live = 1 - self.live;
        self.generation += 1;
    }
}

#[derive(Clone, Copy, Default)]
struct Claim {
    number: u32,
    held: bool,
}

/// The records of all keys, one process at a time.
pub struct LeaseStore<M: Media = DiskMedia> {
    media: M,
    path: PathBuf,
    store_key: Zeroizing<[u8; 32]>,
    pages: Vec<Page>,
    /// Its first record counts the finished extents.
    table: Page,
    claims: Vec<Claim>,
    index: HashMap<(KeyId, bool), u32>,
    free: Vec<u32>,
    failed: bool,
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
        Self::load(DiskMedia::open(path, &header)?, path)
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

    /// Reads the store of `media`.
    pub(super) fn load(mut media: M, path: &Path) -> Result<Self, LeaseError> {
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
            None if sa.first_use => {
                let (kind, value) = if out { (Kind::Out, 1) } else { (Kind::In, 0) };
                self.insert(Record { key, kind, value })?
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
        let value = self.record(handle)?.value;
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
        if let Err(source) = written {
            self.failed = true;
            return Err(io_error("commit to", &self.path)(source));
        }
        Ok(())
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
            Update::Advance { handle, .. } | Update::Retire { handle } => {
                self.record(*handle).map(|_| ())
            }
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
                self.end(handle);
            }
            Update::Retire { handle } => {
                let r = *self.record(handle)?;
                self.end(handle);
                self.index.remove(&(r.key, r.kind == Kind::Out));
                self.clear(handle.slot);
                self.free.push(handle.slot);
            }
        }
        Ok(())
    }

    fn end(&mut self, handle: LeaseHandle) {
        let index = usize::try_from(handle.slot).unwrap_or(usize::MAX);
        if let Some(c) = self.claims.get_mut(index) {
            c.held = false;
        }
    }
}

impl<M: Media> LeaseStore<M> {
    /// The record of a handle that has not ended.
    fn record(&self, handle: LeaseHandle) -> Result<&Record, LeaseError> {
        let slot = usize::try_from(handle.slot).unwrap_or(usize::MAX);
        let claim = self.claims.get(slot).ok_or(LeaseError::Ended)?;
        if !claim.held || claim.number != handle.claim {
            return Err(LeaseError::Ended);
        }
        let page = self.pages.get(slot / RECORDS).ok_or(LeaseError::Ended)?;
        let record = page.records.get(slot % RECORDS);
        record.and_then(Option::as_ref).ok_or(LeaseError::Ended)
    }

    /// The same for writing, with the page's dirty mark.
    fn slot_mut(&mut self, handle: LeaseHandle) -> Result<(&mut bool, &mut Record), LeaseError> {
        self.record(handle)?;
        let slot = usize::try_from(handle.slot).unwrap_or(usize::MAX);
        let page = self
            .pages
            .get_mut(slot / RECORDS)
            .ok_or(LeaseError::Ended)?;
        let record = page.records.get_mut(slot % RECORDS);
        let record = record.and_then(Option::as_mut).ok_or(LeaseError::Ended)?;
        Ok((&mut page.dirty, record))
    }

    fn clear(&mut self, slot: u32) {
        let slot = usize::try_from(slot).unwrap_or(usize::MAX);
        if let Some(page) = self.pages.get_mut(slot / RECORDS)
            && let Some(r) = page.records.get_mut(slot % RECORDS)
        {
            *r = None;
            page.dirty = true;
        }
    }

    fn insert(&mut self, record: Record) -> Result<u32, LeaseError> {
        if self.free.is_empty() {
            self.grow()?;
        }
        let slot = self.free.pop().ok_or(LeaseError::Failed)?;
        let at = usize::try_from(slot).unwrap_or(usize::MAX);
        if let Some(page) = self.pages.get_mut(at / RECORDS)
            && let Some(r) = page.records.get_mut(at % RECORDS)
        {
            *r = Some(record);
            page.dirty = true;
        }
        self.index
            .insert((record.key, record.kind == Kind::Out), slot);
        Ok(slot)
    }

    fn extents(&self) -> usize {
        // More than any disk holds; keeps the arithmetic of offsets from wrapping.
        const MAX: usize = 1 << 24;
        let count = self.table.records.first().and_then(Option::as_ref);
        count.map_or(0, |r| usize::try_from(r.value).unwrap_or(MAX).min(MAX))
    }

    /// Adds an extent of zeros, durable before it is counted, and counted before any of it is used.
    fn grow(&mut self) -> Result<(), LeaseError> {
        let extents = self.extents();
        let mut write = || {
            let zeros = [0u8; BLOCK];
            for copy in 0..2 {
                for page in extents * PAGES..(extents + 1) * PAGES {
                    self.media.write_at(&zeros, offset(page, copy))?;
                }
            }
            self.media.sync()?;
            if let Some(r) = self.table.records.first_mut() {
                *r = Some(Record {
                    key: KeyId([0; 32]),
                    kind: Kind::In,
                    value: u64::try_from(extents + 1).unwrap_or(u64::MAX),
                });
            }
            self.table.write(TABLE, &mut self.media)?;
            self.media.sync()
        };
        if let Err(source) = write() {
            self.failed = true;
            return Err(io_error("grow", &self.path)(source));
        }
        self.table.written();
        for _ in 0..PAGES {
            self.add_page(Page::blank());
        }
        Ok(())
    }

    fn add_page(&mut self, page: Page) {
        let first = self.pages.len() * RECORDS;
        for (i, r) in page.records.iter().enumerate() {
            let slot = u32::try_from(first + i).unwrap_or(u32::MAX);
            match r {
                Some(r) => {
                    self.index.insert((r.key, r.kind == Kind::Out), slot);
                }
                None => self.free.push(slot),
            }
            self.claims.push(Claim::default());
        }
        self.pages.push(page);
    }

    fn read_page(&mut self, page: usize, block: &mut [u8; BLOCK]) -> Result<Page, LeaseError> {
        let mut copies = [Found::Blank, Found::Blank];
        for (copy, found) in copies.iter_mut().enumerate() {
            self.media
                .read_at(&mut block[..], offset(page, copy))
                .map_err(io_error("read", &self.path))?;
            *found = decode_page(page, block);
        }
        let (records, generation, live) = match copies {
            [Found::Good(a, records), Found::Good(b, _)] if a > b => (records, a, 0),
            [_, Found::Good(b, records)] => (records, b, 1),
            [Found::Good(a, records), _] => (records, a, 0),
            // The first write of a page goes to copy 0. If it was torn, nothing was acted upon.
            [Found::Blank | Found::Bad, Found::Blank] => return Ok(Page::blank()),
            [_, Found::Bad] => {
                return Err(LeaseError::Damaged {
                    path: self.path.clone(),
                    what: format!("both copies of page {page} are damaged"),
                });
            }
        };
        Ok(Page {
            records,
            generation,
            live,
            dirty: false,
        })
    }

    fn write_dirty(&mut self) -> io::Result<()> {
        let mut wrote = false;
        for (number, page) in self.pages.iter_mut().enumerate() {
            if page.dirty {
                page.write(number, &mut self.media)?;
                wrote = true;
            }
        }
        if !wrote {
            return Ok(());
        }
        self.media.sync()?;
        self.commits += 1;
        for page in self.pages.iter_mut().filter(|p| p.dirty) {
            page.written();
        }
        Ok(())
    }
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
    let Ok(mut store) = LeaseStore::load(data.to_vec(), Path::new("fuzz")) else {
        return;
    };
    let key = KeyId([1; 32]);
    let record = Record {
        key,
        kind: Kind::Out,
        value: 1,
    };
    if store.insert(record).is_ok() {
        let _ = store.write_dirty();
    }
}
