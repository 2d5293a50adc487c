//! The wrapper's own SAs and packets, for known answers and canaries.

use std::net::IpAddr;
use std::sync::Arc;

use pmd::engine::{EspJob, JobKind, JobStatus};
use pmd::frame::Frame;
use sa_store::cipher::{CipherError, CipherFactory, CipherJob, SaCipher};
use sa_store::plan::{ESP_HEADER, ESP_TRAILER};
use sa_store::runtime::{Place, SaEntry};
use sa_store::sa::{Direction, OffloadMode, SaId, SaKeys, Spi};
use sa_store::suite::Suite;

use crate::crypto::Fixed;
use crate::crypto::rustcrypto::RustCrypto;
use crate::engine::private::{HERE, Private, THERE};
use crate::wire::ipv4::{self, Ipv4Repr};
use crate::wire::proto;

/// Where ESP begins in an outer packet of ours.
pub(super) const OUTER: usize = ipv4::HEADER_LEN;
/// The SPI of our SAs: no packet of theirs ever leaves, so it need not be theirs alone.
pub(super) const SPI: u32 = 0x0e57_1a4d;

/// The reference that engines are held against.
pub(super) fn reference(suite: Suite, keys: &SaKeys) -> Result<Box<dyn SaCipher>, CipherError> {
    Fixed(RustCrypto).make(suite, keys, false, Direction::Out)
}

/// An SA that only this module knows.
///
/// # Errors
/// The keys are not the suite's.
pub(super) fn entry(
    id: SaId,
    suite: Suite,
    keys: &SaKeys,
    direction: Direction,
    mode: OffloadMode,
) -> Result<Arc<SaEntry>, CipherError> {
    let sa = Private {
        name: "(check)",
        id,
        // Not one of the reserved values.
        spi: Spi::new(SPI).unwrap_or_else(|| unreachable!("a constant above 255")),
        suite,
        keys: keys.clone(),
        direction,
        offload: mode,
        place: Place::CPU,
        cipher: reference(suite, keys)?,
        provider: "rustcrypto",
    };
    Ok(sa.entry())
}

/// An inner packet of `len` bytes (at least 20), whose content follows from `seed`.
pub(super) fn inner(len: u16, seed: u64) -> Vec<u8> {
    let mut head = [0; ipv4::HEADER_LEN];
    Ipv4Repr {
        src: HERE,
        dst: THERE,
        // RFC 3692: for experiments.
        proto: 253,
        ttl: 64,
        tos: 0,
        id: 0,
        frag: ipv4::DF,
        payload_len: len.saturating_sub(20),
    }
    .emit(&mut head);
    let mut x = seed;
    let body = (20..len).map(|_| {
        x = x
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        x.to_be_bytes()[0]
    });
    head.into_iter().chain(body).collect()
}

/// A packet in all its forms, from the ESP header on.
pub(super) struct Known {
    /// What lies inside.
    pub(super) inner: Vec<u8>,
    /// Ready to be sealed.
    pub(super) framed: Vec<u8>,
    /// As the reference seals it.
    pub(super) sealed: Vec<u8>,
}

impl Known {
    /// Number `seq` of an SA, whose cipher is given.
    pub(super) fn new(suite: Suite, cipher: &dyn SaCipher, seq: u32, len: u16) -> Option<Known> {
        let inner = inner(len, u64::from(seq) << 16 | u64::from(len));
        let framed = frame(suite, seq, &inner);
        let mut sealed = framed.clone();
        seal(cipher, &mut sealed, 0).then_some(Known {
            inner,
            framed,
            sealed,
        })
    }

    /// The opened packet without its ICV.
    pub(super) fn opened(&self, suite: Suite) -> &[u8] {
        self.framed
            .get(..self.framed.len() - suite.icv_len())
            .unwrap_or_default()
    }
}

