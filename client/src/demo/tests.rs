//! The demonstration against a server in memory: it succeeds where the imprint works and fails where
//! it does not.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex},
};

use super::{
    Arm, Options,
    almanac::{FACTS, HARBOUR, OBSERVATORY},
    report::holds,
    run_with,
};
use crate::{
    Error,
    cli::{Failure, Output},
    fake::{Fake, Quirk},
};

#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

async fn demonstrate(fake: &Fake, json: bool) -> (Result<super::Report, Failure>, String) {
    let kept = Kept::default();
    let mut output = Output::new(json, Box::new(kept.clone()));
    let options = Options {
        json,
        ..Options::default()
    };
    let result = run_with(fake.endpoint(), options, &mut output).await;
    let text = String::from_utf8(kept.0.lock().unwrap().clone()).unwrap();
    (result, text)
}

#[test]
fn every_true_answer_is_in_the_text_and_not_in_the_control() {
    let text = HARBOUR.concat();
    for fact in &FACTS {
        assert!(text.contains(fact.answer), "{}", fact.answer);
        assert!(holds(fact.answer, fact.key), "{}", fact.answer);
        assert!(!holds(OBSERVATORY, fact.key), "{}", fact.answer);
        assert!(!holds(fact.question, fact.key), "{}", fact.question);
    }
}

#[test]
fn a_hit_holds_whole_words_in_a_row_in_any_case() {
    assert!(holds(" The silver marten.", "Silver Marten"));
    assert!(holds("41m? No: 41 metres", "41"));
    assert!(!holds("1641 metres", "41"));
    assert!(!holds("silver and marten", "Silver Marten"));
    assert!(!holds("", "yellow"));
}

#[tokio::test]
async fn an_imprint_that_works_passes_and_all_of_it_is_shown() {
    let fake = Fake::start().await;
    let (result, text) = demonstrate(&fake, false).await;
    let report = result.unwrap();
    assert_eq!(report.versions.len(), HARBOUR.len());
    assert_eq!(report.versions.last().unwrap().adapter_version, 5);
    let hits: Vec<usize> = report.totals.iter().map(|total| total.hits).collect();
    assert_eq!(hits, [0, 10, 10, 0]);
    for line in text.lines() {
        assert!(
            line.chars().count() <= 100,
            "{} columns: {line}",
            line.chars().count()
        );
    }
    for fact in &FACTS {
        assert!(text.contains(fact.question), "{}", fact.question);
    }
    assert_eq!(text.matches(" miss ").count(), 20);
    assert!(
        fake.state().sessions.is_empty(),
        "the sessions were left behind"
    );
}

#[tokio::test]
async fn the_report_is_one_json_document() {
    let fake = Fake::start().await;
    let (_, text) = demonstrate(&fake, true).await;
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["totals"][1]["arm"], "imprinted");
    assert_eq!(
        report["questions"][9]["answers"].as_array().unwrap().len(),
        Arm::ALL.len()
    );
    assert_eq!(report["failures"], serde_json::json!([]));
}

#[tokio::test]
async fn an_imprint_that_changes_nothing_fails_after_all_was_shown() {
    let fake = Fake::with_quirk(Quirk::Deaf).await;
    let (result, text) = demonstrate(&fake, false).await;
    let Err(Failure::Demo(failures)) = result else {
        panic!("{result:?}")
    };
    assert_eq!(failures.len(), 2, "{failures:?}");
    assert!(text.contains("TOTALS"), "{text}");
    assert!(fake.state().sessions.is_empty());
}

#[tokio::test]
async fn a_version_that_does_not_come_fails() {
    let fake = Fake::with_quirk(Quirk::NoVersions).await;
    let kept = Kept::default();
    let mut output = Output::new(true, Box::new(kept));
    let patience = Some(std::time::Duration::from_millis(300));
    let options = Options {
        patience,
        ..Options::default()
    };
    let failure = run_with(fake.endpoint(), options, &mut output)
        .await
        .unwrap_err();
    assert!(
        matches!(failure, Failure::Client(Error::Silent { .. })),
        "{failure:?}"
    );
    assert!(fake.state().sessions.is_empty());
}
