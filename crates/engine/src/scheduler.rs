//! The scheduler: how many tokens of whom run in the next forward, who starts next, who gives way, and why.
//!
//! Reads queues and budgets, never tensors. All of it are pure functions of what they are given, so any schedule can be replayed from
//! its inputs. The rule of [`plan`]:
//!
//! 1. Each running answer decodes its token: `Config::check` keeps the budget above their number. What runs beside them
//!    is limited, as their tokens come no faster than steps do.
//! 2. Of what is left, context windows are owed a quarter (at least one token), as far as they ask.
//! 3. Prompts take the rest. Context windows take what prompts left.
//! 4. In each class tenants take turns (deficit round robin, Shreedhar and Varghese 1995): a turn is worth [`QUANTUM`] tokens, and is gone
//!    on with in the next step if this one ends first. Tokens can be cut anywhere, so the only deficit ever open is that of the
//!    tenant whose turn it is.
//! 5. Inside a tenant prompts come in order of arrival; what is scored goes to the end of the line after each step that it ran in,
//!    however much of it is left. Windows come in order of their turns: a session keeps its turn until its window closes, so
//!    that a half-read window does not lie about.
//!
//! So no class and no tenant waits for another to become empty, and who waits only ever moves forward: there is no priority that
//! others could go on having, and none that has to grow with age. Start at [`plan`].

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    ops::Bound::{Excluded, Unbounded},
};

use crate::ids::TenantId;

/// Tokens of a tenant's turn.
pub(crate) const QUANTUM: usize = 64;

/// Tokens that each one runs in the next step, in the order of the queues.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Of each prompt.
    pub(crate) prefill: Vec<usize>,
    /// Of each session with context to read.
    pub(crate) context: Vec<usize>,
}

/// Whose turn it is, and how many tokens of it are left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Turn {
    tenant: TenantId,
    left: usize,
}

/// The turns of both classes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Turns {
    prefill: Turn,
    context: Turn,
}

/// Plans a step that has `left` tokens for others than running answers, 2 or more. `prefill` and `context` are the tokens that each
/// could run now, with whose they are, in their tenants' order. The turns are those that the step before left.
pub(crate) fn plan(
    left: usize,
    turns: Turns,
    prefill: &[(TenantId, usize)],
    context: &[(TenantId, usize)],
) -> (Plan, Turns) {
    let asked = context
        .iter()
        .fold(0usize, |sum, &(_, tokens)| sum.saturating_add(tokens));
    let owed = (left / 4).max(1).min(asked).min(left);
    let (prefill, spared, prefill_turn) = share(left - owed, turns.prefill, prefill);
    let (context, _, context_turn) = share(spared + owed, turns.context, context);
    let turns = Turns {
        prefill: prefill_turn,
        context: context_turn,
    };
    (Plan { prefill, context }, turns)
}

/// Gives each what it asks for while there is something left, tenant by tenant; returns what nobody asked for, and whose turn it
/// is then.
fn share(
    mut left: usize,
    mut turn: Turn,
    asked: &[(TenantId, usize)],
) -> (Vec<usize>, usize, Turn) {
    let mut given = vec![0; asked.len()];
    // The asks of each tenant that are not met, last first.
    let mut lines: BTreeMap<TenantId, Vec<usize>> = BTreeMap::new();
    for (index, &(tenant, tokens)) in asked.iter().enumerate().rev() {
        if tokens > 0 {
            lines.entry(tenant).or_default().push(index);
        }
    }
    while left > 0 {
        if turn.left == 0 || !lines.contains_key(&turn.tenant) {
            let next = lines.range((Excluded(turn.tenant), Unbounded)).next();
            let Some((&tenant, _)) = next.or_else(|| lines.first_key_value()) else {
                break;
            };
            let left = QUANTUM;
            turn = Turn { tenant, left };
        }
        let Some(line) = lines.get_mut(&turn.tenant) else {
            break;
        };
        while let Some(&index) = line.last()
            && let most = turn.left.min(left)
            && most > 0
        {
            let tokens = (asked[index].1 - given[index]).min(most);
            given[index] += tokens;
            turn.left -= tokens;
            left -= tokens;
            if given[index] == asked[index].1 {
                line.pop();
            }
        }
        if line.is_empty() {
            // What it does not need now it cannot save for later.
            lines.remove(&turn.tenant);
            turn.left = 0;
        }
    }
    (given, left, turn)
}

/// Which request starts next: of the tenants with the fewest that run, the one whose turn comes after the tenant of which the last one
/// started; of that tenant the first to come. `waiting` are the tenants of those that wait, in order of arrival. A tenant whose
/// requests have all ended is among those with the fewest, so none waits for ever.
pub(crate) fn next_to_start(
    waiting: impl Iterator<Item = TenantId>,
    running: &BTreeMap<TenantId, usize>,
    last: TenantId,
) -> Option<usize> {
    let mut first: BTreeMap<TenantId, usize> = BTreeMap::new();
    for (index, tenant) in waiting.enumerate() {
        first.entry(tenant).or_insert(index);
    }
    let runs = |tenant: &TenantId| running.get(tenant).copied().unwrap_or(0);
    let order = |tenant: &TenantId| (runs(tenant), *tenant <= last, *tenant);
    first
        .into_iter()
        .min_by_key(|(tenant, _)| order(tenant))
        .map(|(_, index)| index)
}

/// Which running request gives way: never the first to come, unless it is alone; of the others one of the tenant that has the most, the
/// last to come. `running` has each one's tenant and its place in the order of arrival.
pub(crate) fn gives_way(running: &[(TenantId, u64)]) -> Option<usize> {
    let count = |of: TenantId| running.iter().filter(|(tenant, _)| *tenant == of).count();
    let first = running.iter().map(|(_, number)| *number).min()?;
    let spared = |number: u64| number == first;
    (0..running.len()).max_by_key(|&index| {
        let (tenant, number) = running[index];
        (!spared(number), count(tenant), number)
    })
}
