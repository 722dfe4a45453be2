//! A generator in training: the same formulas as [`crate::Site`], with gradients of every trained tensor.
//!
//! Takes what the frozen model shows at the sites and gives cores and deltas that candle's autograd can follow.
//! Holds no optimiser and no data. Start at [`Trainee::cores`], then [`Adapted`].

mod read_out;
#[cfg(test)]
mod tests;

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use crate::{
    BaseShape, Config, Generator, ReadOut, SiteId, Write,
    error::Error,
    site::{EPS, Writer},
};

/// Adds deltas to the linears of a model's forward: an attached generator's stand-in while one is in training.
pub trait Adapter {
    /// What to add to the output of a linear [T, Dout] for its input x [T, Din]; `rows`: each sequence of the batch
    /// that has tokens here, with its rows of x. `None` adds nothing.
    ///
    /// # Errors
    /// If the arithmetic fails.
    fn delta(
        &self,
        site: SiteId,
        x: &Tensor,
        rows: &[(usize, Range<usize>)],
    ) -> Result<Option<Tensor>, Error>;
}

/// The trained tensors of one site, f32.
#[derive(Clone, Debug)]
pub struct TraineeSite {
    /// Which linear.
    pub id: SiteId,
    /// [R1, Din]
    pub a1: Tensor,
    /// [R1, D], in the published form.
    pub a2: Option<Tensor>,
    /// [R2, D]
    pub a3: Tensor,
    /// [R2, D], in the associative form.
    pub a3n: Option<Tensor>,
    /// `[D]`
    pub gain: Tensor,
    /// [Dout, R2]
    pub b: Tensor,
    /// ln lambda `[1]`, with a ridge read-out.
    pub log_ridge: Option<Tensor>,
    /// ln of a factor on N `[1]`, folded into B when the generator is saved.
    pub log_amplitude: Tensor,
}

/// Names of a site's trained tensors.
pub const PARTS: [&str; 8] = [
    "A1",
    "A2",
    "A3",
    "A3n",
    "hidden_state_norm",
    "B",
    "log_ridge",
    "log_amplitude",
];

impl TraineeSite {
    /// The tensor of that name in [`PARTS`], if the form has it.
    pub fn part(&self, name: &str) -> Option<&Tensor> {
        match name {
            "A1" => Some(&self.a1),
            "A2" => self.a2.as_ref(),
            "A3" => Some(&self.a3),
            "A3n" => self.a3n.as_ref(),
            "hidden_state_norm" => Some(&self.gain),
            "B" => Some(&self.b),
            "log_ridge" => self.log_ridge.as_ref(),
            "log_amplitude" => Some(&self.log_amplitude),
            _ => None,
        }
    }

    /// The same site on other tensors: `of(name, tensor)` gives each.
    ///
    /// # Errors
    /// What `of` says.
    pub fn map<E>(
        &self,
        mut of: impl FnMut(&str, &Tensor) -> Result<Tensor, E>,
    ) -> Result<Self, E> {
        Ok(Self {
            id: self.id,
            a1: of("A1", &self.a1)?,
            a2: self.a2.as_ref().map(|t| of("A2", t)).transpose()?,
            a3: of("A3", &self.a3)?,
            a3n: self.a3n.as_ref().map(|t| of("A3n", t)).transpose()?,
            gain: of("hidden_state_norm", &self.gain)?,
            b: of("B", &self.b)?,
            log_ridge: self
                .log_ridge
                .as_ref()
                .map(|t| of("log_ridge", t))
                .transpose()?,
            log_amplitude: of("log_amplitude", &self.log_amplitude)?,
        })
    }

    /// Keys [T', R1] and values [T', R2] of the rows of a context pass, T' = T, or T - 1 where values take the next
    /// token's embedding. x [T, Din], h [T, D], u [T, D] normed embeddings.
    fn written(&self, x: &Tensor, h: &Tensor, u: &Tensor) -> Result<(Tensor, Tensor), Error> {
        let n = kernels::rms_norm(h, None, EPS)?; // [T, D]
        // The gain goes into the weights: [R2, D] products instead of [T, D].
        let gained = |w: &Tensor| -> Result<Tensor, Error> { Ok(w.broadcast_mul(&self.gain)?) };
        if let Some(a2) = &self.a2 {
            let k = kernels::linear_trained(&n, &gained(a2)?)?; // [T, R1]
            let v = kernels::linear_trained(&n, &gained(&self.a3)?)?; // [T, R2]
            return Ok((k, v));
        }
        let pairs = x.dim(0)?.saturating_sub(1);
        let k = kernels::linear_trained(&x.narrow(0, 0, pairs)?, &self.a1)?; // [T - 1, R1]
        let next = u.narrow(0, u.dim(0)? - pairs, pairs)?; // [T - 1, D]
        let mut v = kernels::linear_trained(&next, &self.a3)?; // [T - 1, R2]
        if let Some(a3n) = &self.a3n {
            let own = kernels::linear_trained(&n.narrow(0, 0, pairs)?, &gained(a3n)?)?; // [T - 1, R2]
            v = kernels::add(&own, &v)?;
        }
        Ok((k, v))
    }
}

