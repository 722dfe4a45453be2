//! Snapshots: what leaves memory of a session, as a value and as bytes.
//!
//! A snapshot carries the digest of the state that it is of, and is taken back for that state alone. Two parts, either of which may
//! be missing: the newest version's core, and the sums and traces of its documents. Who keeps the bytes keeps them whole: what is
//! cut, changed or foreign is refused, and the session is made again from its log. Start at [`Snapshot::read`].

use std::{fmt, sync::Arc};

use generator::{Core, State, Trace};

use crate::{cores::WrittenCore, ids::Digest, traces::HeldTrace};

/// Which parts of a session are meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Need {
    /// The newest version's core.
    pub core: bool,
    /// Sums and traces of the documents.
    pub sums: bool,
}

impl Need {
    /// Whether there is one.
    #[must_use]
    pub fn any(self) -> bool {
        self.core || self.sums
    }

    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            core: self.core || other.core,
            sums: self.sums || other.sums,
        }
    }

    /// What of it is in the other, too.
    pub(crate) fn within(self, other: Self) -> Self {
        Self {
            core: self.core && other.core,
            sums: self.sums && other.sums,
        }
    }
}

/// What leaves memory of a session. A copy costs little.
#[derive(Clone)]
pub struct Snapshot {
    digest: Digest,
    core: Option<Whose>,
    sums: Option<Arc<Sums>>,
}

/// Why bytes are no snapshot of a state.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// It is of another state.
    #[error("a snapshot {detail}")]
    Foreign {
        /// Of what.
        detail: String,
    },
    /// Something is left behind its end, or stands where something else belongs.
    #[error("a snapshot is damaged: {detail}")]
    Damaged {
        /// What is wrong.
        detail: &'static str,
    },
    /// A core, state or trace cannot be written, read or used.
    #[error(transparent)]
    Generator(#[from] generator::Error),
}

/// The core.
#[derive(Clone)]
enum Whose {
    /// Keeps its slot while it is written.
    Held(WrittenCore),
    Own(Core),
}

/// One document's part: its sums, and what its tokens wrote.
pub(crate) type Part = (Option<State>, Option<Kept>);

/// What tokens of a document wrote.
pub(crate) enum Kept {
    Held(HeldTrace),
    Own(Trace),
}

impl Kept {
    pub(crate) fn trace(&self) -> &Trace {
        match self {
            Self::Held(held) => held.trace(),
            Self::Own(trace) => trace,
        }
    }
}

/// Sums and traces of a session.
pub(crate) struct Sums {
    /// The fold, where documents have no sums of their own.
    pub(crate) folded: Option<State>,
    pub(crate) documents: Vec<Part>,
}

impl Sums {
    /// Bytes in memory.
    fn bytes(&self) -> usize {
        let documents = self.documents.iter();
        let parts = documents.map(|(state, trace)| {
            state.as_ref().map_or(0, State::bytes)
                + trace.as_ref().map_or(0, |kept| kept.trace().bytes())
        });
        self.folded.as_ref().map_or(0, State::bytes) + parts.sum::<usize>()
    }

    fn write(&self, out: &mut Vec<u8>) -> Result<(), generator::Error> {
        let put = |out: &mut Vec<u8>, state: &Option<State>| match state {
            Some(state) => {
                out.push(1);
                state.write(out)
            }
            None => {
                out.push(0);
                Ok(())
            }
        };
        put(out, &self.folded)?;
        out.extend_from_slice(&(self.documents.len() as u64).to_le_bytes());
        for (state, trace) in &self.documents {
            put(out, state)?;
            match trace {
                Some(kept) => {
                    out.push(1);
                    kept.trace().write(out);
                }
                None => out.push(0),
            }
        }
        Ok(())
    }

