//! A step against the forward that serves, and its gradients against finite differences.

use std::cell::RefCell;

use candle_core::{DType, Device, Tensor, Var};
use generator::{Generator, Strategy as Served, Trainee};
use lm::{Lm, LoadOptions, Windows, text::TokenId};
use testkit::{Form, GeneratorSpec, Random, TinySpec, tiny_base, tiny_generator};

use super::{Figures, Likeliest, Model};
use crate::{
    batch::{Batch, Kind, Query},
    recipe::{Losses, Strategy, Term},
    teacher::Said,
};

struct Tiny {
    dir: tempfile::TempDir,
    lm: Lm,
    generator: Generator,
}

fn tiny(spec: &GeneratorSpec) -> Tiny {
    let dir = tempfile::tempdir().unwrap();
    let base = TinySpec {
        layers: 3,
        ..TinySpec::default()
    };
    tiny_base(&dir.path().join("base"), &base);
    tiny_generator(&dir.path().join("generator"), &base, spec);
    let lm = Lm::load(&dir.path().join("base"), LoadOptions::default()).unwrap();
    let generator = Generator::load(&dir.path().join("generator"), &lm.shape()).unwrap();
    Tiny { dir, lm, generator }
}

fn tokens(seed: u64, count: usize) -> Vec<TokenId> {
    let mut random = Random::new(seed);
    (0..count)
        .map(|_| TokenId(random.below(288) as u32))
        .collect()
}

fn query(seed: u64, count: usize, scored: usize, kind: Kind, core: usize, window: usize) -> Query {
    Query {
        tokens: tokens(seed, count),
        scored,
        kind,
        core,
        window,
    }
}

/// Three windows, the last two of which are summed, and a query of each kind.
fn batch() -> Batch {
    Batch {
        windows: vec![tokens(1, 12), tokens(2, 9), tokens(3, 7)],
        groups: vec![vec![0], vec![1, 2]],
        queries: vec![
            query(11, 9, 8, Kind::Reconstruction, 0, 0),
            query(12, 6, 5, Kind::Completion, 1, 2),
            query(13, 10, 3, Kind::Answer, 1, 1),
            query(14, 5, 4, Kind::Negative, 0, 0),
        ],
    }
}

fn losses() -> Losses {
    Losses {
        completion: Term {
            weight: 1.3,
            teacher: 0.8,
            tokens: Some(20.0),
            ..Term::default()
        },
        negative: Term {
            weight: 0.6,
            ..Term::default()
        },
        ..Losses::default()
    }
}

/// Mean negative log-probability of the last `scored` tokens by the serving forward.
fn served(lm: &Lm, query: &Query, core: &generator::Core) -> f64 {
    let (count, logits) = (
        query.tokens.len(),
        lm.logits(&query.tokens, Some(core), 1.0).unwrap(),
    );
    let rows: Vec<Vec<f32>> = logits.to_vec2().unwrap();
    let from = count - query.scored;
    let nll = (from..count).map(|at| {
        let row: Vec<f64> = rows[at - 1].iter().map(|z| f64::from(*z)).collect();
        let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum = row.iter().map(|z| (z - largest).exp()).sum::<f64>().ln() + largest;
        sum - row[query.tokens[at].0 as usize]
    });
    nll.sum::<f64>() / query.scored as f64
}

#[test]
fn losses_without_gradients_are_what_the_served_forward_scores() {
    for (form, strategy, as_served) in [
        (Form::Associative, Strategy::Parallel, Served::Parallel),
        (Form::Associative, Strategy::Sequential, Served::Sequential),
        (Form::Published, Strategy::Sequential, Served::Sequential),
    ] {
        let mut tiny = tiny(&GeneratorSpec {
            form,
            window: 12,
            ..GeneratorSpec::default()
        });
        let trainee = Trainee::of(&tiny.generator).unwrap();
        let batch = batch();
        let model = Model {
            lm: &tiny.lm,
            strategy,
            losses: losses(),
            said: None,
        };
        let outcome = model.losses(&trainee, &batch, true).unwrap();
        tiny.lm
            .attach_generator(&tiny.dir.path().join("generator"))
            .unwrap();
        let (lm, generator) = (&tiny.lm, tiny.lm.generator().unwrap());
        let cores: Vec<_> = batch
            .groups
            .iter()
            .map(|group| {
                let text: Vec<TokenId> = group
                    .iter()
                    .flat_map(|&w| batch.windows[w].clone())
                    .collect();
                let cut = Windows::Fixed(batch.windows[group[0]].len());
                let state = lm.encode(&text, as_served, cut).unwrap();
                generator.read_out(&state).unwrap()
            })
            .collect();
        for query in &batch.queries {
            let want = served(lm, query, &cores[query.core]);
            let figures = outcome.figures[query.kind as usize];
            let got = figures.ce / figures.tokens as f64;
            assert!(
                (got - want).abs() < 2e-4,
                "{form:?} {:?}: {got} for {want}",
                query.kind
            );
        }
    }
}

