//! Rows that cannot be run: each fault is its own error, and neither cache nor windows have changed.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use lm::{Error, KvCache, Lm, LoadOptions, Row, TokenId};
use testkit::{GeneratorSpec, TinySpec, tiny_base, tiny_generator};

const TOKENS: [TokenId; 4] = [TokenId(5), TokenId(6), TokenId(7), TokenId(8)];

fn bare() -> (tempfile::TempDir, Lm) {
    let dir = tempfile::tempdir().unwrap();
    let base = TinySpec {
        context_length: 16,
        ..TinySpec::default()
    };
    tiny_base(&dir.path().join("base"), &base);
    tiny_generator(
        &dir.path().join("generator"),
        &base,
        &GeneratorSpec::default(),
    );
    let lm = Lm::load(&dir.path().join("base"), LoadOptions::default()).unwrap();
    (dir, lm)
}

fn row<'a>(tokens: &'a [TokenId], blocks: &'a [u32]) -> Row<'a> {
    Row {
        tokens,
        position: 0,
        blocks,
        core: None,
        scale: 1.0,
        window: None,
        lookahead: None,
        logits: 1,
    }
}

fn bits(kv: &KvCache, lm: &Lm) -> Vec<f32> {
    // What the cache holds shows in the logits of a token that attends to all of it.
    let mut probe = [Row {
        position: 4,
        ..row(&TOKENS[..1], &[0, 1])
    }];
    lm.forward(&mut probe, kv)
        .unwrap()
        .logits
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

#[test]
fn each_fault_has_its_error_and_changes_nothing() {
    let (_dir, lm) = bare();
    let kv = KvCache::new(lm.config(), 4, 4).unwrap();
    lm.forward(&mut [row(&TOKENS, &[0])], &kv).unwrap();
    let before = bits(&kv, &lm);

    let foreign = [TokenId(5), TokenId(288)];
    let other = [TokenId(9), TokenId(9)];
    type Check = fn(&Error) -> bool;
    let cases: Vec<(Row<'_>, Check)> = vec![
        (row(&[], &[0]), |e| matches!(e, Error::EmptyRow { row: 1 })),
        (row(&foreign, &[0]), |e| {
            matches!(
                e,
                Error::TokenOutOfRange {
                    row: 1,
                    token: TokenId(288),
                    vocab: 288
                }
            )
        }),
        (
            Row {
                lookahead: Some(TokenId(u32::MAX)),
                ..row(&other, &[0])
            },
            |e| matches!(e, Error::TokenOutOfRange { row: 1, .. }),
        ),
        (
            Row {
                position: 15,
                ..row(&other, &[0, 1, 2, 3])
            },
            |e| {
                matches!(
                    e,
                    Error::ContextLength {
                        row: 1,
                        end: 17,
                        limit: 16
                    }
                )
            },
        ),
        (
            Row {
                position: usize::MAX,
                ..row(&other, &[0])
            },
            |e| matches!(e, Error::ContextLength { row: 1, .. }),
        ),
        (
            Row {
                position: 3,
                ..row(&other, &[0])
            },
            |e| matches!(e, Error::Blocks { row: 1, .. }),
        ),
        (row(&other, &[4]), |e| {
            matches!(e, Error::Blocks { row: 1, .. })
        }),
        (row(&other, &[2]), |e| {
            matches!(e, Error::Blocks { row: 1, .. })
        }),
        (
            Row {
                logits: 3,
                ..row(&other, &[0])
            },
            |e| {
                matches!(
                    e,
                    Error::TooManyLogits {
                        row: 1,
                        tokens: 2,
                        wanted: 3
                    }
                )
            },
        ),
        (
            Row {
                scale: f32::NAN,
                ..row(&other, &[0])
            },
            |e| matches!(e, Error::Scale { row: 1, .. }),
        ),
    ];
    for (bad, expected) in cases {
        let shown = format!("{bad:?}");
        // A good row before it: nothing of that is applied either.
        let good = row(&other, &[2]);
        let error = lm.forward(&mut [good, bad], &kv).map(|_| ()).unwrap_err();
        assert!(expected(&error), "{shown}: {error:?}");
    }
    assert_eq!(bits(&kv, &lm), before);
    // The good row's place was never written.
    let fresh = KvCache::new(lm.config(), 4, 4).unwrap();
    let probe = |kv: &KvCache| {
        let output = lm
            .forward(
                &mut [Row {
                    position: 2,
                    ..row(&other, &[2])
                }],
                kv,
            )
            .unwrap();
        output.logits.unwrap().to_vec2::<f32>().unwrap()
    };
    assert_eq!(probe(&kv), probe(&fresh));
}

#[test]
fn windows_and_cores_need_a_generator_and_their_place() {
    let (dir, mut lm) = bare();
    let kv = KvCache::new(lm.config(), 4, 4).unwrap();
    lm.attach_generator(&dir.path().join("generator")).unwrap();
    let generator = lm.generator().unwrap();
    let mut window = generator.new_window().unwrap();
    let core = generator.read_out(&generator.new_state().unwrap()).unwrap();

    let late = Row {
        position: 2,
        window: Some(&mut window),
        ..row(&TOKENS, &[0, 1])
    };
    let error = lm.forward(&mut [late], &kv).map(|_| ()).unwrap_err();
    assert!(
        matches!(
            error,
            Error::WindowPosition {
                row: 0,
                position: 2,
                tokens: 0
            }
        ),
        "{error:?}"
    );
    assert_eq!(window.tokens(), 0);

    let (_dir, bare) = self::bare();
    for bad in [
        Row {
            window: Some(&mut window),
            ..row(&TOKENS, &[0])
        },
        Row {
            core: Some(&core),
            ..row(&TOKENS, &[0])
        },
    ] {
        let error = bare.forward(&mut [bad], &kv).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::NoGenerator { row: 0 }), "{error:?}");
    }
    assert!(matches!(
        bare.encode(&TOKENS, generator::Strategy::Concat, lm::Windows::Fixed(4)),
        Err(Error::NoGenerator { .. })
    ));
}

