//! A peer that sends whatever it is told to, for fuzzing.

use std::fs::File;
use std::os::fd::OwnedFd;

use super::message::{HEADER, Header, MAX_FDS, Message};
use super::new_shared;
use super::session::Session;
use crate::arena::memfd;

/// Bytes of memory that the peer shares.
const MEMORY: usize = 64 << 10;
/// Chains taken of a ring at once.
const CHAINS: usize = 64;

/// Runs a session with a peer that `data` plays: messages, files, and memory in which `data` lies again and again, rings
/// included. Nothing may panic; no access may leave the memory (the address sanitizer sees it).
///
/// # Panics
/// As said; that is its purpose.
pub fn fuzz_messages(data: &[u8]) {
    let (Ok(shared), Ok(memory)) = (new_shared("fuzz", 2), memfd("peer", 4096, MEMORY)) else {
        return;
    };
    let all: Vec<u8> = data.iter().copied().cycle().take(MEMORY).collect();
    if data.is_empty() || std::os::unix::fs::FileExt::write_all_at(&memory, &all, 0).is_err() {
        return;
    }
    let mut session = Session::new(shared.clone(), 1500);
    let mut rest = data;
    while let Some((message, more)) = next(rest, &memory) {
        rest = more;
        let Some(message) = message else { continue };
        if session.handle(message).is_err() {
            break;
        }
        for pair in &shared.pairs {
            for cell in [&pair.rx, &pair.tx] {
                take_chains(&mut cell.lock());
            }
        }
        session.serve_workers();
    }
}

/// As a worker does with a ring that came to life.
fn take_chains(place: &mut Option<super::cell::Live>) {
    let Some(live) = place else { return };
    let mut buffers = Vec::new();
    for _ in 0..CHAINS {
        buffers.clear();
        match live.ring.next(&*live.memory, &mut buffers) {
            Ok(Some(taken)) => live.ring.put_used(taken, 0),
            Ok(None) => break,
            Err(_) => {
                *place = None;
                return;
            }
        }
    }
    live.ring.publish();
    live.ring.wants_call();
}

/// The next message: request, files, payload; near the truth by the first byte's choice.
fn next<'a>(data: &'a [u8], memory: &File) -> Option<(Option<Message>, &'a [u8])> {
    let (&[kind, number, files, len], rest) = data.split_first_chunk::<4>()?;
    let number = if kind & 1 != 0 { number % 41 } else { number };
    let len = usize::from(len).min(rest.len());
    let (payload, rest) = rest.split_at(len);
    let mut payload = payload.to_vec();
    match number {
        // One region at 0 that is all there is, and room for its rings.
        5 if kind & 2 != 0 => {
            let words = [1, 0, MEMORY as u64, 0, 0];
            payload = words.iter().flat_map(|w: &u64| w.to_le_bytes()).collect();
        }
        // Addresses inside.
        9 if kind & 2 != 0 && payload.len() >= 4 => {
            let at = |i: usize| u64::from(payload.get(i).copied().unwrap_or(0)) << 8;
            let words = [at(0) >> 8 & 3, at(1), at(2), at(3), 0];
            payload = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        }
        2 if kind & 2 != 0 => {
            let packed = u64::from(kind >> 2 & 1) << 34;
            payload = (1_u64 << 32 | packed).to_le_bytes().to_vec();
        }
        _ if kind & 2 != 0 => payload.resize(8, 0),
        _ => {}
    }
    let flags = if kind & 8 != 0 { kind >> 4 } else { 1 };
    let mut header = [0; HEADER];
    header[0] = number;
    header[4] = flags;
    header[8..].copy_from_slice(&u32::try_from(payload.len()).unwrap_or(0).to_le_bytes());
    let wanted = match number {
        5 => 1,
        12..=14 => usize::from(payload.get(1).is_none_or(|b| b & 1 == 0)),
        _ => 0,
    };
    let n = if kind & 2 != 0 {
        wanted
    } else {
        usize::from(files) % (MAX_FDS + 1)
    };
    let message = Header::parse(header)
        .and_then(|h| Message::parse(h, &payload, given(number, n, memory)))
        .ok();
    Some((message, rest))
}

/// Files as a peer gives them: its memory, or eventfds.
fn given(number: u8, n: usize, memory: &File) -> Vec<OwnedFd> {
    let one = || -> Option<OwnedFd> {
        if number == 5 {
            return memory.try_clone().ok().map(OwnedFd::from);
        }
        nix::sys::eventfd::EventFd::new().ok().map(OwnedFd::from)
    };
    (0..n).filter_map(|_| one()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn no_peer_can_crash_a_session(data in prop::collection::vec(any::<u8>(), 0..600)) {
            fuzz_messages(&data);
        }
    }
}
