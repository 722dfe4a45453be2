//! Where and of what something was measured.
//!
//! Start at `Machine::here`.

use std::{fs, path::Path, process::Command};

use serde::Serialize;

/// The machine of a measurement.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    /// The processor's own name.
    pub(crate) cpu: String,
    /// Threads that compute, ours and the peers'.
    pub(crate) threads: usize,
    /// The vector instructions of those that matter here.
    pub(crate) features: Vec<String>,
    /// Operating system and architecture.
    pub(crate) system: String,
    /// Load average of the last minute when the measurement began.
    pub(crate) load_before: Option<f64>,
    /// The command that measured, with its arguments.
    pub(crate) command: String,
    /// The day, as in 2026-11-22, of universal time.
    pub(crate) date: String,
}

impl Machine {
    /// This machine, now, computing on so many threads. What it does not tell is left empty.
    pub(crate) fn here(threads: usize) -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_once(':'))
                .map_or("", |(_, value)| value.trim())
        };
        let flags: Vec<_> = field("flags").split_whitespace().collect();
        let known = [
            "avx2",
            "fma",
            "f16c",
            "avx512f",
            "avx512_vnni",
            "avx_vnni",
            "amx_tile",
        ];
        let load = fs::read_to_string("/proc/loadavg").ok();
        Self {
            cpu: field("model name").to_owned(),
            threads,
            features: known
                .iter()
                .filter(|name| flags.contains(name))
                .map(ToString::to_string)
                .collect(),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            load_before: load.and_then(|text| text.split_whitespace().next()?.parse().ok()),
            command: command(),
            date: date(),
        }
    }
}

/// The command line; the program by its name alone.
fn command() -> String {
    let mut arguments = std::env::args();
    let program = arguments.next().unwrap_or_default();
    let name = Path::new(&program).file_name();
    let name = name.map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    [name]
        .into_iter()
        .chain(arguments)
        .collect::<Vec<_>>()
        .join(" ")
}

fn date() -> String {
    let output = Command::new("date").args(["-u", "+%F"]).output();
    let text = output
        .ok()
        .and_then(|output| String::from_utf8(output.stdout).ok());
    text.unwrap_or_default().trim().to_owned()
}

/// The commit of the checkout that this was built from, `+` behind it if something was changed; empty if there is none.
pub(crate) fn commit() -> String {
    let git = |arguments: &[&str]| {
        let run = Command::new("git")
            .arg("-C")
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")))
            .args(arguments)
            .output();
        let output = run.ok().filter(|output| output.status.success())?;
        String::from_utf8(output.stdout)
            .ok()
            .map(|text| text.trim().to_owned())
    };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"])
        .is_some_and(|status| !status.is_empty());
    git(&["rev-parse", "--short=12", "HEAD"])
        .map_or_else(String::new, |head| head + if changed { "+" } else { "" })
}
