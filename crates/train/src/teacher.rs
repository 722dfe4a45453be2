//! What teachers said: the likeliest tokens of questions that are asked again and again, kept in memory and in a file.
//!
//! Keyed by what the teacher read (context, query, how much of it is scored), of one base and one number of tokens; kept up to a bound,
//! then no more are taken. The file is a cache: a record that is not whole ends it, a file that cannot be written is done without.
//! Values are those that the model would give again, so a run with it is the run without. Start at [`Said::get`].

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use kernels::Likeliest;
use lm::text::TokenId;

/// Names what a teacher read.
pub(crate) type Key = [u8; 16];

/// Bytes of a record beside its tokens: key, count, check.
const FRAME: usize = 16 + 4 + 8;

/// What teachers said.
#[derive(Debug)]
pub(crate) struct Said {
    /// k
    pub(crate) count: usize,
    known: HashMap<Key, Likeliest>,
    bytes: usize,
    limit: usize,
    file: Option<File>,
}

/// The key of what a teacher reads; without a context it is the bare model.
pub(crate) fn key(context: &[TokenId], query: &[TokenId], scored: usize) -> Key {
    let mut hasher = blake3::Hasher::new();
    for part in [context, query] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        for token in part {
            hasher.update(&token.0.to_le_bytes());
        }
    }
    hasher.update(&(scored as u64).to_le_bytes());
    let mut key = Key::default();
    key.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    key
}

impl Said {
    /// In memory alone: at most `limit` bytes, `count` tokens of each position.
    pub(crate) fn new(count: usize, limit: usize) -> Self {
        Self {
            count,
            known: HashMap::new(),
            bytes: 0,
            limit,
            file: None,
        }
    }

    /// The same with a file in a folder, and what is in it. `name`: of the base and of what it computes in.
    pub(crate) fn in_folder(count: usize, limit: usize, folder: &Path, name: &str) -> Self {
        let mut said = Self::new(count, limit);
        let path = folder.join(format!("{name}-{count}.said"));
        // Without the file it is slower, nothing else.
        said.file = said.open(&path).ok();
        said
    }

    fn open(&mut self, path: &Path) -> io::Result<File> {
        let folder: PathBuf = path.parent().map(Path::to_owned).unwrap_or_default();
        fs::create_dir_all(folder)?;
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(path)?;
        let length = file.metadata()?.len();
        // A longer one is of another bound: what fits is read.
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(&file, self.limit as u64), &mut bytes)?;
        let mut whole = 0;
        while let Some((key, likeliest, size)) = record(&bytes[whole..], self.count) {
            whole += size;
            self.known.insert(key, likeliest);
        }
        self.bytes = whole;
        if whole as u64 != length {
            file.set_len(whole as u64)?;
        }
        let mut file = file;
        io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
        Ok(file)
    }

    /// What was said, if it is known.
    pub(crate) fn get(&self, key: &Key) -> Option<&Likeliest> {
        self.known.get(key)
    }

    /// Keeps what was said, while there is room.
    pub(crate) fn put(&mut self, key: Key, likeliest: Likeliest) {
        let record = framed(&key, &likeliest);
        if self.bytes + record.len() > self.limit || self.known.contains_key(&key) {
            return;
        }
        self.bytes += record.len();
        if let Some(file) = &mut self.file
            && file.write_all(&record).is_err()
        {
            // A full disk: what follows a torn record is not read.
            self.file = None;
        }
        self.known.insert(key, likeliest);
    }
}

fn framed(key: &Key, likeliest: &Likeliest) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(FRAME + 8 * likeliest.tokens.len());
    bytes.extend(key);
    bytes.extend((likeliest.tokens.len() as u32).to_le_bytes());
    let tokens = likeliest.tokens.iter().map(|token| token.to_le_bytes());
    bytes.extend(tokens.flatten());
    let probabilities = likeliest.probabilities.iter().map(|p| p.to_le_bytes());
    bytes.extend(probabilities.flatten());
    let check = blake3::hash(&bytes);
    bytes.extend(&check.as_bytes()[..8]);
    bytes
}

