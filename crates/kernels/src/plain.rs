//! The same operations by candle's own: for tensors on a device, and on the processor in bf16 or f64.
//!
//! The kernels of this crate know f32 in host memory ([`known`]); what training asks of other tensors is done here, with gradients.
//! Sums, norms and softmax are f32 where activations are narrower (f64 where they are that), products what the activations are.
//! Frozen weights get no gradient, gathers bring theirs back as gathers. Which rows belong together is padded by at most
//! [`PADDED`], so that a batch is a few products whatever its sequences. Results differ from the kernels' in rounding alone, but are not the
//! same bits in any batch: nothing is served from here. Start at [`attention`].

mod gather;
#[cfg(test)]
mod tests;

use std::ops::Range;

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, D, DType, Layout, Result, Shape, Storage,
    Tensor, backend::BackendStorage, bail,
};

use crate::score::{Likeliest, Says, Scores, Teacher, rest};
use gather::{Places, gather};

/// Rows with padding over rows without that a group of sequences may have, but for the last few.
const PADDED: f64 = 1.25;
/// Positions whose logits exist at once.
const ROWS: usize = 2048;
/// What a hidden key's score is lowered by: e to this power is 0 in f32.
const HIDDEN: f32 = -1e30;

/// Whether the kernels of this crate know a tensor.
pub(crate) fn known(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

/// What sums of such activations are made in.
fn wide(x: &Tensor) -> DType {
    match x.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// A frozen tensor where x is, in this type.
fn beside(frozen: &Tensor, x: &Tensor, dtype: DType) -> Result<Tensor> {
    frozen.detach().to_device(x.device())?.to_dtype(dtype)
}

/// A value that was computed aside, to be put into the graph.
struct Computed<B> {
    name: &'static str,
    value: Tensor,
    back: B,
}

impl<B> Computed<B> {
    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        let (storage, layout) = self.value.storage_and_layout();
        match &*storage {
            Storage::Cpu(values) => Ok((values.try_clone(layout)?, self.value.shape().clone())),
            Storage::Cuda(_) | Storage::Metal(_) => bail!("{} is not in host memory", self.name),
        }
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        let (storage, layout) = self.value.storage_and_layout();
        match &*storage {
            Storage::Cuda(values) => Ok((values.try_clone(layout)?, self.value.shape().clone())),
            Storage::Cpu(_) | Storage::Metal(_) => bail!("{} is not on the device", self.name),
        }
    }
}

impl<B: Fn(&Tensor) -> Result<Tensor>> CustomOp1 for Computed<B> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        (self.back)(&dy.contiguous()?).map(Some)
    }
}

type Two = (Option<Tensor>, Option<Tensor>);

impl<B: Fn(&Tensor) -> Result<Two>> CustomOp2 for Computed<B> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Two> {
        (self.back)(&dy.contiguous()?)
    }
}

/// `value`, computed from x without its history; `back(dy)` gives the gradient of x.
fn computed(
    name: &'static str,
    x: &Tensor,
    value: Tensor,
    back: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    if !x.track_op() {
        return Ok(value);
    }
    let value = value.contiguous()?.detach();
    x.apply_op1(Computed { name, value, back })
}

/// As [`crate::rms_norm`].
pub(crate) fn rms_norm(x: &Tensor, gain: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let dtype = wide(x);
    let h = x.to_dtype(dtype)?; // [.., D]
    let mean = (h.sqr()?.mean_keepdim(D::Minus1)? + eps)?; // [.., 1]
    let mut y = h.broadcast_div(&mean.sqrt()?)?; // [.., D]
    if let Some(gain) = gain {
        y = y.broadcast_mul(&beside(gain, x, dtype)?)?; // [.., D]
    }
    y.to_dtype(x.dtype())
}

/// As [`crate::silu_mul`].
pub(crate) fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.silu()? * up
}

