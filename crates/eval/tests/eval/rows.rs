//! Files that are malformed in part or in whole.

use eval::Error;

use crate::support::{Tiny, corpus, squad};

#[test]
fn malformed_rows_are_counted_in_the_report_and_too_many_are_refused() {
    let tiny = Tiny::new();
    let mut rows = squad(10);
    rows.insert(3, "{\"context\": \"no question\"}".to_owned());
    rows.push(r#"{"context": "c", "question": "q", "answers": []}"#.to_owned());
    let line = "--task squad --limit 4 --methods none";
    let error = tiny.run(line, &rows).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Rows(rows::Error::Malformed {
                malformed: 2,
                rows: 22,
                first: 4,
                ..
            })
        ),
        "{error}"
    );
    let report = tiny
        .run(&format!("{line} --max-malformed 0.1"), &rows)
        .unwrap();
    assert_eq!(report.about.malformed, 2);
}

#[test]
fn a_file_of_another_task_is_refused_with_what_is_missing() {
    let tiny = Tiny::new();
    for task in [
        "squad",
        "metaicl",
        "msc",
        "persona_chat",
        "stream",
        "forget",
    ] {
        let error = tiny.run(&format!("--task {task}"), &corpus(3)).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Rows(rows::Error::Malformed { malformed: 3, .. })
            ),
            "{task}: {error}"
        );
    }
    let error = tiny.run("--task text", &squad(3)).unwrap_err().to_string();
    assert!(error.contains("text"), "{error}");
}

#[test]
fn a_task_without_its_file_says_so() {
    let tiny = Tiny::new();
    let args = crate::support::args("--task squad");
    let error = eval::run::evaluate(&args, &tiny.lm, &tiny.text).unwrap_err();
    assert!(matches!(error, Error::NoData { task: "squad" }), "{error}");
}

#[test]
fn rows_that_give_no_case_are_an_error_not_an_empty_report() {
    let tiny = Tiny::new();
    let error = tiny
        .run("--task squad --context-tokens 2", &squad(3))
        .unwrap_err();
    assert!(matches!(error, Error::TooFew { .. }), "{error}");
}
