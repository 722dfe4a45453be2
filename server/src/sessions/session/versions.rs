//! Versions that are asked for, and documents that are forgotten.
//!
//! Start at [`Session::publish`].

use engine::{Command, Seq, Version};
use tokio::sync::oneshot;

use super::{Session, Writer, locked, taken};
use crate::{engine_thread::Attach, sessions::feed::Item, status::Error};

impl Session {
    /// Asks for a version of all that was accepted; returns the `seq` that will be in it, or `None` if nothing ever was. Waits
    /// for room, as a chunk does; nothing is asked if the wait is given up.
    ///
    /// # Errors
    /// [`Error::Text`] if the held-back end cannot be tokenised; [`Error::UnknownSession`] if the session is gone.
    pub async fn publish(&self) -> Result<Option<u64>, Error> {
        let writer = self.writer().await?;
        let Some((seq, command, tokens)) = self.publication(&writer, true)? else {
            return Ok(None);
        };
        let room = self.wait_for_room(tokens).await?;
        self.put(Item {
            commands: vec![command],
            attach: Attach::Nobody,
            room: taken(room),
        });
        Ok(Some(seq))
    }

    /// As `publish`, unless somebody writes just now: `false` then. The feed itself asks, so it waits for no room: there is one
    /// such publication at most.
    pub(crate) fn try_publish(&self) -> Result<bool, Error> {
        let Ok(writer) = self.writer.try_lock() else {
            return Ok(false);
        };
        if let Some((_, command, _)) = self.publication(&writer, false)? {
            self.put(Item {
                commands: vec![command],
                attach: Attach::Nobody,
                room: 0,
            });
        }
        Ok(true)
    }

    /// The command for a version of all that was accepted, with its `seq` and its tokens; `asked`: who asked is to be told if it
    /// does not fit.
    fn publication(
        &self,
        writer: &Writer,
        asked: bool,
    ) -> Result<Option<(u64, Command, usize)>, Error> {
        if writer.accepted == 0 {
            return Ok(None);
        }
        let tokenizer = writer
            .open
            .as_ref()
            .and_then(|open| open.tokenizer.as_ref());
        let provisional = match tokenizer {
            Some(tokenizer) => tokenizer.provisional(&self.rooms.rules.document_suffix)?,
            None => Vec::new(),
        };
        let tokens = provisional.len();
        let command = Command::Publish {
            session: self.id,
            seq: Seq(writer.accepted),
            provisional,
            asked,
        };
        Ok(Some((writer.accepted, command, tokens)))
    }

    /// Forgets a document. When `late` resolves, it is not waited for any more: who writes is waited for first, and nothing is done
    /// if that is late; then the engine, which forgets it all the same.
    ///
    /// # Errors
    /// [`Error::UnknownDocument`], [`Error::Deadline`], what the engine says, [`Error::EngineStopped`].
    pub async fn forget(
        &self,
        document: &str,
        late: impl Future<Output = ()>,
    ) -> Result<(Version, engine::Digest), Error> {
        let mut late = std::pin::pin!(late);
        let mut writer = tokio::select! {
            biased;
            () = &mut late => return Err(Error::Deadline("nothing is forgotten yet")),
            writer = self.writer() => writer?,
        };
        let unknown = || Error::UnknownDocument(document.to_owned());
        let (id, tokens) = {
            let documents = locked(&self.documents);
            let known = documents
                .iter()
                .find(|known| known.name == document)
                .ok_or_else(unknown)?;
            (known.id, known.tokens)
        };
        self.rooms
            .store
            .forget(&self.name, document)
            .map_err(|_| unknown())?;
        locked(&self.documents).retain(|known| known.id != id);
        if writer.open.as_ref().is_some_and(|open| open.id == id) {
            writer.open = None;
            // The engine is never told of what is held back.
            self.rooms.link.account().ends(writer.whole);
            writer.whole = writer.accepted;
        }
        writer.tokens = writer.tokens.saturating_sub(tokens);
        let (done, forgotten) = oneshot::channel();
        let command = Command::Forget {
            session: self.id,
            document: id,
        };
        self.put(Item {
            commands: vec![command],
            attach: Attach::Forget(done),
            room: 0,
        });
        drop(writer);
        let forgotten = tokio::select! {
            forgotten = forgotten => forgotten,
            () = &mut late => return Err(Error::Deadline("the document is being forgotten")),
        };
        match forgotten {
            Ok(done) => done.map_err(Error::Context),
            Err(_) if self.rooms.link.progress.borrow().closed => {
                Err(Error::UnknownSession(self.name.clone()))
            }
            Err(_) => Err(Error::EngineStopped),
        }
    }
}
