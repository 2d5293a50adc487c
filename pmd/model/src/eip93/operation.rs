//! What the engine does with one descriptor, wherever the bytes come from.

use super::crypt::{Aes, Prng};
use super::record::{Cipher, Hash, Sa, Source, State};
use super::registers::{AUTH_ERR, Code, HASH_FINAL, PAD_ERR, SEQ_ERR};
use super::switches::Switches;

/// What the engine says of a packet.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Error bits of word 0.
    pub(super) errors: u32,
    /// Next header, ESP inbound.
    pub(super) next_header: u8,
    /// Pad bytes, ESP inbound.
    pub(super) pad: u8,
    /// What goes to the destination.
    pub(super) output: Vec<u8>,
    /// Bytes of it that the result's length leaves out.
    pub(super) uncounted: usize,
    /// The rule that the driver broke.
    pub(super) broke: Option<(&'static str, String)>,
}

impl Outcome {
    fn code(code: Code) -> Outcome {
        Outcome {
            errors: code.bits(),
            ..Outcome::default()
        }
    }

    fn refuse(rule: &'static str, detail: impl Into<String>) -> Outcome {
        Outcome {
            broke: Some((rule, detail.into())),
            ..Outcome::code(Code::Operation)
        }
    }
}

/// Bytes to read from the source: ICVs of basic operations lie behind the length.
pub(super) fn input_len(sa: &Sa, length: usize) -> usize {
    let checks = sa.group() == 0 && sa.opcode() == 1 && sa.inbound();
    length + if checks { sa.icv() } else { 0 }
}

/// One operation. `control` is word 0 of the command, `length` that of word 7, `input` what [`input_len`] asked for.
pub(super) fn run(
    switches: &Switches,
    control: u32,
    length: usize,
    input: &[u8],
    sa: &mut Sa,
    state: Option<&mut State>,
    prng: &mut Prng,
) -> Outcome {
    match control >> 6 & 3 {
        0 => {}
        1 => return load_prng(length, sa, prng),
        2 => return random(length, prng),
        mode => return Outcome::refuse("PRNG_MODE is 0, 1 or 2", format!("{mode}")),
    }
    if length == 0 {
        return Outcome::code(Code::ZeroLength);
    }
    let done = match (sa.group(), sa.opcode()) {
        (1, 0) if sa.inbound() => esp_in(sa, input),
        (1, 0) => esp_out(switches, control, sa, state, input, prng),
        (0, 0 | 1) => basic(switches, sa, state, input, length),
        (0, 3) => hash(control, sa, state, input),
        (group, opcode) => Ok(Outcome::refuse(
            "an operation that the engine has",
            format!("group {group}, opcode {opcode}"),
        )),
    };
    done.unwrap_or_else(Outcome::code)
}

fn load_prng(length: usize, sa: &Sa, prng: &mut Prng) -> Outcome {
    let Ok((_, key)) = sa.cipher() else {
        return Outcome::code(Code::Algorithm);
    };
    let block = |at: usize| {
        let mut b = [0; 16];
        b.copy_from_slice(&sa.0[at..at + 16]);
        b
    };
    prng.load(key, block(0x28), block(0x48));
    random(length, prng)
}

fn random(length: usize, prng: &mut Prng) -> Outcome {
    let mut output = vec![0; length];
    if prng.fill(&mut output).is_none() {
        return Outcome {
            broke: Some(("random numbers need a loaded PRNG", String::new())),
            ..Outcome::code(Code::Processing)
        };
    }
    Outcome {
        output,
        ..Outcome::default()
    }
}

/// The first counter block of RFC 3686, or the IV of CBC.
fn first_block(cipher: Cipher, nonce: [u8; 4], iv: &[u8]) -> [u8; 16] {
    let mut block = [0; 16];
    if cipher == Cipher::AesCtr {
        block[..4].copy_from_slice(&nonce);
        block[4..12].copy_from_slice(&iv[..8]);
        block[15] = 1;
    } else if !iv.is_empty() {
        block.copy_from_slice(&iv[..16]);
    }
    block
}

