//! Every call against a server in memory: what arrives there and what comes back.

use std::{collections::HashMap, time::Duration};

use tonic::Code;

use crate::{
    Client, Error, Key, Options, SessionUpdate,
    fake::{Fake, Quirk},
    prompt, v1,
};

#[tokio::test]
async fn an_endpoint_that_is_no_address_is_named() {
    for endpoint in [
        "https://127.0.0.1:7461",
        "ftp://host",
        "http://",
        "http://a b",
        "",
    ] {
        let error = Client::connect(endpoint, Options::default())
            .await
            .unwrap_err();
        assert!(
            matches!(&error, Error::Endpoint { endpoint: named, .. } if named == endpoint),
            "{endpoint:?}: {error:?}"
        );
    }
}

#[tokio::test]
async fn a_server_that_does_not_answer_is_unreachable_with_the_reason() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = listener.local_addr().unwrap().to_string();
    drop(listener);
    let error = Client::connect(&endpoint, Options::default())
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().contains("refused"), "{error}");
}

#[tokio::test]
async fn the_key_travels_with_every_call_and_is_never_shown() {
    let fake = Fake::start().await;
    fake.state().key = Some("k-secret".to_owned());
    let error = fake.client().await.list_models().await.unwrap_err();
    assert_eq!(error.code(), Some(Code::Unauthenticated));

    let options = Options {
        key: Some(Key::from("k-secret")),
        ..Options::default()
    };
    let client = Client::connect(fake.endpoint(), options).await.unwrap();
    assert_eq!(client.list_models().await.unwrap().len(), 1);
    assert!(!format!("{client:?}").contains("k-secret"));

    let options = Options {
        key: Some(Key::from("two\nlines")),
        ..Options::default()
    };
    let error = Client::connect(fake.endpoint(), options).await.unwrap_err();
    assert!(matches!(error, Error::Key), "{error:?}");
}

#[tokio::test]
async fn the_deadline_travels_with_a_call() {
    let fake = Fake::start().await;
    let options = Options {
        call_timeout: Duration::from_secs(9),
        generate_timeout: Duration::from_secs(70),
        ..Options::default()
    };
    let client = Client::connect(fake.endpoint(), options).await.unwrap();
    client.get_model("").await.unwrap();
    let request = v1::GenerateRequest {
        prompt: Some(prompt::text("a")),
        ..v1::GenerateRequest::default()
    };
    client.generate(request).await.unwrap();
    assert_eq!(fake.state().deadlines, ["9000000u", "70000000u"]);
}

#[tokio::test]
async fn sessions_are_listed_over_all_pages() {
    let fake = Fake::start().await;
    let client = fake.client().await;
    let mut created = Vec::new();
    for _ in 0..5 {
        let session = client
            .create_session(v1::CreateSessionRequest::default())
            .await
            .unwrap();
        created.push(session.session_id);
    }
    let listed = client.list_sessions().await.unwrap();
    let listed: Vec<_> = listed
        .into_iter()
        .map(|session| session.session_id)
        .collect();
    assert_eq!(listed, created);

    fake.state().quirk = Quirk::EndlessPages;
    let error = client.list_sessions().await.unwrap_err();
    assert!(matches!(error, Error::Protocol { .. }), "{error:?}");
}

#[tokio::test]
async fn an_update_names_only_what_it_changes() {
    let fake = Fake::start().await;
    let (client, session) = fake.client_and_session().await;
    let labels = HashMap::from([("team".to_owned(), "blue".to_owned())]);
    let update = SessionUpdate {
        labels: Some(labels.clone()),
        ttl: None,
    };
    let changed = client.update_session(&session, update).await.unwrap();
    assert_eq!((changed.labels, changed.ttl), (labels, None));
    let update = SessionUpdate {
        labels: None,
        ttl: Some(Some(Duration::from_millis(1500))),
    };
    let ttl = client
        .update_session(&session, update)
        .await
        .unwrap()
        .ttl
        .unwrap();
    assert_eq!((ttl.seconds, ttl.nanos), (1, 500_000_000));
    let update = SessionUpdate {
        labels: None,
        ttl: Some(None),
    };
    assert_eq!(
        client.update_session(&session, update).await.unwrap().ttl,
        None
    );
    assert_eq!(fake.state().masks, [["labels"], ["ttl"], ["ttl"]]);
}

#[tokio::test]
async fn a_removed_session_is_not_found() {
    let fake = Fake::start().await;
    let (client, session) = fake.client_and_session().await;
    client.delete_session(&session).await.unwrap();
    for error in [
        client.delete_session(&session).await.unwrap_err(),
        client.get_session(&session).await.unwrap_err(),
        client
            .ingest(&session, crate::IngestOptions::default())
            .await
            .unwrap_err(),
    ] {
        assert_eq!(error.code(), Some(Code::NotFound));
    }
}

#[tokio::test]
async fn a_fork_and_a_forgotten_document_do_not_touch_the_original() {
    let fake = Fake::start().await;
    let (client, session) = fake.client_and_session().await;
    let mut ingest = client
        .ingest(&session, crate::IngestOptions::default())
        .await
        .unwrap();
    ingest.document("a");
    ingest.last_text("one").await.unwrap();
    ingest.finish().await.unwrap();
    let request = v1::ForkSessionRequest {
        session_id: session.clone(),
        ..v1::ForkSessionRequest::default()
    };
    let fork = client.fork_session(request).await.unwrap();
    assert_eq!(fork.forked_from, session);
    assert_eq!(
        client
            .forget_document(&fork.session_id, "a")
            .await
            .unwrap()
            .adapter_version,
        2
    );
    assert!(
        client
            .list_documents(&fork.session_id)
            .await
            .unwrap()
            .is_empty()
    );
    assert_eq!(client.list_documents(&session).await.unwrap().len(), 1);
    let error = client.forget_document(&session, "b").await.unwrap_err();
    assert_eq!(error.code(), Some(Code::NotFound));
}

#[tokio::test]
async fn a_generation_is_read_to_its_end() {
    let fake = Fake::start().await;
    let client = fake.client().await;
    let request = || v1::GenerateRequest {
        prompt: Some(prompt::text("hello")),
        ..v1::GenerateRequest::default()
    };
    let mut generation = client.generate(request()).await.unwrap();
    assert!(generation.finished().is_none());
    let first = generation.next().await.unwrap().unwrap();
    assert_eq!(
        (first.text.as_str(), first.token_ids.as_slice()),
        (" ", [7].as_slice())
    );
    let (rest, finished) = generation.text().await.unwrap();
    assert_eq!(rest, "you said hello");
    assert_eq!(finished.finish_reason(), v1::FinishReason::Stop);

    fake.state().quirk = Quirk::NoFinished;
    let error = client
        .generate(request())
        .await
        .unwrap()
        .text()
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Protocol { .. }), "{error:?}");
}

#[tokio::test]
async fn continuations_are_scored_in_order() {
    let fake = Fake::start().await;
    let client = fake.client().await;
    let continuation = |text: &str| v1::Continuation {
        form: Some(v1::continuation::Form::Text(text.to_owned())),
    };
    let request = v1::ScoreRequest {
        prompt: Some(prompt::text("red and")),
        continuations: vec![continuation(" blue"), continuation(" red")],
        ..v1::ScoreRequest::default()
    };
    let scores = client.score(request).await.unwrap().scores;
    let logprobs: Vec<f64> = scores.iter().map(|score| score.logprob).collect();
    assert_eq!(logprobs, [-12.0, -0.5]);
}
