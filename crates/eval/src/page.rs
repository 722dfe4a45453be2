//! `imprint eval report`: the tables of reports, and one self-contained page with plots and all examples.
//!
//! The page quotes rows of the data, so it stays on the machine that made it; the tables quote none. Start at [`run`].

use std::{fmt::Write as _, fs, path::PathBuf};

use crate::{
    Error, Method,
    plot::{Mark, Plot, Scale, Series},
    report::{Answer, Example, Figures, Point, Report},
};

/// What to report.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Reports of `imprint eval run --json`
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Write one page with plots, tables and all examples to FILE. It quotes the data: keep it local
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Print the tables as Markdown; so it is without --html as well
    #[arg(long)]
    pub markdown: bool,
}

/// Reads reports, writes the page if one is wanted, and returns what is to be printed.
///
/// # Errors
/// A file that is no report, or a page that cannot be written.
pub fn run(args: &Args) -> Result<String, Error> {
    let reports: Vec<Report> = args
        .files
        .iter()
        .map(|path| Report::read(path))
        .collect::<Result<_, _>>()?;
    let mut printed = String::new();
    if let Some(path) = &args.html {
        fs::write(path, page(&reports)).map_err(|source| Error::io(path, source))?;
        printed = format!("the page is {}\n", path.display());
    }
    if args.markdown || args.html.is_none() {
        for report in &reports {
            printed.push_str(&report.markdown());
        }
    }
    Ok(printed)
}