/// Header, IV, payload, padding, trailer, and room for the ICV.
fn frame(suite: Suite, seq: u32, inner: &[u8]) -> Vec<u8> {
    let mut esp = SPI.to_be_bytes().to_vec();
    esp.extend(seq.to_be_bytes());
    // Of either length: a counter as the data path makes it, or what need not be secret here.
    let iv = u64::from(seq).to_be_bytes();
    esp.extend(iv.iter().cycle().take(suite.iv_len()));
    esp.extend(inner);
    let bare = inner.len() + ESP_TRAILER;
    let pad = bare.next_multiple_of(suite.pad_align()) - bare;
    esp.extend((1u8..=u8::MAX).take(pad));
    esp.extend([u8::try_from(pad).unwrap_or(0), proto::IPV4]);
    esp.resize(esp.len() + suite.icv_len(), 0);
    esp
}

/// Ciphers one packet.
pub(super) fn seal(cipher: &dyn SaCipher, esp: &mut [u8], seq_hi: u32) -> bool {
    let mut job = [CipherJob {
        ctx: cipher,
        esp,
        seq_hi,
        ok: false,
    }];
    cipher.seal(&mut job);
    job[0].ok
}

/// Opens one packet.
pub(super) fn open(cipher: &dyn SaCipher, esp: &mut [u8], seq_hi: u32) -> bool {
    let mut job = [CipherJob {
        ctx: cipher,
        esp,
        seq_hi,
        ok: false,
    }];
    cipher.open(&mut job);
    job[0].ok
}

/// Payload and next header of an opened packet that runs from the ESP header to the end of the ICV. `None` when its padding
/// is not what RFC 4303 section 2.4 says and `strict` asks for that, or its lengths cannot be.
pub(super) fn unframe(suite: Suite, opened: &[u8], strict: bool) -> Option<(&[u8], u8)> {
    let front = ESP_HEADER + suite.iv_len();
    let body = opened.get(front..opened.len().checked_sub(suite.icv_len())?)?;
    let (rest, [pad, next]) = body.split_last_chunk::<ESP_TRAILER>()?;
    let at = rest.len().checked_sub(usize::from(*pad))?;
    let (payload, padding) = rest.split_at_checked(at)?;
    let right = padding.iter().zip(1u8..).all(|(a, b)| *a == b);
    (right || !strict).then_some((payload, *next))
}

/// A job of ours in an empty frame. `esp` runs from the ESP header on; to be sealed in packet mode, it is what lies inside.
/// `None` when it does not fit.
pub(super) fn job(
    mut frame: Frame,
    entry: &SaEntry,
    kind: JobKind,
    seq: u64,
    bytes: &[u8],
    outer_headers: bool,
) -> Result<EspJob, Frame> {
    let suite = entry.spec.suite;
    let mode = entry.spec.offload;
    let bare = mode == OffloadMode::Packet && kind == JobKind::Seal;
    let mut front = Vec::with_capacity(OUTER + ESP_HEADER + suite.iv_len());
    if !(bare && outer_headers) {
        let room = if bare { ESP_HEADER + suite.iv_len() } else { 0 };
        let mut head = [0; ipv4::HEADER_LEN];
        let v4 = |a, other| match a {
            IpAddr::V4(a) => a,
            IpAddr::V6(_) => other,
        };
        Ipv4Repr {
            src: v4(entry.spec.src, HERE),
            dst: v4(entry.spec.dst, THERE),
            proto: proto::ESP,
            ttl: 64,
            tos: 0,
            id: 0,
            frag: ipv4::DF,
            payload_len: u16::try_from(room + bytes.len()).unwrap_or(u16::MAX),
        }
        .emit(&mut head);
        front.extend(head);
        front.resize(OUTER + room, 0);
    }
    let esp_off = if front.is_empty() { 0 } else { OUTER };
    let fits = frame.set_data(&front)
        && frame
            .append(bytes.len())
            .map(|place| place.copy_from_slice(bytes))
            .is_some();
    if !fits {
        return Err(frame);
    }
    Ok(EspJob {
        esp_end: u16::try_from(frame.len()).unwrap_or(u16::MAX),
        frame,
        sa: entry.fixed.id,
        seq,
        tag: 0,
        note: 0,
        esp_off: u16::try_from(esp_off).unwrap_or(0),
        next_header: proto::IPV4,
        kind,
        mode,
        status: JobStatus::Pending,
    })
}

