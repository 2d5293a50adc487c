//! An engine that does as the test says.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use pmd::engine::{Capabilities, EngineDead, EspEngine, EspJob, JobKind, JobStatus, Refusal};
use sa_store::cipher::SaCipher;
use sa_store::plan::ESP_HEADER;
use sa_store::runtime::SaEntry;
use sa_store::sa::{OffloadMode, SaId};
use sa_store::snapshot::Snapshot;
use sa_store::suite::Suite;

use crate::engine::trust::packets;
use crate::wire::ipv4::{self, Ipv4Repr};

/// What is wrong with a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Nothing.
    Right,
    /// A bit of the body.
    Body,
    /// A bit of the ICV.
    Icv,
    /// The IV of the packet before.
    SameIv,
    /// An IV of its own, where the caller made it.
    NewIv,
    /// Another SPI.
    Spi,
    /// Where it makes outer headers, to another gateway.
    Outer,
    /// The number of the packet before.
    SameNumber,
    /// A number that the caller has not reached.
    FarNumber,
    /// A byte too short.
    Short,
    /// As it was given, and said to be done.
    Untouched,
    /// It changes places with the next.
    Swap,
    /// It failed.
    Failed,
    /// "The ICV is wrong".
    Mismatch,
    /// It does not come back before a reset.
    Away,
    /// It says that it is another job.
    Tag,
    /// It says that it is another SA's.
    Sa,
    /// It opens whatever comes.
    Gullible,
}

impl Fault {
    pub(super) const ALL: [Fault; 18] = [
        Fault::Right,
        Fault::Body,
        Fault::Icv,
        Fault::SameIv,
        Fault::NewIv,
        Fault::Spi,
        Fault::Outer,
        Fault::SameNumber,
        Fault::FarNumber,
        Fault::Short,
        Fault::Untouched,
        Fault::Swap,
        Fault::Failed,
        Fault::Mismatch,
        Fault::Away,
        Fault::Tag,
        Fault::Sa,
        Fault::Gullible,
    ];
}

/// How the engine behaves, turned while it runs.
#[derive(Debug, Default)]
pub(super) struct Script {
    /// Of the next jobs under the caller's SAs.
    pub(super) faults: VecDeque<Fault>,
    /// Of all jobs under SAs of the checks.
    pub(super) private: Option<Fault>,
    /// Nothing comes back.
    pub(super) hangs: bool,
    /// The driver distrusts it.
    pub(super) ill: bool,
    /// Resets that fail.
    pub(super) bad_resets: u32,
    /// Jobs taken in one call.
    pub(super) room: Option<usize>,
    /// Jobs that it was offered, taken or not.
    pub(super) offered: usize,
    /// SAs that are installed, the checks' own included.
    pub(super) installed: Vec<SaId>,
    /// Those that were at any time.
    pub(super) ever: Vec<SaId>,
    pub(super) resets: u32,
    /// SAs that it has room for.
    pub(super) slots: Option<usize>,
    /// It has no packet mode.
    pub(super) crypto_only: bool,
}

pub(super) type Shared = Arc<Mutex<Script>>;

struct Sa {
    cipher: Box<dyn SaCipher>,
    suite: Suite,
    mode: OffloadMode,
    spi: [u8; 4],
    ends: (IpAddr, IpAddr),
    next: u32,
    seen: HashSet<u32>,
    last_iv: Vec<u8>,
    last_number: u32,
}

pub(super) struct TestEngine {
    caps: Capabilities,
    script: Shared,
    /// SA indexes from here on are the checks'.
    first: u32,
    sas: HashMap<SaId, Sa>,
    queue: VecDeque<EspJob>,
    away: Vec<EspJob>,
}

