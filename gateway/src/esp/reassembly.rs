//! Reassembly of fragments that are addressed to the gateway: RFC 791, RFC 8200 section 4.5, RFC 5722.
//!
//! Memory is bounded three ways (datagrams, frames, fragments per datagram) and time by one timeout. When
//! memory runs out the oldest datagram goes, so a flood of first fragments cannot hold the place of later
//! traffic for long. An overlap condemns its whole datagram, fragments still to come included; an exact
//! copy of a fragment is dropped alone. Every frame that comes in goes out again: as part of the result, or
//! through `done` with what became of it.

use std::collections::VecDeque;

use hashbrown::HashMap;
use pmd::Frame;
use sa_store::drops::{Consumed, DropReason};

use super::ecn;
use super::encap::set_length;
use crate::wire::ipv4::Ipv4;
use crate::wire::ipv6::{FRAGMENT_LEN, Ipv6};
use crate::wire::{Family, Frag, Parsed, ipv6};

/// Bounds of one worker's reassembly.
#[derive(Clone, Copy, Debug)]
pub struct ReassemblyConfig {
    /// Datagrams in progress.
    pub datagrams: usize,
    /// Frames held.
    pub frames: usize,
    /// Fragments per datagram.
    pub pieces: usize,
    /// Nanoseconds from a datagram's first fragment until it is given up.
    pub timeout: u64,
}

impl Default for ReassemblyConfig {
    fn default() -> Self {
        Self {
            datagrams: 256,
            frames: 1024,
            pieces: 48,
            timeout: 2_000_000_000,
        }
    }
}

/// What became of a frame that is given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Its bytes are in a reassembled packet now.
    Consumed(Consumed),
    /// Dropped.
    Dropped(DropReason),
}

/// Datagrams in progress of one worker.
#[derive(Debug)]
pub struct Reassembler {
    config: ReassemblyConfig,
    table: HashMap<Key, Datagram, foldhash::fast::RandomState>,
    /// By age; entries whose serial number is no longer in the table are leftovers.
    ages: VecDeque<Age>,
    frames: usize,
    serial: u64,
    /// Emptied piece lists, kept for their memory.
    spare: Vec<Vec<Piece>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    src: u128,
    dst: u128,
    id: u32,
    proto: u8,
    family: Family,
    vlan: u16,
}

#[derive(Clone, Copy, Debug)]
struct Age {
    deadline: u64,
    key: Key,
    serial: u64,
}

#[derive(Debug)]
struct Datagram {
    serial: u64,
    /// Sorted by offset, without overlap. Empty once condemned.
    pieces: Vec<Piece>,
    /// Bytes of payload held.
    have: usize,
    /// Length of the payload, once the last fragment is here.
    total: Option<usize>,
    /// One bit for each ECN value seen.
    ecn: u8,
    condemned: bool,
}

#[derive(Debug)]
struct Piece {
    offset: usize,
    len: usize,
    /// The frame's data: `header` bytes, then the payload.
    header: usize,
    frame: Frame,
}

impl Piece {
    fn end(&self) -> usize {
        self.offset + self.len
    }

    fn payload(&self) -> &[u8] {
        self.frame.data().get(self.header..).unwrap_or(&[])
    }
}

/// What a fragment says about itself.
struct Place {
    id: u32,
    proto: u8,
    offset: usize,
    more: bool,
    /// Everything in front of the payload.
    header: usize,
    /// IPv6: length of the part before the fragment header, the byte that names the fragment header.
    unfragmentable: usize,
    nh_at: usize,
}

impl Reassembler {
    /// An empty one. All bounds are at least 1.
    pub fn new(config: ReassemblyConfig) -> Self {
        Self {
            config: ReassemblyConfig {
                datagrams: config.datagrams.max(1),
                frames: config.frames.max(1),
                pieces: config.pieces.max(1),
                ..config
            },
            table: HashMap::with_capacity_and_hasher(
                config.datagrams.saturating_add(1).min(1 << 16),
                foldhash::fast::RandomState::default(),
            ),
            ages: VecDeque::new(),
            frames: 0,
            serial: 0,
            spare: Vec::new(),
        }
    }

    /// Frames held now, for the ledger.
    pub fn held(&self) -> usize {
        self.frames
    }

