//! Read-outs on the device against their definitions, the published vectors, and at the ranks of a 7B model.

use std::collections::HashMap;

use candle_core::Tensor;
use cuda::{
    Device, Error,
    ops::{Emitted, SiteCores},
    read_out::{ITERATIONS, Kind, ReadOut, Sites},
};
use half::bf16;
use testkit::{Random, golden_part, matmul, relative_error_of, report, solve, transpose, values};

use crate::with_device;

fn normal(random: &mut Random, len: usize) -> Vec<f64> {
    (0..len).map(|_| random.normal()).collect()
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|x| *x as f32).collect()
}

/// Orthonormal columns [n, p] out of noise, by Gram-Schmidt twice.
fn orthonormal(random: &mut Random, n: usize, p: usize) -> Vec<f64> {
    let mut columns: Vec<Vec<f64>> = Vec::new();
    for _ in 0..p {
        let mut column = normal(random, n);
        for _ in 0..2 {
            for other in &columns {
                let dot: f64 = column.iter().zip(other).map(|(x, y)| x * y).sum();
                column
                    .iter_mut()
                    .zip(other)
                    .for_each(|(x, y)| *x -= dot * y);
            }
        }
        let norm = column.iter().map(|x| x * x).sum::<f64>().sqrt();
        columns.push(column.into_iter().map(|x| x / norm).collect());
    }
    transpose(&columns.concat(), p, n)
}

/// u diag(sigma) vᵀ, [n, r].
fn composed(u: &[f64], sigma: &[f64], v: &[f64], n: usize, r: usize) -> Vec<f64> {
    let p = sigma.len();
    let scaled: Vec<f64> = u
        .chunks_exact(p)
        .flat_map(|row| {
            row.iter()
                .zip(sigma)
                .map(|(x, s)| x * s)
                .collect::<Vec<_>>()
        })
        .collect();
    matmul(&scaled, &transpose(v, r, p), n, p, r)
}

/// N [R1, R2] of one site out of a slot, as rows of the arena are applied.
fn emitted(slot: &[bf16], offset: usize, sites: Sites) -> Vec<f64> {
    let Sites { r1, r2, rank, .. } = sites;
    let wide: Vec<f64> = slot[offset..offset + SiteCores::size(r1, r2, rank)]
        .iter()
        .map(|x| x.to_f64())
        .collect();
    if rank == 0 {
        return transpose(&wide, r2, r1);
    }
    let (ut, v) = wide.split_at(rank * r1);
    matmul(
        &transpose(ut, rank, r1),
        &transpose(v, r2, rank),
        r1,
        rank,
        r2,
    )
}

/// N of the first `rank` directions of a site in f64, as found: singular values are 1, or folded in.
fn found(read_out: &ReadOut, device: &Device, site: usize, rank: usize, fold: bool) -> Vec<f64> {
    let f = read_out.factors();
    let part = |view: cuda::View<'_, f64>, rows: usize| {
        let all = view.read(device).unwrap();
        all[site * rows * f.p..(site + 1) * rows * f.p].to_vec()
    };
    let (u, v, values) = (part(f.u, f.n), part(f.v, f.r), part(f.values, 1));
    let factors: Vec<f64> = values
        .iter()
        .enumerate()
        .map(|(i, value)| {
            let sigma = value.max(0.0).sqrt();
            let kept = i < rank && sigma > 1e-6 * values[0].sqrt();
            match (kept, fold) {
                (false, _) => 0.0,
                (true, true) => 1.0, // v holds sigma already
                (true, false) => 1.0 / sigma,
            }
        })
        .collect();
    composed(&u, &factors, &v, f.n, f.r)
}

