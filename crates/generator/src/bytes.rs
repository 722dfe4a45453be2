//! Cores, states and traces as bytes: little-endian, every count and shape in front of its values, bit for bit.
//!
//! What is read is bounded by what is there: no count is believed before so many bytes have been found. Whether it belongs to a
//! generator is asked afterwards. Start at [`Core::write`].

use std::sync::Arc;

use candle_core::{Device, Tensor};
use half::bf16;
use kernels::Linear;

use crate::{
    config::ReadOut,
    cores::{Core, SiteCore},
    error::Error,
    generator::Generator,
    state::{State, Sums},
    trace::{Rows, Trace},
};

/// The most sites that are read: far more than a model has linears.
const MOST_SITES: usize = 1 << 16;

impl Core {
    /// Appends the core to `out`, without gates if it has any: they follow from the state.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a tensor cannot be read.
    pub fn write(&self, out: &mut Vec<u8>) -> Result<(), Error> {
        put(out, self.sites.len());
        for site in self.sites.iter() {
            match site {
                SiteCore::Zero => out.push(0),
                SiteCore::Dense(n) => {
                    out.push(1);
                    put_matrix(out, n)?;
                }
                SiteCore::LowRank { u, v } => {
                    out.push(2);
                    put_matrix(out, u)?;
                    put_matrix(out, v)?;
                }
                SiteCore::Rounded(n) => {
                    out.push(3);
                    put(out, n.out_features());
                    put(out, n.in_features());
                    let bytes = n
                        .rounded_bytes()
                        .ok_or_else(|| broken("a core of another format"))?;
                    put(out, bytes.len());
                    out.extend_from_slice(bytes);
                }
            }
        }
        Ok(())
    }

    /// Reads what [`Core::write`] has written and leaves what comes behind it in `bytes`.
    ///
    /// # Errors
    /// [`Error::Bytes`] for what is not a core.
    pub fn read(bytes: &mut &[u8]) -> Result<Self, Error> {
        let sites = (0..take_count(bytes, MOST_SITES)?).map(|_| match take::<1>(bytes)? {
            [0] => Ok(SiteCore::Zero),
            [1] => Ok(SiteCore::Dense(take_matrix(bytes)?)),
            [2] => Ok(SiteCore::LowRank {
                u: take_matrix(bytes)?,
                v: take_matrix(bytes)?,
            }),
            [3] => {
                let (r2, r1) = (take_number(bytes)?, take_number(bytes)?);
                let count = take_number(bytes)?;
                let raw = take_slice(bytes, count, 1)?;
                Ok(SiteCore::Rounded(Linear::of_rounded_bytes(raw, r2, r1)?))
            }
            [_] => Err(broken("a site's core of no known form")),
        });
        Ok(Self::of(sites.collect::<Result<Vec<_>, Error>>()?))
    }
}

impl State {
    /// Appends the state to `out`.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a tensor cannot be read, [`Error::Foreign`] for a state some of which a machine holds.
    pub fn write(&self, out: &mut Vec<u8>) -> Result<(), Error> {
        self.check_here()?;
        let (sites, writes) = self.all();
        out.extend_from_slice(&writes.to_le_bytes());
        put(out, sites.len());
        for sums in sites {
            let (s, g, mass) = sums.parts();
            out.push(u8::from(g.is_some()) | u8::from(mass.is_some()) << 1);
            put_matrix(out, s)?;
            if let Some(g) = g {
                put_matrix(out, g)?;
            }
            if let Some(mass) = mass {
                out.extend_from_slice(&mass.to_le_bytes());
            }
        }
        Ok(())
    }

    /// Reads what [`State::write`] has written and leaves what comes behind it in `bytes`.
    ///
    /// # Errors
    /// [`Error::Bytes`] for what is not a state.
    pub fn read(bytes: &mut &[u8]) -> Result<Self, Error> {
        let writes = u64::from_le_bytes(take(bytes)?);
        let count = take_count(bytes, MOST_SITES)?;
        let mut sites = Vec::new();
        for _ in 0..count {
            let [has] = take(bytes)?;
            if has > 3 {
                return Err(broken("a site's sums of no known form"));
            }
            let s = take_matrix(bytes)?; // [R1, R2]
            let g = (has & 1 != 0).then(|| take_matrix(bytes)).transpose()?; // [R1, R1]
            let mass = (has & 2 != 0)
                .then(|| take(bytes))
                .transpose()?
                .map(f64::from_le_bytes);
            sites.push(Sums::of_parts(s, g, mass));
        }
        Ok(Self::from_sums(sites, writes))
    }
}

