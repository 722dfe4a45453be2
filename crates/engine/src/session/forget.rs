//! Forgetting: a document is left out, and what is left is folded again, or read again.
//!
//! Start at [`Session::forget`].

use std::cmp::Ordering;

use generator::Strategy;

use super::{Asks, Barrier, Context, Session};
use crate::{
    document::Place,
    error::SessionError,
    event::Event,
    ids::{DocumentId, Seq},
};

impl Session {
    /// Forgets a document, as if it had never come.
    pub(crate) fn forget(
        &mut self,
        document: DocumentId,
        cx: &mut Context<'_>,
    ) -> Result<(), SessionError> {
        self.usable()?;
        let Some(index) = self.documents.iter().position(|known| known.id == document) else {
            return Err(SessionError::UnknownDocument { document });
        };
        // What is being read out may hold it.
        self.folding = None;
        let rereading = self.rereading();
        let target = rereading.unwrap_or_else(|| self.read_place());
        let removed = self.documents.remove(index);
        if removed.waiting() > 0 {
            cx.events.push(Event::Encoded {
                session: self.id,
                tokens: removed.waiting(),
            });
        }
        let begun = index <= self.current;
        let again = match rereading {
            Some(target) => removed.number <= target.document,
            None => self.strategy == Strategy::Sequential && index < self.current,
        };
        if !begun && !again {
            // No version holds any of it.
            cx.events.push(self.forgotten(document));
            return Ok(());
        }
        let done = if again {
            let at = self.rereads();
            self.barriers.insert(
                at,
                Barrier {
                    place: target,
                    asks: Asks::Reread {
                        forgotten: Some(document),
                    },
                },
            );
            self.leave(index, cx)
        } else {
            let left = self.leave(index, cx);
            left.and_then(|()| self.renew_without(cx))
                .map(|()| cx.events.push(self.forgotten(document)))
        };
        if let Err(error) = done {
            self.fail(&error.to_string(), cx);
            return Err(SessionError::from_state(&error));
        }
        Ok(())
    }

    /// Leaves a removed document, which stood at `index`, out of what was read.
    fn leave(&mut self, index: usize, cx: &mut Context<'_>) -> Result<(), generator::Error> {
        match index.cmp(&self.current) {
            Ordering::Greater => return Ok(()),
            Ordering::Equal => {
                self.drop_reading(cx.allocator);
                return Ok(());
            }
            Ordering::Less => {}
        }
        self.folded = cx.generator.new_state()?;
        if self.strategy == Strategy::Sequential {
            self.drop_reading(cx.allocator);
            self.current = 0;
            return Ok(());
        }
        self.current -= 1;
        for document in self.documents.iter().take(self.current) {
            if let Some(state) = document.state.as_ref().filter(|state| !state.is_empty()) {
                self.folded.add(state, 1.0)?;
            }
        }
        cx.machine.gather(&mut self.folded)?;
        Ok(())
    }

    /// Publishes what is left without a forgotten document, whether its core fits or not: what is forgotten must not go on
    /// answering.
    pub(super) fn renew_without(&mut self, cx: &Context<'_>) -> Result<(), generator::Error> {
        self.settle_window()?;
        let fold = self.fold(self.reading.as_ref(), cx.machine)?;
        self.make_newest(fold, Seq(0), cx.cores);
        Ok(())
    }

    /// While a sequential session reads again: the place up to which it had been read before.
    pub(super) fn rereading(&self) -> Option<Place> {
        self.barriers
            .iter()
            .take(self.rereads())
            .map(|barrier| barrier.place)
            .max()
    }

    /// How many barriers wait for a second reading; they stand before all others.
    fn rereads(&self) -> usize {
        self.barriers
            .iter()
            .take_while(|barrier| matches!(barrier.asks, Asks::Reread { .. } | Asks::Remade))
            .count()
    }

    pub(super) fn forgotten(&self, document: DocumentId) -> Event {
        let (session, newest) = (self.id, self.facts());
        Event::Forgotten {
            session,
            document,
            newest,
        }
    }
}
