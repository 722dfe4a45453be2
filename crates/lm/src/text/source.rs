//! A tokenizer's parts out of a model's files: tokenizer.json and its companions, or GGUF metadata.
//!
//! Reads and checks, and decides nothing about texts. Start at [`from_folder`] and [`from_gguf`].

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::Read,
    path::Path,
};

use serde_json::{Value, json};
use tokenizers::{AddedToken, Tokenizer, models::bpe::BPE};

use super::{Error, Source, TokenId, failed, patterns};
use crate::{files::FileError, gguf::Gguf};

/// tokenizer.json of the largest vocabularies has some 35 MB.
const MAX_TOKENIZER_BYTES: u64 = 1 << 28;
const MAX_CONFIG_BYTES: u64 = 1 << 24;
/// Longer tokens are not split into pairs, which would cost the square of their length; known ones end at some 100 bytes.
const MAX_PIECE_BYTES: usize = 512;

/// The tokenizer of a folder in the HF layout.
pub(super) fn from_folder(dir: &Path) -> Result<Source, Error> {
    let path = dir.join("tokenizer.json");
    let bytes = read(&path, MAX_TOKENIZER_BYTES)?;
    let bytes = bytes.ok_or_else(|| FileError::io(&path, std::io::ErrorKind::NotFound.into()))?;
    let damaged = |error: &dyn std::fmt::Display| FileError::header(&path, error.to_string());
    let tokenizer = Tokenizer::from_bytes(&bytes).map_err(|error| damaged(&error))?;
    let part = |part: serde_json::Result<Value>| part.map_err(|error| damaged(&error));
    let normalizer = part(serde_json::to_value(tokenizer.get_normalizer()))?;
    let pre_tokenizer = part(serde_json::to_value(tokenizer.get_pre_tokenizer()))?;
    let decoder = part(serde_json::to_value(tokenizer.get_decoder()))?;
    let post_processor = part(serde_json::to_value(tokenizer.get_post_processor()))?;

    let config = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
    let special = |key: &str| -> Result<Option<TokenId>, Error> {
        let Some(content) = config[key]
            .as_str()
            .or_else(|| config[key]["content"].as_str())
        else {
            return Ok(None);
        };
        match tokenizer.token_to_id(content) {
            Some(id) => Ok(Some(TokenId(id))),
            None => Err(FileError::header(
                &dir.join("tokenizer_config.json"),
                format!("{key} is {content:?}, which is no token"),
            )
            .into()),
        }
    };
    let (bos, eos) = (special("bos_token")?, special("eos_token")?);
    let adds_bos = match config["add_bos_token"].as_bool() {
        Some(adds) => adds,
        None => bos.is_some_and(|bos| puts_in_front(&post_processor, bos)),
    };
    let template = template(dir, &config)?;
    Ok(Source {
        tokenizer,
        normalizer,
        pre_tokenizer,
        decoder,
        bos,
        eos,
        adds_bos,
        template,
    })
}

/// Whether a post-processor begins a text with this token.
fn puts_in_front(post_processor: &Value, token: TokenId) -> bool {
    if let Some(processors) = post_processor["processors"].as_array() {
        return processors
            .iter()
            .any(|processor| puts_in_front(processor, token));
    }
    let name = &post_processor["single"][0]["SpecialToken"]["id"];
    name.as_str()
        .is_some_and(|name| post_processor["special_tokens"][name]["ids"][0] == token.0)
}

/// The chat template: its own file before the tokenizer's config, the one named default among several.
fn template(dir: &Path, config: &Value) -> Result<Option<String>, Error> {
    let path = dir.join("chat_template.jinja");
    if let Some(bytes) = read(&path, MAX_CONFIG_BYTES)? {
        let text = String::from_utf8(bytes).map_err(|_| FileError::header(&path, "not UTF-8"))?;
        return Ok(Some(text));
    }
    let own = read_json(&dir.join("chat_template.json"))?.unwrap_or_default();
    for templates in [&own["chat_template"], &config["chat_template"]] {
        if let Some(text) = templates.as_str() {
            return Ok(Some(text.to_owned()));
        }
        let named = templates
            .as_array()
            .into_iter()
            .flatten()
            .find(|template| template["name"] == "default");
        if let Some(text) = named.and_then(|template| template["template"].as_str()) {
            return Ok(Some(text.to_owned()));
        }
    }
    Ok(None)
}