/// As [`crate::rope()`].
pub(crate) fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, positions: &[u32]) -> Result<Tensor> {
    let (t, _, dh) = x.dims3()?;
    let (dtype, half) = (wide(x), dh / 2);
    let index = Tensor::new(positions, cos.device())?; // [T]
    let of = |table: &Tensor| -> Result<Tensor> {
        let rows = table.index_select(&index, 0)?; // [T, Dh/2]
        beside(&rows, x, dtype)?.reshape((t, 1, half))
    };
    let (cos, sin) = (of(cos)?, of(sin)?); // [T, 1, Dh/2]
    let x_wide = x.to_dtype(dtype)?; // [T, H, Dh]
    let (low, high) = (
        x_wide.narrow(2, 0, half)?.contiguous()?,
        x_wide.narrow(2, half, half)?.contiguous()?,
    ); // [T, H, Dh/2]
    let y = [
        (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?,
        (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?,
    ];
    Tensor::cat(&y, 2)?.to_dtype(x.dtype()) // [T, H, Dh]
}

/// y = x Wᵀ of a frozen w [out, in], where x is and of its type. x [T, in] -> [T, out].
pub(crate) fn frozen(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let y = x.detach().matmul(&w.t()?)?; // [T, out]
    let w = w.clone();
    computed("frozen", x, y, move |dy| dy.matmul(&w))
}

/// y [T, out] with a frozen bias `[out]` added.
pub(crate) fn add_bias(y: &Tensor, bias: &Tensor) -> Result<Tensor> {
    y.broadcast_add(&beside(bias, y, y.dtype())?)
}

/// As [`crate::linear_trained`]; w may be of another type than x.
pub(crate) fn linear_trained(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let w = w.to_dtype(x.dtype())?; // [out, in]
    let y = x.detach().matmul(&w.detach().t()?)?; // [T, out]
    if !x.track_op() && !w.track_op() {
        return Ok(y);
    }
    let (from, weights) = (x.clone(), w.clone());
    let (tracked_x, tracked_w) = (x.track_op(), w.track_op());
    let op = Computed {
        name: "linear_trained",
        value: y.detach(),
        back: move |dy: &Tensor| {
            let dx = || dy.matmul(&weights.detach()); // [T, in]
            let dw = || dy.t()?.matmul(&from.detach()); // [out, in]
            Ok((
                tracked_x.then(dx).transpose()?,
                tracked_w.then(dw).transpose()?,
            ))
        },
    };
    x.apply_op2(&w, op)
}

/// Rows of groups as matrices of one height, rows of zeros below.
struct Padded {
    /// [J L] rows, of each where it came from.
    places: Places,
    groups: usize,
    /// L
    height: usize,
}

impl Padded {
    fn of(groups: &[Vec<Range<usize>>]) -> Self {
        let count = |group: &Vec<Range<usize>>| group.iter().map(Range::len).sum::<usize>();
        let height = groups.iter().map(count).max().unwrap_or(0).max(1);
        let mut places = Vec::with_capacity(groups.len() * height);
        for group in groups {
            places.extend(group.iter().cloned().flatten().map(Some));
            places.resize(places.len().next_multiple_of(height), None);
            if count(group) == 0 {
                places.resize(places.len() + height, None);
            }
        }
        Self {
            places,
            groups: groups.len(),
            height,
        }
    }

    /// x [T, C] -> [J, L, C].
    fn rows(&self, x: &Tensor) -> Result<Tensor> {
        let (_, width) = x.dims2()?;
        gather(x, &self.places)?.reshape((self.groups, self.height, width))
    }
}

/// As [`crate::apply_trained_cores`].
pub(crate) fn apply_trained_cores(
    a: &Tensor,
    n: &Tensor,
    groups: &[Vec<Range<usize>>],
) -> Result<Tensor> {
    let ((t, _), (_, _, r2), dtype) = (a.dims2()?, n.dims3()?, wide(a));
    let padded = Padded::of(groups);
    let rows = padded.rows(&a.to_dtype(dtype)?)?; // [J, L, R1]
    let c = rows.matmul(&n.to_dtype(dtype)?)?; // [J, L, R2]
    let c = c.reshape((padded.places.len(), r2))?; // [J L, R2]
    gather(&c, &gather::inverse(&padded.places, t))?.to_dtype(a.dtype()) // [T, R2]
}

/// As [`crate::outer_sums`], in f32 or f64.
pub(crate) fn outer_sums(k: &Tensor, v: &Tensor, groups: &[Vec<Range<usize>>]) -> Result<Tensor> {
    let (padded, dtype) = (Padded::of(groups), wide(k));
    let k = padded.rows(&k.to_dtype(dtype)?)?; // [J, L, R1]
    let v = padded.rows(&v.to_dtype(dtype)?)?; // [J, L, R2]
    k.transpose(1, 2)?.contiguous()?.matmul(&v) // [J, R1, R2]
}

/// A run of queries, and what they see.
struct Sequence {
    /// Its first row in q.
    start: usize,
    len: usize,
    /// Position of its first query.
    position: usize,
    /// Rows of its keys, by position.
    keys: Vec<usize>,
}

/// Sizes and switches of attention.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) scale: f32,
    pub(crate) window: Option<usize>,
}

/// As [`crate::self_attention`].
pub(crate) fn self_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sequences: &[(usize, usize)],
    sizes: Sizes,
) -> Result<Tensor> {
    let sequences = sequences.iter().filter(|(_, len)| *len > 0);
    let sequences = sequences
        .map(|&(start, len)| Sequence {
            start,
            len,
            position: 0,
            keys: (start..start + len).collect(),
        })
        .collect();
    attention(q, k, v, sequences, sizes)
}

