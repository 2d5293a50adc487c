//! The reference's known answers and check list, on operations; the driver's tests go through registers and rings.

use super::crypt::{Aes, Prng};
use super::operation::{Outcome, pad_boundary, run, slide};
use super::record::{Cipher, Hash, SA_LEN, STATE_LEN, Sa, State};
use super::registers::{AUTH_ERR, Code, PAD_ERR, SEQ_ERR};
use super::switches::Switches;

const CBC_SHA1_OUT: [u32; 2] = [0x033A_1310, 0x2200_1101];
const CBC_SHA1_IN: [u32; 2] = [0x013A_1318, 0x2200_1102];
const KEY_A: &str = "90d382b410eeba7ad938c46cec1a82bf";
const PACKET_A: &str = "0000432100000001e96e8c08ab465763fd098d45dd3ff893\
    f663c25d325c18c6a9453e194e120849a4870b66cc6b9965330013b4898dc856\
    a4699e523a55db080b59ec3a8e4b7e52775b07d1db34ed9c538ab50c551b874a\
    a269add047ad2d5913ac19b7cfbad4a6cf264838385a370fec0fbf47";

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u32> = text.chars().filter_map(|c| c.to_digit(16)).collect();
    digits
        .chunks(2)
        .map(|d| u8::try_from(d[0] * 16 + d[1]).unwrap())
        .collect()
}

fn payload_a() -> Vec<u8> {
    let mut p = hex("08000ebda70a00008e9c083db95b0700");
    p.extend(8..=0x37);
    p
}

/// The chaining values of a key, the way section 9 says.
fn chains(hash: Hash, key: &[u8]) -> [[u32; 8]; 2] {
    [0x36, 0x5c].map(|pad| {
        let mut block = [pad; 64];
        for (b, k) in block.iter_mut().zip(key) {
            *b ^= k;
        }
        let mut state = hash.initial();
        hash.compress(&mut state, &[block]);
        state
    })
}

fn record(commands: [u32; 2], key: &[u8], hash: Hash, auth: &[u8]) -> Sa {
    let mut sa = Sa([0; SA_LEN]);
    let mut put = |at: usize, w: u32| sa.0[at..at + 4].copy_from_slice(&w.to_le_bytes());
    put(0, commands[0]);
    put(4, commands[1]);
    let [inner, outer] = chains(hash, auth);
    for i in 0..8 {
        put(0x28 + 4 * i, inner[i]);
        put(0x48 + 4 * i, outer[i]);
    }
    put(0x68, 0x4321);
    put(0x74, u32::MAX);
    sa.0[8..8 + key.len()].copy_from_slice(key);
    sa
}

fn sa_a(commands: [u32; 2]) -> Sa {
    record(commands, &hex(KEY_A), Hash::Sha1, &[0x0b; 20])
}

fn loaded() -> Prng {
    let mut prng = Prng::default();
    prng.load(&[1; 16], [2; 16], [3; 16]);
    prng
}

fn open(sa: &mut Sa, packet: &[u8]) -> Outcome {
    let mut prng = Prng::default();
    let n = packet.len();
    run(
        &Switches::default(),
        0x0200_0011,
        n,
        packet,
        sa,
        None,
        &mut prng,
    )
}

fn seal(sa: &mut Sa, control: u32, payload: &[u8]) -> Outcome {
    let n = payload.len();
    run(
        &Switches::default(),
        control,
        n,
        payload,
        sa,
        None,
        &mut loaded(),
    )
}

#[test]
fn precomputes_are_the_known_ones() {
    let words = |t: &str| -> Vec<u32> {
        hex(t)
            .chunks(4)
            .map(|b| u32::from_be_bytes(b.try_into().unwrap()))
            .collect()
    };
    let [inner, outer] = chains(Hash::Sha1, &[0x0b; 20]);
    assert_eq!(
        inner[..5],
        words("064c662acc6ed1b06cfa9ab0042f137fcea570eb")
    );
    assert_eq!(
        outer[..5],
        words("d62acccc7e6a98b3df015b02d885c3e09bd184cb")
    );
    let key: Vec<u8> = (0x20..0x40).collect();
    let [inner, outer] = chains(Hash::Sha256, &key);
    assert_eq!(
        inner[..],
        words("ac1863d268be8cca724f2de561bab156771155f28638c330682fd704f48d22b9")
    );
    assert_eq!(
        outer[..],
        words("cfc3482a7fbe8b659d506dc753b87474dabd1cf96be9e1819979bea647267f40")
    );
}

