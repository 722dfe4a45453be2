//! A core: what serving needs of a state.
//!
//! Per site the matrix N [R1, R2], or its factors U [R1, q], V [R2, q] where they are smaller, or N in 8 bits where the
//! site rounds, or nothing at all where N is zero. It may have gates, which say how far it concerns a token. Immutable and shared; made
//! by a read-out, applied by [`crate::Site::delta`].

use std::sync::Arc;

use candle_core::{Device, Tensor};
use kernels::{CoreView, Linear};

use crate::{error::Error, gate::Gates, generator::Generator};

/// One site's part of a core.
#[derive(Debug)]
pub(crate) enum SiteCore {
    /// N = 0: the site does nothing.
    Zero,
    /// N [R1, R2].
    Dense(Tensor),
    /// N = U Vᵀ, u [R1, q], v [R2, q].
    LowRank { u: Tensor, v: Tensor },
    /// Nᵀ [R2, R1] in 8 bits, of a site that rounds.
    Rounded(Linear),
}

impl SiteCore {
    /// A dense N in 8 bits, where its columns are whole blocks; others stay as they are.
    pub(crate) fn rounded(self) -> Result<Self, Error> {
        let Self::Dense(n) = &self else {
            return Ok(self);
        };
        let rounded = Linear::from_tensor(&n.t()?)?.rounded(); // Nᵀ [R2, R1]
        Ok(if rounded.rounds_activations() {
            Self::Rounded(rounded)
        } else {
            self
        })
    }
}

/// One site's part of a core as plain numbers, row by row.
#[derive(Clone, Debug, PartialEq)]
pub enum PlainCore {
    /// N = 0.
    Zero,
    /// N [R1, R2].
    Dense(Vec<f32>),
    /// N = U Vᵀ, u [R1, q], v [R2, q].
    LowRank {
        /// U
        u: Vec<f32>,
        /// V
        v: Vec<f32>,
    },
}

impl PlainCore {
    /// As a core of a site of these sizes; `None` for other sizes.
    fn on_site(self, r1: usize, r2: usize) -> Result<Option<SiteCore>, Error> {
        let tensor =
            |values, rows, columns| Tensor::from_vec(values, (rows, columns), &Device::Cpu);
        Ok(match self {
            Self::Zero => Some(SiteCore::Zero),
            Self::Dense(n) if n.len() == r1 * r2 => Some(SiteCore::Dense(tensor(n, r1, r2)?)),
            Self::LowRank { u, v }
                if u.len() / r1 * r1 == u.len() && u.len() / r1 * r2 == v.len() =>
            {
                let q = u.len() / r1;
                let (u, v) = (tensor(u, r1, q)?, tensor(v, r2, q)?);
                Some(SiteCore::LowRank { u, v })
            }
            Self::Dense(_) | Self::LowRank { .. } => None,
        })
    }
}

impl Generator {
    /// A core that was read out elsewhere, site by site.
    ///
    /// # Errors
    /// [`Error::Foreign`] for parts of other sizes.
    pub fn core(&self, parts: Vec<PlainCore>) -> Result<Core, Error> {
        let foreign = || Error::Foreign {
            detail: format!(
                "parts of a core that are not those of {} sites",
                self.sites().len()
            ),
        };
        if parts.len() != self.sites().len() {
            return Err(foreign());
        }
        let sites = parts.into_iter().zip(self.sites()).map(|(part, site)| {
            let (r1, r2, _) = site.ranks();
            part.on_site(r1, r2)?.ok_or_else(foreign)
        });
        Ok(Core::of(sites.collect::<Result<Vec<_>, Error>>()?))
    }
}

/// What serving needs of a state. Immutable, cheap to clone.
#[derive(Clone, Debug)]
pub struct Core {
    pub(crate) sites: Arc<[SiteCore]>,
    pub(crate) gates: Option<Arc<Gates>>,
}

impl Core {
    /// A core without gates.
    pub(crate) fn of(sites: impl IntoIterator<Item = SiteCore>) -> Self {
        Self {
            sites: sites.into_iter().collect(),
            gates: None,
        }
    }

    /// Whether it has gates: its rows then run with [`crate::Site::gated_delta`].
    pub fn is_gated(&self) -> bool {
        self.gates.is_some()
    }

    /// Bytes of its tensors.
    pub fn bytes(&self) -> usize {
        let bytes = |core: &SiteCore| match core {
            SiteCore::Zero => 0,
            SiteCore::Dense(n) => n.elem_count() * size_of::<f32>(),
            SiteCore::LowRank { u, v } => (u.elem_count() + v.elem_count()) * size_of::<f32>(),
            SiteCore::Rounded(n) => n.bytes(),
        };
        let gates = self.gates.as_ref().map_or(0, |gates| gates.bytes());
        self.sites.iter().map(bytes).sum::<usize>() + gates
    }

    /// Whether it is the bare model: no site does anything.
    pub fn is_zero(&self) -> bool {
        self.sites.iter().all(|core| matches!(core, SiteCore::Zero))
    }

    /// N [R1, R2] of a site, multiplied out; `None` where it is zero.
    ///
    /// # Errors
    /// [`Error::Foreign`] if there is no such site.
    pub fn matrix(&self, site: usize) -> Result<Option<Tensor>, Error> {
        Ok(match self.site(site)? {
            SiteCore::Zero => None,
            SiteCore::Dense(n) => Some(n.clone()),
            SiteCore::LowRank { u, v } => Some(u.matmul(&v.t()?)?),
            SiteCore::Rounded(n) => Some(n.dequantize()?.t()?.contiguous()?),
        })
    }

    /// Its factors U [R1, q] and V [R2, q] at a site; `None` where N is zero or kept whole.
    ///
    /// # Errors
    /// [`Error::Foreign`] if there is no such site.
    pub fn low_rank(&self, site: usize) -> Result<Option<(&Tensor, &Tensor)>, Error> {
        Ok(match self.site(site)? {
            SiteCore::LowRank { u, v } => Some((u, v)),
            SiteCore::Zero | SiteCore::Dense(_) | SiteCore::Rounded(_) => None,
        })
    }

    /// Its gate at a site, where it has one: (G + lambda I)⁻¹ G [R1, R1] and 1 - e.
    pub fn gate(&self, site: usize) -> Option<(&Tensor, f32)> {
        let gate = self.gates.as_ref()?.site(site)?;
        Some((&gate.known, gate.rest))
    }

    /// As the kernels take it; `None` where N is zero.
    pub(crate) fn view(&self, site: usize) -> Result<Option<CoreView<'_>>, Error> {
        Ok(match self.site(site)? {
            SiteCore::Zero => None,
            SiteCore::Dense(n) => Some(CoreView::Dense(n)),
            SiteCore::LowRank { u, v } => Some(CoreView::LowRank { u, v }),
            SiteCore::Rounded(n) => Some(CoreView::Rounded(n)),
        })
    }

    pub(crate) fn site(&self, site: usize) -> Result<&SiteCore, Error> {
        let none = || Error::Foreign {
            detail: format!(
                "a core of {} sites, none with index {site}",
                self.sites.len()
            ),
        };
        self.sites.get(site).ok_or_else(none)
    }
}
