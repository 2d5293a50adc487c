//! Two gateways, the wire between them, and the traffic of the hosts behind them.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use etherparse::PacketBuilder;
use gateway::crypto::select::{Choice, Compare, Selection};
use pmd::memory::{MemoryPort, MemoryQueue, PairConfig, pair};
use pmd::{Arena, ArenaConfig, Frame, Pool, Port, PortQueue};

use super::site::Site;
use super::{HOST, TUNNELS};

/// Frames that the test has under way in each direction.
const WINDOW: u64 = 48;
/// Ethernet, IPv4, UDP.
const HEADERS: usize = 14 + 20 + 8;

pub(super) struct Bed {
    pub(super) sites: [Site; 2],
    /// Hosts inside, and the wire's two ends.
    hosts: [End; 2],
    wires: [End; 2],
    macs: [[u8; 6]; 2],
    flows: [Flow; 2],
    wire: Wire,
    _arena: Arc<Arena>,
}

impl Bed {
    pub(super) fn start(dir: &Path, rekeys: [control::rekey::Config; 2]) -> Self {
        let arena = Arena::new(ArenaConfig {
            frames: 8192,
            name: "rekey".into(),
            ..ArenaConfig::default()
        })
        .unwrap();
        let crypto = Arc::new(Selection::new(Choice::Auto, Compare::Features).unwrap());
        let mut macs = [[0; 6]; 2];
        let mut sites = Vec::new();
        let (mut hosts, mut wires) = (Vec::new(), Vec::new());
        for (site, rekey) in [0_u8, 1].into_iter().zip(rekeys) {
            let config = PairConfig {
                mtu: 1600,
                ..PairConfig::default()
            };
            let (host, inside) = pair("host", "inside", &config);
            let (wire, outside) = pair("wire", "outside", &config);
            macs[usize::from(site)] = inside.info().mac.0;
            hosts.push(End::new(host, &arena));
            wires.push(End::new(wire, &arena));
            let files = dir.join(site.to_string());
            sites.push(Site::start(
                site,
                &arena,
                &crypto,
                [inside, outside],
                files,
                rekey,
            ));
        }
        let two = |v: Vec<End>| <[End; 2]>::try_from(v).ok().unwrap();
        Self {
            sites: sites.try_into().ok().unwrap(),
            hosts: two(hosts),
            wires: two(wires),
            macs,
            flows: Default::default(),
            wire: Wire::default(),
            _arena: arena,
        }
    }

    /// Sends, carries the wire, receives. Returns whether anything moved.
    fn round(&mut self, send: bool) -> bool {
        let mut moved = false;
        for from in [0_usize, 1] {
            let flow = &mut self.flows[from];
            let room = WINDOW.saturating_sub(flow.sent - flow.got.len() as u64);
            for _ in 0..if send { room } else { 0 } {
                let site = u8::try_from(from).unwrap();
                self.hosts[from].send(&packet(site, flow.sent, self.macs[from]));
                flow.sent += 1;
                moved = true;
            }
            self.hosts[from].push();
            for frame in self.wires[from].take() {
                self.wire.see(&frame);
                self.wires[1 - from].send(&frame);
                moved = true;
            }
            self.wires[1 - from].push();
            for frame in self.hosts[1 - from].take() {
                let n = u64::from_be_bytes(frame[HEADERS..HEADERS + 8].try_into().unwrap());
                assert!(self.flows[from].got.insert(n), "packet {n} came twice");
                moved = true;
            }
        }
        moved
    }

    /// Traffic until `done` says so, asked now and then, at most for so long.
    pub(super) fn run(&mut self, longest: Duration, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + longest;
        let mut next = Instant::now();
        loop {
            if !self.round(true) {
                std::thread::yield_now();
            }
            // Some thousand packets a second are enough, and the gateways need the CPU too.
            std::thread::sleep(Duration::from_millis(2));
            let now = Instant::now();
            if now >= next {
                next = now + Duration::from_millis(100);
                if done(self) {
                    return;
                }
                assert!(
                    now < deadline,
                    "{:?}",
                    self.sites.each_ref().map(Site::rekeys)
                );
            }
        }
    }

    /// Everything that was sent has arrived, once; the gateways end with nothing dropped.
    pub(super) fn finish(mut self) -> (u64, usize) {
        let deadline = Instant::now() + Duration::from_secs(10);
        let left = |b: &Self| b.flows.iter().any(|f| (f.got.len() as u64) < f.sent);
        while left(&self) && Instant::now() < deadline {
            if !self.round(false) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let mut sent = 0;
        for (from, f) in self.flows.iter().enumerate() {
            let lost = f.sent - f.got.len() as u64;
            assert_eq!(lost, 0, "from site {from}: {lost} of {} lost", f.sent);
            sent += f.sent;
        }
        let [a, b] = self.sites;
        a.stop("site 0");
        b.stop("site 1");
        for end in self.hosts.iter_mut().chain(&mut self.wires) {
            end.queue.drain(&mut end.pool);
        }
        (sent, self.wire.numbers.len())
    }
}

/// The test's end of a port.
struct End {
    queue: MemoryQueue,
    pool: Pool,
    pending: Vec<Frame>,
    got: Vec<Frame>,
}

impl End {
    fn new(port: MemoryPort, arena: &Arc<Arena>) -> Self {
        Self {
            queue: port.open(1, arena).unwrap().pop().unwrap(),
            pool: Pool::new(arena, 256),
            pending: Vec::new(),
            got: Vec::new(),
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        let mut frame = self.pool.get().expect("a frame");
        assert!(frame.set_data(bytes));
        self.pending.push(frame);
    }

    /// What has arrived, copied.
    fn take(&mut self) -> Vec<Vec<u8>> {
        self.queue.rx_burst(&mut self.pool, &mut self.got, 64);
        let mut all = Vec::new();
        for frame in self.got.drain(..) {
            all.push(frame.data().to_vec());
            self.pool.put(frame);
        }
        all
    }

    fn push(&mut self) {
        if !self.pending.is_empty() {
            self.queue.tx_burst(&mut self.pool, &mut self.pending);
        }
    }
}

/// One direction's traffic: numbered packets, round robin over the tunnels.
#[derive(Default)]
struct Flow {
    sent: u64,
    got: HashSet<u64>,
}

fn packet(from: u8, n: u64, gateway_mac: [u8; 6]) -> Vec<u8> {
    let tunnel = u8::try_from(n % TUNNELS as u64).unwrap();
    let addr = |s: u8| [10, s, tunnel, 9];
    let mut out = Vec::new();
    PacketBuilder::ethernet2(HOST, gateway_mac)
        .ipv4(addr(from), addr(1 - from), 64)
        .udp(1000, 2000)
        .write(&mut out, &[n.to_be_bytes(), [7; 8]].concat())
        .unwrap();
    out
}

/// Every packet on the wire between the gateways: SPIs, numbers, IVs.
#[derive(Default)]
struct Wire {
    numbers: HashSet<(u32, u32)>,
    ivs: HashSet<(u32, [u8; 8])>,
}

impl Wire {
    fn see(&mut self, frame: &[u8]) {
        let esp = &frame[34..];
        let word = |at: usize| u32::from_be_bytes(esp[at..at + 4].try_into().unwrap());
        assert_eq!(frame[23], 50, "only ESP leaves");
        assert!(
            self.numbers.insert((word(0), word(4))),
            "number {} twice under SPI {:08x}",
            word(4),
            word(0)
        );
        let iv = esp[8..16].try_into().unwrap();
        assert!(self.ivs.insert((word(0), iv)), "a nonce twice");
    }
}