fn iv_len(cipher: Cipher) -> usize {
    match cipher {
        Cipher::AesCbc => 16,
        Cipher::AesCtr => 8,
        Cipher::AesEcb | Cipher::Null => 0,
    }
}

/// Bytes that the ciphered part is a multiple of.
fn block_len(cipher: Cipher) -> usize {
    match cipher {
        Cipher::AesCbc | Cipher::AesEcb => 16,
        Cipher::AesCtr | Cipher::Null => 1,
    }
}

fn apply(
    cipher: Cipher,
    key: &[u8],
    inbound: bool,
    iv: &mut [u8; 16],
    data: &mut [u8],
) -> Result<(), Code> {
    if cipher == Cipher::Null {
        return Ok(());
    }
    let aes = Aes::new(key).ok_or(Code::Algorithm)?;
    match (cipher, inbound) {
        (Cipher::AesCtr, _) => aes.ctr(iv, data),
        (Cipher::AesCbc, false) => aes.cbc_encrypt(iv, data),
        (Cipher::AesCbc, true) => aes.cbc_decrypt(iv, data),
        (_, inbound) => {
            for block in data.as_chunks_mut::<16>().0 {
                if inbound {
                    aes.decrypt(block);
                } else {
                    aes.encrypt(block);
                }
            }
        }
    }
    Ok(())
}

/// The alignment that padding is asked to reach, by PAD_CTRL and the cipher's needs.
pub(super) fn pad_boundary(control: u32, cipher: Cipher) -> Option<usize> {
    let asked = match control >> 24 {
        0 => None,
        1 => Some(1),
        bits if bits.is_power_of_two() => Some(2 * bits as usize),
        _ => return None,
    };
    Some(match cipher {
        Cipher::AesCbc | Cipher::AesEcb => asked.unwrap_or(16).max(16),
        Cipher::AesCtr | Cipher::Null => asked.unwrap_or(8).max(4),
    })
}

fn esp_out(
    switches: &Switches,
    control: u32,
    sa: &mut Sa,
    state: Option<&mut State>,
    input: &[u8],
    prng: &mut Prng,
) -> Result<Outcome, Code> {
    let (cipher, key) = sa.cipher()?;
    let hash = sa.hash()?;
    let refuse = |rule, detail: &str| Ok(Outcome::refuse(rule, detail));
    if cipher == Cipher::AesEcb || hash == Hash::Null || !sa.hmac() || sa.icv() > hash.len() {
        return refuse("ESP has a cipher of its RFCs and an HMAC", "outbound");
    }
    if !sa.header_processing() {
        return refuse("HDR_PROC 0 in ESP is unknown", "outbound");
    }
    if sa.pad_type() != 0 || sa.offset() != 0 {
        return refuse("ESP pads as IPsec does, with offset 0", "outbound");
    }
    let Some(boundary) = pad_boundary(control, cipher) else {
        return refuse("PAD_CTRL has one bit", "outbound");
    };
    let iv = match sa.iv_source() {
        _ if iv_len(cipher) == 0 => Vec::new(),
        Source::Prng if cipher == Cipher::AesCtr && !switches.counter_mode_with_random_iv => {
            return refuse("counter mode takes no random IV", "outbound");
        }
        Source::Prng => {
            let mut iv = vec![0; iv_len(cipher)];
            if prng.fill(&mut iv).is_none() {
                return Ok(Outcome {
                    broke: Some(("random IVs need a loaded PRNG", String::new())),
                    ..Outcome::code(Code::Processing)
                });
            }
            iv
        }
        Source::State if switches.esp_iv_from_state => match state {
            Some(state) => state.iv()[..iv_len(cipher)].to_vec(),
            None => return refuse("an IV from the state record needs one", "outbound"),
        },
        source => return refuse("this IV_SOURCE in ESP is unknown", &format!("{source:?}")),
    };
    if sa.checks_sequence() && sa.sequence() == u32::MAX {
        return Ok(Outcome {
            errors: SEQ_ERR,
            ..Outcome::default()
        });
    }
    let sequence = sa.sequence().wrapping_add(1);
    let mut output = Vec::with_capacity(input.len() + 320);
    output.extend(sa.spi().to_be_bytes());
    output.extend(sequence.to_be_bytes());
    output.extend(&iv);
    let start = output.len();
    output.extend(input);
    let pad = (input.len() + 2).next_multiple_of(boundary) - (input.len() + 2);
    output.extend((1..=pad).map(|n| n.to_le_bytes()[0]));
    output.push(pad.to_le_bytes()[0]);
    output.push(control.to_le_bytes()[1]);
    let mut block = first_block(cipher, sa.nonce(), &iv);
    apply(cipher, key, false, &mut block, &mut output[start..])?;
    let icv = hash.hmac(sa.inner(), sa.outer(), &output);
    if sa.copy_digest() {
        output.extend(&icv[..sa.icv()]);
    }
    sa.set_sequence(sequence);
    Ok(Outcome {
        output,
        ..Outcome::default()
    })
}

