//! The verbs of `imprint` that speak to a server: ingest, ask, chat, session, score, export, forget.
//!
//! Arguments here, one file a verb below. Every verb writes for people, or with `--json` one JSON
//! document (JSON lines where it streams), to standard output; progress goes to standard error and
//! only to a terminal. No verb ends the process: [`run`] returns and [`Failure::exit_code`] says
//! what to end with. Start at [`Verb`].

mod ask;
mod chat;
mod ingest;
mod manage;
mod output;
mod score;
mod view;

use std::{io, path::PathBuf, time::Duration};

use crate::{Client, Error, Key, Options, v1};
pub(crate) use output::{Align, Output, table};
pub(crate) use view::bytes;

/// The verbs that speak to a server.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Stream a text file into a session
    Ingest(IngestArgs),
    /// Ask a question; nothing of the session's context is in the prompt
    Ask(AskArgs),
    /// Talk with a session's model, line by line
    Chat(ChatArgs),
    /// List, show, create, fork and remove sessions
    Session(SessionArgs),
    /// Say how likely given continuations are
    Score(ScoreArgs),
    /// Write a session's adapter as a PEFT LoRA checkpoint
    Export(ExportArgs),
    /// Make a session forget one document, exactly
    Forget(ForgetArgs),
}

/// Where the server is and how to answer.
#[derive(Debug, Clone, clap::Args)]
pub struct Connection {
    /// The server
    #[arg(
        long,
        env = "IMPRINT_ENDPOINT",
        default_value = "http://127.0.0.1:7461",
        global = true
    )]
    pub endpoint: String,
    /// Bearer key, for a server that asks for one
    #[arg(long, env = "IMPRINT_KEY", hide_env_values = true, global = true)]
    pub key: Option<Key>,
    /// Answer in JSON: one document, or a line each where the verb streams
    #[arg(long, global = true)]
    pub json: bool,
    /// Seconds that a call may take
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400), global = true)]
    pub timeout: u64,
}

/// `imprint ingest`.
#[derive(Debug, clap::Args)]
pub struct IngestArgs {
    /// The session, or `new` to create one
    #[arg(long)]
    pub session: String,
    /// The document's name in the session [default: the file's name; for `-`, the server's choice]
    #[arg(long)]
    pub document: Option<String>,
    /// Bytes of text in a chunk; a resumed document must be cut as before
    #[arg(long, default_value_t = 8192, value_parser = clap::value_parser!(u32).range(16..=1_048_576))]
    pub chunk_bytes: u32,
    /// Go on with a document that broke off: chunks that the server has are compared, not applied again
    #[arg(long)]
    pub resume: bool,
    /// UTF-8 text; `-` reads standard input
    pub file: PathBuf,
    /// Where the server is.
    #[command(flatten)]
    pub connection: Connection,
}

/// How an answer is drawn.
#[derive(Debug, Clone, clap::Args)]
pub struct DrawArgs {
    /// 0 takes the likeliest token
    #[arg(long)]
    pub temperature: Option<f32>,
    /// Only the so many likeliest tokens
    #[arg(long)]
    pub top_k: Option<u32>,
    /// Only the likeliest tokens that together reach this probability
    #[arg(long)]
    pub top_p: Option<f32>,
    /// Only tokens at least this fraction as likely as the likeliest
    #[arg(long)]
    pub min_p: Option<f32>,
    /// Makes tokens that occurred less likely; 1 does not
    #[arg(long)]
    pub repetition_penalty: Option<f32>,
    /// Seed of the draw
    #[arg(long)]
    pub seed: Option<u64>,
    /// At most so many tokens
    #[arg(long, default_value_t = 128)]
    pub max_tokens: u32,
    /// Strength of the whole imprint: 0 is the bare model, 1 what was trained. Without it, as much of the imprint as the prompt
    /// means
    #[arg(long)]
    pub scale: Option<f32>,
}

/// `imprint ask`.
#[derive(Debug, clap::Args)]
pub struct AskArgs {
    /// The session; without one the bare model answers
    #[arg(long)]
    pub session: Option<String>,
    /// A string that ends the answer; `\n` and `\t` are understood [default: the end of the line]
    #[arg(long, value_parser = unescape)]
    pub stop: Vec<String>,
    /// The question
    pub question: String,
    /// How the answer is drawn.
    #[command(flatten)]
    pub draw: DrawArgs,
    /// Where the server is.
    #[command(flatten)]
    pub connection: Connection,
}

