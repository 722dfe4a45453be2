//! AdamW on parameters of size one.
//!
//! Every tensor is a fixed root mean square times a parameter of rms 1 or so: one learning rate then means the same
//! relative change everywhere. The tensors are candle variables that the trainee's formulas are followed to; masters and
//! moments are f32 beside them. Start at [`Masters::step`].

use candle_core::{Device, Tensor, Var, backprop::GradStore};
use generator::{SiteId, Trainee};
use rayon::prelude::*;

use crate::{Error, recipe::Optimizer};

/// Keeps a moment that is nearly zero from making a large step; far below the square of any real gradient.
const EPS: f32 = 1e-10;

/// A trained tensor: scale * unit.
pub(crate) struct Master {
    pub(crate) site: SiteId,
    pub(crate) part: String,
    pub(crate) scale: f32,
    pub(crate) unit: Vec<f32>,
    /// Moments of the gradient.
    pub(crate) first: Vec<f32>,
    pub(crate) second: Vec<f32>,
    /// Sum of the gradients since the last step.
    gradient: Vec<f32>,
    var: Var,
}

impl Master {
    /// ln lambda and ln amplitude have their own learning rate, and do not decay.
    fn scalar(&self) -> bool {
        self.unit.len() == 1
    }

    fn publish(&self) -> Result<(), Error> {
        let values: Vec<f32> = self.unit.iter().map(|unit| unit * self.scale).collect();
        let values = Tensor::from_vec(values, self.var.shape(), self.var.device())?;
        Ok(self.var.set(&values)?)
    }
}

/// All trained tensors of a generator.
pub(crate) struct Masters {
    pub(crate) all: Vec<Master>,
    /// The generator on the variables.
    pub(crate) trainee: Trainee,
}

impl Masters {
    /// The tensors of a generator, with nothing learned yet: the variables on a device, masters and moments in host memory.
    pub(crate) fn of(start: &Trainee, device: &Device) -> Result<Self, Error> {
        // A tensor of zeros has no size of its own: that of the one that it works beside.
        let rms = |tensor: &Tensor| -> Result<f64, Error> {
            let mean = tensor.detach().sqr()?.mean_all()?.to_scalar::<f32>()?;
            Ok(f64::from(mean).sqrt())
        };
        let mut all = Vec::new();
        let trainee = start.map(|site, part, tensor| -> Result<Tensor, Error> {
            let mut scale = rms(tensor)?;
            if tensor.elem_count() == 1 {
                scale = 1.0;
            } else if scale == 0.0 {
                let beside = start.sites().iter().find(|other| other.id == site);
                scale = match beside.map(|site| (part, site)) {
                    Some(("A3n", site)) => rms(&site.a3)?,
                    Some(("B", _)) => 0.02,
                    _ => 1.0,
                };
            }
            let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
            let unit: Vec<f32> = values.iter().map(|value| value / scale as f32).collect();
            let var = Var::from_tensor(&tensor.detach().to_device(device)?)?;
            let tensor = var.as_tensor().clone();
            all.push(Master {
                site,
                part: part.to_owned(),
                scale: scale as f32,
                first: vec![0.0; unit.len()],
                second: vec![0.0; unit.len()],
                gradient: vec![0.0; unit.len()],
                unit,
                var,
            });
            Ok(tensor)
        })?;
        let masters = Self { all, trainee };
        masters.publish()?;
        Ok(masters)
    }

    /// Brings the variables to what the masters say.
    pub(crate) fn publish(&self) -> Result<(), Error> {
        self.all.iter().try_for_each(Master::publish)
    }

    /// Adds the gradients of a batch, times `share`.
    pub(crate) fn accumulate(&mut self, gradients: &GradStore, share: f32) -> Result<(), Error> {
        for master in &mut self.all {
            let Some(gradient) = gradients.get(&master.var) else {
                continue;
            };
            let gradient = gradient.flatten_all()?.to_device(&Device::Cpu)?;
            let values = kernels::Floats::of(&gradient)?;
            let factor = master.scale * share;
            master
                .gradient
                .par_iter_mut()
                .zip(values.par_iter())
                .for_each(|(sum, value)| *sum += factor * value);
        }
        Ok(())
    }

    /// Norm of the gradient of all units.
    pub(crate) fn norm(&self) -> f64 {
        let square = |master: &Master| -> f64 {
            master.gradient.iter().map(|g| f64::from(*g).powi(2)).sum()
        };
        self.all.par_iter().map(square).sum::<f64>().sqrt()
    }

    /// Step number `step` (from 0) at `factor` of the learning rate, with the gradients so far, which are forgotten.
    /// `norm`: as [`Masters::norm`] says.
    pub(crate) fn step(
        &mut self,
        recipe: &Optimizer,
        step: u64,
        factor: f64,
        norm: f64,
    ) -> Result<(), Error> {
        let clip = if recipe.clip > 0.0 && norm > recipe.clip {
            (recipe.clip / norm) as f32
        } else {
            1.0
        };
        let (beta1, beta2) = (recipe.beta1 as f32, recipe.beta2 as f32);
        let count = (step + 1).min(1 << 30) as i32;
        let (bias1, bias2) = (
            1.0 - recipe.beta1.powi(count) as f32,
            1.0 - recipe.beta2.powi(count) as f32,
        );
        self.all.par_iter_mut().try_for_each(|master| {
            let mut lr = recipe.lr * factor;
            let mut decay = lr * recipe.weight_decay;
            if master.scalar() {
                lr *= recipe.scalars;
                decay = 0.0;
            }
            let (lr, decay) = (lr as f32, decay as f32);
            let units = master.unit.iter_mut().zip(&mut master.gradient);
            let moments = master.first.iter_mut().zip(&mut master.second);
            for ((unit, gradient), (first, second)) in units.zip(moments) {
                let g = std::mem::take(gradient) * clip;
                *first = beta1 * *first + (1.0 - beta1) * g;
                *second = beta2 * *second + (1.0 - beta2) * g * g;
                *unit -= decay * *unit;
                *unit -= lr * (*first / bias1) / ((*second / bias2).sqrt() + EPS);
            }
            master.publish()
        })
    }
}

#[cfg(test)]
pub(crate) mod tests;
