//! The bytes of the store: a header block, then extents of pages, each page in two copies.
//!
//! ```text
//! block 0      magic 8 | version 4 | zero 4 | store key 32 | SHA-256 of the above 32 | zeros
//! block 1, 2   two copies of the extent table: a page whose first record counts the finished extents
//! extent e     copy 0 of PAGES pages, then copy 1 of the same pages
//! page copy    magic 8 | page number 8 | generation 8 | zero 8 | SHA-256 32 | 63 records of 64
//! record       key id 32 | value 8 | kind 1 | passing 1 | zeros 22
//! ```
//!
//! All numbers are little-endian. The page's digest covers the page with the digest itself as zeros. A page
//! copy of nothing but zeros was never written.

use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::store::KeyId;

/// Unit of writing, bytes.
pub(super) const BLOCK: usize = 4096;
/// Pages of an extent; the file grows by extents.
pub(super) const PAGES: usize = 32;
/// Page number of the extent table.
pub(super) const TABLE: usize = usize::MAX;
/// Blocks before the first extent.
pub(super) const FIRST: usize = 3;
/// Records of a page.
pub(super) const RECORDS: usize = (BLOCK - HEAD) / RECORD;

/// Bytes of a page before what it holds.
pub(super) const HEAD: usize = 64;
const RECORD: usize = 64;
const PAGE_MAGIC: [u8; 8] = *b"ESPpage1";
const FILE_MAGIC: [u8; 8] = *b"ESPlease";
const VERSION: u32 = 1;

/// What a record counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// First number not covered by an outbound lease.
    Out,
    /// Highest number that an inbound SA may have accepted.
    In,
}

/// One key's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) key: KeyId,
    pub(super) kind: Kind,
    pub(super) value: u64,
    /// Whoever gave the key never gives it again: once it is out of use for long, it is retired.
    pub(super) passing: bool,
}

/// The records of one page.
pub(super) type Records = [Option<Record>; RECORDS];

/// What a page copy turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Never written.
    Blank,
    /// Whole.
    Good(u64, Box<Records>),
    /// Torn or damaged.
    Bad,
}

/// What a block's head says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whole {
    /// Nothing but zeros: never written.
    Blank,
    /// Whole, of this generation.
    Good(u64),
    /// Torn or damaged.
    Bad,
}

/// Offset of a page copy in the file.
pub(super) fn offset(page: usize, copy: usize) -> u64 {
    let block = if page == TABLE {
        1 + copy
    } else {
        FIRST + (page / PAGES * 2 + copy) * PAGES + page % PAGES
    };
    u64::try_from(block * BLOCK).unwrap_or(u64::MAX)
}

/// Where the blocks of an extent lie.
pub(super) fn extent(extent: usize) -> impl Iterator<Item = u64> {
    let pages = extent * PAGES..(extent + 1) * PAGES;
    (0..2).flat_map(move |copy| pages.clone().map(move |page| offset(page, copy)))
}

/// Length of the file with so many extents.
pub(super) fn file_len(extents: usize) -> u64 {
    offset(extents * PAGES, 0)
}

/// The beginning of a new store: its header and a blank extent table.
pub(super) fn encode_header(store_key: &[u8; 32]) -> Zeroizing<Vec<u8>> {
    let mut b = Zeroizing::new(vec![0u8; FIRST * BLOCK]);
    put(&mut b, 0, &FILE_MAGIC);
    put(&mut b, 8, &VERSION.to_le_bytes());
    put(&mut b, 16, store_key);
    let digest = Sha256::digest(take::<48>(&b, 0));
    put(&mut b, 48, &digest);
    b
}

/// The store key of a header block, or what is wrong with it.
pub(super) fn decode_header(b: &[u8; BLOCK]) -> Result<[u8; 32], &'static str> {
    if take::<8>(b, 0) != FILE_MAGIC {
        return Err("it is not a lease store");
    }
    if u32::from_le_bytes(take(b, 8)) != VERSION {
        return Err("it was written by another version");
    }
    if Sha256::digest(take::<48>(b, 0)).as_slice() != take::<32>(b, 48) {
        return Err("its header is damaged");
    }
    Ok(take(b, 16))
}

/// The bytes of a page copy.
pub(super) fn encode_page(page: usize, generation: u64, records: &Records) -> Box<[u8; BLOCK]> {
    let mut b = Box::new([0u8; BLOCK]);
    for (i, r) in records.iter().enumerate() {
        if let Some(r) = r {
            let at = HEAD + i * RECORD;
            put(&mut b[..], at, &r.key.0);
            put(&mut b[..], at + 32, &r.value.to_le_bytes());
            put(&mut b[..], at + 40, &[kind_code(r.kind), r.passing.into()]);
        }
    }
    seal(&mut b, PAGE_MAGIC, page_number(page), generation);
    b
}