/// `imprint chat`.
#[derive(Debug, clap::Args)]
pub struct ChatArgs {
    /// The session; without one the bare model answers
    #[arg(long)]
    pub session: Option<String>,
    /// What the model is told to be
    #[arg(long)]
    pub system: Option<String>,
    /// Messages of the conversation that are kept in the prompt
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub keep: u16,
    /// How answers are drawn.
    #[command(flatten)]
    pub draw: DrawArgs,
    /// Where the server is.
    #[command(flatten)]
    pub connection: Connection,
}

/// `imprint session`.
#[derive(Debug, clap::Args)]
pub struct SessionArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: SessionAction,
    /// Where the server is.
    #[command(flatten)]
    pub connection: Connection,
}

/// What to do with sessions.
#[derive(Debug, clap::Subcommand)]
pub enum SessionAction {
    /// List all sessions, oldest first
    Ls,
    /// Show a session and its documents
    Show {
        /// The session
        session: String,
    },
    /// Remove sessions and all they hold
    Rm {
        /// The sessions
        #[arg(required = true)]
        sessions: Vec<String>,
    },
    /// Copy a session: documents, state and adapter version
    Fork {
        /// The session to copy
        session: String,
        /// What the copy is given.
        #[command(flatten)]
        given: GivenArgs,
    },
    /// Create an empty session
    Create {
        /// The model [default: the server's]
        #[arg(long, default_value = "", hide_default_value = true)]
        model: String,
        /// How windows become one state [default: the generator's]
        #[arg(long)]
        strategy: Option<Strategy>,
        /// Tokens in a window [default: the generator's]
        #[arg(long, default_value_t = 0, hide_default_value = true)]
        window: u32,
        /// A name for this request: repeating it returns the same session
        #[arg(long, default_value = "", hide_default_value = true)]
        request_id: String,
        /// What the session is given.
        #[command(flatten)]
        given: GivenArgs,
    },
}

/// Labels and time to live.
#[derive(Debug, Clone, clap::Args)]
pub struct GivenArgs {
    /// A label, KEY=VALUE; may be repeated
    #[arg(long = "label", value_parser = label, value_name = "KEY=VALUE")]
    pub labels: Vec<(String, String)>,
    /// Seconds that the session outlives its last use [default: until it is removed]
    #[arg(long, value_name = "SECONDS")]
    pub ttl: Option<u64>,
}

/// How the windows of a context become one state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Strategy {
    /// One window: the whole document at once
    Concat,
    /// Each window by itself, summed
    Parallel,
    /// Each window read with the imprint of those before it
    Sequential,
}

/// `imprint score`.
#[derive(Debug, clap::Args)]
pub struct ScoreArgs {
    /// The session; without one the bare model scores
    #[arg(long)]
    pub session: Option<String>,
    /// A question, put as `ask` puts it
    #[arg(long, required_unless_present = "prompt", conflicts_with = "prompt")]
    pub question: Option<String>,
    /// A prompt as it stands; `\n` and `\t` are understood
    #[arg(long, value_parser = unescape)]
    pub prompt: Option<String>,
    /// Strength of the whole imprint: 0 is the bare model, 1 what was trained. Without it, as much of the imprint as the prompt
    /// means
    #[arg(long)]
    pub scale: Option<f32>,
    /// The continuations, usually with a space in front; `\n` and `\t` are understood
    #[arg(required = true, value_parser = unescape)]
    pub continuations: Vec<String>,
    /// Where the server is.
    #[command(flatten)]
    pub connection: Connection,
}

/// `imprint export`.
#[derive(Debug, clap::Args)]
pub struct ExportArgs {
    /// The session
    #[arg(long)]
    pub session: String,
    /// The folder for adapter_config.json and adapter_model.safetensors
    #[arg(long, value_name = "FOLDER")]
    pub out: PathBuf,
    /// Where the server is.
    #[command(flatten)]
    pub connection: Connection,
}

