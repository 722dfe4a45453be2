//! The program `imprint`: a server, its clients' verbs, the demonstration, model files and measurements.
//!
//! Each verb is a call into a crate; here they are only named and wired. Start at [`Verb`].

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use anyhow::Context;
use clap::Parser;
use server::{
    Config, Server,
    config::{Device, Flags},
    machine::on_device,
    models,
};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Language models whose weights take the imprint of what each session tells them
#[derive(Debug, Parser)]
#[command(name = "imprint", version, propagate_version = true)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Serve a model over gRPC
    Serve(Flags),
    /// Show the whole job once: a text becomes an adapter, and what it changes is measured
    Demo {
        /// What is served meanwhile.
        #[command(flatten)]
        flags: Flags,
        /// How to demonstrate.
        #[command(flatten)]
        options: imprint_client::demo::Options,
    },
    /// Fetch and list model files
    Model {
        /// What to do.
        #[command(subcommand)]
        action: ModelAction,
    },
    /// Measure, beside peers
    Bench {
        /// What to measure.
        #[command(subcommand)]
        what: BenchWhat,
    },
    /// Train a generator for a model
    Train {
        /// The base: a name, a path or a hub id
        #[arg(long)]
        model: Option<String>,
        /// How to train.
        #[command(flatten)]
        args: train::Args,
    },
    /// Measure the gate of a trained generator, which holds its imprints back on text that they say nothing of
    Gate {
        /// The base: a name, a path or a hub id
        #[arg(long)]
        model: Option<String>,
        /// How to measure.
        #[command(flatten)]
        args: train::GateArgs,
    },
    /// Judge a generator: what an imprint is worth beside the context in the prompt
    Eval {
        /// What to do.
        #[command(subcommand)]
        what: EvalWhat,
    },
    /// What speaks to a server.
    #[command(flatten)]
    Client(imprint_client::cli::Verb),
}

#[derive(Debug, clap::Subcommand)]
enum BenchWhat {
    /// The engine by itself: prefill, ingest and decode, with and without adapters
    Offline {
        /// What is measured.
        #[command(flatten)]
        flags: Flags,
        /// How to measure.
        #[command(flatten)]
        args: bench::offline::Args,
    },
    /// A server under load: arrivals at their own times, what they waited for, and how much was answered
    Serve {
        /// What is served, where no server is named.
        #[command(flatten)]
        model: ModelFlags,
        /// Which load.
        #[command(flatten)]
        args: Box<bench::serve::Args>,
    },
    /// From a server's start to its first answer, and the memory that it holds
    Start {
        /// What is served.
        #[command(flatten)]
        model: ModelFlags,
        /// How to measure.
        #[command(flatten)]
        args: bench::start::Args,
    },
    /// Make tables and a plot of what was measured
    Report(bench::page::Args),
    /// Many sessions, few of them in memory: bytes of each tier, time to the first token
    Sessions {
        /// What is measured.
        #[command(flatten)]
        flags: Flags,
        /// How to measure.
        #[command(flatten)]
        args: bench::sessions::Args,
    },
    /// Answers, quiet and beside a long ingest: the time between two of their tokens
    Beside {
        /// What is measured.
        #[command(flatten)]
        flags: Flags,
        /// How to measure.
        #[command(flatten)]
        args: bench::beside::Args,
    },
    /// A session that grows: what its next window costs, and how soon a few tokens are visible
    Append {
        /// What is measured.
        #[command(flatten)]
        flags: Flags,
        /// How to measure.
        #[command(flatten)]
        args: bench::append::Args,
    },
}

#[derive(Debug, clap::Subcommand)]
enum EvalWhat {
    /// Run one task with all methods side by side
    Run {
        /// What is judged.
        #[command(flatten)]
        model: ModelFlags,
        /// Where the model runs: `cpu` or `cuda`
        #[arg(long)]
        device: Option<String>,
        /// How to judge.
        #[command(flatten)]
        args: Box<eval::run::Args>,
    },
    /// Make tables and a page of reports
    Report(eval::page::Args),
}

