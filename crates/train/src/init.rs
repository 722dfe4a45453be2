//! A generator that begins with what the base already knows.
//!
//! White: keys are the site's inputs, whitened on some contexts, so that different tokens have keys that are nearly
//! orthogonal; values are the principal directions of the token embeddings, and B maps them back into the residual
//! stream. Such a generator recalls before it is trained. Start at [`begin`].

use candle_core::{DType, Device, Tensor};
use faer::{Mat, Side};
use generator::{BaseShape, Config, Module, Seen, SiteId, Trainee, TraineeSite};
use lm::{KvCache, Lm, Row, text::TokenId};
use serde_json::{Map, Value, json};

use crate::{
    Error,
    random::Random,
    recipe::{Form, Grow, Init, NewGenerator, ReadOut, Strategy},
};

/// The first tokens of a context are sinks of attention and like nothing else.
const SKIPPED: usize = 8;
/// Contexts that are read at once.
const AT_ONCE: usize = 8;

/// adapter_config.json of a new generator.
pub(crate) fn config(
    new: &NewGenerator,
    base: &str,
    digest: &str,
    prompt: &str,
    suffix: &str,
) -> Map<String, Value> {
    let associative = new.form == Form::Associative;
    let keys = json!({
        "peft_type": "FASTLORA",
        "base_model_name_or_path": base,
        "fastlora_r": new.r2,
        "fastlora_inter_size": new.r1,
        "fastlora_max_rank": if new.read_out == ReadOut::Ridge { new.r1.min(new.r2) } else { new.max_rank },
        "fastlora_alpha": new.r2,
        "fastlora_window": new.window,
        "fastlora_norm": match new.read_out {
            ReadOut::Svd => "svd",
            ReadOut::Frobenius => "frobenius",
            ReadOut::Spectral => "spectral",
            ReadOut::Ridge => "ridge",
        },
        "fastlora_merge": "pre-norm-sum",
        "fastlora_param": new.modules,
        "target_modules": new.modules,
        "fastlora_layers": new.layers,
        "fastlora_key": associative.then_some("site_input_tied_A1"),
        "fastlora_value": associative.then_some("next_token_embedding+A3n_hidden"),
        "fastlora_skip_first": u8::from(associative),
        "fastlora_skip_last": u8::from(associative),
        "fastlora_strategy": match new.strategy {
            Strategy::Parallel => "parallel",
            Strategy::Sequential => "sequential",
        },
        "bos": false,
        "document_suffix": suffix,
        "prompt_format": prompt,
        "base_digest": digest,
    });
    match keys {
        Value::Object(keys) => keys
            .into_iter()
            .filter(|(_, value)| !value.is_null())
            .collect(),
        _ => Map::new(),
    }
}

/// A new generator for this base. Its statistics are taken from `contexts`, how often tokens occur from `counted`.
pub(crate) fn begin(
    new: &NewGenerator,
    config: Config,
    lm: &Lm,
    contexts: &[&[TokenId]],
    counted: &[Vec<TokenId>],
    random: &mut Random,
) -> Result<Trainee, Error> {
    let base = lm.shape();
    let mut modules = config.modules.clone();
    modules.sort();
    let mut sites = Vec::new();
    for &layer in &new.layers {
        if layer >= base.layers {
            return Err(generator::Error::Layer {
                layer,
                layers: base.layers,
            }
            .into());
        }
        sites.extend(modules.iter().map(|&module| SiteId { layer, module }));
    }
    sites.sort();
    sites.dedup();
    let built = match new.init {
        Init::Random => sites
            .iter()
            .map(|site| by_chance(new, *site, &base, random))
            .collect::<Result<_, _>>()?,
        Init::White => white(new, &sites, lm, contexts, counted)?,
    };
    Ok(Trainee::new(config, built, &base)?)
}