/// What a context pass shows at one site: T tokens of some windows, one window after the other.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Input of the linear [T, Din].
    pub x: Tensor,
    /// Residual entering the layer [T, D].
    pub h: Tensor,
}

/// A generator in training.
#[derive(Clone, Debug)]
pub struct Trainee {
    config: Config,
    sites: Vec<TraineeSite>,
}

impl Trainee {
    /// The tensors of a loaded generator, in f32, amplitude 1.
    ///
    /// # Errors
    /// [`Error::Tensor`] if memory runs out.
    pub fn of(generator: &Generator) -> Result<Self, Error> {
        let site = |site: &crate::Site| -> Result<TraineeSite, Error> {
            let (a2, a3, a3n) = match &site.writer {
                Writer::Published { a2, a3 } => (Some(a2.dequantize()?), a3, None),
                Writer::Associative { a3, a3n } => (None, a3, Some(a3n.dequantize()?)),
            };
            let ridge = site
                .ridge
                .map(|lambda| Tensor::new(&[lambda.ln() as f32], &Device::Cpu));
            Ok(TraineeSite {
                id: site.id,
                a1: site.a1.dequantize()?,
                a2,
                a3: a3.dequantize()?,
                a3n,
                gain: site.gain.clone(),
                b: site.b.dequantize()?,
                log_ridge: ridge.transpose()?,
                log_amplitude: Tensor::zeros(1, DType::F32, &Device::Cpu)?,
            })
        };
        Ok(Self {
            config: generator.config().clone(),
            sites: generator
                .sites()
                .iter()
                .map(site)
                .collect::<Result<_, _>>()?,
        })
    }

    /// A generator of these tensors, held against config and base.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Tensors`], naming the tensor that does not fit.
    pub fn new(config: Config, sites: Vec<TraineeSite>, base: &BaseShape) -> Result<Self, Error> {
        for site in &sites {
            let ((out, input), hidden) = (base.linear(site.id.module), base.hidden);
            let (r1, r2) = (config.r1, config.r2);
            let published = config.write == Write::Published;
            let ridge = config.read_out == ReadOut::Ridge;
            for (name, want, called) in [
                ("A1", vec![r1, input], true),
                ("A2", vec![r1, hidden], published),
                ("A3", vec![r2, hidden], true),
                ("A3n", vec![r2, hidden], !published),
                ("hidden_state_norm", vec![hidden], true),
                ("B", vec![out, r2], true),
                ("log_ridge", vec![1], ridge),
                ("log_amplitude", vec![1], true),
            ] {
                let key = || format!("{} {name}", site.id);
                match (site.part(name), called) {
                    (Some(tensor), true) if tensor.dims() != want => {
                        return Err(Error::Shape {
                            key: key(),
                            want,
                            found: tensor.dims().to_vec(),
                        });
                    }
                    (None, true) => {
                        return Err(Error::Tensors {
                            missing: vec![key()],
                            foreign: vec![],
                        });
                    }
                    (Some(_), false) => {
                        return Err(Error::Tensors {
                            missing: vec![],
                            foreign: vec![key()],
                        });
                    }
                    (Some(_), true) | (None, false) => {}
                }
            }
        }
        Ok(Self { config, sites })
    }

    /// The parsed adapter_config.json.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Its sites, in order.
    pub fn sites(&self) -> &[TraineeSite] {
        &self.sites
    }

    /// The same generator on other tensors: `of(site, name, tensor)` gives each.
    ///
    /// # Errors
    /// What `of` says.
    pub fn map<E>(
        &self,
        mut of: impl FnMut(SiteId, &str, &Tensor) -> Result<Tensor, E>,
    ) -> Result<Self, E> {
        let sites = self
            .sites
            .iter()
            .map(|site| site.map(|name, tensor| of(site.id, name, tensor)))
            .collect::<Result<_, E>>()?;
        Ok(Self {
            config: self.config.clone(),
            sites,
        })
    }

    /// The same numbers, followed by no gradient.
    pub fn detached(&self) -> Self {
        let detached = self.map(|_, _, tensor| Ok::<_, std::convert::Infallible>(tensor.detach()));
        match detached {
            Ok(detached) => detached,
            Err(never) => match never {},
        }
    }

    /// Number of trained values.
    pub fn parameters(&self) -> usize {
        let of = |site: &TraineeSite| -> usize {
            let parts = PARTS.iter().filter_map(|name| site.part(name));
            parts.map(Tensor::elem_count).sum()
        };
        self.sites.iter().map(of).sum()
    }

