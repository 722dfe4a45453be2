//! Names and pages. What sessions do with an engine is tested end to end.

use std::time::{Duration, SystemTime};

use super::name::Names;

#[test]
fn names_differ_and_sort_by_their_time() {
    let names = Names::default();
    let early = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let (a, b) = (
        names.next(early),
        names.next(early + Duration::from_secs(1)),
    );
    assert!(a < b && a.len() == 28 && a.starts_with("s_"), "{a} {b}");
    assert_ne!(names.next(early), names.next(early));
    assert_ne!(
        Names::default().next(early)[12..],
        Names::default().next(early)[12..]
    );
}

#[test]
fn a_page_token_is_read_by_its_tenant_and_its_server_only() {
    let names = Names::default();
    let token = names.page("acme", 300);
    assert_eq!(names.read_page("acme", &token).unwrap(), 300);
    assert!(names.read_page("other", &token).is_err());
    assert!(Names::default().read_page("acme", &token).is_err());
    for wrong in [
        "",
        "-",
        "12c",
        "12c-",
        &token.replace("12c", "12d"),
        &format!("0{token}"),
    ] {
        assert!(names.read_page("acme", wrong).is_err(), "{wrong}");
    }
}
