//! 82574-class gigabit controllers, and the I217 to I219 where their registers agree.
//!
//! - Two receive and two transmit queues; extended receive descriptors.
//! - RSS hashes addresses (and TCP ports), not the SPI of ESP: all packets between two gateways meet in one queue, and are
//!   handed to the worker that owns their SA.
//! - Interrupts: 82574 MSI-X, one vector a queue. The I217 to I219 have one MSI: with two queues they must be polled.
//! - Buffers have 2048 bytes for frames that are not longer than 1518, and n × 1024 for jumbo frames up to 9018.
//! - UDP checksums over IPv6 are left to a device with one queue ([`crate::checksum`]). VLAN tags stay in the frame.
//!
//! Verified on QEMU's 82574 model. The I217 to I219 were not: their PHY is taken as the firmware left it.
//!
//! Sections are those of the *Intel 82574 GbE Controller Family Datasheet*.

use std::sync::Arc;

use super::gigabit::{self, *};
use super::port::{Chip, CounterRegister, Fault, Filter, IntelPort, Plan};
use super::regs::{Regs, is_station, mac_of};
use super::ring::Format;
use crate::device::pci::CAP_MSIX;
use crate::device::{Device, DeviceError};
use crate::nic::{Driver, Link, NicOptions};
use crate::port::{MacAddr, Port, PortError};

/// 82574L, 82574LA, 82583V.
const IDS: &[(u16, u16)] = &[(0x8086, 0x10d3), (0x8086, 0x10f6), (0x8086, 0x150c)];
/// I217, I218 and I219 of the chipsets from Lynx Point to Cannon Point.
const PCH_IDS: &[(u16, u16)] = &[
    (0x8086, 0x153a),
    (0x8086, 0x153b),
    (0x8086, 0x155a),
    (0x8086, 0x1559),
    (0x8086, 0x15a0),
    (0x8086, 0x15a1),
    (0x8086, 0x15a2),
    (0x8086, 0x15a3),
    (0x8086, 0x156f),
    (0x8086, 0x1570),
    (0x8086, 0x15b7),
    (0x8086, 0x15b8),
    (0x8086, 0x15d7),
    (0x8086, 0x15d8),
    (0x8086, 0x15e3),
    (0x8086, 0x15bd),
    (0x8086, 0x15be),
    (0x8086, 0x15bb),
    (0x8086, 0x15bc),
];

// Registers of this family alone, in the datasheet's order (10.2).
const EIAC: usize = 0x00dc;
const IAM: usize = 0x00e0;
const IVAR: usize = 0x00e4;
const GCR: usize = 0x5b00;
/// Registers of a receive queue, 0x100 apart.
const RDBAL: usize = 0x2800;
const RDBAH: usize = 0x2804;
const RDLEN: usize = 0x2808;
const RDH: usize = 0x2810;
const RDT: usize = 0x2818;
const RXDCTL: usize = 0x2828;
/// Registers of a transmit queue, 0x100 apart.
const TDBAL: usize = 0x3800;
const TDBAH: usize = 0x3804;
const TDLEN: usize = 0x3808;
const TDH: usize = 0x3810;
const TDT: usize = 0x3818;
const TXDCTL: usize = 0x3828;
const TARC: usize = 0x3840;

const CTRL_EXT_RESERVED_SET: u32 = 1 << 22;
const CTRL_EXT_RESERVED_CLEAR: u32 = 1 << 23;
/// Bits of [`IAM`] are masked when their MSI-X message is sent.
const CTRL_EXT_AUTO_MASK: u32 = 1 << 24;
const CTRL_EXT_PENDING_CLEAR: u32 = 1 << 31;
const CTRL_RESERVED_CLEAR: u32 = 1 << 29;
const GCR_RESERVED_SET: u32 = 1 << 22;
/// Interrupt causes of receive queue 0; queue 1 is the next bit.
const CAUSE_RX_QUEUE_0: u32 = 1 << 20;
/// Interrupt causes of receiving without MSI-X: timer, minimum of descriptors, overrun.
const CAUSE_RX: u32 = 1 << 7 | 1 << 6 | 1 << 4;
/// Receive queue n → vector n, valid; no others.
const IVAR_QUEUES: u32 = 0x8 | 0x9 << 4;
/// Thresholds count descriptors, not cache lines.
const DCTL_DESCRIPTORS: u32 = 1 << 24;
/// Prefetch below 32 when 4 are there, write back each.
const RXDCTL_THRESHOLDS: u32 = 32 | 4 << 8 | 1 << 16;
const TXDCTL_THRESHOLDS: u32 = 31 | 1 << 8 | 1 << 16;
const TXDCTL_RESERVED_SET: u32 = 1 << 22;
const TARC_RESERVED_SET: u32 = 1 << 26;
const TCTL_MULTIPLE_READS: u32 = 1 << 28;
/// Copper: 8, 8, 6 byte times.
const TIPG_COPPER: u32 = 8 | 8 << 10 | 6 << 20;
const RFCTL_EXTENDED: u32 = 1 << 15;
/// RSS over TCP and IPv4, IPv4, TCP and IPv6, IPv6.
const MRQC_RSS: u32 = 1 | 1 << 16 | 1 << 17 | 1 << 18 | 1 << 20;

