use candle_core::Tensor;
use lm::{LoadOptions, text::Text};
use testkit::{GeneratorSpec, TINY_TOKENIZER_VOCAB, TinySpec, tiny_base, tiny_generator};

use super::*;
use crate::{
    cost::Costs,
    model::{Ask, Group, Heard, Model},
    seat::Seat,
};

/// A tiny model with sites in these layers (none: in all).
fn tiny(layers: Option<Vec<usize>>) -> (Lm, Text) {
    let folder = tempfile::tempdir().unwrap();
    let (base, made) = (folder.path().join("base"), folder.path().join("generator"));
    let spec = TinySpec {
        vocab: TINY_TOKENIZER_VOCAB,
        context_length: 512,
        layers: 3,
        ..TinySpec::default()
    };
    tiny_base(&base, &spec);
    let generator = GeneratorSpec {
        layers,
        ..GeneratorSpec::default()
    };
    tiny_generator(&made, &spec, &generator);
    let mut lm = Lm::load(&base, LoadOptions::default()).unwrap();
    lm.attach_generator(&made).unwrap();
    let text = Text::load(&base).unwrap();
    (lm, text)
}

fn document(count: usize, seed: u64) -> Document {
    let mut draws = Draws::new(seed, "document");
    let token = |_| TokenId(draws.below(TINY_TOKENIZER_VOCAB) as u32);
    Document {
        text: String::new(),
        tokens: (0..count).map(token).collect(),
    }
}

fn training<'a>(lm: &'a Lm, context: &[&Document]) -> Training<'a> {
    Training::new(lm, context, &[], &mut Draws::new(1, "lora")).unwrap()
}

/// What a model makes of the rest of a document behind its first token.
fn heard(model: &mut Model<'_>, document: &Document) -> Heard {
    let group = Group {
        core: None,
        scale: 1.0,
        prefix: Vec::new(),
        asks: vec![Ask {
            tail: document.tokens[..1].to_vec(),
            answer: &document.tokens[1..],
            options: &[],
            max_tokens: 5,
            keep: true,
            bare: None,
        }],
    };
    let mut answers = model.hear(&[group]).unwrap();
    answers.remove(0).heard.remove(0)
}

#[test]
fn an_adapter_that_took_no_step_is_the_bare_model_to_the_bit() {
    let (lm, text) = tiny(None);
    let document = document(30, 2);
    let lora = training(&lm, &[&document]).lora().unwrap();
    let mut model = Model::new(Seat::processor(&lm, None).unwrap(), &text).unwrap();
    let (bare, adapted) = (
        heard(&mut model, &document),
        heard(&mut model.with(&lm, &lora).unwrap(), &document),
    );
    assert_eq!(bare.kept, adapted.kept);
    assert_eq!(bare.logprobs, adapted.logprobs);
    assert_eq!(bare.tokens, adapted.tokens);
}

#[test]
fn steps_lower_the_loss_on_the_context_and_what_was_trained_is_what_answers() {
    let (lm, text) = tiny(Some(vec![1, 2]));
    let window = lm.generator().unwrap().config().window;
    // One window, and the token behind it.
    let document = document(window + 1, 3);
    let mut training = training(&lm, &[&document]);
    let model = Model::new(Seat::processor(&lm, None).unwrap(), &text).unwrap();
    let mut losses = Vec::new();
    for _ in 0..12 {
        let lora = training.lora().unwrap();
        let served = heard(&mut model.with(&lm, &lora).unwrap(), &document);
        let served = -served.logprobs.iter().sum::<f64>() / window as f64;
        let loss = training.step(0.02).unwrap();
        assert!((loss - served).abs() < 1e-5, "{loss} {served}");
        losses.push(loss);
    }
    assert!(losses[11] < 0.8 * losses[0], "{losses:?}");
}

#[test]
fn every_token_but_a_documents_first_is_predicted_once() {
    let (lm, _) = tiny(None);
    let window = lm.generator().unwrap().config().window;
    let documents = [
        document(2 * window + 3, 4),
        document(1, 5),
        document(window, 6),
        document(0, 7),
    ];
    let bos = [TokenId(1)];
    let context: Vec<&Document> = documents.iter().collect();
    let training = Training::new(&lm, &context, &bos, &mut Draws::new(1, "lora")).unwrap();
    let counts: Vec<usize> = training.windows().collect();
    assert_eq!(counts, [window, window, 3, 1, window]);
    let predicted = training.windows.iter().flat_map(|window| &window[1..]);
    let told = documents.iter().flat_map(|document| &document.tokens);
    assert!(predicted.eq(told));
    assert_eq!(training.windows[0][0], bos[0]);
    assert_eq!(training.windows[1][0], documents[0].tokens[window - 1]);
}

