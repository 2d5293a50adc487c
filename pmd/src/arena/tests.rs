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
