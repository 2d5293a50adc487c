//! The gateway's end.

use std::path::PathBuf;
use std::sync::Arc;

use pmd::arena::ArenaConfig;
use pmd::nic::NicControl;
use pmd::port::Port;
use pmd::virtio::vhost::{Place, Role, VhostConfig, VhostPort};
use pmd::{Arena, Frame, Pool, PortQueue};

/// What the gateway has: the port's queues, and frames.
pub(super) struct Gateway {
    pub(super) queues: Vec<Box<dyn PortQueue>>,
    pub(super) control: Arc<dyn NicControl>,
    pub(super) arena: Arc<Arena>,
    pub(super) pool: Pool,
    pub(super) socket: PathBuf,
    pub(super) _dir: tempfile::TempDir,
}

impl Gateway {
    pub(super) fn new(pairs: usize) -> Gateway {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vhost.sock");
        let arena = Arena::new(ArenaConfig {
            frames: 512,
            ..ArenaConfig::default()
        })
        .unwrap();
        let port = VhostPort::open(VhostConfig {
            name: "v".into(),
            place: Place {
                path: socket.clone(),
                role: Role::Server,
            },
            mode: 0o600,
            mtu: 1500,
        })
        .unwrap();
        let control = port.control().unwrap();
        let queues = Box::new(port).queues(pairs, &arena).unwrap();
        let pool = Pool::new(&arena, 64);
        Gateway {
            queues,
            control,
            arena,
            pool,
            socket,
            _dir: dir,
        }
    }

    pub(super) fn error(&self, name: &str) -> u64 {
        let all = self.control.device_errors();
        all.iter().find(|(n, _)| *n == name).unwrap().1
    }

    pub(super) fn receive(&mut self, queue: usize) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        self.queues[queue].rx_burst(&mut self.pool, &mut frames, 64);
        let got = frames.iter().map(|f| f.data().to_vec()).collect();
        self.pool.put_bulk(&mut frames);
        got
    }

    pub(super) fn frame(&mut self, bytes: &[u8]) -> Frame {
        let mut frame = self.pool.get().unwrap();
        assert!(frame.set_data(bytes));
        frame
    }

    pub(super) fn send(&mut self, queue: usize, packets: &[Vec<u8>]) -> usize {
        let mut frames: Vec<Frame> = packets.iter().map(|p| self.frame(p)).collect();
        let n = self.queues[queue].tx_burst(&mut self.pool, &mut frames);
        self.pool.put_bulk(&mut frames);
        n
    }

    /// All frames are accounted for once the queues are gone.
    pub(super) fn close(mut self) {
        for q in &mut self.queues {
            q.drain(&mut self.pool);
        }
        self.queues.clear();
        assert_eq!(self.arena.outstanding(), 0);
        assert!(!self.socket.exists(), "the socket stays behind");
    }
}