/// Without long packets the device drops what is longer, check sequence included.
const LONGEST_SHORT: usize = 1522;
/// 10.2.5.1 names no other limit than the 9018 bytes of the feature list.
const LARGEST_FRAME: usize = 9018;
const REGISTERS: usize = 0x6000;

/// This family in the table of drivers.
pub const DRIVER: Driver = Driver {
    name: "e1000e",
    ids: IDS,
    experimental: false,
    open,
};

/// The chipsets' controllers: the same registers, never tried.
pub const PCH_DRIVER: Driver = Driver {
    name: "e1000e-pch",
    ids: PCH_IDS,
    experimental: true,
    open,
};

/// Opens a device of this family.
fn open(device: Arc<dyn Device>, options: &NicOptions) -> Result<Box<dyn Port>, PortError> {
    let chip = E1000e::probe(device.as_ref()).map_err(|source| PortError::Device {
        port: options.name.clone(),
        source,
    })?;
    Ok(Box::new(IntelPort::new(device, Box::new(chip), options)?))
}

#[derive(Debug)]
struct E1000e {
    regs: Regs,
    mac: MacAddr,
    msix: bool,
}

impl E1000e {
    /// Resets the device and reads who it is.
    fn probe(device: &dyn Device) -> Result<E1000e, DeviceError> {
        let regs = Regs::new(device.region(0)?, REGISTERS)?;
        if regs.read(STATUS) == u32::MAX {
            return Err(DeviceError::Gone);
        }
        // Transfers of an earlier owner may be under way; the reset ends them in any case.
        let _ = stop(&regs);
        reset(&regs)?;
        let mac = mac_of(regs.read(RAL0), regs.read(RAH0));
        if !is_station(mac) {
            return Err(DeviceError::Broken(format!("station address {mac}")));
        }
        let msix = |p: &crate::device::PciInfo| p.capabilities.iter().any(|c| c.id == CAP_MSIX);
        Ok(E1000e {
            msix: device.pci().is_some_and(msix),
            regs,
            mac,
        })
    }

    /// Buffer size bits of RCTL.
    fn buffer_bits(frame: usize, room: usize) -> u32 {
        if frame + 4 <= LONGEST_SHORT {
            // BSIZE 0: 2048 bytes, of which at most 1522 are written.
            return 0;
        }
        // FLXBUF: whole kilobytes, 15 at most.
        let kilobytes = u32::try_from(room / 1024).unwrap_or(15).min(15);
        RCTL_LONG_PACKETS | kilobytes << 27
    }
}

