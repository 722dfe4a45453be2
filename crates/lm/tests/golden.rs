//! Reference vectors: every case found under `IMPRINT_GOLDEN_DIR` (default `../shared/golden`) and the
//! associative form's beside it.
//!
//! Prints each case with its largest relative (Frobenius) error. Start at the tests, one for each kind
//! of case.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests; each case reports its largest error"
)]

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use generator::{Module, SiteId, State, Strategy};
use lm::{KvCache, Lm, LoadOptions, Row, TokenId, Windows};
use testkit::relative_error;

type Vectors = HashMap<String, Tensor>;

fn read(path: &Path) -> Vectors {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn tokens(tensor: &Tensor) -> Vec<TokenId> {
    tensor
        .to_vec1::<i64>()
        .unwrap()
        .into_iter()
        .map(|id| TokenId(u32::try_from(id).unwrap()))
        .collect()
}

/// The largest error of a case, and where.
struct Report {
    case: String,
    tolerance: f64,
    largest: (f64, String),
    compared: usize,
}

impl Report {
    fn new(case: &str, tolerance: f64) -> Self {
        Self {
            case: case.to_owned(),
            tolerance,
            largest: (0.0, String::new()),
            compared: 0,
        }
    }

    fn compare(&mut self, what: &str, got: &Tensor, want: &Tensor) {
        assert_eq!(got.dims(), want.dims(), "{}: {what}", self.case);
        let error = relative_error(got, &want.to_dtype(DType::F32).unwrap());
        // Not a number counts as the largest error there is.
        let error = if error.is_nan() { f64::INFINITY } else { error };
        if error >= self.largest.0 {
            self.largest = (error, what.to_owned());
        }
        self.compared += 1;
    }

    /// Prints the case with its largest error and says whether it holds.
    fn finish(self) -> bool {
        let Self {
            case,
            tolerance,
            largest: (error, at),
            compared,
        } = self;
        assert!(compared > 0, "{case} compared nothing");
        let holds = error <= tolerance;
        let verdict = if holds { "within" } else { "OVER" };
        testkit::report(&format!(
            "golden {case}: largest error {error:.1e} at {at} ({compared} tensors, {verdict} {tolerance:.0e})"
        ));
        holds
    }
}

#[test]
fn golden_cases_of_the_published_form_agree() {
    let Some(folder) = testkit::golden_dir() else {
        return;
    };
    let mut cases: Vec<PathBuf> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    cases.retain(|path| path.is_dir() && !path.join("prompts.json").is_file());
    cases.sort();
    assert!(!cases.is_empty(), "no case under {}", folder.display());
    // Every case is compared before the first one that does not hold fails the test.
    cases.retain(|case| !published(case));
    assert!(cases.is_empty(), "over the tolerance: {cases:?}");
}

fn published(case: &Path) -> bool {
    let mut report = Report::new(&case.file_name().unwrap().to_string_lossy(), 1e-4);
    let expected = read(&case.join("expected.safetensors"));
    let mut lm = Lm::load(&case.join("base"), LoadOptions::default()).unwrap();
    lm.attach_generator(&case.join("generator")).unwrap();
    let generator = lm.generator().unwrap();
    let (context, query) = (tokens(&expected["context"]), tokens(&expected["query"]));

    report.compare(
        "base.logits",
        &lm.logits(&query, None, 1.0).unwrap(),
        &expected["base.logits"],
    );
    for (layer, hidden) in lm
        .hidden_states(&query, None, 1.0)
        .unwrap()
        .iter()
        .enumerate()
    {
        if let Some(want) = expected.get(&format!("base.hidden.{layer}")) {
            report.compare(&format!("base.hidden.{layer}"), hidden, want);
        }
    }

    let mut strategies: Vec<&str> = expected
        .keys()
        .filter_map(|key| key.strip_suffix(".exact.logits"))
        .collect();
    strategies.sort_unstable();
    assert!(!strategies.is_empty(), "{}: no strategy", report.case);
    for name in strategies {
        let strategy = match name {
            "concat" => Strategy::Concat,
            "parallel" => Strategy::Parallel,
            "sequential" | "sequential-long" => Strategy::Sequential,
            other => panic!("unknown strategy {other}"),
        };
        let state = lm
            .encode(
                &context,
                strategy,
                Windows::Equalised(generator.config().window),
            )
            .unwrap();
        let core = generator.read_out(&state).unwrap();
        for (key, want) in &expected {
            let Some(rest) = key.strip_prefix(&format!("{name}.exact.layer.")) else {
                continue;
            };
            let [layer, module, kind] = rest.split('.').collect::<Vec<_>>().try_into().unwrap();
            let id = SiteId {
                layer: layer.parse().unwrap(),
                module: Module::from_name(module).unwrap(),
            };
            let site = generator
                .site_index(id)
                .unwrap_or_else(|| panic!("{}: no site {id}", report.case));
            let got = match kind {
                "state" => state.sums(site).unwrap().0.clone(),
                "delta" => generator.delta_weight(site, &core).unwrap(),
                other => panic!("unknown vector {other}"),
            };
            report.compare(key, &got, want);
        }
        let logits = lm.logits(&query, Some(&core), 1.0).unwrap();
        report.compare(
            &format!("{name}.exact.logits"),
            &logits,
            &expected[&format!("{name}.exact.logits")],
        );
    }
    report.finish()
}

#[test]
fn golden_smollm2_agrees_quantised_and_dequantised() {
    let Some(folder) = testkit::golden_part("smollm2-135m") else {
        return;
    };
    let expected = read(&folder.join("expected.safetensors"));
    let prompts: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.join("prompts.json")).unwrap()).unwrap();
    for (kind, dequantize, tolerance) in [("quantised", false, 1e-2), ("dequantised", true, 1e-4)] {
        let mut report = Report::new(&format!("smollm2-135m {kind}"), tolerance);
        let lm = Lm::load(
            &testkit::smollm2_gguf(),
            LoadOptions {
                dequantize,
                ..LoadOptions::default()
            },
        )
        .unwrap();
        for (index, prompt) in prompts.as_array().unwrap().iter().enumerate() {
            let ids = |key: &str| -> Vec<TokenId> {
                let ids = prompt[key].as_array().unwrap().iter();
                ids.map(|id| TokenId(u32::try_from(id.as_u64().unwrap()).unwrap()))
                    .collect()
            };
            let prompt = ids("ids_with_bos");
            let logits = lm.logits(&prompt, None, 1.0).unwrap(); // [T, V]
            let last = logits.get(prompt.len() - 1).unwrap(); // [V]
            report.compare(
                &format!("{index}.last_logits"),
                &last,
                &expected[&format!("{index}.last_logits")],
            );
            let next = Tensor::new(logprobs_of_next(&logits, &prompt), &Device::Cpu).unwrap();
            report.compare(
                &format!("{index}.logprob_of_next"),
                &next,
                &expected[&format!("{index}.logprob_of_next")],
            );
            let greedy = ids("greedy");
            assert_eq!(
                generate_greedily(&lm, &prompt, greedy.len()),
                greedy,
                "{kind} prompt {index}"
            );
        }
        assert!(report.finish());
    }
}

