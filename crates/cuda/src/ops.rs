//! Every kernel as a function whose operands are checked, and the dense products of cuBLAS.
//!
//! What each computes stands in its twin ([`crate::twin`], the same name) and in kernels/*.cu. Operands are checked for size
//! before anything is launched; what is data on the device (slots, positions, blocks) is its writer's matter, and is checked there.

mod attention;
mod cores;
mod draw;
mod factor;
mod quant;
mod rows;

pub use attention::{
    Attention, Cache, Heads, Parts, Rotation, Sequences, attend, queries_of_tile, rope_append,
};
pub use cores::{SiteCores, SiteGates, apply_cores, close_gates};
pub use draw::{Draw, draw, seen_words};
pub use factor::{
    EIGEN_MAX, Emitted, FACTOR_BLOCK, Factors, copy_block, eigen, emit_dense, emit_low_rank,
    factor_block, shift_diagonal, symmetric, widen,
};
pub use quant::{MOST_ROWS, QUANTISED_BLOCK, Quantised, dequantise, multiply_quantised};
pub use rows::{
    add_bias, add_mass, add_rms_norm, add_scaled, add_scaled_masses, gather_residual, gather_rows,
    head_norm, narrow, norm_residual, rms_norm, silu_mul,
};

use crate::{
    Buffer, Device, Error, View,
    device::{Argument, Element, Gemm},
    error::{fits, shape},
};

/// A matrix, or `batch` of them `stride` elements apart: row-major, rows `ld` elements apart.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, T> {
    /// Where the first row begins.
    pub view: View<'a, T>,
    /// From row to row.
    pub ld: usize,
    /// From matrix to matrix; 0: one for all.
    pub stride: usize,
}

impl<'a, T: Element> Matrix<'a, T> {
    /// A matrix with nothing between its rows.
    pub fn dense(view: View<'a, T>, columns: usize) -> Self {
        Self {
            view,
            ld: columns,
            stride: 0,
        }
    }
}

/// What is multiplied: C [m, n] = alpha op(A) [m, k] op(B) [k, n] + beta C.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// A is stored [k, m].
    pub a_transposed: bool,
    /// B is stored [n, k].
    pub b_transposed: bool,
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Terms of a sum.
    pub k: usize,
    /// Factor of the product.
    pub alpha: f64,
    /// Factor of what stands in C; at 0 it is not read.
    pub beta: f64,
    /// Matrices.
    pub batch: usize,
}

impl Product {
    /// C [m, n] = A [m, k] Wᵀ, W [n, k]: a linear.
    pub fn linear(m: usize, n: usize, k: usize) -> Self {
        Self {
            a_transposed: false,
            b_transposed: true,
            m,
            n,
            k,
            alpha: 1.0,
            beta: 0.0,
            batch: 1,
        }
    }

    /// The same, added to what stands in C, times a factor.
    #[must_use]
    pub fn scaled(self, alpha: f64, beta: f64) -> Self {
        Self {
            alpha,
            beta,
            ..self
        }
    }
}

/// A product by cuBLAS. Sums are in f32 for operands in bf16 (C in bf16 or f32) and in f32 (which are rounded to TF32, ten bits behind the
/// first), in f64 for f64.
///
/// # Errors
/// [`Error::Shape`] if an operand reaches beyond its buffer; [`Error::Call`] where cuBLAS refuses.
pub fn multiply<T: Element, C: Element>(
    device: &Device,
    product: &Product,
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    c: Matrix<'_, C>,
) -> Result<(), Error> {
    let Product {
        a_transposed,
        b_transposed,
        m,
        n,
        k,
        alpha,
        beta,
        batch,
    } = *product;
    if m == 0 || n == 0 || batch == 0 {
        return Ok(());
    }
    fits(k > 0, || "a product over nothing".into())?;
    let stored = |transposed, rows, columns| {
        if transposed {
            (columns, rows)
        } else {
            (rows, columns)
        }
    };
    let a_shape = stored(a_transposed, m, k);
    let b_shape = stored(b_transposed, k, n);
    let reach = |(rows, columns): (usize, usize), ld: usize, stride: usize| {
        stride
            .checked_mul(batch - 1)?
            .checked_add(ld.checked_mul(rows - 1)?)?
            .checked_add(columns)
    };
    let inside = |len: usize, size: (usize, usize), ld: usize, stride: usize| {
        size.1 <= ld && reach(size, ld, stride).is_some_and(|end| end <= len)
    };
    fits(
        inside(a.view.len, a_shape, a.ld, a.stride)
            && inside(b.view.len, b_shape, b.ld, b.stride)
            && inside(c.view.len, (m, n), c.ld, c.stride),
        || {
            format!(
                "a product [{m}, {k}] [{k}, {n}] of buffers of {}, {} and {}",
                a.view.len, b.view.len, c.view.len
            )
        },
    )?;
    let int =
        |n: usize| i32::try_from(n).map_err(|_| shape(format!("a product with a size of {n}")));
    device.gemm(&Gemm {
        transposed: (a_transposed, b_transposed),
        m: int(m)?,
        n: int(n)?,
        k: int(k)?,
        alpha,
        beta,
        a: (a.view.address, T::TYPE, int(a.ld)?, a.stride as i64),
        b: (b.view.address, T::TYPE, int(b.ld)?, b.stride as i64),
        c: (c.view.address, C::TYPE, int(c.ld)?, c.stride as i64),
        batch: int(batch)?,
    })
}

fn u32_of(n: usize) -> Result<u32, Error> {
    u32::try_from(n).map_err(|_| shape(format!("a size of {n}")))
}

fn of(n: usize) -> Result<Argument, Error> {
    u32_of(n).map(Argument::U32)
}

/// Sizes that a row is read by, in steps of 16 bytes.
fn eights(sizes: &[usize]) -> Result<(), Error> {
    fits(sizes.iter().all(|n| n.is_multiple_of(8) && *n > 0), || {
        format!("sizes {sizes:?} that are not multiples of 8")
    })
}

fn holds<T: Element>(what: &str, view: View<'_, T>, len: usize) -> Result<(), Error> {
    fits(view.len >= len, || {
        format!("{what}: {} elements, not {len}", view.len)
    })
}

/// A null pointer where an operand is not there.
fn optional<T: Element>(view: Option<View<'_, T>>) -> Argument {
    view.map_or(Argument::Pointer(0), |view| view.argument())
}

/// A buffer's view, where both are at hand.
impl<'a, T: Element> From<&'a Buffer<T>> for View<'a, T> {
    fn from(buffer: &'a Buffer<T>) -> Self {
        buffer.view()
    }
}
