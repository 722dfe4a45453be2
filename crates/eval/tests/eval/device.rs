//! Evaluations on the software device, against the same on the processor: what they say may differ by bf16 alone.

use std::path::Path;

use candle_core::DType;
use device::{Accelerator, Libraries, Options};
use eval::{Error, report::Report, run::evaluate_on, settings};
use testkit::{GeneratorSpec, TinySpec};

use crate::support::{Tiny, args, corpus, spec, squad};

/// Part of an NLL that bf16 activations and cores may take or give.
const SHARE: f64 = 1e-2;

/// A model whose numbers the device takes as they are.
fn tiny() -> Tiny {
    let spec = TinySpec {
        head_dim: Some(16),
        dtype: DType::BF16,
        ..spec(512)
    };
    let generator = GeneratorSpec {
        r1: 16,
        r2: 8,
        rank: 8,
        window: 64,
        document_suffix: Some("\n\n"),
        bos: Some(false),
        ..GeneratorSpec::default()
    };
    Tiny::of(spec, Some(generator))
}

fn on_device(tiny: &Tiny, line: &str, rows: &[String]) -> Result<Report, Error> {
    let settings = settings(4096);
    let options = Options {
        libraries: Libraries::from(testkit::software_device(Path::new(env!(
            "CARGO_TARGET_TMPDIR"
        )))),
        ordinal: 0,
        // Fewer than are asked with at once.
        slots: 3,
        pinned: 4,
        quantised: false,
        windows: 2,
    };
    let machine =
        Accelerator::load(&tiny.base(), Some(&tiny.generator()), &settings, &options).unwrap();
    let path = tiny.rows(rows);
    let args = args(&format!("{line} --data {}", path.display()));
    evaluate_on(&args, Box::new(machine), &settings, &tiny.text)
}

#[test]
fn an_evaluation_on_a_device_is_the_processors_up_to_bf16() {
    let tiny = tiny();
    let (mut answers, mut same) = (0, 0);
    for (line, rows) in [
        (
            "--task squad --limit 6 --questions 2 --context-tokens 200 --methods none,in_context,imprint,imprint_foreign",
            squad(12),
        ),
        (
            "--task text --limit 2 --methods none,imprint --whole",
            corpus(3),
        ),
    ] {
        let want = tiny.run(line, &rows).unwrap();
        let got = on_device(&tiny, line, &rows).unwrap();
        assert_eq!(got.about.device.as_deref(), Some("cuda"));
        assert_eq!(want.examples.len(), got.examples.len());
        let (mut moved, mut imprinted) = (0.0_f64, 0.0_f64);
        for (want, got) in want.examples.iter().zip(&got.examples) {
            assert_eq!(
                want.answers.keys().collect::<Vec<_>>(),
                got.answers.keys().collect::<Vec<_>>()
            );
            for (method, want) in &want.answers {
                let got = &got.answers[method];
                let apart = (want.nll - got.nll).abs() / want.nll;
                assert!(apart < SHARE, "{method}: {} {}", want.nll, got.nll);
                answers += 1;
                same += usize::from(want.text == got.text);
                assert_eq!(want.strength, got.strength, "{method}");
                moved = moved.max(apart);
            }
            let own = |name: &str| got.answers[name].nll;
            imprinted = (own("none") / own("imprint") - 1.0).abs().max(imprinted);
        }
        // It is no processor, and imprints do something there.
        assert!(
            moved > 0.0 && imprinted > 3.0 * SHARE,
            "{moved} {imprinted}"
        );
    }
    // A greedy answer of a model of noise turns where two tokens are as good as equal.
    assert!(
        4 * same >= 3 * answers,
        "{same} of {answers} greedy answers are the same"
    );
    let error = on_device(&tiny, "--task squad --methods none,lora", &squad(4)).unwrap_err();
    assert!(
        matches!(&error, Error::Device { what, .. } if what == "method lora"),
        "{error}"
    );
}
