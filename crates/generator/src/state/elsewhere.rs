//! Sums that are added up elsewhere: by a machine with memory of its own, which writes what a window's tokens write and hands it over when
//! somebody asks.
//!
//! Start at [`Window::set_sums`].

use std::sync::Arc;

use candle_core::{Device, Tensor};
use half::bf16;

use super::{Keeps, State, Sums, Window, foreign_site};
use crate::error::Error;

/// One site's sums as plain numbers, row by row.
#[derive(Clone, Debug, PartialEq)]
pub struct PlainSums {
    /// S [R1, R2]
    pub s: Vec<f32>,
    /// G [R1, R1], where the read-out asks for it.
    pub g: Option<Vec<f32>>,
    /// Σ ||k_t|| ||v_t||, where the read-out asks for it.
    pub mass: f64,
}

impl Window {
    /// The name of what a machine holds of it, if one does; a clone's is the same one.
    pub fn elsewhere(&self) -> Option<&Arc<u64>> {
        self.elsewhere.as_ref()
    }

    /// Gives what a machine holds of it a name.
    pub fn set_elsewhere(&mut self, name: Arc<u64>) {
        self.elsewhere = Some(name);
    }

    /// Takes note that so many tokens have passed, of which `writes` have written elsewhere.
    ///
    /// # Errors
    /// As [`Window::try_clone`].
    pub fn pass(&mut self, tokens: usize, writes: usize) -> Result<(), Error> {
        for index in 0..self.sites.len() {
            let site = self.site_mut(index)?;
            site.position += tokens;
            site.writes += writes as u64;
        }
        Ok(())
    }

    /// Puts sums that were added up elsewhere in the place of its own.
    ///
    /// # Errors
    /// [`Error::Foreign`] for sums of another generator; the window is as it was.
    pub fn set_sums(&mut self, sums: Vec<PlainSums>) -> Result<(), Error> {
        if sums.len() != self.sites.len() {
            return Err(foreign_site(sums.len(), self.sites.len()));
        }
        let mut all = Vec::with_capacity(sums.len());
        for (site, PlainSums { s, g, mass }) in self.sites.iter().zip(sums) {
            let Keeps {
                r1,
                r2,
                gram,
                mass: keeps_mass,
            } = site.sums.keeps()?;
            let sizes = (s.len(), g.as_ref().map(Vec::len));
            if sizes != (r1 * r2, gram.then_some(r1 * r1)) {
                return Err(Error::Foreign {
                    detail: format!("sums of {sizes:?} elements, not [{r1}, {r2}]"),
                });
            }
            let g = g.map(|g| Tensor::from_vec(g, (r1, r1), &Device::Cpu));
            all.push(Sums {
                s: Tensor::from_vec(s, (r1, r2), &Device::Cpu)?,
                g: g.transpose()?,
                mass: keeps_mass.then_some(mass),
            });
        }
        for (index, sums) in all.into_iter().enumerate() {
            self.site_mut(index)?.sums = sums;
        }
        Ok(())
    }

    /// Whether it keeps what every token writes, for a [`crate::Trace`].
    pub fn is_traced(&self) -> bool {
        self.sites.first().is_some_and(|site| site.rows.is_some())
    }

    /// Adds what tokens wrote at a site to what it keeps of them: k [n, R1], v [n, R2].
    ///
    /// # Errors
    /// [`Error::Foreign`] for a site that is not there, or rows of other sizes.
    pub fn push_written(&mut self, site: usize, k: &[bf16], v: &[bf16]) -> Result<(), Error> {
        let part = self.site_mut(site)?;
        let Keeps { r1, r2, .. } = part.sums.keeps()?;
        if k.len() / r1 * r1 != k.len() || k.len() / r1 * r2 != v.len() {
            return Err(Error::Foreign {
                detail: format!(
                    "{} and {} values for rows of {r1} and {r2}",
                    k.len(),
                    v.len()
                ),
            });
        }
        if let Some(rows) = &mut part.rows {
            rows.k.extend_from_slice(k);
            rows.v.extend_from_slice(v);
        }
        Ok(())
    }

    /// Sites that it has sums of.
    pub fn site_count(&self) -> usize {
        self.sites.len()
    }
}

impl State {
    /// Σ ||k_t|| ||v_t|| of a site, where the read-out asks for it: what the rounding of S is measured with.
    pub fn mass(&self, site: usize) -> Option<f64> {
        self.sites.get(site)?.mass
    }
}