/// What a job of ours came back with.
pub(super) struct Outcome<'a> {
    pub(super) status: JobStatus,
    /// From the ESP header to the end of the packet; what lies inside, of a packet opened in packet mode.
    pub(super) bytes: &'a [u8],
    pub(super) next_header: u8,
}

impl<'a> Outcome<'a> {
    /// Of a job that came back.
    pub(super) fn of(job: &'a EspJob, suite: Suite, outer_headers: bool) -> Outcome<'a> {
        let opened = job.kind == JobKind::Open && job.mode == OffloadMode::Packet;
        let from = match (opened, outer_headers) {
            (true, true) => 0,
            (true, false) => usize::from(job.esp_off) + ESP_HEADER + suite.iv_len(),
            (false, _) => usize::from(job.esp_off),
        };
        let bytes = job.frame.data().get(from..usize::from(job.esp_end));
        Outcome {
            status: job.status,
            bytes: bytes.unwrap_or_default(),
            next_header: job.next_header,
        }
    }

    /// Whether it is what the reference makes of the packet.
    pub(super) fn is_right(
        &self,
        known: &Known,
        suite: Suite,
        cipher: &dyn SaCipher,
        kind: JobKind,
        mode: OffloadMode,
        seq: u32,
    ) -> bool {
        if self.status != JobStatus::Done {
            return false;
        }
        match (mode, kind) {
            (OffloadMode::Packet, JobKind::Seal) => {
                let mut esp = self.bytes.to_vec();
                let header = [SPI.to_be_bytes(), seq.to_be_bytes()].concat();
                esp.get(..ESP_HEADER) == Some(&header[..])
                    && open(cipher, &mut esp, 0)
                    && unframe(suite, &esp, true) == Some((&known.inner, proto::IPV4))
            }
            (OffloadMode::Packet, JobKind::Open) => {
                self.bytes == known.inner && self.next_header == proto::IPV4
            }
            (_, JobKind::Seal) => self.bytes == known.sealed,
            (_, JobKind::Open) => {
                let opened = known.opened(suite);
                self.bytes.get(..opened.len()) == Some(opened)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::differential::keys;

    #[test]
    fn what_the_reference_seals_it_opens_to_the_packet_that_was_framed() {
        for suite in Suite::all() {
            let cipher = reference(suite, &keys(suite, 5)).unwrap();
            for len in [20, 47, 1400] {
                let known = Known::new(suite, &*cipher, 9, len).unwrap();
                let mut esp = known.sealed.clone();
                assert_ne!(known.framed, known.sealed, "{suite}");
                assert!(open(&*cipher, &mut esp, 0), "{suite}");
                assert_eq!(esp[..known.opened(suite).len()], *known.opened(suite));
                assert_eq!(
                    unframe(suite, &esp, true),
                    Some((&known.inner[..], proto::IPV4)),
                    "{suite}"
                );
            }
        }
    }

    #[test]
    fn padding_that_is_not_the_rfcs_is_refused_where_we_made_it() {
        let suite: Suite = "aes-128-cbc+hmac-sha1-96".parse().unwrap();
        let cipher = reference(suite, &keys(suite, 5)).unwrap();
        let known = Known::new(suite, &*cipher, 1, 40).unwrap();
        let mut esp = known.framed.clone();
        let first = ESP_HEADER + suite.iv_len() + 40;
        esp[first] ^= 0x80;
        assert_eq!(unframe(suite, &esp, true), None);
        assert!(unframe(suite, &esp, false).is_some());
        let end = esp.len() - suite.icv_len();
        esp[end - 2] = 255;
        assert_eq!(unframe(suite, &esp, false), None);
    }
}