#[test]
fn the_record_of_vector_a_is_the_known_image() {
    let image = "10133a030111002290d382b410eeba7ad938c46cec1a82bf0000000000000000\
        00000000000000002a664c06b0d16eccb09afa6c7f132f04eb70a5ce00000000\
        0000000000000000cccc2ad6b3986a7e025b01dfe0c385d8cb84d19b00000000\
        0000000000000000214300000000000000000000ffffffff0000000000000000";
    let mut sa = sa_a(CBC_SHA1_OUT);
    assert_eq!(sa.0.to_vec(), hex(image));
    sa.0[..8].copy_from_slice(&sa_a(CBC_SHA1_IN).0[..8]);
    assert_eq!(sa.0[..8], hex("18133a0102110022"));
}

#[test]
fn vector_a_opens_as_known() {
    let mut sa = sa_a(CBC_SHA1_IN);
    let outcome = open(&mut sa, &hex(PACKET_A));
    assert_eq!(
        (outcome.errors, outcome.next_header, outcome.pad),
        (0, 1, 14)
    );
    assert_eq!(outcome.output.len(), 88);
    assert_eq!(outcome.output[..24], hex(PACKET_A)[..24]);
    assert_eq!(outcome.output[24..], payload_a());
    assert_eq!((sa.sequence(), sa.mask()), (1, 0x1_ffff_ffff));
    // Once only; the record stays as it is.
    let again = open(&mut sa, &hex(PACKET_A));
    assert_eq!(again.errors, SEQ_ERR);
    assert_eq!((sa.sequence(), sa.mask()), (1, 0x1_ffff_ffff));
}

#[test]
fn what_is_sealed_opens_again_with_the_next_number() {
    let mut out = sa_a(CBC_SHA1_OUT);
    let mut inb = sa_a(CBC_SHA1_IN);
    for n in 1..4 {
        let sealed = seal(&mut out, 0x0200_0111, &payload_a());
        assert_eq!((sealed.errors, sealed.output.len()), (0, 116));
        assert_eq!(out.sequence(), n);
        assert_eq!(sealed.output[4..8], n.to_be_bytes());
        let opened = open(&mut inb, &sealed.output);
        assert_eq!((opened.errors, opened.next_header), (0, 1));
        assert_eq!(opened.output[24..], payload_a());
    }
}

#[test]
fn vectors_b_and_c_open_as_known() {
    let auth: Vec<u8> = (0x20..0x40).collect();
    let mut b = hex(PACKET_A);
    b.truncate(104);
    b.extend(hex("69d9cd39200e45eaceabeb3137577aa1"));
    let mut sa = record([0x014A_3318, 0x2200_1102], &hex(KEY_A), Hash::Sha256, &auth);
    let outcome = open(&mut sa, &b);
    assert_eq!(outcome.errors, 0);
    assert_eq!(outcome.output[24..], payload_a());
    let mut c = hex("0000432100000002e96e8c08ab465763fd098d45dd3ff893");
    c.extend(hex(
        "ac3296968a5595d8d6642d7132dbf3b68d012ed3afceb0f5b7491079dae260a3152da3af7d6e38f1d7cb5d79d6fbae69\
         79508859da321bf62efefc41a53d72c73a62024cd4aada09019fba2701ac331c2a10da823e0fb4e48f47224b27c938b8",
    ));
    let key: Vec<u8> = (0..32).collect();
    let mut sa = record([0x014A_3318, 0x2400_1102], &key, Hash::Sha256, &auth);
    let outcome = open(&mut sa, &c);
    assert_eq!((outcome.errors, outcome.next_header), (0, 1));
    assert_eq!(outcome.output[24..], payload_a());
    assert_eq!(sa.sequence(), 2);
}

