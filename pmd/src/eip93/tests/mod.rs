//! The driver against the model, through a vfio-user socket.

mod misbehaviour;
mod modes;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use aes::cipher::{
    BlockModeDecrypt, BlockModeEncrypt, InnerIvInit, KeyInit, KeyIvInit, StreamCipher,
};
use esplanade_model::eip93::{Eip93, Switches};
use esplanade_model::{KnobArgs, Knobs, Running, Server};
use hmac::Mac;
use sa_store::cipher::NoCipher;
use sa_store::runtime::Start;
use sa_store::sa::{Direction, OffloadMode, SaId, SaKeys, SaSpec, Spi};
use sa_store::snapshot::Snapshot;
use sa_store::store::Store;
use sa_store::suite::{AesBits, Cipher, Hmac, Suite};

pub(super) use super::fuzz::{CBC_SHA1, OUTER, SPI, spec};
use super::*;
use crate::device::vfio_user::VfioUserDevice;
use crate::engine::{EspEngine, EspJob, JobKind, JobStatus, Refusal};
use crate::frame::Frame;
use crate::{ArenaConfig, Pool};

/// Every suite that the engine has.
pub(super) fn suites() -> Vec<Suite> {
    let mut all = Suite::all();
    all.retain(|s| Parts::of(*s).is_some());
    assert_eq!(all.len(), 12);
    all
}

/// Engine, model, memory.
pub(super) struct Rig {
    pub(super) engine: Eip93Engine,
    pub(super) pool: Pool,
    pub(super) store: Store,
    pub(super) view: Arc<Snapshot>,
    pub(super) done: Vec<EspJob>,
    pub(super) knobs: Arc<Knobs>,
    pub(super) model: Option<Running>,
    next_spi: u32,
    _dir: tempfile::TempDir,
}

pub(super) fn arena() -> Arc<Arena> {
    Arena::new(ArenaConfig {
        frames: 1024,
        ..ArenaConfig::default()
    })
    .unwrap()
}

/// Patient, as machines that run tests are busy.
pub(super) fn patient() -> Eip93Config {
    Eip93Config {
        deadline: Duration::from_secs(10),
        bring_up: Duration::from_secs(10),
        ..Eip93Config::default()
    }
}

pub(super) fn rig(config: Eip93Config) -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let knobs = Knobs::new(&KnobArgs {
        seed: 7,
        ..KnobArgs::default()
    });
    let model = Eip93::new(Switches::default(), Arc::clone(&knobs));
    let model = Server::bind(&dir.path().join("eip93"))
        .unwrap()
        .spawn(Box::new(model))
        .unwrap();
    let device = Arc::new(VfioUserDevice::connect(model.path()).unwrap());
    let arena = arena();
    let engine = Eip93Engine::open(device, &arena, config).unwrap();
    let store = Store::new(1, 4096);
    Rig {
        engine,
        pool: Pool::new(&arena, 16),
        view: store.current(),
        store,
        done: Vec::new(),
        knobs,
        model: Some(model),
        next_spi: SPI,
        _dir: dir,
    }
}

impl Rig {
    /// Adds an SA to the store, with numbers enough.
    pub(super) fn add(&mut self, mut spec: SaSpec, start: Start) -> SaId {
        // Each SA in the store has a name and an SPI of its own.
        spec.name = format!("{:x}", self.next_spi);
        spec.spi = Spi::new(self.next_spi).unwrap();
        self.next_spi += 1;
        let mut draft = self.store.draft();
        let id = self
            .store
            .add_sa(&mut draft, Arc::new(spec), &NoCipher, start, 0)
            .unwrap();
        self.store.publish(draft);
        self.view = self.store.current();
        id
    }

    pub(super) fn install(&mut self, id: SaId) -> Result<(), Refusal> {
        let entry = Arc::clone(self.view.sa(id).unwrap());
        self.engine.install(&entry)
    }

    /// An SA of the engine.
    pub(super) fn sa(&mut self, suite: Suite, direction: Direction, offload: OffloadMode) -> SaId {
        let start = Start {
            lease_end: 1 << 40,
            ..Start::default()
        };
        let id = self.add(spec(suite, direction, offload), start);
        self.install(id).unwrap();
        id
    }

