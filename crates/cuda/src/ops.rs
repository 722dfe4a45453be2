//! Every kernel as a function whose operands are checked, and the dense products of cuBLAS.
//!
//! What each computes stands in its twin ([`crate::twin`], the same name) and in kernels/*.cu. Operands are checked for size
//! before anything is launched; what is data on the device (slots, positions, blocks) is its writer's matter, and is checked there.

use half::bf16;

use crate::{
    Buffer, Device, Error, Kernel, View,
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

/// A product by cuBLAS. Sums are in f32 for bf16 operands (C in bf16 or f32), in f64 for f64.
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

/// y [T, D] = x [T, D] / sqrt(mean(x²) + eps) * gain `[D]`; no gain: 1.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn rms_norm(
    device: &Device,
    y: View<'_, bf16>,
    x: View<'_, bf16>,
    gain: Option<View<'_, bf16>>,
    rows: usize,
    d: usize,
    eps: f32,
) -> Result<(), Error> {
    eights(&[d])?;
    holds("y", y, rows * d)?;
    holds("x", x, rows * d)?;
    if let Some(gain) = gain {
        holds("gain", gain, d)?;
    }
    let arguments = [
        y.argument(),
        x.argument(),
        optional(gain),
        of(d)?,
        Argument::F32(eps),
    ];
    device.launch(Kernel::RmsNorm, [rows, 1, 1], 256, 0, &arguments)
}

/// h [T, D] += y [T, D]; then x [T, D] = `rms_norm` of h.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
#[expect(
    clippy::too_many_arguments,
    reason = "operands and sizes of one kernel"
)]
pub fn add_rms_norm(
    device: &Device,
    x: View<'_, bf16>,
    h: View<'_, bf16>,
    y: View<'_, bf16>,
    gain: View<'_, bf16>,
    rows: usize,
    d: usize,
    eps: f32,
) -> Result<(), Error> {
    eights(&[d])?;
    for (name, view) in [("x", x), ("h", h), ("y", y)] {
        holds(name, view, rows * d)?;
    }
    holds("gain", gain, d)?;
    let arguments = [
        x.argument(),
        h.argument(),
        y.argument(),
        gain.argument(),
        of(d)?,
        Argument::F32(eps),
    ];
    device.launch(Kernel::AddRmsNorm, [rows, 1, 1], 256, 0, &arguments)
}

/// `rms_norm` of heads `first ..` `first + heads` of each row of x [T, stride], in place.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
#[expect(
    clippy::too_many_arguments,
    reason = "operands and sizes of one kernel"
)]
pub fn head_norm(
    device: &Device,
    x: View<'_, bf16>,
    gain: View<'_, bf16>,
    rows: usize,
    first: usize,
    heads: usize,
    dh: usize,
    stride: usize,
    eps: f32,
) -> Result<(), Error> {
    holds("x", x, rows * stride)?;
    holds("gain", gain, dh)?;
    fits((first + heads) * dh <= stride, || {
        format!("heads {first} + {heads} of {dh} in rows of {stride}")
    })?;
    let arguments = [
        x.argument(),
        gain.argument(),
        of(first)?,
        of(dh)?,
        of(stride)?,
        Argument::F32(eps),
    ];
    device.launch(Kernel::HeadNorm, [rows, heads, 1], 32, 0, &arguments)
}

/// out [T, D] = table [V, D] at index `[T]`; beyond the table: 0.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn gather_rows(
    device: &Device,
    out: View<'_, bf16>,
    table: View<'_, bf16>,
    index: View<'_, u32>,
    rows: usize,
    d: usize,
) -> Result<(), Error> {
    eights(&[d])?;
    holds("out", out, rows * d)?;
    holds("index", index, rows)?;
    let arguments = [
        out.argument(),
        table.argument(),
        index.argument(),
        of(d)?,
        of(table.len / d)?,
    ];
    device.launch(Kernel::GatherRows, [rows, 1, 1], 256, 0, &arguments)
}

/// m [T, F] = silu(gate) up of gate_up [T, 2F].
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn silu_mul(
    device: &Device,
    m: View<'_, bf16>,
    gate_up: View<'_, bf16>,
    rows: usize,
    f: usize,
) -> Result<(), Error> {
    eights(&[f])?;
    holds("m", m, rows * f)?;
    holds("gate_up", gate_up, rows * 2 * f)?;
    let arguments = [m.argument(), gate_up.argument(), of(f)?];
    device.launch(
        Kernel::SiluMul,
        [rows, (f / 8).div_ceil(256), 1],
        256,
        0,
        &arguments,
    )
}

