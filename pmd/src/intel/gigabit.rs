//! What the gigabit families (82574, igb) have in common: the registers that kept their place since the first of them.

use std::time::Duration;

use super::port::{CounterRegister, Counts, Fault, Filter};
use super::regs::Regs;
use crate::device::DeviceError;
use crate::nic::Link;

// General registers (82574 datasheet 10.2.2, 82576 datasheet 8.2).
pub(super) const CTRL: usize = 0x0000;
pub(super) const STATUS: usize = 0x0008;
pub(super) const EECD: usize = 0x0010;
pub(super) const CTRL_EXT: usize = 0x0018;
const MDIC: usize = 0x0020;
// Interrupts.
pub(super) const ICR: usize = 0x00c0;
pub(super) const ICS: usize = 0x00c8;
pub(super) const IMS: usize = 0x00d0;
pub(super) const IMC: usize = 0x00d8;
// Receive and transmit control.
pub(super) const RCTL: usize = 0x0100;
pub(super) const TCTL: usize = 0x0400;
pub(super) const TIPG: usize = 0x0410;
// Receive.
pub(super) const RXCSUM: usize = 0x5000;
pub(super) const RFCTL: usize = 0x5008;
/// 128 registers.
pub(super) const MTA: usize = 0x5200;
pub(super) const RAL0: usize = 0x5400;
pub(super) const RAH0: usize = 0x5404;
pub(super) const MRQC: usize = 0x5818;
/// 32 registers of 4 entries.
pub(super) const RETA: usize = 0x5c00;
/// 10 registers.
pub(super) const RSSRK: usize = 0x5c80;

pub(super) const CTRL_MASTER_DISABLE: u32 = 1 << 2;
pub(super) const CTRL_SET_LINK_UP: u32 = 1 << 6;
pub(super) const CTRL_FORCE_SPEED: u32 = 1 << 11;
pub(super) const CTRL_FORCE_DUPLEX: u32 = 1 << 12;
pub(super) const CTRL_RESET: u32 = 1 << 26;
pub(super) const CTRL_RX_FLOW_CONTROL: u32 = 1 << 27;
pub(super) const CTRL_TX_FLOW_CONTROL: u32 = 1 << 28;
pub(super) const CTRL_VLAN_STRIP: u32 = 1 << 30;
const STATUS_FULL_DUPLEX: u32 = 1 << 0;
const STATUS_LINK_UP: u32 = 1 << 1;
const STATUS_MASTER_ENABLED: u32 = 1 << 19;
const EECD_AUTO_READ_DONE: u32 = 1 << 9;
/// Tells the management firmware that a driver is there.
pub(super) const CTRL_EXT_DRIVER_LOADED: u32 = 1 << 28;
pub(super) const RCTL_ENABLE: u32 = 1 << 1;
pub(super) const RCTL_UNICAST_PROMISCUOUS: u32 = 1 << 3;
pub(super) const RCTL_MULTICAST_PROMISCUOUS: u32 = 1 << 4;
pub(super) const RCTL_LONG_PACKETS: u32 = 1 << 5;
pub(super) const RCTL_BROADCAST: u32 = 1 << 15;
pub(super) const RCTL_DISCARD_PAUSE: u32 = 1 << 22;
pub(super) const RCTL_STRIP_CRC: u32 = 1 << 26;
pub(super) const TCTL_ENABLE: u32 = 1 << 1;
pub(super) const TCTL_PAD_SHORT: u32 = 1 << 3;
/// Collision threshold 15 and distance 63, for half duplex.
pub(super) const TCTL_COLLISIONS: u32 = 0x0f << 4 | 0x3f << 12;
/// Packet checksum off, so that the hash can be written in its place.
pub(super) const RXCSUM_HASH_INSTEAD: u32 = 1 << 13;
pub(super) const RAH_VALID: u32 = 1 << 31;

/// The PHY's first register (IEEE 802.3, 22.2.4.1), and its address.
const MDIC_CONTROL: u32 = 1 << 21;
const MDIC_WRITE: u32 = 1 << 26;
const MDIC_READ: u32 = 2 << 26;
const MDIC_READY: u32 = 1 << 28;
const MDIC_ERROR: u32 = 1 << 30;
const PHY_RESTART: u32 = 1 << 9;
const PHY_ISOLATE: u32 = 1 << 10;
const PHY_POWER_DOWN: u32 = 1 << 11;
const PHY_NEGOTIATE: u32 = 1 << 12;

/// Longest time of one access to the PHY.
const MDIC_LIMIT: Duration = Duration::from_millis(10);
/// The datasheets' longest time for pending transfers to end.
const MASTER_LIMIT: Duration = Duration::from_millis(100);
const RESET_LIMIT: Duration = Duration::from_millis(500);
const AUTO_READ_LIMIT: Duration = Duration::from_millis(20);
/// From the write of the reset bit until registers may be touched.
const RESET_PAUSE: Duration = Duration::from_millis(2);

/// Masks all interrupts, stops both directions, waits until the device's transfers are over.
pub(super) fn stop(regs: &Regs) -> Result<(), DeviceError> {
    regs.write(IMC, u32::MAX);
    regs.clear(RCTL, RCTL_ENABLE);
    regs.clear(TCTL, TCTL_ENABLE);
    regs.set(CTRL, CTRL_MASTER_DISABLE);
    regs.wait(
        STATUS,
        STATUS_MASTER_ENABLED,
        0,
        MASTER_LIMIT,
        "end of the device's transfers",
    )
}

