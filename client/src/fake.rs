//! A server of the contract for tests: sessions in a map, no model, every answer known beforehand.
//!
//! It keeps the laws of the contract that a client leans on (contiguous `seq`, duplicates, gaps,
//! pages, tenants' keys), "knows" a fact when the fact's text is in the prompt or in the session,
//! and breaks the contract on demand by a [`Quirk`]. Start at [`Fake::start`].

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
};

use sha2::{Digest as _, Sha256};
use tokio::{net::TcpListener, sync::watch};
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tonic::{Request, Response, Status, Streaming, transport::Server};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{
    Client, Options,
    demo::almanac::FACTS,
    export::hex,
    v1::{
        self, adapter_service_server, context_service_server, generation_service_server,
        ingest_request, ingest_response, model_service_server, prompt::Form,
        session_service_server,
    },
};

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// How the fake breaks the contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Quirk {
    #[default]
    None,
    /// The next page's token is always the same.
    EndlessPages,
    /// Chunks are accepted under the `seq` after their own.
    WrongSeq,
    /// Chunks are taken, but never accepted until [`Fake::release`].
    Withhold,
    /// A generation ends without `finished`.
    NoFinished,
    /// The answer to a question is empty.
    Silent,
    /// Imprints change nothing.
    Deaf,
    /// Flushes are answered by the version before.
    NoVersions,
    /// The export's last byte is another.
    WrongBytes,
    /// The export's last byte is missing.
    ShortFile,
    /// The export names a file outside its folder.
    Outside,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) sessions: BTreeMap<String, Held>,
    pub(crate) quirk: Quirk,
    pub(crate) key: Option<String>,
    pub(crate) page: usize,
    /// Deadlines that calls came with, as `grpc-timeout` has them.
    pub(crate) deadlines: Vec<String>,
    /// Prompts of all generations.
    pub(crate) prompts: Vec<v1::Prompt>,
    /// Paths of all update masks.
    pub(crate) masks: Vec<Vec<String>>,
}

/// A session with what was told to it.
#[derive(Debug, Default, Clone)]
pub(crate) struct Held {
    pub(crate) session: v1::Session,
    pub(crate) chunks: Vec<v1::IngestChunk>,
    pub(crate) documents: Vec<v1::Document>,
}

/// A running fake; it ends with the test's runtime.
#[derive(Debug, Clone)]
pub(crate) struct Fake {
    state: Arc<Mutex<State>>,
    endpoint: String,
    chunks: watch::Sender<usize>,
    released: watch::Sender<bool>,
}

