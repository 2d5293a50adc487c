//! Checks of the core: every order of events in a small world, and thousands of rekeys in virtual time.

mod small;

use std::cell::RefCell;
use std::collections::{HashSet, VecDeque};

use sa_store::runtime::TunnelIdx;
use sa_store::sa::SaId;

use super::machine::Machine;
use super::terms::{Published, Reason, Spent, Step, Wanted, World};
use super::{Config, Timing};
use small::{Facts, GENERATIONS, Happens, Installed, Small, T, files, outbound, sa, timing};

#[test]
fn every_order_of_events_keeps_inbound_sas_and_one_sender() {
    let mut seen = HashSet::new();
    let mut queue = VecDeque::from([(Small::new(), 0_u32)]);
    let mut transitions = 0_u64;
    let mut finished = 0_u64;
    while let Some((state, depth)) = queue.pop_front() {
        for what in state.possible() {
            let mut next = state.clone();
            next.happen(what);
            transitions += 1;
            if seen.insert(next.fingerprint()) {
                finished += u64::from(
                    next.state.sender == Some(outbound(GENERATIONS - 1))
                        && next.state.sas.len() == 2
                        && !next.both,
                );
                assert!(depth < 200, "it does not end");
                queue.push_back((next, depth + 1));
            }
        }
    }
    eprintln!(
        "{} states, {transitions} transitions, {finished} of them at rest",
        seen.len()
    );
    assert!(seen.len() > 2000, "the world is too small: {}", seen.len());
    assert!(finished > 0, "no rekey ever ended");
}

/// Whatever happened before: once events stop and workers acknowledge, every rekey comes to its end.
#[test]
fn every_rekey_ends_once_nothing_more_happens() {
    let mut seen = HashSet::new();
    let mut queue = VecDeque::from([Small::new()]);
    while let Some(state) = queue.pop_front() {
        if seen.len() > 3000 {
            break;
        }
        let mut rest = state.clone();
        for _ in 0..40 {
            if rest.acknowledged < rest.epoch {
                rest.happen(Happens::Acknowledge);
            }
            rest.happen(Happens::Tick);
        }
        let newest = outbound(rest.newest);
        if rest.facts.spent(newest).dead && rest.state.sender != Some(newest) {
            // It came to its end while it waited, and no other has come since: the old one goes on.
            assert!(!rest.facts.spent(rest.state.sender.unwrap()).dead);
            assert_eq!(rest.machine.view(T).reason, Some(Reason::Packets));
        } else {
            assert_eq!(rest.state.sender, Some(newest));
            assert_eq!(rest.state.sas.len(), if rest.both { 4 } else { 2 });
        }
        for what in state.possible() {
            let mut next = state.clone();
            next.happen(what);
            if seen.insert(next.fingerprint()) {
                queue.push_back(next);
            }
        }
    }
}

#[test]
fn thousands_of_rekeys_pass_in_virtual_time() {
    const TUNNELS: u32 = 1000;
    const ROUNDS: u32 = 20;
    let config = Config {
        hook: Some("/hook".into()),
        ..Config::default()
    };
    let second = 1_000_000_000_u64;
    let mut m = Machine::new(config.timing());
    let facts = RefCell::new(Facts::default());
    let mut epoch = 1;
    let pair = |t: u32, g: u32| [sa(t), sa(t + TUNNELS)].map(|s| SaId { generation: g, ..s });
    let mut live: Vec<u32> = vec![1; TUNNELS as usize];
    let publish = |m: &mut Machine, t: u32, g: u32, epoch: u64| {
        let ([i, o], idx) = (pair(t, g), TunnelIdx(t));
        let old = pair(t, g - 1);
        let dropped = |s: SaId| if g > 1 { vec![s] } else { Vec::new() };
        let hold = m.hold(
            idx,
            &Wanted {
                dropped_in: dropped(old[0]),
                dropped_out: dropped(old[1]),
                inbound: true,
                target: Some(None),
            },
        );
        let published = Published {
            inbound: vec![i],
            outbound: vec![o],
            sender: hold.sender.or(Some(o)),
            held: hold.keep,
            target: Some(o),
        };
        m.published(idx, &published, epoch);
    };
    for t in 0..TUNNELS {
        publish(&mut m, t, 1, epoch);
    }
    let (mut switches, mut removals, mut asks, mut most) = (0, 0, 0, 0);
    let mut now = second;
    let mut pending: VecDeque<(u64, u32)> = VecDeque::new();
    while switches < TUNNELS * ROUNDS {
        now += second / 10;
        assert!(now < 3600 * 24 * second, "{switches} switches");
        // A soft limit every 100 seconds, spread over the tunnels.
        for t in (0..TUNNELS).filter(|t| (now / (second / 10) + u64::from(*t)).is_multiple_of(1000))
        {
            let spent = Spent {
                reason: Some(Reason::Time),
                ..Spent::default()
            };
            let out = pair(t, live[t as usize])[1];
            facts.borrow_mut().spent.insert(out, spent);
            m.attend(TunnelIdx(t));
        }
        while pending.front().is_some_and(|p| p.0 <= now) {
            let Some((_, t)) = pending.pop_front() else {
                break;
            };
            m.answered(TunnelIdx(t), now);
            live[t as usize] += 1;
            epoch += 1;
            publish(&mut m, t, live[t as usize], epoch);
        }
        let steps = m.step(now, epoch, epoch + 1, &*facts.borrow());
        for step in steps {
            match step {
                Step::Ask { tunnel, .. } => {
                    asks += 1;
                    pending.push_back((now + second / 5, tunnel.0));
                    most = most.max(pending.len());
                }
                Step::Switch { .. } => switches += 1,
                Step::Remove { .. } => removals += 1,
                Step::Overdue { .. } => panic!("{step:?}"),
                Step::Expired { .. } | Step::Renewed { .. } => {}
            }
        }
        epoch += 1;
    }
    assert!(most <= config.hook_parallel, "{most} at once");
    assert!(asks >= switches, "{asks} attempts");
    eprintln!("{switches} rekeys, {removals} SAs removed");
}

