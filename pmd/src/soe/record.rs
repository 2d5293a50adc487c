//! An SA as the engine takes it, and what it does not take.

use std::net::IpAddr;

use sa_store::sa::{Df, Direction, Dscp, Mode, SaSpec, Tfc};
use sa_store::suite::{AeadIcv, AesBits, Cipher, Hmac, Suite};
use zeroize::Zeroizing;

use super::assumptions::Assumptions;
use super::window::RECORD;

/// Hard limit of sequence numbers in the engine: far enough from the end that the driver reacts before they wrap.
pub(super) const SEQUENCE_END: u32 = 0xf000_0000;
/// Largest packet, in or out: what a frame of the ordinary size holds and a hop descriptor announces.
pub(super) const LARGEST: u16 = 16_128;

const ENC: u32 = 1;
const VLD: u32 = 1 << 31;
const NAT_EN: u32 = 1 << 12;
const REPLAY_EN: u32 = 1 << 13;
const DF_CFG_EN: u32 = 1 << 19;
const OUT_DSCP_CFG_EN: u32 = 1 << 27;
const ECN_MODE: u32 = 1 << 28;
const DEC_UDP_PARSER_EN: u32 = 1 << 29;

/// Words of the record, by register.
mod word {
    pub(super) const CMD: usize = 0;
    pub(super) const BYTES_SOFT: [usize; 2] = [1, 2];
    pub(super) const SPI: usize = 3;
    pub(super) const UDP_PORT: usize = 4;
    pub(super) const ENC_KEY: usize = 5;
    pub(super) const HMAC_KEY: usize = 13;
    pub(super) const SRC: usize = 21;
    pub(super) const DST: usize = 25;
    pub(super) const BYTES_80: usize = (0x1b0 - 0x110) / 4;
    pub(super) const BYTES_HARD: [usize; 2] = [BYTES_80 + 1, BYTES_80 + 2];
    pub(super) const SEQ_SOFT: [usize; 2] = [BYTES_80 + 3, BYTES_80 + 4];
    pub(super) const SEQ_HARD: [usize; 2] = [BYTES_80 + 5, BYTES_80 + 6];
}

/// Lengths that the driver needs to judge what the engine returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) udp: bool,
    pub(super) iv: u16,
    pub(super) icv: u16,
    pub(super) align: u16,
    /// The engine adds as little padding as can be.
    pub(super) least: bool,
}

impl Shape {
    pub(super) fn of(spec: &SaSpec, assume: &Assumptions) -> Shape {
        let small = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
        Shape {
            udp: spec.encap.is_some(),
            iv: small(spec.suite.iv_len()),
            icv: small(spec.suite.icv_len()),
            align: small(spec.suite.pad_align()).max(1),
            least: assume.pads_least,
        }
    }

    /// Where ESP begins in the outer packet.
    pub(super) fn esp_off(self) -> u16 {
        if self.udp { 28 } else { 20 }
    }

    /// Bytes of an outer packet beside the ciphertext.
    fn fixed(self) -> u32 {
        u32::from(self.esp_off()) + 8 + u32::from(self.iv) + u32::from(self.icv)
    }

    /// Whether an inner packet of `inner` bytes gives an outer one of `outer`: padding of at most 255 bytes, aligned.
    pub(super) fn fits(self, inner: u16, outer: u16) -> bool {
        let Some(cipher) = u32::from(outer).checked_sub(self.fixed()) else {
            return false;
        };
        let Some(pad) = cipher.checked_sub(u32::from(inner) + 2) else {
            return false;
        };
        cipher % u32::from(self.align) == 0 && pad <= 255
    }

    /// Whether the engine makes an outer packet of `outer` bytes of an inner one of `inner`.
    pub(super) fn seals(self, inner: u16, outer: u16) -> bool {
        if self.least {
            self.smallest_outer(inner) == u32::from(outer)
        } else {
            self.fits(inner, outer)
        }
    }

    /// Bytes of the outer packet with as little padding as can be.
    pub(super) fn smallest_outer(self, inner: u16) -> u32 {
        (u32::from(inner) + 2).next_multiple_of(u32::from(self.align)) + self.fixed()
    }
}

