//! What the shipped generator costs beside the base: writing a window, reading a core out, applying it.
//!
//! `cargo bench -p generator`. A window of the base takes a few hundred milliseconds on two cores; `cargo bench -p lm`
//! has that figure beside these.

use std::{hint::black_box, time::Duration};

use candle_core::{Device, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use generator::{BaseShape, Generator, SiteRows, Window, WriteRows};

/// Tokens of a window.
const WINDOW: usize = 256;

/// SmolLM2-135M.
const BASE: BaseShape = BaseShape {
    layers: 30,
    hidden: 576,
    intermediate: 1536,
    query: 576,
    key_value: 192,
    vocab: 49_152,
};

/// Values in -1 ... 1 without a pattern that matters, [rows, columns].
fn noise(seed: u32, rows: usize, columns: usize) -> Tensor {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let values: Vec<f32> = (0..rows * columns)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as f32 / u32::MAX as f32 * 2.0 - 1.0
        })
        .collect();
    Tensor::from_vec(values, (rows, columns), &Device::Cpu).expect("a tensor")
}

/// Writes a window of noise at every site.
fn write(generator: &Generator, x: &Tensor, h: &Tensor) -> Window {
    let mut window = generator.new_window().expect("a window");
    for (index, site) in generator.sites().iter().enumerate() {
        let rows = WriteRows {
            start: 0,
            len: WINDOW,
            position: 0,
            lookahead: None,
            window: &mut window,
        };
        site.write(index, x, h, h, &mut [rows])
            .expect("rows of a window");
    }
    window
}

fn generator(c: &mut Criterion) {
    in_profile(c, "all_sites", false);
    in_profile(c, "all_sites_in_8_bits", true);
}

fn in_profile(c: &mut Criterion, name: &str, rounds: bool) {
    let folder = testkit::repository_root().join("models/smollm2-135m-instruct");
    let generator = Generator::load(&folder, &BASE).expect("the shipped generator");
    let generator = generator.rounded(|_| rounds);
    let (x, h) = (
        noise(1, WINDOW, BASE.intermediate),
        noise(2, WINDOW, BASE.hidden),
    );
    let mut state = generator.new_state().expect("a state");
    state
        .add_window(&write(&generator, &x, &h), 1.0)
        .expect("a window of this generator");
    let core = generator.read_out(&state).expect("a core");

    let mut group = c.benchmark_group(name);
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    group.bench_function("write/256", |b| {
        b.iter(|| black_box(write(&generator, &x, &h)));
    });
    group.bench_function("read_out", |b| {
        b.iter(|| black_box(generator.read_out(&state).expect("a core")));
    });
    group.bench_function("delta/256", |b| {
        b.iter(|| {
            for (index, site) in generator.sites().iter().enumerate() {
                let rows = SiteRows {
                    start: 0,
                    len: WINDOW,
                    core: &core,
                    scale: 1.0,
                };
                black_box(site.delta(index, &x, &[rows]).expect("a core of this site"));
            }
        });
    });
}

criterion_group!(benches, generator);
criterion_main!(benches);
