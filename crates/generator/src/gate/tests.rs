//! Gates against their formula, and what of a gate's file is refused.

use std::{collections::HashMap, fs};

use candle_core::{Device, Tensor};
use testkit::{
    Form, GeneratorSpec, Random, TinySpec, matmul, tiny_generator, transpose, values as doubles,
};

use super::{Doubt, GATE_FILE, Gate};
use crate::{
    Core, Error, Generator, SiteRows,
    testing::{batch, bits, shape, state},
};

/// The folder of a random generator, and the second moments of its gate [R1, R1].
fn gated(spec: &GeneratorSpec) -> (tempfile::TempDir, Vec<Tensor>) {
    let dir = tempfile::tempdir().unwrap();
    let base = TinySpec::default();
    tiny_generator(dir.path(), &base, spec);
    let generator = Generator::load(dir.path(), &shape(&base)).unwrap();
    assert!(generator.gate().is_none());
    let mut random = Random::new(3);
    let keys: Vec<Tensor> = generator
        .sites()
        .iter()
        .map(|site| {
            let r1 = site.ranks().0;
            let m = random.tensor(&[r1, r1], 0.0, 0.3);
            let keys = m.matmul(&m.t().unwrap()).unwrap();
            // As the file holds them.
            let keys = keys.to_dtype(candle_core::DType::BF16).unwrap();
            keys.to_dtype(candle_core::DType::F32).unwrap()
        })
        .collect();
    let gate = Gate::new(0.75, 0.25, keys.clone()).unwrap();
    fs::write(
        dir.path().join(GATE_FILE),
        generator.gate_bytes(&gate).unwrap(),
    )
    .unwrap();
    (dir, keys)
}

fn load(dir: &tempfile::TempDir) -> Result<Generator, Error> {
    Generator::load(dir.path(), &shape(&TinySpec::default()))
}

fn rows(core: &Core, len: usize) -> [SiteRows<'_>; 1] {
    [SiteRows {
        start: 0,
        len,
        core,
        scale: 1.0,
    }]
}

#[test]
fn a_gated_delta_is_the_delta_times_what_the_doubts_of_its_token_leave() {
    let (dir, second) = gated(&GeneratorSpec::default());
    let generator = load(&dir).unwrap();
    let told = state(&generator, &[(1, 3), (2, 4)]);
    let core = generator.read_out_gated(&told).unwrap();
    let plain = generator.read_out(&told).unwrap();
    assert!(core.is_gated() && !plain.is_gated());
    let tokens = 5;
    let mut doubts = vec![Doubt::default(); tokens];
    let mut sums = vec![0.0; tokens];
    for (index, site) in generator.sites().iter().enumerate().take(2) {
        let (r1, _, _) = site.ranks();
        let known = &core.gates.as_ref().unwrap().site(index).unwrap().known;
        // (G + lambda I) M = G.
        let g = doubles(told.sums(index).unwrap().1.unwrap());
        let mut damped = g.clone();
        for i in 0..r1 {
            damped[i * r1 + i] += site.ridge.unwrap();
        }
        let back = matmul(&damped, &doubles(known), r1, r1, r1);
        for (back, g) in back.iter().zip(&g) {
            assert!((back - g).abs() < 1e-4, "{back} {g}");
        }
        let known = doubles(known);
        let second = doubles(&second[index]);
        let traced = matmul(&known, &transpose(&second, r1, r1), r1, r1, r1);
        let expected: f64 = (0..r1).map(|i| traced[i * r1 + i]).sum();

        let x = batch(&generator, index, 9, tokens).x;
        let keys = doubles(&site.keys(&x).unwrap());
        let through = matmul(&keys, &known, tokens, r1, r1);
        let all = rows(&core, tokens);
        let bare = site
            .delta(index, &x, &rows(&plain, tokens))
            .unwrap()
            .unwrap();
        // Without doubts a core's gates are left out of account.
        let open = site.delta(index, &x, &all).unwrap().unwrap();
        assert_eq!(bits(&bare), bits(&open));
        let delta = site.gated_delta(index, &x, &all, &mut doubts).unwrap();
        let (delta, bare) = (doubles(&delta.unwrap()), doubles(&bare));
        let width = delta.len() / tokens;
        for (token, sum) in sums.iter_mut().enumerate() {
            let own = token * r1..(token + 1) * r1;
            let (k, known) = (&keys[own.clone()], &through[own]);
            let spanned: f64 = k.iter().zip(known).map(|(a, b)| a * b).sum();
            let length: f64 = k.iter().map(|k| k * k).sum();
            *sum += (1.0 - spanned / length) / (1.0 - expected).max(1e-6);
            let mean = *sum / (index + 1) as f64;
            let left = 1.0 / (1.0 + ((mean - 0.75) / 0.25).exp());
            for place in token * width..(token + 1) * width {
                let want = left * bare[place];
                assert!(
                    (delta[place] - want).abs() < 1e-4,
                    "{} {want}",
                    delta[place]
                );
            }
        }
    }
}

