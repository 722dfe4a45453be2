//! Sums of an open window, and the state that closed windows are folded into.
//!
//! Both are values: `try_clone` gives an independent one at once (the sums are shared until one of the two
//! changes), and nothing is ever subtracted, as (a + b) - b is not a in f32: forgetting refolds.
//! Start at [`State::add_window`].

mod elsewhere;
mod gathered;

use std::{ops::Range, sync::Arc};

use candle_core::{CpuStorage, DType, Device, InplaceOp2, Layout, Tensor};
use kernels::Floats;
use rayon::prelude::*;

pub use self::elsewhere::{Elsewhere, PlainSums};
use self::gathered::Gathered;
use crate::{error::Error, site::Site, trace::Rows};

/// S [R1, R2] and, for a ridge read-out, G [R1, R1] of one site, f32.
#[derive(Debug)]
pub(crate) struct Sums {
    s: Tensor,
    g: Option<Tensor>,
    /// Σ ||k_t|| ||v_t|| where the read-out asks for it: what the rounding of S is measured with.
    mass: Option<f64>,
}

/// Which sums a generator keeps of a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Keeps {
    pub(crate) r1: usize,
    pub(crate) r2: usize,
    /// G, for a ridge read-out.
    pub(crate) gram: bool,
    /// The mass, for an svd read-out.
    pub(crate) mass: bool,
}

impl Sums {
    pub(crate) fn new(keeps: Keeps) -> Result<Self, Error> {
        let Keeps { r1, r2, gram, mass } = keeps;
        let zeros = |columns| Tensor::zeros((r1, columns), DType::F32, &Device::Cpu);
        let g = if gram { Some(zeros(r1)?) } else { None };
        Ok(Self {
            s: zeros(r2)?,
            g,
            mass: mass.then_some(0.0),
        })
    }

    fn copy(&self) -> Result<Self, Error> {
        let g = match &self.g {
            Some(g) => Some(g.copy()?),
            None => None,
        };
        Ok(Self {
            s: self.s.copy()?,
            g,
            mass: self.mass,
        })
    }

    /// (S [R1, R2], G [R1, R1], mass)
    pub(crate) fn parts(&self) -> (&Tensor, Option<&Tensor>, Option<f64>) {
        (&self.s, self.g.as_ref(), self.mass)
    }

    pub(crate) fn of_parts(s: Tensor, g: Option<Tensor>, mass: Option<f64>) -> Self {
        Self { s, g, mass }
    }

    pub(crate) fn keeps(&self) -> Result<Keeps, Error> {
        let (r1, r2) = self.s.dims2()?;
        Ok(Keeps {
            r1,
            r2,
            gram: self.g.is_some(),
            mass: self.mass.is_some(),
        })
    }

    /// self += weight * other, in place.
    fn add(&mut self, other: &Self, weight: f32) -> Result<(), Error> {
        self.s.inplace_op2(&other.s, &AddScaled(weight))?;
        if let (Some(g), Some(theirs)) = (&self.g, &other.g) {
            g.inplace_op2(theirs, &AddScaled(weight))?;
        }
        if let (Some(mass), Some(theirs)) = (&mut self.mass, other.mass) {
            *mass += f64::from(weight).abs() * theirs;
        }
        Ok(())
    }

    /// self + weight * other, in memory of its own.
    fn plus(&self, other: &Self, weight: f32) -> Result<Self, Error> {
        let g = match (&self.g, &other.g) {
            (Some(g), Some(theirs)) => Some(sum_of(g, theirs, weight)?),
            _ => None,
        };
        let mass = self.mass.zip(other.mass);
        Ok(Self {
            s: sum_of(&self.s, &other.s, weight)?,
            g,
            mass: mass.map(|(mine, theirs)| mine + f64::from(weight).abs() * theirs),
        })
    }

