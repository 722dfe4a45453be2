//! Snapshots on a thread of their own, as the server keeps them.
//!
//! Start at [`Disk::start`].

use std::{path::Path, sync::mpsc};

use anyhow::{Context, Result};
use engine::{Command, Event, Need, Snapshot};
use store::{Key, Snapshots};

/// The way to the thread.
pub(crate) struct Disk {
    jobs: mpsc::Sender<Event>,
    done: mpsc::Receiver<Done>,
    kept: (usize, u64),
}

/// The engine's next command, with files and bytes that are kept.
type Done = (Command, (usize, u64));

impl Disk {
    /// Keeps at most so many bytes in a folder, of what was made with a base and a generator of these digests.
    pub(crate) fn start(dir: &Path, bytes: u64, base: &str, generator: &str) -> Result<Self> {
        let mut snapshots = Snapshots::open(dir, bytes, base, generator)?;
        let (jobs, work) = mpsc::channel();
        let (answers, done) = mpsc::channel();
        let body = move || {
            for event in work {
                let Some(command) = run(&mut snapshots, event) else {
                    continue;
                };
                let kept = snapshots.kept();
                if answers.send((command, (kept.files, kept.bytes))).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new()
            .name("snapshots".to_owned())
            .spawn(body)?;
        Ok(Self {
            jobs,
            done,
            kept: (0, 0),
        })
    }

    /// Files and bytes that are kept, as of the last answer.
    pub(crate) fn kept(&self) -> (usize, u64) {
        self.kept
    }

    pub(crate) fn ask(&self, event: Event) -> Result<()> {
        self.jobs
            .send(event)
            .ok()
            .context("the disk's thread has ended")
    }

    /// The answers that are there.
    pub(crate) fn answers(&mut self) -> Vec<Command> {
        let done: Vec<Done> = self.done.try_iter().collect();
        done.into_iter().map(|done| self.note(done)).collect()
    }

    /// The next answer.
    pub(crate) fn wait(&mut self) -> Result<Command> {
        let done = self
            .done
            .recv()
            .ok()
            .context("the disk's thread has ended")?;
        Ok(self.note(done))
    }

    fn note(&mut self, (command, kept): Done) -> Command {
        self.kept = kept;
        command
    }
}

/// Does what the engine asks; what fails is not kept, or not there.
fn run(snapshots: &mut Snapshots, event: Event) -> Option<Command> {
    let key = |session: engine::SessionId, part| Key {
        session: session.0,
        part,
    };
    match event {
        Event::Save { session, snapshot } => {
            let digest = snapshot.digest();
            let mut put = |part, bytes: Option<Vec<u8>>| {
                let put = bytes.map(|bytes| snapshots.put(key(session, part), digest.0, &bytes));
                put.is_some_and(|put| put.unwrap_or(false))
            };
            let kept = Need {
                core: put(0, snapshot.core_bytes().ok().flatten()),
                sums: put(1, snapshot.sums_bytes().ok().flatten()),
            };
            Some(Command::Saved {
                session,
                digest,
                kept,
            })
        }
        Event::Wanted {
            session,
            digest,
            need,
        } => {
            let mut get = |part, wanted: bool| {
                let got = wanted.then(|| snapshots.get(key(session, part), digest.0));
                got.and_then(Result::ok).flatten()
            };
            let (core, sums) = (get(0, need.core), get(1, need.sums));
            Some(Command::Restored {
                session,
                snapshot: Snapshot::read(digest, core.as_deref(), sums.as_deref()).ok(),
            })
        }
        _ => None,
    }
}
