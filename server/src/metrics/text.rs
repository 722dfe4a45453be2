//! The text format of Prometheus (version 0.0.4), one metric after the other.
//!
//! Start at [`Metrics::text`].

use std::{
    fmt::{Display, Write as _},
    sync::atomic::Ordering,
};

use super::{CODES, ENDS, Histogram, Metrics, SERVICES};

/// A text under construction. Writing to a String cannot fail.
struct Page(String);

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn value(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.0.push_str(name);
        for (place, (label, value)) in labels.iter().enumerate() {
            let open = if place == 0 { '{' } else { ',' };
            let _ = write!(self.0, "{open}{label}=\"{}\"", escaped(value));
        }
        let close = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.0, "{close} {value}");
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.head(name, "gauge", help);
        self.value(name, &[], value);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.head(name, "counter", help);
        self.value(name, &[], value);
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.head(name, "histogram", help);
        let (below, all, sum) = histogram.read();
        let bucket = format!("{name}_bucket");
        for (bound, count) in below {
            self.value(&bucket, &[("le", &bound.to_string())], count);
        }
        self.value(&bucket, &[("le", "+Inf")], all);
        self.value(&format!("{name}_sum"), &[], sum);
        self.value(&format!("{name}_count"), &[], all);
    }
}

/// A label's value as the format wants it.
fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