fn site(
    new: &NewGenerator,
    id: SiteId,
    base: &BaseShape,
    parts: Parts,
) -> Result<TraineeSite, Error> {
    let Parts { a1, a2, a3, b } = parts;
    let associative = new.form == Form::Associative;
    let zeros = || Tensor::zeros((new.r2, base.hidden), DType::F32, &Device::Cpu);
    let one = |value: f64| Tensor::new(&[value as f32], &Device::Cpu);
    let ridge = new.read_out == ReadOut::Ridge;
    Ok(TraineeSite {
        id,
        a1,
        a2: (!associative).then_some(a2).flatten(),
        a3,
        a3n: associative.then(zeros).transpose()?,
        gain: Tensor::ones(base.hidden, DType::F32, &Device::Cpu)?,
        b,
        log_ridge: ridge.then(|| one(new.ridge.ln())).transpose()?,
        log_amplitude: one(0.0)?,
    })
}

struct Parts {
    a1: Tensor,
    a2: Option<Tensor>,
    a3: Tensor,
    b: Tensor,
}

fn by_chance(
    new: &NewGenerator,
    id: SiteId,
    base: &BaseShape,
    random: &mut Random,
) -> Result<TraineeSite, Error> {
    let (out, input) = base.linear(id.module);
    let mut normal = |rows: usize, columns: usize| {
        let size = 1.0 / (columns as f64).sqrt();
        let values: Vec<f32> = (0..rows * columns)
            .map(|_| (random.normal() * size) as f32)
            .collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu)
    };
    let parts = Parts {
        a1: normal(new.r1, input)?,
        a2: Some(normal(new.r1, base.hidden)?),
        a3: normal(new.r2, base.hidden)?,
        b: Tensor::zeros((out, new.r2), DType::F32, &Device::Cpu)?,
    };
    site(new, id, base, parts)
}

/// Sums over tokens of z and z zᵀ.
struct Moments {
    count: f64,
    sum: Vec<f64>,
    squares: Tensor,
}

impl Moments {
    fn new(width: usize) -> Result<Self, Error> {
        Ok(Self {
            count: 0.0,
            sum: vec![0.0; width],
            squares: Tensor::zeros((width, width), DType::F32, &Device::Cpu)?,
        })
    }

    /// z [T, width].
    fn add(&mut self, z: &Tensor) -> Result<(), Error> {
        let (tokens, _) = z.dims2()?;
        kernels::accumulate_outer(&[(&self.squares, z)], z, 0..tokens)?;
        self.count += tokens as f64;
        for (sum, value) in self.sum.iter_mut().zip(z.sum(0)?.to_vec1::<f32>()?) {
            *sum += f64::from(value);
        }
        Ok(())
    }

    fn mean(&self) -> Vec<f64> {
        self.sum.iter().map(|sum| sum / self.count).collect()
    }

    /// Covariance [width, width], the mean's own direction taken out.
    fn covariance(&self) -> Result<Mat<f64>, Error> {
        let width = self.sum.len();
        let squares: Vec<Vec<f32>> = self.squares.to_vec2()?;
        let mean = self.mean();
        let covariance = Mat::from_fn(width, width, |i, j| {
            0.5 * f64::from(squares[i][j] + squares[j][i]) / self.count - mean[i] * mean[j]
        });
        Ok(without(&covariance, &mean))
    }
}

/// A covariance without the direction of `mean`: (I - u uᵀ) C (I - u uᵀ).
fn without(covariance: &Mat<f64>, mean: &[f64]) -> Mat<f64> {
    let width = mean.len();
    let length = mean.iter().map(|m| m * m).sum::<f64>().sqrt().max(1e-30);
    let u: Vec<f64> = mean.iter().map(|m| m / length).collect();
    let cu: Vec<f64> = (0..width)
        .map(|i| (0..width).map(|j| covariance[(i, j)] * u[j]).sum())
        .collect();
    let ucu: f64 = u.iter().zip(&cu).map(|(u, c)| u * c).sum();
    Mat::from_fn(width, width, |i, j| {
        covariance[(i, j)] - u[i] * cu[j] - cu[i] * u[j] + ucu * u[i] * u[j]
    })
}

