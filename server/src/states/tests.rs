//! What an account takes and gives back, in states.

use engine::{SessionError, Strategy};

use super::{Account, States};

fn free(states: &States) -> usize {
    states.free.available_permits()
}

#[test]
fn a_session_that_has_read_all_gives_back_what_reading_took() {
    let states = States::new(100, 10);
    let mut account = Account::new(states.clone(), Strategy::Parallel);
    account.begin(1).unwrap();
    assert_eq!(free(&states), 5);
    account.read(1); // a version of the open document
    assert_eq!(free(&states), 5);
    account.told(2, false);
    account.read(1);
    assert_eq!(free(&states), 5);
    account.read(2);
    assert_eq!(free(&states), 10);
    account.begin(3).unwrap();
    assert_eq!(free(&states), 4);
    account.end();
    assert_eq!(free(&states), 10);
}

#[test]
fn a_forgotten_document_is_given_back_when_the_engine_has_forgotten_it() {
    let states = States::new(100, 10);
    let mut account = Account::new(states.clone(), Strategy::Parallel);
    for seq in 1..=2 {
        account.begin(seq).unwrap();
        account.told(seq, seq == 2);
    }
    assert_eq!(free(&states), 4);
    account.ends(2);
    account.forgotten(1); // the other one is unread
    assert_eq!(free(&states), 5);
    account.read(2);
    assert_eq!(free(&states), 10);
    account.forgotten(2);
    assert_eq!(free(&states), 10);
}

#[test]
fn what_is_held_back_of_a_forgotten_document_is_not_waited_for() {
    let states = States::new(100, 10);
    let mut account = Account::new(states.clone(), Strategy::Parallel);
    account.begin(1).unwrap();
    account.told(1, false);
    account.begin(2).unwrap();
    account.told(3, true);
    account.ends(2); // the engine was told of 2
    account.forgotten(1);
    assert_eq!(free(&states), 5);
    account.read(2);
    assert_eq!(free(&states), 10);
}

#[test]
fn a_document_is_given_back_where_no_version_has_all_that_is_read() {
    let states = States::new(100, 10);
    let mut account = Account::new(states.clone(), Strategy::Parallel);
    for seq in 1..=2 {
        account.begin(seq).unwrap();
        account.told(seq, false);
    }
    assert_eq!(free(&states), 4);
    account.read(2);
    assert_eq!(free(&states), 10);
    account.forgotten(1); // the newest version is of 1
    assert_eq!(free(&states), 10);
}

#[test]
fn a_sequential_session_takes_as_much_however_many_documents_it_has() {
    let states = States::new(100, 10);
    let mut account = Account::new(states.clone(), Strategy::Sequential);
    for seq in 1..=4 {
        account.begin(seq).unwrap();
        account.told(seq, false);
    }
    assert_eq!(free(&states), 5);
    account.read(4);
    assert_eq!(free(&states), 10);
}

#[test]
fn what_does_not_fit_is_refused_with_the_bytes_and_takes_nothing() {
    let states = States::new(69, 10);
    let mut account = Account::new(states.clone(), Strategy::Parallel);
    account.begin(1).unwrap();
    let over = SessionError::StateBudget {
        bytes: 100,
        limit: 69,
    };
    let mut other = Account::new(states.clone(), Strategy::Parallel);
    assert_eq!(other.begin(1), Err(over));
    assert_eq!(free(&states), 1);
    assert!(account.copy(1).is_err());
    assert_eq!(free(&states), 1);
    account.told(1, false);
    account.read(1);
    drop(account.copy(1).unwrap());
    assert_eq!(free(&states), 6);
}

#[test]
fn what_was_taken_for_a_document_that_has_not_come_serves_the_next_one() {
    let states = States::new(50, 10);
    let mut account = Account::new(states.clone(), Strategy::Parallel);
    account.begin(1).unwrap();
    account.abandon();
    account.begin(1).unwrap();
    assert_eq!(free(&states), 0);
}