    /// S += k_tᵀ v_t, G += k_tᵀ k_t for the rows t of `range`, in order. k [T, R1], v [T, R2].
    pub(crate) fn accumulate(
        &mut self,
        k: &Tensor,
        v: &Tensor,
        range: Range<usize>,
    ) -> Result<(), Error> {
        let mut sums = vec![(&self.s, v)];
        sums.extend(self.g.as_ref().map(|g| (g, k)));
        kernels::accumulate_outer(&sums, k, range.clone())?;
        if let Some(mass) = &mut self.mass {
            let norms = |rows: &Tensor| -> Result<Vec<f64>, Error> {
                let rows = rows.narrow(0, range.start, range.len())?; // [Tr, R]
                let width = rows.dim(1)?;
                let values = rows.flatten_all()?.to_vec1::<f32>()?;
                let norm = |row: &[f32]| {
                    row.iter()
                        .map(|x| f64::from(*x).powi(2))
                        .sum::<f64>()
                        .sqrt()
                };
                Ok(values.chunks_exact(width).map(norm).collect())
            };
            for (k, v) in norms(k)?.into_iter().zip(norms(v)?) {
                *mass += k * v;
            }
        }
        Ok(())
    }

    fn bytes(&self) -> usize {
        let g = self.g.as_ref().map_or(0, Tensor::elem_count);
        (self.s.elem_count() + g) * size_of::<f32>() + size_of::<f64>()
    }
}

/// a + w b of one shape, element by element, with the bits of [`AddScaled`].
fn sum_of(a: &Tensor, b: &Tensor, w: f32) -> Result<Tensor, Error> {
    let sum = {
        let (a, b) = (Floats::of(a)?, Floats::of(b)?);
        a.iter().zip(b.iter()).map(|(a, b)| a + w * b).collect()
    };
    Ok(Tensor::from_vec::<_, f32>(sum, a.shape(), &Device::Cpu)?)
}

/// a += w b, element by element.
struct AddScaled(f32);

impl InplaceOp2 for AddScaled {
    fn name(&self) -> &'static str {
        "add-scaled"
    }

    fn cpu_fwd(
        &self,
        a: &mut CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> candle_core::Result<()> {
        let (CpuStorage::F32(a), CpuStorage::F32(b)) = (a, b) else {
            candle_core::bail!("sums are f32")
        };
        let (Some((a0, a1)), Some((b0, b1))) = (la.contiguous_offsets(), lb.contiguous_offsets())
        else {
            candle_core::bail!("sums are contiguous")
        };
        for (a, b) in a[a0..a1].iter_mut().zip(&b[b0..b1]) {
            *a += self.0 * b;
        }
        Ok(())
    }
}

/// A token of the associative form whose successor has not come.
#[derive(Clone, Debug)]
pub(crate) struct Pending {
    /// [1, R1]
    pub(crate) key: Tensor,
    /// A3n n, [1, R2]
    pub(crate) own: Tensor,
}

/// One site's part of an open window.
#[derive(Debug)]
pub(crate) struct SiteWindow {
    sums: Sums,
    /// What was written and is not in the sums yet, in a window that gathers.
    gathered: Option<Gathered>,
    pub(crate) pending: Option<Pending>,
    /// Tokens that have passed.
    pub(crate) position: usize,
    /// Tokens that have written.
    writes: u64,
    /// What they wrote, row by row, if that is kept.
    pub(crate) rows: Option<Rows>,
}

impl SiteWindow {
    /// S += k_tᵀ v_t, G += k_tᵀ k_t for the rows t of `range`, in order. k [T, R1], v [T, R2].
    pub(crate) fn accumulate(
        &mut self,
        k: &Tensor,
        v: &Tensor,
        range: Range<usize>,
    ) -> Result<(), Error> {
        if range.is_empty() {
            return Ok(());
        }
        let gathers = match &mut self.gathered {
            Some(gathered) => gathered.push(k, v, range.clone())?,
            None => false,
        };
        if !gathers {
            self.settle()?;
            self.sums.accumulate(k, v, range.clone())?;
        }
        if let Some(rows) = &mut self.rows {
            rows.push(k, v, range.clone())?;
        }
        self.writes += range.len() as u64;
        Ok(())
    }

