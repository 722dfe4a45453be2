//! A histogram with fixed bounds, as Prometheus counts: how many were at most so long, how many there were, and their sum.
//!
//! Start at [`Histogram::observe`].

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Durations, counted by the least bound that they do not exceed.
#[derive(Debug)]
pub(super) struct Histogram {
    /// Seconds, rising.
    bounds: &'static [f64],
    /// One for each bound, and one for what is longer than all.
    counts: Box<[AtomicU64]>,
    sum_ns: AtomicU64,
}

impl Histogram {
    pub(super) fn new(bounds: &'static [f64]) -> Self {
        Self {
            bounds,
            counts: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(),
            sum_ns: AtomicU64::new(0),
        }
    }

    pub(super) fn observe(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let place = self.bounds.partition_point(|bound| *bound < seconds);
        self.counts[place].fetch_add(1, Ordering::Relaxed);
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }

    /// Each bound with how many did not exceed it, how many there were, and the sum of their seconds.
    pub(super) fn read(&self) -> (Vec<(f64, u64)>, u64, f64) {
        let mut total = 0;
        let mut running = self.counts.iter().map(|count| {
            total += count.load(Ordering::Relaxed);
            total
        });
        let below = self.bounds.iter().copied().zip(&mut running).collect();
        let all = running.next().unwrap_or_default();
        let sum = Duration::from_nanos(self.sum_ns.load(Ordering::Relaxed));
        (below, all, sum.as_secs_f64())
    }
}
