//! A training run from recipe to checkpoints.
//!
//! Draw, step, tell, now and then validate and save; what is random hangs on one number that is saved with the rest.
//! Start at [`run`].

use std::{
    cell::RefCell,
    collections::HashMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::Instant,
};

use candle_core::Tensor;
use generator::{Config, Generator, Trainee};
use lm::{Lm, LoadOptions, text::Text};
use serde_json::{Map, Value, json};

use crate::{
    Error,
    batch::{Batch, Draw, Kind},
    checkpoint::{Standing, export, load_state, save_state, told},
    compute::Place,
    data::{Format, Pool},
    estimate::Estimate,
    files::write_whole,
    init,
    optimizer::Masters,
    progress::{Progress, running},
    random::Random,
    recipe::{Length, Recipe, Strategy},
    step::{Figures, Model},
    teacher::Said,
};

/// Longest adapter_config.json that is read, in bytes.
const MAX_CONFIG: u64 = 1 << 20;
/// Tokens that a question may have by default where the checkpoint does not say how to ask.
const PROMPT: &str = "Question: {question}\nAnswer:";

/// Most bytes of what teachers said, in memory and in their file.
const SAID_BYTES: usize = 512 << 20;

/// How to train.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The recipe
    #[arg(long = "config", value_name = "FILE", visible_alias = "recipe")]
    pub recipe: PathBuf,
    /// Where state, metrics and checkpoints go; a run that is there goes on
    #[arg(long, value_name = "DIR", default_value = "runs/train")]
    pub out: PathBuf,
    /// The folder of the training files, in place of the recipe's `data.folder`
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Start at this generator, in place of the recipe's `start`
    #[arg(long, value_name = "DIR")]
    pub start: Option<PathBuf>,
    /// Length of the run, in place of the recipe's
    #[arg(long, value_name = "MINUTES", conflicts_with = "steps")]
    pub minutes: Option<f64>,
    /// Length of the run, in place of the recipe's
    #[arg(long, value_name = "STEPS")]
    pub steps: Option<u64>,
    /// Seed, in place of the recipe's
    #[arg(long)]
    pub seed: Option<u64>,
    /// Where to compute: cpu, cuda or cuda:N (in a program built with the feature `cuda-train`)
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: Place,
    /// Tell what it would cost, and train nothing
    #[arg(long, conflicts_with = "probe")]
    pub dry_run: bool,
    /// Take loss and gradients of the batches in FILE (such as not-finite.json) at the start, write them to probe.json and
    /// probe.safetensors in the folder of `--out`, and train nothing
    #[arg(long, value_name = "FILE")]
    pub probe: Option<PathBuf>,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// Steps taken, those before a resumption included.
    pub steps: u64,
    /// The lowest held-out figure.
    pub best: Option<f64>,
    /// Where the best generator is.
    pub best_dir: PathBuf,
}

