//! Measures what keys of text at large look like, for the gate of a trained generator.
//!
//! The second moment of unit keys at each site, over windows of text that nobody was told; with it a core knows how much of a key
//! is in it by chance. Start at [`measure`].

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use generator::{GATE_FILE, Gate, Generator, SiteId};
use lm::{
    Lm, LoadOptions,
    text::{Text, TokenId},
};

use crate::{
    Error,
    files::write_whole,
    init::{counted_tokens, look},
    random::Random,
};

/// How to measure a gate.
#[derive(Clone, Debug, clap::Args)]
pub struct GateArgs {
    /// The folder of the generator; its gate is written into it, in place of one that is there
    #[arg(long, value_name = "DIR")]
    pub generator: PathBuf,
    /// Text at large: JSON lines with a `text` each, compressed with zstd or not
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// Windows of text, each of another row
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub windows: u32,
    /// Doubt at which half of an imprint is left: 1 is that of text that it knows nothing of
    #[arg(long, default_value_t = 0.64)]
    pub threshold: f32,
    /// Doubt over which a gate closes
    #[arg(long, default_value_t = 0.03)]
    pub width: f32,
    /// Which windows are drawn
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Characters of a row that are looked at, for each token of a window.
const CHARS: usize = 16;
/// The share of malformed rows that is put up with.
const MALFORMED: f64 = 0.02;

/// Measures the gate of a generator and writes it into the generator's folder. `model`: the base's file or folder. Says where it lies.
///
/// # Errors
/// A variant per fault of data, model and generator; [`Error::NoData`] for too little text. What was there stays then.
pub fn measure(args: &GateArgs, model: &Path) -> Result<PathBuf, Error> {
    let lm = Lm::load(model, LoadOptions::default())?;
    let text = Text::load(model)?;
    let generator = Generator::load_ungated(&args.generator, &lm.shape())?;
    let windows = windows(args, &text, generator.config().window)?;
    let windows: Vec<&[TokenId]> = windows.iter().map(Vec::as_slice).collect();
    let keys = unit_moments(&generator, &lm, &windows)?;
    let gate = Gate::new(args.threshold, args.width, keys)?;
    let path = args.generator.join(GATE_FILE);
    let bytes = generator.gate_bytes(&gate)?;
    write_whole(&path, &bytes).map_err(|source| Error::io(&path, source))?;
    Ok(path)
}

/// Windows of as many tokens, from anywhere in as many rows, drawn of all.
fn windows(args: &GateArgs, text: &Text, length: usize) -> Result<Vec<Vec<TokenId>>, Error> {
    let wanted = args.windows as usize;
    let mut random = Random::new(args.seed, "gate");
    // A reservoir: every row has the same chance, and no more than is wanted is held.
    let mut pieces: Vec<String> = Vec::new();
    let mut seen = 0;
    rows::read(&args.data, MALFORMED, |row| {
        let text = row.get("text").and_then(|text| text.as_str());
        let text = text.ok_or("no `text`")?;
        let letters = text.chars().count();
        let chars = length.saturating_mul(CHARS);
        if letters < length {
            return Ok(());
        }
        seen += 1;
        let place = if pieces.len() < wanted {
            pieces.push(String::new());
            pieces.len() - 1
        } else {
            random.below(seen)
        };
        let from = random.below(letters.saturating_sub(chars).max(1));
        if let Some(piece) = pieces.get_mut(place) {
            *piece = text.chars().skip(from).take(chars).collect();
        }
        Ok(())
    })?;
    let mut windows = Vec::with_capacity(pieces.len());
    for piece in &pieces {
        let mut tokens = text.encode_plain(piece)?;
        tokens.truncate(length);
        windows.push(tokens);
    }
    windows.retain(|tokens| tokens.len() == length);
    if windows.is_empty() {
        return Err(Error::NoData {
            what: "text",
            detail: format!("no row of {} is {length} tokens long", args.data.display()),
        });
    }
    Ok(windows)
}

/// E[k kᵀ / |k|²] [R1, R1] over the tokens of windows, for each site.
fn unit_moments(
    generator: &Generator,
    lm: &Lm,
    windows: &[&[TokenId]],
) -> Result<Vec<Tensor>, Error> {
    let sites: Vec<(SiteId, Tensor)> = generator
        .sites()
        .iter()
        .map(|site| {
            let (r1, _, _) = site.ranks();
            let sums = Tensor::zeros((r1, r1), DType::F32, &Device::Cpu)?; // [R1, R1]
            Ok((site.id(), sums))
        })
        .collect::<Result<_, Error>>()?;
    let ids: Vec<SiteId> = sites.iter().map(|(id, _)| *id).collect();
    let mut count = 0;
    look(lm, windows, &ids, |group, seen| {
        let mut first = 0;
        for window in group {
            let (from, len) = counted_tokens(window, first);
            first += window.len();
            count += len;
            for ((site, (_, sums)), seen) in generator.sites().iter().zip(&sites).zip(seen) {
                let keys = site.keys(&seen.x.narrow(0, from, len)?.contiguous()?)?; // [T, R1]
                let lengths = keys.sqr()?.sum_keepdim(1)?.sqrt()?.maximum(1e-30)?; // [T, 1]
                let unit = keys.broadcast_div(&lengths)?; // [T, R1]
                kernels::accumulate_outer(&[(sums, &unit)], &unit, 0..len)?;
            }
        }
        Ok(())
    })?;
    let mean = |(_, sums): &(SiteId, Tensor)| Ok((sums / f64::from(count.max(1) as u32))?);
    sites.iter().map(mean).collect()
}
