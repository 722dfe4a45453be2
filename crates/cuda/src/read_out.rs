//! Read-outs on the device: the cores that states stand for, all sites of a session at once, by products of matrices.
//!
//! In f64: tr(G) grows by about 1 a token beside a lambda of about 0.1, and this kind of device multiplies f64 on its matrix units. A
//! fixed number of steps in a fixed order, so equal sums give equal bits; nothing is allocated or waited for, so a graph
//! can hold it. `svd` is subspace iteration with Cholesky-QR, `ridge` a blocked Cholesky solution; the CPU's are in
//! `generator::read_out`. Start at [`ReadOut::run`].

use crate::{
    Buffer, Device, Error, View,
    error::fits,
    ops::{self, EIGEN_MAX, Emitted, FACTOR_BLOCK, Factors, Matrix, Product},
};

/// Which read-out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// U_q V_qᵀ of the sums' truncated SVD: every kept singular value becomes 1.
    Svd,
    /// (G + lambda I)⁻¹ S, truncated to rank q where that is smaller.
    Ridge,
}

/// Sizes of the sites that are read together.
#[derive(Clone, Copy, Debug)]
pub struct Sites {
    /// Sites.
    pub count: usize,
    /// R1.
    pub r1: usize,
    /// R2.
    pub r2: usize,
    /// q; 0 keeps a ridge's N as it is.
    pub rank: usize,
}

/// Subspace iterations of a serving read-out. With sixteen directions beside those that are kept, N is then within 3e-8 of the exact one where
/// each singular value is a tenth below the one before it; sums of random keys and values, which have no gap at all, it leaves at 0.25
/// (16 iterations: 2e-3, 64: 4e-10). Measured on [96, 80] and [192, 192] by tests/software/read_out.rs.
pub const ITERATIONS: usize = 4;
/// Of one whose spectrum turns out to have no gap there; see [`ReadOut::left`].
pub const MORE_ITERATIONS: usize = 16;
/// Directions carried beside those that are kept.
const OVERSAMPLING: usize = 16;
/// Sweeps of the Jacobi iteration; quadratic from about the fifth on.
const SWEEPS: usize = 10;
/// A Gram matrix is shifted by this part of its trace, so that directions which are not there stay small instead of breaking the factor.
const SHIFT: f64 = 1e-13;
/// tau, as `generator::read_out` has it.
const RELATIVE_CUTOFF: f64 = 1e-6;

/// A read-out with the memory that it works in.
pub struct ReadOut {
    kind: Kind,
    sites: Sites,
    iterations: usize,
    /// p, directions of the subspace.
    width: usize,
    lambdas: Buffer<f64>,
    /// [sites, R1, R2] S, or N behind a ridge.
    s: Buffer<f64>,
    /// [sites, R1, R1]
    g: Option<Buffer<f64>>,
    /// [R2, p], the same start for every site.
    start: Buffer<f64>,
    /// [sites, R1, p]
    y: Buffer<f64>,
    /// [sites, R2, p]
    z: Buffer<f64>,
    /// [sites, R1, p] and [sites, R2, p]: U, and V times singular values.
    u: Buffer<f64>,
    v: Buffer<f64>,
    /// [sites, p, p]
    gram: Buffer<f64>,
    vectors: Buffer<f64>,
    scratch: Buffer<f64>,
    /// [sites, p]
    values: Buffer<f64>,
    /// [blocks, sites, 64, 64]
    inverses: Buffer<f64>,
    /// [sites, max(R1, R2), 64] or [sites, 64, R2]
    panel: Buffer<f64>,
    /// `[sites]`
    failed: Buffer<u32>,
}

