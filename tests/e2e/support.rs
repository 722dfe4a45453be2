//! A server to test, and short ways to ask it.
//!
//! Start at `World`.

use std::path::PathBuf;

use imprint_proto::v1::{
    self, adapter_service_client::AdapterServiceClient,
    context_service_client::ContextServiceClient,
    generation_service_client::GenerationServiceClient, ingest_chunk::Content, ingest_request,
    ingest_response, session_service_client::SessionServiceClient,
};
use server::{Config, Running, Server};
use tempfile::TempDir;
use testkit::{GeneratorSpec, TinySpec, tiny_base, tiny_generator};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, transport::Channel};
use tonic_types::StatusExt;

/// Tokens of a window of the tiny generator.
pub(crate) const WINDOW: usize = 8;
/// Tokens of an answer that does not end while a test runs.
pub(crate) const ENDLESS: u32 = 30_000;
/// What the tiny generator puts behind a text document.
pub(crate) const SUFFIX: &str = "\n\n";

/// A server with a client's connection to it.
pub(crate) struct World {
    pub(crate) running: Running,
    pub(crate) channel: Channel,
    /// Holds the model's files.
    _folder: TempDir,
}

/// A folder with a tiny model and its generator, and a configuration that serves them.
pub(crate) fn tiny() -> (TempDir, Config) {
    tiny_of(&TinySpec::default())
}

fn tiny_of(spec: &TinySpec) -> (TempDir, Config) {
    let folder = tempfile::tempdir().unwrap();
    let (base, generator) = (folder.path().join("base"), folder.path().join("generator"));
    tiny_base(&base, spec);
    let form = GeneratorSpec {
        window: WINDOW,
        strategy: Some("parallel"),
        document_suffix: Some(SUFFIX),
        ..GeneratorSpec::default()
    };
    tiny_generator(&generator, spec, &form);
    let mut config = Config {
        listen: ([127, 0, 0, 1], 0).into(),
        model: text(base),
        generator: text(generator),
        home: folder.path().join("home"),
        ..Config::default()
    };
    config.ingest.idle_publish_ms = 0;
    (folder, config)
}

fn text(path: PathBuf) -> String {
    path.into_os_string().into_string().unwrap()
}

impl World {
    /// A server of the tiny model.
    pub(crate) async fn tiny() -> Self {
        Self::tiny_with(|_| ()).await
    }

    /// A server of the tiny model, configured otherwise.
    pub(crate) async fn tiny_with(change: impl FnOnce(&mut Config)) -> Self {
        let (folder, mut config) = tiny();
        change(&mut config);
        Self::start(folder, config).await
    }

    /// A server of a tiny model whose answers may have `ENDLESS` tokens, which take it longer than a test does.
    pub(crate) async fn endless(change: impl FnOnce(&mut Config)) -> Self {
        let (folder, mut config) = tiny_of(&TinySpec {
            context_length: 2 * ENDLESS as usize,
            ..TinySpec::default()
        });
        config.engine.kv_blocks = Some(4 * ENDLESS as usize / 16);
        change(&mut config);
        Self::start(folder, config).await
    }