    /// Takes in a fragment: `frame` holds the IP packet that `p` describes. Returns the whole packet when
    /// this completes it, as one frame whose data starts at the IP header, to be parsed anew.
    pub fn push(
        &mut self,
        frame: Frame,
        p: &Parsed,
        now: u64,
        done: &mut Vec<(Frame, Fate)>,
    ) -> Option<Frame> {
        self.expire(now, done);
        let place = match place(frame.data(), p) {
            Ok(place) => place,
            Err(reason) => {
                done.push((frame, Fate::Dropped(reason)));
                return None;
            }
        };
        let key = Key {
            src: p.src,
            dst: p.dst,
            id: place.id,
            proto: place.proto,
            family: p.family,
            vlan: p.vlan,
        };
        if !self.table.contains_key(&key) {
            self.open(key, now, done);
        }
        while self.frames >= self.config.frames {
            // Never the datagram just touched, unless it is the only one.
            if !self.evict_oldest(done) {
                break;
            }
        }
        if !self.table.contains_key(&key) {
            self.open(key, now, done);
        }
        self.insert(key, place, frame, p, done)
    }

    /// Gives up what has waited too long. Cheap when nothing has.
    #[inline]
    pub fn expire(&mut self, now: u64, done: &mut Vec<(Frame, Fate)>) {
        while self.ages.front().is_some_and(|a| a.deadline <= now) {
            if let Some(age) = self.ages.pop_front() {
                self.give_up(age, DropReason::FragmentTimeout, done);
            }
        }
    }

    /// Gives everything back, at shutdown.
    pub fn drain(&mut self, done: &mut Vec<(Frame, Fate)>) {
        while let Some(age) = self.ages.pop_front() {
            self.give_up(age, DropReason::Shutdown, done);
        }
    }

    fn open(&mut self, key: Key, now: u64, done: &mut Vec<(Frame, Fate)>) {
        while self.table.len() >= self.config.datagrams && self.evict_oldest(done) {}
        // Leftovers of completed datagrams may not pile up until their deadline.
        if self.ages.len() >= 2 * self.config.datagrams + 16 {
            let table = &self.table;
            self.ages
                .retain(|a| table.get(&a.key).is_some_and(|d| d.serial == a.serial));
        }
        self.serial += 1;
        self.ages.push_back(Age {
            deadline: now.saturating_add(self.config.timeout),
            key,
            serial: self.serial,
        });
        let datagram = Datagram {
            serial: self.serial,
            pieces: self.spare.pop().unwrap_or_default(),
            have: 0,
            total: None,
            ecn: 0,
            condemned: false,
        };
        self.table.insert(key, datagram);
    }

    fn evict_oldest(&mut self, done: &mut Vec<(Frame, Fate)>) -> bool {
        while let Some(age) = self.ages.pop_front() {
            if self.give_up(age, DropReason::FragmentMemory, done) {
                return true;
            }
        }
        false
    }

    /// False when the datagram was gone already.
    fn give_up(&mut self, age: Age, reason: DropReason, done: &mut Vec<(Frame, Fate)>) -> bool {
        if self
            .table
            .get(&age.key)
            .is_none_or(|d| d.serial != age.serial)
        {
            return false;
        }
        if let Some(d) = self.table.remove(&age.key) {
            self.release(d.pieces, reason, done);
        }
        true
    }

    fn release(
        &mut self,
        mut pieces: Vec<Piece>,
        reason: DropReason,
        done: &mut Vec<(Frame, Fate)>,
    ) {
        self.frames -= pieces.len();
        done.extend(pieces.drain(..).map(|p| (p.frame, Fate::Dropped(reason))));
        self.spare.push(pieces);
    }

