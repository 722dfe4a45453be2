//! A freed slot: its old address reaches nothing, and its memory holds nothing.

use candle_core::Tensor;
use generator::Core;

use super::*;

/// A core of one dense site [2, 3] of this value.
fn core(value: f32) -> Core {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&1u64.to_le_bytes());
    bytes.push(1);
    for side in [2u64, 3] {
        bytes.extend_from_slice(&side.to_le_bytes());
    }
    bytes.extend([value; 6].iter().flat_map(|value| value.to_le_bytes()));
    Core::read(&mut bytes.as_slice()).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn a_freed_slots_old_address_is_refused_and_its_memory_is_zero() {
    let budget = CoreBudget::new(1000);
    let held = budget.hold(core(2.5));
    let (slot, copy) = (held.slot(), held.clone());
    // The slot's own memory, seen from outside.
    let memory = held.core().matrix(0).unwrap().unwrap();
    drop(held);
    assert!(budget.reaches(slot));
    assert_eq!((values(&memory), budget.used()), (vec![2.5; 6], 24));
    drop(copy);
    assert!(!budget.reaches(slot));
    assert_eq!((values(&memory), budget.used()), (vec![0.0; 6], 0));
    // The same place, under another address.
    let next = budget.hold(core(1.0));
    assert_eq!(next.slot().index, slot.index);
    assert!(budget.reaches(next.slot()) && !budget.reaches(slot));
    assert_eq!(values(&next.core().matrix(0).unwrap().unwrap()), [1.0; 6]);
}

#[test]
fn a_core_in_the_place_of_another_needs_no_room_if_nobody_else_holds_that() {
    let budget = CoreBudget::new(40);
    let held = budget.hold(core(1.0));
    assert!(budget.check(&core(2.0), None).is_err());
    assert!(budget.check(&core(2.0), Some(&held)).is_ok());
    let copy = held.clone();
    assert!(budget.check(&core(2.0), Some(&held)).is_err());
    drop(copy);
    assert!(budget.check(&core(2.0), Some(&held)).is_ok());
}

#[test]
fn what_is_being_written_counts_while_its_session_holds_it_and_no_longer() {
    let budget = CoreBudget::new(40);
    let held = budget.hold(core(1.0));
    let written = held.to_be_written();
    let again = written.clone();
    assert!(held.is_alone() && budget.check(&core(2.0), Some(&held)).is_ok());
    // An answer holds it, too.
    let answer = held.clone();
    assert!(!held.is_alone());
    drop(answer);
    let slot = held.slot();
    held.leave();
    assert_eq!((budget.used(), budget.reaches(slot)), (0, true));
    assert_eq!(
        values(&written.core().matrix(0).unwrap().unwrap()),
        [1.0; 6]
    );
    drop((written, again));
    assert_eq!((budget.used(), budget.reaches(slot)), (0, false));
    // One that an answer holds counts until that ends.
    let held = budget.hold(core(1.0));
    let answer = held.clone();
    held.leave();
    assert_eq!(budget.used(), 24);
    drop(answer);
    assert_eq!(budget.used(), 0);
}
