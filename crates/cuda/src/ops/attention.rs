//! Rotation with the append to a paged cache, and attention over it.
//!
//! Ragged sequences are data on the device. Start at [`attend`].

use half::bf16;

use super::{fits, holds, of, shape};
use crate::{Device, Error, Kernel, View, device::Argument};

/// Heads of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// H.
    pub queries: usize,
    /// Hkv, divides H.
    pub keys: usize,
    /// Dh.
    pub dim: usize,
}

impl Heads {
    /// Elements of a row of q, k and v beside each other.
    pub fn stride(&self) -> usize {
        (self.queries + 2 * self.keys) * self.dim
    }
}

/// A layer's cache: k and v, [blocks block_size, Hkv Dh] each.
#[derive(Clone, Copy, Debug)]
pub struct Cache<'a> {
    /// Keys.
    pub k: View<'a, bf16>,
    /// Values.
    pub v: View<'a, bf16>,
}

/// Tables of the rotation, [max, Dh/2] each.
#[derive(Clone, Copy, Debug)]
pub struct Rotation<'a> {
    /// Cosines.
    pub cos: View<'a, f32>,
    /// Sines.
    pub sin: View<'a, f32>,
}

/// Rotates q and k of qkv [T, (H + 2 Hkv) Dh], puts q into q [T, H Dh] and k, v into the cache at cache_slots `[T]`; rows whose slot is
/// beyond the cache are left out. positions `[T]` are below the tables' max.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
#[expect(
    clippy::too_many_arguments,
    reason = "operands and sizes of one kernel"
)]
pub fn rope_append(
    device: &Device,
    q: View<'_, bf16>,
    qkv: View<'_, f32>,
    cache: Cache<'_>,
    rotation: Rotation<'_>,
    positions: View<'_, u32>,
    cache_slots: View<'_, u32>,
    rows: usize,
    heads: Heads,
) -> Result<(), Error> {
    holds("q", q, rows * heads.queries * heads.dim)?;
    holds("qkv", qkv, rows * heads.stride())?;
    holds("positions", positions, rows)?;
    holds("cache_slots", cache_slots, rows)?;
    holds("sines", rotation.sin, rotation.cos.len)?;
    let slots = cache.k.len / (heads.keys * heads.dim);
    holds("values", cache.v, slots * heads.keys * heads.dim)?;
    let arguments = [
        q.argument(),
        qkv.argument(),
        cache.k.argument(),
        cache.v.argument(),
        rotation.cos.argument(),
        rotation.sin.argument(),
        positions.argument(),
        cache_slots.argument(),
        of(heads.queries)?,
        of(heads.keys)?,
        of(heads.dim)?,
        of(slots)?,
    ];
    device.launch(Kernel::RopeAppend, [rows, 1, 1], 256, 0, &arguments)
}

/// Ragged sequences of an attention, as data on the device.
#[derive(Clone, Copy, Debug)]
pub struct Sequences<'a> {
    /// [tiles, 2]: sequence, first query in it, in steps of [`queries_of_tile`].
    pub tiles: View<'a, u32>,
    /// `[S]`: first row of q.
    pub starts: View<'a, u32>,
    /// `[S]`: queries.
    pub lengths: View<'a, u32>,
    /// `[S]`: position of the first query.
    pub positions: View<'a, u32>,
    /// [S, max_blocks]: blocks in the cache.
    pub blocks: View<'a, u32>,
    /// S.
    pub count: usize,
    /// Tiles.
    pub tile_count: usize,
}

/// What an attention does.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Heads.
    pub heads: Heads,
    /// Tokens of a block of the cache.
    pub block_size: usize,
    /// Only so many keys are visible to a query; 0: all.
    pub window: usize,
    /// Into how many parts keys are split; above 1 for decode alone (row t is sequence t, one query each).
    pub splits: usize,
}

/// Where split attention keeps its parts.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// [T, H, splits, Dh]
    pub sums: View<'a, f32>,
    /// [T, H, splits, 2]
    pub extents: View<'a, f32>,
}

/// Queries that one tile of attention takes: 64 rows for all heads of a group, 16 where keys are split.
pub fn queries_of_tile(heads: Heads, splits: usize) -> usize {
    (if splits == 1 { 64 } else { 16 }) / (heads.queries / heads.keys.max(1)).max(1)
}