#[test]
fn a_batch_without_its_cores_is_the_bare_model() {
    let tiny = tiny(&GeneratorSpec::default());
    let trainee = Trainee::of(&tiny.generator).unwrap();
    let model = Model {
        lm: &tiny.lm,
        strategy: Strategy::Parallel,
        losses: losses(),
        said: None,
    };
    let outcome = model.losses(&trainee, &batch(), false).unwrap();
    for query in &batch().queries {
        let logits = tiny.lm.logits(&query.tokens, None, 1.0).unwrap();
        assert_eq!(logits.dims()[0], query.tokens.len());
        assert!(outcome.figures[query.kind as usize].kl == 0.0);
    }
}

#[test]
fn gradients_of_a_whole_step_are_differences_of_its_loss() {
    for (form, norm, strategy) in [
        (Form::Associative, None, Strategy::Parallel),
        (Form::Published, Some("svd"), Strategy::Parallel),
        (Form::Published, Some("frobenius"), Strategy::Parallel),
    ] {
        let tiny = tiny(&GeneratorSpec {
            form,
            norm,
            modules: vec!["o_proj", "down_proj"],
            layers: Some(vec![1, 2]),
            ..GeneratorSpec::default()
        });
        let start = Trainee::of(&tiny.generator).unwrap();
        let (trainee, variables) = tracked(&start);
        let model = Model {
            lm: &tiny.lm,
            strategy,
            losses: losses(),
            said: None,
        };
        let batch = batch();
        let gradients = model
            .losses(&trainee, &batch, true)
            .unwrap()
            .backward()
            .unwrap()
            .unwrap();
        let value = || {
            model
                .losses(&trainee.detached(), &batch, true)
                .unwrap()
                .value()
                .unwrap()
        };
        let all: f64 = variables
            .iter()
            .map(|(_, var)| {
                gradients
                    .get(var)
                    .map_or(0.0, |g| testkit::values(g).iter().map(|g| g * g).sum())
            })
            .sum::<f64>()
            .sqrt();
        assert!(all > 1e-3, "the loss hangs on the generator");
        for (name, var) in &variables {
            let gradient = testkit::values(gradients.get(var).expect(name));
            let start = var.copy().unwrap().detach();
            let size = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
            // Along the gradient itself, where the loss changes most.
            let direction: Vec<f32> = gradient
                .iter()
                .map(|g| (g / size.max(1e-30)) as f32)
                .collect();
            let direction = Tensor::from_vec(direction, var.shape(), var.device()).unwrap();
            let rms = (testkit::values(&start).iter().map(|v| v * v).sum::<f64>())
                .sqrt()
                .max(0.1);
            let step = 2e-3 * rms;
            let moved = |by: f64| {
                var.set(&(&start + (&direction * by).unwrap()).unwrap())
                    .unwrap();
                value()
            };
            let slope = (moved(step) - moved(-step)) / (2.0 * step);
            var.set(&start).unwrap();
            assert!(
                (slope - size).abs() <= 0.03 * size + 2e-3 * all,
                "{form:?} {norm:?} {name}: {size} by the gradient, {slope} by differences (all {all})"
            );
        }
    }
}

/// The same with variables in place of its tensors, and these by name.
fn tracked(start: &Trainee) -> (Trainee, Vec<(String, Var)>) {
    let mut variables = Vec::new();
    let trainee = start
        .map(|site, name, tensor| {
            let var = Var::from_tensor(tensor)?;
            let tensor = var.as_tensor().clone();
            variables.push((format!("{site} {name}"), var));
            Ok::<_, candle_core::Error>(tensor)
        })
        .unwrap();
    (trainee, variables)
}

/// By the name of what they are of.
type Gradients = Vec<(String, Vec<f64>)>;

