//! The forward's laws, bit for bit: a row in a batch is the row alone, decode is prefill, a window cut
//! anywhere is the window at once, and without a core nothing is added.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "support/gguf.rs"]
mod gguf;

use std::ops::Range;

use candle_core::{Tensor, quantized::GgmlDType};
use generator::{Adapter, Core, Site, SiteId, Strategy, Window};
use lm::{Activations, KvCache, Lm, LoadOptions, Row, TokenId, Windows};
use proptest::prelude::*;
use testkit::{Form, GeneratorSpec, Random, TinySpec, cut, cuts, tiny_base, tiny_generator};

const BLOCK: usize = 4;
const BLOCKS_PER_ROW: usize = 12;

/// A tiny decoder with sites in the middle of it and of its layers.
fn model(
    architecture: &'static str,
    form: Form,
    modules: Vec<&'static str>,
    layers: Option<Vec<usize>>,
) -> Lm {
    let dir = tempfile::tempdir().unwrap();
    let base = TinySpec {
        architecture,
        layers: 3,
        sliding_window: (architecture == "mistral").then_some(7),
        ..TinySpec::default()
    };
    tiny_base(&dir.path().join("base"), &base);
    let spec = GeneratorSpec {
        form,
        modules,
        layers,
        ..GeneratorSpec::default()
    };
    tiny_generator(&dir.path().join("generator"), &base, &spec);
    let mut lm = Lm::load(&dir.path().join("base"), LoadOptions::default()).unwrap();
    lm.attach_generator(&dir.path().join("generator")).unwrap();
    lm
}

/// A decoder with weights in this format, and activations in int8.
fn rounding_model(format: GgmlDType, form: Form, modules: Vec<&'static str>) -> Lm {
    let dir = tempfile::tempdir().unwrap();
    let base = TinySpec {
        layers: 3,
        hidden: 64,
        intermediate: 96,
        ..TinySpec::default()
    };
    tiny_base(dir.path(), &base);
    let path = dir.path().join("model.gguf");
    gguf::write_gguf(&path, &base, &gguf::tensors(dir.path()), format, &[]);
    // Of whole blocks of 32, so that the sites' maps and dense cores round, too.
    let spec = GeneratorSpec {
        form,
        modules,
        r1: 64,
        r2: 32,
        rank: 32,
        ..GeneratorSpec::default()
    };
    tiny_generator(&dir.path().join("generator"), &base, &spec);
    let options = LoadOptions {
        activations: Activations::Int8,
        ..LoadOptions::default()
    };
    let mut lm = Lm::load(&path, options).unwrap();
    assert!(lm.head().rounds_activations());
    lm.attach_generator(&dir.path().join("generator")).unwrap();
    assert!(lm.generator().unwrap().sites().iter().all(Site::rounds));
    lm
}

fn models() -> Vec<Lm> {
    vec![
        rounding_model(
            GgmlDType::Q4_1,
            Form::Associative,
            vec!["down_proj", "v_proj"],
        ),
        rounding_model(GgmlDType::Q8_0, Form::Published, vec!["q_proj", "o_proj"]),
        model("llama", Form::Associative, vec!["down_proj"], None),
        model(
            "mistral",
            Form::Published,
            vec!["o_proj", "down_proj"],
            None,
        ),
        model(
            "qwen2",
            Form::Associative,
            vec!["q_proj", "up_proj"],
            Some(vec![0, 1]),
        ),
        model(
            "qwen3",
            Form::Published,
            vec!["k_proj", "v_proj", "gate_proj"],
            Some(vec![1]),
        ),
    ]
}

fn random_tokens(seed: u64, count: usize) -> Vec<TokenId> {
    let mut random = Random::new(seed);
    (0..count)
        .map(|_| TokenId(random.below(288) as u32))
        .collect()
}

fn core(lm: &Lm, seed: u64) -> Core {
    let state = lm
        .encode(
            &random_tokens(seed, 19),
            Strategy::Parallel,
            Windows::Fixed(8),
        )
        .unwrap();
    lm.generator().unwrap().read_out(&state).unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor
        .flatten_all()
        .unwrap()
        .to_vec1::<f32>()
        .unwrap()
        .into_iter()
        .map(f32::to_bits)
        .collect()
}

