//! What callers are told: codes, reasons and details of some errors that matter most.

use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::{DOMAIN, Error, Violation};

#[test]
fn a_gap_tells_the_expected_seq() {
    let status = Status::from(Error::Store(store::Error::Gap { want: 3, got: 7 }));
    assert_eq!(status.code(), Code::FailedPrecondition);
    let info = status.get_details_error_info().unwrap();
    assert_eq!(
        (info.reason.as_str(), info.domain.as_str()),
        ("SEQ_GAP", DOMAIN)
    );
    assert_eq!(info.metadata["expected_seq"], "3");
}

#[test]
fn every_violation_is_told_with_its_field() {
    let violations = vec![
        Violation::new("sampling.top_p", "is 2"),
        Violation::new("stop[3]", "is empty"),
    ];
    let status = Status::from(Error::Invalid(violations));
    assert_eq!(status.code(), Code::InvalidArgument);
    let told = status.get_details_bad_request().unwrap().field_violations;
    assert_eq!(
        told.iter()
            .map(|one| one.field.as_str())
            .collect::<Vec<_>>(),
        ["sampling.top_p", "stop[3]"]
    );
    assert_eq!(status.message(), "sampling.top_p is 2; stop[3] is empty");
}

#[test]
fn a_full_server_says_when_to_try_again() {
    for error in [
        Error::Busy { what: "requests" },
        Error::ShuttingDown,
        Error::TooLate {
            wait: std::time::Duration::MAX,
        },
        Error::TooManySessions { limit: 1 },
    ] {
        assert!(
            Status::from(error)
                .get_details_retry_info()
                .unwrap()
                .retry_delay
                .is_some()
        );
    }
}

#[test]
fn what_a_client_sent_is_told_back_in_part_only() {
    let long = "x".repeat(10_000);
    let violation = Violation::new("stop", "is empty");
    for error in [
        Error::UnknownSession(long.clone()),
        Error::UnknownModel(long.clone()),
        Error::UnknownDocument(long.clone()),
        Error::RequestReused(long.clone()),
        Error::Malformed(long.clone()),
        Error::Store(store::Error::NameUsed(long.clone())),
        Error::Store(store::Error::MixedContent(long)),
        Error::Invalid(vec![violation; 1000]),
    ] {
        let status = Status::from(error);
        let details = status.get_error_details();
        let told = details.error_info().unwrap().metadata.values();
        assert!(told.clone().all(|value| value.len() <= 64), "{status}");
        assert!(status.message().len() < 300, "{status}");
        let violations = details.bad_request().map(|bad| &bad.field_violations);
        assert!(violations.is_none_or(|bad| bad.len() <= 16), "{status}");
    }
}
