//! The server's end: running requests finish or are told.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use imprint_proto::v1::{
    self, FinishReason, generation_service_client::GenerationServiceClient,
    session_service_client::SessionServiceClient,
};
use tonic::{Code, transport::Channel};

use crate::support::{ENDLESS, World, adapter, ask, chunk, collect, refused, tiny};

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
    let world = World::endless(|config| config.shutdown.drain_ms = 0).await;
    let running = world.endless_answer(None).await;
    let (ended, answer) = tokio::join!(world.running.shutdown(), collect(running));
    ended.unwrap();
    let finished = answer.unwrap().finished;
    assert_eq!(finished.finish_reason(), FinishReason::Shutdown);
    assert!((1..ENDLESS).contains(&finished.usage.unwrap().completion_tokens));
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

fn terminate(program: &Child) {
    let kill = Command::new("kill").arg(program.id().to_string()).status();
    assert!(kill.unwrap().success());
}

async fn ended(program: &mut Child) -> ExitStatus {
    let began = Instant::now();
    loop {
        if let Some(status) = program.try_wait().unwrap() {
            return status;
        }
        if began.elapsed() > Duration::from_secs(20) {
            program.kill().unwrap();
            panic!("it has not ended");
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn serve(model: &str, generator: &str) -> Child {
    Command::new(env!("CARGO_BIN_EXE_imprint"))
        .args(["serve", "--listen", "127.0.0.1:0"])
        .args(["--model", model, "--generator", generator])
        .env("IMPRINT_SHUTDOWN_DRAIN_MS", "600000")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_the_drain_at_once() {
    let (_folder, config) = tiny();
    let mut program = serve(&config.model, &config.generator);
    let mut line = String::new();
    let mut out = BufReader::new(program.stdout.take().unwrap());
    out.read_line(&mut line).unwrap();
    let address = line.trim().rsplit(' ').next().unwrap().to_owned();
    let channel = Channel::from_shared(address)
        .unwrap()
        .connect()
        .await
        .unwrap();
    let mut sessions = SessionServiceClient::new(channel.clone());
    let created = sessions.create_session(v1::CreateSessionRequest::default());
    let session = created.await.unwrap().into_inner().session.unwrap();
    // The drain waits for a request, and that for a chunk that never comes.
    let mut answers = GenerationServiceClient::new(channel);
    let request = v1::GenerateRequest {
        adapter: Some(v1::AdapterSelection {
            min_applied_seq: 1,
            ..adapter(&session.session_id).unwrap()
        }),
        ..ask("hello", 1)
    };
    let waiting = tokio::spawn(async move { answers.generate(request).await.map(drop) });
    tokio::time::sleep(Duration::from_millis(300)).await;
    terminate(&program);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(program.try_wait().unwrap().is_none(), "the drain goes on");
    terminate(&program);
    assert!(!ended(&mut program).await.success());
    waiting.await.unwrap().unwrap_err();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_ends_the_loading_of_a_model() {
    let folder = tempfile::tempdir().unwrap();
    // Whoever reads it waits for ever.
    let model = folder.path().join("model.gguf");
    assert!(
        Command::new("mkfifo")
            .arg(&model)
            .status()
            .unwrap()
            .success()
    );
    let mut program = serve(model.to_str().unwrap(), "none");
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(program.try_wait().unwrap().is_none(), "it loads");
    terminate(&program);
    assert!(ended(&mut program).await.success());
}