    /// Brings what is gathered into the sums.
    fn settle(&mut self) -> Result<(), Error> {
        match &mut self.gathered {
            Some(gathered) => gathered.settle(&mut self.sums),
            None => Ok(()),
        }
    }

    /// An error if the sums are not of that site's form.
    pub(crate) fn check(&self, site: &Site) -> Result<(), Error> {
        let (r1, r2, _) = site.ranks();
        let (mine, theirs) = self.sums.s.dims2()?;
        if (mine, theirs) == (r1, r2) {
            return Ok(());
        }
        Err(Error::Foreign {
            detail: format!(
                "its sums are {mine} x {theirs}, those of {} {r1} x {r2}",
                site.id()
            ),
        })
    }
}

/// Sums of one open window, of all sites.
#[derive(Debug)]
pub struct Window {
    sites: Arc<Vec<SiteWindow>>,
    /// Names what a machine with memory of its own holds of it.
    elsewhere: Option<Arc<u64>>,
}

impl Window {
    pub(crate) fn new(keeps: impl Iterator<Item = Keeps>, traced: bool) -> Result<Self, Error> {
        let site = |keeps| {
            Ok(SiteWindow {
                sums: Sums::new(keeps)?,
                gathered: None,
                pending: None,
                position: 0,
                writes: 0,
                rows: traced.then(Rows::default),
            })
        };
        Ok(Self {
            sites: Arc::new(keeps.map(site).collect::<Result<_, Error>>()?),
            elsewhere: None,
        })
    }

    /// An independent window of the same values. Costs nothing until one of the two is written into.
    ///
    /// # Errors
    /// None today; a device that copies at once could run out of memory.
    pub fn try_clone(&self) -> Result<Self, Error> {
        Ok(Self {
            sites: Arc::clone(&self.sites),
            elsewhere: self.elsewhere.clone(),
        })
    }

    /// The same window, gathering what few tokens write until there is more of it, as the sums are large beside it. The bits of the sums
    /// do not change; they are whole once it is [settled](Self::settle).
    #[must_use]
    pub fn gathering(mut self) -> Self {
        if let Some(sites) = Arc::get_mut(&mut self.sites) {
            for site in sites {
                site.gathered = Some(Gathered::default());
            }
        }
        self
    }

    /// Brings what is gathered into the sums.
    ///
    /// # Errors
    /// As [`Window::try_clone`].
    pub fn settle(&mut self) -> Result<(), Error> {
        let gathered =
            |site: &SiteWindow| site.gathered.as_ref().is_some_and(|all| !all.is_empty());
        if self.sites.iter().any(gathered) {
            for index in 0..self.sites.len() {
                self.site_mut(index)?.settle()?;
            }
        }
        Ok(())
    }

    /// Tokens that have passed through it.
    pub fn tokens(&self) -> usize {
        self.sites.first().map_or(0, |site| site.position)
    }

    /// Bytes of its sums, in f32.
    pub fn bytes(&self) -> usize {
        self.sites.iter().map(|site| site.sums.bytes()).sum()
    }

    /// S [R1, R2] of a site, and G [R1, R1] where the read-out asks for it; of a window that gathers once it is settled.
    pub fn sums(&self, site: usize) -> Option<(&Tensor, Option<&Tensor>)> {
        self.sites
            .get(site)
            .map(|site| (&site.sums.s, site.sums.g.as_ref()))
    }

    /// Tokens that have written.
    pub(crate) fn writes(&self) -> usize {
        self.sites.first().map_or(0, |site| site.writes as usize)
    }

    /// Its sites' parts, in order.
    pub(crate) fn sites(&self) -> &[SiteWindow] {
        &self.sites
    }

    pub(crate) fn site(&self, index: usize) -> Result<&SiteWindow, Error> {
        self.sites
            .get(index)
            .ok_or_else(|| foreign_site(index, self.sites.len()))
    }

