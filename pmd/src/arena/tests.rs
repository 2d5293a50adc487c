use proptest::prelude::*;

use super::*;
use crate::pool::Pool;

fn config(frames: u32, stride: u32) -> ArenaConfig {
    ArenaConfig {
        frames,
        stride,
        ..ArenaConfig::default()
    }
}

#[test]
fn a_configuration_that_cannot_hold_packets_is_refused() {
    assert!(matches!(
        Arena::new(config(0, 2048)),
        Err(ArenaError::NoFrames)
    ));
    for stride in [0, 64, 2000, 65536, 1 << 31] {
        assert!(matches!(Arena::new(config(1, stride)), Err(ArenaError::Stride(s)) if s == stride));
    }
    let headroom = |headroom| {
        Arena::new(ArenaConfig {
            headroom,
            ..config(1, 2048)
        })
    };
    assert!(matches!(headroom(127), Err(ArenaError::Headroom(127))));
    assert!(matches!(headroom(2000), Err(ArenaError::NoRoom { .. })));
}

#[test]
fn frames_do_not_overlap_and_keep_the_promised_room() {
    for stride in [256, 2048, 2112, 4096, 10240, 65472] {
        let arena = Arena::new(config(64, stride)).unwrap();
        let mut pool = Pool::new(&arena, 8);
        let mut frames = Vec::new();
        assert_eq!(pool.get_bulk(&mut frames, 100), 64);
        for f in &mut frames {
            assert!(f.headroom() >= 192);
            assert!(f.tailroom() >= arena.largest_packet(0));
            let mark = f.index().to_le_bytes();
            let (head, tail) = (f.headroom(), f.tailroom());
            f.prepend(head).unwrap();
            f.append(tail).unwrap();
            f.data_mut()
                .chunks_exact_mut(4)
                .for_each(|c| c.copy_from_slice(&mark));
        }
        for f in &frames {
            let mark = f.index().to_le_bytes();
            assert!(f.data().chunks_exact(4).all(|c| c == mark));
            assert_eq!(arena.offset_of(f), u64::from(f.index()) * u64::from(stride));
        }
        assert_eq!(arena.outstanding(), 64);
        pool.put_bulk(&mut frames);
        assert_eq!(arena.outstanding(), 0);
    }
}

#[test]
fn a_device_gives_back_what_it_was_given() {
    let arena = Arena::new(config(4, 2048)).unwrap();
    let mut pool = Pool::new(&arena, 4);
    let mut f = pool.get().unwrap();
    assert!(f.set_data(b"to the device"));
    let place = arena.offset_of(&f);
    let raw = f.into_raw();
    assert_eq!(arena.offset_of_raw(&raw), place);
    // SAFETY: no device took the buffer.
    let f = unsafe { arena.from_raw(raw) };
    assert_eq!(f.data(), b"to the device");
    let _ = f.into_raw();
    // SAFETY: the frame was just given away and no device took it.
    let f = unsafe { arena.frame_at(place + 3, 10) }.unwrap();
    assert_eq!(f.data(), b"the device");
    pool.put(f);
    for (offset, len) in [
        (4 * 2048, 1),
        (2047, 2),
        (0, 2049),
        (0, u32::MAX),
        (u64::MAX, 0),
    ] {
        // SAFETY: all of these are refused before a handle is made.
        assert!(unsafe { arena.frame_at(offset, len) }.is_none());
    }
    assert_eq!(arena.outstanding(), 0);
}

#[test]
fn the_mapping_stays_while_a_frame_lives() {
    let arena = Arena::new(config(4, 2048)).unwrap();
    let mut pool = Pool::new(&arena, 4);
    let mut f = pool.get().unwrap();
    let before = leaked_mappings();
    drop(pool);
    drop(arena);
    assert!(leaked_mappings() > before);
    assert!(f.set_data(b"still here"));
    assert_eq!(f.data(), b"still here");
    f.give_back();
}

#[test]
fn the_memory_can_be_mapped_again_from_its_file() {
    for huge in [HugePolicy::Auto, HugePolicy::Never] {
        let arena = Arena::new(ArenaConfig {
            huge,
            ..config(2048, 2048)
        })
        .unwrap();
        let mut pool = Pool::new(&arena, 4);
        let mut f = pool.get().unwrap();
        assert!(f.set_data(b"seen from elsewhere"));
        let (fd, offset) = arena.fd().unwrap();
        // SAFETY: nobody writes to the frame while the second mapping is looked at.
        let again = unsafe {
            memmap2::MmapOptions::new()
                .offset(offset)
                .len(arena.len())
                .map(&fd)
        }
        .unwrap();
        let at = usize::try_from(arena.offset_of(&f)).unwrap();
        assert_eq!(&again[at..at + f.len()], f.data());
        assert!(arena.base().addr().is_multiple_of(4096));
        assert!(arena.huge_bytes() <= arena.len());
        pool.put(f);
    }
}