#[test]
fn an_empty_batch_is_nothing() {
    let (_dir, lm) = bare();
    let kv = KvCache::new(lm.config(), 1, 4).unwrap();
    assert!(lm.forward(&mut [], &kv).unwrap().logits.is_none());
    assert!(lm.logits(&[], None, 1.0).is_err());
}

#[test]
fn a_cache_is_bounded_and_fits_its_model() {
    let (_dir, lm) = bare();
    for (blocks, size) in [(0, 4), (4, 0), (usize::MAX, 2), (1 << 32, 1)] {
        assert!(
            matches!(
                KvCache::new(lm.config(), blocks, size),
                Err(Error::Cache { .. })
            ),
            "{blocks} x {size}"
        );
    }
    let mut other = lm.config().clone();
    other.layers += 1;
    let kv = KvCache::new(&other, 4, 4).unwrap();
    assert!(matches!(
        lm.forward(&mut [row(&TOKENS, &[0])], &kv),
        Err(Error::Cache { .. })
    ));
}

#[test]
fn a_generator_of_another_base_is_refused() {
    let (dir, mut lm) = bare();
    let base = TinySpec {
        context_length: 16,
        ..TinySpec::default()
    };
    let spec = GeneratorSpec {
        base_digest: Some("00ff".into()),
        ..GeneratorSpec::default()
    };
    tiny_generator(&dir.path().join("foreign"), &base, &spec);
    let error = lm
        .attach_generator(&dir.path().join("foreign"))
        .unwrap_err();
    assert!(matches!(error, Error::ForeignBase { .. }), "{error}");
    let wide = TinySpec {
        hidden: 64,
        ..base.clone()
    };
    tiny_generator(&dir.path().join("wide"), &wide, &GeneratorSpec::default());
    assert!(matches!(
        lm.attach_generator(&dir.path().join("wide")),
        Err(Error::Generator(_))
    ));
    assert!(lm.generator().is_none());
    let spec = GeneratorSpec {
        base_digest: Some(lm.digest().to_owned()),
        ..GeneratorSpec::default()
    };
    tiny_generator(&dir.path().join("own"), &base, &spec);
    lm.attach_generator(&dir.path().join("own")).unwrap();
    assert!(lm.generator().is_some());
}
