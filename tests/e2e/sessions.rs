//! Sessions over gRPC: their life, their names, their tenants, copies and forgetting.

use std::{collections::HashMap, time::Duration};

use imprint_proto::v1;
use tonic::{Code, Request, metadata::MetadataValue};

use crate::support::{World, adapter, ask, chunk, fields, refused};

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_created_shown_and_deleted() {
    let world = World::tiny().await;
    let labels = HashMap::from([("team".to_owned(), "blue".to_owned())]);
    let ttl = prost_types::Duration {
        seconds: 60,
        nanos: 0,
    };
    let request = v1::CreateSessionRequest {
        labels: labels.clone(),
        ttl: Some(ttl),
        ..Default::default()
    };
    let session = world.create(request).await.unwrap();
    assert!(
        session.session_id.starts_with("s_") && session.session_id.len() == 28,
        "{}",
        session.session_id
    );
    assert_eq!(
        (session.strategy(), session.window, session.adapter_version),
        (v1::Strategy::Parallel, 8, 0)
    );
    assert_eq!((session.labels.clone(), session.ttl), (labels, Some(ttl)));
    let expires = session.expire_time.unwrap().seconds - session.update_time.unwrap().seconds;
    assert_eq!(expires, 60);

    let shown = world.get(&session.session_id).await.unwrap();
    assert_eq!(
        (shown.labels, shown.create_time),
        (session.labels, session.create_time)
    );
    let request = v1::DeleteSessionRequest {
        session_id: session.session_id.clone(),
    };
    world.sessions().delete_session(request).await.unwrap();
    assert_eq!(
        world.get(&session.session_id).await.unwrap_err().code(),
        Code::NotFound
    );
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_labels_and_lifetime_can_be_changed() {
    let world = World::tiny().await;
    let session_id = world.session().await;
    let update = async |session: v1::Session, paths: &[&str]| {
        let paths = paths.iter().map(|path| (*path).to_owned()).collect();
        let update_mask = Some(prost_types::FieldMask { paths });
        let request = v1::UpdateSessionRequest {
            session: Some(session),
            update_mask,
        };
        world
            .sessions()
            .update_session(request)
            .await
            .map(|answer| answer.into_inner().session.unwrap())
    };
    let labels = HashMap::from([("a".to_owned(), "b".to_owned())]);
    let ttl = Some(prost_types::Duration {
        seconds: 5,
        nanos: 0,
    });
    let wanted = v1::Session {
        session_id: session_id.clone(),
        labels: labels.clone(),
        ttl,
        ..Default::default()
    };
    let changed = update(wanted.clone(), &["labels"]).await.unwrap();
    assert_eq!((changed.labels, changed.ttl), (labels, None));
    let changed = update(wanted.clone(), &["ttl"]).await.unwrap();
    assert_eq!(changed.ttl, ttl);
    let changed = update(
        v1::Session {
            ttl: None,
            ..wanted.clone()
        },
        &["ttl"],
    )
    .await
    .unwrap();
    assert_eq!((changed.ttl, changed.expire_time), (None, None));
    assert_eq!(
        fields(&update(wanted.clone(), &["window"]).await.unwrap_err()),
        ["update_mask"]
    );
    assert_eq!(
        fields(&update(wanted.clone(), &[]).await.unwrap_err()),
        ["update_mask"]
    );
    let short = Some(prost_types::Duration {
        seconds: 0,
        nanos: 5,
    });
    let error = update(
        v1::Session {
            ttl: short,
            ..wanted
        },
        &["ttl"],
    )
    .await
    .unwrap_err();
    assert_eq!(fields(&error), ["session.ttl"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_session_is_unknown_and_so_is_one_that_never_was() {
    let world = World::tiny().await;
    let session_id = world.session().await;
    world
        .sessions()
        .delete_session(v1::DeleteSessionRequest {
            session_id: session_id.clone(),
        })
        .await
        .unwrap();
    for name in [session_id.as_str(), "s_nobody", ""] {
        refused(
            &world.get(name).await.unwrap_err(),
            Code::NotFound,
            "SESSION_NOT_FOUND",
        );
        let request = v1::GenerateRequest {
            adapter: adapter(name),
            ..ask("x", 1)
        };
        if !name.is_empty() {
            refused(
                &world.generate(request).await.unwrap_err(),
                Code::NotFound,
                "SESSION_NOT_FOUND",
            );
        }
        let error = world.ingest(name).await.finish().await.unwrap_err();
        refused(&error, Code::NotFound, "SESSION_NOT_FOUND");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_ends_when_its_time_is_over() {
    let world = World::tiny_with(|config| config.engine.max_sessions = Some(1)).await;
    let ttl = Some(prost_types::Duration {
        seconds: 1,
        nanos: 0,
    });
    let session = world
        .create(v1::CreateSessionRequest {
            ttl,
            ..Default::default()
        })
        .await
        .unwrap();
    // It is found over by itself, and its place is free for another one; nobody asks for it.
    let place = async {
        while world
            .create(v1::CreateSessionRequest::default())
            .await
            .is_err()
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), place)
        .await
        .unwrap();
    refused(
        &world.get(&session.session_id).await.unwrap_err(),
        Code::NotFound,
        "SESSION_NOT_FOUND",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_new_session_asks_wrongly_is_named_field_by_field() {
    let world = World::tiny().await;
    let long = HashMap::from([("k".repeat(64), "v".repeat(257))]);
    let request = v1::CreateSessionRequest {
        strategy: 9,
        window: 100_000,
        labels: long,
        ttl: Some(prost_types::Duration {
            seconds: -1,
            nanos: 0,
        }),
        request_id: "r".repeat(129),
        ..Default::default()
    };
    let error = world.create(request).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert_eq!(
        fields(&error),
        [
            "strategy",
            "request_id",
            "window",
            "labels",
            "labels",
            "ttl"
        ]
    );
    let error = world
        .create(v1::CreateSessionRequest {
            window: 1,
            ..Default::default()
        })
        .await
        .unwrap_err();
    refused(&error, Code::InvalidArgument, "WINDOW_OUT_OF_RANGE");
    let error = world
        .create(v1::CreateSessionRequest {
            model: "other".into(),
            ..Default::default()
        })
        .await
        .unwrap_err();
    refused(&error, Code::NotFound, "MODEL_NOT_FOUND");
    // A refused session leaves nothing.
    let listed = world
        .sessions()
        .list_sessions(v1::ListSessionsRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert!(listed.sessions.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_request_returns_the_same_session_and_another_under_its_name_is_refused() {
    let world = World::tiny().await;
    let request = v1::CreateSessionRequest {
        request_id: "r1".into(),
        window: 16,
        ..Default::default()
    };
    let first = world.create(request.clone()).await.unwrap();
    let (a, b) = tokio::join!(world.create(request.clone()), world.create(request.clone()));
    assert_eq!(a.unwrap().session_id, first.session_id);
    assert_eq!(b.unwrap().session_id, first.session_id);
    let error = world
        .create(v1::CreateSessionRequest {
            window: 17,
            ..request.clone()
        })
        .await
        .unwrap_err();
    refused(&error, Code::AlreadyExists, "REQUEST_ID_REUSED");
    world
        .sessions()
        .delete_session(v1::DeleteSessionRequest {
            session_id: first.session_id.clone(),
        })
        .await
        .unwrap();
    assert_ne!(
        world.create(request).await.unwrap().session_id,
        first.session_id
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_are_listed_oldest_first_page_by_page() {
    let world = World::tiny().await;
    let mut made = Vec::new();
    for _ in 0..5 {
        made.push(world.session().await);
    }
    let (mut listed, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = v1::ListSessionsRequest {
            page_size: 2,
            page_token: page_token.clone(),
        };
        let page = world
            .sessions()
            .list_sessions(request)
            .await
            .unwrap()
            .into_inner();
        assert!(page.sessions.len() <= 2);
        listed.extend(page.sessions.into_iter().map(|session| session.session_id));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(listed, made);
    let request = v1::ListSessionsRequest {
        page_size: 0,
        page_token: "1-2".into(),
    };
    assert_eq!(
        fields(&world.sessions().list_sessions(request).await.unwrap_err()),
        ["page_token"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_sessions_with_large_labels_is_bounded_in_bytes() {
    let world = World::tiny().await;
    let labels: HashMap<String, String> = (0..64)
        .map(|number| (format!("{number:063}"), "v".repeat(256)))
        .collect();
    let mut made = Vec::new();
    for _ in 0..60 {
        let request = v1::CreateSessionRequest {
            labels: labels.clone(),
            ..Default::default()
        };
        made.push(world.create(request).await.unwrap().session_id);
    }
    let (mut listed, mut pages, mut page_token) = (Vec::new(), 0, String::new());
    loop {
        let request = v1::ListSessionsRequest {
            page_size: 1000,
            page_token,
        };
        let page = world.sessions().list_sessions(request).await.unwrap();
        let page = page.into_inner();
        assert!(prost::Message::encoded_len(&page) <= 1 << 20);
        listed.extend(page.sessions.into_iter().map(|session| session.session_id));
        (pages, page_token) = (pages + 1, page.next_page_token);
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!((listed, pages), (made, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_that_is_late_leaves_its_source_alone() {
    let world = World::tiny_with(|config| config.ingest.unread_tokens = 16).await;
    let source = world.session().await;
    let mut ingest = world.ingest(&source).await;
    let text = "some words of a long text, ".repeat(400);
    ingest.chunk(chunk(1, &text)).await.unwrap();
    let mut request = Request::new(v1::ForkSessionRequest {
        session_id: source.clone(),
        ..Default::default()
    });
    request.set_timeout(Duration::from_millis(30));
    let error = world.sessions().fork_session(request).await.unwrap_err();
    assert!(
        matches!(error.code(), Code::DeadlineExceeded | Code::Cancelled),
        "{error:?}"
    );
    ingest.finish().await.unwrap();
    let alone = async {
        loop {
            let list = v1::ListSessionsRequest::default();
            let list = world.sessions().list_sessions(list).await.unwrap();
            if list.into_inner().sessions.len() == 1 {
                break;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), alone)
        .await
        .unwrap();
    assert_eq!(world.get(&source).await.unwrap().applied_seq, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_are_bounded_and_a_full_server_says_so() {
    let world = World::tiny_with(|config| config.engine.max_sessions = Some(2)).await;
    let first = world.session().await;
    world.session().await;
    let error = world
        .create(v1::CreateSessionRequest::default())
        .await
        .unwrap_err();
    refused(&error, Code::ResourceExhausted, "TOO_MANY_SESSIONS");
    let error = world
        .sessions()
        .fork_session(v1::ForkSessionRequest {
            session_id: first.clone(),
            ..Default::default()
        })
        .await;
    refused(
        &error.unwrap_err(),
        Code::ResourceExhausted,
        "TOO_MANY_SESSIONS",
    );
    world
        .sessions()
        .delete_session(v1::DeleteSessionRequest { session_id: first })
        .await
        .unwrap();
    world.session().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_session_looks_like_an_unknown_one() {
    let keys = [
        ("acme", "0123456789abcdef-acme"),
        ("other", "0123456789abcdef-other"),
    ];
    let world = World::tiny_with(|config| {
        config.keys = keys
            .iter()
            .map(|(tenant, key)| ((*key).to_owned(), (*tenant).to_owned()))
            .collect();
    })
    .await;
    let with = |key: &str| {
        let bearer: MetadataValue<_> = format!("Bearer {key}").parse().unwrap();
        move |mut request: Request<()>| {
            request
                .metadata_mut()
                .insert("authorization", bearer.clone());
            Ok::<_, tonic::Status>(request)
        }
    };
    let client = |key| {
        v1::session_service_client::SessionServiceClient::with_interceptor(
            world.channel.clone(),
            with(key),
        )
    };
    let (mut acme, mut other) = (client(keys[0].1), client(keys[1].1));
    let session = acme
        .create_session(v1::CreateSessionRequest::default())
        .await
        .unwrap()
        .into_inner()
        .session
        .unwrap();
    let name = session.session_id;
    let get = || v1::GetSessionRequest {
        session_id: name.clone(),
    };
    acme.get_session(get()).await.unwrap();
    let foreign = other.get_session(get()).await.unwrap_err();
    let unknown = other
        .get_session(v1::GetSessionRequest {
            session_id: "s_x".into(),
        })
        .await
        .unwrap_err();
    assert_eq!(foreign.code(), unknown.code());
    assert_eq!(
        foreign.message().replace(&name, ""),
        unknown.message().replace("s_x", "")
    );
    let delete = other
        .delete_session(v1::DeleteSessionRequest {
            session_id: name.clone(),
        })
        .await
        .unwrap_err();
    assert_eq!(delete.code(), Code::NotFound);
    assert!(
        other
            .list_sessions(v1::ListSessionsRequest::default())
            .await
            .unwrap()
            .into_inner()
            .sessions
            .is_empty()
    );
    let error = client("0123456789abcdef-wrong")
        .get_session(get())
        .await
        .unwrap_err();
    refused(&error, Code::Unauthenticated, "UNAUTHENTICATED");
    let error = world.get(&name).await.unwrap_err();
    refused(&error, Code::Unauthenticated, "UNAUTHENTICATED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_has_what_its_source_had_and_goes_its_own_way() {
    let world = World::tiny().await;
    let source = world.session().await;
    let first = world.tell(&source, &["the first text of many words"]).await;
    let request = v1::ForkSessionRequest {
        session_id: source.clone(),
        ..Default::default()
    };
    let fork = world
        .sessions()
        .fork_session(request)
        .await
        .unwrap()
        .into_inner()
        .session
        .unwrap();
    assert_eq!(fork.forked_from, source);
    assert_eq!(
        (fork.adapter_version, fork.accepted_seq, fork.applied_seq),
        (first.adapter_version, 1, 1)
    );
    assert_eq!(
        (fork.state_digest.as_str(), fork.documents),
        (first.state_digest.as_str(), 1)
    );
    let fork = fork.session_id;
    let ours = world.tell(&source, &["second"]).await;
    let theirs = world.tell(&fork, &["second"]).await;
    assert_eq!(ours.state_digest, theirs.state_digest);
    let other = world.tell(&fork, &["third"]).await;
    assert_ne!(other.state_digest, ours.state_digest);
    assert_eq!(
        world.get(&source).await.unwrap().state_digest,
        ours.state_digest
    );
    assert_eq!(world.documents(&source).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_in_the_middle_of_a_document_continues_it() {
    let world = World::tiny().await;
    let source = world.session().await;
    let mut ingest = world.ingest(&source).await;
    ingest
        .chunk(crate::support::chunk(1, "an unfinished docu"))
        .await
        .unwrap();
    let request = v1::ForkSessionRequest {
        session_id: source.clone(),
        ..Default::default()
    };
    let fork = world
        .sessions()
        .fork_session(request)
        .await
        .unwrap()
        .into_inner()
        .session
        .unwrap()
        .session_id;
    ingest
        .chunk(crate::support::chunk(2, "ment goes on"))
        .await
        .unwrap();
    let ours = ingest.finish().await.unwrap().unwrap();
    let mut ingest = world.ingest(&fork).await;
    ingest
        .chunk(crate::support::chunk(2, "ment goes on"))
        .await
        .unwrap();
    let theirs = ingest.finish().await.unwrap().unwrap();
    assert_eq!(ours.state_digest, theirs.state_digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forgotten_document_is_as_if_it_had_never_come() {
    let world = World::tiny().await;
    let (session, never) = (world.session().await, world.session().await);
    world
        .tell(
            &session,
            &["one fine text", "a secret of some length", "and the last"],
        )
        .await;
    let without = world.tell(&never, &["one fine text", "and the last"]).await;
    let forget = async |name: &str| {
        let request = v1::ForgetDocumentRequest {
            session_id: session.clone(),
            document_id: name.to_owned(),
        };
        world
            .sessions()
            .forget_document(request)
            .await
            .map(tonic::Response::into_inner)
    };
    let forgotten = forget("doc-2").await.unwrap();
    assert_eq!(forgotten.state_digest, without.state_digest);
    assert_eq!(world.documents(&session).await.len(), 2);
    refused(
        &forget("doc-2").await.unwrap_err(),
        Code::NotFound,
        "DOCUMENT_NOT_FOUND",
    );
    refused(
        &forget("none").await.unwrap_err(),
        Code::NotFound,
        "DOCUMENT_NOT_FOUND",
    );
    let ask = |session: &str| v1::GenerateRequest {
        adapter: adapter(session),
        logprobs: true,
        ..ask("hello", 6)
    };
    let (a, b) = (
        world.generate(ask(&session)).await.unwrap(),
        world.generate(ask(&never)).await.unwrap(),
    );
    assert_eq!((a.tokens, a.logprobs), (b.tokens, b.logprobs));
    forget("doc-1").await.unwrap();
    forget("doc-3").await.unwrap();
    let (none, bare) = (
        world.generate(ask(&session)).await.unwrap(),
        world.generate(ask("")).await.unwrap(),
    );
    assert_eq!((none.tokens, none.logprobs), (bare.tokens, bare.logprobs));
    // The name stays used.
    let mut ingest = world.ingest(&session).await;
    let again = v1::IngestChunk {
        document_id: "doc-2".into(),
        ..crate::support::chunk(4, "again")
    };
    refused(
        &ingest.chunk(again).await.unwrap_err(),
        Code::FailedPrecondition,
        "DOCUMENT_CLOSED",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_whose_session_is_over_makes_a_new_one() {
    let world = World::tiny().await;
    let request = v1::CreateSessionRequest {
        request_id: "r1".into(),
        ttl: Some(prost_types::Duration {
            seconds: 1,
            nanos: 0,
        }),
        ..Default::default()
    };
    let first = world.create(request.clone()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1050)).await;
    let second = world.create(request).await.unwrap();
    assert_ne!(first.session_id, second.session_id);
    world.get(&second.session_id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_that_fails_when_its_client_has_gone_leaves_nothing() {
    let world = World::tiny_with(|config| config.ingest.unread_tokens = 16).await;
    let source = world.session().await;
    let mut ingest = world.ingest(&source).await;
    let text = "some words of a long text, ".repeat(2000);
    ingest.chunk(chunk(1, &text)).await.unwrap();
    let request = v1::ForkSessionRequest {
        session_id: source.clone(),
        ..Default::default()
    };
    let mut sessions = world.sessions();
    let fork = sessions.fork_session(request);
    let gone = tokio::time::timeout(Duration::from_millis(20), fork).await;
    gone.unwrap_err();
    let count = async || {
        let list = v1::ListSessionsRequest::default();
        let list = world.sessions().list_sessions(list).await.unwrap();
        list.into_inner().sessions.len()
    };
    assert_eq!(count().await, 2, "the copy is not yet there");
    let request = v1::DeleteSessionRequest { session_id: source };
    world.sessions().delete_session(request).await.unwrap();
    let left = async {
        while count().await > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), left)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_of_a_session_that_is_deleted_meanwhile_leaves_nothing() {
    let world = World::tiny_with(|config| config.ingest.unread_tokens = 16).await;
    let source = world.session().await;
    let mut ingest = world.ingest(&source).await;
    // The engine has much to read before it comes to the fork.
    let text = "some words of a long text, ".repeat(2000);
    ingest.chunk(chunk(1, &text)).await.unwrap();
    let request = v1::ForkSessionRequest {
        session_id: source.clone(),
        ..Default::default()
    };
    let mut sessions = world.sessions();
    let (forked, deleted) = tokio::join!(sessions.fork_session(request), async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let request = v1::DeleteSessionRequest { session_id: source };
        world.sessions().delete_session(request).await
    });
    deleted.unwrap();
    refused(&forked.unwrap_err(), Code::NotFound, "SESSION_NOT_FOUND");
    let left = world
        .sessions()
        .list_sessions(v1::ListSessionsRequest::default())
        .await
        .unwrap();
    assert_eq!(left.into_inner().sessions, []);
}
