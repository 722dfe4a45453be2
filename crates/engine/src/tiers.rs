//! Tiers: what of the sessions is in slots, in host memory, or has left, and how it came back. Figures alone.
//!
//! Start at [`Tiers`].

/// Sessions and bytes of each tier, and what has moved between them. What is on disk whoever keeps
/// it fills in: the engine does no I/O.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tiers {
    /// Sessions whose newest version is in a slot, ready to answer.
    pub slot_sessions: usize,
    /// Bytes of all cores in slots, those included that only windows and running requests hold.
    pub slot_bytes: usize,
    /// Sessions whose sums and traces are in host memory.
    pub host_sessions: usize,
    /// Bytes of these (as the budget of states counts them, and of traces).
    pub host_bytes: usize,
    /// Files of snapshots. 0 as the engine says it.
    pub disk_files: usize,
    /// Bytes of these. 0 as the engine says it.
    pub disk_bytes: u64,
    /// Sessions of which nothing but their log is in memory.
    pub asleep_sessions: usize,
    /// Sessions that are being brought back.
    pub waking_sessions: usize,
    /// Requests that found what they need, since the start.
    pub hits: u64,
    /// Requests that had to wait for a session to be brought back.
    pub misses: u64,
    /// Cores that were read out of sums in host memory for a request.
    pub promoted_host: u64,
    /// Sessions that came back from a snapshot.
    pub promoted_disk: u64,
    /// Sessions that came back by reading their log again.
    pub reread: u64,
    /// Sessions whose sums and traces left memory.
    pub evicted_host: u64,
    /// Sessions whose core left its slot.
    pub evicted_slots: u64,
}