    fn insert(
        &mut self,
        key: Key,
        place: Place,
        mut frame: Frame,
        p: &Parsed,
        done: &mut Vec<(Frame, Fate)>,
    ) -> Option<Frame> {
        let pieces_max = self.config.pieces;
        let Some(d) = self.table.get_mut(&key) else {
            done.push((frame, Fate::Dropped(DropReason::FragmentMemory)));
            return None;
        };
        let len = frame.len() - place.header;
        let verdict = if d.condemned {
            Verdict::Drop(DropReason::FragmentInvalid)
        } else if d.pieces.len() >= pieces_max {
            Verdict::Condemn(DropReason::FragmentMemory)
        } else {
            d.judge(&place, len, frame.data().get(place.header..).unwrap_or(&[]))
        };
        let at = match verdict {
            Verdict::Insert(at) => at,
            Verdict::Drop(reason) => {
                done.push((frame, Fate::Dropped(reason)));
                return None;
            }
            Verdict::Condemn(reason) => {
                d.condemned = true;
                let pieces = std::mem::take(&mut d.pieces);
                self.release(pieces, reason, done);
                done.push((frame, Fate::Dropped(reason)));
                return None;
            }
        };
        let header = if place.offset == 0 {
            strip_fragment_header(&mut frame, &place, p.family)
        } else {
            place.header
        };
        if !place.more {
            d.total = Some(place.offset + len);
        }
        d.have += len;
        d.ecn |= 1 << (p.tos & 3);
        d.pieces.insert(
            at,
            Piece {
                offset: place.offset,
                len,
                header,
                frame,
            },
        );
        self.frames += 1;
        if d.total != Some(d.have) {
            return None;
        }
        let d = self.table.remove(&key)?;
        self.join(d, p.family, done)
    }

    /// Puts the pieces of a complete datagram into the frame of the first.
    fn join(
        &mut self,
        mut d: Datagram,
        family: Family,
        done: &mut Vec<(Frame, Fate)>,
    ) -> Option<Frame> {
        let (Some(first), Some(total)) = (d.pieces.first(), d.total) else {
            self.release(d.pieces, DropReason::FragmentInvalid, done);
            return None;
        };
        let header = first.header;
        let refused = if header + total > 65535 {
            Some(DropReason::FragmentInvalid)
        } else if first.frame.tailroom() < total - first.len {
            Some(DropReason::NoRoom)
        // RFC 3168 section 5.3: a mark must not be lost, and must not reach one who cannot read it.
        } else if d.ecn & 1 << ecn::CE != 0 && d.ecn & 1 << ecn::NOT_ECT != 0 {
            Some(DropReason::FragmentInvalid)
        } else {
            None
        };
        if let Some(reason) = refused {
            self.release(d.pieces, reason, done);
            return None;
        }
        self.frames -= d.pieces.len();
        let mut pieces = d.pieces.drain(..);
        let mut whole = pieces.next()?.frame;
        for piece in pieces {
            if let Some(room) = whole.append(piece.len) {
                room.copy_from_slice(piece.payload());
            }
            done.push((piece.frame, Fate::Consumed(Consumed::Reassembled)));
        }
        self.spare.push(d.pieces);
        finish_header(&mut whole, family, header, d.ecn & 1 << ecn::CE != 0);
        Some(whole)
    }
}

enum Verdict {
    /// At this place of the list.
    Insert(usize),
    /// This fragment alone.
    Drop(DropReason),
    /// The whole datagram.
    Condemn(DropReason),
}

impl Datagram {
    fn judge(&self, place: &Place, len: usize, payload: &[u8]) -> Verdict {
        let invalid = Verdict::Condemn(DropReason::FragmentInvalid);
        let end = place.offset + len;
        let at = self.pieces.partition_point(|p| p.offset < place.offset);
        if let Some(same) = self.pieces.get(at)
            && same.offset == place.offset
            && same.len == len
            && same.payload() == payload
            && (place.more || self.total == Some(end))
        {
            return Verdict::Drop(DropReason::FragmentInvalid);
        }
        let before = at.checked_sub(1).and_then(|i| self.pieces.get(i));
        if before.is_some_and(|p| p.end() > place.offset)
            || self.pieces.get(at).is_some_and(|p| p.offset < end)
        {
            return invalid;
        }
        // One end only, and nothing behind it.
        let last_end = self.pieces.last().map_or(0, Piece::end);
        match (self.total, place.more) {
            (Some(_), false) => return invalid,
            (Some(total), true) if end > total => return invalid,
            (None, false) if last_end > end => return invalid,
            _ => {}
        }
        Verdict::Insert(at)
    }
}

