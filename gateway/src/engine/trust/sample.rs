//! Software does again what the engine does, for one packet in so many.
//!
//! What the answer must be is worked out before the packet goes in, with the SA's own cipher. Only of a packet that the engine
//! numbers is it not known before: there the plaintext is kept, and what comes back is opened.

use pmd::engine::{EspJob, JobKind, JobStatus};
use sa_store::plan::ESP_HEADER;
use sa_store::runtime::SaEntry;
use sa_store::sa::OffloadMode;

use super::packets;
use super::sas::Carried;
use super::ticket::NO_SAMPLE;
use crate::esp::ecn;
use crate::wire::proto;

/// Bytes kept ready for each sample: an Ethernet frame's worth.
const USUAL: usize = 2048;

/// One packet in each run of `one_in`, at a random place in it; 0 for none.
#[derive(Debug)]
pub(super) struct Draw {
    one_in: u32,
    /// Packets to the next one, and to the end of its run.
    until: u32,
    rest: u32,
    random: u64,
}

impl Draw {
    pub(super) fn new(one_in: u32, seed: u64) -> Draw {
        let mut draw = Draw {
            one_in,
            until: 0,
            rest: 0,
            random: seed,
        };
        draw.begin();
        draw
    }

    fn begin(&mut self) {
        // Splitmix64: it need not be secret.
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        let place = z % u64::from(self.one_in.max(1));
        self.until = u32::try_from(place).unwrap_or(0);
        self.rest = self.one_in.saturating_sub(self.until);
    }

    /// Whether the next packet is one.
    #[inline]
    pub(super) fn is_due(&self) -> bool {
        self.one_in != 0 && self.until == 0
    }

    /// Whether every packet is one.
    pub(super) fn is_all(&self) -> bool {
        self.one_in == 1
    }

    /// The packet that was due has been taken.
    pub(super) fn taken(&mut self) {
        let rest = self.rest;
        self.begin();
        // The run that was begun ends first.
        self.until += rest.saturating_sub(1);
    }

    /// A packet passed that was not due.
    #[inline]
    pub(super) fn pass(&mut self) {
        self.until = self.until.saturating_sub(1);
    }
}

/// What the answer must be.
#[derive(Debug, Default)]
struct Sample {
    /// The sealed or opened packet from its ESP header on; of packets that the engine numbers, what lies inside.
    bytes: Vec<u8>,
    /// Whether the ICV is right; of sealing, whether there is an answer.
    right: bool,
    next_header: u8,
}

/// Samples of packets in the engine, as many as there are places.
#[derive(Debug)]
pub(super) struct Samples {
    list: Vec<Sample>,
    free: Vec<u16>,
    scratch: Vec<u8>,
}

impl Samples {
    pub(super) fn new(places: u16) -> Samples {
        let places = places.min(NO_SAMPLE - 1);
        let sample = || Sample {
            bytes: Vec::with_capacity(USUAL),
            ..Sample::default()
        };
        Samples {
            list: (0..places).map(|_| sample()).collect(),
            free: (0..places).collect(),
            scratch: Vec::with_capacity(USUAL),
        }
    }

    /// Whether there is no place for another.
    pub(super) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Works out the answer to a job.
    pub(super) fn take(&mut self, job: &EspJob, entry: &SaEntry, bare: bool) -> Option<u16> {
        let place = *self.free.last()?;
        let sample = self.list.get_mut(usize::from(place))?;
        let bytes = packet(job, entry, bare)?;
        sample.bytes.clear();
        sample.bytes.extend_from_slice(bytes);
        sample.next_header = job.next_header;
        if bare {
            // An engine that makes the outer headers reads the packet's own version.
            sample.next_header = match bytes.first().map(|b| b >> 4) {
                Some(6) => proto::IPV6,
                _ => proto::IPV4,
            };
        }
        sample.right = match (job.kind, job.mode) {
            (JobKind::Seal, OffloadMode::Packet) => true,
            _ => cipher(entry, &mut sample.bytes, job),
        };
        self.free.pop();
        Some(place)
    }

    /// The job is not sampled after all.
    pub(super) fn drop(&mut self, place: u16) {
        if place != NO_SAMPLE {
            self.free.push(place);
        }
    }

    /// Holds what came back against the answer; `None` when it says nothing about it.
    pub(super) fn check(
        &mut self,
        place: u16,
        job: &EspJob,
        sa: &Carried,
        bare: bool,
    ) -> Option<bool> {
        let Samples {
            list,
            free,
            scratch,
        } = self;
        let sample = list.get(usize::from(place))?;
        free.push(place);
        match job.status {
            JobStatus::Done => {}
            // It may not call bad what is good.
            JobStatus::IcvMismatch => return Some(!sample.right),
            _ => return None,
        }
        if !sample.right {
            return Some(false);
        }
        let opened = job.kind == JobKind::Open && job.mode == OffloadMode::Packet;
        let from = match (opened, bare) {
            (true, true) => 0,
            (true, false) => usize::from(job.esp_off) + ESP_HEADER + sa.suite.iv_len(),
            (false, _) => usize::from(job.esp_off),
        };
        let data = job.frame.data().get(from..usize::from(job.esp_end));
        let Some(data) = data else {
            return Some(false);
        };
        Some(match (job.kind, job.mode) {
            (JobKind::Seal, OffloadMode::Packet) => {
                let Some(opener) = &sa.opener else {
                    return None;
                };
                scratch.clear();
                scratch.extend_from_slice(data);
                packets::open(&**opener, scratch, 0)
                    && packets::unframe(sa.suite, scratch, true)
                        == Some((&sample.bytes, sample.next_header))
            }
            (JobKind::Seal, _) => data == sample.bytes,
            (JobKind::Open, OffloadMode::Packet) => {
                // The peer's padding is the peer's.
                packets::unframe(sa.suite, &sample.bytes, false).is_some_and(|(payload, next)| {
                    if bare {
                        is_inner(payload, data)
                    } else {
                        payload == data && next == job.next_header
                    }
                })
            }
            (JobKind::Open, _) => {
                let end = data.len().saturating_sub(sa.suite.icv_len());
                data.len() == sample.bytes.len() && data.get(..end) == sample.bytes.get(..end)
            }
        })
    }
}