fn basic(commands: [u32; 2], key: &str, iv: &str, input: &[u8]) -> (Outcome, State) {
    let mut sa = record(commands, &hex(key), Hash::Sha1, &[0x0b; 20]);
    let mut state = State([0; STATE_LEN]);
    state.set_iv(&hex(iv).try_into().unwrap());
    let outcome = run(
        &Switches::default(),
        0x11,
        input.len(),
        input,
        &mut sa,
        Some(&mut state),
        &mut Prng::default(),
    );
    (outcome, state)
}

#[test]
fn basic_operations_give_the_known_answers() {
    let cbc = "06a9214036b8a15b512e03d534120006";
    let iv = "3dafba429d9eb430b422da802c9fac41";
    let want = hex("e353779c1079aeb82708942dbe77181a");
    let (sealed, state) = basic([0x1200_F3C0, 0x0200_0100], cbc, iv, b"Single block msg");
    assert_eq!((sealed.errors, &sealed.output), (0, &want));
    assert_eq!(state.iv().to_vec(), want);
    let (opened, _) = basic([0x1200_F3C8, 0x0200_0100], cbc, iv, &want);
    assert_eq!(opened.output, b"Single block msg");
    let (ctr, state) = basic(
        [0x1200_F3C0, 0x0200_0200],
        "ae6852f8121067cc4bf7a5765577f39e",
        "00000030000000000000000000000001",
        b"Single block msg",
    );
    assert_eq!(ctr.output, hex("e4095d4fb7a7b3792d6175a3261311b8"));
    assert_eq!(state.iv()[12..], [0, 0, 0, 2]);
}

#[test]
fn the_host_may_build_the_packet_and_swap_the_icv() {
    let packet = hex(PACKET_A);
    let iv = "e96e8c08ab465763fd098d45dd3ff893";
    let mut plain = packet[..24].to_vec();
    plain.extend(payload_a());
    plain.extend(1..=14);
    plain.extend([14, 1]);
    let (mut sealed, _) = basic([0x1230_13C1, 0x0206_110B], KEY_A, iv, &plain);
    assert_eq!((sealed.errors, sealed.output.len()), (0, 116));
    sealed.output[104..].chunks_mut(4).for_each(<[u8]>::reverse);
    assert_eq!(sealed.output, packet);
    // Inbound the ICV lies behind the length, as on the wire.
    let open = |packet: &[u8]| {
        let mut sa = record(
            [0x1230_13C9, 0x0206_1102],
            &hex(KEY_A),
            Hash::Sha1,
            &[0x0b; 20],
        );
        let mut state = State([0; STATE_LEN]);
        state.set_iv(&hex(iv).try_into().unwrap());
        let s = Some(&mut state);
        run(
            &Switches::default(),
            0x11,
            104,
            packet,
            &mut sa,
            s,
            &mut Prng::default(),
        )
    };
    let opened = open(&packet);
    assert_eq!((opened.errors, opened.output), (0, plain));
    for at in [0, 30, 103, 104, 115] {
        let mut wrong = packet.clone();
        wrong[at] ^= 1;
        assert_eq!(open(&wrong).errors, AUTH_ERR, "byte {at}");
    }
}

#[test]
fn each_fault_of_a_packet_has_its_own_error() {
    let good = hex(PACKET_A);
    let check = |packet: &[u8], errors: u32| {
        let mut sa = sa_a(CBC_SHA1_IN);
        assert_eq!(open(&mut sa, packet).errors, errors);
        assert_eq!((sa.sequence(), sa.mask()), (0, 0xffff_ffff));
    };
    let mut wrong = good.clone();
    wrong[115] ^= 0x80;
    check(&wrong, AUTH_ERR);
    wrong = good.clone();
    wrong[3] ^= 1;
    check(&wrong, Code::Spi.bits());
    check(&[], Code::ZeroLength.bits());
    check(&good[..51], Code::Length.bits());
    check(&good[..115], Code::Block.bits());
    // A wrong pad byte under a right ICV.
    let mut body = payload_a();
    body.extend([1, 2, 9, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 14, 1]);
    let mut iv = good[8..24].try_into().unwrap();
    Aes::new(&hex(KEY_A))
        .unwrap()
        .cbc_encrypt(&mut iv, &mut body);
    let mut packet = good[..24].to_vec();
    packet.extend(body);
    let [inner, outer] = chains(Hash::Sha1, &[0x0b; 20]);
    let icv = Hash::Sha1.hmac(inner, outer, &packet);
    packet.extend(&icv[..12]);
    check(&packet, PAD_ERR);
}

