//! One SA slot and what the engine does with a packet of it: RFC 4303 tunnel mode, RFC 3948, RFC 6040.

use super::crypt::{Aes, Hash};
use super::switches::Switches;

/// Words of the staging window.
pub(super) const WORDS: usize = 47;

const CMD_ENC: u32 = 1;
const CMD_NAT: u32 = 1 << 12;
const CMD_REPLAY: u32 = 1 << 13;
const CMD_SN_DROP: u32 = 1 << 16;
const CMD_PAD_DROP: u32 = 1 << 17;
const CMD_ICV_DROP: u32 = 1 << 18;
const CMD_DF_CFG: u32 = 1 << 19;
const CMD_DSCP_IN: u32 = 1 << 23;
const CMD_DSCP_CFG: u32 = 1 << 27;
const CMD_ECN: u32 = 1 << 28;
const CMD_UDP_PARSER: u32 = 1 << 29;
const CMD_VALID: u32 = 1 << 31;
/// Bits that no driver has set on silicon: ESN, IPv6 outside, transport mode, and those without a name.
pub(super) const CMD_UNTRIED: u32 = 7 << 9 | 7 << 20 | 1 << 26 | 1 << 30;

/// Why a packet is not what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    Icv,
    Replay,
    Padding,
    /// The slot carries nothing, or not this.
    Slot,
    /// The hard limit of numbers.
    Limit,
}

impl Fault {
    /// Hop flags.
    pub(super) fn flags(self) -> u32 {
        match self {
            Fault::Icv => 5,
            Fault::Replay => 6,
            Fault::Padding | Fault::Slot | Fault::Limit => 7,
        }
    }
}

enum Suite {
    Cbc(Aes, Hash, Vec<u8>, usize),
    Gcm(Aes, [u8; 4], usize),
}

/// A committed SA.
pub(super) struct Entry {
    cmd: u32,
    spi: u32,
    /// As they are in the register.
    ports: u32,
    src: u32,
    dst: u32,
    hard: u64,
    suite: Option<Suite>,
    /// Number of the last packet out, or the highest in.
    number: u64,
    /// Bit n: `number - n` was seen.
    seen: [u64; 4],
    id: u16,
}

impl Entry {
    /// Decodes the staging window; `None` for an entry that is not valid.
    pub(super) fn decode(w: &[u32; WORDS], switches: &Switches) -> Option<Entry> {
        let cmd = w[0];
        if cmd & CMD_VALID == 0 {
            return None;
        }
        let key_len = match cmd >> 7 & 3 {
            0 => 16,
            1 => 24,
            _ => 32,
        };
        let bytes = |from: usize, n: usize| -> Vec<u8> {
            let words = w[from..from + 8].iter();
            words.flat_map(|v| v.to_be_bytes()).take(n).collect()
        };
        let aes = Aes::new(&bytes(5, key_len));
        let icv = match cmd >> 24 & 3 {
            0 => 8,
            1 => 12,
            _ => 16,
        };
        let suite = match (cmd >> 1 & 7, cmd >> 4 & 7, aes) {
            (1, 1, Some(aes)) => Some(Suite::Cbc(aes, Hash::Sha1, bytes(13, 20), 12)),
            (1, 2, Some(aes)) => Some(Suite::Cbc(aes, Hash::Sha256, bytes(13, 32), 16)),
            (2, 0, Some(aes)) => Some(Suite::Gcm(aes, w[13].to_be_bytes(), icv)),
            _ => None,
        };
        let outbound = cmd & CMD_ENC != 0;
        let begin = u64::from(switches.first_number.max(1)) - 1;
        Some(Entry {
            cmd,
            spi: w[3],
            ports: w[4],
            src: w[21],
            dst: w[25],
            hard: u64::from(w[46]) << 32 | u64::from(w[45]),
            suite,
            number: (u64::from(w[35]) << 32 | u64::from(w[34])).max(if outbound {
                begin
            } else {
                0
            }),
            seen: [0; 4],
            id: 0,
        })
    }

