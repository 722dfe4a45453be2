//! What a verb says: lines for people or JSON for programs, through one writer.
//!
//! Text that comes from a server or a model is shown without its control characters, so that it
//! cannot steer a terminal; JSON escapes them by itself. Start at [`Output`].

use std::io::{self, Write};

use serde::Serialize;

/// Standard output, for people or for programs.
pub(crate) struct Output {
    json: bool,
    sink: Box<dyn Write + Send>,
}

impl Output {
    pub(crate) fn stdout(json: bool) -> Self {
        Self {
            json,
            sink: Box::new(io::stdout()),
        }
    }

    #[cfg(test)]
    pub(crate) fn new(json: bool, sink: Box<dyn Write + Send>) -> Self {
        Self { json, sink }
    }

    /// Whether programs read this.
    pub(crate) fn json(&self) -> bool {
        self.json
    }

    /// A line for people.
    pub(crate) fn line(&mut self, text: impl AsRef<str>) -> io::Result<()> {
        self.piece(text.as_ref())?;
        self.piece("\n")
    }

    /// Text for people that may not be a whole line yet; shown at once.
    pub(crate) fn piece(&mut self, text: &str) -> io::Result<()> {
        self.sink.write_all(printable(text).as_bytes())?;
        self.sink.flush()
    }

    /// A document for programs, on one line.
    pub(crate) fn document(&mut self, value: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(value).map_err(io::Error::other)?;
        line.push(b'\n');
        self.sink.write_all(&line)?;
        self.sink.flush()
    }
}

/// The text with control characters but line breaks and tabs shown as U+FFFD.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c.is_control() && c != '\n' && c != '\t' {
                char::REPLACEMENT_CHARACTER
            } else {
                c
            }
        })
        .collect()
}

/// How a column stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Align {
    /// Text.
    Left,
    /// Figures.
    Right,
}

/// Rows under their headings, two spaces between columns, one line a row, no space at line ends.
pub(crate) fn table<const N: usize>(columns: [(&str, Align); N], rows: &[[String; N]]) -> String {
    let widths: [usize; N] = std::array::from_fn(|i| {
        let cells = rows.iter().map(|row| row[i].chars().count());
        cells
            .chain([columns[i].0.chars().count()])
            .max()
            .unwrap_or(0)
    });
    let line = |cells: [&str; N]| -> String {
        let mut text = String::new();
        for (i, cell) in cells.into_iter().enumerate() {
            let pad = " ".repeat(widths[i].saturating_sub(cell.chars().count()));
            if i > 0 {
                text.push_str("  ");
            }
            match columns[i].1 {
                Align::Left => text.extend([cell, &pad]),
                Align::Right => text.extend([&pad, cell]),
            }
        }
        text.trim_end().to_owned()
    };
    let head = line(columns.map(|(name, _)| name));
    let body = rows
        .iter()
        .map(|row| line(row.each_ref().map(String::as_str)));
    [head]
        .into_iter()
        .chain(body)
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests;
