//! What a configuration accepts, which source wins, and what each refusal says.

use std::path::PathBuf;

use super::{Config, Engine, Flags};

fn read(file: &str, environment: &[(&str, &str)], flags: Flags) -> Result<Config, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("imprint.toml");
    std::fs::write(&path, file).unwrap();
    let flags = Flags {
        config: Some(path),
        ..flags
    };
    let environment = environment
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Config::read(&flags, environment).map_err(|error| error.to_string())
}

#[test]
fn flags_win_over_the_environment_and_the_environment_over_the_file() {
    let file = "model = 'file'\ngenerator = 'file'\nlisten = '127.0.0.1:1'\n[limits]\nchunk_bytes = 100\nrequests = 7";
    let environment = [
        ("IMPRINT_MODEL", "environment"),
        ("IMPRINT_GENERATOR", "environment"),
        ("IMPRINT_LIMITS_CHUNK_BYTES", "200"),
        ("IMPRINT_ENGINE_DEQUANTIZE", "true"),
        ("IMPRINT_HOME", "/somewhere"),
        ("IMPRINT_ENDPOINT", "http://not.ours"),
    ];
    let config = read(
        file,
        &environment,
        Flags {
            model: Some("flag".into()),
            ..Flags::default()
        },
    )
    .unwrap();
    assert_eq!(
        (config.model.as_str(), config.generator.as_str()),
        ("flag", "environment")
    );
    assert_eq!(
        (
            config.limits.chunk_bytes,
            config.limits.requests,
            config.listen.port()
        ),
        (200, 7, 1)
    );
    assert_eq!(
        (config.engine.dequantize, config.home),
        (Some(true), PathBuf::from("/somewhere"))
    );
}

#[test]
fn the_cache_lies_in_the_home_folder_by_default() {
    let config = read("", &[("HOME", "/home/x")], Flags::default()).unwrap();
    assert_eq!(config.home, PathBuf::from("/home/x/.cache/imprint"));
}

#[test]
fn an_unknown_key_is_refused_with_the_nearest_known_one() {
    let say = |file| read(file, &[], Flags::default()).unwrap_err();
    assert_eq!(
        say("modle = 'x'"),
        "unknown key `modle`; did you mean `model`?"
    );
    assert_eq!(
        say("[limits]\nchunk_byte = 1"),
        "unknown key `limits.chunk_byte`; did you mean `limits.chunk_bytes`?"
    );
    assert_eq!(
        say("chunk_bytes = 1"),
        "unknown key `chunk_bytes`; did you mean `limits.chunk_bytes`?"
    );
    assert_eq!(say("zzz = 1"), "unknown key `zzz`");
    let error = read("", &[("IMPRINT_LIMITS_CHUNK_BYTE", "1")], Flags::default()).unwrap_err();
    assert_eq!(
        error,
        "unknown key `limits.chunk_byte`; did you mean `limits.chunk_bytes`?"
    );
}

#[test]
fn an_unknown_variable_is_refused_with_the_nearest_known_one_and_those_of_others_pass() {
    let say = |name| read("", &[(name, "x")], Flags::default()).unwrap_err();
    for (wrong, right) in [
        ("IMPRINT_MODLE", "IMPRINT_MODEL"),
        ("IMPRINT_KEYES", "IMPRINT_KEYS"),
        ("IMPRINT_LIMIT_CHUNK_BYTES", "IMPRINT_LIMITS_CHUNK_BYTES"),
        ("IMPRINT_ENDPONT", "IMPRINT_ENDPOINT"),
    ] {
        let want = format!("unknown variable `{wrong}`; did you mean `{right}`?");
        assert_eq!(say(wrong), want);
    }
    assert_eq!(say("IMPRINT_ZZZ"), "unknown variable `IMPRINT_ZZZ`");
    assert!(say("IMPRINT_LIMITS").contains("IMPRINT_LIMITS"));
    for other in [
        "IMPRINT_ENDPOINT",
        "IMPRINT_KEY",
        "IMPRINT_BIN",
        "IMPRINT_TEST_MODEL",
        "IMPRINT_GOLDEN_DIR",
        "IMPRINT_PORT_7461_TCP",
        "IMPRINT_SERVICE_HOST",
    ] {
        read("", &[(other, "x")], Flags::default()).unwrap();
    }
}

#[test]
fn a_tenant_has_half_of_the_places_where_there_are_others() {
    let keys = "[keys]\n'0123456789abcdef' = 'acme'\n'fedcba9876543210' = ";
    let one = read(&format!("{keys}'acme'"), &[], Flags::default()).unwrap();
    let two = read(&format!("{keys}'other'"), &[], Flags::default()).unwrap();
    assert_eq!((one.of_tenant(9, 0), one.of_tenant(9, 2)), (9, 2));
    assert_eq!((two.of_tenant(9, 0), two.of_tenant(9, 2)), (5, 2));
}

#[test]
fn values_of_a_wrong_type_or_range_are_refused_by_name() {
    let say = |file| read(file, &[], Flags::default()).unwrap_err();
    assert!(say("[limits]\nchunk_bytes = 'many'").contains("chunk_bytes"));
    assert!(say("limits = 3").contains("limits"));
    assert!(say("listen = 'nowhere'").contains("listen"));
    assert!(say("[limits]\nchunk_bytes = -1").contains("chunk_bytes"));
    assert!(say("[limits]\nrequests = 0").contains("limits.requests"));
    assert!(say("[engine]\nthreads = 0").contains("engine.threads"));
    assert!(say("[ingest]\nwaiting_tokens = 0").contains("ingest.waiting_tokens"));
    assert!(say("model = ").contains("imprint.toml"));
    let missing = Flags {
        config: Some("/no/such/file".into()),
        ..Flags::default()
    };
    assert!(
        Config::read(&missing, [])
            .unwrap_err()
            .to_string()
            .contains("/no/such/file")
    );
}