#[test]
fn the_window_is_64_wide() {
    let (top, mask) = slide(0, 0xffff_ffff, 100).unwrap();
    assert_eq!(slide(top, mask, 100), None);
    assert_eq!(slide(top, mask, 36), None);
    let (top, mask) = slide(top, mask, 37).unwrap();
    assert_eq!(slide(top, mask, 37), None);
    assert_eq!(slide(top, mask, 1000).unwrap(), (1000, 1));
    assert_eq!(slide(0, 0xffff_ffff, 0), None);
    assert_eq!(
        slide(0, 0xffff_ffff, 40).unwrap(),
        (40, 0xffff_ff00_0000_0001)
    );
}

#[test]
fn numbers_end_and_ivs_need_a_seed() {
    let mut sa = sa_a(CBC_SHA1_OUT);
    sa.set_sequence(u32::MAX - 1);
    assert_eq!(seal(&mut sa, 0x0200_0111, b"last").errors, 0);
    let over = seal(&mut sa, 0x0200_0111, b"over");
    assert_eq!((over.errors, over.output.len()), (SEQ_ERR, 0));
    assert_eq!(sa.sequence(), u32::MAX);
    let mut sa = sa_a(CBC_SHA1_OUT);
    let dry = run(
        &Switches::default(),
        0x0200_0111,
        1,
        b"x",
        &mut sa,
        None,
        &mut Prng::default(),
    );
    assert_eq!(dry.errors, Code::Processing.bits());
    assert!(dry.broke.is_some());
}

#[test]
fn packets_are_padded_to_what_is_asked_and_what_the_cipher_needs() {
    for (control, cbc, ctr) in [
        (0u32, 16, 8),
        (1, 16, 4),
        (2, 16, 4),
        (4, 16, 8),
        (8, 16, 16),
        (0x10, 32, 32),
        (0x80, 256, 256),
    ] {
        assert_eq!(pad_boundary(control << 24, Cipher::AesCbc), Some(cbc));
        assert_eq!(pad_boundary(control << 24, Cipher::AesCtr), Some(ctr));
        for length in 1..=64 {
            let mut sa = sa_a(CBC_SHA1_OUT);
            let sealed = seal(&mut sa, control << 24 | 0x0111, &vec![7; length]);
            assert_eq!((sealed.output.len() - 36) % cbc, 0);
            assert!(sealed.output.len() - 36 - length - 2 < cbc);
            let opened = open(&mut sa_a(CBC_SHA1_IN), &sealed.output);
            assert_eq!((opened.errors, opened.output.len()), (0, 24 + length));
        }
    }
    assert_eq!(pad_boundary(3 << 24, Cipher::AesCbc), None);
}

#[test]
fn what_is_unknown_of_silicon_is_refused() {
    let packet = hex(PACKET_A);
    // Without COPY_HEADER; with the IV from the state record; without HDR_PROC.
    for commands in [
        [0x013A_1318, 0x2200_1100],
        [0x023A_1318, 0x2200_1102],
        [0x0132_1318, 0x2200_1102],
    ] {
        let outcome = open(&mut sa_a(commands), &packet);
        assert_eq!(outcome.errors, Code::Operation.bits());
        assert!(outcome.broke.is_some());
    }
    // Counter mode with a random IV, an IV from the input, DES.
    for (commands, code) in [
        ([0x033A_1310, 0x2200_1201], Code::Operation),
        ([0x013A_1310, 0x2200_1101], Code::Operation),
        ([0x033A_1010, 0x2200_1101], Code::Algorithm),
        ([0x033A_0310, 0x2200_1101], Code::Algorithm),
    ] {
        let outcome = seal(&mut sa_a(commands), 0x0200_0111, b"payload");
        assert_eq!(outcome.errors, code.bits());
    }
}
