//! What is taken for an address.

use super::address;

#[test]
fn the_address_is_found_in_whatever_line_names_it() {
    assert_eq!(
        address("listening on http://127.0.0.1:40123 (pid 7)\n").as_deref(),
        Some("127.0.0.1:40123")
    );
    assert_eq!(address("127.0.0.1:7461").as_deref(), Some("127.0.0.1:7461"));
    assert_eq!(address("loading on 127.0.0.1: wait"), None);
    assert_eq!(address("loading"), None);
}