fn place(packet: &[u8], p: &Parsed) -> Result<Place, DropReason> {
    if p.frag == Frag::No {
        return Err(DropReason::FragmentInvalid);
    }
    let place = match p.family {
        Family::V4 => {
            let ip = Ipv4::new(packet)?;
            Place {
                id: u32::from(ip.id()),
                proto: ip.proto(),
                offset: ip.frag_offset(),
                more: ip.mf(),
                header: ip.header_len(),
                unfragmentable: 0,
                nh_at: 0,
            }
        }
        Family::V6 => {
            let w = Ipv6::new(packet)?.walk()?;
            let f = w.fragment.ok_or(DropReason::FragmentInvalid)?;
            Place {
                id: f.id,
                // Only the first fragment's next header counts, RFC 8200 section 4.5.
                proto: 0,
                offset: f.offset,
                more: f.more,
                header: f.at + FRAGMENT_LEN,
                unfragmentable: f.at,
                nh_at: f.nh_at,
            }
        }
    };
    if packet.len() <= place.header || packet.len() != usize::from(p.l3_len) {
        return Err(DropReason::FragmentInvalid);
    }
    Ok(place)
}

/// Takes the IPv6 fragment header out of the first fragment; returns the length of what stays in front of
/// the payload.
fn strip_fragment_header(frame: &mut Frame, place: &Place, family: Family) -> usize {
    if family == Family::V4 {
        return place.header;
    }
    let packet = frame.data_mut();
    if let Some(&next) = packet.get(place.unfragmentable)
        && let Some(b) = packet.get_mut(place.nh_at)
    {
        *b = next;
    }
    packet.copy_within(..place.unfragmentable, FRAGMENT_LEN);
    frame.trim_front(FRAGMENT_LEN);
    place.unfragmentable
}

fn finish_header(frame: &mut Frame, family: Family, header: usize, marked: bool) {
    let total = frame.len();
    let packet = frame.data_mut();
    match family {
        Family::V4 => {
            if let Some(h) = packet.first_chunk_mut::<20>() {
                h[6] &= 0x40;
                h[7] = 0;
                if marked {
                    h[1] |= ecn::CE;
                }
            }
        }
        Family::V6 => {
            if marked && let Some(h) = packet.first_chunk_mut::<40>() {
                let tos = ipv6::tos(h) | ecn::CE;
                ipv6::set_tos(h, tos);
            }
        }
    }
    if let Some(h) = packet.get_mut(..header) {
        set_length(h, family, total);
    }
}

/// Runs arbitrary fragments through a small reassembler and checks the account of frames, for the fuzzer.
#[doc(hidden)]
pub fn fuzz_reassembly(data: &[u8], pool: &mut pmd::Pool) {
    let mut r = Reassembler::new(ReassemblyConfig {
        datagrams: 3,
        frames: 6,
        pieces: 4,
        timeout: 100,
    });
    let mut done = Vec::new();
    let (mut now, mut pushed, mut whole, mut returned) = (0u64, 0, 0, 0);
    let mut rest = data;
    while let [len, tick, body @ ..] = rest {
        let (packet, behind) = body.split_at(usize::from(*len).min(body.len()));
        rest = behind;
        let packet = &*crate::wire::fuzz::with_checksum(packet);
        now += u64::from(*tick);
        let Ok(p) = crate::wire::parse_ip(packet, crate::wire::NattPorts::default()) else {
            continue;
        };
        let Some(mut frame) = pool.get() else {
            break;
        };
        let cut = packet.get(..usize::from(p.l3_len)).unwrap_or(packet);
        if !frame.set_data(cut) {
            pool.put(frame);
            continue;
        }
        pushed += 1;
        if let Some(f) = r.push(frame, &p, now, &mut done) {
            let q = crate::wire::parse_ip(f.data(), crate::wire::NattPorts::default());
            assert!(q.is_err() || q.is_ok_and(|q| usize::from(q.l3_len) == f.len()));
            whole += 1;
            pool.put(f);
        }
        returned += done.len();
        done.drain(..).for_each(|(f, _)| pool.put(f));
        assert!(r.held() <= 6);
        assert_eq!(pushed, whole + returned + r.held());
    }
    r.drain(&mut done);
    returned += done.len();
    done.drain(..).for_each(|(f, _)| pool.put(f));
    assert_eq!(pushed, whole + returned);
}

#[cfg(test)]
mod tests;
