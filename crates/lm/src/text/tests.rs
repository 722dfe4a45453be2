//! Tests of tokenizers as models have them: reference vectors, special tokens, and files that lie.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use serde_json::json;
use tempfile::TempDir;
use tokenizers::{ModelWrapper, models::bpe::BPE};

use super::*;

/// The default model's tokenizer, read once.
pub(super) static SMOLLM2: LazyLock<Text> =
    LazyLock::new(|| Text::load(&testkit::smollm2_gguf()).unwrap());

pub(super) fn ids(tokens: &[TokenId]) -> Vec<u32> {
    tokens.iter().map(|token| token.0).collect()
}

pub(super) fn tokens(ids: &[u32]) -> Vec<TokenId> {
    ids.iter().copied().map(TokenId).collect()
}

/// A byte-level model that joins any two bytes, in a mixed order: wherever a text is split, its tokens show it.
fn joining() -> BPE {
    let letters = pieces::byte_letters();
    let letters = letters.iter().enumerate().filter(|(_, byte)| **byte > 0);
    let letters: Vec<char> = letters
        .map(|(letter, _)| char::from_u32(letter as u32).unwrap())
        .collect();
    let pairs = (0..65_536_usize).map(|rank| rank * 40_503 % 65_536);
    let merges: Vec<(String, String)> = pairs
        .map(|pair| {
            (
                letters[pair / 256].to_string(),
                letters[pair % 256].to_string(),
            )
        })
        .collect();
    let joined = merges.iter().map(|(left, right)| format!("{left}{right}"));
    let vocab = letters.iter().map(char::to_string).chain(joined).zip(0..);
    let vocab: tokenizers::models::bpe::Vocab = vocab.collect();
    BPE::builder()
        .vocab_and_merges(vocab, merges)
        .build()
        .unwrap()
}

/// A byte-level tokenizer with these stages.
pub(super) fn with_stages(normalizer: Value, pre_tokenizer: Value) -> Text {
    let decoder = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    Text::new(Source {
        tokenizer: Tokenizer::new(joining()),
        normalizer,
        pre_tokenizer,
        decoder,
        bos: None,
        eos: None,
        adds_bos: false,
        template: None,
    })
    .unwrap()
}

/// The library's own tokenizer of the same parts, without added tokens.
pub(super) fn library(text: &Text) -> Tokenizer {
    let inner = &text.inner;
    let mut tokenizer = Tokenizer::new(inner.tokenizer.get_model().clone());
    tokenizer
        .with_normalizer(inner.first.normalizer.clone())
        .unwrap();
    tokenizer.with_pre_tokenizer(inner.first.pre_tokenizer.clone());
    tokenizer
}

/// A value of a GGUF header.
pub(super) enum Meta<'a> {
    Text(&'a str),
    Number(u32),
    Flag(bool),
    Texts(Vec<String>),
    Numbers(Vec<i32>),
    Floats(Vec<f32>),
}

/// The keys of a GGUF header with their values.
type Header = Vec<(&'static str, Meta<'static>)>;

