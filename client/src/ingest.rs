//! The writer of a session's context: numbers the chunks, bounds what is under way, keeps the answers.
//!
//! Sending and reading go hand in hand in one task: whoever waits for room also takes the server's
//! answers in, so neither side can block the other, and neither grows. Start at [`Ingest::text`].

use std::{collections::VecDeque, time::Duration};

use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{
    Streaming,
    codegen::{Body, Bytes, StdError},
};

use crate::{
    Error,
    v1::{
        IngestAccepted, IngestApplied, IngestChunk, IngestFlush, IngestOpen, IngestRequest,
        IngestResponse, Session, TokenIds, context_service_client::ContextServiceClient,
        ingest_chunk::Content, ingest_request, ingest_response,
    },
};

/// Versions that are kept for a caller that does not ask for them; older ones make room.
const KEPT_VERSIONS: usize = 64;

/// How to write into a session.
#[derive(Debug, Clone)]
pub struct IngestOptions {
    /// The `seq` of the first chunk; `None` continues after the last accepted one. An earlier one
    /// sends chunks again: the same content is answered as a duplicate, another is `ALREADY_EXISTS`.
    pub first_seq: Option<u64>,
    /// Chunks that may be sent but not yet accepted; at least 1.
    pub in_flight_chunks: usize,
    /// Bytes of content that may be sent but not yet accepted; a larger chunk goes alone.
    pub in_flight_bytes: usize,
    /// How long the server may say nothing while an answer of it is awaited.
    pub patience: Duration,
}

impl Default for IngestOptions {
    /// On from the last accepted chunk; 32 chunks or 1 MiB under way; 600 s of patience.
    fn default() -> Self {
        Self {
            first_seq: None,
            in_flight_chunks: 32,
            in_flight_bytes: 1 << 20,
            patience: Duration::from_secs(600),
        }
    }
}

/// A published version of the session's adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// All chunks up to this `seq` are in it.
    pub seq: u64,
    /// The version.
    pub adapter_version: u64,
    /// Digest of its state, in hex.
    pub state_digest: String,
    /// Context tokens in it.
    pub tokens: u64,
}

/// A stream into one session.
///
/// Dropping it ends the call; what was accepted stays. [`Self::finish`] is the orderly end.
#[derive(Debug)]
pub struct Ingest {
    requests: Option<mpsc::Sender<IngestRequest>>, // none once this side is closed
    responses: Streaming<IngestResponse>,
    document_id: String,
    next_seq: u64,
    in_flight: VecDeque<(u64, usize)>, // seq and bytes of what is sent and not yet accepted
    in_flight_bytes: usize,
    limit_chunks: usize,
    limit_bytes: usize,
    patience: Duration,
    accepted_seq: u64,
    duplicates: u64,
    applied_seq: u64,
    applied: Option<Applied>,
    unread: VecDeque<Applied>,
    ended: bool, // the server's side is closed
}

/// Opens the stream: `open` must be under way before the call, as the server may answer only to it.
pub(crate) async fn open<T>(
    mut context: ContextServiceClient<T>,
    session: &Session,
    options: IngestOptions,
) -> Result<Ingest, Error>
where
    T: tonic::client::GrpcService<tonic::body::Body>,
    T::Error: Into<StdError>,
    T::ResponseBody: Body<Data = Bytes> + Send + 'static,
    <T::ResponseBody as Body>::Error: Into<StdError> + Send,
{
    let limit_chunks = options.in_flight_chunks.max(1);
    let (requests, receiver) = mpsc::channel(limit_chunks.min(1024));
    let open = IngestRequest {
        message: Some(ingest_request::Message::Open(IngestOpen {
            session_id: session.session_id.clone(),
        })),
    };
    let stream = tokio_stream::once(open).chain(stream(receiver));
    let responses = context.ingest(stream).await?.into_inner();
    let next_seq = options.first_seq.unwrap_or(session.accepted_seq + 1);
    Ok(Ingest {
        requests: Some(requests),
        responses,
        document_id: String::new(),
        next_seq,
        in_flight: VecDeque::new(),
        in_flight_bytes: 0,
        limit_chunks,
        limit_bytes: options.in_flight_bytes,
        patience: options.patience,
        accepted_seq: next_seq.saturating_sub(1),
        duplicates: 0,
        applied_seq: session.applied_seq,
        applied: None,
        unread: VecDeque::new(),
        ended: false,
    })
}

