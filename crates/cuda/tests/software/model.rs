//! The whole forward on the software device against `lm`'s, on tiny models: prefill, decode by graphs, ingest, cores, swaps.

use std::{collections::HashMap, path::Path};

use candle_core::DType;
use cuda::{
    Batch, Bucket, Capacity, Device, Error, Files, Form, GeneratorShape, Memory, Model, Place,
    Rows, Shape, Source, Sums, Write,
    check::Scale,
    ops::{Draw, Emitted, Heads},
    read_out::{ITERATIONS, Kind, ReadOut, Sites},
};
use generator::{Core, State};
use half::bf16;
use lm::{KvCache, Lm, LoadOptions, Row, TokenId};
use testkit::{
    Form as TinyForm, GeneratorSpec, TinySpec, relative_error_of, tiny_base, tiny_generator, values,
};

use crate::with_device;

/// bf16 activations through two layers.
const BF16: f64 = 2e-2;

struct Tiny {
    folder: tempfile::TempDir,
    lm: Lm,
    shape: Shape,
    generator: Option<GeneratorShape>,
}

fn tiny(architecture: &'static str, form: Option<TinyForm>) -> Tiny {
    let folder = tempfile::tempdir().unwrap();
    let spec = TinySpec {
        architecture,
        head_dim: Some(16),
        intermediate: 48,
        vocab: 96,
        context_length: 128,
        tied: architecture != "mistral",
        sliding_window: (architecture == "mistral").then_some(11),
        dtype: DType::BF16,
        ..TinySpec::default()
    };
    let base = folder.path().join("base");
    std::fs::create_dir(&base).unwrap();
    tiny_base(&base, &spec);
    let mut lm = Lm::load(&base, LoadOptions::default()).unwrap();
    let generator = form.map(|form| {
        let modules = if form == TinyForm::Published {
            vec!["o_proj", "down_proj"]
        } else {
            vec!["down_proj"]
        };
        let spec_of = GeneratorSpec {
            form,
            r1: 16,
            r2: 8,
            rank: 8,
            window: 64,
            modules: modules.clone(),
            ..GeneratorSpec::default()
        };
        let path = folder.path().join("generator");
        std::fs::create_dir(&path).unwrap();
        tiny_generator(&path, &spec, &spec_of);
        lm.attach_generator(&path).unwrap();
        let places = modules
            .iter()
            .map(|module| {
                if *module == "o_proj" {
                    Place::Output
                } else {
                    Place::Down
                }
            })
            .collect();
        let config = std::fs::read(path.join("adapter_config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        let scale = config["fastlora_alpha"].as_f64().unwrap() / 8.0;
        let form = if form == TinyForm::Published {
            Form::Published
        } else {
            Form::Associative
        };
        // The associative form's N is kept as it is: at these ranks that is smaller.
        let rank = if form == Form::Published { 8 } else { 0 };
        GeneratorShape {
            form,
            places,
            layers: None,
            r1: 16,
            r2: 8,
            rank,
            scale: scale as f32,
            gate: None,
        }
    });
    let config = lm.config();
    let shape = Shape {
        layers: config.layers,
        hidden: config.hidden,
        intermediate: config.intermediate,
        heads: Heads {
            queries: config.heads,
            keys: config.kv_heads,
            dim: config.head_dim,
        },
        vocab: config.vocab,
        eps: config.rms_norm_eps as f32,
        frequencies: config.rope_frequencies(),
        positions: 128,
        window: config.sliding_window.unwrap_or(0),
        tied: config.tied_embeddings,
        attention_bias: config.attention_bias,
        qk_norm: config.qk_norm,
    };
    Tiny {
        folder,
        lm,
        shape,
        generator,
    }
}

impl Tiny {
    fn on(&self, device: &Device) -> Model {
        let memory = Memory {
            cache_blocks: 24,
            block_size: 8,
            rows: 64,
            logits: 64,
            slots: 3,
            parts: 64,
        };
        self.with_memory(device, memory)
    }

    fn with_memory(&self, device: &Device, memory: Memory) -> Model {
        let files =
            |what: &str| Source::Files(Files::open(&self.folder.path().join(what)).unwrap());
        let base = files("base");
        match &self.generator {
            None => Model::load(device, self.shape.clone(), &base, None, memory),
            Some(generator) => Model::load(
                device,
                self.shape.clone(),
                &base,
                Some((generator.clone(), &files("generator"))),
                memory,
            ),
        }
        .unwrap()
    }

    /// Logits of the last `logits` tokens, as `lm` has them.
    fn expected(&self, tokens: &[u32], logits: usize, core: Option<&Core>) -> Vec<f64> {
        let kv = KvCache::new(self.lm.config(), 8, 16).unwrap();
        let (tokens, blocks) = (ids(tokens), (0..8).collect::<Vec<_>>());
        let row = Row {
            tokens: &tokens,
            position: 0,
            blocks: &blocks,
            core,
            scale: 1.0,
            window: None,
            lookahead: None,
            logits,
        };
        values(&self.lm.forward(&mut [row], &kv).unwrap().logits.unwrap())
    }
}

fn ids(tokens: &[u32]) -> Vec<TokenId> {
    tokens.iter().map(|token| TokenId(*token)).collect()
}

fn rows<'a>(tokens: &'a [u32], position: usize, blocks: &'a [u32], logits: usize) -> Rows<'a> {
    Rows {
        tokens,
        position,
        blocks,
        slot: None,
        scale: 1.0,
        lookahead: None,
        logits,
        draw: Some(Draw::greedy()),
    }
}

/// Runs rows and gives the logits that they want.
fn run(device: &Device, model: &Model, spans: &[Rows<'_>], writes: &[Write<'_>]) -> Vec<f64> {
    let mut batch = Batch::new(
        device,
        Capacity {
            rows: 64,
            sequences: 4,
            blocks: 12,
            splits: 1,
        },
        model.limits().heads,
    )
    .unwrap();
    batch.fill(device, spans, &model.limits()).unwrap();
    model.forward(&batch, writes).unwrap();
    model
        .logits(&batch)
        .unwrap()
        .into_iter()
        .map(f64::from)
        .collect()
}

fn text(seed: u32, len: u32) -> Vec<u32> {
    (0..len)
        .map(|i| (i * i * 7 + i * 13 + seed * 31) % 96)
        .collect()
}

#[test]
fn a_prompt_has_the_cpus_logits_on_every_architecture() {
    for architecture in ["llama", "mistral", "qwen2", "qwen3"] {
        let tiny = tiny(architecture, None);
        with_device(|device| {
            let model = tiny.on(device);
            let (a, b) = (text(1, 23), text(2, 9));
            // Two prompts in one batch, the first in blocks in disorder; then the first again in two chunks.
            let got = run(
                device,
                &model,
                &[rows(&a, 0, &[5, 2, 9], 23), rows(&b, 0, &[1, 0], 1)],
                &[],
            );
            let mut want = tiny.expected(&a, 23, None);
            want.extend(tiny.expected(&b, 1, None));
            let error = relative_error_of(&got, &want);
            assert!(error < BF16, "{architecture}: {error}");
            run(device, &model, &[rows(&a[..11], 0, &[7, 3, 4], 0)], &[]);
            let chunked = run(device, &model, &[rows(&a[11..], 11, &[7, 3, 4], 12)], &[]);
            let error = relative_error_of(&chunked, &got[11 * 96..23 * 96]);
            assert!(error < BF16, "{architecture} in chunks: {error}");
        });
    }
}

#[test]
fn a_decode_graph_goes_on_as_a_prompt_would() {
    let tiny = tiny("llama", Some(TinyForm::Associative));
    with_device(|device| {
        let model = tiny.on(device);
        let texts = [text(3, 17), text(4, 8), text(5, 30)];
        let blocks = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]];
        let prompts: Vec<_> = texts
            .iter()
            .zip(&blocks)
            .map(|(text, blocks)| rows(&text[..text.len() - 1], 0, blocks, 0))
            .collect();
        run(device, &model, &prompts, &[]);
        // Buckets of every size that a batch of three fits; all are captured before any runs.
        let mut buckets = [3, 4, 8].map(|size| Bucket::capture(&model, size, 12, 4).unwrap());
        for bucket in &mut buckets {
            let spans: Vec<_> = texts
                .iter()
                .zip(&blocks)
                .map(|(text, blocks)| rows(&text[text.len() - 1..], text.len() - 1, blocks, 1))
                .collect();
            bucket.batch.fill(device, &spans, &model.limits()).unwrap();
            bucket.launch().unwrap();
            let (logits, drawn) = (
                model.logits(&bucket.batch).unwrap(),
                model.drawn(&bucket.batch).unwrap().0,
            );
            for (i, text) in texts.iter().enumerate() {
                let got: Vec<f64> = logits[i * 96..(i + 1) * 96]
                    .iter()
                    .map(|x| f64::from(*x))
                    .collect();
                let error = relative_error_of(&got, &tiny.expected(text, 1, None));
                assert!(error < BF16, "row {i}: {error}");
                let largest = got.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                assert_eq!(
                    drawn[i] as usize,
                    got.iter().position(|x| *x == largest).unwrap()
                );
            }
        }
    });
}

