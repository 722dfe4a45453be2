//! What each method computes, held against the model asked directly, and against the engine.

use std::time::Instant;

use engine::{Command, Config, DocumentId, Engine, Event, RequestId, Seq, SessionId};
use eval::{
    Error, Method,
    report::{Example, Report, Tried},
};
use lm::{Lm, TokenId};

use crate::support::{Tiny, refused, spec, squad};

/// Log-likelihood of `answer` behind `prompt`, by the bare model in one go.
fn likelihood(lm: &Lm, prompt: &[TokenId], answer: &[TokenId]) -> f64 {
    let tokens = [prompt, answer].concat();
    let logits = lm
        .logits(&tokens, None, 1.0)
        .unwrap()
        .to_vec2::<f32>()
        .unwrap();
    let mut sum = 0.0;
    for (place, token) in answer.iter().enumerate() {
        let row = &logits[prompt.len() + place - 1];
        let total: f64 = row.iter().map(|&z| f64::from(z).exp()).sum::<f64>().ln();
        sum += f64::from(row[token.0 as usize]) - total;
    }
    sum
}

/// The greedy continuation by the bare model, read from the start for every token.
fn greedy(tiny: &Tiny, prompt: &[TokenId], most: usize) -> String {
    let (mut tokens, mut answer) = (prompt.to_vec(), Vec::new());
    for skipped in 0.. {
        let logits = tiny
            .lm
            .logits(&tokens, None, 1.0)
            .unwrap()
            .to_vec2::<f32>()
            .unwrap();
        let row = logits.last().unwrap();
        let best = (0..row.len())
            .rev()
            .max_by(|&a, &b| row[a].total_cmp(&row[b]))
            .unwrap();
        let token = TokenId(best as u32);
        if tiny.lm.config().eos.contains(&token) || answer.len() == most || skipped == most + 4 {
            break;
        }
        tokens.push(token);
        if !tiny.text.decode(&[token]).unwrap().contains('\n') {
            answer.push(token);
        } else if !answer.is_empty() || skipped >= 4 {
            break;
        }
    }
    tiny.text.decode(&answer).unwrap().trim().to_owned()
}

fn tokens(tiny: &Tiny, text: &str) -> Vec<TokenId> {
    tiny.text.encode_plain(text).unwrap()
}

/// The parts of an example: its context and prompt as tokens, and its scored answer.
fn parts(
    tiny: &Tiny,
    report: &Report,
    number: usize,
) -> (Vec<TokenId>, Vec<TokenId>, Vec<TokenId>) {
    let example = &report.examples[number];
    let context = report.contexts[example.context].text.clone();
    (
        tokens(tiny, &context),
        tokens(tiny, &format!("Question: {}\nAnswer:", example.question)),
        tokens(tiny, &format!(" {}\n", example.references[0])),
    )
}

#[test]
fn every_method_answers_every_question() {
    let tiny = Tiny::new();
    let report = tiny
        .run("--task squad --limit 8 --questions 2", &squad(6))
        .unwrap();
    assert_eq!(report.examples.len(), 8);
    for example in &report.examples {
        assert!(!example.answers.contains_key("lora"));
        for method in Method::ALL {
            if method == Method::Lora {
                continue;
            }
            let answer = &example.answers[method.name()];
            assert!(answer.nll.is_finite() && answer.nll > 0.0, "{method:?}");
            assert!(
                answer.text.is_some() && answer.choice.is_some(),
                "{method:?}"
            );
        }
    }
    let of = |method: Method| &report.methods[method.name()];
    assert!(of(Method::Imprint).kl_to_bare.unwrap() > 0.0);
    assert_eq!(of(Method::InContext).kl_to_bare, None);
    assert_ne!(
        of(Method::Imprint).answer_nll,
        of(Method::ImprintForeign).answer_nll
    );
    assert_ne!(
        of(Method::ImprintSnippet).answer_nll,
        of(Method::Imprint).answer_nll
    );
    assert!(of(Method::Bm25).prompt_tokens > of(Method::None).prompt_tokens);
}

#[test]
fn the_same_seed_gives_the_same_answers_and_another_one_other_cases() {
    let tiny = Tiny::new();
    let answers = |seed: u64| {
        let line = format!("--task squad --limit 6 --seed {seed}");
        let report = tiny.run(&line, &squad(9)).unwrap();
        let each = report.examples.iter().map(|example| {
            let nll: Vec<_> = example
                .answers
                .values()
                .map(|answer| answer.nll.to_bits())
                .collect();
            let texts: Vec<_> = example
                .answers
                .values()
                .map(|answer| answer.text.clone())
                .collect();
            (example.id.clone(), nll, texts)
        });
        each.collect::<Vec<_>>()
    };
    assert_eq!(answers(5), answers(5));
    assert_ne!(answers(5), answers(6));
}

