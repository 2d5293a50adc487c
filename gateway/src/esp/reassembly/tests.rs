use super::super::testing::{Ip, frame, parsed, pool};
use super::*;
use crate::wire::ipv4::MF;
use pmd::Pool;
use proptest::prelude::*;

const SECOND: u64 = 1_000_000_000;

/// `payload[from..to]` of an IP packet as a fragment.
fn piece(family: Family, id: u16, next: u8, payload: &[u8], from: usize, to: usize) -> Vec<u8> {
    let more = to < payload.len();
    let mut ip = Ip::new(family);
    match family {
        Family::V4 => {
            ip.id = id;
            ip.frag = u16::try_from(from / 8).unwrap() | if more { MF } else { 0 };
            ip.packet(next, &payload[from..to])
        }
        Family::V6 => {
            let field = u16::try_from(from).unwrap() | u16::from(more);
            let [a, b] = field.to_be_bytes();
            let [c, d] = id.to_be_bytes();
            let header = [next, 0, a, b, 0, 0, c, d];
            ip.packet(44, &[&header[..], &payload[from..to]].concat())
        }
    }
}

struct Bed {
    arena: std::sync::Arc<pmd::Arena>,
    pool: Pool,
    r: Reassembler,
    done: Vec<(Frame, Fate)>,
    pushed: usize,
    out: usize,
}

impl Bed {
    fn new(config: ReassemblyConfig) -> Self {
        let (arena, pool) = pool(256, 10240);
        Self {
            arena,
            pool,
            r: Reassembler::new(config),
            done: Vec::new(),
            pushed: 0,
            out: 0,
        }
    }

    /// The reassembled packet, if any, and the fates of the frames that came back.
    fn push(&mut self, bytes: &[u8], now: u64) -> (Option<Vec<u8>>, Vec<Fate>) {
        let f = frame(&mut self.pool, bytes);
        self.pushed += 1;
        let whole = self.r.push(f, &parsed(bytes), now, &mut self.done);
        let whole = whole.map(|f| {
            let b = f.data().to_vec();
            self.pool.put(f);
            self.out += 1;
            b
        });
        (whole, self.fates())
    }

    fn fates(&mut self) -> Vec<Fate> {
        let fates: Vec<_> = self.done.iter().map(|(_, f)| *f).collect();
        self.done.drain(..).for_each(|(f, _)| self.pool.put(f));
        self.out += fates.len();
        assert_eq!(
            self.pushed,
            self.out + self.r.held(),
            "every frame is accounted"
        );
        fates
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.r.drain(&mut self.done);
        self.fates();
        assert_eq!(self.r.held(), 0);
        assert!(self.arena.outstanding() <= 256);
    }
}

const REASSEMBLED: Fate = Fate::Consumed(Consumed::Reassembled);
const INVALID: Fate = Fate::Dropped(DropReason::FragmentInvalid);

fn body(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 7).to_le_bytes()[0]).collect()
}

#[test]
fn two_halves_in_either_order_become_the_packet() {
    let body = body(3000);
    for family in [Family::V4, Family::V6] {
        let mut whole = Ip::new(family);
        whole.id = 9;
        let whole = whole.packet(50, &body);
        let halves = [
            piece(family, 9, 50, &body, 0, 1480),
            piece(family, 9, 50, &body, 1480, 3000),
        ];
        for order in [[0, 1], [1, 0]] {
            let mut bed = Bed::new(ReassemblyConfig::default());
            assert_eq!(bed.push(&halves[order[0]], 0), (None, vec![]));
            let got = bed.push(&halves[order[1]], 1);
            assert_eq!(got, (Some(whole.clone()), vec![REASSEMBLED]));
        }
    }
}

#[test]
fn an_overlap_condemns_the_datagram_and_what_still_comes_of_it() {
    let body = body(64);
    let overlaps: [&[(usize, usize)]; 4] = [
        &[(0, 32), (24, 64)],
        &[(32, 64), (0, 40)],
        &[(16, 32), (8, 40)],
        &[(8, 40), (16, 32)],
    ];
    for family in [Family::V4, Family::V6] {
        for cuts in overlaps {
            let mut bed = Bed::new(ReassemblyConfig::default());
            bed.push(&piece(family, 1, 50, &body, cuts[0].0, cuts[0].1), 0);
            let got = bed.push(&piece(family, 1, 50, &body, cuts[1].0, cuts[1].1), 0);
            assert_eq!(got, (None, vec![INVALID, INVALID]), "{cuts:?}");
            let late = bed.push(&piece(family, 1, 50, &body, 40, 64), 0);
            assert_eq!(late, (None, vec![INVALID]));
            let other = bed.push(&piece(family, 2, 50, &body, 0, 32), 0);
            assert_eq!(other, (None, vec![]), "another datagram is untouched");
        }
    }
}

