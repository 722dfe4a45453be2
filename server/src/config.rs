//! The configuration: a TOML file, then the environment over it, then flags over both, read once and checked into types.
//!
//! The doc comments of the structs are the manual. An unknown key is refused with the nearest known one. In the environment a
//! key is `IMPRINT_` and its path in capitals: `limits.chunk_bytes` is `IMPRINT_LIMITS_CHUNK_BYTES`. This is the only place that
//! reads the environment. Start at [`Config::read`].

#[cfg(test)]
mod tests;

mod layers;
mod names;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use engine::Activations;
use serde::Deserialize;

use crate::{
    auth::{Keys, KeysError},
    snapshots::Place,
};

/// The port that the clients try by default.
const PORT: u16 = 7461;
/// What snapshots may take on disk.
const SNAPSHOT_BUDGET: u64 = 4 << 30;
/// Of a session of one document with the shipped generator, 5.8 MB and 11 KB a token, the core is kept from 22 tokens on, all from 48: what
/// reads in a few hundredths of a second is read again. Beside answers reading is held to a share of their time: 128 tokens take a second there,
/// and their snapshot some hundredths (docs/PERFORMANCE.md).
const SNAPSHOT_BYTES_PER_TOKEN: usize = 128 << 10;
/// What `imprint serve` can be told.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address to listen on; port 0 takes a free one. Without `keys` it must be a loopback address.
    pub listen: SocketAddr,
    /// The model: `smollm2-135m-instruct` (fetched once), a path to a GGUF file or to a folder in the Hugging Face layout, or a
    /// hub id such as `Qwen/Qwen3-0.6B`.
    pub model: String,
    /// The generator: `default` (the one that ships for the model; none if none does), `none`, or a path to a folder.
    pub generator: String,
    /// Where model files are cached; by default `~/.cache/imprint`.
    pub home: PathBuf,
    /// Folder for durable sessions. They live in memory today: the folder is created, and only snapshots of sessions that left memory, which
    /// end with the process, are written to it (without it, to `home`).
    pub data: Option<PathBuf>,
    /// Small budgets of the engine, where none are given: a few sessions of one user in 250 MB with the default model.
    pub low_memory: bool,
    /// Bearer keys, each with its tenant: `"a-long-random-key" = "tenant"`. A session is seen by its own tenant only. Without
    /// keys everybody is one tenant.
    pub keys: BTreeMap<String, String>,
    /// Bounds on what clients may ask.
    pub limits: Limits,
    /// How context is taken in.
    pub ingest: Ingest,
    /// Budgets of the engine.
    pub engine: Engine,
    /// Where the model runs: `cpu`, or `cuda` in a program built with that feature.
    pub device: Device,
    /// What a CUDA device is given.
    pub cuda: Cuda,
    /// What the server counts of itself.
    pub metrics: Metrics,
    /// How the server ends.
    pub shutdown: Shutdown,
}

/// Bounds on what clients may ask.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Bytes of a chunk's content; an id counts four. A message may be twice this and 64 KiB.
    pub chunk_bytes: usize,
    /// Bytes of a prompt or of one continuation; an id counts four.
    pub prompt_bytes: usize,
    /// Chunks in a session.
    pub session_chunks: usize,
    /// Bytes of content that a session's log holds.
    pub session_bytes: usize,
    /// Generate, Score and Export calls at once.
    pub requests: usize,
    /// Of these the most of one tenant; 0: half of them, or all where there is one tenant.
    pub tenant_requests: usize,
    /// Ingest streams at once.
    pub ingest_streams: usize,
    /// Of these the most of one tenant; 0: half of them, or all where there is one tenant.
    pub tenant_ingest_streams: usize,
    /// How long an Ingest stream may take to say which session it is about, in milliseconds.
    pub open_ms: u64,
    /// Streams of one connection at once.
    pub streams_per_connection: u32,
    /// How long a request waits for a version of its session if it has no deadline of its own, in milliseconds.
    pub wait_ms: u64,
    /// How often an idle connection is pinged, in milliseconds.
    pub keepalive_ms: u64,
    /// How long a ping may stay without an answer, in milliseconds.
    pub keepalive_timeout_ms: u64,
}

/// How context is taken in.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ingest {
    /// How long after a session's last chunk a version of it is published without being asked for, in milliseconds; 0: never.
    pub idle_publish_ms: u64,
    /// Context tokens of a session that are accepted and wait for the engine.
    /// Each chunk and each flush counts as 16 more.
    pub waiting_tokens: usize,
    /// Context tokens of a session that the engine holds unread, over those of its open window.
    pub unread_tokens: usize,
}