#[test]
fn every_bucket_that_a_server_can_have_is_captured_and_runs() {
    let tiny = tiny("llama", Some(TinyForm::Published));
    with_device(|device| {
        let sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256];
        let parts = sizes.map(|size| size * cuda::splits_for(size, 2, 4));
        let memory = Memory {
            cache_blocks: 256,
            block_size: 8,
            rows: 256,
            logits: 256,
            slots: 3,
            parts: parts.into_iter().max().unwrap(),
        };
        let model = tiny.with_memory(device, memory);
        let buckets = sizes.map(|size| Bucket::capture(&model, size, 2, 4).unwrap());
        let tokens = text(1, 256);
        let blocks: Vec<[u32; 1]> = (0..256).map(|block| [block]).collect();
        let mut alone = Vec::new();
        for (size, mut bucket) in sizes.into_iter().zip(buckets) {
            // One row less than there is room for, beside as many cores as there are.
            let count = (size - 1).max(1);
            let spans: Vec<_> = (0..count)
                .map(|i| Rows {
                    slot: (i % 4 < 3).then_some(i as u32 % 4),
                    ..rows(&tokens[i..=i], 0, &blocks[i], 1)
                })
                .collect();
            bucket.batch.fill(device, &spans, &model.limits()).unwrap();
            bucket.launch().unwrap();
            let logits = model.logits_of(0..count).unwrap();
            // A row is the same in a graph of any size, whatever runs beside it.
            if alone.is_empty() {
                alone = logits[..96].to_vec();
            }
            assert!(alone.iter().all(|x| x.is_finite()));
            assert_eq!(logits[..96], alone, "{size}");
        }
    });
}