/// A GGUF file without tensors.
pub(super) fn gguf(path: &Path, keys: &[(&str, Meta<'_>)]) {
    fn text(bytes: &mut Vec<u8>, text: &str) {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    }
    fn array(bytes: &mut Vec<u8>, kind: u32, length: usize) {
        bytes.extend([9_u32, kind].iter().flat_map(|n| n.to_le_bytes()));
        bytes.extend((length as u64).to_le_bytes());
    }
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend([0, keys.len() as u64].iter().flat_map(|n| n.to_le_bytes()));
    for (key, value) in keys {
        text(&mut bytes, key);
        match value {
            Meta::Text(value) => {
                bytes.extend(8_u32.to_le_bytes());
                text(&mut bytes, value);
            }
            Meta::Number(value) => bytes.extend([4, *value].iter().flat_map(|n| n.to_le_bytes())),
            Meta::Flag(value) => {
                bytes.extend(7_u32.to_le_bytes());
                bytes.push(u8::from(*value));
            }
            Meta::Texts(values) => {
                array(&mut bytes, 8, values.len());
                values.iter().for_each(|value| text(&mut bytes, value));
            }
            Meta::Numbers(values) => {
                array(&mut bytes, 5, values.len());
                bytes.extend(values.iter().flat_map(|n| n.to_le_bytes()));
            }
            Meta::Floats(values) => {
                array(&mut bytes, 6, values.len());
                bytes.extend(values.iter().flat_map(|n| n.to_le_bytes()));
            }
        }
    }
    fs::write(path, bytes).unwrap();
}

/// A tokenizer of the kind `llama`: unknown, BOS, EOS, the bytes, and the default model's first words with ▁ for a space.
pub(super) fn sentence_pieces(prefix: bool) -> Text {
    let ModelWrapper::BPE(bpe) = SMOLLM2.inner.tokenizer.get_model() else {
        panic!("a BPE")
    };
    let mut words: Vec<(u32, String)> = bpe
        .get_vocab()
        .into_iter()
        .map(|(word, id)| (id, word.replace('Ġ', "▁")))
        .collect();
    words.retain(|(id, word)| {
        *id < 6_000
            && word.chars().all(|c| c.is_ascii_graphic() || c == '▁')
            && !word.starts_with("<|")
    });
    words.sort_unstable();
    let (mut tokens, mut types): (Vec<String>, Vec<i32>) = (
        ["<unk>", "<s>", "</s>"].map(String::from).to_vec(),
        vec![2, 3, 3],
    );
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    types.resize(tokens.len(), 6);
    // Pieces that would make a control token, if merges could.
    tokens.extend(["<s", "</", "s>", "</s"].map(String::from));
    let known: std::collections::HashSet<String> = tokens.iter().cloned().collect();
    tokens.extend(
        words
            .into_iter()
            .map(|(_, word)| word)
            .filter(|word| !known.contains(word)),
    );
    types.resize(tokens.len(), 1);
    let scores = (0..tokens.len()).map(|rank| -(rank as f32)).collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let keys = [
        ("tokenizer.ggml.model", Meta::Text("llama")),
        ("tokenizer.ggml.tokens", Meta::Texts(tokens)),
        ("tokenizer.ggml.token_type", Meta::Numbers(types)),
        ("tokenizer.ggml.scores", Meta::Floats(scores)),
        ("tokenizer.ggml.bos_token_id", Meta::Number(1)),
        ("tokenizer.ggml.eos_token_id", Meta::Number(2)),
        ("tokenizer.ggml.unknown_token_id", Meta::Number(0)),
        ("tokenizer.ggml.add_space_prefix", Meta::Flag(prefix)),
    ];
    gguf(&path, &keys);
    Text::load(&path).unwrap()
}

fn tiny() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    testkit::tiny_tokenizer(dir.path());
    let path = dir.path().to_owned();
    (dir, path)
}

/// Changes one of the tiny model's files.
fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut json = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

#[test]
fn golden_prompts_and_greedy_texts_of_smollm2_are_met() {
    let Some(cases) = testkit::golden_part("smollm2-135m/prompts.json") else {
        return;
    };
    let cases: Value = serde_json::from_slice(&fs::read(cases).unwrap()).unwrap();
    let list = |value: &Value| -> Vec<u32> {
        value
            .as_array()
            .unwrap()
            .iter()
            .map(|id| id.as_u64().unwrap() as u32)
            .collect()
    };
    let cases = cases.as_array().unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let mut got = vec![SMOLLM2.bos().unwrap()];
        got.extend(SMOLLM2.encode(case["prompt"].as_str().unwrap()).unwrap());
        assert_eq!(ids(&got), list(&case["ids_with_bos"]), "{}", case["prompt"]);
        assert_eq!(
            SMOLLM2.decode(&tokens(&list(&case["greedy"]))).unwrap(),
            case["greedy_text"].as_str().unwrap()
        );
    }
}

#[test]
fn smollm2_names_its_special_tokens_and_asks_for_no_bos() {
    assert_eq!(
        (SMOLLM2.bos(), SMOLLM2.eos(), SMOLLM2.adds_bos()),
        (Some(TokenId(1)), Some(TokenId(2)), false)
    );
    assert_eq!(SMOLLM2.vocab_size(), 49_152);
    fn shared<T: Send + Sync + Clone>(_: &T) {}
    shared(&*SMOLLM2);
}

