//! What batches may look like, whatever is drawn.

use lm::text::{Text, TokenId};
use testkit::{TinySpec, tiny_base};

use super::{Batch, Draw, Kind};
use crate::{
    data::{Asked, Format, Question, Split},
    random::Random,
    recipe::{Ask, Layout, Length, Mix, Recipe},
};

pub(crate) fn format(window: usize, query: usize) -> Format {
    let dir = tempfile::tempdir().unwrap();
    tiny_base(dir.path(), &TinySpec::default());
    Format {
        text: Text::load(dir.path()).unwrap(),
        prompt: "Q: {question}\nA:".to_owned(),
        window,
        query,
        suffix: "\n\n".to_owned(),
    }
}

fn split() -> Split {
    let piece = |first: u32| (first..first + 90).map(TokenId).collect::<Vec<_>>();
    Split {
        pieces: vec![piece(0), piece(100)],
        asked: vec![Asked {
            context: (0..20).map(TokenId).collect(),
            questions: vec![Question {
                tokens: (30..40).map(TokenId).collect(),
                scored: 3,
            }],
        }],
        dialogues: vec![said(200), said(300)],
        fewshot: vec![said(400)],
    }
}

/// A context and a question of tokens that tell where they come from.
fn said(first: u32) -> Asked {
    Asked {
        context: (first..first + 20).map(TokenId).collect(),
        questions: vec![Question {
            tokens: (first + 30..first + 40).map(TokenId).collect(),
            scored: 3,
        }],
    }
}

fn recipe(layout: Layout) -> Recipe {
    let text = "start = \"x\"\nlength = { steps = 1 }\nlayout = []\n[data]\nfolder = \"x\"\ncorpus = \"x\"\nqa = \"x\"\nmix = { corpus = 1, qa = 1, facts = 1 }\n";
    let mut recipe: Recipe = toml::from_str(text).unwrap();
    recipe.length = Length::Steps(1);
    recipe.layout = vec![layout];
    recipe
}

fn asks() -> Vec<Ask> {
    let none = Ask::default();
    vec![
        Ask {
            reconstruction: 1.0,
            ..none
        },
        Ask {
            completion: 1.0,
            ..none
        },
        Ask { far: 1.0, ..none },
        Ask {
            negative: 1.0,
            ..none
        },
    ]
}

fn layout(windows: usize, group: usize, mix: Option<Mix>) -> Layout {
    Layout {
        chance: 1.0,
        windows,
        group,
        prefix: false,
        queries: asks(),
        foreign: 0.0,
        mix,
    }
}

fn drawn(layout: Layout, seed: u64) -> Batch {
    let (recipe, format, split) = (recipe(layout), format(32, 16), split());
    let draw = Draw {
        recipe: &recipe,
        format: &format,
        split: &split,
    };
    draw.batch(&mut Random::new(seed, "test")).unwrap()
}

const TEXT: Mix = Mix {
    corpus: 1.0,
    qa: 0.0,
    facts: 0.0,
    dialogues: 0.0,
    fewshot: 0.0,
};

#[test]
fn spans_come_from_the_window_what_follows_from_behind_it_and_negatives_from_elsewhere() {
    for seed in 0..20 {
        let batch = drawn(layout(4, 2, Some(TEXT)), seed);
        assert_eq!(batch.groups, [vec![0, 1], vec![2, 3]]);
        assert_eq!(batch.queries.len() % 4, 0);
        for query in &batch.queries {
            assert_eq!((query.tokens.len(), query.scored), (16, 15));
            assert_eq!(query.core, query.window / 2);
            let window = &batch.windows[query.window];
            let (first, last) = (window[0].0, window[window.len() - 1].0);
            let at = query.tokens[0].0;
            match query.kind {
                Kind::Reconstruction => assert!(at > first && query.tokens[15].0 <= last),
                Kind::Completion => assert!(at == last + 1 || at == last + 17),
                Kind::Negative => assert_ne!(at / 100, first / 100),
                Kind::Answer => panic!("nothing was asked"),
            }
        }
    }
}

#[test]
fn equal_random_numbers_draw_equal_batches() {
    assert_eq!(drawn(layout(4, 1, None), 3), drawn(layout(4, 1, None), 3));
    assert_ne!(drawn(layout(4, 1, None), 3), drawn(layout(4, 1, None), 4));
}

#[test]
fn facts_fit_into_a_window_and_what_is_asked_is_in_it() {
    let format = format(96, 48);
    let mut random = Random::new(1, "facts");
    for _ in 0..50 {
        let asked = crate::facts::pack(&mut random, &format, 3, 0.0).unwrap();
        assert!(asked.context.len() <= 96 && asked.questions.len() == 3);
        let context = format.text.decode(&asked.context).unwrap();
        for question in asked.questions {
            assert!(question.tokens.len() <= 48 && question.scored <= 16);
            let answer = &question.tokens[question.tokens.len() - question.scored..];
            let answer = format.text.decode(answer).unwrap();
            let answer = answer.trim().trim_end_matches('.');
            assert!(context.contains(answer), "{answer:?} of {context:?}");
        }
    }
}

#[test]
fn in_the_published_scheme_a_window_is_asked_with_the_cores_before_it() {
    let batch = drawn(
        Layout {
            chance: 1.0,
            windows: 2,
            group: 1,
            prefix: true,
            foreign: 0.0,
            queries: vec![],
            mix: None,
        },
        5,
    );
    assert_eq!(batch.groups, [vec![0], vec![0, 1]]);
    let kinds: Vec<_> = batch
        .queries
        .iter()
        .map(|query| (query.kind, query.core))
        .collect();
    assert_eq!(
        kinds,
        [
            (Kind::Reconstruction, 0),
            (Kind::Completion, 0),
            (Kind::Reconstruction, 1)
        ]
    );
    assert_eq!(batch.queries[1].tokens, batch.windows[1]);
    assert_eq!(batch.queries[0].tokens, batch.windows[0]);
}

#[test]
fn a_foreign_question_is_a_negative_of_a_context_that_it_does_not_concern() {
    let mix = Mix {
        corpus: 0.0,
        dialogues: 1.0,
        ..TEXT
    };
    let foreign = Layout {
        foreign: 0.5,
        ..layout(4, 1, Some(mix))
    };
    let (mut own, mut other) = (0, 0);
    for seed in 0..20 {
        let batch = drawn(foreign.clone(), seed);
        for query in &batch.queries {
            let same = batch.windows[query.window][0].0 / 100 == query.tokens[0].0 / 100;
            assert_eq!(same, query.kind == Kind::Answer);
            assert!(same || query.kind == Kind::Negative);
            own += usize::from(same);
            other += usize::from(!same);
        }
    }
    // Half of the draws, of which half hit the context itself and stay.
    assert!(own > other && other > 8, "{own} {other}");
}

#[test]
fn examples_of_a_task_are_never_asked_as_foreign_ones() {
    let mix = Mix {
        corpus: 0.0,
        fewshot: 1.0,
        ..TEXT
    };
    let foreign = Layout {
        foreign: 1.0,
        ..layout(2, 1, Some(mix))
    };
    let batch = drawn(foreign, 1);
    assert_eq!(batch.queries.len(), 2);
    assert!(batch.queries.iter().all(|query| query.kind == Kind::Answer));
}