#[test]
fn colours_spread_heads_only_where_packets_still_fit() {
    assert_eq!(colours(2048, 192), 4);
    assert_eq!(colours(2112, 192), 1);
    assert_eq!(colours(1024, 192), 1);
    assert_eq!(colours(10240, 192), 8);
    let arena = Arena::new(config(8, 10240)).unwrap();
    assert!(arena.largest_packet(128) >= 9000 + 18);
}

/// The frames' places, in the order of their indexes.
fn places(arena: &Arc<Arena>) -> Vec<u64> {
    let mut pool = Pool::new(arena, 64);
    let mut frames = Vec::new();
    pool.get_bulk(&mut frames, usize::MAX);
    let mut places: Vec<_> = frames
        .iter()
        .map(|f| arena.offset_of(f) - f.headroom() as u64)
        .collect();
    assert_eq!(arena.outstanding(), arena.frames());
    pool.put_bulk(&mut frames);
    assert_eq!(arena.outstanding(), 0);
    places.sort_unstable();
    places
}

#[test]
fn frames_that_divide_a_huge_page_leave_none_out() {
    for stride in [256, 2048, 4096, 16_384, 32_768] {
        let arena = Arena::new(config(500, stride)).unwrap();
        let all = (0..500).map(|n| n * u64::from(stride));
        assert_eq!(places(&arena), all.collect::<Vec<_>>());
        assert_eq!(arena.end_of_indexes(), 500);
    }
}

#[test]
fn the_frame_on_the_edge_of_a_huge_page_is_left_out_and_made_up_for() {
    let arena = Arena::new(config(409, 10_240)).unwrap();
    // Number 204 begins 8 KiB before the edge, number 409 6 KiB before the next.
    assert_eq!(arena.frames(), 409);
    assert_eq!(arena.end_of_indexes(), 411);
    let missing: Vec<_> = (0..411)
        .filter(|i| !arena.indexes().any(|j| j == *i))
        .collect();
    assert_eq!(missing, [204, 409]);
    assert_eq!(places(&arena).len(), 409);
}

#[test]
fn as_many_frames_as_an_index_can_name_and_no_more() {
    assert_eq!(end_of_indexes(u32::MAX, 2048), Some(u32::MAX));
    assert_eq!(end_of_indexes(u32::MAX, 2112), None);
    let most = 4_290_000_000;
    let end = end_of_indexes(most, 2112).unwrap();
    assert!(end > most && is_whole(end - 1, 2112));
    let pages = u64::from(end) * 2112 / HUGE_PAGE;
    // Every 33rd edge is between two frames.
    assert_eq!(u64::from(end - most), pages - pages / 33);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn no_frame_crosses_the_edge_of_a_huge_page(frames in 1u32..3000, stride in (4u32..=1023).prop_map(|n| n * 64)) {
        let end = end_of_indexes(frames, stride).unwrap();
        let whole: Vec<_> = (0..end).filter(|&i| is_whole(i, stride)).collect();
        prop_assert_eq!(whole.len(), frames as usize);
        // None more than is needed.
        prop_assert_eq!(whole.last(), Some(&(end - 1)));
        for index in whole {
            let first = u64::from(index) * u64::from(stride);
            let to_the_edge = HUGE_PAGE - first % HUGE_PAGE;
            prop_assert!(to_the_edge >= u64::from(stride));
        }
    }

    #[test]
    fn the_frames_of_an_arena_are_what_was_asked_for_apart_and_within_it(
        frames in 1u32..600,
        stride in (16u32..=1023).prop_map(|n| n * 64),
    ) {
        let arena = Arena::new(ArenaConfig { huge: HugePolicy::Never, lock: false, ..config(frames, stride) }).unwrap();
        let places = places(&arena);
        prop_assert_eq!(places.len(), frames as usize);
        prop_assert!(places.windows(2).all(|p| p[1] - p[0] >= u64::from(stride)));
        prop_assert!(places.iter().all(|p| p / HUGE_PAGE == (p + u64::from(stride) - 1) / HUGE_PAGE));
        prop_assert!(places.last().unwrap() + u64::from(stride) <= arena.len() as u64);
    }
}
