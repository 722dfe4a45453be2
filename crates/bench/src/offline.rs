//! `imprint bench offline`: prefill, ingest and decode on the engine itself, no server between.
//!
//! Every repetition runs every case once, ours and the peer's in turn, so that a machine that slows down slows all of
//! them; figures are medians over repetitions, ratios are medians of the ratios within one repetition. Start at [`run`].

use std::path::{Path, PathBuf};

use anyhow::Result;
use engine::{Activations, Config, SessionId, TokenId};

use crate::{
    driver::Driver,
    machine::{self, Machine},
    peer::{Format, Peer},
    report::{Direction, Report, Samples, Settings},
};

/// Sequences of the batched cases.
const BATCH: usize = 8;
/// Sequences of the larger batch that decodes with and without adapters.
const WIDE: usize = 16;
/// Tokens of each of the prompts that are read side by side.
const PROMPT_OF_EIGHT: usize = 128;

/// What to measure.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Write the figures as JSON to FILE, or to standard output without one; otherwise a table is printed.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
    /// Measure llama.cpp on the same GGUF and thread count in the same run (needs Node.js; installs node-llama-cpp).
    #[arg(long)]
    pub peers: bool,
    /// The folder that peers are installed into.
    #[arg(long, value_name = "DIR", default_value = "target/peers")]
    pub peers_dir: PathBuf,
    /// A Python that has torch, transformers and gguf: measure its forward of the prompt in bf16 and f32 in the same run.
    #[arg(long, value_name = "PYTHON")]
    pub torch: Option<PathBuf>,
    /// Also decode with llama.cpp on the same weights in these formats, quantised again with the Python that `--torch` names.
    #[arg(
        long,
        value_enum,
        value_name = "FORMAT",
        requires = "peers",
        requires = "torch"
    )]
    pub peer_format: Vec<Format>,
    /// What activations are rounded to where weights are quantised: f32 (nothing) or int8.
    #[arg(long, value_name = "PROFILE", default_value_t = Activations::Int8)]
    pub activations: Activations,
    /// Only these cases (all without it).
    #[arg(long, value_enum, value_name = "CASE")]
    pub only: Vec<Case>,
    /// Repetitions of every case, after one that warms up and is not counted.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub repetitions: u16,
    /// Tokens of the prompt that is read alone; eight side by side have 128 each.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u16).range(2..=1024))]
    pub prefill_tokens: u16,
    /// Windows of the document that is ingested alone; eight side by side have one each.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub ingest_windows: u16,
    /// Tokens of each answer, behind a prompt of 64.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(2..=512))]
    pub decode_tokens: u16,
}

/// A group of cases that are measured in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Case {
    /// Prompts read.
    Prefill,
    /// Documents told, beside a plain prefill of the same windows.
    Ingest,
    /// Answers decoded.
    Decode,
}

/// Measures a model, and a generator if there is one, and prints or writes what came out. `threads` are those that the
/// engine computes on; peers get as many.
///
/// # Errors
/// The engine or the peer does not load or breaks, or the file cannot be written.
pub fn run(args: &Args, model: &Path, generator: Option<&Path>, threads: usize) -> Result<()> {
    let machine = Machine::here(threads);
    // What is measured again is computed again.
    let config = Config {
        activations: args.activations,
        prefix_cache: false,
        ..Config::default()
    };
    let mut driver = Driver::load(model, generator, config)?;
    let mut peers = Peers::default();
    if args.peers {
        peers.llama_cpp = Some(Peer::llama_cpp(&args.peers_dir, model, threads)?);
    }
    if let Some(python) = &args.torch {
        for &format in &args.peer_format {
            let digest = &driver.model().digest;
            let file = format.file(&args.peers_dir, model, digest, python)?;
            let peer = Peer::llama_cpp(&args.peers_dir, &file, threads)?;
            peers.formats.push((format, peer));
        }
    }
    if let Some(python) = &args.torch {
        peers.torch = Some(Peer::torch(python, model, threads)?);
    }
    let samples = measure(args, &mut driver, &mut peers)?;
    let settings = Settings {
        repetitions: args.repetitions,
        prefill_tokens: args.prefill_tokens,
        ingest_windows: args.ingest_windows,
        decode_prompt_tokens: DECODE_PROMPT,
        decode_tokens: args.decode_tokens,
        activations: args.activations.to_string(),
        batch: BATCH,
        wide_batch: WIDE,
        batch_prefill_tokens: PROMPT_OF_EIGHT,
    };
    let peers = [&peers.llama_cpp, &peers.torch].into_iter().flatten();
    let peers = peers.map(|peer| peer.name.clone()).collect();
    let report = Report::new(
        machine,
        machine::commit(),
        driver.model(),
        settings,
        peers,
        samples,
    );
    report.write(args.json.as_deref())
}

/// Tokens of the prompt that is decoded behind.
const DECODE_PROMPT: usize = 64;

/// Who is measured beside us.
#[derive(Default)]
struct Peers {
    llama_cpp: Option<Peer>,
    torch: Option<Peer>,
    /// llama.cpp with other files of the same weights.
    formats: Vec<(Format, Peer)>,
}

