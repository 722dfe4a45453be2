//! Tables of figures in markdown, each with the command that measured them.
//!
//! A kind of measurement is known by its fields. Start at [`tables`].

use std::fmt::Write as _;

use serde_json::Value;

/// Ratios of `bench offline` in words, in the order of their rows.
const RATIOS: [(&str, &str); 18] = [
    ("prefill_vs_llama_cpp", "prefill, over llama.cpp"),
    (
        "prefill8_vs_llama_cpp",
        "prefill of 8 prompts, over llama.cpp",
    ),
    ("prefill_vs_torch_bf16", "prefill, over torch in bf16"),
    ("prefill_vs_torch_f32", "prefill, over torch in f32"),
    ("decode_vs_llama_cpp", "decode, over llama.cpp"),
    (
        "decode8_vs_llama_cpp",
        "decode of 8 at once, over llama.cpp",
    ),
    (
        "decode8_adapters_vs_llama_cpp_bare",
        "decode of 8 with adapters of their own, over llama.cpp without any",
    ),
    (
        "prefill8_adapters_vs_llama_cpp_bare",
        "prefill of 8 with adapters of their own, over llama.cpp without any",
    ),
    (
        "prefill_adapter_vs_bare",
        "prefill with an adapter, over without",
    ),
    ("prefill8_adapters_vs_bare", "the same of 8, each its own"),
    (
        "decode_adapter_vs_bare",
        "decode with an adapter, over without",
    ),
    (
        "decode8_shared_adapter_vs_bare",
        "the same of 8 that share one",
    ),
    ("decode8_adapters_vs_bare", "the same of 8, each its own"),
    ("decode16_adapters_vs_bare", "the same of 16, each its own"),
    (
        "ingest_vs_prefill",
        "time to tell a document, over that of reading it as a prompt",
    ),
    (
        "ingest_vs_windows",
        "time to tell a document, over that of its windows as prompts",
    ),
    ("ingest8_vs_windows", "the same of 8 at once"),
    (
        "read_outs_vs_windows",
        "time of the read-outs, over that of reading the windows",
    ),
];

pub(super) fn number(value: &Value, name: &str) -> f64 {
    value[name].as_f64().unwrap_or(f64::NAN)
}

/// A load of ours or of a peer.
pub(super) fn is_load(value: &Value) -> bool {
    value["output_throughput"].is_number()
}

/// All files' tables, one kind after the other.
pub(super) fn tables(all: &[Value]) -> String {
    let is = |name: &'static str| all.iter().filter(move |value| !value[name].is_null());
    let mut tables: Vec<String> = is("ratios").map(offline).collect();
    let loads: Vec<_> = all.iter().filter(|value| is_load(value)).collect();
    if !loads.is_empty() {
        tables.push(self::loads(&loads));
    }
    tables.extend(is("p99_beside_over_quiet").map(beside));
    tables.extend(is("tail").map(append));
    tables.extend(is("runs").map(sessions));
    let starts = is("figures").filter(|value| value["figures"]["listening_ms"].is_array());
    tables.extend(starts.map(start));
    tables.join("\n")
}

/// The command that measured, when and where; a line of its own, or nothing where the file does not say.
fn origin(value: &Value) -> String {
    let machine = &value["machine"];
    let Some(command) = machine["command"].as_str() else {
        return String::new();
    };
    let mut text = format!("\n`{command}`");
    for part in [&machine["date"], &machine["cpu"]] {
        if let Some(part) = part.as_str().filter(|part| !part.is_empty()) {
            text += &format!(", {part}");
        }
    }
    if let Some(threads) = machine["threads"].as_u64() {
        text += &format!(", {threads} threads");
    }
    if let Some(commit) = value["commit"].as_str().filter(|commit| !commit.is_empty()) {
        text += &format!(", commit {commit}");
    }
    if let Some(load) = machine["load_before"].as_f64() {
        text += &format!(", load average before {load:.1}");
    }
    text + "\n"
}

fn offline(value: &Value) -> String {
    let mut text = String::from("| ratio | median | range |\n|---|---|---|\n");
    let mut row = |name: &str, words: &str| {
        let ratio = &value["ratios"][name];
        let Some(median) = ratio["median"].as_f64().or_else(|| ratio.as_f64()) else {
            return;
        };
        let values = value["ranges"][name]["values"].as_array();
        let values = values.into_iter().flatten().filter_map(Value::as_f64);
        let (least, most) = values.fold((median, median), |(least, most), value| {
            (least.min(value), most.max(value))
        });
        // Writing to a String cannot fail.
        let _ = writeln!(text, "| {words} | {median:.2} | {least:.2} ... {most:.2} |");
    };
    for (name, words) in RATIOS {
        row(name, words);
    }
    let known = |name: &String| RATIOS.iter().any(|(known, _)| known == name);
    let names = value["ratios"].as_object().into_iter().flatten();
    for (name, _) in names.filter(|(name, _)| !known(name)) {
        row(name, &name.replace('_', " "));
    }
    if let Some(peers) = value["peers"].as_array().filter(|peers| !peers.is_empty()) {
        let peers: Vec<_> = peers.iter().filter_map(Value::as_str).collect();
        let _ = writeln!(text, "\nBeside {}.", peers.join("; "));
    }
    text + &origin(value)
}

