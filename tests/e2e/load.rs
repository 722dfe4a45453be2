//! `imprint bench serve` against a server of the tiny model: what it reports is what happened.

use clap::Parser;
use serde_json::Value;

use crate::support::World;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: bench::serve::Args,
}

/// Runs a load with these arguments and returns what it wrote.
async fn load(world: &World, arguments: &str) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("figures.json");
    let endpoint = format!("http://{}", world.running.address());
    let metrics = format!(
        "http://{}/metrics",
        world.running.metrics_address().unwrap()
    );
    let fixed = [
        "bench",
        "--endpoint",
        &endpoint,
        "--metrics",
        &metrics,
        "--json",
        file.to_str().unwrap(),
    ];
    let cli = Cli::parse_from(fixed.into_iter().chain(arguments.split_whitespace()));
    bench::serve::run(&cli.args, &[]).await.unwrap();
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

async fn measured(change: impl FnOnce(&mut server::Config)) -> World {
    World::tiny_with(|config| {
        config.metrics.listen = Some(([127, 0, 0, 1], 0).into());
        change(config);
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_is_answered_counted_and_leaves_nothing_behind() {
    let world = measured(|_| ()).await;
    let figures = load(
        &world,
        "--request-rate 40 --seconds 1 --warm-up-seconds 0.25 --sessions 3 --facts 2 --told-facts 1 \
         --ingest-share 0.3 --output-tokens 4 --goodput e2el:60000 --seed 5",
    )
    .await;
    assert_eq!(figures["errors"], serde_json::json!({}), "{figures:#}");
    let number = |name: &str| figures[name].as_f64().unwrap();
    // 40 are expected, 30 % of them told; far from all is far outside of chance.
    assert!(
        number("completed") >= 10.0 && number("ingest_completed") >= 2.0,
        "{figures:#}"
    );
    assert!(number("total_output_tokens") >= number("completed"));
    assert!(number("total_output_tokens") <= 4.0 * number("completed"));
    assert_eq!(figures["request_goodput"], figures["request_throughput"]);
    for name in ["ttft", "e2el", "visible"] {
        let of = |what: &str| number(&format!("{what}_{name}_ms"));
        assert!(0.0 < of("p50") && of("p50") <= of("p90") && of("p90") <= of("p99"));
    }
    // The server counted what it was asked, the warm-up included.
    let told = &figures["server_metrics"]["imprint:generation_tokens_total"];
    assert!(told.as_f64().unwrap() >= number("total_output_tokens"));
    let request = imprint_proto::v1::ListSessionsRequest::default();
    let left = world.sessions().list_sessions(request).await.unwrap();
    assert!(left.into_inner().sessions.is_empty());
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_refuses_is_counted_by_its_code() {
    let world = measured(|config| config.limits.requests = 1).await;
    let figures = load(
        &world,
        "--burst 40 --sessions 0 --output-tokens 200 --max-concurrency 40",
    )
    .await;
    let (good, bad) = (&figures["completed"], &figures["failed"]);
    assert_eq!(good.as_u64().unwrap() + bad.as_u64().unwrap(), 40);
    assert!(good.as_u64().unwrap() >= 1, "{figures:#}");
    assert!(bad.as_u64().unwrap() >= 1, "{figures:#}");
    assert_eq!(
        &figures["errors"]["ResourceExhausted BUSY"], bad,
        "{figures:#}"
    );
    world.end().await;
}
