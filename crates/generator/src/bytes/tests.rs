//! What is written is read bit for bit; what is cut, changed or foreign is an error and never a panic.

use proptest::prelude::*;
use testkit::GeneratorSpec;

use super::*;
use crate::testing;

/// A generator of either form, a state of some windows' sums, and its core.
fn made(associative: bool) -> (Generator, State, Core) {
    let generator = if associative {
        testing::associative()
    } else {
        testing::published("svd")
    };
    let empty = generator.new_state().unwrap();
    let mut sites = Vec::new();
    for (index, sums) in empty.all().0.iter().enumerate() {
        let (s, g, mass) = sums.parts();
        let values = |m: &Tensor| {
            let (rows, columns) = m.dims2().unwrap();
            let value = |i: usize| ((i * 37 + index * 11) % 23) as f32 / 7.0 - 1.5;
            let values: Vec<f32> = (0..rows * columns).map(value).collect();
            Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
        };
        let s = values(s);
        // G is a sum of outer products.
        let g = g.map(|g| {
            let g = values(g);
            g.matmul(&g.t().unwrap()).unwrap()
        });
        sites.push(Sums::of_parts(s, g, mass.map(|_| 3.25)));
    }
    let state = State::from_sums(sites, 5);
    let core = generator.read_out(&state).unwrap();
    (generator, state, core)
}

fn trace(generator: &Generator) -> Trace {
    let tokens = vec![1, 2, 5];
    let sites = generator.sites().iter().map(|site| {
        let (r1, r2, _) = site.ranks();
        let row = |width: usize| (0..3 * width).map(|i| bf16::from_f32(i as f32)).collect();
        Rows {
            k: row(r1),
            v: row(r2),
        }
    });
    let skip = generator.config().skip_first;
    Trace::of_parts(sites.collect(), tokens, 6, skip)
}

fn written(associative: bool) -> (Generator, [Vec<u8>; 3]) {
    let (generator, state, core) = made(associative);
    let (mut a, mut b, mut c) = (Vec::new(), Vec::new(), Vec::new());
    core.write(&mut a).unwrap();
    state.write(&mut b).unwrap();
    trace(&generator).write(&mut c);
    (generator, [a, b, c])
}

/// Reads as what `kind` says, checks it, and writes it again.
fn again(generator: &Generator, kind: usize, bytes: &[u8]) -> Result<Vec<u8>, Error> {
    let (mut rest, mut out) = (bytes, Vec::new());
    match kind {
        0 => {
            let core = Core::read(&mut rest)?;
            generator.check_core(&core)?;
            core.write(&mut out)?;
        }
        1 => {
            let state = State::read(&mut rest)?;
            generator.check_state(&state)?;
            state.write(&mut out)?;
        }
        _ => {
            let trace = Trace::read(&mut rest)?;
            generator.check_trace(&trace)?;
            trace.write(&mut out);
        }
    }
    Ok(out)
}

#[test]
fn what_is_written_is_read_bit_for_bit() {
    for associative in [true, false] {
        let (generator, kinds) = written(associative);
        for (kind, bytes) in kinds.iter().enumerate() {
            assert_eq!(&again(&generator, kind, bytes).unwrap(), bytes, "{kind}");
        }
        let (_, state, core) = made(associative);
        let read = State::read(&mut kinds[1].as_slice()).unwrap();
        let mut out = Vec::new();
        generator.read_out(&read).unwrap().write(&mut out).unwrap();
        assert_eq!((out, read.is_empty()), (kinds[0].clone(), state.is_empty()));
        assert_eq!(
            core.bytes(),
            Core::read(&mut kinds[0].as_slice()).unwrap().bytes()
        );
        assert!(core.bytes() <= generator.core_bytes());
    }
}

#[test]
fn what_is_of_another_generator_is_refused() {
    let (_, kinds) = written(true);
    let ranks = testing::tiny(&GeneratorSpec {
        r1: 10,
        r2: 12,
        ..GeneratorSpec::default()
    });
    let sites = testing::tiny(&GeneratorSpec {
        layers: Some(vec![0]),
        ..GeneratorSpec::default()
    });
    for other in [ranks, sites] {
        for (kind, bytes) in kinds.iter().enumerate() {
            let refused = again(&other, kind, bytes).unwrap_err();
            assert!(matches!(refused, Error::Foreign { .. }), "{kind} {refused}");
        }
    }
    // A form that keeps other sums.
    let refused = again(&testing::published("svd"), 1, &kinds[1]).unwrap_err();
    assert!(matches!(refused, Error::Foreign { .. }), "{refused}");
}

proptest! {
    #[test]
    fn what_is_cut_is_refused(kind in 0usize..3, at in any::<prop::sample::Index>()) {
        let (generator, kinds) = written(true);
        let bytes = &kinds[kind];
        prop_assert!(again(&generator, kind, &bytes[..at.index(bytes.len())]).is_err());
    }

    #[test]
    fn no_byte_that_is_changed_panics(kind in 0usize..3, at in any::<prop::sample::Index>(), to in any::<u8>()) {
        let (generator, kinds) = written(true);
        let mut bytes = kinds[kind].clone();
        // Counts and shapes come first.
        let at = at.index(bytes.len().min(64));
        bytes[at] = to;
        drop(again(&generator, kind, &bytes));
    }
}

#[test]
fn a_core_that_nobody_else_holds_is_scrubbed() {
    let (_, _, mut core) = made(true);
    let SiteCore::Dense(view) = &core.sites[0] else {
        panic!("a small core is dense");
    };
    // The same memory, seen from outside.
    let view = view.clone();
    let before = view.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(before.iter().any(|value| *value != 0.0));
    let shared = core.clone();
    assert!(!core.scrub());
    drop(shared);
    assert!(core.scrub());
    let after = view.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(after.iter().all(|value| *value == 0.0));
}