/// x [T, N] += bias `[N]`.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn add_bias(
    device: &Device,
    x: View<'_, bf16>,
    bias: View<'_, bf16>,
    rows: usize,
    n: usize,
) -> Result<(), Error> {
    holds("x", x, rows * n)?;
    holds("bias", bias, n)?;
    device.launch(
        Kernel::AddBias,
        [rows, 1, 1],
        256,
        0,
        &[x.argument(), bias.argument(), of(n)?],
    )
}

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

/// Rotates q and k of qkv [T, (H + 2 Hkv) Dh] in place and appends k, v to the cache at cache_slots `[T]`; rows whose slot is beyond
/// the cache are left alone. positions `[T]` are below the tables' max.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
#[expect(
    clippy::too_many_arguments,
    reason = "operands and sizes of one kernel"
)]
pub fn rope_append(
    device: &Device,
    qkv: View<'_, bf16>,
    cache: Cache<'_>,
    rotation: Rotation<'_>,
    positions: View<'_, u32>,
    cache_slots: View<'_, u32>,
    rows: usize,
    heads: Heads,
) -> Result<(), Error> {
    holds("qkv", qkv, rows * heads.stride())?;
    holds("positions", positions, rows)?;
    holds("cache_slots", cache_slots, rows)?;
    holds("sines", rotation.sin, rotation.cos.len)?;
    let slots = cache.k.len / (heads.keys * heads.dim);
    holds("values", cache.v, slots * heads.keys * heads.dim)?;
    let arguments = [
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

/// out [T, H Dh] = causal attention of q (rows of qkv [T, (H + 2 Hkv) Dh]) over the cache. Rows that no sequence names are left alone
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
    qkv: View<'_, bf16>,
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
    holds("qkv", qkv, rows * heads.stride())?;
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
        qkv.argument(),
        cache.k.argument(),
        cache.v.argument(),
        sequences.tiles.argument(),
        sequences.starts.argument(),
        sequences.lengths.argument(),
        sequences.positions.argument(),
        sequences.blocks.argument(),
        of(heads.stride())?,
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

/// Cores of one site in an arena of slots.
#[derive(Clone, Copy, Debug)]
pub struct SiteCores<'a> {
    /// All slots.
    pub arena: View<'a, bf16>,
    /// Elements of a slot.
    pub slot_size: usize,
    /// Where this site's part of a slot begins: Uᵀ [q, R1] and V [R2, q], or Nᵀ [R2, R1].
    pub offset: usize,
    /// R1.
    pub r1: usize,
    /// R2.
    pub r2: usize,
    /// q; 0: dense.
    pub rank: usize,
}

impl SiteCores<'_> {
    /// Elements of one site's part of a slot.
    pub fn size(r1: usize, r2: usize, rank: usize) -> usize {
        if rank == 0 { r1 * r2 } else { rank * (r1 + r2) }
    }
}

/// c [T, R2] = scales `[T]` a [T, R1] N with each row's own N, out of slots `[T]`; -1: 0. b [T, q] is scratch. Slots are below the arena's.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
#[expect(
    clippy::too_many_arguments,
    reason = "operands and sizes of one kernel"
)]
pub fn apply_cores(
    device: &Device,
    c: View<'_, bf16>,
    b: View<'_, f32>,
    a: View<'_, bf16>,
    cores: &SiteCores<'_>,
    slots: View<'_, i32>,
    scales: View<'_, f32>,
    rows: usize,
) -> Result<(), Error> {
    let SiteCores {
        arena,
        slot_size,
        offset,
        r1,
        r2,
        rank,
    } = *cores;
    eights(&[r1, r2])?;
    holds("c", c, rows * r2)?;
    holds("a", a, rows * r1)?;
    holds("slots", slots, rows)?;
    holds("scales", scales, rows)?;
    fits(offset + SiteCores::size(r1, r2, rank) <= slot_size, || {
        format!("a site at {offset} of slots of {slot_size}")
    })?;
    fits(arena.len >= slot_size && rows <= 65_535, || {
        format!("{rows} rows on an arena of {}", arena.len)
    })?;
    let slot = Argument::U64(slot_size as u64);
    let at = |offset: usize| Argument::U64(offset as u64);
    if rank == 0 {
        let arguments = [
            c.argument(),
            a.argument(),
            arena.argument(),
            slots.argument(),
            scales.argument(),
            slot,
            at(offset),
            of(r1)?,
            of(r2)?,
        ];
        return device.launch(
            Kernel::CoreDense,
            [r2.div_ceil(8), rows, 1],
            256,
            0,
            &arguments,
        );
    }
    eights(&[rank])?;
    holds("b", b, rows * rank)?;
    let down = [
        b.argument(),
        a.argument(),
        arena.argument(),
        slots.argument(),
        slot,
        at(offset),
        of(r1)?,
        of(rank)?,
    ];
    device.launch(Kernel::CoreDown, [rank.div_ceil(8), rows, 1], 256, 0, &down)?;
    let up = [
        c.argument(),
        b.argument(),
        arena.argument(),
        slots.argument(),
        scales.argument(),
        slot,
        at(offset + rank * r1),
        of(r2)?,
        of(rank)?,
    ];
    device.launch(Kernel::CoreUp, [r2.div_ceil(16), rows, 1], 256, 0, &up)
}