#[test]
fn special_tokens_are_recognised_by_encode_and_are_text_to_encode_plain() {
    let spelled = "a<|im_end|>b";
    assert!(ids(&SMOLLM2.encode(spelled).unwrap()).contains(&2));
    let plain = SMOLLM2.encode_plain(spelled).unwrap();
    assert!(plain.iter().all(|token| token.0 > 16), "{plain:?}");
    assert_eq!(SMOLLM2.decode(&plain).unwrap(), spelled);
    assert_eq!(
        SMOLLM2.decode(&SMOLLM2.encode(spelled).unwrap()).unwrap(),
        spelled
    );
    let pieces = sentence_pieces(true);
    assert_eq!(ids(&pieces.encode("<s>").unwrap()), [1]);
    let plain = pieces.encode_plain("x</s><s>").unwrap();
    assert!(plain.iter().all(|token| token.0 > 2), "{plain:?}");
    assert_eq!(pieces.decode(&plain).unwrap(), "x</s><s>");
}

#[test]
fn sentence_pieces_put_a_space_in_front_of_a_text_and_take_it_away_again() {
    let with = sentence_pieces(true);
    assert!(with.adds_bos());
    for text in ["the house", " the", "", "é中\n\t🦀  x "] {
        assert_eq!(
            with.decode(&with.encode_plain(text).unwrap()).unwrap(),
            text
        );
    }
    let without = sentence_pieces(false);
    assert_eq!(
        without.encode_plain(" the").unwrap(),
        with.encode_plain("the").unwrap()
    );
    assert_eq!(
        without
            .decode(&without.encode_plain(" the").unwrap())
            .unwrap(),
        " the"
    );
}

#[test]
fn a_tokenizer_that_is_rebuilt_from_a_folder_has_its_parts() {
    let (_guard, dir) = tiny();
    let text = Text::load(&dir).unwrap();
    assert_eq!(text.vocab_size(), testkit::TINY_TOKENIZER_VOCAB);
    assert_eq!(
        text.decode(&text.encode_plain("and the\u{e9}🦀").unwrap())
            .unwrap(),
        "and the\u{e9}🦀"
    );
    assert!(!text.adds_bos());
    edit(&dir.join("tokenizer_config.json"), |config| {
        config.as_object_mut().unwrap().remove("add_bos_token");
    });
    assert!(!Text::load(&dir).unwrap().adds_bos());
    let bos = text.bos().unwrap();
    edit(&dir.join("tokenizer.json"), |tokenizer| {
        tokenizer["post_processor"] = json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [bos.0], "tokens": ["<|im_start|>"]}},
        });
    });
    assert!(Text::load(&dir).unwrap().adds_bos());
}

#[test]
fn a_chat_template_of_its_own_file_comes_before_the_config_and_default_among_several() {
    let (_guard, dir) = tiny();
    let hello = [Message {
        role: "user".into(),
        content: "hi".into(),
    }];
    let rendered = |dir: &Path| {
        let text = Text::load(dir).unwrap();
        text.decode(&text.encode_chat(&hello).unwrap()).unwrap()
    };
    assert_eq!(
        rendered(&dir),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    );
    edit(&dir.join("tokenizer_config.json"), |config| {
        config["chat_template"] = json!([{"name": "tool_use", "template": "no"}, {"name": "default", "template": "config"}]);
    });
    assert_eq!(rendered(&dir), "config");
    fs::write(
        dir.join("chat_template.json"),
        r#"{"chat_template": "json"}"#,
    )
    .unwrap();
    assert_eq!(rendered(&dir), "json");
    fs::write(
        dir.join("chat_template.jinja"),
        "jinja {{ messages[0].content }}",
    )
    .unwrap();
    assert_eq!(rendered(&dir), "jinja hi");
}

