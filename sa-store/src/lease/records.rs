//! Records, and the pages they lie on.

use std::time::Duration;

use super::error::LeaseError;
use super::media::{Media, io_error};
use super::page::{BLOCK, Found, Kind, PAGES, RECORDS, Record, decode_page, offset};
use super::stage::Page;
use super::store::{Claim, KeyId, LeaseHandle, LeaseStore};
use super::sweep::Idle;

impl<M: Media> LeaseStore<M> {
    pub(super) fn record_at(&self, slot: u32) -> Option<&Record> {
        let slot = usize::try_from(slot).ok()?;
        self.pages
            .get(slot / RECORDS)?
            .records
            .get(slot % RECORDS)?
            .as_ref()
    }

    /// The record of a handle that has not ended.
    pub(super) fn record(&self, handle: LeaseHandle) -> Result<&Record, LeaseError> {
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
    pub(super) fn slot_mut(
        &mut self,
        handle: LeaseHandle,
    ) -> Result<(&mut bool, &mut Record), LeaseError> {
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

    pub(super) fn clear(&mut self, slot: u32) {
        let slot = usize::try_from(slot).unwrap_or(usize::MAX);
        if let Some(page) = self.pages.get_mut(slot / RECORDS)
            && let Some(r) = page.records.get_mut(slot % RECORDS)
        {
            *r = None;
            page.dirty = true;
        }
    }

    pub(super) fn insert(&mut self, record: Record) -> Result<u32, LeaseError> {
        if self.free.is_empty() {
            self.grow();
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

    pub(super) fn extents(&self) -> usize {
        // More than any disk holds; keeps the arithmetic of offsets from wrapping.
        const MAX: usize = 1 << 24;
        let count = self.table.records.first().and_then(Option::as_ref);
        count.map_or(0, |r| usize::try_from(r.value).unwrap_or(MAX).min(MAX))
    }

    /// Adds an extent, which comes to disk with what is staged next.
    fn grow(&mut self) {
        let extents = self.extents();
        self.blank.push(extents);
        if let Some(r) = self.table.records.first_mut() {
            *r = Some(Record {
                key: KeyId([0; 32]),
                kind: Kind::In,
                value: u64::try_from(extents + 1).unwrap_or(u64::MAX),
                passing: false,
            });
            self.table.dirty = true;
        }
        for _ in 0..PAGES {
            self.add_page(Page::blank());
        }
    }

    pub(super) fn add_page(&mut self, page: Page) {
        let first = self.pages.len() * RECORDS;
        for (i, r) in page.records.iter().enumerate() {
            let slot = u32::try_from(first + i).unwrap_or(u32::MAX);
            match r {
                Some(r) => {
                    self.index.insert((r.key, r.kind == Kind::Out), slot);
                    if r.passing {
                        self.idle.push_back(Idle {
                            since: Duration::ZERO,
                            slot,
                            claim: 0,
                        });
                    }
                }
                None => self.free.push(slot),
            }
            self.claims.push(Claim::default());
        }
        self.pages.push(page);
    }

    pub(super) fn read_page(
        &mut self,
        page: usize,
        block: &mut [u8; BLOCK],
    ) -> Result<Page, LeaseError> {
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
            staged: false,
        })
    }
}
