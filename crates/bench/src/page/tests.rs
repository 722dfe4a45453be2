//! Tables hold what the files say, and a file keeps all but what stands between its marks.

use serde_json::json;

use super::*;

fn load(rate: f64) -> Value {
    json!({
        "backend": "imprint", "num_sessions": 16, "request_rate": rate, "output_throughput": 12.34, "request_throughput": 2.5,
        "p50_ttft_ms": 100.0 * rate, "p99_ttft_ms": 400.0 * rate, "p50_itl_ms": 20.0, "p99_itl_ms": 45.0, "p50_tpot_ms": 21.0,
        "answers_right": 3, "completed": 9, "failed": 1, "ingest_share": 0.1,
    })
}

#[test]
fn a_row_says_what_the_load_was_and_what_came_of_it() {
    let table = tables(&[load(2.0)]);
    let row = table.lines().last().unwrap();
    assert_eq!(
        row,
        "| imprint, 16 sessions, 2/s, 10 % telling | 12.3 | 2.50 | 200, 800 | 20, 45 | 21 | 3/9 | 1 |"
    );
}

#[test]
fn starts_and_ratios_have_tables_of_their_own() {
    let start = json!({"figures": {"listening_ms": [300.0, 100.0, 200.0]}});
    let offline = json!({"ratios": {"decode_vs_peer": {"median": 1.5}}});
    let table = tables(&[start, offline]);
    assert!(
        table.contains("| listening ms | 200 | 100 | 300 |"),
        "{table}"
    );
    assert!(
        table.contains("| decode vs peer | 1.50 | 1.50 ... 1.50 |"),
        "{table}"
    );
}

#[test]
fn a_table_names_the_command_and_the_range_of_its_figures() {
    let offline = json!({
        "ratios": {"decode_vs_llama_cpp": 2.0, "unheard_of": 3.0},
        "ranges": {"decode_vs_llama_cpp": {"values": [2.5, 2.0, 1.5]}},
        "machine": {"command": "imprint bench offline", "cpu": "a processor", "threads": 2},
        "commit": "abc",
    });
    let table = tables(&[offline]);
    assert!(
        table.contains("| decode, over llama.cpp | 2.00 | 1.50 ... 2.50 |"),
        "{table}"
    );
    assert!(table.contains("| unheard of | 3.00 |"), "{table}");
    let origin = "`imprint bench offline`, a processor, 2 threads, commit abc\n";
    assert!(table.ends_with(origin), "{table}");
}

#[test]
fn every_kind_of_measurement_has_a_table() {
    let beside = json!({
        "quiet": {"p50_ms": 1.0, "p99_ms": 2.0}, "beside": {"p50_ms": 3.0, "p99_ms": 4.0},
        "p99_beside_over_quiet": 2.0, "context_tokens_per_s": 180.4,
    });
    let append = json!({
        "windows": [{"from": 1, "to": 4, "p50_ms": 7.0, "p90_ms": 8.0}],
        "tail": {"tokens": 8, "p50_ms": 5.0, "p99_ms": 6.0, "read_out_ms": 2.5},
    });
    let run = json!({
        "sessions": 16, "slots": 4, "created_s": 1.5, "ttft_p50_ms": 20.0, "ttft_p99_ms": 40.0, "tokens_per_s": 9.0,
        "hits": 1, "from_disk": 2, "read_again": 3, "resident_bytes": 5_000_000,
        "slot_bytes": 3_000_000, "slot_sessions": 4, "host_bytes": 0, "host_sessions": 0, "disk_bytes": 1_500_000, "disk_files": 6,
    });
    let table = tables(&[beside, append, json!({"runs": [run]})]);
    for row in [
        "| beside an ingest | 3.0 | 4.0 |",
        "p99 beside over quiet 2.00; 180 context tokens/s",
        "| window 1 to 4 | 7.0 | 8.0 |",
        "8 tokens into an open window, visible: p50 5.0 ms, p99 6.0 ms; 2.5 ms of the mean went into the read-out.",
        "| 16 | 4 | 1.5 | 20, 40 | 9.0 | 1 | 2 | 3 | 0.75, 0.00, 0.25 | 5 |",
    ] {
        assert!(table.contains(row), "{row} is not in {table}");
    }
}

#[test]
fn a_file_keeps_all_but_what_stands_between_its_marks() {
    let old = format!("before\n{BEGIN}\nold\n{END}\nbehind\n");
    let new = placed(&old, "new\n").unwrap();
    assert_eq!(new, format!("before\n{BEGIN}\n\nnew\n\n{END}\nbehind\n"));
    assert_eq!(placed(&new, "new\n").unwrap(), new);
    assert!(placed("no marks", "new").is_err());
    assert!(placed(&format!("{END}{BEGIN}"), "new").is_err());
}

#[test]
fn latencies_are_drawn_over_the_rates_of_at_least_two_loads() {
    assert!(latencies(&[load(2.0)]).is_none());
    let svg = latencies(&[load(4.0), load(2.0)]).unwrap();
    assert_eq!(svg.matches("<polyline").count(), 4);
    assert_eq!(svg.matches("<circle").count(), 8);
    assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    // More milliseconds lie higher: smaller y.
    let y = |number: usize| -> f64 {
        let line = svg.split("<polyline points=\"").nth(number).unwrap();
        let point = line.split([' ', '"']).next().unwrap();
        point.split_once(',').unwrap().1.parse().unwrap()
    };
    assert!(y(2) < y(1), "p99 above p50");
}
