//! N = (G + lambda I)⁻¹ S in f32: what a ridge core is.
//!
//! A Cholesky factor in blocks of [`BLOCK`] rows: products in f32, blocks on the diagonal in f64. One thread, and every element one
//! chain of fused multiply-adds in an order that hangs on the sizes alone: equal sums give equal bits on every vector unit.
//!
//! Rounding acts like a change of G by some 1e-7 of its largest eigenvalue, about what the f32 sums of G have themselves. No pivot of
//! G + lambda I is below lambda; where rounding has brought one far below, there is no result, and who asks takes f64.
//! Start at [`ridge`].
#![expect(unsafe_code, reason = "products on raw addresses")]

#[cfg(test)]
mod tests;

use candle_core::{Result, Tensor, bail};

use crate::{
    floats::{Floats, tensor, transpose},
    gemm::{Begin, Left, Out, Steps, multiply},
    simd::LANES,
};

/// Rows of a block: four tiles of AVX2's six.
const BLOCK: usize = 24;

/// Nᵀ [C, R] of each of `sides` [R, C], N = (G + lambda I)⁻¹ side; g [R, R], of which the two triangles are averaged, lambda > 0.
/// None if f32 does not suffice: G is not positive, too ill-conditioned, or something is not finite.
///
/// Fails for other shapes.
pub fn ridge(g: &Tensor, lambda: f64, sides: &[&Tensor]) -> Result<Option<Vec<Tensor>>> {
    let (size, columns) = g.dims2()?;
    if size != columns || sides.iter().any(|side| side.dims().first() != Some(&size)) {
        let sides: Vec<_> = sides.iter().map(|side| side.dims()).collect();
        bail!("sides {sides:?} of {:?}", g.dims())
    }
    let g = g.contiguous()?;
    let Some(factor) = Factor::of(&Floats::of(&g)?, size, lambda) else {
        return Ok(None);
    };
    let mut solved = Vec::with_capacity(sides.len());
    for side in sides {
        let (_, columns) = side.dims2()?;
        let side = side.contiguous()?;
        let turned = factor.solve(&Floats::of(&side)?, columns); // [C, R]
        // All of them, as vectors look: no value ends the loop.
        if turned
            .iter()
            .fold(false, |bad, value| bad | !value.is_finite())
        {
            return Ok(None);
        }
        solved.push(tensor(turned, (columns, size))?);
    }
    Ok(Some(solved))
}

/// G + lambda I = L Lᵀ.
struct Factor {
    size: usize,
    /// -L [R, R], without its blocks on the diagonal, and its transpose.
    below: Vec<f32>,
    above: Vec<f32>,
    /// The inverses of the blocks on the diagonal, and their transposes, BLOCK rows of BLOCK each.
    inverses: Vec<[f32; BLOCK * BLOCK]>,
    turned: Vec<[f32; BLOCK * BLOCK]>,
}

impl Factor {
    /// g [R, R].
    fn of(g: &[f32], size: usize, lambda: f64) -> Option<Self> {
        let mut rest = averaged(g, size); // [R, R]
        let mut below = vec![0.0; size * size]; // [R, R]
        let (mut inverses, mut turned) = (Vec::new(), Vec::new());
        let mut scratch = vec![0.0; size.max(BLOCK) * LANES]; // [R, 16]
        for first in (0..size).step_by(BLOCK) {
            let rows = BLOCK.min(size - first);
            // What the blocks to the left take away: rest += (-L) Lᵀ.
            for column in (first..first + rows).step_by(LANES) {
                let columns = LANES.min(first + rows - column);
                for lane in 0..columns {
                    let row = &below[(column + lane) * size..][..first];
                    for (to, value) in scratch[lane..].iter_mut().step_by(LANES).zip(row) {
                        *to = -value;
                    }
                }
                // SAFETY: rows `first ..` of both matrices, of `size` floats each, begin where is said; the scratch holds `first`
                // steps of 16 columns; the `columns` columns from `column` on are within a row.
                unsafe {
                    multiply(
                        left(&below, first * size, size),
                        steps(&scratch),
                        out(&mut rest, first * size + column, size, columns),
                        size - first,
                        first,
                        Begin::Out,
                    );
                }
            }
            let inverse = inverse(&rest[first * size + first..], size, rows, lambda)?; // [rows, rows]
            let back = transpose(&inverse, BLOCK, BLOCK);
            // L below the block: rest W ᵀ.
            let under = first + rows;
            for column in (0..rows).step_by(LANES) {
                for (to, row) in scratch
                    .chunks_exact_mut(LANES)
                    .zip(back.chunks_exact(BLOCK))
                {
                    for (lane, to) in to.iter_mut().enumerate() {
                        *to = row.get(column + lane).map_or(0.0, |value| -value);
                    }
                }
                if under == size {
                    break;
                }
                // SAFETY: rows `under ..` of both matrices; the scratch holds BLOCK steps of 16 columns; columns as above.
                unsafe {
                    multiply(
                        left(&rest, under * size + first, size),
                        steps(&scratch),
                        out(
                            &mut below,
                            under * size + first + column,
                            size,
                            LANES.min(rows - column),
                        ),
                        size - under,
                        rows,
                        Begin::Zero,
                    );
                }
            }
            inverses.push(inverse);
            turned.push(back.try_into().ok()?);
        }
        Some(Self {
            size,
            above: transpose(&below, size, size),
            below,
            inverses,
            turned,
        })
    }

