//! The connection to one server and every call of `imprint.v1`.
//!
//! Cheap to clone: all clones share one HTTP/2 connection, which comes back by itself after a
//! break. No call is repeated here; what may be repeated safely is for the caller to know. Start at
//! [`Client::connect`].

use std::{collections::HashMap, fmt, path::Path, time::Duration};

use prost_types::FieldMask;
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

use crate::{
    Error, Export, Generation, Ingest, IngestOptions, export, ingest,
    v1::{
        CreateSessionRequest, DeleteSessionRequest, Document, ExportAdapterRequest,
        ForgetDocumentRequest, ForgetDocumentResponse, ForkSessionRequest, GenerateRequest,
        GetModelRequest, GetSessionRequest, ListDocumentsRequest, ListModelsRequest,
        ListSessionsRequest, Model, ScoreRequest, ScoreResponse, Session, UpdateSessionRequest,
        adapter_service_client::AdapterServiceClient, context_service_client::ContextServiceClient,
        generation_service_client::GenerationServiceClient,
        model_service_client::ModelServiceClient, session_service_client::SessionServiceClient,
    },
};

/// Sessions fetched in one page.
const PAGE_SIZE: u32 = 500;

/// How to connect.
#[derive(Debug, Clone)]
pub struct Options {
    /// The bearer key that names the tenant; none for a server without keys.
    pub key: Option<Key>,
    /// How long connecting may take.
    pub connect_timeout: Duration,
    /// Deadline of a call with one answer. It travels with the call: the server gives up with it.
    pub call_timeout: Duration,
    /// Deadline of a generation, first to last token.
    pub generate_timeout: Duration,
    /// The largest message that is read, in bytes.
    pub max_message_bytes: usize,
}

impl Default for Options {
    /// No key; 10 s to connect, 120 s a call, 600 s a generation, messages to 16 MiB.
    fn default() -> Self {
        Self {
            key: None,
            connect_timeout: Duration::from_secs(10),
            call_timeout: Duration::from_secs(120),
            generate_timeout: Duration::from_secs(600),
            max_message_bytes: 16 << 20,
        }
    }
}

/// A bearer key. It is never shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Key(String);

impl From<String> for Key {
    fn from(key: String) -> Self {
        Self(key)
    }
}

impl From<&str> for Key {
    fn from(key: &str) -> Self {
        Self(key.to_owned())
    }
}

impl std::str::FromStr for Key {
    type Err = std::convert::Infallible;

    fn from_str(key: &str) -> Result<Self, Self::Err> {
        Ok(Self::from(key))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// What to change about a session; `None` leaves it as it is.
#[derive(Debug, Clone, Default)]
pub struct SessionUpdate {
    /// The new labels, in place of all old ones.
    pub labels: Option<HashMap<String, String>>,
    /// The new time to live; `Some(None)` lets the session live until it is deleted.
    pub ttl: Option<Option<Duration>>,
}

/// A connection to an imprint server.
#[derive(Debug, Clone)]
pub struct Client {
    channel: InterceptedService<Channel, Bearer>,
    options: Options,
}

/// Puts the key into each call's `authorization`.
#[derive(Debug, Clone)]
struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(header) = &self.0 {
            request
                .metadata_mut()
                .insert("authorization", header.clone());
        }
        Ok(request)
    }
}