    /// The site's part, for writing: copies the sums first if a clone shares them.
    pub(crate) fn site_mut(&mut self, index: usize) -> Result<&mut SiteWindow, Error> {
        let count = self.sites.len();
        if Arc::get_mut(&mut self.sites).is_none() {
            let copy = |site: &SiteWindow| {
                let SiteWindow {
                    sums,
                    gathered,
                    pending,
                    position,
                    writes,
                    rows,
                } = site;
                Ok(SiteWindow {
                    sums: sums.copy()?,
                    gathered: gathered.clone(),
                    pending: pending.clone(),
                    position: *position,
                    writes: *writes,
                    rows: rows.clone(),
                })
            };
            self.sites = Arc::new(self.sites.iter().map(copy).collect::<Result<_, Error>>()?);
        }
        let sites =
            Arc::get_mut(&mut self.sites).expect("the sums were just made this window's own");
        sites
            .get_mut(index)
            .ok_or_else(|| foreign_site(index, count))
    }
}

/// Sums of closed windows, of all sites: S, G where the read-out asks for it, and what it takes to judge them.
#[derive(Debug)]
pub struct State {
    sites: Arc<Vec<Sums>>,
    /// Tokens that have written, whatever their weight.
    writes: u64,
    /// Sums that a machine holds, in the order in which they are added to these.
    elsewhere: Vec<Elsewhere>,
}

impl State {
    pub(crate) fn new(keeps: impl Iterator<Item = Keeps>) -> Result<Self, Error> {
        Ok(Self {
            sites: Arc::new(keeps.map(Sums::new).collect::<Result<_, Error>>()?),
            writes: 0,
            elsewhere: Vec::new(),
        })
    }

    /// self += weight * the sums of a window. A pending token of the window is dropped: it has no successor.
    ///
    /// # Errors
    /// [`Error::Foreign`] if the two are not of one generator, [`Error::Weight`] for a weight that is not finite;
    /// the state is as it was.
    pub fn add_window(&mut self, window: &Window, weight: f32) -> Result<(), Error> {
        let mut settled = window.try_clone()?;
        settled.settle()?;
        let window = &settled;
        let sums: Vec<_> = window.sites.iter().map(|site| &site.sums).collect();
        let writes = window
            .sites
            .iter()
            .map(|site| site.writes)
            .max()
            .unwrap_or(0);
        let Some(name) = &window.elsewhere else {
            return self.fold(&sums, None, writes, weight);
        };
        self.fold(&sums, None, 0, weight)?;
        self.add_elsewhere(&[Elsewhere::new(name, writes)], weight);
        Ok(())
    }

    /// self += weight * other: composes what two documents or sessions have said.
    ///
    /// # Errors
    /// As [`State::add_window`].
    pub fn add(&mut self, other: &Self, weight: f32) -> Result<(), Error> {
        let sums: Vec<_> = other.sites.iter().collect();
        self.fold(&sums, Some(&other.sites), other.writes, weight)?;
        self.add_elsewhere(&other.elsewhere, weight);
        Ok(())
    }

    /// An independent state of the same values. Costs nothing until one of the two changes.
    ///
    /// # Errors
    /// None today; a device that copies at once could run out of memory.
    pub fn try_clone(&self) -> Result<Self, Error> {
        Ok(Self {
            sites: Arc::clone(&self.sites),
            writes: self.writes,
            elsewhere: self.elsewhere.clone(),
        })
    }

    /// Bytes of its sums, in f32.
    pub fn bytes(&self) -> usize {
        self.sites.iter().map(Sums::bytes).sum()
    }

    /// Whether no token has written: the state of the bare model.
    pub fn is_empty(&self) -> bool {
        self.writes == 0 && self.elsewhere.is_empty()
    }