#[test]
fn a_gguf_tokenizer_that_lies_is_an_error_that_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let letters = || Meta::Texts(vec!["a".into(), "b".into(), "ab".into(), "<s>".into()]);
    let base = |pre: &'static str| -> Header {
        vec![
            ("tokenizer.ggml.model", Meta::Text("gpt2")),
            ("tokenizer.ggml.pre", Meta::Text(pre)),
            ("tokenizer.ggml.tokens", letters()),
            ("tokenizer.ggml.token_type", Meta::Numbers(vec![1, 1, 1, 3])),
            ("tokenizer.ggml.merges", Meta::Texts(vec!["a b".into()])),
        ]
    };
    let load = |keys: &[(&str, Meta<'_>)]| {
        gguf(&path, keys);
        Text::load(&path)
            .map(|text| ids(&text.encode_plain("ab").unwrap()))
            .map_err(|error| error.to_string())
    };
    for pre in [
        "default",
        "gpt-2",
        "smollm",
        "llama-bpe",
        "qwen2",
        "tekken",
        "gpt-4o",
    ] {
        assert_eq!(load(&base(pre)), Ok(vec![2]), "{pre}");
    }
    let fails = |change: &dyn Fn(&mut Header), says: &str| {
        let mut keys = base("gpt-2");
        change(&mut keys);
        let error = load(&keys).unwrap_err();
        assert!(error.contains(says), "{error:?} says {says:?}");
    };
    fails(
        &|keys| keys[1].1 = Meta::Text("no-such-split"),
        "no-such-split",
    );
    fails(&|keys| keys[0].1 = Meta::Text("bert"), "bert");
    fails(&|keys| keys[0].1 = Meta::Text("llama"), "scores");
    fails(
        &|keys| keys[3].1 = Meta::Numbers(vec![1]),
        "4 tokens with 1 types",
    );
    fails(&|keys| keys[4].1 = Meta::Texts(vec!["ab".into()]), "ab");
    fails(&|keys| keys[4].1 = Meta::Texts(vec!["a x".into()]), "x");
    fails(
        &|keys| keys[2].1 = Meta::Texts(vec!["a".into(), "a".into(), "ab".into(), "b".into()]),
        "twice",
    );
    fails(&|keys| drop(keys.remove(2)), "tokenizer.ggml.tokens");
    fails(
        &|keys| keys.push(("tokenizer.ggml.bos_token_id", Meta::Number(4))),
        "bos_token_id is 4",
    );
    fails(
        &|keys| keys.push(("tokenizer.ggml.add_bos_token", Meta::Number(1))),
        "add_bos_token",
    );
}

#[test]
fn a_folder_that_lies_is_an_error_that_says_so() {
    let fails = |file: &str, change: &dyn Fn(&mut Value), says: &str| {
        let (_guard, dir) = tiny();
        edit(&dir.join(file), change);
        let error = Text::load(&dir).err().unwrap().to_string();
        assert!(error.contains(says), "{error:?} says {says:?}");
    };
    fails(
        "tokenizer.json",
        &|json| json["decoder"] = Value::Null,
        "decoder",
    );
    fails(
        "tokenizer.json",
        &|json| {
            json["decoder"] = json!({"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": true})
        },
        "CTC",
    );
    fails(
        "tokenizer.json",
        &|json| json["model"]["merges"] = json!(["no such"]),
        "tokenizer.json",
    );
    fails(
        "tokenizer.json",
        &|json| json["model"]["dropout"] = json!(0.1),
        "dropout",
    );
    fails(
        "tokenizer.json",
        &|json| json["model"]["vocab"]["zzz"] = json!(4_000_000_000_u32),
        "4000000000",
    );
    fails(
        "tokenizer_config.json",
        &|json| json["bos_token"] = json!("nobody"),
        "nobody",
    );
    let (_guard, dir) = tiny();
    fs::remove_file(dir.join("tokenizer.json")).unwrap();
    assert!(matches!(
        Text::load(&dir),
        Err(Error::File(FileError::Io { .. }))
    ));
    fs::write(dir.join("tokenizer.json"), "{\"version\"").unwrap();
    assert!(matches!(
        Text::load(&dir),
        Err(Error::File(FileError::Header { .. }))
    ));
    assert!(Text::load(&dir.join("nothing")).is_err());
    assert!(Text::load(&dir.join("tokenizer.json")).is_err());
}

#[test]
fn a_token_outside_the_vocabulary_is_an_error() {
    let outside = TokenId(49_152);
    assert!(
        matches!(SMOLLM2.decode(&[outside]), Err(Error::UnknownToken { token, vocab: 49_152 }) if token == outside)
    );
    assert!(SMOLLM2.decoder().push(TokenId(u32::MAX)).is_err());
}

#[test]
fn a_text_whose_bytes_have_no_token_keeps_what_has_one() {
    let model = BPE::builder()
        .vocab_and_merges([("a".to_owned(), 0)], vec![])
        .build()
        .unwrap();
    let decoder = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let parts = (Value::Null, patterns::split(patterns::GPT2));
    let source = Source {
        tokenizer: Tokenizer::new(model),
        normalizer: parts.0,
        pre_tokenizer: parts.1,
        decoder,
        bos: None,
        eos: None,
        adds_bos: true,
        template: None,
    };
    let text = Text::new(source).unwrap();
    assert_eq!(ids(&text.encode("aba").unwrap()), [0, 0]);
    assert!(!text.adds_bos(), "there is no BOS to add");
    assert!(matches!(text.encode_chat(&[]), Err(Error::NoChatTemplate)));
}