/// out [T, H Dh] = causal attention of q [T, H Dh] over the cache. Rows that no sequence names are left alone
/// (0 where keys are split).
///
/// # Errors
/// [`Error::Unsupported`] for heads that no kernel has; [`Error::Shape`], [`Error::Call`].
#[expect(
    clippy::too_many_arguments,
    reason = "operands and sizes of one kernel"
)]
pub fn attend(
    device: &Device,
    out: View<'_, bf16>,
    parts: Option<Parts<'_>>,
    q: View<'_, bf16>,
    cache: Cache<'_>,
    sequences: &Sequences<'_>,
    attention: &Attention,
    rows: usize,
) -> Result<(), Error> {
    let Attention {
        heads,
        block_size,
        window,
        splits,
    } = *attention;
    let kernel = match (heads.dim, splits) {
        (16, 1) => Kernel::Attend16,
        (64, 1) => Kernel::Attend64,
        (128, 1) => Kernel::Attend128,
        (16, _) => Kernel::Attend16One,
        (64, _) => Kernel::Attend64One,
        (128, _) => Kernel::Attend128One,
        (dim, _) => {
            return Err(Error::Unsupported {
                what: format!("attention with heads of {dim}"),
            });
        }
    };
    let group = heads.queries / heads.keys.max(1);
    fits(
        heads.keys > 0 && heads.queries == group * heads.keys && (1..=16).contains(&group),
        || format!("heads {heads:?}"),
    )?;
    fits(block_size > 0 && splits > 0 && sequences.count > 0, || {
        "an attention of nothing".into()
    })?;
    let max_blocks = sequences.blocks.len / sequences.count;
    holds("out", out, rows * heads.queries * heads.dim)?;
    holds("q", q, rows * heads.queries * heads.dim)?;
    holds("tiles", sequences.tiles, 2 * sequences.tile_count)?;
    for (name, view) in [
        ("starts", sequences.starts),
        ("lengths", sequences.lengths),
        ("positions", sequences.positions),
    ] {
        holds(name, view, sequences.count)?;
    }
    holds("values", cache.v, cache.k.len)?;
    if splits > 1 {
        let Some(parts) = parts else {
            return Err(shape("split attention without room for its parts"));
        };
        fits(rows == sequences.count, || {
            "split attention of sequences with more than one row".into()
        })?;
        holds(
            "parts",
            parts.sums,
            rows * heads.queries * splits * heads.dim,
        )?;
        holds("extents", parts.extents, rows * heads.queries * splits * 2)?;
    }
    let (sums, extents) = parts.map_or((Argument::Pointer(0), Argument::Pointer(0)), |p| {
        (p.sums.argument(), p.extents.argument())
    });
    #[expect(clippy::cast_precision_loss, reason = "a head's size is small")]
    let scale = 1.0 / (heads.dim as f32).sqrt();
    let arguments = [
        out.argument(),
        sums,
        extents,
        q.argument(),
        cache.k.argument(),
        cache.v.argument(),
        sequences.tiles.argument(),
        sequences.starts.argument(),
        sequences.lengths.argument(),
        sequences.positions.argument(),
        sequences.blocks.argument(),
        of(heads.queries)?,
        of(heads.keys)?,
        of(block_size)?,
        of(max_blocks)?,
        of(window)?,
        Argument::F32(scale),
    ];
    let threads = if splits == 1 { 128 } else { 32 };
    let shared = 2 * 2 * 32 * (heads.dim + 8) * size_of::<bf16>();
    device.launch(
        kernel,
        [sequences.tile_count, heads.keys, splits],
        threads,
        shared,
        &arguments,
    )?;
    if let (Some(parts), true) = (parts, splits > 1) {
        let arguments = [
            out.argument(),
            parts.sums.argument(),
            parts.extents.argument(),
            sequences.lengths.argument(),
            of(heads.queries)?,
            of(heads.dim)?,
            of(splits)?,
        ];
        device.launch(
            Kernel::AttendCombine,
            [rows, heads.queries, 1],
            64,
            0,
            &arguments,
        )?;
    }
    Ok(())
}
