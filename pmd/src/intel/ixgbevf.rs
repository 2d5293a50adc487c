//! Virtual functions of the 82599, X540 and X550.
//!
//! As many queues as the physical function's driver grants (it also owns RSS, so what is hashed is its decision); MSI-X, one
//! vector a queue where there are enough. The address is the one that the physical function gives. Everything that
//! concerns the whole controller is asked for over a mailbox ([`super::mailbox`]).
//!
//! Virtual functions of the 82599 cannot limit the length of packets, which may be jumbo by another function's wish: their
//! buffers are whole kilobytes, and frames of 2048 bytes are too small for an MTU of 1500.
//!
//! **Experimental**: written from the public datasheets and held against a model of both sides; no board has run it.
//!
//! Sections are those of the *Intel 82599 10 GbE Controller Datasheet*.

use std::sync::Arc;
use std::time::Duration;

use super::ixgbe::link_of;
use super::mailbox::{Granted, Mailbox};
use super::port::{Chip, CounterRegister, Fault, Filter, IntelPort, Plan};
use super::regs::{Regs, is_station};
use super::ring::Format;
use crate::device::{Device, DeviceError};
use crate::nic::{Driver, Link, NicOptions};
use crate::port::{MacAddr, Port, PortError};

const VF_82599: u16 = 0x10ed;
/// 82599, X540, X550.
const IDS: &[(u16, u16)] = &[(0x8086, VF_82599), (0x8086, 0x1515), (0x8086, 0x1565)];

// Registers in the datasheet's order (8.3).
const VFCTRL: usize = 0x0000;
const VFSTATUS: usize = 0x0008;
const VFLINKS: usize = 0x0010;
const VTEICR: usize = 0x0100;
const VTEICS: usize = 0x0104;
const VTEIMS: usize = 0x0108;
const VTEIMC: usize = 0x010c;
const VTEIAC: usize = 0x0110;
const VTEIAM: usize = 0x0114;
/// 4 registers.
const VTIVAR: usize = 0x0120;
const VFPSRTYPE: usize = 0x0300;
/// Registers of a receive queue, 0x40 apart.
const VFRDBAL: usize = 0x1000;
const VFRDBAH: usize = 0x1004;
const VFRDLEN: usize = 0x1008;
const VFRDH: usize = 0x1010;
const VFSRRCTL: usize = 0x1014;
const VFRDT: usize = 0x1018;
const VFRXDCTL: usize = 0x1028;
/// Registers of a transmit queue, 0x40 apart.
const VFTDBAL: usize = 0x2000;
const VFTDBAH: usize = 0x2004;
const VFTDLEN: usize = 0x2008;
const VFTDH: usize = 0x2010;
const VFTDT: usize = 0x2018;
const VFTXDCTL: usize = 0x2028;

const VFCTRL_RESET: u32 = 1 << 26;
const DCTL_ENABLE: u32 = 1 << 25;
/// X540 and later: the queue has a limit of length in the low 14 bits.
const RXDCTL_LIMITED: u32 = 1 << 15;
const TXDCTL_THRESHOLDS: u32 = 32 | 8 << 8;
const TXDCTL_FLUSH: u32 = 1 << 26;
const SRRCTL_ADVANCED_DROP: u32 = 1 << 25 | 1 << 28;
/// Several receive queues in the pool.
const PSRTYPE_QUEUES: u32 = 1 << 29;
const IVAR_VALID: u32 = 0x80;

const MAX_QUEUES: usize = 4;
const LARGEST_FRAME: usize = 9728 - 4;
const REGISTERS: usize = 0x3000;
const QUEUE_LIMIT: Duration = Duration::from_millis(100);

/// This family in the table of drivers.
pub const DRIVER: Driver = Driver {
    name: "ixgbevf",
    ids: IDS,
    experimental: true,
    open,
};