/// Writes a block's head: what it is, which one, and a digest of all of it.
pub(super) fn seal(b: &mut [u8; BLOCK], magic: [u8; 8], number: u64, generation: u64) {
    put(b, 0, &magic);
    put(b, 8, &number.to_le_bytes());
    put(b, 16, &generation.to_le_bytes());
    put(b, 32, &[0; 32]);
    let digest = Sha256::digest(&b[..]);
    put(b, 32, &digest);
}

/// Judges a block by its head.
pub(super) fn judge(b: &[u8; BLOCK], magic: [u8; 8], number: u64) -> Whole {
    if b.iter().all(|x| *x == 0) {
        return Whole::Blank;
    }
    let mut plain = *b;
    put(&mut plain, 32, &[0; 32]);
    let whole = Sha256::digest(plain).as_slice() == take::<32>(b, 32)
        && take::<8>(b, 0) == magic
        && u64::from_le_bytes(take(b, 8)) == number;
    if whole {
        Whole::Good(u64::from_le_bytes(take(b, 16)))
    } else {
        Whole::Bad
    }
}

/// Judges the bytes of a page copy.
pub(super) fn decode_page(page: usize, b: &[u8; BLOCK]) -> Found {
    let generation = match judge(b, PAGE_MAGIC, page_number(page)) {
        Whole::Blank => return Found::Blank,
        Whole::Bad => return Found::Bad,
        Whole::Good(generation) => generation,
    };
    let mut records: Box<Records> = Box::new([None; RECORDS]);
    for (i, slot) in records.iter_mut().enumerate() {
        let at = HEAD + i * RECORD;
        let kind = match take::<1>(b, at + 40) {
            [0] => continue,
            [1] => Kind::Out,
            [2] => Kind::In,
            _ => return Found::Bad,
        };
        *slot = Some(Record {
            key: KeyId(take(b, at)),
            kind,
            value: u64::from_le_bytes(take(b, at + 32)),
            passing: take::<1>(b, at + 41) == [1],
        });
    }
    Found::Good(generation, records)
}

fn kind_code(k: Kind) -> u8 {
    match k {
        Kind::Out => 1,
        Kind::In => 2,
    }
}

fn page_number(page: usize) -> u64 {
    u64::try_from(page).unwrap_or(u64::MAX)
}

/// Offsets are constants or bounded by the layout, so both always hit.
fn put(b: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(dst) = b.get_mut(at..at + bytes.len()) {
        dst.copy_from_slice(bytes);
    }
}

fn take<const N: usize>(b: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    if let Some(src) = b.get(at..at + N) {
        out.copy_from_slice(src);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Box<Records> {
        let mut r: Box<Records> = Box::new([None; RECORDS]);
        r[3] = Some(Record {
            key: KeyId([7; 32]),
            kind: Kind::In,
            value: u64::MAX - 5,
            passing: true,
        });
        r[62] = Some(Record {
            key: KeyId([9; 32]),
            kind: Kind::Out,
            value: 1,
            passing: false,
        });
        r
    }

    #[test]
    fn pages_decode_as_encoded_and_only_at_their_place() {
        let b = encode_page(17, 99, &sample());
        assert_eq!(decode_page(17, &b), Found::Good(99, sample()));
        assert_eq!(decode_page(18, &b), Found::Bad);
        assert_eq!(decode_page(0, &[0; BLOCK]), Found::Blank);
    }

    #[test]
    fn any_changed_byte_is_noticed() {
        let b = encode_page(0, 1, &sample());
        for i in 0..BLOCK {
            let mut torn = b.clone();
            torn[i] ^= 0x40;
            assert_eq!(decode_page(0, &torn), Found::Bad, "byte {i}");
        }
    }

    #[test]
    fn copies_never_share_a_block() {
        let mut seen = std::collections::HashSet::from([0, offset(TABLE, 0), offset(TABLE, 1)]);
        assert_eq!(seen.len(), FIRST);
        for page in 0..3 * PAGES {
            for copy in 0..2 {
                let o = offset(page, copy);
                assert!(o.is_multiple_of(4096) && seen.insert(o));
                assert!(o < file_len(page / PAGES + 1));
            }
        }
    }
}
