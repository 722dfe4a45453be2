//! Losses against plain f64, gradients against finite differences.

use candle_core::Tensor;

use super::{Likeliest, Says, Teacher, likeliest, score};
use crate::{
    Linear,
    gradients::{check, var},
};

fn rows(tensor: &Tensor) -> Vec<Vec<f64>> {
    let rows: Vec<Vec<f32>> = tensor.to_vec2().unwrap();
    rows.into_iter()
        .map(|row| row.into_iter().map(f64::from).collect())
        .collect()
}

fn log_softmax(z: &[f64]) -> Vec<f64> {
    let largest = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum = z.iter().map(|z| (z - largest).exp()).sum::<f64>().ln() + largest;
    z.iter().map(|z| z - sum).collect()
}

#[test]
fn losses_are_their_formulas_beyond_a_call_of_logits() {
    // 37 entries: two vectors of sixteen and a tail; 300 rows: more than exist at once.
    let (n, d, v) = (300, 8, 37);
    let (h, w, g) = (var(1, &[n, d]), var(2, &[v, d]), var(3, &[2, d]));
    let head = Linear::from_tensor(&w).unwrap();
    let targets: Vec<u32> = (0..n as u32).map(|t| t * 7 % v as u32).collect();
    let mut at = vec![None; n];
    (at[3], at[250]) = (Some((1, 0.8)), Some((0, 1.0)));
    let teacher = Teacher {
        says: Says::Hidden(g.detach()),
        at: at.clone(),
    };
    let scores = score(&head, &h, &targets, Some(&teacher)).unwrap();
    let (own, says) = (
        rows(&head.forward(&h.detach()).unwrap()),
        rows(&head.forward(&g.detach()).unwrap()),
    );
    let loss: Vec<f32> = scores.loss.to_vec1().unwrap();
    for (t, z) in own.iter().enumerate() {
        let s = log_softmax(z);
        let ce = -s[targets[t] as usize];
        let (mut kl, mut share) = (0.0, 0.0);
        if let Some((row, part)) = at[t] {
            let p = log_softmax(&says[row]);
            kl = p
                .iter()
                .zip(&s)
                .map(|(p, s)| p.exp() * (p - s))
                .sum::<f64>();
            share = f64::from(part);
        }
        assert!((f64::from(scores.ce[t]) - ce).abs() < 1e-5);
        assert!((f64::from(scores.kl[t]) - kl).abs() < 1e-5);
        assert!((f64::from(loss[t]) - (1.0 - share) * ce - share * kl).abs() < 1e-5);
        let best = (0..v).all(|i| z[i] <= z[targets[t] as usize]);
        assert_eq!(scores.right[t], best);
    }
}

#[test]
fn gradients_of_losses_are_their_differences() {
    let (h, w, g) = (var(1, &[5, 6]), var(2, &[19, 6]), var(3, &[1, 6]));
    let head = Linear::from_tensor(&w).unwrap();
    let targets = [0, 18, 7, 7, 3];
    let mut at = vec![None; 5];
    (at[1], at[4]) = (Some((0, 0.7)), Some((0, 1.0)));
    let teacher = Teacher {
        says: Says::Hidden(g.detach()),
        at,
    };
    check(&[&h], 2e-3, || {
        Ok(score(&head, &h, &targets, Some(&teacher))?.loss)
    });
}

#[test]
fn a_teacher_of_few_tokens_has_its_formula_and_its_differences_and_of_all_tokens_is_the_whole_one()
{
    let (h, w, g) = (var(1, &[5, 6]), var(2, &[37, 6]), var(3, &[2, 6]));
    let head = Linear::from_tensor(&w).unwrap();
    let targets = [0, 18, 7, 36, 3];
    let mut at = vec![None; 5];
    (at[1], at[4]) = (Some((1, 0.7)), Some((0, 1.0)));
    let of = |says| Teacher {
        says,
        at: at.clone(),
    };
    let own = rows(&head.forward(&h.detach()).unwrap());
    for k in [1, 3, 37] {
        let found = likeliest(&head, &g.detach(), k).unwrap();
        assert_eq!((found.len(), found.tokens.len()), (2, 2 * k));
        let teacher = of(Says::Likeliest(found.clone()));
        let scores = score(&head, &h, &targets, Some(&teacher)).unwrap();
        for (t, z) in own.iter().enumerate() {
            let Some((row, _)) = at[t] else {
                assert_eq!(scores.kl[t], 0.0);
                continue;
            };
            let s = log_softmax(z);
            let (tokens, p) = found.row(row);
            let (mut kl, mut left, mut others) = (0.0, 1.0, 1.0);
            for (&token, &p) in tokens.iter().zip(p) {
                let (p, s) = (f64::from(p), s[token as usize]);
                kl += p * (p.ln() - s);
                (left, others) = (left - p, others - s.exp());
            }
            if left > 1e-6 {
                kl += left * (left.ln() - others.ln());
            }
            assert!((f64::from(scores.kl[t]) - kl).abs() < 1e-5, "{k} {t}: {kl}");
        }
        check(&[&h], 2e-3, || {
            Ok(score(&head, &h, &targets, Some(&teacher))?.loss)
        });
    }
    let whole = score(&head, &h, &targets, Some(&of(Says::Hidden(g.detach())))).unwrap();
    let all = of(Says::Likeliest(likeliest(&head, &g.detach(), 37).unwrap()));
    let all = score(&head, &h, &targets, Some(&all)).unwrap();
    for (whole, all) in whole.kl.iter().zip(&all.kl) {
        assert!((whole - all).abs() < 1e-5);
    }
}

#[test]
fn likeliest_tokens_are_in_order_and_those_that_cannot_be_are_refused() {
    let w = Tensor::new(&[[1.0f32], [3.0], [2.0], [3.0]], &candle_core::Device::Cpu).unwrap();
    let head = Linear::from_tensor(&w).unwrap();
    let one = Tensor::ones((2, 1), candle_core::DType::F32, w.device()).unwrap();
    let found = likeliest(&head, &one, 3).unwrap();
    assert_eq!(found.tokens, [1, 3, 2, 1, 3, 2]);
    let total = 2.0 * 3f64.exp() + 2f64.exp() + 1f64.exp();
    let want = [3f64.exp() / total, 3f64.exp() / total, 2f64.exp() / total];
    for (got, want) in found.row(1).1.iter().zip(want) {
        assert!((f64::from(*got) - want).abs() < 1e-6);
    }
    assert!(likeliest(&head, &one, 0).is_err() && likeliest(&head, &one, 5).is_err());
    let wrong = |tokens: Vec<u32>| {
        let says = Says::Likeliest(Likeliest {
            count: 2,
            probabilities: vec![0.5; tokens.len()],
            tokens,
        });
        let teacher = Teacher {
            says,
            at: vec![Some((0, 0.5))],
        };
        score(&head, &one.narrow(0, 0, 1).unwrap(), &[0], Some(&teacher)).is_err()
    };
    assert!(!wrong(vec![0, 1]) && wrong(vec![0, 4]) && wrong(vec![0]) && wrong(vec![]));
}

#[test]
fn what_does_not_fit_is_refused() {
    let (h, w) = (var(1, &[2, 6]), var(2, &[19, 6]));
    let head = Linear::from_tensor(&w).unwrap();
    assert!(score(&head, &h, &[0], None).is_err());
    assert!(score(&head, &h, &[0, 19], None).is_err());
    let teacher = Teacher {
        says: Says::Hidden(h.detach()),
        at: vec![Some((2, 0.5)), None],
    };
    assert!(score(&head, &h, &[0, 1], Some(&teacher)).is_err());
}
