//! The f32 values of CPU tensors as slices, and tensors out of them.
//!
//! The only file that knows how candle stores a tensor. Start at [`Floats`].
#![expect(
    unsafe_code,
    reason = "results that are written once and not cleared before"
)]

use std::{
    mem::MaybeUninit,
    ops::{Deref, Range},
};

use candle_core::{CpuStorage, Device, Layout, Result, Shape, Storage, StorageRef, Tensor, bail};

use crate::simd::{Isa, Kernel, LANES, run};

#[cfg(test)]
mod tests;

/// The values of a contiguous f32 tensor on the CPU, row-major, readable while this guard lives.
///
/// Holds the tensor's read lock: drop it before anything writes into the same storage.
pub struct Floats<'a> {
    storage: StorageRef<'a>,
    range: Range<usize>,
}

impl<'a> Floats<'a> {
    /// Fails for a tensor that is not f32, not contiguous or not on the CPU.
    pub fn of(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let range = match &*storage {
            Storage::Cpu(CpuStorage::F32(_)) => contiguous(layout)?,
            Storage::Cpu(_) => bail!("expected an f32 tensor, got {:?}", tensor.dtype()),
            Storage::Cuda(_) | Storage::Metal(_) => {
                bail!("expected a tensor on the CPU, got {:?}", tensor.device())
            }
        };
        Ok(Self { storage, range })
    }
}

impl Deref for Floats<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.clone()],
            // `of` let nothing else in.
            Storage::Cpu(_) | Storage::Cuda(_) | Storage::Metal(_) => &[],
        }
    }
}

/// The values of a tensor that is being written in place.
pub(crate) fn floats_mut<'a>(
    storage: &'a mut CpuStorage,
    layout: &Layout,
) -> Result<&'a mut [f32]> {
    let range = contiguous(layout)?;
    match storage {
        CpuStorage::F32(values) => Ok(&mut values[range]),
        _ => bail!("expected an f32 tensor"),
    }
}

/// The values of a source of an in-place operation.
pub(crate) fn floats_of<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let range = contiguous(layout)?;
    match storage {
        CpuStorage::F32(values) => Ok(&values[range]),
        _ => bail!("expected an f32 tensor"),
    }
}

/// A CPU tensor of these values.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), &Device::Cpu)
}

/// `len` values that `fill` writes, without clearing them first: clearing took 2 % of a prefill.
///
/// # Safety
/// `fill` writes all of them.
pub(crate) unsafe fn filled<T: Copy>(
    len: usize,
    fill: impl FnOnce(&mut [MaybeUninit<T>]),
) -> Vec<T> {
    let mut values = Vec::with_capacity(len);
    fill(&mut values.spare_capacity_mut()[..len]);
    // SAFETY: as the caller says.
    unsafe { values.set_len(len) }
    values
}

/// [rows, columns] -> [columns, rows], in squares of eight that a vector unit turns.
pub(crate) fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    assert!(values.len() == rows * columns, "a matrix of another size");
    let turn = |to: &mut [MaybeUninit<f32>]| {
        run(Transpose {
            values,
            rows,
            columns,
            to,
        });
    };
    // SAFETY: every value has its place in the turned matrix.
    unsafe { filled(values.len(), turn) }
}

struct Transpose<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    to: &'a mut [MaybeUninit<f32>],
}

impl Kernel for Transpose<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self {
            values,
            rows,
            columns,
            to,
        } = self;
        const SIDE: usize = 8;
        let (whole_rows, whole_columns) = (rows / SIDE * SIDE, columns / SIDE * SIDE);
        let mut square = [0.0f32; SIDE * LANES];
        for row in (0..whole_rows).step_by(SIDE) {
            for column in (0..whole_columns).step_by(SIDE) {
                let mut at = [std::ptr::null(); SIDE];
                for (i, at) in at.iter_mut().enumerate() {
                    *at = values[(row + i) * columns + column..][..SIDE].as_ptr();
                }
                // SAFETY: eight floats of each of eight rows, and the square holds eight sixteens.
                unsafe { isa.turn(&at, square.as_mut_ptr()) };
                for (i, turned) in square.chunks_exact(LANES).enumerate() {
                    let to = &mut to[(column + i) * rows + row..][..SIDE];
                    for (to, value) in to.iter_mut().zip(turned) {
                        to.write(*value);
                    }
                }
            }
        }
        for row in 0..rows {
            let done = if row < whole_rows { whole_columns } else { 0 };
            for column in done..columns {
                to[column * rows + row].write(values[row * columns + column]);
            }
        }
    }
}

fn contiguous(layout: &Layout) -> Result<Range<usize>> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!(
            "expected a contiguous tensor, got strides {:?} for {:?}",
            layout.stride(),
            layout.shape()
        )
    };
    Ok(start..end)
}
