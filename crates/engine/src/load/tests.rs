use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn wait(load: &Load, tokens: usize, requests: usize) -> f64 {
    let before = Before {
        tokens,
        requests,
        places: 4,
    };
    load.wait(before).as_secs_f64()
}

#[test]
fn prompts_wait_for_those_before_them_at_the_speed_of_full_steps() {
    let mut load = Load::default();
    assert_eq!(wait(&load, 1000, 0), 0.0, "nothing is known");
    // A step that could have taken more says nothing of how fast it could go.
    load.step(3, 3, SECOND);
    assert_eq!(wait(&load, 1000, 0), 0.0);
    for _ in 0..100 {
        load.step(50, 200, SECOND / 10);
    }
    assert!((wait(&load, 1000, 0) - 2.0).abs() < 1e-6);
    for _ in 0..200 {
        load.step(50, 200, SECOND / 20);
    }
    assert!((wait(&load, 1000, 0) - 1.0).abs() < 1e-3);
}

#[test]
fn without_a_place_as_many_answers_have_to_end_as_wait_before() {
    let mut load = Load::default();
    for _ in 0..100 {
        load.ended(2 * SECOND);
    }
    assert_eq!(wait(&load, 0, 3), 0.0, "one place is left");
    assert!((wait(&load, 0, 4) - 0.5).abs() < 1e-6);
    assert!((wait(&load, 0, 11) - 4.0).abs() < 1e-6);
}

#[test]
fn what_cannot_be_waited_for_is_for_ever_and_no_panic() {
    let mut load = Load::default();
    load.step(1, usize::MAX, Duration::MAX);
    load.ended(Duration::MAX);
    assert!(
        load.wait(Before {
            tokens: usize::MAX,
            requests: usize::MAX - 1,
            places: 0
        }) > SECOND
    );
}