impl Client {
    /// Connects to `endpoint`, e.g. `http://127.0.0.1:7461`; without a scheme it is `http://`.
    ///
    /// # Errors
    /// [`Error::Endpoint`] for what is no address, [`Error::Key`] for a key that is no header,
    /// [`Error::Unreachable`] when nobody answers.
    pub async fn connect(endpoint: &str, options: Options) -> Result<Self, Error> {
        let bad = |reason: &str| Error::Endpoint {
            endpoint: endpoint.to_owned(),
            reason: reason.to_owned(),
        };
        let uri = match endpoint.split_once("://") {
            Some(("http", _)) => endpoint.to_owned(),
            Some(("https", _)) => {
                return Err(bad(
                    "this client speaks plain http; put a TLS proxy before the server",
                ));
            }
            Some(_) => return Err(bad("the scheme must be http")),
            None => format!("http://{endpoint}"),
        };
        let bearer = match &options.key {
            Some(Key(key)) => {
                let mut header: MetadataValue<Ascii> =
                    format!("Bearer {key}").parse().map_err(|_| Error::Key)?;
                header.set_sensitive(true);
                Some(header)
            }
            None => None,
        };
        let channel = Endpoint::from_shared(uri)
            .map_err(|error| bad(&reasons(&error)))?
            .connect_timeout(options.connect_timeout)
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(20))
            .tcp_nodelay(true)
            .connect()
            .await
            .map_err(|error| Error::Unreachable {
                endpoint: endpoint.to_owned(),
                reason: reasons(&error),
            })?;
        Ok(Self {
            channel: InterceptedService::new(channel, Bearer(bearer)),
            options,
        })
    }

    /// Creates an empty session. With a `request_id` it may be repeated safely.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub async fn create_session(&self, request: CreateSessionRequest) -> Result<Session, Error> {
        let response = self.sessions().create_session(self.call(request)).await?;
        session(response.into_inner().session)
    }

    /// The session as it is now.
    ///
    /// # Errors
    /// [`Error::Refused`]; `NOT_FOUND` if there is none.
    pub async fn get_session(&self, session_id: &str) -> Result<Session, Error> {
        let request = GetSessionRequest {
            session_id: session_id.to_owned(),
        };
        let response = self.sessions().get_session(self.call(request)).await?;
        session(response.into_inner().session)
    }

    /// All sessions of the tenant, oldest first, over all pages.
    ///
    /// # Errors
    /// [`Error::Refused`]; [`Error::Protocol`] if the pages do not come to an end.
    pub async fn list_sessions(&self) -> Result<Vec<Session>, Error> {
        let mut sessions = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = ListSessionsRequest {
                page_size: PAGE_SIZE,
                page_token: page_token.clone(),
            };
            let page = self
                .sessions()
                .list_sessions(self.call(request))
                .await?
                .into_inner();
            let came = page.sessions.len();
            sessions.extend(page.sessions);
            if page.next_page_token.is_empty() {
                return Ok(sessions);
            }
            if came == 0 || page.next_page_token == page_token {
                return Err(Error::protocol(
                    "the pages of the sessions do not come to an end",
                ));
            }
            page_token = page.next_page_token;
        }
    }

    /// Changes labels, time to live, or both.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub async fn update_session(
        &self,
        session_id: &str,
        update: SessionUpdate,
    ) -> Result<Session, Error> {
        let mut paths = Vec::new();
        let mut changed = Session {
            session_id: session_id.to_owned(),
            ..Session::default()
        };
        if let Some(labels) = update.labels {
            paths.push("labels".to_owned());
            changed.labels = labels;
        }
        if let Some(ttl) = update.ttl {
            paths.push("ttl".to_owned());
            changed.ttl = ttl.map(duration);
        }
        let request = UpdateSessionRequest {
            session: Some(changed),
            update_mask: Some(FieldMask { paths }),
        };
        let response = self.sessions().update_session(self.call(request)).await?;
        session(response.into_inner().session)
    }

    /// Ends a session and frees all it holds.
    ///
    /// # Errors
    /// [`Error::Refused`]; `NOT_FOUND` if there is none.
    pub async fn delete_session(&self, session_id: &str) -> Result<(), Error> {
        let request = DeleteSessionRequest {
            session_id: session_id.to_owned(),
        };
        self.sessions().delete_session(self.call(request)).await?;
        Ok(())
    }

    /// Creates a session with a copy of another's documents, state, `seq` and adapter version.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub async fn fork_session(&self, request: ForkSessionRequest) -> Result<Session, Error> {
        let response = self.sessions().fork_session(self.call(request)).await?;
        session(response.into_inner().session)
    }

    /// The documents of a session, in the order in which they were begun.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub async fn list_documents(&self, session_id: &str) -> Result<Vec<Document>, Error> {
        let request = ListDocumentsRequest {
            session_id: session_id.to_owned(),
        };
        let response = self.sessions().list_documents(self.call(request)).await?;
        Ok(response.into_inner().documents)
    }

    /// Forgets a document; from the returned version on, the session answers as if it had never come.
    ///
    /// # Errors
    /// [`Error::Refused`]; `NOT_FOUND` if the session has no document of this name.
    pub async fn forget_document(
        &self,
        session_id: &str,
        document_id: &str,
    ) -> Result<ForgetDocumentResponse, Error> {
        let request = ForgetDocumentRequest {
            session_id: session_id.to_owned(),
            document_id: document_id.to_owned(),
        };
        Ok(self
            .sessions()
            .forget_document(self.call(request))
            .await?
            .into_inner())
    }

    /// Opens a stream into a session; chunks are numbered on from what the session has accepted.
    ///
    /// # Errors
    /// [`Error::Refused`]; `NOT_FOUND` if there is no such session.
    pub async fn ingest(&self, session_id: &str, options: IngestOptions) -> Result<Ingest, Error> {
        let session = self.get_session(session_id).await?;
        let context = ContextServiceClient::new(self.channel.clone())
            .max_decoding_message_size(self.options.max_message_bytes);
        ingest::open(context, &session, options).await
    }

    /// Generates a continuation of the prompt.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub async fn generate(&self, request: GenerateRequest) -> Result<Generation, Error> {
        let mut request = Request::new(request);
        request.set_timeout(self.options.generate_timeout);
        let response = self.generation().generate(request).await?;
        Ok(Generation::new(response.into_inner()))
    }

    /// The log-probabilities of given continuations, in nats, in the order of the request.
    ///
    /// # Errors
    /// [`Error::Refused`]; [`Error::Protocol`] if the answer holds another number of scores.
    pub async fn score(&self, request: ScoreRequest) -> Result<ScoreResponse, Error> {
        let asked = request.continuations.len();
        let response = self
            .generation()
            .score(self.call(request))
            .await?
            .into_inner();
        if response.scores.len() != asked {
            let got = response.scores.len();
            return Err(Error::protocol(format!(
                "{asked} continuations got {got} scores"
            )));
        }
        Ok(response)
    }

    /// The models of the server, its default first.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub async fn list_models(&self) -> Result<Vec<Model>, Error> {
        let response = self
            .models()
            .list_models(self.call(ListModelsRequest {}))
            .await?;
        Ok(response.into_inner().models)
    }

    /// One model; an empty name is the default.
    ///
    /// # Errors
    /// [`Error::Refused`]; `NOT_FOUND` if there is none of this name.
    pub async fn get_model(&self, name: &str) -> Result<Model, Error> {
        let request = GetModelRequest {
            name: name.to_owned(),
        };
        let response = self.models().get_model(self.call(request)).await?;
        let model = response.into_inner().model;
        model.ok_or_else(|| Error::protocol("an answer about a model names none"))
    }

    /// Exports a session's newest adapter as a PEFT LoRA checkpoint into `folder`, which is created
    /// if need be. Sizes and SHA-256 digests are checked before any file gets its final name.
    ///
    /// # Errors
    /// [`Error::Refused`]; `FAILED_PRECONDITION` while the session has no version.
    /// [`Error::Integrity`] if other bytes came than were announced, [`Error::Io`] if they cannot be
    /// written.
    pub async fn export_adapter(&self, session_id: &str, folder: &Path) -> Result<Export, Error> {
        let request = Request::new(ExportAdapterRequest {
            session_id: session_id.to_owned(),
        });
        let response = AdapterServiceClient::new(self.channel.clone())
            .max_decoding_message_size(self.options.max_message_bytes)
            .export_adapter(request)
            .await?;
        export::receive(response.into_inner(), folder).await
    }

    /// A request with the deadline of a call with one answer.
    fn call<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.options.call_timeout);
        request
    }

    fn sessions(&self) -> SessionServiceClient<InterceptedService<Channel, Bearer>> {
        SessionServiceClient::new(self.channel.clone())
            .max_decoding_message_size(self.options.max_message_bytes)
    }

    fn generation(&self) -> GenerationServiceClient<InterceptedService<Channel, Bearer>> {
        GenerationServiceClient::new(self.channel.clone())
            .max_decoding_message_size(self.options.max_message_bytes)
    }

    fn models(&self) -> ModelServiceClient<InterceptedService<Channel, Bearer>> {
        ModelServiceClient::new(self.channel.clone())
            .max_decoding_message_size(self.options.max_message_bytes)
    }
}

/// An answer about a session must name one.
fn session(session: Option<Session>) -> Result<Session, Error> {
    session.ok_or_else(|| Error::protocol("an answer about a session names none"))
}

/// A span of time as the contract has it; what lies beyond its range is its end, 10,000 years.
pub(crate) fn duration(span: Duration) -> prost_types::Duration {
    prost_types::Duration::try_from(span).unwrap_or(prost_types::Duration {
        seconds: 315_576_000_000,
        nanos: 0,
    })
}

/// An error with all its causes in one line: the transport's own text is only "transport error".
fn reasons(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