    /// A server of SmolLM2 with the generator that ships.
    pub(crate) async fn smollm2() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = Config {
            listen: ([127, 0, 0, 1], 0).into(),
            model: text(testkit::smollm2_gguf()),
            generator: text(testkit::repository_root().join("models/smollm2-135m-instruct")),
            home: folder.path().join("home"),
            ..Config::default()
        };
        Self::start(folder, config).await
    }

    async fn start(folder: TempDir, config: Config) -> Self {
        let running = Server::start(config).await.unwrap();
        let endpoint = Channel::from_shared(format!("http://{}", running.address())).unwrap();
        // A small window, so that a reader that does not read is felt soon.
        let endpoint = endpoint.initial_stream_window_size(65_535);
        let channel = endpoint.connect().await.unwrap();
        Self {
            running,
            channel,
            _folder: folder,
        }
    }

    pub(crate) fn sessions(&self) -> SessionServiceClient<Channel> {
        SessionServiceClient::new(self.channel.clone())
    }

    pub(crate) fn context(&self) -> ContextServiceClient<Channel> {
        ContextServiceClient::new(self.channel.clone())
    }

    pub(crate) fn answers(&self) -> GenerationServiceClient<Channel> {
        GenerationServiceClient::new(self.channel.clone())
    }

    pub(crate) fn adapters(&self) -> AdapterServiceClient<Channel> {
        AdapterServiceClient::new(self.channel.clone())
    }

    /// A new session of the defaults.
    pub(crate) async fn session(&self) -> String {
        self.create(v1::CreateSessionRequest::default())
            .await
            .unwrap()
            .session_id
    }

    pub(crate) async fn create(
        &self,
        request: v1::CreateSessionRequest,
    ) -> Result<v1::Session, Status> {
        let created = self.sessions().create_session(request).await?;
        Ok(created.into_inner().session.unwrap())
    }

    pub(crate) async fn get(&self, session: &str) -> Result<v1::Session, Status> {
        let request = v1::GetSessionRequest {
            session_id: session.to_owned(),
        };
        Ok(self
            .sessions()
            .get_session(request)
            .await?
            .into_inner()
            .session
            .unwrap())
    }

    pub(crate) async fn documents(&self, session: &str) -> Vec<v1::Document> {
        let request = v1::ListDocumentsRequest {
            session_id: session.to_owned(),
        };
        self.sessions()
            .list_documents(request)
            .await
            .unwrap()
            .into_inner()
            .documents
    }

    /// Opens an ingest stream.
    pub(crate) async fn ingest(&self, session: &str) -> Ingest {
        Ingest::open(self.context(), session).await
    }

    /// Sends whole texts as documents of their own and returns the last version.
    pub(crate) async fn tell(&self, session: &str, documents: &[&str]) -> v1::IngestApplied {
        let from = self.get(session).await.unwrap().accepted_seq;
        let mut ingest = self.ingest(session).await;
        for (seq, document) in (from + 1..).zip(documents) {
            ingest
                .chunk(v1::IngestChunk {
                    end_of_document: true,
                    ..chunk(seq, document)
                })
                .await
                .unwrap();
        }
        ingest.finish().await.unwrap().unwrap()
    }

    /// An answer that goes on, read to its first tokens.
    pub(crate) async fn endless_answer(
        &self,
        session: Option<&str>,
    ) -> Streaming<v1::GenerateResponse> {
        let request = v1::GenerateRequest {
            adapter: session.and_then(adapter),
            ..ask("hello", ENDLESS)
        };
        let answer = self.answers().generate(request).await.unwrap();
        let mut answer = answer.into_inner();
        answer.message().await.unwrap().unwrap();
        answer
    }

    /// All of an answer.
    pub(crate) async fn generate(&self, request: v1::GenerateRequest) -> Result<Generated, Status> {
        let answer = self.answers().generate(request).await?.into_inner();
        collect(answer).await
    }

    pub(crate) async fn score(
        &self,
        request: v1::ScoreRequest,
    ) -> Result<v1::ScoreResponse, Status> {
        Ok(self.answers().score(request).await?.into_inner())
    }

    /// Ends the server, which must go well.
    pub(crate) async fn end(self) {
        drop(self.channel);
        self.running.shutdown().await.unwrap();
    }
}

/// All of an answer.
#[derive(Debug)]
pub(crate) struct Generated {
    pub(crate) text: String,
    pub(crate) tokens: Vec<u32>,
    pub(crate) logprobs: Vec<v1::TokenLogprob>,
    pub(crate) top: Vec<v1::TopLogprobs>,
    pub(crate) finished: v1::GenerateFinished,
}

/// Reads an answer to its end.
pub(crate) async fn collect(
    mut answer: Streaming<v1::GenerateResponse>,
) -> Result<Generated, Status> {
    use v1::generate_response::Message;
    let (mut text, mut tokens, mut logprobs, mut top) =
        (String::new(), Vec::new(), Vec::new(), Vec::new());
    let mut end = None;
    while let Some(message) = answer.message().await? {
        assert!(end.is_none(), "a message behind the end");
        match message.message.unwrap() {
            Message::Delta(delta) => {
                text.push_str(&delta.text);
                tokens.extend(delta.token_ids);
                logprobs.extend(delta.logprobs);
                top.extend(delta.top_logprobs);
            }
            Message::Finished(finished) => end = Some(finished),
        }
    }
    Ok(Generated {
        text,
        tokens,
        logprobs,
        top,
        finished: end.expect("an end"),
    })
}

/// An ingest stream.
pub(crate) struct Ingest {
    pub(crate) sender: Option<mpsc::Sender<v1::IngestRequest>>,
    pub(crate) answers: Streaming<v1::IngestResponse>,
}

