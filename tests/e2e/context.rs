//! Context over gRPC: the laws of `seq`, each bad chunk with its own error, versions, and readers that are slow or gone.

use std::time::Duration;

use imprint_proto::v1::{self, ingest_request::Message};
use tonic::{Code, Request};
use tonic_types::StatusExt;

use crate::support::{World, adapter, ask, chunk, fields, ids, refused};

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_chunk_is_a_duplicate_and_changes_nothing() {
    let world = World::tiny().await;
    let (session, once) = (world.session().await, world.session().await);
    let mut ingest = world.ingest(&session).await;
    assert!(!ingest.chunk(chunk(1, "hello ")).await.unwrap().duplicate);
    assert!(ingest.chunk(chunk(1, "hello ")).await.unwrap().duplicate);
    assert!(!ingest.chunk(chunk(2, "world")).await.unwrap().duplicate);
    ingest.finish().await.unwrap();
    // A later stream, as after a lost connection.
    let mut again = world.ingest(&session).await;
    assert!(again.chunk(chunk(1, "hello ")).await.unwrap().duplicate);
    assert!(again.chunk(chunk(2, "world")).await.unwrap().duplicate);
    let applied = again.finish().await.unwrap().unwrap();
    let mut ingest = world.ingest(&once).await;
    ingest.chunk(chunk(1, "hello world")).await.unwrap();
    assert_eq!(
        ingest.finish().await.unwrap().unwrap().state_digest,
        applied.state_digest
    );
    assert_eq!(world.get(&session).await.unwrap().accepted_seq, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_content_under_a_used_seq_is_refused_and_a_gap_names_the_expected_one() {
    let world = World::tiny().await;
    let session = world.session().await;
    let mut ingest = world.ingest(&session).await;
    ingest.chunk(chunk(1, "one")).await.unwrap();
    refused(
        &ingest.chunk(chunk(1, "uno")).await.unwrap_err(),
        Code::AlreadyExists,
        "SEQ_CONFLICT",
    );
    for seq in [0, 3, u64::MAX] {
        let error = world
            .ingest(&session)
            .await
            .chunk(chunk(seq, "three"))
            .await
            .unwrap_err();
        refused(&error, Code::FailedPrecondition, "SEQ_GAP");
        assert_eq!(
            error.get_details_error_info().unwrap().metadata["expected_seq"],
            "2"
        );
    }
    assert_eq!(world.get(&session).await.unwrap().accepted_seq, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_bad_chunk_has_its_own_error_and_leaves_what_came_before() {
    let world = World::tiny_with(|config| config.limits.chunk_bytes = 64).await;
    let (session, clean) = (world.session().await, world.session().await);
    let mut ingest = world.ingest(&session).await;
    ingest.chunk(chunk(1, "a text ")).await.unwrap();
    let ids_of_text = ids(2, &[1, 2]);
    let out_of_range = ids(2, &[1, 2, 100_000]);
    let bad = [
        (
            chunk(2, ""),
            Code::InvalidArgument,
            "EMPTY_CHUNK",
            "chunk.content",
        ),
        (
            v1::IngestChunk {
                content: None,
                ..chunk(2, "")
            },
            Code::InvalidArgument,
            "INVALID_ARGUMENT",
            "chunk.content",
        ),
        (
            chunk(2, &"x".repeat(65)),
            Code::InvalidArgument,
            "INVALID_ARGUMENT",
            "chunk.text",
        ),
        (
            ids(2, &[1; 17]),
            Code::InvalidArgument,
            "INVALID_ARGUMENT",
            "chunk.token_ids",
        ),
        (
            ids_of_text,
            Code::InvalidArgument,
            "MIXED_CONTENT",
            "chunk.content",
        ),
        (
            v1::IngestChunk {
                document_id: "other".into(),
                ..out_of_range
            },
            Code::InvalidArgument,
            "INVALID_ARGUMENT",
            "chunk.token_ids.ids[2]",
        ),
        (
            v1::IngestChunk {
                document_id: "d".repeat(257),
                ..chunk(2, "x")
            },
            Code::InvalidArgument,
            "DOCUMENT_ID_TOO_LONG",
            "chunk.document_id",
        ),
    ];
    for (chunk, code, why, field) in bad {
        let error = world
            .ingest(&session)
            .await
            .chunk(chunk.clone())
            .await
            .unwrap_err();
        refused(&error, code, why);
        assert_eq!(fields(&error), [field], "{chunk:?}");
    }
    // The first stream is as it was, and so is the document.
    ingest.chunk(chunk(2, "goes on")).await.unwrap();
    let applied = ingest.finish().await.unwrap().unwrap();
    let mut whole = world.ingest(&clean).await;
    whole.chunk(chunk(1, "a text goes on")).await.unwrap();
    assert_eq!(
        whole.finish().await.unwrap().unwrap().state_digest,
        applied.state_digest
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_must_begin_with_open_and_say_it_once() {
    let world = World::tiny().await;
    let session = world.session().await;
    let messages = tokio_stream::once(v1::IngestRequest {
        message: Some(Message::Chunk(chunk(1, "x"))),
    });
    let mut answers = world.context().ingest(messages).await.unwrap().into_inner();
    assert_eq!(fields(&answers.message().await.unwrap_err()), ["open"]);
    let mut ingest = world.ingest(&session).await;
    ingest
        .send(Message::Open(v1::IngestOpen {
            session_id: session.clone(),
        }))
        .await;
    assert_eq!(
        fields(&ingest.answers.message().await.unwrap_err()),
        ["open"]
    );
    let empty = world.ingest(&session).await;
    empty
        .sender
        .as_ref()
        .unwrap()
        .send(v1::IngestRequest { message: None })
        .await
        .unwrap();
    assert_eq!(fields(&empty.finish().await.unwrap_err()), ["message"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_are_listed_with_their_tokens_and_their_place_in_the_log() {
    let world = World::tiny().await;
    let session = world.session().await;
    let mut ingest = world.ingest(&session).await;
    ingest
        .chunk(v1::IngestChunk {
            document_id: "a".into(),
            ..chunk(1, "some words")
        })
        .await
        .unwrap();
    ingest
        .chunk(v1::IngestChunk {
            end_of_document: true,
            ..chunk(2, "")
        })
        .await
        .unwrap();
    ingest.chunk(ids(3, &[1, 2, 3])).await.unwrap();
    ingest
        .chunk(v1::IngestChunk {
            document_id: "c".into(),
            ..ids(4, &[4])
        })
        .await
        .unwrap();
    let applied = ingest.finish().await.unwrap().unwrap();
    let documents = world.documents(&session).await;
    let place = |document: &v1::Document| {
        (
            document.document_id.clone(),
            document.complete,
            document.first_seq,
            document.last_seq,
        )
    };
    let places: Vec<_> = documents.iter().map(place).collect();
    assert_eq!(
        places,
        [
            ("a".into(), true, 1, 2),
            ("doc-3".into(), true, 3, 3),
            ("c".into(), false, 4, 4)
        ]
    );
    assert_eq!((documents[1].tokens, documents[2].tokens), (3, 1));
    assert!(documents[0].tokens > 2);
    assert_eq!(
        documents
            .iter()
            .map(|document| document.tokens)
            .sum::<u64>(),
        applied.tokens
    );
    let session = world.get(&session).await.unwrap();
    assert_eq!(
        (
            session.documents,
            session.context_tokens,
            session.applied_seq
        ),
        (3, applied.tokens, 4)
    );
    assert!(session.state_bytes > 0 && session.core_bytes > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flush_publishes_what_has_come_and_closes_nothing() {
    let world = World::tiny().await;
    let (session, once) = (world.session().await, world.session().await);
    let mut ingest = world.ingest(&session).await;
    ingest.chunk(chunk(1, "wo")).await.unwrap();
    ingest.flush().await;
    let first = ingest.applied(1).await.unwrap();
    ingest
        .chunk(chunk(2, "rds and more of them"))
        .await
        .unwrap();
    ingest.flush().await;
    let second = ingest.applied(2).await.unwrap();
    assert!(
        second.adapter_version > first.adapter_version && second.state_digest != first.state_digest
    );
    // Nothing has come since: the same version again.
    ingest.flush().await;
    assert_eq!(ingest.applied(2).await.unwrap(), second);
    let whole = world.tell(&once, &["words and more of them"]).await;
    assert_eq!(second.state_digest, whole.state_digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quiet_session_publishes_by_itself() {
    let world = World::tiny_with(|config| config.ingest.idle_publish_ms = 20).await;
    let session = world.session().await;
    let mut ingest = world.ingest(&session).await;
    ingest.chunk(chunk(1, "hel")).await.unwrap();
    assert_eq!(ingest.applied(1).await.unwrap().seq, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_reads_what_was_written_before_it() {
    let world = World::tiny().await;
    let session = world.session().await;
    let mut ingest = world.ingest(&session).await;
    ingest.chunk(chunk(1, "hello")).await.unwrap();
    let fresh = v1::AdapterSelection {
        min_applied_seq: 1,
        ..adapter(&session).unwrap()
    };
    let request = v1::GenerateRequest {
        adapter: Some(fresh.clone()),
        ..ask("x", 2)
    };
    let answer = world.generate(request).await.unwrap();
    assert!(
        answer.finished.adapter_version >= 1 && answer.finished.usage.unwrap().context_tokens > 0
    );
    assert_eq!(
        answer.finished.state_digest,
        world.get(&session).await.unwrap().state_digest
    );
    // A chunk that has not come yet, and comes.
    let later = v1::AdapterSelection {
        min_applied_seq: 2,
        ..fresh
    };
    let waits = world.generate(v1::GenerateRequest {
        adapter: Some(later),
        ..ask("x", 2)
    });
    let (answer, accepted) = tokio::join!(waits, ingest.chunk(chunk(2, " world")));
    accepted.unwrap();
    assert!(answer.unwrap().finished.adapter_version >= 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_come_by_the_deadline_is_told_apart() {
    let world = World::tiny().await;
    let session = world.session().await;
    let with = |adapter: v1::AdapterSelection| {
        let mut request = Request::new(v1::GenerateRequest {
            adapter: Some(adapter),
            ..ask("x", 2)
        });
        request
            .metadata_mut()
            .insert("grpc-timeout", "300m".parse().unwrap());
        request
    };
    let base = adapter(&session).unwrap();
    let seq = with(v1::AdapterSelection {
        min_applied_seq: 1,
        ..base.clone()
    });
    refused(
        &world.answers().generate(seq).await.unwrap_err(),
        Code::FailedPrecondition,
        "SEQ_NOT_ARRIVED",
    );
    let version = with(v1::AdapterSelection {
        min_adapter_version: 9,
        ..base
    });
    refused(
        &world.answers().generate(version).await.unwrap_err(),
        Code::DeadlineExceeded,
        "DEADLINE_EXCEEDED",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_leaves_whole_chunks() {
    let world = World::tiny().await;
    let (session, whole) = (world.session().await, world.session().await);
    let mut ingest = world.ingest(&session).await;
    ingest.chunk(chunk(1, "first ")).await.unwrap();
    ingest.send(Message::Chunk(chunk(2, "second "))).await;
    drop(ingest);
    // Whatever became of the second chunk, the next writer finds a place where it can go on.
    let accepted = world.get(&session).await.unwrap().accepted_seq;
    assert!((1..=2).contains(&accepted));
    let mut again = world.ingest(&session).await;
    again.chunk(chunk(2, "second ")).await.unwrap();
    again.chunk(chunk(3, "third")).await.unwrap();
    let applied = again.finish().await.unwrap().unwrap();
    let mut ingest = world.ingest(&whole).await;
    ingest.chunk(chunk(1, "first second third")).await.unwrap();
    assert_eq!(
        ingest.finish().await.unwrap().unwrap().state_digest,
        applied.state_digest
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn two_streams_of_one_session_take_turns() {
    let world = World::tiny().await;
    let (session, once) = (world.session().await, world.session().await);
    let (mut a, mut b) = (world.ingest(&session).await, world.ingest(&session).await);
    for seq in (1..=20).step_by(2) {
        a.chunk(chunk(seq, "ab ")).await.unwrap();
        b.chunk(chunk(seq + 1, "c ")).await.unwrap();
    }
    a.finish().await.unwrap();
    let applied = b.finish().await.unwrap().unwrap();
    let mut whole = world.ingest(&once).await;
    whole.chunk(chunk(1, &"ab c ".repeat(10))).await.unwrap();
    assert_eq!(
        whole.finish().await.unwrap().unwrap().state_digest,
        applied.state_digest
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_does_not_read_cannot_make_the_server_take_without_end() {
    let world = World::tiny().await;
    let session = world.session().await;
    let mut ingest = world.ingest(&session).await;
    ingest.chunk(chunk(1, "x")).await.unwrap();
    // The same chunk over and over costs the engine nothing; only the answers grow. Either nothing more is taken, or
    // HTTP/2 ends a connection on which so many small frames lie unread.
    let sender = ingest.sender.clone().unwrap();
    let message = || v1::IngestRequest {
        message: Some(Message::Chunk(chunk(1, "x"))),
    };
    let mut sent = 0_u32;
    while let Ok(Ok(())) =
        tokio::time::timeout(Duration::from_secs(2), sender.send(message())).await
    {
        sent += 1;
        assert!(sent < 200_000, "the server takes without end");
    }
    drop(ingest);
    // The server goes on, on a connection that the client opens anew.
    assert_eq!(world.get(&session).await.unwrap().accepted_seq, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_are_read_late_are_all_there() {
    let world = World::tiny().await;
    let session = world.session().await;
    let mut ingest = world.ingest(&session).await;
    for seq in 1..=90 {
        ingest.send(Message::Chunk(chunk(seq, "late "))).await;
    }
    ingest.sender = None;
    let mut accepted = Vec::new();
    while let Some(answer) = ingest.answers.message().await.unwrap() {
        if let Some(v1::ingest_response::Message::Accepted(one)) = answer.message {
            accepted.push(one.seq);
        }
    }
    assert_eq!(accepted, (1..=90).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_is_behind_slows_the_client_down_and_all_of_it_arrives() {
    let world = World::tiny_with(|config| {
        config.ingest.waiting_tokens = 64;
        config.ingest.unread_tokens = 16;
        config.engine.max_queued_tokens = Some(64);
    })
    .await;
    let (session, other) = (world.session().await, world.session().await);
    let text = "some words of a long text, ".repeat(100);
    let documents = [text.as_str(), "end"];
    let (a, b) = tokio::join!(
        world.tell(&session, &documents),
        world.tell(&other, &documents)
    );
    assert_eq!(a.state_digest, b.state_digest);
    assert_eq!((a.seq, a.tokens), (2, b.tokens));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_bounded_in_tokens_bytes_and_documents() {
    let world = World::tiny_with(|config| {
        config.engine.max_session_tokens = Some(40);
        config.engine.max_documents = Some(2);
        config.limits.session_bytes = 200;
    })
    .await;
    let full = async |documents: &[&str]| {
        let session = world.session().await;
        let mut ingest = world.ingest(&session).await;
        for (seq, document) in (1..).zip(documents) {
            let chunk = v1::IngestChunk {
                end_of_document: true,
                ..chunk(seq, document)
            };
            if let Err(error) = ingest.chunk(chunk).await {
                return error.get_details_error_info().unwrap().metadata["what"].clone();
            }
        }
        panic!("all was taken");
    };
    assert_eq!(full(&[&"abcdefgh".repeat(6)]).await, "tokens");
    assert_eq!(full(&["a", "b", "c"]).await, "documents");
    assert_eq!(full(&[&"a".repeat(201)]).await, "bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_that_does_not_fit_one_window_is_refused_where_a_document_is_one() {
    let world = World::tiny().await;
    let request = v1::CreateSessionRequest {
        strategy: v1::Strategy::Concat.into(),
        ..Default::default()
    };
    let session = world.create(request).await.unwrap().session_id;
    let mut ingest = world.ingest(&session).await;
    ingest.chunk(ids(1, &[65; 500])).await.unwrap();
    let error = ingest.chunk(ids(2, &[65; 13])).await.unwrap_err();
    refused(&error, Code::FailedPrecondition, "DOCUMENT_TOO_LONG");
    let mut ingest = world.ingest(&session).await;
    ingest.chunk(ids(2, &[65; 12])).await.unwrap();
    assert_eq!(ingest.finish().await.unwrap().unwrap().tokens, 512);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_without_room_for_its_state_is_refused_before_it_is_acknowledged() {
    let world = World::tiny().await;
    let session = world.session().await;
    world
        .tell(&session, &["some text, longer than a window"])
        .await;
    // The fold and the one document.
    let state = world.get(&session).await.unwrap().state_bytes / 2;
    let world = World::tiny_with(|config| {
        config.engine.state_budget_bytes = Some(usize::try_from(6 * state).unwrap());
    })
    .await;
    let session = world.session().await;
    world.tell(&session, &["one", "two"]).await;
    let mut ingest = world.ingest(&session).await;
    let error = ingest.chunk(chunk(3, "three")).await.unwrap_err();
    refused(&error, Code::ResourceExhausted, "STATE_BUDGET");
    let now = world.get(&session).await.unwrap();
    assert_eq!(
        (now.accepted_seq, now.applied_seq, now.documents),
        (2, 2, 2)
    );
    // What is forgotten makes room.
    let forgotten = v1::ForgetDocumentRequest {
        session_id: session.clone(),
        document_id: world.documents(&session).await[0].document_id.clone(),
    };
    world.sessions().forget_document(forgotten).await.unwrap();
    let mut ingest = world.ingest(&session).await;
    ingest.chunk(chunk(3, "three")).await.unwrap();
    ingest.finish().await.unwrap();
    // So does what is deleted while a document is open.
    let other = world.session().await;
    let mut refuses = world.ingest(&other).await;
    let error = refuses.chunk(chunk(1, "one")).await.unwrap_err();
    refused(&error, Code::ResourceExhausted, "STATE_BUDGET");
    let deleted = v1::DeleteSessionRequest {
        session_id: session,
    };
    world.sessions().delete_session(deleted).await.unwrap();
    // The engine is told soon after.
    let told = async {
        loop {
            let mut ingest = world.ingest(&other).await;
            match ingest.chunk(chunk(1, "one")).await {
                Ok(_) => break ingest.finish().await.unwrap(),
                Err(error) => refused(&error, Code::ResourceExhausted, "STATE_BUDGET"),
            }
        }
    };
    let told = tokio::time::timeout(Duration::from_secs(20), told).await;
    assert_eq!(told.unwrap().unwrap().seq, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_that_are_read_leave_room_for_those_of_others() {
    let world = World::tiny().await;
    let session = world.session().await;
    world.tell(&session, &["text"]).await;
    let state = world.get(&session).await.unwrap().state_bytes / 2;
    let world = World::tiny_with(|config| {
        config.engine.state_budget_bytes = Some(usize::try_from(9 * state).unwrap());
    })
    .await;
    // Five states each while it is read, and none of its own for good: who is at rest makes room.
    for _ in 0..8 {
        let session = world.session().await;
        world.tell(&session, &["text"]).await;
    }
    let open = world.session().await;
    let mut stays_open = world.ingest(&open).await;
    stays_open.chunk(chunk(1, "text")).await.unwrap();
    let session = world.session().await;
    let mut ingest = world.ingest(&session).await;
    let error = ingest.chunk(chunk(1, "text")).await.unwrap_err();
    refused(&error, Code::ResourceExhausted, "STATE_BUDGET");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_without_room_for_its_core_is_told_and_comes_when_there_is() {
    let world = World::tiny().await;
    let session = world.session().await;
    world.tell(&session, &["a text of some words"]).await;
    let core = world.get(&session).await.unwrap().core_bytes;
    let world = World::tiny_with(|config| {
        config.engine.core_budget_bytes = Some(usize::try_from(core).unwrap());
    })
    .await;
    let (first, second) = (world.session().await, world.session().await);
    // A session whose document is open cannot make room.
    let mut open = world.ingest(&first).await;
    open.chunk(chunk(1, "a text of some words")).await.unwrap();
    open.finish().await.unwrap();
    let mut asked = ask("x", 1);
    asked.adapter = adapter(&first);
    let want = world.generate(asked).await.unwrap().finished;
    let mut ingest = world.ingest(&second).await;
    let whole = v1::IngestChunk {
        end_of_document: true,
        ..chunk(1, "a text of some words")
    };
    ingest.chunk(whole).await.unwrap();
    let error = ingest.finish().await.unwrap_err();
    refused(&error, Code::ResourceExhausted, "CORE_BUDGET");
    let told = error.get_details_error_info().unwrap().metadata;
    assert_eq!(
        (&told["bytes"], &told["limit"]),
        (&(2 * core).to_string(), &core.to_string())
    );
    assert!(error.get_details_retry_info().is_some());
    let fresh = || v1::GenerateRequest {
        adapter: Some(v1::AdapterSelection {
            min_applied_seq: 1,
            ..adapter(&second).unwrap()
        }),
        ..ask("x", 1)
    };
    let error = world.generate(fresh()).await.unwrap_err();
    refused(&error, Code::ResourceExhausted, "CORE_BUDGET");
    let now = world.get(&second).await.unwrap();
    assert_eq!((now.accepted_seq, now.applied_seq), (1, 0));
    // What was accepted is not lost.
    let deleted = v1::DeleteSessionRequest { session_id: first };
    world.sessions().delete_session(deleted).await.unwrap();
    let told = async {
        loop {
            match world.generate(fresh()).await {
                Ok(answer) => break answer,
                Err(error) => refused(&error, Code::ResourceExhausted, "CORE_BUDGET"),
            }
        }
    };
    let told = tokio::time::timeout(Duration::from_secs(20), told).await;
    assert_eq!(told.unwrap().finished.state_digest, want.state_digest);
    // A stream that begins later does not hear of what was refused before.
    let last = world.ingest(&second).await.finish().await.unwrap();
    assert_eq!(last.unwrap().seq, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_nobody_asked_for_ends_no_stream_and_keeps_no_states() {
    let world = World::tiny().await;
    let session = world.session().await;
    world.tell(&session, &["a text of some words"]).await;
    let took = world.get(&session).await.unwrap();
    let state = took.state_bytes / 2;
    let world = World::tiny_with(|config| {
        config.engine.core_budget_bytes = Some(usize::try_from(took.core_bytes).unwrap());
        // The first session's five, the second's six while it reads two documents, or a third one's five.
        config.engine.state_budget_bytes = Some(usize::try_from(11 * state).unwrap());
        config.ingest.idle_publish_ms = 20;
    })
    .await;
    let (first, second) = (world.session().await, world.session().await);
    let mut open = world.ingest(&first).await;
    open.chunk(chunk(1, "a text of some words")).await.unwrap();
    open.finish().await.unwrap();
    let mut ingest = world.ingest(&second).await;
    for seq in 1..3 {
        let whole = v1::IngestChunk {
            document_id: seq.to_string(),
            end_of_document: true,
            ..chunk(seq, "a text of some words")
        };
        ingest.chunk(whole).await.unwrap();
        // It is quiet: a version is made, and does not fit.
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    // What reading took is free again.
    let third = world.session().await;
    let read = async {
        loop {
            let mut other = world.ingest(&third).await;
            match other.chunk(chunk(1, "text")).await {
                Ok(_) => return,
                Err(error) => refused(&error, Code::ResourceExhausted, "STATE_BUDGET"),
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), read)
        .await
        .unwrap();
    assert_eq!(world.get(&second).await.unwrap().accepted_seq, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_keeps_its_deadline() {
    let world = World::tiny().await;
    let session = world.session().await;
    let (sender, messages) = tokio::sync::mpsc::channel::<v1::IngestRequest>(2);
    let open = v1::IngestOpen {
        session_id: session.clone(),
    };
    let open = v1::IngestRequest {
        message: Some(Message::Open(open)),
    };
    sender.send(open).await.unwrap();
    let messages = tokio_stream::wrappers::ReceiverStream::new(messages);
    let mut request = Request::new(messages);
    request.set_timeout(Duration::from_millis(300));
    let mut answers = world.context().ingest(request).await.unwrap().into_inner();
    let error = answers.message().await.unwrap_err();
    refused(&error, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_does_not_say_open_loses_its_place() {
    let world = World::tiny_with(|config| {
        config.limits.open_ms = 100;
        config.limits.ingest_streams = 1;
    })
    .await;
    let session = world.session().await;
    let (_sender, silent) = tokio::sync::mpsc::channel::<v1::IngestRequest>(1);
    let silent = tokio_stream::wrappers::ReceiverStream::new(silent);
    let mut answers = world.context().ingest(silent).await.unwrap().into_inner();
    let error = answers.message().await.unwrap_err();
    refused(&error, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
    world.tell(&session, &["text"]).await;
    // One that has said it may be silent.
    let mut ingest = world.ingest(&session).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    ingest.chunk(chunk(2, "more")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn flushes_without_end_wait_for_room_and_end() {
    let world = World::tiny_with(|config| config.ingest.waiting_tokens = 32).await;
    let session = world.session().await;
    let mut ingest = world.ingest(&session).await;
    ingest.chunk(chunk(1, "some text")).await.unwrap();
    for _ in 0..500 {
        ingest.flush().await;
    }
    ingest.chunk(chunk(2, " and more")).await.unwrap();
    let last = tokio::time::timeout(Duration::from_secs(60), ingest.finish()).await;
    assert_eq!(last.unwrap().unwrap().unwrap().seq, 2);
}
