//! AdamW beside its formula, and what the masters keep.

use candle_core::{Device, Tensor};
use generator::{Generator, Trainee};
use testkit::{GeneratorSpec, TinySpec, tiny_base, tiny_generator};

use super::{EPS, Masters};
use crate::recipe::Optimizer;

pub(crate) fn trainee() -> Trainee {
    let dir = tempfile::tempdir().unwrap();
    let base = TinySpec::default();
    tiny_base(&dir.path().join("base"), &base);
    tiny_generator(
        &dir.path().join("generator"),
        &base,
        &GeneratorSpec::default(),
    );
    let lm = lm::Lm::load(&dir.path().join("base"), lm::LoadOptions::default()).unwrap();
    Trainee::of(&Generator::load(&dir.path().join("generator"), &lm.shape()).unwrap()).unwrap()
}

#[test]
fn masters_are_the_tensors_that_they_were_made_of() {
    let start = trainee();
    let masters = Masters::of(&start, &candle_core::Device::Cpu).unwrap();
    for (site, trained) in start.sites().iter().zip(masters.trainee.sites()) {
        for part in generator::PARTS {
            let (Some(before), Some(after)) = (site.part(part), trained.part(part)) else {
                continue;
            };
            assert!(after.is_variable());
            assert!(testkit::relative_error(after, before) < 1e-6, "{part}");
        }
    }
    for master in masters.all.iter().filter(|master| master.unit.len() > 1) {
        let mean =
            master.unit.iter().map(|unit| unit * unit).sum::<f32>() / master.unit.len() as f32;
        assert!((mean - 1.0).abs() < 1e-3, "{}", master.part);
    }
}

#[test]
fn a_step_is_adamw_on_units_with_a_rate_of_its_own_for_scalars() {
    let mut masters = Masters::of(&trainee(), &candle_core::Device::Cpu).unwrap();
    let recipe = Optimizer {
        lr: 0.02,
        weight_decay: 0.5,
        clip: 0.7,
        ..Optimizer::default()
    };
    let units: Vec<Vec<f32>> = masters
        .all
        .iter()
        .map(|master| master.unit.clone())
        .collect();
    // Loss Σ w²/2 over all tensors: the gradient of a unit is scale² unit.
    let mut want: Vec<(Vec<f32>, Vec<f32>, Vec<f32>)> = units
        .iter()
        .map(|unit| (unit.clone(), vec![0.0; unit.len()], vec![0.0; unit.len()]))
        .collect();
    for step in 0..3u64 {
        let mut loss = Tensor::zeros((), candle_core::DType::F32, &Device::Cpu).unwrap();
        for site in masters.trainee.sites() {
            for part in generator::PARTS.iter().filter_map(|part| site.part(part)) {
                loss = (loss + (part.sqr().unwrap().sum_all().unwrap() * 0.5).unwrap()).unwrap();
            }
        }
        let gradients = loss.backward().unwrap();
        masters.accumulate(&gradients, 0.25).unwrap();
        masters.accumulate(&gradients, 0.75).unwrap();
        let norm = masters.norm();
        let scales: Vec<f32> = masters.all.iter().map(|master| master.scale).collect();
        let square: f64 = want
            .iter()
            .zip(&scales)
            .flat_map(|((unit, ..), scale)| {
                unit.iter()
                    .map(move |unit| f64::from(unit * scale * scale).powi(2))
            })
            .sum();
        assert!((norm - square.sqrt()).abs() < 1e-4 * norm);
        masters.step(&recipe, step, 0.5, norm).unwrap();
        let clip = (0.7 / norm).min(1.0) as f32;
        for ((unit, first, second), scale) in want.iter_mut().zip(&scales) {
            let scalar = unit.len() == 1;
            let lr = 0.01 * if scalar { 3.0 } else { 1.0 };
            for i in 0..unit.len() {
                let g = clip * unit[i] * scale * scale;
                first[i] = 0.9 * first[i] + 0.1 * g;
                second[i] = 0.98 * second[i] + 0.02 * g * g;
                let (m, v) = (
                    first[i] / (1.0 - 0.9f32.powi(step as i32 + 1)),
                    second[i] / (1.0 - 0.98f32.powi(step as i32 + 1)),
                );
                if !scalar {
                    unit[i] -= 0.01 * 0.5 * unit[i];
                }
                unit[i] -= lr * m / (v.sqrt() + EPS);
            }
        }
        for (master, (unit, ..)) in masters.all.iter().zip(&want) {
            for (got, want) in master.unit.iter().zip(unit) {
                assert!(
                    (got - want).abs() < 1e-4,
                    "{} step {step}: {got} for {want}",
                    master.part
                );
            }
        }
    }
}