/// log p(token t + 1 | tokens up to t), [T - 1]. logits [T, V].
fn logprobs_of_next(logits: &Tensor, tokens: &[TokenId]) -> Vec<f32> {
    let logits = logits.to_vec2::<f32>().unwrap();
    let pairs = logits.iter().zip(&tokens[1..]);
    pairs
        .map(|(row, next)| {
            let largest = row.iter().copied().fold(f32::MIN, f32::max);
            let sum: f64 = row
                .iter()
                .map(|&logit| f64::from(logit - largest).exp())
                .sum();
            (f64::from(row[next.0 as usize] - largest) - sum.ln()) as f32
        })
        .collect()
}

/// The likeliest tokens behind a prompt, one decode step each.
fn generate_greedily(lm: &Lm, prompt: &[TokenId], count: usize) -> Vec<TokenId> {
    let kv = KvCache::new(lm.config(), 8, 16).unwrap();
    let blocks: Vec<u32> = (0..8).collect();
    let (mut position, mut next, mut generated) = (0, prompt.to_vec(), Vec::new());
    while generated.len() < count {
        let row = Row {
            tokens: &next,
            position,
            blocks: &blocks,
            core: None,
            scale: 1.0,
            window: None,
            lookahead: None,
            logits: 1,
        };
        let logits = lm.forward(&mut [row], &kv).unwrap().logits.unwrap(); // [1, V]
        let best = logits
            .get(0)
            .unwrap()
            .argmax(0)
            .unwrap()
            .to_scalar::<u32>()
            .unwrap();
        position += next.len();
        next = vec![TokenId(best)];
        generated.push(TokenId(best));
    }
    generated
}

