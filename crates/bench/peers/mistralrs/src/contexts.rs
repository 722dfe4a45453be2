//! Sessions whose context is kept as text, for the prompts.
//!
//! Bounded in sessions and in bytes. Says in terms of the contract what is wrong; knows nothing of a model. Start at [`Contexts`].

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    ops::Bound,
};

use imprint_proto::v1::{Document, IngestChunk, Session, ingest_chunk::Content};
use tonic::Status;

/// What sessions may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) sessions: usize,
    /// Bytes of text of a session, names of documents included.
    pub(crate) bytes: usize,
    /// Chunks of a session: what each was is remembered.
    pub(crate) chunks: usize,
}

/// All sessions, oldest first.
#[derive(Debug)]
pub(crate) struct Contexts {
    bounds: Bounds,
    model: String,
    created: u64,
    sessions: BTreeMap<u64, Context>,
}

#[derive(Clone, Debug, Default)]
struct Context {
    documents: Vec<Told>,
    /// Names of documents that were forgotten.
    forgotten: Vec<String>,
    /// A hash of each chunk that was taken.
    chunks: Vec<u64>,
    version: u64,
    /// Chunks in the newest version.
    applied: usize,
    forked_from: String,
}

/// A document.
#[derive(Clone, Debug)]
struct Told {
    name: String,
    text: String,
    complete: bool,
    first: u64,
    last: u64,
}

impl Contexts {
    /// No session yet.
    pub(crate) fn new(model: String, bounds: Bounds) -> Self {
        Self {
            bounds,
            model,
            created: 0,
            sessions: BTreeMap::new(),
        }
    }

    /// A session without context, or a copy of another.
    pub(crate) fn create(&mut self, of: Option<&str>) -> Result<Session, Status> {
        let context = match of {
            None => Context::default(),
            Some(of) => Context {
                forked_from: of.to_owned(),
                ..self.context(of)?.clone()
            },
        };
        if self.sessions.len() >= self.bounds.sessions {
            return Err(Status::resource_exhausted("there is no room for a session"));
        }
        self.created += 1;
        self.sessions.insert(self.created, context);
        self.session(&name(self.created))
    }

    /// Ends a session.
    pub(crate) fn delete(&mut self, id: &str) -> Result<(), Status> {
        self.context(id)?;
        if let Some(number) = number(id) {
            self.sessions.remove(&number);
        }
        Ok(())
    }

    /// A session as it is.
    pub(crate) fn session(&self, id: &str) -> Result<Session, Status> {
        let context = self.context(id)?;
        Ok(Session {
            session_id: id.to_owned(),
            model: self.model.clone(),
            adapter_version: context.version,
            accepted_seq: context.chunks.len() as u64,
            applied_seq: context.applied as u64,
            documents: u32::try_from(context.documents.len()).unwrap_or(u32::MAX),
            state_bytes: context.bytes() as u64,
            forked_from: context.forked_from.clone(),
            ..Session::default()
        })
    }

    /// The sessions behind the one of this name, oldest first, and whether there are more.
    pub(crate) fn page(&self, after: &str, most: usize) -> Result<(Vec<Session>, bool), Status> {
        let after = match after {
            "" => 0,
            after => number(after).ok_or_else(|| Status::invalid_argument("page_token"))?,
        };
        let rest = self
            .sessions
            .range((Bound::Excluded(after), Bound::Unbounded));
        let names: Vec<_> = rest.take(most + 1).map(|(&id, _)| name(id)).collect();
        let more = names.len() > most;
        let page: Result<_, _> = names.iter().take(most).map(|id| self.session(id)).collect();
        Ok((page?, more))
    }

    /// The documents of a session, in order.
    pub(crate) fn documents(&self, id: &str) -> Result<Vec<Document>, Status> {
        let documents = self.context(id)?.documents.iter();
        let document = |told: &Told| Document {
            document_id: told.name.clone(),
            tokens: 0,
            complete: told.complete,
            first_seq: told.first,
            last_seq: told.last,
        };
        Ok(documents.map(document).collect())
    }

