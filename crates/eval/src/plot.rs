//! Plots as inline SVG: lines and dots over an axis, and bars.
//!
//! Numbers in, markup out. Start at [`Plot::svg`].

use std::fmt::Write as _;

use crate::{Method, page::escape};

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 30.0;
const BOTTOM: f64 = 46.0;

/// How values lie on the horizontal axis.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    Logarithmic,
    /// Nothing lies left of the smallest other value.
    LogarithmicWithZero,
}

/// How a series is drawn.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mark {
    Line,
    Dot,
}

/// One method's points.
pub(crate) struct Series {
    pub(crate) method: Method,
    /// (x, y)
    pub(crate) points: Vec<(f64, f64)>,
}

/// A plot.
pub(crate) struct Plot {
    pub(crate) title: String,
    pub(crate) x: String,
    pub(crate) scale: Scale,
    pub(crate) mark: Mark,
    pub(crate) series: Vec<Series>,
}

/// A colour for each method: imprints warm, prompts cold, none grey.
fn colour(method: Method) -> &'static str {
    match method {
        Method::None => "#6e7781",
        Method::NoneStyled => "#afb8c1",
        Method::InContext => "#0550ae",
        Method::InContextStyled => "#54aeff",
        Method::InContextForeign => "#8250df",
        Method::InContextTruncated => "#1b7c83",
        Method::Bm25 => "#2da44e",
        Method::Imprint => "#cf222e",
        Method::ImprintForeign => "#e99695",
        Method::ImprintSnippet => "#bc4c00",
        Method::Lora => "#9a6700",
    }
}

impl Plot {
    /// As a figure; empty where there is nothing to draw.
    pub(crate) fn svg(&self) -> String {
        let all: Vec<(f64, f64)> = self
            .series
            .iter()
            .flat_map(|series| series.points.iter().copied())
            .filter(|(x, y)| x.is_finite() && y.is_finite())
            .collect();
        let above = |x: f64| x > 0.0;
        let least = all
            .iter()
            .map(|p| p.0)
            .filter(|&x| above(x))
            .fold(f64::INFINITY, f64::min);
        let most = all.iter().map(|p| p.0).fold(0.0, f64::max);
        if all.is_empty() || !least.is_finite() {
            return String::new();
        }
        let zero = self.scale == Scale::LogarithmicWithZero && all.iter().any(|p| !above(p.0));
        // Zero is a factor of four left of the smallest other value.
        let low = if zero { least / 4.0 } else { least };
        let span = (most / low).ln().max(1e-9);
        let across = |x: f64| {
            let share = if x > 0.0 { (x / low).ln() / span } else { 0.0 };
            LEFT + share * (WIDTH - LEFT - RIGHT)
        };
        let bottom = all
            .iter()
            .map(|p| p.1)
            .fold(f64::INFINITY, f64::min)
            .min(0.0);
        let top = all.iter().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
        let top = if top > bottom {
            top * 1.05
        } else {
            bottom + 1.0
        };
        let down =
            |y: f64| HEIGHT - BOTTOM - (y - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM);

        let mut svg = String::new();
        let _ = write!(
            svg,
            "<figure><svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" font-family=\"system-ui,sans-serif\" font-size=\"11\">\
             <text x=\"{LEFT}\" y=\"16\" font-size=\"13\" font-weight=\"600\">{}</text><text x=\"{LEFT}\" y=\"{}\" fill=\"#57606a\">{}</text>",
            escape(&self.title),
            HEIGHT - 6.0,
            escape(&self.x),
        );
        for step in 0..=4 {
            let y = bottom + (top - bottom) * f64::from(step) / 4.0;
            let _ = write!(
                svg,
                "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{1:.1}\" y2=\"{1:.1}\" stroke=\"#e4e7eb\"/><text x=\"{2}\" y=\"{3:.1}\" text-anchor=\"end\">{4}</text>",
                WIDTH - RIGHT,
                down(y),
                LEFT - 6.0,
                down(y) + 4.0,
                short(y),
            );
        }
        let mut ticks: Vec<f64> = all.iter().map(|p| p.0).collect();
        ticks.sort_by(f64::total_cmp);
        ticks.dedup();
        let mut last = f64::NEG_INFINITY;
        for x in ticks {
            if across(x) - last >= 44.0 {
                last = across(x);
                let _ = write!(
                    svg,
                    "<text x=\"{last:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                    HEIGHT - BOTTOM + 16.0,
                    short(x),
                );
            }
        }
        let mut line = TOP;
        for series in self
            .series
            .iter()
            .filter(|series| !series.points.is_empty())
        {
            let (colour, name) = (colour(series.method), series.method.name());
            if self.mark == Mark::Line {
                let path: Vec<String> = series
                    .points
                    .iter()
                    .map(|&(x, y)| format!("{:.1},{:.1}", across(x), down(y)))
                    .collect();
                let _ = write!(
                    svg,
                    "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" points=\"{}\"/>",
                    path.join(" "),
                );
            }
            for &(x, y) in &series.points {
                let _ = write!(
                    svg,
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\" fill=\"{colour}\"><title>{name}: {} at {}</title></circle>",
                    across(x),
                    down(y),
                    short(y),
                    short(x),
                );
            }
            let _ = write!(
                svg,
                "<rect x=\"{0}\" y=\"{1:.1}\" width=\"10\" height=\"10\" fill=\"{colour}\"/><text x=\"{2}\" y=\"{3:.1}\">{name}</text>",
                WIDTH - RIGHT + 12.0,
                line,
                WIDTH - RIGHT + 27.0,
                line + 9.0,
            );
            line += 17.0;
        }
        svg.push_str("</svg></figure>");
        svg
    }
}