impl Fake {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let state = State {
            page: 2,
            ..State::default()
        };
        let fake = Self {
            state: Arc::new(Mutex::new(state)),
            endpoint,
            chunks: watch::Sender::new(0),
            released: watch::Sender::new(false),
        };
        let server = Server::builder()
            .add_service(session_service_server::SessionServiceServer::new(
                fake.clone(),
            ))
            .add_service(context_service_server::ContextServiceServer::new(
                fake.clone(),
            ))
            .add_service(generation_service_server::GenerationServiceServer::new(
                fake.clone(),
            ))
            .add_service(model_service_server::ModelServiceServer::new(fake.clone()))
            .add_service(adapter_service_server::AdapterServiceServer::new(
                fake.clone(),
            ));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        fake
    }

    pub(crate) async fn with_quirk(quirk: Quirk) -> Self {
        let fake = Self::start().await;
        fake.state().quirk = quirk;
        fake
    }

    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) async fn client(&self) -> Client {
        Client::connect(&self.endpoint, Options::default())
            .await
            .unwrap()
    }

    /// A client and the name of a new session.
    pub(crate) async fn client_and_session(&self) -> (Client, String) {
        let client = self.client().await;
        let session = client
            .create_session(v1::CreateSessionRequest::default())
            .await
            .unwrap();
        (client, session.session_id)
    }

    /// Waits until so many chunks have arrived.
    pub(crate) async fn saw_chunks(&self, count: usize) {
        self.chunks
            .subscribe()
            .wait_for(|seen| *seen >= count)
            .await
            .unwrap();
    }

    /// Lets withheld chunks be accepted.
    pub(crate) fn release(&self) {
        self.released.send_replace(true);
    }

    /// What every call is checked for.
    fn admit<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let mut state = self.state();
        if let Some(deadline) = request.metadata().get("grpc-timeout") {
            state.deadlines.push(deadline.to_str().unwrap().to_owned());
        }
        let given = request
            .metadata()
            .get("authorization")
            .map(|key| key.to_str().unwrap());
        match &state.key {
            Some(key) if given != Some(&format!("Bearer {key}")) => {
                Err(Status::unauthenticated("no key, or one that is not known"))
            }
            _ => Ok(()),
        }
    }

    fn held(&self, session_id: &str) -> Result<Held, Status> {
        self.state()
            .sessions
            .get(session_id)
            .cloned()
            .ok_or_else(|| unknown(session_id))
    }

    fn create(&self, mut held: Held) -> v1::Session {
        let mut state = self.state();
        held.session.session_id = format!("s_{:026}", state.sessions.len() + 1);
        let session = held.session.clone();
        state.sessions.insert(session.session_id.clone(), held);
        session
    }

    /// Publishes all chunks of a session, if there are any that no version has.
    fn publish(&self, session_id: &str) -> Option<ingest_response::Message> {
        let mut state = self.state();
        if state.quirk == Quirk::NoVersions {
            return None;
        }
        let held = state.sessions.get_mut(session_id)?;
        let session = &mut held.session;
        if session.applied_seq == session.accepted_seq {
            return None;
        }
        session.applied_seq = session.accepted_seq;
        session.adapter_version += 1;
        session.context_tokens = words(&told(&held.chunks));
        session.state_digest = format!("{:04x}", session.adapter_version);
        Some(ingest_response::Message::Applied(v1::IngestApplied {
            seq: session.applied_seq,
            adapter_version: session.adapter_version,
            state_digest: session.state_digest.clone(),
            tokens: session.context_tokens,
        }))
    }

    /// Takes a chunk by the contract's rules; answers whether it was there before.
    fn take(&self, session_id: &str, chunk: v1::IngestChunk) -> Result<bool, Status> {
        let mut state = self.state();
        let held = state
            .sessions
            .get_mut(session_id)
            .ok_or_else(|| unknown(session_id))?;
        let want = held.session.accepted_seq + 1;
        if chunk.seq < want {
            let known = held.chunks.contains(&chunk);
            return match known {
                true => Ok(true),
                false => Err(Status::already_exists(format!(
                    "chunk {} was another",
                    chunk.seq
                ))),
            };
        }
        if chunk.seq > want {
            let details = ErrorDetails::with_error_info(
                "SEQ_GAP",
                "imprint",
                [("expected_seq".to_owned(), want.to_string())],
            );
            let message = format!("chunk {} came where {want} was due", chunk.seq);
            return Err(Status::with_error_details(
                tonic::Code::FailedPrecondition,
                message,
                details,
            ));
        }
        let name = &chunk.document_id;
        match held
            .documents
            .iter_mut()
            .find(|known| known.document_id == *name)
        {
            Some(known) => {
                known.last_seq = chunk.seq;
                known.complete = chunk.end_of_document;
            }
            None => held.documents.push(v1::Document {
                document_id: name.clone(),
                tokens: 1,
                complete: chunk.end_of_document,
                first_seq: chunk.seq,
                last_seq: chunk.seq,
            }),
        }
        held.session.accepted_seq = chunk.seq;
        held.session.documents = u32::try_from(held.documents.len()).unwrap();
        held.chunks.push(chunk);
        Ok(false)
    }

    /// What one asks, what is known of the text where one asks, and the version that answers.
    fn knowledge(
        &self,
        adapter: Option<v1::AdapterSelection>,
        prompt: Option<v1::Prompt>,
    ) -> Result<(String, String, v1::Session), Status> {
        let asked = match prompt.and_then(|prompt| prompt.form) {
            Some(Form::Question(text) | Form::Text(text)) => text,
            Some(Form::Chat(chat)) => chat.messages.last().unwrap().content.clone(),
            Some(Form::TokenIds(ids)) => format!("{:?}", ids.ids),
            None => return Err(Status::invalid_argument("no prompt")),
        };
        let session_id = adapter.unwrap_or_default().session_id;
        let held = match session_id.as_str() {
            "" => Held::default(),
            session_id => self.held(session_id)?,
        };
        let imprint = match self.state().quirk {
            Quirk::Deaf => String::new(),
            _ => told(&held.chunks),
        };
        Ok((asked.clone(), format!("{imprint} {asked}"), held.session))
    }
}

fn unknown(session_id: &str) -> Status {
    Status::not_found(format!("no session {session_id}"))
}

/// The text of all chunks.
fn told(chunks: &[v1::IngestChunk]) -> String {
    let texts = chunks.iter().map(|chunk| match &chunk.content {
        Some(v1::ingest_chunk::Content::Text(text)) => text.clone(),
        Some(v1::ingest_chunk::Content::TokenIds(ids)) => format!("{:?}", ids.ids),
        None => String::new(),
    });
    texts.collect()
}

