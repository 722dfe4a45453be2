//! ContextService: what a session is told.
//!
//! One task a stream: it takes chunks one by one and answers each, and tells of new versions in between. Answers go through a
//! short queue; while the reader is slow nothing more is taken from the client, and of several versions only the newest is told.
//! What happens to a chunk is in `sessions`. Start at `Stream::run`.

use std::{sync::Arc, time::Instant};

use imprint_proto::v1::{
    self, context_service_server::ContextService, ingest_chunk::Content, ingest_request,
    ingest_response,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::{Shared, at, reached};
use crate::{
    edge::{Phase, deadline, readable, tenant},
    engine_thread::Progress,
    places::Place,
    sessions::{Session, session::User},
    status::{Error, Violation},
};

/// Answers that wait for the reader.
const ANSWERS: usize = 32;

/// The service.
pub struct Service(pub Arc<Shared>);

type Answer = Result<v1::IngestResponse, Status>;

#[async_trait]
impl ContextService for Service {
    type IngestStream = ReceiverStream<Answer>;

    async fn ingest(
        &self,
        request: Request<Streaming<v1::IngestRequest>>,
    ) -> Result<Response<Self::IngestStream>, Status> {
        let tenant = tenant(&request)?;
        let place = self.0.streams.take(&tenant)?;
        let (answers, receiver) = mpsc::channel(ANSWERS);
        let shared = Arc::clone(&self.0);
        let deadline = deadline(&request);
        let messages = request.into_inner();
        // The answer's head goes out at once: a client may wait for it before it sends `open`.
        tokio::spawn(async move {
            let stream = Stream {
                messages,
                answers: answers.clone(),
                phase: shared.phase.clone(),
            };
            // A stream can end wherever it waits: a chunk is taken whole or not at all.
            let done = tokio::select! {
                done = stream.open(&shared, &tenant, place) => done,
                () = at(deadline) => Err(Error::Deadline("the stream's time is over").into()),
            };
            if let Err(error) = done {
                // The reader may have gone.
                drop(answers.send(Err(error)).await);
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

struct Stream {
    messages: Streaming<v1::IngestRequest>,
    answers: mpsc::Sender<Answer>,
    phase: watch::Receiver<Phase>,
}

/// How much of a session's progress a stream has told, or has found when it began.
#[derive(Clone, Copy)]
struct Told {
    announced: u64,
    refusals: u64,
}

impl Told {
    fn of(progress: &Progress) -> Self {
        let Progress {
            announced,
            refusals,
            ..
        } = *progress;
        Self {
            announced,
            refusals,
        }
    }
}

/// What a stream waits for.
enum Next {
    Message(Option<v1::IngestRequest>),
    Announced,
    Gone,
    Draining,
}

fn invalid(field: &str, why: &str) -> Status {
    Error::Invalid(vec![Violation::new(field, why)]).into()
}

impl Stream {
    async fn open(
        mut self,
        shared: &Shared,
        tenant: &crate::auth::Tenant,
        place: Place,
    ) -> Result<(), Status> {
        // A stream that says nothing keeps its place from others no longer than this.
        let late = Instant::now().checked_add(shared.open_wait);
        let first = tokio::select! {
            () = self.answers.closed() => return Ok(()),
            () = reached(&mut self.phase, Phase::Draining) => return Err(Error::ShuttingDown.into()),
            () = at(late) => return Err(Error::Deadline("`open` has not come").into()),
            first = self.messages.message() => first.map_err(readable)?,
        };
        let Some(ingest_request::Message::Open(open)) = first.and_then(|first| first.message)
        else {
            return Err(invalid("open", "must be the first message"));
        };
        let session = shared.sessions.get(tenant, &open.session_id)?;
        let user = session.user();
        let done = self.run(&session).await;
        drop::<(User, Place)>((user, place));
        done
    }

    async fn run(&mut self, session: &Arc<Session>) -> Result<(), Status> {
        let mut progress = session.progress();
        progress.mark_unchanged();
        let mut told = Told::of(&progress.borrow());
        loop {
            let next = tokio::select! {
                biased;
                () = self.answers.closed() => Next::Gone,
                changed = progress.changed() => changed.map(|()| Next::Announced).map_err(|_| Error::EngineStopped)?,
                () = reached(&mut self.phase, Phase::Draining) => Next::Draining,
                message = self.messages.message() => Next::Message(message.map_err(readable)?),
            };
            match next {
                Next::Gone => return Ok(()),
                Next::Announced => self.tell(session, &progress, &mut told).await?,
                Next::Draining => {
                    self.last(session, &mut progress, told).await?;
                    return Err(Error::ShuttingDown.into());
                }
                Next::Message(None) => return self.last(session, &mut progress, told).await,
                Next::Message(Some(message)) => {
                    // A chunk waits for room before it is taken, and for nothing behind that: giving up takes nothing.
                    let (answers, mut phase) = (self.answers.clone(), self.phase.clone());
                    tokio::select! {
                        biased;
                        done = self.handle(session, message) => done?,
                        () = answers.closed() => return Ok(()),
                        () = reached(&mut phase, Phase::Over) => return Err(Error::ShuttingDown.into()),
                    }
                }
            }
        }
    }

    async fn handle(&self, session: &Session, message: v1::IngestRequest) -> Result<(), Status> {
        match message.message {
            Some(ingest_request::Message::Chunk(chunk)) => {
                let seq = chunk.seq;
                let duplicate = session.take(seq, content(chunk)?).await?.duplicate;
                let accepted = v1::IngestAccepted { seq, duplicate };
                self.send(ingest_response::Message::Accepted(accepted))
                    .await;
                Ok(())
            }
            Some(ingest_request::Message::Flush(v1::IngestFlush {})) => {
                session.publish().await?;
                Ok(())
            }
            Some(ingest_request::Message::Open(_)) => Err(invalid(
                "open",
                "came before; a stream speaks of one session",
            )),
            None => Err(invalid("message", "is required")),
        }
    }

    /// Tells the newest version, if it was announced since the last time.
    async fn tell(
        &self,
        session: &Session,
        progress: &watch::Receiver<Progress>,
        told: &mut Told,
    ) -> Result<(), Status> {
        // Wait for the reader first: what is told then is the newest.
        let Ok(place) = self.answers.reserve().await else {
            return Ok(());
        };
        let now = progress.borrow().clone();
        trouble(session, &now, told.refusals)?;
        if now.announced > told.announced {
            *told = Told::of(&now);
            place.send(Ok(applied(&now)));
        }
        Ok(())
    }

    /// Publishes what has come, waits until it is applied, and tells it.
    async fn last(
        &mut self,
        session: &Session,
        progress: &mut watch::Receiver<Progress>,
        mut told: Told,
    ) -> Result<(), Status> {
        let before = Told::of(&progress.borrow());
        let seq = tokio::select! {
            () = self.answers.closed() => return Ok(()),
            () = reached(&mut self.phase, Phase::Over) => return Err(Error::ShuttingDown.into()),
            seq = session.publish() => seq?,
        };
        let Some(seq) = seq else {
            return Ok(());
        };
        loop {
            let now = progress.borrow_and_update().clone();
            trouble(session, &now, before.refusals)?;
            if now.applied() >= seq && now.announced > before.announced {
                break;
            }
            tokio::select! {
                () = self.answers.closed() => return Ok(()),
                () = reached(&mut self.phase, Phase::Over) => return Err(Error::ShuttingDown.into()),
                changed = progress.changed() => changed.map_err(|_| Error::EngineStopped)?,
            }
        }
        self.tell(session, progress, &mut told).await
    }

    async fn send(&self, message: ingest_response::Message) {
        // A reader that has gone is noticed by the loop.
        drop(
            self.answers
                .send(Ok(v1::IngestResponse {
                    message: Some(message),
                }))
                .await,
        );
    }
}

/// What stands in the way of a session's context, or of a version since so many had been refused.
fn trouble(session: &Session, progress: &Progress, refusals: u64) -> Result<(), Status> {
    if progress.closed {
        return Err(Error::UnknownSession(session.name.clone()).into());
    }
    match progress.trouble(refusals) {
        Some(error) => Err(Error::Context(error.clone()).into()),
        None => Ok(()),
    }
}

fn applied(progress: &Progress) -> v1::IngestResponse {
    let applied = v1::IngestApplied {
        seq: progress.applied(),
        adapter_version: progress.version(),
        state_digest: progress
            .newest
            .map(|newest| newest.digest.to_string())
            .unwrap_or_default(),
        tokens: progress.newest.map_or(0, |newest| newest.tokens as u64),
    };
    v1::IngestResponse {
        message: Some(ingest_response::Message::Applied(applied)),
    }
}

fn content(chunk: v1::IngestChunk) -> Result<store::Chunk, Status> {
    let content = match chunk.content {
        Some(Content::Text(text)) => store::Content::Text(text),
        Some(Content::TokenIds(ids)) => store::Content::Ids(ids.ids),
        None => return Err(invalid("chunk.content", "is required")),
    };
    Ok(store::Chunk {
        document: chunk.document_id,
        content,
        end_of_document: chunk.end_of_document,
    })
}