impl TestEngine {
    /// `bare`: it makes outer headers and counts itself, and forgets all SAs in a reset.
    pub(super) fn new(first: u32, bare: bool, suites: &[Suite], script: &Shared) -> TestEngine {
        let (slots, packet) = {
            let script = script.lock().unwrap();
            let packet = match script.crypto_only {
                true => Vec::new(),
                false => suites.to_vec(),
            };
            (script.slots.unwrap_or(128), packet)
        };
        TestEngine {
            caps: Capabilities {
                name: "test",
                in_flight: 256,
                crypto: if bare { Vec::new() } else { suites.to_vec() },
                packet,
                outer_headers: bare,
                renumbers: !bare,
                window: 64,
                slots,
                longest: 2000,
                run: 64,
                ..Capabilities::default()
            },
            script: Arc::clone(script),
            first,
            sas: HashMap::new(),
            queue: VecDeque::new(),
            away: Vec::new(),
        }
    }

    fn work(&mut self, mut job: EspJob) {
        let private = job.sa.index >= self.first;
        let mut script = self.script.lock().unwrap();
        let fault = if private {
            script.private
        } else {
            script.faults.pop_front()
        };
        drop(script);
        let fault = fault.unwrap_or(Fault::Right);
        let Some(sa) = self.sas.get_mut(&job.sa) else {
            job.status = JobStatus::SaGone;
            self.queue.push_back(job);
            return;
        };
        job.status = sa.cipher(&mut job, fault, self.caps.outer_headers);
        match fault {
            Fault::Failed => job.status = JobStatus::Failed,
            Fault::Mismatch => job.status = JobStatus::IcvMismatch,
            Fault::Tag => job.tag ^= 1 << 40,
            Fault::Sa => job.sa.index ^= 1,
            _ => {}
        }
        match fault {
            Fault::Away => self.away.push(job),
            Fault::Swap if !self.queue.is_empty() => {
                let at = self.queue.len() - 1;
                self.queue.insert(at, job);
            }
            _ => self.queue.push_back(job),
        }
    }
}

impl Sa {
    fn cipher(&mut self, job: &mut EspJob, fault: Fault, bare: bool) -> JobStatus {
        if fault == Fault::Untouched {
            return JobStatus::Done;
        }
        let status = match (job.mode, job.kind) {
            (OffloadMode::Packet, JobKind::Seal) => self.packet_seal(job, fault, bare),
            (OffloadMode::Packet, JobKind::Open) => self.packet_open(job, fault, bare),
            (_, JobKind::Seal) => self.crypto_seal(job, fault),
            (_, JobKind::Open) => {
                let range = usize::from(job.esp_off)..usize::from(job.esp_end);
                let esp = &mut job.frame.data_mut()[range];
                match packets::open(&*self.cipher, esp, 0) || fault == Fault::Gullible {
                    true => JobStatus::Done,
                    false => JobStatus::IcvMismatch,
                }
            }
        };
        let data = job.frame.data_mut();
        let n = data.len();
        match fault {
            Fault::Body => data[n / 4 * 3] ^= 4,
            Fault::Icv => data[n - 1] ^= 1,
            Fault::Short => {
                job.frame.trim_back(1);
                job.esp_end -= 1;
            }
            _ => {}
        }
        status
    }

    fn crypto_seal(&mut self, job: &mut EspJob, fault: Fault) -> JobStatus {
        let range = usize::from(job.esp_off)..usize::from(job.esp_end);
        let esp = &mut job.frame.data_mut()[range];
        let iv = ESP_HEADER..ESP_HEADER + self.suite.iv_len();
        match fault {
            Fault::Spi => esp[2] ^= 1,
            Fault::SameNumber => esp[4..8].copy_from_slice(&self.last_number.to_be_bytes()),
            Fault::FarNumber => esp[4] ^= 0x80,
            Fault::NewIv => esp[iv.start] ^= 0x40,
            Fault::SameIv if !self.last_iv.is_empty() => {
                esp[iv.clone()].copy_from_slice(&self.last_iv);
            }
            _ => {}
        }
        self.last_iv = esp[iv].to_vec();
        self.last_number = u32::from_be_bytes(esp[4..8].try_into().unwrap());
        match packets::seal(&*self.cipher, esp, 0) {
            true => JobStatus::Done,
            false => JobStatus::Failed,
        }
    }