#[test]
fn greedy_tokens_are_the_cpus() {
    let tiny = tiny("llama", None);
    with_device(|device| {
        let model = tiny.on(device);
        let mut bucket = Bucket::capture(&model, 1, 12, 4).unwrap();
        let blocks = [3, 0, 4, 2];
        let mut told = text(6, 12);
        let mut twin = told.clone();
        run(device, &model, &[rows(&told[..11], 0, &blocks, 0)], &[]);
        let mut close = 0;
        for _ in 0..12 {
            let at = told.len() - 1;
            bucket
                .batch
                .fill(
                    device,
                    &[rows(&told[at..], at, &blocks, 1)],
                    &model.limits(),
                )
                .unwrap();
            bucket.launch().unwrap();
            let token = model.drawn(&bucket.batch).unwrap().0[0];
            let logits = tiny.expected(&twin, 1, None);
            let mut order: Vec<usize> = (0..96).collect();
            order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
            // Where the two first are nearer to each other than bf16 tells apart, either is right.
            let tied = logits[order[0]] - logits[order[1]] < 0.05;
            close += usize::from(tied);
            assert!(token as usize == order[0] || tied && token as usize == order[1]);
            told.push(token);
            twin.push(token);
        }
        assert!(close < 4);
    });
}

#[test]
fn a_model_whose_weights_stay_quantised_answers_as_with_the_same_weights_in_bf16() {
    let tiny = tiny("llama", None);
    // Each matrix has its own numbers, by its name; those of q, k and v are alike, of gate and up not.
    let blocks = |name: &str, len: usize| {
        let bits = if name.contains("up_proj") { 8 } else { 4 };
        let mut random = testkit::Random::new(name.bytes().map(u64::from).sum());
        let half = |x: f64| u32::from(half::f16::from_f64(x).to_bits());
        let scale = |_| half(0.02) | half(if bits == 4 { -0.15 } else { 0.0 }) << 16;
        cuda::Blocks {
            bits,
            codes: (0..len / 32 * bits)
                .map(|_| random.next_u64() as u32 & if bits == 4 { !0 } else { 0x0f0f_0f0f })
                .collect(),
            scales: (0..len / 32).map(scale).collect(),
        }
    };
    let quantised = |name: &str| name.ends_with("_proj.weight") && !name.contains("down");
    let values = move |name: &str, len: usize| {
        if quantised(name) {
            let of = blocks(name, len);
            return Ok(cuda::twin::narrow(&cuda::twin::dequantise(
                &of.codes, &of.scales, of.bits,
            )));
        }
        let gain = if name.contains("norm") { 1.0 } else { 0.0 };
        let mut random = testkit::Random::new(name.len() as u64);
        let value = |_| bf16::from_f64(gain + 0.1 * random.normal());
        Ok((0..len).map(value).collect())
    };
    let asked = move |name: &str, len: usize| Ok(quantised(name).then(|| blocks(name, len)));
    with_device(|device| {
        let memory = Memory {
            cache_blocks: 24,
            block_size: 8,
            rows: 64,
            logits: 64,
            slots: 1,
            parts: 64,
        };
        let load = |source| Model::load(device, tiny.shape.clone(), &source, None, memory).unwrap();
        let as_bf16 = load(Source::Asked(Box::new(values)));
        let as_it_is = load(Source::Quantised(Box::new(values), Box::new(asked)));
        let (long, short) = (text(1, 23), text(2, 5));
        // Many rows take the weights in bf16: the same bits. Few read them as they are.
        let blocks = [5, 2, 9];
        let prompt = rows(&long, 0, &blocks, 23);
        let want = run(device, &as_bf16, &[prompt], &[]);
        assert_eq!(run(device, &as_it_is, &[prompt], &[]), want);
        let prompt = rows(&short, 0, &blocks[..1], 5);
        let want = run(device, &as_bf16, &[prompt], &[]);
        let got = run(device, &as_it_is, &[prompt], &[]);
        let error = relative_error_of(&got, &want);
        assert!(error > 0.0 && error < BF16, "{error}");
        let mut bucket = Bucket::capture(&as_it_is, 2, 12, 4).unwrap();
        let next = rows(&short[4..], 4, &blocks[..1], 1);
        bucket
            .batch
            .fill(device, &[next], &as_it_is.limits())
            .unwrap();
        bucket.launch().unwrap();
        let logits = as_it_is.logits(&bucket.batch).unwrap();
        let logits: Vec<f64> = logits[..96].iter().map(|x| f64::from(*x)).collect();
        let error = relative_error_of(&logits, &got[4 * 96..]);
        assert!(error < BF16, "{error}");
    });
}

