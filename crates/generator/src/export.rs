//! A core as a PEFT LoRA: what any other engine can load.
//!
//! LoRA adds (lora_alpha / r) B' A x. With a core U, V of rank q: A = Uᵀ A1, B' = B V; with a dense N of the other
//! read-outs: A = Nᵀ A1, B' = B. Keys and config are those of PEFT's LoraConfig. Start at [`export`].

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

use crate::{
    config::{Config, ReadOut},
    cores::{Core, SiteCore},
    error::Error,
    read_out,
    site::Site,
};

/// The two files of a PEFT adapter.
#[derive(Clone, Debug)]
pub struct PeftExport {
    /// adapter_config.json
    pub config_json: Vec<u8>,
    /// adapter_model.safetensors
    pub safetensors: Vec<u8>,
    /// r of the adapter.
    pub rank: usize,
}

/// (alpha / R2) B Nᵀ A1 of one site, [Dout, Din] f32.
pub(crate) fn delta_weight(site: &Site, core: &SiteCore) -> Result<Tensor, Error> {
    match lora(site, core, ReadOut::Frobenius)? {
        Some((a, b)) => Ok((b.matmul(&a)? * site.scale)?),
        None => Ok(Tensor::zeros(
            (site.b.out_features(), site.a1.in_features()),
            DType::F32,
            &Device::Cpu,
        )?),
    }
}

/// A [r, Din] and B' [Dout, r] of one site, not scaled; `None` where the core is zero.
fn lora(
    site: &Site,
    core: &SiteCore,
    read_out: ReadOut,
) -> Result<Option<(Tensor, Tensor)>, Error> {
    if let SiteCore::Rounded(n) = core {
        let n = n.dequantize()?.t()?; // [R1, R2]
        return lora(site, &SiteCore::Dense(n), read_out);
    }
    let (a1, b) = match core {
        SiteCore::Zero | SiteCore::Rounded(_) => return Ok(None),
        SiteCore::Dense(_) | SiteCore::LowRank { .. } => {
            (site.a1.dequantize()?, site.b.dequantize()?)
        } // [R1, Din], [Dout, R2]
    };
    let factored = |u: &Tensor, v: &Tensor| -> Result<_, Error> {
        Ok(Some((u.t()?.matmul(&a1)?, b.matmul(v)?)))
    };
    match core {
        SiteCore::Zero | SiteCore::Rounded(_) => Ok(None),
        SiteCore::LowRank { u, v } => factored(u, v),
        SiteCore::Dense(n) if read_out == ReadOut::Svd => {
            // All kept singular values are 1: the rank is found again exactly.
            let (u, v) =
                read_out::unit_factors(n)?.ok_or(Error::NotConverged { site: site.id() })?;
            factored(&u, &v)
        }
        SiteCore::Dense(n) => Ok(Some((n.t()?.matmul(&a1)?, b))),
    }
}

/// The adapter of a core. Sites of a lower rank than the largest are filled up with zeros, so that one r and one
/// lora_alpha hold for all: engines that load LoRA files do not all know `rank_pattern`.
pub(crate) fn export(config: &Config, sites: &[Site], core: &Core) -> Result<PeftExport, Error> {
    let mut factors = Vec::with_capacity(sites.len());
    for (site, core) in sites.iter().zip(core.sites.iter()) {
        factors.push(lora(site, core, config.read_out)?);
    }
    let mut rank = 1;
    for (a, _) in factors.iter().flatten() {
        rank = rank.max(a.dim(0)?);
    }
    let mut tensors: Vec<(String, [usize; 2], Vec<u8>)> = Vec::with_capacity(2 * sites.len());
    for (site, factors) in sites.iter().zip(factors) {
        let (outputs, inputs) = (site.b.out_features(), site.a1.in_features());
        let (a, b) = match factors {
            Some((a, b)) => {
                let fill = rank - a.dim(0)?;
                (
                    bytes(&a.pad_with_zeros(0, 0, fill)?)?,
                    bytes(&b.pad_with_zeros(1, 0, fill)?)?,
                )
            }
            None => (
                vec![0; rank * inputs * size_of::<f32>()],
                vec![0; rank * outputs * size_of::<f32>()],
            ),
        };
        let module = format!("base_model.model.model.{}", site.id());
        tensors.push((format!("{module}.lora_A.weight"), [rank, inputs], a)); // [r, Din]
        tensors.push((format!("{module}.lora_B.weight"), [outputs, rank], b)); // [Dout, r]
    }
    let failed = |fault: &dyn std::fmt::Display| Error::Export {
        detail: fault.to_string(),
    };
    let mut views = Vec::with_capacity(tensors.len());
    for (name, shape, bytes) in &tensors {
        views.push((
            name.as_str(),
            TensorView::new(Dtype::F32, shape.to_vec(), bytes).map_err(|fault| failed(&fault))?,
        ));
    }
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    Ok(PeftExport {
        config_json: serde_json::to_vec_pretty(&peft_config(config, rank))
            .map_err(|fault| failed(&fault))?,
        safetensors: safetensors::serialize(views, Some(metadata))
            .map_err(|fault| failed(&fault))?,
        rank,
    })
}

/// lora_alpha / r = alpha / R2.
fn peft_config(config: &Config, rank: usize) -> Value {
    let alpha = config.alpha * rank as f64 / config.r2 as f64;
    // PEFT's schema has an integer; a fraction is written only where it is one.
    let alpha = if alpha.fract() == 0.0 && alpha < 1e15 {
        json!(alpha as u64)
    } else {
        json!(alpha)
    };
    let modules: Vec<_> = config.modules.iter().map(|module| module.name()).collect();
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": modules,
        "layers_to_transform": config.layers,
        "layers_pattern": null,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "modules_to_save": null,
        "use_rslora": false,
        "use_dora": false,
    })
}

/// Values of a tensor, f32, little-endian, row-major.
fn bytes(t: &Tensor) -> Result<Vec<u8>, Error> {
    let values = t.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.into_iter().flat_map(f32::to_le_bytes).collect())
}

#[cfg(test)]
mod tests;
