//! Capture files, pcap and pcapng: checked as a whole when opened, packets found by place in the file's bytes.

use std::ops::Range;
use std::path::Path;

use pcap_file::pcap::PcapParser;
use pcap_file::pcapng::PcapNgParser;
use pcap_file::pcapng::blocks::{ENHANCED_PACKET_BLOCK, SIMPLE_PACKET_BLOCK};
use pcap_file::{DataLink, Endianness, PcapError};

use crate::port::PortError;

/// All packets of one capture file, in memory.
#[derive(Debug)]
pub struct CaptureFile {
    bytes: Vec<u8>,
    packets: Vec<Range<usize>>,
}

/// What is wrong with a capture file, and where. Always the file's fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CaptureFileError {
    /// Neither pcap nor pcapng.
    #[error("neither a pcap nor a pcapng file (first bytes {0:02x?})")]
    Magic(Vec<u8>),
    /// Not a capture of Ethernet frames.
    #[error("link type {0} at byte {1}: only Ethernet captures can be used")]
    LinkType(u32, usize),
    /// The file ends within a record.
    #[error("packet {packet} at byte {at}: the file ends within it")]
    Truncated {
        /// Number of the packet, from 1.
        packet: usize,
        /// Where its record begins.
        at: usize,
    },
    /// A record that contradicts itself.
    #[error("packet {packet} at byte {at}: {rule}")]
    Record {
        /// Number of the packet, from 1.
        packet: usize,
        /// Where its record begins.
        at: usize,
        /// Rule broken.
        rule: String,
    },
}

impl CaptureFile {
    /// Reads and checks a whole file.
    ///
    /// # Errors
    /// `PortError::Capture` when it cannot be read or is broken; see [`CaptureFileError`].
    pub fn open(path: &Path) -> Result<CaptureFile, PortError> {
        let error = |reason: String| PortError::Capture {
            path: path.display().to_string(),
            reason,
        };
        let bytes = std::fs::read(path).map_err(|e| error(e.to_string()))?;
        CaptureFile::parse(bytes).map_err(|e| error(e.to_string()))
    }

    /// Checks the bytes of a capture file.
    ///
    /// # Errors
    /// See [`CaptureFileError`].
    pub fn parse(bytes: Vec<u8>) -> Result<CaptureFile, CaptureFileError> {
        let packets = match bytes.first_chunk::<4>() {
            Some([0x0a, 0x0d, 0x0d, 0x0a]) => parse_pcapng(&bytes)?,
            Some(
                [0xa1, 0xb2, 0xc3, 0xd4]
                | [0xa1, 0xb2, 0x3c, 0x4d]
                | [0xd4, 0xc3, 0xb2, 0xa1]
                | [0x4d, 0x3c, 0xb2, 0xa1],
            ) => parse_pcap(&bytes)?,
            _ => {
                return Err(CaptureFileError::Magic(
                    bytes.iter().take(4).copied().collect(),
                ));
            }
        };
        Ok(CaptureFile { bytes, packets })
    }

    /// Number of packets.
    pub fn len(&self) -> usize {
        self.packets.len()
    }

    /// True when the file holds no packet.
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// The captured bytes of packet `n`, from 0.
    pub fn packet(&self, n: usize) -> Option<&[u8]> {
        self.bytes.get(self.packets.get(n)?.clone())
    }

    /// All packets, in order.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.len()).filter_map(|n| self.packet(n))
    }
}

fn parse_pcap(bytes: &[u8]) -> Result<Vec<Range<usize>>, CaptureFileError> {
    let (mut rest, parser) = PcapParser::new(bytes).map_err(|e| fault(&e, 1, 0))?;
    if parser.header().datalink != DataLink::ETHERNET {
        return Err(CaptureFileError::LinkType(
            parser.header().datalink.into(),
            20,
        ));
    }
    let mut packets = Vec::new();
    while !rest.is_empty() {
        let at = bytes.len() - rest.len();
        let (after, packet) = parser
            .next_raw_packet(rest)
            .map_err(|e| fault(&e, packets.len() + 1, at))?;
        let end = bytes.len() - after.len();
        packets.push(end - packet.data.len()..end);
        rest = after;
    }
    Ok(packets)
}

fn parse_pcapng(bytes: &[u8]) -> Result<Vec<Range<usize>>, CaptureFileError> {
    let (mut rest, mut parser) = PcapNgParser::new(bytes).map_err(|e| fault(&e, 1, 0))?;
    let mut packets = Vec::new();
    while !rest.is_empty() {
        let at = bytes.len() - rest.len();
        let number = packets.len() + 1;
        let (after, block) = parser
            .next_raw_block(rest)
            .map_err(|e| fault(&e, number, at))?;
        let rule = |rule: &str| CaptureFileError::Record {
            packet: number,
            at,
            rule: rule.into(),
        };
        // Block: type and length (8), body, length (4). The body of a packet block: fixed fields, then the data.
        let body = at + 8;
        let word = |n: usize| -> Option<u32> {
            let word = *block.body.get(n * 4..)?.first_chunk::<4>()?;
            Some(match parser.section().endianness {
                Endianness::Big => u32::from_be_bytes(word),
                Endianness::Little => u32::from_le_bytes(word),
            })
        };
        let found = match block.type_ {
            ENHANCED_PACKET_BLOCK => Some((word(0), 20, word(3))),
            SIMPLE_PACKET_BLOCK => {
                // Only the original length is given; the data is that, cut at the snap length.
                let snap = parser.interfaces().first().map_or(0, |i| i.snaplen);
                let cut = word(0).map(|n| if snap == 0 { n } else { n.min(snap) });
                Some((Some(0), 4, cut))
            }
            _ => None,
        };
        if let Some((interface, fixed, len)) = found {
            let (Some(interface), Some(len)) = (interface, len) else {
                return Err(rule("the block is too short"));
            };
            let interface = parser
                .interfaces()
                .get(interface as usize)
                .ok_or_else(|| rule("its interface is not described before it"))?;
            if interface.linktype != DataLink::ETHERNET {
                return Err(CaptureFileError::LinkType(interface.linktype.into(), at));
            }
            if block.body.len() < fixed + len as usize {
                return Err(rule("the packet is longer than its block"));
            }
            packets.push(body + fixed..body + fixed + len as usize);
        }
        rest = after;
    }
    Ok(packets)
}

