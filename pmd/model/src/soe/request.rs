//! Requests: frames for port 7, with the hop descriptor and the dummy header that the engine wants.

use super::esp::Fault;
use super::qdma::Given;
use super::{MACS, Soe};
use crate::Bus;

const HOP: usize = 32;
const HEADERS: usize = HOP + 14;

impl Soe {
    /// Does what a frame to port 7 asks for.
    pub(super) fn request(&mut self, bus: &mut Bus, instance: usize, given: &Given) {
        let lint = |rule, detail: String| bus.broke(rule, detail);
        let [msg0, msg1, msg2] = given.msg;
        let oq = msg1 >> 15 & 0x1f;
        let bytes = &given.bytes;
        let Some((hop, packet)) = bytes.split_at_checked(HEADERS) else {
            return lint(
                "a request has its headers",
                format!("{} bytes", bytes.len()),
            );
        };
        let word = |at: usize| u32::from_le_bytes([hop[at], hop[at + 1], hop[at + 2], hop[at + 3]]);
        let encrypt = match hop[30] {
            0xa0 => true,
            0xb0 => false,
            other => return lint("byte 30 is hop 2 or 3", format!("{other:#x}")),
        };
        let first = if encrypt { 0xffff_ff81 } else { 0xffff_ff82 };
        let expected = [first, 0, 0, 0x1ff, 0, 0, 0x05dc_0000];
        for (i, e) in expected.into_iter().enumerate() {
            if word(4 * i) != e {
                lint(
                    "the constants of the hop descriptor",
                    format!("word {i}: {:#x}", word(4 * i)),
                );
            }
        }
        if hop[31] != 0 {
            lint(
                "the constants of the hop descriptor",
                format!("byte 31: {:#x}", hop[31]),
            );
        }
        let meters = 0x7f74_07ff | 1 << 13;
        if msg1 & !(0x1f << 15) != meters & !(0x1f << 15) || msg2 != 0xff00_ffff {
            lint(
                "the constants of a request's messages",
                format!("{msg1:#x} {msg2:#x}"),
            );
        }
        if msg0 & !(0x3f << 24) != 0 {
            lint("message 0 holds the slot only", format!("{msg0:#x}"));
        }
        let kind = match (packet.first().map(|b| b >> 4), encrypt) {
            (Some(6), true) => [0x86, 0xdd],
            _ => [0x08, 0x00],
        };
        if hop[HOP..HOP + 12] != MACS || hop[HOP + 12..] != kind {
            lint("the dummy Ethernet header", String::new());
        }
        let slot = hop[29] & 0x3f;
        let user = hop[28];
        let agree = u32::from(slot) == msg0 >> 24 & 0x3f && user & 0x1f == slot;
        if !agree {
            lint(
                "one slot in message 0, byte 28 and byte 29",
                format!("{slot} {user}"),
            );
        }
        if user & 0xe0 != 0 {
            lint("bits 5 to 7 of byte 28 are 0", format!("{user:#x}"));
        }
        if oq != if encrypt { 8 } else { 9 } {
            lint("queue 8 encrypts, 9 decrypts", format!("{oq}"));
        }
        let right = agree && oq == if encrypt { 8 } else { 9 };
        if self.config & if encrypt { 1 } else { 2 } == 0 {
            // Frames for a stopped engine disappear.
            return;
        }
        self.jobs += 1;
        if self.knobs.hangs(self.jobs) {
            return;
        }
        let outcome = self.work(if right { slot } else { u8::MAX }, encrypt, packet);
        self.conclude(instance, slot, user, encrypt, packet, outcome);
    }

    pub(super) fn work(
        &mut self,
        slot: u8,
        encrypt: bool,
        packet: &[u8],
    ) -> Result<Vec<u8>, Fault> {
        let entry = self.slots.get_mut(usize::from(slot));
        let entry = entry.and_then(Option::as_mut).ok_or(Fault::Slot)?;
        if entry.is_outbound() != encrypt {
            return Err(Fault::Slot);
        }
        if !encrypt {
            return entry.decrypt(packet);
        }
        let random = [self.knobs.random(), self.knobs.random()];
        let mut iv = [0; 16];
        iv[..8].copy_from_slice(&random[0].to_ne_bytes());
        iv[8..].copy_from_slice(&random[1].to_ne_bytes());
        let extra = match self.switches.extra_padding {
            0 => 0,
            most => usize::try_from(self.knobs.random() % (u64::from(most) + 1)).unwrap_or(0),
        };
        entry.encrypt(packet, iv, extra, &self.switches)
    }
}
