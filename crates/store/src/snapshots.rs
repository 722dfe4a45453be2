//! Snapshots: parts of sessions that left memory, as files.
//!
//! A cache and never the truth: what is lost, damaged or foreign is refused, and the session is made again from its log. So nothing is
//! synced, and nothing outlives the process: each has a folder of its own, locked while it lives; folders that nobody locks are
//! removed. A file is written beside and renamed; at most so many bytes are kept, and what was used longest ago goes first. Only the
//! owner of the process may read them; they are not encrypted. Start at [`Snapshots::put`].
//!
//! All numbers are little-endian:
//!
//! ```text
//! magic "imprsnap" [8]   format u32 = 1   base [32]   generator [32]   state [32]   length u64   checksum [32]   payload [length]
//! ```
//!
//! `base` and `generator` are blake3 over the two's digests as text, `state` is the state digest, the checksum blake3 over all that stands
//! before it and the payload.

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU64, Ordering},
};

/// What a file begins with.
const MAGIC: &[u8; 8] = b"imprsnap";
const FORMAT: u32 = 1;
/// Bytes in front of the checksum, and of the whole head.
const NAMED: usize = 8 + 4 + 3 * 32 + 8;
const HEAD: usize = NAMED + 32;

/// Which part of which session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// The session, as its owner numbers it.
    pub session: u64,
    /// The part of it.
    pub part: u8,
}

/// What is kept, and what was done since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Files.
    pub files: usize,
    /// Bytes of them.
    pub bytes: u64,
    /// Files that were written.
    pub written: u64,
    /// Files that were read.
    pub read: u64,
    /// Files that made room for others.
    pub dropped: u64,
    /// Files that were refused: damaged or foreign.
    pub refused: u64,
}

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// A file or folder cannot be written or read.
    #[error("snapshot {path}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It does not begin as a snapshot does.
    #[error("{path} is not a snapshot")]
    NotOne {
        /// The file.
        path: PathBuf,
    },
    /// It is of a format that is not known.
    #[error("{path} has format {found}, not {FORMAT}")]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// It is of another base, generator or state.
    #[error("{path} is of another {what}")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: &'static str,
    },
    /// It is cut, or its bytes have changed.
    #[error("{path} is damaged: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How one can tell.
        what: &'static str,
    },
}

/// A file that is kept.
#[derive(Clone, Copy, Debug)]
struct Entry {
    bytes: u64,
    used: u64,
}

/// Snapshots of one process, made with one base and one generator.
#[derive(Debug)]
pub struct Snapshots {
    dir: PathBuf,
    /// Locked while this lives.
    _lock: File,
    limit: u64,
    base: [u8; 32],
    generator: [u8; 32],
    entries: BTreeMap<Key, Entry>,
    clock: u64,
    kept: Kept,
}

/// Tells folders of one process apart.
static NEXT: AtomicU64 = AtomicU64::new(0);