/// Runs all cases, one repetition more than asked for; the first is dropped.
fn measure(args: &Args, driver: &mut Driver, peers: &mut Peers) -> Result<Samples> {
    let vocab = driver.model().vocab;
    let window = driver
        .model()
        .generator
        .as_ref()
        .map(|generator| generator.window);
    let prompt = tokens(0, args.prefill_tokens.into(), vocab);
    let short = tokens(1, DECODE_PROMPT, vocab);
    let answer = usize::from(args.decode_tokens);

    // Every row of a batch reads something else.
    let windows: Vec<_> = (0..WIDE)
        .map(|row| tokens(100 + row, window.unwrap_or(PROMPT_OF_EIGHT), vocab))
        .collect();
    let windows: Vec<_> = windows.iter().map(Vec::as_slice).collect();
    let prompts = windows[..BATCH]
        .iter()
        .map(|tokens| &tokens[..tokens.len().min(PROMPT_OF_EIGHT)]);
    let prompts: Vec<_> = prompts.collect();
    let read: usize = prompts.iter().map(|prompt| prompt.len()).sum();
    let document = window.map(|window| tokens(2, window * usize::from(args.ingest_windows), vocab));

    // Whose adapter each row runs with: none, or each its own.
    let bare = [None; WIDE];
    let mut own = Vec::new();
    if window.is_some() {
        own.extend(driver.ingest(&windows)?.0.into_iter().map(Some));
    }

    let measured = |case| args.only.is_empty() || args.only.contains(&case);
    let mut samples = Samples::default();
    for repetition in 0..=args.repetitions {
        samples.begin();
        if measured(Case::Prefill) {
            let prefills = in_turn(
                repetition,
                vec![
                    ("prefill_1_bare", &bare[..1]),
                    ("prefill_1_adapter", &own[..own.len().min(1)]),
                    ("prefill_8_bare", &bare[..BATCH]),
                    ("prefill_8_distinct_adapters", &own[..own.len().min(BATCH)]),
                ],
            );
            for (name, sessions) in prefills {
                let (count, time) = match sessions {
                    [session] => (
                        prompt.len(),
                        driver.prefill([(*session, prompt.as_slice())])?,
                    ),
                    _ => (
                        read,
                        driver.prefill(sessions.iter().copied().zip(prompts.iter().copied()))?,
                    ),
                };
                samples.add(name, rate(count, time));
            }
            if let Some(torch) = &mut peers.torch {
                samples.add("torch_bf16_forward", torch.forward("bf16", &prompt)?);
                samples.add("torch_f32_forward", torch.forward("f32", &prompt)?);
            }
            if let Some(peer) = &mut peers.llama_cpp {
                samples.add("llama_cpp_prefill_1", peer.prefill(&[&prompt])?);
                samples.add("llama_cpp_prefill_8", peer.prefill(&prompts)?);
            }
        }

        if let (true, Some(window), Some(document)) = (measured(Case::Ingest), window, &document) {
            // The same tokens: read as a prompt, read as windows of their own, and told.
            let time = driver.prefill([(None, document.as_slice())])?;
            samples.add("prefill_of_the_document", rate(document.len(), time));
            let before = driver.usage().read_out;
            ingest(driver, &mut samples, "ingest_1", &[document])?;
            let time = driver.usage().read_out - before;
            samples.add("read_outs_of_1", rate(document.len(), time));
            let alone = document.chunks(window).map(|window| (None, window));
            let time = driver.prefill(alone)?;
            samples.add("prefill_of_the_windows_1", rate(document.len(), time));
            let side_by_side = windows[..BATCH].iter().map(|window| (None, *window));
            let time = driver.prefill(side_by_side)?;
            samples.add("prefill_of_the_windows_8", rate(BATCH * window, time));
            ingest(driver, &mut samples, "ingest_8", &windows[..BATCH])?;
        }

        if measured(Case::Decode) {
            let shared = [own.first().copied().flatten(); BATCH];
            let decodes = in_turn(
                repetition,
                vec![
                    ("decode_1_bare", &bare[..1]),
                    ("decode_1_adapter", &own[..own.len().min(1)]),
                    ("decode_8_shared_adapter", &shared[..own.len().min(BATCH)]),
                    ("decode_8_bare", &bare[..BATCH]),
                    ("decode_8_distinct_adapters", &own[..own.len().min(BATCH)]),
                    ("decode_16_bare", &bare),
                    ("decode_16_distinct_adapters", &own),
                ],
            );
            for (name, rows) in decodes {
                let (count, time) = driver.decode(rows, &short, answer)?;
                samples.add(name, rate(count, time));
            }
            if let Some(peer) = &mut peers.llama_cpp {
                let mut fastest = peer.decode(&short, 1, answer)?;
                samples.add("llama_cpp_decode_1", fastest);
                for (format, peer) in &mut peers.formats {
                    let rate = peer.decode(&short, 1, answer)?;
                    let name = match format {
                        Format::Q8_0 => "llama_cpp_q8_0_decode_1",
                        Format::Q4_0 => "llama_cpp_q4_0_decode_1",
                        Format::Bf16 => "llama_cpp_bf16_decode_1",
                    };
                    samples.add(name, rate);
                    fastest = fastest.max(rate);
                }
                if !peers.formats.is_empty() {
                    samples.add("llama_cpp_fastest_decode_1", fastest);
                }
                samples.add("llama_cpp_decode_8", peer.decode(&short, BATCH, answer)?);
            }
        }
    }
    samples.drop_first();
    for (name, ours, other, direction) in RATIOS {
        samples.ratio(name, ours, other, *direction);
    }
    Ok(samples)
}

