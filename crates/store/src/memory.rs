//! Logs in memory: they end with the process.
//!
//! All rules of a log stand in [`Log`]; the type around it only finds the session. Start at [`Log::check`].

#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{Appended, Chunk, Document, Error, Hash, Head, Limits, Place, Row, Store};

/// The most bytes of a document's name.
const NAME_BYTES: usize = 256;

/// A [`Store`] in memory.
#[derive(Debug)]
pub struct Memory {
    limits: Limits,
    logs: Mutex<HashMap<String, Log>>,
}

impl Memory {
    /// An empty store whose sessions keep to the limits.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            logs: Mutex::new(HashMap::new()),
        }
    }

    /// The logs. Every change of a log is made after its last check, so a panic elsewhere leaves them whole.
    fn logs(&self) -> MutexGuard<'_, HashMap<String, Log>> {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unknown(session: &str) -> Error {
    Error::UnknownSession(session.to_owned())
}

impl Store for Memory {
    fn create(&self, session: &str) -> Result<(), Error> {
        let mut logs = self.logs();
        if logs.contains_key(session) {
            return Err(Error::SessionExists(session.to_owned()));
        }
        logs.insert(session.to_owned(), Log::default());
        Ok(())
    }

    fn fork(&self, from: &str, to: &str) -> Result<(), Error> {
        let mut logs = self.logs();
        if logs.contains_key(to) {
            return Err(Error::SessionExists(to.to_owned()));
        }
        let copy = logs.get(from).ok_or_else(|| unknown(from))?.clone();
        logs.insert(to.to_owned(), copy);
        Ok(())
    }

    fn remove(&self, session: &str) -> Result<(), Error> {
        self.logs()
            .remove(session)
            .map(drop)
            .ok_or_else(|| unknown(session))
    }

    fn check(&self, session: &str, seq: u64, chunk: &Chunk) -> Result<Appended, Error> {
        self.logs()
            .get(session)
            .ok_or_else(|| unknown(session))?
            .check(seq, chunk, &chunk.hash(), self.limits)
    }

    fn append(&self, session: &str, seq: u64, chunk: Chunk) -> Result<Appended, Error> {
        let hash = chunk.hash();
        self.logs()
            .get_mut(session)
            .ok_or_else(|| unknown(session))?
            .append(seq, chunk, hash, self.limits)
    }

    fn forget(&self, session: &str, document: &str) -> Result<(), Error> {
        self.logs()
            .get_mut(session)
            .ok_or_else(|| unknown(session))?
            .forget(document)
    }

    fn documents(&self, session: &str) -> Result<Vec<Document>, Error> {
        self.logs()
            .get(session)
            .map(|log| log.documents.clone())
            .ok_or_else(|| unknown(session))
    }

    fn head(&self, session: &str) -> Result<Head, Error> {
        self.logs()
            .get(session)
            .map(Log::head)
            .ok_or_else(|| unknown(session))
    }

    fn read(&self, session: &str, after: u64, limit: usize) -> Result<Vec<Row>, Error> {
        self.logs()
            .get(session)
            .map(|log| log.read(after, limit))
            .ok_or_else(|| unknown(session))
    }
}

/// One session's log.
#[derive(Clone, Debug, Default)]
struct Log {
    /// Row n holds `seq` n + 1.
    rows: Vec<Kept>,
    /// In the order in which they were begun; only the last one can be open.
    documents: Vec<Document>,
    /// Place of each name in `documents`.
    names: HashMap<String, usize>,
    chain: Hash,
    bytes: usize,
}

#[derive(Clone, Debug)]
struct Kept {
    hash: Hash,
    /// Place of its document in `documents`.
    document: usize,
    /// Gone once the document is forgotten.
    chunk: Option<Arc<Chunk>>,
}

impl Log {
    fn head(&self) -> Head {
        Head {
            seq: self.rows.len() as u64,
            chain: self.chain,
        }
    }

    fn open(&self) -> Option<&Document> {
        self.documents
            .last()
            .filter(|document| !document.complete && !document.forgotten)
    }