/// All sums of a window.
fn sums(lm: &Lm, window: &Window) -> Vec<Vec<u32>> {
    let sites = 0..lm.generator().unwrap().sites().len();
    sites
        .flat_map(|site| {
            let (s, g) = window.sums(site).unwrap();
            [bits(s), g.map(bits).unwrap_or_default()]
        })
        .collect()
}

/// What a row of a batch is like.
#[derive(Clone, Debug)]
struct Spec {
    /// Tokens already in the cache, and tokens of the row.
    before: usize,
    len: usize,
    core: Option<usize>,
    scale: f32,
    writes: bool,
    logits: usize,
}

fn spec() -> impl Strategy_<Value = Spec> {
    let scale = prop_oneof![Just(1.0_f32), Just(0.4), Just(0.0)];
    (
        0_usize..12,
        1_usize..12,
        prop::option::of(0_usize..2),
        scale,
        any::<bool>(),
        0_usize..12,
    )
        .prop_map(|(before, len, core, scale, writes, logits)| Spec {
            before,
            len,
            core,
            scale,
            writes,
            logits: logits.min(len),
        })
}

use proptest::strategy::Strategy as Strategy_;

/// Runs the rows, all in one forward or each in its own, and returns each one's logits and sums.
fn run(lm: &Lm, specs: &[Spec], cores: &[Core], together: bool) -> Vec<(Vec<u32>, Vec<Vec<u32>>)> {
    let kv = KvCache::new(lm.config(), specs.len() * BLOCKS_PER_ROW, BLOCK).unwrap();
    let tokens: Vec<_> = (0..specs.len())
        .map(|row| random_tokens(row as u64, specs[row].before + specs[row].len))
        .collect();
    // Blocks of different rows alternate, last ones first.
    let count = (specs.len() * BLOCKS_PER_ROW) as u32;
    let blocks: Vec<Vec<u32>> = (0..specs.len())
        .map(|row| {
            (0..BLOCKS_PER_ROW)
                .map(|i| count - 1 - (i * specs.len() + row) as u32)
                .collect()
        })
        .collect();
    let mut windows: Vec<_> = specs
        .iter()
        .map(|spec| {
            spec.writes
                .then(|| lm.generator().unwrap().new_window().unwrap())
        })
        .collect();
    let vocab = lm.config().vocab;

    let mut logits = vec![Vec::new(); specs.len()];
    for second in [false, true] {
        let mut rows = Vec::new();
        for (index, (spec, window)) in specs.iter().zip(&mut windows).enumerate() {
            let range = if second {
                spec.before..spec.before + spec.len
            } else {
                0..spec.before
            };
            if range.is_empty() {
                continue;
            }
            let row = Row {
                position: range.start,
                tokens: &tokens[index][range],
                blocks: &blocks[index],
                core: spec.core.map(|core| &cores[core]),
                scale: spec.scale,
                window: window.as_mut(),
                lookahead: None,
                // The prefix of a row that later wants logits has to fill all layers' caches.
                logits: if second {
                    spec.logits
                } else {
                    usize::from(spec.logits > 0)
                },
            };
            rows.push((index, row));
        }
        let group = if second && together {
            rows.len().max(1)
        } else {
            1
        };
        while !rows.is_empty() {
            let (indices, mut batch): (Vec<_>, Vec<_>) =
                rows.drain(..group.min(rows.len())).unzip();
            let output = lm.forward(&mut batch, &kv).unwrap().logits;
            if let Some(output) = output.filter(|_| second) {
                let mut all = bits(&output);
                assert_eq!(
                    all.len(),
                    indices
                        .iter()
                        .map(|&i| specs[i].logits * vocab)
                        .sum::<usize>()
                );
                for index in indices {
                    logits[index] = all.drain(..specs[index].logits * vocab).collect();
                }
            }
        }
    }
    let sums = windows
        .iter()
        .map(|window| window.as_ref().map(|w| sums(lm, w)).unwrap_or_default());
    logits.into_iter().zip(sums).collect()
}

