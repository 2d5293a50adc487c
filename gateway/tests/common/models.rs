//! Models of engines, opened as the gateway opens the engines of its configuration.

use std::sync::{Arc, Mutex};

use esplanade_model::eip93::{self, Eip93};
use esplanade_model::soe::{self, Soe};
use esplanade_model::{KnobArgs, Knobs, Model, Running, Server};
use gateway::app::OpenEngines;
use gateway::config::{DeviceAt, EngineConfig, EngineType};
use gateway::crypto::select::{Choice, Compare, Selection};
use pmd::Arena;
use sa_store::cipher::CipherFactory;
use std::time::Duration;

/// A model on its socket.
pub struct Modelled {
    pub config: EngineConfig,
    pub knobs: Arc<Knobs>,
    pub running: Running,
    _dir: tempfile::TempDir,
}

fn serve(name: &str, kind: EngineType, knobs: Arc<Knobs>, model: Box<dyn Model>) -> Modelled {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("engine");
    let running = Server::bind(&path).unwrap().spawn(model).unwrap();
    Modelled {
        config: EngineConfig {
            name: name.into(),
            kind,
            at: DeviceAt::Socket(path),
            worker: 0,
            verify: 1.0,
            canary: Duration::from_millis(100),
            max_lost: 100,
            deadline: Duration::from_secs(1),
        },
        knobs,
        running,
        _dir: dir,
    }
}

pub fn eip93() -> Modelled {
    let knobs = Knobs::new(&KnobArgs::default());
    let model = Eip93::new(eip93::Switches::default(), Arc::clone(&knobs));
    let kind = EngineType::Eip93(pmd::eip93::Unknowns::default());
    serve("eip0", kind, knobs, Box::new(model))
}

pub fn soe() -> Modelled {
    let knobs = Arc::<Knobs>::default();
    let model = Soe::new(soe::Switches::default(), Arc::clone(&knobs));
    let kind = EngineType::Soe(pmd::soe::Assumptions::default());
    serve("soe0", kind, knobs, Box::new(model))
}

/// Opens the models at one site of a bed. What tells of them goes to `kept`.
pub fn open(
    models: &[Modelled],
    arena: &Arc<Arena>,
    kept: &Mutex<Vec<OpenEngines>>,
) -> Vec<Arc<gateway::engine::Desk>> {
    let mut engines = OpenEngines::default();
    let provider = Choice::Provider(gateway::crypto::ProviderId::RustCrypto);
    let ciphers: Arc<dyn CipherFactory> =
        Arc::new(Selection::new(provider, Compare::Features).unwrap());
    for m in models {
        engines.open(&m.config, arena, &ciphers, 1 << 20).unwrap();
    }
    let desks = engines.desks.clone();
    kept.lock().unwrap().push(engines);
    desks
}
