//! A ragged batch: its rows, what is wrong with them, and how far through the model each token goes.
//!
//! Plain numbers, no arithmetic on activations. A token leaves the batch as soon as nothing needs it any
//! more: rows that only write stop at the last site, prompts stop once the last layer has their keys and
//! values, the rest goes on to the head. Start at [`Row`].

use std::ops::Range;

use candle_core::{Device, Tensor};
use generator::{
    Adapter, Core, Doubt, Generator, Module, Seen, SiteId, SiteRows, Window, WriteRows,
};

use crate::{Config, Error, KvCache, TokenId};

/// A span of one sequence.
#[derive(Debug)]
pub struct Row<'a> {
    /// Its tokens, at least one.
    pub tokens: &'a [TokenId],
    /// Position of the first token = tokens of the sequence already in the cache.
    pub position: usize,
    /// Blocks of the sequence, enough for position + tokens.len(); no block in two rows' spans.
    pub blocks: &'a [u32],
    /// The imprint that the row runs with; None: the bare model.
    pub core: Option<&'a Core>,
    /// Strength of the imprint; 0 is the bare model.
    pub scale: f32,
    /// The open window that the tokens write into (their index in it = their position). A row with a window
    /// and no logits stops behind the last site: its sequence's cache then serves only such rows.
    pub window: Option<&'a mut Window>,
    /// The token behind the last one, if known: needed for `window` only.
    pub lookahead: Option<TokenId>,
    /// The last so many tokens whose logits are wanted.
    pub logits: usize,
}

/// The steps of a layer that a site can sit at, in order; a layer has [`STAGES`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// The input of q, k and v.
    Attention = 0,
    /// The input of o.
    Output = 1,
    /// The input of gate and up.
    FeedForward = 2,
    /// The input of down.
    Down = 3,
}

const STAGES: usize = 4;

impl Stage {
    pub(crate) fn in_layer(self, layer: usize) -> usize {
        layer * STAGES + self as usize
    }

    pub(crate) fn of(module: Module) -> Self {
        match module {
            Module::QProj | Module::KProj | Module::VProj => Self::Attention,
            Module::OProj => Self::Output,
            Module::GateProj | Module::UpProj => Self::FeedForward,
            Module::DownProj => Self::Down,
        }
    }
}

/// How far a row's tokens go.
struct Way {
    /// All of them are at the input of the first so many stages.
    stages: usize,
    /// Their keys and values are kept in the first so many layers.
    kv_layers: usize,
    /// The last so many go to the head.
    logits: usize,
}

/// Rows in the current tensors: `len` tokens from `start` on, the first at `position` of its sequence.
#[derive(Clone, Copy)]
pub(crate) struct Span {
    pub(crate) row: usize,
    pub(crate) start: usize,
    pub(crate) len: usize,
    pub(crate) position: usize,
}

