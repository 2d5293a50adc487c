use super::*;
use gateway::crypto::{Fixed, rustcrypto::RustCrypto};

fn step_all(direction: Direction, workers: usize, spread: Spread) -> Rig {
    let one = spread == Spread::Help;
    let scenario = Scenario {
        suite: "aes-128-gcm-16".parse().unwrap(),
        direction,
        sas: if one { 1 } else { 12 },
        flows: 24,
        policies: 50,
        workers,
        spread,
        mix: if one { "1420" } else { "imix" }.parse().unwrap(),
        frames: if one { 1024 } else { 128 },
    };
    let arena = arena_for(workers, scenario.frames).unwrap();
    let mut rig = Rig::new(&scenario, &Fixed(RustCrypto), &arena).unwrap();
    for _ in 0..5 {
        let packets = rig.step(|_| ()).unwrap().packets;
        assert_eq!(packets, if one { 1024 } else { 128 * workers });
    }
    rig
}

#[test]
fn every_packet_comes_out_sealed_and_opened_again() {
    for direction in [Direction::Out, Direction::In] {
        let rig = step_all(direction, 1, Spread::Owner);
        let counters = &rig.counters[0];
        let (sealed, opened) = (counters.encrypted.value(), counters.decrypted.value());
        match direction {
            Direction::Out => assert_eq!((sealed, opened), (640, 0)),
            Direction::In => assert_eq!((sealed, opened), (0, 640)),
        }
    }
}

#[test]
fn packets_are_handed_over_only_when_they_come_to_the_wrong_worker() {
    for direction in [Direction::Out, Direction::In] {
        assert_eq!(step_all(direction, 2, Spread::Owner).handed_over(), 0);
        let handed = step_all(direction, 2, Spread::Any).handed_over();
        assert!((500..800).contains(&handed), "{handed} of 1280");
    }
}

#[test]
fn workers_help_with_one_sa_and_its_packets_stay_in_order() {
    for direction in [Direction::Out, Direction::In] {
        let rig = step_all(direction, 2, Spread::Help);
        let snapshot = rig.store.current();
        let sa = snapshot.sa_at(0).unwrap();
        assert_eq!(sa.live.counters.replays.value(), 0);
        assert!(rig.helped() > 0, "{direction:?}: nobody helped");
        assert_eq!(rig.handed_over(), 0);
    }
}