    /// S [R1, R2] of a site, and G [R1, R1] where the read-out asks for it; without what a machine holds.
    pub fn sums(&self, site: usize) -> Option<(&Tensor, Option<&Tensor>)> {
        self.sites.get(site).map(|sums| (&sums.s, sums.g.as_ref()))
    }

    /// Its sites' sums, and how many tokens have written.
    pub(crate) fn all(&self) -> (&[Sums], u64) {
        (&self.sites, self.writes)
    }

    /// Number of sites.
    pub(crate) fn len(&self) -> usize {
        self.sites.len()
    }

    /// (S [R1, R2], G [R1, R1], mass) of a site.
    pub(crate) fn parts(&self, site: usize) -> Result<(&Tensor, Option<&Tensor>, f64), Error> {
        let sums = self
            .sites
            .get(site)
            .ok_or_else(|| foreign_site(site, self.sites.len()))?;
        Ok((&sums.s, sums.g.as_ref(), sums.mass.unwrap_or(0.0)))
    }

    /// self += weight * other. `whole`: what holds all of `other`, if a state does.
    fn fold(
        &mut self,
        other: &[&Sums],
        whole: Option<&Arc<Vec<Sums>>>,
        writes: u64,
        weight: f32,
    ) -> Result<(), Error> {
        if !weight.is_finite() {
            return Err(Error::Weight { weight });
        }
        if self.sites.len() != other.len() {
            return Err(Error::Foreign {
                detail: format!("{} sites, not {}", other.len(), self.sites.len()),
            });
        }
        for (mine, theirs) in self.sites.iter().zip(other) {
            let (want, found) = (mine.keeps()?, theirs.keeps()?);
            if want != found {
                return Err(Error::Foreign {
                    detail: format!("sums of {found:?}, not {want:?}"),
                });
            }
        }
        if writes == 0 || weight == 0.0 {
            return Ok(()); // Nothing is added: an empty state stays the bare model, bit for bit.
        }
        if self.writes == 0 && weight == 1.0 {
            // 0 + x is x: nothing is summed, and what another state holds is shared.
            self.sites = match whole {
                Some(sites) => Arc::clone(sites),
                None => {
                    let copies: Vec<_> = other.par_iter().map(|sums| sums.copy()).collect();
                    Arc::new(copies.into_iter().collect::<Result<_, Error>>()?)
                }
            };
            self.writes = writes;
            return Ok(());
        }
        // Sites side by side: it is memory that takes the time.
        if let Some(sites) = Arc::get_mut(&mut self.sites) {
            let added = sites.par_iter_mut().zip(other);
            let added: Vec<_> = added
                .map(|(mine, theirs)| mine.add(theirs, weight))
                .collect();
            added.into_iter().collect::<Result<(), Error>>()?;
        } else {
            let sums = self.sites.par_iter().zip(other);
            let sums: Vec<_> = sums
                .map(|(mine, theirs)| mine.plus(theirs, weight))
                .collect();
            self.sites = Arc::new(sums.into_iter().collect::<Result<_, Error>>()?);
        }
        self.writes = self.writes.saturating_add(writes);
        Ok(())
    }

    /// A state of sums that so many tokens have written.
    pub(crate) fn from_sums(sites: Vec<Sums>, writes: u64) -> Self {
        Self {
            sites: Arc::new(sites),
            writes,
            elsewhere: Vec::new(),
        }
    }

    /// A state of given sums (S, G, mass), as if `writes` tokens had written them.
    #[cfg(test)]
    pub(crate) fn of(sums: Vec<(Tensor, Option<Tensor>, Option<f64>)>, writes: u64) -> Self {
        let sites = sums
            .into_iter()
            .map(|(s, g, mass)| Sums { s, g, mass })
            .collect();
        Self {
            sites: Arc::new(sites),
            writes,
            elsewhere: Vec::new(),
        }
    }
}

fn foreign_site(index: usize, count: usize) -> Error {
    Error::Foreign {
        detail: format!("it has {count} sites, none with index {index}"),
    }
}

#[cfg(test)]
mod tests;
