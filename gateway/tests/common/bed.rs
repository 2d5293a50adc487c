//! The two gateways at work: what is sent, carried, injected and taken away, and the account that is drawn after each time.

use std::sync::Arc;

use gateway::app::Assembled;
use pmd::memory::MemoryQueue;
use pmd::{Arena, Frame, Pool, PortQueue};
use sa_store::drops::DropReason;
use sa_store::fib::{Fib, Route};
use sa_store::ledger::{Balance, WorkerCounters};
use sa_store::policy::Policy;

use super::{ip, udp};

/// One gateway, its host inside and the wire outside.
pub struct Site {
    pub gw: Assembled,
    pub host: MemoryQueue,
    pub(super) wire: MemoryQueue,
    /// The kernel's ends of the TAPs of the inside and the outside port, by worker.
    pub kernel: [Vec<MemoryQueue>; 2],
}

impl Site {
    /// Sum of a count over the workers.
    pub fn count(&self, of: impl Fn(&WorkerCounters) -> u64) -> u64 {
        self.gw.counters.iter().map(|c| of(c)).sum()
    }
}

pub struct Bed {
    pub arena: Arc<Arena>,
    pub pool: Pool,
    pub left: Site,
    pub right: Site,
    /// What the left gateway sent to the right one so far.
    pub wire: Vec<Vec<u8>>,
    /// Frames from the left gateway are recorded but do not reach the right one.
    pub cut: bool,
    /// Ends after the workers, before frames are counted.
    pub kept: Option<Box<dyn std::any::Any>>,
}

impl Bed {
    pub fn send_left(&mut self, packets: &[Vec<u8>]) {
        let mut frames = Vec::new();
        for p in packets {
            let mut f = self.pool.get().unwrap();
            assert!(f.set_data(p));
            frames.push(f);
        }
        assert_eq!(
            self.left.host.tx_burst(&mut self.pool, &mut frames),
            packets.len()
        );
    }

    pub fn send_right(&mut self, packets: &[Vec<u8>]) {
        for p in packets {
            put(&mut self.pool, &mut self.right.host, p);
        }
    }