fn esp_in(sa: &mut Sa, input: &[u8]) -> Result<Outcome, Code> {
    let (cipher, key) = sa.cipher()?;
    let hash = sa.hash()?;
    let refuse = |rule| Ok(Outcome::refuse(rule, "inbound"));
    if cipher == Cipher::AesEcb || hash == Hash::Null || !sa.hmac() || sa.icv() > hash.len() {
        return refuse("ESP has a cipher of its RFCs and an HMAC");
    }
    if !sa.header_processing() {
        return refuse("HDR_PROC 0 in ESP is unknown");
    }
    if sa.iv_source() != Source::Input || !sa.copy_header() {
        return refuse("inbound ESP without COPY_HEADER and IV_SOURCE 1 is unknown");
    }
    if sa.pad_type() != 0 || sa.offset() != 0 {
        return refuse("ESP pads as IPsec does, with offset 0");
    }
    let start = 8 + iv_len(cipher);
    let Some(end) = input.len().checked_sub(sa.icv()) else {
        return Err(Code::Length);
    };
    if end < start + block_len(cipher).max(4) {
        return Err(Code::Length);
    }
    if !(end - start).is_multiple_of(block_len(cipher)) {
        return Err(Code::Block);
    }
    let word =
        |at: usize| u32::from_be_bytes([input[at], input[at + 1], input[at + 2], input[at + 3]]);
    if word(0) != sa.spi() {
        return Err(Code::Spi);
    }
    let mut outcome = Outcome::default();
    let window = if sa.checks_sequence() {
        let moved = slide(sa.sequence(), sa.mask(), word(4));
        if moved.is_none() {
            outcome.errors |= SEQ_ERR;
        }
        moved
    } else {
        None
    };
    let icv = hash.hmac(sa.inner(), sa.outer(), &input[..end]);
    if icv[..sa.icv()] != input[end..] {
        outcome.errors |= AUTH_ERR;
    }
    // One pass: the plaintext leaves the engine whatever the checks say.
    let mut output = input[..end].to_vec();
    let mut block = first_block(cipher, sa.nonce(), &input[8..start]);
    apply(cipher, key, true, &mut block, &mut output[start..])?;
    let (pad, next_header) = (output[end - 2], output[end - 1]);
    let padding = usize::from(pad);
    match (end - 2).checked_sub(padding).filter(|&n| n >= start) {
        Some(payload_end) => {
            let right = output[payload_end..end - 2]
                .iter()
                .zip(1u8..)
                .all(|(have, want)| *have == want);
            if !right {
                outcome.errors |= PAD_ERR;
            }
            output.truncate(payload_end);
        }
        None => {
            outcome.errors |= PAD_ERR;
            output.truncate(start);
        }
    }
    if outcome.errors == 0
        && let Some((top, mask)) = window
    {
        sa.set_sequence(top);
        sa.set_mask(mask);
    }
    outcome.next_header = next_header;
    outcome.pad = pad;
    outcome.output = output;
    Ok(outcome)
}

/// The window after `n`: bit 0 of the mask is the highest number seen, `top`. `None` for a number seen or too old.
pub(super) fn slide(top: u32, mask: u64, n: u32) -> Option<(u32, u64)> {
    if n > top {
        let mask = mask.checked_shl(n - top).unwrap_or(0) | 1;
        return Some((n, mask));
    }
    let bit = 1u64.checked_shl(top - n)?;
    (mask & bit == 0).then_some((top, mask | bit))
}