/// Resets the device and waits until it has read its non-volatile memory.
pub(super) fn reset(regs: &Regs) -> Result<(), DeviceError> {
    regs.set(CTRL, CTRL_RESET);
    std::thread::sleep(RESET_PAUSE);
    regs.wait(CTRL, CTRL_RESET, 0, RESET_LIMIT, "reset")?;
    // Some devices (QEMU's 82576) never set the bit; whether there was something to read shows in the station address.
    let read = regs.wait(
        EECD,
        EECD_AUTO_READ_DONE,
        EECD_AUTO_READ_DONE,
        AUTO_READ_LIMIT,
        "reading of the non-volatile memory",
    );
    match read {
        Err(DeviceError::Timeout(what)) => tracing::debug!("timed out: {what}"),
        other => other?,
    }
    regs.write(IMC, u32::MAX);
    regs.read(ICR);
    Ok(())
}

/// Has the PHY negotiate, which an earlier driver may have left powered down; leaves one alone that has a link.
pub(super) fn start_phy(regs: &Regs) -> Result<(), DeviceError> {
    let access = |command: u32| {
        regs.write(MDIC, MDIC_CONTROL | command);
        regs.wait(
            MDIC,
            MDIC_READY,
            MDIC_READY,
            MDIC_LIMIT,
            "access to the PHY",
        )?;
        match regs.read(MDIC) {
            value if value & MDIC_ERROR != 0 => {
                Err(DeviceError::Broken("the PHY does not answer".into()))
            }
            value => Ok(value & 0xffff),
        }
    };
    let control = access(MDIC_READ)?;
    let off = control & (PHY_POWER_DOWN | PHY_ISOLATE) != 0 || control & PHY_NEGOTIATE == 0;
    if off || !link(regs).is_some_and(|l| l.up) {
        let on = control & !(PHY_POWER_DOWN | PHY_ISOLATE) | PHY_NEGOTIATE | PHY_RESTART;
        access(MDIC_WRITE | on)?;
    }
    Ok(())
}

/// Address filters: the station, everybody, and what `filter` says.
pub(super) fn set_filter(regs: &Regs, filter: Filter) {
    let mut bits = 0;
    if filter.promiscuous {
        bits |= RCTL_UNICAST_PROMISCUOUS | RCTL_MULTICAST_PROMISCUOUS;
    }
    if filter.all_multicast {
        bits |= RCTL_MULTICAST_PROMISCUOUS;
    }
    regs.replace(
        RCTL,
        RCTL_UNICAST_PROMISCUOUS | RCTL_MULTICAST_PROMISCUOUS,
        bits,
    );
}

/// Whether the device still receives and transmits, as it was told.
pub(super) fn fault(regs: &Regs) -> Option<Fault> {
    let (rx, tx) = (regs.read(RCTL), regs.read(TCTL));
    let enabled = rx & RCTL_ENABLE != 0 && tx & TCTL_ENABLE != 0;
    (!enabled).then_some(Fault::ForeignReset)
}

/// State of the link; `None` when the device does not answer.
pub(super) fn link(regs: &Regs) -> Option<Link> {
    let status = regs.read(STATUS);
    if status == u32::MAX {
        return None;
    }
    let up = status & STATUS_LINK_UP != 0;
    let mbps = match status >> 6 & 3 {
        _ if !up => 0,
        0 => 10,
        1 => 100,
        _ => 1000,
    };
    Some(Link {
        up,
        mbps,
        full_duplex: status & STATUS_FULL_DUPLEX != 0,
    })
}

/// Writes the hash key and spreads the hash over `queues` queues; `entry` gives a queue's byte in the table.
pub(super) fn write_rss(regs: &Regs, key: &[u8; 40], queues: usize, entry: impl Fn(u8) -> u8) {
    let (words, _) = key.as_chunks::<4>();
    for (n, word) in words.iter().enumerate() {
        regs.write(RSSRK + 4 * n, u32::from_le_bytes(*word));
    }
    let queue_of = |slot: usize| entry(u8::try_from(slot % queues.max(1)).unwrap_or(0));
    for n in 0..32 {
        let four = std::array::from_fn(|i| queue_of(4 * n + i));
        regs.write(RETA + 4 * n, u32::from_le_bytes(four));
    }
}

/// Statistics registers that reading clears (82574 datasheet 10.2.7, 82576 datasheet 8.18), the ones that tell something.
pub(super) const COUNTERS: &[CounterRegister] = &[
    counter("crc_errors", 0x4000, Counts::Errors),
    counter("alignment_errors", 0x4004, Counts::Errors),
    counter("rx_errors", 0x400c, Counts::Errors),
    counter("missed_packets", 0x4010, Counts::Dropped),
    counter("excessive_collisions", 0x4018, Counts::Other),
    counter("late_collisions", 0x4020, Counts::Other),
    counter("length_errors", 0x4040, Counts::Other),
    counter("xon_received", 0x4048, Counts::Other),
    counter("xoff_received", 0x4050, Counts::Other),
    counter("good_packets_received", 0x4074, Counts::Other),
    counter("good_packets_sent", 0x4080, Counts::Other),
    counter("no_receive_buffers", 0x40a0, Counts::Other),
    counter("undersize", 0x40a4, Counts::Errors),
    counter("fragments", 0x40a8, Counts::Errors),
    counter("oversize", 0x40ac, Counts::Errors),
    counter("jabber", 0x40b0, Counts::Errors),
];

pub(super) const fn counter(name: &'static str, offset: usize, counts: Counts) -> CounterRegister {
    CounterRegister {
        name,
        offset,
        counts,
    }
}