/// out `[T]`: a token drawn from logits [T, V]: the largest at temperature 0, else by Gumbel noise of seeds `[T]`.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn sample(
    device: &Device,
    out: View<'_, u32>,
    logits: View<'_, f32>,
    temperatures: View<'_, f32>,
    seeds: View<'_, u32>,
    rows: usize,
    vocab: usize,
) -> Result<(), Error> {
    holds("out", out, rows)?;
    holds("logits", logits, rows * vocab)?;
    holds("temperatures", temperatures, rows)?;
    holds("seeds", seeds, rows)?;
    fits(vocab > 0, || "a vocabulary of nothing".into())?;
    let arguments = [
        out.argument(),
        logits.argument(),
        temperatures.argument(),
        seeds.argument(),
        of(vocab)?,
    ];
    device.launch(Kernel::Sample, [rows, 1, 1], 1024, 0, &arguments)
}

/// a [B, n, n] = (g + gᵀ) / 2 + lambda I of g [B, n, n], lambdas `[B]`.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn symmetric(
    device: &Device,
    a: View<'_, f64>,
    g: View<'_, f32>,
    lambdas: View<'_, f64>,
    n: usize,
    batch: usize,
) -> Result<(), Error> {
    holds("a", a, batch * n * n)?;
    holds("g", g, batch * n * n)?;
    holds("lambdas", lambdas, batch)?;
    device.launch(
        Kernel::Symmetric,
        [n, batch, 1],
        256,
        0,
        &[a.argument(), g.argument(), lambdas.argument(), of(n)?],
    )
}

/// to = from, in f64.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn widen(device: &Device, to: View<'_, f64>, from: View<'_, f32>) -> Result<(), Error> {
    holds("to", to, from.len)?;
    let blocks = from.len.div_ceil(256).min(1 << 14);
    device.launch(
        Kernel::Widen,
        [blocks, 1, 1],
        256,
        0,
        &[
            to.argument(),
            from.argument(),
            Argument::U64(from.len as u64),
        ],
    )
}

/// to = from: `batch` blocks [rows, columns].
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn copy_block(
    device: &Device,
    to: Matrix<'_, f64>,
    from: Matrix<'_, f64>,
    rows: usize,
    columns: usize,
    batch: usize,
) -> Result<(), Error> {
    if rows == 0 || columns == 0 || batch == 0 {
        return Ok(());
    }
    for matrix in [to, from] {
        holds(
            "a block",
            matrix.view,
            (batch - 1) * matrix.stride + (rows - 1) * matrix.ld + columns,
        )?;
    }
    let arguments = [
        to.view.argument(),
        from.view.argument(),
        of(columns)?,
        of(to.ld)?,
        of(from.ld)?,
        Argument::U64(to.stride as u64),
        Argument::U64(from.stride as u64),
    ];
    device.launch(Kernel::CopyBlock, [rows, batch, 1], 128, 0, &arguments)
}

/// a [B, n, n] += eps tr(a) I; I itself where that is 0.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn shift_diagonal(
    device: &Device,
    a: View<'_, f64>,
    n: usize,
    eps: f64,
    batch: usize,
) -> Result<(), Error> {
    holds("a", a, batch * n * n)?;
    device.launch(
        Kernel::ShiftDiagonal,
        [batch, 1, 1],
        128,
        0,
        &[a.argument(), of(n)?, Argument::F64(eps)],
    )
}

/// Largest diagonal block of [`factor_block`].
pub const FACTOR_BLOCK: usize = 64;

/// The diagonal block of a [B, n, n] at `at` becomes its Cholesky factor L; inverse [B, 64, 64] = L⁻¹; failed `[B]` = 1 where there is none.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
#[expect(
    clippy::too_many_arguments,
    reason = "operands and sizes of one kernel"
)]
pub fn factor_block(
    device: &Device,
    a: View<'_, f64>,
    inverse: View<'_, f64>,
    failed: View<'_, u32>,
    n: usize,
    at: usize,
    size: usize,
    batch: usize,
) -> Result<(), Error> {
    holds("a", a, batch * n * n)?;
    holds("inverse", inverse, batch * FACTOR_BLOCK * FACTOR_BLOCK)?;
    holds("failed", failed, batch)?;
    fits(size <= FACTOR_BLOCK && at + size <= n, || {
        format!("a block {at} + {size} of {n}")
    })?;
    let arguments = [
        a.argument(),
        inverse.argument(),
        failed.argument(),
        of(n)?,
        of(at)?,
        of(size)?,
    ];
    device.launch(Kernel::FactorBlock, [batch, 1, 1], 256, 0, &arguments)
}

