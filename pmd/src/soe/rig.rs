//! The engine over a device that is played by hand: for tests, and for fuzzing.

#![allow(dead_code, reason = "the fuzzer uses part of it, tests the rest")]

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use aes::cipher::{BlockCipherEncrypt, KeyInit};
use sa_store::cipher::NoCipher;
use sa_store::runtime::{Install, Place, SaEntry, Start, TunnelIdx};
use sa_store::sa::{Direction, OffloadMode, SaId, SaKeys, SaSpec, Spi};
use sa_store::snapshot::Snapshot;
use sa_store::store::Store;
use sa_store::suite::{AesBits, Cipher, Hmac, Suite};
use zeroize::Zeroizing;

use super::*;
use crate::arena::reused;
use crate::device::model::{ModelBus, ModelDevice};
use crate::device::{Device, RegisterSpace};
use crate::engine::JobKind;
use crate::pool::Pool;
use crate::qdma::hub::{Hub, dummy_header};
use crate::qdma::player::{Given, Player, Registers};
use crate::qdma::{Qdma, QdmaPlan};

pub(crate) const CBC: Suite = Suite::CipherHmac(Cipher::Cbc(AesBits::B128), Hmac::Sha1_96);

/// An SA that the engine takes.
pub(crate) fn spec(direction: Direction, suite: Suite) -> SaSpec {
    SaSpec {
        tunnel: "t".into(),
        src: "10.0.0.1".parse().unwrap(),
        dst: "10.0.0.2".parse().unwrap(),
        offload: OffloadMode::Packet,
        engine: Some("soe".into()),
        ..SaSpec::plain(
            "sa",
            direction,
            Spi::new(0x1000).unwrap(),
            suite,
            SaKeys {
                enc: Zeroizing::new(vec![1; suite.enc_key_len()]),
                auth: Zeroizing::new(vec![2; suite.auth_key_len()]),
            },
        )
    }
}

pub(crate) fn id(index: u32) -> SaId {
    SaId {
        index,
        generation: 0,
    }
}

pub(crate) fn entry_from(spec: SaSpec, index: u32, start: Start) -> SaEntry {
    SaEntry::new(
        Arc::new(spec),
        Install {
            id: id(index),
            tunnel: TunnelIdx(index),
            owner: 0,
            cipher: Box::new(NoCipher),
            provider: "none",
            start,
            place: Place::CPU,
            now: 0,
        },
    )
}

pub(crate) fn entry(spec: SaSpec, index: u32) -> SaEntry {
    entry_from(spec, index, Start::default())
}

/// The engine's registers: commits are kept, and may fail.
#[derive(Default)]
pub(crate) struct SoeRegisters {
    pub(crate) words: Mutex<Vec<u32>>,
    /// Slot and command of each commit.
    pub(crate) commits: Mutex<Vec<(u32, u32)>>,
    pub(crate) refuse: std::sync::atomic::AtomicBool,
}

impl RegisterSpace for SoeRegisters {
    fn read(&self, at: usize, _: usize) -> u64 {
        let words = self.words.lock().unwrap();
        u64::from(words.get(at / 4).copied().unwrap_or(0))
    }

    fn write(&self, at: usize, _: usize, value: u64) {
        let value = u32::try_from(value).unwrap();
        let mut words = self.words.lock().unwrap();
        words.resize(window::WINDOW / 4, 0);
        match at {
            0x104 | 0x024 | 0x0b0 => words[at / 4] &= !value,
            0x100 if value & 1 == 1 => {
                words[at / 4] = value;
                if !self.refuse.load(Relaxed) {
                    words[0x104 / 4] = 1;
                    let mut commits = self.commits.lock().unwrap();
                    commits.push((value >> 8, words[0x110 / 4]));
                }
            }
            _ => words[at / 4] = value,
        }
    }

    fn len(&self) -> usize {
        0x1000
    }
}

pub(crate) struct Rig {
    pub(crate) engine: SoeEngine,
    pub(crate) player: Player,
    pub(crate) soe: Arc<SoeRegisters>,
    pub(crate) pool: Pool,
    pub(crate) clock: Arc<AtomicU64>,
    pub(crate) view: Arc<Snapshot>,
    pub(crate) done: Vec<EspJob>,
}

