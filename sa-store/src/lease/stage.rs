//! Pages in memory, and how what has changed of them comes to disk.

use std::io;

use super::media::Media;
use super::page::{BLOCK, RECORDS, Records, encode_page, offset};

/// A block and where it goes.
pub(super) type Block = (u64, Box<[u8; BLOCK]>);

/// A page of records, and its two copies on disk.
pub(super) struct Page {
    pub(super) records: Box<Records>,
    pub(super) generation: u64,
    /// The copy that holds `generation`.
    pub(super) live: usize,
    /// Changed since it was staged last.
    pub(super) dirty: bool,
    /// Being written.
    pub(super) staged: bool,
}

impl Page {
    pub(super) fn blank() -> Self {
        Self {
            records: Box::new([None; RECORDS]),
            generation: 0,
            live: 1,
            dirty: false,
            staged: false,
        }
    }

    /// What to write, and where: over the older copy. `None` when nothing has changed.
    pub(super) fn stage(&mut self, number: usize) -> Option<Block> {
        if !self.dirty {
            return None;
        }
        let bytes = encode_page(number, self.generation + 1, &self.records);
        self.dirty = false;
        self.staged = true;
        Some((offset(number, 1 - self.live), bytes))
    }

    /// What was staged, if anything, is durable.
    pub(super) fn written(&mut self) {
        if self.staged {
            self.staged = false;
            self.live = 1 - self.live;
            self.generation += 1;
        }
    }
}

/// What is to be written, each part durable before the next, which relies on it. Meanwhile the store goes on serving claims.
#[derive(Default)]
pub(super) struct Stage {
    /// Of the filter: it has the keys before their records go.
    pub(super) retired: Vec<Block>,
    /// Where blocks of zeros go: an extent is blank before it is counted.
    pub(super) blank: Vec<u64>,
    /// Of the extent table: an extent is counted before any of it is used, and a filter that has keys is known to be there.
    pub(super) table: Option<Block>,
    pub(super) pages: Vec<Block>,
}

impl Stage {
    pub(super) fn is_empty(&self) -> bool {
        self.retired.is_empty()
            && self.blank.is_empty()
            && self.table.is_none()
            && self.pages.is_empty()
    }

    /// May take long.
    pub(super) fn write<M: Media>(&self, records: &mut M, retired: &mut M) -> io::Result<()> {
        write(retired, &self.retired)?;
        if !self.blank.is_empty() {
            let zeros = [0; BLOCK];
            for at in &self.blank {
                records.write_at(&zeros, *at)?;
            }
            records.sync()?;
        }
        write(records, self.table.as_slice())?;
        write(records, &self.pages)
    }
}

fn write(media: &mut impl Media, blocks: &[Block]) -> io::Result<()> {
    if blocks.is_empty() {
        return Ok(());
    }
    for (at, bytes) in blocks {
        media.write_at(&bytes[..], *at)?;
    }
    media.sync()
}
