//! The contract's services over [`Contexts`] and [`Answers`].
//!
//! What an imprint alone can do (scores under it, its strength, its digest, its export) is refused or left empty. Start at [`Service`].

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use imprint_proto::v1::{
    self as v1, context_service_server::ContextService, generate_response,
    generation_service_server::GenerationService, ingest_request, ingest_response,
    model_service_server::ModelService, prompt::Form, session_service_server::SessionService,
};
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    answers::{Answers, Asked, Piece, sampling},
    contexts::Contexts,
};

/// Messages that wait for a client to read them.
const WAITING: usize = 16;
/// Sessions of a page.
const PAGE: usize = 100;

/// All of it; clones share sessions and model.
#[derive(Clone)]
pub(crate) struct Service {
    pub(crate) model: v1::Model,
    pub(crate) answers: Arc<Answers>,
    pub(crate) contexts: Arc<Mutex<Contexts>>,
}

type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Service {
    fn contexts(&self) -> MutexGuard<'_, Contexts> {
        // Nothing is left half done: every call checks before it changes anything.
        self.contexts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The prompt with the session's context in front.
    fn asked(&self, request: &v1::GenerateRequest) -> Result<Asked, Status> {
        let adapter = request.adapter.clone().unwrap_or_default();
        let bare = adapter.session_id.is_empty() || adapter.adapter_scale == Some(0.0);
        if !bare && adapter.adapter_scale.is_some_and(|scale| scale != 1.0) {
            return Err(Status::invalid_argument(
                "adapter_scale: a prompt has no strength but 0 and 1",
            ));
        }
        if !adapter.session_id.is_empty() {
            let mut contexts = self.contexts();
            let session = contexts.session(&adapter.session_id)?;
            if adapter.min_applied_seq > session.accepted_seq {
                return Err(Status::failed_precondition("min_applied_seq has not come"));
            }
            if adapter.min_applied_seq > session.applied_seq {
                contexts.publish(&adapter.session_id)?;
            }
        }
        let context = if bare {
            String::new()
        } else {
            self.contexts().text(&adapter.session_id)?
        };
        let before = |text: &str| match context.as_str() {
            "" => text.to_owned(),
            context => format!("{context}\n\n{text}"),
        };
        match request
            .prompt
            .as_ref()
            .and_then(|prompt| prompt.form.as_ref())
        {
            Some(Form::Text(text)) => Ok(Asked::Text(before(text))),
            Some(Form::Question(question)) => Ok(Asked::Text(before(&format!(
                "Question: {question}\nAnswer:"
            )))),
            Some(Form::Chat(chat)) => {
                let messages = chat.messages.iter();
                let mut messages: Vec<_> = messages
                    .map(|message| (message.role.clone(), message.content.clone()))
                    .collect();
                match messages.first_mut() {
                    None => return Err(Status::invalid_argument("prompt.chat has no messages")),
                    Some((role, content)) if role == "system" => *content = before(content),
                    Some(_) if context.is_empty() => {}
                    Some(_) => messages.insert(0, ("system".to_owned(), context)),
                }
                Ok(Asked::Chat(messages))
            }
            Some(Form::TokenIds(_)) => Err(Status::invalid_argument(
                "prompt.token_ids: this engine takes text",
            )),
            None => Err(Status::invalid_argument("prompt is required")),
        }
    }
}

#[tonic::async_trait]
impl GenerationService for Service {
    type GenerateStream = Messages<v1::GenerateResponse>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let request = request.into_inner();
        if request.logprobs || request.top_logprobs > 0 {
            return Err(Status::invalid_argument("logprobs: this engine tells none"));
        }
        let asked = self.asked(&request)?;
        let params = sampling(request.sampling, request.stop, request.max_tokens)?;
        let pieces = self.answers.ask(asked, params).await?;
        let messages = ReceiverStream::new(pieces).map(|piece| {
            let message = match piece? {
                Piece::Text(text) => generate_response::Message::Delta(v1::GenerateDelta {
                    text,
                    ..v1::GenerateDelta::default()
                }),
                Piece::End(end) => generate_response::Message::Finished(end),
            };
            Ok(v1::GenerateResponse {
                message: Some(message),
            })
        });
        Ok(Response::new(Box::pin(messages)))
    }

    async fn score(
        &self,
        _: Request<v1::ScoreRequest>,
    ) -> Result<Response<v1::ScoreResponse>, Status> {
        Err(Status::unimplemented("this engine scores nothing"))
    }
}

#[tonic::async_trait]
impl ContextService for Service {
    type IngestStream = Messages<v1::IngestResponse>;

    async fn ingest(
        &self,
        request: Request<Streaming<v1::IngestRequest>>,
    ) -> Result<Response<Self::IngestStream>, Status> {
        let mut messages = request.into_inner();
        let open = messages.message().await?.and_then(|first| first.message);
        let Some(ingest_request::Message::Open(open)) = open else {
            return Err(Status::invalid_argument(
                "the first message opens a session",
            ));
        };
        let id = open.session_id;
        self.contexts().session(&id)?;
        let (answers, answered) = mpsc::channel(WAITING);
        let service = self.clone();
        tokio::spawn(async move {
            loop {
                let message = match messages.message().await {
                    Ok(Some(message)) => message.message,
                    Ok(None) => break,
                    Err(_) => return,
                };
                let answer = service.ingested(&id, message);
                let over = answer.is_err();
                if answers.send(answer).await.is_err() || over {
                    return;
                }
            }
            let flush = Some(ingest_request::Message::Flush(v1::IngestFlush {}));
            let last = service.ingested(&id, flush);
            drop(answers.send(last).await);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answered))))
    }
}