/// Bars from zero, a group for each row.
pub(crate) fn bars(title: &str, rows: &[(String, Vec<(Method, f64)>)]) -> String {
    const LABEL: f64 = 230.0;
    const BAR: f64 = 13.0;
    let values = || {
        rows.iter()
            .flat_map(|(_, values)| values.iter().map(|(_, value)| *value))
    };
    let low = values().fold(0.0, f64::min);
    let high = values().fold(0.0, f64::max);
    let span = (high - low).max(1e-9);
    let across = |value: f64| LABEL + (value - low) / span * 420.0;
    let height: f64 = 34.0
        + rows
            .iter()
            .map(|(_, values)| f64::from(u32::try_from(values.len()).unwrap_or(0)) * BAR + 8.0)
            .sum::<f64>();
    let mut svg = String::new();
    let _ = write!(
        svg,
        "<figure><svg xmlns=\"http://www.w3.org/2000/svg\" width=\"860\" height=\"{height}\" font-family=\"system-ui,sans-serif\" font-size=\"11\">\
         <text x=\"0\" y=\"16\" font-size=\"13\" font-weight=\"600\">{}</text>",
        escape(title),
    );
    let mut y = 30.0;
    for (label, values) in rows {
        let _ = write!(
            svg,
            "<text x=\"0\" y=\"{:.1}\">{}</text>",
            y + 10.0,
            escape(label)
        );
        for &(method, value) in values {
            let (from, to) = (across(value.min(0.0)), across(value.max(0.0)));
            let _ = write!(
                svg,
                "<rect x=\"{from:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{}\"/><text x=\"{:.1}\" y=\"{:.1}\">{value:.2} {}</text>",
                (to - from).max(0.5),
                BAR - 2.0,
                colour(method),
                to + 5.0,
                y + 9.5,
                method.name(),
            );
            y += BAR;
        }
        y += 8.0;
    }
    svg.push_str("</svg></figure>");
    svg
}

/// A number in few letters.
fn short(value: f64) -> String {
    let size = value.abs();
    for (unit, name) in [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")] {
        if size >= unit {
            let unit = if name == "k" { 1e3 } else { unit };
            return format!("{:.1}{name}", value / unit);
        }
    }
    if size >= 100.0 || value.fract() == 0.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_draws_every_point_and_an_empty_one_nothing() {
        let plot = |points| Plot {
            title: "a < b".to_owned(),
            x: "x".to_owned(),
            scale: Scale::LogarithmicWithZero,
            mark: Mark::Line,
            series: vec![Series {
                method: Method::Imprint,
                points,
            }],
        };
        let drawn = plot(vec![(0.0, 1.0), (1e6, 2.0), (4e6, 3.0)]).svg();
        assert_eq!(drawn.matches("<circle").count(), 3);
        assert!(drawn.contains("a &lt; b") && !drawn.contains("NaN") && !drawn.contains("inf"));
        assert_eq!(plot(vec![]).svg(), "");
        assert_eq!(plot(vec![(f64::NAN, 1.0)]).svg(), "");
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(
            [short(720_896.0), short(16384.0), short(2.345), short(256.0)],
            ["720.9k", "16.4k", "2.35", "256"]
        );
    }
}
