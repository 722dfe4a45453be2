//! The writer against a server in memory: numbers, bounds, versions, and what breaks the contract.

use std::time::Duration;

use tonic::Code;

use crate::{
    Error, IngestOptions,
    fake::{Fake, Quirk},
};

#[tokio::test]
async fn chunks_are_numbered_on_over_streams() {
    let fake = Fake::start().await;
    let (client, session) = fake.client_and_session().await;
    for want in [[1, 2], [3, 4]] {
        let mut ingest = client
            .ingest(&session, IngestOptions::default())
            .await
            .unwrap();
        assert_eq!(ingest.next_seq(), want[0]);
        assert_eq!(ingest.text("a ").await.unwrap(), want[0]);
        assert_eq!(ingest.tokens(vec![5, 6]).await.unwrap(), want[1]);
        let applied = ingest.finish().await.unwrap().unwrap();
        assert_eq!(applied.seq, want[1]);
        assert_eq!(ingest.accepted_seq(), want[1]);
    }
}

#[tokio::test]
async fn a_flush_returns_the_version_of_all_that_was_sent() {
    let fake = Fake::start().await;
    let (client, session) = fake.client_and_session().await;
    let mut ingest = client
        .ingest(&session, IngestOptions::default())
        .await
        .unwrap();
    assert_eq!(ingest.flush().await.unwrap(), None);
    ingest.text("one ").await.unwrap();
    ingest.text("two ").await.unwrap();
    let first = ingest.flush().await.unwrap().unwrap();
    assert_eq!((first.seq, first.adapter_version, first.tokens), (2, 1, 2));
    assert_eq!(ingest.flush().await.unwrap(), Some(first.clone()));
    ingest.text("three").await.unwrap();
    let second = ingest.finish().await.unwrap().unwrap();
    assert_eq!(
        (second.seq, second.adapter_version, second.tokens),
        (3, 2, 3)
    );
    assert_eq!(ingest.take_applied(), [first, second]);
    assert!(ingest.take_applied().is_empty());
}

#[tokio::test]
async fn a_finished_stream_takes_nothing_more() {
    let fake = Fake::start().await;
    let (client, session) = fake.client_and_session().await;
    let mut ingest = client
        .ingest(&session, IngestOptions::default())
        .await
        .unwrap();
    assert_eq!(ingest.finish().await.unwrap(), None);
    let error = ingest.text("late").await.unwrap_err();
    assert!(matches!(error, Error::Finished), "{error:?}");
}

#[tokio::test]
async fn no_more_chunks_are_under_way_than_allowed() {
    let fake = Fake::with_quirk(Quirk::Withhold).await;
    let (client, session) = fake.client_and_session().await;
    let options = IngestOptions {
        in_flight_chunks: 3,
        ..IngestOptions::default()
    };
    let mut ingest = client.ingest(&session, options).await.unwrap();
    for text in ["a", "b", "c"] {
        ingest.text(text).await.unwrap();
    }
    tokio::select! {
        biased;
        sent = ingest.text("d") => panic!("a fourth chunk went out: {sent:?}"),
        () = fake.saw_chunks(3) => {}
    }
    fake.release();
    assert_eq!(ingest.text("d").await.unwrap(), 4);
    ingest.finish().await.unwrap();
    assert_eq!(ingest.accepted_seq(), 4);
}

#[tokio::test]
async fn no_more_bytes_are_under_way_than_allowed_but_a_large_chunk_goes_alone() {
    let fake = Fake::with_quirk(Quirk::Withhold).await;
    let (client, session) = fake.client_and_session().await;
    let options = IngestOptions {
        in_flight_bytes: 10,
        ..IngestOptions::default()
    };
    let mut ingest = client.ingest(&session, options).await.unwrap();
    ingest.text("x".repeat(100)).await.unwrap();
    tokio::select! {
        biased;
        sent = ingest.text("d") => panic!("more bytes went out: {sent:?}"),
        () = fake.saw_chunks(1) => {}
    }
    fake.release();
    ingest.text("d").await.unwrap();
    ingest.finish().await.unwrap();
    assert_eq!(ingest.accepted_seq(), 2);
}

/// The fake stops reading while its one answer waits; a writer that only sent would wait with it.
#[tokio::test]
async fn a_server_that_waits_to_be_read_does_not_stop_the_writer() {
    let fake = Fake::start().await;
    let (client, session) = fake.client_and_session().await;
    let options = IngestOptions {
        in_flight_chunks: 5000,
        ..IngestOptions::default()
    };
    let mut ingest = client.ingest(&session, options).await.unwrap();
    let writing = async {
        for _ in 0..5000 {
            ingest.text("word ".repeat(40)).await.unwrap();
        }
        ingest.finish().await.unwrap()
    };
    let applied = tokio::time::timeout(Duration::from_secs(60), writing)
        .await
        .unwrap();
    assert_eq!(applied.unwrap().seq, 5000);
}

#[tokio::test]
async fn chunks_sent_again_are_duplicates_and_another_content_is_refused() {
    let fake = Fake::start().await;
    let (client, session) = fake.client_and_session().await;
    let mut ingest = client
        .ingest(&session, IngestOptions::default())
        .await
        .unwrap();
    ingest.text("one").await.unwrap();
    ingest.text("two").await.unwrap();
    ingest.finish().await.unwrap();
    assert_eq!(ingest.duplicates(), 0);

    let again = IngestOptions {
        first_seq: Some(1),
        ..IngestOptions::default()
    };
    let mut ingest = client.ingest(&session, again.clone()).await.unwrap();
    for text in ["one", "two", "three"] {
        ingest.text(text).await.unwrap();
    }
    assert_eq!(ingest.finish().await.unwrap().unwrap().adapter_version, 2);
    assert_eq!(ingest.duplicates(), 2);

    let mut ingest = client.ingest(&session, again).await.unwrap();
    ingest.text("another").await.unwrap();
    let error = ingest.finish().await.unwrap_err();
    assert_eq!(error.code(), Some(Code::AlreadyExists));
}

#[tokio::test]
async fn a_gap_is_refused_with_the_expected_seq_and_further_chunks_with_it() {
    let fake = Fake::start().await;
    let (client, session) = fake.client_and_session().await;
    let gap = IngestOptions {
        first_seq: Some(5),
        in_flight_chunks: 1,
        ..IngestOptions::default()
    };
    let mut ingest = client.ingest(&session, gap).await.unwrap();
    ingest.text("far").await.unwrap();
    let error = ingest.text("further").await.unwrap_err();
    assert_eq!(error.refusal().unwrap().expected_seq(), Some(1));
}

#[tokio::test]
async fn a_chunk_accepted_under_another_seq_breaks_the_contract() {
    let fake = Fake::with_quirk(Quirk::WrongSeq).await;
    let (client, session) = fake.client_and_session().await;
    let mut ingest = client
        .ingest(&session, IngestOptions::default())
        .await
        .unwrap();
    ingest.text("one").await.unwrap();
    let error = ingest.finish().await.unwrap_err();
    assert!(matches!(error, Error::Protocol { .. }), "{error:?}");
}
