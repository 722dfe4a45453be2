//! A server of our own to measure: `imprint serve` as a process beside this one, on a free port.
//!
//! A process of its own, so that its memory is its own and the load does not run on its threads. Start at `Child::start`.

use std::{
    fs,
    io::{BufRead, BufReader},
    process::{self, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// A server that runs until it is dropped.
pub(crate) struct Child {
    process: process::Child,
    /// Where it listens.
    pub(crate) endpoint: String,
    /// Where its metrics are.
    pub(crate) metrics: String,
    /// From its start to where it listened.
    pub(crate) ready: Duration,
}

impl Child {
    /// Starts this program's verb `serve` with flags and variables and waits until it listens.
    pub(crate) fn start(
        flags: &[String],
        variables: impl IntoIterator<Item = (&'static str, String)>,
    ) -> Result<Self> {
        let began = Instant::now();
        let program = std::env::current_exe().context("this program's own file")?;
        let mut process = Command::new(program)
            .args(["serve", "--listen", "127.0.0.1:0"])
            .args(flags)
            .env("IMPRINT_METRICS_LISTEN", "127.0.0.1:0")
            .envs(variables)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("the server does not start")?;
        let out = process.stdout.take().context("the server has no stdout")?;
        let mut child = Self {
            process,
            endpoint: String::new(),
            metrics: String::new(),
            ready: Duration::ZERO,
        };
        let mut lines = BufReader::new(out).lines();
        let mut told = |what: &str| -> Result<String> {
            let line = lines
                .next()
                .context("the server ended before it listened")?;
            let line = line.context("the server's pipe broke")?;
            match line.strip_prefix(what) {
                Some(rest) => Ok(rest.trim().to_owned()),
                None => bail!("the server said {line:?} instead of where it listens"),
            }
        };
        child.endpoint = told("imprint listens on ")?;
        child.ready = began.elapsed();
        child.metrics = told("imprint tells metrics on ")?;
        Ok(child)
    }

    /// Bytes of memory that it has now, and the most that it had; none where the system does not tell.
    pub(crate) fn memory(&self) -> Option<(u64, u64)> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).ok()?;
        let bytes = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
            kib.checked_mul(1024)
        };
        Some((bytes("VmRSS:")?, bytes("VmHWM:")?))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It may have ended by itself; there is nobody to tell.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
