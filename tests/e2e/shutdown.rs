//! The server's end: running requests finish or are told.

use imprint_proto::v1::FinishReason;
use tonic::Code;

use crate::support::{World, ask, chunk, collect, refused};

#[tokio::test(flavor = "multi_thread")]
async fn running_requests_finish_within_the_drain() {
    let world = World::tiny().await;
    let whole = world.generate(ask("hello", 200)).await.unwrap();
    let running = world
        .answers()
        .generate(ask("hello", 200))
        .await
        .unwrap()
        .into_inner();
    let (ended, answer) = tokio::join!(world.running.shutdown(), collect(running));
    ended.unwrap();
    assert_eq!(answer.unwrap().tokens, whole.tokens);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_do_not_finish_are_told() {
    let world = World::tiny_with(|config| config.shutdown.drain_ms = 0).await;
    let mut running = world
        .answers()
        .generate(ask("hello", 480))
        .await
        .unwrap()
        .into_inner();
    running.message().await.unwrap();
    let (ended, answer) = tokio::join!(world.running.shutdown(), collect(running));
    ended.unwrap();
    // A machine may be quick enough to have finished.
    let finished = answer.unwrap().finished;
    assert!(matches!(
        finished.finish_reason(),
        FinishReason::Shutdown | FinishReason::Length | FinishReason::Eos
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ingest_stream_is_told_with_its_last_version_and_new_calls_are_refused() {
    let world = World::tiny().await;
    let session = world.session().await;
    let mut ingest = world.ingest(&session).await;
    ingest.chunk(chunk(1, "some text")).await.unwrap();
    let (ended, applied) = tokio::join!(world.running.shutdown(), async {
        let applied = ingest.applied(1).await.unwrap();
        refused(
            &ingest.finish().await.unwrap_err(),
            Code::Unavailable,
            "SHUTTING_DOWN",
        );
        applied
    });
    ended.unwrap();
    assert_eq!(applied.seq, 1);
}