#[test]
fn a_context_of_many_windows_has_the_gradient_of_its_parts() {
    let (lm, _) = tiny(None);
    let (one, two) = (document(AT_ONCE - 40, 8), document(200, 9));
    let moments = |context: &[&Document]| -> (Vec<f32>, f64) {
        let mut training = training(&lm, context);
        let loss = training.step(1e-3).unwrap();
        let b = training.masters.iter().flat_map(|master| &master.first);
        (b.copied().collect(), loss)
    };
    let ((whole, loss), (first, first_loss), (second, second_loss)) =
        (moments(&[&one, &two]), moments(&[&one]), moments(&[&two]));
    let (n, m) = ((one.tokens.len() - 1) as f64, (two.tokens.len() - 1) as f64);
    let mean = |a: f64, b: f64| (n * a + m * b) / (n + m);
    assert!((loss - mean(first_loss, second_loss)).abs() < 1e-6);
    let mut largest = 0_f64;
    for ((&whole, &a), &b) in whole.iter().zip(&first).zip(&second) {
        largest = largest.max(f64::from(whole).abs());
        let parts = mean(f64::from(a), f64::from(b));
        assert!((f64::from(whole) - parts).abs() < 1e-7, "{whole} {parts}");
    }
    assert!(largest > 1e-4, "{largest}");
}

#[test]
fn a_context_without_anything_to_predict_teaches_nothing() {
    let (lm, _) = tiny(None);
    let document = document(1, 10);
    let mut training = training(&lm, &[&document]);
    let before = training.masters[0].values.clone();
    assert_eq!(training.step(0.1).unwrap().to_bits(), 0);
    assert_eq!(training.masters[0].values, before);
}

#[test]
fn it_has_the_places_and_the_rank_of_an_exported_core_and_is_counted_as_it_is() {
    for layers in [None, Some(vec![1]), Some(vec![1, 2])] {
        let (lm, _) = tiny(layers.clone());
        let generator = lm.generator().unwrap();
        let mut draws = Draws::new(3, "context");
        let tokens: Vec<TokenId> = (0..40).map(|_| TokenId(draws.below(90) as u32)).collect();
        let strategy = generator.config().strategy;
        let read = lm.encode(&tokens, strategy, lm::Windows::Fixed(8)).unwrap();
        let core = generator.read_out(&read).unwrap();
        let exported = generator.export_peft(&core).unwrap();

        let document = document(30, 2);
        let training = training(&lm, &[&document]);
        let sites: Vec<SiteId> = generator.sites().iter().map(|site| site.id()).collect();
        let own: Vec<SiteId> = training.lora.sites.iter().map(|(site, ..)| *site).collect();
        assert_eq!(own, sites);
        let mut floats = 0;
        for (_, a, b) in &training.lora.sites {
            assert_eq!(
                (a.dim(0).unwrap(), b.dim(1).unwrap()),
                (exported.rank, exported.rank)
            );
            floats += [a, b].into_iter().map(Tensor::elem_count).sum::<usize>();
        }

        let costs = Costs::new(lm.config(), lm.generator());
        assert_eq!(costs.lora_floats(), floats);
        // A multiplication and an addition for each weight.
        let forward = |tokens| costs.pass(0, tokens, tokens, false);
        assert_eq!(costs.lora_pass(7), 14.0 * floats as f64);
        // The way back: as far as the lowest site, twice where both factors have gradients (attention and the adapter).
        let windows = [8, 8, 5];
        let head = forward(1) - costs.pass(0, 1, 0, false);
        let layers_all = 3.0;
        let attention = costs.pass(0, 2, 0, false) - 2.0 * costs.pass(0, 1, 0, false);
        let linears = costs.pass(0, 1, 0, false) - attention;
        let share = if layers.is_none() {
            1.0
        } else {
            2.0 / layers_all
        };
        let mut want = 0.0;
        for tokens in windows {
            let (n, pairs) = (tokens as f64, (tokens * (tokens + 1)) as f64 / 2.0);
            want += forward(tokens) + 3.0 * costs.lora_pass(tokens);
            want += n * (share * linears + head) + 2.0 * share * attention * pairs;
        }
        let counted = costs.lora(windows.into_iter(), 5);
        assert!((counted / (5.0 * want) - 1.0).abs() < 1e-12);
    }
}
