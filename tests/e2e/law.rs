//! The law: the same documents give the same state, however they are cut into chunks and whenever they are flushed.

use imprint_proto::v1;
use proptest::{
    collection::vec,
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, TestRunner},
};
use testkit::{cut_text, cuts};

use crate::support::{World, ask, chunk};

/// A document cut into pieces, each with whether a flush follows it.
type Cut = Vec<(String, bool)>;

fn documents(
    text: impl Strategy<Value = String> + Clone,
) -> impl Strategy<Value = (Vec<String>, Vec<Cut>)> {
    let document = (text, cuts(), vec(any::<bool>(), 70));
    vec(document, 1..4).prop_map(|documents| {
        let cut = |(text, cuts, flushes): (String, Vec<_>, Vec<bool>)| {
            let pieces = cut_text(&text, &cuts)
                .into_iter()
                .filter(|piece| !piece.is_empty())
                .map(str::to_owned);
            let pieces: Cut = pieces.zip(flushes).collect();
            (
                pieces
                    .iter()
                    .map(|(piece, _)| piece.as_str())
                    .collect::<String>(),
                pieces,
            )
        };
        documents
            .into_iter()
            .map(cut)
            .filter(|(text, _)| !text.is_empty())
            .unzip()
    })
}

/// Holds the law for some documents: digest, tokens and what the adapter makes of a prompt.
async fn holds(world: &World, whole: &[String], pieces: &[Cut], strategy: v1::Strategy) {
    let request = || v1::CreateSessionRequest {
        strategy: strategy.into(),
        ..Default::default()
    };
    let once = world.create(request()).await.unwrap().session_id;
    let whole: Vec<&str> = whole.iter().map(String::as_str).collect();
    let want = world.tell(&once, &whole).await;
    let cut = world.create(request()).await.unwrap().session_id;
    let mut ingest = world.ingest(&cut).await;
    let mut seq = 0;
    for document in pieces {
        for (index, (piece, flush)) in document.iter().enumerate() {
            seq += 1;
            let last = index + 1 == document.len();
            ingest
                .chunk(v1::IngestChunk {
                    end_of_document: last,
                    ..chunk(seq, piece)
                })
                .await
                .unwrap();
            if *flush {
                ingest.flush().await;
            }
        }
    }
    let got = ingest.finish().await.unwrap().unwrap();
    assert_eq!(
        (got.state_digest, got.tokens),
        (want.state_digest, want.tokens),
        "{pieces:?}"
    );
    let ask = |session: &str| v1::GenerateRequest {
        adapter: crate::support::adapter(session),
        logprobs: true,
        ..ask("The", 4)
    };
    let (a, b) = (
        world.generate(ask(&once)).await.unwrap(),
        world.generate(ask(&cut)).await.unwrap(),
    );
    assert_eq!(
        (a.text, a.tokens, a.logprobs),
        (b.text, b.tokens, b.logprobs),
        "{pieces:?}"
    );
    for session_id in [once, cut] {
        world
            .sessions()
            .delete_session(v1::DeleteSessionRequest { session_id })
            .await
            .unwrap();
    }
}

/// Draws cases and holds each to the law. The runner is driven by hand: its cases are futures.
async fn law(
    world: &World,
    text: impl Strategy<Value = String> + Clone,
    cases: u32,
    strategy: v1::Strategy,
) {
    let mut runner = TestRunner::new(Config {
        failure_persistence: None,
        ..Config::default()
    });
    for _ in 0..cases {
        let (whole, pieces) = documents(text.clone())
            .new_tree(&mut runner)
            .unwrap()
            .current();
        if whole.is_empty() {
            continue;
        }
        holds(world, &whole, &pieces, strategy).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_chunks_and_flushes_give_the_state_of_one_call() {
    let world = World::tiny().await;
    law(&world, testkit::text().boxed(), 24, v1::Strategy::Parallel).await;
    law(
        &world,
        testkit::text().boxed(),
        12,
        v1::Strategy::Sequential,
    )
    .await;
}

/// A paragraph of running text, repeated to several windows.
const TEXT: &str = "The harbour of Eastmere was dredged in 1874, when Captain Ilse Brandt's survey found barely nine feet of \
water over the bar. \"It's no place for a ship,\" she wrote; \"we'll need 3,500 tons of stone.\" The work took four winters.\n\n\
By 1879 the light on Gull Point could be seen for 17 miles. Señor Núñez, the keeper, kept a log of every sail: 1,204 in his \
first year alone. ";

#[tokio::test(flavor = "multi_thread")]
async fn real_text_on_the_real_model_keeps_the_law() {
    let world = World::smollm2().await;
    let text = (1_usize..5, any::<prop::sample::Index>()).prop_map(|(times, end)| {
        let text = TEXT.repeat(times);
        text[..text.floor_char_boundary(end.index(text.len()) + 1)].to_owned()
    });
    law(&world, text.boxed(), 3, v1::Strategy::Parallel).await;
}