/// Budgets of the engine; what is absent keeps the engine's own default.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Engine {
    /// Compute threads; absent: one a core.
    pub threads: Option<usize>,
    /// Tokens of a step.
    pub step_tokens: Option<usize>,
    /// Of these the most for prompts and context together while an answer is running.
    pub max_bulk_beside_decode: Option<usize>,
    /// Blocks of the KV cache.
    pub kv_blocks: Option<usize>,
    /// Tokens of a block.
    pub block_size: Option<usize>,
    /// Whether what requests leave in the cache is kept for those of the same tenant that begin alike.
    pub prefix_cache: Option<bool>,
    /// Requests that decode at once.
    pub max_running: Option<usize>,
    /// Requests that wait.
    pub max_queued: Option<usize>,
    /// Sessions.
    pub max_sessions: Option<usize>,
    /// Documents of a session.
    pub max_documents: Option<usize>,
    /// Context tokens of a session.
    pub max_session_tokens: Option<usize>,
    /// Context tokens of all sessions that wait to be read.
    pub max_queued_tokens: Option<usize>,
    /// Bytes of all sessions' states.
    pub state_budget_bytes: Option<usize>,
    /// Bytes of what single tokens of all sessions' documents wrote.
    pub trace_budget_bytes: Option<usize>,
    /// Bytes of the cores of all sessions' versions, those included that running requests are pinned to.
    pub core_budget_bytes: Option<usize>,
    /// Bytes of snapshots on disk, of sessions that left memory; 0 keeps none.
    pub snapshot_budget_bytes: Option<u64>,
    /// A snapshot is kept where it takes at most so many bytes for each token of the session's log; other sessions are read again.
    pub snapshot_bytes_per_token: Option<usize>,
    /// Whether quantised weights are expanded to f32.
    pub dequantize: Option<bool>,
    /// What activations are rounded to where weights are quantised: `int8`, several times as fast and the default, or `f32`
    /// (nothing), which is the dequantised model.
    pub activations: Option<Activations>,
}

/// Where the model runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// What a CUDA device is given.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cuda {
    /// Which GPU, from 0.
    pub ordinal: i32,
    /// The driver's library.
    pub driver: PathBuf,
    /// cuBLAS 12 or 13.
    pub cublas: PathBuf,
    /// Cores in device memory: of the requests that run at once, and of sessions that are likely to ask next.
    pub slots: usize,
    /// Cores in pinned host memory behind them; all others are made ready from `engine.core_budget_bytes`.
    pub pinned: usize,
    /// Sums in device memory: of open windows, and of what sessions have read; those of others wait on the host.
    pub windows: usize,
    /// Whether matrices that a file has in Q4_0, Q4_1 or Q8_0 stay so in device memory; else they become bf16.
    pub quantised: bool,
}

/// What the server counts of itself.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// Address that answers `GET /metrics` over plain HTTP, without keys; port 0 takes a free one. Absent: nobody is answered.
    /// No session, tenant or text is named there.
    pub listen: Option<SocketAddr>,
}

/// How the server ends.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Shutdown {
    /// How long running requests may go on after SIGTERM or SIGINT, in milliseconds.
    pub drain_ms: u64,
}

impl fmt::Debug for Config {
    /// All but the bearer keys: of them their number.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            listen,
            model,
            generator,
            home,
            data,
            low_memory,
            keys,
            limits,
            ingest,
            engine,
            device,
            cuda,
            metrics,
            shutdown,
        } = self;
        f.debug_struct("Config")
            .field("listen", listen)
            .field("model", model)
            .field("generator", generator)
            .field("home", home)
            .field("data", data)
            .field("low_memory", low_memory)
            .field("keys", &keys.len())
            .field("limits", limits)
            .field("ingest", ingest)
            .field("engine", engine)
            .field("device", device)
            .field("cuda", cuda)
            .field("metrics", metrics)
            .field("shutdown", shutdown)
            .finish()
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, PORT)),
            model: crate::models::DEFAULT.to_owned(),
            generator: "default".to_owned(),
            home: PathBuf::from(".imprint"),
            data: None,
            low_memory: false,
            keys: BTreeMap::new(),
            limits: Limits::default(),
            ingest: Ingest::default(),
            engine: Engine::default(),
            device: Device::Cpu,
            cuda: Cuda::default(),
            metrics: Metrics::default(),
            shutdown: Shutdown::default(),
        }
    }
}

impl Default for Cuda {
    fn default() -> Self {
        Self {
            ordinal: 0,
            driver: PathBuf::from("libcuda.so.1"),
            cublas: PathBuf::from("libcublas.so.13"),
            slots: 256,
            pinned: 512,
            windows: 32,
            quantised: false,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            chunk_bytes: 1 << 20,
            prompt_bytes: 1 << 20,
            session_chunks: 1 << 20,
            session_bytes: 256 << 20,
            requests: 256,
            tenant_requests: 0,
            ingest_streams: 256,
            tenant_ingest_streams: 0,
            open_ms: 10_000,
            streams_per_connection: 256,
            wait_ms: 60_000,
            keepalive_ms: 30_000,
            keepalive_timeout_ms: 20_000,
        }
    }
}

