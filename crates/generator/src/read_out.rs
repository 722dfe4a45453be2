//! Read-outs: the matrix N that a state stands for.
//!
//! Pure functions of one site's sums, factorised in f64 by faer on one thread, so that equal sums give equal
//! bits on equal machines; sites run beside each other. Ridge cores that are rounded to 8 bits anyway are solved for in f32 by
//! [`kernels::ridge`] where that is as good ([`F32_REACH`]). Start at [`read_out`].

use candle_core::{Device, Tensor};
use faer::{
    Mat, MatRef, Par,
    diag::Diag,
    dyn_stack::{MemBuffer, MemStack},
    linalg::{
        cholesky::llt::{factor, solve},
        svd::{self, ComputeSvdVectors},
    },
};
use kernels::{Floats, Linear};

use crate::{config::ReadOut, cores::SiteCore, error::Error, gate::SiteGate, site::Site};

/// tau: singular values below tau * sigma_1 are rounding noise. The published read-out keeps them and lifts
/// them to 1, so that a context of 20 tokens fills 84 % of N's energy with noise (GENERATOR.md).
pub(crate) const RELATIVE_CUTOFF: f64 = 1e-6;

/// Of sums whose trace is at most so many lambdas (some 100,000 tokens of the generator that ships) the ridge core is solved for in f32.
/// What that changes is less than what the f32 sums' own rounding has changed: in a model of it in numpy, of keys of 256 numbers with a spectrum that falls as 1/√i, at a trace
/// of 330,000 lambdas, 9e-8 of N beside 4e-7, and beside 5e-3 by which rounding it to 8 bits does.
pub(crate) const F32_REACH: f64 = 1_048_576.0;

/// Reads one site's core out of its sums: s [R1, R2], g [R1, R1], mass = Σ ||k_t|| ||v_t||; a ridge core with its gate, if the
/// second moment of unit keys [R1, R1] is given.
pub(crate) fn read_out(
    kind: ReadOut,
    site: &Site,
    s: &Tensor,
    g: Option<&Tensor>,
    mass: f64,
    keys: Option<&Tensor>,
) -> Result<(SiteCore, Option<SiteGate>), Error> {
    let not_finite = || Error::NotFinite { site: site.id() };
    let (r1, r2, max_rank) = site.ranks();
    if s.dims2()? != (r1, r2) {
        return Err(Error::Foreign {
            detail: format!(
                "sums of shape {:?} at {}, not [{r1}, {r2}]",
                s.dims(),
                site.id()
            ),
        });
    }
    if kind == ReadOut::Ridge
        && let Some(read) = ridge_in_f32(site, s, g, keys)?
    {
        return Ok(read);
    }
    let s = finite(s)?.ok_or_else(not_finite)?; // [R1, R2]
    if !mass.is_finite() {
        return Err(not_finite());
    }
    let mut gate = None;
    let core = match kind {
        ReadOut::Svd => {
            let factors = decompose(s.as_ref()).ok_or(Error::NotConverged { site: site.id() })?;
            let floor = f64::from(f32::EPSILON) * mass;
            let rank = factors.rank_above(floor).min(max_rank);
            factors.with_unit_values(rank)
        }
        ReadOut::Frobenius => {
            let norm = s.norm_l2();
            if norm > 0.0 {
                Form::Dense(divided(&s, norm))
            } else {
                Form::Zero
            }
        }
        ReadOut::Spectral => {
            let norm = largest_singular_value(s.as_ref())
                .ok_or(Error::NotConverged { site: site.id() })?;
            if norm > 0.0 {
                Form::Dense(divided(&s, norm))
            } else {
                Form::Zero
            }
        }
        ReadOut::Ridge => {
            let missing = || Error::Foreign {
                detail: format!("no key sums at {}", site.id()),
            };
            let g = g.filter(|g| g.dims() == [r1, r1]).ok_or_else(missing)?;
            let g = finite(g)?.ok_or_else(not_finite)?; // [R1, R1]
            let lambda = site.ridge.ok_or_else(missing)?;
            let factored = Factored::of(g.clone(), lambda);
            let factored = factored.ok_or(Error::NotPositive { site: site.id() })?;
            let n = factored.solve(s); // [R1, R2]
            if let Some(keys) = keys {
                let known = factored.solve(g); // [R1, R1]
                gate = Some(gate_of(&known, keys)?.ok_or_else(not_finite)?);
            }
            if max_rank * (r1 + r2) < r1 * r2 {
                // Truncated only where that makes the core smaller.
                let factors =
                    decompose(n.as_ref()).ok_or(Error::NotConverged { site: site.id() })?;
                let rank = factors.rank_above(0.0).min(max_rank);
                factors.with_values_folded_in(rank)
            } else {
                Form::Dense(n)
            }
        }
    };
    let core = core.to_tensors()?.ok_or_else(not_finite)?;
    let core = if site.rounds() { core.rounded()? } else { core };
    Ok((core, gate))
}

