//! For tests: a gradient against central differences.

use candle_core::{Device, Result, Tensor, Var};

use crate::noise::noise;

/// A variable of seeded noise.
pub(crate) fn var(seed: u64, shape: &[usize]) -> Var {
    let values = noise(seed, shape.iter().product());
    Var::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Holds the gradient of Σ c y, c fixed noise and y = `f()`, against central differences in each variable.
pub(crate) fn check(variables: &[&Var], tolerance: f64, f: impl Fn() -> Result<Tensor>) {
    let y = f().unwrap();
    let weights = Tensor::from_vec(noise(99, y.elem_count()), y.shape(), &Device::Cpu).unwrap();
    let loss = (y * &weights).unwrap().sum_all().unwrap();
    let gradients = loss.backward().unwrap();
    let value = || -> f64 {
        let y: Vec<f32> = f().unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let c: Vec<f32> = weights.flatten_all().unwrap().to_vec1().unwrap();
        y.iter()
            .zip(&c)
            .map(|(y, c)| f64::from(*y) * f64::from(*c))
            .sum()
    };
    for (number, variable) in variables.iter().enumerate() {
        let gradient = gradients
            .get(variable)
            .expect("every variable has a gradient");
        let gradient: Vec<f32> = gradient.flatten_all().unwrap().to_vec1().unwrap();
        let start: Vec<f32> = variable.flatten_all().unwrap().to_vec1().unwrap();
        let set = |values: Vec<f32>| {
            let values = Tensor::from_vec(values, variable.shape(), &Device::Cpu).unwrap();
            variable.set(&values).unwrap();
        };
        let size = gradient.iter().fold(0.0f32, |size, g| size.max(g.abs()));
        for i in 0..start.len() {
            let step = 1e-2f32;
            let moved = |by: f32| {
                let mut values = start.clone();
                values[i] += by;
                set(values);
                value()
            };
            let slope = (moved(step) - moved(-step)) / f64::from(2.0 * step);
            set(start.clone());
            let apart = (slope - f64::from(gradient[i])).abs();
            assert!(
                apart <= tolerance * f64::from(size) + 1e-6,
                "variable {number}, element {i}: {} by the gradient, {slope} by differences",
                gradient[i]
            );
        }
    }
}
