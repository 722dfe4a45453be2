//! The law: the same documents give the same state, however they are cut into chunks and whenever they are flushed.

use imprint_proto::v1::{self, ingest_chunk::Content};
use proptest::{
    collection::vec,
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, TestRunner},
};
use testkit::{cut_text, cuts};

use crate::support::{World, ask, chunk};

/// A document cut into pieces, each with whether a flush follows it.
type Cut = Vec<(Content, bool)>;

/// Documents, whole and cut.
type Documents = Vec<(Content, Cut)>;

fn texts(text: impl Strategy<Value = String> + Clone + 'static) -> BoxedStrategy<Documents> {
    let document = (text, cuts(), vec(any::<bool>(), 70));
    let cut = |(text, cuts, flushes): (String, Vec<_>, Vec<bool>)| {
        let pieces = cut_text(&text, &cuts)
            .into_iter()
            .filter(|piece| !piece.is_empty())
            .map(|piece| Content::Text(piece.to_owned()));
        let pieces = pieces.zip(flushes).collect();
        (Content::Text(text), pieces)
    };
    vec(document.prop_map(cut), 1..4)
        .prop_map(|documents| {
            let said = |(_, pieces): &(Content, Cut)| !pieces.is_empty();
            documents.into_iter().filter(said).collect()
        })
        .boxed()
}

fn token_ids() -> BoxedStrategy<Documents> {
    let document = (vec(0..288_u32, 1..60), cuts(), vec(any::<bool>(), 70));
    let ids = |ids: &[u32]| Content::TokenIds(v1::TokenIds { ids: ids.to_vec() });
    let cut = move |(tokens, cuts, flushes): (Vec<u32>, Vec<_>, Vec<bool>)| {
        let pieces = testkit::cut(&tokens, &cuts)
            .into_iter()
            .filter(|piece| !piece.is_empty())
            .map(ids);
        (ids(&tokens), pieces.zip(flushes).collect())
    };
    vec(document.prop_map(cut), 1..4).boxed()
}

/// A new session that is told a document's pieces, one after the other.
async fn tell(
    world: &World,
    documents: Vec<Cut>,
    strategy: v1::Strategy,
) -> (String, v1::IngestApplied) {
    let request = v1::CreateSessionRequest {
        strategy: strategy.into(),
        ..Default::default()
    };
    let session = world.create(request).await.unwrap().session_id;
    let mut ingest = world.ingest(&session).await;
    let mut seq = 0;
    for document in documents {
        let count = document.len();
        for (index, (content, flush)) in document.into_iter().enumerate() {
            seq += 1;
            let piece = v1::IngestChunk {
                content: Some(content),
                end_of_document: index + 1 == count,
                ..chunk(seq, "")
            };
            ingest.chunk(piece).await.unwrap();
            if flush {
                ingest.flush().await;
            }
        }
    }
    (session, ingest.finish().await.unwrap().unwrap())
}

/// Holds the law for some documents: digest, tokens and what the adapter makes of a prompt.
async fn holds(world: &World, documents: Documents, strategy: v1::Strategy) {
    let told = format!("{documents:?}");
    let (whole, pieces): (Vec<_>, Vec<_>) = documents.into_iter().unzip();
    let whole = whole.into_iter().map(|content| vec![(content, false)]);
    let (once, want) = tell(world, whole.collect(), strategy).await;
    let (cut, got) = tell(world, pieces, strategy).await;
    assert_eq!(
        (got.state_digest, got.tokens),
        (want.state_digest, want.tokens),
        "{told}"
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
        "{told}"
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
    documents: &BoxedStrategy<Documents>,
    cases: u32,
    strategy: v1::Strategy,
) {
    let mut runner = TestRunner::new(Config {
        failure_persistence: None,
        ..Config::default()
    });
    for _ in 0..cases {
        let documents = documents.new_tree(&mut runner).unwrap().current();
        if !documents.is_empty() {
            holds(world, documents, strategy).await;
        }
    }
}

/// Texts that a window of the tiny model's context holds, a token for each byte.
fn short_texts() -> BoxedStrategy<Documents> {
    let short = testkit::text().prop_map(|mut text| {
        text.truncate(text.floor_char_boundary(500));
        text
    });
    texts(short.boxed())
}

#[tokio::test(flavor = "multi_thread")]
async fn any_chunks_and_flushes_give_the_state_of_one_call() {
    let world = World::tiny().await;
    let texts = texts(testkit::text().boxed());
    law(&world, &texts, 24, v1::Strategy::Parallel).await;
    law(&world, &texts, 12, v1::Strategy::Sequential).await;
    law(&world, &short_texts(), 12, v1::Strategy::Concat).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn token_ids_keep_the_law_as_texts_do() {
    let world = World::tiny().await;
    for strategy in [
        v1::Strategy::Parallel,
        v1::Strategy::Sequential,
        v1::Strategy::Concat,
    ] {
        law(&world, &token_ids(), 6, strategy).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_that_a_quiet_session_publishes_by_itself_change_nothing() {
    let world = World::tiny_with(|config| config.ingest.idle_publish_ms = 1).await;
    let texts = texts(testkit::text().boxed());
    law(&world, &texts, 12, v1::Strategy::Parallel).await;
    law(&world, &texts, 6, v1::Strategy::Sequential).await;
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
    law(&world, &texts(text.boxed()), 3, v1::Strategy::Parallel).await;
}
