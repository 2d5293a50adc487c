//! A server that answers whatever it is told to, for fuzzing.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use super::VfioUserDevice;
use crate::device::{Device, IovaClass};

/// Body of a reply; what is wrong with its head, and the value for that.
pub(super) type Answer = (Vec<u8>, u8, u32);

/// Uses a device whose server answers as `data` says. Nothing may panic or wait for ever.
///
/// # Panics
/// As said; that is its purpose.
pub fn fuzz_server(data: &[u8]) {
    let mut script = Vec::new();
    let mut rest = data;
    while let Some((&[len, twist, a, b], more)) = rest.split_first_chunk::<4>() {
        let (body, more) = more.split_at(usize::from(len % 64).min(more.len()));
        rest = more;
        // Mostly nothing is wrong with the head.
        let twist = if twist < 192 { 0 } else { twist & 7 };
        script.push((body.to_vec(), twist, u32::from(a) | u32::from(b) << 24));
    }
    if !script.is_empty() {
        serve(script);
    }
}

/// One life of a device with that server.
pub(super) fn serve(script: Vec<Answer>) {
    let Ok((ours, theirs)) = UnixStream::pair() else {
        return;
    };
    let server = thread::spawn(move || hostile(theirs, &script));
    if let Ok(device) = VfioUserDevice::over(ours, "hostile", Duration::from_millis(200)) {
        for index in 0..9 {
            if let Ok(region) = device.region(index) {
                region.write32(0, region.read32(4));
            }
        }
        let _ = device.enable_msix(2);
        if let Ok(memory) = device.dma_alloc(64, 64, IovaClass::Any) {
            memory.write64(0, 1);
            assert_eq!(memory.read64(0), 1);
        }
        let _ = device.reset();
    }
    assert!(server.join().is_ok());
}

/// Answers each request: with the given bytes as the reply's body and the given changes of its head, over and over.
fn hostile(mut stream: UnixStream, script: &[Answer]) {
    let mut answers = script.iter().cycle();
    loop {
        let mut head = [0; 16];
        if stream.read_exact(&mut head).is_err() {
            return;
        }
        let size = u32::from_ne_bytes([head[4], head[5], head[6], head[7]]);
        let mut body = vec![0; (size as usize).saturating_sub(16)];
        if stream.read_exact(&mut body).is_err() {
            return;
        }
        let Some((answer, twist, value)) = answers.next() else {
            return;
        };
        let command = head[2];
        // Believable first: version 0.1, a PCI device; then whatever the script says.
        let mut reply = match command {
            1 => vec![0, 0, 1, 0],
            4 => words(&[16, 2, 9, 5]),
            9 => {
                let n = usize::from(body[12].min(8));
                body[..16]
                    .iter()
                    .copied()
                    .chain(answer.iter().copied().cycle().take(n))
                    .collect()
            }
            _ => answer.clone(),
        };
        if *twist == 7 {
            reply = answer.clone();
        }
        let size = u32::try_from(16 + reply.len()).unwrap_or(u32::MAX);
        head[4..8].copy_from_slice(&size.to_ne_bytes());
        head[8..12].copy_from_slice(&1u32.to_ne_bytes());
        match twist {
            1 => head[0] ^= 1,
            2 => head[2] ^= 1,
            3 => head[4..8].copy_from_slice(&value.to_ne_bytes()),
            4 => head[8..12].copy_from_slice(&value.to_ne_bytes()),
            5 => head[8..16].copy_from_slice(&[33, 0, 0, 0, 22, 0, 0, 0]),
            6 => return,
            _ => {}
        }
        if stream.write_all(&head).is_err() || stream.write_all(&reply).is_err() {
            return;
        }
    }
}

fn words(list: &[u32]) -> Vec<u8> {
    list.iter().flat_map(|w| w.to_ne_bytes()).collect()
}