fn stream(receiver: mpsc::Receiver<IngestRequest>) -> impl Stream<Item = IngestRequest> {
    tokio_stream::wrappers::ReceiverStream::new(receiver)
}

impl Ingest {
    /// Names the document of the chunks that follow. Another name ends the open document; without a
    /// name the chunks continue it, or begin one that the server names `doc-<seq>`.
    pub fn document(&mut self, document_id: impl Into<String>) {
        self.document_id = document_id.into();
    }

    /// Sends text and returns its `seq`; waits while too much is under way. The text may end
    /// anywhere, within a word too.
    ///
    /// # Errors
    /// [`Error::Refused`] as soon as the server refused this or an earlier chunk.
    pub async fn text(&mut self, text: impl Into<String>) -> Result<u64, Error> {
        self.chunk(Content::Text(text.into()), false).await
    }

    /// Sends the last text of the open document; see [`Self::text`].
    ///
    /// # Errors
    /// As [`Self::text`].
    pub async fn last_text(&mut self, text: impl Into<String>) -> Result<u64, Error> {
        self.chunk(Content::Text(text.into()), true).await
    }

    /// Sends ids of the model's vocabulary; see [`Self::text`]. A document is text or ids throughout.
    ///
    /// # Errors
    /// As [`Self::text`].
    pub async fn tokens(&mut self, ids: Vec<u32>) -> Result<u64, Error> {
        self.chunk(Content::TokenIds(TokenIds { ids }), false).await
    }

    /// Sends the last ids of the open document; see [`Self::tokens`].
    ///
    /// # Errors
    /// As [`Self::text`].
    pub async fn last_tokens(&mut self, ids: Vec<u32>) -> Result<u64, Error> {
        self.chunk(Content::TokenIds(TokenIds { ids }), true).await
    }

    /// Ends the open document with an empty chunk, whose `seq` it returns. A document of ids is
    /// ended by [`Self::last_tokens`].
    ///
    /// # Errors
    /// As [`Self::text`].
    pub async fn end_document(&mut self) -> Result<u64, Error> {
        self.chunk(Content::Text(String::new()), true).await
    }

    /// Asks for a version of all that was sent and waits for it: `None` if the session has no
    /// chunk that is not in a version already, and this stream saw none published. Nothing is
    /// closed: the open document goes on with its next chunk.
    ///
    /// # Errors
    /// As [`Self::text`]; [`Error::Protocol`] if the stream ends before the version comes.
    pub async fn flush(&mut self) -> Result<Option<Applied>, Error> {
        let sent = self.next_seq.saturating_sub(1);
        self.send(ingest_request::Message::Flush(IngestFlush {}))
            .await?;
        while self.applied_seq < sent {
            if !self.read().await? {
                return Err(Error::protocol(
                    "the stream ended before the flushed version came",
                ));
            }
        }
        Ok(self.applied.clone())
    }

    /// Closes this side, waits until the server has published all of it, and returns the last
    /// version that it told of. After it only what has been read can be asked for.
    ///
    /// # Errors
    /// As [`Self::text`]; [`Error::Protocol`] if the stream ends with chunks not accepted.
    pub async fn finish(&mut self) -> Result<Option<Applied>, Error> {
        self.requests = None;
        while self.read().await? {}
        match self.in_flight.front() {
            Some((seq, _)) => Err(Error::protocol(format!("chunk {seq} was never accepted"))),
            None => Ok(self.applied.clone()),
        }
    }

    /// The `seq` that the next chunk will have.
    #[must_use]
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// The last `seq` that was accepted, as far as answers have been read.
    #[must_use]
    pub fn accepted_seq(&self) -> u64 {
        self.accepted_seq
    }

