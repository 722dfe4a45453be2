//! A running server: what it is made of, how it begins and how it ends.
//!
//! The model is loaded before the first call is taken. At the end new calls are refused, running ones may go on for a while, then
//! they are told. Start at [`Server::start`].

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::AtomicU64},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use imprint_proto::{FILE_DESCRIPTOR_SET, v1};
use lm::text::Text;
use tokio::{net::TcpListener, sync::watch, task};
use tonic::{
    server::NamedService,
    transport::{self, server::TcpIncoming},
};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    config::{self, Config, Device},
    edge::{Edge, Phase},
    engine_thread::{self, Handle},
    grpc::{self, Shared},
    metrics::{self, Metrics},
    models::{self, Files},
    places::Places,
    sessions::{Rules, Sessions},
    states::States,
};

/// How often expired sessions are looked for.
const REAP: Duration = Duration::from_secs(1);
/// How long connections may take to end once nothing runs on them any more.
const FAREWELL: Duration = Duration::from_secs(2);
/// Connections may take up to so many bytes of headers in a call.
const HEADER_BYTES: u32 = 16 << 10;

/// Why a server does not start, or ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration cannot be.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// The model's files.
    #[error(transparent)]
    Models(#[from] models::Error),
    /// The engine cannot be had.
    #[error(transparent)]
    Engine(#[from] engine_thread::StartError),
    /// The tokenizer cannot be had.
    #[error("the model's tokenizer")]
    Text(#[from] lm::text::Error),
    /// The address cannot be bound.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The folder for durable sessions cannot be had.
    #[error("the data folder {}", path.display())]
    Data {
        /// The folder.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The transport.
    #[error("the transport")]
    Transport(#[from] transport::Error),
    /// The reflection service does not take our descriptors.
    #[error("the descriptors of the contract")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The engine broke while it served.
    #[error("the engine broke")]
    Broken,
    /// A task of the server panicked.
    #[error("a task of the server panicked")]
    Panicked,
}

/// Starts servers.
#[derive(Debug)]
pub struct Server;

/// A server that runs.
#[derive(Debug)]
pub struct Running {
    address: SocketAddr,
    metrics_address: Option<SocketAddr>,
    phase: watch::Sender<Phase>,
    drain: Duration,
    transport: task::JoinHandle<Result<(), transport::Error>>,
    reaper: task::JoinHandle<()>,
    metrics: Option<task::JoinHandle<()>>,
    /// All calls that hold something: none left when all places are free.
    requests: Arc<Places>,
    streams: Arc<Places>,
    broken: watch::Receiver<bool>,
    engine: Option<JoinHandle<()>>,
}

impl Server {
    /// Fetches and loads the model, binds the address and serves.
    ///
    /// # Errors
    /// Any [`Error`]: nothing runs then.
    pub async fn start(config: Config) -> Result<Running, Error> {
        let keys = config.check()?;
        if let Some(path) = &config.data {
            std::fs::create_dir_all(path).map_err(|source| Error::Data {
                path: path.clone(),
                source,
            })?;
            tracing::warn!(path = %path.display(), "sessions live in memory today; only snapshots, which end with the process, are written to the data folder");
        }
        // The address first: one that is taken should not cost the loading of a model.
        let (listener, address) = bind(config.listen).await?;
        let metrics_listener = match config.metrics.listen {
            Some(address) => Some(bind(address).await?),
            None => None,
        };
        let (model, generator, home) = (
            config.model.clone(),
            config.generator.clone(),
            config.home.clone(),
        );
        let resolve = move || models::resolve(&model, &generator, &home);
        let Files {
            name,
            model,
            generator,
        } = task::spawn_blocking(resolve)
            .await
            .map_err(|_| Error::Panicked)??;
        let began = Instant::now();
        let path = model.clone();
        let text = task::spawn_blocking(move || Text::load(&path));
        let settings = config.engine.settings();
        let (max_sessions, rules) = (settings.max_sessions, settings.clone());
        let counts = Arc::new(Metrics::new(&name));
        let place = config.snapshots();
        let cuda = (config.device == Device::Cuda).then(|| config.cuda.clone());
        let (engine, thread) = engine_thread::start(
            model,
            generator,
            (settings, cuda),
            Arc::clone(&counts),
            place,
        )
        .await?;
        // It was read beside the weights.
        let text = text.await.map_err(|_| Error::Panicked)??;
        let rules = session_rules(&config, &rules, &engine, &text);
        let elapsed_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::info!(
            model = name,
            generator = engine.model().generator.is_some(),
            elapsed_ms,
            "loaded"
        );

        let limits = store::Limits {
            max_chunks: config.limits.session_chunks,
            max_bytes: config.limits.session_bytes,
            ..store::Limits::default()
        };
        let (phase, phases) = watch::channel(Phase::Running);
        let places = |count, of_tenant, what| {
            Arc::new(Places::new(count, config.of_tenant(count, of_tenant), what))
        };
        let of = &config.limits;
        let requests = places(of.requests, of.tenant_requests, "requests");
        let streams = places(
            of.ingest_streams,
            of.tenant_ingest_streams,
            "ingest streams",
        );
        let log = Arc::new(store::Memory::new(limits));
        let shared = Arc::new(Shared {
            sessions: Sessions::new(engine.clone(), text.clone(), log, rules, max_sessions),
            engine: engine.clone(),
            text,
            model: name,
            prompt_bytes: config.limits.prompt_bytes,
            wait: Duration::from_millis(config.limits.wait_ms),
            open_wait: Duration::from_millis(config.limits.open_ms),
            metrics: Arc::clone(&counts),
            requests: Arc::clone(&requests),
            streams: Arc::clone(&streams),
            phase: phases.clone(),
            next_request: AtomicU64::new(1),
        });
        let broken = engine.broken();
        let reaper = tokio::spawn(reap(Arc::clone(&shared)));
        let router = router(&config, keys, phases.clone(), &shared, engine)?;
        let metrics_address = metrics_listener.as_ref().map(|(_, address)| *address);
        let metrics = metrics_listener
            .map(|(listener, _)| tokio::spawn(metrics::http::serve(listener, counts)));
        if let Some(address) = metrics_address {
            tracing::info!(%address, "metrics");
        }
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let mut ends = phases;
        let signal = async move {
            // An error means that `Running` is gone, and the server with it.
            drop(ends.wait_for(|phase| *phase >= Phase::Draining).await);
        };
        let transport = tokio::spawn(router.serve_with_incoming_shutdown(incoming, signal));
        Ok(Running {
            address,
            metrics_address,
            phase,
            drain: Duration::from_millis(config.shutdown.drain_ms),
            transport,
            reaper,
            metrics,
            requests,
            streams,
            broken,
            engine: Some(thread),
        })
    }
}

async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), Error> {
    let listen = |source| Error::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(listen)?;
    let address = listener.local_addr().map_err(listen)?;
    Ok((listener, address))
}

fn session_rules(config: &Config, engine: &engine::Config, handle: &Handle, text: &Text) -> Rules {
    let model = handle.model();
    Rules {
        chunk_bytes: config.limits.chunk_bytes,
        session_tokens: engine.max_session_tokens,
        concat_tokens: model
            .context_length
            .min(engine.kv_blocks.saturating_mul(engine.block_size)),
        documents: engine.max_documents,
        waiting_tokens: config.ingest.waiting_tokens,
        unread_tokens: config.ingest.unread_tokens,
        states: States::new(
            engine.state_budget_bytes,
            model
                .generator
                .as_ref()
                .map_or(0, |generator| generator.state_bytes),
        ),
        idle_publish: config.idle_publish(),
        vocab: model.vocab,
        bos: Shared::bos(handle, text),
        document_suffix: model
            .generator
            .as_ref()
            .map(|generator| generator.document_suffix.clone())
            .unwrap_or_default(),
    }
}

/// Ends sessions whose time is over, for as long as it is not aborted.
async fn reap(shared: Arc<Shared>) {
    let mut ticks = tokio::time::interval(REAP);
    loop {
        ticks.tick().await;
        shared.sessions.expire(Instant::now());
    }
}

fn router(
    config: &Config,
    keys: crate::auth::Keys,
    phase: watch::Receiver<Phase>,
    shared: &Arc<Shared>,
    engine: Handle,
) -> Result<transport::server::Router, Error> {
    use v1::{
        adapter_service_server::AdapterServiceServer, context_service_server::ContextServiceServer,
        generation_service_server::GenerationServiceServer,
        model_service_server::ModelServiceServer, session_service_server::SessionServiceServer,
    };
    let bytes = config.message_bytes();
    // The reporter lives as long as its task: until the engine breaks or the server ends.
    let (reporter, health) = tonic_health::server::health_reporter();
    let session = SessionServiceServer::new(grpc::session::Service(Arc::clone(shared)))
        .max_decoding_message_size(bytes);
    let context = ContextServiceServer::new(grpc::context::Service(Arc::clone(shared)))
        .max_decoding_message_size(bytes);
    let generation = GenerationServiceServer::new(grpc::generation::Service(Arc::clone(shared)))
        .max_decoding_message_size(bytes);
    let model = ModelServiceServer::new(grpc::model::Service(Arc::clone(shared)))
        .max_decoding_message_size(bytes);
    let adapter = AdapterServiceServer::new(grpc::adapter::Service(Arc::clone(shared)))
        .max_decoding_message_size(bytes);
    tokio::spawn(report(
        reporter,
        [
            name_of(&session),
            name_of(&context),
            name_of(&generation),
            name_of(&model),
            name_of(&adapter),
        ],
        phase.clone(),
        engine,
    ));
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let limits = &config.limits;
    let edge = Edge::new((), keys, phase, Arc::clone(&shared.metrics));
    Ok(transport::Server::builder()
        .max_concurrent_streams(limits.streams_per_connection)
        .concurrency_limit_per_connection(limits.streams_per_connection as usize)
        .http2_max_header_list_size(HEADER_BYTES)
        .http2_keepalive_interval(Some(Duration::from_millis(limits.keepalive_ms)))
        .http2_keepalive_timeout(Some(Duration::from_millis(limits.keepalive_timeout_ms)))
        .tcp_keepalive(Some(Duration::from_millis(limits.keepalive_ms)))
        .add_service(health)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(edge.before(session))
        .add_service(edge.before(context))
        .add_service(edge.before(generation))
        .add_service(edge.before(model))
        .add_service(edge.before(adapter)))
}

fn name_of<S: NamedService>(_: &S) -> &'static str {
    S::NAME
}

/// Reports SERVING until the server drains or the engine breaks.
async fn report(
    reporter: HealthReporter,
    services: [&'static str; 5],
    mut phase: watch::Receiver<Phase>,
    engine: Handle,
) {
    let all = || services.into_iter().chain([""]);
    for service in all() {
        reporter
            .set_service_status(service, ServingStatus::Serving)
            .await;
    }
    let mut broken = engine.broken();
    drop(engine);
    tokio::select! {
        ended = phase.wait_for(|phase| *phase >= Phase::Draining) => drop(ended),
        ended = broken.wait_for(|broken| *broken) => drop(ended),
    }
    for service in all() {
        reporter
            .set_service_status(service, ServingStatus::NotServing)
            .await;
    }
}

impl Running {
    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where `GET /metrics` is answered, if the configuration wants it.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_address
    }

    /// Resolves if the engine breaks: the server cannot answer any more.
    pub async fn broken(&mut self) {
        // An error means that the engine's thread is gone, which is the same.
        drop(self.broken.wait_for(|broken| *broken).await);
    }

    /// Refuses new calls, lets running ones finish for as long as the configuration says, then ends them.
    ///
    /// # Errors
    /// [`Error::Transport`], [`Error::Panicked`].
    pub async fn shutdown(mut self) -> Result<(), Error> {
        self.phase.send_replace(Phase::Draining);
        let idle = async {
            self.requests.free().await;
            self.streams.free().await;
        };
        if tokio::time::timeout(self.drain, idle).await.is_err() {
            tracing::warn!("calls still run; they end now");
        }
        self.phase.send_replace(Phase::Over);
        self.reaper.abort();
        if let Some(metrics) = &self.metrics {
            metrics.abort();
        }
        let ended = tokio::time::timeout(FAREWELL, &mut self.transport).await;
        let result = match ended {
            Ok(joined) => joined
                .map_err(|_| Error::Panicked)?
                .map_err(Error::Transport),
            // Connections that nobody reads from do not keep the server.
            Err(_) => {
                self.transport.abort();
                Ok(())
            }
        };
        if let Some(thread) = self.engine.take() {
            // All ways to the engine end with the services; a step takes a while at most.
            let joined = task::spawn_blocking(move || thread.join());
            match tokio::time::timeout(FAREWELL, joined).await {
                Ok(Ok(Ok(()))) => {}
                Ok(_) => return Err(Error::Panicked),
                Err(_) => tracing::warn!("the engine still works; leaving it"),
            }
        }
        result
    }
}