    /// Cores [J, R1, R2] of each site, one for each of J groups of windows whose sums are added. `seen`: what each
    /// site saw of T tokens; u [T, D] their normed embeddings; `windows`: the rows of each window;
    /// `groups`: the windows of each group. A window may be in many groups. A group that nothing has written into
    /// has a core of zeros.
    ///
    /// # Errors
    /// [`Error::Foreign`] for other sites or windows that do not exist; what a read-out says of sums that it cannot read.
    pub fn cores(
        &self,
        seen: &[Seen],
        u: &Tensor,
        windows: &[Range<usize>],
        groups: &[Vec<usize>],
    ) -> Result<Vec<Tensor>, Error> {
        let tokens = u.dim(0)?;
        if seen.len() != self.sites.len() {
            return Err(Error::Foreign {
                detail: format!("{} sites were seen, not {}", seen.len(), self.sites.len()),
            });
        }
        let skip = usize::from(self.config.skip_first);
        let last = usize::from(self.config.write == Write::Associative);
        let written = |window: &usize| -> Result<Option<Range<usize>>, Error> {
            let rows = windows.get(*window).filter(|rows| rows.end <= tokens);
            let rows = rows.ok_or_else(|| Error::Foreign {
                detail: format!("{} windows, none with index {window}", windows.len()),
            })?;
            let rows = rows.start + skip..rows.end.saturating_sub(last);
            Ok((!rows.is_empty()).then_some(rows))
        };
        let groups: Vec<Vec<Range<usize>>> = groups
            .iter()
            .map(|group| {
                group
                    .iter()
                    .filter_map(|w| written(w).transpose())
                    .collect()
            })
            .collect::<Result<_, _>>()?;
        let scale = self.config.alpha / self.config.r2 as f64;
        let mut cores = Vec::with_capacity(self.sites.len());
        for (site, seen) in self.sites.iter().zip(seen) {
            let (k, v) = site.written(&seen.x, &seen.h, u)?; // [T', R1], [T', R2]
            let s = kernels::outer_sums(&k, &v, &groups)?; // [J, R1, R2]
            let n = match (self.config.read_out, &site.log_ridge) {
                (ReadOut::Ridge, Some(log_ridge)) => {
                    let g = kernels::gram_sums(&k, &groups)?; // [J, R1, R1]
                    read_out::ridge(site.id, &home(&s)?, &home(&g)?, &home(log_ridge)?)?
                }
                (kind, _) => read_out::normalised(kind, site.id, self.config.max_rank, &home(&s)?)?,
            }; // [J, R1, R2]
            let n = n.to_device(s.device())?.to_dtype(s.dtype())?; // [J, R1, R2]
            let amplitude = site.log_amplitude.exp()?.reshape((1, 1, 1))?;
            let amplitude = (amplitude * scale)?.to_dtype(s.dtype())?;
            cores.push(n.broadcast_mul(&amplitude)?); // [J, R1, R2]
        }
        Ok(cores)
    }
}

/// The numbers as read-outs take them, f32 in host memory. Differentiable.
fn home(x: &Tensor) -> Result<Tensor, Error> {
    Ok(x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?)
}

/// A generator in training together with the cores that sequences run with.
#[derive(Debug)]
pub struct Adapted<'a> {
    trainee: &'a Trainee,
    /// [J, R1, R2] of each site.
    cores: &'a [Tensor],
    /// The core of each sequence of the batch.
    of_row: &'a [Option<usize>],
}

impl<'a> Adapted<'a> {
    /// `cores`: as [`Trainee::cores`] gives them; `of_row`: which of the J cores each sequence runs with.
    pub fn new(trainee: &'a Trainee, cores: &'a [Tensor], of_row: &'a [Option<usize>]) -> Self {
        Self {
            trainee,
            cores,
            of_row,
        }
    }
}

impl Adapter for Adapted<'_> {
    fn delta(
        &self,
        id: SiteId,
        x: &Tensor,
        rows: &[(usize, Range<usize>)],
    ) -> Result<Option<Tensor>, Error> {
        let sites = &self.trainee.sites;
        let Ok(index) = sites.binary_search_by_key(&id, |site| site.id) else {
            return Ok(None);
        };
        let (site, cores) = (&sites[index], self.cores.get(index));
        let cores = cores.ok_or_else(|| Error::Foreign {
            detail: format!("no cores at {id}"),
        })?; // [J, R1, R2]
        let mut groups = vec![Vec::new(); cores.dim(0)?];
        for (row, span) in rows {
            if let Some(core) = self.of_row.get(*row).copied().flatten() {
                let group: &mut Vec<_> = groups.get_mut(core).ok_or_else(|| Error::Foreign {
                    detail: format!("no core with index {core}"),
                })?;
                group.push(span.clone());
            }
        }
        if groups.iter().all(Vec::is_empty) {
            return Ok(None);
        }
        let a = kernels::linear_trained(x, &site.a1)?; // [T, R1]
        let c = kernels::apply_trained_cores(&a, cores, &groups)?; // [T, R2]
        Ok(Some(kernels::linear_trained(&c, &site.b)?)) // [T, Dout]
    }
}