impl Snapshots {
    /// A folder of its own in `dir` for at most `limit` bytes, made with the base and the generator of these digests. Removes what
    /// processes that ended have left there.
    ///
    /// # Errors
    /// [`SnapshotError::Io`].
    pub fn open(
        dir: &Path,
        limit: u64,
        base: &str,
        generator: &str,
    ) -> Result<Self, SnapshotError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| SnapshotError::Io { path, source }
        };
        private_folder(dir).map_err(io(dir))?;
        sweep(dir);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mine = dir.join(format!("{}-{number}", process::id()));
        private_folder(&mine).map_err(io(&mine))?;
        let path = mine.join("lock");
        let lock = private_file(&path).map_err(io(&path))?;
        lock.lock().map_err(io(&path))?;
        Ok(Self {
            dir: mine,
            _lock: lock,
            limit,
            base: *blake3::hash(base.as_bytes()).as_bytes(),
            generator: *blake3::hash(generator.as_bytes()).as_bytes(),
            entries: BTreeMap::new(),
            clock: 0,
            kept: Kept::default(),
        })
    }

    /// What is kept.
    #[must_use]
    pub fn kept(&self) -> Kept {
        self.kept
    }

    fn path(&self, key: Key) -> PathBuf {
        self.dir
            .join(format!("{}-{}.snapshot", key.session, key.part))
    }

    /// Keeps a part of a session in `state`, in the place of what was kept of it. Says whether it is kept: what is larger than all that may be
    /// is not.
    ///
    /// # Errors
    /// [`SnapshotError::Io`]: nothing of this part is kept.
    pub fn put(
        &mut self,
        key: Key,
        state: [u8; 32],
        payload: &[u8],
    ) -> Result<bool, SnapshotError> {
        self.drop_one(key);
        let bytes = (HEAD as u64).saturating_add(payload.len() as u64);
        if bytes > self.limit {
            return Ok(false);
        }
        while self.kept.bytes.saturating_add(bytes) > self.limit {
            let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.used);
            let Some(oldest) = oldest.map(|(key, _)| *key) else {
                break;
            };
            self.drop_one(oldest);
            self.kept.dropped += 1;
        }
        let path = self.path(key);
        let beside = path.with_extension("part");
        let head = self.head(state, payload);
        let write = || {
            let mut file = private_file(&beside)?;
            file.write_all(&head)?;
            file.write_all(payload)?;
            fs::rename(&beside, &path)
        };
        if let Err(source) = write() {
            drop(fs::remove_file(&beside));
            return Err(SnapshotError::Io { path, source });
        }
        self.clock += 1;
        let used = self.clock;
        self.entries.insert(key, Entry { bytes, used });
        self.kept.files += 1;
        self.kept.bytes += bytes;
        self.kept.written += 1;
        Ok(true)
    }

    /// The part of a session in `state`; none if it is not kept. What is refused is not kept any longer.
    ///
    /// # Errors
    /// [`SnapshotError`] says what is wrong with the file.
    pub fn get(&mut self, key: Key, state: [u8; 32]) -> Result<Option<Vec<u8>>, SnapshotError> {
        self.clock += 1;
        let used = self.clock;
        let Some(entry) = self.entries.get_mut(&key) else {
            return Ok(None);
        };
        entry.used = used;
        let bytes = entry.bytes;
        match self.read(&self.path(key), bytes, state) {
            Ok(payload) => {
                self.kept.read += 1;
                Ok(Some(payload))
            }
            Err(error) => {
                self.drop_one(key);
                self.kept.refused += 1;
                Err(error)
            }
        }
    }

    /// Keeps nothing of a session any longer.
    pub fn remove(&mut self, session: u64) {
        let key = |part| Key { session, part };
        let keys: Vec<Key> = (self.entries.range(key(0)..=key(u8::MAX)))
            .map(|(key, _)| *key)
            .collect();
        for key in keys {
            self.drop_one(key);
        }
    }

    fn drop_one(&mut self, key: Key) {
        if let Some(entry) = self.entries.remove(&key) {
            self.kept.files -= 1;
            self.kept.bytes -= entry.bytes;
            // One that cannot be removed goes with the folder.
            drop(fs::remove_file(self.path(key)));
        }
    }

    fn head(&self, state: [u8; 32], payload: &[u8]) -> Vec<u8> {
        let mut head = Vec::with_capacity(HEAD);
        head.extend_from_slice(MAGIC);
        head.extend_from_slice(&FORMAT.to_le_bytes());
        for digest in [&self.base, &self.generator, &state] {
            head.extend_from_slice(digest);
        }
        head.extend_from_slice(&(payload.len() as u64).to_le_bytes());
        let mut checksum = blake3::Hasher::new();
        checksum.update(&head).update(payload);
        head.extend_from_slice(checksum.finalize().as_bytes());
        head
    }

    /// The payload of a file of so many bytes.
    fn read(&self, path: &Path, bytes: u64, state: [u8; 32]) -> Result<Vec<u8>, SnapshotError> {
        let io = |source| SnapshotError::Io {
            path: path.to_owned(),
            source,
        };
        let damaged = |what| SnapshotError::Damaged {
            path: path.to_owned(),
            what,
        };
        let mut all = Vec::new();
        // One byte more shows a file that has grown.
        let file = File::open(path).map_err(io)?;
        file.take(bytes.saturating_add(1))
            .read_to_end(&mut all)
            .map_err(io)?;
        if !all.starts_with(MAGIC) {
            return Err(SnapshotError::NotOne {
                path: path.to_owned(),
            });
        }
        if all.len() < HEAD {
            return Err(damaged("it ends in its head"));
        }
        let payload = all.split_off(HEAD);
        let found = all[8..12].try_into().map_or(0, u32::from_le_bytes);
        if found != FORMAT {
            return Err(SnapshotError::Format {
                path: path.to_owned(),
                found,
            });
        }
        let digests = [
            ("base", self.base),
            ("generator", self.generator),
            ("state", state),
        ];
        for ((what, want), found) in digests.into_iter().zip(all[12..].chunks_exact(32)) {
            if want != found {
                return Err(SnapshotError::Foreign {
                    path: path.to_owned(),
                    what,
                });
            }
        }
        let head = self.head(state, &payload);
        if head[..NAMED] != all[..NAMED] {
            return Err(damaged("its length is another"));
        }
        if head != all {
            return Err(damaged("its checksum is another"));
        }
        Ok(payload)
    }
}

impl Drop for Snapshots {
    fn drop(&mut self) {
        // What cannot be removed the next process removes.
        drop(fs::remove_dir_all(&self.dir));
    }
}

/// Removes the folders of processes that have ended.
fn sweep(dir: &Path) {
    let Ok(folders) = fs::read_dir(dir) else {
        return;
    };
    for folder in folders.filter_map(Result::ok) {
        let path = folder.path();
        // Only what is ours, and only if its lock is free.
        let free = File::open(path.join("lock")).is_ok_and(|lock| lock.try_lock().is_ok());
        if free {
            drop(fs::remove_dir_all(&path));
        }
    }
}

/// A folder, made if it is not there, that others cannot look into.
fn private_folder(path: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path)
}

/// An empty file that others cannot read.
fn private_file(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}