pub(crate) fn rig(config: SoeConfig) -> Rig {
    let bus = ModelBus::new();
    let (regs, soe) = (Registers::new(), Arc::<SoeRegisters>::default());
    let spaces: [(u32, Arc<dyn RegisterSpace>); 2] =
        [(1, Arc::clone(&regs) as _), (3, Arc::clone(&soe) as _)];
    let device: Arc<dyn Device> = Arc::new(ModelDevice::new("eth", &bus, vec![], spaces).unwrap());
    let arena = reused(4096);
    let window = device.region(1).unwrap();
    let qdma = Qdma::new(&device, window, QdmaPlan::shared(0, 2, true), &arena).unwrap();
    let hub = Hub::new(vec![qdma], &arena).share();
    let clock = Arc::new(AtomicU64::new(1));
    let engine = SoeEngine::with_clock(
        device.region(3).unwrap(),
        hub.clone(),
        config,
        Clock::Manual(Arc::clone(&clock)),
    )
    .unwrap();
    hub.lock().start().unwrap();
    Rig {
        engine,
        player: Player::new(&bus, &regs),
        soe,
        pool: Pool::new(&arena, 16),
        clock,
        view: Store::new(1, 16).current(),
        done: Vec::new(),
    }
}

/// An IPv4 packet of `len` bytes.
pub(crate) fn inner(len: u16) -> Vec<u8> {
    let mut p = vec![0; usize::from(len)];
    p[0] = 0x45;
    p[2..4].copy_from_slice(&len.to_be_bytes());
    p
}

/// What the engine makes of an inner packet of `len` bytes under the SA of [`spec`], but for the ICV.
pub(crate) fn sealed(len: u16, number: u32) -> Vec<u8> {
    seal_inner(&inner(len), number)
}

/// Likewise of any packet.
pub(crate) fn seal_inner(inner: &[u8], number: u32) -> Vec<u8> {
    let cipher = (inner.len() + 2).next_multiple_of(16);
    let total = 20 + 8 + 16 + cipher + 12;
    let mut p = vec![0; total];
    p[0] = 0x45;
    p[2..4].copy_from_slice(&u16::try_from(total).unwrap().to_be_bytes());
    p[9] = 50;
    p[12..16].copy_from_slice(&[10, 0, 0, 1]);
    p[16..20].copy_from_slice(&[10, 0, 0, 2]);
    p[20..24].copy_from_slice(&0x1000u32.to_be_bytes());
    p[24..28].copy_from_slice(&number.to_be_bytes());
    p[44..44 + inner.len()].copy_from_slice(inner);
    let aes = aes::Aes128Enc::new(&[1; 16].into());
    let mut last = [0; 16];
    for block in p[44..44 + cipher].as_chunks_mut::<16>().0 {
        for (a, b) in block.iter_mut().zip(last) {
            *a ^= b;
        }
        aes.encrypt_block(block.into());
        last = *block;
    }
    p
}

impl Rig {
    pub(crate) fn install(&mut self, direction: Direction, index: u32) {
        let sa = entry(spec(direction, CBC), index);
        self.engine.install(&sa).unwrap();
    }

    pub(crate) fn job(&mut self, index: u32, kind: JobKind, tag: u64, bytes: &[u8]) -> EspJob {
        let mut frame = self.pool.get().unwrap();
        assert!(frame.set_data(bytes));
        EspJob {
            frame,
            sa: id(index),
            seq: tag,
            tag,
            note: 0,
            esp_off: 20,
            esp_end: 0,
            next_header: 0,
            kind,
            mode: OffloadMode::Crypto,
            status: JobStatus::Pending,
        }
    }

    pub(crate) fn seal(&mut self, index: u32, tags: std::ops::Range<u64>, len: u16) -> Vec<EspJob> {
        let mut jobs = tags
            .map(|tag| self.job(index, JobKind::Seal, tag, &inner(len)))
            .collect();
        self.engine.submit(&self.view, &mut jobs, &mut self.done);
        jobs
    }

    pub(crate) fn poll(&mut self) -> Vec<(u64, JobStatus)> {
        self.engine.poll(&mut self.done);
        let pool = &mut self.pool;
        let done = self.done.drain(..);
        done.map(|j| {
            pool.put(j.frame);
            (j.tag, j.status)
        })
        .collect()
    }

    /// Takes all requests, which then have left memory.
    pub(crate) fn requests(&mut self) -> Vec<Given> {
        let mut all = Vec::new();
        while let Some(g) = self.player.take(2) {
            self.player.done(2, g.slot, false);
            all.push(g);
        }
        all
    }

    pub(crate) fn result(&mut self, ring: u8, slot: u8, flags: u32, packet: &[u8]) {
        let mut bytes = dummy_header(false).to_vec();
        bytes.extend(packet);
        let msg = [flags, 0, u32::from(slot) << 24];
        assert!(self.player.give(ring, &bytes, msg, 0));
    }

    pub(crate) fn later(&self, nanoseconds: u64) {
        self.clock.fetch_add(nanoseconds, Relaxed);
    }

    /// Everything must come home.
    pub(crate) fn end(mut self) {
        let _ = self.poll();
        let arena = Arc::clone(self.pool.arena());
        drop(self);
        assert_eq!(arena.outstanding(), 0);
    }
}
