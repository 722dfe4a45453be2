//! c_t = scale a_t N for rows that run with a core each: N dense [R1, R2], or U Vᵀ, or Nᵀ in 8 bits.
//!
//! All cores of a call run side by side, so many sessions with a row each keep the threads as busy as one
//! session with many rows. c_t is one chain over ascending channels of a_t, then scaled: the same bits in any
//! batch. Start at [`apply_cores`].

#[cfg(test)]
mod tests;

use candle_core::{Result, Tensor, bail};

use crate::{
    Linear,
    floats::{Floats, tensor},
    gemm::{Begin, Product, Right, products},
    linear::own_maps,
};

/// The core of one site, as rows apply it.
#[derive(Clone, Debug)]
pub enum CoreView<'a> {
    /// N [R1, R2].
    Dense(&'a Tensor),
    /// U [R1, q], V [R2, q]: N = U Vᵀ.
    LowRank {
        /// [R1, q]
        u: &'a Tensor,
        /// [R2, q]
        v: &'a Tensor,
    },
    /// Nᵀ [R2, R1], a map that rounds activations: c_t = N of a_t in 8 bits.
    Rounded(&'a Linear),
}

/// Rows of a that share one core.
#[derive(Clone, Debug)]
pub struct CoreRows<'a> {
    /// First row in a.
    pub start: usize,
    /// Number of rows.
    pub len: usize,
    /// Their core.
    pub core: CoreView<'a>,
    /// Factor on what the core gives.
    pub scale: f32,
}

/// a [T, R1] -> c [T, R2]: c_t = scale * a_t N of the rows' own core; rows that no entry names give 0.
///
/// Fails if entries overlap, if one reaches beyond a, or if a core does not have R1 and R2.
pub fn apply_cores(a: &Tensor, rows: &[CoreRows<'_>], r2: usize) -> Result<Tensor> {
    let (t, r1) = a.dims2()?;
    let a = a.contiguous()?;
    let a = Floats::of(&a)?; // [T, R1]
    let mut c = vec![0.0f32; t * r2]; // [T, R2]
    let mut rows: Vec<_> = rows.iter().collect();
    rows.sort_by_key(|row| row.start);
    let cores = rows
        .iter()
        .map(|row| Core::of(&row.core, r1, r2))
        .collect::<Result<Vec<_>>>()?;
    let mut next = 0;
    for row in &rows {
        let end = row.start.checked_add(row.len);
        let Some(end) = end.filter(|&end| row.start >= next && end <= t) else {
            bail!(
                "core rows {} + {} of {t}, behind row {next}",
                row.start,
                row.len
            )
        };
        next = end;
    }

    // Cores in 8 bits, all at once.
    let mut own = Vec::with_capacity(rows.len());
    for (row, core) in rows.iter().zip(&cores) {
        if let Core::Rounded(core) = core {
            own.push((*core, row.start..row.start + row.len));
        }
    }
    own_maps(&own, &a, &mut c);

    // Each entry's factors, and its own rows of a and c.
    let mut entries = Vec::with_capacity(rows.len());
    let (mut rest, mut next) = (c.as_mut_slice(), 0);
    for (row, core) in rows.into_iter().zip(&cores) {
        let end = row.start + row.len;
        let (_, behind) = rest.split_at_mut((row.start - next) * r2);
        let (own, behind) = behind.split_at_mut(row.len * r2);
        (rest, next) = (behind, end);
        let Core::Floats { u, last, q } = core else {
            own.iter_mut().for_each(|c| *c *= row.scale);
            continue;
        };
        entries.push(Entry {
            a: &a[row.start * r1..end * r1],
            c: own,
            u: u.as_ref().map(Floats::of).transpose()?, // [R1, q]
            last: Floats::of(last)?,
            q: *q,
            b: vec![0.0f32; row.len * q], // [len, q]
            scale: row.scale,
        });
    }

    // b = a U where the core has low rank, then c = a N or b Vᵀ.
    let mut inner: Vec<_> = entries
        .iter_mut()
        .filter_map(|entry| {
            let u = entry.u.as_ref()?;
            Some(Product {
                x: entry.a,
                w: Right::Steps(u),
                out: &mut entry.b,
                k: r1,
                n: entry.q,
                begin: Begin::Zero,
            })
        })
        .collect();
    products(&mut inner);
    drop(inner);
    let mut outer: Vec<_> = entries
        .iter_mut()
        .map(
            |Entry {
                 a,
                 c,
                 u,
                 last,
                 q,
                 b,
                 ..
             }| match u {
                None => Product {
                    x: a,
                    w: Right::Steps(last),
                    out: c,
                    k: r1,
                    n: r2,
                    begin: Begin::Zero,
                },
                Some(_) => Product {
                    x: b,
                    w: Right::Columns(last),
                    out: c,
                    k: *q,
                    n: r2,
                    begin: Begin::Zero,
                },
            },
        )
        .collect();
    products(&mut outer);
    drop(outer);
    for entry in entries {
        for c in entry.c {
            *c *= entry.scale;
        }
    }
    tensor(c, (t, r2))
}

struct Entry<'a> {
    a: &'a [f32],
    c: &'a mut [f32],
    u: Option<Floats<'a>>,
    /// N [R1, R2] or V [R2, q].
    last: Floats<'a>,
    q: usize,
    /// a U [len, q].
    b: Vec<f32>,
    scale: f32,
}

/// A checked core, contiguous.
enum Core<'a> {
    Floats {
        u: Option<Tensor>,
        /// N [R1, R2] or V [R2, q].
        last: Tensor,
        q: usize,
    },
    Rounded(&'a Linear),
}

impl<'a> Core<'a> {
    fn of(core: &CoreView<'a>, r1: usize, r2: usize) -> Result<Self> {
        match core {
            CoreView::Dense(n) => {
                if n.dims2()? != (r1, r2) {
                    bail!("a core {:?} where R1 is {r1} and R2 {r2}", n.shape())
                }
                Ok(Self::Floats {
                    u: None,
                    last: n.contiguous()?,
                    q: 0,
                })
            }
            CoreView::LowRank { u, v } => {
                let (_, q) = u.dims2()?;
                if u.dims2()? != (r1, q) || v.dims2()? != (r2, q) {
                    bail!(
                        "core factors {:?} and {:?} where R1 is {r1} and R2 {r2}",
                        u.shape(),
                        v.shape()
                    )
                }
                Ok(Self::Floats {
                    u: Some(u.contiguous()?),
                    last: v.contiguous()?,
                    q,
                })
            }
            CoreView::Rounded(n) => {
                if (n.in_features(), n.out_features()) != (r1, r2) || !n.rounds_activations() {
                    bail!(
                        "a core [{}, {}] where R1 is {r1} and R2 {r2}, or not in 8 bits",
                        n.in_features(),
                        n.out_features()
                    )
                }
                Ok(Self::Rounded(n))
            }
        }
    }
}

/// The meaning for rows of one dense core: c[t, j] = scale Σ_i a[t, i] n[i, j], fused, i ascending.
#[cfg(test)]
fn reference(a: &[f32], n: &[f32], r1: usize, r2: usize, scale: f32) -> Vec<f32> {
    let rows = a.chunks_exact(r1);
    rows.flat_map(|a| {
        (0..r2)
            .map(move |j| scale * (0..r1).fold(0.0, |sum: f32, i| a[i].mul_add(n[i * r2 + j], sum)))
    })
    .collect()
}