/// A case: its name, and the session of each row.
type Rows<'a> = (&'static str, &'a [Option<SessionId>]);

/// The cases that have rows. What is compared stands side by side, every other time the other way round: the machine's speed wanders.
fn in_turn(repetition: u16, mut cases: Vec<Rows<'_>>) -> Vec<Rows<'_>> {
    cases.retain(|(_, rows)| !rows.is_empty());
    if repetition % 2 == 1 {
        cases.reverse();
    }
    cases
}

/// Tells documents to new sessions, side by side, and ends the sessions.
fn ingest(
    driver: &mut Driver,
    samples: &mut Samples,
    name: &'static str,
    documents: &[&[TokenId]],
) -> Result<()> {
    let (sessions, time) = driver.ingest(documents)?;
    for session in sessions {
        driver.close(session)?;
    }
    let told = documents.iter().map(|document| document.len()).sum();
    samples.add(name, rate(told, time));
    Ok(())
}

/// Ratios of figures: the name, ours, the other, and which way is better.
const RATIOS: &[(&str, &str, &str, Direction)] = &[
    (
        "prefill_vs_llama_cpp",
        "prefill_1_bare",
        "llama_cpp_prefill_1",
        Direction::Speed,
    ),
    (
        "prefill8_vs_llama_cpp",
        "prefill_8_bare",
        "llama_cpp_prefill_8",
        Direction::Speed,
    ),
    (
        "prefill8_adapters_vs_llama_cpp_bare",
        "prefill_8_distinct_adapters",
        "llama_cpp_prefill_8",
        Direction::Speed,
    ),
    (
        "prefill_adapter_vs_bare",
        "prefill_1_adapter",
        "prefill_1_bare",
        Direction::Speed,
    ),
    (
        "prefill8_adapters_vs_bare",
        "prefill_8_distinct_adapters",
        "prefill_8_bare",
        Direction::Speed,
    ),
    (
        "decode_vs_llama_cpp",
        "decode_1_bare",
        "llama_cpp_decode_1",
        Direction::Speed,
    ),
    (
        "decode_vs_llama_cpp_fastest",
        "decode_1_bare",
        "llama_cpp_fastest_decode_1",
        Direction::Speed,
    ),
    (
        "decode8_vs_llama_cpp",
        "decode_8_bare",
        "llama_cpp_decode_8",
        Direction::Speed,
    ),
    (
        "decode8_adapters_vs_llama_cpp_bare",
        "decode_8_distinct_adapters",
        "llama_cpp_decode_8",
        Direction::Speed,
    ),
    (
        "decode_adapter_vs_bare",
        "decode_1_adapter",
        "decode_1_bare",
        Direction::Speed,
    ),
    (
        "decode8_shared_adapter_vs_bare",
        "decode_8_shared_adapter",
        "decode_8_bare",
        Direction::Speed,
    ),
    (
        "decode8_adapters_vs_bare",
        "decode_8_distinct_adapters",
        "decode_8_bare",
        Direction::Speed,
    ),
    (
        "decode16_adapters_vs_bare",
        "decode_16_distinct_adapters",
        "decode_16_bare",
        Direction::Speed,
    ),
    (
        "prefill_vs_torch_bf16",
        "prefill_1_bare",
        "torch_bf16_forward",
        Direction::Speed,
    ),
    (
        "prefill_vs_torch_f32",
        "prefill_1_bare",
        "torch_f32_forward",
        Direction::Speed,
    ),
    (
        "ingest_vs_prefill",
        "ingest_1",
        "prefill_of_the_document",
        Direction::Time,
    ),
    (
        "ingest_vs_windows",
        "ingest_1",
        "prefill_of_the_windows_1",
        Direction::Time,
    ),
    (
        "read_outs_vs_windows",
        "read_outs_of_1",
        "prefill_of_the_windows_1",
        Direction::Time,
    ),
    (
        "ingest8_vs_windows",
        "ingest_8",
        "prefill_of_the_windows_8",
        Direction::Time,
    ),
];

/// Tokens that look like none in particular, the same in every run: the cost does not depend on which they are.
fn tokens(seed: usize, count: usize, vocab: usize) -> Vec<TokenId> {
    let ids = (0..count).map(|place| (seed * 7907 + place * 7919 + 101) % vocab);
    ids.filter_map(|id| u32::try_from(id).ok())
        .map(TokenId)
        .collect()
}

#[expect(
    clippy::cast_precision_loss,
    reason = "token counts are far below 2^52"
)]
fn rate(tokens: usize, time: std::time::Duration) -> f64 {
    tokens as f64 / time.as_secs_f64()
}
