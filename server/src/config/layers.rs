//! The layers of a configuration: a file, the environment over it, flags over both, and what a profile sets below all of them.
//!
//! Keys and tables, no types: an unknown name is refused with the nearest known one. Start at [`laid`].

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use toml::{Table, Value};

use super::{Config, Cuda, Engine, Error, Flags, Ingest, Limits, Metrics, Shutdown, names};

/// What a variable of ours begins with.
const PREFIX: &str = "IMPRINT_";
/// Top-level keys whose values are text, whatever they look like.
const TEXTS: [&str; 6] = ["listen", "model", "generator", "home", "data", "device"];
/// Variables of clients, tests and the program that are no keys.
const OTHERS: [&str; 7] = [
    "IMPRINT_CONFIG",
    "IMPRINT_ENDPOINT",
    "IMPRINT_KEY",
    "IMPRINT_BIN",
    "IMPRINT_TEST_MODEL",
    "IMPRINT_TEST_CUBLAS",
    "IMPRINT_GOLDEN_DIR",
];
/// Top-level keys that are tables of their own.
const SECTIONS: [&str; 6] = ["limits", "ingest", "engine", "cuda", "metrics", "shutdown"];

/// File (the flag's, else `IMPRINT_CONFIG`'s, else none), environment and flags as one table.
pub(super) fn laid(flags: &Flags, environment: &BTreeMap<String, String>) -> Result<Table, Error> {
    let path = flags
        .config
        .clone()
        .or_else(|| environment.get("IMPRINT_CONFIG").map(PathBuf::from));
    let mut table = match path {
        Some(path) => read_file(&path)?,
        None => Table::new(),
    };
    check_names(&table)?;
    overlay_environment(&mut table, environment)?;
    overlay_flags(&mut table, flags);
    if table.get("low_memory") == Some(&Value::Boolean(true)) {
        underlay_low_memory(&mut table);
    }
    if !table.contains_key("home") {
        let base = environment
            .get("HOME")
            .map_or_else(|| PathBuf::from("."), PathBuf::from);
        let home = base.join(".cache").join("imprint");
        table.insert(
            "home".to_owned(),
            Value::String(home.to_string_lossy().into_owned()),
        );
    }
    Ok(table)
}

fn read_file(path: &Path) -> Result<Table, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Io {
        path: path.to_owned(),
        source,
    })?;
    toml::from_str(&text).map_err(|source| Error::Syntax {
        path: path.to_owned(),
        source: Box::new(source),
    })
}

/// Keys that a table may hold: the top level's with an empty `section`. Keys of `keys` are free.
fn known(section: &str) -> &'static [&'static str] {
    match section {
        "limits" => names::of::<Limits>(),
        "ingest" => names::of::<Ingest>(),
        "engine" => names::of::<Engine>(),
        "cuda" => names::of::<Cuda>(),
        "metrics" => names::of::<Metrics>(),
        "shutdown" => names::of::<Shutdown>(),
        _ => names::of::<Config>(),
    }
}

fn check_names(table: &Table) -> Result<(), Error> {
    for (key, value) in table {
        if !known("").contains(&key.as_str()) {
            return Err(unknown("", key));
        }
        let Some(section) = value
            .as_table()
            .filter(|_| SECTIONS.contains(&key.as_str()))
        else {
            continue;
        };
        if let Some(inner) = section
            .keys()
            .find(|inner| !known(key).contains(&inner.as_str()))
        {
            return Err(unknown(key, inner));
        }
    }
    Ok(())
}

/// The error about an unknown key. The nearest known one is sought in all tables, for a key that was put into a wrong one.
fn unknown(section: &str, key: &str) -> Error {
    let path = |section: &str, key: &str| {
        if section.is_empty() {
            key.to_owned()
        } else {
            format!("{section}.{key}")
        }
    };
    let all = std::iter::once("")
        .chain(SECTIONS)
        .flat_map(|table| known(table).iter().map(move |name| (table, *name)));
    let nearest = all
        .map(|(table, name)| {
            let elsewhere = if table == section { 0.0 } else { 0.05 };
            (
                strsim::jaro_winkler(key, name) - elsewhere,
                path(table, name),
            )
        })
        .filter(|(likeness, _)| *likeness > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name);
    Error::UnknownKey {
        key: path(section, key),
        nearest,
    }
}

