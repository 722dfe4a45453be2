//! Reference vectors: the first generator, which lies beside them, on the real model, told through the engine.
//!
//! `streams.safetensors` beside the reference vectors holds logits of a query under documents of several windows and a tail: each
//! alone, both, and the first as far as a flush saw it. The log-probabilities of the query's own tokens are compared.

use std::collections::HashMap;

use candle_core::{Device, Tensor, safetensors};
use engine::{
    Activations, Chosen, Command, Config, Engine, Event, RequestId, SessionId, Strategy, TenantId,
    TokenId,
};

use crate::support::{failures, forget, fork, ingest, publish};

/// Largest difference of a log-probability, in nats.
const TOLERANCE: f64 = 3e-4;

struct Real(Engine);

impl Real {
    fn run(&mut self, commands: impl IntoIterator<Item = Command>) -> Vec<Event> {
        for command in commands {
            self.0.push(command).expect("the queue has room");
        }
        let mut events = Vec::new();
        while !self.0.idle() {
            self.0
                .step(std::time::Instant::now, &mut events)
                .expect("the engine is sound");
        }
        assert_eq!(failures(&events), []);
        events
    }

    /// Log-probabilities of the last of the query's tokens, each given those before it.
    fn score(&mut self, session: u64, query: &[TokenId], last: usize) -> Vec<f64> {
        let (prompt, continuation) = query.split_at(query.len() - last);
        let events = self.run([Command::Score {
            request: RequestId(1),
            tenant: TenantId(0),
            session: Some(SessionId(session)),
            adapter_scale: 1.0,
            chosen: Chosen::default(),
            prompt: prompt.to_vec(),
            continuations: vec![continuation.to_vec()],
        }]);
        match &events[..] {
            [Event::Scored { scores, .. }] => scores
                .iter()
                .flatten()
                .map(|&(_, logprob)| f64::from(logprob))
                .collect(),
            _ => panic!("{events:?}"),
        }
    }
}

fn tokens(vectors: &HashMap<String, Tensor>, name: &str) -> Vec<TokenId> {
    let ids: Vec<i64> = vectors[name].to_vec1().expect("ids");
    ids.into_iter()
        .map(|id| TokenId(u32::try_from(id).expect("an id")))
        .collect()
}

/// Log-probabilities of the query's last tokens by logits [last + 1, V] of its last places.
fn expected(vectors: &HashMap<String, Tensor>, name: &str, query: &[TokenId]) -> Vec<f64> {
    let logits: Vec<Vec<f32>> = vectors[&format!("{name}.logits")]
        .to_vec2()
        .expect("logits");
    let wanted = &query[query.len() + 1 - logits.len()..];
    let logprob = |(row, token): (&Vec<f32>, &TokenId)| {
        let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
        f64::from(row[token.0 as usize]) - sum.ln()
    };
    logits.iter().zip(wanted).map(logprob).collect()
}

#[test]
fn golden_streams_told_through_the_engine_agree() {
    let Some(folder) = testkit::associative_dir() else {
        return;
    };
    let vectors = safetensors::load(folder.join("streams.safetensors"), &Device::Cpu)
        .expect("reference vectors");
    let config = Config {
        kv_blocks: 64,
        // The vectors are of the dequantised model.
        activations: Activations::F32,
        ..Config::default()
    };
    let mut real = Real(
        Engine::load(&testkit::smollm2_gguf(), Some(&folder), config).expect("the model loads"),
    );
    let [a, b, query] = ["document.a", "document.b", "query"].map(|name| tokens(&vectors, name));
    let last = query.len().min(vectors["a.logits"].dims()[0]) - 1;
    let flush = vectors["flush.length"].to_vec1::<i64>().expect("a length")[0] as usize;
    let window = vectors["window"].to_vec1::<i64>().expect("a length")[0] as usize;

    let mut largest = Vec::new();
    let mut check = |real: &mut Real, session: u64, name: &'static str| {
        let pairs = real
            .score(session, &query, last)
            .into_iter()
            .zip(expected(&vectors, name, &query));
        largest.push((
            name,
            pairs
                .map(|(got, want)| (got - want).abs())
                .fold(0.0, f64::max),
        ));
    };
    real.run([
        Command::Open {
            session: SessionId(1),
            tenant: TenantId(0),
            strategy: Strategy::Parallel,
            window,
        },
        ingest(1, 1, 1, &a[..13], false),
        ingest(1, 2, 1, &a[13..flush - 4], false),
        // A flush: the version holds a held-back end of 4 tokens.
        publish(1, 2, &a[flush - 4..flush]),
    ]);
    check(&mut real, 1, "flush");
    real.run([ingest(1, 3, 1, &a[flush - 4..], true)]);
    check(&mut real, 1, "a");
    real.run([ingest(1, 4, 2, &b, true)]);
    check(&mut real, 1, "ab");
    real.run([fork(1, 2), forget(1, 1), forget(2, 2)]);
    check(&mut real, 1, "b");
    check(&mut real, 2, "a");
    for (name, error) in &largest {
        println!("streams through the engine: {name}: largest difference {error:.2e} nats");
    }
    assert!(
        largest.iter().all(|&(_, error)| error < TOLERANCE),
        "{largest:?}"
    );
}
