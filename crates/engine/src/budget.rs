//! Budgets of bytes: what is held counts once, however many hold it, until the last one lets it go.
//!
//! Start at [`Budget::hold`].

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// A budget. Whether something fits is its owner's to ask before.
#[derive(Debug)]
pub(crate) struct Budget {
    used: Arc<AtomicUsize>,
    limit: usize,
}

/// A value that counts. Cheap to clone.
#[derive(Debug)]
pub(crate) struct Held<T>(Arc<Counted<T>>);

#[derive(Debug)]
struct Counted<T> {
    value: T,
    bytes: usize,
    used: Arc<AtomicUsize>,
}

impl<T> Drop for Counted<T> {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl<T> Clone for Held<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Held<T> {
    pub(crate) fn value(&self) -> &T {
        &self.0.value
    }

    pub(crate) fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// The value, to be changed, if nobody else holds it; [`Held::recount`] afterwards.
    pub(crate) fn own(&mut self) -> Option<&mut T> {
        Arc::get_mut(&mut self.0).map(|counted| &mut counted.value)
    }

    /// Counts so many bytes from now on, if nobody else holds it.
    pub(crate) fn recount(&mut self, bytes: usize) {
        if let Some(counted) = Arc::get_mut(&mut self.0) {
            counted.used.fetch_add(bytes, Ordering::Relaxed);
            counted.used.fetch_sub(counted.bytes, Ordering::Relaxed);
            counted.bytes = bytes;
        }
    }
}

impl Budget {
    /// Nothing held yet, and at most `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            used: Arc::default(),
            limit,
        }
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// Bytes that are held.
    pub(crate) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Holds a value of so many bytes, whether it fits or not.
    pub(crate) fn hold<T>(&self, value: T, bytes: usize) -> Held<T> {
        let used = Arc::clone(&self.used);
        used.fetch_add(bytes, Ordering::Relaxed);
        Held(Arc::new(Counted { value, bytes, used }))
    }
}