fn basic(
    switches: &Switches,
    sa: &Sa,
    state: Option<&mut State>,
    input: &[u8],
    length: usize,
) -> Result<Outcome, Code> {
    let (cipher, key) = sa.cipher()?;
    let hashes = sa.opcode() == 1;
    let hash = if hashes { sa.hash()? } else { Hash::Null };
    if hashes && (hash == Hash::Null || !sa.hmac() || sa.icv() > hash.len()) {
        return Ok(Outcome::refuse("a combined operation has an HMAC", ""));
    }
    let offset = if hashes { sa.offset() } else { 0 };
    if length <= offset {
        return Err(Code::Length);
    }
    let (body, given) = input.split_at_checked(length).ok_or(Code::Length)?;
    if !(length - offset).is_multiple_of(block_len(cipher)) {
        return Err(Code::Block);
    }
    let needs_iv = matches!(cipher, Cipher::AesCbc | Cipher::AesCtr);
    let mut iv = match (&state, sa.iv_source()) {
        (Some(state), Source::State) => state.iv(),
        _ if !needs_iv => [0; 16],
        (_, source) => {
            return Ok(Outcome::refuse(
                "basic operations take the IV from the state record",
                format!("{source:?}"),
            ));
        }
    };
    let mut outcome = Outcome::default();
    if hashes && sa.inbound() {
        let icv = hash.hmac(sa.inner(), sa.outer(), body);
        if icv[..sa.icv()] != *given {
            outcome.errors |= AUTH_ERR;
        }
    }
    let mut output = body.to_vec();
    apply(cipher, key, sa.inbound(), &mut iv, &mut output[offset..])?;
    if hashes && !sa.inbound() {
        let mut icv = hash.hmac(sa.inner(), sa.outer(), &output);
        // Out of the hash come native words.
        for word in icv.as_chunks_mut::<4>().0 {
            word.reverse();
        }
        if sa.copy_digest() {
            output.extend(&icv[..sa.icv()]);
        }
    }
    if !sa.copy_header() {
        output.drain(..offset);
    }
    if let Some(state) = state.filter(|_| sa.save_iv()) {
        state.set_iv(&iv);
    }
    if switches.basic_length_without_icv && hashes && !sa.inbound() {
        outcome.uncounted = sa.icv();
    }
    outcome.output = output;
    Ok(outcome)
}

fn hash(control: u32, sa: &Sa, state: Option<&mut State>, input: &[u8]) -> Result<Outcome, Code> {
    let hash = sa.hash()?;
    if hash == Hash::Null {
        return Err(Code::Algorithm);
    }
    let (mut chain, before) = match (sa.hash_source(), &state) {
        (3, _) => (hash.initial(), 0),
        (0, _) => (sa.inner(), 64),
        (2, Some(state)) => (state.digest(), state.bytes()),
        (source, _) => {
            return Ok(Outcome::refuse(
                "HASH_SOURCE is 0, 2 with a state record, or 3",
                format!("{source}"),
            ));
        }
    };
    let mut output = Vec::new();
    let (blocks, rest) = input.as_chunks::<64>();
    if control & HASH_FINAL != 0 {
        let mut digest = hash.finish(chain, before, input);
        if sa.hmac() {
            digest = hash.finish(sa.outer(), 64, &digest[..hash.len()]);
        }
        for (word, bytes) in chain.iter_mut().zip(digest.as_chunks::<4>().0) {
            *word = u32::from_be_bytes(*bytes);
        }
        for word in digest.as_chunks_mut::<4>().0 {
            word.reverse();
        }
        if sa.copy_digest() {
            output.extend(&digest[..hash.len()]);
        }
    } else {
        if !rest.is_empty() {
            return Err(Code::Block);
        }
        hash.compress(&mut chain, blocks);
    }
    if let Some(state) = state.filter(|_| sa.save_hash()) {
        state.set_digest(&chain);
        state.set_bytes(before + input.len() as u64);
    }
    Ok(Outcome {
        output,
        ..Outcome::default()
    })
}