    fn outer(&self, esp: usize, fault: Fault) -> Vec<u8> {
        let (IpAddr::V4(src), IpAddr::V4(dst)) = self.ends else {
            panic!("IPv4 outside")
        };
        let mut header = [0; ipv4::HEADER_LEN];
        Ipv4Repr {
            src,
            dst,
            proto: 50,
            ttl: 64,
            tos: 0,
            id: 0,
            frag: 0,
            payload_len: u16::try_from(esp).unwrap(),
        }
        .emit(&mut header);
        if fault == Fault::Outer {
            header[19] ^= 1;
            ipv4::fill_checksum(&mut header);
        }
        header.to_vec()
    }

    fn packet_seal(&mut self, job: &mut EspJob, fault: Fault, bare: bool) -> JobStatus {
        let iv_len = self.suite.iv_len();
        let from = match bare {
            true => 0,
            false => usize::from(job.esp_off) + ESP_HEADER + iv_len,
        };
        let payload = job.frame.data()[from..usize::from(job.esp_end)].to_vec();
        let mut number = match bare {
            true => self.next,
            false => u32::try_from(job.seq).unwrap(),
        };
        self.next += 1;
        match fault {
            Fault::SameNumber => number = self.last_number,
            Fault::FarNumber => number += 1000,
            _ => {}
        }
        let mut iv: Vec<u8> = u64::from(number)
            .to_be_bytes()
            .into_iter()
            .cycle()
            .take(iv_len)
            .collect();
        if fault == Fault::SameIv && !self.last_iv.is_empty() {
            iv = self.last_iv.clone();
        }
        self.last_iv.clone_from(&iv);
        self.last_number = number;
        let mut spi = self.spi;
        if fault == Fault::Spi {
            spi[3] ^= 1;
        }
        let version = if bare { payload[0] >> 4 } else { 0 };
        let next_header = match version {
            0 => job.next_header,
            6 => 41,
            _ => 4,
        };
        let mut esp = [&spi[..], &number.to_be_bytes(), &iv, &payload].concat();
        let open = payload.len() + 2;
        let pad = open.next_multiple_of(self.suite.pad_align()) - open;
        esp.extend((1..=u8::MAX).take(pad));
        esp.extend([u8::try_from(pad).unwrap(), next_header]);
        esp.resize(esp.len() + self.suite.icv_len(), 0);
        assert!(packets::seal(&*self.cipher, &mut esp, 0));
        let outer = match bare {
            true => self.outer(esp.len(), fault),
            false => job.frame.data()[..usize::from(job.esp_off)].to_vec(),
        };
        job.esp_off = u16::try_from(outer.len()).unwrap();
        assert!(job.frame.set_data(&[outer, esp].concat()));
        job.esp_end = u16::try_from(job.frame.len()).unwrap();
        job.seq = number.into();
        JobStatus::Done
    }

    fn packet_open(&mut self, job: &mut EspJob, fault: Fault, bare: bool) -> JobStatus {
        let from = usize::from(job.esp_off);
        let mut esp = job.frame.data()[from..usize::from(job.esp_end)].to_vec();
        let number = u32::from_be_bytes(esp[4..8].try_into().unwrap());
        if fault != Fault::Gullible {
            if self.seen.contains(&number) {
                return JobStatus::Replayed;
            }
            if !packets::open(&*self.cipher, &mut esp, 0) {
                return JobStatus::IcvMismatch;
            }
            self.seen.insert(number);
        }
        let front = ESP_HEADER + self.suite.iv_len();
        let (payload, next) = match packets::unframe(self.suite, &esp, false) {
            Some((payload, next)) => (payload.to_vec(), next),
            None => (esp[front..esp.len() - self.suite.icv_len() - 2].to_vec(), 4),
        };
        if bare {
            assert!(job.frame.set_data(&payload));
            job.esp_off = 0;
        } else {
            esp[front..front + payload.len()].copy_from_slice(&payload);
            let data = job.frame.data_mut();
            data[from..from + esp.len()].copy_from_slice(&esp);
            let behind = data.len() - (from + front + payload.len());
            job.frame.trim_back(behind);
        }
        job.esp_end = u16::try_from(job.frame.len()).unwrap();
        job.next_header = next;
        JobStatus::Done
    }
}

