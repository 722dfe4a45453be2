use super::*;

fn answer(nll: f64, tokens: usize, f1: f64) -> Answer {
    Answer {
        nll,
        tokens,
        likeliest: 1,
        f1: Some(f1),
        em: Some(0.0),
        text: Some(format!("{f1}")),
        ..Answer::default()
    }
}

fn example(context: usize, label: &str, answers: &[(Method, Answer)]) -> Example {
    Example {
        context,
        id: String::new(),
        label: label.to_owned(),
        x: None,
        question: String::new(),
        references: Vec::new(),
        answers: answers
            .iter()
            .map(|(method, answer)| (method.name().to_owned(), answer.clone()))
            .collect(),
    }
}

fn about() -> About {
    About {
        task: Task::Squad,
        form: Form::Plain,
        seed: 3,
        limit: 2,
        data: None,
        data_digest: None,
        malformed: 0,
        model_digest: String::new(),
        generator_digest: None,
        context_length: 8192,
        device: None,
        skipped: Vec::new(),
        lora: Vec::new(),
    }
}

/// Two contexts; per-token nats: none 4, none_styled 3, foreign imprint 2.5, imprint 1, in_context 2, its foreign 5, styled 1.5.
fn report() -> Report {
    let of = |n: f64, f1: f64| -> Vec<(Method, Answer)> {
        // The first token count differs by context: figures are total over total.
        [
            (Method::None, 4.0, 0.0),
            (Method::NoneStyled, 3.0, 0.1),
            (Method::InContext, 2.0, 0.2),
            (Method::InContextStyled, 1.5, 0.4),
            (Method::InContextForeign, 5.0, 0.0),
            (Method::Imprint, 1.0, f1),
            (Method::ImprintForeign, 2.5, 0.0),
        ]
        .into_iter()
        .map(|(method, nll, f1)| (method, answer(nll * n, n as usize, f1)))
        .collect()
    };
    let examples = vec![
        example(0, "a", &of(2.0, 0.2)),
        example(1, "b", &of(6.0, 0.4)),
    ];
    let contexts = vec![
        Context {
            tokens: 1,
            documents: 1,
            text: String::new(),
        };
        2
    ];
    Report::new(about(), &Method::ALL, contexts, examples)
}

#[track_caller]
fn near(found: Option<f64>, want: f64) {
    assert!((found.unwrap() - want).abs() < 1e-12, "{found:?} {want}");
}

#[test]
fn derived_figures_are_what_one_computes_by_hand() {
    let report = report();
    let of = |method: Method| &report.methods[method.name()];
    let imprint = of(Method::Imprint);
    near(Some(imprint.answer_nll), 1.0);
    near(imprint.gap_closed, 1.5); // (4 - 1) / (4 - 2)
    near(imprint.content_gain, 1.5); // min(3, 2.5) - 1
    near(imprint.content_gain_ratio, 1.5); // 1.5 / (min(3, 5) - 2)
    near(imprint.f1, 0.3);
    near(imprint.f1_ratio, 0.75); // 0.3 / max(0.2, 0.4)
    near(of(Method::InContext).content_gain, 1.0);
    near(of(Method::InContext).gap_closed, 1.0);
    near(of(Method::InContext).content_gain_ratio, 1.0);
    near(of(Method::InContextStyled).content_gain, 1.5);
    assert_eq!(of(Method::None).gap_closed, None);
    assert_eq!(of(Method::ImprintForeign).content_gain, None);
    // 2 likeliest of 2 + 6 tokens.
    near(Some(imprint.token_accuracy), 0.25);
    assert!(
        !report.methods.contains_key("bm25"),
        "nothing was answered by it"
    );
}

#[test]
fn figures_are_totals_over_totals_and_points_hold_their_own_examples() {
    let mut report = report();
    report.examples[0]
        .answers
        .insert("imprint".into(), answer(10.0, 2, 0.2));
    let report = Report::new(about(), &Method::ALL, report.contexts, report.examples);
    near(Some(report.methods["imprint"].answer_nll), 16.0 / 8.0);
    let labels: Vec<_> = report
        .series
        .iter()
        .map(|point| point.label.as_str())
        .collect();
    assert_eq!(labels, ["a", "b"]);
    near(Some(report.series[0].methods["imprint"].answer_nll), 5.0);
    near(Some(report.series[1].methods["imprint"].answer_nll), 1.0);
}

#[test]
fn intervals_come_from_contexts_not_from_questions() {
    let one = |context| {
        example(
            context,
            "a",
            &[(Method::None, answer(f64::from(context as u32 % 2), 1, 0.0))],
        )
    };
    let contexts = Context {
        tokens: 1,
        documents: 1,
        text: String::new(),
    };
    // The same twenty questions on twenty contexts, and each four times on the same contexts.
    let once: Vec<_> = (0..20).map(one).collect();
    let often: Vec<_> = (0..80).map(|number| one(number / 4)).collect();
    let width = |examples| {
        let report = Report::new(
            about(),
            &[Method::None],
            vec![contexts.clone(); 20],
            examples,
        );
        let interval = report.methods["none"].answer_nll_interval.unwrap();
        interval.high - interval.low
    };
    assert_eq!(width(once), width(often));
}

#[test]
fn a_gap_is_not_closed_without_what_it_is_measured_by() {
    let examples = vec![
        example(0, "a", &[(Method::Imprint, answer(1.0, 1, 0.5))]),
        example(1, "a", &[(Method::Imprint, answer(1.0, 1, 0.5))]),
    ];
    let report = Report::new(about(), &[Method::Imprint], Vec::new(), examples);
    let figures = &report.methods["imprint"];
    assert_eq!(
        (figures.gap_closed, figures.content_gain, figures.f1_ratio),
        (None, None, None)
    );
}

#[test]
fn kept_answers_are_those_of_the_bare_model() {
    let mut asked = example(
        0,
        "a",
        &[
            (Method::None, answer(1.0, 1, 0.5)),
            (Method::Imprint, answer(1.0, 1, 0.5)),
            (Method::ImprintForeign, answer(1.0, 1, 0.25)),
            (Method::InContext, answer(1.0, 1, 0.5)),
        ],
    );
    asked.compare();
    let kept = |method: &str| asked.answers[method].kept;
    assert_eq!(kept("imprint"), Some(1.0));
    assert_eq!(kept("imprint_foreign"), Some(0.0));
    assert_eq!((kept("in_context"), kept("none")), (None, None));
}

#[test]
fn a_report_is_read_back_and_tables_hold_every_method_once() {
    let report = report();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("report.json");
    std::fs::write(&path, serde_json::to_vec(&report).unwrap()).unwrap();
    let read = Report::read(&path).unwrap();
    assert_eq!(
        read.methods["imprint"].answer_nll,
        report.methods["imprint"].answer_nll
    );
    let tables = read.markdown();
    assert_eq!(tables.matches("| imprint |").count(), 2, "{tables}");
    assert!(tables.contains("| squad, a |"), "{tables}");
    std::fs::write(&path, "{}").unwrap();
    assert!(matches!(Report::read(&path), Err(Error::Report { .. })));
}
