//! Known answers, before the engine is trusted with a packet. RFC 3602 case 5 with HMAC (computed, and checked against the
//! RFC's ciphertext), RFC 3686 vector 1.

use sa_store::sa::{Direction, SaKeys};
use sa_store::suite::{AesBits, Cipher, Hmac, Suite};

use super::chip::Chip;
use super::record::{Image, Parts, SA_LEN};
use super::ring::{Command, Fault, HASH_FINAL};
use super::{Eip93Engine, Eip93Error};

const IV: [u8; 16] = 0xe96e_8c08_ab46_5763_fd09_8d45_dd3f_f893_u128.to_be_bytes();
const KEY_128: [u8; 16] = 0x90d3_82b4_10ee_ba7a_d938_c46c_ec1a_82bf_u128.to_be_bytes();
const SPI: u32 = 0x4321;
/// What the sealed vector A looks like behind header and IV: ciphertext, then ICV.
const SEALED_A: [u8; 92] = [
    0xf6, 0x63, 0xc2, 0x5d, 0x32, 0x5c, 0x18, 0xc6, 0xa9, 0x45, 0x3e, 0x19, 0x4e, 0x12, 0x08, 0x49,
    0xa4, 0x87, 0x0b, 0x66, 0xcc, 0x6b, 0x99, 0x65, 0x33, 0x00, 0x13, 0xb4, 0x89, 0x8d, 0xc8, 0x56,
    0xa4, 0x69, 0x9e, 0x52, 0x3a, 0x55, 0xdb, 0x08, 0x0b, 0x59, 0xec, 0x3a, 0x8e, 0x4b, 0x7e, 0x52,
    0x77, 0x5b, 0x07, 0xd1, 0xdb, 0x34, 0xed, 0x9c, 0x53, 0x8a, 0xb5, 0x0c, 0x55, 0x1b, 0x87, 0x4a,
    0xa2, 0x69, 0xad, 0xd0, 0x47, 0xad, 0x2d, 0x59, 0x13, 0xac, 0x19, 0xb7, 0xcf, 0xba, 0xd4, 0xa6,
    0xcf, 0x26, 0x48, 0x38, 0x38, 0x5a, 0x37, 0x0f, 0xec, 0x0f, 0xbf, 0x47,
];
/// The same packet's ICV with HMAC-SHA2-256-128.
const ICV_B: [u8; 16] = 0x69d9_cd39_200e_45ea_ceab_eb31_3757_7aa1_u128.to_be_bytes();
/// Vector C: AES-256-CBC, number 2.
const ICV_C: [u8; 16] = 0x2a10_da82_3e0f_b4e4_8f47_224b_27c9_38b8_u128.to_be_bytes();
/// RFC 3686 vector 1: key, first counter block, answer to "Single block msg".
const KEY_CTR: [u8; 16] = 0xae68_52f8_1210_67cc_4bf7_a576_5577_f39e_u128.to_be_bytes();
const BLOCK_CTR: [u8; 16] = 0x0000_0030_0000_0000_0000_0000_0000_0001_u128.to_be_bytes();
const ANSWER_CTR: [u8; 16] = 0xe409_5d4f_b7a7_b379_2d61_75a3_2613_11b8_u128.to_be_bytes();

/// Scratch memory: SA, state, data.
const SA_AT: usize = 0;
const STATE_AT: usize = 128;
const DATA_AT: usize = 1024;

fn header(seq: u32) -> Vec<u8> {
    let mut p = SPI.to_be_bytes().to_vec();
    p.extend(seq.to_be_bytes());
    p.extend(IV);
    p
}

fn payload() -> Vec<u8> {
    let mut p = 0x0800_0ebd_a70a_0000_8e9c_083d_b95b_0700_u128
        .to_be_bytes()
        .to_vec();
    p.extend(8..=0x37);
    p
}

/// Header, IV, payload and trailer.
fn framed(seq: u32) -> Vec<u8> {
    let mut p = header(seq);
    p.extend(payload());
    p.extend(1..=14);
    p.extend([14, 1]);
    p
}

fn parts(bits: AesBits, hmac: Hmac) -> Option<Parts> {
    Parts::of(Suite::CipherHmac(Cipher::Cbc(bits), hmac))
}

fn keys(bits: AesBits, hmac: Hmac) -> SaKeys {
    SaKeys {
        enc: match bits {
            AesBits::B128 => KEY_128.to_vec(),
            _ => (0..32).collect::<Vec<u8>>(),
        }
        .into(),
        auth: match hmac {
            Hmac::Sha1_96 => vec![0x0b; 20],
            _ => (0x20..0x40).collect(),
        }
        .into(),
    }
}

/// What crypto mode gives for header, IV, payload and trailer: ICV words reversed.
struct Answer {
    what: &'static str,
    bits: AesBits,
    hmac: Hmac,
    seq: u32,
    /// The last 16 bytes of the sealed packet, as on the wire.
    tail: [u8; 16],
}