fn words(text: &str) -> u64 {
    text.split_whitespace().count() as u64
}

#[tonic::async_trait]
impl session_service_server::SessionService for Fake {
    async fn create_session(
        &self,
        request: Request<v1::CreateSessionRequest>,
    ) -> Result<Response<v1::CreateSessionResponse>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let strategy = match request.strategy() {
            v1::Strategy::Unspecified => v1::Strategy::Parallel,
            other => other,
        };
        let session = v1::Session {
            model: "tiny".to_owned(),
            strategy: strategy.into(),
            window: 256,
            labels: request.labels,
            ttl: request.ttl,
            state_bytes: 5_900_000,
            core_bytes: 2_883_584,
            ..v1::Session::default()
        };
        let session = self.create(Held {
            session,
            ..Held::default()
        });
        Ok(Response::new(v1::CreateSessionResponse {
            session: Some(session),
        }))
    }

    async fn get_session(
        &self,
        request: Request<v1::GetSessionRequest>,
    ) -> Result<Response<v1::GetSessionResponse>, Status> {
        self.admit(&request)?;
        let session = self.held(&request.into_inner().session_id)?.session;
        Ok(Response::new(v1::GetSessionResponse {
            session: Some(session),
        }))
    }

    async fn list_sessions(
        &self,
        request: Request<v1::ListSessionsRequest>,
    ) -> Result<Response<v1::ListSessionsResponse>, Status> {
        self.admit(&request)?;
        let from: usize = request.into_inner().page_token.parse().unwrap_or(0);
        let state = self.state();
        let sessions: Vec<_> = state
            .sessions
            .values()
            .skip(from)
            .take(state.page)
            .map(|held| held.session.clone())
            .collect();
        let next = from + sessions.len();
        let next_page_token = match state.quirk {
            Quirk::EndlessPages => "1".to_owned(),
            _ if next < state.sessions.len() => next.to_string(),
            _ => String::new(),
        };
        Ok(Response::new(v1::ListSessionsResponse {
            sessions,
            next_page_token,
        }))
    }

    async fn update_session(
        &self,
        request: Request<v1::UpdateSessionRequest>,
    ) -> Result<Response<v1::UpdateSessionResponse>, Status> {
        self.admit(&request)?;
        let v1::UpdateSessionRequest {
            session,
            update_mask,
        } = request.into_inner();
        let session = session.unwrap();
        self.held(&session.session_id)?;
        self.state().masks.push(update_mask.unwrap().paths);
        Ok(Response::new(v1::UpdateSessionResponse {
            session: Some(session),
        }))
    }

    async fn delete_session(
        &self,
        request: Request<v1::DeleteSessionRequest>,
    ) -> Result<Response<v1::DeleteSessionResponse>, Status> {
        self.admit(&request)?;
        let session_id = request.into_inner().session_id;
        match self.state().sessions.remove(&session_id) {
            Some(_) => Ok(Response::new(v1::DeleteSessionResponse {})),
            None => Err(unknown(&session_id)),
        }
    }

    async fn fork_session(
        &self,
        request: Request<v1::ForkSessionRequest>,
    ) -> Result<Response<v1::ForkSessionResponse>, Status> {
        self.admit(&request)?;
        let v1::ForkSessionRequest {
            session_id,
            labels,
            ttl,
        } = request.into_inner();
        let mut held = self.held(&session_id)?;
        held.session.forked_from = session_id;
        held.session.labels = labels;
        held.session.ttl = ttl;
        Ok(Response::new(v1::ForkSessionResponse {
            session: Some(self.create(held)),
        }))
    }

    async fn list_documents(
        &self,
        request: Request<v1::ListDocumentsRequest>,
    ) -> Result<Response<v1::ListDocumentsResponse>, Status> {
        self.admit(&request)?;
        let documents = self.held(&request.into_inner().session_id)?.documents;
        Ok(Response::new(v1::ListDocumentsResponse { documents }))
    }

    async fn forget_document(
        &self,
        request: Request<v1::ForgetDocumentRequest>,
    ) -> Result<Response<v1::ForgetDocumentResponse>, Status> {
        self.admit(&request)?;
        let v1::ForgetDocumentRequest {
            session_id,
            document_id,
        } = request.into_inner();
        let mut state = self.state();
        let held = state
            .sessions
            .get_mut(&session_id)
            .ok_or_else(|| unknown(&session_id))?;
        let before = held.documents.len();
        held.documents
            .retain(|document| document.document_id != document_id);
        if held.documents.len() == before {
            return Err(Status::not_found(format!("no document {document_id}")));
        }
        held.chunks.retain(|chunk| chunk.document_id != document_id);
        held.session.adapter_version += 1;
        Ok(Response::new(v1::ForgetDocumentResponse {
            adapter_version: held.session.adapter_version,
            state_digest: "f0".to_owned(),
        }))
    }
}