/// Eigenvalues of a covariance, descending, and eigenvectors as columns.
fn principal(covariance: &Mat<f64>) -> Result<(Vec<f64>, Mat<f64>), Error> {
    let width = covariance.nrows();
    let eigen = covariance
        .self_adjoint_eigen(Side::Lower)
        .map_err(|_| undecomposed("a covariance of the base has no decomposition"))?;
    // Ascending as they come.
    let (values, vectors) = (eigen.S().column_vector(), eigen.U());
    let order = |k: usize| width - 1 - k;
    let sorted = (0..width).map(|k| values[order(k)].max(1e-12)).collect();
    Ok((
        sorted,
        Mat::from_fn(width, width, |i, k| vectors[(i, order(k))]),
    ))
}

fn undecomposed(detail: &str) -> Error {
    Error::NoData {
        what: "statistics",
        detail: detail.to_owned(),
    }
}

/// Reads contexts with the bare model, some at once; `each` gets them with what was seen of them at `watched`.
pub(crate) fn look(
    lm: &Lm,
    contexts: &[&[TokenId]],
    watched: &[SiteId],
    mut each: impl FnMut(&[&[TokenId]], &[Seen]) -> Result<(), Error>,
) -> Result<(), Error> {
    for group in contexts.chunks(AT_ONCE) {
        let mut next = 0u32;
        let places: Vec<Vec<u32>> = group
            .iter()
            .map(|context| {
                let first = next;
                next += context.len() as u32;
                (first..next).collect()
            })
            .collect();
        let kv = KvCache::new(lm.config(), next.max(1) as usize, 1)?;
        let mut rows: Vec<Row<'_>> = group
            .iter()
            .zip(&places)
            .map(|(context, blocks)| Row {
                tokens: context,
                position: 0,
                blocks,
                core: None,
                scale: 1.0,
                window: None,
                lookahead: None,
                logits: 0,
            })
            .collect();
        let seen = lm.observe(&mut rows, &kv, watched, None, false)?;
        each(group, &seen)?;
    }
    Ok(())
}

/// The tokens of a context that statistics are taken from: its first, which is at `first`, and how many.
pub(crate) fn counted_tokens(context: &[TokenId], first: usize) -> (usize, usize) {
    let skipped = SKIPPED.min(context.len() / 2);
    (first + skipped, context.len() - skipped)
}

/// The same generator with longer keys: to the rows of A1 come whitened principal directions of what they leave of the
/// sites' inputs, uncorrelated with them and of their mean variance. Everything else stays as it is.
pub(crate) fn grown(
    start: &Trainee,
    config: Config,
    grow: &Grow,
    lm: &Lm,
    contexts: &[&[TokenId]],
) -> Result<Trainee, Error> {
    check_growth(start, grow)?;
    let base = lm.shape();
    let ids: Vec<SiteId> = start.sites().iter().map(|site| site.id).collect();
    let mut moments: Vec<Moments> = ids
        .iter()
        .map(|site| Moments::new(base.linear(site.module).1))
        .collect::<Result<_, _>>()?;
    look(lm, contexts, &ids, |group, seen| {
        let mut first = 0;
        for context in group {
            let (from, len) = counted_tokens(context, first);
            first += context.len();
            for (moments, seen) in moments.iter_mut().zip(seen) {
                moments.add(&seen.x.narrow(0, from, len)?.contiguous()?)?;
            }
        }
        Ok(())
    })?;
    let mut sites = Vec::new();
    for (site, moments) in start.sites().iter().zip(&moments) {
        if moments.count == 0.0 {
            return Err(undecomposed("no contexts"));
        }
        let more = beside(&matrix(&site.a1)?, &moments.covariance()?, grow)?;
        let a1 = Tensor::cat(&[&site.a1, &tensor(&more)?], 0)?;
        sites.push(TraineeSite { a1, ..site.clone() });
    }
    Ok(Trainee::new(config, sites, &base)?)
}