#[test]
fn a_missing_successor_is_asked_for_again_and_again_and_becomes_an_alarm() {
    let mut s = Small {
        machine: Machine::new(Timing {
            switch_delay: 2,
            ..timing()
        }),
        ..Small::new()
    };
    files(&mut s.machine, &mut s.state, &[0], 1);
    let set = |s: &mut Small, permille, dead| {
        let spent = Spent {
            reason: Some(Reason::Bytes),
            permille,
            dead,
        };
        s.facts.spent.insert(outbound(0), spent);
        s.machine.attend(T);
    };
    set(&mut s, 0, false);
    let mut asked = Vec::new();
    let mut alarms = Vec::new();
    for now in 11..40 {
        if now == 30 {
            set(&mut s, 500, false);
        }
        for step in s.machine.step(now, 1, 2, &s.facts) {
            match step {
                Step::Ask { attempt, .. } => {
                    asked.push((now, attempt));
                    s.machine.answered(T, now);
                }
                Step::Overdue { .. } => alarms.push(now),
                Step::Expired { reason, .. } => assert_eq!((now, reason), (11, Reason::Bytes)),
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!(
        asked[..4],
        [(11, 1), (13, 2), (17, 3), (21, 4)],
        "{asked:?}"
    );
    assert_eq!(alarms, [30]);
    assert!(s.machine.is_overdue(T));
    assert_eq!(s.machine.view(T).state, "overdue");
    // The successor ends it.
    s.newest = 1;
    s.epoch = 2;
    s.files();
    let steps = s.machine.step(40, 1, 3, &s.facts);
    assert_eq!(steps, [Step::Renewed { tunnel: T }]);
    assert_eq!(s.machine.view(T).state, "workers");
}

/// Limits that pass before a successor may send: it sends in its turn all the same, and is replaced then.
#[test]
fn successors_that_are_spent_before_they_send_have_their_turn() {
    const WAIT: u64 = 10;
    const LIFE: u64 = 3;
    const ROUNDS: u32 = 50;
    let mut m = Machine::new(Timing {
        switch_delay: WAIT,
        ..timing()
    });
    let (mut state, mut facts) = (Installed::default(), Facts::default());
    let (mut newest, mut born, mut epoch, mut switches) = (0, 0, 1, Vec::new());
    files(&mut m, &mut state, &[0], epoch);
    for now in 1..u64::from(ROUNDS) * (WAIT + LIFE + 2) {
        if now >= born + LIFE {
            let spent = Spent {
                reason: Some(Reason::Time),
                ..Spent::default()
            };
            facts.spent.insert(outbound(newest), spent);
            m.attend(T);
        }
        epoch += 1;
        for step in m.step(now, epoch, epoch + 1, &facts) {
            match step {
                Step::Switch { to, .. } => {
                    assert_eq!(to, outbound(newest));
                    state.sender = Some(to);
                    switches.push(now);
                }
                // The answer is there at once, and lives no longer.
                Step::Ask { .. } => {
                    m.answered(T, now);
                    newest += 1;
                    born = now;
                    epoch += 1;
                    files(&mut m, &mut state, &[newest], epoch);
                }
                Step::Remove { sa, .. } => state.sas.retain(|s| *s != sa),
                _ => {}
            }
        }
    }
    assert!(switches.len() + 2 >= ROUNDS as usize, "{switches:?}");
}

#[test]
fn a_tunnel_taken_out_while_it_wants_a_successor_wants_none_any_more() {
    let mut m = Machine::new(timing());
    let (mut state, mut facts) = (Installed::default(), Facts::default());
    files(&mut m, &mut state, &[0], 1);
    let spent = Spent {
        reason: Some(Reason::Bytes),
        ..Spent::default()
    };
    facts.spent.insert(outbound(0), spent);
    m.attend(T);
    let steps = m.step(10, 1, 2, &facts);
    assert!(matches!(steps[0], Step::Expired { .. }), "{steps:?}");
    m.answered(T, 10);
    files(&mut m, &mut state, &[], 2);
    assert_eq!(m.step(11, 2, 3, &facts), [Step::Renewed { tunnel: T }]);
    assert_eq!((m.active(), m.tunnels().count()), (0, 0));
}

#[test]
fn an_sa_taken_out_without_a_successor_goes_at_once() {
    let mut m = Machine::new(timing());
    let mut state = Installed::default();
    files(&mut m, &mut state, &[0, 1], 1);
    assert_eq!(state.sender, Some(outbound(1)));
    files(&mut m, &mut state, &[], 2);
    assert_eq!(state, Installed::default());
    assert_eq!(m.active(), 0);
}
