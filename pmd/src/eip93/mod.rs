//! The EIP-93 look-aside engine (Inside Secure / Rambus), as in MediaTek MT7621 and Airoha EN7581: a port of its own, which
//! any traffic can use.
//!
//! ```text
//!   submit ─▶ check, align, state record ─▶ command ring ─▶ doorbell     one doorbell a run
//!   poll   ◀─ check, ICV, header         ◀─ result ring                  polled; one result per command, in order
//! ```
//!
//! **Crypto mode** is the engine's *encrypt-then-hash*, the path that mainline Linux proves with its self-tests: header, IV,
//! padding and numbers are ours, each packet has a state record with its IV. **Packet mode** is its ESP operation: the
//! engine numbers, pads and makes random IVs from a generator that is loaded with the system's entropy after every reset.
//!
//! What an engine wrote is input: a result must carry the identity of its command, a length that fits, the ESP header that was
//! given (or the number that was expected), and ciphertext that is not the plaintext. What breaks a rule makes the engine
//! untrusted: it takes nothing until [`reset`](EspEngine::reset), which proves it stopped before a frame is given back.
//!
//! One ring pair serves all SAs and both directions, and has one owner. Everything the engine reads lies below 4 GiB. What is
//! not known of silicon is in [`Unknowns`].

mod chip;
mod flight;
pub mod fuzz;
mod known;
mod queue;
mod record;
mod regs;
mod ring;
mod slots;
#[cfg(test)]
mod tests;
mod unknown;

use std::sync::Arc;
use std::time::{Duration, Instant};

use sa_store::suite::{AesBits, Cipher, Hmac, Suite};
use zeroize::Zeroizing;

use crate::arena::Arena;
use crate::device::{Device, DeviceError, IovaClass};
use crate::engine::{Capabilities, EngineStats};
use chip::Chip;
use flight::Flights;
use record::{Image, Parts, SA_LEN, STATE_STRIDE};
use ring::{Command, PRNG_LOAD, Rings};
use slots::Slots;
pub use unknown::Unknowns;

#[cfg(doc)]
use crate::engine::EspEngine;

/// The name in logs and metrics.
pub const NAME: &str = "eip93";
/// Bytes that loading the random number generator makes, as drivers ask for.
const PRNG_OUTPUT: u32 = 4080;
const SCRATCH: usize = 8192;

/// How the engine is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Eip93Config {
    /// Descriptors of each ring, 2 to 1024. One always stays free.
    pub ring: u32,
    /// SAs at once.
    pub slots: u32,
    /// A job without a result by then is lost, and the engine untrusted.
    pub deadline: Duration,
    /// How long each operation of the bring-up may take: a reset of an engine that does not answer ends after one.
    pub bring_up: Duration,
    /// What is not known of silicon.
    pub unknowns: Unknowns,
}

impl Default for Eip93Config {
    fn default() -> Self {
        Eip93Config {
            ring: 512,
            slots: 1024,
            deadline: Duration::from_millis(50),
            bring_up: Duration::from_millis(50),
            unknowns: Unknowns::default(),
        }
    }
}