    /// Cipher, hash and key length make sense together.
    pub(super) fn has_suite(&self) -> bool {
        self.suite.is_some()
    }

    pub(super) fn is_outbound(&self) -> bool {
        self.cmd & CMD_ENC != 0
    }

    /// Whether a packet with this fault disappears.
    pub(super) fn drops(&self, fault: Fault) -> bool {
        let bit = match fault {
            Fault::Icv => CMD_ICV_DROP,
            Fault::Replay => CMD_SN_DROP,
            Fault::Padding => CMD_PAD_DROP,
            Fault::Slot | Fault::Limit => return false,
        };
        self.cmd & bit != 0
    }

    fn ports(&self, switches: &Switches) -> [u8; 4] {
        let [a, b, c, d] = self.ports.to_be_bytes();
        if switches.udp_swapped {
            [c, d, a, b]
        } else {
            [a, b, c, d]
        }
    }

    /// An inner packet becomes an outer one.
    pub(super) fn encrypt(
        &mut self,
        inner: &[u8],
        iv: [u8; 16],
        extra: usize,
        switches: &Switches,
    ) -> Result<Vec<u8>, Fault> {
        let next = match inner.first().map(|b| b >> 4) {
            Some(4) if inner.len() >= 20 => 4,
            Some(6) if inner.len() >= 40 => 41,
            _ => return Err(Fault::Slot),
        };
        let ports = self.ports(switches);
        let suite = self.suite.as_ref().ok_or(Fault::Slot)?;
        if self.number >= self.hard || self.number >= u64::from(u32::MAX) {
            return Err(Fault::Limit);
        }
        self.number += 1;
        let number = u32::try_from(self.number).map_err(|_| Fault::Limit)?;
        let block = match suite {
            Suite::Cbc(..) => 16,
            Suite::Gcm(..) => 4,
        };
        let mut esp = self.spi.to_be_bytes().to_vec();
        esp.extend(number.to_be_bytes());
        let iv_at = esp.len();
        match suite {
            Suite::Cbc(..) => esp.extend(iv),
            Suite::Gcm(..) => esp.extend(self.number.to_be_bytes()),
        }
        let body = esp.len();
        esp.extend(inner);
        let pad = (block - (inner.len() + 2) % block) % block + extra * block;
        let pad = u8::try_from(pad).map_err(|_| Fault::Padding)?;
        esp.extend(1..=pad);
        esp.extend([pad, next]);
        match suite {
            Suite::Cbc(aes, hash, key, icv) => {
                aes.cbc_encrypt(iv, &mut esp[body..]);
                let tag = hash.hmac(key, &esp);
                esp.extend(&tag[..*icv]);
            }
            Suite::Gcm(aes, salt, icv) => {
                let nonce = nonce(salt, &esp[iv_at..body]);
                aes.gcm_crypt(&nonce, &mut esp[body..]);
                let tag = aes.gcm_tag(&nonce, &esp[..8], &esp[body..]);
                esp.extend(&tag[..*icv]);
            }
        }
        Ok(self.outer_header(inner, &esp, ports, switches.ttl))
    }

    fn outer_header(&mut self, inner: &[u8], esp: &[u8], ports: [u8; 4], ttl: u8) -> Vec<u8> {
        let nat = self.cmd & CMD_NAT != 0;
        let (tos, df) = if inner[0] >> 4 == 4 {
            (inner[1], inner[6] & 0x40)
        } else {
            ((inner[0] & 0xf) << 4 | inner[1] >> 4, 0x40)
        };
        let ecn = if self.cmd & CMD_ECN != 0 { tos & 3 } else { 0 };
        let dscp = if self.cmd & CMD_DSCP_CFG != 0 {
            0
        } else {
            tos & 0xfc
        };
        let df = if self.cmd & CMD_DF_CFG != 0 { 0 } else { df };
        let udp = if nat { 8 } else { 0 };
        let total = 20 + udp + esp.len();
        let length = |n: usize| u16::try_from(n).unwrap_or(u16::MAX).to_be_bytes();
        let mut p = vec![0x45, dscp | ecn];
        p.extend(length(total));
        p.extend(self.id.to_be_bytes());
        self.id = self.id.wrapping_add(1);
        p.extend([df, 0, ttl, if nat { 17 } else { 50 }, 0, 0]);
        p.extend(self.src.to_be_bytes());
        p.extend(self.dst.to_be_bytes());
        let sum = checksum(&p);
        p[10..12].copy_from_slice(&sum.to_be_bytes());
        if nat {
            p.extend(ports);
            p.extend(length(udp + esp.len()));
            p.extend([0, 0]);
        }
        p.extend(esp);
        p
    }

