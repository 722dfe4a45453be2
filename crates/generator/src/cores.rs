//! A core: what serving needs of a state.
//!
//! Per site the matrix N [R1, R2], or its factors U [R1, q], V [R2, q] where they are smaller, or nothing at
//! all where N is zero. Immutable and shared; made by a read-out, applied by [`crate::Site::delta`].

use std::sync::Arc;

use candle_core::Tensor;
use kernels::CoreView;

use crate::error::Error;

/// One site's part of a core.
#[derive(Debug)]
pub(crate) enum SiteCore {
    /// N = 0: the site does nothing.
    Zero,
    /// N [R1, R2].
    Dense(Tensor),
    /// N = U Vᵀ, u [R1, q], v [R2, q].
    LowRank { u: Tensor, v: Tensor },
}

/// What serving needs of a state. Immutable, cheap to clone.
#[derive(Clone, Debug)]
pub struct Core {
    pub(crate) sites: Arc<[SiteCore]>,
}

impl Core {
    /// Bytes of its tensors.
    pub fn bytes(&self) -> usize {
        let floats = |core: &SiteCore| match core {
            SiteCore::Zero => 0,
            SiteCore::Dense(n) => n.elem_count(),
            SiteCore::LowRank { u, v } => u.elem_count() + v.elem_count(),
        };
        self.sites.iter().map(floats).sum::<usize>() * size_of::<f32>()
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
        })
    }

    /// As the kernels take it; `None` where N is zero.
    pub(crate) fn view(&self, site: usize) -> Result<Option<CoreView<'_>>, Error> {
        Ok(match self.site(site)? {
            SiteCore::Zero => None,
            SiteCore::Dense(n) => Some(CoreView::Dense(n)),
            SiteCore::LowRank { u, v } => Some(CoreView::LowRank { u, v }),
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