#[test]
fn prompts_are_context_and_question_whether_or_not_questions_share_the_reading() {
    let tiny = Tiny::new();
    for line in [
        "--task squad --limit 6 --questions 2",
        "--task squad --limit 8 --context-tokens 300 --questions 4",
    ] {
        let report = tiny.run(line, &squad(12)).unwrap();
        for (number, example) in report.examples.iter().enumerate() {
            let (context, prompt, answer) = parts(&tiny, &report, number);
            let bare = likelihood(&tiny.lm, &prompt, &answer);
            assert!((example.answers["none"].nll + bare).abs() < 1e-6);
            let told = [context, prompt.clone()].concat();
            let in_context = likelihood(&tiny.lm, &told, &answer);
            assert!((example.answers["in_context"].nll + in_context).abs() < 1e-6);
            assert_eq!(example.answers["in_context"].prompt_tokens, told.len());
            let text = example.answers["none"].text.clone();
            assert_eq!(text, Some(greedy(&tiny, &prompt, 16)));
            let text = example.answers["in_context"].text.clone();
            assert_eq!(text, Some(greedy(&tiny, &told, 16)));
        }
    }
}

#[test]
fn a_foreign_context_is_another_rows() {
    let tiny = Tiny::new();
    let report = tiny.run("--task squad --limit 4", &squad(4)).unwrap();
    for (number, example) in report.examples.iter().enumerate() {
        let (own, prompt, answer) = parts(&tiny, &report, number);
        let found = -example.answers["in_context_foreign"].nll;
        let with = |other: usize| {
            let context = tokens(&tiny, &report.contexts[other].text);
            likelihood(&tiny.lm, &[context, prompt.clone()].concat(), &answer)
        };
        let others = (0..report.contexts.len()).filter(|&other| other != example.context);
        assert!(
            others
                .into_iter()
                .any(|other| (with(other) - found).abs() < 1e-6)
        );
        let told = [own, prompt.clone()].concat();
        assert!((likelihood(&tiny.lm, &told, &answer) - found).abs() > 1e-4);
    }
}

#[test]
fn what_is_judged_is_what_the_engine_serves() {
    let tiny = Tiny::new();
    let report = tiny
        .run(
            "--task squad --limit 4 --context-tokens 300 --questions 2 --methods imprint --whole",
            &squad(12),
        )
        .unwrap();
    let mut engine =
        Engine::load(&tiny.base(), Some(&tiny.generator()), Config::default()).unwrap();
    let mut events = Vec::new();
    for (number, example) in report.examples.iter().enumerate() {
        let (_, prompt, answer) = parts(&tiny, &report, number);
        let session = SessionId(number as u64);
        let mut push = |command| assert!(engine.push(command).is_ok());
        push(Command::Open {
            session,
            tenant: engine::TenantId::default(),
            strategy: engine::Strategy::Parallel,
            window: 8,
        });
        let context = &report.contexts[example.context].text;
        let documents: Vec<_> = context.split_terminator("\n\n").collect();
        for (place, document) in (1_u64..).zip(&documents) {
            push(Command::Ingest {
                session,
                seq: Seq(place),
                document: DocumentId(place),
                tokens: tokens(&tiny, &format!("{document}\n\n")),
                end_of_document: true,
            });
        }
        // One of them is told twice and forgotten again: that changes nothing.
        let twice = DocumentId(99);
        let seq = Seq(documents.len() as u64 + 1);
        push(Command::Ingest {
            session,
            seq,
            document: twice,
            tokens: tokens(&tiny, documents[0]),
            end_of_document: true,
        });
        while !engine.idle() {
            engine.step(Instant::now, &mut events).unwrap();
        }
        assert!(
            engine
                .push(Command::Forget {
                    session,
                    document: twice
                })
                .is_ok()
        );
        while !engine.idle() {
            engine.step(Instant::now, &mut events).unwrap();
        }
        let request = RequestId(number as u64);
        assert!(
            engine
                .push(Command::Score {
                    request,
                    tenant: engine::TenantId::default(),
                    session: Some(session),
                    adapter_scale: 1.0,
                    chosen: engine::Chosen::default(),
                    prompt,
                    continuations: vec![answer],
                })
                .is_ok()
        );
        events.clear();
        while !engine.idle() {
            engine.step(Instant::now, &mut events).unwrap();
        }
        let scores = events.iter().find_map(|event| match event {
            Event::Scored { scores, .. } => Some(scores.clone()),
            _ => None,
        });
        let sum: f32 = scores.unwrap()[0].iter().map(|(_, logprob)| *logprob).sum();
        let judged = example.answers["imprint"].nll;
        assert!((judged + f64::from(sum)).abs() < 1e-4, "{judged} {sum}");
    }
}

#[test]
fn a_prompt_too_long_keeps_the_newest_tokens_and_a_truncated_one_costs_no_more_than_the_imprint() {
    let tiny = Tiny::with(spec(256), true);
    let report = tiny
        .run(
            "--task squad --limit 6 --context-tokens 1k --questions 2",
            &squad(60),
        )
        .unwrap();
    for example in &report.examples {
        let answer = |method: Method| &example.answers[method.name()];
        let whole = report.contexts[example.context].tokens;
        assert!(whole > 256);
        let in_context = answer(Method::InContext);
        assert!(in_context.context_tokens < whole && in_context.prompt_tokens + 16 <= 256);
        let (cut, imprint) = (answer(Method::InContextTruncated), answer(Method::Imprint));
        assert!(cut.context_tokens <= in_context.context_tokens);
        let questions = report
            .examples
            .iter()
            .filter(|other| other.context == example.context);
        let share = imprint.context_flops / questions.count() as f64;
        let budget = share + imprint.query_flops;
        assert!(cut.context_flops + cut.query_flops <= budget * 1.000_001);
        assert_eq!(imprint.context_tokens, 0);
    }
}

