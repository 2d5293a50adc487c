//! 82576, 82580, i350, i210 and i211 gigabit controllers with copper ports.
//!
//! - 2 to 16 receive and transmit queues; advanced descriptors.
//! - RSS hashes addresses (and TCP ports), not the SPI of ESP: all packets between two gateways meet in one queue, and are
//!   handed to the worker that owns their SA.
//! - MSI-X, one vector a queue.
//! - The longest packet is a register of its own, so frames may be up to 9728 bytes and need no rounding of buffers.
//! - UDP checksums over IPv6 are left to the device ([`crate::checksum`]). VLAN tags stay in the frame.
//!
//! Verified on QEMU's 82576 model, whose link is up three seconds after a reset. The others were written from their
//! datasheets; their differences are [`Model::queues`] and the layout of IVAR.
//!
//! Sections are those of the *Intel 82576 Gigabit Ethernet Controller Datasheet*.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::gigabit::{self, *};
use super::port::{Chip, CounterRegister, Fault, Filter, IntelPort, Plan};
use super::regs::{Regs, is_station, mac_of};
use super::ring::Format;
use crate::device::{Device, DeviceError};
use crate::nic::{Driver, Link, NicOptions};
use crate::port::{MacAddr, Port, PortError};

/// 82576 (four boards), 82580 (two), i350, i210 (two), i211.
const IDS: &[(u16, u16)] = &[
    (0x8086, 0x10c9),
    (0x8086, 0x10e8),
    (0x8086, 0x150a),
    (0x8086, 0x1526),
    (0x8086, 0x150e),
    (0x8086, 0x1516),
    (0x8086, 0x1521),
    (0x8086, 0x1533),
    (0x8086, 0x157b),
    (0x8086, 0x1539),
];

/// What differs between the controllers.
#[derive(Debug, Clone, Copy)]
struct Model {
    queues: usize,
    /// Whether IVAR n serves queues n and n + 8, not 2n and 2n + 1.
    wide_ivar: bool,
}

impl Model {
    fn of(id: u16) -> Model {
        let (queues, wide_ivar) = match id {
            0x10c9 | 0x10e8 | 0x150a | 0x1526 => (16, true),
            0x1533 | 0x157b => (4, false),
            0x1539 => (2, false),
            _ => (8, false),
        };
        Model { queues, wide_ivar }
    }
}

// Registers of this family alone, in the datasheet's order (8.1.3).
const GPIE: usize = 0x1514;
const EICS: usize = 0x1520;
const EIMS: usize = 0x1524;
const EIMC: usize = 0x1528;
const EIAC: usize = 0x152c;
const EIAM: usize = 0x1530;
const EICR: usize = 0x1580;
/// 25 registers.
const EITR: usize = 0x1680;
/// 8 registers.
const IVAR: usize = 0x1700;
const RLPML: usize = 0x5004;
const SWSM: usize = 0x5b50;
const SW_FW_SYNC: usize = 0x5b5c;
/// Registers of a receive queue, 0x40 apart.
const RDBAL: usize = 0xc000;
const RDBAH: usize = 0xc004;
const RDLEN: usize = 0xc008;
const SRRCTL: usize = 0xc00c;
const RDH: usize = 0xc010;
const RDT: usize = 0xc018;
const RXDCTL: usize = 0xc028;
const RQDPC: usize = 0xc030;
/// Registers of a transmit queue, 0x40 apart.
const TDBAL: usize = 0xe000;
const TDBAH: usize = 0xe004;
const TDLEN: usize = 0xe008;
const TDH: usize = 0xe010;
const TDT: usize = 0xe018;
const TXDCTL: usize = 0xe028;

/// MSI-X, one message a cause; EIAM masks when the message is sent; pending bits cleared.
const GPIE_MSIX: u32 = 1 | 1 << 4 | 1 << 30 | 1 << 31;
/// Semaphores among drivers, and between drivers and firmware.
const SWSM_SOFTWARE: u32 = 1 << 0;
const SWSM_FIRMWARE: u32 = 1 << 1;
const IVAR_VALID: u32 = 0x80;
/// Advanced descriptors, one buffer.
const SRRCTL_ADVANCED: u32 = 1 << 25;
/// A queue without descriptors drops, instead of holding up the others.
const SRRCTL_DROP: u32 = 1 << 31;
const DCTL_ENABLE: u32 = 1 << 25;
/// Prefetch below 8 when 8 are there, write back each.
const RXDCTL_THRESHOLDS: u32 = 8 | 8 << 8 | 1 << 16;
const TXDCTL_THRESHOLDS: u32 = 8 | 1 << 8 | 1 << 16;
/// RSS over TCP and IPv4, IPv4, IPv6, TCP and IPv6. Not UDP: fragments would go another way than their packet.
const MRQC_RSS: u32 = 2 | 1 << 16 | 1 << 17 | 1 << 20 | 1 << 21;

