//! An exported adapter does what its core does, in the layout that PEFT reads.

use candle_core::safetensors::load_buffer;
use serde_json::Value;
use testkit::{Form, GeneratorSpec, relative_error};

use super::*;
use crate::{
    Generator, Module,
    testing::{all, associative, published, state, tiny},
};

/// (lora_alpha / r) B A of every site, as PEFT would add it.
fn added(generator: &Generator, export: &PeftExport) -> Vec<Tensor> {
    let config: Value = serde_json::from_slice(&export.config_json).unwrap();
    let tensors = load_buffer(&export.safetensors, &Device::Cpu).unwrap();
    assert_eq!(tensors.len(), 2 * generator.sites().len());
    let scale = config["lora_alpha"].as_f64().unwrap() / config["r"].as_f64().unwrap();
    let site = |site: &Site| {
        let (layer, module) = (site.id().layer, site.id().module);
        let part = |part: &str| {
            &tensors[&format!(
                "base_model.model.model.layers.{layer}.{}.{}.{part}.weight",
                module.block(),
                module.name()
            )]
        };
        (part("lora_B").matmul(part("lora_A")).unwrap() * scale).unwrap()
    };
    generator.sites().iter().map(site).collect()
}

fn assert_same(generator: &Generator, core: &Core, export: &PeftExport) {
    for (index, lora) in added(generator, export).iter().enumerate() {
        let delta = generator.delta_weight(index, core).unwrap();
        let error = relative_error(lora, &delta);
        assert!(
            error < 1e-5,
            "{:?}, site {index}: {error}",
            generator.config().read_out
        );
    }
}

#[test]
fn an_export_adds_what_the_core_adds() {
    for generator in all() {
        for tokens in [4, 40] {
            let core = generator
                .read_out(&state(&generator, &[(1, tokens)]))
                .unwrap();
            assert_same(&generator, &core, &generator.export_peft(&core).unwrap());
        }
    }
}

#[test]
fn an_svd_core_exports_with_its_rank_whether_it_lies_dense_or_in_factors() {
    for rank in [2, 6] {
        let generator = tiny(&GeneratorSpec {
            form: Form::Published,
            rank,
            ..GeneratorSpec::default()
        });
        let core = generator.read_out(&state(&generator, &[(1, 40)])).unwrap();
        let export = generator.export_peft(&core).unwrap();
        assert_eq!(export.rank, rank);
        let config: Value = serde_json::from_slice(&export.config_json).unwrap();
        // alpha = R2 = 10 here: lora_alpha = alpha q / R2 = q.
        assert_eq!(
            (config["r"].as_u64(), config["lora_alpha"].as_u64()),
            (Some(rank as u64), Some(rank as u64))
        );
    }
}

#[test]
fn an_associative_core_exports_with_rank_r2_and_factor_one() {
    let generator = associative();
    let core = generator.read_out(&state(&generator, &[(1, 40)])).unwrap();
    let export = generator.export_peft(&core).unwrap();
    let config: Value = serde_json::from_slice(&export.config_json).unwrap();
    assert_eq!(
        (
            export.rank,
            config["r"].as_u64(),
            config["lora_alpha"].as_u64()
        ),
        (10, Some(10), Some(10))
    );
}

#[test]
fn sites_of_different_ranks_share_one_r() {
    let generator = published("svd");
    let mut core = generator.read_out(&state(&generator, &[(1, 40)])).unwrap();
    let short = generator.read_out(&state(&generator, &[(2, 3)])).unwrap();
    let sites = [&core, &short].map(|core| core.matrix(1).unwrap().unwrap());
    core = Core::of(sites.clone().map(SiteCore::Dense));
    let export = generator.export_peft(&core).unwrap();
    assert_eq!(export.rank, 6);
    assert_same(&generator, &core, &export);
    core = Core::of([SiteCore::Zero, SiteCore::Dense(sites[1].clone())]);
    let export = generator.export_peft(&core).unwrap();
    assert_eq!(export.rank, 3);
    let lora = added(&generator, &export);
    assert_eq!(
        lora[0]
            .abs()
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap(),
        0.0
    );
    assert!(relative_error(&lora[1], &generator.delta_weight(1, &core).unwrap()) < 1e-5);
}

#[test]
fn the_bare_model_exports_as_zeros() {
    let generator = associative();
    let core = generator.read_out(&generator.new_state().unwrap()).unwrap();
    let export = generator.export_peft(&core).unwrap();
    assert_eq!(export.rank, 1);
    for lora in added(&generator, &export) {
        assert_eq!(
            lora.abs()
                .unwrap()
                .sum_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap(),
            0.0
        );
    }
}

#[test]
fn the_config_names_modules_and_layers() {
    let spec = GeneratorSpec {
        modules: vec!["down_proj", "o_proj"],
        layers: Some(vec![1]),
        ..GeneratorSpec::default()
    };
    let generator = tiny(&spec);
    assert_eq!(
        generator.config().modules,
        [Module::OProj, Module::DownProj]
    );
    let core = generator.read_out(&state(&generator, &[(1, 40)])).unwrap();
    let export = generator.export_peft(&core).unwrap();
    let config: Value = serde_json::from_slice(&export.config_json).unwrap();
    assert_eq!(config["peft_type"], "LORA");
    assert_eq!(config["target_modules"], json!(["o_proj", "down_proj"]));
    assert_eq!(config["layers_to_transform"], json!([1]));
    assert_eq!(config["base_model_name_or_path"], "tiny");
    assert_same(&generator, &core, &export);
}

#[test]
fn a_core_of_another_generator_is_refused() {
    let one = tiny(&GeneratorSpec {
        layers: Some(vec![0]),
        ..GeneratorSpec::default()
    });
    let core = one.read_out(&state(&one, &[(1, 20)])).unwrap();
    assert!(matches!(
        associative().export_peft(&core),
        Err(Error::Foreign { .. })
    ));
}
