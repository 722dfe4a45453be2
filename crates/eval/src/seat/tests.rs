use lm::{LoadOptions, Windows};
use testkit::{GeneratorSpec, TinySpec, tiny_base, tiny_generator};

use super::*;

fn tiny(strategy: &'static str) -> Lm {
    let folder = tempfile::tempdir().unwrap();
    let (base, made) = (folder.path().join("base"), folder.path().join("generator"));
    let spec = TinySpec {
        context_length: 2 * STEP,
        ..TinySpec::default()
    };
    tiny_base(&base, &spec);
    let generator = GeneratorSpec {
        strategy: Some(strategy),
        ..GeneratorSpec::default()
    };
    tiny_generator(&made, &spec, &generator);
    let mut lm = Lm::load(&base, LoadOptions::default()).unwrap();
    lm.attach_generator(&made).unwrap();
    lm
}

/// The bits of a state's sums.
fn bits(lm: &Lm, state: &State) -> Vec<u32> {
    let sites = 0..lm.generator().unwrap().sites().len();
    let sums = sites.flat_map(|site| {
        let (s, g) = state.sums(site).unwrap();
        [Some(s.clone()), g.cloned()]
    });
    sums.flatten()
        .flat_map(|sum| sum.flatten_all().unwrap().to_vec1::<f32>().unwrap())
        .map(f32::to_bits)
        .collect()
}

#[test]
fn a_document_read_through_the_seam_is_the_one_shot_state_to_the_bit() {
    let lengths = [
        ("parallel", 1, Strategy::Parallel),
        ("parallel", 100, Strategy::Parallel),
        ("sequential", 29, Strategy::Sequential),
        // One window, longer than a step.
        ("concat", STEP + 77, Strategy::Concat),
    ];
    for (name, length, strategy) in lengths {
        let lm = tiny(name);
        let document: Vec<TokenId> = (0..length).map(|i| TokenId(i as u32 * 7 % 280)).collect();
        let mut seat = Seat::processor(&lm, None).unwrap();
        let (state, trace) = seat.read(&document).unwrap();
        let window = lm.generator().unwrap().config().window;
        let (want, traced) = lm
            .encode_traced(&document, strategy, Windows::Fixed(window))
            .unwrap();
        assert_eq!(bits(&lm, &state), bits(&lm, &want), "{name}");
        assert_eq!(trace.bytes(), traced.bytes());
        assert_eq!(state.is_empty(), length == 1);
    }
}

#[test]
fn a_device_says_what_its_cache_has_no_room_for() {
    let lm = tiny("parallel");
    let machine = Processor::new(&lm, None, 2).unwrap();
    let mut seat = Seat::device(Box::new(machine), &settings(2 * BLOCK));
    seat.reserve(2).unwrap();
    let error = seat.reserve(3).unwrap_err().to_string();
    assert!(
        error.contains("48 tokens") && error.contains("room for 32"),
        "{error}"
    );
}