impl Chip for E1000e {
    fn kind(&self) -> &'static str {
        "e1000e"
    }

    fn mac(&self) -> MacAddr {
        self.mac
    }

    fn queues(&self) -> usize {
        2
    }

    fn largest_frame(&self) -> usize {
        LARGEST_FRAME
    }

    fn room_needed(&self, frame: usize) -> usize {
        if frame + 4 <= LONGEST_SHORT {
            LONGEST_SHORT
        } else {
            frame.next_multiple_of(1024)
        }
    }

    fn format(&self) -> Format {
        Format::EXTENDED
    }

    /// The datasheet does not say whose the context is when there are two queues.
    fn completes_checksums(&self, queues: usize) -> bool {
        queues == 1
    }

    fn regs(&self) -> &Regs {
        &self.regs
    }

    fn tails(&self, queue: usize) -> (usize, usize) {
        (RDT + 0x100 * queue, TDT + 0x100 * queue)
    }

    /// 4.6, Software Initialization Sequence.
    fn start(&self, plan: &Plan) -> Result<(), DeviceError> {
        let r = &self.regs;
        // 1. Interrupts during initialization: all off (4.6.1).
        // 2. Global reset (4.6.2), when earlier transfers are over; the reset ends what does not end by itself.
        let _ = stop(r);
        reset(r)?;
        // 3. General configuration (4.6.2): link up, no forced speed, no flow control, tags stay; the bits that the
        //    datasheet wants otherwise than the reset leaves them.
        r.replace(
            CTRL,
            CTRL_MASTER_DISABLE
                | CTRL_SET_LINK_UP
                | CTRL_FORCE_SPEED
                | CTRL_FORCE_DUPLEX
                | CTRL_RX_FLOW_CONTROL
                | CTRL_TX_FLOW_CONTROL
                | CTRL_RESERVED_CLEAR
                | CTRL_VLAN_STRIP,
            CTRL_SET_LINK_UP,
        );
        r.clear(CTRL_EXT, CTRL_EXT_RESERVED_CLEAR);
        r.set(CTRL_EXT, CTRL_EXT_RESERVED_SET | CTRL_EXT_DRIVER_LOADED);
        r.set(GCR, GCR_RESERVED_SET);
        start_phy(r)?;
        // 4. Statistics (4.6.4): reading clears them.
        for counter in COUNTERS {
            r.read(counter.offset);
        }
        // 5. Receive (4.6.5): address filters, descriptors, queues, then the receiver.
        r.set(RAH0, RAH_VALID);
        (0..128).for_each(|n| r.write(MTA + 4 * n, 0));
        r.set(RFCTL, RFCTL_EXTENDED);
        r.write(RXCSUM, RXCSUM_HASH_INSTEAD);
        let queues = plan.rings.len();
        // The table has the queue in the highest bit of each entry (7.1.11.3).
        write_rss(r, &plan.rss_key, queues, |queue| queue << 7);
        r.write(MRQC, if queues > 1 { MRQC_RSS } else { 0 });
        for (n, (rx, _)) in plan.rings.iter().enumerate() {
            let at = 0x100 * n;
            r.write_address(RDBAL + at, RDBAH + at, *rx);
            r.write(RDLEN + at, Plan::ring_bytes(plan.rx_entries));
            r.write(RDH + at, 0);
            r.write(RDT + at, 0);
            r.write(RXDCTL + at, DCTL_DESCRIPTORS | RXDCTL_THRESHOLDS);
        }
        r.write(
            RCTL,
            RCTL_ENABLE
                | RCTL_BROADCAST
                | RCTL_DISCARD_PAUSE
                | RCTL_STRIP_CRC
                | Self::buffer_bits(plan.frame, plan.room),
        );
        // 6. Transmit (4.6.6): queues, gaps, then the transmitter.
        for (n, (_, tx)) in plan.rings.iter().enumerate() {
            let at = 0x100 * n;
            r.write_address(TDBAL + at, TDBAH + at, *tx);
            r.write(TDLEN + at, Plan::ring_bytes(plan.tx_entries));
            r.write(TDH + at, 0);
            r.write(TDT + at, 0);
            r.write(
                TXDCTL + at,
                DCTL_DESCRIPTORS | TXDCTL_RESERVED_SET | TXDCTL_THRESHOLDS,
            );
        }
        r.set(TARC, TARC_RESERVED_SET);
        r.write(TIPG, TIPG_COPPER);
        r.write(
            TCTL,
            TCTL_ENABLE | TCTL_PAD_SHORT | TCTL_COLLISIONS | TCTL_MULTIPLE_READS,
        );
        // 7. Interrupts (7.4): a vector a queue, cleared and masked by their message, none let through yet.
        if self.msix && plan.msix {
            let causes = CAUSE_RX_QUEUE_0 | CAUSE_RX_QUEUE_0 << 1;
            r.write(IVAR, IVAR_QUEUES);
            r.write(EIAC, causes);
            r.write(IAM, causes);
            r.set(CTRL_EXT, CTRL_EXT_AUTO_MASK | CTRL_EXT_PENDING_CLEAR);
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), DeviceError> {
        let stopped = stop(&self.regs);
        self.regs.clear(CTRL_EXT, CTRL_EXT_DRIVER_LOADED);
        stopped
    }

    fn set_filter(&self, filter: Filter) -> Result<(), DeviceError> {
        set_filter(&self.regs, filter);
        Ok(())
    }

    fn fault(&self) -> Option<Fault> {
        gigabit::fault(&self.regs)
    }

    fn link(&self) -> Option<Link> {
        link(&self.regs)
    }

    fn arm(&self, queue: usize, on: bool) {
        let causes = if self.msix {
            CAUSE_RX_QUEUE_0 << (queue & 1)
        } else {
            CAUSE_RX
        };
        // What happened while masked was polled; left there it would interrupt at once.
        self.regs.write(ICR, causes);
        self.regs.write(if on { IMS } else { IMC }, causes);
    }

    fn wake(&self, queues: usize) {
        let mut causes = if self.msix { 0 } else { CAUSE_RX };
        for queue in 0..queues.min(2) {
            causes |= CAUSE_RX_QUEUE_0 << queue;
        }
        self.regs.write(IMS, causes);
        self.regs.write(ICS, causes);
    }

    fn counters(&self) -> &'static [CounterRegister] {
        COUNTERS
    }

    /// The device counts what it loses for all queues together (missed packets).
    fn queue_drops(&self, _: usize) -> u32 {
        0
    }
}
