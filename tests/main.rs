//! End to end: the real server, over gRPC, on tiny models and on the real one; and the workspace's own rules.
//!
//! Each test starts a server of its own on a free port. Start at `support`.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics, in its helpers too"
)]

#[path = "e2e/support.rs"]
mod support;

#[path = "e2e/answers.rs"]
mod answers;
#[path = "arrows.rs"]
mod arrows;
#[path = "e2e/context.rs"]
mod context;
#[path = "e2e/edge.rs"]
mod edge;
#[path = "e2e/law.rs"]
mod law;
#[path = "e2e/load.rs"]
mod load;
#[path = "e2e/metrics.rs"]
mod metrics;
#[path = "e2e/sessions.rs"]
mod sessions;
#[path = "e2e/shutdown.rs"]
mod shutdown;
#[path = "e2e/smollm2.rs"]
mod smollm2;
#[path = "e2e/tiers.rs"]
mod tiers;
