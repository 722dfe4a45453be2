//! Who gets a place.

use super::Places;
use crate::auth::Tenant;

#[test]
fn a_tenant_has_its_part_and_leaves_the_rest_to_others() {
    let places = Places::new(3, 2, "calls");
    let (acme, other) = (Tenant::new("acme"), Tenant::new("other"));
    let mine = [places.take(&acme).unwrap(), places.take(&acme).unwrap()];
    let refused = places.take(&acme).unwrap_err().to_string();
    assert!(refused.contains("calls"), "{refused}");
    let theirs = places.take(&other).unwrap();
    // All places are taken; a refusal takes nothing of the tenant's own part.
    for _ in 0..3 {
        places.take(&other).unwrap_err();
    }
    drop(mine);
    let more = places.take(&other).unwrap();
    places.take(&other).unwrap_err();
    drop((theirs, more));
    assert_eq!(places.all.available_permits(), 3);
}