#[test]
fn an_exact_copy_is_dropped_alone_and_a_forged_copy_with_all() {
    let body = body(64);
    let mut bed = Bed::new(ReassemblyConfig::default());
    let first = piece(Family::V4, 1, 50, &body, 0, 32);
    bed.push(&first, 0);
    assert_eq!(bed.push(&first, 0), (None, vec![INVALID]));
    assert!(
        bed.push(&piece(Family::V4, 1, 50, &body, 32, 64), 0)
            .0
            .is_some()
    );
    bed.push(&first, 0);
    let mut forged = first;
    forged[40] ^= 1;
    assert_eq!(bed.push(&forged, 0), (None, vec![INVALID, INVALID]));
}

#[test]
fn a_datagram_has_one_end_and_nothing_behind_it() {
    let long = body(128);
    // From, to, length of the datagram that the fragment claims to be of.
    let bad: [[(usize, usize, usize); 2]; 4] = [
        [(32, 64, 64), (64, 96, 96)],
        [(64, 96, 96), (32, 64, 64)],
        [(64, 96, 128), (32, 64, 64)],
        [(32, 64, 64), (64, 96, 128)],
    ];
    for family in [Family::V4, Family::V6] {
        for cuts in bad {
            let mut bed = Bed::new(ReassemblyConfig::default());
            let [a, b] = cuts.map(|(a, b, n)| piece(family, 1, 50, &long[..n], a, b));
            assert_eq!(bed.push(&a, 0), (None, vec![]));
            assert_eq!(bed.push(&b, 0), (None, vec![INVALID, INVALID]), "{cuts:?}");
        }
    }
}

#[test]
fn whole_packets_and_fragments_beyond_65535_bytes_are_refused() {
    let mut bed = Bed::new(ReassemblyConfig::default());
    let mut ip = Ip::new(Family::V4);
    ip.frag = 8189;
    let b = ip.packet(50, &[0; 24]);
    assert!(crate::wire::parse_ip(&b, super::super::testing::NATT).is_err());
    let (_, fates) = bed.push(&Ip::new(Family::V4).udp(8), 0);
    assert_eq!(fates, [INVALID], "no fragment at all");
}

#[test]
fn what_waits_too_long_is_given_up() {
    let body = body(64);
    let mut bed = Bed::new(ReassemblyConfig::default());
    bed.push(&piece(Family::V4, 1, 50, &body, 0, 32), 0);
    bed.push(&piece(Family::V4, 2, 50, &body, 0, 32), SECOND);
    let mut done = Vec::new();
    bed.r.expire(2 * SECOND - 1, &mut done);
    assert!(done.is_empty());
    let (whole, fates) = bed.push(&piece(Family::V4, 1, 50, &body, 32, 64), 2 * SECOND);
    assert_eq!(whole, None, "too late");
    assert_eq!(fates, [Fate::Dropped(DropReason::FragmentTimeout)]);
    assert_eq!(bed.r.held(), 2);
}

#[test]
fn the_oldest_datagram_makes_room_and_bounds_hold() {
    let body = body(64);
    let config = ReassemblyConfig {
        datagrams: 4,
        frames: 6,
        pieces: 3,
        timeout: SECOND,
    };
    let mut bed = Bed::new(config);
    for id in 0..4 {
        bed.push(&piece(Family::V4, id, 50, &body, 0, 16), 0);
    }
    let (_, fates) = bed.push(&piece(Family::V4, 4, 50, &body, 0, 16), 0);
    assert_eq!(fates, [Fate::Dropped(DropReason::FragmentMemory)]);
    assert!(
        bed.push(&piece(Family::V4, 4, 50, &body, 16, 64), 0)
            .0
            .is_some()
    );
    for id in 10..400 {
        bed.push(&piece(Family::V6, id, 50, &body, 0, 16), 0);
        bed.push(&piece(Family::V6, id, 50, &body, 32, 48), 0);
        assert!(bed.r.held() <= 6 && bed.r.table.len() <= 4);
        assert!(bed.r.ages.len() <= 2 * 4 + 17);
    }
    let mut bed = Bed::new(config);
    for i in 0..3 {
        bed.push(&piece(Family::V4, 1, 50, &body, i * 8, i * 8 + 8), 0);
    }
    let (_, fates) = bed.push(&piece(Family::V4, 1, 50, &body, 40, 48), 0);
    assert_eq!(fates, [Fate::Dropped(DropReason::FragmentMemory); 4]);
}

#[test]
fn completed_datagrams_leave_nothing_behind() {
    let body = body(64);
    let mut bed = Bed::new(ReassemblyConfig::default());
    for id in 0..5000 {
        bed.push(&piece(Family::V4, id, 50, &body, 0, 32), 0);
        assert!(
            bed.push(&piece(Family::V4, id, 50, &body, 32, 64), 0)
                .0
                .is_some()
        );
    }
    assert_eq!(bed.r.held(), 0);
    assert!(bed.r.ages.len() < 600 && bed.r.spare.len() < 4);
}

