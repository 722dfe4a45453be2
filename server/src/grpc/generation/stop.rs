//! Stop strings in a text that comes in pieces.
//!
//! Text that could still become a stop string is held back. Start at [`Stops::push`].

/// Stop strings, and the end of the text that is held back because of them.
pub(super) struct Stops {
    strings: Vec<String>,
    held: String,
}

impl Stops {
    /// Stop strings, none of them empty.
    pub(super) fn new(strings: Vec<String>) -> Self {
        Self {
            strings,
            held: String::new(),
        }
    }

    /// Takes the next piece and puts what may be shown behind `out`. True if a stop string came: the text ends before it.
    pub(super) fn push(&mut self, piece: &str, out: &mut String) -> bool {
        self.held.push_str(piece);
        let first = self
            .strings
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()))
            .min();
        if let Some(at) = first {
            out.push_str(&self.held[..at]);
            self.held.clear();
            return true;
        }
        let safe = self.held.len() - self.beginning();
        out.push_str(&self.held[..safe]);
        self.held.drain(..safe);
        false
    }

    /// Bytes of the longest end of the held text that begins a stop string.
    fn beginning(&self) -> usize {
        let longest = self
            .strings
            .iter()
            .map(String::len)
            .max()
            .unwrap_or(0)
            .saturating_sub(1);
        let mut starts = self
            .held
            .char_indices()
            .map(|(at, _)| at)
            .filter(|at| self.held.len() - at <= longest);
        let start = starts.find(|at| {
            self.strings
                .iter()
                .any(|stop| stop.starts_with(&self.held[*at..]))
        });
        start.map_or(0, |at| self.held.len() - at)
    }

    /// What is held back still, once it is clear that nothing follows.
    pub(super) fn rest(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}