    /// Takes a chunk; says whether it had been taken before.
    pub(crate) fn take(&mut self, id: &str, chunk: IngestChunk) -> Result<bool, Status> {
        let bounds = self.bounds;
        let context = self.context_mut(id)?;
        let Some(Content::Text(text)) = chunk.content else {
            return Err(Status::invalid_argument("content: this engine takes text"));
        };
        let mut hash = DefaultHasher::new();
        (&text, &chunk.document_id, chunk.end_of_document).hash(&mut hash);
        let (hash, taken) = (hash.finish(), context.chunks.len());
        let known = usize::try_from(chunk.seq)
            .ok()
            .and_then(|seq| seq.checked_sub(1));
        let known = known.ok_or_else(|| Status::invalid_argument("seq counts from 1"))?;
        match context.chunks.get(known) {
            Some(&old) if old == hash => return Ok(true),
            Some(_) => return Err(Status::already_exists("another chunk had this seq")),
            None if known > taken => {
                let expected = taken + 1;
                return Err(Status::failed_precondition(format!(
                    "seq {expected} is next"
                )));
            }
            None => {}
        }
        let open = context.documents.last().filter(|told| !told.complete);
        let goes_on =
            open.is_some_and(|open| [&open.name, ""].contains(&chunk.document_id.as_str()));
        let name = match chunk.document_id {
            name if name.is_empty() => format!("doc-{}", chunk.seq),
            name => name,
        };
        let used = |old: &String| *old == name;
        let names = context.documents.iter().map(|told| &told.name);
        if !goes_on && names.chain(&context.forgotten).any(used) {
            return Err(Status::failed_precondition(
                "a document of this name has ended",
            ));
        }
        let bytes = text.len() + if goes_on { 0 } else { name.len() };
        if context.bytes() + bytes > bounds.bytes || taken >= bounds.chunks {
            return Err(Status::resource_exhausted("the session's context is full"));
        }
        context.chunks.push(hash);
        if !goes_on {
            if let Some(open) = context.documents.last_mut() {
                open.complete = true;
            }
            context.documents.push(Told {
                name,
                text: String::new(),
                complete: false,
                first: chunk.seq,
                last: chunk.seq,
            });
        }
        if let Some(open) = context.documents.last_mut() {
            open.text.push_str(&text);
            open.last = chunk.seq;
            open.complete = chunk.end_of_document;
        }
        Ok(false)
    }

    /// Makes a version of all that was taken, unless the newest one has it.
    pub(crate) fn publish(&mut self, id: &str) -> Result<Session, Status> {
        let context = self.context_mut(id)?;
        if context.applied < context.chunks.len() {
            context.applied = context.chunks.len();
            context.version += 1;
        }
        self.session(id)
    }

    /// Forgets a document.
    pub(crate) fn forget(&mut self, id: &str, document: &str) -> Result<Session, Status> {
        let context = self.context_mut(id)?;
        let place = context
            .documents
            .iter()
            .position(|told| told.name == document);
        let place = place.ok_or_else(|| Status::not_found("the session has no such document"))?;
        let told = context.documents.remove(place);
        context.forgotten.push(told.name);
        context.version += 1;
        self.session(id)
    }

    /// All that a session was told so far, a document a paragraph; what no version has yet is in it, too.
    pub(crate) fn text(&self, id: &str) -> Result<String, Status> {
        let documents = self.context(id)?.documents.iter();
        let texts: Vec<_> = documents.map(|told| told.text.trim_end()).collect();
        Ok(texts.join("\n\n"))
    }

    fn context(&self, id: &str) -> Result<&Context, Status> {
        let context = number(id).and_then(|number| self.sessions.get(&number));
        context.ok_or_else(|| Status::not_found("there is no such session"))
    }

    fn context_mut(&mut self, id: &str) -> Result<&mut Context, Status> {
        let context = number(id).and_then(|number| self.sessions.get_mut(&number));
        context.ok_or_else(|| Status::not_found("there is no such session"))
    }
}

impl Context {
    fn bytes(&self) -> usize {
        let told = self
            .documents
            .iter()
            .map(|told| told.text.len() + told.name.len());
        told.chain(self.forgotten.iter().map(String::len)).sum()
    }
}

fn name(number: u64) -> String {
    format!("s_{number:026}")
}

fn number(id: &str) -> Option<u64> {
    let number = id.strip_prefix("s_")?.parse().ok()?;
    (name(number) == id).then_some(number)
}