    /// An outer packet becomes the inner one.
    pub(super) fn decrypt(&mut self, outer: &[u8]) -> Result<Vec<u8>, Fault> {
        let header = outer.get(..20).ok_or(Fault::Slot)?;
        let (proto, tos) = (header[9], header[1]);
        let esp = match (proto, self.cmd & CMD_UDP_PARSER != 0) {
            (50, false) => outer.get(20..),
            (17, true) => outer.get(28..),
            _ => None,
        }
        .filter(|e| e.len() >= 8)
        .ok_or(Fault::Slot)?;
        let word = |at: usize| u32::from_be_bytes([esp[at], esp[at + 1], esp[at + 2], esp[at + 3]]);
        if word(0) != self.spi {
            return Err(Fault::Slot);
        }
        let number = u64::from(word(4));
        let replay = self.cmd & CMD_REPLAY != 0;
        if replay && !self.is_fresh(number) {
            return Err(Fault::Replay);
        }
        let mut plain = self.open(esp)?;
        if replay {
            self.mark(number);
        }
        let &[.., pad, next] = &plain[..] else {
            return Err(Fault::Padding);
        };
        let pad = usize::from(pad);
        let inner = plain.len().checked_sub(pad + 2).ok_or(Fault::Padding)?;
        if !plain[inner..inner + pad]
            .iter()
            .copied()
            .eq((1..=255).take(pad))
        {
            return Err(Fault::Padding);
        }
        plain.truncate(inner);
        match (next, plain.first().map(|b| b >> 4)) {
            (4, Some(4)) if inner >= 20 => {}
            (41, Some(6)) if inner >= 40 => {}
            _ => return Err(Fault::Padding),
        }
        self.inner_header(&mut plain, tos);
        Ok(plain)
    }

    /// Authenticates, then decrypts.
    fn open(&self, esp: &[u8]) -> Result<Vec<u8>, Fault> {
        match self.suite.as_ref().ok_or(Fault::Slot)? {
            Suite::Cbc(aes, hash, key, icv) => {
                let end = esp.len().checked_sub(*icv).ok_or(Fault::Icv)?;
                if end < 24 + 16 || (end - 24) % 16 != 0 {
                    return Err(Fault::Icv);
                }
                if hash.hmac(key, &esp[..end])[..*icv] != esp[end..] {
                    return Err(Fault::Icv);
                }
                let mut iv = [0; 16];
                iv.copy_from_slice(&esp[8..24]);
                let mut plain = esp[24..end].to_vec();
                aes.cbc_decrypt(iv, &mut plain);
                Ok(plain)
            }
            Suite::Gcm(aes, salt, icv) => {
                let end = esp.len().checked_sub(*icv).ok_or(Fault::Icv)?;
                if end < 16 {
                    return Err(Fault::Icv);
                }
                let nonce = nonce(salt, &esp[8..16]);
                if aes.gcm_tag(&nonce, &esp[..8], &esp[16..end])[..*icv] != esp[end..] {
                    return Err(Fault::Icv);
                }
                let mut plain = esp[16..end].to_vec();
                aes.gcm_crypt(&nonce, &mut plain);
                Ok(plain)
            }
        }
    }