/// The sums of `tokens` as one window, on the device and by `lm`.
fn told(device: &Device, model: &Model, tiny: &Tiny, tokens: &[u32]) -> (Sums, State) {
    let generator = tiny.lm.generator().unwrap();
    let mut window = generator.new_window().unwrap();
    let kv = KvCache::new(tiny.lm.config(), 8, 16).unwrap();
    let (all, blocks) = (ids(tokens), (0..8).collect::<Vec<_>>());
    let row = Row {
        tokens: &all,
        position: 0,
        blocks: &blocks,
        core: None,
        scale: 1.0,
        window: Some(&mut window),
        lookahead: None,
        logits: 0,
    };
    tiny.lm.forward(&mut [row], &kv).unwrap();
    let mut state = generator.new_state().unwrap();
    state.add_window(&window, 1.0).unwrap();

    let associative = tiny.generator.as_ref().unwrap().form == Form::Associative;
    let sums = model.new_sums().unwrap();
    // The first token writes nothing where the form skips it, the last has no successor; the rest is told in two calls.
    let (cut, skip) = (tokens.len() / 2, usize::from(associative));
    let blocks = [20, 21, 22, 23, 19, 18];
    for (start, end) in [(0, cut), (cut, tokens.len())] {
        let lookahead = associative.then(|| tokens.get(end).copied()).flatten();
        let span = Rows {
            lookahead,
            ..rows(&tokens[start..end], start, &blocks, 0)
        };
        let first = if start == 0 { skip } else { 0 };
        let last = if associative && end == tokens.len() {
            end - start - 1
        } else {
            end - start
        };
        let write = Write {
            first,
            len: last - first,
            sums: &sums,
        };
        run(device, model, &[span], &[write]);
    }
    (sums, state)
}