    pub(super) fn spi(&self, id: SaId) -> u32 {
        self.view.sa(id).unwrap().fixed.spi
    }

    /// A frame whose ESP header's address has the low bits `shift`.
    pub(super) fn frame(&mut self, shift: usize, esp: &[u8]) -> Frame {
        let mut frame = self.pool.get().unwrap();
        frame.reset(192 + shift);
        frame.append(OUTER.into()).unwrap().fill(0x45);
        frame.append(esp.len()).unwrap().copy_from_slice(esp);
        frame
    }

    pub(super) fn job(&mut self, sa: SaId, kind: JobKind, shift: usize, esp: &[u8]) -> EspJob {
        let frame = self.frame(shift, esp);
        let entry = self.view.sa(sa).unwrap();
        let mode = entry.spec.offload;
        let seq = match (mode, kind) {
            (OffloadMode::Packet, JobKind::Seal) => entry.next_out(1, 0).unwrap_or(u64::MAX),
            _ => 1,
        };
        EspJob {
            esp_end: u16::try_from(frame.len()).unwrap(),
            frame,
            sa,
            seq,
            tag: 77,
            note: 5,
            esp_off: OUTER,
            next_header: 4,
            kind,
            mode,
            status: JobStatus::Pending,
        }
    }

    /// Gives jobs, and waits for so many to come back.
    pub(super) fn run(&mut self, mut jobs: Vec<EspJob>) -> Vec<EspJob> {
        let n = jobs.len();
        let begin = Instant::now();
        while self.done.len() < n && begin.elapsed() < Duration::from_secs(20) {
            self.engine.submit(&self.view, &mut jobs, &mut self.done);
            self.engine.poll(&mut self.done);
            std::thread::yield_now();
        }
        assert!(jobs.is_empty(), "{:?}", self.engine.health());
        std::mem::take(&mut self.done)
    }

    /// One job: its status, and its ESP packet.
    pub(super) fn one(&mut self, job: EspJob) -> (JobStatus, Vec<u8>) {
        let mut back = self.run(vec![job]);
        assert_eq!(back.len(), 1, "{:?}", self.engine.health());
        let job = back.pop().unwrap();
        assert_eq!((job.tag, job.note, job.esp_off), (77, 5, OUTER));
        let (from, to) = (usize::from(job.esp_off), usize::from(job.esp_end));
        assert_eq!(job.frame.data()[..from], [0x45; 20]);
        let esp = job.frame.data()[from..to].to_vec();
        self.pool.put(job.frame);
        (job.status, esp)
    }

    pub(super) fn put(&mut self, jobs: Vec<EspJob>) {
        for job in jobs {
            self.pool.put(job.frame);
        }
    }

    /// Nothing was broken, nothing is lost.
    pub(super) fn end(self) {
        assert_eq!(
            self.engine.states.faults() + self.engine.scratch.faults(),
            0
        );
        let arena = Arc::clone(self.pool.arena());
        drop(self.engine);
        if let Some(model) = self.model {
            assert_eq!(model.log().take(), []);
        }
        drop(self.pool);
        assert_eq!(arena.outstanding(), 0);
    }
}

