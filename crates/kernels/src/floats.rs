//! The f32 values of CPU tensors as slices, and tensors out of them.
//!
//! The only file that knows how candle stores a tensor. Start at [`Floats`].

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, Device, Layout, Result, Shape, Storage, StorageRef, Tensor, bail};

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

/// [rows, columns] -> [columns, rows], in squares that stay in L1.
pub(crate) fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    const SQUARE: usize = 16;
    let mut turned = vec![0.0; values.len()];
    for row in (0..rows).step_by(SQUARE) {
        for column in (0..columns).step_by(SQUARE) {
            for c in column..columns.min(column + SQUARE) {
                for r in row..rows.min(row + SQUARE) {
                    turned[c * rows + r] = values[r * columns + c];
                }
            }
        }
    }
    turned
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