const STYLE: &str = "body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:76em;padding:0 1em;color:#1b1f24;background:#fff}
h1,h2,h3{line-height:1.2}h2{margin-top:2em;border-top:1px solid #ccc;padding-top:.7em}
table{border-collapse:collapse;font-size:13px;margin:.7em 0;display:block;overflow-x:auto}
td,th{padding:.25em .6em;border-bottom:1px solid #ddd;text-align:right;vertical-align:top}td:first-child,th:first-child,td.text{text-align:left}
pre{white-space:pre-wrap;background:#f5f6f8;padding:.7em;font-size:13px}
details{margin:.25em 0}summary{cursor:pointer}figure{display:inline-block;margin:.5em 1em .5em 0}.note{color:#57606a}";

/// The page of some reports.
fn page(reports: &[Report]) -> String {
    let mut html = String::new();
    // Writing to a String does not fail, here and below.
    let _ = write!(
        html,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>imprint: evaluation</title><style>{STYLE}</style><h1>What an imprint is worth</h1>\
         <p class=\"note\">NLL in nats a token of the reference answer. Gap closed: (none - x) / (none - in_context). Content gain: min(none_styled, foreign) - x: \
         neither the style of an answer nor a harmful foreign context counts as knowledge. Intervals: 95 %, bootstrap over contexts. FLOP and floats are counted from shapes. \
         This page quotes the data; it is for this machine.</p>"
    );
    bars(&mut html, reports);
    for report in reports {
        let about = &report.about;
        let _ = write!(
            html,
            "<h2>{}</h2><p class=\"note\">{} · {} questions on {} contexts · seed {} · {:?} form · model {:.12} · generator {:.12}",
            about.task.name(),
            escape(about.data.as_deref().unwrap_or("no data file")),
            report.examples.len(),
            report.contexts.len(),
            about.seed,
            about.form,
            about.model_digest,
            about.generator_digest.as_deref().unwrap_or("none"),
        );
        if let Some(device) = &about.device {
            let _ = write!(html, " · on {}", escape(device));
        }
        if about.malformed > 0 {
            let _ = write!(html, " · {} malformed rows skipped", about.malformed);
        }
        let names: Vec<_> = about.skipped.iter().map(|method| method.name()).collect();
        if !names.is_empty() {
            let _ = write!(html, " · not possible here: {}", names.join(", "));
        }
        for tuned in &about.lora {
            let _ = write!(html, " · {}", escape(&tuned.to_string()));
        }
        html.push_str("</p>");
        plots(&mut html, report);
        for point in &report.series {
            table(&mut html, point);
        }
        examples(&mut html, report);
    }
    html.push_str("</html>\n");
    html
}

/// Gap closed and content gain of each task's points.
fn bars(html: &mut String, reports: &[Report]) {
    type Figure = fn(&Figures) -> Option<f64>;
    let figures: [(&str, Figure); 2] = [
        ("gap closed", |figures| figures.gap_closed),
        ("content gain, nats", |figures| figures.content_gain),
    ];
    let methods = [
        Method::Imprint,
        Method::InContext,
        Method::InContextStyled,
        Method::Bm25,
    ];
    for (title, figure) in figures {
        let mut rows = Vec::new();
        for report in reports {
            for point in &report.series {
                let values: Vec<(Method, f64)> = methods
                    .into_iter()
                    .filter_map(|method| Some((method, figure(point.methods.get(method.name())?)?)))
                    .collect();
                if !values.is_empty() {
                    rows.push((
                        format!("{}, {}", report.about.task.name(), point.label),
                        values,
                    ));
                }
            }
        }
        if !rows.is_empty() {
            html.push_str(&crate::plot::bars(title, &rows));
        }
    }
}

/// Quality against context length (or whatever the series is over), storage and compute.
fn plots(html: &mut String, report: &Report) {
    type Figure = fn(&Figures) -> Option<f64>;
    let qualities: [(&str, Figure); 3] = [
        ("NLL, nats a token", |figures| Some(figures.answer_nll)),
        ("F1", |figures| figures.f1),
        ("right choices", |figures| figures.choice),
    ];
    type Cost = fn(&Figures) -> f64;
    let costs: [(&str, Cost); 2] = [
        ("floats kept of the context", |figures| figures.state_floats),
        ("FLOP, context once and one question", |figures| {
            figures.context_flops + figures.query_flops
        }),
    ];
    for (quality, figure) in qualities {
        if !report
            .methods
            .values()
            .any(|figures| figure(figures).is_some())
        {
            continue;
        }
        let places = report
            .series
            .iter()
            .filter(|point| point.x.is_some())
            .count();
        if places > 1 {
            let along = |method: Method| {
                let at =
                    |point: &Point| Some((point.x?, figure(point.methods.get(method.name())?)?));
                report.series.iter().filter_map(at).collect()
            };
            let plot = Plot {
                title: format!("{quality} along the series"),
                x: "tokens, facts, windows or examples of context".to_owned(),
                scale: Scale::Logarithmic,
                mark: Mark::Line,
                series: series(report, along),
            };
            html.push_str(&plot.svg());
        }
        for (cost, of) in costs {
            let against = |method: Method| {
                let at = |point: &Point| {
                    let figures = point.methods.get(method.name())?;
                    Some((of(figures), figure(figures)?))
                };
                report.series.iter().filter_map(at).collect()
            };
            let plot = Plot {
                title: format!("{quality} against {cost}"),
                x: cost.to_owned(),
                scale: Scale::LogarithmicWithZero,
                mark: Mark::Dot,
                series: series(report, against),
            };
            html.push_str(&plot.svg());
        }
    }
}

fn series(report: &Report, points: impl Fn(Method) -> Vec<(f64, f64)>) -> Vec<Series> {
    Method::ALL
        .into_iter()
        .filter(|method| report.methods.contains_key(method.name()))
        .map(|method| Series {
            method,
            points: points(method),
        })
        .collect()
}

fn table(html: &mut String, point: &Point) {
    let mut rows = crate::report::cells(point).into_iter();
    let Some(head) = rows.next() else {
        return;
    };
    let _ = write!(html, "<h3>{}</h3><table><tr>", escape(&point.label));
    for cell in head {
        let _ = write!(html, "<th>{}</th>", escape(&cell));
    }
    for row in rows {
        html.push_str("</tr><tr>");
        for cell in row {
            let _ = write!(html, "<td>{}</td>", escape(&cell));
        }
    }
    html.push_str("</tr></table>");
}

/// Every context with its questions and all answers, folded.
fn examples(html: &mut String, report: &Report) {
    let _ = write!(
        html,
        "<details><summary>{} examples</summary>",
        report.examples.len()
    );
    for (index, context) in report.contexts.iter().enumerate() {
        let _ = write!(
            html,
            "<details><summary>context {index}: {} tokens, {} documents: {}</summary><pre>{}</pre>",
            context.tokens,
            context.documents,
            escape(&context.text.chars().take(80).collect::<String>()),
            escape(&context.text),
        );
        for example in report
            .examples
            .iter()
            .filter(|example| example.context == index)
        {
            example_table(html, example);
        }
        html.push_str("</details>");
    }
    html.push_str("</details>");
}

fn example_table(html: &mut String, example: &Example) {
    let _ = write!(
        html,
        "<p><b>{}</b> <span class=\"note\">({}, {}; reference: {})</span></p><table><tr><th>method</th><th>answer</th><th>NLL</th><th>F1</th><th>choice</th><th>prompt</th></tr>",
        escape(&example.question),
        escape(&example.label),
        escape(&example.id),
        escape(&example.references.join(" | ")),
    );
    for method in Method::ALL {
        let Some(answer) = example.answers.get(method.name()) else {
            continue;
        };
        let Answer {
            nll,
            tokens,
            text,
            f1,
            choice,
            prompt_tokens,
            ..
        } = answer;
        let number = |figure: &Option<f64>| figure.map_or(String::new(), |f| format!("{f:.2}"));
        #[expect(clippy::cast_precision_loss, reason = "answers are short")]
        let each = nll / (*tokens).max(1) as f64;
        let _ = write!(
            html,
            "<tr><td>{}</td><td class=\"text\">{}</td><td>{each:.3}</td><td>{}</td><td>{}</td><td>{prompt_tokens}</td></tr>",
            method.name(),
            escape(text.as_deref().unwrap_or("")),
            number(f1),
            number(choice),
        );
    }
    html.push_str("</table>");
}

/// Text as it may stand in HTML and in its attributes.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests;