/// Largest matrix of [`eigen`].
pub const EIGEN_MAX: usize = 160;

/// Eigenvalues [B, p], descending, and vectors w [B, p, p] (columns) of symmetric a [B, p, p]; scratch [B, p, p].
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
#[expect(
    clippy::too_many_arguments,
    reason = "operands and sizes of one kernel"
)]
pub fn eigen(
    device: &Device,
    values: View<'_, f64>,
    w: View<'_, f64>,
    scratch: View<'_, f64>,
    a: View<'_, f64>,
    p: usize,
    sweeps: usize,
    batch: usize,
) -> Result<(), Error> {
    fits(p.is_multiple_of(2) && (2..=EIGEN_MAX).contains(&p), || {
        format!("eigenvalues of a matrix of {p}")
    })?;
    holds("values", values, batch * p)?;
    for (name, view) in [("w", w), ("scratch", scratch), ("a", a)] {
        holds(name, view, batch * p * p)?;
    }
    let arguments = [
        values.argument(),
        w.argument(),
        scratch.argument(),
        a.argument(),
        of(p)?,
        of(sweeps)?,
    ];
    device.launch(
        Kernel::Eigen,
        [batch, 1, 1],
        1024,
        (p * p + 2 * p) * size_of::<f64>(),
        &arguments,
    )
}

/// Where a read-out's cores go: one site after the other, in one slot.
#[derive(Clone, Copy, Debug)]
pub struct Emitted<'a> {
    /// The slot.
    pub slot: View<'a, bf16>,
    /// Of the first site.
    pub offset: usize,
    /// From site to site.
    pub site_size: usize,
}

/// Factors of a decomposition: u [B, n, p], v [B, r, p], values [B, p] the squares of the singular values, descending.
#[derive(Clone, Copy, Debug)]
pub struct Factors<'a> {
    /// Left vectors.
    pub u: View<'a, f64>,
    /// Right vectors times singular values.
    pub v: View<'a, f64>,
    /// Squares of the singular values.
    pub values: View<'a, f64>,
    /// n.
    pub n: usize,
    /// r.
    pub r: usize,
    /// p.
    pub p: usize,
    /// B.
    pub batch: usize,
}

/// Low-rank cores of rank q: singular values above max(relative sigma_1, floors `[B]`) become 1, or stay what they are if `fold`.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn emit_low_rank(
    device: &Device,
    to: &Emitted<'_>,
    factors: &Factors<'_>,
    floors: View<'_, f64>,
    q: usize,
    relative: f64,
    fold: bool,
) -> Result<(), Error> {
    let Factors {
        u,
        v,
        values,
        n,
        r,
        p,
        batch,
    } = *factors;
    holds("u", u, batch * n * p)?;
    holds("v", v, batch * r * p)?;
    holds("values", values, batch * p)?;
    holds("floors", floors, batch)?;
    holds(
        "slot",
        to.slot,
        to.offset + batch.saturating_sub(1) * to.site_size + q * (n + r),
    )?;
    let arguments = [
        to.slot.argument(),
        u.argument(),
        v.argument(),
        values.argument(),
        floors.argument(),
        of(n)?,
        of(r)?,
        of(p)?,
        of(q)?,
        Argument::U64(to.offset as u64),
        Argument::U64(to.site_size as u64),
        Argument::F64(relative),
        Argument::U32(u32::from(fold)),
    ];
    device.launch(Kernel::EmitLowRank, [q, batch, 1], 256, 0, &arguments)
}

/// Dense cores of x [B, n, r].
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn emit_dense(
    device: &Device,
    to: &Emitted<'_>,
    x: View<'_, f64>,
    n: usize,
    r: usize,
    batch: usize,
) -> Result<(), Error> {
    holds("x", x, batch * n * r)?;
    holds(
        "slot",
        to.slot,
        to.offset + batch.saturating_sub(1) * to.site_size + n * r,
    )?;
    let arguments = [
        to.slot.argument(),
        x.argument(),
        of(n)?,
        of(r)?,
        Argument::U64(to.offset as u64),
        Argument::U64(to.site_size as u64),
    ];
    device.launch(Kernel::EmitDense, [r, batch, 1], 256, 0, &arguments)
}

/// A buffer's view, where both are at hand.
impl<'a, T: Element> From<&'a Buffer<T>> for View<'a, T> {
    fn from(buffer: &'a Buffer<T>) -> Self {
        buffer.view()
    }
}