#[test]
fn a_token_that_was_told_is_in_less_doubt_than_one_that_was_not() {
    let (dir, _) = gated(&GeneratorSpec::default());
    let generator = load(&dir).unwrap();
    let core = generator
        .read_out_gated(&state(&generator, &[(1, 3)]))
        .unwrap();
    let site = &generator.sites()[0];
    let doubts = |seed: u64| {
        let x = batch(&generator, 0, seed, 3).x;
        let mut doubts = vec![Doubt::default(); 3];
        site.gated_delta(0, &x, &rows(&core, 3), &mut doubts)
            .unwrap();
        doubts
    };
    // The first token of a window writes nothing, the last is pending.
    let (told, other) = (doubts(1)[1].mean(), doubts(77)[1].mean());
    assert!(told < 0.5 * other, "{told} {other}");
}

#[test]
fn rows_of_a_gated_core_do_not_touch_each_other() {
    let (dir, _) = gated(&GeneratorSpec::default());
    let generator = load(&dir).unwrap();
    let core = |seed| {
        generator
            .read_out_gated(&state(&generator, &[(seed, 6)]))
            .unwrap()
    };
    let cores = [
        core(1),
        core(2),
        generator.read_out(&state(&generator, &[(3, 9)])).unwrap(),
    ];
    let x = batch(&generator, 1, 9, 9).x;
    let site = &generator.sites()[1];
    let row = |token: usize| SiteRows {
        start: token,
        len: 1,
        core: &cores[token % 3],
        scale: 1.0,
    };
    let all: Vec<_> = (1..9).map(row).collect();
    let mut doubts = vec![Doubt::default(); 9];
    let together = site.gated_delta(1, &x, &all, &mut doubts).unwrap().unwrap();
    for row in &all {
        let x = x.narrow(0, row.start, 1).unwrap();
        let alone = [SiteRows {
            start: 0,
            ..row.clone()
        }];
        let mut doubt = [Doubt::default()];
        let alone = site
            .gated_delta(1, &x, &alone, &mut doubt)
            .unwrap()
            .unwrap();
        assert_eq!(
            bits(&alone),
            bits(&together.narrow(0, row.start, 1).unwrap())
        );
        assert_eq!(doubt[0], doubts[row.start]);
        assert_eq!(doubt[0] == Doubt::default(), row.start % 3 == 2);
    }
    assert_eq!(doubts[0], Doubt::default());
    let short = site.gated_delta(1, &x, &all, &mut doubts[..8]);
    assert!(matches!(short, Err(Error::Rows { .. })));
}

#[test]
fn gates_count_as_bytes_and_are_scrubbed_with_their_core() {
    let (dir, _) = gated(&GeneratorSpec::default());
    let generator = load(&dir).unwrap();
    let told = state(&generator, &[(1, 6)]);
    let (plain, mut core) = (
        generator.read_out(&told).unwrap(),
        generator.read_out_gated(&told).unwrap(),
    );
    let square = |site: &crate::Site| site.ranks().0 * site.ranks().0 * size_of::<f32>();
    let gates: usize = generator.sites().iter().map(square).sum();
    assert_eq!(core.bytes(), plain.bytes() + gates);
    let held = core.clone();
    assert!(!core.scrub());
    drop(held);
    assert!(core.scrub());
    let gates = core.gates.as_ref().unwrap();
    for site in 0..generator.sites().len() {
        let known = doubles(&gates.site(site).unwrap().known);
        assert!(known.iter().all(|value| *value == 0.0));
    }
}

