//! A refusal's details, as a server encodes them, come out again; and it reads well.

use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::Error;

fn refused(code: Code, message: &str, details: ErrorDetails) -> Error {
    Error::from(Status::with_error_details(code, message, details))
}

#[test]
fn all_details_of_a_refusal_are_decoded() {
    let mut details = ErrorDetails::new();
    details
        .set_error_info(
            "SEQ_GAP",
            "imprint",
            [("expected_seq".to_owned(), "7".to_owned())],
        )
        .add_bad_request_violation("sampling.top_p", "must be in (0, 1]")
        .add_bad_request_violation("stop[2]", "is empty")
        .set_retry_info(Some(Duration::from_millis(1500)));
    let error = refused(Code::FailedPrecondition, "chunk 9 leaves a gap", details);

    let refusal = error.refusal().unwrap();
    assert_eq!(error.code(), Some(Code::FailedPrecondition));
    assert_eq!(refusal.reason, "SEQ_GAP");
    assert_eq!(refusal.expected_seq(), Some(7));
    let fields: Vec<_> = refusal
        .violations
        .iter()
        .map(|violation| &violation.field)
        .collect();
    assert_eq!(fields, ["sampling.top_p", "stop[2]"]);
    assert_eq!(refusal.retry_delay, Some(Duration::from_millis(1500)));
    assert_eq!(
        error.to_string(),
        "chunk 9 leaves a gap (SEQ_GAP)\n  sampling.top_p: must be in (0, 1]\n  stop[2]: is empty\n  \
         worth another try in 1.5 s"
    );
}

#[test]
fn a_refusal_without_details_shows_its_code() {
    let error = Error::from(Status::not_found("no session s_1"));
    assert_eq!(error.to_string(), "no session s_1 (NOT_FOUND)");
    assert_eq!(error.refusal().unwrap().expected_seq(), None);
    assert_eq!(error.refusal().unwrap().retry_delay, None);
}

#[test]
fn details_that_are_no_protobuf_do_not_hide_the_code() {
    let status = Status::with_details(Code::Internal, "broken", vec![0xff; 9].into());
    let error = Error::from(status);
    assert_eq!(error.to_string(), "broken (INTERNAL)");
}