    /// Congestion outside shows inside, and the DSCP where it is asked for. Inner IPv4 only, as far as checksums go.
    fn inner_header(&self, inner: &mut [u8], tos: u8) {
        let ecn = self.cmd & CMD_ECN != 0 && tos & 3 == 3;
        let dscp = self.cmd & CMD_DSCP_IN != 0;
        if inner[0] >> 4 == 4 {
            let mut t = inner[1];
            if ecn && t & 3 != 0 {
                t |= 3;
            }
            if dscp {
                t = t & 3 | tos & 0xfc;
            }
            if t != inner[1] {
                inner[1] = t;
                inner[10..12].fill(0);
                let len = usize::from(inner[0] & 0xf) * 4;
                let sum = checksum(&inner[..len.clamp(20, inner.len())]);
                inner[10..12].copy_from_slice(&sum.to_be_bytes());
            }
        } else if ecn && inner[1] & 0x30 != 0 {
            inner[1] |= 0x30;
        }
    }

    fn window(&self) -> u64 {
        64 * (u64::from(self.cmd >> 14 & 3) + 1)
    }

    fn is_fresh(&self, number: u64) -> bool {
        if number == 0 {
            return false;
        }
        let Some(back) = self.number.checked_sub(number) else {
            return true;
        };
        back < self.window() && !self.bit(back)
    }

    fn bit(&self, back: u64) -> bool {
        let word = usize::try_from(back / 64)
            .ok()
            .and_then(|i| self.seen.get(i));
        word.is_some_and(|w| w >> (back % 64) & 1 == 1)
    }

    fn mark(&mut self, number: u64) {
        if let Some(ahead) = number.checked_sub(self.number).filter(|&n| n > 0) {
            let old = self.seen;
            self.seen = [0; 4];
            for back in 0..256u64 {
                let was = usize::try_from(back / 64).ok().and_then(|i| old.get(i));
                if was.is_some_and(|w| w >> (back % 64) & 1 == 1) {
                    self.set(back.saturating_add(ahead));
                }
            }
            self.number = number;
            self.set(0);
        } else {
            self.set(self.number - number);
        }
    }

    fn set(&mut self, back: u64) {
        let word = usize::try_from(back / 64).ok();
        if let Some(w) = word.and_then(|i| self.seen.get_mut(i)) {
            *w |= 1 << (back % 64);
        }
    }
}

fn nonce(salt: &[u8; 4], iv: &[u8]) -> [u8; 12] {
    let mut n = [0; 12];
    n[..4].copy_from_slice(salt);
    for (to, from) in n[4..].iter_mut().zip(iv) {
        *to = *from;
    }
    n
}

/// RFC 1071.
fn checksum(header: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in header.chunks(2) {
        let low = pair.get(1).copied().unwrap_or(0);
        sum += u32::from(u16::from_be_bytes([pair[0], low]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inbound(window: u32) -> Entry {
        let mut w = [0; WORDS];
        w[0] = CMD_VALID | CMD_REPLAY | 1 << 1 | 1 << 4 | window << 14;
        Entry::decode(&w, &Switches::default()).unwrap()
    }

    #[test]
    fn windows_are_64_to_256_wide() {
        for code in 0..4 {
            let mut e = inbound(code);
            let width = 64 * (u64::from(code) + 1);
            assert!(!e.is_fresh(0) && e.is_fresh(1));
            e.mark(1000);
            assert!(!e.is_fresh(1000) && e.is_fresh(1001));
            assert!(e.is_fresh(1001 - width) && !e.is_fresh(1000 - width));
            e.mark(1001 - width);
            assert!(!e.is_fresh(1001 - width));
            e.mark(1003);
            assert!(e.is_fresh(1002) && !e.is_fresh(1000));
            e.mark(1002);
            assert!(!e.is_fresh(1002) && !e.is_fresh(1003));
        }
    }

    #[test]
    fn an_entry_of_zeros_carries_nothing() {
        assert!(Entry::decode(&[0; WORDS], &Switches::default()).is_none());
        let mut only_valid = [0; WORDS];
        only_valid[0] = CMD_VALID;
        let e = Entry::decode(&only_valid, &Switches::default()).unwrap();
        assert!(!e.has_suite());
    }

    #[test]
    fn a_header_of_rfc_1071_has_its_checksum() {
        let header = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(checksum(&header), !0xddf2);
    }
}
