//! Keys that are never to be used again, in bounded room: a filter that may take a new key for one of them, but never one
//! of them for a new key.
//!
//! ```text
//! page p      copy 0 at block 2p, copy 1 at block 2p + 1; a page of zeros has no key
//! page copy   magic 8 | page number 8 | generation 8 | zero 8 | SHA-256 32 | 32 256 bits
//! ```
//!
//! A key sets eight bits of one page. With 4096 pages, of 5 million retired keys one new key in 40 000 is refused without
//! need, of 10 million one in 500; an IKE daemon negotiates another one then.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use super::error::LeaseError;
use super::media::{Media, io_error};
use super::page::{BLOCK, HEAD, Whole, judge, seal};
use super::stage::Block;
use super::store::KeyId;

const MAGIC: [u8; 8] = *b"ESPgone1";
/// Pages of a gateway's filter.
pub(super) const PAGES: u32 = 4096;
/// Bits that a key sets.
const BITS: usize = 8;
/// Bits of a page.
const ROOM: usize = (BLOCK - HEAD) * 8;

/// The filter, and the file that holds it.
pub(super) struct Retired<M> {
    media: M,
    size: u32,
    /// Those that hold something.
    pages: BTreeMap<u32, Page>,
    /// Those that have changed since they were staged last, and those that are being written.
    dirty: Vec<u32>,
    staged: Vec<u32>,
}

struct Page {
    bytes: Box<[u8; BLOCK]>,
    generation: u64,
    /// The copy that holds `generation`.
    live: u8,
    dirty: bool,
}

impl<M: Media> Retired<M> {
    /// Reads the filter of `size` pages; it is always the same for one file.
    ///
    /// # Errors
    /// [`LeaseError::Io`], [`LeaseError::Damaged`].
    pub(super) fn load(mut media: M, size: u32, path: &Path) -> Result<Self, LeaseError> {
        // As for the records: what a killed predecessor wrote must be durable before it is written over.
        media.sync().map_err(io_error("sync", path))?;
        let len = media.len().map_err(io_error("read", path))?;
        let mut pages = BTreeMap::new();
        for number in 0..size {
            if offset(number, 0) >= len {
                break;
            }
            let mut copies = Vec::with_capacity(2);
            for live in 0..2 {
                let bytes =
                    read(&media, offset(number, live), len).map_err(io_error("read", path))?;
                let found = judge(&bytes, MAGIC, u64::from(number));
                copies.push((found, live, bytes));
            }
            let torn = copies.iter().any(|(f, ..)| *f == Whole::Bad);
            let blank = copies.iter().any(|(f, ..)| *f == Whole::Blank);
            let newest = copies
                .into_iter()
                .filter_map(|(found, live, bytes)| match found {
                    Whole::Good(generation) => Some((generation, live, bytes)),
                    _ => None,
                })
                .max_by_key(|(generation, ..)| *generation);
            match newest {
                Some((generation, live, bytes)) => {
                    let page = Page {
                        bytes,
                        generation,
                        live,
                        dirty: false,
                    };
                    pages.insert(number, page);
                }
                // The first write was torn: nothing was acted upon.
                None if blank => {}
                None if torn => {
                    return Err(LeaseError::Damaged {
                        path: path.to_owned(),
                        what: format!(
                            "both copies of page {number} of the retired keys are damaged"
                        ),
                    });
                }
                None => {}
            }
        }
        Ok(Self {
            media,
            size,
            pages,
            dirty: Vec::new(),
            staged: Vec::new(),
        })
    }

    /// Whether the key was retired, or cannot be told from one that was.
    pub(super) fn contains(&self, key: &KeyId) -> bool {
        let (page, bits) = self.place(key);
        self.pages.get(&page).is_some_and(|p| {
            let set = |bit: usize| {
                p.bytes
                    .get(HEAD + bit / 8)
                    .is_some_and(|b| b >> (bit % 8) & 1 == 1)
            };
            bits.into_iter().all(set)
        })
    }

    /// Retires a key; it is on disk once what is staged next is.
    pub(super) fn add(&mut self, key: &KeyId) {
        let (number, bits) = self.place(key);
        let page = self.pages.entry(number).or_insert_with(Page::blank);
        for bit in bits {
            if let Some(b) = page.bytes.get_mut(HEAD + bit / 8) {
                *b |= 1 << (bit % 8);
            }
        }
        if !page.dirty {
            page.dirty = true;
            self.dirty.push(number);
        }
    }

    /// What has changed, and where to write it: over the older copies.
    pub(super) fn stage(&mut self) -> Vec<Block> {
        let mut blocks = Vec::with_capacity(self.dirty.len());
        for number in &self.dirty {
            let Some(page) = self.pages.get_mut(number) else {
                continue;
            };
            page.dirty = false;
            let next = page.generation + 1;
            seal(&mut page.bytes, MAGIC, u64::from(*number), next);
            blocks.push((offset(*number, 1 - page.live), page.bytes.clone()));
        }
        self.staged = std::mem::take(&mut self.dirty);
        blocks
    }

