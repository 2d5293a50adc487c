//! What the peer receives: the packets that our own generator makes, for inbound sealed by our own gateway.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use pmd::{Arena, ArenaConfig, Pool};
use sa_store::sa::Direction;

use crate::measure::Bench;
use crate::rig;
use crate::scenario::Scenario;

/// Least packets in the looped capture: as many as frames cycle on our side.
const PACKETS: usize = 1024;

/// Writes a capture in which every flow comes up. Returns the number of packets.
///
/// # Errors
/// The file cannot be written, or the sealing gateway does not work.
pub(super) fn write(path: &Path, bench: &Bench<'_>, scenario: &Scenario) -> Result<usize> {
    let mut file = Capture::create(path)?;
    let count = PACKETS.max(scenario.flows as usize);
    match scenario.direction {
        Direction::Out => {
            let arena = Arena::new(ArenaConfig {
                frames: 1,
                lock: false,
                ..ArenaConfig::default()
            })?;
            let mut pool = Pool::new(&arena, 1);
            let mut frame = pool.get().context("a frame")?;
            let mut generator = rig::generator(scenario);
            let written = (0..count).try_for_each(|_| {
                generator.fill(&mut frame);
                file.packet(frame.data())
            });
            pool.put(frame);
            written?;
        }
        Direction::In => {
            rig::sealed(scenario, bench.factory, bench.arena, count, |packet| {
                Ok(file.packet(packet)?)
            })?;
        }
    }
    file.0.flush()?;
    Ok(count)
}

struct Capture(BufWriter<File>);

impl Capture {
    fn create(path: &Path) -> io::Result<Self> {
        let mut file = Self(BufWriter::new(File::create(path)?));
        file.words(&[0xa1b2_c3d4, 0x0004_0002, 0, 0, 65535, 1])?;
        Ok(file)
    }

    fn packet(&mut self, bytes: &[u8]) -> io::Result<()> {
        let len = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        self.words(&[0, 0, len, len])?;
        self.0.write_all(bytes)
    }

    fn words(&mut self, words: &[u32]) -> io::Result<()> {
        words
            .iter()
            .try_for_each(|word| self.0.write_all(&word.to_le_bytes()))
    }
}
