//! The scheduler: how many tokens of whom run in the next forward, and why.
//!
//! Reads queues and budgets, never tensors. [`plan`] is a pure function of what it is given, so any schedule can be
//! replayed from its inputs. The rule:
//!
//! 1. Each running answer decodes its token: `Config::check` keeps the budget above their number. What runs beside them
//!    is limited, as their tokens come no faster than steps do.
//! 2. Of what is left, context windows are owed a quarter (at least one token), as far as they ask.
//! 3. Prompts take the rest, in order of arrival; the first always gets at least one token. What is scored goes to the end
//!    of the line after each step that it ran in, however much of it is left.
//! 4. Context windows take what prompts left, in order of their turns. A session keeps its turn until its window
//!    closes, so that a half-read window does not lie about.
//!
//! So no class waits for another to become empty. Start at [`plan`].

#[cfg(test)]
mod tests;

/// Tokens that each one runs in the next step, in the order of the queues.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Of each prompt.
    pub(crate) prefill: Vec<usize>,
    /// Of each session with context to read.
    pub(crate) context: Vec<usize>,
}

/// Plans a step of `budget` tokens, `decode` of which are running answers', with at most `bulk` others beside those.
/// `prefill` and `context` are the tokens that each could run now, whose turn it is first. `budget` exceeds `decode` by 2 or
/// more, and `bulk` is 2 or more.
pub(crate) fn plan(
    budget: usize,
    bulk: usize,
    decode: usize,
    prefill: &[usize],
    context: &[usize],
) -> Plan {
    let mut left = budget.saturating_sub(decode);
    if decode > 0 {
        left = left.min(bulk);
    }
    let asked = context
        .iter()
        .fold(0usize, |sum, &tokens| sum.saturating_add(tokens));
    let owed = (left / 4).max(1).min(asked).min(left);
    let (prefill, spared) = share(left - owed, prefill);
    let (context, _) = share(spared + owed, context);
    Plan { prefill, context }
}

/// Gives each what it asks for while there is something left; returns what nobody asked for.
fn share(mut left: usize, asked: &[usize]) -> (Vec<usize>, usize) {
    let given = asked.iter().map(|&tokens| {
        let given = tokens.min(left);
        left -= given;
        given
    });
    let given = given.collect();
    (given, left)
}
