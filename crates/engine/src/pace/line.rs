//! A line through what was measured: a fixed cost, and one of each token.
//!
//! Weighted least squares, the newest counting most. Start at [`Line::saw`].

/// What a measurement still counts for after the next one. They are noisy, and steps of half the tokens are few.
const MEMORY: f64 = 0.97;
/// Spread of the tokens, as a share of their mean squared, below which the line's slope is not to be seen.
const SPREAD: f64 = 1e-3;
/// At least such a share of the mean cost is the tokens': noise must not make them look free.
const SHARE: f64 = 0.25;

/// Sums over what was seen of tokens x and seconds y.
#[derive(Clone, Debug, Default)]
pub(super) struct Line {
    weight: f64,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
}

impl Line {
    /// Takes note of so many tokens that added so many seconds. What is further from the line than `most` counts as if it were just so
    /// far: it may be that the process was kept waiting.
    pub(super) fn saw(&mut self, tokens: f64, seconds: f64, most: f64) {
        let seconds = match self.fixed_and_each() {
            Some((fixed, each)) => {
                let expected = fixed + each * tokens;
                seconds.clamp(expected - most, expected + most)
            }
            None => seconds,
        };
        let Self {
            weight,
            x,
            y,
            xx,
            xy,
        } = self;
        for sum in [&mut *weight, x, y, xx, xy] {
            *sum *= MEMORY;
        }
        self.weight += 1.0;
        self.x += tokens;
        self.y += seconds;
        self.xx += tokens * tokens;
        self.xy += tokens * seconds;
    }

    /// The fixed seconds and those of each token, neither below 0; all of it is the tokens' where they were always as many. None if
    /// nothing was seen.
    pub(super) fn fixed_and_each(&self) -> Option<(f64, f64)> {
        if self.x <= 0.0 {
            return None;
        }
        let (x, y) = (self.x / self.weight, self.y / self.weight);
        let through_zero = (0.0, (y / x).max(0.0));
        if y <= 0.0 {
            return Some((0.0, 0.0));
        }
        let spread = self.xx / self.weight - x * x;
        if spread <= SPREAD * x * x {
            return Some(through_zero);
        }
        let each = (self.xy / self.weight - x * y) / spread;
        let each = each.max(SHARE * y / x);
        let fixed = y - each * x;
        Some(if fixed < 0.0 {
            through_zero
        } else {
            (fixed, each)
        })
    }
}
