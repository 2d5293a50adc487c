//! 82599, X540 and X550 10-gigabit controllers: physical functions.
//!
//! - Up to 16 receive and transmit queues (what RSS spreads over); advanced descriptors.
//! - RSS hashes addresses (and TCP ports), not the SPI of ESP: all packets between two gateways meet in one queue, and are
//!   handed to the worker that owns their SA. (The 82599's flow director could match the SPI's bytes; not used.)
//! - MSI-X, one vector a queue.
//! - Frames up to 9724 bytes; the longest packet is a register of its own.
//! - UDP checksums over IPv6 are left to the device ([`crate::checksum`]). Segmentation, RSC and IPsec offloads stay off: a port
//!   has no place for them. VLAN tags stay in the frame.
//!
//! **Experimental**: written from the public datasheets and held against a register model that knows the order of 4.6; no
//! board has run it. The link is what EEPROM and firmware set up: no SFP+ module is initialised, no PHY is programmed.
//!
//! Sections are those of the *Intel 82599 10 GbE Controller Datasheet*.

use std::sync::Arc;
use std::time::Duration;

use super::gigabit::counter;
use super::port::{Chip, CounterRegister, Counts, Fault, Filter, IntelPort, Plan};
use super::regs::{Regs, is_station, mac_of};
use super::ring::Format;
use crate::device::{Device, DeviceError};
use crate::nic::{Driver, Link, NicOptions};
use crate::port::{MacAddr, Port, PortError};

/// 82599 (KX4, combined, SFI, XAUI, T3, SFP variants, QSFP), X540 (one and two ports), X550 (one and two ports).
const IDS: &[(u16, u16)] = &[
    (0x8086, 0x10f7),
    (0x8086, 0x10f8),
    (0x8086, 0x10fb),
    (0x8086, 0x10fc),
    (0x8086, 0x151c),
    (0x8086, 0x154a),
    (0x8086, 0x154d),
    (0x8086, 0x1557),
    (0x8086, 0x1558),
    (0x8086, X540),
    (0x8086, X540_ONE_PORT),
    (0x8086, X550),
    (0x8086, X550_ONE_PORT),
];
const X540: u16 = 0x1528;
const X540_ONE_PORT: u16 = 0x1560;
const X550: u16 = 0x1563;
const X550_ONE_PORT: u16 = 0x15d1;

// Registers in the datasheet's order (8.2.3).
const CTRL: usize = 0x0_0000;
const STATUS: usize = 0x0_0008;
const CTRL_EXT: usize = 0x0_0018;
const EEC: usize = 0x1_0010;
const EICR: usize = 0x0_0800;
const EIAC: usize = 0x0_0810;
/// 24 registers.
const EITR: usize = 0x0_0820;
const EIAM: usize = 0x0_0890;
const GPIE: usize = 0x0_0898;
/// 64 registers.
const IVAR: usize = 0x0_0900;
/// Causes of queues, two registers of each kind.
const EICS_EX: usize = 0x0_0a90;
const EIMS_EX: usize = 0x0_0aa0;
const EIMC_EX: usize = 0x0_0ab0;
const EIAM_EX: usize = 0x0_0ad0;
const EIMC: usize = 0x0_0888;
/// Registers of a receive queue, 0x40 apart.
const RDBAL: usize = 0x0_1000;
const RDBAH: usize = 0x0_1004;
const RDLEN: usize = 0x0_1008;
const DCA_RXCTRL: usize = 0x0_100c;
const RDH: usize = 0x0_1010;
const SRRCTL: usize = 0x0_1014;
const RDT: usize = 0x0_1018;
const RXDCTL: usize = 0x0_1028;
const QPRDC: usize = 0x0_1430;
const RDRXCTL: usize = 0x0_2f00;
const RXCTRL: usize = 0x0_3000;
/// 8 registers.
const RXPBSIZE: usize = 0x0_3c00;
const FCCFG: usize = 0x0_3d00;
const HLREG0: usize = 0x0_4240;
const MAXFRS: usize = 0x0_4268;
const AUTOC: usize = 0x0_42a0;
const LINKS: usize = 0x0_42a4;
const MFLCN: usize = 0x0_4294;
const RTTDCS: usize = 0x0_4900;
/// 8 registers.
const TXPBTHRESH: usize = 0x0_4950;
const DMATXCTL: usize = 0x0_4a80;
const RXCSUM: usize = 0x0_5000;
const FCTRL: usize = 0x0_5080;
const VLNCTRL: usize = 0x0_5088;
/// 128 registers.
const MTA: usize = 0x0_5200;
const MRQC: usize = 0x0_5818;
/// 32 registers of 4 entries.
const RETA: usize = 0x0_5c00;
/// 10 registers.
const RSSRK: usize = 0x0_5c80;
/// Registers of a transmit queue, 0x40 apart.
const TDBAL: usize = 0x0_6000;
const TDBAH: usize = 0x0_6004;
const TDLEN: usize = 0x0_6008;
const DCA_TXCTRL: usize = 0x0_600c;
const TDH: usize = 0x0_6010;
const TDT: usize = 0x0_6018;
const TXDCTL: usize = 0x0_6028;
const DTXMXSZRQ: usize = 0x0_8100;
const MTQC: usize = 0x0_8120;
const SECRXCTRL: usize = 0x0_8d00;
const SECRXSTAT: usize = 0x0_8d04;
const RAL0: usize = 0x0_a200;
const RAH0: usize = 0x0_a204;
/// 8 registers.
const TXPBSIZE: usize = 0x0_cc00;