/// The words of the staging window for `spec`, or what the engine cannot do of it.
pub(super) fn record(
    spec: &SaSpec,
    assume: &Assumptions,
) -> Result<Zeroizing<[u32; RECORD]>, String> {
    let mut words = Zeroizing::new([0u32; RECORD]);
    let mut cmd = VLD | suite(spec.suite, assume)?;
    if spec.mode != Mode::Tunnel {
        return Err("only tunnel mode".into());
    }
    let (IpAddr::V4(src), IpAddr::V4(dst)) = (spec.src, spec.dst) else {
        return Err("only IPv4 outer addresses".into());
    };
    if spec.esn {
        return Err("no extended sequence numbers".into());
    }
    if spec.tfc != Tfc::Off {
        return Err("no TFC padding".into());
    }
    if !spec.ecn {
        return Err("ECN is always copied".into());
    }
    cmd |= ECN_MODE;
    match spec.direction {
        Direction::Out => {
            cmd |= ENC | header(spec, assume)?;
            words[word::SRC] = src.to_bits();
            words[word::DST] = dst.to_bits();
            if spec.encap.is_some() {
                cmd |= NAT_EN;
            }
        }
        Direction::In => {
            let wdw = match spec.replay_window {
                64 => 0,
                128 => 1,
                192 => 2,
                256 => 3,
                n => return Err(format!("a replay window of {n}: only 64, 128, 192 or 256")),
            };
            cmd |= REPLAY_EN | wdw << 14;
            if spec.encap.is_some() {
                cmd |= DEC_UDP_PARSER_EN;
            }
        }
    }
    if let Some(udp) = spec.encap {
        if assume.udp_ports_equal && udp.sport != udp.dport {
            return Err(format!(
                "UDP ports {} and {}: which half of the register is which has not been proven",
                udp.sport, udp.dport
            ));
        }
        let (high, low) = if assume.udp_source_port_high {
            (udp.sport, udp.dport)
        } else {
            (udp.dport, udp.sport)
        };
        words[word::UDP_PORT] = u32::from(high) << 16 | u32::from(low);
    }
    words[word::CMD] = cmd;
    words[word::SPI] = spec.spi.value();
    keys(spec, &mut words)?;
    for pair in [word::BYTES_SOFT, word::BYTES_HARD, word::SEQ_SOFT] {
        words[pair[0]] = u32::MAX;
        words[pair[1]] = u32::MAX;
    }
    words[word::BYTES_80] = u32::MAX;
    words[word::SEQ_HARD[0]] = SEQUENCE_END;
    Ok(words)
}

/// What the engine carries.
pub(super) fn suites(assume: &Assumptions) -> Vec<Suite> {
    let all = Suite::all().into_iter();
    all.filter(|s| suite(*s, assume).is_ok()).collect()
}

/// Cipher, hash and key length, bits 1 to 8; ICV length of GCM, bits 24 and 25.
fn suite(suite: Suite, assume: &Assumptions) -> Result<u32, String> {
    let key = |bits: AesBits| match bits {
        AesBits::B128 => 0,
        AesBits::B192 => 1 << 7,
        AesBits::B256 => 2 << 7,
    };
    match suite {
        Suite::CipherHmac(Cipher::Cbc(bits), hash @ (Hmac::Sha1_96 | Hmac::Sha256_128)) => {
            let hash = if hash == Hmac::Sha1_96 { 1 } else { 2 };
            Ok(1 << 1 | hash << 4 | key(bits))
        }
        Suite::Gcm(bits, icv) if assume.gcm => {
            let icv = match icv {
                AeadIcv::L8 => 0,
                AeadIcv::L12 => 1,
                AeadIcv::L16 => 2,
            };
            Ok(2 << 1 | key(bits) | icv << 24)
        }
        Suite::Gcm(..) => Err(format!(
            "{suite}: how the engine makes the IV has not been proven"
        )),
        _ => Err(format!("no {suite}")),
    }
}

/// How the outer header is made.
fn header(spec: &SaSpec, assume: &Assumptions) -> Result<u32, String> {
    let mut cmd = 0;
    match spec.df {
        Df::Copy if assume.copies_df => {}
        Df::Clear => cmd |= DF_CFG_EN,
        df => return Err(format!("no DF policy {df:?}")),
    }
    match spec.dscp {
        Dscp::Copy => {}
        Dscp::Fixed(0) => cmd |= OUT_DSCP_CFG_EN,
        Dscp::Fixed(n) => return Err(format!("no fixed DSCP {n}")),
    }
    if spec.ttl != assume.ttl {
        return Err(format!(
            "no outer TTL of {}: it is {}",
            spec.ttl, assume.ttl
        ));
    }
    Ok(cmd)
}