fn answers() -> [Answer; 3] {
    let mut tail_a = [0; 16];
    tail_a.copy_from_slice(&SEALED_A[76..]);
    let of = |what, bits, hmac, seq, tail| Answer {
        what,
        bits,
        hmac,
        seq,
        tail,
    };
    [
        of(
            "AES-128-CBC with HMAC-SHA1-96",
            AesBits::B128,
            Hmac::Sha1_96,
            1,
            tail_a,
        ),
        of(
            "AES-128-CBC with HMAC-SHA2-256-128",
            AesBits::B128,
            Hmac::Sha256_128,
            1,
            ICV_B,
        ),
        of(
            "AES-256-CBC with HMAC-SHA2-256-128",
            AesBits::B256,
            Hmac::Sha256_128,
            2,
            ICV_C,
        ),
    ]
}

/// Reverses the words of an ICV at the end of a packet.
fn swap(packet: &mut [u8], icv: usize) {
    let at = packet.len().saturating_sub(icv);
    for word in packet[at..].as_chunks_mut::<4>().0 {
        word.reverse();
    }
}

/// All that this chip offers, through the rings: crypto mode in both directions, wrong ICVs, packet mode.
pub(super) fn ring(engine: &mut Eip93Engine) -> Result<(), Eip93Error> {
    for a in answers() {
        let Some(parts) = parts(a.bits, a.hmac).filter(|p| p.offered(engine.chip.options)) else {
            continue;
        };
        let keys = keys(a.bits, a.hmac);
        let wrong = Eip93Error::WrongAnswer(a.what);
        let plain = framed(a.seq);
        let icv = parts.icv_len();
        let mut bench = Bench {
            engine,
            what: a.what,
        };
        let out = parts.crypto(Direction::Out);
        let (fault, mut packet) =
            bench.crypto(parts, out, &keys, &plain, plain.len(), plain.len() + icv)?;
        swap(&mut packet, icv);
        if fault.is_some() || !packet.ends_with(&a.tail) || packet[..24] != plain[..24] {
            return Err(wrong);
        }
        let inb = parts.crypto(Direction::In);
        let (fault, opened) = bench.crypto(parts, inb, &keys, &packet, plain.len(), plain.len())?;
        if fault.is_some() || opened != plain {
            return Err(wrong);
        }
        let mut forged = packet.clone();
        forged[30] ^= 1;
        let (fault, _) = bench.crypto(parts, inb, &keys, &forged, plain.len(), 0)?;
        if fault != Some(Fault::Authentication) {
            return Err(wrong);
        }
        bench.packet(parts, &keys, &packet)?;
    }
    counter(engine)
}

/// Counter mode, without a hash: where the counter is and how it begins.
fn counter(engine: &mut Eip93Engine) -> Result<(), Eip93Error> {
    let what = "AES-128-CTR";
    let suite = Suite::CipherHmac(Cipher::Ctr(AesBits::B128), Hmac::Sha1_96);
    let Some(parts) = Parts::of(suite).filter(|p| p.offered(engine.chip.options)) else {
        return Ok(());
    };
    let keys = SaKeys {
        enc: [&KEY_CTR[..], &BLOCK_CTR[..4]].concat().into(),
        auth: vec![0; 20].into(),
    };
    let image = Image::new(parts, parts.cipher_only(), &keys);
    let image = image.ok_or(Eip93Error::WrongAnswer(what))?;
    engine.scratch.write_bytes(STATE_AT, &BLOCK_CTR);
    let mut bench = Bench { engine, what };
    let (fault, answer) = bench.run(&image, Kind::Basic, b"Single block msg", 16, 16)?;
    if fault.is_some() || answer != ANSWER_CTR {
        return Err(Eip93Error::WrongAnswer(what));
    }
    Ok(())
}

/// What an operation needs beside its SA record.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A state record with the cipher's first block.
    Basic,
    /// ESP inbound.
    Open,
    /// ESP outbound: header and IV go in front.
    Seal,
}

struct Bench<'a> {
    engine: &'a mut Eip93Engine,
    what: &'static str,
}

