//! Outbound packets on their way into an engine and back.

use pmd::engine::{EspJob, JobStatus};
use sa_store::drops::DropReason;
use sa_store::plan::{ESP_TRAILER, OutPlan};
use sa_store::runtime::SaEntry;
use sa_store::sa::OffloadMode;

use super::core::Shared;
use crate::wire::len16;

/// Gives a packet that is framed, or that its engine will frame, to the SA's engine. The caller asked for room before it took a
/// number.
pub(super) fn stage(shared: &mut Shared, entry: &SaEntry, plan: &OutPlan, mut job: EspJob) {
    let place = entry.fixed.place;
    let bared = place.mode != OffloadMode::Packet || place.outer_headers || bare(&mut job, plan);
    let refused = if bared {
        shared.bank.stage(place.engine, job)
    } else {
        Err(job)
    };
    if let Err(job) = refused {
        entry.live.counters.engine.add(1);
        shared.drop(job.frame, DropReason::EngineError);
    }
}

/// Packet mode: the engine pads and writes the trailer. The outer header, whose length counts both, stays as it is.
fn bare(job: &mut EspJob, plan: &OutPlan) -> bool {
    let data = job.frame.data();
    let trailer = data
        .len()
        .checked_sub(usize::from(plan.icv_len) + ESP_TRAILER);
    let Some((at, Some([pad, next_header]))) =
        trailer.map(|at| (at, data.get(at..at + ESP_TRAILER)))
    else {
        return false;
    };
    job.next_header = *next_header;
    match at.checked_sub(usize::from(*pad)) {
        Some(end) if end > usize::from(job.esp_off) => {
            job.esp_end = len16(end);
            true
        }
        _ => false,
    }
}

/// Whether what an engine framed is one whole IP packet: its length is what its header says.
pub(super) fn is_whole(job: &EspJob) -> bool {
    let data = job.frame.data();
    let said = match data.first().map(|b| b >> 4) {
        Some(4) => data.get(2..4).map(|l| (l, 0)),
        Some(6) => data.get(4..6).map(|l| (l, 40)),
        _ => None,
    };
    said.and_then(|(l, more)| Some((l.first_chunk()?, more)))
        .is_some_and(|(l, more)| usize::from(u16::from_be_bytes(*l)) + more == data.len())
}

/// Why a packet that did not come back sealed is dropped.
pub(super) fn reason(status: JobStatus) -> DropReason {
    match status {
        JobStatus::SaGone => DropReason::SaDisabled,
        JobStatus::LimitReached => DropReason::SequenceExhausted,
        JobStatus::Malformed => DropReason::EngineRefused,
        _ => DropReason::EngineError,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pmd::engine::JobKind;
    use pmd::{Arena, ArenaConfig, Pool};
    use sa_store::sa::SaId;

    fn job(pool: &mut Pool, packet: &[u8]) -> EspJob {
        let mut frame = pool.get().unwrap();
        frame.append(packet.len()).unwrap().copy_from_slice(packet);
        EspJob {
            frame,
            sa: SaId {
                index: 0,
                generation: 1,
            },
            seq: 1,
            tag: 0,
            note: 0,
            esp_off: 20,
            esp_end: len16(packet.len()),
            next_header: 0,
            kind: JobKind::Seal,
            mode: OffloadMode::Packet,
            status: JobStatus::Done,
        }
    }

    #[test]
    fn a_packet_is_whole_when_its_header_says_its_length() {
        let arena = Arena::new(ArenaConfig {
            frames: 64,
            lock: false,
            ..ArenaConfig::default()
        })
        .unwrap();
        let mut pool = Pool::new(&arena, 8);
        let v4 = |said: u8| [&[0x45, 0, 0, said][..], &[0; 56]].concat();
        let v6 = |said: u8| [&[0x60, 0, 0, 0, 0, said][..], &[0; 54]].concat();
        for (packet, whole) in [
            (v4(60), true),
            (v4(59), false),
            (v4(61), false),
            (v6(20), true),
            (v6(60), false),
            (vec![0x00; 60], false),
            (vec![], false),
            (vec![0x45], false),
        ] {
            let job = job(&mut pool, &packet);
            assert_eq!(is_whole(&job), whole, "{packet:02x?}");
            pool.put(job.frame);
        }
    }
}
