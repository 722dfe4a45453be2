//! Gates on the device hold back what they hold back on the processor.

use candle_core::{Device, Tensor};
use engine::{Chosen, Strategy};
use generator::{GATE_FILE, Gate};
use lm::{Lm, LoadOptions};

use crate::{MODELS, Rig, Said, apart, config, side_by_side, text};

fn gated() -> Chosen {
    Chosen {
        gated: true,
        ..Chosen::default()
    }
}

#[test]
fn gates_hold_back_what_they_hold_back_on_the_processor() {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(&MODELS.associative).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let mut lm = Lm::load(&MODELS.base, LoadOptions::default()).unwrap();
    lm.attach_generator(folder.path()).unwrap();
    let generator = lm.generator().unwrap();
    // Keys of any text are like each other in one direction.
    let keys = generator.sites().iter().map(|site| {
        let (r1, ..) = site.ranks();
        let one = |i: usize| {
            if i.is_multiple_of(r1 + 1) {
                1.0 / r1 as f32
            } else {
                0.01
            }
        };
        let values: Vec<f32> = (0..r1 * r1).map(one).collect();
        Tensor::from_vec(values, (r1, r1), &Device::Cpu).unwrap()
    });
    let gate = Gate::new(0.65, 0.2, keys.collect()).unwrap();
    let bytes = generator.gate_bytes(&gate).unwrap();
    std::fs::write(folder.path().join(GATE_FILE), bytes).unwrap();

    let script = |rig: &mut Rig| {
        rig.open(1, Strategy::Parallel);
        rig.ingest(1, 1, 10, &text(1, 25), true);
        rig.ingest(1, 2, 11, &text(2, 9), false);
        let mut said = vec![rig.publish(1, 2, &[])];
        // Of the newest version, whose last window is open; prompts are grouped, answers gathered.
        said.push(rig.score_of(Some(1), 1.0, gated()));
        said.push(rig.score(Some(1), 1.0));
        said.push(rig.score(None, 1.0));
        said.extend(rig.ask_of(&[Some(1), None, Some(1)], 4, &gated()));
        said
    };
    let (said, _) = side_by_side(&MODELS.base, folder.path(), config(), |_| {}, script);
    let scores: Vec<_> = said
        .iter()
        .filter(|said| matches!(said, Said::Scores(_)))
        .collect();
    assert!(apart(scores[0], scores[1]) > 0.02 && apart(scores[0], scores[2]) > 0.02);
}