/// Trains as the arguments say. `model`: the base's file or folder; `home`: where caches go; `out`: standard output.
///
/// # Errors
/// A variant per fault of recipe, data, model and checkpoint; [`Error::NotFinite`] with the batch saved.
pub fn run(args: &Args, model: &Path, home: &Path, out: &mut dyn Write) -> Result<Ended, Error> {
    let mut recipe = Recipe::load(&args.recipe)?;
    if let Some(seed) = args.seed {
        recipe.seed = seed;
    }
    match (args.steps, args.minutes) {
        (Some(steps), _) => recipe.length = Length::Steps(steps),
        (None, Some(minutes)) => recipe.length = Length::Minutes(minutes),
        (None, None) => {}
    }
    if let Some(start) = &args.start {
        (recipe.start, recipe.generator) = (Some(start.clone()), None);
    }
    if let Some(folder) = &args.data {
        recipe.data.folder.clone_from(folder);
    }
    recipe.checked().map_err(|detail| Error::Recipe {
        path: args.recipe.clone(),
        detail,
    })?;
    let mut lm = Lm::load(model, LoadOptions::default())?;
    let text = Text::load(model)?;
    let name = model
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let (config_keys, config) = config_of(&recipe, &lm, &name)?;

    let format = Format {
        text,
        prompt: config
            .prompt_format
            .clone()
            .unwrap_or_else(|| PROMPT.to_owned()),
        window: recipe.data.window.unwrap_or(config.window),
        query: recipe.data.query,
        suffix: recipe.data.suffix.clone(),
    };
    if format.window < 3 || format.window + 2 * format.query + 64 > lm.config().context_length {
        return Err(Error::Recipe {
            path: args.recipe.clone(),
            detail: format!(
                "windows of {} and queries of {} tokens in a model of {}",
                format.window,
                format.query,
                lm.config().context_length
            ),
        });
    }
    let strategy = match config.strategy {
        generator::Strategy::Sequential => Strategy::Sequential,
        generator::Strategy::Parallel | generator::Strategy::Concat => Strategy::Parallel,
    };
    if args.dry_run {
        let start = untrained(&recipe, &config, &lm)?;
        let estimate = Estimate::of(&recipe, &lm, &start, args.device)?;
        write!(out, "{estimate}")
            .map_err(|source| Error::io(Path::new("standard output"), source))?;
        return Ok(Ended {
            steps: 0,
            best: None,
            best_dir: args.out.join("best"),
        });
    }

    let device = args.device.open()?;
    let plain = args.device.is_plain(recipe.compute);
    fs::create_dir_all(&args.out).map_err(|source| Error::io(&args.out, source))?;
    if let Some(batches) = &args.probe {
        let start = untrained(&recipe, &config, &lm)?;
        let mut masters = Masters::of(&start, &device)?;
        if plain {
            lm.train_on(device, recipe.compute.dtype());
        }
        load_state(&args.out, &mut masters)?;
        let model = Model {
            lm: &lm,
            strategy,
            losses: recipe.loss,
            said: recipe
                .loss
                .teacher_top_k
                .map(|k| RefCell::new(Said::new(k, 0))),
        };
        let found = probe(&model, &masters, batches, &args.out)?;
        writeln!(out, "{found}")
            .map_err(|source| Error::io(Path::new("standard output"), source))?;
        return Ok(Ended {
            steps: 0,
            best: None,
            best_dir: args.out.join("best"),
        });
    }
    let say = |line: &str| drop(writeln!(std::io::stderr(), "{line}"));
    let pool = Pool::load(
        &recipe,
        &recipe.data.folder,
        &format,
        lm.digest(),
        home,
        &say,
    )?;
    say(&format!(
        "{} pieces of text, {} contexts with questions; of {} rows {} were malformed and {} held out",
        pool.train.pieces.len(),
        pool.train.asked.len(),
        pool.told.rows,
        pool.told.malformed,
        pool.told.held_out
    ));
    let start = match &recipe.start {
        Some(start) => {
            let start = Trainee::of(&Generator::load(start, &lm.shape())?)?;
            match &recipe.grow {
                Some(grow) => {
                    say("statistics of the base, for longer keys");
                    let contexts = contexts(&pool, grow.contexts, format.window);
                    init::grown(&start, config, grow, &lm, &contexts)?
                }
                None => start,
            }
        }
        None => new(&recipe, config, &lm, &pool, format.window)?,
    };
    let masters = Masters::of(&start, &device)?;
    if plain {
        // Statistics were taken by the kernels.
        lm.train_on(device, recipe.compute.dtype());
    }
    let mut run = Run {
        model: Model {
            lm: &lm,
            strategy,
            losses: recipe.loss,
            said: recipe.loss.teacher_top_k.map(|k| {
                let folder = home.join("teachers");
                let base: String = lm.digest().chars().take(16).collect();
                let name = format!("{base}-{}", recipe.compute.dtype().as_str());
                RefCell::new(Said::in_folder(k, SAID_BYTES, &folder, &name))
            }),
        },
        recipe: &recipe,
        format: &format,
        pool: &pool,
        folder: &args.out,
        config: config_keys,
        masters,
    };
    // Operation after operation on the pool's own thread.
    kernels::on_pool(|| run.train())
}

