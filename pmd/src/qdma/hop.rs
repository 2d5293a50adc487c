//! The hop descriptor: 32 bytes in front of a frame for the secure offload engine, which consumes them.

/// Bytes of a hop descriptor.
pub const HOP: usize = 32;

/// What the engine is to do with the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// An inner packet becomes an outer one.
    Encrypt,
    /// An outer packet becomes the inner one.
    Decrypt,
}

impl Action {
    /// Output queue of the engine's port.
    pub const fn queue(self) -> u8 {
        match self {
            Action::Encrypt => 8,
            Action::Decrypt => 9,
        }
    }

    /// Hop flags of a result that is right.
    pub const fn success(self) -> u8 {
        match self {
            Action::Encrypt => 3,
            Action::Decrypt => 4,
        }
    }
}

/// The descriptor for SA slot `sa` (below 64).
///
/// Byte 28 comes back as the user field of the result. It must be the slot alone: with other bits set, silicon was seen to
/// give a wrong ICV, so it cannot carry a mark of the request.
pub fn descriptor(action: Action, sa: u8) -> [u8; HOP] {
    let (kind, hop) = match action {
        Action::Encrypt => (0x81, 0xa0),
        Action::Decrypt => (0x82, 0xb0),
    };
    let sa = sa & 0x3f;
    let mut d = [0; HOP];
    d[..4].copy_from_slice(&[kind, 0xff, 0xff, 0xff]);
    d[12..16].copy_from_slice(&[0xff, 0x01, 0, 0]);
    // Largest packet that leaves, 1500.
    d[24..28].copy_from_slice(&[0, 0, 0xdc, 0x05]);
    d[28..].copy_from_slice(&[sa, sa, hop, 0]);
    d
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        let words = bytes.chunks(4);
        let words = words.map(|w| w.iter().map(|b| format!("{b:02x}")).collect::<String>());
        words.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn descriptors_are_the_published_bytes() {
        assert_eq!(
            hex(&descriptor(Action::Encrypt, 5)),
            "81ffffff 00000000 00000000 ff010000 00000000 00000000 0000dc05 0505a000"
        );
        assert_eq!(
            hex(&descriptor(Action::Decrypt, 5)),
            "82ffffff 00000000 00000000 ff010000 00000000 00000000 0000dc05 0505b000"
        );
        for sa in [0, 31] {
            let d = descriptor(Action::Encrypt, sa);
            assert_eq!((d[28], d[29], d[30]), (sa, sa, 0xa0));
        }
    }
}