/// 9.5 KiB, the longest packet of the feature list, less the check sequence.
const LARGEST_FRAME: usize = 9728 - 4;
const REGISTERS: usize = 0x1_0000;
const SWSM_LIMIT: Duration = Duration::from_millis(10);
const PHY_LOCK_LIMIT: Duration = Duration::from_millis(500);
const QUEUE_LIMIT: Duration = Duration::from_millis(100);

/// This family in the table of drivers.
pub const DRIVER: Driver = Driver {
    name: "igb",
    ids: IDS,
    experimental: false,
    open,
};

/// Opens a device of this family.
fn open(device: Arc<dyn Device>, options: &NicOptions) -> Result<Box<dyn Port>, PortError> {
    let chip = Igb::probe(device.as_ref()).map_err(|source| PortError::Device {
        port: options.name.clone(),
        source,
    })?;
    Ok(Box::new(IntelPort::new(device, Box::new(chip), options)?))
}

#[derive(Debug)]
struct Igb {
    regs: Regs,
    mac: MacAddr,
    model: Model,
}

impl Igb {
    /// Resets the device and reads who it is.
    fn probe(device: &dyn Device) -> Result<Igb, DeviceError> {
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
        Ok(Igb {
            regs,
            mac,
            model: Model::of(device.pci().map_or(0, |p| p.device)),
        })
    }

