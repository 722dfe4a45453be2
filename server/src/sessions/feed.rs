//! How a session's commands reach the engine: in order, as fast as the engine reads, and a publication when it is quiet.
//!
//! One task a session. What waits here is bounded by the session's room, what the engine holds unread by its credit. Start at
//! [`run`].

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use engine::{Command, Seq, TokenId};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};

use super::session::Session;
use crate::engine_thread::{Attach, Handle, Link};

/// How long the task sleeps when nothing is to be published.
const LONG: Duration = Duration::from_secs(3600);

/// Commands that belong together, and the room that they took.
pub(super) struct Item {
    pub(super) commands: Vec<Command>,
    /// Whom the last command's events concern.
    pub(super) attach: Attach,
    /// Tokens' room to be given back once they are fed.
    pub(super) room: usize,
}

impl Item {
    /// The item never reaches the engine: a copy that would have begun with it is gone.
    pub(super) fn abandon(self) {
        if let Attach::Session(link) = self.attach {
            link.progress.send_modify(|progress| progress.closed = true);
        }
    }
}

/// Feeds the engine until the session has ended. All chunks up to `fed` are fed already.
pub(super) async fn run(
    session: Weak<Session>,
    engine: Handle,
    link: Arc<Link>,
    fed: Seq,
    mut items: mpsc::UnboundedReceiver<Item>,
) {
    run_to_the_end(session, engine, link, fed, &mut items).await;
    items.close();
    while let Ok(item) = items.try_recv() {
        item.abandon();
    }
}

async fn run_to_the_end(
    session: Weak<Session>,
    engine: Handle,
    link: Arc<Link>,
    mut fed: Seq,
    items: &mut mpsc::UnboundedReceiver<Item>,
) {
    let idle = session.upgrade().and_then(|session| session.idle_publish());
    let mut due = None;
    loop {
        let quiet = due.unwrap_or_else(|| Instant::now() + LONG);
        tokio::select! {
            biased;
            item = items.recv() => {
                let Some(item) = item else { return };
                if matches!(item.attach, Attach::Session(_)) && link.credit.is_closed() {
                    // What came before may have been passed over: a copy would have a hole.
                    item.abandon();
                    continue;
                }
                let last = item.commands.iter().any(|command| matches!(command, Command::Close { .. }));
                let publishes = item.commands.iter().any(|command| matches!(command, Command::Publish { .. }));
                let chunk = matches!(item.attach, Attach::Nobody);
                if feed(&engine, &link, &mut fed, item.commands, item.attach).await.is_none() || last {
                    return;
                }
                if let Some(session) = session.upgrade() {
                    session.free(item.room);
                }
                if chunk {
                    due = idle.filter(|_| !publishes).map(|idle| Instant::now() + idle);
                }
            }
            () = sleep_until(quiet) => {
                let Some(session) = session.upgrade() else { return };
                let published = due.is_none() || session.try_publish().unwrap_or_else(|error| {
                    tracing::warn!(session = session.name, %error, "cannot publish");
                    true
                });
                // Somebody writes: it is not quiet after all.
                due = idle.filter(|_| !published).map(|idle| Instant::now() + idle);
            }
        }
    }
}

/// Sends the commands; `None` if the engine is gone. `fed`: all chunks up to it are fed.
async fn feed(
    engine: &Handle,
    link: &Link,
    fed: &mut Seq,
    commands: Vec<Command>,
    attach: Attach,
) -> Option<()> {
    let mut attach = Some(attach);
    let count = commands.len();
    for (index, command) in commands.into_iter().enumerate() {
        let attach = attach
            .take_if(|_| index + 1 == count)
            .unwrap_or(Attach::Nobody);
        let Command::Ingest {
            session,
            seq,
            document,
            mut tokens,
            end_of_document,
        } = command
        else {
            engine.send(command, attach).await.ok()?;
            continue;
        };
        loop {
            let rest = tokens.split_off(tokens.len().min(link.piece));
            let piece: Vec<TokenId> = std::mem::replace(&mut tokens, rest);
            // A closed session's credit is closed, too: nothing of it need be read any more.
            let Ok(credit) = link
                .credit
                .acquire_many(u32::try_from(piece.len()).unwrap_or(u32::MAX))
                .await
            else {
                return Some(());
            };
            credit.forget();
            let last = tokens.is_empty();
            // A piece that is not the last completes no chunk.
            let seq = if last { seq } else { *fed };
            let end_of_document = last && end_of_document;
            let piece = Command::Ingest {
                session,
                seq,
                document,
                tokens: piece,
                end_of_document,
            };
            engine.send(piece, Attach::Nobody).await.ok()?;
            if last {
                *fed = seq;
                break;
            }
        }
    }
    Some(())
}
