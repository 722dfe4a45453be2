//! What a step runs, as data on the device: one buffer of words that one copy fills.
//!
//! A batch has a capacity; a graph is captured for one, so its addresses never change. Everything that is checked about rows is checked
//! here, because kernels take slots, blocks and positions as they are. Start at [`Rows`].

use crate::{
    Buffer, Device, Error, View,
    error::fits,
    ops::{self, Draw, Heads, Sequences},
};

/// A span of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Its tokens, at least one.
    pub tokens: &'a [u32],
    /// Position of the first.
    pub position: usize,
    /// Blocks of its sequence in the cache, enough for position + tokens.
    pub blocks: &'a [u32],
    /// Slot of the core that it runs with.
    pub slot: Option<u32>,
    /// Strength of the imprint.
    pub scale: f32,
    /// The token behind the last one, where the span writes in the associative form.
    pub lookahead: Option<u32>,
    /// The last so many tokens whose logits are wanted.
    pub logits: usize,
    /// How a token is drawn of each of them; not at all: the caller takes the logits.
    pub draw: Option<Draw>,
}

/// How much a batch can hold.
#[derive(Clone, Copy, Debug)]
pub struct Capacity {
    /// Rows.
    pub rows: usize,
    /// Sequences.
    pub sequences: usize,
    /// Blocks of a sequence.
    pub blocks: usize,
    /// Parts that keys are split into; above 1 the batch is for decode: one row a sequence.
    pub splits: usize,
}

/// What batches are checked against.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// V.
    pub vocab: usize,
    /// Positions of the rotary tables.
    pub positions: usize,
    /// Blocks of the cache.
    pub cache_blocks: usize,
    /// Tokens of a block.
    pub block_size: usize,
    /// Slots of the arena.
    pub slots: usize,
    /// Heads.
    pub heads: Heads,
    /// alpha / R2, which goes into each row's strength.
    pub scale: f32,
}

/// A slot that no cache and no arena has.
const NONE: u32 = u32::MAX;
/// From so many rows of one core on its products are matrix products of their own, which read it once instead of once a row.
const GROUP: usize = 8;

/// Rows of one core.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group {
    pub(crate) first: usize,
    pub(crate) rows: usize,
    pub(crate) slot: usize,
    /// With alpha / R2 in it.
    pub(crate) scale: f32,
}

/// Rows on the device.
pub struct Batch {
    words: Buffer<u32>,
    capacity: Capacity,
    tiles: usize,
    /// Of the last fill.
    pub(crate) rows: usize,
    pub(crate) sequences: usize,
    pub(crate) tile_count: usize,
    pub(crate) wanted: usize,
    pub(crate) any_core: bool,
    /// Long spans with a core, which the gathering kernels leave out.
    pub(crate) groups: Vec<Group>,
}

/// The arrays of a batch, in their order.
#[derive(Clone, Copy)]
enum Field {
    Tokens,
    Next,
    Positions,
    CacheSlots,
    Slots,
    Scales,
    Held,
    Wanted,
    Draws,
    Starts,
    Lengths,
    FirstPositions,
    Tiles,
    Blocks,
}

impl Batch {
    /// An empty batch. Tiles: as many as its rows can need.
    ///
    /// # Errors
    /// [`Error::Shape`] for a capacity of nothing; [`Error::Call`].
    pub fn new(device: &Device, capacity: Capacity, heads: Heads) -> Result<Self, Error> {
        let Capacity {
            rows,
            sequences,
            blocks,
            splits,
        } = capacity;
        fits(
            rows > 0 && sequences > 0 && blocks > 0 && splits > 0,
            || format!("a batch of {capacity:?}"),
        )?;
        fits(splits == 1 || rows == sequences, || {
            format!("a batch of {capacity:?} for decode")
        })?;
        let tiles = if splits > 1 {
            rows
        } else {
            rows.div_ceil(ops::queries_of_tile(heads, 1).max(1)) + sequences
        };
        let mut batch = Self {
            words: device.zeros(1)?,
            capacity,
            tiles,
            rows: 0,
            sequences: 0,
            tile_count: 0,
            wanted: 0,
            any_core: false,
            groups: Vec::new(),
        };
        batch.words = device.zeros(batch.offset(Field::Blocks) + sequences * blocks)?;
        Ok(batch)
    }