/// The core of a site that rounds, and its gate, by f32; None where that does not suffice, or the core is none in 8 bits.
fn ridge_in_f32(
    site: &Site,
    s: &Tensor,
    g: Option<&Tensor>,
    keys: Option<&Tensor>,
) -> Result<Option<(SiteCore, Option<SiteGate>)>, Error> {
    let (r1, r2, max_rank) = site.ranks();
    let (Some(g), Some(lambda)) = (g.filter(|g| g.dims() == [r1, r1]), site.ridge) else {
        return Ok(None);
    };
    if !site.rounds() || max_rank * (r1 + r2) < r1 * r2 {
        return Ok(None);
    }
    let g = &g.contiguous()?; // [R1, R1]
    let trace: f64 = {
        let g = Floats::of(g)?;
        g.iter()
            .step_by(r1 + 1)
            .map(|value| f64::from(*value))
            .sum()
    };
    if trace.is_nan() || trace > F32_REACH * lambda {
        return Ok(None);
    }
    let sides = [s, g];
    let Some(solved) = kernels::ridge(g, lambda, &sides[..1 + usize::from(keys.is_some())])? else {
        return Ok(None);
    };
    let Some(core) = solved
        .first()
        .map(Linear::rounded_of)
        .transpose()?
        .flatten()
    else {
        return Ok(None);
    };
    // What is known of each key is a symmetric matrix but for rounding, and is only ever asked for between a key and itself.
    let gate = match solved.get(1).zip(keys) {
        None => None,
        Some((_, keys)) if keys.dims() != [r1, r1] => return Ok(None),
        Some((known, keys)) => {
            let keys = keys.contiguous()?;
            let expected: f64 = {
                let (known, keys) = (Floats::of(known)?, Floats::of(&keys)?);
                known
                    .iter()
                    .zip(keys.iter())
                    .map(|(n, c)| f64::from(*n) * f64::from(*c))
                    .sum()
            };
            if !expected.is_finite() {
                return Ok(None);
            }
            Some(SiteGate::new(known.clone(), expected))
        }
    };
    Ok(Some((SiteCore::Rounded(core), gate)))
}

/// The gate of what is known of each key, (G + lambda I)⁻¹ G [R1, R1]; keys: the second moment of unit keys [R1, R1]. `None` if a
/// value does not fit.
fn gate_of(known: &Mat<f64>, keys: &Tensor) -> Result<Option<SiteGate>, Error> {
    let Some(keys) = finite(keys)?.filter(|keys| keys.shape() == known.shape()) else {
        return Ok(None);
    };
    let size = known.nrows();
    let places = (0..size).flat_map(|i| (0..size).map(move |j| (i, j)));
    let expected: f64 = places.map(|(i, j)| known[(i, j)] * keys[(j, i)]).sum();
    Ok(tensor(known.as_ref())?.map(|known| SiteGate::new(known, expected)))
}

/// A core before it becomes tensors.
enum Form {
    Zero,
    /// [R1, R2]
    Dense(Mat<f64>),
    /// u [R1, q], v [R2, q]
    LowRank {
        u: Mat<f64>,
        v: Mat<f64>,
    },
}