#[tonic::async_trait]
impl context_service_server::ContextService for Fake {
    type IngestStream = Answers<v1::IngestResponse>;

    async fn ingest(
        &self,
        request: Request<Streaming<v1::IngestRequest>>,
    ) -> Result<Response<Self::IngestStream>, Status> {
        self.admit(&request)?;
        let mut requests = request.into_inner();
        let Some(ingest_request::Message::Open(open)) = requests
            .message()
            .await?
            .and_then(|request| request.message)
        else {
            return Err(Status::invalid_argument("`open` must come first"));
        };
        let session_id = open.session_id;
        self.held(&session_id)?;
        // Room for one answer only: a client that did not read would stop this server.
        let (answers, stream) = tokio::sync::mpsc::channel(1);
        let fake = self.clone();
        tokio::spawn(async move {
            if let Err(status) = fake.serve(&session_id, requests, &answers).await {
                // The client may be gone; then there is nobody to tell.
                let _ = answers.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

type Sender = tokio::sync::mpsc::Sender<Result<v1::IngestResponse, Status>>;

impl Fake {
    async fn serve(
        &self,
        session_id: &str,
        mut requests: Streaming<v1::IngestRequest>,
        answers: &Sender,
    ) -> Result<(), Status> {
        let answer = async |message| {
            let response = v1::IngestResponse {
                message: Some(message),
            };
            answers
                .send(Ok(response))
                .await
                .map_err(|_| Status::cancelled("the client is gone"))
        };
        let quirk = self.state().quirk;
        let mut withheld = Vec::new();
        let mut released = self.released.subscribe();
        loop {
            let request = tokio::select! {
                request = requests.message() => request?,
                _ = async { released.wait_for(|released| *released).await.is_ok() }, if !withheld.is_empty() => {
                    for accepted in withheld.drain(..) {
                        answer(accepted).await?;
                    }
                    continue;
                }
            };
            match request.and_then(|request| request.message) {
                Some(ingest_request::Message::Chunk(chunk)) => {
                    let seq = chunk.seq + u64::from(quirk == Quirk::WrongSeq);
                    let duplicate = self.take(session_id, chunk)?;
                    self.chunks.send_modify(|count| *count += 1);
                    let accepted =
                        ingest_response::Message::Accepted(v1::IngestAccepted { seq, duplicate });
                    if quirk == Quirk::Withhold && !*self.released.borrow() {
                        withheld.push(accepted);
                    } else {
                        answer(accepted).await?;
                    }
                }
                Some(ingest_request::Message::Flush(v1::IngestFlush {})) => {
                    if let Some(applied) = self.publish(session_id) {
                        answer(applied).await?;
                    }
                }
                Some(ingest_request::Message::Open(_)) => {
                    return Err(Status::invalid_argument("`open` came twice"));
                }
                None => break,
            }
        }
        if let Some(applied) = self.publish(session_id) {
            answer(applied).await?;
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl generation_service_server::GenerationService for Fake {
    type GenerateStream = Answers<v1::GenerateResponse>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        self.state().prompts.extend(request.prompt.clone());
        let (asked, known, session) = self.knowledge(request.adapter, request.prompt)?;
        let fact = FACTS.iter().find(|fact| asked.contains(fact.question));
        let text = match fact {
            Some(fact) if known.contains(fact.answer) => format!(" {}", fact.answer),
            Some(_) => " no\u{1b}idea".to_owned(),
            None => format!(" you said {}", asked.trim()),
        };
        let quirk = self.state().quirk;
        let (head, tail) = text.split_at(1);
        let pieces = if quirk == Quirk::Silent {
            Vec::new()
        } else {
            vec![head, tail]
        };
        let deltas = pieces.into_iter().map(|text| {
            v1::generate_response::Message::Delta(v1::GenerateDelta {
                text: text.to_owned(),
                token_ids: vec![7],
                ..v1::GenerateDelta::default()
            })
        });
        let finished = v1::GenerateFinished {
            adapter_scale: 1.0,
            finish_reason: v1::FinishReason::Stop.into(),
            usage: Some(v1::Usage {
                prompt_tokens: u32::try_from(words(&asked)).unwrap(),
                completion_tokens: 2,
                context_tokens: session.context_tokens,
                cached_tokens: 0,
            }),
            adapter_version: session.adapter_version,
            state_digest: session.state_digest,
            timings: None,
        };
        let end = match quirk {
            Quirk::NoFinished => None,
            _ => Some(v1::generate_response::Message::Finished(finished)),
        };
        let messages: Vec<_> = deltas
            .chain(end)
            .map(|message| {
                Ok(v1::GenerateResponse {
                    message: Some(message),
                })
            })
            .collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(messages))))
    }

    async fn score(
        &self,
        request: Request<v1::ScoreRequest>,
    ) -> Result<Response<v1::ScoreResponse>, Status> {
        self.admit(&request)?;
        let v1::ScoreRequest {
            adapter,
            prompt,
            continuations,
            ..
        } = request.into_inner();
        let (asked, known, session) = self.knowledge(adapter, prompt)?;
        let scores = continuations.into_iter().map(|continuation| {
            let text = match continuation.form {
                Some(v1::continuation::Form::Text(text)) => text,
                _ => String::new(),
            };
            let greedy = known.contains(text.trim());
            let token = v1::TokenLogprob {
                token_id: 7,
                text: text.clone(),
                logprob: -0.5,
            };
            let logprob = if greedy { -0.5 } else { -12.0 };
            v1::ContinuationScore {
                logprob,
                tokens: vec![token],
                greedy,
            }
        });
        Ok(Response::new(v1::ScoreResponse {
            scores: scores.collect(),
            adapter_version: session.adapter_version,
            adapter_scale: 1.0,
            prompt_tokens: u32::try_from(words(&asked)).unwrap(),
            cached_tokens: 0,
        }))
    }
}

#[tonic::async_trait]
impl model_service_server::ModelService for Fake {
    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        self.admit(&request)?;
        Ok(Response::new(v1::ListModelsResponse {
            models: vec![model()],
        }))
    }

    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        self.admit(&request)?;
        match request.into_inner().name.as_str() {
            "" | "tiny" => Ok(Response::new(v1::GetModelResponse {
                model: Some(model()),
            })),
            other => Err(Status::not_found(format!("no model {other}"))),
        }
    }
}

fn model() -> v1::Model {
    v1::Model {
        name: "tiny".to_owned(),
        parameters: 134_515_008,
        weight_format: "Q4_1".to_owned(),
        generator: Some(v1::Generator {
            prompt_format: "Question: {question}\nAnswer:".to_owned(),
            parameters: 9_000_000,
            ..v1::Generator::default()
        }),
        ..v1::Model::default()
    }
}

#[tonic::async_trait]
impl adapter_service_server::AdapterService for Fake {
    type ExportAdapterStream = Answers<v1::ExportAdapterResponse>;

    async fn export_adapter(
        &self,
        request: Request<v1::ExportAdapterRequest>,
    ) -> Result<Response<Self::ExportAdapterStream>, Status> {
        use v1::export_adapter_response::Message;
        self.admit(&request)?;
        let session = self.held(&request.into_inner().session_id)?.session;
        let quirk = self.state().quirk;
        let mut messages = Vec::new();
        for (name, bytes) in [
            ("adapter_config.json", b"{\"peft_type\": \"LORA\"}".to_vec()),
            ("adapter_model.safetensors", vec![3; 10_000]),
        ] {
            let name = if quirk == Quirk::Outside {
                format!("../{name}")
            } else {
                name.to_owned()
            };
            messages.push(Message::File(v1::ExportedFile {
                name,
                size: bytes.len() as u64,
                sha256: hex(&Sha256::digest(&bytes)),
            }));
            let mut sent = bytes;
            match quirk {
                Quirk::WrongBytes => *sent.last_mut().unwrap() ^= 1,
                Quirk::ShortFile => drop(sent.pop()),
                _ => {}
            }
            messages.extend(sent.chunks(4096).map(|data| Message::Data(data.to_vec())));
        }
        messages.push(Message::Finished(v1::ExportFinished {
            adapter_version: session.adapter_version,
            state_digest: session.state_digest,
            rank: 256,
        }));
        let messages = messages.into_iter().map(|message| {
            Ok(v1::ExportAdapterResponse {
                message: Some(message),
            })
        });
        Ok(Response::new(Box::pin(tokio_stream::iter(
            messages.collect::<Vec<_>>(),
        ))))
    }
}
