//! What a recipe may say.

use std::{fs, path::Path};

use super::{Length, Optimizer, Recipe, Schedule};
use crate::Error;

const RECIPE: &str = r#"
start = "generator"
length = { steps = 10 }
[data]
folder = "data"
corpus = "text.jsonl"
mix = { corpus = 1 }
[[layout]]
chance = 1
windows = 4
group = 2
queries = [{ reconstruction = 1 }]
"#;

fn load(text: &str) -> Result<Recipe, Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("recipe.toml");
    fs::write(&path, text).unwrap();
    Recipe::load(&path)
}

#[test]
fn paths_count_from_the_recipe() {
    let recipe = load(RECIPE).unwrap();
    let folder = recipe.data.folder.parent().unwrap();
    assert_eq!(
        recipe.start.as_deref(),
        Some(folder.join("generator").as_path())
    );
}

#[test]
fn the_recipes_of_the_repository_can_be_read() {
    let folder = testkit::repository_root().join("recipes");
    let mut count = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_some_and(|extension| extension == "toml")
        {
            Recipe::load(&path).unwrap_or_else(|error| panic!("{error}"));
            count += 1;
        }
    }
    assert!(count >= 2);
}

#[test]
fn unknown_keys_and_impossible_values_are_refused_by_name() {
    for (from, to, names) in [
        (
            "start = \"generator\"",
            "start = \"generator\"\nspeed = 3",
            "speed",
        ),
        ("chance = 1", "chance = 1\nwindow = 3", "window"),
        ("steps = 10", "steps = 0", "length.steps"),
        ("steps = 10", "hours = 1", "hours"),
        ("group = 2", "group = 3", "layout.group"),
        ("group = 2", "group = 8", "layout.group"),
        ("chance = 1", "chance = 0", "layout.chance"),
        ("mix = { corpus = 1 }", "mix = { qa = 1 }", "mix.qa"),
        (
            "mix = { corpus = 1 }",
            "mix = { corpus = nan }",
            "mix.corpus",
        ),
        ("start = \"generator\"", "", "start"),
        (
            "start = \"generator\"",
            "start = \"generator\"\noptimizer = { lr = -1 }",
            "optimizer.lr",
        ),
        (
            "start = \"generator\"",
            "start = \"generator\"\nloss = { answer = { at_least = 0 } }",
            "loss.answer",
        ),
    ] {
        assert!(RECIPE.contains(from));
        let error = load(&RECIPE.replace(from, to)).unwrap_err().to_string();
        assert!(error.contains(names), "{to}: {error}");
    }
    assert!(matches!(
        Recipe::load(Path::new("/nowhere")),
        Err(Error::Io { .. })
    ));
}

#[test]
fn the_digest_is_that_of_the_run_and_not_of_its_length() {
    let recipe = load(RECIPE).unwrap();
    let mut longer = recipe.clone();
    longer.length = Length::Minutes(7.0);
    assert_eq!(recipe.digest(), longer.digest());
    let mut other = recipe.clone();
    other.optimizer.lr *= 2.0;
    assert_ne!(recipe.digest(), other.digest());
}

#[test]
fn the_rate_rises_stays_and_falls() {
    let optimizer = Optimizer {
        warmup: 10,
        tail: 0.5,
        floor: 0.1,
        ..Optimizer::default()
    };
    let at = |schedule, step, progress| {
        Optimizer {
            schedule,
            ..optimizer
        }
        .factor(step, progress)
    };
    for schedule in [Schedule::Linear, Schedule::Cosine, Schedule::Constant] {
        assert!((at(schedule, 0, 0.0) - 0.1).abs() < 1e-12);
        assert!((at(schedule, 9, 0.01) - 1.0).abs() < 1e-12);
        assert!((at(schedule, 50, 0.5) - 1.0).abs() < 1e-12);
    }
    assert!((at(Schedule::Linear, 75, 0.75) - 0.5).abs() < 1e-12);
    assert!((at(Schedule::Cosine, 75, 0.75) - 0.5).abs() < 1e-12);
    assert!((at(Schedule::Linear, 99, 0.99) - 0.1).abs() < 1e-12);
    assert!((at(Schedule::Constant, 99, 0.99) - 1.0).abs() < 1e-12);
}
