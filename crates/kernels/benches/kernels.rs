//! How fast the kernels are, beside candle's f32 matmul of the same shape and beside the roofline.
//!
//! `cargo bench -p kernels` prints elements a second, an element being one multiply-add (two operations).
//! Shapes are those of SmolLM2-135M; `token` is all 211 matrices of it, one row: what a decode step pays.
#![allow(
    missing_docs,
    reason = "criterion's macros make undocumented functions"
)]
#![expect(clippy::unwrap_used, reason = "a bench may stop")]

use std::hint::black_box;

use candle_core::{Device, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kernels::{
    AttentionRow, CoreRows, CoreView, Linear, WeightFormat, accumulate_outer, apply_cores,
    paged_attention, ridge, rms_norm, silu_mul,
};

fn random(shape: impl Into<candle_core::Shape>) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
}

/// A matrix with bytes that are a valid number everywhere: the time does not depend on them.
fn linear(format: WeightFormat, out: usize, width: usize) -> Linear {
    let bytes = format.row_bytes(width).unwrap() * out;
    Linear::new(format, &vec![0x11; bytes], out, width).unwrap()
}

/// The same for activations in int8.
fn rounding(format: WeightFormat, out: usize, width: usize) -> Linear {
    let bytes = format.row_bytes(width).unwrap() * out;
    Linear::with_int8_activations(format, &vec![0x11; bytes], out, width).unwrap()
}

fn products(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("linear");
    let (out, width) = (1536, 576);
    for t in [1, 2, 4, 8, 32, 256] {
        group.throughput(Throughput::Elements((t * out * width) as u64));
        let x = random((t, width));
        for format in [
            WeightFormat::F32,
            WeightFormat::Q4_1,
            WeightFormat::Q8_0,
            WeightFormat::Q6K,
            WeightFormat::F16,
        ] {
            if width % format.block_weights() != 0 {
                continue;
            }
            let linear = linear(format, out, width);
            group.bench_function(BenchmarkId::new(format!("{format:?}"), t), |b| {
                b.iter(|| linear.forward(black_box(&x)).unwrap())
            });
            let rounding = rounding(format, out, width);
            if rounding.rounds_activations() {
                group.bench_function(BenchmarkId::new(format!("{format:?} x int8"), t), |b| {
                    b.iter(|| rounding.forward(black_box(&x)).unwrap())
                });
            }
        }
        let w = random((width, out));
        group.bench_function(BenchmarkId::new("candle matmul", t), |b| {
            b.iter(|| black_box(&x).matmul(&w).unwrap())
        });
    }
    group.finish();
}

fn token(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("token");
    let shapes = [
        (576, 576),
        (192, 576),
        (192, 576),
        (576, 576),
        (1536, 576),
        (1536, 576),
        (576, 1536),
    ];
    let mut all: Vec<Linear> = (0..30)
        .flat_map(|_| shapes)
        .map(|(out, width)| linear(WeightFormat::Q4_1, out, width))
        .collect();
    all.push(linear(WeightFormat::Q8_0, 49152, 576));
    for t in [1usize, 2, 4, 8, 256] {
        let (narrow, wide) = (random((t, 576)), random((t, 1536)));
        // No logits are asked of a prefill but of its last row.
        let matrices = if t == 256 { &all[..210] } else { &all[..] };
        group.throughput(Throughput::Elements(t as u64));
        group.bench_function(BenchmarkId::new("all matrices", t), |b| {
            b.iter(|| {
                for linear in matrices {
                    black_box(
                        linear
                            .forward(if linear.in_features() == 576 {
                                &narrow
                            } else {
                                &wide
                            })
                            .unwrap(),
                    );
                }
            });
        });
    }
    group.finish();
}

fn attention(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention");
    let (k, v) = (random((128, 16, 3, 64)), random((128, 16, 3, 64)));
    let blocks: Vec<u32> = (0..128).rev().collect();
    for (len, position) in [(256, 0), (1, 255), (1, 1023)] {
        let keys: usize = (0..len).map(|i| position + i + 1).sum();
        group.throughput(Throughput::Elements((2 * keys * 9 * 64) as u64));
        let q = random((len, 9, 64));
        let row = [AttentionRow {
            start: 0,
            len,
            position,
            blocks: &blocks,
        }];
        group.bench_function(format!("{len} queries behind {position} keys"), |b| {
            b.iter(|| paged_attention(black_box(&q), &k, &v, &row, 0.125, None).unwrap());
        });
    }
    group.finish();
}

fn imprint(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("imprint");
    let r = 256;
    let (a, n, k) = (random((256, r)), random((r, r)), random((256, r)));
    group.throughput(Throughput::Elements((256 * r * r) as u64));
    group.bench_function("apply_cores, 256 rows of one core", |b| {
        let rows = [CoreRows {
            start: 0,
            len: 256,
            core: CoreView::Dense(&n),
            scale: 1.0,
        }];
        b.iter(|| apply_cores(black_box(&a), &rows, r).unwrap());
    });
    let acc = random((r, r));
    let gram = random((r, r));
    group.bench_function("accumulate_outer, 256 tokens, both sums", |b| {
        b.iter(|| accumulate_outer(&[(&acc, &k), (&gram, &a)], black_box(&a), 0..256).unwrap())
    });
    let g = a.t().unwrap().matmul(&a).unwrap();
    group.throughput(Throughput::Elements((r * r * r / 6 + r * r * r) as u64));
    group.bench_function("ridge, 256 keys and values, one thread", |b| {
        b.iter(|| ridge(black_box(&g), 1.0, &[&acc]).unwrap().unwrap())
    });
    group.throughput(Throughput::Elements((8 * r * r) as u64));
    let cores: Vec<_> = (0..8).map(|_| random((r, r))).collect();
    group.bench_function("apply_cores, 8 rows of 8 cores", |b| {
        let rows: Vec<_> = cores
            .iter()
            .enumerate()
            .map(|(start, n)| CoreRows {
                start,
                len: 1,
                core: CoreView::Dense(n),
                scale: 1.0,
            })
            .collect();
        let a = random((8, r));
        b.iter(|| apply_cores(black_box(&a), &rows, r).unwrap());
    });
    let rounded: Vec<_> = cores
        .iter()
        .map(|n| Linear::from_tensor(&n.t().unwrap()).unwrap().rounded())
        .collect();
    group.bench_function("apply_cores, 8 rows of 8 cores in 8 bits", |b| {
        let rows: Vec<_> = rounded
            .iter()
            .enumerate()
            .map(|(start, n)| CoreRows {
                start,
                len: 1,
                core: CoreView::Rounded(n),
                scale: 1.0,
            })
            .collect();
        let a = random((8, r));
        b.iter(|| apply_cores(black_box(&a), &rows, r).unwrap());
    });
    group.finish();
}

fn rows(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("rows");
    let (x, gate, up) = (random((256, 576)), random((256, 1536)), random((256, 1536)));
    group.throughput(Throughput::Elements(256 * 576));
    group.bench_function("rms_norm", |b| {
        b.iter(|| rms_norm(black_box(&x), None, 1e-5).unwrap())
    });
    group.throughput(Throughput::Elements(256 * 1536));
    group.bench_function("silu_mul", |b| {
        b.iter(|| silu_mul(black_box(&gate), &up).unwrap())
    });
    group.finish();
}

criterion_group!(all, products, token, attention, imprint, rows);
criterion_main!(all);