const CTRL_MASTER_DISABLE: u32 = 1 << 2;
/// Link reset and device reset together (4.2.1.6, 4.2.1.7).
const CTRL_RESET: u32 = 1 << 3 | 1 << 26;
const STATUS_MASTER_ENABLED: u32 = 1 << 19;
/// No snooping from here on (4.6.7, last step); relaxed ordering off.
const CTRL_EXT_NO_SNOOP_OFF: u32 = 1 << 16;
const CTRL_EXT_DRIVER_LOADED: u32 = 1 << 28;
const EEC_AUTO_READ_DONE: u32 = 1 << 9;
/// One vector a cause, messages mask their cause, pending bits cleared.
const GPIE_MSIX: u32 = 1 << 4 | 1 << 30 | 1 << 31;
const IVAR_VALID: u32 = 0x80;
const DCTL_ENABLE: u32 = 1 << 25;
/// Prefetch below 32 when 8 are there; write back only what asks for it.
const TXDCTL_THRESHOLDS: u32 = 32 | 8 << 8;
const TXDCTL_FLUSH: u32 = 1 << 26;
/// Advanced descriptors, one buffer; a queue without descriptors drops instead of holding up the others.
const SRRCTL_ADVANCED_DROP: u32 = 1 << 25 | 1 << 28;
/// Reset to 1, to be written 0 (4.6.7).
const DCA_RXCTRL_RESERVED: u32 = 1 << 12;
/// Write-back of descriptors keeps its order behind the data.
const DCA_TXCTRL_RELAXED_WRITE_BACK: u32 = 1 << 11;
const RDRXCTL_CRC_STRIP: u32 = 1 << 1;
const RDRXCTL_DMA_READY: u32 = 1 << 3;
/// To be written 0.
const RDRXCTL_RSC_FIRST_SIZE: u32 = 0x1f << 17;
/// To be written 1.
const RDRXCTL_RSC_ACK: u32 = 1 << 25;
const RXCTRL_ENABLE: u32 = 1 << 0;
const HLREG0_TX_CRC: u32 = 1 << 0;
const HLREG0_CRC_STRIP: u32 = 1 << 1;
const HLREG0_JUMBO: u32 = 1 << 2;
const HLREG0_TX_PAD: u32 = 1 << 10;
const AUTOC_RESTART: u32 = 1 << 12;
const MFLCN_DISCARD_PAUSE: u32 = 1 << 1;
const MFLCN_FLOW_CONTROL: u32 = 1 << 2 | 1 << 3;
const RTTDCS_ARBITER_OFF: u32 = 1 << 6;
const DMATXCTL_ENABLE: u32 = 1 << 0;
const RXCSUM_HASH_INSTEAD: u32 = 1 << 13;
const FCTRL_MULTICAST_PROMISCUOUS: u32 = 1 << 8;
const FCTRL_UNICAST_PROMISCUOUS: u32 = 1 << 9;
const FCTRL_BROADCAST: u32 = 1 << 10;
const VLNCTRL_FILTER: u32 = 1 << 30;
/// RSS over TCP and IPv4, IPv4, IPv6, TCP and IPv6. Not UDP: fragments would go another way than their packet.
const MRQC_RSS: u32 = 1 | 1 << 16 | 1 << 17 | 1 << 20 | 1 << 21;
const SECRXCTRL_STOP: u32 = 1 << 1;
const SECRXSTAT_READY: u32 = 1 << 0;
const RAH_VALID: u32 = 1 << 31;
/// No arbitration: one buffer of 160 KB (4.6.11.3.4).
const TXPBSIZE_ALL: u32 = 160 << 10;
const TXPBTHRESH_ALL: u32 = 160;
const DTXMXSZRQ_MAX: u32 = 0xfff;