/// The batch on its way through the model.
pub(crate) struct Batch<'a, 'w> {
    ways: Vec<Way>,
    cores: Vec<Option<(&'a Core, f32)>>,
    windows: Vec<Option<&'w mut Window>>,
    blocks: Vec<&'a [u32]>,
    any_core: bool,
    /// What the sites so far made of each token `[T]`, if a row's core has gates; else empty.
    doubts: Vec<Doubt>,
    /// All tokens of the batch at its start, T.
    pub(crate) tokens: Vec<u32>,
    /// Their positions, `[T]`.
    pub(crate) positions: Vec<u32>,
    /// Their places in the cache, `[T]`.
    slots: Vec<u32>,
    /// The rows that still have tokens.
    spans: Vec<Span>,
    /// For each token still there its index at the start.
    pub(crate) origin: Vec<u32>,
    /// Normed embeddings of the tokens still there [T, D], if any row writes.
    pub(crate) normed: Option<Tensor>,
    /// Normed embeddings of the rows' lookaheads [1, D].
    pub(crate) lookaheads: Vec<Option<Tensor>>,
    /// Whose deltas the rows run with, in place of the attached generator's.
    pub(crate) adapter: Option<&'a dyn Adapter>,
    /// Sites that are watched, and what they have seen.
    watched: Vec<(SiteId, Option<Seen>)>,
}

impl<'a, 'w> Batch<'a, 'w> {
    /// Checks all rows; changes nothing.
    pub(crate) fn new(
        rows: &'w mut [Row<'a>],
        config: &Config,
        generator: Option<&Generator>,
        kv: &KvCache,
    ) -> Result<Self, Error> {
        for (index, row) in rows.iter().enumerate() {
            check_row(index, row, config, generator.is_some(), kv)?;
        }
        let last_site = generator.map(|g| {
            g.sites()
                .iter()
                .map(|site| Stage::of(site.id().module).in_layer(site.id().layer))
                .max()
        });
        let last_site = last_site.flatten();

        let total = rows.iter().map(|row| row.tokens.len()).sum();
        let (mut tokens, mut positions, mut slots) = (
            Vec::with_capacity(total),
            Vec::with_capacity(total),
            Vec::with_capacity(total),
        );
        let (mut spans, mut ways) = (
            Vec::with_capacity(rows.len()),
            Vec::with_capacity(rows.len()),
        );
        for (index, row) in rows.iter().enumerate() {
            spans.push(Span {
                row: index,
                start: tokens.len(),
                len: row.tokens.len(),
                position: row.position,
            });
            ways.push(way(row, config, last_site));
            tokens.extend(row.tokens.iter().map(|token| token.0));
            for position in row.position..row.position + row.tokens.len() {
                let block = row.blocks[position / kv.block_size()];
                positions.push(position as u32);
                slots.push(block * kv.block_size() as u32 + (position % kv.block_size()) as u32);
            }
        }
        check_slots(&slots, &spans)?;
        let cores: Vec<_> = rows
            .iter()
            .map(|row| {
                row.core
                    .map(|core| (core, row.scale))
                    .filter(|(_, scale)| *scale != 0.0)
            })
            .collect();
        let any_core = cores.iter().any(Option::is_some);
        let any_gate = cores.iter().flatten().any(|(core, _)| core.is_gated());
        let blocks = rows.iter().map(|row| row.blocks).collect();
        let lookaheads = rows.iter().map(|_| None).collect();
        let windows = rows
            .iter_mut()
            .map(|row| row.window.as_deref_mut())
            .collect();
        let origin = (0..total as u32).collect();
        Ok(Self {
            ways,
            cores,
            windows,
            blocks,
            any_core,
            doubts: vec![Doubt::default(); if any_gate { total } else { 0 }],
            tokens,
            positions,
            slots,
            spans,
            origin,
            normed: None,
            lookaheads,
            adapter: None,
            watched: Vec::new(),
        })
    }

    /// Whole sequences from position 0 on that attend to themselves, without a cache: (tokens, how many of the
    /// last go to the head) each. Checked like rows.
    pub(crate) fn whole(
        sequences: &[(&'a [TokenId], usize)],
        config: &Config,
        adapter: Option<&'a dyn Adapter>,
    ) -> Result<Self, Error> {
        let (mut tokens, mut positions): (Vec<u32>, Vec<u32>) = (Vec::new(), Vec::new());
        let (mut spans, mut ways) = (Vec::new(), Vec::new());
        for (row, &(sequence, logits)) in sequences.iter().enumerate() {
            check_tokens(row, sequence, 0, logits, config)?;
            spans.push(Span {
                row,
                start: tokens.len(),
                len: sequence.len(),
                position: 0,
            });
            // All queries of a layer are answered: its keys are at hand only there.
            ways.push(Way {
                stages: Stage::Output.in_layer(config.layers - 1) + 1,
                kv_layers: config.layers,
                logits,
            });
            tokens.extend(sequence.iter().map(|token| token.0));
            positions.extend(0..sequence.len() as u32);
        }
        Ok(Self {
            ways,
            cores: sequences.iter().map(|_| None).collect(),
            windows: Vec::new(),
            blocks: Vec::new(),
            any_core: false,
            doubts: Vec::new(),
            origin: (0..tokens.len() as u32).collect(),
            tokens,
            positions,
            slots: Vec::new(),
            spans,
            normed: None,
            lookaheads: Vec::new(),
            adapter,
            watched: Vec::new(),
        })
    }

    /// Lets what these sites see be kept; tokens without logits go no further than the last of them. `fill`: keys
    /// and values of all layers are kept, for rows that come behind.
    pub(crate) fn watch(&mut self, sites: &[SiteId], fill: bool, layers: usize) {
        let last = sites
            .iter()
            .map(|site| Stage::of(site.module).in_layer(site.layer) + 1)
            .max()
            .unwrap_or(0);
        for way in &mut self.ways {
            if fill {
                way.stages = way.stages.max(last);
                way.kv_layers = layers;
            } else if way.logits == 0 {
                way.stages = last;
                way.kv_layers = last.saturating_sub(1).div_ceil(STAGES);
            }
        }
        self.watched = sites.iter().map(|site| (*site, None)).collect();
    }

    /// Keeps what a watched site sees.
    pub(crate) fn see(&mut self, site: SiteId, x: &Tensor, h: &Tensor) {
        if let Some((_, seen)) = self.watched.iter_mut().find(|(id, _)| *id == site) {
            *seen = Some(Seen {
                x: x.clone(),
                h: h.clone(),
            });
        }
    }

    /// What the watched sites have seen, in their order.
    pub(crate) fn seen(self) -> Option<Vec<Seen>> {
        self.watched.into_iter().map(|(_, seen)| seen).collect()
    }

    /// The rows still there with their tokens.
    pub(crate) fn row_spans(&self) -> Vec<(usize, Range<usize>)> {
        let span = |span: &Span| (span.row, span.start..span.start + span.len);
        self.spans.iter().map(span).collect()
    }

    /// (first token, number of tokens) of each row still there.
    pub(crate) fn sequences(&self) -> Vec<(usize, usize)> {
        self.spans
            .iter()
            .map(|span| (span.start, span.len))
            .collect()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.origin.is_empty()
    }

    /// Places in the cache of the tokens still there.
    pub(crate) fn slots(&self) -> Vec<u32> {
        self.origin
            .iter()
            .map(|&index| self.slots[index as usize])
            .collect()
    }

    /// The rows still there, as attention takes them.
    pub(crate) fn attention_rows(&self) -> Vec<kernels::AttentionRow<'a>> {
        let row = |&Span {
                       row,
                       start,
                       len,
                       position,
                   }: &Span| kernels::AttentionRow {
            start,
            len,
            position,
            blocks: self.blocks[row],
        };
        self.spans.iter().map(row).collect()
    }

    /// The rows still there that have a core; empty if none has.
    pub(crate) fn site_rows(&self) -> Vec<SiteRows<'a>> {
        if !self.any_core {
            return Vec::new();
        }
        let row = |&Span {
                       row, start, len, ..
                   }: &Span| {
            self.cores[row].map(|(core, scale)| SiteRows {
                start,
                len,
                core,
                scale,
            })
        };
        self.spans.iter().filter_map(row).collect()
    }