/// Opens a device of this family.
fn open(device: Arc<dyn Device>, options: &NicOptions) -> Result<Box<dyn Port>, PortError> {
    let chip = IxgbeVf::probe(device.as_ref()).map_err(|source| PortError::Device {
        port: options.name.clone(),
        source,
    })?;
    tracing::warn!(port = %options.name, "ixgbevf is experimental: no board has run this driver yet");
    Ok(Box::new(IntelPort::new(device, Box::new(chip), options)?))
}

#[derive(Debug)]
struct IxgbeVf {
    regs: Regs,
    mailbox: Mailbox,
    granted: Granted,
    /// Whether a queue can refuse packets by length.
    limited: bool,
}

impl IxgbeVf {
    /// Resets the function and asks who it is and what it may.
    fn probe(device: &dyn Device) -> Result<IxgbeVf, DeviceError> {
        let regs = Regs::new(device.region(0)?, REGISTERS)?;
        if regs.read(VFSTATUS) == u32::MAX {
            return Err(DeviceError::Gone);
        }
        let mailbox = Mailbox::new(regs.clone());
        stop(&regs);
        // The mailbox needs no transfers of the device.
        let granted = reset(&regs, &mailbox)?;
        if !is_station(granted.mac) {
            return Err(DeviceError::Broken(
                "the physical function gave no address (ip link set PF vf N mac …)".into(),
            ));
        }
        Ok(IxgbeVf {
            limited: device.pci().is_some_and(|p| p.device != VF_82599),
            regs,
            mailbox,
            granted,
        })
    }
}