/// The error about an unknown variable.
fn unknown_variable(variable: &str) -> Error {
    let keys = std::iter::once("")
        .chain(SECTIONS)
        .flat_map(|section| known(section).iter().map(move |key| (section, *key)))
        .filter(|(section, key)| !section.is_empty() || !SECTIONS.contains(key))
        .map(|(section, key)| match section {
            "" => format!("{PREFIX}{key}").to_uppercase(),
            section => format!("{PREFIX}{section}_{key}").to_uppercase(),
        });
    // All share the prefix: what comes behind it decides.
    let likeness = |known: &str| {
        strsim::jaro_winkler(
            variable.strip_prefix(PREFIX).unwrap_or(variable),
            known.strip_prefix(PREFIX).unwrap_or(known),
        )
    };
    let nearest = keys
        .chain(OTHERS.map(str::to_owned))
        .map(|known| (likeness(&known), known))
        .filter(|(likeness, _)| *likeness > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known);
    Error::UnknownVariable {
        name: variable.to_owned(),
        nearest,
    }
}

/// Puts the variables that name a key over the file.
fn overlay_environment(
    table: &mut Table,
    environment: &BTreeMap<String, String>,
) -> Result<(), Error> {
    for (variable, raw) in environment {
        let Some(name) = variable.strip_prefix(PREFIX).map(str::to_lowercase) else {
            continue;
        };
        if OTHERS.contains(&variable.as_str()) || is_of_a_service(&name) {
            continue;
        }
        if TEXTS.contains(&name.as_str()) {
            table.insert(name, Value::String(raw.clone()));
        } else if name == "keys" || name == "low_memory" {
            table.insert(name, parsed(raw));
        } else if let Some((section, key)) = SECTIONS
            .into_iter()
            .find_map(|section| Some((section, name.strip_prefix(section)?.strip_prefix('_')?)))
        {
            if !known(section).contains(&key) {
                return Err(unknown(section, key));
            }
            let inner = table
                .entry(section)
                .or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(inner) = inner {
                inner.insert(key.to_owned(), parsed(raw));
            }
        } else {
            return Err(unknown_variable(variable));
        }
    }
    Ok(())
}

/// The engine's budgets of `low_memory`, under those that are given. With the default model: 24 MB of keys and values (512 tokens),
/// two sessions' states and three cores.
const LOW_MEMORY: [(&str, i64); 7] = [
    ("step_tokens", 128),
    ("kv_blocks", 32),
    ("max_running", 4),
    ("max_sessions", 16),
    ("state_budget_bytes", 32 << 20),
    ("trace_budget_bytes", 6 << 20),
    ("core_budget_bytes", 9 << 20),
];

fn underlay_low_memory(table: &mut Table) {
    let engine = table
        .entry("engine")
        .or_insert_with(|| Value::Table(Table::new()));
    // What is no table is refused when the types are checked.
    if let Value::Table(engine) = engine {
        for (key, value) in LOW_MEMORY {
            engine.entry(key).or_insert(Value::Integer(value));
        }
    }
}

/// Whether Kubernetes made the variable: it names the address of every service, and one may be called `imprint`.
fn is_of_a_service(name: &str) -> bool {
    name == "port" || name.starts_with("port_") || name.starts_with("service_")
}

/// A variable's value as TOML has it; what is no TOML is text.
fn parsed(raw: &str) -> Value {
    let table: Option<Table> = toml::from_str(&format!("value = {raw}")).ok();
    table
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| Value::String(raw.to_owned()))
}

fn overlay_flags(table: &mut Table, flags: &Flags) {
    let Flags {
        listen,
        model,
        generator,
        config: _,
        data,
        device,
        low_memory,
    } = flags;
    if *low_memory {
        table.insert("low_memory".to_owned(), Value::Boolean(true));
    }
    let texts = [
        ("listen", listen.map(|address| address.to_string())),
        ("model", model.clone()),
        ("generator", generator.clone()),
        ("device", device.clone()),
        (
            "data",
            data.as_ref()
                .map(|path| path.to_string_lossy().into_owned()),
        ),
    ];
    for (key, value) in texts {
        if let Some(value) = value {
            table.insert(key.to_owned(), Value::String(value));
        }
    }
}