#[test]
fn a_row_in_a_batch_is_the_row_alone() {
    for lm in models() {
        let cores = [core(&lm, 77), core(&lm, 78)];
        proptest!(ProptestConfig::with_cases(24), |(specs in prop::collection::vec(spec(), 1..6))| {
            let (batched, alone) = (run(&lm, &specs, &cores, true), run(&lm, &specs, &cores, false));
            for (index, (batched, alone)) in batched.iter().zip(&alone).enumerate() {
                prop_assert!(batched == alone, "row {index} of {specs:?}");
            }
        });
    }
}

#[test]
fn decode_is_prefill_and_a_window_in_pieces_is_the_window_at_once() {
    let whole = random_tokens(5, 33);
    for lm in models() {
        let cores = [core(&lm, 77)];
        // Logits of all tokens, and the sums of a window that they write into.
        let read = |pieces: &[&[TokenId]], core: Option<&Core>, known: &[bool], wanted: bool| {
            let kv = KvCache::new(lm.config(), BLOCKS_PER_ROW, BLOCK).unwrap();
            let blocks: Vec<u32> = (0..BLOCKS_PER_ROW as u32).rev().collect();
            let mut window = lm.generator().unwrap().new_window().unwrap();
            let (mut position, mut logits) = (0, Vec::new());
            for (index, tokens) in pieces
                .iter()
                .enumerate()
                .filter(|(_, piece)| !piece.is_empty())
            {
                let end = position + tokens.len();
                let row = Row {
                    tokens,
                    position,
                    blocks: &blocks,
                    core,
                    scale: 1.0,
                    window: Some(&mut window),
                    lookahead: whole
                        .get(end)
                        .copied()
                        .filter(|_| known[index % known.len()]),
                    logits: if wanted { tokens.len() } else { 0 },
                };
                let output = lm.forward(&mut [row], &kv).unwrap().logits;
                logits.extend(output.iter().flat_map(bits));
                position = end;
            }
            (logits, sums(&lm, &window))
        };
        for core in [None, Some(&cores[0])] {
            let (logits, written) = read(&[&whole], core, &[false], true);
            assert_eq!(logits.len(), whole.len() * lm.config().vocab);
            let (none, fast) = read(&[&whole], core, &[false], false);
            assert!(
                none.is_empty() && fast == written,
                "rows that only write stop early"
            );
            proptest!(ProptestConfig::with_cases(16), |(cuts in cuts(), known in prop::collection::vec(any::<bool>(), 1..8))| {
                let pieces = cut(&whole, &cuts);
                let (pieced, sums) = read(&pieces, core, &known, true);
                prop_assert!(pieced == logits, "logits after {cuts:?}");
                prop_assert!(sums == written, "sums after {cuts:?}, {known:?}");
                let (_, sums) = read(&pieces, core, &known, false);
                prop_assert!(sums == written, "sums of a row that only writes after {cuts:?}, {known:?}");
            });
        }
    }
}

#[test]
fn a_core_in_8_bits_is_smaller_and_comes_back_from_its_bytes_bit_for_bit() {
    let lm = rounding_model(GgmlDType::Q4_1, Form::Associative, vec!["down_proj"]);
    let generator = lm.generator().unwrap();
    let core = core(&lm, 77);
    // 64 x 32 codes and a scale for each 32 of them, at each of three sites.
    assert_eq!(core.bytes(), 3 * (64 * 32 + 64 * 4));
    assert_eq!(core.bytes(), generator.core_bytes());
    let mut bytes = Vec::new();
    core.write(&mut bytes).unwrap();
    let mut back = Core::read(&mut bytes.as_slice()).unwrap();
    generator.check_core(&back).unwrap();
    let tokens = random_tokens(9, 21);
    let logits = |core| bits(&lm.logits(&tokens, Some(core), 1.0).unwrap());
    assert_eq!(logits(&back), logits(&core));
    // What is served is what is exported.
    let [whole, exported] = [core.matrix(0), back.matrix(0)].map(|n| n.unwrap().unwrap());
    assert_eq!(
        (whole.dims(), bits(&whole)),
        (&[64, 32][..], bits(&exported))
    );
    let weight = generator.delta_weight(0, &core).unwrap();
    let size = weight.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>();
    assert!(size.unwrap() > 0.0);
    assert!(
        back.scrub()
            && bits(&back.matrix(0).unwrap().unwrap())
                .iter()
                .all(|&b| b == 0)
    );
    for cut in [1, bytes.len() / 2, bytes.len() - 1] {
        assert!(Core::read(&mut &bytes[..cut]).is_err());
    }
}