#[test]
fn a_ridge_is_the_solution_of_its_equations() {
    with_device(|device| {
        let mut random = Random::new(1);
        // One block of a factor, and three of which the last is not full.
        for (r1, r2, tokens) in [(16, 8, 5), (136, 72, 300)] {
            let sites = Sites {
                count: 2,
                r1,
                r2,
                rank: 0,
            };
            let (mut s, mut g, mut want) = (Vec::new(), Vec::new(), Vec::new());
            let lambdas = [0.1, 2.0];
            for lambda in lambdas {
                let (k, v) = (
                    normal(&mut random, tokens * r1),
                    normal(&mut random, tokens * r2),
                );
                let kt = transpose(&k, tokens, r1);
                let (one_s, one_g) = (
                    narrow(&matmul(&kt, &v, r1, tokens, r2)),
                    narrow(&matmul(&kt, &k, r1, tokens, r1)),
                );
                let mut a: Vec<f64> = one_g.iter().map(|x| f64::from(*x)).collect();
                (0..r1).for_each(|i| a[i * r1 + i] += lambda);
                want.push(solve(
                    &a,
                    &one_s.iter().map(|x| f64::from(*x)).collect::<Vec<_>>(),
                    r1,
                    r2,
                ));
                s.extend(one_s);
                g.extend(one_g);
            }
            let read_out = ReadOut::new(device, Kind::Ridge, sites, 0, &lambdas).unwrap();
            let size = SiteCores::size(r1, r2, 0);
            let slot = device.zeros::<bf16>(2 * size + 8).unwrap();
            let (s, g, floors) = (
                device.upload(&s).unwrap(),
                device.upload(&g).unwrap(),
                device.zeros(2).unwrap(),
            );
            let to = Emitted {
                slot: slot.view(),
                offset: 8,
                site_size: size,
            };
            read_out
                .run(device, s.view(), Some(g.view()), floors.view(), &to)
                .unwrap();
            read_out.check().unwrap();
            let solution = read_out.solution().read(device).unwrap();
            let slot = slot.read().unwrap();
            for (site, want) in want.iter().enumerate() {
                let exact =
                    relative_error_of(&solution[site * r1 * r2..(site + 1) * r1 * r2], want);
                assert!(exact < 1e-9, "{exact}");
                assert!(relative_error_of(&emitted(&slot, 8 + site * size, sites), want) < 4e-3);
            }
        }
    });
}

#[test]
fn a_ridge_that_is_truncated_to_all_of_its_directions_is_the_whole_one() {
    with_device(|device| {
        let mut random = Random::new(5);
        let (r1, r2, tokens) = (24, 16, 60);
        let (k, v) = (
            normal(&mut random, tokens * r1),
            normal(&mut random, tokens * r2),
        );
        let kt = transpose(&k, tokens, r1);
        let s = device
            .upload(&narrow(&matmul(&kt, &v, r1, tokens, r2)))
            .unwrap();
        let g = device
            .upload(&narrow(&matmul(&kt, &k, r1, tokens, r1)))
            .unwrap();
        let floors = device.zeros(1).unwrap();
        let n = |rank: usize| {
            let sites = Sites {
                count: 1,
                r1,
                r2,
                rank,
            };
            let read_out = ReadOut::new(device, Kind::Ridge, sites, ITERATIONS, &[0.5]).unwrap();
            let slot = device.zeros::<bf16>(SiteCores::size(r1, r2, rank)).unwrap();
            let to = Emitted {
                slot: slot.view(),
                offset: 0,
                site_size: 0,
            };
            read_out
                .run(device, s.view(), Some(g.view()), floors.view(), &to)
                .unwrap();
            emitted(&slot.read().unwrap(), 0, sites)
        };
        let (whole, all, half) = (n(0), n(16), n(8));
        assert!(relative_error_of(&all, &whole) < 6e-3);
        let lost = relative_error_of(&half, &whole);
        assert!((0.05..0.95).contains(&lost), "{lost}");
    });
}

#[test]
fn sums_that_are_no_sums_are_refused_by_name_of_their_site() {
    with_device(|device| {
        let sites = Sites {
            count: 2,
            r1: 8,
            r2: 8,
            rank: 0,
        };
        let read_out = ReadOut::new(device, Kind::Ridge, sites, 0, &[0.1, 0.1]).unwrap();
        let slot = device.zeros::<bf16>(2 * 64).unwrap();
        let mut g = vec![0.0f32; 2 * 64];
        g[64] = -1.0;
        let (s, g, floors) = (
            device.zeros(2 * 64).unwrap(),
            device.upload(&g).unwrap(),
            device.zeros(2).unwrap(),
        );
        let to = Emitted {
            slot: slot.view(),
            offset: 0,
            site_size: 64,
        };
        read_out
            .run(device, s.view(), Some(g.view()), floors.view(), &to)
            .unwrap();
        assert!(matches!(
            read_out.check(),
            Err(Error::NotPositive { site: 1 })
        ));
    });
}

