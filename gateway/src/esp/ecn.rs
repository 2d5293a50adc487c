//! ECN at the end of a tunnel, RFC 6040 section 4.2.

use sa_store::drops::DropReason;

/// Not ECN-capable transport.
pub const NOT_ECT: u8 = 0;
/// ECN-capable transport (1).
pub const ECT_1: u8 = 1;
/// ECN-capable transport (0).
pub const ECT_0: u8 = 2;
/// Congestion experienced.
pub const CE: u8 = 3;

/// The TOS byte of the inner packet after decapsulation; DSCP stays the inner one.
///
/// # Errors
/// `EcnInvalid`: a congestion mark met a packet whose sender cannot understand it; RFC 6040 drops it.
#[inline(always)]
pub const fn combine(inner: u8, outer: u8) -> Result<u8, DropReason> {
    let merged = match (inner & 3, outer & 3) {
        (NOT_ECT, CE) => return Err(DropReason::EcnInvalid),
        (NOT_ECT, _) => NOT_ECT,
        (_, CE) | (CE, _) => CE,
        (ECT_0, ECT_1) => ECT_1,
        (i, _) => i,
    };
    Ok(inner & 0xfc | merged)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_of_rfc_6040_figure_4_holds() {
        // Rows: inner Not-ECT, ECT(0), ECT(1), CE. Columns: outer, in the same order.
        let order = [NOT_ECT, ECT_0, ECT_1, CE];
        let want = [
            [Some(NOT_ECT), Some(NOT_ECT), Some(NOT_ECT), None],
            [Some(ECT_0), Some(ECT_0), Some(ECT_1), Some(CE)],
            [Some(ECT_1), Some(ECT_1), Some(ECT_1), Some(CE)],
            [Some(CE), Some(CE), Some(CE), Some(CE)],
        ];
        for (inner, row) in order.iter().zip(want) {
            for (outer, cell) in order.iter().zip(row) {
                let got = combine(0xb8 | inner, 0x44 | outer);
                assert_eq!(got.ok(), cell.map(|e| 0xb8 | e), "{inner} {outer}");
            }
        }
    }
}
