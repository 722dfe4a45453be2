//! What stays on the device and in pinned memory when a core is let go, and what rows are refused.

use std::path::Path;

use device::{Accelerator, Libraries, Options};
use engine::{Config, Machine, Slot};
use generator::PlainCore;
use lm::{Row, TokenId};
use testkit::{GeneratorSpec, TinySpec};

use crate::one;

/// A tiny model with a generator of two sites, on a software device.
fn accelerator() -> Accelerator {
    let folder = tempfile::tempdir().unwrap();
    let spec = TinySpec {
        head_dim: Some(16),
        vocab: 96,
        context_length: 64,
        ..TinySpec::default()
    };
    let [base, generator] = ["base", "generator"].map(|name| folder.path().join(name));
    testkit::tiny_base(&base, &spec);
    let sizes = GeneratorSpec {
        r1: 16,
        r2: 8,
        rank: 8,
        ..GeneratorSpec::default()
    };
    testkit::tiny_generator(&generator, &spec, &sizes);
    let config = Config {
        step_tokens: 8,
        kv_blocks: 8,
        block_size: 8,
        max_running: 2,
        ..Config::default()
    };
    let options = Options {
        libraries: Libraries::from(testkit::software_device(Path::new(env!(
            "CARGO_TARGET_TMPDIR"
        )))),
        ordinal: 0,
        slots: 2,
        pinned: 2,
        windows: 1,
    };
    Accelerator::load(&base, Some(&generator), &config, &options).unwrap()
}

fn row<'a>(tokens: &'a [TokenId], core: Option<&'a generator::Core>) -> Row<'a> {
    Row {
        tokens,
        position: 0,
        blocks: &[0],
        core,
        scale: 1.0,
        window: None,
        lookahead: None,
        logits: 1,
    }
}

#[test]
fn nothing_of_a_core_that_is_let_go_stays_and_rows_that_cannot_run_are_refused() {
    let _one = one();
    let mut machine = accelerator();
    let sites = machine.generator().unwrap().sites().len();
    let parts = (0..sites).map(|site| PlainCore::Dense(vec![0.1 + site as f32; 16 * 8]));
    let core = machine.generator().unwrap().core(parts.collect()).unwrap();
    let tokens = [3, 7, 2].map(TokenId);
    let slot = Slot::new(5, 3);
    let adapted = machine
        .forward(&mut [row(&tokens, Some(&core))], &[Some(slot)])
        .unwrap();
    let bare = machine.forward(&mut [row(&tokens, None)], &[None]).unwrap();
    assert_ne!(adapted, bare);

    let device = machine.device().clone();
    assert!(!machine.holds_no_core().unwrap());
    machine.free(slot).unwrap();
    assert!(machine.holds_no_core().unwrap());

    // Two passes, as there are two slots; the third core takes the place of the first.
    let mut rows = [0, 1, 2].map(|_| row(&tokens[..1], Some(&core)));
    let blocks = [[1], [2], [3]];
    for (row, blocks) in rows.iter_mut().zip(&blocks) {
        row.blocks = blocks;
    }
    let named = [0, 1, 2].map(|index| Some(Slot::new(index, 0)));
    let logits = machine.forward(&mut rows, &named).unwrap();
    assert_eq!(logits.len(), 3 * 96);
    assert_eq!(logits[..96], logits[192..]);
    assert_eq!(machine.brought().get(), 4);

    let foreign = [TokenId(96)];
    assert!(
        machine
            .forward(&mut [row(&foreign, None)], &[None])
            .is_err()
    );
    let again = machine.forward(&mut [row(&tokens, None)], &[None]).unwrap();
    assert_eq!(again, bare);
    device.synchronize().unwrap();
    assert_eq!(device.violations(), [] as [String; 0]);
}