impl Ingest {
    /// Opens a stream over a client's own connection.
    pub(crate) async fn open(mut context: ContextServiceClient<Channel>, session: &str) -> Self {
        let (sender, receiver) = mpsc::channel(4);
        let answers = context
            .ingest(ReceiverStream::new(receiver))
            .await
            .unwrap()
            .into_inner();
        let ingest = Self {
            sender: Some(sender),
            answers,
        };
        ingest
            .send(ingest_request::Message::Open(v1::IngestOpen {
                session_id: session.to_owned(),
            }))
            .await;
        ingest
    }

    pub(crate) async fn send(&self, message: ingest_request::Message) {
        // A stream that the server has ended says why in its answers.
        drop(
            self.sender
                .as_ref()
                .unwrap()
                .send(v1::IngestRequest {
                    message: Some(message),
                })
                .await,
        );
    }

    /// Sends a chunk and waits until it is accepted; versions that come before are passed over.
    pub(crate) async fn chunk(
        &mut self,
        chunk: v1::IngestChunk,
    ) -> Result<v1::IngestAccepted, Status> {
        self.send(ingest_request::Message::Chunk(chunk)).await;
        loop {
            let answer = self.answers.message().await?.expect("an answer");
            if let ingest_response::Message::Accepted(accepted) = answer.message.unwrap() {
                return Ok(accepted);
            }
        }
    }

    pub(crate) async fn flush(&self) {
        self.send(ingest_request::Message::Flush(v1::IngestFlush {}))
            .await;
    }

    /// Waits for a version that holds all chunks up to `seq`.
    pub(crate) async fn applied(&mut self, seq: u64) -> Result<v1::IngestApplied, Status> {
        loop {
            let answer = self.answers.message().await?.expect("an answer");
            match answer.message.unwrap() {
                ingest_response::Message::Applied(applied) if applied.seq >= seq => {
                    return Ok(applied);
                }
                _ => {}
            }
        }
    }

    /// Closes our side and returns the last version.
    pub(crate) async fn finish(mut self) -> Result<Option<v1::IngestApplied>, Status> {
        self.sender = None;
        let mut last = None;
        while let Some(answer) = self.answers.message().await? {
            if let ingest_response::Message::Applied(applied) = answer.message.unwrap() {
                last = Some(applied);
            }
        }
        Ok(last)
    }
}

/// A chunk of text that continues the open document.
pub(crate) fn chunk(seq: u64, text: &str) -> v1::IngestChunk {
    v1::IngestChunk {
        seq,
        content: Some(Content::Text(text.to_owned())),
        document_id: String::new(),
        end_of_document: false,
    }
}

/// A chunk of ids that continues the open document.
pub(crate) fn ids(seq: u64, ids: &[u32]) -> v1::IngestChunk {
    v1::IngestChunk {
        content: Some(Content::TokenIds(v1::TokenIds { ids: ids.to_vec() })),
        ..chunk(seq, "")
    }
}

/// The adapter of a session, all that was accepted in it.
pub(crate) fn adapter(session: &str) -> Option<v1::AdapterSelection> {
    Some(v1::AdapterSelection {
        session_id: session.to_owned(),
        ..v1::AdapterSelection::default()
    })
}

/// A prompt of plain text.
pub(crate) fn prompt(text: &str) -> Option<v1::Prompt> {
    Some(v1::Prompt {
        form: Some(v1::prompt::Form::Text(text.to_owned())),
    })
}

/// A greedy request for a few tokens of the bare model.
pub(crate) fn ask(text: &str, max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        prompt: prompt(text),
        max_tokens,
        ..v1::GenerateRequest::default()
    }
}

/// The reason in a status' ErrorInfo.
pub(crate) fn reason(status: &Status) -> String {
    status
        .get_details_error_info()
        .map(|info| info.reason)
        .unwrap_or_default()
}

/// The fields that a status complains of.
pub(crate) fn fields(status: &Status) -> Vec<String> {
    let request = status.get_details_bad_request();
    request
        .map(|bad| {
            bad.field_violations
                .into_iter()
                .map(|one| one.field)
                .collect()
        })
        .unwrap_or_default()
}

/// Holds a status to its code and reason.
pub(crate) fn refused(status: &Status, code: Code, why: &str) {
    assert_eq!(
        (status.code(), reason(status).as_str()),
        (code, why),
        "{status:?}"
    );
}