fn check_growth(start: &Trainee, grow: &Grow) -> Result<(), Error> {
    for site in start.sites() {
        let (rows, input) = site.a1.dims2()?;
        if !(rows..=input).contains(&grow.r1) || site.a2.is_some() {
            return Err(undecomposed(&format!(
                "{} has {rows} keys of {input} inputs: they cannot grow to {} (only associative ones grow at all)",
                site.id, grow.r1
            )));
        }
    }
    Ok(())
}

/// The shape of what [`grown`] makes: its new keys are zero.
pub(crate) fn widened(
    start: &Trainee,
    config: Config,
    grow: &Grow,
    lm: &Lm,
) -> Result<Trainee, Error> {
    check_growth(start, grow)?;
    let wide = |site: &TraineeSite| -> Result<TraineeSite, Error> {
        let (rows, input) = site.a1.dims2()?;
        let zeros = Tensor::zeros((grow.r1 - rows, input), DType::F32, &Device::Cpu)?;
        let a1 = Tensor::cat(&[&site.a1, &zeros], 0)?;
        Ok(TraineeSite { a1, ..site.clone() })
    };
    let sites = start.sites().iter().map(wide).collect::<Result<_, _>>()?;
    Ok(Trainee::new(config, sites, &lm.shape())?)
}

/// Rows [R1 - r, Din] beside those of A [r, Din], for inputs of covariance C.
fn beside(a: &Mat<f64>, c: &Mat<f64>, grow: &Grow) -> Result<Mat<f64>, Error> {
    let (r, width) = (a.nrows(), a.ncols());
    let ac = a * c; // [r, Din]
    let mut m = &ac * a.transpose(); // [r, r], covariance of the keys
    let mean = (0..r).map(|i| m[(i, i)]).sum::<f64>() / r as f64;
    for i in 0..r {
        m[(i, i)] += 1e-6 * mean;
    }
    let m = m
        .llt(Side::Lower)
        .map_err(|_| undecomposed("the keys have no covariance"))?;
    let x = faer::linalg::solvers::Solve::solve(&m, &ac); // (A C Aᵀ)⁻¹ A C [r, Din]
    // What is left of the inputs once the keys are known.
    let left = c - ac.transpose() * &x;
    let left = Mat::from_fn(width, width, |i, j| 0.5 * (left[(i, j)] + left[(j, i)]));
    let (variances, directions) = principal(&left)?;
    let count = grow.r1 - r;
    let damping = grow.damping * variances.iter().take(count).sum::<f64>() / count.max(1) as f64;
    let u = Mat::from_fn(width, count, |i, k| directions[(i, k)]);
    // uᵀ (x - C Aᵀ (A C Aᵀ)⁻¹ A x)
    let rows = u.transpose() - (a.transpose() * (&x * &u)).transpose();
    Ok(Mat::from_fn(count, width, |k, i| {
        rows[(k, i)] * (mean / (variances[k] + damping)).sqrt()
    }))
}

fn matrix(tensor: &Tensor) -> Result<Mat<f64>, Error> {
    let rows: Vec<Vec<f32>> = tensor.to_vec2()?;
    let columns = rows.first().map_or(0, Vec::len);
    Ok(Mat::from_fn(rows.len(), columns, |i, j| {
        f64::from(rows[i][j])
    }))
}

