//! Whole runs of a tiny model.

use std::{fs, path::PathBuf};

use lm::{Lm, LoadOptions};
use serde_json::Value;
use testkit::{GeneratorSpec, TinySpec, tiny_base, tiny_generator};

use super::{Args, Ended, run};
use crate::{Error, Place, checkpoint::load_state, optimizer::Masters};

const RECIPE: &str = r#"
start = "generator"
length = { steps = 6 }
save_minutes = 0
[data]
folder = "data"
corpus = "text.jsonl"
qa = "qa.jsonl"
qa_chars = [10, 200]
piece_chars = 400
query = 12
mix = { corpus = 2, qa = 1, facts = 1 }
[[layout]]
chance = 1
windows = 2
queries = [{ reconstruction = 1 }, { completion = 1 }, { negative = 1 }]
[[layout]]
chance = 1
windows = 4
group = 2
queries = [{ reconstruction = 1 }, { completion = 1, negative = 1 }]
[optimizer]
lr = 0.02
warmup = 2
schedule = "constant"
[validation]
steps = 2
contexts = 4
"#;

struct Tiny {
    dir: tempfile::TempDir,
}

impl Tiny {
    fn new(recipe: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = TinySpec::default();
        tiny_base(&dir.path().join("base"), &base);
        let spec = GeneratorSpec {
            window: 24,
            ..GeneratorSpec::default()
        };
        tiny_generator(&dir.path().join("generator"), &base, &spec);
        let data = dir.path().join("data");
        fs::create_dir(&data).unwrap();
        let words = |n: usize| {
            (0..60)
                .map(|i| format!("w{} ", (n * 7 + i) % 90))
                .collect::<String>()
        };
        let text: String = (0..400)
            .map(|n| format!("{{\"text\":\"{n} {}\"}}\n", words(n)))
            .collect();
        fs::write(data.join("text.jsonl"), text).unwrap();
        let qa: String = (0..400)
            .map(|n| format!("{{\"context\":\"mill {n} fell\",\"question\":\"which?\",\"answers\":[\"mill {n}\"]}}\n"))
            .collect();
        fs::write(data.join("qa.jsonl"), qa).unwrap();
        fs::write(dir.path().join("recipe.toml"), recipe).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn args(&self, out: &str, steps: u64) -> Args {
        Args {
            recipe: self.path("recipe.toml"),
            out: self.path(out),
            data: None,
            start: None,
            minutes: None,
            steps: Some(steps),
            seed: None,
            device: Place::Cpu,
            dry_run: false,
            probe: None,
        }
    }

    fn run(&self, out: &str, steps: u64) -> Result<Ended, Error> {
        self.with(&self.args(out, steps)).map(|(ended, _)| ended)
    }

    fn with(&self, args: &Args) -> Result<(Ended, String), Error> {
        let mut out = Vec::new();
        let ended = run(args, &self.path("base"), &self.path("home"), &mut out)?;
        Ok((ended, String::from_utf8(out).unwrap()))
    }

    /// Masters and moments of a run's state.
    fn state(&self, out: &str) -> Vec<(Vec<f32>, Vec<f32>, Vec<f32>)> {
        let mut masters = Masters::of(
            &crate::optimizer::tests::trainee(),
            &candle_core::Device::Cpu,
        )
        .unwrap();
        load_state(&self.path(out), &mut masters).unwrap().unwrap();
        masters
            .all
            .into_iter()
            .map(|master| (master.unit, master.first, master.second))
            .collect()
    }

    fn metrics(&self, out: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(out).join("metrics.jsonl")).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

#[test]
fn a_run_in_two_parts_is_the_run_at_once_bit_for_bit() {
    whole_and_in_parts(RECIPE);
}

#[test]
fn a_run_in_bf16_in_two_parts_is_the_run_at_once_bit_for_bit() {
    whole_and_in_parts(&format!("compute = \"bf16\"\n{RECIPE}"));
}

#[test]
fn what_teachers_said_before_changes_no_bit_of_a_run() {
    // The second run finds the first one's words, in the middle of itself as at its beginning.
    let recipe = RECIPE.replace(
        "[optimizer]",
        "[loss]\nteacher_top_k = 4\n[loss.answer]\nteacher = 0.5\n[optimizer]",
    );
    let tiny = whole_and_in_parts(&recipe);
    let words = fs::read_dir(tiny.path("home/teachers")).unwrap();
    let sizes: Vec<u64> = words
        .map(|file| file.unwrap().metadata().unwrap().len())
        .collect();
    assert!(sizes.len() == 1 && sizes[0] > 0, "{sizes:?}");
    fs::remove_dir_all(tiny.path("home/teachers")).unwrap();
    tiny.run("alone", 6).unwrap();
    assert_eq!(tiny.state("alone"), tiny.state("once"));
}

fn whole_and_in_parts(recipe: &str) -> Tiny {
    let tiny = Tiny::new(recipe);
    let at_once = tiny.run("once", 6).unwrap();
    tiny.run("parts", 3).unwrap();
    assert_ne!(tiny.state("parts"), tiny.state("once"));
    let resumed = tiny.run("parts", 6).unwrap();
    assert_eq!((resumed.steps, at_once.steps), (6, 6));
    assert_eq!(tiny.state("parts"), tiny.state("once"));
    for file in ["last/adapter_model.safetensors", "last/adapter_config.json"] {
        assert_eq!(
            fs::read(tiny.path("parts").join(file)).unwrap(),
            fs::read(tiny.path("once").join(file)).unwrap(),
            "{file}"
        );
    }
    // What is behind it is not done again.
    assert_eq!(tiny.run("parts", 6).unwrap().steps, 6);
    let lines = tiny.metrics("parts");
    let steps: Vec<_> = lines
        .iter()
        .filter_map(|line| line["step"].as_u64())
        .collect();
    assert!(steps.is_sorted(), "{steps:?}");
    tiny
}

#[test]
fn training_lowers_the_held_out_figure_and_the_best_can_be_served() {
    let tiny = Tiny::new(RECIPE);
    let ended = tiny.run("out", 60).unwrap();
    let figures: Vec<f64> = tiny
        .metrics("out")
        .iter()
        .filter_map(|line| line["figure"].as_f64())
        .collect();
    let (first, last) = (figures[0], figures[figures.len() - 1]);
    assert!(last < first - 0.05, "{first} to {last}");
    let least = figures.iter().copied().fold(f64::INFINITY, f64::min);
    assert_eq!(ended.best, Some(least));
    let mut lm = Lm::load(&tiny.path("base"), LoadOptions::default()).unwrap();
    lm.attach_generator(&ended.best_dir).unwrap();
}

#[test]
fn a_run_of_another_recipe_or_another_base_is_not_gone_on_with() {
    let tiny = Tiny::new(RECIPE);
    tiny.run("out", 1).unwrap();
    let before = tiny.state("out");
    fs::write(
        tiny.path("recipe.toml"),
        RECIPE.replace("lr = 0.02", "lr = 0.03"),
    )
    .unwrap();
    let error = tiny.run("out", 2).unwrap_err();
    assert!(matches!(error, Error::Foreign { .. }), "{error}");
    fs::write(tiny.path("recipe.toml"), RECIPE).unwrap();
    let other = TinySpec {
        seed: 9,
        ..TinySpec::default()
    };
    tiny_base(&tiny.path("base"), &other);
    let error = tiny.run("out", 2).unwrap_err();
    assert!(matches!(error, Error::Foreign { .. }), "{error}");
    assert_eq!(tiny.state("out"), before);
}

#[test]
fn a_generator_of_another_base_is_refused_by_its_digest() {
    let tiny = Tiny::new(RECIPE);
    let path = tiny.path("generator").join("adapter_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["base_digest"] = "00".repeat(32).into();
    fs::write(&path, config.to_string()).unwrap();
    let error = tiny.run("out", 1).unwrap_err();
    assert!(
        matches!(error, Error::Lm(lm::Error::ForeignBase { .. })),
        "{error}"
    );
}

#[test]
fn a_loss_that_is_no_number_ends_the_run_and_keeps_batch_and_state() {
    let tiny = Tiny::new(&RECIPE.replace("lr = 0.02", "lr = 900.0"));
    let error = tiny.run("out", 40).unwrap_err();
    let Error::NotFinite { step, batch, .. } = &error else {
        panic!("{error}");
    };
    assert!(*step > 1);
    let saved: Value = serde_json::from_slice(&fs::read(batch).unwrap()).unwrap();
    assert_eq!(saved["step"].as_u64(), Some(*step));
    assert!(
        !saved["batches"][0]["windows"]
            .as_array()
            .unwrap()
            .is_empty()
    );
    // The batch can be looked at again, on its own.
    let args = Args {
        probe: Some(batch.clone()),
        ..tiny.args("probed", 1)
    };
    let (_, told) = tiny.with(&args).unwrap();
    let told: Value = serde_json::from_str(&told).unwrap();
    assert!(told["batches"][0]["loss"].as_f64().unwrap() > 0.0);
    assert!(tiny.path("probed/probe.safetensors").exists());
    assert_eq!(
        tiny.state("out").len(),
        Masters::of(
            &crate::optimizer::tests::trainee(),
            &candle_core::Device::Cpu
        )
        .unwrap()
        .all
        .len()
    );
}

#[test]
fn a_device_that_is_not_there_is_named_before_anything_is_read() {
    let tiny = Tiny::new(RECIPE);
    let on_device = |dry_run| Args {
        device: Place::Cuda(900),
        dry_run,
        ..tiny.args("out", 5)
    };
    let error = tiny.with(&on_device(false)).unwrap_err();
    assert!(matches!(error, Error::Device { .. }), "{error}");
    assert!(!tiny.path("out").exists() && !tiny.path("home").exists());
    // What it would take there can be told here.
    let (_, told) = tiny.with(&on_device(true)).unwrap();
    assert!(told.contains("assumed"), "{told}");
}

#[test]
fn a_dry_run_tells_and_leaves_nothing() {
    let tiny = Tiny::new(RECIPE);
    let args = Args {
        dry_run: true,
        ..tiny.args("out", 5)
    };
    let (_, told) = tiny.with(&args).unwrap();
    for what in ["parameters", "operations a step", "memory", "time"] {
        assert!(told.contains(what), "{told}");
    }
    assert!(!tiny.path("out").exists() && !tiny.path("home").exists());
}

#[test]
fn a_new_generator_of_either_form_is_trained_and_served() {
    for (form, read_out, init) in [
        ("associative", "ridge", "white"),
        ("published", "svd", "white"),
        ("published", "frobenius", "random"),
    ] {
        let new = format!(
            "[generator]\nform = \"{form}\"\nread_out = \"{read_out}\"\nmodules = [\"o_proj\", \"down_proj\"]\nlayers = [1]\nr1 = 12\nr2 = 10\nmax_rank = 4\nwindow = 24\ncontexts = 12\ninit = \"{init}\"\nstrategy = \"sequential\"\n[data]"
        );
        let tiny = Tiny::new(
            &RECIPE
                .replace("start = \"generator\"\n", "")
                .replace("[data]", &new),
        );
        let ended = tiny.run("out", 2).unwrap();
        let mut lm = Lm::load(&tiny.path("base"), LoadOptions::default()).unwrap();
        lm.attach_generator(&ended.best_dir).unwrap();
        let config = fs::read_to_string(ended.best_dir.join("adapter_config.json")).unwrap();
        assert!(config.contains("base_digest") && config.contains(read_out));
    }
}

#[test]
fn a_checkpoint_that_finds_no_room_leaves_the_one_before_and_the_run_goes_on() {
    let tiny = Tiny::new(RECIPE);
    tiny.run("out", 2).unwrap();
    let (state, full) = (
        tiny.path("out/state.safetensors"),
        tiny.path("out/state.safetensors.new"),
    );
    let before = fs::read(&state).unwrap();
    // A folder where the new file would be written.
    fs::create_dir(&full).unwrap();
    let error = tiny.run("out", 4).unwrap_err();
    assert!(
        matches!(error, Error::Io { .. }),
        "the last save is not passed over: {error}"
    );
    assert_eq!(fs::read(&state).unwrap(), before);
    let lines = tiny.metrics("out");
    assert!(
        lines.iter().any(|line| line["step"].as_u64() == Some(4)),
        "the run went on to its end"
    );
    fs::remove_dir(&full).unwrap();
    assert_eq!(tiny.run("out", 4).unwrap().steps, 4);
}
