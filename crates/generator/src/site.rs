//! A site: one adapted linear with its trained network. What its rows add, and what they write.
//!
//! Knows tensors of one batch, not the model around it: the caller hands in the linear's input x, the
//! residual h that enters the layer and the tokens' normed embeddings u. Keys and values are pure functions
//! of these. Start at [`Site::delta`] and [`Site::write`].

use std::{fmt, ops::Range};

use candle_core::Tensor;
use kernels::{CoreRows, CoreView, Linear};

use crate::{
    cores::Core,
    error::Error,
    gate::{self, Doubt, Gates, SiteGate},
    state::{Pending, SiteWindow, Window},
};

/// An adapted linear of a decoder layer. Ordered as a layer computes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Module {
    /// self_attn.q_proj
    QProj,
    /// self_attn.k_proj
    KProj,
    /// self_attn.v_proj
    VProj,
    /// self_attn.o_proj
    OProj,
    /// mlp.gate_proj
    GateProj,
    /// mlp.up_proj
    UpProj,
    /// mlp.down_proj
    DownProj,
}

impl Module {
    /// All of them, in order.
    pub const ALL: [Self; 7] = [
        Self::QProj,
        Self::KProj,
        Self::VProj,
        Self::OProj,
        Self::GateProj,
        Self::UpProj,
        Self::DownProj,
    ];

    /// Name within its block: `o_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
        }
    }

    /// The block of a layer that holds it: `self_attn` or `mlp`.
    pub fn block(self) -> &'static str {
        match self {
            Self::QProj | Self::KProj | Self::VProj | Self::OProj => "self_attn",
            Self::GateProj | Self::UpProj | Self::DownProj => "mlp",
        }
    }

    /// The module of that name, with its block in front or without.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|module| {
            name.strip_suffix(module.name()).is_some_and(|before| {
                before.is_empty() || before.strip_suffix('.') == Some(module.block())
            })
        })
    }
}

/// Which linear of which layer. Ordered by layer, then as the layer computes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SiteId {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// The linear.
    pub module: Module,
}

impl fmt::Display for SiteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "layers.{}.{}.{}",
            self.layer,
            self.module.block(),
            self.module.name()
        )
    }
}

/// What a generator must know of its base: to check shapes and to name a mismatch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseShape {
    /// Decoder layers.
    pub layers: usize,
    /// D, size of the residual stream.
    pub hidden: usize,
    /// Size between gate/up and down.
    pub intermediate: usize,
    /// Features of all query heads together.
    pub query: usize,
    /// Features of all key (or value) heads together.
    pub key_value: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
}

impl BaseShape {
    /// (out, in) features of a layer's linear.
    pub fn linear(&self, module: Module) -> (usize, usize) {
        match module {
            Module::QProj => (self.query, self.hidden),
            Module::KProj | Module::VProj => (self.key_value, self.hidden),
            Module::OProj => (self.hidden, self.query),
            Module::GateProj | Module::UpProj => (self.intermediate, self.hidden),
            Module::DownProj => (self.hidden, self.intermediate),
        }
    }
}

/// Rows of a batch that run with one core.
#[derive(Clone, Debug)]
pub struct SiteRows<'a> {
    /// First row of the batch.
    pub start: usize,
    /// Number of rows.
    pub len: usize,
    /// Their core.
    pub core: &'a Core,
    /// Strength of the imprint: factor on the delta, 1 as trained.
    pub scale: f32,
}

/// Rows of a batch that write into one open window: tokens `position .. position + len` of it.
#[derive(Debug)]
pub struct WriteRows<'a> {
    /// First row of the batch.
    pub start: usize,
    /// Number of rows.
    pub len: usize,
    /// Index of the first row's token in its window.
    pub position: usize,
    /// Normed embedding [1, D] of the token behind the last row, if the window's next token is known.
    pub lookahead: Option<Tensor>,
    /// The window.
    pub window: &'a mut Window,
}

/// eps of every rms in a generator (GENERATOR.md).
pub(crate) const EPS: f64 = 1e-6;

/// u = e / rms(e), what a successor contributes to a value. e [T, D] token embeddings -> [T, D].
///
/// # Errors
/// [`Error::Tensor`] if e is not of that form.
pub fn normed_embeddings(e: &Tensor) -> Result<Tensor, Error> {
    Ok(kernels::rms_norm(e, None, EPS)?) // [T, D]
}

