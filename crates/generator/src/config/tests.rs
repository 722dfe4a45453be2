//! Keys that are honoured, keys that pass, values that are refused by name.

use serde_json::json;

use super::*;

fn published() -> Value {
    json!({
        "peft_type": "FASTLORA", "base_model_name_or_path": "base", "task_type": "CAUSAL_LM", "fastlora_r": 32,
        "fastlora_inter_size": null, "fastlora_window": 16, "fastlora_max_rank": 8, "fastlora_attn_len": 8192,
        "fastlora_gist_len": 0, "fastlora_alpha": 16, "fastlora_arch": "aassbb", "fastlora_norm": "svd",
        "fastlora_merge": "pre-norm-sum", "fastlora_param": ["down_proj", "o_proj"], "target_modules": ["o_proj"],
        "lora_r": 0, "bias": "none", "some_key_of_another_tool": {"a": 1},
    })
}

fn with(key: &str, value: Value) -> Result<Config, Error> {
    let mut config = published();
    config[key] = value;
    Config::parse(config.to_string().as_bytes())
}

#[test]
fn a_missing_key_means_the_published_behaviour() {
    let config = Config::parse(published().to_string().as_bytes()).unwrap();
    assert_eq!(
        (config.write, config.read_out, config.strategy),
        (Write::Published, ReadOut::Svd, Strategy::Sequential)
    );
    assert_eq!(
        (config.r1, config.r2, config.max_rank, config.window),
        (32, 32, 8, 16)
    );
    assert_eq!(config.modules, [Module::OProj, Module::DownProj]);
    assert_eq!(
        (
            config.layers,
            config.skip_first,
            config.skip_last,
            config.bos
        ),
        (None, false, false, None)
    );
    assert!(
        config.base_digest.is_empty()
            && config.prompt_format.is_none()
            && config.document_suffix.is_empty()
    );
}

#[test]
fn the_shipped_config_is_understood() {
    let path = testkit::repository_root().join("models/smollm2-135m-instruct/adapter_config.json");
    let config = Config::parse(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(
        (config.write, config.read_out, config.strategy),
        (Write::Associative, ReadOut::Ridge, Strategy::Parallel)
    );
    assert_eq!(
        (
            config.r1,
            config.r2,
            config.window,
            config.modules.as_slice()
        ),
        (256, 256, 256, [Module::DownProj].as_slice())
    );
    assert_eq!(
        config.layers.as_deref(),
        Some([9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29].as_slice())
    );
    assert_eq!(
        (
            config.skip_first,
            config.skip_last,
            config.bos,
            config.document_suffix.as_str()
        ),
        (true, true, Some(false), "\n\n")
    );
    assert_eq!(
        config.prompt_format.as_deref(),
        Some("Question: {question}\nAnswer:")
    );
    assert_eq!(config.base_digest.len(), 1);
}

#[test]
fn an_associative_config_without_a_strategy_is_parallel() {
    let mut config = published();
    config["fastlora_norm"] = json!("ridge");
    assert_eq!(
        Config::parse(config.to_string().as_bytes())
            .unwrap()
            .strategy,
        Strategy::Parallel
    );
}

#[test]
fn a_base_may_have_one_digest_or_several_and_none_fits_all() {
    assert!(
        with("base_digest", json!("aB01"))
            .unwrap()
            .names_base("ab01")
    );
    let several = with("base_digest", json!(["aa", "bb"])).unwrap();
    assert!(several.names_base("aa") && several.names_base("BB") && !several.names_base("cc"));
    assert!(
        with("base_digest", Value::Null)
            .unwrap()
            .names_base("anything")
    );
}

#[test]
fn layers_come_as_a_list_or_as_one_index_under_either_key() {
    assert_eq!(
        with("fastlora_layers", json!([3, 1, 3])).unwrap().layers,
        Some(vec![1, 3])
    );
    assert_eq!(
        with("layers_to_transform", json!(2)).unwrap().layers,
        Some(vec![2])
    );
}

#[test]
fn a_rank_beyond_the_sizes_is_the_smaller_size() {
    assert_eq!(with("fastlora_max_rank", json!(512)).unwrap().max_rank, 32);
}

#[test]
fn an_unsupported_value_is_named_with_its_key() {
    let cases = [
        ("peft_type", json!("LORA")),
        ("fastlora_arch", json!("aabb")),
        ("fastlora_merge", json!("post-norm-mean")),
        ("fastlora_norm", json!("layernorm")),
        ("fastlora_strategy", json!("tree")),
        ("fastlora_r", json!(0)),
        ("fastlora_r", json!(-4)),
        ("fastlora_r", json!(1_u64 << 40)),
        ("fastlora_inter_size", json!("big")),
        ("fastlora_max_rank", json!(0)),
        ("fastlora_alpha", json!(-1)),
        ("fastlora_alpha", json!("16")),
        ("fastlora_window", json!(0)),
        ("fastlora_gist_len", json!(4)),
        ("fastlora_param", json!(["lm_head"])),
        ("fastlora_param", json!([])),
        ("fastlora_layers", json!([])),
        ("fastlora_layers", json!([-1])),
        ("fastlora_key", json!("other")),
        ("fastlora_skip_first", json!(2)),
        ("fastlora_skip_last", json!(1)),
        ("lora_r", json!(8)),
        ("bias", json!("all")),
        ("bos", json!("no")),
        ("document_suffix", json!(3)),
        ("prompt_format", json!("Q: {}")),
        ("base_digest", json!([1])),
    ];
    for (key, value) in cases {
        let message = with(key, value.clone()).unwrap_err().to_string();
        assert!(
            message.contains(key) && message.contains(&value.to_string()),
            "{key} = {value}: {message}"
        );
    }
}

#[test]
fn a_last_token_cannot_write_without_a_successor() {
    let mut config = published();
    config["fastlora_key"] = json!("site_input_tied_A1");
    config["fastlora_value"] = json!("next_token_embedding+A3n_hidden");
    assert!(
        Config::parse(config.to_string().as_bytes())
            .unwrap()
            .skip_last
    );
    config["fastlora_skip_last"] = json!(0);
    let fault = Config::parse(config.to_string().as_bytes()).unwrap_err();
    assert!(
        matches!(
            fault,
            Error::UnsupportedValue {
                key: "fastlora_skip_last",
                ..
            }
        ),
        "{fault}"
    );
}

#[test]
fn half_an_associative_form_is_missing_the_other_half() {
    let fault = with("fastlora_key", json!("site_input_tied_A1")).unwrap_err();
    assert!(
        matches!(
            fault,
            Error::MissingKey {
                key: "fastlora_value"
            }
        ),
        "{fault}"
    );
}

#[test]
fn a_required_key_that_is_missing_is_named() {
    for key in [
        "peft_type",
        "fastlora_r",
        "fastlora_max_rank",
        "fastlora_alpha",
        "fastlora_window",
    ] {
        let fault = with(key, Value::Null).unwrap_err();
        assert!(
            matches!(fault, Error::MissingKey { key: found } if found == key),
            "{fault}"
        );
    }
}

#[test]
fn text_that_is_no_object_is_refused() {
    for text in ["", "[]", "{", "\u{0}", "3"] {
        assert!(
            matches!(
                Config::parse(text.as_bytes()),
                Err(Error::UnsupportedValue { .. })
            ),
            "{text:?}"
        );
    }
}