#[test]
fn what_is_told_adds_up_to_the_cpus_sums_and_is_read_out_to_its_core() {
    for form in [TinyForm::Published, TinyForm::Associative] {
        let tiny = tiny("llama", Some(form));
        with_device(|device| {
            let model = tiny.on(device);
            let generator = tiny.generator.clone().unwrap();
            let (sums, state) = told(device, &model, &tiny, &text(7, 41));
            let count = tiny.lm.generator().unwrap().sites().len();
            let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
            let s = wide(sums.s.read().unwrap());
            let g = sums.g.as_ref().map(|g| wide(g.read().unwrap()));
            let mass = sums.mass.as_ref().map(|mass| mass.read().unwrap());
            assert_eq!(mass.is_some(), generator.form == Form::Published);
            for site in 0..count {
                // S is a sum of as many products as the mass: never larger.
                if let Some(mass) = &mass {
                    let norm = s[site * 128..(site + 1) * 128]
                        .iter()
                        .map(|x| x * x)
                        .sum::<f64>()
                        .sqrt();
                    assert!(norm < mass[site] && mass[site] < 41.0 * norm);
                }
                let (want_s, want_g) = state.sums(site).unwrap();
                let error = relative_error_of(&s[site * 128..(site + 1) * 128], &values(want_s));
                assert!(error < BF16, "{form:?}, S of site {site}: {error}");
                if let (Some(g), Some(want)) = (&g, want_g) {
                    let error = relative_error_of(&g[site * 256..(site + 1) * 256], &values(want));
                    assert!(error < BF16, "G of site {site}: {error}");
                }
            }

            // Read out into slot 1, and answered with: as the CPU's core answers, and not as the bare model does.
            let core = tiny.lm.generator().unwrap().read_out(&state).unwrap();
            let (kind, lambdas) = match generator.form {
                Form::Published => (Kind::Svd, Vec::new()),
                Form::Associative => (Kind::Ridge, vec![lambda(&tiny); count]),
            };
            let sites = Sites {
                count,
                r1: 16,
                r2: 8,
                rank: generator.rank,
            };
            let read_out = ReadOut::new(device, kind, sites, ITERATIONS, &lambdas).unwrap();
            let to = Emitted {
                slot: model.slots().unwrap().slot(1).unwrap(),
                offset: 0,
                site_size: generator.site_size(),
            };
            let floors = device.zeros(count).unwrap();
            let graph = {
                let read = || {
                    read_out.run(
                        device,
                        sums.s.view(),
                        sums.g.as_ref().map(|g| g.view()),
                        floors.view(),
                        &to,
                    )
                };
                read().unwrap();
                read_out.check().unwrap();
                device.capture(read).unwrap()
            };
            to.slot.clear(device).unwrap();
            graph.launch().unwrap();
            let prompt = text(8, 15);
            let spans = [
                Rows {
                    slot: Some(1),
                    ..rows(&prompt, 0, &[0, 1], 15)
                },
                Rows {
                    slot: Some(1),
                    scale: 0.5,
                    ..rows(&prompt[..3], 0, &[4, 5], 0)
                },
                rows(&prompt, 0, &[2, 3], 15),
            ];
            let got = run(device, &model, &spans, &[]);
            let (adapted, bare) = got.split_at(15 * 96);
            let (want, want_bare) = (
                tiny.expected(&prompt, 15, Some(&core)),
                tiny.expected(&prompt, 15, None),
            );
            let change = relative_error_of(&want, &want_bare);
            let error = relative_error_of(adapted, &want);
            assert!(
                error < 2.0 * BF16 && error < change / 3.0,
                "{form:?}: {error}, the core changes {change}"
            );
            assert!(relative_error_of(bare, &want_bare) < BF16);
        });
    }
}

/// The logits of the last tokens of a row that runs alone, with a core or into a window.
fn alone(
    lm: &Lm,
    kv: &KvCache,
    tokens: &[TokenId],
    (core, window): (Option<&Core>, Option<&mut generator::Window>),
    logits: usize,
) -> Option<candle_core::Tensor> {
    let row = Row {
        tokens,
        position: 0,
        blocks: &[0, 1],
        core,
        scale: 1.0,
        window,
        lookahead: None,
        logits,
    };
    lm.forward(&mut [row], kv).unwrap().logits
}