impl Trace {
    /// Appends the trace to `out`.
    pub fn write(&self, out: &mut Vec<u8>) {
        let (sites, tokens, length, skip_first) = self.parts();
        put(out, length);
        out.push(u8::from(skip_first));
        put(out, tokens.len());
        for &token in tokens {
            put(out, token);
        }
        put(out, sites.len());
        for rows in sites {
            for values in [&rows.k, &rows.v] {
                put(out, values.len());
                out.reserve(values.len() * size_of::<bf16>());
                out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
        }
    }

    /// Reads what [`Trace::write`] has written and leaves what comes behind it in `bytes`.
    ///
    /// # Errors
    /// [`Error::Bytes`] for what is not a trace.
    pub fn read(bytes: &mut &[u8]) -> Result<Self, Error> {
        let length = take_number(bytes)?;
        let [skip_first] = take(bytes)?;
        let count = take_number(bytes)?;
        let raw = take_slice(bytes, count, size_of::<u64>())?;
        let tokens = raw
            .chunks_exact(size_of::<u64>())
            .map(|mut token| take_number(&mut token));
        let tokens: Vec<usize> = tokens.collect::<Result<_, Error>>()?;
        let ascends = tokens.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascends || tokens.last().is_some_and(|&last| last >= length) || skip_first > 1 {
            return Err(broken("tokens of a trace that are out of order"));
        }
        let count = take_count(bytes, MOST_SITES)?;
        let mut sites = Vec::new();
        for _ in 0..count {
            let mut values = || -> Result<Vec<bf16>, Error> {
                let count = take_number(bytes)?;
                let raw = take_slice(bytes, count, size_of::<bf16>())?;
                let value = |pair: &[u8]| bf16::from_le_bytes([pair[0], pair[1]]);
                Ok(raw.chunks_exact(size_of::<bf16>()).map(value).collect())
            };
            let (k, v) = (values()?, values()?);
            sites.push(Rows { k, v });
        }
        Ok(Self::of_parts(sites, tokens, length, skip_first == 1))
    }
}

impl Generator {
    /// Whether a core is of this generator's form.
    ///
    /// # Errors
    /// [`Error::Foreign`] says what differs.
    pub fn check_core(&self, core: &Core) -> Result<(), Error> {
        let shapes = |core: &SiteCore| -> Result<_, Error> {
            Ok(match core {
                SiteCore::Zero => None,
                SiteCore::Dense(n) => Some(n.dims2()?),
                SiteCore::Rounded(n) => Some((n.in_features(), n.out_features())),
                SiteCore::LowRank { u, v } => {
                    let ((r1, q), (r2, same)) = (u.dims2()?, v.dims2()?);
                    Some((r1, if q == same { r2 } else { usize::MAX }))
                }
            })
        };
        same_count("a core", core.sites.len(), self.sites().len())?;
        for (core, site) in core.sites.iter().zip(self.sites()) {
            let (r1, r2, _) = site.ranks();
            if let Some(found) = shapes(core)?.filter(|found| *found != (r1, r2)) {
                return Err(Error::Foreign {
                    detail: format!(
                        "a core of shape {found:?} at {}, not {:?}",
                        site.id(),
                        (r1, r2)
                    ),
                });
            }
        }
        Ok(())
    }

    /// Whether a state is of this generator's form.
    ///
    /// # Errors
    /// [`Error::Foreign`] says what differs.
    pub fn check_state(&self, state: &State) -> Result<(), Error> {
        let (sites, _) = state.all();
        same_count("a state", sites.len(), self.sites().len())?;
        let mine = self.new_state()?;
        for ((theirs, mine), site) in sites.iter().zip(mine.all().0).zip(self.sites()) {
            let (s, g, _) = theirs.parts();
            let square = g.is_none_or(|g| s.dims2().is_ok_and(|(r1, _)| g.dims() == [r1, r1]));
            if theirs.keeps()? != mine.keeps()? || !square {
                return Err(Error::Foreign {
                    detail: format!("sums of another form at {}", site.id()),
                });
            }
        }
        Ok(())
    }

    /// Whether a trace is of this generator's form.
    ///
    /// # Errors
    /// [`Error::Foreign`] says what differs.
    pub fn check_trace(&self, trace: &Trace) -> Result<(), Error> {
        let (sites, tokens, _, skip_first) = trace.parts();
        same_count("a trace", sites.len(), self.sites().len())?;
        let fits = sites.iter().zip(self.sites()).all(|(rows, site)| {
            let (r1, r2, _) = site.ranks();
            let rows = (rows.k.len(), rows.v.len());
            (tokens.len().checked_mul(r1), tokens.len().checked_mul(r2))
                == (Some(rows.0), Some(rows.1))
        });
        if fits && skip_first == self.config().skip_first {
            return Ok(());
        }
        Err(Error::Foreign {
            detail: "a trace whose rows are of another form".to_owned(),
        })
    }

