//! Packets of the scenarios: sizes, mixes, and which flow comes next.

use std::fmt;
use std::str::FromStr;

/// First address that flows are sent to.
pub const FIRST_DESTINATION: u32 = 0x0a00_0000;
/// Source of every inner packet.
const SOURCE: u32 = 0xac10_0001;
/// Bytes of the smallest inner packet: IPv4 and UDP headers.
const LEAST: u16 = 28;
/// Largest inner packet: what fits an outer packet of 1500 bytes in every suite.
const MOST: u16 = 1420;
const ETHERNET: usize = 14;

/// Sizes of inner IP packets, in the order in which they come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mix {
    name: String,
    sizes: Vec<u16>,
}

/// A size that cannot be sent.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("\"{0}\" is neither \"imix\" nor a size of 28 to 1420 bytes")]
pub struct BadSize(String);

impl FromStr for Mix {
    type Err = BadSize;

    fn from_str(s: &str) -> Result<Self, BadSize> {
        if s == "imix" {
            // 7 x 64, 4 x 576, 1 x 1420, spread so that no burst is all of one size.
            let sizes = vec![64, 576, 64, 64, 576, 64, 1420, 64, 576, 64, 576, 64];
            return Ok(Self {
                name: s.to_owned(),
                sizes,
            });
        }
        match s.parse() {
            Ok(size) if (LEAST..=MOST).contains(&size) => Ok(Self {
                name: s.to_owned(),
                sizes: vec![size],
            }),
            _ => Err(BadSize(s.to_owned())),
        }
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.name)
    }
}

impl Mix {
    /// Size of packet number `n`.
    pub fn size(&self, n: usize) -> u16 {
        self.sizes[n % self.sizes.len()]
    }

    /// Mean inner packet, bytes.
    pub fn mean(&self) -> f64 {
        self.sizes.iter().map(|s| f64::from(*s)).sum::<f64>() / self.sizes.len() as f64
    }
}

/// Builds the packets of a set of flows, visiting the flows over and over in one shuffled order.
#[derive(Debug)]
pub struct Generator {
    mix: Mix,
    /// Destinations in the order of their turns.
    turns: Vec<u32>,
    next: usize,
    template: [u8; ETHERNET + LEAST as usize],
    header_sum: u32,
}

impl Generator {
    /// Packets to these destinations from a host whose gateway has the link address `mac`.
    pub fn new(mix: Mix, mut destinations: Vec<u32>, mac: [u8; 6]) -> Self {
        shuffle(&mut destinations);
        let mut template = [0; ETHERNET + LEAST as usize];
        template[..6].copy_from_slice(&mac);
        template[6..12].copy_from_slice(&[0x02, 0, 0, 0, 0xff, 1]);
        template[12..14].copy_from_slice(&[0x08, 0x00]);
        let ip = &mut template[ETHERNET..];
        ip[..10].copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 17]);
        ip[12..16].copy_from_slice(&SOURCE.to_be_bytes());
        ip[20..24].copy_from_slice(&[0x30, 0x39, 0x13, 0x88]);
        let header_sum = ip[..20]
            .chunks(2)
            .map(|w| u32::from(w[0]) << 8 | u32::from(w[1]))
            .sum();
        Self {
            mix,
            turns: destinations,
            next: 0,
            template,
            header_sum,
        }
    }

    /// Writes the next packet as an Ethernet frame. Returns the length of the inner packet.
    pub fn fill(&mut self, frame: &mut pmd::Frame) -> u16 {
        let size = self.mix.size(self.next);
        let to = self.turns[self.next % self.turns.len()];
        self.next += 1;
        frame.reset_default();
        let packet = frame
            .append(ETHERNET + usize::from(size))
            .expect("the arena's frames hold the largest packet");
        let (head, payload) = packet.split_at_mut(self.template.len());
        head.copy_from_slice(&self.template);
        payload.fill(0x5a);
        let ip = &mut head[ETHERNET..];
        ip[2..4].copy_from_slice(&size.to_be_bytes());
        ip[16..20].copy_from_slice(&to.to_be_bytes());
        ip[24..26].copy_from_slice(&(size - 20).to_be_bytes());
        let mut sum = self.header_sum + u32::from(size) + (to >> 16) + (to & 0xffff);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        let sum = !u16::try_from(sum).unwrap_or(u16::MAX);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        size
    }

    /// Flows that take turns.
    pub fn flows(&self) -> usize {
        self.turns.len()
    }
}

/// Fisher-Yates with a fixed seed: every run visits the flows in the same order.
fn shuffle(list: &mut [u32]) {
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    for i in (1..list.len()).rev() {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let j = usize::try_from(random % (i as u64 + 1)).unwrap_or(0);
        list.swap(i, j);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gateway::wire::{self, NattPorts};
    use pmd::{Arena, ArenaConfig, Pool};

    #[test]
    fn imix_has_the_agreed_shares() {
        let imix: Mix = "imix".parse().unwrap();
        let count = |size| (0..12).filter(|n| imix.size(*n) == size).count();
        assert_eq!((count(64), count(576), count(1420)), (7, 4, 1));
        assert!((imix.mean() - (7. * 64. + 4. * 576. + 1420.) / 12.).abs() < 1e-9);
        assert!("27".parse::<Mix>().is_err() && "1421".parse::<Mix>().is_err());
    }

    #[test]
    fn packets_are_valid_and_every_flow_has_its_turn() {
        let arena = Arena::new(ArenaConfig {
            frames: 4,
            ..ArenaConfig::default()
        })
        .unwrap();
        let mut pool = Pool::new(&arena, 4);
        let mut frame = pool.get().unwrap();
        let to: Vec<u32> = (0..50).map(|i| FIRST_DESTINATION + i * 977).collect();
        let mut generator = Generator::new("imix".parse().unwrap(), to.clone(), [2; 6]);
        let mut seen: Vec<u32> = (0..50)
            .map(|_| {
                let size = generator.fill(&mut frame);
                let p = wire::parse(frame.data(), NattPorts::default()).unwrap();
                assert_eq!(p.l3_len, size);
                u32::try_from(p.dst).unwrap()
            })
            .collect();
        assert_ne!(seen, to);
        seen.sort_unstable();
        assert_eq!(seen, to);
        pool.put(frame);
    }
}
