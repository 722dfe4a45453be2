//! What stays on the device and in pinned memory when a core is let go, and what rows are refused.

use candle_core::Tensor;
use device::Accelerator;
use engine::{Config, Machine, Slot};
use generator::{PlainCore, State, Window};
use lm::{Row, TokenId};
use testkit::{GeneratorSpec, TinySpec};

use crate::{one, software};

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
    software(&base, &generator, &config)
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

/// A window of these tokens, read alone.
fn told(machine: &mut Accelerator, tokens: &[TokenId]) -> Window {
    let mut window = machine.generator().unwrap().new_window().unwrap();
    let mut rows = [Row {
        window: Some(&mut window),
        logits: 0,
        ..row(tokens, None)
    }];
    machine.forward(&mut rows, &[None]).unwrap();
    window
}

/// S and G of all sites, or N.
fn numbers(tensors: impl IntoIterator<Item = Tensor>) -> Vec<f64> {
    tensors
        .into_iter()
        .flat_map(|tensor| testkit::values(&tensor))
        .collect()
}

#[test]
fn sums_stay_on_the_device_however_states_are_made_of_them_and_land_as_the_same_numbers() {
    let _one = one();
    // Room for one of them: the others wait on the host.
    let mut machine = accelerator();
    let device = machine.device().clone();
    let before = device.violations().len();
    let texts = [[3, 7, 2, 9, 1, 4], [8, 8, 5, 0, 6, 2], [1, 2, 3, 4, 5, 6]];
    let texts = texts.map(|text| text.map(TokenId));
    let weights = [1.0, 0.5, 2.0];
    let empty = machine.generator().unwrap().new_state().unwrap();
    let sites = machine.generator().unwrap().sites().len();

    // By names: two windows gathered, then another state of one added twice over.
    let mut named = empty.try_clone().unwrap();
    for (text, weight) in texts.iter().zip(weights).take(2) {
        let window = told(&mut machine, text);
        named.add_window(&window, weight).unwrap();
    }
    assert_eq!(named.elsewhere().len(), 2);
    machine.gather(&mut named).unwrap();
    assert_eq!(named.elsewhere().len(), 1);
    let mut third = empty.try_clone().unwrap();
    third
        .add_window(&told(&mut machine, &texts[2]), 4.0)
        .unwrap();
    named.add(&third, weights[2] / 4.0).unwrap();
    assert!(!named.is_here() && !named.is_empty());

    // By numbers: each landed, then added on the host.
    let mut landed = empty.try_clone().unwrap();
    for (text, weight) in texts.iter().zip(weights) {
        let mut state = empty.try_clone().unwrap();
        state.add_window(&told(&mut machine, text), 1.0).unwrap();
        machine.land(&mut state).unwrap();
        assert!(state.is_here() && state.elsewhere().is_empty());
        landed.add(&state, weight).unwrap();
    }

    let sums = |state: &State| {
        let both = |site| {
            let (s, g) = state.sums(site).unwrap();
            [Some(s.clone()), g.cloned()]
        };
        numbers((0..sites).flat_map(both).flatten())
    };
    let core = |machine: &Accelerator, state: &State| {
        let core = machine.read_out(state).unwrap();
        numbers((0..sites).filter_map(|site| core.matrix(site).unwrap()))
    };
    // A state half here and half there, as one that came back from a snapshot and reads on.
    let mut mixed = empty.try_clone().unwrap();
    mixed.add(&named, 1.0).unwrap();
    machine.land(&mut mixed).unwrap();
    mixed.add(&third, 0.25).unwrap();
    let mut more = landed.try_clone().unwrap();
    machine.land(&mut third).unwrap();
    more.add(&third, 0.25).unwrap();
    for (there, here) in [(&named, &landed), (&mixed, &more)] {
        let error = testkit::relative_error_of(&core(&machine, there), &core(&machine, here));
        assert!(error < 2e-2, "{error}");
        let mut all = there.try_clone().unwrap();
        machine.land(&mut all).unwrap();
        let error = testkit::relative_error_of(&sums(&all), &sums(here));
        assert!(error < 1e-5, "{error}");
        // What another machine or nobody has cannot be read here.
        let generator = machine.generator().unwrap();
        assert!(generator.read_out(there).is_err() && generator.read_out(here).is_ok());
        assert!(there.write(&mut Vec::new()).is_err());
    }
    device.synchronize().unwrap();
    assert_eq!(device.violations()[before..], [] as [String; 0]);
}