#[test]
fn a_truncated_svd_is_exact_where_its_spectrum_has_a_gap() {
    with_device(|device| {
        let mut random = Random::new(2);
        let (n, r, rank) = (96, 80, 16);
        // Each value a tenth below the one before it.
        let sigma: Vec<f64> = (0..80).map(|i| 30.0 * 0.9f64.powi(i)).collect();
        let (u, v) = (
            orthonormal(&mut random, n, 80),
            orthonormal(&mut random, r, 80),
        );
        let s = device
            .upload(&narrow(&composed(&u, &sigma, &v, n, r)))
            .unwrap();
        let kept: Vec<f64> = (0..80).map(|i| f64::from(u8::from(i < rank))).collect();
        let want = composed(&u, &kept, &v, n, r);
        let sites = Sites {
            count: 1,
            r1: n,
            r2: r,
            rank,
        };
        let floors = device.zeros(1).unwrap();
        let slot = device.zeros::<bf16>(SiteCores::size(n, r, rank)).unwrap();
        let to = Emitted {
            slot: slot.view(),
            offset: 0,
            site_size: slot.view().len(),
        };
        let mut last = f64::INFINITY;
        for iterations in [0, 1, 2, ITERATIONS] {
            let read_out = ReadOut::new(device, Kind::Svd, sites, iterations, &[]).unwrap();
            read_out
                .run(device, s.view(), None, floors.view(), &to)
                .unwrap();
            let error = relative_error_of(&found(&read_out, device, 0, rank, false), &want);
            report(&format!(
                "svd of rank {rank} of [{n}, {r}], {iterations} iterations: {error:.1e}"
            ));
            assert!(error < last);
            last = error;
        }
        assert!(last < 1e-4, "{last}");
        assert!(relative_error_of(&emitted(&slot.read().unwrap(), 0, sites), &want) < 1e-2);
    });
}

#[test]
fn directions_that_no_token_wrote_stay_empty() {
    with_device(|device| {
        let mut random = Random::new(3);
        let (n, r, rank, tokens) = (64, 48, 16, 5);
        let (k, v) = (
            normal(&mut random, tokens * n),
            normal(&mut random, tokens * r),
        );
        let sums = matmul(&transpose(&k, tokens, n), &v, n, tokens, r);
        // The second site holds nothing at all.
        let s: Vec<f32> = narrow(&sums).into_iter().chain(vec![0.0; n * r]).collect();
        let sites = Sites {
            count: 2,
            r1: n,
            r2: r,
            rank,
        };
        let read_out = ReadOut::new(device, Kind::Svd, sites, ITERATIONS, &[]).unwrap();
        let size = SiteCores::size(n, r, rank);
        let slot = device.zeros::<bf16>(2 * size).unwrap();
        let (s, floors) = (device.upload(&s).unwrap(), device.zeros(2).unwrap());
        read_out
            .run(
                device,
                s.view(),
                None,
                floors.view(),
                &Emitted {
                    slot: slot.view(),
                    offset: 0,
                    site_size: size,
                },
            )
            .unwrap();
        read_out.check().unwrap();
        let slot = slot.read().unwrap();
        // Five unit values: ||N||² = 5.
        let norm: f64 = emitted(&slot, 0, sites).iter().map(|x| x * x).sum();
        assert!((norm - 5.0).abs() < 0.05, "{norm}");
        assert!(emitted(&slot, size, sites).iter().all(|x| *x == 0.0));
    });
}

/// Random keys and values have no gap anywhere: this says what a fixed number of iterations then costs.
#[test]
fn a_spectrum_without_a_gap_comes_nearer_with_every_iteration() {
    with_device(|device| {
        let mut random = Random::new(4);
        // An eighth of the directions is kept, as 128 of 1024 are.
        let (n, rank, tokens) = (192, 24, 1000);
        let [k, v] = [(); 2].map(|()| normal(&mut random, tokens * n));
        let sums = narrow(&matmul(&transpose(&k, tokens, n), &v, n, tokens, n));
        let (s, floors) = (device.upload(&sums).unwrap(), device.zeros(1).unwrap());
        let sites = Sites {
            count: 1,
            r1: n,
            r2: n,
            rank,
        };
        let slot = device.zeros::<bf16>(SiteCores::size(n, n, rank)).unwrap();
        let to = Emitted {
            slot: slot.view(),
            offset: 0,
            site_size: 0,
        };
        let read = |iterations: usize| {
            let read_out = ReadOut::new(device, Kind::Svd, sites, iterations, &[]).unwrap();
            read_out
                .run(device, s.view(), None, floors.view(), &to)
                .unwrap();
            let left = read_out.left(iterations).unwrap();
            (found(&read_out, device, 0, rank, false), left)
        };
        let (exact, mut last) = (read(256).0, f64::INFINITY);
        for iterations in [2, ITERATIONS, 16, 64] {
            let (found, left) = read(iterations);
            let error = relative_error_of(&found, &exact);
            report(&format!(
                "svd of random sums [{n}, {n}], rank {rank}, {iterations} iterations: {error:.1e}, said to be below {left:.1e}"
            ));
            assert!(error < last && error < left);
            assert!(left > 1e-2 || iterations > ITERATIONS, "{left}");
            last = error;
        }
        assert!(last < 1e-2, "{last}");
    });
}