    /// Doubts of the tokens still there `[T]`; none if no row's core has gates.
    pub(crate) fn doubts(&self) -> Option<Vec<Doubt>> {
        let here = self.origin.iter();
        (!self.doubts.is_empty()).then(|| here.map(|&at| self.doubts[at as usize]).collect())
    }

    /// Keeps the doubts of the tokens still there.
    pub(crate) fn doubt(&mut self, doubts: &[Doubt]) {
        for (&at, doubt) in self.origin.iter().zip(doubts) {
            self.doubts[at as usize] = *doubt;
        }
    }

    /// The rows that write, with their windows.
    pub(crate) fn write_rows(&mut self) -> Vec<WriteRows<'_>> {
        let mut writes = Vec::new();
        let mut windows = self.windows.iter_mut().enumerate();
        for &Span {
            row,
            start,
            len,
            position,
        } in &self.spans
        {
            // Spans are in the rows' order, so the windows are passed once.
            if let Some((_, Some(window))) = windows.find(|(index, _)| *index == row) {
                writes.push(WriteRows {
                    start,
                    len,
                    position,
                    lookahead: self.lookaheads[row].clone(),
                    window,
                });
            }
        }
        writes
    }

    /// Whether any row writes.
    pub(crate) fn writes(&self) -> bool {
        self.windows.iter().any(Option::is_some)
    }

    /// Drops the tokens that nothing needs at this stage, from the batch and from `tensors` [T, ..].
    pub(crate) fn narrow_to(
        &mut self,
        stage: usize,
        tensors: &mut [&mut Tensor],
    ) -> Result<(), Error> {
        self.keep(tensors, |way, len| {
            if stage < way.stages {
                len
            } else {
                way.logits.min(len)
            }
        })
    }

    /// Whether [`Self::narrow_to`] would keep all tokens.
    pub(crate) fn keeps_all(&self, stage: usize) -> bool {
        self.spans.iter().all(|span| {
            let way = &self.ways[span.row];
            stage < way.stages || way.logits >= span.len
        })
    }

    /// Drops the rows whose keys and values nothing needs in this layer.
    pub(crate) fn narrow_to_kv(
        &mut self,
        layer: usize,
        tensors: &mut [&mut Tensor],
    ) -> Result<(), Error> {
        self.keep(tensors, |way, len| {
            if layer < way.kv_layers {
                len
            } else {
                way.logits.min(len)
            }
        })
    }

    /// Keeps the last `kept` tokens of each row.
    fn keep(
        &mut self,
        tensors: &mut [&mut Tensor],
        kept: impl Fn(&Way, usize) -> usize,
    ) -> Result<(), Error> {
        if self
            .spans
            .iter()
            .all(|span| kept(&self.ways[span.row], span.len) == span.len)
        {
            return Ok(());
        }
        let mut indices: Vec<u32> = Vec::new();
        let mut spans = Vec::with_capacity(self.spans.len());
        for span in &self.spans {
            let len = kept(&self.ways[span.row], span.len);
            if len > 0 {
                let dropped = span.len - len;
                spans.push(Span {
                    row: span.row,
                    start: indices.len(),
                    len,
                    position: span.position + dropped,
                });
                indices.extend((span.start + dropped) as u32..(span.start + span.len) as u32);
            }
        }
        self.origin = indices
            .iter()
            .map(|&index| self.origin[index as usize])
            .collect();
        self.spans = spans;
        if indices.is_empty() {
            return Ok(());
        }
        let count = indices.len();
        let device = tensors
            .first()
            .map_or(&Device::Cpu, |tensor| tensor.device());
        let indices = Tensor::from_vec(indices, count, device)?;
        for tensor in tensors.iter_mut() {
            **tensor = tensor.index_select(&indices, 0)?;
        }
        if let Some(normed) = &mut self.normed {
            *normed = normed.index_select(&indices, 0)?;
        }
        Ok(())
    }
}