/// A golden case with weights that bf16 holds, and the logits that `lm` has for it: bare, and behind the context.
fn rounded_case(case: &Path, to: &Path) {
    for (part, files) in [
        ("base", ["config.json", "model.safetensors"]),
        (
            "generator",
            ["adapter_config.json", "adapter_model.safetensors"],
        ),
    ] {
        let [from, to] = [case, to].map(|folder| folder.join(part));
        std::fs::create_dir_all(&to).unwrap();
        std::fs::copy(from.join(files[0]), to.join(files[0])).unwrap();
        let tensors =
            candle_core::safetensors::load(from.join(files[1]), &candle_core::Device::Cpu).unwrap();
        let rounded: HashMap<_, _> = tensors
            .into_iter()
            .map(|(name, tensor)| (name, tensor.to_dtype(DType::BF16).unwrap()))
            .collect();
        candle_core::safetensors::save(&rounded, to.join(files[1])).unwrap();
    }
    let mut lm = Lm::load(&to.join("base"), LoadOptions::default()).unwrap();
    lm.attach_generator(&to.join("generator")).unwrap();
    let generator = lm.generator().unwrap();
    let expected = candle_core::safetensors::load(
        case.join("expected.safetensors"),
        &candle_core::Device::Cpu,
    )
    .unwrap();
    let tokens = |name: &str| {
        let tokens = expected[name].to_vec1::<i64>().unwrap();
        tokens
            .into_iter()
            .map(|token| TokenId(token as u32))
            .collect::<Vec<_>>()
    };
    let (context, query) = (tokens("context"), tokens("query"));
    let kv = KvCache::new(lm.config(), 8, 16).unwrap();
    let mut state = generator.new_state().unwrap();
    for range in generator::windows::equalised(context.len(), 16) {
        let mut window = generator.new_window().unwrap();
        alone(&lm, &kv, &context[range], (None, Some(&mut window)), 0);
        state.add_window(&window, 1.0).unwrap();
    }
    let core = generator.read_out(&state).unwrap();
    let mut written =
        HashMap::from(["context", "query"].map(|name| (name.to_owned(), expected[name].clone())));
    for (name, core) in [
        ("base.logits", None),
        ("parallel.exact.logits", Some(&core)),
    ] {
        let logits = alone(&lm, &kv, &query, (core, None), query.len()).unwrap();
        // The reference itself is near: only its weights were rounded.
        let error = relative_error_of(&values(&logits), &values(&expected[name]));
        assert!(
            error > 1e-4 && error < BF16,
            "{name} of {}: {error}",
            case.display()
        );
        written.insert(name.to_owned(), logits);
    }
    candle_core::safetensors::save(&written, to.join("expected.safetensors")).unwrap();
}

#[test]
fn golden_cases_whose_weights_bf16_holds_are_within_a_hundredth_bare_and_told() {
    let Some(golden) = testkit::golden_dir() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden).unwrap() {
        let case = entry.unwrap().path();
        if case.join("generator").is_dir() {
            rounded_case(&case, &folder.path().join(case.file_name().unwrap()));
        }
    }
    with_device(|device| {
        let mut lines = Vec::new();
        let mut say = |line| lines.push(line);
        cuda::check::run(device, Scale::Tiny, Some(folder.path()), &mut say).unwrap();
        let lines = lines
            .into_iter()
            .filter(|line| line.what.contains(": base") || line.what.contains(": parallel"));
        let lines: Vec<_> = lines.collect();
        assert_eq!(lines.len(), 8);
        for line in lines {
            testkit::report(&format!("{}: {:.1e}\n", line.what, line.error));
            // Of full rank the smallest singular value becomes 1, too, whatever noise is in it.
            let whole = line.what.contains("r24-i24-q24") && line.what.contains("parallel");
            let most = if whole { 1.2e-2 } else { 1e-2 };
            assert!(line.error < most, "{line:?}");
        }
    });
}

fn lambda(tiny: &Tiny) -> f64 {
    let path = tiny
        .folder
        .path()
        .join("generator/adapter_model.safetensors");
    let tensors = candle_core::safetensors::load(path, &candle_core::Device::Cpu).unwrap();
    let (_, ridge) = tensors
        .iter()
        .find(|(name, _)| name.ends_with("fastlora_ridge"))
        .unwrap();
    values(ridge)[0]
}