    /// Keeps firmware and the other ports' drivers from the PHY until the result is called (4.6.13).
    fn lock_phy(&self) -> Result<impl Fn(), DeviceError> {
        let r = &self.regs;
        // The PHY of each port has a bit for software, and one for firmware 16 higher.
        let port = r.read(STATUS) >> 2 & 3;
        let ours = if port < 2 {
            1 << (port + 1)
        } else {
            1 << (port + 3)
        };
        let end = Instant::now() + PHY_LOCK_LIMIT;
        loop {
            self.lock_sync()?;
            let owners = r.read(SW_FW_SYNC);
            if owners & (ours | ours << 16) == 0 {
                r.write(SW_FW_SYNC, owners | ours);
                r.clear(SWSM, SWSM_SOFTWARE | SWSM_FIRMWARE);
                break;
            }
            r.clear(SWSM, SWSM_SOFTWARE | SWSM_FIRMWARE);
            if Instant::now() >= end {
                return Err(DeviceError::Timeout("the PHY to be free"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(move || {
            if self.lock_sync().is_ok() {
                self.regs.clear(SW_FW_SYNC, ours);
                self.regs.clear(SWSM, SWSM_SOFTWARE | SWSM_FIRMWARE);
            }
        })
    }

    /// Takes the semaphore of [`SW_FW_SYNC`]: among drivers (the bit is set by reading it as 0), then against firmware.
    fn lock_sync(&self) -> Result<(), DeviceError> {
        let r = &self.regs;
        let taken = r.wait(SWSM, SWSM_SOFTWARE, 0, SWSM_LIMIT, "the drivers' semaphore");
        if let Err(DeviceError::Timeout(_)) = taken {
            // Left by a driver that died; this is what the datasheet's note on lost semaphores asks for.
            r.clear(SWSM, SWSM_SOFTWARE | SWSM_FIRMWARE);
        }
        let end = Instant::now() + SWSM_LIMIT;
        loop {
            r.set(SWSM, SWSM_FIRMWARE);
            if r.read(SWSM) & SWSM_FIRMWARE != 0 {
                return Ok(());
            }
            if Instant::now() >= end {
                return Err(DeviceError::Timeout("the firmware's semaphore"));
            }
        }
    }

    /// Vector `queue` for receive queue `queue` (7.3.1.2).
    fn write_ivar(&self, queue: usize) {
        let (register, byte) = if self.model.wide_ivar {
            (queue & 7, queue >> 3 << 1)
        } else {
            (queue >> 1, (queue & 1) << 1)
        };
        let vector = IVAR_VALID | u32::try_from(queue & 0xf).unwrap_or(0);
        self.regs.replace(
            IVAR + 4 * register,
            0xff << (8 * byte),
            vector << (8 * byte),
        );
    }
}

impl Chip for Igb {
    fn kind(&self) -> &'static str {
        "igb"
    }

    fn mac(&self) -> MacAddr {
        self.mac
    }

    fn queues(&self) -> usize {
        self.model.queues
    }

    fn largest_frame(&self) -> usize {
        LARGEST_FRAME
    }

    fn room_needed(&self, frame: usize) -> usize {
        frame
    }

    fn format(&self) -> Format {
        Format::ADVANCED
    }

    fn regs(&self) -> &Regs {
        &self.regs
    }

    fn tails(&self, queue: usize) -> (usize, usize) {
        (RDT + 0x40 * queue, TDT + 0x40 * queue)
    }

    /// 4.5, Device Initialization.
    fn start(&self, plan: &Plan) -> Result<(), DeviceError> {
        let r = &self.regs;
        // 1. Interrupts during initialization: all off (4.5.4).
        r.write(EIMC, u32::MAX);
        // 2. Global reset (4.5.5), when earlier transfers are over; the reset ends what does not end by itself.
        let _ = stop(r);
        reset(r)?;
        r.write(EIMC, u32::MAX);
        // 3. Flow control off and link up (4.5.6, 4.5.7): no forced speed, tags stay.
        r.replace(
            CTRL,
            CTRL_MASTER_DISABLE
                | CTRL_SET_LINK_UP
                | CTRL_FORCE_SPEED
                | CTRL_FORCE_DUPLEX
                | CTRL_RX_FLOW_CONTROL
                | CTRL_TX_FLOW_CONTROL
                | CTRL_VLAN_STRIP,
            CTRL_SET_LINK_UP,
        );
        r.set(CTRL_EXT, CTRL_EXT_DRIVER_LOADED);
        let unlock = self.lock_phy()?;
        let negotiating = start_phy(r);
        unlock();
        negotiating?;
        // 4. Statistics (4.5.8): reading clears them.
        for counter in COUNTERS {
            r.read(counter.offset);
        }
        // 5. Receive (4.5.9): address filters, longest packet, hash, queues, then the receiver. The tail registers move when
        //    the queues are enabled.
        r.set(RAH0, RAH_VALID);
        (0..128).for_each(|n| r.write(MTA + 4 * n, 0));
        let longest = u32::try_from(plan.frame + 4).unwrap_or(0);
        r.write(RLPML, longest);
        r.write(RXCSUM, RXCSUM_HASH_INSTEAD);
        let queues = plan.rings.len();
        write_rss(r, &plan.rss_key, queues, |queue| queue);
        r.write(MRQC, if queues > 1 { MRQC_RSS } else { 0 });
        let kilobytes = u32::try_from(plan.frame.div_ceil(1024)).unwrap_or(0);
        for (n, (rx, _)) in plan.rings.iter().enumerate() {
            let at = 0x40 * n;
            r.write_address(RDBAL + at, RDBAH + at, *rx);
            r.write(RDLEN + at, Plan::ring_bytes(plan.rx_entries));
            // In kilobytes; RLPML keeps packets from using more of the last one than there is.
            r.write(SRRCTL + at, SRRCTL_ADVANCED | SRRCTL_DROP | kilobytes);
            r.write(RDH + at, 0);
            r.write(RDT + at, 0);
            r.write(RXDCTL + at, DCTL_ENABLE | RXDCTL_THRESHOLDS);
            r.wait(
                RXDCTL + at,
                DCTL_ENABLE,
                DCTL_ENABLE,
                QUEUE_LIMIT,
                "start of a receive queue",
            )?;
        }
        r.write(
            RCTL,
            RCTL_ENABLE | RCTL_LONG_PACKETS | RCTL_BROADCAST | RCTL_DISCARD_PAUSE | RCTL_STRIP_CRC,
        );
        // 6. Transmit (4.5.10): queues, then the transmitter.
        for (n, (_, tx)) in plan.rings.iter().enumerate() {
            let at = 0x40 * n;
            r.write_address(TDBAL + at, TDBAH + at, *tx);
            r.write(TDLEN + at, Plan::ring_bytes(plan.tx_entries));
            r.write(TDH + at, 0);
            r.write(TDT + at, 0);
            r.write(TXDCTL + at, DCTL_ENABLE | TXDCTL_THRESHOLDS);
            r.wait(
                TXDCTL + at,
                DCTL_ENABLE,
                DCTL_ENABLE,
                QUEUE_LIMIT,
                "start of a transmit queue",
            )?;
        }
        r.write(TCTL, TCTL_ENABLE | TCTL_PAD_SHORT | TCTL_COLLISIONS);
        // 7. Interrupts (7.3): a vector a queue, cleared and masked by their message, none let through yet.
        if plan.msix {
            r.write(GPIE, GPIE_MSIX);
            for queue in 0..queues {
                self.write_ivar(queue);
                r.write(EITR + 4 * queue, 0);
            }
            r.write(EIAC, queue_bits(queues));
            r.write(EIAM, queue_bits(queues));
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), DeviceError> {
        self.regs.write(EIMC, u32::MAX);
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
        // What happened while masked was polled; left there it would interrupt at once.
        self.regs.write(EICR, 1 << (queue & 0xf));
        self.regs
            .write(if on { EIMS } else { EIMC }, 1 << (queue & 0xf));
    }

    fn wake(&self, queues: usize) {
        self.regs.write(EIMS, queue_bits(queues));
        self.regs.write(EICS, queue_bits(queues));
    }

    fn counters(&self) -> &'static [CounterRegister] {
        COUNTERS
    }

    fn queue_drops(&self, queue: usize) -> u32 {
        let register = RQDPC + 0x40 * queue;
        let drops = self.regs.read(register);
        if drops == u32::MAX || drops == 0 {
            return 0;
        }
        // Reading clears it in the 82576 and i350, writing in the i210.
        self.regs.write(register, 0);
        drops
    }
}

/// The causes of the first `queues` vectors.
fn queue_bits(queues: usize) -> u32 {
    (1u32 << queues.min(16)) - 1
}