/// What keys and values are made with.
#[derive(Debug)]
pub(crate) enum Writer {
    /// k = A2 n, v = A3 n. a2 [R1, D], a3 [R2, D].
    Published { a2: Linear, a3: Linear },
    /// k = A1 x, v = A3 u' + A3n n, u' of the next token. a3 [R2, D], a3n [R2, D].
    Associative { a3: Linear, a3n: Linear },
}

/// The trained network of one site.
#[derive(Debug)]
pub struct Site {
    pub(crate) id: SiteId,
    /// [R1, Din]
    pub(crate) a1: Linear,
    /// [Dout, R2]
    pub(crate) b: Linear,
    pub(crate) writer: Writer,
    /// Gain of the norm of h, `[D]`.
    pub(crate) gain: Tensor,
    /// lambda of the ridge read-out.
    pub(crate) ridge: Option<f64>,
    /// alpha / R2.
    pub(crate) scale: f64,
    pub(crate) max_rank: usize,
    pub(crate) skip_first: bool,
}

impl Site {
    /// Keys of tokens, A1 x: x [T, Din], the linear's input -> [T, R1].
    ///
    /// # Errors
    /// [`Error::Tensor`] if x is not of that form.
    pub fn keys(&self, x: &Tensor) -> Result<Tensor, Error> {
        Ok(self.a1.forward(x)?)
    }

    /// Which linear it adapts.
    pub fn id(&self) -> SiteId {
        self.id
    }

    /// lambda of a ridge read-out.
    pub fn ridge(&self) -> Option<f64> {
        self.ridge
    }

    /// (R1, R2, largest rank of a core).
    pub fn ranks(&self) -> (usize, usize, usize) {
        (self.a1.out_features(), self.b.in_features(), self.max_rank)
    }

    /// Whether it computes in integers, and its cores are kept in 8 bits.
    pub fn rounds(&self) -> bool {
        self.a1.rounds_activations()
    }

    /// The same network with its maps in 8 bits, times activations in int8.
    pub(crate) fn rounded(mut self) -> Self {
        self.a1 = self.a1.rounded();
        self.b = self.b.rounded();
        self.writer = match self.writer {
            Writer::Published { a2, a3 } => Writer::Published {
                a2: a2.rounded(),
                a3: a3.rounded(),
            },
            Writer::Associative { a3, a3n } => Writer::Associative {
                a3: a3.rounded(),
                a3n: a3n.rounded(),
            },
        };
        self
    }

