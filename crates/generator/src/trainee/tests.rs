//! Cores and deltas against those of serving, gradients against finite differences.

use candle_core::{Device, Tensor, Var};
use testkit::{Form, GeneratorSpec, Random, TinySpec, relative_error, tiny_generator};

use super::{Adapted, Adapter, Seen, Trainee, read_out};
use crate::{
    Generator, Module, ReadOut, SiteId, SiteRows, WriteRows, normed_embeddings,
    testing::{shape, tiny},
};

fn specs() -> [GeneratorSpec; 4] {
    let published = |norm| GeneratorSpec {
        form: Form::Published,
        norm: Some(norm),
        ..GeneratorSpec::default()
    };
    [
        published("svd"),
        published("frobenius"),
        published("spectral"),
        GeneratorSpec::default(),
    ]
}

/// What a site sees of T tokens: x [T, Din], h [T, D], u [T, D].
fn seen(generator: &Generator, site: usize, seed: u64, tokens: usize) -> (Seen, Tensor) {
    let mut random = Random::new(seed + site as u64);
    let base = TinySpec::default();
    let inputs = generator.sites()[site].a1.in_features();
    let seen = Seen {
        x: random.tensor(&[tokens, inputs], 0.0, 1.0),
        h: random.tensor(&[tokens, base.hidden], 0.0, 1.0),
    };
    // One text, so one u for all sites.
    let e = Random::new(seed + 100).tensor(&[tokens, base.hidden], 0.0, 1.0);
    (seen, normed_embeddings(&e).unwrap())
}

#[test]
fn cores_and_deltas_are_those_of_serving() {
    for spec in specs() {
        let generator = tiny(&spec);
        let trainee = Trainee::of(&generator).unwrap();
        let sites: Vec<_> = (0..trainee.sites().len())
            .map(|site| seen(&generator, site, 7, 19))
            .collect();
        let u = &sites[0].1;
        let mut state = generator.new_state().unwrap();
        for rows in [0..8, 11..19] {
            let mut window = generator.new_window().unwrap();
            for (index, (seen, u)) in sites.iter().enumerate() {
                let mut rows = [WriteRows {
                    start: rows.start,
                    len: rows.len(),
                    position: 0,
                    lookahead: None,
                    window: &mut window,
                }];
                generator.sites()[index]
                    .write(index, &seen.x, &seen.h, u, &mut rows)
                    .unwrap();
            }
            state.add_window(&window, 1.0).unwrap();
        }
        let served = generator.read_out(&state).unwrap();
        let seen: Vec<Seen> = sites.iter().map(|(seen, _)| seen.clone()).collect();
        // The middle window belongs to another group.
        let cores = trainee
            .cores(&seen, u, &[0..8, 8..11, 11..19], &[vec![1], vec![0, 2]])
            .unwrap();
        let of_row = [Some(1), None, Some(0)];
        let adapted = Adapted::new(&trainee, &cores, &of_row);
        for (index, site) in generator.sites().iter().enumerate() {
            let x = Random::new(3).tensor(&[6, site.a1.in_features()], 0.0, 1.0);
            let rows = [SiteRows {
                start: 0,
                len: 3,
                core: &served,
                scale: 1.0,
            }];
            let want = site.delta(index, &x, &rows).unwrap().unwrap();
            let got = adapted
                .delta(site.id, &x, &[(0, 0..3), (1, 3..6)])
                .unwrap()
                .unwrap();
            let error = relative_error(&got, &want);
            assert!(error < 2e-5, "{:?} {:?}: {error:e}", spec.norm, site.id);
        }
        let other = SiteId {
            layer: 0,
            module: Module::QProj,
        };
        let x = Random::new(3).tensor(&[6, 32], 0.0, 1.0);
        assert!(adapted.delta(other, &x, &[(0, 0..6)]).unwrap().is_none());
    }
}

#[test]
fn a_group_that_nothing_has_written_into_is_the_bare_model() {
    for spec in specs() {
        let generator = tiny(&spec);
        let trainee = Trainee::of(&generator).unwrap();
        let sites: Vec<_> = (0..trainee.sites().len())
            .map(|site| seen(&generator, site, 7, 5))
            .collect();
        let seen: Vec<Seen> = sites.iter().map(|(seen, _)| seen.clone()).collect();
        let cores = trainee
            .cores(&seen, &sites[0].1, &[0..3, 3..5], &[vec![], vec![0]])
            .unwrap();
        for core in cores {
            let sizes: Vec<f32> = core.abs().unwrap().sum((1, 2)).unwrap().to_vec1().unwrap();
            assert!(sizes[0] == 0.0 && sizes[1] > 0.0, "{sizes:?}");
        }
    }
}

/// Σ c y with fixed c of noise, in f64.
fn along(y: &Tensor) -> f64 {
    let c = testkit::values(&Random::new(5).tensor(y.dims(), 0.0, 1.0));
    testkit::values(y).iter().zip(&c).map(|(y, c)| y * c).sum()
}