fn white(
    new: &NewGenerator,
    sites: &[SiteId],
    lm: &Lm,
    contexts: &[&[TokenId]],
    counted: &[Vec<TokenId>],
) -> Result<Vec<TraineeSite>, Error> {
    let base = lm.shape();
    let (layers, hidden) = (base.layers, base.hidden);
    if new.r2 > hidden {
        return Err(Error::NoData {
            what: "statistics",
            detail: format!(
                "r2 = {} is more than the {hidden} directions of an embedding",
                new.r2
            ),
        });
    }
    for site in sites {
        let (out, input) = base.linear(site.module);
        if new.r1 > input || out != hidden {
            return Err(Error::NoData {
                what: "statistics",
                detail: format!(
                    "{site} has {input} inputs, {out} outputs: a white start needs r1 inputs and writes into the residual stream"
                ),
            });
        }
    }
    // The last layer's down_proj is seen too: behind it the pass ends.
    let mut watched = sites.to_vec();
    let every: Vec<SiteId> = (0..layers)
        .map(|layer| SiteId {
            layer,
            module: Module::DownProj,
        })
        .collect();
    watched.extend(every.iter().filter(|site| !sites.contains(site)));
    let mut moments: Vec<Moments> = sites
        .iter()
        .map(|site| Moments::new(base.linear(site.module).1))
        .collect::<Result<_, _>>()?;
    // Σ rms of the residual that enters each layer, and, last, of the one behind the last.
    let (mut sizes, mut tokens) = (vec![0.0; layers + 1], 0.0);
    // With published keys A2 n ~ A1 x by least squares: Σ x nᵀ and Σ n nᵀ.
    let mut across: Vec<(Tensor, Moments)> = Vec::new();
    if new.form == Form::Published {
        for site in sites {
            let shape = (base.linear(site.module).1, hidden);
            let cross = Tensor::zeros(shape, DType::F32, &Device::Cpu)?;
            across.push((cross, Moments::new(hidden)?));
        }
    }
    look(lm, contexts, &watched, |group, seen| {
        let ending: Vec<(&[TokenId], usize)> = group
            .iter()
            .map(|context| (*context, context.len()))
            .collect();
        let last = lm.residuals(&ending)?; // [T, D]
        let inputs = layer_inputs(&watched, seen, layers);
        let mut first = 0;
        for context in group {
            let (from, len) = counted_tokens(context, first);
            first += context.len();
            tokens += len as f64;
            for (size, h) in sizes.iter_mut().zip(inputs.iter().chain(&last)) {
                let rms = h.narrow(0, from, len)?.sqr()?.mean(1)?.sqrt()?; // [len]
                *size += f64::from(rms.sum_all()?.to_scalar::<f32>()?);
            }
            for (index, moments) in moments.iter_mut().enumerate() {
                let x = seen[index].x.narrow(0, from, len)?.contiguous()?;
                moments.add(&x)?;
                if let Some((cross, own)) = across.get_mut(index) {
                    let h = seen[index].h.narrow(0, from, len)?;
                    let n = kernels::rms_norm(&h, None, 1e-6)?;
                    kernels::accumulate_outer(&[(&*cross, &n)], &x, 0..len)?;
                    own.add(&n)?;
                }
            }
        }
        Ok(())
    })?;
    if tokens == 0.0 {
        return Err(Error::NoData {
            what: "statistics",
            detail: "no contexts".to_owned(),
        });
    }
    let values = embeddings(lm, counted, new.r2)?; // P [R2, D]
    let mut built = Vec::new();
    for (index, (id, moments)) in sites.iter().zip(&moments).enumerate() {
        let (variances, directions) = principal(&moments.covariance()?)?;
        let damping = new.damping * variances.iter().take(new.r1).sum::<f64>() / new.r1 as f64;
        let a1 = Mat::from_fn(new.r1, directions.nrows(), |k, i| {
            directions[(i, k)] / ((variances[k] + damping) * new.r1 as f64).sqrt()
        });
        let mut a2 = None;
        if let Some((cross, own)) = across.get(index) {
            a2 = Some(least_squares(&a1, cross, own)?);
        }
        let strength = new.amplitude * sizes[id.layer + 1] / sizes[layers];
        let b = Mat::from_fn(hidden, new.r2, |i, k| values[(k, i)] * strength);
        let parts = Parts {
            a1: tensor(&a1)?,
            a2,
            a3: tensor(&values)?,
            b: tensor(&b)?,
        };
        built.push(site(new, *id, &base, parts)?);
    }
    Ok(built)
}