    /// The delta to add to y: (alpha / R2) scale B Nᵀ A1 x with each row's own N, [T, Dout]; 0 for rows that no
    /// entry names; `None` if no row has a core that does anything. x [T, Din], contiguous f32; `index` of this
    /// site in [`crate::Generator::sites`]. Rows do not touch each other: a row's delta is the same, bit for
    /// bit, in any batch. Gates are left out of account.
    ///
    /// # Errors
    /// [`Error::Rows`] for rows outside of x, [`Error::Foreign`] for a core of another generator.
    pub fn delta(
        &self,
        index: usize,
        x: &Tensor,
        rows: &[SiteRows<'_>],
    ) -> Result<Option<Tensor>, Error> {
        self.delta_of(index, x, rows, None)
    }

    /// The same, with each token's delta closed by its core's gates, where it has some. doubts `[T]`: what the sites so far made of
    /// each token; this one adds its own.
    ///
    /// # Errors
    /// As [`Site::delta`]; [`Error::Rows`] if there is not a doubt for each row of x.
    pub fn gated_delta(
        &self,
        index: usize,
        x: &Tensor,
        rows: &[SiteRows<'_>],
        doubts: &mut [Doubt],
    ) -> Result<Option<Tensor>, Error> {
        check_rows(0, x.dim(0)?, doubts.len())?;
        self.delta_of(index, x, rows, Some(doubts))
    }

    fn delta_of(
        &self,
        index: usize,
        x: &Tensor,
        rows: &[SiteRows<'_>],
        doubts: Option<&mut [Doubt]>,
    ) -> Result<Option<Tensor>, Error> {
        let (tokens, _) = x.dims2()?;
        let (_, r2, _) = self.ranks();
        let mut cores = Vec::with_capacity(rows.len());
        let mut gated = Vec::new();
        for row in rows {
            check_rows(row.start, row.len, tokens)?;
            if let Some(core) = row.core.view(index)?
                && row.len > 0
                && row.scale != 0.0
            {
                let gates = row.core.gates.as_deref().filter(|_| doubts.is_some());
                if let Some((gates, gate)) = gates.and_then(|all| Some((all, all.site(index)?))) {
                    gated.push((row.start..row.start + row.len, gates, gate));
                }
                cores.push(CoreRows {
                    start: row.start,
                    len: row.len,
                    core,
                    scale: row.scale * self.scale as f32,
                });
            }
        }
        // Only the span of rows that have a core is multiplied: bare rows beside it cost nothing.
        let Some(span) = span(cores.iter().map(|row| row.start..row.start + row.len)) else {
            return Ok(None);
        };
        for row in &mut cores {
            row.start -= span.start;
        }
        let x = x.narrow(0, span.start, span.len())?; // [Ts, Din]
        let a = self.a1.forward(&x)?; //                 [Ts, R1]    one product for all sessions
        let mut c = kernels::apply_cores(&a, &cores, r2)?; // [Ts, R2]   each row's own N
        if let Some(doubts) = doubts.filter(|_| !gated.is_empty()) {
            c = closed(&a, &c, span.start, &gated, doubts)?; // [Ts, R2]
        }
        let d = self.b.forward(&c)?; //                  [Ts, Dout]  one product again
        if span.len() == tokens {
            return Ok(Some(d));
        }
        Ok(Some(d.pad_with_zeros(0, span.start, tokens - span.end)?)) // [T, Dout]
    }

    /// Lets the rows write into their windows. x [T, Din] input of the linear; h [T, D] residual entering the
    /// layer; u [T, D] normed embedding of each row's own token; all contiguous f32.
    ///
    /// In the associative form the successor of a row is the next row of its segment, that of the last row is
    /// `lookahead`; without one its key and hidden value stay pending in the window, and are written when the
    /// next call's first row (its successor) comes. A window that closes drops its pending token. Cutting a
    /// window into calls changes no bit of the sums.
    ///
    /// # Errors
    /// [`Error::Rows`], [`Error::Position`] and [`Error::Foreign`] before anything is written.
    pub fn write(
        &self,
        index: usize,
        x: &Tensor,
        h: &Tensor,
        u: &Tensor,
        rows: &mut [WriteRows<'_>],
    ) -> Result<(), Error> {
        let (tokens, _) = x.dims2()?;
        for row in rows.iter() {
            check_rows(row.start, row.len, tokens)?;
            let site = row.window.site(index)?;
            site.check(self)?;
            if site.position != row.position {
                return Err(Error::Position {
                    want: site.position,
                    found: row.position,
                });
            }
        }
        let Some(span) = span(
            rows.iter()
                .filter(|row| row.len > 0)
                .map(|row| row.start..row.start + row.len),
        ) else {
            return Ok(());
        };
        let x = x.narrow(0, span.start, span.len())?; // [Ts, Din]
        let h = h.narrow(0, span.start, span.len())?; // [Ts, D]
        let u = u.narrow(0, span.start, span.len())?; // [Ts, D]
        match &self.writer {
            Writer::Published { a2, a3 } => {
                let (k, v) = published(a2, a3, &self.gain, &h)?; // [Ts, R1], [Ts, R2]
                for row in rows.iter_mut().filter(|row| row.len > 0) {
                    let first = row.start - span.start;
                    let skipped = usize::from(self.skip_first && row.position == 0);
                    let site = row.window.site_mut(index)?;
                    site.accumulate(&k, &v, first + skipped..first + row.len)?;
                    site.position += row.len;
                }
            }
            Writer::Associative { a3, a3n } => {
                let written = associative(&self.a1, a3, a3n, &self.gain, &x, &h, &u)?;
                for row in rows.iter_mut().filter(|row| row.len > 0) {
                    let next = match &row.lookahead {
                        Some(u) => Some(a3.forward(u)?), // [1, R2]
                        None => None,
                    };
                    let first = row.start - span.start;
                    let site = row.window.site_mut(index)?;
                    written.write(
                        site,
                        first..first + row.len,
                        next,
                        self.skip_first && row.position == 0,
                    )?;
                    site.position += row.len;
                }
            }
        }
        Ok(())
    }
}

/// c [Ts, R2] with each token's row closed by its gate. a [Ts, R1] are the keys of the batch's tokens from `first` on; gated: tokens
/// of the batch with their gates; doubts `[T]` of the whole batch.
fn closed(
    a: &Tensor,
    c: &Tensor,
    first: usize,
    gated: &[(Range<usize>, &Gates, &SiteGate)],
    doubts: &mut [Doubt],
) -> Result<Tensor, Error> {
    let ((tokens, r1), (_, r2)) = (a.dims2()?, c.dims2()?);
    let rows: Vec<CoreRows<'_>> = gated
        .iter()
        .map(|(tokens, _, gate)| CoreRows {
            start: tokens.start - first,
            len: tokens.len(),
            core: CoreView::Dense(&gate.known),
            scale: 1.0,
        })
        .collect();
    let known = kernels::apply_cores(a, &rows, r1)?; // [Ts, R1]
    let keys = a.flatten_all()?.to_vec1::<f32>()?;
    let known = known.flatten_all()?.to_vec1::<f32>()?;
    let mut values = c.flatten_all()?.to_vec1::<f32>()?;
    for (tokens, gates, gate) in gated {
        let own = tokens.start - first..tokens.end - first;
        let key_rows = own.start * r1..own.end * r1;
        gate::close(
            gates,
            gate,
            &keys[key_rows.clone()],
            &known[key_rows],
            &mut values[own.start * r2..own.end * r2],
            &mut doubts[tokens.clone()],
        );
    }
    Ok(Tensor::from_vec(values, (tokens, r2), c.device())?)
}

/// Keys and values of the published form, with n = RMSNorm(h): (k = A2 n [T, R1], v = A3 n [T, R2]). h [T, D], gain `[D]`.
fn published(
    a2: &Linear,
    a3: &Linear,
    gain: &Tensor,
    h: &Tensor,
) -> Result<(Tensor, Tensor), Error> {
    let n = kernels::rms_norm(h, Some(gain), EPS)?; // [T, D]
    Ok((a2.forward(&n)?, a3.forward(&n)?))
}

/// What the tokens of a batch write in the associative form, as long as successors are not paired.
struct Associative {
    /// k = A1 x, [T, R1].
    keys: Tensor,
    /// A3n n, the part of a token's value that it brings itself, [T, R2].
    own: Tensor,
    /// A3 u, what a token brings to the value of the one before it, [T, R2].
    brought: Tensor,
    /// own of each row + brought of the row behind it, [T - 1, R2].
    values: Tensor,
}

/// k, v of the associative form. x [T, Din], h [T, D], u [T, D], gain `[D]`.
fn associative(
    a1: &Linear,
    a3: &Linear,
    a3n: &Linear,
    gain: &Tensor,
    x: &Tensor,
    h: &Tensor,
    u: &Tensor,
) -> Result<Associative, Error> {
    let keys = a1.forward(x)?; // [T, R1]
    let n = kernels::rms_norm(h, Some(gain), EPS)?; // [T, D]
    let own = a3n.forward(&n)?; // [T, R2]
    let brought = a3.forward(u)?; // [T, R2]
    let pairs = own.dim(0)? - 1;
    let values = kernels::add(&own.narrow(0, 0, pairs)?, &brought.narrow(0, 1, pairs)?)?; // [T - 1, R2]
    Ok(Associative {
        keys,
        own,
        brought,
        values,
    })
}

impl Associative {
    /// Writes the rows `range` (not empty) into one window, after the token that was pending there. `next`
    /// [1, R2] is what the token behind them brings; `skip`: the first of them writes nothing.
    fn write(
        &self,
        site: &mut SiteWindow,
        range: Range<usize>,
        next: Option<Tensor>,
        skip: bool,
    ) -> Result<(), Error> {
        if let Some(Pending { key, own }) = site.pending.take() {
            let value = kernels::add(&own, &self.brought.narrow(0, range.start, 1)?)?; // [1, R2]
            site.accumulate(&key, &value, 0..1)?;
        }
        let (first, last) = (range.start + usize::from(skip), range.end - 1);
        if first < last {
            let pairs = self.values.dim(0)?;
            site.accumulate(&self.keys.narrow(0, 0, pairs)?, &self.values, first..last)?;
        }
        if first <= last {
            // Copies: a pending token must not keep the whole batch in memory.
            let key = self.keys.narrow(0, last, 1)?.copy()?; // [1, R1]
            let own = self.own.narrow(0, last, 1)?.copy()?; // [1, R2]
            match next {
                Some(brought) => site.accumulate(&key, &kernels::add(&own, &brought)?, 0..1)?,
                None => site.pending = Some(Pending { key, own }),
            }
        }
        Ok(())
    }
}

fn check_rows(start: usize, len: usize, tokens: usize) -> Result<(), Error> {
    match start.checked_add(len) {
        Some(end) if end <= tokens => Ok(()),
        _ => Err(Error::Rows { start, len, tokens }),
    }
}

/// The smallest range that holds all of the ranges.
fn span(ranges: impl Iterator<Item = Range<usize>>) -> Option<Range<usize>> {
    ranges.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end))
}

#[cfg(test)]
mod tests;