impl EspEngine for TestEngine {
    fn capabilities(&self) -> &Capabilities {
        &self.caps
    }

    fn install(&mut self, sa: &SaEntry) -> Result<(), Refusal> {
        let used = sa.live.window.top() > 0 || sa.next_seq() > 1;
        if !self.caps.renumbers && used {
            return Err(Refusal::Unsupported {
                engine: "test",
                sa: sa.spec.name.clone(),
                reason: "it has carried packets".into(),
            });
        }
        if self.sas.len() >= self.caps.slots {
            return Err(Refusal::NoSlot {
                engine: "test",
                sa: sa.spec.name.clone(),
            });
        }
        let carried = Sa {
            cipher: packets::reference(sa.spec.suite, &sa.spec.keys).unwrap(),
            suite: sa.spec.suite,
            mode: sa.spec.offload,
            spi: sa.fixed.spi.to_be_bytes(),
            ends: (sa.spec.src, sa.spec.dst),
            next: 1,
            seen: HashSet::new(),
            last_iv: Vec::new(),
            last_number: 0,
        };
        self.sas.insert(sa.fixed.id, carried);
        let mut script = self.script.lock().unwrap();
        script.installed.push(sa.fixed.id);
        script.ever.push(sa.fixed.id);
        Ok(())
    }

    fn remove(&mut self, sa: SaId) {
        self.sas.remove(&sa);
        self.script.lock().unwrap().installed.retain(|i| *i != sa);
    }

    fn submit(&mut self, _: &Snapshot, jobs: &mut Vec<EspJob>, done: &mut Vec<EspJob>) {
        if !self.is_healthy() {
            done.extend(jobs.drain(..).map(|mut job| {
                job.status = JobStatus::Failed;
                job
            }));
            return;
        }
        self.script.lock().unwrap().offered += jobs.len();
        let room = self.script.lock().unwrap().room.unwrap_or(usize::MAX);
        let free = self.caps.in_flight - self.in_flight();
        let n = jobs.len().min(room).min(free);
        for job in jobs.drain(..n) {
            self.work(job);
        }
    }

    fn poll(&mut self, done: &mut Vec<EspJob>) {
        if !self.script.lock().unwrap().hangs {
            done.extend(self.queue.drain(..));
        }
    }

    fn in_flight(&self) -> usize {
        self.queue.len() + self.away.len()
    }

    fn is_healthy(&self) -> bool {
        !self.script.lock().unwrap().ill
    }

    fn reset(&mut self, done: &mut Vec<EspJob>) -> Result<(), EngineDead> {
        let mut script = self.script.lock().unwrap();
        script.resets += 1;
        if script.bad_resets > 0 {
            script.bad_resets -= 1;
            return Err(EngineDead {
                engine: "test",
                reason: "stuck".into(),
            });
        }
        script.hangs = false;
        script.ill = false;
        for mut job in self.queue.drain(..).chain(self.away.drain(..)) {
            job.status = JobStatus::Failed;
            done.push(job);
        }
        if !self.caps.renumbers {
            self.sas.clear();
            script.installed.clear();
        }
        for sa in self.sas.values_mut() {
            if sa.mode == OffloadMode::Packet {
                sa.seen.clear();
            }
        }
        Ok(())
    }
}

impl Drop for TestEngine {
    fn drop(&mut self) {
        let held = self.queue.drain(..).chain(self.away.drain(..));
        held.for_each(|job| job.frame.give_back());
    }
}