fn way(row: &Row<'_>, config: &Config, last_site: Option<usize>) -> Way {
    let logits = row.logits;
    // All stages up to the last site's own, none if there is no site.
    let writing = last_site.map_or(0, |stage| stage + 1);
    if row.window.is_some() && logits == 0 {
        // Keys and values of a layer whose attention no token reaches are not needed.
        let kv_layers = writing.saturating_sub(1).div_ceil(STAGES);
        return Way {
            stages: writing,
            kv_layers,
            logits,
        };
    }
    let filling = Stage::Attention.in_layer(config.layers - 1) + 1;
    let stages = if row.window.is_some() {
        filling.max(writing)
    } else {
        filling
    };
    Way {
        stages,
        kv_layers: config.layers,
        logits,
    }
}

/// The position behind the last token.
fn check_tokens(
    row: usize,
    tokens: &[TokenId],
    position: usize,
    logits: usize,
    config: &Config,
) -> Result<usize, Error> {
    if tokens.is_empty() {
        return Err(Error::EmptyRow { row });
    }
    if let Some(&token) = tokens.iter().find(|token| token.0 as usize >= config.vocab) {
        return Err(Error::TokenOutOfRange {
            row,
            token,
            vocab: config.vocab,
        });
    }
    let end = position.saturating_add(tokens.len());
    if end > config.context_length {
        return Err(Error::ContextLength {
            row,
            end,
            limit: config.context_length,
        });
    }
    if logits > tokens.len() {
        return Err(Error::TooManyLogits {
            row,
            tokens: tokens.len(),
            wanted: logits,
        });
    }
    Ok(end)
}

fn check_row(
    index: usize,
    row: &Row<'_>,
    config: &Config,
    generator: bool,
    kv: &KvCache,
) -> Result<(), Error> {
    let Row {
        tokens,
        position,
        blocks,
        core,
        scale,
        ref window,
        lookahead,
        logits,
    } = *row;
    let end = check_tokens(index, tokens, position, logits, config)?;
    if let Some(token) = lookahead.filter(|token| token.0 as usize >= config.vocab) {
        return Err(Error::TokenOutOfRange {
            row: index,
            token,
            vocab: config.vocab,
        });
    }
    let needed = end.div_ceil(kv.block_size());
    if blocks.len() < needed {
        return Err(Error::Blocks {
            row: index,
            what: format!("{end} tokens need {needed}, there are {}", blocks.len()),
        });
    }
    if let Some(block) = blocks.iter().find(|&&block| block as usize >= kv.blocks()) {
        return Err(Error::Blocks {
            row: index,
            what: format!("there is no block {block}, only {}", kv.blocks()),
        });
    }
    if !scale.is_finite() {
        return Err(Error::Scale { row: index, scale });
    }
    if !generator && (core.is_some() || window.is_some()) {
        return Err(Error::NoGenerator { row: index });
    }
    if let Some(window) = window
        && window.tokens() != position
    {
        return Err(Error::WindowPosition {
            row: index,
            position,
            tokens: window.tokens(),
        });
    }
    Ok(())
}

/// Two tokens never share a place.
fn check_slots(slots: &[u32], spans: &[Span]) -> Result<(), Error> {
    let mut owners: Vec<(u32, usize)> = Vec::with_capacity(slots.len());
    for &Span {
        row, start, len, ..
    } in spans
    {
        owners.extend(slots[start..start + len].iter().map(|&slot| (slot, row)));
    }
    owners.sort_unstable();
    match owners.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        Some(pair) => Err(Error::Blocks {
            row: pair[1].1,
            what: "another token has the same place".to_owned(),
        }),
        None => Ok(()),
    }
}