#[test]
fn without_keys_only_a_loopback_address_may_be_bound() {
    let error = read("listen = '0.0.0.0:7461'", &[], Flags::default()).unwrap_err();
    assert!(
        error.contains("0.0.0.0:7461") && error.contains("keys"),
        "{error}"
    );
    read("listen = '[::1]:0'", &[], Flags::default()).unwrap();
    let config = read(
        "listen = '0.0.0.0:1'\n[keys]\n'0123456789abcdef' = 'acme'",
        &[],
        Flags::default(),
    )
    .unwrap();
    assert_eq!(config.keys.len(), 1);
    let keys = [("IMPRINT_KEYS", "{ '0123456789abcdef' = 'acme' }")];
    read("listen = '0.0.0.0:1'", &keys, Flags::default()).unwrap();
}

#[test]
fn a_key_that_can_be_guessed_is_refused() {
    assert!(
        read("[keys]\n'short' = 'acme'", &[], Flags::default())
            .unwrap_err()
            .contains("16")
    );
    assert!(
        read("[keys]\n'0123456789abcdef' = ''", &[], Flags::default())
            .unwrap_err()
            .contains("tenant")
    );
}

#[test]
fn the_documented_file_holds_every_default() {
    let documented = read(
        include_str!("../../../docs/imprint.toml"),
        &[],
        Flags::default(),
    )
    .unwrap();
    let default = read("", &[], Flags::default()).unwrap();
    assert_eq!(
        format!("{:?}", documented.limits),
        format!("{:?}", default.limits)
    );
    assert_eq!(
        format!("{:?}", documented.ingest),
        format!("{:?}", default.ingest)
    );
    assert_eq!(
        format!("{:?}", documented.shutdown),
        format!("{:?}", default.shutdown)
    );
    assert_eq!(
        (
            documented.listen,
            documented.model,
            documented.generator,
            documented.home,
            documented.data
        ),
        (
            default.listen,
            default.model,
            default.generator,
            default.home,
            default.data
        )
    );
    assert_eq!(documented.device, default.device);
    let facts = |cuda: &super::Cuda| {
        let paths = (cuda.driver.clone(), cuda.cublas.clone());
        (cuda.ordinal, paths, cuda.slots, cuda.pinned, cuda.windows)
    };
    assert_eq!(facts(&documented.cuda), facts(&default.cuda));
    let engine = documented.engine;
    let budgets = Engine::default().settings();
    assert_eq!(
        (
            engine.threads,
            engine.step_tokens,
            engine.max_bulk_beside_decode,
            engine.kv_blocks,
            engine.block_size,
            engine.prefix_cache,
            engine.dequantize,
            engine.activations
        ),
        (
            None,
            Some(budgets.step_tokens),
            Some(budgets.max_bulk_beside_decode),
            Some(budgets.kv_blocks),
            Some(budgets.block_size),
            Some(budgets.prefix_cache),
            Some(budgets.dequantize),
            Some(budgets.activations)
        )
    );
    assert_eq!(
        (
            engine.max_running,
            engine.max_queued,
            engine.max_sessions,
            engine.max_documents
        ),
        (
            Some(budgets.max_running),
            Some(budgets.max_queued),
            Some(budgets.max_sessions),
            Some(budgets.max_documents)
        )
    );
    assert_eq!(
        (
            engine.max_session_tokens,
            engine.max_queued_tokens,
            engine.state_budget_bytes,
            engine.trace_budget_bytes,
            engine.core_budget_bytes,
            engine.snapshot_bytes_per_token,
            engine.snapshot_budget_bytes
        ),
        (
            Some(budgets.max_session_tokens),
            Some(budgets.max_queued_tokens),
            Some(budgets.state_budget_bytes),
            Some(budgets.trace_budget_bytes),
            Some(budgets.core_budget_bytes),
            Some(budgets.snapshot_bytes_per_token),
            Config::default()
                .snapshots()
                .map(|place| place.budget_bytes)
        )
    );
}

#[test]
fn no_bearer_key_is_printed() {
    let mut config = Config::default();
    let key = "a-key-that-nobody-may-read-in-a-log";
    config.keys.insert(key.to_owned(), "acme".to_owned());
    let printed = format!("{config:?}");
    assert!(
        !printed.contains(key) && printed.contains("keys: 1"),
        "{printed}"
    );
}

#[test]
fn low_memory_sets_budgets_where_none_are_given() {
    let flags = || Flags {
        low_memory: true,
        ..Flags::default()
    };
    let plain = read("", &[], flags()).unwrap().engine;
    assert_eq!((plain.kv_blocks, plain.max_running), (Some(32), Some(4)));
    assert!(plain.settings().check().is_ok());
    let variables = [("IMPRINT_LOW_MEMORY", "true")];
    let file = "[engine]\nkv_blocks = 64";
    let given = read(file, &variables, Flags::default()).unwrap().engine;
    assert_eq!((given.kv_blocks, given.max_running), (Some(64), Some(4)));
    assert_eq!(
        read("low_memory = false", &[], Flags::default())
            .unwrap()
            .engine
            .kv_blocks,
        None
    );
    assert!(read("low_memory = 'yes'", &[], Flags::default()).is_err());
}