impl Service {
    /// The answer to a message of a stream.
    fn ingested(
        &self,
        id: &str,
        message: Option<ingest_request::Message>,
    ) -> Result<v1::IngestResponse, Status> {
        let message = match message {
            Some(ingest_request::Message::Chunk(chunk)) => {
                let seq = chunk.seq;
                let duplicate = self.contexts().take(id, chunk)?;
                ingest_response::Message::Accepted(v1::IngestAccepted { seq, duplicate })
            }
            Some(ingest_request::Message::Flush(_)) => {
                let session = self.contexts().publish(id)?;
                ingest_response::Message::Applied(v1::IngestApplied {
                    seq: session.applied_seq,
                    adapter_version: session.adapter_version,
                    ..v1::IngestApplied::default()
                })
            }
            Some(ingest_request::Message::Open(_)) => {
                return Err(Status::invalid_argument("a stream is opened once"));
            }
            None => return Err(Status::invalid_argument("the message is empty")),
        };
        Ok(v1::IngestResponse {
            message: Some(message),
        })
    }
}

#[tonic::async_trait]
impl SessionService for Service {
    async fn create_session(
        &self,
        request: Request<v1::CreateSessionRequest>,
    ) -> Result<Response<v1::CreateSessionResponse>, Status> {
        let request = request.into_inner();
        if !request.model.is_empty() && request.model != self.model.name {
            return Err(Status::not_found("there is no such model"));
        }
        let session = Some(self.contexts().create(None)?);
        Ok(Response::new(v1::CreateSessionResponse { session }))
    }

    async fn get_session(
        &self,
        request: Request<v1::GetSessionRequest>,
    ) -> Result<Response<v1::GetSessionResponse>, Status> {
        let session = Some(self.contexts().session(&request.into_inner().session_id)?);
        Ok(Response::new(v1::GetSessionResponse { session }))
    }

    async fn list_sessions(
        &self,
        request: Request<v1::ListSessionsRequest>,
    ) -> Result<Response<v1::ListSessionsResponse>, Status> {
        let request = request.into_inner();
        let most = match request.page_size {
            0 => PAGE,
            size => usize::try_from(size.min(1000)).unwrap_or(PAGE),
        };
        let (sessions, more) = self.contexts().page(&request.page_token, most)?;
        let last = sessions.last().filter(|_| more);
        let next_page_token = last.map(|last| last.session_id.clone()).unwrap_or_default();
        Ok(Response::new(v1::ListSessionsResponse {
            sessions,
            next_page_token,
        }))
    }

    async fn update_session(
        &self,
        _: Request<v1::UpdateSessionRequest>,
    ) -> Result<Response<v1::UpdateSessionResponse>, Status> {
        Err(Status::unimplemented(
            "sessions have neither labels nor a time to live here",
        ))
    }

    async fn delete_session(
        &self,
        request: Request<v1::DeleteSessionRequest>,
    ) -> Result<Response<v1::DeleteSessionResponse>, Status> {
        self.contexts().delete(&request.into_inner().session_id)?;
        Ok(Response::new(v1::DeleteSessionResponse {}))
    }

    async fn fork_session(
        &self,
        request: Request<v1::ForkSessionRequest>,
    ) -> Result<Response<v1::ForkSessionResponse>, Status> {
        let request = request.into_inner();
        let session = Some(self.contexts().create(Some(&request.session_id))?);
        Ok(Response::new(v1::ForkSessionResponse { session }))
    }

    async fn list_documents(
        &self,
        request: Request<v1::ListDocumentsRequest>,
    ) -> Result<Response<v1::ListDocumentsResponse>, Status> {
        let documents = self
            .contexts()
            .documents(&request.into_inner().session_id)?;
        Ok(Response::new(v1::ListDocumentsResponse { documents }))
    }

    async fn forget_document(
        &self,
        request: Request<v1::ForgetDocumentRequest>,
    ) -> Result<Response<v1::ForgetDocumentResponse>, Status> {
        let request = request.into_inner();
        let forgotten = self
            .contexts()
            .forget(&request.session_id, &request.document_id)?;
        Ok(Response::new(v1::ForgetDocumentResponse {
            adapter_version: forgotten.adapter_version,
            ..v1::ForgetDocumentResponse::default()
        }))
    }
}

#[tonic::async_trait]
impl ModelService for Service {
    async fn list_models(
        &self,
        _: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        Ok(Response::new(v1::ListModelsResponse {
            models: vec![self.model.clone()],
        }))
    }

    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        let name = request.into_inner().name;
        if !name.is_empty() && name != self.model.name {
            return Err(Status::not_found("there is no such model"));
        }
        let model = Some(self.model.clone());
        Ok(Response::new(v1::GetModelResponse { model }))
    }
}
