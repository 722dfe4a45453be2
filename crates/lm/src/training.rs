//! The same forward for training: what sites see of a context, and sequences that gradients can follow.
//!
//! Context passes and teachers run over a cache, without gradients; queries attend to their own tokens, and are
//! differentiable from the first linear on that an adapter's delta reaches. What was trained answers over a cache again,
//! whether it is a generator or not. Start at [`Lm::observe`], [`Lm::differentiable`] and [`Lm::adapted`].

use candle_core::{DType, Device, Tensor};
use generator::{Adapter, Seen, SiteId};
use kernels::Linear;

use crate::{Error, KvCache, Lm, Output, Row, TokenId, batch::Batch};

impl Lm {
    /// From now on what training asks ([`Lm::observe`], [`Lm::hidden`], [`Lm::differentiable`], [`Lm::residuals`],
    /// [`Lm::normed_embeddings`], over caches of [`Lm::training_cache`]) computes on `device` with activations and frozen weights of
    /// `dtype`, by candle's own operations where that is not f32 on the processor. All else stays as it was. The first pass copies
    /// the weights; another device or type later is refused.
    pub fn train_on(&mut self, device: Device, dtype: DType) {
        self.training = Some((device, dtype));
    }

    /// A cache for context passes and teachers, where these compute.
    ///
    /// # Errors
    /// As [`KvCache::new`].
    pub fn training_cache(&self, blocks: usize, block_size: usize) -> Result<KvCache, Error> {
        match &self.training {
            Some(place) => KvCache::of(self.config(), blocks, block_size, place),
            None => KvCache::new(self.config(), blocks, block_size),
        }
    }

    /// Rows of the embedding where training computes, [T, D].
    fn embedded(&self, tokens: &[u32]) -> Result<Tensor, Error> {
        let h = self.embedding.rows(tokens)?; // [T, D]
        match &self.training {
            Some((device, dtype)) => Ok(h.to_device(device)?.to_dtype(*dtype)?),
            None => Ok(h),
        }
    }

    /// Reads rows and hands out what `sites` see of their tokens, rows in order: x [T, Din] and h [T, D] each. Rows
    /// run with the deltas of `adapter`, or bare. `fill`: the cache gets the keys and values of all layers, so that
    /// rows may come behind; else the pass ends at the last site.
    ///
    /// # Errors
    /// What [`Lm::forward`] says of a row; [`Error::NoSite`] for a site that the model does not have.
    pub fn observe<'a>(
        &self,
        rows: &mut [Row<'a>],
        kv: &KvCache,
        sites: &[SiteId],
        adapter: Option<&'a dyn Adapter>,
        fill: bool,
    ) -> Result<Vec<Seen>, Error> {
        if let Some(site) = sites.iter().find(|site| site.layer >= self.config().layers) {
            return Err(Error::NoSite { site: *site });
        }
        let caches = kv.layers(self.config())?;
        let mut batch = Batch::new(rows, self.config(), self.generator(), kv)?;
        batch.adapter = adapter;
        batch.watch(sites, fill, self.config().layers);
        if !batch.is_empty() {
            let h = self.embedded(&batch.tokens)?; // [T, D]
            self.through(h, &mut batch, Some(caches), None)?;
        }
        batch.seen().ok_or(Error::EmptyRow { row: 0 })
    }

    /// One forward of a ragged batch up to the input of the head, [sum of Row::logits, D]; None if none is wanted.
    ///
    /// # Errors
    /// What [`Lm::forward`] says of a row.
    pub fn hidden(&self, rows: &mut [Row<'_>], kv: &KvCache) -> Result<Option<Tensor>, Error> {
        let caches = kv.layers(self.config())?;
        let mut batch = Batch::new(rows, self.config(), self.generator(), kv)?;
        if batch.is_empty() {
            return Ok(None);
        }
        let h = self.embedded(&batch.tokens)?; // [T, D]
        self.through(h, &mut batch, Some(caches), None)
    }

    /// Sequences from position 0 on, (tokens, how many of the last are wanted) each, with the deltas of `adapter`:
    /// the input of the head at the wanted positions [wanted, D], None if none is. Differentiable in the adapter's
    /// tensors; the same numbers as [`Lm::hidden`], bit for bit.
    ///
    /// # Errors
    /// What [`Lm::forward`] says of a row.
    pub fn differentiable<'a>(
        &self,
        sequences: &[(&'a [TokenId], usize)],
        adapter: Option<&'a dyn Adapter>,
    ) -> Result<Option<Tensor>, Error> {
        let mut batch = Batch::whole(sequences, self.config(), adapter)?;
        if batch.is_empty() {
            return Ok(None);
        }
        let h = self.embedded(&batch.tokens)?; // [T, D]
        self.through(h, &mut batch, None, None)
    }

    /// [`Lm::forward`] with the deltas of `adapter` in place of the attached generator's: the same numbers as
    /// [`Lm::differentiable`], bit for bit. Rows' cores are not used, and nothing is written.
    ///
    /// # Errors
    /// What [`Lm::forward`] says of a row, and what the adapter says.
    pub fn adapted(
        &self,
        rows: &mut [Row<'_>],
        kv: &KvCache,
        adapter: &(dyn Adapter + Sync),
    ) -> Result<Output, Error> {
        kernels::on_pool(|| {
            let caches = kv.layers(self.config())?;
            let mut batch = Batch::new(rows, self.config(), self.generator(), kv)?;
            if batch.is_empty() {
                return Ok(Output { logits: None });
            }
            batch.adapter = Some(adapter);
            let h = self.embedding.rows(&batch.tokens)?; // [T, D]
            let h = self.through(h, &mut batch, Some(caches), None)?; // [wanted, D]
            let logits = h.map(|h| self.head.forward(&h)).transpose()?; // [wanted, V]
            Ok(Output { logits })
        })
    }

    /// The residual behind the last layer, before the final norm, at the wanted positions of bare sequences as in
    /// [`Lm::differentiable`]: [wanted, D].
    ///
    /// # Errors
    /// What [`Lm::forward`] says of a row.
    pub fn residuals(&self, sequences: &[(&[TokenId], usize)]) -> Result<Option<Tensor>, Error> {
        let mut batch = Batch::whole(sequences, self.config(), None)?;
        if batch.is_empty() {
            return Ok(None);
        }
        let h = self.embedded(&batch.tokens)?; // [T, D]
        self.all_layers(h, &mut batch, None, None)
    }

    /// Normed embeddings of tokens, [T, D].
    ///
    /// # Errors
    /// [`Error::Tensor`] for a token that the vocabulary does not have.
    pub fn normed_embeddings(&self, tokens: &[TokenId]) -> Result<Tensor, Error> {
        let ids: Vec<u32> = tokens.iter().map(|token| token.0).collect();
        Ok(generator::normed_embeddings(&self.embedded(&ids)?)?)
    }

    /// The head [V, D], whose input [`Lm::hidden`] and [`Lm::differentiable`] give.
    pub fn head(&self) -> &Linear {
        &self.head
    }
}
