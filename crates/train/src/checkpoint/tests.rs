//! What is saved is what is loaded; what is exported is what was trained.

use std::fs;

use generator::{Generator, Trainee};
use serde_json::{Map, Value};
use testkit::{Form, GeneratorSpec, Random, TinySpec, tiny_base, tiny_generator};

use super::{Standing, bf16, export, load_state, save_state};
use crate::{Error, optimizer::Masters};

fn standing() -> Standing {
    Standing {
        recipe: "recipe".to_owned(),
        base: "base".to_owned(),
        step: 7,
        tokens: 1 << 40,
        seconds: 0.1 + 0.2,
        random: u64::MAX - 3,
        best: Some((1.0 / 3.0, 5)),
        validated: (5, 0.25),
        running: Default::default(),
    }
}

fn trainee(form: Form) -> (tempfile::TempDir, lm::Lm, Trainee) {
    let dir = tempfile::tempdir().unwrap();
    let base = TinySpec::default();
    tiny_base(&dir.path().join("base"), &base);
    let spec = GeneratorSpec {
        form,
        ..GeneratorSpec::default()
    };
    tiny_generator(&dir.path().join("generator"), &base, &spec);
    let lm = lm::Lm::load(&dir.path().join("base"), lm::LoadOptions::default()).unwrap();
    let generator = Generator::load(&dir.path().join("generator"), &lm.shape()).unwrap();
    (dir, lm, Trainee::of(&generator).unwrap())
}

#[test]
fn a_state_comes_back_bit_for_bit() {
    let (dir, _, start) = trainee(Form::Associative);
    let mut masters = Masters::of(&start, &candle_core::Device::Cpu).unwrap();
    let mut random = Random::new(9);
    for master in &mut masters.all {
        for values in [&mut master.unit, &mut master.first, &mut master.second] {
            values
                .iter_mut()
                .for_each(|value| *value = random.next_u64() as f32 / 1e18);
        }
    }
    save_state(dir.path(), &standing(), &masters).unwrap();
    let mut other = Masters::of(&start, &candle_core::Device::Cpu).unwrap();
    assert_eq!(
        load_state(dir.path(), &mut other).unwrap(),
        Some(standing())
    );
    for (one, other) in masters.all.iter().zip(&other.all) {
        assert_eq!(
            (&one.unit, &one.first, &one.second, one.scale),
            (&other.unit, &other.first, &other.second, other.scale)
        );
    }
    let values = testkit::values(&other.trainee.sites()[0].a1);
    let master = &other.all[0];
    assert_eq!(values[3], f64::from(master.unit[3] * master.scale));
}

#[test]
fn no_state_is_none_and_a_cut_one_is_damaged() {
    let (dir, _, start) = trainee(Form::Associative);
    let mut masters = Masters::of(&start, &candle_core::Device::Cpu).unwrap();
    assert_eq!(load_state(dir.path(), &mut masters).unwrap(), None);
    save_state(dir.path(), &standing(), &masters).unwrap();
    let path = dir.path().join("state.safetensors");
    let bytes = fs::read(&path).unwrap();
    for length in [0, 7, 100, bytes.len() - 1] {
        fs::write(&path, &bytes[..length]).unwrap();
        let error = load_state(dir.path(), &mut masters).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{length}: {error}");
    }
}

#[test]
fn an_exported_generator_is_served_as_it_was_trained() {
    for form in [Form::Associative, Form::Published] {
        let (dir, lm, start) = trainee(form);
        // An amplitude that has been learned goes into B.
        let louder = start
            .map(|_, part, tensor| {
                if part == "log_amplitude" {
                    tensor + 0.7
                } else {
                    Ok(tensor.clone())
                }
            })
            .unwrap();
        let config = fs::read(dir.path().join("generator/adapter_config.json")).unwrap();
        let config: Map<String, Value> = serde_json::from_slice(&config).unwrap();
        let folder = dir.path().join("exported");
        export(&folder, &louder, &config).unwrap();
        let served = Trainee::of(&Generator::load(&folder, &lm.shape()).unwrap()).unwrap();
        for (site, want) in served.sites().iter().zip(start.sites()) {
            for part in generator::PARTS {
                let (Some(got), Some(want)) = (site.part(part), want.part(part)) else {
                    continue;
                };
                let factor = if part == "B" { 0.7f64.exp() } else { 1.0 };
                let want = (want * factor).unwrap();
                let apart = testkit::values(&(got - &want).unwrap())
                    .iter()
                    .fold(0.0, |a: f64, b| a.max(b.abs()));
                let size = testkit::values(&want)
                    .iter()
                    .fold(0.0, |a: f64, b| a.max(b.abs()));
                assert!(apart <= size / 200.0, "{form:?} {part}: {apart} of {size}");
            }
        }
    }
}

#[test]
fn halves_are_rounded_to_the_nearest_and_ties_to_even() {
    for (value, want) in [
        (1.0f32, 0x3f80),
        (1.0 + 1.0 / 256.0, 0x3f80),
        (1.0 + 3.0 / 256.0, 0x3f82),
        (-2.0, 0xc000),
    ] {
        assert_eq!(bf16(value), want, "{value}");
    }
    assert!(f32::from_bits(u32::from(bf16(f32::NAN)) << 16).is_nan());
    assert_eq!(bf16(f32::INFINITY), 0x7f80);
}
