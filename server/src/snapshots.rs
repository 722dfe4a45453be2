//! The thread that keeps snapshots: what the engine lets go of, written to files and read again.
//!
//! It answers every job of the engine, whatever becomes of the file: what cannot be had the engine makes again from the session's log.
//! Jobs run in the order in which they came, so what is removed after it was written is gone. It knows no sessions but their numbers.
//! Start at `Disk::start`.

#[cfg(test)]
mod tests;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
};

use engine::{Command, Digest, Need, SessionId, Snapshot};
use store::{Kept, Key, Snapshots};

/// The part of a session that is its core.
const CORE: u8 = 0;
/// The part that is its sums and traces.
const SUMS: u8 = 1;

/// Where snapshots are kept, and how many bytes of them.
#[derive(Clone, Debug)]
pub struct Place {
    /// The folder; it is made when the first snapshot is.
    pub dir: PathBuf,
    /// At most so many bytes.
    pub budget_bytes: u64,
}

/// What the engine asks.
#[derive(Debug)]
pub(crate) enum Job {
    Save {
        session: SessionId,
        snapshot: Snapshot,
    },
    Want {
        session: SessionId,
        digest: Digest,
        need: Need,
    },
    Remove {
        session: SessionId,
    },
}

/// What is kept, for who wants to know.
#[derive(Clone, Debug, Default)]
pub struct Gauge(Arc<Mutex<Kept>>);

impl Gauge {
    /// What is kept now.
    #[must_use]
    pub fn kept(&self) -> Kept {
        *self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        // A copy of numbers: whole at any time.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The way to the thread. It ends when this does.
#[derive(Debug)]
pub(crate) struct Disk {
    jobs: mpsc::Sender<Job>,
}

impl Disk {
    /// Starts the thread. `made_with` are the digests of base and generator; `answer` takes the engine's next command and says whether anybody listens. At most eight jobs wait for an answer, as the
    /// engine asks for no more at a time; those that remove something are small.
    pub(crate) fn start(
        place: Place,
        made_with: (String, String),
        gauge: Gauge,
        answer: impl Fn(Command) -> bool + Send + 'static,
    ) -> std::io::Result<Self> {
        let (jobs, work) = mpsc::channel();
        let mut keeper = Keeper {
            place,
            made_with,
            gauge,
            snapshots: None,
        };
        let body = move || {
            for job in work {
                let heard = keeper.run(job).is_none_or(&answer);
                if !heard {
                    return;
                }
            }
        };
        std::thread::Builder::new()
            .name("snapshots".to_owned())
            .spawn(body)?;
        Ok(Self { jobs })
    }

    /// Queues a job; it comes back if the thread is gone.
    pub(crate) fn send(&self, job: Job) -> Result<(), Job> {
        self.jobs.send(job).map_err(|mpsc::SendError(job)| job)
    }
}

/// The answer to a job that nobody does.
pub(crate) fn without_disk(job: &Job) -> Option<Command> {
    match job {
        Job::Save { session, snapshot } => Some(Command::Saved {
            session: *session,
            digest: snapshot.digest(),
            kept: Need::default(),
        }),
        Job::Want { session, .. } => Some(Command::Restored {
            session: *session,
            snapshot: None,
        }),
        Job::Remove { .. } => None,
    }
}

struct Keeper {
    place: Place,
    /// Digests of base and generator.
    made_with: (String, String),
    gauge: Gauge,
    /// None before the first snapshot.
    snapshots: Option<Snapshots>,
}

impl Keeper {
    fn run(&mut self, job: Job) -> Option<Command> {
        let answer = match job {
            Job::Save { session, snapshot } => Some(Command::Saved {
                session,
                digest: snapshot.digest(),
                kept: self.save(session, &snapshot),
            }),
            Job::Want {
                session,
                digest,
                need,
            } => Some(Command::Restored {
                session,
                snapshot: self.restore(session, digest, need),
            }),
            Job::Remove { session } => {
                if let Some(snapshots) = &mut self.snapshots {
                    snapshots.remove(session.0);
                }
                None
            }
        };
        if let Some(snapshots) = &self.snapshots {
            *self.gauge.lock() = snapshots.kept();
        }
        answer
    }

    /// Keeps what a snapshot holds; says what is kept.
    fn save(&mut self, session: SessionId, snapshot: &Snapshot) -> Need {
        if self.snapshots.is_none() {
            let Place { dir, budget_bytes } = &self.place;
            let (base, generator) = &self.made_with;
            match Snapshots::open(dir, *budget_bytes, base, generator) {
                Ok(snapshots) => self.snapshots = Some(snapshots),
                Err(error) => warn(session, &error),
            }
        }
        let Some(snapshots) = &mut self.snapshots else {
            return Need::default();
        };
        // What was kept of an older state is of no use.
        snapshots.remove(session.0);
        let mut put = |part, bytes: Result<Option<Vec<u8>>, engine::SnapshotError>| {
            let bytes = bytes.unwrap_or_else(|error| {
                warn(session, &error);
                None
            });
            let Some(bytes) = bytes else {
                return false;
            };
            let key = Key {
                session: session.0,
                part,
            };
            snapshots
                .put(key, snapshot.digest().0, &bytes)
                .unwrap_or_else(|error| {
                    warn(session, &error);
                    false
                })
        };
        Need {
            core: put(CORE, snapshot.core_bytes()),
            sums: put(SUMS, snapshot.sums_bytes()),
        }
    }

    /// What there is of what is needed.
    fn restore(&mut self, session: SessionId, digest: Digest, need: Need) -> Option<Snapshot> {
        let snapshots = self.snapshots.as_mut()?;
        let mut get = |part, wanted: bool| {
            let key = Key {
                session: session.0,
                part,
            };
            let got = wanted.then(|| snapshots.get(key, digest.0));
            got.transpose()
                .unwrap_or_else(|error| {
                    warn(session, &error);
                    None
                })
                .flatten()
        };
        let (core, sums) = (get(CORE, need.core), get(SUMS, need.sums));
        if core.is_none() && sums.is_none() {
            return None;
        }
        let snapshot = Snapshot::read(digest, core.as_deref(), sums.as_deref());
        snapshot.inspect_err(|error| warn(session, error)).ok()
    }
}

fn warn(session: SessionId, error: &dyn std::error::Error) {
    tracing::warn!(
        session = session.0,
        %error,
        "a session's snapshot is of no use; its log is read again"
    );
}