impl Form {
    /// In f32; `None` if a value does not fit.
    fn to_tensors(&self) -> Result<Option<SiteCore>, Error> {
        let core = match self {
            Self::Zero => SiteCore::Zero,
            Self::Dense(n) => match tensor(n.as_ref())? {
                Some(n) => SiteCore::Dense(n),
                None => return Ok(None),
            },
            Self::LowRank { u, v } => match (tensor(u.as_ref())?, tensor(v.as_ref())?) {
                (Some(u), Some(v)) => SiteCore::LowRank { u, v },
                _ => return Ok(None),
            },
        };
        Ok(Some(core))
    }
}

/// m = U diag(values) Vᵀ, values descending. u [R1, r], v [R2, r], r = min(R1, R2).
pub(crate) struct Svd {
    pub(crate) u: Mat<f64>,
    pub(crate) values: Vec<f64>,
    pub(crate) v: Mat<f64>,
}

impl Svd {
    /// Number of singular values above max(tau * sigma_1, floor).
    fn rank_above(&self, floor: f64) -> usize {
        let largest = self.values.first().copied().unwrap_or(0.0);
        let cutoff = (RELATIVE_CUTOFF * largest).max(floor);
        self.values
            .iter()
            .take_while(|value| **value > cutoff)
            .count()
    }

    /// U_q V_qᵀ, in the smaller of its two forms.
    fn with_unit_values(&self, rank: usize) -> Form {
        let u = self.u.subcols(0, rank).to_owned();
        self.smaller(u, rank)
    }

    /// U_q diag(values) V_qᵀ, in the smaller of its two forms.
    fn with_values_folded_in(&self, rank: usize) -> Form {
        let u = Mat::from_fn(self.u.nrows(), rank, |i, j| self.u[(i, j)] * self.values[j]);
        self.smaller(u, rank)
    }

    fn smaller(&self, u: Mat<f64>, rank: usize) -> Form {
        let (r1, r2) = (self.u.nrows(), self.v.nrows());
        let v = self.v.subcols(0, rank);
        if rank == 0 {
            Form::Zero
        } else if rank * (r1 + r2) <= r1 * r2 {
            Form::LowRank { u, v: v.to_owned() }
        } else {
            let mut n = Mat::zeros(r1, r2);
            faer::linalg::matmul::matmul(
                &mut n,
                faer::Accum::Replace,
                &u,
                v.transpose(),
                1.0,
                Par::Seq,
            );
            Form::Dense(n)
        }
    }
}

/// The thin SVD of m; `None` if it does not converge.
pub(crate) fn decompose(m: MatRef<'_, f64>) -> Option<Svd> {
    let size = m.nrows().min(m.ncols());
    svd_of(m, ComputeSvdVectors::Thin, size, size)
}

/// The SVD of m with u [R1, R1] and v [R2, R2]; `None` if it does not converge.
pub(crate) fn full_decompose(m: MatRef<'_, f64>) -> Option<Svd> {
    svd_of(m, ComputeSvdVectors::Full, m.nrows(), m.ncols())
}

fn svd_of(
    m: MatRef<'_, f64>,
    vectors: ComputeSvdVectors,
    u_columns: usize,
    v_columns: usize,
) -> Option<Svd> {
    let (rows, columns) = m.shape();
    let size = rows.min(columns);
    let (mut u, mut v, mut values) = (
        Mat::zeros(rows, u_columns),
        Mat::zeros(columns, v_columns),
        Diag::zeros(size),
    );
    let scratch = svd::svd_scratch::<f64>(
        rows,
        columns,
        vectors,
        vectors,
        Par::Seq,
        Default::default(),
    );
    let mut memory = MemBuffer::new(scratch);
    let stack = MemStack::new(&mut memory);
    svd::svd(
        m,
        values.as_mut(),
        Some(u.as_mut()),
        Some(v.as_mut()),
        Par::Seq,
        stack,
        Default::default(),
    )
    .ok()?;
    let values = (0..size).map(|i| values.column_vector()[i]).collect();
    Some(Svd { u, values, v })
}

