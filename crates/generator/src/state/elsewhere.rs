//! Sums that are added up elsewhere: by a machine with memory of its own, which writes what a window's tokens write, adds what states are
//! made of, and hands it over when somebody asks.
//!
//! A state then has names in the place of numbers, and is added, weighted and copied by these. Start at [`State::elsewhere`].

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

/// Sums that a machine holds under a name, as a part of a state.
#[derive(Clone, Debug)]
pub struct Elsewhere {
    name: Arc<u64>,
    /// Tokens that have written them.
    writes: u64,
    weight: f32,
}

impl Elsewhere {
    pub(super) fn new(name: &Arc<u64>, writes: u64) -> Self {
        Self {
            name: Arc::clone(name),
            writes,
            weight: 1.0,
        }
    }

    /// Their name; while somebody has it, the machine keeps them as they are.
    pub fn name(&self) -> u64 {
        *self.name
    }

    /// What they are taken times.
    pub fn weight(&self) -> f32 {
        self.weight
    }
}

impl State {
    /// Sites that it has sums of.
    pub fn site_count(&self) -> usize {
        self.sites.len()
    }

    /// What a machine holds of it.
    pub fn elsewhere(&self) -> &[Elsewhere] {
        &self.elsewhere
    }

    /// Whether it has sums of its own.
    pub fn is_here(&self) -> bool {
        self.writes > 0
    }

    /// Names what a machine has made of all that it holds of it: one sum.
    pub fn gathered(&mut self, name: &Arc<u64>) {
        let writes = self.elsewhere.iter().map(|part| part.writes).sum();
        self.elsewhere = vec![Elsewhere::new(name, writes)];
    }

    pub(super) fn add_elsewhere(&mut self, parts: &[Elsewhere], weight: f32) {
        if weight == 0.0 {
            return;
        }
        for part in parts.iter().filter(|part| part.writes > 0) {
            self.elsewhere.push(Elsewhere {
                weight: part.weight * weight,
                ..part.clone()
            });
        }
    }

    /// Adds the sum of all that a machine holds of it to its own; the machine then holds nothing of it.
    ///
    /// # Errors
    /// [`Error::Foreign`] for sums of another generator; the state is as it was.
    pub fn land(&mut self, sums: Vec<PlainSums>) -> Result<(), Error> {
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
            } = site.keeps()?;
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
        let writes = self.elsewhere.iter().map(|part| part.writes).sum();
        let all = Arc::new(all);
        self.fold(&all.iter().collect::<Vec<_>>(), Some(&all), writes, 1.0)?;
        self.elsewhere.clear();
        Ok(())
    }

    /// An error if a machine holds some of it: what is asked for needs all of it here.
    pub(crate) fn check_here(&self) -> Result<(), Error> {
        if self.elsewhere.is_empty() {
            return Ok(());
        }
        Err(Error::Foreign {
            detail: "some of its sums are with a machine".to_owned(),
        })
    }

    /// Σ ||k_t|| ||v_t|| of a site, where the read-out asks for it: what the rounding of S is measured with.
    pub fn mass(&self, site: usize) -> Option<f64> {
        self.sites.get(site)?.mass
    }
}
