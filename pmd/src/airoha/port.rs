//! One port of the block: frames through ring 0 of its QDMA instance.

use std::sync::Arc;

use super::BlockControl;
use crate::arena::Arena;
use crate::frame::Frame;
use crate::nic::NicControl;
use crate::pool::Pool;
use crate::port::{MacAddr, Port, PortError, PortInfo, PortQueue, PortQueueStats, check_queues};
use crate::qdma::hub::SharedHub;
use crate::qdma::{PsePort, TxMsg};

/// The transmit ring of ports.
const RING: u8 = 0;
/// Shorter frames are filled up with zeros.
const SHORTEST: usize = 60;
const ETHERNET: u32 = 18;

/// Where the block's MACs are: the ports of the packet switch that lead to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Gdm(u8);

impl Gdm {
    /// Number 1 (the switch of the LAN ports) to 4.
    pub fn new(number: u8) -> Option<Gdm> {
        (1..=4).contains(&number).then_some(Gdm(number))
    }

    /// 1 to 4.
    pub fn number(self) -> u8 {
        self.0
    }

    /// The QDMA instance that the public drivers serve it with: 0 for the LAN ports, 1 for the others.
    pub fn usual_instance(self) -> u8 {
        u8::from(self.0 != 1)
    }

    /// Where its frames go to in the packet switch.
    fn pse(self) -> PsePort {
        match self.0 {
            1 => PsePort::GDM1,
            2 => PsePort::GDM2,
            3 => PsePort::GDM3,
            _ => PsePort::GDM4,
        }
    }

    /// What received frames name as their source, first and last such number. The public driver takes 0x10 to 0x14 for the
    /// first, and the number itself for the others.
    fn sources(self) -> (u8, u8) {
        match self.0 {
            1 => (0x10, 0x14),
            n => (n, n),
        }
    }
}

/// A port to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortOptions {
    /// Name.
    pub name: String,
    /// Which of the block's MACs.
    pub gdm: Gdm,
    /// QDMA instance, 0 or 1: see [`Gdm::usual_instance`].
    pub instance: u8,
    /// Own address, as the kernel knew it.
    pub mac: MacAddr,
    /// Largest IP packet.
    pub mtu: u32,
}

/// A port before its queue is opened.
pub struct AirohaPort {
    hub: SharedHub,
    control: Arc<BlockControl>,
    options: PortOptions,
}

impl AirohaPort {
    pub(super) fn new(
        hub: SharedHub,
        control: Arc<BlockControl>,
        options: PortOptions,
    ) -> AirohaPort {
        AirohaPort {
            hub,
            control,
            options,
        }
    }
}

impl Port for AirohaPort {
    fn info(&self) -> PortInfo {
        PortInfo {
            name: self.options.name.clone(),
            kind: "airoha",
            mac: self.options.mac,
            mtu: self.options.mtu,
            max_queues: 1,
            mode: "zero-copy, experimental".into(),
        }
    }

    fn control(&self) -> Option<Arc<dyn NicControl>> {
        Some(Arc::clone(&self.control) as _)
    }

    fn queues(
        self: Box<Self>,
        n: usize,
        arena: &Arc<Arena>,
    ) -> Result<Vec<Box<dyn PortQueue>>, PortError> {
        let name = &self.options.name;
        check_queues(name, n, 1)?;
        let needed = usize::try_from(self.options.mtu.saturating_add(ETHERNET));
        let (needed, room) = (needed.unwrap_or(usize::MAX), arena.largest_packet(0));
        if needed > room {
            return Err(PortError::FrameTooSmall {
                port: name.clone(),
                needed,
                room,
            });
        }
        let PortOptions { instance, gdm, .. } = self.options;
        let (cookie, attached) = {
            let mut hub = self.hub.lock();
            if hub.arena_id() != arena.id() {
                return Err(PortError::ForeignArena { port: name.clone() });
            }
            (hub.new_cookie(), hub.attach_port(instance, gdm.sources()))
        };
        if !attached {
            return Err(PortError::Setting {
                port: name.clone(),
                reason: format!("GDM {} is another port's", gdm.number()),
            });
        }
        Ok(vec![Box::new(AirohaQueue {
            hub: self.hub.clone(),
            control: Arc::clone(&self.control),
            options: self.options.clone(),
            cookie,
            stats: Arc::default(),
        })])
    }
}

/// The one queue pair of a port.
struct AirohaQueue {
    hub: SharedHub,
    control: Arc<BlockControl>,
    options: PortOptions,
    cookie: u64,
    stats: Arc<PortQueueStats>,
}

impl PortQueue for AirohaQueue {
    fn rx_burst(&mut self, _pool: &mut Pool, out: &mut Vec<Frame>, max: usize) -> usize {
        let Some(mut hub) = self.hub.try_lock() else {
            return 0;
        };
        if self.control.take_restart() {
            let done = hub.stop().and_then(|()| hub.start());
            if let Err(error) = done {
                tracing::error!(port = %self.options.name, %error, "rings do not start anew");
                return 0;
            }
        }
        hub.pump();
        let before = out.len();
        let (n, lost) = hub.take_port(self.options.instance, self.options.gdm.sources(), out, max);
        self.stats.rx_dropped.add(lost);
        let dropped = hub.take_tx_errors(self.cookie);
        self.stats.tx_errors.add(dropped);
        if n > 0 {
            let bytes = out[before..].iter().map(Frame::len).sum();
            self.stats.note_rx(n, bytes);
        }
        n
    }

    fn tx_burst(&mut self, pool: &mut Pool, frames: &mut Vec<Frame>) -> usize {
        let Some(mut hub) = self.hub.try_lock() else {
            return 0;
        };
        let mut room = hub.room(self.options.instance, RING);
        let fit = frames.len().min(room as usize);
        let (mut sent, mut bytes, mut errors) = (0, 0, 0);
        for mut frame in frames.drain(..fit) {
            if let Some(missing) = SHORTEST.checked_sub(frame.len())
                && let Some(zeros) = frame.append(missing)
            {
                zeros.fill(0);
            }
            let len = frame.len();
            let msg = TxMsg::frame(self.options.gdm.pse());
            let done = if len < SHORTEST || room == 0 {
                Err(frame)
            } else {
                hub.send(self.options.instance, RING, frame, msg, self.cookie)
            };
            match done {
                Ok(()) => {
                    room -= 1;
                    sent += 1;
                    bytes += len;
                }
                Err(frame) => {
                    errors += 1;
                    pool.put(frame);
                }
            }
        }
        hub.kick();
        self.stats.note_tx(sent, bytes);
        self.stats.tx_errors.add(errors);
        fit
    }

    fn flush(&mut self, _pool: &mut Pool) {
        if let Some(mut hub) = self.hub.try_lock() {
            hub.pump();
        }
    }

    fn stats(&self) -> &Arc<PortQueueStats> {
        &self.stats
    }

    /// The hub keeps its rings, which serve other ports and the engine; this port's frames go home.
    fn drain(&mut self, _pool: &mut Pool) {
        let mut hub = self.hub.lock();
        hub.detach_port(self.options.instance, self.options.gdm.sources());
    }
}

impl Drop for AirohaQueue {
    fn drop(&mut self) {
        let mut hub = self.hub.lock();
        hub.detach_port(self.options.instance, self.options.gdm.sources());
    }
}