/// The associative form's checkpoint on its base, and its vectors; None if they are not there.
fn associative(file: &str) -> Option<(Lm, Vectors)> {
    let folder = testkit::associative_dir()?;
    let mut lm = Lm::load(&testkit::smollm2_gguf(), LoadOptions::default()).unwrap();
    lm.attach_generator(&folder).unwrap();
    Some((lm, read(&folder.join(file))))
}

/// S, G and N of a state wherever `expected` has them under `prefix`.
fn compare_state(report: &mut Report, lm: &Lm, state: &State, expected: &Vectors, prefix: &str) {
    let generator = lm.generator().unwrap();
    let core = generator.read_out(state).unwrap();
    for (key, want) in expected {
        let Some(rest) = key.strip_prefix(&format!("{prefix}layer.")) else {
            continue;
        };
        let (layer, kind) = rest.split_once('.').unwrap();
        let id = SiteId {
            layer: layer.parse().unwrap(),
            module: Module::DownProj,
        };
        let site = generator.site_index(id).unwrap();
        let (s, g) = state.sums(site).unwrap();
        let got = match kind {
            "S" => s.clone(),
            "G" => g.unwrap().clone(),
            "N" => core.matrix(site).unwrap().unwrap(),
            other => panic!("unknown vector {other}"),
        };
        report.compare(key, &got, want);
    }
}

#[test]
fn golden_associative_window_agrees() {
    let Some((lm, expected)) = associative("expected.safetensors") else {
        return;
    };
    let mut report = Report::new("generator-smollm2 expected", 1e-3);
    let (context, query) = (tokens(&expected["context"]), tokens(&expected["query"]));
    let state = lm
        .encode(&context, Strategy::Parallel, Windows::Fixed(256))
        .unwrap();
    compare_state(&mut report, &lm, &state, &expected, "");
    let core = lm.generator().unwrap().read_out(&state).unwrap();
    report.compare(
        "base.logits",
        &lm.logits(&query, None, 1.0).unwrap(),
        &expected["base.logits"],
    );
    report.compare(
        "adapted.logits",
        &lm.logits(&query, Some(&core), 1.0).unwrap(),
        &expected["adapted.logits"],
    );
    assert!(report.finish());
}

#[test]
fn golden_associative_streams_agree() {
    let Some((lm, expected)) = associative("streams.safetensors") else {
        return;
    };
    let mut report = Report::new("generator-smollm2 streams", 1e-3);
    let generator = lm.generator().unwrap();
    let number = |key: &str| usize::try_from(expected[key].to_vec1::<i64>().unwrap()[0]).unwrap();
    let (a, b, query) = (
        tokens(&expected["document.a"]),
        tokens(&expected["document.b"]),
        tokens(&expected["query"]),
    );
    let encode = |document: &[TokenId]| {
        lm.encode(
            document,
            Strategy::Parallel,
            Windows::Fixed(number("window")),
        )
        .unwrap()
    };
    let (of_a, of_b, flushed) = (encode(&a), encode(&b), encode(&a[..number("flush.length")]));
    let sum = |weight: f32| {
        let mut state = generator.new_state().unwrap();
        state.add(&of_a, weight).unwrap();
        state.add(&of_b, 1.0).unwrap();
        state
    };
    let cases = [
        ("a", &of_a),
        ("b", &of_b),
        ("flush", &flushed),
        ("ab", &sum(1.0)),
        ("half_a_plus_b", &sum(0.5)),
    ];
    for (name, state) in cases {
        compare_state(&mut report, &lm, state, &expected, &format!("{name}."));
        let core = generator.read_out(state).unwrap();
        let want = &expected[&format!("{name}.logits")]; // [6, V]: of the query's last tokens
        let logits = lm.logits(&query, Some(&core), 1.0).unwrap(); // [T, V]
        let (rows, _) = want.dims2().unwrap();
        let last = logits.narrow(0, query.len() - rows, rows).unwrap();
        report.compare(&format!("{name}.logits"), &last, want);
    }
    assert!(report.finish());
}