/// 9.5 KiB, the longest packet of the feature list, less the check sequence.
const LARGEST_FRAME: usize = 9728 - 4;
const QUEUES: usize = 16;
const REGISTERS: usize = 0x1_1000;
const RESET_PAUSE: Duration = Duration::from_millis(10);
const RESET_LIMIT: Duration = Duration::from_millis(500);
const MASTER_LIMIT: Duration = Duration::from_millis(100);
const QUEUE_LIMIT: Duration = Duration::from_millis(100);

/// Statistics registers that reading clears (8.2.3.23), the ones that tell something.
const COUNTERS: &[CounterRegister] = &[
    counter("crc_errors", 0x4000, Counts::Errors),
    counter("illegal_bytes", 0x4004, Counts::Other),
    counter("error_bytes", 0x4008, Counts::Errors),
    counter("missed_packets", 0x3fa0, Counts::Dropped),
    counter("local_faults", 0x4034, Counts::Other),
    counter("remote_faults", 0x4038, Counts::Other),
    counter("length_errors", 0x4040, Counts::Errors),
    counter("good_packets_received", 0x4074, Counts::Other),
    counter("good_packets_sent", 0x4080, Counts::Other),
    counter("undersize", 0x40a4, Counts::Errors),
    counter("fragments", 0x40a8, Counts::Errors),
    counter("oversize", 0x40ac, Counts::Errors),
    counter("jabber", 0x40b0, Counts::Errors),
];

/// This family in the table of drivers.
pub const DRIVER: Driver = Driver {
    name: "ixgbe",
    ids: IDS,
    experimental: true,
    open,
};

/// Opens a device of this family.
fn open(device: Arc<dyn Device>, options: &NicOptions) -> Result<Box<dyn Port>, PortError> {
    let chip = Ixgbe::probe(device.as_ref()).map_err(|source| PortError::Device {
        port: options.name.clone(),
        source,
    })?;
    tracing::warn!(port = %options.name, "ixgbe is experimental: no board has run this driver yet");
    Ok(Box::new(IntelPort::new(device, Box::new(chip), options)?))
}

#[derive(Debug)]
struct Ixgbe {
    regs: Regs,
    mac: MacAddr,
    id: u16,
}

impl Ixgbe {
    /// Resets the device and reads who it is.
    fn probe(device: &dyn Device) -> Result<Ixgbe, DeviceError> {
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
        Ok(Ixgbe {
            regs,
            mac,
            id: device.pci().map_or(0, |p| p.device),
        })
    }