    /// What was staged is durable.
    pub(super) fn written(&mut self) {
        for number in self.staged.drain(..) {
            if let Some(page) = self.pages.get_mut(&number) {
                page.live = 1 - page.live;
                page.generation += 1;
            }
        }
    }

    /// The file.
    pub(super) fn media(&mut self) -> &mut M {
        &mut self.media
    }

    /// Whether it holds no key.
    pub(super) fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Page and bits of a key. Its name is a keyed hash: whoever chooses keys cannot choose these.
    fn place(&self, key: &KeyId) -> (u32, [usize; BITS]) {
        let word = |at: usize| match key.0.get(at..at + 4) {
            Some(&[a, b, c, d]) => u32::from_le_bytes([a, b, c, d]),
            _ => 0,
        };
        // A multiplication shift, as 32 256 is no power of two.
        let bit = |i: usize| (u64::from(word(i * 3 + 4)) * ROOM as u64) >> 32;
        let bits = std::array::from_fn(|i| usize::try_from(bit(i)).unwrap_or(0));
        (word(0) % self.size.max(1), bits)
    }
}

impl Page {
    fn blank() -> Self {
        Self {
            bytes: Box::new([0; BLOCK]),
            generation: 0,
            // The first write goes to copy 0.
            live: 1,
            dirty: false,
        }
    }
}

fn offset(page: u32, copy: u8) -> u64 {
    (u64::from(page) * 2 + u64::from(copy)) * BLOCK as u64
}

/// A block; what lies behind the end of the file reads as zeros.
fn read(media: &impl Media, at: u64, len: u64) -> io::Result<Box<[u8; BLOCK]>> {
    let mut bytes = Box::new([0; BLOCK]);
    let there = usize::try_from(len.saturating_sub(at))
        .unwrap_or(BLOCK)
        .min(BLOCK);
    if let Some(part) = bytes.get_mut(..there).filter(|p| !p.is_empty()) {
        media.read_at(part, at)?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest, Sha256};

    fn key(n: u32) -> KeyId {
        KeyId(Sha256::digest(n.to_le_bytes()).into())
    }

    fn load(bytes: &[u8]) -> Retired<Vec<u8>> {
        Retired::load(bytes.to_vec(), 256, Path::new("memory")).unwrap()
    }

    fn add(r: &mut Retired<Vec<u8>>, keys: &[KeyId]) {
        keys.iter().for_each(|k| r.add(k));
        for (at, bytes) in r.stage() {
            r.media.write_at(&bytes[..], at).unwrap();
        }
        r.written();
    }

    #[test]
    fn no_retired_key_is_ever_taken_for_a_new_one() {
        let mut r = load(&[]);
        for chunk in 0..20 {
            let keys: Vec<KeyId> = (chunk * 1000..chunk * 1000 + 1000).map(key).collect();
            add(&mut r, &keys);
        }
        assert!((0..20_000).all(|n| r.contains(&key(n))));
        let wrong = (200_000..220_000).filter(|n| r.contains(&key(*n))).count();
        assert_eq!(wrong, 0, "20 000 keys leave the filter nearly empty");
        // And after a restart.
        let again = load(&r.media);
        assert!((0..20_000).all(|n| again.contains(&key(n))));
        assert!(Vec::len(&r.media) <= 256 * 2 * BLOCK);
    }

    /// A write that a power cut tore takes nothing of what was there before.
    #[test]
    fn a_torn_write_leaves_the_copy_before() {
        let mut r = load(&[]);
        add(&mut r, &[key(1)]);
        let before = r.media.clone();
        let (page, _) = r.place(&key(1));
        let other = (2..).map(key).find(|k| r.place(k).0 == page).unwrap();
        add(&mut r, &[other]);
        assert_ne!(before, r.media);
        let changed = (0..Vec::len(&r.media)).filter(|i| before.get(*i) != r.media.get(*i));
        let changed: Vec<usize> = changed.collect();
        let (first, last) = (changed[0], changed[changed.len() - 1]);
        assert_eq!(first / BLOCK, last / BLOCK, "one block is written");
        for cut in [first, first + 100, last] {
            let mut torn = r.media.clone();
            for b in &mut torn[cut..=last] {
                *b = 0xa5;
            }
            assert!(load(&torn).contains(&key(1)), "cut at {cut}");
        }
        let mut both = r.media.clone();
        for b in &mut both {
            *b ^= 1;
        }
        assert!(Retired::load(both, 256, Path::new("memory")).is_err());
    }
}
