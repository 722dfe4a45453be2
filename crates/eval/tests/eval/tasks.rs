//! Every task on a tiny model.

use eval::{Error, Task, report::Report};

use crate::support::{Tiny, args, corpus, dialogues, metaicl, squad};

fn labels(report: &Report) -> Vec<&str> {
    report
        .series
        .iter()
        .map(|point| point.label.as_str())
        .collect()
}

#[test]
fn contexts_are_joined_up_to_each_length_and_points_follow_the_options() {
    let tiny = Tiny::new();
    let line = "--task squad --limit 6 --context-tokens 128,400 --methods none,imprint";
    let report = tiny.run(line, &squad(40)).unwrap();
    assert_eq!(labels(&report), ["128 tokens", "400 tokens"]);
    for example in &report.examples {
        let context = &report.contexts[example.context];
        let most = if example.label == "128 tokens" {
            128
        } else {
            400
        };
        assert!(context.tokens <= most);
        assert_eq!(
            context.documents > 1,
            most == 400,
            "up to 256 tokens a document is alone"
        );
    }
    assert!(
        report
            .series
            .iter()
            .all(|point| point.methods["none"].questions == 6)
    );
}

#[test]
fn few_shot_contexts_hold_training_rows_and_ask_for_test_rows() {
    let tiny = Tiny::new();
    let report = tiny
        .run("--task metaicl --limit 8 --shots 1,4", &metaicl())
        .unwrap();
    assert_eq!(labels(&report), ["1 examples", "4 examples"]);
    for example in &report.examples {
        let shots = if example.label == "1 examples" { 1 } else { 4 };
        let context = &report.contexts[example.context].text;
        assert_eq!(context.matches("Answer: yes").count(), shots);
        assert!(context.contains(" train ") && !context.contains(" test "));
        assert!(example.question.contains(" test "));
        assert!(example.answers["imprint"].choice.is_some());
    }
    assert!(report.about.skipped.contains(&eval::Method::NoneStyled));
}

#[test]
fn dialogues_ask_for_an_utterance_and_sessions_for_a_fact_as_well() {
    let tiny = Tiny::new();
    let msc = tiny.run("--task msc --limit 5", &dialogues(6)).unwrap();
    let mut found = labels(&msc);
    found.sort_unstable();
    assert_eq!(found, ["fact", "utterance"]);
    let facts = msc
        .examples
        .iter()
        .filter(|example| example.label == "fact");
    assert!(
        facts.clone().count() == 5
            && facts
                .clone()
                .all(|fact| fact.answers["none"].text.is_none())
    );

    let persona = tiny
        .run("--task persona_chat --limit 5", &dialogues(6))
        .unwrap();
    assert_eq!(labels(&persona), ["utterance"]);
    for example in &persona.examples {
        // The persona that is told is the speaker's.
        let speaker = example
            .question
            .lines()
            .last()
            .unwrap()
            .trim_end_matches(':');
        assert!(persona.contexts[example.context].text.starts_with(speaker));
    }
}

#[test]
fn text_asks_for_a_span_again_and_for_what_follows() {
    let tiny = Tiny::new();
    let line = "--task text --limit 3 --context-tokens 256";
    let report = tiny.run(line, &corpus(4)).unwrap();
    assert_eq!(labels(&report), ["reconstruction", "completion"]);
    for example in &report.examples {
        let told = &report.contexts[example.context];
        assert_eq!(told.tokens, 256);
        let inside = told.text.contains(&example.question);
        assert!(
            inside || example.label == "completion",
            "{}",
            example.question
        );
        assert_eq!(example.answers["none"].tokens, 63);
    }
}

#[test]
fn facts_are_in_the_context_and_the_distance_is_behind_them() {
    let tiny = Tiny::new();
    let line = args("--task facts --facts 1,3 --limit 4 --distance-tokens 40");
    let report = eval::run::evaluate(&line, &tiny.lm, &tiny.text).unwrap();
    for example in &report.examples {
        let context = &report.contexts[example.context].text;
        let fact = format!("{}{}.", example.question, example.references[0]);
        assert!(context.contains(&fact), "{context}");
        let count = if example.label.starts_with('1') { 1 } else { 3 };
        assert_eq!(context.matches("The code of").count(), count);
        let behind = context.rsplit("The code of").next().unwrap();
        assert!(tiny.text.encode_plain(behind).unwrap().len() > 40);
    }
    let wrong = args("--task facts --facts 0");
    let error = eval::run::evaluate(&wrong, &tiny.lm, &tiny.text).unwrap_err();
    assert!(matches!(
        error,
        Error::Option {
            option: "--facts",
            ..
        }
    ));
}

#[test]
fn an_irrelevant_context_is_never_the_rows_own() {
    let tiny = Tiny::new();
    for rows in [squad(5), corpus(4), dialogues(5)] {
        let report = tiny
            .run("--task interference --limit 4 --context-tokens 200", &rows)
            .unwrap();
        assert_eq!(report.about.task, Task::Interference);
        for example in &report.examples {
            let context = &report.contexts[example.context].text;
            assert!(!context.contains(&example.question));
            assert!(example.answers["imprint"].kl.is_some());
        }
    }
}

#[test]
fn a_forgotten_document_is_not_told_any_more_and_the_others_are() {
    let tiny = Tiny::new();
    let report = tiny.run("--task forget --limit 2", &squad(9)).unwrap();
    assert_eq!(labels(&report), ["told", "forgotten", "kept"]);
    for part in report.examples.chunks_exact(3) {
        let town = |example: usize| {
            let id = &part[example].id;
            format!("In town {} ", id.rsplit('-').next().unwrap())
        };
        let context = |example: usize| &report.contexts[part[example].context].text;
        assert_eq!(part[0].id, part[1].id);
        assert!(context(0).contains(&town(0)) && !context(1).contains(&town(1)));
        assert!(context(2).contains(&town(2)));
        assert_eq!(context(1), context(2));
    }
}

#[test]
fn a_stream_asks_the_same_questions_after_more_and_more_windows() {
    let tiny = Tiny::new();
    let line = "--task stream --limit 4 --windows 1,2,4";
    let report = tiny.run(line, &squad(20)).unwrap();
    assert_eq!(labels(&report), ["1 windows", "2 windows", "4 windows"]);
    let ids = |label: &str| -> Vec<_> {
        let of_it = report
            .examples
            .iter()
            .filter(|example| example.label == label);
        of_it.map(|example| example.id.clone()).collect()
    };
    assert_eq!(ids("1 windows"), ids("4 windows"));
    let told = report
        .examples
        .iter()
        .map(|e| report.contexts[e.context].documents);
    assert_eq!(
        told.collect::<Vec<_>>(),
        [1, 1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 4]
    );
}

#[test]
fn all_tasks_were_tried() {
    // A new task has to come into this file.
    assert_eq!(Task::ALL.len(), 12);
}