/// adapter_config.json of what is trained: that of the start or a new one, with the recipe's changes.
fn config_of(recipe: &Recipe, lm: &Lm, name: &str) -> Result<(Map<String, Value>, Config), Error> {
    let mut keys = match (&recipe.start, &recipe.generator) {
        (Some(start), _) => {
            let path = start.join("adapter_config.json");
            let io = |source| Error::io(&path, source);
            if fs::metadata(&path).map_err(io)?.len() > MAX_CONFIG {
                return Err(Error::Damaged {
                    path,
                    detail: format!("it is longer than {MAX_CONFIG} bytes"),
                });
            }
            let text = fs::read(&path).map_err(io)?;
            serde_json::from_slice(&text).map_err(|error| Error::Damaged {
                path: path.clone(),
                detail: error.to_string(),
            })?
        }
        (None, Some(new)) => init::config(new, name, lm.digest(), PROMPT, &recipe.data.suffix),
        (None, None) => Map::new(),
    };
    if let (Some(grow), None) = (&recipe.grow, &recipe.generator) {
        let r2 = keys.get("fastlora_r").and_then(Value::as_u64).unwrap_or(0);
        keys.insert("fastlora_inter_size".to_owned(), json!(grow.r1));
        keys.insert(
            "fastlora_max_rank".to_owned(),
            json!(r2.min(grow.r1 as u64)),
        );
    }
    for (key, value) in &recipe.config {
        keys.insert(key.clone(), json!(value));
    }
    let config = Config::parse(Value::Object(keys.clone()).to_string().as_bytes())?;
    if !config.names_base(lm.digest()) {
        return Err(lm::Error::ForeignBase {
            expected: config.base_digest.join(" or "),
            found: lm.digest().to_owned(),
        }
        .into());
    }
    Ok((keys, config))
}

/// A generator of the recipe's shape, without statistics: to be measured, or filled with a saved state, not to be trained.
fn untrained(recipe: &Recipe, config: &Config, lm: &Lm) -> Result<Trainee, Error> {
    match (&recipe.start, &recipe.generator) {
        (Some(start), _) => {
            let start = Trainee::of(&Generator::load(start, &lm.shape())?)?;
            match &recipe.grow {
                Some(grow) => init::widened(&start, config.clone(), grow, lm),
                None => Ok(start),
            }
        }
        (None, Some(new)) => {
            let mut new = new.clone();
            new.init = crate::recipe::Init::Random;
            let mut random = Random::new(recipe.seed, "start");
            init::begin(&new, config.clone(), lm, &[], &[], &mut random)
        }
        (None, None) => Err(nothing_to_start()),
    }
}

fn nothing_to_start() -> Error {
    Error::NoData {
        what: "start",
        detail: "the recipe names neither a checkpoint nor a new generator".to_owned(),
    }
}

fn new(
    recipe: &Recipe,
    config: Config,
    lm: &Lm,
    pool: &Pool,
    window: usize,
) -> Result<Trainee, Error> {
    let Some(new) = &recipe.generator else {
        return Err(nothing_to_start());
    };
    let contexts = contexts(pool, new.contexts, window);
    let mut random = Random::new(recipe.seed, "start");
    init::begin(new, config, lm, &contexts, &pool.train.pieces, &mut random)
}

/// Windows that statistics of the base are taken from.
fn contexts(pool: &Pool, count: usize, window: usize) -> Vec<&[lm::text::TokenId]> {
    let pieces = pool.train.pieces.iter().rev().take(count);
    pieces
        .map(|piece| &piece[..window.min(piece.len())])
        .collect()
}

/// Loss and figures of the batches in a file; their gradients go to probe.safetensors in `folder`.
fn probe(model: &Model<'_>, masters: &Masters, file: &Path, folder: &Path) -> Result<Value, Error> {
    let damaged = |detail: String| Error::Damaged {
        path: file.to_owned(),
        detail,
    };
    #[derive(serde::Deserialize)]
    struct Saved {
        batches: Vec<Batch>,
    }
    let text = fs::read(file).map_err(|source| Error::io(file, source))?;
    let Saved { batches } =
        serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
    let mut told_batches = Vec::new();
    let mut sums: HashMap<String, Tensor> = HashMap::new();
    for batch in &batches {
        batch.check().map_err(damaged)?;
        let outcome = model.losses(&masters.trainee, batch, true)?;
        told_batches.push(json!({ "loss": outcome.value()?, "figures": told(&outcome.figures) }));
        let Some(gradients) = outcome.backward()? else {
            continue;
        };
        for site in masters.trainee.sites() {
            for part in generator::PARTS {
                if let Some(gradient) = site.part(part).and_then(|tensor| gradients.get(tensor)) {
                    let name = format!("{}.{part}", site.id);
                    let sum = match sums.remove(&name) {
                        Some(sum) => kernels::add(&sum, gradient)?,
                        None => gradient.clone(),
                    };
                    sums.insert(name, sum);
                }
            }
        }
    }
    candle_core::safetensors::save(&sums, folder.join("probe.safetensors"))?;
    let found = json!({ "batches": told_batches });
    let path = folder.join("probe.json");
    write_whole(&path, found.to_string().as_bytes()).map_err(|source| Error::io(&path, source))?;
    Ok(found)
}