/// As [`crate::paged_attention`]; without gradients of the caches.
pub(crate) fn paged_attention(
    q: &Tensor,
    k_cache: &Tensor,
    v_cache: &Tensor,
    rows: &[crate::AttentionRow<'_>],
    sizes: Sizes,
) -> Result<Tensor> {
    let (_, block_size, _, _) = k_cache.dims4()?;
    let sequences = rows.iter().filter(|row| row.len > 0).map(|row| Sequence {
        start: row.start,
        len: row.len,
        position: row.position,
        keys: (0..row.position + row.len)
            .map(|at| row.blocks[at / block_size] as usize * block_size + at % block_size)
            .collect(),
    });
    let sequences = sequences.collect();
    let flat = |cache: &Tensor| cache.detach().flatten(0, 1); // [slots, Hkv, Dh]
    attention(q, &flat(k_cache)?, &flat(v_cache)?, sequences, sizes)
}

/// As [`crate::kv_append`]: runs of neighbouring slots are copied at once.
pub(crate) fn kv_append(cache: &Tensor, rows: &Tensor, slots: &[u32]) -> Result<()> {
    let flat = cache.flatten(0, 1)?; // [slots, Hkv, Dh]
    let rows = rows.detach().contiguous()?; // [T, Hkv, Dh]
    let mut start = 0;
    while let Some(&slot) = slots.get(start) {
        let run = (slot..).zip(&slots[start..]);
        let len = run.take_while(|(want, slot)| want == *slot).count();
        let part = rows.narrow(0, start, len)?.contiguous()?;
        flat.slice_set(&part, 0, slot as usize)?;
        start += len;
    }
    Ok(())
}

/// Sequences of similar lengths, in groups whose padding is bounded.
fn alike(mut sequences: Vec<Sequence>) -> Vec<Vec<Sequence>> {
    sequences.sort_by_key(|sequence| (sequence.keys.len(), sequence.len, sequence.start));
    let mut groups: Vec<Vec<Sequence>> = Vec::new();
    let mut held = 0;
    for sequence in sequences {
        // Keys grow along the group: with this one all are as long as it is.
        let size = sequence.keys.len();
        if let Some(group) = groups.last_mut() {
            let padded = (group.len() + 1) * size;
            #[expect(clippy::cast_precision_loss, reason = "row counts are far below 2^52")]
            let fits = padded as f64 <= PADDED * (held + size) as f64;
            if fits {
                held += size;
                group.push(sequence);
                continue;
            }
        }
        held = size;
        groups.push(vec![sequence]);
    }
    groups
}

/// Causal attention of sequences. q [T, H, Dh], k and v [S, Hkv, Dh] -> [T, H Dh]; rows of no sequence give 0.
fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sequences: Vec<Sequence>,
    sizes: Sizes,
) -> Result<Tensor> {
    let ((t, heads, dh), (s, kv_heads, _)) = (q.dims3()?, k.dims3()?);
    let (q, k, v) = (
        q.reshape((t, heads * dh))?,
        k.reshape((s, kv_heads * dh))?,
        v.reshape((s, kv_heads * dh))?,
    );
    let (mut parts, mut places) = (Vec::new(), Vec::new());
    for group in alike(sequences) {
        let here = Group::of(&group);
        let of = |x: &Tensor, places: &Places, rows: usize, heads: usize| -> Result<Tensor> {
            gather(x, places)?.reshape((here.count, rows, heads, dh))
        };
        let per = heads / kv_heads;
        let q = of(&q, &here.queries, here.rows, heads)?
            .reshape((here.count, here.rows, kv_heads, per, dh))?
            .permute((0, 2, 3, 1, 4))?
            .reshape((here.count * kv_heads, per * here.rows, dh))?; // [n Hkv, g Lq, Dh]
        let k = of(&k, &here.keys, here.columns, kv_heads)?
            .permute((0, 2, 3, 1))?
            .reshape((here.count * kv_heads, dh, here.columns))?; // [n Hkv, Dh, Lk]
        let v = of(&v, &here.keys, here.columns, kv_heads)?
            .permute((0, 2, 1, 3))?
            .reshape((here.count * kv_heads, here.columns, dh))?; // [n Hkv, Lk, Dh]
        let dtype = wide(&q);
        let scores = (q.matmul(&k)?.to_dtype(dtype)? * f64::from(sizes.scale))?;
        let shape = (here.count, heads, here.rows, here.columns);
        let mask = here.mask(&group, sizes.window);
        let mask = Tensor::from_vec(mask, (here.count, 1, here.rows, here.columns), q.device())?;
        let scores = scores
            .reshape(shape)?
            .broadcast_add(&mask.to_dtype(dtype)?)?; // [n, H, Lq, Lk]
        let p = softmax(&scores)?.to_dtype(q.dtype())?.reshape((
            here.count * kv_heads,
            per * here.rows,
            here.columns,
        ))?;
        let out = p
            .matmul(&v)?
            .reshape((here.count, kv_heads, per, here.rows, dh))?
            .permute((0, 3, 1, 2, 4))?
            .reshape((here.count * here.rows, heads * dh))?; // [n Lq, H Dh]
        parts.push(out);
        places.extend(here.queries);
    }
    if parts.is_empty() {
        return Tensor::zeros((t, heads * dh), q.dtype(), q.device());
    }
    let out = Tensor::cat(&parts, 0)?; // [sum of n Lq, H Dh]
    gather(&out, &gather::inverse(&places, t)) // [T, H Dh]
}