impl ReadOut {
    /// Memory for sites of these sizes. lambdas: one a site, for a ridge.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for ranks beyond what the eigenvalue kernel takes; [`Error::Shape`], [`Error::Call`].
    pub fn new(
        device: &Device,
        kind: Kind,
        sites: Sites,
        iterations: usize,
        lambdas: &[f64],
    ) -> Result<Self, Error> {
        let Sites {
            count,
            r1,
            r2,
            rank,
        } = sites;
        fits(
            count > 0 && r1.is_multiple_of(8) && r2.is_multiple_of(8) && r1 > 0 && r2 > 0,
            || format!("a read-out of {sites:?}"),
        )?;
        fits(kind == Kind::Ridge || rank > 0, || {
            "an SVD of rank 0".into()
        })?;
        fits(
            lambdas.len() == if kind == Kind::Ridge { count } else { 0 },
            || format!("{} lambdas of {count} sites", lambdas.len()),
        )?;
        let width = (rank + OVERSAMPLING).min(r1).min(r2);
        if rank > 0 && (width > EIGEN_MAX || rank > width) {
            return Err(Error::Unsupported {
                what: format!("a read-out of rank {rank} of [{r1}, {r2}]"),
            });
        }
        // Any directions serve, as long as none is orthogonal to all that matters; SplitMix64's are the same everywhere.
        let mut seed = 0u64;
        let mut direction = || {
            seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        };
        let start: Vec<f64> = (0..r2 * width).map(|_| direction()).collect();
        let square = count * width * width;
        let blocks = r1.max(width).div_ceil(FACTOR_BLOCK);
        Ok(Self {
            kind,
            sites,
            iterations,
            width,
            lambdas: device.upload(lambdas)?,
            s: device.alloc(count * r1 * r2)?,
            g: (kind == Kind::Ridge)
                .then(|| device.alloc(count * r1 * r1))
                .transpose()?,
            start: device.upload(&start)?,
            y: device.alloc(count * r1 * width)?,
            z: device.alloc(count * r2 * width)?,
            u: device.alloc(count * r1 * width)?,
            v: device.alloc(count * r2 * width)?,
            gram: device.alloc(square)?,
            vectors: device.alloc(square)?,
            scratch: device.alloc(square)?,
            values: device.alloc(count * width)?,
            inverses: device.alloc(blocks * count * FACTOR_BLOCK * FACTOR_BLOCK)?,
            panel: device.alloc(count * r1.max(r2) * FACTOR_BLOCK)?,
            failed: device.zeros(count)?,
        })
    }

    /// Bytes of the memory that it works in.
    pub fn bytes(&self) -> usize {
        let f64s = [
            &self.s,
            &self.y,
            &self.z,
            &self.u,
            &self.v,
            &self.gram,
            &self.vectors,
            &self.scratch,
            &self.inverses,
            &self.panel,
        ];
        let g = self.g.as_ref().map_or(0, |g| g.view().len());
        (f64s.iter().map(|buffer| buffer.view().len()).sum::<usize>() + g) * size_of::<f64>()
    }

    /// Reads cores out of sums s [sites, R1, R2] and, for a ridge, g [sites, R1, R1], into a slot. floors `[sites]`: singular values at or
    /// below are rounding noise (eps Σ ||k_t|| ||v_t||). Whether it could is told by [`Self::check`].
    ///
    /// # Errors
    /// [`Error::Shape`] if something has another size; [`Error::Call`].
    pub fn run(
        &self,
        device: &Device,
        s: View<'_, f32>,
        g: Option<View<'_, f32>>,
        floors: View<'_, f64>,
        to: &Emitted<'_>,
    ) -> Result<(), Error> {
        let Sites {
            count,
            r1,
            r2,
            rank,
        } = self.sites;
        fits(s.len() == count * r1 * r2, || {
            format!("sums of {} elements of {:?}", s.len(), self.sites)
        })?;
        self.failed.view().clear(device)?;
        ops::widen(device, self.s.view(), s)?;
        if let Some(a) = &self.g {
            let g = g.filter(|g| g.len() == count * r1 * r1);
            let g = g.ok_or_else(|| crate::error::shape("a ridge without its key sums"))?;
            ops::symmetric(device, a.view(), g, self.lambdas.view(), r1, count)?;
            self.factor(device, a.view(), r1)?;
            self.solve(device, a.view())?;
        }
        if rank == 0 {
            return ops::emit_dense(device, to, self.s.view(), r1, r2, count);
        }
        self.decompose(device)?;
        let fold = self.kind == Kind::Ridge;
        ops::emit_low_rank(
            device,
            to,
            &self.factors(),
            floors,
            rank,
            RELATIVE_CUTOFF,
            fold,
        )
    }

    /// How many iterations runs from here on have. A graph keeps those that it was captured with.
    pub fn set_iterations(&mut self, iterations: usize) {
        self.iterations = iterations;
    }

    /// At most about so much of N, relative, a run of so many iterations may have left undone, by the singular values that it found: each
    /// iteration shrinks what is beyond the subspace by the square of its first value over the last that is kept. Ten times that, as values
    /// of few iterations are too small. Waits.
    ///
    /// # Errors
    /// [`Error::Call`] if something before failed.
    pub fn left(&self, iterations: usize) -> Result<f64, Error> {
        let Sites { r1, r2, rank, .. } = self.sites;
        if rank == 0 || self.width == r1.min(r2) {
            return Ok(0.0); // The subspace is all there is.
        }
        let squares = self.values.read()?; // [sites, p], descending
        let of_site = |squares: &[f64]| {
            let kept = squares[rank - 1].max(0.0);
            if kept <= squares[0] * RELATIVE_CUTOFF.powi(2) {
                return 0.0;
            }
            10.0 * (squares[squares.len() - 1].max(0.0) / kept).powi(iterations as i32)
        };
        let sites = squares.chunks_exact(self.width).map(of_site);
        Ok(sites.fold(0.0, f64::max))
    }