    /// The most bytes that a core of this generator takes.
    pub fn core_bytes(&self) -> usize {
        let bytes = self.sites().iter().map(|site| {
            let (r1, r2, rank) = site.ranks();
            let dense = rank * (r1 + r2) >= r1 * r2 && self.config().read_out != ReadOut::Svd;
            match Linear::rounded_size(r2, r1).filter(|_| dense && site.rounds()) {
                Some(bytes) => bytes,
                None => (rank * (r1 + r2)).min(r1 * r2) * size_of::<f32>(),
            }
        });
        bytes.sum()
    }

    /// Bytes that a token takes in a trace, if it writes.
    pub fn trace_bytes(&self) -> usize {
        let values = self.sites().iter().map(|site| {
            let (r1, r2, _) = site.ranks();
            r1 + r2
        });
        values.sum::<usize>() * size_of::<bf16>() + size_of::<usize>()
    }
}

fn same_count(what: &str, found: usize, want: usize) -> Result<(), Error> {
    if found == want {
        return Ok(());
    }
    Err(Error::Foreign {
        detail: format!("{what} of {found} sites, not {want}"),
    })
}

fn broken(detail: &'static str) -> Error {
    Error::Bytes { detail }
}

fn put(out: &mut Vec<u8>, number: usize) {
    out.extend_from_slice(&(number as u64).to_le_bytes());
}

/// m [rows, columns]
fn put_matrix(out: &mut Vec<u8>, m: &Tensor) -> Result<(), Error> {
    let (rows, columns) = m.dims2()?;
    put(out, rows);
    put(out, columns);
    let values = m.flatten_all()?.to_vec1::<f32>()?;
    out.reserve(values.len() * size_of::<f32>());
    out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    Ok(())
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], Error> {
    let (head, rest) = bytes
        .split_first_chunk::<N>()
        .ok_or_else(|| broken("it ends too early"))?;
    *bytes = rest;
    Ok(*head)
}

fn take_number(bytes: &mut &[u8]) -> Result<usize, Error> {
    usize::try_from(u64::from_le_bytes(take(bytes)?)).map_err(|_| broken("a count beyond memory"))
}

fn take_count(bytes: &mut &[u8], most: usize) -> Result<usize, Error> {
    let count = take_number(bytes)?;
    if count > most {
        return Err(broken("a count out of range"));
    }
    Ok(count)
}

/// So many values of so many bytes each.
fn take_slice<'a>(bytes: &mut &'a [u8], count: usize, size: usize) -> Result<&'a [u8], Error> {
    let length = count.checked_mul(size);
    let (head, rest) = length
        .and_then(|length| bytes.split_at_checked(length))
        .ok_or_else(|| broken("it ends too early"))?;
    *bytes = rest;
    Ok(head)
}

/// [rows, columns]
fn take_matrix(bytes: &mut &[u8]) -> Result<Tensor, Error> {
    let (rows, columns) = (take_number(bytes)?, take_number(bytes)?);
    let count = rows
        .checked_mul(columns)
        .ok_or_else(|| broken("a matrix beyond memory"))?;
    let raw = take_slice(bytes, count, size_of::<f32>())?;
    let value = |four: &[u8]| f32::from_le_bytes([four[0], four[1], four[2], four[3]]);
    let values: Vec<f32> = raw.chunks_exact(size_of::<f32>()).map(value).collect();
    Ok(Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)
}

impl Core {
    /// Writes zeros over what it holds, if nobody else holds it. Says whether it did.
    pub fn scrub(&mut self) -> bool {
        let Some(sites) = Arc::get_mut(&mut self.sites) else {
            return false;
        };
        let mut done = true;
        if let Some(gates) = &mut self.gates {
            done = Arc::get_mut(gates).is_some_and(|gates| gates.scrub());
        }
        for site in sites {
            let tensors = match site {
                SiteCore::Zero => vec![],
                SiteCore::Rounded(n) => {
                    done &= n.scrub();
                    vec![]
                }
                SiteCore::Dense(n) => vec![&*n],
                SiteCore::LowRank { u, v } => vec![&*u, &*v],
            };
            for tensor in tensors {
                done &= tensor.zero_set().is_ok();
            }
        }
        done
    }
}

#[cfg(test)]
mod tests;