/// A file's bytes, at most `limit`; None if there is no such file.
fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, FileError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(FileError::io(path, error)),
    };
    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| FileError::io(path, error))?;
    if bytes.len() as u64 > limit {
        return Err(FileError::header(
            path,
            format!("longer than {limit} bytes"),
        ));
    }
    Ok(Some(bytes))
}

fn read_json(path: &Path) -> Result<Option<Value>, FileError> {
    let Some(bytes) = read(path, MAX_CONFIG_BYTES)? else {
        return Ok(None);
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| FileError::header(path, error.to_string()))
}

/// What GGUF says of a token (`tokenizer.ggml.token_type`, llama.cpp's `llama_token_type`).
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const BYTE: i64 = 6;

/// The tokenizer in a GGUF file's metadata.
pub(super) fn from_gguf(path: &Path) -> Result<Source, Error> {
    let gguf = Gguf::open(path)?;
    let need = |key: &str| FileError::header(path, format!("it has no {key}"));
    let model = gguf
        .string("tokenizer.ggml.model")?
        .ok_or_else(|| need("tokenizer.ggml.model"))?;
    let tokens = gguf
        .strings("tokenizer.ggml.tokens")?
        .ok_or_else(|| need("tokenizer.ggml.tokens"))?;
    let types = gguf
        .i64s("tokenizer.ggml.token_type")?
        .unwrap_or_else(|| vec![1; tokens.len()]);
    if types.len() != tokens.len() {
        return Err(FileError::header(
            path,
            format!("{} tokens with {} types", tokens.len(), types.len()),
        )
        .into());
    }
    let vocab = vocab(path, tokens, &types)?;
    let mut source = match model {
        "gpt2" => byte_level(&gguf, vocab)?,
        "llama" => marked_spaces(&gguf, tokens, &types, vocab)?,
        other => {
            return Err(Error::Unsupported {
                what: format!("the tokenizer model {other:?} of a GGUF file"),
            });
        }
    };
    let added = tokens.iter().zip(&types).filter(|(token, kind)| {
        matches!(**kind, UNKNOWN | CONTROL | USER_DEFINED) && !token.is_empty()
    });
    let added = added.map(|(token, &kind)| {
        AddedToken::from(token.as_str(), kind != USER_DEFINED).normalized(false)
    });
    source.tokenizer.add_tokens(added).map_err(failed)?;
    let id = |key: &str| -> Result<Option<TokenId>, FileError> {
        let Some(id) = gguf.u64(key)? else {
            return Ok(None);
        };
        match u32::try_from(id) {
            Ok(small) if (id as usize) < tokens.len() => Ok(Some(TokenId(small))),
            _ => Err(FileError::header(
                path,
                format!("{key} is {id}, with {} tokens", tokens.len()),
            )),
        }
    };
    source.bos = id("tokenizer.ggml.bos_token_id")?;
    source.eos = id("tokenizer.ggml.eos_token_id")?;
    source.adds_bos = gguf
        .bool("tokenizer.ggml.add_bos_token")?
        .unwrap_or(source.adds_bos);
    source.template = gguf.string("tokenizer.chat_template")?.map(str::to_owned);
    Ok(source)
}

/// Ids by token. Padding may come twice, a token that a text can have may not.
fn vocab(path: &Path, tokens: &[String], types: &[i64]) -> Result<HashMap<String, u32>, FileError> {
    let mut vocab = HashMap::with_capacity(tokens.len());
    for ((id, token), kind) in (0_u32..).zip(tokens).zip(types) {
        if vocab.insert(token.clone(), id).is_some() && *kind == 1 {
            return Err(FileError::header(
                path,
                format!("the token {token:?} comes twice"),
            ));
        }
    }
    Ok(vocab)
}

