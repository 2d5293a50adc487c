//! A control thread with a data path of counters alone.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use control::core::{Control, Parts};
use control::plane::{
    CaptureReport, CaptureRequest, DataPlane, DeviceReport, EngineReport, PortReport,
    ProviderReport, QueueCounters, WorkerView,
};
use sa_store::cipher::{CipherError, CipherFactory, NoCipher, SaCipher};
use sa_store::lease::{LeaseStore, LeaseWriter};
use sa_store::ledger::WorkerCounters;
use sa_store::policy::Policy;
use sa_store::report::Report;
use sa_store::sa::{Direction, SaKeys};
use sa_store::spd::PolicyIdx;
use sa_store::store::Store;
use sa_store::suite::Suite;

/// Nothing is ciphered, but keys must be as long as a provider wants them.
struct NoCiphers;

impl CipherFactory for NoCiphers {
    fn make(
        &self,
        suite: Suite,
        keys: &SaKeys,
        _: bool,
        _: Direction,
    ) -> Result<Box<dyn SaCipher>, CipherError> {
        let (want, got) = (suite.enc_key_len(), keys.enc.len());
        if want == got {
            Ok(Box::new(NoCipher))
        } else {
            Err(CipherError::KeyLength { suite, want, got })
        }
    }
    fn provider_for(&self, _: Suite) -> Option<&'static str> {
        Some("none")
    }
}

/// One worker that never runs, one port.
pub(crate) struct Plane {
    pub(crate) workers: Vec<WorkerView>,
    pub(crate) clock: AtomicU64,
    pub(crate) published: AtomicU64,
}

impl Default for Plane {
    fn default() -> Self {
        let worker = WorkerView {
            counters: Arc::new(WorkerCounters::default()),
            cpu: Some(0),
        };
        Self {
            workers: vec![worker],
            clock: AtomicU64::new(1_000_000_000),
            published: AtomicU64::new(0),
        }
    }
}

impl DataPlane for Plane {
    fn workers(&self) -> &[WorkerView] {
        &self.workers
    }
    fn ports(&self) -> Vec<PortReport> {
        vec![PortReport {
            name: "wan".into(),
            kind: "memory".into(),
            side: "outside".into(),
            mode: "shared frames".into(),
            mac: "02:00:00:00:00:01".into(),
            mtu: 1500,
            queues: vec![QueueCounters {
                rx_packets: 3,
                ..QueueCounters::default()
            }],
            device: Some(DeviceReport {
                link_up: true,
                mbps: 10_000,
                statistics: vec![("restarts".into(), 2)],
                errors: vec![("queue_stopped".into(), 1)],
            }),
        }]
    }
    fn providers(&self) -> Vec<ProviderReport> {
        vec![ProviderReport {
            suite: "aes-128-gcm-16".into(),
            provider: "none".into(),
            selected: true,
            ns_per_packet: Some(150.0),
        }]
    }
    fn engines(&self) -> Vec<EngineReport> {
        vec![EngineReport {
            name: "eip0".into(),
            kind: "eip93".into(),
            state: "recovering".into(),
            reason: "canary".into(),
            canaries: 5,
            canaries_failed: 1,
            quarantines: 1,
            resets: 3,
            resets_failed: 2,
            ..EngineReport::default()
        }]
    }
    fn policy_hits(&self, _: Direction, policy: PolicyIdx) -> Option<u64> {
        Some(u64::from(policy.0))
    }
    fn reports(&self, _: &mut dyn FnMut(Report)) {}
    fn now(&self) -> u64 {
        self.clock.load(Ordering::Relaxed)
    }
    fn alive(&self) -> bool {
        true
    }
    fn frames(&self) -> (u64, u64) {
        (7, 8)
    }
    fn published(&self, _: &[&Policy]) {
        self.published.fetch_add(1, Ordering::Relaxed);
    }
    fn capture_start(&self, r: &CaptureRequest) -> Result<(), String> {
        if r.port == "wan" {
            Ok(())
        } else {
            Err(format!("there is no port \"{}\"", r.port))
        }
    }
    fn capture_stop(&self, port: &str) -> Result<CaptureReport, String> {
        Err(format!("no capture runs on port \"{port}\""))
    }
}

/// Parts around a plane.
pub(crate) fn parts(plane: &Arc<Plane>, sa_files: Vec<PathBuf>) -> Parts {
    let leases = LeaseWriter::start(
        LeaseStore::throw_away().unwrap(),
        Box::new(|e| panic!("{e}")),
    )
    .unwrap();
    Parts {
        store: Store::new(1, 1 << 20),
        leases,
        ciphers: Arc::new(NoCiphers),
        plane: Arc::clone(plane) as Arc<dyn DataPlane>,
        sa_files,
        metrics_max_sas: 2,
        // Follows the kernel of the machine that the tests run on, and takes nothing over.
        kernel: Some(control::kernel::Plan {
            settings: control::kernel::Settings::default(),
            sockets: control::kernel::Sockets::open(1 << 20).unwrap(),
        }),
        rekey: control::rekey::Config::immediate(),
    }
}

/// A control over SA files.
#[allow(dead_code, reason = "each test file uses its part")]
pub(crate) fn control(plane: &Arc<Plane>, sa_files: Vec<PathBuf>) -> Control {
    Control::new(parts(plane, sa_files))
}

/// SA file of `n` tunnels; `salt` changes the keys of those below `changed`.
pub(crate) fn sa_file(n: usize, changed: usize, salt: u8) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    for i in 0..n {
        let (hi, lo) = (i / 250, i % 250);
        let s = if i < changed { salt } else { 0 };
        let _ = write!(
            text,
            "[[tunnel]]\nname = \"t{i}\"\nlocal = \"192.0.2.1\"\nremote = \"198.51.{hi}.{}\"\nsuite = \"aes-128-gcm-16\"\n\
             [[tunnel.sa]]\nname = \"t{i}-out-{s}\"\ndirection = \"out\"\nspi = {}\nkey = \"{s:02x}01{i:036x}\"\nfirst_use = true\n\
             [[tunnel.sa]]\nname = \"t{i}-in-{s}\"\ndirection = \"in\"\nspi = {}\nkey = \"{s:02x}02{i:036x}\"\nfirst_use = true\n\
             [[policy]]\nname = \"t{i}\"\ndirection = \"out\"\npriority = 10\naction = \"protect\"\ntunnel = \"t{i}\"\nsrc = \"10.0.0.0/8\"\ndst = \"172.{}.{lo}.0/24\"\n",
            lo + 1,
            0x1_0000 + i * 2 + usize::from(s) * 0x10_0000,
            0x1_0001 + i * 2 + usize::from(s) * 0x10_0000,
            16 + hi,
        );
    }
    text
}

/// Writes an SA file that only its owner can read, by renaming.
pub(crate) fn write_private(path: &std::path::Path, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    let temp = path.with_extension("new");
    std::fs::write(&temp, text).unwrap();
    std::fs::set_permissions(&temp, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::rename(temp, path).unwrap();
}