/// The tensors of a gate's file with another header.
fn file(tensors: &HashMap<String, Tensor>, about: &[(&str, &str)]) -> Vec<u8> {
    let about = about
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    safetensors::serialize(tensors, Some(about.collect())).unwrap()
}

#[test]
fn a_gate_that_is_not_of_this_generator_is_refused() {
    let (dir, second) = gated(&GeneratorSpec::default());
    let generator = load(&dir).unwrap();
    let path = dir.path().join(GATE_FILE);
    let good = fs::read(&path).unwrap();
    let digest = generator.digest().to_owned();
    let tensors = crate::testing::tensors(&path);
    let name = tensors.keys().min().unwrap().clone();
    let about = |digest, threshold, width| {
        file(
            &tensors,
            &[
                ("generator", digest),
                ("threshold", threshold),
                ("width", width),
            ],
        )
    };
    let detail = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        load(&dir).unwrap_err().to_string()
    };
    assert!(detail(&about("00", "0.5", "0.1")).contains("not of this generator"));
    for (threshold, width, wrong) in [
        ("1.5", "0.1", "threshold"),
        ("0.5", "0", "width"),
        ("x", "0.1", "threshold"),
        ("NaN", "0.1", "threshold"),
    ] {
        assert!(
            detail(&about(&digest, threshold, width)).contains(wrong),
            "{threshold} {width}"
        );
    }
    assert!(detail(&file(&tensors, &[])).contains("threshold"));
    for cut in [0, 7, good.len() / 2, good.len() - 1] {
        assert!(detail(&good[..cut]).contains(GATE_FILE), "{cut}");
    }
    let all = [
        ("generator", digest.as_str()),
        ("threshold", "0.5"),
        ("width", "0.1"),
    ];
    let change = |tensor: Option<Tensor>, name: &str| {
        let mut tensors = tensors.clone();
        match tensor {
            Some(tensor) => tensors.insert(name.to_owned(), tensor),
            None => tensors.remove(name),
        };
        file(&tensors, &all)
    };
    assert!(detail(&change(None, &name)).contains(&name));
    assert!(detail(&change(Some(second[0].clone()), "other")).contains("other"));
    let r1 = second[0].dims()[0];
    let narrow = second[0]
        .narrow(0, 0, r1 - 1)
        .unwrap()
        .contiguous()
        .unwrap();
    assert!(detail(&change(Some(narrow), &name)).contains("shape"));
    let endless = Tensor::full(f32::INFINITY, (r1, r1), &Device::Cpu).unwrap();
    assert!(detail(&change(Some(endless), &name)).contains("not finite"));
    fs::write(&path, &good).unwrap();
    assert_eq!(
        load(&dir).unwrap().gate().unwrap().digest(),
        generator.gate().unwrap().digest()
    );
    // The generator's own digest does not hang on it: states are the same.
    fs::remove_file(&path).unwrap();
    let bare = load(&dir).unwrap();
    assert_eq!(bare.digest(), digest);
    assert!(
        !bare
            .read_out_gated(&state(&bare, &[(1, 6)]))
            .unwrap()
            .is_gated()
    );
}

#[test]
fn only_an_associative_generator_with_a_ridge_has_gates() {
    let spec = GeneratorSpec {
        form: Form::Published,
        ..GeneratorSpec::default()
    };
    let dir = tempfile::tempdir().unwrap();
    tiny_generator(dir.path(), &TinySpec::default(), &spec);
    fs::write(dir.path().join(GATE_FILE), b"whatever").unwrap();
    assert!(load(&dir).unwrap_err().to_string().contains("associative"));
    assert!(Gate::new(0.5, f32::NAN, Vec::new()).is_err());
    assert!(Gate::new(0.0, 0.5, Vec::new()).is_err());
    let (dir, mut second) = gated(&GeneratorSpec::default());
    second.pop();
    let gate = Gate::new(0.5, 0.5, second).unwrap();
    assert!(load(&dir).unwrap().gate_bytes(&gate).is_err());
}
