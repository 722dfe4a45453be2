//! Who leaves first, what stays, and in which order what was said to a session comes to it when it is back.

use std::time::Instant;

use engine::{Command, Event, RequestId, SessionId, Strategy};

use crate::{
    support::*,
    tiers::{core_bytes, meant, rig, tell},
};

/// One step of which the disk learns nothing.
fn step(rig: &mut Rig) -> Vec<Event> {
    let mut events = Vec::new();
    let now = Instant::now();
    rig.engine.step(|| now, &mut events).expect("it is sound");
    events
}

#[test]
fn the_session_that_was_spoken_of_longest_ago_leaves_first() {
    let core = core_bytes();
    let mut rig = rig(usize::MAX, |config| config.core_budget_bytes = 3 * core);
    for session in 1..4 {
        tell(&mut rig, session, Strategy::Parallel);
    }
    rig.ask(generate(1, Some(1), &ids(&[3]), 2, 7));
    tell(&mut rig, 4, Strategy::Parallel);
    let plain = |request, session| generate(request, Some(session), &ids(&[3]), 2, 7);
    for (request, session) in [(2, 1), (3, 3), (4, 4)] {
        assert!(!rig.moves(plain(request, session)).contains(&"core wanted"));
    }
    assert!(rig.moves(plain(5, 2)).contains(&"core wanted"));
}

#[test]
fn a_version_that_is_not_of_all_that_was_told_stays() {
    let core = core_bytes();
    let mut rig = rig(0, |config| config.core_budget_bytes = 2 * core);
    let told = ids(&[5, 6, 7, 8, 9, 3]);
    for session in [1, 2] {
        rig.open(session, Strategy::Parallel);
        rig.ask(ingest(session, 1, 1, &told, true));
    }
    let before = rig.ask(generate(1, Some(2), &ids(&[3, 4]), 4, 7));
    // Both cores are leased while more is told: there is no room for a version of it.
    rig.push(generate(2, Some(1), &ids(&[3]), 30, 1));
    rig.push(generate(3, Some(2), &ids(&[3]), 30, 1));
    rig.step();
    rig.push(ingest(2, 2, 2, &ids(&[1, 2, 3, 4]), true));
    let events = rig.run();
    let left_out = |event: &Event| matches!(event, Event::Read { session, .. } if session.0 == 2);
    assert!(events.iter().any(left_out), "{events:?}");
    rig.ask(evict(2, true));
    let after = rig.ask(generate(4, Some(2), &ids(&[3, 4]), 4, 7));
    assert_eq!(answer(&after, 4), answer(&before, 1));
}

#[test]
fn sums_of_other_documents_are_refused_under_any_name() {
    let (mut stays, mut leaves) = (rig(0, |_| {}), rig(usize::MAX, |_| {}));
    for rig in [&mut stays, &mut leaves] {
        tell(rig, 1, Strategy::Parallel);
        rig.open(2, Strategy::Parallel);
        rig.ask(ingest(2, 1, 1, &ids(&[9, 8, 7, 6, 5]), true));
    }
    leaves.ask(evict(1, true));
    leaves.ask(evict(2, true));
    let (_, _, foreign) = leaves.disk[&SessionId(2)].clone();
    let kept = leaves.disk.get_mut(&SessionId(1)).expect("it is kept");
    kept.2 = foreign;
    let (mine, theirs) = (leaves.ask(meant(7, 1)), stays.ask(meant(7, 1)));
    assert_eq!(answer(&mine, 7), answer(&theirs, 7));
    assert_eq!(leaves.engine.usage().tiers.reread, 1);
}

#[test]
fn what_the_disk_has_lost_is_written_again() {
    let mut rig = rig(usize::MAX, |_| {});
    tell(&mut rig, 1, Strategy::Parallel);
    rig.ask(evict(1, true));
    rig.disk.clear();
    let ask = generate(1, Some(1), &ids(&[3]), 2, 7);
    assert_eq!(rig.moves(ask), ["core wanted"]);
    assert_eq!(rig.moves(evict(1, true)), ["save"]);
}

#[test]
fn a_session_that_something_waits_for_does_not_leave() {
    let mut rig = rig(usize::MAX, |_| {});
    tell(&mut rig, 1, Strategy::Parallel);
    rig.ask(evict(1, false));
    rig.push(meant(1, 1));
    let events = step(&mut rig);
    assert!(matches!(&events[..], [Event::Wanted { .. }]), "{events:?}");
    rig.push(evict(1, true));
    step(&mut rig);
    assert_eq!(rig.engine.usage().tiers.evicted_slots, 0);
}

#[test]
fn what_is_said_behind_a_document_that_is_to_be_forgotten_comes_behind_it() {
    let (mut stays, mut leaves) = (rig(0, |_| {}), rig(usize::MAX, |_| {}));
    for rig in [&mut stays, &mut leaves] {
        tell(rig, 1, Strategy::Parallel);
    }
    // Its core is here, and enough for an answer or an export; to forget needs the sums.
    leaves.ask(evict(1, false));
    let mut said = Vec::new();
    for rig in [&mut stays, &mut leaves] {
        rig.push(forget(1, 2));
        rig.push(generate(1, Some(1), &ids(&[3, 4, 5]), 4, 7));
        rig.push(Command::Export {
            request: RequestId(2),
            session: SessionId(1),
        });
        said.push(rig.run());
    }
    let exported = |events: &[Event]| {
        let found = events.iter().find_map(|event| match event {
            Event::Exported { safetensors, .. } => Some(safetensors.clone()),
            _ => None,
        });
        found.expect("it is exported")
    };
    assert_eq!(answer(&said[1], 1), answer(&said[0], 1));
    assert_eq!(answer(&said[1], 1).len(), answer(&said[0], 1).len());
    assert!(exported(&said[1]) == exported(&said[0]));
}

#[test]
fn who_waited_for_a_session_starts_in_order_of_arrival() {
    let mut rig = rig(usize::MAX, |config| config.max_running = 1);
    for session in [1, 2] {
        tell(&mut rig, session, Strategy::Parallel);
    }
    rig.ask(evict(1, true));
    rig.push(generate(1, None, &ids(&[3]), 20, 1));
    rig.step();
    rig.push(generate(2, Some(1), &ids(&[3]), 3, 7));
    rig.push(generate(3, Some(2), &ids(&[3]), 3, 7));
    let events = rig.run();
    let order = events.iter().filter_map(|event| match event {
        Event::Finished { request, .. } => Some(request.0),
        _ => None,
    });
    assert_eq!(order.collect::<Vec<_>>(), [1, 2, 3]);
}
