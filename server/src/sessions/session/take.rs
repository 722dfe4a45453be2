//! A chunk's way through a session: checked, tokenised, committed to the log, and only then acknowledged and fed.
//!
//! All that can fail or wait comes before the commit; behind it nothing does. Start at [`Session::take`].

use std::{collections::VecDeque, sync::Arc};

use engine::{Command, DocumentId, Seq, SessionError, Strategy, TokenId};
use lm::text::{DocumentTokenizer, Text, TextDecoder};
use relevance::Spoken;
use store::{Appended, Chunk, Content, Place};

use super::{Document, INLINE_BYTES, Open, Rules, Session, Writer, locked, taken};
use crate::{
    engine_thread::Attach,
    sessions::feed::Item,
    status::{Error, Violation},
};

/// What a chunk comes to, worked out before anything is changed.
struct Plan {
    /// The last tokens of the document that ends because another begins, and what it speaks of with them.
    closing: Option<(Vec<TokenId>, Spoken)>,
    /// The chunk's tokens, and those that were held back before it.
    tokens: Vec<TokenId>,
    /// The document's tokenizer behind the chunk; none for ids.
    tokenizer: Option<DocumentTokenizer>,
    /// The most tokens that are still held back, with the document's suffix: one for each byte.
    held: usize,
    /// What the document speaks of with the chunk, from the end of what it spoke of before.
    onward: Spoken,
    /// The text of the document's tokens, behind the chunk.
    decoder: TextDecoder,
}

impl Plan {
    fn count(&self) -> usize {
        self.tokens.len() + self.closing.as_ref().map_or(0, |(tokens, _)| tokens.len())
    }
}

/// A chunk was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Whether it had been taken before.
    pub duplicate: bool,
}

impl Session {
    /// Takes a chunk: when this returns, it is in the log, and will become part of the state.
    ///
    /// # Errors
    /// [`Error::Store`] about `seq`, document or bounds, [`Error::Invalid`] about the content, [`Error::Context`] if the
    /// session can take no more. Nothing of the chunk is applied then.
    pub async fn take(&self, seq: u64, chunk: Chunk) -> Result<Taken, Error> {
        let rules = &self.rooms.rules;
        let bytes = chunk.content.bytes();
        if bytes > rules.chunk_bytes {
            let why = format!("has {bytes} bytes, more than {}", rules.chunk_bytes);
            return Err(Error::Invalid(vec![Violation::new(
                field(&chunk.content),
                why,
            )]));
        }
        let mut writer = self.writer().await?;
        let place = match self.rooms.store.check(&self.name, seq, &chunk)? {
            Appended::Duplicate => return Ok(Taken { duplicate: true }),
            Appended::Accepted(place) => place,
        };
        if let Some(error) = self.rooms.link.progress.borrow().failed.clone() {
            return Err(Error::Context(error));
        }
        let plan = self.plan(&writer, &chunk, &place).await?;
        // Waits while the engine is behind: the client is slowed down here.
        let room = self.wait_for_room(plan.count()).await?;
        let end = chunk.end_of_document;
        if place.begins {
            self.rooms
                .link
                .account()
                .begin(seq)
                .map_err(Error::Context)?;
        }
        if let Err(error) = self.rooms.store.append(&self.name, seq, chunk) {
            if place.begins {
                self.rooms.link.account().abandon();
            }
            return Err(error.into());
        }
        // From here on nothing waits and nothing fails.
        let commands = self.apply(&mut writer, plan, seq, bytes, end, &place);
        self.rooms
            .link
            .progress
            .send_modify(|progress| progress.accepted = seq);
        self.put(Item {
            commands,
            attach: Attach::Nobody,
            room: taken(room),
        });
        Ok(Taken { duplicate: false })
    }