/// n sequences as one batch of Lq queries and Lk keys each.
struct Group {
    count: usize,
    /// Lq
    rows: usize,
    /// Lk
    columns: usize,
    /// [n Lq]
    queries: Places,
    /// [n Lk]
    keys: Places,
}

impl Group {
    fn of(sequences: &[Sequence]) -> Self {
        let longest = |of: fn(&Sequence) -> usize| sequences.iter().map(of).max().unwrap_or(0);
        let (rows, columns) = (
            longest(|sequence| sequence.len),
            longest(|sequence| sequence.keys.len()),
        );
        let (mut queries, mut keys) = (Vec::new(), Vec::new());
        for (number, sequence) in sequences.iter().enumerate() {
            queries.extend((sequence.start..sequence.start + sequence.len).map(Some));
            queries.resize((number + 1) * rows, None);
            keys.extend(sequence.keys.iter().copied().map(Some));
            keys.resize((number + 1) * columns, None);
        }
        Self {
            count: sequences.len(),
            rows,
            columns,
            queries,
            keys,
        }
    }

    /// [n, 1, Lq, Lk]: 0 where a query sees a key.
    fn mask(&self, sequences: &[Sequence], window: Option<usize>) -> Vec<f32> {
        let window = window.unwrap_or(usize::MAX);
        let mut mask = Vec::with_capacity(sequences.len() * self.rows * self.columns);
        for sequence in sequences {
            for row in 0..self.rows {
                let own = sequence.position + row;
                mask.extend((0..self.columns).map(|key| {
                    let seen = key <= own && own - key < window;
                    if seen { 0.0 } else { HIDDEN }
                }));
            }
        }
        mask
    }
}