/// The record that bytes begin with, and its size.
fn record(bytes: &[u8], count: usize) -> Option<(Key, Likeliest, usize)> {
    let (key, rest) = bytes.split_first_chunk::<16>()?;
    let (values, rest) = rest.split_first_chunk::<4>()?;
    let values = u32::from_le_bytes(*values) as usize;
    if values == 0 || !values.is_multiple_of(count.max(1)) {
        return None;
    }
    let size = FRAME + values.checked_mul(8)?;
    let (tokens, rest) = rest.split_at_checked(4 * values)?;
    let (probabilities, rest) = rest.split_at_checked(4 * values)?;
    let check = rest.get(..8)?;
    if &blake3::hash(&bytes[..size - 8]).as_bytes()[..8] != check {
        return None;
    }
    let (tokens, probabilities) = (tokens.as_chunks::<4>().0, probabilities.as_chunks::<4>().0);
    let likeliest = Likeliest {
        count,
        tokens: tokens.iter().map(|t| u32::from_le_bytes(*t)).collect(),
        probabilities: probabilities
            .iter()
            .map(|p| f32::from_le_bytes(*p))
            .collect(),
    };
    Some((*key, likeliest, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(seed: u32, positions: usize) -> Likeliest {
        let values = 3 * positions as u32;
        Likeliest {
            count: 3,
            tokens: (seed..seed + values).collect(),
            probabilities: (0..values).map(|i| 1.0 / (seed + i + 4) as f32).collect(),
        }
    }

    fn keys(n: u32) -> Key {
        key(&[TokenId(n)], &[TokenId(1), TokenId(2)], 1)
    }

    #[test]
    fn what_was_said_is_there_again_and_a_torn_record_ends_it() {
        let folder = tempfile::tempdir().unwrap();
        let open = |limit| Said::in_folder(3, limit, folder.path(), "base");
        let mut said = open(1 << 20);
        for n in 0..4 {
            said.put(keys(n), words(n, 1 + n as usize));
        }
        drop(said);
        let path = folder.path().join("base-3.said");
        let whole = fs::read(&path).unwrap();
        let again = open(1 << 20);
        for n in 0..4 {
            assert_eq!(again.get(&keys(n)), Some(&words(n, 1 + n as usize)));
        }
        drop(again);
        fs::write(&path, &whole[..whole.len() - 3]).unwrap();
        let mut torn = open(1 << 20);
        assert!(torn.get(&keys(2)).is_some() && torn.get(&keys(3)).is_none());
        torn.put(keys(3), words(3, 4));
        drop(torn);
        assert_eq!(fs::read(&path).unwrap(), whole);
        let mut damaged = whole;
        damaged[40] ^= 1;
        fs::write(&path, damaged).unwrap();
        assert!(open(1 << 20).get(&keys(0)).is_none());
    }

    #[test]
    fn no_more_is_kept_than_the_bound_in_memory_and_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let size = framed(&keys(0), &words(0, 2)).len();
        let mut said = Said::in_folder(3, 2 * size + 1, folder.path(), "base");
        for n in 0..5 {
            said.put(keys(n), words(n, 2));
            said.put(keys(n), words(n, 2));
        }
        assert!(said.get(&keys(1)).is_some() && said.get(&keys(2)).is_none());
        drop(said);
        let length = fs::metadata(folder.path().join("base-3.said"))
            .unwrap()
            .len();
        assert_eq!(length, 2 * size as u64);
    }

    #[test]
    fn keys_are_of_all_that_a_teacher_reads() {
        let token = |n| vec![TokenId(n)];
        let all = [
            key(&token(1), &token(2), 1),
            key(&token(2), &token(2), 1),
            key(&token(1), &token(3), 1),
            key(&token(1), &token(2), 2),
            key(&[], &[TokenId(1), TokenId(2)], 1),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b));
        }
    }
}
