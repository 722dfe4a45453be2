//! The per-session core at one site, out of an arena of slots.

use half::bf16;

use super::{eights, fits, holds, of};
use crate::{Device, Error, Kernel, View, device::Argument};

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
    a: View<'_, f32>,
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

/// Gates of one site in an arena of slots.
#[derive(Clone, Copy, Debug)]
pub struct SiteGates<'a> {
    /// All slots.
    pub arena: View<'a, bf16>,
    /// Elements of a slot.
    pub slot_size: usize,
    /// Where this site's gate begins in a slot: (G + lambda I)⁻¹ G [R1, R1], then 1 - e as an f32 (0: there is none).
    pub offset: usize,
    /// R1.
    pub r1: usize,
    /// R2.
    pub r2: usize,
    /// The doubt at which half is left.
    pub threshold: f32,
    /// Over which a gate closes.
    pub width: f32,
}

impl SiteGates<'_> {
    /// Elements of one site's gate: eights, with the f32 in the last of them.
    pub fn size(r1: usize) -> usize {
        r1 * r1 + 8
    }
}

/// c [T, R2] times what the gates of slots `[T]` (-1: none) leave for keys a [T, R1]; doubts [T, 2] are taken further by this site. Slots are
/// below the arena's.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn close_gates(
    device: &Device,
    c: View<'_, bf16>,
    doubts: View<'_, f32>,
    a: View<'_, f32>,
    gates: &SiteGates<'_>,
    slots: View<'_, i32>,
    rows: usize,
) -> Result<(), Error> {
    let SiteGates {
        arena,
        slot_size,
        offset,
        r1,
        r2,
        threshold,
        width,
    } = *gates;
    eights(&[r1, r2])?;
    holds("c", c, rows * r2)?;
    holds("doubts", doubts, rows * 2)?;
    holds("a", a, rows * r1)?;
    holds("slots", slots, rows)?;
    fits(
        offset + SiteGates::size(r1) <= slot_size
            && arena.len >= slot_size
            && offset.is_multiple_of(8)
            && slot_size.is_multiple_of(8),
        || format!("a gate at {offset} of slots of {slot_size}"),
    )?;
    let arguments = [
        c.argument(),
        doubts.argument(),
        a.argument(),
        arena.argument(),
        slots.argument(),
        Argument::U64(slot_size as u64),
        Argument::U64(offset as u64),
        of(r1)?,
        of(r2)?,
        Argument::F32(threshold),
        Argument::F32(width),
    ];
    device.launch(Kernel::CloseGates, [rows, 1, 1], 256, 0, &arguments)
}