/// Of the server's flags those that name a model; its `--data` is another one.
#[derive(Debug, clap::Args)]
struct ModelFlags {
    /// The model: a name, a path or a hub id
    #[arg(long)]
    model: Option<String>,
    /// The generator: `default`, `none` or a folder
    #[arg(long)]
    generator: Option<String>,
    /// The configuration file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ModelFlags {
    /// As a command line has them.
    fn arguments(&self) -> Vec<String> {
        let Self {
            model,
            generator,
            config,
        } = self;
        let config = config.as_ref().map(|path| path.display().to_string());
        [
            ("--model", model.clone()),
            ("--generator", generator.clone()),
            ("--config", config),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some([name.to_owned(), value?]))
        .flatten()
        .collect()
    }
}

#[derive(Debug, clap::Subcommand)]
enum ModelAction {
    /// Fetch a model into the cache, and say where it lies
    Pull {
        /// The model: a name or a hub id
        #[arg(default_value = models::DEFAULT)]
        model: String,
    },
    /// List the models in the cache
    Ls,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Standard output is for answers.
    let filter = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new("info,h2=warn,hyper=warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .init();
    match run(arguments.verb) {
        Ok(code) => code,
        Err(error) => {
            // Nothing can be done if standard error is closed.
            drop(writeln!(io::stderr(), "imprint: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> anyhow::Result<ExitCode> {
    match verb {
        Verb::Serve(flags) => {
            let config = Config::load(&flags)?;
            let runtime = runtime(&config)?;
            let ended = runtime.block_on(serve(config));
            // A model that is being loaded, or a step of the engine, keeps nobody waiting.
            runtime.shutdown_background();
            ended
        }
        Verb::Demo { flags, options } => {
            let mut config = Config::load(&flags)?;
            if flags.listen.is_none() {
                config.listen = ([127, 0, 0, 1], 0).into();
            }
            // The demonstration calls without a key.
            config.keys.clear();
            runtime(&config)?.block_on(demo(config, options))
        }
        Verb::Model { action } => model(&action, &Config::load(&Flags::default())?.home),
        Verb::Bench {
            what: BenchWhat::Offline { flags, args },
        } => in_process(&flags, |model, generator, threads| {
            bench::offline::run(&args, model, generator, threads)
        }),
        Verb::Bench {
            what: BenchWhat::Serve { model, args },
        } => {
            client_runtime()?.block_on(bench::serve::run(&args, &model.arguments()))?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Bench {
            what: BenchWhat::Start { model, args },
        } => {
            client_runtime()?.block_on(bench::start::run(&args, &model.arguments()))?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Bench {
            what: BenchWhat::Report(args),
        } => {
            write!(io::stdout(), "{}", bench::page::run(&args)?)?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Bench {
            what: BenchWhat::Sessions { flags, args },
        } => in_process(&flags, |model, generator, threads| {
            bench::sessions::run(&args, model, generator, threads)
        }),
        Verb::Bench {
            what: BenchWhat::Beside { flags, args },
        } => in_process(&flags, |model, generator, threads| {
            bench::beside::run(&args, model, generator, threads)
        }),
        Verb::Bench {
            what: BenchWhat::Append { flags, args },
        } => in_process(&flags, |model, generator, threads| {
            bench::append::run(&args, model, generator, threads)
        }),
        Verb::Train { model, args } => {
            let (config, base) = base(model)?;
            train::run(&args, &base, &config.home, &mut io::stdout())?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Gate { model, args } => {
            let (_, base) = base(model)?;
            let path = train::measure_gate(&args, &base)?;
            writeln!(io::stdout(), "{}", path.display())?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Eval { what } => evaluate(what),
        Verb::Client(verb) => match client_runtime()?.block_on(imprint_client::cli::run(verb)) {
            Ok(()) => Ok(ExitCode::SUCCESS),
            Err(failure) => {
                drop(writeln!(io::stderr(), "imprint: {failure}"));
                Ok(ExitCode::from(failure.exit_code()))
            }
        },
    }
}

/// The configuration, and the file or folder of the model alone.
fn base(model: Option<String>) -> anyhow::Result<(Config, PathBuf)> {
    let config = Config::load(&Flags {
        model,
        ..Flags::default()
    })?;
    compute_threads(&config)?;
    let files = models::resolve(&config.model, "none", &config.home)?;
    Ok((config, files.model))
}

fn evaluate(what: EvalWhat) -> anyhow::Result<ExitCode> {
    let printed = match what {
        EvalWhat::Run {
            model,
            device,
            args,
        } => {
            let config = Config::load(&Flags {
                model: model.model,
                generator: model.generator,
                config: model.config,
                device,
                ..Flags::default()
            })?;
            compute_threads(&config)?;
            let files = models::resolve(&config.model, &config.generator, &config.home)?;
            let generator = files.generator.as_deref();
            let load = |settings: &_| on_device(&files.model, generator, settings, &config.cuda);
            let device = (config.device == Device::Cuda).then_some(&load as eval::run::Loading<'_>);
            eval::run::run(&args, &files.model, generator, device)?.markdown()
        }
        EvalWhat::Report(args) => eval::page::run(&args)?,
    };
    writeln!(io::stdout(), "{}", printed.trim())?;
    Ok(ExitCode::SUCCESS)
}

/// Measures the engine in this process: model, generator and threads as a server would have them.
fn in_process(
    flags: &Flags,
    measure: impl FnOnce(&Path, Option<&Path>, usize) -> anyhow::Result<()>,
) -> anyhow::Result<ExitCode> {
    let config = Config::load(flags)?;
    compute_threads(&config)?;
    let files = models::resolve(&config.model, &config.generator, &config.home)?;
    let generator = files.generator.as_deref();
    measure(&files.model, generator, rayon::current_num_threads())?;
    Ok(ExitCode::SUCCESS)
}

fn compute_threads(config: &Config) -> anyhow::Result<()> {
    if let Some(threads) = config.engine.threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build_global().context("compute threads")?;
    }
    Ok(())
}

fn runtime(config: &Config) -> anyhow::Result<tokio::runtime::Runtime> {
    compute_threads(config)?;
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    Ok(runtime.worker_threads(2).enable_all().build()?)
}

/// What calls a server needs one thread.
fn client_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    Ok(runtime.enable_all().build()?)
}

async fn serve(config: Config) -> anyhow::Result<ExitCode> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut running = tokio::select! {
        running = Server::start(config) => running?,
        // Nobody has been answered yet.
        _ = terminate.recv() => return Ok(ExitCode::SUCCESS),
        _ = interrupt.recv() => return Ok(ExitCode::SUCCESS),
    };
    let mut out = io::stdout();
    writeln!(out, "imprint listens on http://{}", running.address())?;
    if let Some(address) = running.metrics_address() {
        writeln!(out, "imprint tells metrics on http://{address}/metrics")?;
    }
    out.flush()?;
    let broken = tokio::select! {
        _ = terminate.recv() => false,
        _ = interrupt.recv() => false,
        () = running.broken() => true,
    };
    tracing::info!("shutting down");
    tokio::select! {
        ended = running.shutdown() => ended?,
        _ = terminate.recv() => anyhow::bail!("ended at once"),
        _ = interrupt.recv() => anyhow::bail!("ended at once"),
    }
    anyhow::ensure!(!broken, "the engine broke");
    Ok(ExitCode::SUCCESS)
}

async fn demo(config: Config, options: imprint_client::demo::Options) -> anyhow::Result<ExitCode> {
    let began = Instant::now();
    let running = Server::start(config).await?;
    tracing::info!(address = %running.address(), elapsed_ms = began.elapsed().as_millis(), "the server is ready");
    let endpoint = format!("http://{}", running.address());
    let report = imprint_client::demo::run(&endpoint, options).await;
    running.shutdown().await?;
    match report {
        Ok(_) => Ok(ExitCode::SUCCESS),
        Err(failure) => {
            drop(writeln!(io::stderr(), "imprint: {failure}"));
            Ok(ExitCode::from(failure.exit_code()))
        }
    }
}

fn model(action: &ModelAction, home: &Path) -> anyhow::Result<ExitCode> {
    let mut out = io::stdout();
    match action {
        ModelAction::Pull { model } => {
            let (_, path) = models::pull(model, home)?;
            writeln!(out, "{}", path.display())?;
        }
        ModelAction::Ls => {
            for models::Cached { name, path, bytes } in models::list(home)? {
                writeln!(
                    out,
                    "{name}\t{:.1} MB\t{}",
                    bytes as f64 / 1e6,
                    path.display()
                )?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn no_verb_has_two_options_of_one_name() {
        Arguments::command().debug_assert();
    }
}