    /// Works out what a new chunk comes to.
    async fn plan(&self, writer: &Writer, chunk: &Chunk, place: &Place) -> Result<Plan, Error> {
        let rules = &self.rooms.rules;
        if place.begins && self.document_count() >= rules.documents {
            return Err(Error::Store(store::Error::Full {
                what: "documents",
                limit: rules.documents,
            }));
        }
        let tokenizer = writer.open.as_ref().and_then(|open| open.tokenizer.clone());
        let open = match (locked(&self.documents).last(), &writer.open) {
            (Some(document), Some(open)) => Some((document.spoken.onward(), open.decoder.clone())),
            _ => None,
        };
        let held = tokenizer.as_ref().map_or(0, DocumentTokenizer::held_bytes);
        let first = writer.next_document == 0;
        let plan = if chunk.content.bytes() + held <= INLINE_BYTES {
            plan(
                tokenizer,
                open,
                first,
                rules,
                &self.rooms.text,
                chunk,
                place,
            )?
        } else {
            let (rules, text) = (Arc::clone(rules), self.rooms.text.clone());
            let (chunk, place) = (chunk.clone(), place.clone());
            let work = move || plan(tokenizer, open, first, &rules, &text, &chunk, &place);
            tokio::task::spawn_blocking(work)
                .await
                .map_err(|_| Error::Internal("tokenising panicked"))??
        };
        let fits = self.fits(writer, &plan, place, plan.held);
        if fits.is_ok() || plan.held == 0 {
            return fits.map(|()| plan);
        }
        // As many tokens as bytes are the worst case: look how many there are.
        let (tokenizer, suffix) = (plan.tokenizer.clone(), rules.document_suffix.clone());
        let count = move || match tokenizer {
            Some(tokenizer) => tokenizer.provisional(&suffix).map(|held| held.len()),
            None => Ok(0),
        };
        let held = if plan.held <= INLINE_BYTES {
            count()?
        } else {
            tokio::task::spawn_blocking(count)
                .await
                .map_err(|_| Error::Internal("tokenising panicked"))??
        };
        self.fits(writer, &plan, place, held)?;
        Ok(plan)
    }

    /// Whether a chunk of so many held-back tokens fits the session and, where it is one window, the document.
    fn fits(&self, writer: &Writer, plan: &Plan, place: &Place, held: usize) -> Result<(), Error> {
        let rules = &self.rooms.rules;
        let tokens = writer
            .tokens
            .saturating_add(plan.count())
            .saturating_add(held);
        if tokens > rules.session_tokens {
            return Err(Error::Context(SessionError::TooManyTokens {
                tokens,
                limit: rules.session_tokens,
            }));
        }
        if self.strategy == Strategy::Concat {
            let limit = rules.concat_tokens;
            let before = writer.open.as_ref().map_or(0, |open| open.tokens);
            let closed = plan
                .closing
                .as_ref()
                .map_or(0, |(closing, _)| before + closing.len());
            let tokens = plan.tokens.len() + held + if place.begins { 0 } else { before };
            if let Some(tokens) = [closed, tokens].into_iter().find(|tokens| *tokens > limit) {
                return Err(Error::Context(SessionError::DocumentTooLong {
                    tokens,
                    limit,
                }));
            }
        }
        Ok(())
    }

    /// Makes the plan true, and returns what the engine is to be told.
    fn apply(
        &self,
        writer: &mut Writer,
        plan: Plan,
        seq: u64,
        bytes: usize,
        end: bool,
        place: &Place,
    ) -> Vec<Command> {
        let session = self.id;
        let mut documents = locked(&self.documents);
        let mut commands = Vec::with_capacity(2);
        writer.tokens += plan.count();
        if let (Some((tokens, onward)), Some(open)) =
            (plan.closing, writer.open.take_if(|_| place.begins))
        {
            if let Some(last) = documents.last_mut() {
                Arc::make_mut(&mut last.spoken).extend(onward);
                last.tokens += tokens.len();
                last.complete = true;
            }
            let (seq, document) = (Seq(writer.accepted), open.id);
            commands.push(Command::Ingest {
                session,
                seq,
                document,
                tokens,
                end_of_document: true,
            });
            writer.whole = writer.accepted;
        }
        if place.begins {
            let id = DocumentId(writer.next_document);
            writer.next_document += 1;
            writer.open = Some(Open {
                id,
                tokenizer: None,
                decoder: plan.decoder.clone(),
                pending: VecDeque::new(),
                bytes: 0,
                tokens: 0,
            });
            let name = place.document.clone();
            documents.push(Document {
                name,
                id,
                tokens: 0,
                complete: false,
                first_seq: seq,
                last_seq: seq,
                spoken: Arc::default(),
            });
        }
        writer.accepted = seq;
        // `place` is in an open document: the one that was open, or the one that has just begun.
        let Some(open) = writer.open.as_mut() else {
            return commands;
        };
        open.tokens += plan.tokens.len();
        if let Some(last) = documents.last_mut() {
            Arc::make_mut(&mut last.spoken).extend(plan.onward);
            last.tokens = open.tokens;
            last.complete = end;
            last.last_seq = seq;
        }
        open.bytes += bytes;
        open.pending.push_back((seq, open.bytes));
        let committed = match &plan.tokenizer {
            Some(tokenizer) if !end => tokenizer.committed_bytes(),
            _ => usize::MAX,
        };
        let before = writer.whole;
        while let Some((seq, _)) = open.pending.pop_front_if(|(_, end)| *end <= committed) {
            writer.whole = seq;
        }
        open.tokenizer = plan.tokenizer;
        open.decoder = plan.decoder;
        let document = open.id;
        if end {
            writer.open = None;
        }
        self.rooms.link.account().told(seq, !end);
        if place.begins || end || !plan.tokens.is_empty() || writer.whole > before {
            let seq = Seq(writer.whole);
            commands.push(Command::Ingest {
                session,
                seq,
                document,
                tokens: plan.tokens,
                end_of_document: end,
            });
        }
        commands
    }
}