fn loads(loads: &[&Value]) -> String {
    let mut text = String::from(
        "| load | answered tok/s | answers/s | TTFT p50, p99 ms | ITL p50, p99 ms | TPOT p50 ms | right | failed |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    for load in loads {
        let n = |name: &str| number(load, name);
        let _ = writeln!(
            text,
            "| {} | {:.1} | {:.2} | {:.0}, {:.0} | {:.0}, {:.0} | {:.0} | {}/{} | {} |",
            label(load),
            n("output_throughput"),
            n("request_throughput"),
            n("p50_ttft_ms"),
            n("p99_ttft_ms"),
            n("p50_itl_ms"),
            n("p99_itl_ms"),
            n("p50_tpot_ms"),
            load["answers_right"],
            load["completed"],
            load["failed"],
        );
    }
    for load in loads {
        text += &origin(load);
    }
    text
}

/// What a load was.
fn label(load: &Value) -> String {
    let mut label = load["backend"].as_str().unwrap_or("?").to_owned();
    if let Some(sessions) = load["num_sessions"].as_u64() {
        label += &format!(", {sessions} sessions");
    }
    if let Some(slots) = load["slots"].as_u64() {
        label += &format!(", {slots} slots");
    }
    if load["in_context"] == true {
        label += ", in prompts";
    }
    match load["request_rate"].as_f64() {
        Some(rate) => label += &format!(", {rate}/s"),
        None => {
            if let Some(concurrency) = load["max_concurrency"].as_u64() {
                label += &format!(", {concurrency} at once");
            }
        }
    }
    if let Some(share) = load["ingest_share"].as_f64().filter(|share| *share > 0.0) {
        label += &format!(", {:.0} % telling", share * 100.0);
    }
    label
}

fn beside(value: &Value) -> String {
    let mut text =
        String::from("| between tokens of an answer | p50 ms | p99 ms |\n|---|---|---|\n");
    for (name, words) in [("quiet", "quiet"), ("beside", "beside an ingest")] {
        let (p50, p99) = (
            number(&value[name], "p50_ms"),
            number(&value[name], "p99_ms"),
        );
        let _ = writeln!(text, "| {words} | {p50:.1} | {p99:.1} |");
    }
    let ratio = number(value, "p99_beside_over_quiet");
    let rate = number(value, "context_tokens_per_s");
    let _ = writeln!(
        text,
        "\np99 beside over quiet {ratio:.2}; {rate:.0} context tokens/s read meanwhile."
    );
    text + &origin(value)
}

fn append(value: &Value) -> String {
    let mut text = String::from("| a window told, visible | p50 ms | p90 ms |\n|---|---|---|\n");
    for part in value["windows"].as_array().into_iter().flatten() {
        let (p50, p90) = (number(part, "p50_ms"), number(part, "p90_ms"));
        let _ = writeln!(
            text,
            "| window {} to {} | {p50:.1} | {p90:.1} |",
            part["from"], part["to"]
        );
    }
    let tail = &value["tail"];
    let (p50, p99) = (number(tail, "p50_ms"), number(tail, "p99_ms"));
    let _ = write!(
        text,
        "\n{} tokens into an open window, visible: p50 {p50:.1} ms, p99 {p99:.1} ms",
        tail["tokens"]
    );
    if tail["read_out_ms"].is_number() {
        let _ = write!(
            text,
            "; {:.1} ms of the mean went into the read-out",
            number(tail, "read_out_ms")
        );
    }
    text.push_str(".\n");
    text + &origin(value)
}

fn sessions(value: &Value) -> String {
    let mut text = String::from(
        "| sessions | slots | created in s | TTFT p50, p99 ms | tokens/s | found in a slot or in memory | from disk | read again | MB of a session in a slot, in memory; of a file on disk | resident MB |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    for run in value["runs"].as_array().into_iter().flatten() {
        let n = |name: &str| number(run, name);
        let each = |bytes, sessions| n(bytes) / 1e6 / n(sessions).max(1.0);
        let _ = writeln!(
            text,
            "| {} | {} | {:.1} | {:.0}, {:.0} | {:.1} | {} | {} | {} | {:.2}, {:.2}, {:.2} | {:.0} |",
            run["sessions"],
            run["slots"],
            n("created_s"),
            n("ttft_p50_ms"),
            n("ttft_p99_ms"),
            n("tokens_per_s"),
            run["hits"],
            run["from_disk"],
            run["read_again"],
            each("slot_bytes", "slot_sessions"),
            each("host_bytes", "host_sessions"),
            each("disk_bytes", "disk_files"),
            n("resident_bytes") / 1e6,
        );
    }
    text + &origin(value)
}

fn start(value: &Value) -> String {
    let mut text = String::from("| from start to | median | least | most |\n|---|---|---|---|\n");
    for (name, values) in value["figures"].as_object().into_iter().flatten() {
        let values = values.as_array().map(Vec::as_slice).unwrap_or_default();
        let mut values: Vec<_> = values.iter().filter_map(Value::as_f64).collect();
        values.sort_by(f64::total_cmp);
        if let (Some(least), Some(most)) = (values.first(), values.last()) {
            let median = values[values.len() / 2];
            let name = name.replace('_', " ");
            let _ = writeln!(text, "| {name} | {median:.0} | {least:.0} | {most:.0} |");
        }
    }
    text + &origin(value)
}