impl Bench<'_> {
    /// One packet of crypto mode: the fault, and so many bytes of what lies there then.
    fn crypto(
        &mut self,
        parts: Parts,
        commands: [u32; 2],
        keys: &SaKeys,
        input: &[u8],
        length: usize,
        output: usize,
    ) -> Result<(Option<Fault>, Vec<u8>), Eip93Error> {
        let image = Image::new(parts, commands, keys).ok_or(Eip93Error::WrongAnswer(self.what))?;
        self.engine.scratch.write_bytes(STATE_AT, &IV);
        self.run(&image, Kind::Basic, input, length, output)
    }

    fn run(
        &mut self,
        image: &Image,
        kind: Kind,
        input: &[u8],
        length: usize,
        output: usize,
    ) -> Result<(Option<Fault>, Vec<u8>), Eip93Error> {
        image.store(&self.engine.scratch.slice(SA_AT, SA_LEN)?);
        self.again(kind, input, length, output)
    }

    /// Another packet of the record that is there.
    fn again(
        &mut self,
        kind: Kind,
        input: &[u8],
        length: usize,
        output: usize,
    ) -> Result<(Option<Fault>, Vec<u8>), Eip93Error> {
        let engine = &mut *self.engine;
        engine.scratch.write_bytes(DATA_AT, input);
        let (control, ahead) = match kind {
            // Padding to 4 at least, next header 1.
            Kind::Seal => (2 << 24 | 1 << 8, 24),
            _ => (0, 0),
        };
        let at = |n: usize| engine.scratch_at(u32::try_from(n).unwrap_or(0));
        let command = Command {
            control: HASH_FINAL | control,
            source: at(DATA_AT),
            destination: at(DATA_AT - ahead),
            sa: at(SA_AT),
            state: if kind == Kind::Basic { at(STATE_AT) } else { 0 },
            length: u32::try_from(length).unwrap_or(0),
            id: 0,
        };
        let done = engine.operate(command, self.what)?;
        let mut bytes = vec![0; output];
        engine.scratch.read_bytes(DATA_AT - ahead, &mut bytes);
        Ok((done.fault(), bytes))
    }

    /// Packet mode: `packet` opens once, what is sealed has the numbers 1 and 2 and another IV each time, and opens.
    fn packet(&mut self, parts: Parts, keys: &SaKeys, packet: &[u8]) -> Result<(), Eip93Error> {
        let make = |direction, last| {
            let mut image = Image::new(parts, parts.packet(direction, true), keys)?;
            image.number(SPI, last, u64::from(u32::MAX));
            Some(image)
        };
        let (Some(out), Some(inb)) = (make(Direction::Out, 0), make(Direction::In, 0)) else {
            return Err(Eip93Error::WrongAnswer(self.what));
        };
        let (what, payload) = (self.what, payload());
        let wrong = || Eip93Error::WrongAnswer(what);
        let (fault, opened) = self.run(&inb, Kind::Open, packet, packet.len(), 88)?;
        if fault.is_some() || opened[24..] != payload {
            return Err(wrong());
        }
        let (fault, _) = self.again(Kind::Open, packet, packet.len(), 0)?;
        if fault != Some(Fault::Sequence) {
            return Err(wrong());
        }
        let total = packet.len();
        let (first_fault, first) = self.run(&out, Kind::Seal, &payload, payload.len(), total)?;
        let (second_fault, second) = self.again(Kind::Seal, &payload, payload.len(), total)?;
        let right = first_fault.is_none()
            && second_fault.is_none()
            && first[..8] == header(1)[..8]
            && second[..8] == header(2)[..8]
            && first[8..24] != second[8..24];
        if !right {
            return Err(wrong());
        }
        let (fault, opened) = self.run(&inb, Kind::Open, &second, total, 88)?;
        if fault.is_some() || opened[24..] != payload {
            return Err(wrong());
        }
        Ok(())
    }
}

/// Vector A in crypto mode, both directions, in direct host mode.
pub(super) fn direct(chip: &Chip) -> Result<(), Eip93Error> {
    let what = "vector A in direct host mode";
    let wrong = || Eip93Error::WrongAnswer(what);
    let Some(parts) = parts(AesBits::B128, Hmac::Sha1_96).filter(|p| p.offered(chip.options))
    else {
        return Ok(());
    };
    let keys = keys(AesBits::B128, Hmac::Sha1_96);
    let plain = framed(1);
    let image = |direction| Image::new(parts, parts.crypto(direction), &keys).ok_or_else(wrong);
    let sealed = chip.direct(
        image(Direction::Out)?.words(),
        IV,
        HASH_FINAL,
        &plain,
        plain.len(),
    )?;
    let mut packet = sealed.output;
    if packet.len() < plain.len() {
        return Err(wrong());
    }
    let icv = packet.len() - plain.len();
    swap(&mut packet, icv);
    if sealed.status >> 16 & 0xf != 0 || packet[24..] != SEALED_A {
        return Err(wrong());
    }
    let opened = chip.direct(
        image(Direction::In)?.words(),
        IV,
        HASH_FINAL,
        &packet,
        plain.len(),
    )?;
    if opened.status >> 16 & 0xf != 0 || opened.output != plain {
        return Err(wrong());
    }
    packet[40] ^= 1;
    let forged = chip.direct(
        image(Direction::In)?.words(),
        IV,
        HASH_FINAL,
        &packet,
        plain.len(),
    )?;
    if forged.status >> 16 & 1 != 1 {
        return Err(wrong());
    }
    Ok(())
}