/// `imprint forget`.
#[derive(Debug, clap::Args)]
pub struct ForgetArgs {
    /// The session
    #[arg(long)]
    pub session: String,
    /// The document
    pub document: String,
    /// Where the server is.
    #[command(flatten)]
    pub connection: Connection,
}

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// The command asks for what cannot be.
    #[error("{0}")]
    Usage(String),
    /// The server refused, cannot be reached, or sent what it should not.
    #[error(transparent)]
    Client(#[from] Error),
    /// Input could not be read.
    #[error("{name}: {source}")]
    Input {
        /// The file, or `standard input`.
        name: String,
        /// What the system said.
        source: io::Error,
    },
    /// Input is no text.
    #[error("{name} is not UTF-8: byte {at}")]
    NotText {
        /// The file, or `standard input`.
        name: String,
        /// Where the first wrong byte is, from 0.
        at: u64,
    },
    /// The answer could not be written.
    #[error("standard output: {0}")]
    Output(#[from] io::Error),
    /// Parts of the demonstration did not show what they should.
    #[error("the demonstration failed: {}", .0.join("; "))]
    Demo(Vec<String>),
}

impl Failure {
    /// 2 for a wrong command, 1 for all else.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Client(_)
            | Self::Input { .. }
            | Self::NotText { .. }
            | Self::Output(_)
            | Self::Demo(_) => 1,
        }
    }
}

/// Carries a verb out, writing to standard output. A reader of it that went away is no failure.
///
/// # Errors
/// [`Failure`]; nothing has been said about it yet.
pub async fn run(verb: Verb) -> Result<(), Failure> {
    let mut output = Output::stdout(verb.connection().json);
    quiet_pipe(run_with(verb, &mut output).await)
}

/// A closed pipe on standard output ends a verb early and well.
pub(crate) fn quiet_pipe<T: Default>(result: Result<T, Failure>) -> Result<T, Failure> {
    match result {
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            Ok(T::default())
        }
        other => other,
    }
}

async fn run_with(verb: Verb, output: &mut Output) -> Result<(), Failure> {
    let client = verb.connection().connect().await?;
    match verb {
        Verb::Ingest(args) => ingest::run(&client, &args, output).await,
        Verb::Ask(args) => ask::run(&client, args, output).await,
        Verb::Chat(args) => {
            let input = tokio::io::BufReader::new(tokio::io::stdin());
            chat::run(&client, &args, input, output).await
        }
        Verb::Session(args) => manage::session(&client, args.action, output).await,
        Verb::Score(args) => score::run(&client, args, output).await,
        Verb::Export(args) => manage::export(&client, &args, output).await,
        Verb::Forget(args) => manage::forget(&client, &args, output).await,
    }
}

impl Verb {
    fn connection(&self) -> &Connection {
        match self {
            Self::Ingest(args) => &args.connection,
            Self::Ask(args) => &args.connection,
            Self::Chat(args) => &args.connection,
            Self::Session(args) => &args.connection,
            Self::Score(args) => &args.connection,
            Self::Export(args) => &args.connection,
            Self::Forget(args) => &args.connection,
        }
    }
}

impl Connection {
    async fn connect(&self) -> Result<Client, Error> {
        let timeout = Duration::from_secs(self.timeout);
        let options = Options {
            key: self.key.clone(),
            call_timeout: timeout,
            generate_timeout: timeout,
            ..Options::default()
        };
        Client::connect(&self.endpoint, options).await
    }
}

impl DrawArgs {
    fn sampling(&self) -> v1::Sampling {
        v1::Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
        }
    }
}

impl From<Strategy> for v1::Strategy {
    fn from(strategy: Strategy) -> Self {
        match strategy {
            Strategy::Concat => Self::Concat,
            Strategy::Parallel => Self::Parallel,
            Strategy::Sequential => Self::Sequential,
        }
    }
}

/// The adapter of a session, or the bare model, at a strength.
fn adapter(session: Option<&str>, scale: Option<f32>) -> v1::AdapterSelection {
    v1::AdapterSelection {
        adapter_scale: scale,
        ..crate::prompt::adapter(session.unwrap_or_default())
    }
}

/// `\n`, `\t` and `\\` as a shell user writes them.
fn unescape(text: &str) -> Result<String, String> {
    let mut plain = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            plain.push(c);
            continue;
        }
        match chars.next() {
            Some('n') => plain.push('\n'),
            Some('t') => plain.push('\t'),
            Some('\\') => plain.push('\\'),
            Some(other) => {
                return Err(format!(
                    "\\{other} means nothing; write \\\\ for a backslash"
                ));
            }
            None => return Err("a lone backslash at the end; write \\\\".to_owned()),
        }
    }
    Ok(plain)
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("a label is KEY=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests;