/// The model `gpt2`: BPE over letters for bytes, with merges and a named split.
fn byte_level(gguf: &Gguf, vocab: HashMap<String, u32>) -> Result<Source, Error> {
    let name = gguf.string("tokenizer.ggml.pre")?.unwrap_or("default");
    let named = patterns::named(name).ok_or_else(|| Error::Unsupported {
        what: format!("the tokenizer.ggml.pre {name:?} of a GGUF file"),
    })?;
    let merges = gguf.strings("tokenizer.ggml.merges")?;
    let merges =
        merges.ok_or_else(|| FileError::header(gguf.path(), "it has no tokenizer.ggml.merges"))?;
    let pair = |merge: &String| {
        let (left, right) = merge.split_once(' ')?;
        Some((left.to_owned(), right.to_owned()))
    };
    let merges = merges.iter().map(|merge| {
        pair(merge).ok_or_else(|| FileError::header(gguf.path(), format!("the merge {merge:?}")))
    });
    let merges = merges.collect::<Result<Vec<_>, _>>()?;
    let model = BPE::builder()
        .vocab_and_merges(
            vocab
                .into_iter()
                .collect::<tokenizers::models::bpe::Vocab>(),
            merges,
        )
        .ignore_merges(named.ignore_merges);
    Ok(Source {
        tokenizer: Tokenizer::new(model.build().map_err(failed)?),
        normalizer: named.normalizer,
        pre_tokenizer: named.pre_tokenizer,
        decoder: json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}),
        bos: None,
        eos: None,
        adds_bos: named.adds_bos,
        template: None,
    })
}

/// The model `llama`: SentencePiece's BPE. Its merges are not written down: any two pieces that make a third, the best
/// score first. Control tokens are made by none, so no text spells one.
fn marked_spaces(
    gguf: &Gguf,
    tokens: &[String],
    types: &[i64],
    vocab: HashMap<String, u32>,
) -> Result<Source, Error> {
    let path = gguf.path();
    let scores = gguf.f32s("tokenizer.ggml.scores")?;
    let scores =
        scores.ok_or_else(|| FileError::header(path, "it has no tokenizer.ggml.scores"))?;
    if scores.len() != tokens.len() {
        return Err(FileError::header(
            path,
            format!("{} tokens with {} scores", tokens.len(), scores.len()),
        )
        .into());
    }
    let is_piece = |kind: i64| !matches!(kind, UNKNOWN | CONTROL | BYTE);
    let pieces: HashSet<&str> = tokens
        .iter()
        .zip(types)
        .filter(|&(_, &kind)| is_piece(kind))
        .map(|(token, _)| token.as_str())
        .collect();
    let mut merges = Vec::new();
    for ((token, &kind), &score) in tokens.iter().zip(types).zip(scores) {
        if !is_piece(kind) || kind == USER_DEFINED {
            continue;
        }
        if token.len() > MAX_PIECE_BYTES {
            return Err(
                FileError::header(path, format!("a token of {} bytes", token.len())).into(),
            );
        }
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if pieces.contains(left) && pieces.contains(right) {
                merges.push((score, left, right));
            }
        }
    }
    merges.sort_by(|(a, ..), (b, ..)| b.total_cmp(a));
    let merges = merges
        .into_iter()
        .map(|(_, left, right)| (left.to_owned(), right.to_owned()))
        .collect::<Vec<_>>();
    let unknown = gguf
        .u64("tokenizer.ggml.unknown_token_id")?
        .and_then(|id| tokens.get(usize::try_from(id).ok()?));
    let mut model = BPE::builder()
        .vocab_and_merges(
            vocab
                .into_iter()
                .collect::<tokenizers::models::bpe::Vocab>(),
            merges,
        )
        .byte_fallback(types.contains(&BYTE))
        .fuse_unk(true);
    if let Some(unknown) = unknown {
        model = model.unk_token(unknown.clone());
    }
    let prefix = gguf
        .bool("tokenizer.ggml.add_space_prefix")?
        .unwrap_or(true);
    let marks = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let stages = if prefix {
        vec![json!({"type": "Prepend", "prepend": "▁"}), marks]
    } else {
        vec![marks]
    };
    Ok(Source {
        tokenizer: Tokenizer::new(model.build().map_err(failed)?),
        normalizer: json!({"type": "Sequence", "normalizers": stages}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": usize::from(prefix), "stop": 0},
        ]}),
        bos: None,
        eos: None,
        adds_bos: true,
        template: None,
    })
}