    /// 4.6.7, Receive Initialization.
    fn start_receive(&self, plan: &Plan) -> Result<(), DeviceError> {
        let r = &self.regs;
        let queues = plan.rings.len();
        r.clear(RXCTRL, RXCTRL_ENABLE);
        // a. Address and VLAN filters, the hash.
        r.set(RAH0, RAH_VALID);
        (0..128).for_each(|n| r.write(MTA + 4 * n, 0));
        r.clear(VLNCTRL, VLNCTRL_FILTER);
        r.write(FCTRL, FCTRL_BROADCAST);
        r.write(RXCSUM, RXCSUM_HASH_INSTEAD);
        let (words, _) = plan.rss_key.as_chunks::<4>();
        for (n, word) in words.iter().enumerate() {
            r.write(RSSRK + 4 * n, u32::from_le_bytes(*word));
        }
        let queue_of = |slot: usize| u8::try_from(slot % queues.max(1)).unwrap_or(0);
        for n in 0..32 {
            let four = std::array::from_fn(|i| queue_of(4 * n + i));
            r.write(RETA + 4 * n, u32::from_le_bytes(four));
        }
        r.write(MRQC, if queues > 1 { MRQC_RSS } else { 0 });
        // b. One packet buffer for all: 512 KB in the 82599, 384 KB in the X540 and X550. No flow control.
        let kilobytes = if matches!(self.id, X540 | X540_ONE_PORT | X550 | X550_ONE_PORT) {
            384
        } else {
            512
        };
        r.write(RXPBSIZE, kilobytes << 10);
        (1..8).for_each(|n| r.write(RXPBSIZE + 4 * n, 0));
        r.replace(
            MFLCN,
            MFLCN_FLOW_CONTROL | MFLCN_DISCARD_PAUSE,
            MFLCN_DISCARD_PAUSE,
        );
        r.write(FCCFG, 0);
        // c. Longest packet, check sequence included; CRC stripped, the same in both places.
        let longest = u32::try_from(plan.frame + 4).unwrap_or(0);
        r.replace(MAXFRS, 0xffff_0000, longest << 16);
        r.set(
            HLREG0,
            HLREG0_CRC_STRIP | HLREG0_JUMBO | HLREG0_TX_CRC | HLREG0_TX_PAD,
        );
        r.replace(
            RDRXCTL,
            RDRXCTL_CRC_STRIP | RDRXCTL_RSC_FIRST_SIZE | RDRXCTL_RSC_ACK,
            RDRXCTL_CRC_STRIP | RDRXCTL_RSC_ACK,
        );
        // d. Queues; their tails move when they are on.
        let kilobytes = u32::try_from(plan.frame.div_ceil(1024)).unwrap_or(0);
        for (n, (rx, _)) in plan.rings.iter().enumerate() {
            let at = 0x40 * n;
            r.write_address(RDBAL + at, RDBAH + at, *rx);
            r.write(RDLEN + at, Plan::ring_bytes(plan.rx_entries));
            r.write(RDH + at, 0);
            r.write(RDT + at, 0);
            // In kilobytes; MAXFRS keeps packets from using more of the last one than there is.
            r.write(SRRCTL + at, SRRCTL_ADVANCED_DROP | kilobytes);
            r.clear(DCA_RXCTRL + at, DCA_RXCTRL_RESERVED);
            r.set(RXDCTL + at, DCTL_ENABLE);
            r.wait(
                RXDCTL + at,
                DCTL_ENABLE,
                DCTL_ENABLE,
                QUEUE_LIMIT,
                "start of a receive queue",
            )?;
        }
        // e. The receiver, while the security block in front of it is empty.
        r.set(SECRXCTRL, SECRXCTRL_STOP);
        r.wait(
            SECRXSTAT,
            SECRXSTAT_READY,
            SECRXSTAT_READY,
            QUEUE_LIMIT,
            "security block empty",
        )?;
        r.set(RXCTRL, RXCTRL_ENABLE);
        r.clear(SECRXCTRL, SECRXCTRL_STOP);
        r.set(CTRL_EXT, CTRL_EXT_NO_SNOOP_OFF);
        Ok(())
    }