/// Loss, figures and gradients of a step.
fn step(lm: &Lm, start: &Trainee, strategy: Strategy) -> (f64, [Figures; 4], Gradients) {
    let (trainee, variables) = tracked(start);
    let model = Model {
        lm,
        strategy,
        losses: losses(),
        said: None,
    };
    let outcome = model.losses(&trainee, &batch(), true).unwrap();
    let gradients = outcome.backward().unwrap().unwrap();
    let gradients = variables
        .into_iter()
        .map(|(name, var)| {
            let gradient = gradients.get(&var).expect(&name);
            assert_eq!(gradient.dtype(), DType::F32, "{name}");
            (name, testkit::values(gradient))
        })
        .collect();
    (outcome.value().unwrap(), outcome.figures, gradients)
}

#[test]
fn a_step_by_plain_operations_is_the_step_by_the_kernels() {
    for (form, norm, strategy) in [
        (Form::Associative, None, Strategy::Parallel),
        (Form::Associative, None, Strategy::Sequential),
        (Form::Published, Some("svd"), Strategy::Parallel),
    ] {
        // Gradients of scalars are sums that nearly cancel: they are held against the whole, too.
        for (dtype, loss_tolerance, tolerance, beside) in [
            (DType::F64, 1e-5, 1e-4, 1e-6),
            (DType::BF16, 2e-2, 0.2, 0.02),
        ] {
            let mut tiny = tiny(&GeneratorSpec {
                form,
                norm,
                modules: vec!["o_proj", "down_proj"],
                layers: Some(vec![1, 2]),
                ..GeneratorSpec::default()
            });
            let start = Trainee::of(&tiny.generator).unwrap();
            let (want, figures, want_back) = step(&tiny.lm, &start, strategy);
            tiny.lm.train_on(Device::Cpu, dtype);
            let (got, plain_figures, got_back) = step(&tiny.lm, &start, strategy);
            let apart = (got - want).abs() / want;
            assert!(
                apart < loss_tolerance,
                "{form:?} {dtype:?}: {got} for {want}"
            );
            assert!(got.to_bits() != want.to_bits(), "it is another computation");
            for (want, got) in figures.iter().zip(&plain_figures) {
                assert_eq!(want.tokens, got.tokens);
                let apart = (want.ce - got.ce).abs().max((want.kl - got.kl).abs());
                assert!(apart < loss_tolerance * (1.0 + want.ce), "{want:?} {got:?}");
            }
            let norm = |values: &mut dyn Iterator<Item = f64>| {
                values.map(|value| value * value).sum::<f64>().sqrt()
            };
            let all = norm(&mut want_back.iter().flat_map(|(_, want)| want.iter().copied()));
            for ((name, want), (_, got)) in want_back.iter().zip(&got_back) {
                let size = norm(&mut want.iter().copied());
                let apart = norm(&mut want.iter().zip(got).map(|(a, b)| a - b));
                assert!(
                    apart <= tolerance * size + beside * all,
                    "{form:?} {strategy:?} {dtype:?} {name}: {apart} of {size}, all {all}"
                );
            }
        }
    }
}

#[test]
fn a_teacher_of_all_tokens_is_the_whole_teacher_and_one_that_is_known_is_not_asked() {
    let tiny = tiny(&GeneratorSpec::default());
    let trainee = Trainee::of(&tiny.generator).unwrap();
    let losses = Losses {
        answer: Term {
            teacher: 0.5,
            ..Term::default()
        },
        ..losses()
    };
    let loss = |said: Option<Said>| {
        let model = Model {
            lm: &tiny.lm,
            strategy: Strategy::Parallel,
            losses,
            said: said.map(RefCell::new),
        };
        let loss = model.losses(&trainee, &batch(), true).unwrap().value();
        (loss.unwrap(), model.said.map(RefCell::into_inner))
    };
    let (whole, _) = loss(None);
    let (all, _) = loss(Some(Said::new(288, 0)));
    assert!((whole - all).abs() < 1e-4, "{whole} {all}");
    let (few, said) = loss(Some(Said::new(4, 1 << 20)));
    assert!((whole - few).abs() > 1e-4, "{whole} {few}");
    assert_eq!(loss(said).0.to_bits(), few.to_bits());
    // Of the batch's question alone: words that are known are taken as they are.
    let query = &batch().queries[2];
    let mut other = Said::new(4, 1 << 20);
    let said = Likeliest {
        count: 4,
        tokens: [5, 6, 7, 8].repeat(query.scored),
        probabilities: vec![0.25; 4 * query.scored],
    };
    let name = crate::teacher::key(&batch().windows[query.window], &query.tokens, query.scored);
    other.put(name, said);
    assert!((loss(Some(other)).0 - few).abs() > 1e-3);
}