/// Ciphers `body` by RustCrypto.
fn cipher(suite: Suite, keys: &SaKeys, iv: &[u8], body: &mut [u8], seal: bool) {
    fn cbc<C>(key: &[u8], iv: &[u8], body: &mut [u8], seal: bool)
    where
        C: aes::cipher::BlockCipherEncrypt
            + aes::cipher::BlockCipherDecrypt
            + aes::cipher::BlockSizeUser<BlockSize = aes::cipher::consts::U16>
            + KeyInit,
    {
        let cipher = C::new_from_slice(key).unwrap();
        let (blocks, rest) = aes::cipher::Array::slice_as_chunks_mut(body);
        assert!(rest.is_empty());
        let iv = iv.try_into().unwrap();
        if seal {
            cbc::Encryptor::inner_iv_init(cipher, iv).encrypt_blocks(blocks);
        } else {
            cbc::Decryptor::inner_iv_init(cipher, iv).decrypt_blocks(blocks);
        }
    }
    let Suite::CipherHmac(kind, _) = suite else {
        panic!("{suite}")
    };
    match kind {
        Cipher::Cbc(AesBits::B128) => cbc::<aes::Aes128>(&keys.enc, iv, body, seal),
        Cipher::Cbc(AesBits::B192) => cbc::<aes::Aes192>(&keys.enc, iv, body, seal),
        Cipher::Cbc(AesBits::B256) => cbc::<aes::Aes256>(&keys.enc, iv, body, seal),
        Cipher::Ctr(bits) => {
            let (key, nonce) = keys.enc.split_at(bits.key_len());
            let block = [nonce, iv, &[0, 0, 0, 1]].concat();
            match bits {
                AesBits::B128 => ctr::Ctr128BE::<aes::Aes128>::new_from_slices(key, &block)
                    .unwrap()
                    .apply_keystream(body),
                AesBits::B192 => ctr::Ctr128BE::<aes::Aes192>::new_from_slices(key, &block)
                    .unwrap()
                    .apply_keystream(body),
                AesBits::B256 => ctr::Ctr128BE::<aes::Aes256>::new_from_slices(key, &block)
                    .unwrap()
                    .apply_keystream(body),
            }
        }
        Cipher::Null => {}
    }
}

fn icv(suite: Suite, keys: &SaKeys, bytes: &[u8]) -> Vec<u8> {
    let Suite::CipherHmac(_, hash) = suite else {
        panic!("{suite}")
    };
    let mut tag = match hash {
        Hmac::Sha1_96 => hmac::Hmac::<sha1::Sha1>::new_from_slice(&keys.auth)
            .unwrap()
            .chain_update(bytes)
            .finalize()
            .into_bytes()
            .to_vec(),
        _ => hmac::Hmac::<sha2::Sha256>::new_from_slice(&keys.auth)
            .unwrap()
            .chain_update(bytes)
            .finalize()
            .into_bytes()
            .to_vec(),
    };
    tag.truncate(suite.icv_len());
    tag
}

/// An ESP packet: framed, with room for the ICV, and sealed.
pub(super) fn packets(suite: Suite, spi: u32, seq: u32, payload: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let keys = spec(suite, Direction::Out, OffloadMode::Crypto).keys;
    let mut framed = spi.to_be_bytes().to_vec();
    framed.extend(seq.to_be_bytes());
    let front = 8 + suite.iv_len();
    framed.extend(
        (0..suite.iv_len())
            .zip(seq.to_le_bytes().into_iter().cycle())
            .map(|(_, b)| b ^ 0x5a),
    );
    framed.extend(payload);
    let pad = (payload.len() + 2).next_multiple_of(suite.pad_align()) - (payload.len() + 2);
    framed.extend((1..=pad).map(|n| u8::try_from(n).unwrap()));
    framed.extend([u8::try_from(pad).unwrap(), 4]);
    let mut sealed = framed.clone();
    let iv = framed[8..front].to_vec();
    cipher(suite, &keys, &iv, &mut sealed[front..], true);
    let tag = icv(suite, &keys, &sealed);
    sealed.extend(&tag);
    framed.extend(vec![0xee; tag.len()]);
    (framed, sealed)
}

/// What a sealed packet holds: number and payload, when all of it is right.
pub(super) fn open(suite: Suite, spi: u32, packet: &[u8]) -> Option<(u32, Vec<u8>)> {
    let keys = spec(suite, Direction::In, OffloadMode::Crypto).keys;
    let front = 8 + suite.iv_len();
    let (body, tag) = packet.split_at_checked(packet.len().checked_sub(suite.icv_len())?)?;
    if icv(suite, &keys, body) != tag || body[..4] != spi.to_be_bytes() {
        return None;
    }
    let seq = u32::from_be_bytes(body[4..8].try_into().unwrap());
    let mut plain = body[front..].to_vec();
    cipher(suite, &keys, &body[8..front], &mut plain, false);
    let (pad, next) = (usize::from(plain[plain.len() - 2]), plain[plain.len() - 1]);
    let end = plain.len().checked_sub(2 + pad)?;
    let right = plain[end..end + pad]
        .iter()
        .zip(1u8..)
        .all(|(a, b)| *a == b);
    plain.truncate(end);
    (right && next == 4).then_some((seq, plain))
}

pub(super) fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + len).to_le_bytes()[0]).collect()
}
