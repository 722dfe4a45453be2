//! Tokens per second of the default model: prefill, ingest and decode, bare and with distinct imprints.
//!
//! `cargo bench -p lm`. Ingest beside a prefill of the same tokens is the figure to watch (at most 1.15x).

use std::{hint::black_box, time::Duration};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use generator::{Core, Strategy};
use lm::{KvCache, Lm, LoadOptions, Row, TokenId, Windows};

const BLOCK: usize = 32;

fn tokens(seed: usize, count: usize) -> Vec<TokenId> {
    (0..count)
        .map(|i| TokenId(((i * 7919 + seed * 104_729) % 40_000 + 100) as u32))
        .collect()
}

fn row<'a>(
    tokens: &'a [TokenId],
    position: usize,
    blocks: &'a [u32],
    core: Option<&'a Core>,
) -> Row<'a> {
    Row {
        tokens,
        position,
        blocks,
        core,
        scale: 1.0,
        window: None,
        lookahead: None,
        logits: 1,
    }
}

fn forward(c: &mut Criterion) {
    let mut lm =
        Lm::load(&testkit::smollm2_gguf(), LoadOptions::default()).expect("the default model");
    let generator = testkit::repository_root().join("models/smollm2-135m-instruct");
    lm.attach_generator(&generator)
        .expect("the default generator");
    let generator = lm.generator().expect("just attached");
    let kv = KvCache::new(lm.config(), 8 * 16, BLOCK).expect("a cache");
    let blocks: Vec<Vec<u32>> = (0..8)
        .map(|row| (row * 16..row * 16 + 16).collect())
        .collect();

    let mut group = c.benchmark_group("smollm2");
    group
        .sample_size(10)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(4));
    for count in [256, 512] {
        let prompt = tokens(1, count);
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(format!("prefill/{count}"), |b| {
            b.iter(|| {
                black_box(
                    lm.forward(&mut [row(&prompt, 0, &blocks[0], None)], &kv)
                        .expect("a forward"),
                )
            });
        });
    }
    let context = tokens(2, 256);
    group.throughput(Throughput::Elements(256));
    group.bench_function("ingest/256", |b| {
        b.iter(|| {
            let mut window = generator.new_window().expect("a window");
            let row = Row {
                window: Some(&mut window),
                logits: 0,
                ..row(&context, 0, &blocks[0], None)
            };
            lm.forward(&mut [row], &kv).expect("a forward");
            black_box(window.tokens())
        });
    });

    let cores: Vec<Core> = (0..8)
        .map(|seed| {
            let state = lm
                .encode(&tokens(seed, 128), Strategy::Parallel, Windows::Fixed(256))
                .expect("a state");
            generator.read_out(&state).expect("a core")
        })
        .collect();
    for (row, blocks) in blocks.iter().enumerate() {
        lm.forward(&mut [self::row(&tokens(row, 128), 0, blocks, None)], &kv)
            .expect("a prefill");
    }
    for batch in [1, 8] {
        for adapted in [false, true] {
            group.throughput(Throughput::Elements(batch as u64));
            group.bench_function(
                format!("decode/{batch}{}", if adapted { " imprinted" } else { "" }),
                |b| {
                    let next = tokens(3, batch);
                    b.iter(|| {
                        let rows = (0..batch).map(|i| {
                            row(
                                &next[i..=i],
                                128,
                                &blocks[i],
                                Some(&cores[i]).filter(|_| adapted),
                            )
                        });
                        let mut rows: Vec<_> = rows.collect();
                        black_box(lm.forward(&mut rows, &kv).expect("a forward"))
                    });
                },
            );
        }
    }
    group.finish();
}

criterion_group!(benches, forward);
criterion_main!(benches);
