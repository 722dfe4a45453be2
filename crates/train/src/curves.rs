//! The curves of a run as one SVG, from its lines of metrics.
//!
//! Running means of each kind of query in nats per token, and held-out figures as dots, over steps. Start at [`svg`].

use std::fmt::Write;

use serde_json::Value;

use crate::batch::Kind;

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 420.0;
const MARGIN: f64 = 46.0;
/// Points of a curve at most.
const POINTS: usize = 600;
const COLOURS: [&str; 4] = ["#1b6ca8", "#d1495b", "#2e8b57", "#8a5a9e"];

/// A curve's points, (step, nats per token).
type Curve = Vec<(f64, f64)>;

/// The curves of the lines of a metrics.jsonl; lines that say nothing are passed over.
pub(crate) fn svg(lines: &str) -> String {
    let mut means: [Curve; 4] = Default::default();
    let mut held_out: [Curve; 4] = Default::default();
    for line in lines
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
    {
        let Some(step) = line["step"].as_f64() else {
            continue;
        };
        for (index, kind) in Kind::ALL.iter().enumerate() {
            let measure = if *kind == Kind::Negative { "kl" } else { "ce" };
            let value = |of: &str| {
                line[of][kind.name()][measure]
                    .as_f64()
                    .filter(|value| value.is_finite())
            };
            means[index].extend(value("running").map(|value| (step, value)));
            held_out[index].extend(value("held_out").map(|value| (step, value)));
        }
    }
    let all = || means.iter().chain(&held_out).flatten();
    let last = all().map(|(step, _)| *step).fold(1.0, f64::max);
    let highest = all().map(|(_, value)| *value).fold(0.1, f64::max);
    let x = |step: f64| MARGIN + step / last * (WIDTH - 2.0 * MARGIN);
    let y = |value: f64| HEIGHT - MARGIN - value / highest * (HEIGHT - 2.0 * MARGIN);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
    );
    let mut put = |part: String| {
        svg.push_str(&part);
        svg.push('\n');
    };
    for tick in 0..=5 {
        let (value, step) = (
            highest * f64::from(tick) / 5.0,
            last * f64::from(tick) / 5.0,
        );
        let (right, bottom) = (WIDTH - MARGIN, HEIGHT - MARGIN);
        put(format!(
            "<path d=\"M{MARGIN} {0:.1}H{right}\" stroke=\"#ddd\"/><text x=\"4\" y=\"{0:.1}\">{value:.2}</text><text x=\"{1:.1}\" y=\"{2}\" text-anchor=\"middle\">{step:.0}</text>",
            y(value),
            x(step),
            bottom + 18.0
        ));
    }
    for (index, kind) in Kind::ALL.iter().enumerate() {
        let (curve, colour) = (&means[index], COLOURS[index]);
        if curve.is_empty() && held_out[index].is_empty() {
            continue;
        }
        let mut path = String::new();
        for (step, value) in curve.iter().step_by(curve.len().div_ceil(POINTS).max(1)) {
            let command = if path.is_empty() { 'M' } else { 'L' };
            // Writing to a string does not fail.
            let _ = write!(path, "{command}{:.1} {:.1}", x(*step), y(*value));
        }
        put(format!(
            "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\"/>"
        ));
        for (step, value) in &held_out[index] {
            put(format!(
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\" fill=\"{colour}\"/>",
                x(*step),
                y(*value)
            ));
        }
        let left = MARGIN + 190.0 * index as f64;
        put(format!(
            "<text x=\"{left}\" y=\"20\" fill=\"{colour}\">{} (dots: held out)</text>",
            kind.name()
        ));
    }
    svg.push_str("</svg>\n");
    svg
}

#[cfg(test)]
mod tests;
