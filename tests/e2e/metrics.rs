//! `/metrics`: what it says under load, and that nothing stays behind when clients have finished, cancelled or died.

use std::{collections::BTreeMap, time::Duration};

use imprint_proto::v1::{
    self, context_service_client::ContextServiceClient,
    generation_service_client::GenerationServiceClient,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::{Code, Request, transport::Channel};

use crate::support::{ENDLESS, Ingest, World, adapter, ask, chunk, collect};

/// How long a gauge may take to be what it must.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a plain HTTP client gets: head and body.
async fn http(world: &World, request: &str) -> (String, String) {
    let address = world.running.metrics_address().unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("{request} HTTP/1.1\r\nhost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

async fn scrape(world: &World) -> BTreeMap<String, f64> {
    let (head, body) = http(world, "GET /metrics").await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    body.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}

/// Scrapes until it is so.
async fn until(
    world: &World,
    so: impl Fn(&BTreeMap<String, f64>) -> bool,
) -> BTreeMap<String, f64> {
    let mut last = BTreeMap::new();
    let scraped = tokio::time::timeout(PATIENCE, async {
        while last.is_empty() || !so(&last) {
            last = scrape(world).await;
        }
    });
    assert!(scraped.await.is_ok(), "not so: {last:#?}");
    last
}

async fn measured(change: impl FnOnce(&mut server::Config)) -> World {
    World::endless(|config| {
        config.metrics.listen = Some(([127, 0, 0, 1], 0).into());
        change(config);
    })
    .await
}

const IN_FLIGHT: [&str; 2] = [
    "imprint:grpc_calls_in_flight{service=\"imprint.v1.ContextService\"}",
    "imprint:grpc_calls_in_flight{service=\"imprint.v1.GenerationService\"}",
];

#[tokio::test(flavor = "multi_thread")]
async fn gauges_return_to_zero_after_clients_that_finish_cancel_and_die() {
    let world = measured(|_| ()).await;
    let session = world.session().await;
    world.tell(&session, &["hello world", "the bell"]).await;
    // One that finishes, one that is refused.
    world.generate(ask("hello", 5)).await.unwrap();
    let mut wrong = ask("hello", 5);
    wrong.adapter = adapter("nobody");
    world.generate(wrong).await.unwrap_err();

    // One that will be cancelled, and one whose client will die with an open stream of context as well.
    let cancelled = world.endless_answer(Some(&session)).await;
    let endpoint = format!("http://{}", world.running.address());
    let channel = Channel::from_shared(endpoint).unwrap();
    let dying = channel.connect().await.unwrap();
    let mut answer = GenerationServiceClient::new(dying.clone())
        .generate(ask("hello", ENDLESS))
        .await
        .unwrap()
        .into_inner();
    answer.message().await.unwrap().unwrap();
    let mut ingest = Ingest::open(ContextServiceClient::new(dying.clone()), &session).await;
    ingest.chunk(chunk(3, "unfinished")).await.unwrap();

    let busy = until(&world, |now| {
        now["imprint:num_requests_running"] == 2.0
            && IN_FLIGHT.iter().map(|name| now[*name]).eq([1.0, 2.0])
    })
    .await;
    assert!(busy["imprint:kv_cache_usage_perc"] > 0.0);
    assert!(busy["imprint:ingest_tokens_total"] > 0.0);
    assert!(busy["imprint:versions_published_total"] >= 1.0);

    drop(cancelled);
    drop((answer, ingest, dying));
    let deleted = v1::DeleteSessionRequest {
        session_id: session,
    };
    world.sessions().delete_session(deleted).await.unwrap();

    let quiet = until(&world, |now| {
        [
            "imprint:num_requests_running",
            "imprint:num_requests_waiting",
            "imprint:kv_cache_usage_perc",
            "imprint:num_sessions",
            "imprint:ingest_tokens_waiting",
            "imprint:session_bytes{kind=\"state\"}",
            "imprint:session_bytes{kind=\"trace\"}",
            "imprint:session_bytes{kind=\"core\"}",
        ]
        .iter()
        .chain(&IN_FLIGHT)
        .all(|gauge| now[*gauge] == 0.0)
    })
    .await;
    let of = |name: &str| quiet[&format!("imprint:{name}")];
    assert_eq!(
        of("request_success_total{finished_reason=\"abort\"}"),
        2.0,
        "{quiet:#?}"
    );
    let calls = |code: &str| {
        of(&format!(
            "grpc_calls_total{{service=\"imprint.v1.GenerationService\",code=\"{code}\"}}"
        ))
    };
    assert_eq!(
        (calls("OK"), calls("NOT_FOUND"), calls("CANCELLED")),
        (1.0, 1.0, 2.0)
    );
    assert_eq!(of("time_to_first_token_seconds_count"), 3.0);
    assert!(of("inter_token_latency_seconds_count") >= 1.0);
    assert!(of("generation_tokens_total") >= 3.0);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_but_metrics_is_told_and_nothing_without_an_address() {
    let world = measured(|_| ()).await;
    for (request, status) in [
        ("GET /", "404"),
        ("GET /metrics/../keys", "404"),
        ("POST /metrics", "405"),
    ] {
        let (head, body) = http(&world, request).await;
        assert!(
            head.starts_with(&format!("HTTP/1.1 {status}")) && body.len() < 100,
            "{head}"
        );
    }
    assert_eq!(World::tiny().await.running.metrics_address(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_say_nothing_keep_metrics_from_nobody_for_long() {
    let world = measured(|_| ()).await;
    let address = world.running.metrics_address().unwrap();
    let mut silent = Vec::new();
    for _ in 0..40 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    until(&world, |now| now.contains_key("imprint:num_sessions")).await;
}

/// Streams that are opened and never read.
const UNREAD: usize = 1000;
/// Bytes that one of them may take, here as server and client together.
const UNREAD_BYTES: f64 = 400_000.0;

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_answers_that_nobody_reads_take_bounded_memory_and_keep_nobody_else() {
    let keys = [("crowd", "0123456789abcdef"), ("other", "fedcba9876543210")];
    let world = World::tiny_with(|config| {
        config.metrics.listen = Some(([127, 0, 0, 1], 0).into());
        config.keys = keys
            .map(|(tenant, key)| (key.to_owned(), tenant.to_owned()))
            .into();
    })
    .await;
    let with = |key: &str, max_tokens| {
        let mut request = Request::new(v1::GenerateRequest {
            logprobs: true,
            top_logprobs: 20,
            ..ask("hello", max_tokens)
        });
        let bearer = format!("Bearer {key}").parse().unwrap();
        request.metadata_mut().insert("authorization", bearer);
        request
    };
    let endpoint = format!("http://{}", world.running.address());
    let connect = || async {
        let endpoint = Channel::from_shared(endpoint.clone()).unwrap();
        let endpoint = endpoint.initial_stream_window_size(65_535);
        GenerationServiceClient::new(endpoint.connect().await.unwrap())
    };
    let warm = world.answers().generate(with(keys[1].1, 200)).await;
    collect(warm.unwrap().into_inner()).await.unwrap();
    let bytes = |now: &BTreeMap<String, f64>| now["process_resident_memory_bytes"];
    let before = bytes(&scrape(&world).await);

    let (mut unread, mut refused) = (Vec::new(), 0);
    for _ in 0..UNREAD / 200 {
        let mut client = connect().await;
        for _ in 0..200 {
            match client.generate(with(keys[0].1, 200)).await {
                Ok(answer) => unread.push(answer.into_inner()),
                Err(status) => {
                    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                    refused += 1;
                }
            }
        }
    }
    // A tenant has a part of the places; nobody reads, so nobody gives one back.
    assert_eq!(unread.len() + refused, UNREAD);
    assert!((100..256).contains(&unread.len()), "{}", unread.len());
    let other = world.answers().generate(with(keys[1].1, 200)).await;
    collect(other.unwrap().into_inner()).await.unwrap();
    let done = until(&world, |now| {
        now["imprint:num_requests_running"] == 0.0 && now["imprint:num_requests_waiting"] == 0.0
    })
    .await;
    let grown = bytes(&done) - before;
    assert!(grown < unread.len() as f64 * UNREAD_BYTES, "{grown}");

    drop(unread);
    until(&world, |now| now[IN_FLIGHT[1]] == 0.0).await;
    let again = world.answers().generate(with(keys[0].1, 2)).await;
    collect(again.unwrap().into_inner()).await.unwrap();
    world.end().await;
}