/// The residuals entering each layer, found among what all layers' down_proj have seen.
fn layer_inputs(watched: &[SiteId], seen: &[Seen], layers: usize) -> Vec<Tensor> {
    (0..layers)
        .filter_map(|layer| {
            let at = watched
                .iter()
                .position(|site| site.layer == layer && site.module == Module::DownProj)?;
            Some(seen[at].h.clone())
        })
        .collect()
}

/// A2 = A1 (Σ x nᵀ) (Σ n nᵀ + damping)⁻¹.
fn least_squares(a1: &Mat<f64>, cross: &Tensor, own: &Moments) -> Result<Tensor, Error> {
    let (cross, mut own) = (matrix(cross)?, matrix(&own.squares)?);
    let size = own.nrows();
    let mean = (0..size).map(|i| own[(i, i)]).sum::<f64>() / size as f64;
    for i in 0..size {
        own[(i, i)] += 1e-3 * mean;
    }
    let factored = own.llt(Side::Lower).map_err(|_| Error::NoData {
        what: "statistics",
        detail: "the hidden states have no covariance".to_owned(),
    })?;
    let right = (a1 * cross).transpose().to_owned(); // [D, R1]
    let solved = faer::linalg::solvers::Solve::solve(&factored, right); // [D, R1]
    tensor(&solved.transpose().to_owned())
}

/// Principal directions [R2, D] of the normed embeddings, each token weighted by the square root of how often it
/// occurs, the mean's own direction taken out.
fn embeddings(lm: &Lm, texts: &[Vec<TokenId>], r2: usize) -> Result<Mat<f64>, Error> {
    let (vocab, hidden) = (lm.config().vocab, lm.config().hidden);
    let mut counts = vec![0.0f64; vocab];
    for token in texts.iter().flatten() {
        counts[token.0 as usize] += 1.0;
    }
    let total: f64 = counts.iter().sum();
    let used: Vec<TokenId> = (0..vocab as u32)
        .filter(|&id| counts[id as usize] > 0.0)
        .map(TokenId)
        .collect();
    let e: Vec<Vec<f32>> = lm.normed_embeddings(&used)?.to_vec2()?;
    let shares: Vec<f64> = used
        .iter()
        .map(|id| counts[id.0 as usize] / total)
        .collect();
    let mut mean = vec![0.0; hidden];
    for (e, share) in e.iter().zip(&shares) {
        mean.iter_mut()
            .zip(e)
            .for_each(|(mean, e)| *mean += share * f64::from(*e));
    }
    let weight: f64 = shares.iter().map(|share| share.sqrt()).sum();
    let centred: Vec<f32> = e
        .iter()
        .zip(&shares)
        .flat_map(|(e, share)| {
            let root = (share.sqrt() / weight).sqrt();
            e.iter()
                .zip(&mean)
                .map(move |(e, mean)| ((f64::from(*e) - mean) * root) as f32)
                .collect::<Vec<_>>()
        })
        .collect();
    let centred = Tensor::from_vec(centred, (used.len(), hidden), &Device::Cpu)?;
    let covariance = Tensor::zeros((hidden, hidden), DType::F32, &Device::Cpu)?;
    kernels::accumulate_outer(&[(&covariance, &centred)], &centred, 0..used.len())?;
    let rows: Vec<Vec<f32>> = covariance.to_vec2()?;
    let covariance = Mat::from_fn(hidden, hidden, |i, j| {
        0.5 * f64::from(rows[i][j] + rows[j][i])
    });
    let (_, directions) = principal(&without(&covariance, &mean))?;
    Ok(Mat::from_fn(r2, hidden, |k, i| directions[(i, k)]))
}

fn tensor(m: &Mat<f64>) -> Result<Tensor, Error> {
    let (rows, columns) = (m.nrows(), m.ncols());
    let values: Vec<f32> = (0..rows)
        .flat_map(|i| (0..columns).map(move |j| m[(i, j)] as f32))
        .collect();
    Ok(Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)
}

#[cfg(test)]
mod tests;