#[test]
fn without_a_core_or_with_scale_zero_a_row_is_the_bare_model() {
    let tokens = random_tokens(9, 21);
    for lm in models() {
        let core = core(&lm, 77);
        let empty = lm
            .generator()
            .unwrap()
            .read_out(&lm.generator().unwrap().new_state().unwrap())
            .unwrap();
        let bare = bits(&lm.logits(&tokens, None, 1.0).unwrap());
        assert!(
            bits(&lm.logits(&tokens, Some(&core), 0.0).unwrap()) == bare,
            "scale 0"
        );
        assert!(
            bits(&lm.logits(&tokens, Some(&empty), 1.0).unwrap()) == bare,
            "an empty state"
        );
        assert!(
            bits(&lm.logits(&tokens, Some(&core), 1.0).unwrap()) != bare,
            "a core changes logits"
        );
    }
}

#[test]
fn windows_read_together_are_windows_read_alone() {
    let context = random_tokens(3, 61);
    for lm in models() {
        let together = lm
            .encode(&context, Strategy::Parallel, Windows::Fixed(8))
            .unwrap();
        let mut alone = lm.generator().unwrap().new_state().unwrap();
        for window in context.chunks(8) {
            alone
                .add(
                    &lm.encode(window, Strategy::Concat, Windows::Fixed(1))
                        .unwrap(),
                    1.0,
                )
                .unwrap();
        }
        for site in 0..lm.generator().unwrap().sites().len() {
            assert_eq!(
                bits(together.sums(site).unwrap().0),
                bits(alone.sums(site).unwrap().0)
            );
        }
    }
}

/// A low-rank delta at every linear that takes or gives what its factors do.
struct Everywhere {
    a: Tensor,
    b: Tensor,
}

impl Adapter for Everywhere {
    fn delta(
        &self,
        _: SiteId,
        x: &Tensor,
        _: &[(usize, Range<usize>)],
    ) -> Result<Option<Tensor>, generator::Error> {
        let ((_, input), (_, takes)) = (x.dims2()?, self.a.dims2()?);
        if input != takes {
            return Ok(None);
        }
        let c = kernels::linear_trained(x, &self.a)?; // [T, r]
        Ok(Some(kernels::linear_trained(&c, &self.b)?)) // [T, Dout]
    }
}

#[test]
fn rows_under_an_adapter_are_the_differentiable_forward_however_they_are_cut() {
    let lm = model("llama", Form::Associative, vec!["down_proj"], None);
    let (hidden, wide) = (lm.config().hidden, lm.config().intermediate);
    let mut random = Random::new(5);
    // Only down_proj takes so many.
    let adapter = Everywhere {
        a: random.tensor(&[3, wide], 0.0, 0.3),
        b: random.tensor(&[hidden, 3], 0.0, 0.3),
    };
    let tokens: Vec<TokenId> = (0..13).map(|n| TokenId(3 + n * 5 % 40)).collect();
    let whole = lm
        .differentiable(&[(&tokens, tokens.len())], Some(&adapter))
        .unwrap()
        .unwrap();
    let want = lm.head().forward(&whole).unwrap(); // [T, V]
    let want = want.to_vec2::<f32>().unwrap();
    for cut in [1, 5, 12] {
        let kv = KvCache::new(lm.config(), BLOCKS_PER_ROW, BLOCK).unwrap();
        let blocks: Vec<u32> = (0..BLOCKS_PER_ROW as u32).rev().collect();
        let mut found = Vec::new();
        for span in [0..cut, cut..tokens.len()] {
            let mut rows = [Row {
                tokens: &tokens[span.clone()],
                position: span.start,
                blocks: &blocks,
                core: None,
                scale: 1.0,
                window: None,
                lookahead: None,
                logits: span.len(),
            }];
            let output = lm.adapted(&mut rows, &kv, &adapter).unwrap();
            found.extend(output.logits.unwrap().to_vec2::<f32>().unwrap());
        }
        assert_eq!(found, want, "{cut}");
    }
    let bare = lm.logits(&tokens, None, 1.0).unwrap();
    assert_ne!(bare.to_vec2::<f32>().unwrap(), want);
}
