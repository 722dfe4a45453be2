//! What a session is told: chunks and publishes, checked and put in line.
//!
//! Nothing is read here. Start at [`Session::ingest`].

use generator::Strategy;

use super::{Asks, Barrier, Session};
use crate::{
    document::{Document, Place},
    error::SessionError,
    ids::{DocumentId, Seq, TokenId},
};

impl Session {
    /// Why a chunk was refused before, as an error.
    pub(crate) fn takes_chunks(&self) -> Result<(), SessionError> {
        self.refused.clone().map_or(Ok(()), Err)
    }

    /// Takes no more chunks: one was refused.
    pub(crate) fn refuse(&mut self, error: &SessionError) {
        self.refused = Some(error.clone());
    }

    /// Takes a chunk in. `begins` asks whether the states may grow by another document's.
    pub(crate) fn ingest(
        &mut self,
        seq: Seq,
        document: DocumentId,
        tokens: &[TokenId],
        end_of_document: bool,
        begins: impl FnOnce() -> Result<(), SessionError>,
    ) -> Result<(), SessionError> {
        self.usable()?;
        self.check_tokens(tokens)?;
        let open = self.open_document();
        if let Some(open) = open.filter(|open| open.id != document) {
            return Err(SessionError::DocumentOpen { open: open.id });
        }
        self.check_lengths(open.map_or(0, |open| open.tokens.len()), tokens.len())?;
        if open.is_none() {
            if self.documents.iter().any(|known| known.id == document) {
                return Err(SessionError::DocumentClosed { document });
            }
            let limit = self.bounds.max_documents;
            if self.documents.len() >= limit {
                return Err(SessionError::TooManyDocuments { limit });
            }
            begins()?;
            self.documents
                .push(Document::new(document, self.next_number));
            self.next_number += 1;
        }
        let Some(open) = self.documents.last_mut() else {
            return Ok(());
        };
        open.tokens.extend_from_slice(tokens);
        open.complete = end_of_document;
        let place = open.end();
        let seq = self.marks.back().map_or(seq, |&(_, last)| seq.max(last));
        match self.marks.back_mut() {
            Some(mark) if mark.0 == place => mark.1 = seq,
            _ => self.marks.push_back((place, seq)),
        }
        Ok(())
    }

    /// Asks for a version of all that has come and `provisional` behind it.
    pub(crate) fn publish(
        &mut self,
        seq: Seq,
        provisional: Vec<TokenId>,
        asked: bool,
    ) -> Result<(), SessionError> {
        self.usable()?;
        let (seq, provisional) = if self.refused.is_some() {
            let told = self.marks.back().map_or(self.read, |&(_, told)| told);
            (seq.min(told), Vec::new())
        } else {
            (seq, provisional)
        };
        self.check_tokens(&provisional)?;
        if !provisional.is_empty() {
            let Some(open) = self.open_document() else {
                return Err(SessionError::NoOpenDocument);
            };
            self.check_lengths(open.tokens.len(), provisional.len())?;
        }
        let place = self.log_end();
        // The one at the front may be under way; of those behind it one is enough.
        let owed = self
            .barriers
            .iter()
            .rev()
            .take_while(|barrier| matches!(barrier.asks, Asks::Publish { .. }))
            .count();
        let (mut least, mut asked) = (seq, asked);
        if owed >= 2
            && let Some(Barrier {
                asks:
                    Asks::Publish {
                        seq: earlier,
                        asked: before,
                        ..
                    },
                ..
            }) = self.barriers.pop_back()
        {
            least = seq.max(earlier);
            asked |= before;
        }
        self.barriers.push_back(Barrier {
            place,
            asks: Asks::Publish {
                seq: least,
                provisional,
                asked,
            },
        });
        Ok(())
    }

    pub(super) fn usable(&self) -> Result<(), SessionError> {
        match &self.failed {
            Some(reason) => Err(SessionError::ReadOut {
                reason: reason.clone(),
            }),
            None => Ok(()),
        }
    }

    fn check_tokens(&self, tokens: &[TokenId]) -> Result<(), SessionError> {
        let vocab = self.bounds.vocab;
        match tokens.iter().find(|token| token.0 as usize >= vocab) {
            Some(&token) => Err(SessionError::TokenOutOfRange { token, vocab }),
            None => Ok(()),
        }
    }

    /// Whether so many more tokens fit a document that has some, and the session.
    fn check_lengths(&self, document: usize, more: usize) -> Result<(), SessionError> {
        let (tokens, limit) = (document.saturating_add(more), self.bounds.window_limit);
        if self.strategy == Strategy::Concat && tokens > limit {
            return Err(SessionError::DocumentTooLong { tokens, limit });
        }
        let all: usize = self
            .documents
            .iter()
            .map(|document| document.tokens.len())
            .sum();
        let (tokens, limit) = (all.saturating_add(more), self.bounds.max_session_tokens);
        if tokens > limit {
            return Err(SessionError::TooManyTokens { tokens, limit });
        }
        Ok(())
    }

    /// The place behind all that has come.
    pub(super) fn log_end(&self) -> Place {
        match self.open_document() {
            Some(open) => open.end(),
            None => Place {
                document: self.next_number,
                token: 0,
            },
        }
    }
}