    /// What happens to a chunk: `seq` first, then its content, then the bounds.
    fn check(
        &self,
        seq: u64,
        chunk: &Chunk,
        hash: &Hash,
        limits: Limits,
    ) -> Result<Appended, Error> {
        let want = self.rows.len() as u64 + 1;
        if seq == 0 || seq > want {
            return Err(Error::Gap { want, got: seq });
        }
        let before = usize::try_from(seq - 1)
            .ok()
            .and_then(|index| self.rows.get(index));
        if let Some(row) = before {
            return if row.hash == *hash {
                Ok(Appended::Duplicate)
            } else {
                Err(Error::Conflict { seq })
            };
        }
        if chunk.document.len() > NAME_BYTES {
            return Err(Error::NameTooLong {
                bytes: chunk.document.len(),
                limit: NAME_BYTES,
            });
        }
        let open = self.open();
        let continues =
            open.filter(|open| chunk.document.is_empty() || chunk.document == open.name);
        let empty = chunk.content.bytes() == 0;
        if empty && (continues.is_none() || !chunk.end_of_document) {
            return Err(Error::EmptyChunk);
        }
        let place = match continues {
            Some(document) => {
                if !empty && document.kind != chunk.content.kind() {
                    return Err(Error::MixedContent(document.name.clone()));
                }
                Place {
                    document: document.name.clone(),
                    begins: false,
                    ends_open: false,
                }
            }
            None => {
                let document = if chunk.document.is_empty() {
                    format!("doc-{seq}")
                } else {
                    chunk.document.clone()
                };
                if self.names.contains_key(&document) {
                    return Err(Error::NameUsed(document));
                }
                if self.documents.len() >= limits.max_documents {
                    return Err(Error::Full {
                        what: "documents",
                        limit: limits.max_documents,
                    });
                }
                Place {
                    document,
                    begins: true,
                    ends_open: open.is_some(),
                }
            }
        };
        if self.rows.len() >= limits.max_chunks {
            return Err(Error::Full {
                what: "chunks",
                limit: limits.max_chunks,
            });
        }
        if chunk.content.bytes() > limits.max_bytes.saturating_sub(self.bytes) {
            return Err(Error::Full {
                what: "bytes",
                limit: limits.max_bytes,
            });
        }
        Ok(Appended::Accepted(place))
    }

    fn append(
        &mut self,
        seq: u64,
        chunk: Chunk,
        hash: Hash,
        limits: Limits,
    ) -> Result<Appended, Error> {
        let appended = self.check(seq, &chunk, &hash, limits)?;
        let Appended::Accepted(place) = &appended else {
            return Ok(appended);
        };
        if place.begins {
            if let Some(open) = self.documents.last_mut().filter(|_| place.ends_open) {
                open.complete = true;
            }
            self.names
                .insert(place.document.clone(), self.documents.len());
            self.documents.push(Document {
                name: place.document.clone(),
                kind: chunk.content.kind(),
                complete: false,
                forgotten: false,
                first_seq: seq,
                last_seq: seq,
            });
        }
        if let Some(document) = self.documents.last_mut() {
            document.last_seq = seq;
            document.complete = chunk.end_of_document;
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.chain);
        hasher.update(&hash);
        self.chain = *hasher.finalize().as_bytes();
        self.bytes += chunk.content.bytes();
        self.rows.push(Kept {
            hash,
            document: self.documents.len() - 1,
            chunk: Some(Arc::new(chunk)),
        });
        Ok(appended)
    }

    fn forget(&mut self, name: &str) -> Result<(), Error> {
        let unknown = || Error::UnknownDocument(name.to_owned());
        let index = *self.names.get(name).ok_or_else(unknown)?;
        let document = self
            .documents
            .get_mut(index)
            .filter(|document| !document.forgotten)
            .ok_or_else(unknown)?;
        document.forgotten = true;
        for row in self.rows.iter_mut().filter(|row| row.document == index) {
            if let Some(chunk) = row.chunk.take() {
                self.bytes -= chunk.content.bytes();
            }
        }
        Ok(())
    }

    fn read(&self, after: u64, limit: usize) -> Vec<Row> {
        let after = usize::try_from(after).unwrap_or(usize::MAX);
        let rows = self.rows.iter().enumerate().skip(after);
        rows.filter_map(|(index, row)| {
            let document = self.documents.get(row.document)?.name.clone();
            Some(Row {
                seq: index as u64 + 1,
                document,
                chunk: Arc::clone(row.chunk.as_ref()?),
            })
        })
        .take(limit)
        .collect()
    }
}
