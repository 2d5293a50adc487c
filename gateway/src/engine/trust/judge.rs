//! Checks of every result: what was given must be what comes back, and nothing leaves under a number or an IV that was used
//! before.

use pmd::engine::{EspJob, JobKind};
use sa_store::plan::{ESP_HEADER, ESP_TRAILER};
use sa_store::sa::OffloadMode;
use sa_store::suite::MAX_PAD;

use super::sas::Carried;
use super::state::Reason;
use super::ticket::Ticket;

/// Notes of a job what the result must show.
#[inline]
pub(super) fn note(ticket: &mut Ticket, job: &EspJob, sa: &Carried, bare: bool) {
    let iv_len = sa.sizes.iv;
    let from = usize::from(job.esp_off);
    let data = job.frame.data();
    let packet = job.mode == OffloadMode::Packet;
    let payload = match (job.kind, packet && bare) {
        (JobKind::Seal, true) => Some(0),
        (JobKind::Seal, false) => Some(from + ESP_HEADER + iv_len),
        (JobKind::Open, _) => None,
    };
    if sa.sizes.hides {
        let end = usize::from(job.esp_end);
        let first = payload.and_then(|at| data.get(at..end)?.first_chunk());
        ticket.plain = first.copied();
    }
    if job.kind == JobKind::Seal && packet {
        return;
    }
    if let Some(header) = data.get(from..).and_then(|d| d.first_chunk()) {
        ticket.header = *header;
    }
    if let Some(iv) = data.get(from..).and_then(|esp| iv_of(sa, esp)) {
        ticket.iv = iv;
    }
}

/// Judges a job that is said to be done, and notes its number and IV as used.
pub(super) fn result(
    sa: &mut Carried,
    ticket: &Ticket,
    job: &mut EspJob,
    bare: bool,
) -> Result<(), Reason> {
    if ticket.nth <= sa.landed {
        return Err(Reason::Order);
    }
    match (job.kind, job.mode) {
        (JobKind::Seal, OffloadMode::Packet) => numbered(sa, ticket, job, bare)?,
        (JobKind::Seal, _) => sealed(sa, ticket, job)?,
        (JobKind::Open, OffloadMode::Packet) => opened(sa, ticket, job, bare)?,
        (JobKind::Open, _) => {
            framed(ticket, job)?;
        }
    }
    sa.landed = ticket.nth;
    Ok(())
}

/// Software sealed the packet: its number and IV are used.
pub(super) fn used(sa: &mut Carried, job: &EspJob) {
    sa.last_seq = sa.last_seq.max(job.seq);
    let esp = job.frame.data().get(usize::from(job.esp_off)..);
    if let Some(iv) = esp.and_then(|esp| iv_of(sa, esp)) {
        sa.last_iv = iv;
    }
}

/// Lies where it lay, with the header and the IV that it had; from its ESP header on.
fn framed<'a>(ticket: &Ticket, job: &'a EspJob) -> Result<&'a [u8], Reason> {
    let same = job.esp_off == ticket.esp_off
        && job.esp_end == ticket.esp_end
        && job.frame.len() == usize::from(ticket.len);
    let esp = job
        .frame
        .data()
        .get(usize::from(job.esp_off)..usize::from(job.esp_end));
    let esp = esp.filter(|_| same).ok_or(Reason::Length)?;
    if esp.first_chunk() != Some(&ticket.header) {
        return Err(Reason::Header);
    }
    Ok(esp)
}

/// The IV of a packet, and zeros behind it.
#[inline]
fn iv_of(sa: &Carried, esp: &[u8]) -> Option<[u8; 16]> {
    let esp = esp.get(ESP_HEADER..)?;
    let mut iv = [0; 16];
    // Lengths that are known cost no call.
    match sa.sizes.iv {
        16 => iv = *esp.first_chunk()?,
        8 => *iv.first_chunk_mut()? = *esp.first_chunk::<8>()?,
        n => iv.get_mut(..n)?.copy_from_slice(esp.get(..n)?),
    }
    Some(iv)
}

/// In counter mode an IV must be above all before it, RFC 4106 section 3.1 asks for "never again". Of other ciphers' the last
/// one is known.
fn fresh(sa: &Carried, iv: &[u8; 16]) -> Result<(), Reason> {
    let right = if sa.sizes.is_counter_mode {
        // Big-endian and of equal lengths: as bytes they compare like numbers.
        *iv > sa.last_iv || sa.last_seq == 0
    } else {
        sa.sizes.iv == 0 || *iv != sa.last_iv
    };
    if right { Ok(()) } else { Err(Reason::Iv) }
}