/// Along the last dimension.
fn softmax(scores: &Tensor) -> Result<Tensor> {
    let largest = scores.detach().max_keepdim(D::Minus1)?;
    let e = scores.broadcast_sub(&largest)?.exp()?;
    e.broadcast_div(&e.sum_keepdim(D::Minus1)?)
}

/// As [`crate::score()`], its arguments checked; `head` [V, D] where the hidden states are and of their type.
pub(crate) fn score(
    head: &Tensor,
    hidden: &Tensor,
    targets: &[u32],
    teacher: &Teacher,
) -> Result<Scores> {
    let (n, _) = hidden.dims2()?;
    let (dtype, device) = (wide(hidden), hidden.device());
    let (tracked, states) = (hidden.track_op(), hidden.detach());
    let mut scores = Scores {
        loss: Tensor::zeros(0, dtype, device)?,
        ce: Vec::with_capacity(n),
        kl: Vec::with_capacity(n),
        right: Vec::with_capacity(n),
    };
    let (mut losses, mut gradients) = (Vec::new(), Vec::new());
    for from in (0..n).step_by(ROWS) {
        let count = ROWS.min(n - from);
        let at = &teacher.at[from..from + count];
        let z = states.narrow(0, from, count)?.matmul(&head.t()?)?; // [n', V]
        let z = z.to_dtype(dtype)?;
        let largest = z.max_keepdim(1)?; // [n', 1]
        let ln_s = log_softmax(&z, &largest)?; // [n', V]
        let index = Tensor::new(&targets[from..from + count], device)?.reshape((count, 1))?;
        let ce = ln_s.gather(&index, 1)?.neg()?; // [n', 1]
        let right = z.gather(&index, 1)?.ge(&largest)?; // [n', 1]
        let share: Vec<f32> = at
            .iter()
            .map(|at| at.map_or(0.0, |(_, share)| share))
            .collect();
        let share = Tensor::from_vec(share, (count, 1), device)?.to_dtype(dtype)?;
        let own = share.affine(-1.0, 1.0)?; // [n', 1]
        let mut dz = ln_s.exp()?; // [n', V]
        let mut kl = ce.zeros_like()?; // [n', 1]
        let asked: Places = at.iter().map(|at| at.map(|(row, _)| row)).collect();
        if asked.iter().any(Option::is_some) {
            let there: Vec<f32> = asked
                .iter()
                .map(|row| if row.is_some() { 1.0 } else { 0.0 })
                .collect();
            let there = Tensor::from_vec(there, (count, 1), device)?.to_dtype(dtype)?;
            let (p, apart) = match &teacher.says {
                Says::Hidden(hidden) => {
                    let says = gather(&hidden.detach(), &asked)?.matmul(&head.t()?)?;
                    let says = says.to_dtype(dtype)?; // [n', V]
                    let ln_p = log_softmax(&says, &says.max_keepdim(1)?)?;
                    let p = ln_p.exp()?;
                    let apart = p.mul(&(ln_p - &ln_s)?)?.sum_keepdim(1)?;
                    (p, apart)
                }
                Says::Likeliest(tokens) => among_likeliest(tokens, &asked, &ln_s)?,
            }; // [n', V], [n', 1]
            kl = (apart * there)?;
            dz = (dz - p.broadcast_mul(&share)?)?;
        }
        losses.push(((&ce * &own)? + (&kl * &share)?)?.flatten_all()?);
        scores.ce.extend(floats(&ce)?);
        scores.kl.extend(floats(&kl)?);
        let right = floats(&right.to_dtype(DType::F32)?)?;
        scores
            .right
            .extend(right.into_iter().map(|right| right > 0.5));
        if tracked {
            let dz = dz.scatter_add(&index, &own.neg()?, 1)?; // [n', V]
            gradients.push(dz.to_dtype(hidden.dtype())?.matmul(head)?); // [n', D]
        }
    }
    if n == 0 {
        return Ok(scores);
    }
    let value = Tensor::cat(&losses, 0)?; // [N]
    scores.loss = match tracked {
        true => {
            let dh = Tensor::cat(&gradients, 0)?; // [N, D]
            computed("score", hidden, value, move |dy| {
                let dy = dy.reshape((n, 1))?.to_dtype(dh.dtype())?;
                dh.broadcast_mul(&dy)
            })?
        }
        false => value,
    };
    Ok(scores)
}