    /// Runs both gateways until nothing moves; returns what their hosts received: (left, right).
    pub fn settle(&mut self) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
        let (mut l, mut r) = (Vec::new(), Vec::new());
        let mut quiet = 0;
        while quiet < 4 {
            let mut work = 0;
            work += self.rounds();
            for (host, out) in [
                (&mut self.left.host, &mut l),
                (&mut self.right.host, &mut r),
            ] {
                let mut got = Vec::new();
                work += host.rx_burst(&mut self.pool, &mut got, 64);
                for f in got {
                    out.push(f.data().to_vec());
                    self.pool.put(f);
                }
            }
            work += self.carry();
            quiet = if work == 0 { quiet + 1 } else { 0 };
        }
        for site in [&self.left, &self.right] {
            let b = Balance::of(site.gw.counters.iter().map(|c| &**c));
            assert!(b.holds(), "every frame is accounted for: {b:?}");
            assert_eq!(b.inside, 0, "{b:?}");
        }
        (l, r)
    }

    /// A round of every worker of both.
    fn rounds(&mut self) -> usize {
        let sites = [&mut self.left, &mut self.right];
        let workers = sites.into_iter().flat_map(|s| &mut s.gw.workers);
        workers.map(|w| w.round()).sum()
    }

    /// Carries frames between the two gateways.
    fn carry(&mut self) -> usize {
        let mut got = Vec::new();
        let n = self.left.wire.rx_burst(&mut self.pool, &mut got, 64);
        for f in &got {
            self.wire.push(f.data().to_vec());
        }
        if self.cut {
            self.pool.put_bulk(&mut got);
        } else {
            self.right.wire.tx_burst(&mut self.pool, &mut got);
        }
        assert!(got.is_empty());
        let m = self.right.wire.rx_burst(&mut self.pool, &mut got, 64);
        self.left.wire.tx_burst(&mut self.pool, &mut got);
        assert!(got.is_empty());
        n + m
    }

    /// Frames that reach the right gateway from outside.
    pub fn inject_right(&mut self, frames: &[Vec<u8>]) {
        for bytes in frames {
            put(&mut self.pool, &mut self.right.wire, bytes);
        }
    }

    /// Frames that reach the left gateway from outside.
    pub fn inject_left(&mut self, frames: &[Vec<u8>]) {
        for bytes in frames {
            put(&mut self.pool, &mut self.left.wire, bytes);
        }
    }

    /// What the right gateway makes of packets of its host; it does not reach the left one.
    pub fn sealed_by_right(&mut self, packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
        self.send_right(packets);
        let mut got = Vec::new();
        for _ in 0..4 {
            for w in &mut self.right.gw.workers {
                w.round();
            }
            self.right.wire.rx_burst(&mut self.pool, &mut got, 64);
        }
        let bytes = got.iter().map(|f| f.data().to_vec()).collect();
        self.pool.put_bulk(&mut got);
        bytes
    }

    /// What the left gateway gave to the kernel by a port's TAPs.
    pub fn kernel_got(&mut self, port: usize) -> Vec<Vec<u8>> {
        let mut got = Vec::new();
        for queue in &mut self.left.kernel[port] {
            while queue.rx_burst(&mut self.pool, &mut got, 64) != 0 {}
        }
        let bytes = got.iter().map(|f| f.data().to_vec()).collect();
        self.pool.put_bulk(&mut got);
        bytes
    }

    /// The left gateway's kernel sends frames by a port's TAP.
    pub fn kernel_sends(&mut self, port: usize, frames: &[Vec<u8>]) {
        for bytes in frames {
            put(&mut self.pool, &mut self.left.kernel[port][0], bytes);
        }
        // Workers do not look into silent TAPs in every round.
        std::thread::sleep(std::time::Duration::from_millis(1));
    }

    /// Runs the left gateway until what waits for a neighbour is given up.
    pub fn give_up_neighbours(&mut self) {
        let end = std::time::Instant::now() + std::time::Duration::from_millis(1100);
        while std::time::Instant::now() < end {
            self.settle_left();
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    /// Runs rounds without asking that nothing be held.
    pub fn settle_holding(&mut self) {
        for _ in 0..4 {
            self.rounds();
            self.carry();
        }
        let b = Balance::of(self.right.gw.counters.iter().map(|c| &**c));
        assert!(b.holds(), "{b:?}");
    }

    /// Runs the left gateway alone.
    pub fn settle_left(&mut self) {
        for _ in 0..4 {
            for w in &mut self.left.gw.workers {
                w.round();
            }
        }
    }

    /// Compiles the left gateway's outbound policies anew after a change.
    pub fn set_left_policies(&mut self, change: impl FnOnce(&mut Vec<Policy>)) {
        let snapshot = self.left.gw.store.current();
        let mut policies: Vec<_> = snapshot
            .spd_out
            .policies()
            .map(|(_, p)| p.clone())
            .collect();
        change(&mut policies);
        let tunnel = self.left.gw.store.tunnel("t");
        let out = snapshot
            .spd_out
            .updated(&policies, |_| Some(tunnel))
            .unwrap()
            .0;
        let mut draft = self.left.gw.store.draft();
        draft.set_spd(Arc::new(out), Arc::clone(&snapshot.spd_in));
        self.left.gw.store.publish(draft);
    }

    /// Replaces the left gateway's routes.
    pub fn set_left_routes(&mut self, routes: &[Route]) {
        let fib = Fib::build(
            routes,
            self.left.gw.store.current().fib.neighbours().clone(),
        )
        .unwrap();
        let mut draft = self.left.gw.store.draft();
        draft.set_fib(Arc::new(fib));
        self.left.gw.store.publish(draft);
    }

    /// The left gateway forgets the right one's link address.
    pub fn forget_left_peer(&mut self) {
        let snapshot = self.left.gw.store.current();
        let n = snapshot.fib.neighbours();
        n.forget(n.find(1, ip("192.0.2.2")).unwrap());
    }

    /// A packet from the left host that ends at its frame's last byte.
    pub fn send_without_tailroom(&mut self) {
        let mut f = self.pool.get().unwrap();
        f.reset_default();
        let room = f.tailroom();
        let bytes = udp("10.1.0.1", "10.2.0.1", 64, &[0; 1000]);
        let headroom = f.headroom();
        f.reset(headroom + room - bytes.len());
        f.append(bytes.len()).unwrap().copy_from_slice(&bytes);
        assert_eq!(f.tailroom(), 0);
        assert_eq!(self.left.host.tx_burst(&mut self.pool, &mut vec![f]), 1);
    }

    /// Takes every free frame: all but one, and that one.
    pub fn starve(&mut self) -> (Vec<Frame>, Frame) {
        let mut all = Vec::new();
        while let Some(f) = self.pool.get() {
            all.push(f);
        }
        let one = all.pop().unwrap();
        (all, one)
    }

    /// Sends bytes in this frame.
    pub fn send_frame_left(&mut self, mut frame: Frame, bytes: &[u8]) {
        assert!(frame.set_data(bytes));
        assert_eq!(self.left.host.tx_burst(&mut self.pool, &mut vec![frame]), 1);
    }

    /// Ends the starvation.
    pub fn feed(&mut self, mut frames: Vec<Frame>) {
        self.pool.put_bulk(&mut frames);
    }

    /// Asserts that so many frames came; if not, tells what was dropped instead.
    #[track_caller]
    pub fn expect(&self, frames: &[Vec<u8>], number: usize) {
        let dropped = [self.dropped(true), self.dropped(false)];
        assert_eq!(frames.len(), number, "dropped left, right: {dropped:?}");
    }

    pub fn dropped(&self, left: bool) -> Vec<(DropReason, u64)> {
        let site = if left { &self.left } else { &self.right };
        let sum = |r: DropReason| site.count(|c| c.dropped[r.index()].value());
        DropReason::ALL
            .iter()
            .map(|r| (*r, sum(*r)))
            .filter(|(_, n)| *n != 0)
            .collect()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        for site in [&mut self.left, &mut self.right] {
            for w in std::mem::take(&mut site.gw.workers) {
                w.shut_down();
            }
            site.host.drain(&mut self.pool);
            site.wire.drain(&mut self.pool);
            for queue in site.kernel.iter_mut().flatten() {
                queue.drain(&mut self.pool);
            }
        }
        self.kept = None;
        if !std::thread::panicking() {
            assert_eq!(self.arena.outstanding(), 0, "no frame is lost");
        }
    }
}

/// Sends one frame with these bytes.
fn put(pool: &mut Pool, queue: &mut MemoryQueue, bytes: &[u8]) {
    let mut frame = pool.get().unwrap();
    assert!(frame.set_data(bytes));
    assert_eq!(queue.tx_burst(pool, &mut vec![frame]), 1);
}