fn keys(spec: &SaSpec, words: &mut [u32; RECORD]) -> Result<(), String> {
    if spec.keys.enc.len() != spec.suite.enc_key_len()
        || spec.keys.auth.len() != spec.suite.auth_key_len()
    {
        return Err("keys of the wrong length".into());
    }
    let (cipher, other) = if matches!(spec.suite, Suite::Gcm(..)) {
        let salt = spec.keys.enc.len().saturating_sub(4);
        spec.keys.enc.split_at(salt)
    } else {
        (&spec.keys.enc[..], &spec.keys.auth[..])
    };
    for (from, to) in [(cipher, word::ENC_KEY), (other, word::HMAC_KEY)] {
        let places = words[to..to + 8].iter_mut();
        for (place, bytes) in places.zip(from.chunks_exact(4)) {
            *place = bytes.iter().fold(0, |w, b| w << 8 | u32::from(*b));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::soe::tests::spec;
    use sa_store::sa::UdpEncap;

    const ANY: Assumptions = Assumptions {
        gcm: true,
        udp_source_port_high: true,
        udp_ports_equal: true,
        in_flight: 4,
        slots: 32,
        ring: 2,
        lossless: true,
        batch: true,
        scrub_staging: true,
        first_number: 1,
        copies_df: true,
        pads_least: true,
        knows_by_content: true,
        ttl: 64,
    };

    fn cbc(bits: AesBits, hash: Hmac) -> Suite {
        Suite::CipherHmac(Cipher::Cbc(bits), hash)
    }

    #[test]
    fn commands_are_the_published_values() {
        let gcm = |b| Suite::Gcm(b, AeadIcv::L16);
        let s = spec(Direction::Out, gcm(AesBits::B256));
        assert_eq!(record(&s, &ANY).unwrap()[0], 0x9200_0105);
        let mut s = spec(Direction::In, gcm(AesBits::B128));
        s.replay_window = 256;
        assert_eq!(record(&s, &ANY).unwrap()[0], 0x9200_e004);
        let mut s = spec(Direction::Out, cbc(AesBits::B128, Hmac::Sha1_96));
        s.encap = Some(UdpEncap {
            sport: 4500,
            dport: 4500,
        });
        let r = record(&s, &ANY).unwrap();
        assert_eq!((r[0], r[4]), (0x9000_1013, 4500 << 16 | 4500));
        let mut s = spec(Direction::In, cbc(AesBits::B256, Hmac::Sha256_128));
        s.encap = Some(UdpEncap {
            sport: 4500,
            dport: 4500,
        });
        // As published, but for the bits that drop what is wrong: results are wanted, also of errors.
        assert_eq!(record(&s, &ANY).unwrap()[0], 0xb007_2122 & !(7 << 16));
    }

    #[test]
    fn keys_are_packed_big_endian_and_limits_are_open() {
        let mut s = spec(Direction::Out, cbc(AesBits::B256, Hmac::Sha1_96));
        s.keys.enc = Zeroizing::new((0..32).collect());
        s.keys.auth = Zeroizing::new((100..120).collect());
        let r = record(&s, &ANY).unwrap();
        assert_eq!(r[word::ENC_KEY], 0x0001_0203);
        assert_eq!(r[word::ENC_KEY + 7], 0x1c1d_1e1f);
        assert_eq!(r[word::HMAC_KEY + 4], 0x7475_7677);
        assert_eq!(r[word::HMAC_KEY + 5], 0);
        assert_eq!((r[word::SRC], r[word::DST]), (0x0a00_0001, 0x0a00_0002));
        assert_eq!((r[40], r[45], r[46]), (u32::MAX, SEQUENCE_END, 0));
    }

    #[test]
    fn what_the_engine_cannot_do_is_refused_with_the_reason() {
        let safe = Assumptions::default();
        let good = spec(Direction::In, cbc(AesBits::B128, Hmac::Sha1_96));
        assert!(record(&good, &safe).is_ok());
        let refused = |change: fn(&mut SaSpec), why: &str| {
            for direction in [Direction::Out, Direction::In] {
                let mut s = spec(direction, cbc(AesBits::B128, Hmac::Sha1_96));
                change(&mut s);
                match record(&s, &safe) {
                    Err(reason) if reason.contains(why) => return,
                    _ => {}
                }
            }
            panic!("not refused: {why}");
        };
        refused(|s| s.suite = Suite::Gcm(AesBits::B128, AeadIcv::L16), "IV");
        refused(|s| s.suite = Suite::ChaCha20Poly1305, "chacha20");
        refused(|s| s.mode = Mode::Transport, "tunnel");
        refused(|s| s.dst = "2001:db8::1".parse().unwrap(), "IPv4");
        refused(|s| s.esn = true, "extended");
        refused(|s| s.tfc = Tfc::PadTo(500), "TFC");
        refused(|s| s.ecn = false, "ECN");
        refused(|s| s.df = Df::Set, "DF");
        refused(|s| s.dscp = Dscp::Fixed(46), "DSCP");
        refused(|s| s.ttl = 63, "TTL");
        refused(|s| s.replay_window = 512, "512");
        refused(|s| s.replay_window = 0, "window of 0");
        refused(
            |s| {
                s.encap = Some(UdpEncap {
                    sport: 4500,
                    dport: 4501,
                });
            },
            "UDP ports",
        );
        refused(|s| s.keys.auth = Zeroizing::new(vec![0; 19]), "length");
    }

    #[test]
    fn lengths_of_inner_and_outer_packets_belong_together() {
        let s = Shape::of(
            &spec(Direction::Out, cbc(AesBits::B128, Hmac::Sha1_96)),
            &ANY,
        );
        // 20 + 8 + 16 + 96 + 12.
        assert_eq!(s.smallest_outer(84), 152);
        assert!(s.seals(84, 152) && !s.seals(84, 168));
        assert!(s.fits(84, 152) && s.fits(94, 152) && !s.fits(95, 152));
        assert!(s.fits(84, 152 + 160) && !s.fits(84, 153) && !s.fits(84, 1520));
        assert!(!s.fits(0, 19) && !s.fits(u16::MAX, u16::MAX));
    }
}
