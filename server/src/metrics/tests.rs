//! What is counted, and how it is written.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use engine::{Event, Finish, RequestId, Timings, TokenId, Usage, Version};
use tonic::Code;

use super::{End, Metrics, Watch};

/// The samples of a text by name and labels.
fn samples(text: &str) -> BTreeMap<&str, f64> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name, value.parse().unwrap())
        })
        .collect()
}

fn token(request: u64) -> Event {
    Event::Token {
        request: RequestId(request),
        token: TokenId(1),
        logprob: None,
        top: Vec::new(),
    }
}

fn finished(request: u64) -> Event {
    Event::Finished {
        request: RequestId(request),
        reason: Finish::Eos,
        version: Version(0),
        digest: None,
        prompt_tokens: 7,
        cached_tokens: 0,
        completion_tokens: 3,
        context_tokens: 0,
        timings: Timings::default(),
    }
}

#[test]
fn the_times_of_a_generation_are_counted_from_its_arrival() {
    let metrics = Arc::new(Metrics::new("tiny"));
    let mut watch = Watch::new(Arc::clone(&metrics));
    let start = Instant::now();
    let at = |ms| start + Duration::from_millis(ms);
    watch.begins(RequestId(1), start);
    for ms in [300, 320, 380] {
        watch.sees(&token(1), at(ms));
    }
    watch.sees(&finished(1), at(400));
    // Nobody's token, as of a request that was refused: counted, not timed.
    watch.refused(RequestId(2));
    watch.sees(&token(2), at(900));

    let text = metrics.text();
    let samples = samples(&text);
    let of = |name: &str| samples[format!("imprint:{name}").as_str()];
    assert_eq!(
        (of("prompt_tokens_total"), of("generation_tokens_total")),
        (7.0, 4.0)
    );
    let near = |name: &str, want: f64| {
        assert!((of(name) - want).abs() < 1e-9, "{name}: {}", of(name));
    };
    near("time_to_first_token_seconds_sum", 0.3);
    near("inter_token_latency_seconds_sum", 0.08);
    near("request_time_per_output_token_seconds_sum", 0.04);
    near("e2e_request_latency_seconds_sum", 0.4);
    assert_eq!(of("inter_token_latency_seconds_count"), 2.0);
    // A bound counts all that is not above it.
    let below = |le: &str| {
        of(&format!(
            "inter_token_latency_seconds_bucket{{le=\"{le}\"}}"
        ))
    };
    assert_eq!(
        (below("0.01"), below("0.025"), below("0.075"), below("+Inf")),
        (0.0, 1.0, 2.0, 2.0)
    );
}

#[test]
fn a_call_counts_while_it_runs_and_by_its_code_when_it_has_ended() {
    let metrics = Arc::new(Metrics::new("tiny"));
    let service = "imprint.v1.ContextService";
    let mut good = metrics.call(service);
    let gone = metrics.call(service);
    let of_others = metrics.call("grpc.health.v1.Health");
    let name = |what: &str| format!("imprint:{what}{{service=\"{service}\"}}");
    let text = metrics.text();
    assert_eq!(
        samples(&text)[name("grpc_calls_in_flight").as_str()],
        2.0,
        "those of the contract"
    );
    good.ends(Code::Ok);
    drop((good, gone, of_others));
    let text = metrics.text();
    let samples = samples(&text);
    assert_eq!(samples[name("grpc_calls_in_flight").as_str()], 0.0);
    for code in ["OK", "CANCELLED"] {
        let name = format!("imprint:grpc_calls_total{{service=\"{service}\",code=\"{code}\"}}");
        assert_eq!(samples[name.as_str()], 1.0, "{code}");
    }
}

#[test]
fn an_idle_engine_has_told_its_last_usage() {
    let metrics = Arc::new(Metrics::new("tiny"));
    let mut watch = Watch::new(Arc::clone(&metrics));
    let start = Instant::now();
    let usage = |running| Usage {
        running,
        blocks: 8,
        free_blocks: 6,
        ..Usage::default()
    };
    let running = || {
        let text = metrics.text();
        samples(&text)["imprint:num_requests_running"]
    };
    watch.stepped(false, start, || usage(3));
    assert_eq!(running(), 3.0);
    // Busy, a moment later: what was told will do.
    watch.stepped(false, start, || usage(2));
    assert_eq!(running(), 3.0);
    watch.stepped(true, start, || usage(0));
    assert_eq!(running(), 0.0);
    let text = metrics.text();
    assert_eq!(samples(&text)["imprint:kv_cache_usage_perc"], 0.25);
}

#[test]
fn what_the_engine_says_of_its_load_stands_in_the_text() {
    let metrics = Metrics::new("tiny");
    metrics.set_usage(Usage {
        blocks: 8,
        free_blocks: 6,
        kept_blocks: 2,
        queued: 5,
        preempted: 7,
        prompt_tokens: 90,
        cached_tokens: 30,
        wait: Duration::from_millis(1500),
        ..Usage::default()
    });
    let text = metrics.text();
    let samples = samples(&text);
    let of = |name: &str| samples[format!("imprint:{name}").as_str()];
    let names = [
        "num_requests_waiting",
        "num_preemptions_total",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "prefix_cache_usage_perc",
        "request_wait_estimate_seconds",
    ];
    assert_eq!(names.map(of), [5.0, 7.0, 90.0, 30.0, 0.25, 1.5]);
}

#[test]
fn the_text_is_what_prometheus_reads() {
    let metrics = Metrics::new("a \"quoted\\ name\n");
    metrics.ended(End::Abort);
    let text = metrics.text();
    assert!(
        text.contains(r#"model_name="a \"quoted\\ name\n""#),
        "{text}"
    );
    let mut described = BTreeSet::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(described.insert(name), "{name} twice");
            assert!(["gauge", "counter", "histogram"].contains(&kind));
            assert_eq!(
                kind == "counter",
                name.ends_with("_total"),
                "{name} is a {kind}"
            );
        } else if !line.starts_with('#') {
            let name = line.split(['{', ' ']).next().unwrap();
            let of_histogram = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|end| name.strip_suffix(end));
            assert!(
                described.contains(name) || described.contains(of_histogram.unwrap()),
                "{name} has no TYPE before it"
            );
        }
    }
    // No label grows with what clients do.
    assert!(!text.contains("session_id") && !text.contains("tenant"));
}