/// What stands for p in the gradient [n', V], and the divergence [n', 1], of a teacher that is known by its likeliest tokens; ln_s [n', V].
fn among_likeliest(
    likeliest: &Likeliest,
    asked: &Places,
    ln_s: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (shape, device, dtype) = ((asked.len(), likeliest.count), ln_s.device(), ln_s.dtype());
    let (mut tokens, mut p, mut left) = (Vec::new(), Vec::new(), Vec::new());
    for row in asked {
        // Rows that nobody asks for take the first one's words; they count nothing.
        let (own, probabilities) = likeliest.row(row.unwrap_or(0));
        tokens.extend_from_slice(own);
        p.extend_from_slice(probabilities);
        left.push(rest(probabilities));
    }
    let tokens = Tensor::from_vec(tokens, shape, device)?; // [n', k]
    let p = Tensor::from_vec(p, shape, device)?.to_dtype(dtype)?; // [n', k]
    let left = Tensor::from_vec(left, (asked.len(), 1), device)?.to_dtype(dtype)?; // [n', 1]
    let tiny = f64::from(f32::MIN_POSITIVE);
    let own = ln_s.gather(&tokens, 1)?; // [n', k]
    let others = ln_s.exp()?.scatter(&tokens, &p.zeros_like()?, 1)?; // [n', V]
    let sum = others.sum_keepdim(1)?.maximum(tiny)?; // [n', 1]
    let within = p.mul(&(p.maximum(tiny)?.log()? - own)?)?.sum_keepdim(1)?;
    let beyond = left.mul(&(left.maximum(tiny)?.log()? - sum.log()?)?)?;
    let share = others.broadcast_mul(&left.div(&sum)?)?; // [n', V]
    Ok((share.scatter(&tokens, &p, 1)?, (within + beyond)?))
}

/// z - ln Σ e^z along the last dimension.
fn log_softmax(z: &Tensor, largest: &Tensor) -> Result<Tensor> {
    let z = z.broadcast_sub(largest)?;
    z.broadcast_sub(&z.exp()?.sum_keepdim(1)?.log()?)
}

fn floats(x: &Tensor) -> Result<Vec<f32>> {
    x.flatten_all()?.to_dtype(DType::F32)?.to_vec1()
}