fn field(content: &Content) -> &'static str {
    match content {
        Content::Text(_) => "chunk.text",
        Content::Ids(_) => "chunk.token_ids",
    }
}

/// Tokenises a chunk behind what its document holds so far. `open`: what the open document speaks of, and the text of its tokens; `first` says that nothing came before it in the session.
fn plan(
    tokenizer: Option<DocumentTokenizer>,
    open: Option<(Spoken, TextDecoder)>,
    first: bool,
    rules: &Rules,
    text: &Text,
    chunk: &Chunk,
    place: &Place,
) -> Result<Plan, Error> {
    let suffix = rules.document_suffix.as_str();
    let mut tokens = Vec::new();
    let mut closing = None;
    let mut tokenizer = tokenizer;
    let (mut onward, mut decoder) = open.unwrap_or_else(|| (Spoken::default(), text.decoder()));
    if place.begins {
        let before = tokenizer.take();
        if place.ends_open {
            let last = before.map_or_else(|| Ok(Vec::new()), |before| before.finish(suffix))?;
            hear(&mut onward, &mut decoder, &last);
            onward.ahead("");
            closing = Some((last, onward));
        }
        (onward, decoder) = (Spoken::default(), text.decoder());
        if let Content::Text(_) = chunk.content {
            tokenizer = Some(text.document());
            tokens.extend(rules.bos.filter(|_| first));
        }
    }
    match (&chunk.content, tokenizer.as_mut()) {
        (Content::Text(text), Some(tokenizer)) => tokens.extend(tokenizer.push(text)?),
        // An empty text that ends a document of ids.
        (Content::Text(_), None) => {}
        (Content::Ids(ids), _) => tokens.extend(checked("chunk.token_ids", ids, rules.vocab)?),
    }
    let mut held = 0;
    if chunk.end_of_document {
        if let Some(tokenizer) = tokenizer.take() {
            tokens.extend(tokenizer.finish(suffix)?);
        }
    } else if let Some(tokenizer) = &tokenizer {
        held = tokenizer.held_bytes() + suffix.len(); // a token has at least one byte
    }
    hear(&mut onward, &mut decoder, &tokens);
    onward.ahead(tokenizer.as_ref().map_or("", DocumentTokenizer::held));
    Ok(Plan {
        closing,
        tokens,
        tokenizer,
        held,
        onward,
        decoder,
    })
}

/// Goes on with the text of tokens; ids that the tokenizer does not know have none.
fn hear(spoken: &mut Spoken, decoder: &mut TextDecoder, tokens: &[TokenId]) {
    for &token in tokens {
        spoken.hear(&decoder.push(token).unwrap_or_default(), 1);
    }
}

/// Ids of the vocabulary.
///
/// # Errors
/// [`Error::Invalid`] names the first that is none.
pub fn checked(field: &str, ids: &[u32], vocab: usize) -> Result<Vec<TokenId>, Error> {
    let wrong = ids.iter().position(|id| *id as usize >= vocab);
    if let Some((index, id)) = wrong.and_then(|index| Some((index, ids.get(index)?))) {
        let why = format!("is {id}, not below the vocabulary size {vocab}");
        return Err(Error::Invalid(vec![Violation::new(
            format!("{field}.ids[{index}]"),
            why,
        )]));
    }
    Ok(ids.iter().copied().map(TokenId).collect())
}