#[test]
fn congestion_marks_survive_unless_the_sender_cannot_read_them() {
    let body = body(64);
    for family in [Family::V4, Family::V6] {
        for (a, b, want) in [
            (2, 3, Some(3)),
            (2, 2, Some(2)),
            (0, 3, None),
            (0, 0, Some(0)),
        ] {
            let mut bed = Bed::new(ReassemblyConfig::default());
            let mark = |mut p: Vec<u8>, tos| {
                match family {
                    Family::V4 => crate::wire::ipv4::set_tos(p.first_chunk_mut().unwrap(), tos),
                    Family::V6 => ipv6::set_tos(p.first_chunk_mut().unwrap(), tos),
                }
                p
            };
            bed.push(&mark(piece(family, 1, 50, &body, 0, 32), a), 0);
            let (whole, _) = bed.push(&mark(piece(family, 1, 50, &body, 32, 64), b), 0);
            assert_eq!(whole.map(|w| parsed(&w).tos), want);
        }
    }
}

#[test]
fn a_packet_that_no_frame_holds_is_dropped_with_its_reason() {
    let (_arena, mut small) = pool(16, 2048);
    let body = body(2400);
    let mut r = Reassembler::new(ReassemblyConfig::default());
    let mut done = Vec::new();
    for (from, to) in [(0, 1200), (1200, 2400)] {
        let b = piece(Family::V4, 1, 50, &body, from, to);
        let f = frame(&mut small, &b);
        assert!(r.push(f, &parsed(&b), 0, &mut done).is_none());
    }
    assert_eq!(done.len(), 2);
    for (f, fate) in done {
        assert_eq!(fate, Fate::Dropped(DropReason::NoRoom));
        small.put(f);
    }
}

#[test]
fn headers_in_front_of_an_ipv6_fragment_header_are_kept() {
    let mut bed = Bed::new(ReassemblyConfig::default());
    let hop = [44, 0, 1, 4, 0, 0, 0, 0];
    let ip = Ip::new(Family::V6);
    let a = [&hop[..], &[50, 0, 0, 1, 0, 0, 0, 1], &[7; 16]].concat();
    let b = [&hop[..], &[50, 0, 0, 16, 0, 0, 0, 1], &[8; 5]].concat();
    bed.push(&ip.packet(0, &a), 0);
    let whole = bed.push(&ip.packet(0, &b), 0).0.unwrap();
    let want = [&[50, 0, 1, 4, 0, 0, 0, 0][..], &[7; 16], &[8; 5]].concat();
    assert_eq!(whole, ip.packet(0, &want));
}

proptest! {
    #[test]
    fn any_split_in_any_order_gives_the_packet_back(
        v6 in any::<bool>(), len in 16usize..4000, mut cuts in proptest::collection::vec(1usize..500, 1..20),
        order in any::<u64>())
    {
        let family = if v6 { Family::V6 } else { Family::V4 };
        let body = body(len);
        cuts.iter_mut().for_each(|c| *c = *c * 8 % len.next_multiple_of(8));
        cuts.retain(|c| *c > 0 && *c < len);
        cuts.extend([0, len]);
        cuts.sort_unstable();
        cuts.dedup();
        prop_assume!(cuts.len() > 2);
        let mut parts: Vec<_> = cuts
            .windows(2)
            .map(|w| piece(family, 77, 50, &body, w[0], w[1]))
            .collect();
        let mut x = order | 1;
        for i in (1..parts.len()).rev() {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            parts.swap(i, usize::try_from(x >> 33).unwrap() % (i + 1));
        }
        let mut bed = Bed::new(ReassemblyConfig::default());
        let last = parts.pop().unwrap();
        for b in &parts {
            prop_assert_eq!(bed.push(b, 0), (None, vec![]));
        }
        let mut want = Ip::new(family);
        want.id = 77;
        let (whole, fates) = bed.push(&last, 0);
        prop_assert_eq!(whole, Some(want.packet(50, &body)));
        prop_assert_eq!(fates, vec![REASSEMBLED; parts.len()]);
    }

    #[test]
    fn arbitrary_fragments_never_give_bytes_that_were_not_sent_in_place(
        cuts in proptest::collection::vec((0usize..12, 1usize..6), 1..30))
    {
        // Every fragment holds the right bytes for its place: whatever comes out is a prefix of the body.
        let body = body(96);
        let mut bed = Bed::new(ReassemblyConfig { datagrams: 2, frames: 5, pieces: 4, timeout: 9 });
        for (i, (at, n)) in cuts.iter().enumerate() {
            let (from, to) = (at * 8, (at * 8 + n * 8).min(96));
            let b = piece(Family::V4, u16::from(i % 3 == 0), 50, &body, from, to);
            if parsed(&b).frag == Frag::No {
                continue;
            }
            let (whole, _) = bed.push(&b, u64::try_from(i).unwrap());
            prop_assert!(bed.r.held() <= 5);
            if let Some(w) = whole {
                prop_assert_eq!(&w[20..], &body[..]);
            }
        }
    }

    #[test]
    fn arbitrary_bytes_are_survived(data in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let (_arena, mut pool) = pool(64, 2048);
        fuzz_reassembly(&data, &mut pool);
    }
}
