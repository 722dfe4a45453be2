//! What rounding activations to int8 does to the real model's predictions, in figures.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::Path;

use generator::Strategy;
use lm::{Activations, Lm, LoadOptions, TokenId, Windows, text::Text};

/// Written for this test.
const TEXT: &str = "The ferry to the island leaves at seven in the morning and returns at dusk. Nobody on board speaks much before \
the second cup of coffee; the engine is loud, the benches are wet, and the gulls follow the boat for as long as somebody might \
throw them a crust of bread. Anna had taken the crossing every week for eleven years. She taught mathematics at the small school \
behind the lighthouse, nineteen pupils between six and fifteen in a single room, and she liked to say that fractions are easiest \
to explain with a loaf and a sharp knife. In winter the sea froze along the shore, and the ferryman, a patient man called Oskar, \
would walk ahead with a long pole to see whether the ice would bear a sledge. One evening in March the radio announced a storm \
from the north-west with gusts of more than one hundred kilometres an hour. The mayor asked everybody to stay at home. Anna lit \
the stove, marked forty pages of homework, and listened to the tiles rattle on the roof. At three in the morning the light went \
out. When she opened the door at dawn, the pier was gone: eight posts stood in the water like the teeth of a broken comb, and \
between them floated a red bucket. It took the islanders until August to build another one. They used larch from the mainland, \
steel bolts as thick as a thumb, and a plan that the older pupils had drawn and computed themselves, with every angle checked \
twice. On the first day of term the children crossed it one after the other, counting their steps aloud: two hundred and six.";

/// Natural logarithms of the probabilities.
fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
    let sum: f64 = logits.iter().map(|&l| (f64::from(l) - largest).exp()).sum();
    let shift = largest + sum.ln();
    logits.iter().map(|&l| f64::from(l) - shift).collect()
}

/// How far predictions [T, V] of the same T tokens lie apart.
struct Apart {
    /// Mean KL from the exact ones, in nats.
    divergence: f64,
    /// Share of tokens with the same best next one.
    same: f64,
    /// Mean losses of the next tokens, exact and rounded, in nats.
    losses: [f64; 2],
    figures: String,
}

fn apart(tokens: &[TokenId], exact: &[Vec<f32>], rounded: &[Vec<f32>]) -> Apart {
    let count = exact.len() as f64;
    let (mut divergence, mut same, mut largest, mut losses) = (0.0, 0.0, 0.0_f32, [0.0, 0.0]);
    for (t, (exact, rounded)) in exact.iter().zip(rounded).enumerate() {
        let (p, q) = (log_softmax(exact), log_softmax(rounded));
        divergence += p
            .iter()
            .zip(&q)
            .map(|(p, q)| p.exp() * (p - q))
            .sum::<f64>()
            / count;
        let best = |logs: &[f64]| (0..logs.len()).max_by(|&a, &b| logs[a].total_cmp(&logs[b]));
        same += f64::from(u8::from(best(&p) == best(&q))) / count;
        for (a, b) in exact.iter().zip(rounded) {
            largest = largest.max((a - b).abs());
        }
        if let Some(next) = tokens.get(t + 1) {
            losses[0] -= p[next.0 as usize] / (count - 1.0);
            losses[1] -= q[next.0 as usize] / (count - 1.0);
        }
    }
    let figures = format!(
        "{count} tokens: mean KL {divergence:.2e} nats, the same best token at {:.1} %, largest difference of a logit {largest:.2}, \
         loss {:.4} -> {:.4}",
        100.0 * same,
        losses[0],
        losses[1]
    );
    testkit::report(&figures);
    Apart {
        divergence,
        same,
        losses,
        figures,
    }
}

fn model(activations: Activations) -> Lm {
    let options = LoadOptions {
        activations,
        ..LoadOptions::default()
    };
    Lm::load(&testkit::smollm2_gguf(), options).unwrap()
}

#[test]
fn predictions_hardly_move_when_activations_are_rounded() {
    let text = Text::load(&testkit::smollm2_gguf()).unwrap();
    let tokens = text.encode(TEXT).unwrap();
    let [exact, rounded] = [Activations::F32, Activations::Int8].map(|activations| {
        let logits = model(activations).logits(&tokens, None, 1.0).unwrap(); // [T, V]
        logits.to_vec2::<f32>().unwrap()
    });
    let Apart {
        divergence,
        same,
        losses,
        figures,
    } = apart(&tokens, &exact, &rounded);
    assert!(exact.len() > 300, "{figures}");
    assert!(divergence > 0.0 && divergence < 0.01, "{figures}");
    assert!(same > 0.93, "{figures}");
    assert!((losses[1] / losses[0] - 1.0).abs() < 0.01, "{figures}");
}

#[test]
fn an_imprint_is_worth_the_same_when_maps_and_cores_are_rounded_too() {
    let text = Text::load(&testkit::smollm2_gguf()).unwrap();
    let generator =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/smollm2-135m-instruct");
    let tokens = text.encode(TEXT).unwrap();
    // Told the whole text, then asked for it again: what an imprint does most to.
    let [exact, rounded] = [Activations::F32, Activations::Int8].map(|activations| {
        let mut lm = model(activations);
        lm.attach_generator(&generator).unwrap();
        let state = lm
            .encode(&tokens, Strategy::Parallel, Windows::Fixed(256))
            .unwrap();
        let generator = lm.generator().unwrap();
        assert!(
            generator
                .sites()
                .iter()
                .all(|site| site.rounds() == (activations == Activations::Int8))
        );
        let core = generator.read_out(&state).unwrap();
        testkit::report(&format!("{activations}: a core of {} bytes", core.bytes()));
        let logits = lm.logits(&tokens, Some(&core), 1.0).unwrap(); // [T, V]
        logits.to_vec2::<f32>().unwrap()
    });
    let Apart {
        divergence,
        same,
        losses,
        figures,
    } = apart(&tokens, &exact, &rounded);
    // The bare model's loss is 3.95.
    assert!(losses[0] < 2.5, "{figures}");
    assert!(divergence > 0.0 && divergence < 0.02, "{figures}");
    assert!(same > 0.9, "{figures}");
    assert!((losses[1] - losses[0]).abs() < 0.03, "{figures}");
}