    /// How many chunks of this stream the server had before.
    #[must_use]
    pub fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// Versions that came since the last call, oldest first; at most the 64 newest.
    pub fn take_applied(&mut self) -> Vec<Applied> {
        self.unread.drain(..).collect()
    }

    async fn chunk(&mut self, content: Content, end_of_document: bool) -> Result<u64, Error> {
        let bytes = match &content {
            Content::Text(text) => text.len(),
            Content::TokenIds(TokenIds { ids }) => ids.len().saturating_mul(size_of::<u32>()),
        };
        while self.in_flight.len() >= self.limit_chunks
            || (!self.in_flight.is_empty()
                && self.in_flight_bytes.saturating_add(bytes) > self.limit_bytes)
        {
            if !self.read().await? {
                return Err(Error::protocol(
                    "the stream ended before its chunks were accepted",
                ));
            }
        }
        let seq = self.next_seq;
        let chunk = IngestChunk {
            seq,
            content: Some(content),
            document_id: self.document_id.clone(),
            end_of_document,
        };
        self.send(ingest_request::Message::Chunk(chunk)).await?;
        self.next_seq = seq + 1;
        self.in_flight.push_back((seq, bytes));
        self.in_flight_bytes += bytes;
        Ok(seq)
    }

    /// Queues a message, taking answers in while there is no room.
    async fn send(&mut self, message: ingest_request::Message) -> Result<(), Error> {
        let message = IngestRequest {
            message: Some(message),
        };
        let Some(requests) = self.requests.clone() else {
            return Err(Error::Finished);
        };
        loop {
            let response = tokio::select! {
                biased;
                permit = requests.reserve() => {
                    if let Ok(permit) = permit {
                        permit.send(message);
                        return Ok(());
                    }
                    // Nobody takes messages any more: the call is over, and its status says why.
                    read(&mut self.responses).await?
                }
                response = read(&mut self.responses) => response?,
            };
            match response {
                Some(response) => self.take(response)?,
                None => return Err(Error::protocol("the server ended a stream that was open")),
            }
        }
    }

    /// Takes one answer in; `false` at the end of the stream.
    async fn read(&mut self) -> Result<bool, Error> {
        if self.ended {
            return Ok(false);
        }
        let response = tokio::time::timeout(self.patience, read(&mut self.responses)).await;
        match response.map_err(|_| Error::Silent {
            after: self.patience,
        })?? {
            Some(message) => self.take(message).map(|()| true),
            None => {
                self.ended = true;
                Ok(false)
            }
        }
    }

    fn take(&mut self, message: ingest_response::Message) -> Result<(), Error> {
        match message {
            ingest_response::Message::Accepted(IngestAccepted { seq, duplicate }) => {
                let Some((want, bytes)) = self.in_flight.pop_front() else {
                    return Err(Error::protocol(format!(
                        "chunk {seq} was accepted but not sent"
                    )));
                };
                if want != seq {
                    let what = format!("chunk {seq} was accepted where {want} was due");
                    return Err(Error::protocol(what));
                }
                self.in_flight_bytes -= bytes;
                self.accepted_seq = self.accepted_seq.max(seq);
                self.duplicates += u64::from(duplicate);
            }
            ingest_response::Message::Applied(IngestApplied {
                seq,
                adapter_version,
                state_digest,
                tokens,
            }) => {
                let applied = Applied {
                    seq,
                    adapter_version,
                    state_digest,
                    tokens,
                };
                self.applied_seq = self.applied_seq.max(seq);
                if self.unread.len() == KEPT_VERSIONS {
                    self.unread.pop_front();
                }
                self.unread.push_back(applied.clone());
                self.applied = Some(applied);
            }
        }
        Ok(())
    }
}

async fn read(
    responses: &mut Streaming<IngestResponse>,
) -> Result<Option<ingest_response::Message>, Error> {
    match responses.message().await? {
        Some(IngestResponse {
            message: Some(message),
        }) => Ok(Some(message)),
        Some(IngestResponse { message: None }) => Err(Error::protocol(
            "an ingest stream sent a message without content",
        )),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests;