impl Default for Ingest {
    fn default() -> Self {
        Self {
            idle_publish_ms: 200,
            waiting_tokens: 65_536,
            unread_tokens: 2_048,
        }
    }
}

impl Default for Shutdown {
    fn default() -> Self {
        Self { drain_ms: 10_000 }
    }
}

/// What the command line says; it wins over the environment and the file.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Flags {
    /// Address to listen on.
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<SocketAddr>,
    /// The model: a name, a path or a hub id.
    #[arg(long)]
    pub model: Option<String>,
    /// The generator: `default`, `none` or a folder.
    #[arg(long)]
    pub generator: Option<String>,
    /// The configuration file.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Folder for durable sessions.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Where the model runs: `cpu` or `cuda`.
    #[arg(long)]
    pub device: Option<String>,
    /// Small budgets of the engine, where none are given.
    #[arg(long)]
    pub low_memory: bool,
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no TOML.
    #[error("{}: {source}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where, and what.
        source: Box<toml::de::Error>,
    },
    /// There is no such key.
    #[error("unknown key `{key}`{}", .nearest.as_ref().map(|name| format!("; did you mean `{name}`?")).unwrap_or_default())]
    UnknownKey {
        /// The key with its path.
        key: String,
        /// The known one that is nearest to it, with its path.
        nearest: Option<String>,
    },
    /// There is no such variable.
    #[error("unknown variable `{name}`{}", .nearest.as_ref().map(|name| format!("; did you mean `{name}`?")).unwrap_or_default())]
    UnknownVariable {
        /// The variable.
        name: String,
        /// The known one that is nearest to it.
        nearest: Option<String>,
    },
    /// A value is of a wrong type.
    #[error("{0}")]
    Value(String),
    /// A value that cannot be.
    #[error("`{key}` is {value}, but must be {must}")]
    Range {
        /// The key with its path.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        must: &'static str,
    },
    /// The bearer keys cannot be used.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// An address that others can reach, and no keys.
    #[error(
        "{0} can be reached by others: set `keys`, or listen on a loopback address such as 127.0.0.1"
    )]
    OpenAddress(SocketAddr),
}

impl Config {
    /// Reads file (the flag's, else `IMPRINT_CONFIG`'s, else none), environment and flags.
    ///
    /// # Errors
    /// Any [`Error`]; the message names the key.
    pub fn load(flags: &Flags) -> Result<Self, Error> {
        Self::read(
            flags,
            std::env::vars_os().filter_map(|(name, value)| {
                Some((name.into_string().ok()?, value.into_string().ok()?))
            }),
        )
    }