#[test]
fn a_core_that_is_brought_in_waits_for_steps_before_and_is_there_for_those_behind() {
    let tiny = tiny("llama", Some(TinyForm::Published));
    with_device(|device| {
        let mut model = tiny.on(device);
        let mut random = testkit::Random::new(9);
        let size = model.slots().unwrap().size();
        let mut cores = [0, 1].map(|_| device.pinned::<bf16>(size).unwrap());
        for core in &mut cores {
            core.values_mut()
                .iter_mut()
                .for_each(|x| *x = bf16::from_f64(random.normal() * 0.3));
        }
        let prompt = text(9, 6);
        let span = Rows {
            slot: Some(2),
            ..rows(&prompt, 0, &[0], 1)
        };
        let mut batch = Batch::new(
            device,
            Capacity {
                rows: 8,
                sequences: 1,
                blocks: 12,
                splits: 1,
            },
            model.limits().heads,
        )
        .unwrap();
        batch.fill(device, &[span], &model.limits()).unwrap();
        let step = |model: &mut Model, core: Option<usize>, read: bool| {
            if let Some(core) = core {
                model.slots_mut().unwrap().bring(2, &cores[core]).unwrap();
                model.slots().unwrap().need(2).unwrap();
            }
            model.forward(&batch, &[]).unwrap();
            read.then(|| model.logits(&batch).unwrap())
        };
        let alone: Vec<_> = [None, Some(0), Some(1)]
            .map(|core| step(&mut model, core, true))
            .into();
        assert!(alone[0] != alone[1] && alone[1] != alone[2] && alone[0] != alone[2]);
        // Nothing is waited for between: the second core must not be there too early, the last one not too late.
        step(&mut model, Some(0), false);
        step(&mut model, Some(1), false);
        assert_eq!(step(&mut model, Some(0), true), alone[1]);
        let mut kept = device.pinned::<bf16>(size).unwrap();
        model.slots_mut().unwrap().keep(2, &mut kept).unwrap();
        assert_eq!(kept.values(), cores[0].values());
    });
}

#[test]
fn rows_that_do_not_fit_are_refused_before_anything_runs() {
    let tiny = tiny("llama", Some(TinyForm::Published));
    with_device(|device| {
        let model = tiny.on(device);
        let mut batch = Batch::new(
            device,
            Capacity {
                rows: 8,
                sequences: 2,
                blocks: 3,
                splits: 1,
            },
            model.limits().heads,
        )
        .unwrap();
        let tokens = [1, 2, 3];
        let good = rows(&tokens, 0, &[0], 1);
        let many = [0; 9];
        for bad in [
            Rows {
                tokens: &[],
                ..good
            },
            Rows {
                tokens: &[96],
                ..good
            },
            Rows {
                tokens: &many,
                blocks: &[0, 1],
                ..good
            },
            Rows {
                position: 6,
                ..good
            },
            Rows {
                position: usize::MAX,
                ..good
            },
            Rows {
                blocks: &[24],
                ..good
            },
            Rows {
                blocks: &[0, 1, 2, 3],
                ..good
            },
            Rows {
                slot: Some(3),
                ..good
            },
            Rows {
                lookahead: Some(96),
                ..good
            },
            Rows { logits: 4, ..good },
        ] {
            assert!(
                matches!(
                    batch.fill(device, &[bad], &model.limits()),
                    Err(Error::Shape { .. })
                ),
                "{bad:?}"
            );
        }
        batch.fill(device, &[good], &model.limits()).unwrap();
        let sums = model.new_sums().unwrap();
        assert!(matches!(
            model.forward(
                &batch,
                &[Write {
                    first: 1,
                    len: 3,
                    sums: &sums
                }]
            ),
            Err(Error::Shape { .. })
        ));
        assert!(
            Bucket::capture(&model, 64, 12, 4).is_err(),
            "more parts than there is memory for"
        );
    });
}

#[test]
fn a_capture_that_allocates_or_waits_is_refused_and_counted() {
    crate::with_device_that_refuses(|device| {
        let before = device.violations().len();
        assert!(device.capture(|| device.alloc::<f32>(8).map(drop)).is_err());
        assert!(device.capture(|| device.synchronize()).is_err());
        let buffer = device.alloc::<f32>(8).unwrap();
        assert!(
            device
                .capture(|| buffer.view().write(device, &[1.0]))
                .is_err()
        );
        let event = device.event(false).unwrap();
        event.record().unwrap();
        assert!(device.capture(|| device.wait_for(&event)).is_err());
        assert_eq!(device.violations().len(), before + 4);
        // A refused capture leaves the stream as it was.
        buffer.view().write(device, &[2.0]).unwrap();
        assert_eq!(buffer.read().unwrap()[0], 2.0);
    });
}