/// Holds gradients of Σ c f() against central differences along some random directions of each variable.
fn check(name: &str, variables: &[&Var], tolerance: f64, f: impl Fn() -> Tensor) {
    let y = f();
    let c = Random::new(5).tensor(y.dims(), 0.0, 1.0);
    let gradients = (y * c).unwrap().sum_all().unwrap().backward().unwrap();
    for (number, variable) in variables.iter().enumerate() {
        let gradient = testkit::values(gradients.get(variable).expect("a gradient"));
        let start = variable.copy().unwrap().detach();
        for direction in 0..4 {
            let d = Random::new(40 + direction).tensor(variable.dims(), 0.0, 1.0);
            let slope: f64 = testkit::values(&d)
                .iter()
                .zip(&gradient)
                .map(|(d, g)| d * g)
                .sum();
            let step = 1e-3;
            let moved = |by: f64| {
                variable
                    .set(&(&start + (&d * by).unwrap()).unwrap())
                    .unwrap();
                along(&f())
            };
            let measured = (moved(step) - moved(-step)) / (2.0 * step);
            variable.set(&start).unwrap();
            let size = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
            assert!(
                (measured - slope).abs() <= tolerance * size,
                "{name}, variable {number}: {slope} by the gradient, {measured} by differences, norm {size}"
            );
        }
    }
}

#[test]
fn gradients_of_every_read_out_are_its_differences() {
    let id = SiteId {
        layer: 0,
        module: Module::DownProj,
    };
    for (r1, r2) in [(6, 6), (7, 5), (4, 6)] {
        let var = |seed: u64, rows, columns| {
            Var::from_tensor(&Random::new(seed).tensor(&[2, rows, columns], 0.0, 1.0)).unwrap()
        };
        let s = var(1, r1, r2);
        for kind in [ReadOut::Frobenius, ReadOut::Spectral, ReadOut::Svd] {
            check(&format!("{kind:?} {r1} x {r2}"), &[&s], 2e-2, || {
                read_out::normalised(kind, id, 2, &s).unwrap()
            });
        }
        let k = var(2, r1, 2 * r1);
        let square = k.matmul(&k.t().unwrap()).unwrap();
        let g = Var::from_tensor(&square.detach()).unwrap();
        let log_ridge = Var::from_tensor(&Tensor::new(&[-0.7f32], &Device::Cpu).unwrap()).unwrap();
        check("ridge", &[&s, &g, &log_ridge], 1e-2, || {
            read_out::ridge(id, &s, &g, &log_ridge).unwrap()
        });
    }
}

#[test]
fn gradients_of_every_trained_tensor_are_differences_through_core_and_delta() {
    for spec in specs() {
        let generator = tiny(&GeneratorSpec {
            layers: Some(vec![1]),
            ..spec.clone()
        });
        let start = Trainee::of(&generator).unwrap();
        let mut variables = Vec::new();
        let trainee = start
            .map(|_, name, tensor| {
                let var = Var::from_tensor(tensor)?;
                let tensor = var.as_tensor().clone();
                variables.push((name.to_owned(), var));
                Ok::<_, candle_core::Error>(tensor)
            })
            .unwrap();
        let (seen, u) = seen(&generator, 0, 7, 16);
        let x = Random::new(3).tensor(&[5, generator.sites()[0].a1.in_features()], 0.0, 1.0);
        let delta = || {
            let cores = trainee.cores(
                std::slice::from_ref(&seen),
                &u,
                &[0..7, 7..16],
                &[vec![0], vec![0, 1]],
            );
            let cores = cores.unwrap();
            let adapted = Adapted::new(&trainee, &cores, &[Some(1), Some(0)]);
            adapted
                .delta(trainee.sites()[0].id, &x, &[(0, 0..3), (1, 3..5)])
                .unwrap()
                .unwrap()
        };
        for (name, variable) in &variables {
            check(&format!("{:?} {name}", spec.norm), &[variable], 3e-2, delta);
        }
    }
}

#[test]
fn tensors_of_another_shape_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let base = TinySpec::default();
    tiny_generator(dir.path(), &base, &GeneratorSpec::default());
    let generator = Generator::load(dir.path(), &shape(&base)).unwrap();
    let trainee = Trainee::of(&generator).unwrap();
    let mut sites = trainee.sites().to_vec();
    sites[1].b = sites[1].b.t().unwrap();
    let error = Trainee::new(trainee.config().clone(), sites, &shape(&base)).unwrap_err();
    assert!(
        error.to_string().contains("layers.1.mlp.down_proj B"),
        "{error}"
    );
    let mut sites = trainee.sites().to_vec();
    sites[0].log_ridge = None;
    let error = Trainee::new(trainee.config().clone(), sites, &shape(&base)).unwrap_err();
    assert!(error.to_string().contains("log_ridge"), "{error}");
}