/// A run on its way.
struct Run<'a> {
    model: Model<'a>,
    recipe: &'a Recipe,
    format: &'a Format,
    pool: &'a Pool,
    folder: &'a Path,
    /// adapter_config.json of what is saved.
    config: Map<String, Value>,
    masters: Masters,
}

impl Run<'_> {
    fn train(&mut self) -> Result<Ended, Error> {
        let (recipe, length) = (self.recipe, self.recipe.length);
        let mut standing = self.resume()?;
        let mut random = Random::of_state(standing.random);
        let mut progress = Progress::new(self.folder, length, standing.step)?;
        if standing.step > 0 {
            progress.say(&format!("resumed behind step {}", standing.step));
        }
        let held_out = self.held_out()?;
        let mut saved = Instant::now();
        while Progress::share(length, &standing) < 1.0 {
            let began = Instant::now();
            let share = Progress::share(length, &standing);
            let (mut loss, mut tokens) = (0.0, 0);
            let mut figures = [Figures::default(); 4];
            for _ in 0..recipe.optimizer.accumulate {
                let draw = Draw {
                    recipe,
                    format: self.format,
                    split: &self.pool.train,
                };
                let batch = draw.batch(&mut random)?;
                let part = 1.0 / recipe.optimizer.accumulate as f32;
                loss +=
                    f64::from(part) * self.learn(&batch, part, standing.step + 1, &mut figures)?;
                tokens += batch.tokens();
            }
            let norm = self.masters.norm();
            if !norm.is_finite() {
                return Err(self.not_finite("the gradient", standing.step + 1, &[]));
            }
            let factor = recipe.optimizer.factor(standing.step, share);
            self.masters
                .step(&recipe.optimizer, standing.step, factor, norm)?;
            standing.step += 1;
            standing.tokens += tokens;
            let seconds = began.elapsed().as_secs_f64();
            standing.seconds += seconds;
            standing.random = random.state();
            for (mean, figures) in standing.running.iter_mut().zip(&figures) {
                running(mean, figures);
            }
            let lr = recipe.optimizer.lr * factor;
            progress.step(&standing, loss, norm, lr, seconds, tokens)?;
            if self.due(&standing) {
                self.validate(&mut standing, &held_out, &mut progress)?;
            }
            if saved.elapsed().as_secs_f64() >= 60.0 * recipe.save_minutes {
                if let Err(error) = self.save(&standing) {
                    // The state before is whole; a full disk may have room again at the next.
                    progress.say(&format!("not saved: {error}"));
                }
                progress.draw();
                saved = Instant::now();
            }
        }
        if standing.validated.0 < standing.step || standing.best.is_none() {
            self.validate(&mut standing, &held_out, &mut progress)?;
        }
        progress.draw();
        self.save(&standing)?;
        progress.finish();
        let ended = Ended {
            steps: standing.step,
            best: standing.best.map(|(best, _)| best),
            best_dir: self.folder.join("best"),
        };
        progress.say(&format!(
            "{} steps, {:.2} M tokens in {:.1} min; best held-out figure {:.4} at step {}: {}",
            standing.step,
            standing.tokens as f64 / 1e6,
            standing.seconds / 60.0,
            standing.best.map_or(f64::NAN, |(best, _)| best),
            standing.best.map_or(0, |(_, step)| step),
            ended.best_dir.display()
        ));
        Ok(ended)
    }

    /// Where the run stands: at the state in its folder, or at its beginning.
    fn resume(&mut self) -> Result<Standing, Error> {
        let (recipe, base) = (self.recipe.digest(), self.model.lm.digest().to_owned());
        let Some(standing) = load_state(self.folder, &mut self.masters)? else {
            return Ok(Standing {
                recipe,
                base,
                step: 0,
                tokens: 0,
                seconds: 0.0,
                random: Random::new(self.recipe.seed, "batches").state(),
                best: None,
                validated: (0, 0.0),
                running: Default::default(),
            });
        };
        let foreign = |detail: &str| Error::Foreign {
            path: self.folder.to_owned(),
            detail: detail.to_owned(),
        };
        if standing.base != base {
            return Err(foreign("it is a run on another base"));
        }
        if standing.recipe != recipe {
            return Err(foreign(
                "it is a run of another recipe: name another folder with --out",
            ));
        }
        Ok(standing)
    }

    /// The gradients of a batch; its loss.
    fn learn(
        &mut self,
        batch: &Batch,
        share: f32,
        step: u64,
        figures: &mut [Figures; 4],
    ) -> Result<f64, Error> {
        let outcome = match self.model.losses(&self.masters.trainee, batch, true) {
            Ok(outcome) => outcome,
            Err(Error::Generator(
                generator::Error::NotFinite { .. } | generator::Error::NotPositive { .. },
            )) => return Err(self.not_finite("a core", step, std::slice::from_ref(batch))),
            Err(error) => return Err(error),
        };
        let loss = outcome.value()?;
        if !loss.is_finite() {
            return Err(self.not_finite("the loss", step, std::slice::from_ref(batch)));
        }
        if let Some(gradients) = outcome.backward()? {
            self.masters.accumulate(&gradients, share)?;
            if !self.masters.norm().is_finite() {
                return Err(self.not_finite("the gradient", step, std::slice::from_ref(batch)));
            }
        }
        for (sum, figures) in figures.iter_mut().zip(&outcome.figures) {
            sum.add(figures);
        }
        Ok(loss)
    }

    /// Saves the batch that ends the run.
    fn not_finite(&self, what: &str, step: u64, batches: &[Batch]) -> Error {
        let path = self.folder.join("not-finite.json");
        let text = json!({ "step": step, "what": what, "batches": batches }).to_string();
        match write_whole(&path, text.as_bytes()) {
            Ok(()) => Error::NotFinite {
                step,
                what: what.to_owned(),
                batch: path,
            },
            Err(source) => Error::io(&path, source),
        }
    }

    fn save(&self, standing: &Standing) -> Result<(), Error> {
        save_state(self.folder, standing, &self.masters)?;
        export(
            &self.folder.join("last"),
            &self.masters.trainee.detached(),
            &self.config,
        )
    }

    fn due(&self, standing: &Standing) -> bool {
        let (step, second) = standing.validated;
        let validation = &self.recipe.validation;
        match validation.steps {
            0 => standing.seconds - second >= 60.0 * validation.minutes,
            steps => standing.step - step >= steps,
        }
    }

    /// Batches that every figure of the run is taken on.
    fn held_out(&self) -> Result<Vec<Batch>, Error> {
        let draw = Draw {
            recipe: self.recipe,
            format: self.format,
            split: &self.pool.validation,
        };
        let mut random = Random::new(self.recipe.seed, "validation");
        let (mut batches, mut windows) = (Vec::new(), 0);
        while windows < self.recipe.validation.contexts {
            let batch = draw.batch(&mut random)?;
            windows += batch.windows.len();
            batches.push(batch);
        }
        Ok(batches)
    }

    /// Takes the held-out figure, the loss of the recipe on the same batches each time, and keeps the best generator.
    fn validate(
        &mut self,
        standing: &mut Standing,
        batches: &[Batch],
        progress: &mut Progress,
    ) -> Result<(), Error> {
        let trainee = self.masters.trainee.detached();
        let mut sums = [Figures::default(); 4];
        for batch in batches {
            let outcome = self.model.losses(&trainee, batch, true)?;
            for (sum, figures) in sums.iter_mut().zip(&outcome.figures) {
                sum.add(figures);
            }
        }
        let losses = &self.recipe.loss;
        let terms = [
            losses.reconstruction,
            losses.completion,
            losses.answer,
            losses.negative,
        ];
        let weights = terms.iter().zip(&sums).filter(|(_, sum)| sum.tokens > 0);
        let (mut figure, mut weight) = (0.0, 0.0);
        for (kind, (term, sum)) in Kind::ALL.iter().zip(terms.iter().zip(&sums)) {
            if sum.tokens > 0 {
                figure += term.weight * sum.mean(*kind);
            }
        }
        for (term, _) in weights {
            weight += term.weight;
        }
        if weight > 0.0 {
            figure /= weight;
        }
        standing.validated = (standing.step, standing.seconds);
        let mut line = format!("step {} held out {figure:.4}:", standing.step);
        for (kind, sum) in Kind::ALL
            .iter()
            .zip(&sums)
            .filter(|(_, sum)| sum.tokens > 0)
        {
            line.push_str(&format!(" {} {:.3}", kind.name(), sum.mean(*kind)));
        }
        progress.say(&line);
        progress.validated(standing, figure, &told(&sums))?;
        if standing.best.is_none_or(|(best, _)| figure < best) {
            export(&self.folder.join("best"), &trainee, &self.config)?;
            standing.best = Some((figure, standing.step));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