fn hidden(ticket: &Ticket, payload: &[u8]) -> Result<(), Reason> {
    let shown = ticket.plain.is_some() && payload.first_chunk::<8>() == ticket.plain.as_ref();
    if shown {
        Err(Reason::Plaintext)
    } else {
        Ok(())
    }
}

fn sealed(sa: &mut Carried, ticket: &Ticket, job: &EspJob) -> Result<(), Reason> {
    let esp = framed(ticket, job)?;
    let iv = iv_of(sa, esp).ok_or(Reason::Length)?;
    if iv != ticket.iv {
        return Err(Reason::Iv);
    }
    fresh(sa, &iv)?;
    if ticket.seq <= sa.last_seq {
        return Err(Reason::Number);
    }
    let payload = esp.get(ESP_HEADER + sa.sizes.iv..);
    hidden(ticket, payload.unwrap_or_default())?;
    sa.last_iv = iv;
    sa.last_seq = ticket.seq;
    Ok(())
}

/// Sealed in packet mode.
fn numbered(sa: &mut Carried, ticket: &Ticket, job: &mut EspJob, bare: bool) -> Result<(), Reason> {
    let sizes = sa.sizes;
    let front = ESP_HEADER + sizes.iv;
    let (from, to) = (usize::from(job.esp_off), usize::from(job.esp_end));
    let data = job.frame.data();
    let (at, given) = if bare {
        (usize::from(sa.outer.len()), usize::from(ticket.len))
    } else {
        let at = usize::from(ticket.esp_off);
        let given = usize::from(ticket.esp_end).checked_sub(at + front);
        (at, given.ok_or(Reason::Length)?)
    };
    if from != at || to != data.len() {
        return Err(Reason::Length);
    }
    let esp = data.get(from..to).ok_or(Reason::Length)?;
    let least = (given + ESP_TRAILER).next_multiple_of(sizes.pad_align);
    let ciphered = esp.len().checked_sub(front + sizes.icv);
    let fits = ciphered.is_some_and(|n| {
        n >= least && n - given <= ESP_TRAILER + MAX_PAD && n.is_multiple_of(sizes.pad_align)
    });
    if !fits {
        return Err(Reason::Length);
    }
    if bare && !sa.outer.is_on(data) {
        return Err(Reason::Header);
    }
    let header: [u8; ESP_HEADER] = *esp.first_chunk().ok_or(Reason::Length)?;
    let [a, b, c, d, e, f, g, h] = header;
    if [a, b, c, d] != sa.spi {
        return Err(Reason::Header);
    }
    let number = whole(u32::from_be_bytes([e, f, g, h]), ticket.seq);
    // The caller's number is the last that limits and leases allow.
    if number <= sa.last_seq || number > ticket.seq {
        return Err(Reason::Number);
    }
    let iv = iv_of(sa, esp).ok_or(Reason::Length)?;
    fresh(sa, &iv)?;
    hidden(ticket, esp.get(front..).unwrap_or_default())?;
    sa.last_iv = iv;
    sa.last_seq = number;
    job.seq = number;
    Ok(())
}

/// The number with this low half that is closest below `upto`, or it.
fn whole(low: u32, upto: u64) -> u64 {
    let high = upto & !u64::from(u32::MAX);
    let number = high | u64::from(low);
    if number > upto && high != 0 {
        number - (1 << 32)
    } else {
        number
    }
}

/// Opened in packet mode.
fn opened(sa: &Carried, ticket: &Ticket, job: &EspJob, bare: bool) -> Result<(), Reason> {
    let front = ESP_HEADER + sa.sizes.iv;
    let behind = ESP_TRAILER + sa.sizes.icv;
    let (from, to) = (usize::from(ticket.esp_off), usize::from(ticket.esp_end));
    let most = to
        .checked_sub(from + front + behind)
        .ok_or(Reason::Length)?;
    let end = usize::from(job.esp_end);
    if end != job.frame.len() {
        return Err(Reason::Length);
    }
    let len = if bare {
        end
    } else {
        let data = job.frame.data();
        if job.esp_off != ticket.esp_off {
            return Err(Reason::Length);
        }
        if data.get(from..).and_then(|d| d.first_chunk()) != Some(&ticket.header) {
            return Err(Reason::Header);
        }
        end.checked_sub(from + front).ok_or(Reason::Length)?
    };
    if len > most || most - len > MAX_PAD {
        return Err(Reason::Length);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_on_the_wire_is_read_as_the_closest_that_may_be() {
        assert_eq!(whole(7, 9), 7);
        assert_eq!(whole(9, 7), 9);
        let next = 1u64 << 32;
        assert_eq!(whole(3, next + 5), next + 3);
        assert_eq!(whole(u32::MAX, next + 5), next - 1);
    }
}