impl Metrics {
    /// All of it as Prometheus reads it.
    #[must_use]
    pub fn text(&self) -> String {
        let mut page = Page(String::with_capacity(16 << 10));
        page.head("imprint:info", "gauge", "What is served.");
        let labels = [
            ("model_name", self.model.as_str()),
            ("version", env!("CARGO_PKG_VERSION")),
        ];
        page.value("imprint:info", &labels, 1);
        self.usage_into(&mut page);
        self.tiers_into(&mut page);
        self.tokens_into(&mut page);
        self.calls_into(&mut page);
        process_into(&mut page);
        page.0
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "blocks of a cache are far below 2^52"
    )]
    fn usage_into(&self, page: &mut Page) {
        let usage = self.usage();
        page.gauge(
            "imprint:num_requests_running",
            "Requests that run.",
            usage.running,
        );
        page.gauge(
            "imprint:num_requests_waiting",
            "Requests that wait to run.",
            usage.queued,
        );
        let taken = usage.blocks.saturating_sub(usage.free_blocks);
        page.gauge(
            "imprint:kv_cache_usage_perc",
            "Share of the KV cache's blocks that are in use; 1 is all.",
            taken as f64 / usage.blocks.max(1) as f64,
        );
        page.gauge(
            "imprint:prefix_cache_usage_perc",
            "Share of the KV cache's blocks that nobody holds and that are kept for prompts that begin alike.",
            usage.kept_blocks as f64 / usage.blocks.max(1) as f64,
        );
        page.counter(
            "imprint:num_preemptions_total",
            "How many times a running request gave up its blocks, to be computed again.",
            usage.preempted,
        );
        page.gauge(
            "imprint:request_wait_estimate_seconds",
            "How long a request that came now would wait until its prompt is read, by what was measured; requests with less time are refused.",
            usage.wait.as_secs_f64(),
        );
        page.gauge(
            "imprint:num_sessions",
            "Sessions that the engine holds.",
            usage.sessions,
        );
        page.gauge(
            "imprint:ingest_tokens_waiting",
            "Context tokens that wait to be read.",
            usage.queued_tokens,
        );
        page.head(
            "imprint:session_bytes",
            "gauge",
            "Bytes that sessions hold or may come to hold, against the engine's budgets.",
        );
        for (kind, bytes) in [
            ("state", usage.state_bytes),
            ("trace", usage.trace_bytes),
            ("core", usage.core_bytes),
        ] {
            page.value("imprint:session_bytes", &[("kind", kind)], bytes);
        }
    }

    fn tiers_into(&self, page: &mut Page) {
        let usage = self.usage();
        let tiers = usage.tiers;
        let name = "imprint:tier_sessions";
        page.head(name, "gauge", "Sessions by where they are.");
        for (tier, sessions) in [
            ("slot", tiers.slot_sessions),
            ("host", tiers.host_sessions),
            ("asleep", tiers.asleep_sessions),
            ("waking", tiers.waking_sessions),
        ] {
            page.value(name, &[("tier", tier)], sessions);
        }
        let name = "imprint:tier_bytes";
        page.head(name, "gauge", "Bytes of sessions by where they are.");
        for (tier, bytes) in [("slot", tiers.slot_bytes), ("host", tiers.host_bytes)] {
            page.value(name, &[("tier", tier)], bytes);
        }
        page.value(name, &[("tier", "disk")], tiers.disk_bytes);
        let name = "imprint:snapshot_files";
        page.head(name, "gauge", "Files of snapshots on disk.");
        page.value(name, &[], tiers.disk_files);
        let counters = [
            (
                "imprint:adapter_hits_total",
                "Requests that found their adapter in a slot.",
                tiers.hits,
            ),
            (
                "imprint:adapter_misses_total",
                "Requests that waited for a session to be brought back.",
                tiers.misses,
            ),
            (
                "imprint:prefix_cache_queries_total",
                "Prompt tokens that were looked up in the prefix cache.",
                usage.prompt_tokens,
            ),
            (
                "imprint:prefix_cache_hits_total",
                "Of these the ones that were there.",
                usage.cached_tokens,
            ),
        ];
        for (name, help, count) in counters {
            page.counter(name, help, count);
        }
        let name = "imprint:tier_moves_total";
        page.head(
            name,
            "counter",
            "Sessions that changed their place, by how.",
        );
        for (how, count) in [
            ("host_to_slot", tiers.promoted_host),
            ("disk_to_host", tiers.promoted_disk),
            ("read_again", tiers.reread),
            ("out_of_host", tiers.evicted_host),
            ("out_of_slot", tiers.evicted_slots),
        ] {
            page.value(name, &[("move", how)], count);
        }
    }

    fn tokens_into(&self, page: &mut Page) {
        let counters = [
            (
                "imprint:prompt_tokens_total",
                "Tokens of the prompts of requests that have ended.",
                &self.prompt_tokens,
            ),
            (
                "imprint:generation_tokens_total",
                "Tokens generated.",
                &self.generation_tokens,
            ),
            (
                "imprint:ingest_tokens_total",
                "Context tokens that wait no more: read, refused or forgotten.",
                &self.ingest_tokens,
            ),
            (
                "imprint:versions_published_total",
                "Adapter versions published.",
                &self.versions,
            ),
            (
                "imprint:engine_steps_total",
                "Steps of the engine.",
                &self.steps,
            ),
        ];
        for (name, help, counter) in counters {
            page.counter(name, help, counter.get());
        }
        let name = "imprint:request_success_total";
        page.head(name, "counter", "Generations that have ended, by reason.");
        for (reason, counter) in ENDS.iter().zip(&self.ends) {
            page.value(name, &[("finished_reason", reason)], counter.get());
        }
        let histograms = [
            (
                "imprint:time_to_first_token_seconds",
                "From a generation's arrival to its first token.",
                &self.first,
            ),
            (
                "imprint:inter_token_latency_seconds",
                "Between two tokens of a generation.",
                &self.between,
            ),
            (
                "imprint:request_time_per_output_token_seconds",
                "Of each generation: the mean time between two tokens.",
                &self.per_token,
            ),
            (
                "imprint:e2e_request_latency_seconds",
                "From a generation's arrival to its end, whichever that was.",
                &self.whole,
            ),
            (
                "imprint:request_queue_time_seconds",
                "From the engine's taking a generation to its first step.",
                &self.queue,
            ),
        ];
        for (name, help, histogram) in histograms {
            page.histogram(name, help, histogram);
        }
    }

    fn calls_into(&self, page: &mut Page) {
        let name = "imprint:grpc_calls_in_flight";
        page.head(name, "gauge", "Calls under way, streams included.");
        for (service, calls) in SERVICES.iter().zip(&self.calls) {
            page.value(
                name,
                &[("service", service)],
                calls.load(Ordering::Relaxed).max(0),
            );
        }
        let name = "imprint:grpc_calls_total";
        page.head(
            name,
            "counter",
            "Calls that have ended, by code; CANCELLED: the client went away.",
        );
        for (service, codes) in SERVICES.iter().zip(&self.codes) {
            for (code, counter) in CODES.iter().zip(codes) {
                // OK always, so that a rate of errors has what to be divided by; others once they have happened.
                if counter.get() > 0 || *code == "OK" {
                    page.value(name, &[("service", service), ("code", code)], counter.get());
                }
            }
        }
    }
}

/// What Linux tells of the process; elsewhere nothing.
fn process_into(page: &mut Page) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let resident = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    if let Some(kib) = resident {
        page.gauge(
            "process_resident_memory_bytes",
            "Resident memory size in bytes.",
            kib.saturating_mul(1024),
        );
    }
}
