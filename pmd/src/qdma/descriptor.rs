//! Descriptors: eight little-endian words, the same places for both directions.
//!
//! ```text
//! 0 reserved   4 control   8 address   12 next index   16..28 messages 0 to 2   28 message 3
//! ```

/// Bytes of a descriptor.
pub const DESCRIPTOR: usize = 32;

pub(crate) const CTRL: usize = 4;
pub(crate) const ADDR: usize = 8;
pub(crate) const NEXT: usize = 12;
pub(crate) const MSG0: usize = 16;
pub(crate) const MSG1: usize = 20;
pub(crate) const MSG2: usize = 24;
pub(crate) const MSG3: usize = 28;

/// Written back: the device is through with the descriptor.
pub(crate) const DONE: u32 = 1 << 31;
/// Written back: sent nowhere (transmit), or lost by overflow (receive).
pub(crate) const DROP: u32 = 1 << 30;
/// The frame goes on in the next descriptor.
pub(crate) const MORE: u32 = 1 << 29;
/// Bytes of this buffer.
pub(crate) const LENGTH: u32 = 0xffff;

/// A port of the packet switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PsePort(u8);

impl PsePort {
    /// First GDM: the switch of the LAN ports.
    pub const GDM1: PsePort = PsePort(1);
    /// Second GDM.
    pub const GDM2: PsePort = PsePort(2);
    /// Third GDM.
    pub const GDM3: PsePort = PsePort(3);
    /// Fourth GDM.
    pub const GDM4: PsePort = PsePort(9);
    /// CDM4: the secure offload engine, shared with the network processor.
    pub const SOE: PsePort = PsePort(7);

    /// Number of the port in the packet switch.
    pub const fn number(self) -> u8 {
        self.0
    }
}

/// What a transmit descriptor tells the packet switch about its frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TxMsg {
    /// Special tag, checksum requests, channel and queue.
    pub msg0: u32,
    /// Meter, port, output queue, hop, accounting.
    pub msg1: u32,
    /// Constant for a kind of traffic.
    pub msg2: u32,
}

/// Message 1: no meter, not counted.
const NO_METER: u32 = 0x7f << 24;
const NOT_COUNTED: u32 = 0x7ff;
/// Message 1: the frame begins with a hop descriptor.
const HOP: u32 = 1 << 13;

impl TxMsg {
    /// An Ethernet frame for a port, unmetered, on channel 0 and queue 0.
    pub const fn frame(port: PsePort) -> TxMsg {
        TxMsg {
            msg0: 0,
            msg1: NO_METER | (port.0 as u32) << 20 | NOT_COUNTED,
            msg2: 0xffff,
        }
    }

    /// A frame that begins with a hop descriptor, for output queue `queue` of the secure offload engine.
    pub const fn hop(sa: u8, queue: u8) -> TxMsg {
        TxMsg {
            msg0: ((sa & 0x3f) as u32) << 24,
            msg1: NO_METER
                | (PsePort::SOE.0 as u32) << 20
                | ((queue & 0x1f) as u32) << 15
                | HOP
                | NOT_COUNTED,
            msg2: 0xff00_ffff,
        }
    }
}

/// What a receive descriptor tells about its frame. All of it is the device's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct RxMsg {
    /// Hop flags, special tag.
    pub msg0: u32,
    /// Source port, reason, flow entry.
    pub msg1: u32,
    /// User field.
    pub msg2: u32,
}

impl RxMsg {
    /// What an engine on the way did: 3 encrypted, 4 decrypted, 5 to 7 an error.
    pub fn hop_flags(self) -> u8 {
        low8(self.msg0 & 7)
    }

    /// The byte that the sender put into the hop descriptor.
    pub fn user_field(self) -> u8 {
        low8(self.msg2 >> 24)
    }

    /// Port of the packet switch that the frame came from.
    pub fn source_port(self) -> u8 {
        low8(self.msg1 >> 21 & 0x1f)
    }
}

fn low8(v: u32) -> u8 {
    v.to_le_bytes()[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_to_the_secure_offload_engine_are_the_published_words() {
        let m = TxMsg::hop(5, 8);
        assert_eq!(
            (m.msg0, m.msg1, m.msg2),
            (0x0500_0000, 0x7f74_27ff, 0xff00_ffff)
        );
        assert_eq!(TxMsg::hop(31, 9).msg1, 0x7f74_a7ff);
        assert_eq!(TxMsg::frame(PsePort::GDM2).msg1, 0x7f20_07ff);
    }

    #[test]
    fn received_messages_are_cut_at_the_published_bits() {
        let m = RxMsg {
            msg0: 0xffff_fffc,
            msg1: 0x07c0_0000,
            msg2: 0x1f00_ffff,
        };
        assert_eq!(
            (m.hop_flags(), m.user_field(), m.source_port()),
            (4, 31, 30)
        );
    }
}