#[test]
fn without_a_generator_imprints_are_refused_and_left_out_by_default() {
    let tiny = Tiny::with(spec(512), false);
    let report = tiny.run("--task squad --limit 4", &squad(4)).unwrap();
    assert!(report.methods.contains_key("in_context") && !report.methods.contains_key("imprint"));
    assert!(report.about.skipped.contains(&Method::Imprint));
    let error = tiny
        .run("--task squad --methods imprint", &squad(4))
        .unwrap_err();
    assert!(
        matches!(error, Error::NoGenerator { method: "imprint" }),
        "{error}"
    );
    let error = tiny
        .run("--task squad --methods none,lora", &squad(20))
        .unwrap_err();
    assert!(
        matches!(error, Error::NoGenerator { method: "lora" }),
        "{error}"
    );
}

#[test]
fn lora_is_tuned_on_other_cases_and_says_what_it_took() {
    let tiny = Tiny::new();
    let line = "--task squad --limit 4 --questions 2 --methods none,imprint,lora";
    let report = tiny.run(line, &squad(12)).unwrap();
    let [tuned] = report.about.lora.as_slice() else {
        panic!("{:?}", report.about.lora)
    };
    assert_eq!((tuned.label.as_str(), tuned.cases), ("alone", 4));
    let best = tuned.tried.iter().map(|tried| tried.answer_nll);
    let best = best.min_by(f64::total_cmp).unwrap();
    let taken = |tried: &&Tried| tried.rate == tuned.rate && tried.steps == tuned.steps;
    assert_eq!(tuned.tried.iter().find(taken).unwrap().answer_nll, best);
    for example in &report.examples {
        let (none, imprint) = (&example.answers["none"], &example.answers["imprint"]);
        let lora = &example.answers["lora"];
        assert!(lora.nll.is_finite() && lora.nll != none.nll);
        assert!(lora.kl.unwrap() > 0.0 && lora.text.is_some() && lora.f1.is_some());
        assert_eq!(lora.prompt_tokens, none.prompt_tokens);
        assert!(lora.context_flops > imprint.context_flops);
        assert!(lora.query_flops > none.query_flops);
        assert!(lora.context_seconds > 0.0 && lora.state_floats > 0);
    }
    let seconds = |method: Method| report.methods[method.name()].median_context_seconds;
    assert!(seconds(Method::Lora).unwrap() > seconds(Method::Imprint).unwrap());
    assert_eq!(seconds(Method::None), None);
    let table = report.markdown();
    assert!(table.contains("s a context") && table.contains("\nlora at alone: rank"));

    let again = tiny.run(line, &squad(12)).unwrap();
    for (one, other) in report.examples.iter().zip(&again.examples) {
        let bits = |example: &Example| example.answers["lora"].nll.to_bits();
        assert_eq!(bits(one), bits(other));
    }
}

#[test]
fn lora_without_cases_to_tune_on_says_so() {
    let tiny = Tiny::new();
    let error = tiny
        .run("--task squad --limit 30 --methods lora", &squad(6))
        .unwrap_err();
    assert!(
        matches!(&error, Error::TooFew { detail } if detail.contains("lora")),
        "{error}"
    );
}

#[test]
fn the_chat_form_puts_questions_as_messages() {
    let tiny = Tiny::new();
    let report = tiny
        .run("--task squad --limit 4 --form chat", &squad(6))
        .unwrap();
    for (number, example) in report.examples.iter().enumerate() {
        let message = |content: String| lm::text::Message {
            role: "user".to_owned(),
            content,
        };
        let mut answer = tokens(&tiny, &example.references[0]);
        answer.extend(tiny.text.eos());
        let prompt = tiny
            .text
            .encode_chat(&[message(example.question.clone())])
            .unwrap();
        let bare = likelihood(&tiny.lm, &prompt, &answer);
        assert!((example.answers["none"].nll + bare).abs() < 1e-6);
        let (context, ..) = parts(&tiny, &report, number);
        let told = tiny.text.decode(&context).unwrap() + &example.question;
        let prompt = tiny.text.encode_chat(&[message(told)]).unwrap();
        let told = likelihood(&tiny.lm, &prompt, &answer);
        assert!((example.answers["in_context"].nll + told).abs() < 1e-6);
    }
}

#[test]
fn methods_and_tasks_that_are_not_there_are_named() {
    assert!(refused("--task squid").contains("squid"));
    let said = refused("--task squad --methods loro");
    assert!(
        said.contains("loro") && said.contains("lora") && said.contains("imprint_foreign"),
        "{said}"
    );
    assert!(refused("--task squad --context-tokens long").contains("16k"));
    assert!(refused("--task squad --context-tokens 99999999k").contains("more than"));
}