/// Their ranks and sixteen directions more are all that there are, so any number of iterations finds them.
#[test]
fn golden_deltas_come_out_of_golden_states() {
    let Some(folder) = golden_part("mistral-r32-i24-q8-o_proj-s2") else {
        return;
    };
    let folders = [
        "mistral-r32-i24-q8-o_proj-s2",
        "llama-r32-i32-q16-o_proj-s3",
        "mistral-r16-i16-q8-o_proj_down_proj-s4",
        "mistral-r24-i24-q24-o_proj-s1",
    ];
    with_device(|device| {
        for name in folders {
            let folder = folder.with_file_name(name);
            let load = |path: &str| -> HashMap<String, Tensor> {
                candle_core::safetensors::load(folder.join(path), &candle_core::Device::Cpu)
                    .unwrap()
            };
            let (expected, generator) = (
                load("expected.safetensors"),
                load("generator/adapter_model.safetensors"),
            );
            let config: serde_json::Value = serde_json::from_slice(
                &std::fs::read(folder.join("generator/adapter_config.json")).unwrap(),
            )
            .unwrap();
            let number = |key: &str| config[key].as_f64().unwrap();
            let rank = number("fastlora_max_rank") as usize;
            let (mut worst, mut compared) = (0.0f64, 0);
            for strategy in ["concat", "parallel", "sequential"] {
                for layer in 0..3 {
                    for (module, block) in [("o_proj", "self_attn"), ("down_proj", "mlp")] {
                        let vector = |what: &str| {
                            expected.get(&format!("{strategy}.exact.layer.{layer}.{module}.{what}"))
                        };
                        let (Some(state), Some(delta)) = (vector("state"), vector("delta")) else {
                            continue;
                        };
                        let (r1, r2) = state.dims2().unwrap();
                        let weight = |part: &str| {
                            let key = format!(
                                "base_model.model.model.layers.{layer}.base_layer.{block}.{module}.fastlora_{part}.weight"
                            );
                            let tensor = &generator[&key];
                            let (rows, columns) = tensor.dims2().unwrap();
                            (values(tensor), rows, columns)
                        };
                        let sites = Sites {
                            count: 1,
                            r1,
                            r2,
                            rank,
                        };
                        let read_out =
                            ReadOut::new(device, Kind::Svd, sites, ITERATIONS, &[]).unwrap();
                        let slot = device.zeros::<bf16>(SiteCores::size(r1, r2, rank)).unwrap();
                        let (s, floors) = (
                            device.upload(&narrow(&values(state))).unwrap(),
                            device.zeros(1).unwrap(),
                        );
                        read_out
                            .run(
                                device,
                                s.view(),
                                None,
                                floors.view(),
                                &Emitted {
                                    slot: slot.view(),
                                    offset: 0,
                                    site_size: 0,
                                },
                            )
                            .unwrap();
                        let n = found(&read_out, device, 0, rank, false);
                        // (alpha / R2) B Nᵀ A1
                        let ((b, out, _), (a1, _, input)) = (weight("B"), weight("A1"));
                        let scale = number("fastlora_alpha") / r2 as f64;
                        let got = matmul(
                            &matmul(&b, &transpose(&n, r1, r2), out, r2, r1),
                            &a1,
                            out,
                            r1,
                            input,
                        );
                        let got: Vec<f64> = got.iter().map(|x| x * scale).collect();
                        worst = worst.max(relative_error_of(&got, &values(delta)));
                        compared += 1;
                    }
                }
            }
            report(&format!(
                "{name}: {compared} deltas, largest error {worst:.1e}"
            ));
            assert!(compared > 0 && worst < 1e-4, "{name}: {worst}");
        }
    });
}