/// sigma_1 of m; `None` if the decomposition does not converge.
fn largest_singular_value(m: MatRef<'_, f64>) -> Option<f64> {
    let (rows, columns) = m.shape();
    let size = rows.min(columns);
    let mut values = Diag::zeros(size);
    let none = ComputeSvdVectors::No;
    let scratch = svd::svd_scratch::<f64>(rows, columns, none, none, Par::Seq, Default::default());
    let mut memory = MemBuffer::new(scratch);
    svd::svd(
        m,
        values.as_mut(),
        None,
        None,
        Par::Seq,
        MemStack::new(&mut memory),
        Default::default(),
    )
    .ok()?;
    (size > 0).then(|| values.column_vector()[0])
}

/// The Cholesky factor of G + lambda I, [R1, R1], in f64, as tr(G) grows by about 1 a token beside a lambda of about 0.1.
pub(crate) struct Factored(Mat<f64>);

impl Factored {
    /// g [R1, R1], its two triangles are averaged; `None` if G + lambda I is not positive definite.
    pub(crate) fn of(mut g: Mat<f64>, lambda: f64) -> Option<Self> {
        let size = g.nrows();
        for j in 0..size {
            g[(j, j)] += lambda;
            for i in j + 1..size {
                g[(i, j)] = 0.5 * (g[(i, j)] + g[(j, i)]);
            }
        }
        let mut memory = MemBuffer::new(factor::cholesky_in_place_scratch::<f64>(
            size,
            Par::Seq,
            Default::default(),
        ));
        let stack = MemStack::new(&mut memory);
        factor::cholesky_in_place(
            g.as_mut(),
            Default::default(),
            Par::Seq,
            stack,
            Default::default(),
        )
        .ok()?;
        Some(Self(g))
    }

    /// (G + lambda I)⁻¹ S for s [R1, R2].
    pub(crate) fn solve(&self, mut s: Mat<f64>) -> Mat<f64> {
        let mut memory = MemBuffer::new(solve::solve_in_place_scratch::<f64>(
            self.0.nrows(),
            s.ncols(),
            Par::Seq,
        ));
        solve::solve_in_place(
            self.0.as_ref(),
            s.as_mut(),
            Par::Seq,
            MemStack::new(&mut memory),
        );
        s
    }
}

/// u [R1, q], v [R2, q] of an N = U Vᵀ all of whose q singular values are 1; `None` if N is not finite or its
/// decomposition does not converge.
pub(crate) fn unit_factors(n: &Tensor) -> Result<Option<(Tensor, Tensor)>, Error> {
    let Some(n) = finite(n)? else { return Ok(None) };
    let Some(Svd { u, values, v }) = decompose(n.as_ref()) else {
        return Ok(None);
    };
    let rank = values.iter().take_while(|value| **value > 0.5).count();
    Ok(tensor(u.subcols(0, rank))?.zip(tensor(v.subcols(0, rank))?))
}

fn divided(m: &Mat<f64>, by: f64) -> Mat<f64> {
    Mat::from_fn(m.nrows(), m.ncols(), |i, j| m[(i, j)] / by)
}

/// A tensor [R, C] as a matrix in f64; `None` if a value is not finite.
fn finite(t: &Tensor) -> Result<Option<Mat<f64>>, Error> {
    let (rows, columns) = t.dims2()?;
    let values = t.flatten_all()?.to_vec1::<f32>()?;
    if !values.iter().all(|value| value.is_finite()) {
        return Ok(None);
    }
    Ok(Some(Mat::from_fn(rows, columns, |i, j| {
        f64::from(values[i * columns + j])
    })))
}

/// A matrix as an f32 tensor [R, C]; `None` if a value is not finite in f32.
fn tensor(m: MatRef<'_, f64>) -> Result<Option<Tensor>, Error> {
    let (rows, columns) = m.shape();
    let values: Vec<f32> = (0..rows)
        .flat_map(|i| (0..columns).map(move |j| m[(i, j)] as f32))
        .collect();
    if !values.iter().all(|value| value.is_finite()) {
        return Ok(None);
    }
    Ok(Some(Tensor::from_vec(
        values,
        (rows, columns),
        &Device::Cpu,
    )?))
}

#[cfg(test)]
mod tests;