    fn offset(&self, field: Field) -> usize {
        let Capacity {
            rows, sequences, ..
        } = self.capacity;
        match field {
            Field::Tokens => 0,
            Field::Next => rows,
            Field::Positions => 2 * rows,
            Field::CacheSlots => 3 * rows,
            Field::Slots => 4 * rows,
            Field::Scales => 5 * rows,
            Field::Held => 6 * rows,
            Field::Wanted => 7 * rows,
            Field::Draws => 8 * rows,
            Field::Starts => (8 + Draw::WORDS) * rows,
            Field::Lengths => self.offset(Field::Starts) + sequences,
            Field::FirstPositions => self.offset(Field::Starts) + 2 * sequences,
            Field::Tiles => self.offset(Field::Starts) + 3 * sequences,
            Field::Blocks => self.offset(Field::Tiles) + 2 * self.tiles,
        }
    }

    fn field(&self, field: Field, len: usize) -> Result<View<'_, u32>, Error> {
        self.words.view().part(self.offset(field), len)
    }

    /// Takes rows in, in order. A batch for decode is filled up to its capacity with rows that do nothing.
    ///
    /// # Errors
    /// [`Error::Shape`] naming what does not fit; the batch is then as it was.
    pub fn fill(
        &mut self,
        device: &Device,
        spans: &[Rows<'_>],
        limits: &Limits,
    ) -> Result<(), Error> {
        let capacity = self.capacity;
        let decode = capacity.splits > 1;
        let mut words = vec![0u32; self.words.view().len()];
        let (cache_slots, slots) = (self.offset(Field::CacheSlots), self.offset(Field::Slots));
        words[cache_slots..cache_slots + capacity.rows].fill(NONE);
        words[slots..slots + capacity.rows].fill(NONE);
        let held = self.offset(Field::Held);
        words[held..held + capacity.rows].fill(NONE);
        let (mut row, mut tile, mut wanted) = (0, 0, 0);
        let mut groups = Vec::new();
        let step = ops::queries_of_tile(limits.heads, capacity.splits);
        for (sequence, span) in spans.iter().enumerate() {
            let length = span.tokens.len();
            let end = span
                .position
                .checked_add(length)
                .filter(|end| *end <= limits.positions);
            let end = end.ok_or_else(|| {
                crate::error::shape(format!(
                    "positions {} + {length} of {}",
                    span.position, limits.positions
                ))
            })?;
            fits(
                length > 0 && row + length <= capacity.rows && sequence < capacity.sequences,
                || format!("rows {row} + {length} of {capacity:?}"),
            )?;
            fits(!decode || length == 1, || {
                format!("{length} tokens of one sequence in a batch for decode")
            })?;
            fits(
                span.tokens
                    .iter()
                    .chain(&span.lookahead)
                    .all(|token| (*token as usize) < limits.vocab),
                || format!("a token beyond the vocabulary of {}", limits.vocab),
            )?;
            fits(
                end.div_ceil(limits.block_size) <= span.blocks.len()
                    && span.blocks.len() <= capacity.blocks,
                || {
                    format!(
                        "{end} tokens in {} blocks of at most {}",
                        span.blocks.len(),
                        capacity.blocks
                    )
                },
            )?;
            fits(
                span.blocks
                    .iter()
                    .all(|block| (*block as usize) < limits.cache_blocks),
                || format!("a block beyond the cache's {}", limits.cache_blocks),
            )?;
            fits(
                span.slot.is_none_or(|slot| (slot as usize) < limits.slots),
                || format!("slot {:?} of {}", span.slot, limits.slots),
            )?;
            fits(span.logits <= length, || {
                format!("logits of {} of {length} tokens", span.logits)
            })?;
            let mut gathered = span.slot.unwrap_or(NONE);
            if let Some(slot) = span.slot.filter(|_| length >= GROUP) {
                gathered = NONE;
                groups.push(Group {
                    first: row,
                    rows: length,
                    slot: slot as usize,
                    scale: span.scale * limits.scale,
                });
            }
            for (i, token) in span.tokens.iter().enumerate() {
                let (at, position) = (row + i, span.position + i);
                let place = span.blocks[position / limits.block_size] as usize * limits.block_size
                    + position % limits.block_size;
                let next = span
                    .tokens
                    .get(i + 1)
                    .copied()
                    .or(span.lookahead)
                    .unwrap_or(NONE);
                for (field, value) in [
                    (Field::Tokens, *token),
                    (Field::Next, next),
                    (Field::Positions, position as u32),
                    (Field::CacheSlots, place as u32),
                    (Field::Slots, gathered),
                    (Field::Held, span.slot.unwrap_or(NONE)),
                    (Field::Scales, (span.scale * limits.scale).to_bits()),
                ] {
                    words[self.offset(field) + at] = value;
                }
                if i + span.logits >= length {
                    words[self.offset(Field::Wanted) + wanted] = at as u32;
                    if let Some(draw) = &span.draw {
                        let to = self.offset(Field::Draws) + wanted * Draw::WORDS;
                        words[to..to + Draw::WORDS].copy_from_slice(&draw.words());
                    }
                    wanted += 1;
                }
            }
            for (field, value) in [
                (Field::Starts, row),
                (Field::Lengths, length),
                (Field::FirstPositions, span.position),
            ] {
                words[self.offset(field) + sequence] = value as u32;
            }
            for first in (0..length).step_by(step) {
                let at = self.offset(Field::Tiles) + 2 * tile;
                words[at..at + 2].copy_from_slice(&[sequence as u32, first as u32]);
                tile += 1;
            }
            let blocks = self.offset(Field::Blocks) + sequence * capacity.blocks;
            words[blocks..blocks + span.blocks.len()].copy_from_slice(span.blocks);
            row += length;
        }
        (self.rows, self.sequences, self.tile_count, self.wanted) =
            (row, spans.len(), tile, wanted);
        if decode {
            // Row, sequence, tile and logits are one: those without a token have no query, and point to themselves.
            let (starts, tiles, wanted_at) = (
                self.offset(Field::Starts),
                self.offset(Field::Tiles),
                self.offset(Field::Wanted),
            );
            for i in spans.len()..capacity.rows {
                words[starts + i] = i as u32;
                words[tiles + 2 * i] = i as u32;
                words[wanted_at + i] = i as u32;
            }
            let all = capacity.rows;
            (self.rows, self.sequences, self.tile_count, self.wanted) = (all, all, all, all);
        }
        self.groups = groups;
        self.any_core = spans
            .iter()
            .any(|span| span.slot.is_some() && span.scale != 0.0);
        self.words.view().write(device, &words)
    }

    pub(crate) fn tokens(&self) -> Result<View<'_, u32>, Error> {
        self.field(Field::Tokens, self.rows)
    }

    pub(crate) fn next(&self) -> Result<View<'_, u32>, Error> {
        self.field(Field::Next, self.rows)
    }

    pub(crate) fn positions(&self) -> Result<View<'_, u32>, Error> {
        self.field(Field::Positions, self.rows)
    }

    pub(crate) fn cache_slots(&self) -> Result<View<'_, u32>, Error> {
        self.field(Field::CacheSlots, self.rows)
    }

    pub(crate) fn slots(&self) -> Result<View<'_, i32>, Error> {
        Ok(self.field(Field::Slots, self.rows)?.as_i32())
    }

    /// Slots of all rows that have a core, gathered or grouped.
    pub(crate) fn held(&self) -> Result<View<'_, i32>, Error> {
        Ok(self.field(Field::Held, self.rows)?.as_i32())
    }

    pub(crate) fn scales(&self) -> Result<View<'_, f32>, Error> {
        Ok(self.field(Field::Scales, self.rows)?.as_f32())
    }

    pub(crate) fn wanted_rows(&self) -> Result<View<'_, u32>, Error> {
        self.field(Field::Wanted, self.wanted)
    }

    pub(crate) fn draws(&self) -> Result<View<'_, u32>, Error> {
        self.field(Field::Draws, self.wanted * Draw::WORDS)
    }

    pub(crate) fn splits(&self) -> usize {
        self.capacity.splits
    }

    pub(crate) fn ragged(&self) -> Result<Sequences<'_>, Error> {
        Ok(Sequences {
            tiles: self.field(Field::Tiles, 2 * self.tile_count)?,
            starts: self.field(Field::Starts, self.sequences)?,
            lengths: self.field(Field::Lengths, self.sequences)?,
            positions: self.field(Field::FirstPositions, self.sequences)?,
            blocks: self.field(Field::Blocks, self.sequences * self.capacity.blocks)?,
            count: self.sequences,
            tile_count: self.tile_count,
        })
    }
}