impl Chip for IxgbeVf {
    fn kind(&self) -> &'static str {
        "ixgbevf"
    }

    fn mac(&self) -> MacAddr {
        self.granted.mac
    }

    fn queues(&self) -> usize {
        self.granted.queues.clamp(1, MAX_QUEUES)
    }

    fn largest_frame(&self) -> usize {
        LARGEST_FRAME
    }

    fn room_needed(&self, frame: usize) -> usize {
        if self.limited {
            frame
        } else {
            frame.next_multiple_of(1024)
        }
    }

    fn format(&self) -> Format {
        Format::ADVANCED_10G
    }

    fn regs(&self) -> &Regs {
        &self.regs
    }

    fn tails(&self, queue: usize) -> (usize, usize) {
        (VFRDT + 0x40 * queue, VFTDT + 0x40 * queue)
    }

    /// 4.6.3 for virtual functions (7.10.2, 8.3).
    fn start(&self, plan: &Plan) -> Result<(), DeviceError> {
        let r = &self.regs;
        // 1. Interrupts off, reset, handshake with the physical function.
        stop(r);
        let granted = reset(r, &self.mailbox)?;
        if granted.mac != self.granted.mac || granted.queues < plan.rings.len() {
            return Err(DeviceError::Broken(
                "the physical function changed the address or the queues".into(),
            ));
        }
        // 2. Longest packet, check sequence included.
        let longest = u32::try_from(plan.frame + 4).unwrap_or(0);
        self.mailbox.set_longest(longest)?;
        // 3. Receive queues; their tails move when they are on.
        let many = if plan.rings.len() > 1 {
            PSRTYPE_QUEUES
        } else {
            0
        };
        r.write(VFPSRTYPE, many);
        let (buffer, limit) = if self.limited {
            (plan.frame.div_ceil(1024), RXDCTL_LIMITED | longest & 0x3fff)
        } else {
            ((plan.room / 1024).min(16), 0)
        };
        let kilobytes = u32::try_from(buffer).unwrap_or(0);
        for (n, (rx, _)) in plan.rings.iter().enumerate() {
            let at = 0x40 * n;
            r.write_address(VFRDBAL + at, VFRDBAH + at, *rx);
            r.write(VFRDLEN + at, Plan::ring_bytes(plan.rx_entries));
            r.write(VFRDH + at, 0);
            r.write(VFRDT + at, 0);
            r.write(VFSRRCTL + at, SRRCTL_ADVANCED_DROP | kilobytes);
            r.write(VFRXDCTL + at, DCTL_ENABLE | limit);
            r.wait(
                VFRXDCTL + at,
                DCTL_ENABLE,
                DCTL_ENABLE,
                QUEUE_LIMIT,
                "start of a receive queue",
            )?;
        }
        // 4. Transmit queues.
        for (n, (_, tx)) in plan.rings.iter().enumerate() {
            let at = 0x40 * n;
            r.write_address(VFTDBAL + at, VFTDBAH + at, *tx);
            r.write(VFTDLEN + at, Plan::ring_bytes(plan.tx_entries));
            r.write(VFTDH + at, 0);
            r.write(VFTDT + at, 0);
            r.write(VFTXDCTL + at, DCTL_ENABLE | TXDCTL_THRESHOLDS);
            r.wait(
                VFTXDCTL + at,
                DCTL_ENABLE,
                DCTL_ENABLE,
                QUEUE_LIMIT,
                "start of a transmit queue",
            )?;
        }
        // 5. Interrupts: a vector a queue, cleared and masked by their message, none let through yet.
        if plan.msix {
            for queue in 0..plan.rings.len() {
                let shift = 16 * (queue & 1);
                let vector = IVAR_VALID | u32::try_from(queue & 3).unwrap_or(0);
                r.replace(VTIVAR + 4 * (queue >> 1), 0xff << shift, vector << shift);
            }
            r.write(VTEIAC, queue_bits(plan.rings.len()));
            r.write(VTEIAM, queue_bits(plan.rings.len()));
        }
        Ok(())
    }

    /// A virtual function cannot see its transfers end: it stops its queues, and bus-master off does the rest.
    fn stop(&self) -> Result<(), DeviceError> {
        stop(&self.regs);
        self.regs.write(VFCTRL, VFCTRL_RESET);
        Err(DeviceError::Unsupported("waiting for the end of transfers"))
    }

    fn set_filter(&self, filter: Filter) -> Result<(), DeviceError> {
        self.mailbox
            .set_filter(filter.promiscuous, filter.all_multicast)
    }

    fn link(&self) -> Option<Link> {
        if self.regs.read(VFSTATUS) == u32::MAX {
            return None;
        }
        Some(link_of(self.regs.read(VFLINKS)))
    }

    fn fault(&self) -> Option<Fault> {
        self.mailbox
            .parent_was_reset()
            .then_some(Fault::ParentReset)
    }

    fn arm(&self, queue: usize, on: bool) {
        // What happened while masked was polled; left there it would interrupt at once.
        self.regs.write(VTEICR, 1 << (queue & 3));
        self.regs
            .write(if on { VTEIMS } else { VTEIMC }, 1 << (queue & 3));
    }

    fn wake(&self, queues: usize) {
        self.regs.write(VTEIMS, queue_bits(queues));
        self.regs.write(VTEICS, queue_bits(queues));
    }

    /// The function's own counters wrap and do not clear, and count only what went well.
    fn counters(&self) -> &'static [CounterRegister] {
        &[]
    }

    fn queue_drops(&self, _: usize) -> u32 {
        0
    }
}

fn stop(r: &Regs) {
    r.write(VTEIMC, u32::MAX);
    for n in 0..MAX_QUEUES {
        r.clear(VFRXDCTL + 0x40 * n, DCTL_ENABLE);
        if r.read(VFTXDCTL + 0x40 * n) & DCTL_ENABLE != 0 {
            r.write(VFTXDCTL + 0x40 * n, TXDCTL_FLUSH);
        }
    }
}

/// Resets the function; the physical function's driver answers.
fn reset(r: &Regs, mailbox: &Mailbox) -> Result<Granted, DeviceError> {
    mailbox.forget();
    r.write(VFCTRL, VFCTRL_RESET);
    let granted = mailbox.hello()?;
    r.write(VTEIMC, u32::MAX);
    Ok(granted)
}

/// The causes of the first `queues` vectors.
fn queue_bits(queues: usize) -> u32 {
    (1u32 << queues.min(MAX_QUEUES)) - 1
}