    /// side [R, C] -> [C, R], sixteen columns at a time.
    fn solve(&self, side: &[f32], columns: usize) -> Vec<f32> {
        let size = self.size;
        let mut solved = vec![0.0; columns * size]; // [C, R]
        let mut y = vec![0.0; size * LANES]; // [R, 16]
        for column in (0..columns).step_by(LANES) {
            let count = LANES.min(columns - column);
            for (y, side) in y.chunks_exact_mut(LANES).zip(side.chunks_exact(columns)) {
                y[..count].copy_from_slice(&side[column..column + count]);
                y[count..].fill(0.0);
            }
            self.solve_sixteen(&mut y);
            let turned = transpose(&y, size, LANES); // [16, R]
            solved[column * size..][..count * size].copy_from_slice(&turned[..count * size]);
        }
        solved
    }

    /// y [R, 16] -> (L Lᵀ)⁻¹ y in its place.
    fn solve_sixteen(&self, y: &mut [f32]) {
        let size = self.size;
        assert!(y.len() == size * LANES, "sixteen columns of a side");
        let at = y.as_mut_ptr();
        // Rows of y from one on: what is read, and what is written.
        let (read, written) = (
            |row: usize| Steps {
                at: at.wrapping_add(row * LANES),
                row: LANES,
            },
            |row: usize| Out {
                at: at.wrapping_add(row * LANES),
                row: LANES,
                columns: LANES,
            },
        );
        // L z = y, from the first block on.
        for (block, inverse) in self.inverses.iter().enumerate() {
            let first = block * BLOCK;
            let rows = BLOCK.min(size - first);
            // SAFETY: rows `first ..` of -L have as many steps as stand above them in y, and only their rows in y are written.
            unsafe {
                multiply(
                    left(&self.below, first * size, size),
                    read(0),
                    written(first),
                    rows,
                    first,
                    Begin::Out,
                );
                times(inverse, read(first), written(first), rows);
            }
        }
        // Lᵀ x = z, from the last block on.
        for (block, turned) in self.turned.iter().enumerate().rev() {
            let first = block * BLOCK;
            let rows = BLOCK.min(size - first);
            let under = first + rows;
            // SAFETY: rows `first ..` of -Lᵀ, from column `under` on, have as many steps as stand below them in y; as above.
            unsafe {
                if under < size {
                    multiply(
                        left(&self.above, first * size + under, size),
                        read(under),
                        written(first),
                        rows,
                        size - under,
                        Begin::Out,
                    );
                }
                times(turned, read(first), written(first), rows);
            }
        }
    }
}

/// y [rows, 16] -> W y in its place, W the first rows and columns of a block.
///
/// # Safety
/// Both name the same `rows` (at most BLOCK) rows of y, which nobody else writes meanwhile.
unsafe fn times(w: &[f32; BLOCK * BLOCK], y: Steps, to: Out, rows: usize) {
    let mut product = [0.0; BLOCK * LANES]; // [rows, 16]
    // SAFETY: `rows` rows of BLOCK floats in W, of 16 in the product, and as the caller says.
    unsafe {
        multiply(
            left(w, 0, BLOCK),
            y,
            out(&mut product, 0, LANES, LANES),
            rows,
            rows,
            Begin::Zero,
        );
        std::ptr::copy_nonoverlapping(product.as_ptr(), to.at, rows * LANES);
    }
}

fn left(values: &[f32], from: usize, row: usize) -> Left {
    Left {
        at: values[from..].as_ptr(),
        row,
    }
}

fn steps(values: &[f32]) -> Steps {
    Steps {
        at: values.as_ptr(),
        row: LANES,
    }
}

fn out(values: &mut [f32], from: usize, row: usize, columns: usize) -> Out {
    Out {
        at: values[from..].as_mut_ptr(),
        row,
        columns,
    }
}

/// (G + Gᵀ) / 2 [R, R].
fn averaged(g: &[f32], size: usize) -> Vec<f32> {
    let mut averaged = transpose(g, size, size);
    for (other, value) in averaged.iter_mut().zip(g) {
        *other = 0.5 * (value + *other);
    }
    averaged
}

/// The inverse of the Cholesky factor of a block + lambda I, in f64: block [rows, rows], `stride` floats from row to row. None if a
/// pivot is below half of lambda.
fn inverse(block: &[f32], stride: usize, rows: usize, lambda: f64) -> Option<[f32; BLOCK * BLOCK]> {
    let mut l = [[0.0_f64; BLOCK]; BLOCK];
    for i in 0..rows {
        for j in 0..=i {
            let mut sum = f64::from(block[i * stride + j]);
            if i == j {
                sum += lambda;
            }
            for (left, above) in l[i].iter().zip(&l[j]).take(j) {
                sum -= left * above;
            }
            if i > j {
                l[i][j] = sum / l[j][j];
            } else if sum >= 0.5 * lambda && sum.is_finite() {
                l[i][i] = sum.sqrt();
            } else {
                return None;
            }
        }
    }
    let mut w = [[0.0_f64; BLOCK]; BLOCK];
    let mut inverse = [0.0; BLOCK * BLOCK];
    for i in 0..rows {
        for j in 0..=i {
            let mut sum = if i == j { 1.0 } else { 0.0 };
            for k in j..i {
                sum -= l[i][k] * w[k][j];
            }
            w[i][j] = sum / l[i][i];
            inverse[i * BLOCK + j] = w[i][j] as f32;
        }
    }
    Some(inverse)
}
