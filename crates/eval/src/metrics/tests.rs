use super::*;

fn of(references: &[&str]) -> Vec<String> {
    references.iter().map(|&text| text.to_owned()).collect()
}

#[test]
fn words_lose_case_punctuation_and_articles_as_squad_has_it() {
    assert_eq!(words("The  Denver, Broncos!"), ["denver", "broncos"]);
    assert_eq!(words("an A.F.C. the"), ["afc"]);
    assert_eq!(words("theatre"), ["theatre"]);
    assert!(words(" ... ").is_empty());
}

#[test]
fn exact_matches_any_reference_by_words() {
    assert!(exact("the Broncos.", &of(&["Carolina", "broncos"])));
    assert!(!exact("Denver Broncos", &of(&["broncos"])));
}

#[test]
fn f1_is_what_one_computes_by_hand() {
    // 2 of 3 and 2 of 2 words: precision 2/3, recall 1.
    assert!((f1("in Denver Broncos", &of(&["Denver Broncos"])) - 0.8).abs() < 1e-12);
    // A word counts as often as the reference has it.
    assert!((f1("red red", &of(&["red blue"])) - 0.5).abs() < 1e-12);
    // The best reference counts.
    assert!((f1("red", &of(&["blue", "red"])) - 1.0).abs() < 1e-12);
    assert_eq!(f1("", &of(&["red"])), 0.0);
    assert_eq!(f1("the", &of(&["a"])), 1.0);
    assert_eq!(f1("red", &[]), 0.0);
}

#[test]
fn rouge_l_recall_counts_words_in_order() {
    // "cat on mat" is the longest in order, of 4 words.
    assert!((rouge_l_recall("cat mat on mat", &of(&["the cat sat on mat"])) - 0.75).abs() < 1e-12);
    assert!((rouge_l_recall("b a", &of(&["x y", "b c"])) - 0.5).abs() < 1e-12);
    assert_eq!(rouge_l_recall("red", &of(&["the"])), 0.0);
}

#[test]
fn an_interval_holds_the_mean_and_is_as_wide_as_theory_says() {
    let values: Vec<f64> = (0..400).map(|i| f64::from(i % 2)).collect();
    let mean = |times: &[u32]| {
        let sum: f64 = times
            .iter()
            .zip(&values)
            .map(|(t, v)| f64::from(*t) * v)
            .sum();
        Some(sum / 400.0)
    };
    let [low, high] = interval(400, 7, mean).unwrap();
    // 1.96 standard errors of a coin in 400 throws are 0.049.
    assert!((0.5 - low - 0.049).abs() < 0.012, "{low}");
    assert!((high - 0.5 - 0.049).abs() < 0.012, "{high}");
    assert_eq!(interval(400, 7, mean), Some([low, high]));
    assert_eq!(interval(1, 7, |_| Some(1.0)), None);
    assert_eq!(interval(5, 7, |_| None), None);
}
