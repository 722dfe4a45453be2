//! Decode batches of one size, captured as graphs: which cores and which tokens are data.
//!
//! Start at [`Bucket::capture`].

use super::Model;
use crate::{Batch, Capacity, Error, Graph, error::fits};

/// Decode batches of one size: their rows, and two graphs of the forward, for batches with cores and without.
pub struct Bucket {
    /// To be filled before a step.
    pub batch: Batch,
    bare: Graph,
    adapted: Option<Graph>,
}

/// Into how many parts a decode batch of `rows` splits keys: enough blocks for about six on each multiprocessor.
pub fn splits_for(rows: usize, kv_heads: usize, multiprocessors: usize) -> usize {
    (6 * multiprocessors)
        .div_ceil(rows.max(1) * kv_heads.max(1))
        .clamp(2, 32)
}

impl Bucket {
    /// Captures the forward of `rows` rows with up to `blocks` blocks each.
    ///
    /// # Errors
    /// [`Error::Shape`] for more rows than the model has memory for; [`Error::Call`].
    pub fn capture(
        model: &Model,
        rows: usize,
        blocks: usize,
        multiprocessors: usize,
    ) -> Result<Self, Error> {
        let splits = splits_for(rows, model.shape.heads.keys, multiprocessors)
            .min(model.memory.parts / rows.max(1));
        fits(splits >= 2, || format!("{rows} rows of {:?}", model.memory))?;
        let device = &model.device;
        let mut batch = Batch::new(
            device,
            Capacity {
                rows,
                sequences: rows,
                blocks,
                splits,
            },
            model.shape.heads,
        )?;
        batch.fill(device, &[], &model.limits())?;
        let graph = |adapted: bool| {
            // Once before: what cuBLAS loads and chooses at its first call cannot be captured.
            model.pass(&batch, &[], adapted)?;
            device.synchronize()?;
            device.capture(|| model.pass(&batch, &[], adapted))
        };
        let bare = graph(false)?;
        let adapted = model.generator.is_some().then(|| graph(true)).transpose()?;
        Ok(Self {
            batch,
            bare,
            adapted,
        })
    }

    /// Runs what the batch was filled with.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn launch(&self) -> Result<(), Error> {
        match &self.adapted {
            Some(graph) if self.batch.any_core => graph.launch(),
            _ => self.bare.launch(),
        }
    }
}