    /// 4.6.8, Transmit Initialization.
    fn start_transmit(&self, plan: &Plan) -> Result<(), DeviceError> {
        let r = &self.regs;
        // a. Buffers, while the arbiter is off.
        r.set(RTTDCS, RTTDCS_ARBITER_OFF);
        r.write(MTQC, 0);
        r.write(DTXMXSZRQ, DTXMXSZRQ_MAX);
        r.write(TXPBSIZE, TXPBSIZE_ALL);
        r.write(TXPBTHRESH, TXPBTHRESH_ALL);
        for n in 1..8 {
            r.write(TXPBSIZE + 4 * n, 0);
            r.write(TXPBTHRESH + 4 * n, 0);
        }
        r.clear(RTTDCS, RTTDCS_ARBITER_OFF);
        // b. Transmit DMA, then queues.
        r.set(DMATXCTL, DMATXCTL_ENABLE);
        for (n, (_, tx)) in plan.rings.iter().enumerate() {
            let at = 0x40 * n;
            r.write_address(TDBAL + at, TDBAH + at, *tx);
            r.write(TDLEN + at, Plan::ring_bytes(plan.tx_entries));
            r.write(TDH + at, 0);
            r.write(TDT + at, 0);
            r.clear(DCA_TXCTRL + at, DCA_TXCTRL_RELAXED_WRITE_BACK);
            r.write(TXDCTL + at, DCTL_ENABLE | TXDCTL_THRESHOLDS);
            r.wait(
                TXDCTL + at,
                DCTL_ENABLE,
                DCTL_ENABLE,
                QUEUE_LIMIT,
                "start of a transmit queue",
            )?;
        }
        Ok(())
    }
}

impl Chip for Ixgbe {
    fn kind(&self) -> &'static str {
        "ixgbe"
    }

    fn mac(&self) -> MacAddr {
        self.mac
    }

    fn queues(&self) -> usize {
        QUEUES
    }

    fn largest_frame(&self) -> usize {
        LARGEST_FRAME
    }

    fn room_needed(&self, frame: usize) -> usize {
        frame
    }

    fn format(&self) -> Format {
        Format::ADVANCED_10G
    }

    fn regs(&self) -> &Regs {
        &self.regs
    }

    fn tails(&self, queue: usize) -> (usize, usize) {
        (RDT + 0x40 * queue, TDT + 0x40 * queue)
    }

    /// 4.6.3, Initialization Sequence.
    fn start(&self, plan: &Plan) -> Result<(), DeviceError> {
        let r = &self.regs;
        // 1. Interrupts off, reset, interrupts off again, wait for EEPROM and DMA (4.6.3.1, 4.6.3.2).
        let _ = stop(r);
        reset(r)?;
        r.set(CTRL_EXT, CTRL_EXT_DRIVER_LOADED);
        // 2. Link (4.6.4): as EEPROM and firmware chose it. The 82599 negotiates anew when told.
        if !matches!(self.id, X540 | X540_ONE_PORT | X550 | X550_ONE_PORT) {
            r.set(AUTOC, AUTOC_RESTART);
        }
        // 3. Statistics (4.6.5): reading clears them.
        for counter in COUNTERS {
            r.read(counter.offset);
        }
        // 4. Receive (4.6.7) and transmit (4.6.8).
        self.start_receive(plan)?;
        self.start_transmit(plan)?;
        // 5. Interrupts (4.6.6): a vector a queue, cleared and masked by their message, none let through yet.
        if plan.msix {
            r.write(GPIE, GPIE_MSIX);
            let queues = plan.rings.len();
            for queue in 0..queues {
                // IVAR n has queues 2n and 2n + 1, the receive cause in front.
                let shift = 16 * (queue & 1);
                let vector = IVAR_VALID | u32::try_from(queue & 0xf).unwrap_or(0);
                r.replace(IVAR + 4 * (queue >> 1), 0xff << shift, vector << shift);
                r.write(EITR + 4 * queue, 0);
            }
            r.write(EIAC, queue_bits(queues));
            r.write(EIAM, queue_bits(queues));
            r.write(EIAM_EX, queue_bits(queues));
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), DeviceError> {
        let stopped = stop(&self.regs);
        self.regs.clear(CTRL_EXT, CTRL_EXT_DRIVER_LOADED);
        stopped
    }

    fn set_filter(&self, filter: Filter) -> Result<(), DeviceError> {
        let mut bits = FCTRL_BROADCAST;
        if filter.promiscuous {
            bits |= FCTRL_UNICAST_PROMISCUOUS | FCTRL_MULTICAST_PROMISCUOUS;
        }
        if filter.all_multicast {
            bits |= FCTRL_MULTICAST_PROMISCUOUS;
        }
        self.regs.write(FCTRL, bits);
        Ok(())
    }

    fn fault(&self) -> Option<Fault> {
        let enabled = self.regs.read(RXCTRL) & RXCTRL_ENABLE != 0;
        (!enabled).then_some(Fault::ForeignReset)
    }

    fn link(&self) -> Option<Link> {
        if self.regs.read(STATUS) == u32::MAX {
            return None;
        }
        Some(link_of(self.regs.read(LINKS)))
    }

    fn arm(&self, queue: usize, on: bool) {
        // What happened while masked was polled; left there it would interrupt at once.
        self.regs.write(EICR, 1 << (queue & 0xf));
        self.regs
            .write(if on { EIMS_EX } else { EIMC_EX }, 1 << (queue & 0xf));
    }

    fn wake(&self, queues: usize) {
        self.regs.write(EIMS_EX, queue_bits(queues));
        self.regs.write(EICS_EX, queue_bits(queues));
    }

    fn counters(&self) -> &'static [CounterRegister] {
        COUNTERS
    }

    fn queue_drops(&self, queue: usize) -> u32 {
        match self.regs.read(QPRDC + 0x40 * queue) {
            u32::MAX => 0,
            drops => drops,
        }
    }
}