    /// As `load`, in the given environment.
    ///
    /// # Errors
    /// Any [`Error`]; the message names the key.
    pub fn read(
        flags: &Flags,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, Error> {
        let table = layers::laid(flags, &environment.into_iter().collect())?;
        let config: Self = table
            .try_into()
            .map_err(|error| Error::Value(error.to_string().trim_end().to_owned()))?;
        config.check()?;
        Ok(config)
    }

    /// Checks what types cannot say, and returns the keys.
    ///
    /// # Errors
    /// [`Error::Range`], [`Error::Keys`], [`Error::OpenAddress`].
    pub fn check(&self) -> Result<Keys, Error> {
        let Limits {
            chunk_bytes,
            prompt_bytes,
            session_chunks,
            session_bytes,
            requests,
            tenant_requests: _,
            ingest_streams,
            tenant_ingest_streams: _,
            open_ms,
            streams_per_connection,
            wait_ms: _,
            keepalive_ms,
            keepalive_timeout_ms,
        } = self.limits;
        let positive = [
            ("limits.session_chunks", session_chunks),
            ("limits.session_bytes", session_bytes),
            ("limits.requests", requests),
            ("limits.ingest_streams", ingest_streams),
            (
                "limits.streams_per_connection",
                streams_per_connection as usize,
            ),
            (
                "limits.open_ms",
                usize::try_from(open_ms).unwrap_or(usize::MAX),
            ),
            (
                "limits.keepalive_ms",
                usize::try_from(keepalive_ms).unwrap_or(usize::MAX),
            ),
            (
                "limits.keepalive_timeout_ms",
                usize::try_from(keepalive_timeout_ms).unwrap_or(usize::MAX),
            ),
            ("engine.threads", self.engine.threads.unwrap_or(1)),
            ("cuda.slots", self.cuda.slots),
            ("cuda.pinned", self.cuda.pinned),
            ("cuda.windows", self.cuda.windows),
        ];
        for (key, value) in positive {
            if value == 0 {
                return Err(Error::Range {
                    key,
                    value: value.to_string(),
                    must: "1 or more",
                });
            }
        }
        for (key, bytes) in [
            ("limits.chunk_bytes", chunk_bytes),
            ("limits.prompt_bytes", prompt_bytes),
        ] {
            if !(16..=256 << 20).contains(&bytes) {
                return Err(Error::Range {
                    key,
                    value: bytes.to_string(),
                    must: "16 bytes to 256 MiB",
                });
            }
        }
        let counts = [
            ("ingest.waiting_tokens", self.ingest.waiting_tokens),
            ("ingest.unread_tokens", self.ingest.unread_tokens),
        ];
        for (key, tokens) in counts {
            if !(1..=1 << 28).contains(&tokens) {
                return Err(Error::Range {
                    key,
                    value: tokens.to_string(),
                    must: "1 to 2^28",
                });
            }
        }
        let keys = Keys::new(&self.keys)?;
        if keys.is_empty() && !self.listen.ip().is_loopback() {
            return Err(Error::OpenAddress(self.listen));
        }
        Ok(keys)
    }

    /// Of so many places those that one tenant may have: what is configured, else half of them where there are others.
    #[must_use]
    pub fn of_tenant(&self, places: usize, configured: usize) -> usize {
        let tenants: BTreeSet<&String> = self.keys.values().collect();
        match configured {
            0 if tenants.len() > 1 => places.div_ceil(2),
            0 => places,
            configured => configured,
        }
    }

    /// Bytes of a message that a client may send.
    #[must_use]
    pub fn message_bytes(&self) -> usize {
        self.limits.chunk_bytes.max(self.limits.prompt_bytes) * 2 + (64 << 10)
    }

    /// How long after the last chunk a version is published unasked; `None`: never.
    #[must_use]
    pub fn idle_publish(&self) -> Option<Duration> {
        (self.ingest.idle_publish_ms > 0)
            .then(|| Duration::from_millis(self.ingest.idle_publish_ms))
    }

    /// Where sessions that leave memory are kept; none if they are not.
    #[must_use]
    pub fn snapshots(&self) -> Option<Place> {
        let budget_bytes = self.engine.snapshot_budget();
        let dir = self.data.as_ref().unwrap_or(&self.home).join("snapshots");
        (budget_bytes > 0).then_some(Place { dir, budget_bytes })
    }
}

impl Engine {
    fn snapshot_budget(&self) -> u64 {
        self.snapshot_budget_bytes.unwrap_or(SNAPSHOT_BUDGET)
    }

    /// The engine's own configuration with these budgets in it.
    #[must_use]
    pub fn settings(&self) -> engine::Config {
        let mut settings = engine::Config::default();
        let Self {
            threads: _,
            step_tokens,
            max_bulk_beside_decode,
            kv_blocks,
            block_size,
            prefix_cache,
            max_running,
            max_queued,
            max_sessions,
            max_documents,
            max_session_tokens,
            max_queued_tokens,
            state_budget_bytes,
            trace_budget_bytes,
            core_budget_bytes,
            snapshot_budget_bytes: _,
            snapshot_bytes_per_token,
            dequantize,
            activations,
        } = self;
        let set = |to: &mut usize, value: &Option<usize>| *to = value.unwrap_or(*to);
        set(&mut settings.step_tokens, step_tokens);
        set(&mut settings.max_bulk_beside_decode, max_bulk_beside_decode);
        set(&mut settings.kv_blocks, kv_blocks);
        set(&mut settings.block_size, block_size);
        set(&mut settings.max_running, max_running);
        set(&mut settings.max_queued, max_queued);
        set(&mut settings.max_sessions, max_sessions);
        set(&mut settings.max_documents, max_documents);
        set(&mut settings.max_session_tokens, max_session_tokens);
        set(&mut settings.max_queued_tokens, max_queued_tokens);
        set(&mut settings.state_budget_bytes, state_budget_bytes);
        set(&mut settings.trace_budget_bytes, trace_budget_bytes);
        set(&mut settings.core_budget_bytes, core_budget_bytes);
        settings.prefix_cache = prefix_cache.unwrap_or(settings.prefix_cache);
        settings.snapshot_bytes_per_token = if self.snapshot_budget() == 0 {
            0
        } else {
            snapshot_bytes_per_token.unwrap_or(SNAPSHOT_BYTES_PER_TOKEN)
        };
        settings.dequantize = dequantize.unwrap_or(settings.dequantize);
        settings.activations = activations.unwrap_or(settings.activations);
        settings
    }
}