/// Whether an engine that takes the outer header off gave the packet inside: as it was, or marked as congested where the outer
/// header was and its sender understands that (RFC 6040). IPv4's checksum is looked at by whoever takes the packet on.
fn is_inner(packet: &[u8], given: &[u8]) -> bool {
    if packet == given {
        return true;
    }
    let mut marked = [0; 12];
    let (Some((a, b)), Some((c, d))) = (
        packet.split_first_chunk::<12>(),
        given.split_first_chunk::<12>(),
    ) else {
        return false;
    };
    marked.copy_from_slice(a);
    if a[0] >> 4 == 4 {
        marked[1] |= ecn::CE * u8::from(a[1] & ecn::CE != ecn::NOT_ECT);
        marked[10..].copy_from_slice(&c[10..]);
    } else {
        let mark = ecn::CE << 4;
        marked[1] |= mark * u8::from(a[1] & mark != 0);
    }
    marked == *c && b == d
}

/// The bytes of the packet that the answer follows from.
fn packet<'a>(job: &'a EspJob, entry: &SaEntry, bare: bool) -> Option<&'a [u8]> {
    let (from, to) = (usize::from(job.esp_off), usize::from(job.esp_end));
    let from = match (job.kind, job.mode, bare) {
        (JobKind::Seal, OffloadMode::Packet, true) => return Some(job.frame.data()),
        (JobKind::Seal, OffloadMode::Packet, false) => {
            from + ESP_HEADER + entry.spec.suite.iv_len()
        }
        _ => from,
    };
    job.frame.data().get(from..to)
}

fn cipher(entry: &SaEntry, esp: &mut [u8], job: &EspJob) -> bool {
    let spec = &entry.spec;
    let least = ESP_HEADER + spec.suite.iv_len() + 2 + spec.suite.icv_len();
    let ciphered = esp.len().checked_sub(least - 2);
    // As the ciphers ask of their callers.
    if !ciphered.is_some_and(|n| n >= 2 && n.is_multiple_of(spec.suite.pad_align())) {
        return false;
    }
    let [_, _, _, _, a, b, c, d] = job.seq.to_le_bytes();
    let seq_hi = u32::from_le_bytes([a, b, c, d]);
    let ctx = &*entry.fixed.cipher;
    match job.kind {
        JobKind::Seal => packets::seal(ctx, esp, seq_hi),
        JobKind::Open => packets::open(ctx, esp, seq_hi),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(one_in: u32, n: usize) -> Vec<usize> {
        let mut draw = Draw::new(one_in, 7);
        let mut taken = Vec::new();
        for i in 0..n {
            if draw.is_due() {
                draw.taken();
                taken.push(i);
            } else {
                draw.pass();
            }
        }
        taken
    }

    #[test]
    fn a_packet_may_be_marked_as_congested_and_changed_in_no_other_way() {
        let v4 = |tos: u8, sum: u8| {
            [
                &[0x45, tos, 0, 24, 0, 1, 0, 0, 64, 17, sum, 0][..],
                &[7; 12],
            ]
            .concat()
        };
        assert!(is_inner(&v4(2, 1), &v4(2, 1)) && is_inner(&v4(2, 1), &v4(3, 9)));
        for other in [
            v4(1, 9),
            v4(0, 9),
            v4(7, 9),
            [&v4(3, 9)[..23], &[0]].concat(),
        ] {
            assert!(!is_inner(&v4(2, 1), &other), "{other:?}");
        }
        assert!(
            !is_inner(&v4(0, 1), &v4(3, 9)),
            "its sender does not understand the mark"
        );
        let v6 = |class: u8| [&[0x60, class, 0, 0, 0, 0, 17, 64][..], &[7; 32]].concat();
        assert!(is_inner(&v6(0x20), &v6(0x30)) && !is_inner(&v6(0), &v6(0x30)));
        assert!(!is_inner(&v6(0x20), &v6(0x10)) && !is_inner(&v6(0x20), &v6(0x31)));
    }

    #[test]
    fn one_packet_of_each_run_is_drawn() {
        assert_eq!(drawn(1, 50), (0..50).collect::<Vec<_>>());
        assert!(drawn(0, 50).is_empty());
        let taken = drawn(16, 16 * 100);
        let runs: Vec<usize> = taken.iter().map(|i| i / 16).collect();
        assert_eq!(runs, (0..100).collect::<Vec<_>>());
        let places: std::collections::HashSet<usize> = taken.iter().map(|i| i % 16).collect();
        assert!(places.len() > 8, "{places:?}");
    }
}