/// Why the engine cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Eip93Error {
    /// The register window is too small for the engine.
    #[error("a register window of {0} bytes, 4096 are needed")]
    Window(usize),
    /// Another device.
    #[error("no EIP-93: revision register {0:#010x}")]
    NotThis(u32),
    /// It does not go into reset, or does not come out of it as it should.
    #[error("the engine cannot be reset")]
    NoReset,
    /// The ring pointers are not where the record says.
    #[error("ring pointers after reset: {0:#010x}")]
    Pointers(u32),
    /// Memory that the engine cannot reach.
    #[error("address {0:#x} is not below 4 GiB")]
    Address(u64),
    /// A ring size or number of SAs that cannot be.
    #[error("{0}")]
    Config(&'static str),
    /// The system has no randomness to give.
    #[error("no entropy for the engine's random numbers: {0}")]
    Entropy(getrandom::Error),
    /// An operation of the bring-up has no result.
    #[error("no result of {0}")]
    Silent(&'static str),
    /// A known answer came out wrong.
    #[error("wrong answer to {0}")]
    WrongAnswer(&'static str),
    /// Direct host mode.
    #[error("direct host mode: {0}")]
    Direct(&'static str),
    /// The device layer.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Whether the engine can be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// Yes.
    Good,
    /// A job has no result in time.
    Lost,
    /// It told of an error after which it does not go on; its code.
    Fault(u32),
    /// It returned what cannot be right.
    Wrong(&'static str),
    /// It could not be reset.
    Dead,
}

/// The engine, owned by one worker.
pub struct Eip93Engine {
    device: Arc<dyn Device>,
    chip: Chip,
    rings: Rings,
    flights: Flights,
    states: crate::device::DmaMem,
    scratch: crate::device::DmaMem,
    slots: Slots,
    health: Health,
    /// Polls since the last result.
    quiet: u32,
    /// Since when results wait to be released with nothing in flight.
    unreleased: Option<Instant>,
    config: Eip93Config,
    capabilities: Capabilities,
    stats: Arc<EngineStats>,
}

impl Eip93Engine {
    /// Takes the engine in region 0 of `device`, resets it, seeds it, and checks its answers. It works on frames of `arena`.
    ///
    /// # Errors
    /// [`Eip93Error`]: it is not this engine, cannot be reset, or answers wrongly.
    pub fn open(
        device: Arc<dyn Device>,
        arena: &Arc<Arena>,
        config: Eip93Config,
    ) -> Result<Eip93Engine, Eip93Error> {
        let mut engine = Eip93Engine::assemble(device, arena, config)?;
        engine.begin()?;
        tracing::info!(
            engine = NAME,
            device = engine.device.name(),
            revision = format_args!("{:#010x}", engine.chip.revision),
            options = format_args!("{:#010x}", engine.chip.options),
            "engine in service"
        );
        Ok(engine)
    }

    /// Stops the engine and gives it its memory.
    fn assemble(
        device: Arc<dyn Device>,
        arena: &Arc<Arena>,
        config: Eip93Config,
    ) -> Result<Eip93Engine, Eip93Error> {
        if !(2..=1024).contains(&config.ring) {
            return Err(Eip93Error::Config("a ring has 2 to 1024 descriptors"));
        }
        if !(1..=1 << 20).contains(&config.slots) {
            return Err(Eip93Error::Config("an engine has 1 to 1048576 SAs"));
        }
        let chip = Chip::identify(device.region(0)?)?;
        chip.stop()?;
        let size = config.ring as usize;
        let low = |len, align| device.dma_alloc(len, align, IovaClass::Below4G);
        let rings = Rings::new(low(32 * size, 4096)?, low(32 * size, 4096)?, config.ring);
        let states = low(STATE_STRIDE * size, 4096)?;
        let scratch = low(SCRATCH, 4096)?;
        let records = low(SA_LEN * config.slots as usize, 4096)?;
        for memory in [&states, &scratch, &records] {
            let end = memory.iova().saturating_add(memory.len() as u64);
            if end > 1 << 32 {
                return Err(Eip93Error::Address(end));
            }
        }
        let map = device.map_arena_in(arena, IovaClass::Below4G)?;
        let capabilities = capabilities(&config, chip.options);
        let engine = Eip93Engine {
            flights: Flights::new(map, config.ring),
            slots: Slots::new(records),
            chip,
            rings,
            states,
            scratch,
            health: Health::Dead,
            quiet: 0,
            unreleased: None,
            config,
            capabilities,
            stats: Arc::default(),
            device,
        };
        engine.device.set_bus_master(true)?;
        crate::quiesce::register(&engine.device, None);
        Ok(engine)
    }

    /// Whether the engine can be trusted. Once it is not, it takes nothing until it has been reset.
    pub fn health(&self) -> Health {
        self.health
    }

    /// SAs that the engine knows, those whose last packets are in flight included.
    pub fn installed(&self) -> usize {
        self.slots.used()
    }

    /// Checks the engine alone, through its register window and without any memory: known answers in direct host mode. For
    /// bring-up; nothing may be in flight.
    ///
    /// # Errors
    /// [`Eip93Error`]; the engine must then be reset.
    pub fn direct_self_test(&mut self) -> Result<(), Eip93Error> {
        if self.rings.given() != 0 {
            return Err(Eip93Error::Config("packets are in the engine"));
        }
        self.health = Health::Dead;
        known::direct(&self.chip)?;
        self.begin()
    }

    /// From reset to service: rings, entropy, known answers.
    fn begin(&mut self) -> Result<(), Eip93Error> {
        let size = self.config.ring;
        self.chip
            .start(&mut self.rings, size, &self.config.unknowns)?;
        self.unreleased = None;
        self.seed()?;
        known::ring(self)?;
        self.scratch.zero();
        self.health = Health::Good;
        Ok(())
    }

    /// Loads the random number generator.
    fn seed(&mut self) -> Result<(), Eip93Error> {
        let mut entropy = Zeroizing::new([0; 48]);
        getrandom::fill(entropy.as_mut_slice()).map_err(Eip93Error::Entropy)?;
        let record = self.scratch.slice(0, SA_LEN)?;
        Image::prng(&entropy).store(&record);
        let command = Command {
            control: PRNG_LOAD,
            sa: self.scratch_at(0),
            destination: self.scratch_at(4096),
            length: PRNG_OUTPUT,
            ..Command::default()
        };
        let done = self.operate(command, "loading random numbers");
        record.zero();
        if done?.fault().is_some() {
            return Err(Eip93Error::WrongAnswer("loading random numbers"));
        }
        Ok(())
    }

    /// One operation on scratch memory, waited for.
    fn operate(
        &mut self,
        mut command: Command,
        what: &'static str,
    ) -> Result<ring::Done, Eip93Error> {
        command.id = self.flights.next_id();
        if !self.rings.give(&command) {
            return Err(Eip93Error::Silent(what));
        }
        self.rings.announce(&self.chip.regs);
        let begin = Instant::now();
        loop {
            if let Some(done) = self.rings.take() {
                self.rings.release(&self.chip.regs);
                if done.id != command.id {
                    return Err(Eip93Error::WrongAnswer(what));
                }
                return Ok(done);
            }
            if begin.elapsed() > self.config.bring_up {
                return Err(Eip93Error::Silent(what));
            }
            std::hint::spin_loop();
        }
    }

    fn scratch_at(&self, offset: u32) -> u32 {
        // Below 4 GiB, which was checked when it was allocated.
        u32::try_from(self.scratch.iova()).map_or(0, |base| base + offset)
    }
}

fn capabilities(config: &Eip93Config, options: u32) -> Capabilities {
    let mut crypto = Vec::new();
    for bits in [AesBits::B128, AesBits::B192, AesBits::B256] {
        for cipher in [Cipher::Cbc(bits), Cipher::Ctr(bits)] {
            for hmac in [Hmac::Sha1_96, Hmac::Sha256_128] {
                crypto.push(Suite::CipherHmac(cipher, hmac));
            }
        }
    }
    crypto.retain(|s| Parts::of(*s).is_some_and(|p| p.offered(options)));
    let mut packet = crypto.clone();
    if !config.unknowns.counter_mode_in_packet_mode {
        packet.retain(|s| !s.is_counter_mode());
    }
    Capabilities {
        name: NAME,
        in_flight: config.ring as usize - 1,
        synchronous: false,
        crypto,
        packet,
        outer_headers: false,
        renumbers: true,
        esn: false,
        nat_t: true,
        window: slots::WINDOW,
        slots: config.slots as usize,
        longest: usize::from(u16::MAX),
        alignment: if config.unknowns.unaligned_data { 1 } else { 4 },
        address_bits: 32,
        run: config.ring as usize - 1,
    }
}

impl Drop for Eip93Engine {
    fn drop(&mut self) {
        if let Err(error) = self.chip.stop() {
            // Frames that it may still write to stay away from everybody, with their arena.
            tracing::error!(engine = NAME, %error, "the engine does not stop");
        } else {
            self.flights.give_back();
        }
        if let Err(error) = self.device.set_bus_master(false) {
            tracing::warn!(engine = NAME, %error, "bus-master stays on");
        }
    }
}