    /// Waits, and says whether the last run could factorise all sites.
    ///
    /// # Errors
    /// [`Error::NotPositive`] with the first site whose key sums could not be factorised.
    pub fn check(&self) -> Result<(), Error> {
        match self.failed.read()?.iter().position(|failed| *failed != 0) {
            Some(site) => Err(Error::NotPositive { site }),
            None => Ok(()),
        }
    }

    /// What the last run found, before it was cut off and rounded.
    pub fn factors(&self) -> Factors<'_> {
        let Sites { count, r1, r2, .. } = self.sites;
        Factors {
            u: self.u.view(),
            v: self.v.view(),
            values: self.values.view(),
            n: r1,
            r: r2,
            p: self.width,
            batch: count,
        }
    }

    /// N [sites, R1, R2] of the last ridge.
    pub fn solution(&self) -> View<'_, f64> {
        self.s.view()
    }

    fn batched(&self, m: usize, n: usize, k: usize) -> Product {
        Product {
            a_transposed: false,
            b_transposed: false,
            m,
            n,
            k,
            alpha: 1.0,
            beta: 0.0,
            batch: self.sites.count,
        }
    }

    fn inverse(&self, block: usize) -> Result<Matrix<'_, f64>, Error> {
        let size = self.sites.count * FACTOR_BLOCK * FACTOR_BLOCK;
        let view = self.inverses.view().part(block * size, size)?;
        Ok(Matrix {
            view,
            ld: FACTOR_BLOCK,
            stride: FACTOR_BLOCK * FACTOR_BLOCK,
        })
    }

    /// The lower triangle of a [sites, n, n] becomes its Cholesky factor; the diagonal blocks' inverses are kept.
    fn factor(&self, device: &Device, a: View<'_, f64>, n: usize) -> Result<(), Error> {
        let count = self.sites.count;
        for (block, at) in (0..n).step_by(FACTOR_BLOCK).enumerate() {
            let size = FACTOR_BLOCK.min(n - at);
            let inverse = self.inverse(block)?;
            ops::factor_block(
                device,
                a,
                inverse.view,
                self.failed.view(),
                n,
                at,
                size,
                count,
            )?;
            let below = n - at - size;
            if below == 0 {
                break;
            }
            let under = at_block(a, n, at + size, at)?;
            let panel = Matrix {
                view: self.panel.view(),
                ld: size,
                stride: below * size,
            };
            let scaled = Product {
                b_transposed: true,
                ..self.batched(below, size, size)
            };
            ops::multiply(device, &scaled, under, inverse, panel)?;
            ops::copy_block(device, under, panel, below, size, count)?;
            let trailing = Product {
                b_transposed: true,
                ..self.batched(below, below, size)
            };
            ops::multiply(
                device,
                &trailing.scaled(-1.0, 1.0),
                panel,
                panel,
                at_block(a, n, at + size, at + size)?,
            )?;
        }
        Ok(())
    }

    /// s = (L Lᵀ)⁻¹ s for L [sites, R1, R1], blocks of rows forwards, then backwards.
    fn solve(&self, device: &Device, l: View<'_, f64>) -> Result<(), Error> {
        let Sites { count, r1, r2, .. } = self.sites;
        let rows = |at: usize| -> Result<Matrix<'_, f64>, Error> {
            let view = self.s.view();
            Ok(Matrix {
                view: view.part(at * r2, view.len() - at * r2)?,
                ld: r2,
                stride: r1 * r2,
            })
        };
        let starts: Vec<_> = (0..r1).step_by(FACTOR_BLOCK).enumerate().collect();
        for forwards in [true, false] {
            let order: Vec<_> = if forwards {
                starts.clone()
            } else {
                starts.iter().rev().copied().collect()
            };
            for (block, at) in order {
                let size = FACTOR_BLOCK.min(r1 - at);
                let solved = Matrix {
                    view: self.panel.view(),
                    ld: r2,
                    stride: size * r2,
                };
                let own = Product {
                    a_transposed: !forwards,
                    ..self.batched(size, r2, size)
                };
                ops::multiply(device, &own, self.inverse(block)?, rows(at)?, solved)?;
                ops::copy_block(device, rows(at)?, solved, size, r2, count)?;
                if forwards && at + size < r1 {
                    let others = self.batched(r1 - at - size, r2, size).scaled(-1.0, 1.0);
                    ops::multiply(
                        device,
                        &others,
                        at_block(l, r1, at + size, at)?,
                        solved,
                        rows(at + size)?,
                    )?;
                } else if !forwards && at > 0 {
                    let others = Product {
                        a_transposed: true,
                        ..self.batched(at, r2, size)
                    }
                    .scaled(-1.0, 1.0);
                    ops::multiply(device, &others, at_block(l, r1, at, 0)?, solved, rows(0)?)?;
                }
            }
        }
        Ok(())
    }

    /// The leading singular vectors of s: subspace iteration, then the exact decomposition within the subspace.
    fn decompose(&self, device: &Device) -> Result<(), Error> {
        let (Sites { count, r1, r2, .. }, p) = (self.sites, self.width);
        let s = Matrix {
            view: self.s.view(),
            ld: r2,
            stride: r1 * r2,
        };
        let y = Matrix {
            view: self.y.view(),
            ld: p,
            stride: r1 * p,
        };
        let z = Matrix {
            view: self.z.view(),
            ld: p,
            stride: r2 * p,
        };
        let start = Matrix {
            view: self.start.view(),
            ld: p,
            stride: 0,
        };
        let into_y = self.batched(r1, p, r2);
        let into_z = Product {
            a_transposed: true,
            ..self.batched(r2, p, r1)
        };
        ops::multiply(device, &into_y, s, start, y)?;
        for _ in 0..self.iterations {
            self.orthonormalise(device, y, r1)?;
            ops::multiply(device, &into_z, s, y, z)?;
            self.orthonormalise(device, z, r2)?;
            ops::multiply(device, &into_y, s, z, y)?;
        }
        self.orthonormalise(device, y, r1)?;
        self.orthonormalise(device, y, r1)?;
        ops::multiply(device, &into_z, s, y, z)?; // z = Sᵀ Y: S projected is Y zᵀ
        let square = Matrix {
            view: self.gram.view(),
            ld: p,
            stride: p * p,
        };
        let gram = Product {
            a_transposed: true,
            ..self.batched(p, p, r2)
        };
        ops::multiply(device, &gram, z, z, square)?;
        ops::eigen(
            device,
            self.values.view(),
            self.vectors.view(),
            self.scratch.view(),
            self.gram.view(),
            p,
            SWEEPS,
            count,
        )?;
        let w = Matrix {
            view: self.vectors.view(),
            ld: p,
            stride: p * p,
        };
        ops::multiply(
            device,
            &self.batched(r1, p, p),
            y,
            w,
            Matrix {
                view: self.u.view(),
                ld: p,
                stride: r1 * p,
            },
        )?;
        ops::multiply(
            device,
            &self.batched(r2, p, p),
            z,
            w,
            Matrix {
                view: self.v.view(),
                ld: p,
                stride: r2 * p,
            },
        )
    }

    /// y [sites, rows, p] = y L⁻ᵀ with L Lᵀ = yᵀ y + shift: orthonormal columns, but for directions that are not there.
    fn orthonormalise(
        &self,
        device: &Device,
        y: Matrix<'_, f64>,
        rows: usize,
    ) -> Result<(), Error> {
        let (count, p) = (self.sites.count, self.width);
        let l = self.gram.view();
        let square = Matrix {
            view: l,
            ld: p,
            stride: p * p,
        };
        let gram = Product {
            a_transposed: true,
            ..self.batched(p, p, rows)
        };
        ops::multiply(device, &gram, y, y, square)?;
        ops::shift_diagonal(device, l, p, SHIFT, count)?;
        self.factor(device, l, p)?;
        let columns = |at: usize| -> Result<Matrix<'_, f64>, Error> {
            Ok(Matrix {
                view: y.view.part(at, y.view.len() - at)?,
                ..y
            })
        };
        for (block, at) in (0..p).step_by(FACTOR_BLOCK).enumerate() {
            let size = FACTOR_BLOCK.min(p - at);
            let solved = Matrix {
                view: self.panel.view(),
                ld: size,
                stride: rows * size,
            };
            let own = Product {
                b_transposed: true,
                ..self.batched(rows, size, size)
            };
            ops::multiply(device, &own, columns(at)?, self.inverse(block)?, solved)?;
            ops::copy_block(device, columns(at)?, solved, rows, size, count)?;
            let right = p - at - size;
            if right > 0 {
                let others = Product {
                    b_transposed: true,
                    ..self.batched(rows, right, size)
                }
                .scaled(-1.0, 1.0);
                ops::multiply(
                    device,
                    &others,
                    solved,
                    at_block(l, p, at + size, at)?,
                    columns(at + size)?,
                )?;
            }
        }
        Ok(())
    }
}

/// The part of matrices a [sites, n, n] that begins at (row, column).
fn at_block(
    a: View<'_, f64>,
    n: usize,
    row: usize,
    column: usize,
) -> Result<Matrix<'_, f64>, Error> {
    let at = row * n + column;
    Ok(Matrix {
        view: a.part(at, a.len() - at)?,
        ld: n,
        stride: n * n,
    })
}
