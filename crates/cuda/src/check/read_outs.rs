//! Read-outs against what defines them, by residuals, so that no other decomposition is needed.

use half::bf16;

use super::{Noise, Say, Scale, error_of};
use crate::{
    Device, Error,
    ops::{self, Emitted, SiteCores},
    read_out::{ITERATIONS, Kind, ReadOut, Sites},
};

pub(super) fn read_outs(device: &Device, scale: Scale, say: &mut Say<'_>) -> Result<(), Error> {
    let (r, rank, tokens) = if scale == Scale::Real {
        (1024, 128, 3000)
    } else {
        (72, 16, 200)
    };
    let count = 2;
    let mut noise = Noise(4);
    let floats = |values: &[f64]| values.iter().map(|x| *x as f32).collect::<Vec<_>>();
    // K and V of which S = Kᵀ V, G = Kᵀ K; the products are the device's own, in f64, and are judged by residuals.
    let keys: Vec<f64> = (0..count * tokens * r).map(|_| noise.normal()).collect();
    let keys_at = device.upload(&keys)?;
    let (g64, g) = (
        device.alloc::<f64>(count * r * r)?,
        device.alloc::<f32>(count * r * r)?,
    );
    let gram = ops::Product {
        a_transposed: true,
        b_transposed: false,
        m: r,
        n: r,
        k: tokens,
        alpha: 1.0,
        beta: 0.0,
        batch: count,
    };
    let matrix = |view| ops::Matrix {
        view,
        ld: r,
        stride: tokens * r,
    };
    let square = |view| ops::Matrix {
        view,
        ld: r,
        stride: r * r,
    };
    ops::multiply(
        device,
        &gram,
        matrix(keys_at.view()),
        matrix(keys_at.view()),
        square(g64.view()),
    )?;
    let mut sums = floats(&g64.read()?);
    for at in 0..count * r * r {
        let (row, column) = (at / r % r, at % r);
        sums[at] = sums[at / (r * r) * r * r + row.min(column) * r + row.max(column)];
    }
    g.view().write(device, &sums)?;
    let slot =
        device.zeros::<bf16>(count * SiteCores::size(r, r, 0).max(SiteCores::size(r, r, rank)))?;
    let floors = device.zeros(count)?;
    let to = Emitted {
        slot: slot.view(),
        offset: 0,
        site_size: slot.view().len() / count,
    };

    // N = (G + lambda I)⁻¹ G is I - lambda (G + lambda I)⁻¹: what it is off from G N + lambda N = G.
    let lambda = 50.0;
    let ridge = ReadOut::new(
        device,
        Kind::Ridge,
        Sites {
            count,
            r1: r,
            r2: r,
            rank: 0,
        },
        0,
        &vec![lambda; count],
    )?;
    ridge.run(device, g.view(), Some(g.view()), floors.view(), &to)?;
    ridge.check()?;
    let (n, wide) = (ridge.solution(), device.alloc::<f64>(count * r * r)?);
    ops::widen(device, wide.view(), g.view())?;
    let residual = device.upload(&n.read(device)?)?;
    let product = ops::Product {
        a_transposed: false,
        k: r,
        beta: lambda,
        ..gram
    };
    ops::multiply(
        device,
        &product,
        square(wide.view()),
        square(n),
        square(residual.view()),
    )?;
    let error = error_of(&residual.read()?, &wide.read()?, |x| x, |x| x);
    say(format!("ridge [{r}, {r}]: residual"), error, 1e-10);

    // S = sum of rank-one products of falling strength: kept directions are known to 1e-4 after the iterations of serving.
    let strength: Vec<f64> = (0..r).map(|i| 0.9f64.powi(i.min(400) as i32)).collect();
    let orthogonal = householder(&mut noise, r);
    let s: Vec<f64> = (0..r * r)
        .map(|at| orthogonal(at / r, at % r) * strength[at % r])
        .collect();
    let all: Vec<f32> = (0..count).flat_map(|_| floats(&s)).collect();
    let s_at = device.upload(&all)?;
    let svd = ReadOut::new(
        device,
        Kind::Svd,
        Sites {
            count,
            r1: r,
            r2: r,
            rank,
        },
        ITERATIONS,
        &[],
    )?;
    svd.run(device, s_at.view(), None, floors.view(), &to)?;
    let kept = rank.min(strength.iter().filter(|s| **s > 1e-6).count());
    let found = svd.factors().values.read(device)?;
    let values: Vec<f64> = found[..kept].iter().map(|x| x.max(0.0).sqrt()).collect();
    say(
        format!("svd [{r}, {r}] of rank {rank}: {kept} singular values"),
        error_of(&values, &strength[..kept], |x| x, |x| x),
        1e-4,
    );
    // Uᵀ and V of the slot: Nᵀ N is the projection on the kept columns, as S is an orthogonal matrix with scaled columns.
    let core = slot.read()?;
    let (ut, v) = core[..SiteCores::size(r, r, rank)].split_at(rank * r);
    let first: Vec<f64> = (0..r)
        .map(|i| {
            (0..rank)
                .map(|j| ut[j * r + i].to_f64() * v[j].to_f64())
                .sum()
        })
        .collect();
    let want: Vec<f64> = (0..r).map(|i| orthogonal(i, 0)).collect();
    say(
        format!("svd [{r}, {r}]: the first column of N"),
        error_of(&first, &want, |x| x, |x| x),
        1e-2,
    );
    Ok(())
}

/// Elements of I - 2 w wᵀ / |w|² for a random w: orthogonal, and symmetric.
fn householder(noise: &mut Noise, n: usize) -> impl Fn(usize, usize) -> f64 + use<> {
    let w: Vec<f64> = (0..n).map(|_| noise.normal()).collect();
    let norm: f64 = w.iter().map(|x| x * x).sum();
    move |i, j| f64::from(u8::from(i == j)) - 2.0 * w[i] * w[j] / norm
}
