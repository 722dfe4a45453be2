//! The decoder: one forward for reading context, prefill, decode and scoring.
//!
//! Takes a ragged batch through embedding, layers, final norm and head. Every linear goes through one
//! function that adds the site's delta; every site's write sits beside its linear. Which token goes how
//! far is `batch`'s matter, arithmetic `kernels`'. Start at [`Lm::forward`].

use std::{path::Path, sync::Arc};

use candle_core::{DType, Device, Tensor};
use generator::{BaseShape, Generator, Module, SiteId};
use kernels::Linear;

use crate::{
    Config, Error, KvCache, LoadOptions, Row,
    batch::{Batch, Stage},
    kv::LayerCache,
    tensors::Tensors,
    weights::{Rows, Weights},
};

/// A frozen decoder, with a generator at its sites or without one.
#[derive(Debug)]
pub struct Lm {
    config: Config,
    digest: String,
    parameters: u64,
    weight_format: &'static str,
    /// [V, D]
    pub(crate) embedding: Arc<Linear>,
    layers: Vec<Layer>,
    /// `[D]`
    final_norm: Tensor,
    /// [V, D]; the embedding where the two are tied.
    pub(crate) head: Arc<Linear>,
    /// Where and in which type what is trained on computes, if not where everything else does.
    pub(crate) training: Option<(Device, DType)>,
    /// Rotary frequencies [Dh/2].
    frequencies: Vec<f64>,
    generator: Option<Generator>,
    /// Per layer and module the index of the generator's site.
    sites: Vec<[Option<usize>; Module::ALL.len()]>,
}

/// Logits of all wanted positions, rows in order.
#[derive(Debug)]
pub struct Output {
    /// [sum of Row::logits, V] f32; None if none were wanted.
    pub logits: Option<Tensor>,
}

#[derive(Debug)]
struct Layer {
    /// `[D]`
    input_norm: Tensor,
    /// [H Dh, D]
    q: Projection,
    /// [Hkv Dh, D]
    k: Projection,
    /// [Hkv Dh, D]
    v: Projection,
    /// [D, H Dh]
    o: Projection,
    /// `[Dh]`
    q_norm: Option<Tensor>,
    /// `[Dh]`
    k_norm: Option<Tensor>,
    /// `[D]`
    post_norm: Tensor,
    /// [F, D]
    gate: Projection,
    /// [F, D]
    up: Projection,
    /// [D, F]
    down: Projection,
}

/// A linear of a layer, where a site may sit.
#[derive(Debug)]
struct Projection {
    layer: usize,
    module: Module,
    /// [out, in]
    weight: Linear,
    /// `[out]`
    bias: Option<Tensor>,
}

impl Lm {
    /// `path`: a GGUF file, or a folder in the HF layout (config.json, model.safetensors or shards with index).
    ///
    /// # Errors
    /// [`Error::File`], [`Error::MissingTensor`] or [`Error::Shape`], naming file, key and value.
    pub fn load(path: &Path, options: LoadOptions) -> Result<Self, Error> {
        let Tensors {
            config,
            mut weights,
            digest,
        } = Tensors::open_for(path, options)?;
        let Config { vocab, hidden, .. } = config;
        let embedding =
            Arc::new(weights.linear("model.embed_tokens.weight", vocab, hidden, Rows::Plain)?);
        let layers = (0..config.layers)
            .map(|layer| Layer::load(&mut weights, &config, layer))
            .collect::<Result<_, _>>()?;
        let final_norm = weights.vector("model.norm.weight", hidden, Rows::Plain)?;
        let head = if config.tied_embeddings {
            Arc::clone(&embedding)
        } else {
            Arc::new(weights.linear("lm_head.weight", vocab, hidden, Rows::Plain)?)
        };
        Ok(Self {
            frequencies: config.rope_frequencies(),
            sites: vec![[None; Module::ALL.len()]; config.layers],
            config,
            digest,
            parameters: weights.parameters(),
            weight_format: weights.format(),
            embedding,
            layers,
            final_norm,
            head,
            training: None,
            generator: None,
        })
    }

