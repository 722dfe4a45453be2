//! Lines over an axis, as SVG; the vertical axis is logarithmic.
//!
//! Numbers in, markup out. Start at [`Plot::svg`].

use std::fmt::Write as _;

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 110.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 46.0;
const COLOURS: [&str; 6] = [
    "#0550ae", "#54aeff", "#cf222e", "#e99695", "#2da44e", "#6e7781",
];

/// A line and its name.
pub(super) struct Series {
    pub(super) name: &'static str,
    /// (x, y)
    pub(super) points: Vec<(f64, f64)>,
}

/// A plot.
pub(super) struct Plot {
    pub(super) title: &'static str,
    pub(super) x: &'static str,
    pub(super) y: &'static str,
    pub(super) series: Vec<Series>,
}

impl Plot {
    /// As a figure. Points that are not positive numbers are left out.
    pub(super) fn svg(&self) -> String {
        let good = |point: &(f64, f64)| point.0.is_finite() && point.1.is_finite() && point.1 > 0.0;
        let all: Vec<_> = self
            .series
            .iter()
            .flat_map(|series| series.points.iter().copied())
            .filter(good)
            .collect();
        let right = all.iter().map(|point| point.0).fold(1e-9, f64::max);
        let low = all
            .iter()
            .map(|point| point.1)
            .fold(f64::INFINITY, f64::min);
        let high = all.iter().map(|point| point.1).fold(1.0, f64::max);
        // Whole decades.
        let (low, high) = (low.min(high).log10().floor(), high.log10().ceil());
        let high = high.max(low + 1.0);
        let across = |x: f64| LEFT + x / right * (WIDTH - LEFT - RIGHT);
        let up =
            |y: f64| HEIGHT - BOTTOM - (y.log10() - low) / (high - low) * (HEIGHT - TOP - BOTTOM);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"11\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
             <text x=\"{LEFT}\" y=\"18\" font-size=\"13\">{}</text>\n",
            self.title
        );
        // Writing to a String cannot fail.
        let mut decade = low;
        while decade <= high {
            let (value, y) = (10_f64.powf(decade), up(10_f64.powf(decade)));
            let _ = writeln!(
                svg,
                "<path d=\"M{LEFT} {y:.1}H{:.1}\" stroke=\"#d0d7de\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{value}</text>",
                WIDTH - RIGHT,
                LEFT - 6.0,
                y + 4.0
            );
            decade += 1.0;
        }
        let mut places: Vec<_> = all.iter().map(|point| point.0).collect();
        places.sort_by(f64::total_cmp);
        places.dedup();
        for place in places {
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{place}</text>",
                across(place),
                HEIGHT - BOTTOM + 16.0
            );
        }
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\n<text x=\"10\" y=\"{TOP}\">{}</text>",
            f64::midpoint(LEFT, WIDTH - RIGHT),
            HEIGHT - 10.0,
            self.x,
            self.y
        );
        for (number, series) in self.series.iter().enumerate() {
            let colour = COLOURS[number % COLOURS.len()];
            let points: Vec<_> = series.points.iter().copied().filter(good).collect();
            let line: Vec<_> = points
                .iter()
                .map(|(x, y)| format!("{:.1},{:.1}", across(*x), up(*y)))
                .collect();
            let _ = writeln!(
                svg,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
                line.join(" ")
            );
            for (x, y) in &points {
                let _ = writeln!(
                    svg,
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>",
                    across(*x),
                    up(*y)
                );
            }
            if let Some((x, y)) = points.last() {
                let _ = writeln!(
                    svg,
                    "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{}</text>",
                    across(*x) + 8.0,
                    up(*y) + 4.0,
                    series.name
                );
            }
        }
        svg + "</svg>\n"
    }
}