fn fault(error: &PcapError, packet: usize, at: usize) -> CaptureFileError {
    match error {
        PcapError::IncompleteBuffer => CaptureFileError::Truncated { packet, at },
        other => CaptureFileError::Record {
            packet,
            at,
            rule: other.to_string(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pcap_file::pcap::{PcapHeader, PcapPacket, PcapWriter};
    use pcap_file::pcapng::PcapNgWriter;
    use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketBlock;
    use pcap_file::pcapng::blocks::interface_description::InterfaceDescriptionBlock;
    use proptest::prelude::*;
    use std::borrow::Cow;
    use std::time::Duration;

    fn pcap(endianness: Endianness, datalink: DataLink, packets: &[&[u8]]) -> Vec<u8> {
        let header = PcapHeader {
            endianness,
            datalink,
            ..PcapHeader::default()
        };
        let mut w = PcapWriter::with_header(Vec::new(), header).unwrap();
        for p in packets {
            w.write_packet(&PcapPacket::new(
                Duration::ZERO,
                u32::try_from(p.len()).unwrap(),
                p,
            ))
            .unwrap();
        }
        w.into_writer()
    }

    fn pcapng(endianness: Endianness, packets: &[&[u8]]) -> Vec<u8> {
        let mut w = PcapNgWriter::with_endianness(Vec::new(), endianness).unwrap();
        w.write_pcapng_block(InterfaceDescriptionBlock {
            linktype: DataLink::ETHERNET,
            snaplen: 0,
            options: vec![],
        })
        .unwrap();
        for p in packets {
            w.write_pcapng_block(EnhancedPacketBlock {
                interface_id: 0,
                timestamp: Duration::ZERO,
                original_len: u32::try_from(p.len()).unwrap(),
                data: Cow::Borrowed(p),
                options: vec![],
            })
            .unwrap();
        }
        w.into_inner()
    }

    #[test]
    fn both_formats_in_both_byte_orders_give_the_packets() {
        let packets: [&[u8]; 3] = [b"first", b"", b"the third"];
        for e in [Endianness::Big, Endianness::Little] {
            for bytes in [pcap(e, DataLink::ETHERNET, &packets), pcapng(e, &packets)] {
                let file = CaptureFile::parse(bytes).unwrap();
                assert_eq!(file.iter().collect::<Vec<_>>(), packets);
            }
        }
    }

    #[test]
    fn a_broken_file_is_told_with_its_place() {
        assert_eq!(
            CaptureFile::parse(b"PK\x03\x04".to_vec()).unwrap_err(),
            CaptureFileError::Magic(b"PK\x03\x04".to_vec())
        );
        let mut bytes = pcap(
            Endianness::Little,
            DataLink::ETHERNET,
            &[b"whole", b"cut off"],
        );
        bytes.truncate(bytes.len() - 1);
        assert_eq!(
            CaptureFile::parse(bytes).unwrap_err(),
            CaptureFileError::Truncated {
                packet: 2,
                at: 24 + 16 + 5
            }
        );
        let raw = pcap(Endianness::Big, DataLink::RAW, &[b"x"]);
        assert!(matches!(
            CaptureFile::parse(raw),
            Err(CaptureFileError::LinkType(101, 20))
        ));
        let mut long = pcapng(Endianness::Little, &[b"abcd"]);
        let captured_len = long.len() - 4 - 4 - 8;
        long[captured_len] = 200;
        assert!(matches!(
            CaptureFile::parse(long),
            Err(CaptureFileError::Record { packet: 1, .. })
        ));
    }

    proptest! {
        #[test]
        fn no_damage_to_a_file_makes_the_parser_panic(
            ng in any::<bool>(),
            cut in 0usize..200,
            changes in prop::collection::vec((0usize..200, any::<u8>()), 0..8),
        ) {
            let packets: [&[u8]; 3] = [b"first", b"second one", b"3"];
            let mut bytes = if ng {
                pcapng(Endianness::Little, &packets)
            } else {
                pcap(Endianness::Little, DataLink::ETHERNET, &packets)
            };
            for (at, value) in changes {
                let n = bytes.len();
                bytes[at % n] = value;
            }
            bytes.truncate(bytes.len().saturating_sub(cut));
            if let Ok(file) = CaptureFile::parse(bytes) {
                prop_assert_eq!(file.iter().count(), file.len());
            }
        }
    }
}