    fn read(bytes: &mut &[u8]) -> Result<Self, SnapshotError> {
        let folded = flag(bytes)?.then(|| State::read(bytes)).transpose()?;
        let (count, rest) = bytes.split_first_chunk::<8>().ok_or_else(too_short)?;
        *bytes = rest;
        let mut documents = Vec::new();
        // Each takes two bytes at least: the count is believed no further than they go.
        for _ in 0..u64::from_le_bytes(*count) {
            let state = flag(bytes)?.then(|| State::read(bytes)).transpose()?;
            let trace = flag(bytes)?.then(|| Trace::read(bytes)).transpose()?;
            documents.push((state, trace.map(Kept::Own)));
        }
        Ok(Self { folded, documents })
    }
}

impl Snapshot {
    pub(crate) fn of(digest: Digest, held: Option<WrittenCore>, sums: Option<Sums>) -> Self {
        Self {
            digest,
            core: held.map(Whose::Held),
            sums: sums.map(Arc::new),
        }
    }

    /// The state that it is of.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        let core = self.core.as_ref().map_or(0, |core| match core {
            Whose::Held(held) => held.core().bytes(),
            Whose::Own(core) => core.bytes(),
        });
        core + self.sums.as_ref().map_or(0, |sums| sums.bytes())
    }

    /// What it holds.
    #[must_use]
    pub fn holds(&self) -> Need {
        Need {
            core: self.core.is_some(),
            sums: self.sums.is_some(),
        }
    }

    /// The core as bytes, if there is one.
    ///
    /// # Errors
    /// [`SnapshotError::Generator`] if a tensor cannot be read.
    pub fn core_bytes(&self) -> Result<Option<Vec<u8>>, SnapshotError> {
        let core = match &self.core {
            Some(Whose::Held(held)) => held.core(),
            Some(Whose::Own(core)) => core,
            None => return Ok(None),
        };
        let mut out = Vec::new();
        core.write(&mut out)?;
        Ok(Some(out))
    }

    /// Sums and traces as bytes, if there are any.
    ///
    /// # Errors
    /// [`SnapshotError::Generator`] if a tensor cannot be read.
    pub fn sums_bytes(&self) -> Result<Option<Vec<u8>>, SnapshotError> {
        let Some(sums) = &self.sums else {
            return Ok(None);
        };
        let mut out = Vec::new();
        sums.write(&mut out)?;
        Ok(Some(out))
    }

    /// A snapshot of a state, of the bytes of its parts. Whether it fits the session is asked when the engine takes it.
    ///
    /// # Errors
    /// What is damaged.
    pub fn read(
        digest: Digest,
        core: Option<&[u8]>,
        sums: Option<&[u8]>,
    ) -> Result<Self, SnapshotError> {
        let core = core.map(|mut bytes| ended(Core::read(&mut bytes)?, bytes));
        let sums = sums.map(|mut bytes| ended(Sums::read(&mut bytes)?, bytes));
        Ok(Self {
            digest,
            core: core.transpose()?.map(Whose::Own),
            sums: sums.transpose()?.map(Arc::new),
        })
    }

    pub(crate) fn into_parts(self) -> (Option<Core>, Option<Arc<Sums>>) {
        let core = self.core.map(|core| match core {
            Whose::Held(held) => held.core().clone(),
            Whose::Own(core) => core,
        });
        (core, self.sums)
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot")
            .field("digest", &self.digest.to_string())
            .field("holds", &self.holds())
            .finish_non_exhaustive()
    }
}

fn flag(bytes: &mut &[u8]) -> Result<bool, SnapshotError> {
    let (first, rest) = bytes.split_first().ok_or_else(too_short)?;
    *bytes = rest;
    match first {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(SnapshotError::Damaged {
            detail: "a mark that is none",
        }),
    }
}

fn too_short() -> SnapshotError {
    SnapshotError::Damaged {
        detail: "it ends too early",
    }
}

fn ended<T>(value: T, rest: &[u8]) -> Result<T, SnapshotError> {
    if rest.is_empty() {
        Ok(value)
    } else {
        Err(SnapshotError::Damaged {
            detail: "something stands behind its end",
        })
    }
}