    /// Reads a generator checkpoint made for this base.
    ///
    /// # Errors
    /// [`Error::Generator`] or [`Error::ForeignBase`], naming what does not fit; the model is as it was.
    pub fn attach_generator(&mut self, dir: &Path) -> Result<(), Error> {
        let generator = Generator::load(dir, &self.shape())?;
        if !generator.config().names_base(&self.digest) {
            let expected = generator.config().base_digest.join(" or ");
            return Err(Error::ForeignBase {
                expected,
                found: self.digest.clone(),
            });
        }
        let mut sites = vec![[None; Module::ALL.len()]; self.config.layers];
        for (index, site) in generator.sites().iter().enumerate() {
            let id = site.id();
            sites[id.layer][id.module as usize] = Some(index);
        }
        // What stands beside a linear computes as it does.
        let generator = generator.rounded(|id| {
            self.layers[id.layer]
                .projection(id.module)
                .weight
                .rounds_activations()
        });
        self.sites = sites;
        self.generator = Some(generator);
        Ok(())
    }

    /// What a generator must know of this base.
    pub fn shape(&self) -> BaseShape {
        self.config.base_shape()
    }

    /// The generator, if one is attached.
    pub fn generator(&self) -> Option<&Generator> {
        self.generator.as_ref()
    }

    /// Sizes and switches.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// blake3 over the file(s) that make the function, as they lie on disk, in hex: a GGUF file, or config.json and the weights.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Number of weights.
    pub fn parameters(&self) -> u64 {
        self.parameters
    }

    /// The format that most weights have on disk: F32, BF16, Q4_1, ...
    pub fn weight_format(&self) -> &str {
        self.weight_format
    }