/// LINKS and VFLINKS: up in bit 30, speed in bits 28 and 29; bit 27 marks the X550's speeds between.
pub(super) fn link_of(links: u32) -> Link {
    let up = links & 1 << 30 != 0;
    let mbps = match (links >> 28 & 3, links & 1 << 27 != 0) {
        _ if !up => 0,
        (3, false) => 10_000,
        (3, true) => 2500,
        (2, _) => 1000,
        (1, false) => 100,
        (1, true) => 5000,
        _ => 10,
    };
    Link {
        up,
        mbps,
        full_duplex: true,
    }
}

/// Masks all interrupts, stops both directions, waits until the device's transfers are over (5.2.5.3.2).
fn stop(r: &Regs) -> Result<(), DeviceError> {
    mask_all(r);
    r.clear(RXCTRL, RXCTRL_ENABLE);
    for n in 0..QUEUES {
        r.clear(RXDCTL + 0x40 * n, DCTL_ENABLE);
        if r.read(TXDCTL + 0x40 * n) & DCTL_ENABLE != 0 {
            r.write(TXDCTL + 0x40 * n, TXDCTL_FLUSH);
        }
    }
    r.set(CTRL, CTRL_MASTER_DISABLE);
    r.wait(
        STATUS,
        STATUS_MASTER_ENABLED,
        0,
        MASTER_LIMIT,
        "end of the device's transfers",
    )
}

/// 4.6.3.2: global reset, then EEPROM read and DMA initialised.
fn reset(r: &Regs) -> Result<(), DeviceError> {
    r.set(CTRL, CTRL_RESET);
    std::thread::sleep(RESET_PAUSE);
    r.wait(CTRL, CTRL_RESET, 0, RESET_LIMIT, "reset")?;
    mask_all(r);
    r.wait(
        EEC,
        EEC_AUTO_READ_DONE,
        EEC_AUTO_READ_DONE,
        RESET_LIMIT,
        "reading of the EEPROM",
    )?;
    r.wait(
        RDRXCTL,
        RDRXCTL_DMA_READY,
        RDRXCTL_DMA_READY,
        RESET_LIMIT,
        "initialization of DMA",
    )
}

fn mask_all(r: &Regs) {
    r.write(EIMC, 0x7fff_ffff);
    r.write(EIMC_EX, u32::MAX);
    r.write(EIMC_EX + 4, u32::MAX);
    r.read(EICR);
}

/// The causes of the first `queues` vectors.
fn queue_bits(queues: usize) -> u32 {
    (1u32 << queues.min(QUEUES)) - 1
}