    /// One forward of a ragged batch: ingest, prefill, decode and scoring alike. Checks all rows first (token
    /// range, positions against the context length and the blocks): such an error leaves kv and windows untouched.
    /// A row's results are the same, bit for bit, whatever else is in the batch and however its sequence is cut.
    ///
    /// # Errors
    /// A variant per fault of a row; [`Error::Tensor`] and [`Error::Generator`] if arithmetic itself failed.
    pub fn forward(&self, rows: &mut [Row<'_>], kv: &KvCache) -> Result<Output, Error> {
        kernels::on_pool(|| self.forward_traced(rows, kv, None))
    }

    /// The same; `trace` receives the input of each layer and of the head, [T, D] each.
    pub(crate) fn forward_traced(
        &self,
        rows: &mut [Row<'_>],
        kv: &KvCache,
        trace: Option<&mut Vec<Tensor>>,
    ) -> Result<Output, Error> {
        let caches = kv.layers(&self.config)?;
        let lookaheads: Vec<_> = rows
            .iter()
            .map(|row| row.lookahead.filter(|_| row.window.is_some()))
            .collect();
        let mut batch = Batch::new(rows, &self.config, self.generator.as_ref(), kv)?;
        if batch.is_empty() {
            return Ok(Output { logits: None });
        }
        let h = self.embedding.rows(&batch.tokens)?; // [T, D]
        if batch.writes() {
            batch.normed = Some(generator::normed_embeddings(&h)?); // [T, D]
            for (normed, token) in batch.lookaheads.iter_mut().zip(lookaheads) {
                if let Some(token) = token {
                    *normed = Some(generator::normed_embeddings(
                        &self.embedding.rows(&[token.0])?,
                    )?); // [1, D]
                }
            }
        }
        let Some(h) = self.through(h, &mut batch, Some(caches), trace)? else {
            return Ok(Output { logits: None });
        }; // [wanted, D]
        Ok(Output {
            logits: Some(self.head.forward(&h)?),
        }) // [wanted, V]
    }

    /// Takes a batch's embeddings h [T, D] through all layers and the final norm: [wanted, D], None if nothing is
    /// wanted. Without caches rows attend to themselves.
    pub(crate) fn through(
        &self,
        h: Tensor,
        batch: &mut Batch<'_, '_>,
        caches: Option<&[LayerCache]>,
        mut trace: Option<&mut Vec<Tensor>>,
    ) -> Result<Option<Tensor>, Error> {
        let Some(h) = self.all_layers(h, batch, caches, trace.as_deref_mut())? else {
            return Ok(None);
        }; // [wanted, D]
        let h = kernels::rms_norm(&h, Some(&self.final_norm), self.config.rms_norm_eps)?; // [wanted, D]
        if let Some(trace) = trace {
            trace.push(h.clone());
        }
        Ok(Some(h))
    }

    /// The same up to the residual behind the last layer.
    pub(crate) fn all_layers(
        &self,
        mut h: Tensor,
        batch: &mut Batch<'_, '_>,
        caches: Option<&[LayerCache]>,
        mut trace: Option<&mut Vec<Tensor>>,
    ) -> Result<Option<Tensor>, Error> {
        let rotation = self.rotation(&batch.positions, h.device())?;
        for (index, layer) in self.layers.iter().enumerate() {
            if let Some(trace) = trace.as_deref_mut() {
                trace.push(h.clone());
            }
            let cache = caches.map(|caches| &caches[index]);
            match self.layer(index, layer, h, batch, &rotation, cache)? {
                Some(output) => h = output, // [T, D]
                None => return Ok(None),
            }
        }
        Ok(Some(h))
    }

    /// A decoder layer. h [T, D], the residual that enters it; -> [T', D] of the tokens that go on, None if none do.
    fn layer(
        &self,
        index: usize,
        layer: &Layer,
        mut h: Tensor,
        batch: &mut Batch<'_, '_>,
        rotation: &Rotation,
        cache: Option<&LayerCache>,
    ) -> Result<Option<Tensor>, Error> {
        let Config {
            heads,
            kv_heads,
            head_dim,
            rms_norm_eps: eps,
            sliding_window,
            ..
        } = self.config;

        batch.narrow_to(Stage::Attention.in_layer(index), &mut [&mut h])?;
        if batch.is_empty() {
            return Ok(None);
        }
        let mut x = kernels::rms_norm(&h, Some(&layer.input_norm), eps)?; // [T, D]
        for module in [Module::QProj, Module::KProj, Module::VProj] {
            self.write(index, module, &x, &h, batch)?;
        }
        batch.narrow_to_kv(index, &mut [&mut x, &mut h])?;
        if batch.is_empty() {
            return Ok(None);
        }
        // Queries with the keys and values where all rows go on.
        let (q, k, v) = if batch.keeps_all(Stage::Output.in_layer(index)) {
            let [q, k, v] = self.linears([&layer.q, &layer.k, &layer.v], &x, batch)?;
            (Some(q), k, v) // [T, H Dh], [T, Hkv Dh], [T, Hkv Dh]
        } else {
            let [k, v] = self.linears([&layer.k, &layer.v], &x, batch)?;
            (None, k, v) // [T, Hkv Dh], [T, Hkv Dh]
        };
        let k = self.heads(k, kv_heads, layer.k_norm.as_ref())?; // [T, Hkv, Dh]
        let k = rotation.apply(&k, &batch.origin)?; //              [T, Hkv, Dh]
        let v = self.heads(v, kv_heads, None)?; //                  [T, Hkv, Dh]
        if let Some(cache) = cache {
            let slots = batch.slots();
            kernels::kv_append(&cache.k, &k, &slots)?;
            kernels::kv_append(&cache.v, &v, &slots)?;
        }

        batch.narrow_to(Stage::Output.in_layer(index), &mut [&mut x, &mut h])?;
        if batch.is_empty() {
            return Ok(None);
        }
        let q = match q {
            Some(q) => q,
            None => self.linear(&layer.q, &x, batch)?,
        }; //                                                    [T, H Dh]
        let q = self.heads(q, heads, layer.q_norm.as_ref())?; // [T, H, Dh]
        let q = rotation.apply(&q, &batch.origin)?; //           [T, H, Dh]
        let scale = 1.0 / (head_dim as f32).sqrt();
        let mut a = match cache {
            Some(LayerCache {
                k: k_cache,
                v: v_cache,
            }) => {
                let rows = batch.attention_rows();
                kernels::paged_attention(&q, k_cache, v_cache, &rows, scale, sliding_window)?
            }
            None => {
                let sequences = batch.sequences();
                kernels::self_attention(&q, &k, &v, &sequences, scale, sliding_window)?
            }
        }; // [T, H Dh]
        self.write(index, Module::OProj, &a, &h, batch)?;

        batch.narrow_to(Stage::FeedForward.in_layer(index), &mut [&mut a, &mut h])?;
        if batch.is_empty() {
            return Ok(None);
        }
        let mut middle = kernels::add(&h, &self.linear(&layer.o, &a, batch)?)?; //          [T, D]
        let mut x = kernels::rms_norm(&middle, Some(&layer.post_norm), eps)?; //            [T, D]
        self.write(index, Module::GateProj, &x, &h, batch)?;
        self.write(index, Module::UpProj, &x, &h, batch)?;

        batch.narrow_to(
            Stage::Down.in_layer(index),
            &mut [&mut x, &mut h, &mut middle],
        )?;
        if batch.is_empty() {
            return Ok(None);
        }
        let [gate, up] = self.linears([&layer.gate, &layer.up], &x, batch)?; // [T, F] each
        let mut x = kernels::silu_mul(&gate, &up)?; //                          [T, F]
        self.write(index, Module::DownProj, &x, &h, batch)?;

        batch.narrow_to(
            Stage::Attention.in_layer(index + 1),
            &mut [&mut x, &mut middle],
        )?;
        if batch.is_empty() {
            return Ok(None);
        }
        let output = self.linear(&layer.down, &x, batch)?; // [T, D]
        Ok(Some(kernels::add(&middle, &output)?))
    }

    /// y = W0 x + bias + the site's delta. x [T, in] -> [T, out].
    fn linear(
        &self,
        projection: &Projection,
        x: &Tensor,
        batch: &mut Batch<'_, '_>,
    ) -> Result<Tensor, Error> {
        let [y] = self.linears([projection], x, batch)?;
        Ok(y)
    }

    /// The same of several linears of one x.
    fn linears<const N: usize>(
        &self,
        projections: [&Projection; N],
        x: &Tensor,
        batch: &mut Batch<'_, '_>,
    ) -> Result<[Tensor; N], Error> {
        let mut ys = Linear::forward_all(projections.map(|projection| &projection.weight), x)?; // [T, out] each
        for (y, projection) in ys.iter_mut().zip(projections) {
            *y = self.adapted_output(projection, x, y.clone(), batch)?; // [T, out]
        }
        Ok(ys)
    }

    /// y = W0 x [T, out] with the bias and the site's delta added.
    fn adapted_output(
        &self,
        projection: &Projection,
        x: &Tensor,
        mut y: Tensor,
        batch: &mut Batch<'_, '_>,
    ) -> Result<Tensor, Error> {
        let Projection {
            layer,
            module,
            bias,
            ..
        } = projection;
        if let Some(bias) = bias {
            y = kernels::add_bias(&y, bias)?; // [T, out]
        }
        if let Some(adapter) = batch.adapter {
            let site = SiteId {
                layer: *layer,
                module: *module,
            };
            return match adapter.delta(site, x, &batch.row_spans())? {
                Some(delta) => Ok(kernels::add(&y, &delta)?), // [T, out]
                None => Ok(y),
            };
        }
        let Some((generator, index)) = self.site(*layer, *module) else {
            return Ok(y);
        };
        let rows = batch.site_rows();
        if rows.is_empty() {
            return Ok(y);
        }
        let site = &generator.sites()[index];
        let delta = match &mut batch.doubts() {
            Some(doubts) => {
                let delta = site.gated_delta(index, x, &rows, doubts)?;
                batch.doubt(doubts);
                delta
            }
            None => site.delta(index, x, &rows)?,
        };
        match delta {
            Some(delta) => Ok(kernels::add(&y, &delta)?), // [T, out]
            None => Ok(y),
        }
    }

    /// Lets the rows with windows write at a site, if there is one. x [T, in] input of its linear, h [T, D]
    /// the residual that entered the layer.
    fn write(
        &self,
        layer: usize,
        module: Module,
        x: &Tensor,
        h: &Tensor,
        batch: &mut Batch<'_, '_>,
    ) -> Result<(), Error> {
        batch.see(SiteId { layer, module }, x, h);
        let Some((generator, index)) = self.site(layer, module) else {
            return Ok(());
        };
        let Some(normed) = batch.normed.clone() else {
            return Ok(());
        }; // [T, D]
        let mut rows = batch.write_rows();
        Ok(generator.sites()[index].write(index, x, h, &normed, &mut rows)?)
    }

    fn site(&self, layer: usize, module: Module) -> Option<(&Generator, usize)> {
        let index = self.sites[layer][module as usize]?;
        Some((self.generator.as_ref()?, index))
    }

    /// A linear's output y [T, heads Dh] as heads [T, heads, Dh], each normed with `norm` `[Dh]` if there is one.
    fn heads(&self, y: Tensor, heads: usize, norm: Option<&Tensor>) -> Result<Tensor, Error> {
        let (tokens, _) = y.dims2()?;
        let head_dim = self.config.head_dim;
        let Some(gain) = norm else {
            return Ok(y.reshape((tokens, heads, head_dim))?);
        };
        let y = y.reshape((tokens * heads, head_dim))?; //                                 [T heads, Dh]
        let y = kernels::rms_norm(&y, Some(gain), self.config.rms_norm_eps)?; //            [T heads, Dh]
        Ok(y.reshape((tokens, heads, head_dim))?)
    }

    /// cos and sin of the tokens' angles. Made for each forward: a table for a long context would take
    /// more memory than the model's activations, and making it costs less than 1 % of a layer.
    fn rotation(&self, positions: &[u32], device: &Device) -> Result<Rotation, Error> {
        let half = self.frequencies.len();
        let (mut cos, mut sin) = (
            Vec::with_capacity(positions.len() * half),
            Vec::with_capacity(positions.len() * half),
        );
        for &position in positions {
            for frequency in &self.frequencies {
                let (s, c) = (f64::from(position) * frequency).sin_cos();
                cos.push(c as f32);
                sin.push(s as f32);
            }
        }
        let tensor = |values| Tensor::from_vec(values, (positions.len(), half), device);
        Ok(Rotation {
            cos: tensor(cos)?,
            sin: tensor(sin)?,
        })
    }
}

/// cos and sin of each token's angles, [T, Dh/2], T the tokens at the batch's start.
struct Rotation {
    cos: Tensor,
    sin: Tensor,
}

impl Rotation {
    /// x [T', H, Dh], rotated; `origin` [T'] says which of the T tokens each is.
    fn apply(&self, x: &Tensor, origin: &[u32]) -> Result<Tensor, Error> {
        Ok(kernels::rope(x, &self.cos, &self.sin, origin)?)
    }
}

impl Layer {
    fn projection(&self, module: Module) -> &Projection {
        match module {
            Module::QProj => &self.q,
            Module::KProj => &self.k,
            Module::VProj => &self.v,
            Module::OProj => &self.o,
            Module::GateProj => &self.gate,
            Module::UpProj => &self.up,
            Module::DownProj => &self.down,
        }
    }

    fn load(weights: &mut Weights, config: &Config, layer: usize) -> Result<Self, Error> {
        let Config {
            hidden,
            intermediate,
            head_dim,
            ..
        } = *config;
        let (query, key_value) = (config.query_features(), config.kv_features());
        let rotary = Rows::Rotary { head_dim };
        let prefix = format!("model.layers.{layer}");
        let mut projection = |module: Module,
                              out: usize,
                              features: usize,
                              bias: bool|
         -> Result<Projection, Error> {
            let rows = if matches!(module, Module::QProj | Module::KProj) {
                rotary
            } else {
                Rows::Plain
            };
            let name = format!("{prefix}.{}.{}", module.block(), module.name());
            let weight = weights.linear(&format!("{name}.weight"), out, features, rows)?;
            let bias_name = format!("{name}.bias");
            let bias = if bias {
                Some(weights.vector(&bias_name, out, rows)?)
            } else if weights.has(&bias_name) {
                return Err(weights
                    .unsupported(format!("{bias_name} has no place"))
                    .into());
            } else {
                None
            };
            Ok(Projection {
                layer,
                module,
                weight,
                bias,
            })
        };
        let q = projection(Module::QProj, query, hidden, config.attention_bias)?;
        let k = projection(Module::KProj, key_value, hidden, config.attention_bias)?;
        let v = projection(Module::VProj, key_value, hidden, config.attention_bias)?;
        let o = projection(Module::OProj, hidden, query, config.output_bias)?;
        let gate = projection(Module::GateProj, intermediate, hidden, false)?;
        let up = projection(Module::UpProj, intermediate, hidden, false)?;
        let down = projection(Module::DownProj, hidden, intermediate, false)?;
        let mut norm = |name: &str, size: usize| {
            weights.vector(&format!("{prefix}.{name}.weight"), size, Rows::Plain)
        };
        let input_norm = norm("input_layernorm", hidden)?;
        let post_norm = norm("post_attention_layernorm", hidden)?;
        let (mut q_norm, mut k_norm) = (None, None);
        if config.qk_norm {
            q_norm = Some(norm("self_attn.q_norm", head_dim)?);
            k_norm = Some(norm("self_attn.k_norm", head_dim)?);
        }
        Ok(Self {
            input_norm,
            q,
            k,
            v,
            o,
            q_norm,
            k_norm,
            post_norm,
            gate,
            up,
            down,
        })
    }
}
