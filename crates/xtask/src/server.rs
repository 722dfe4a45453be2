//! A real server on a free loopback port, for checks that speak to one.
//!
//! Start at `Server::start`.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
};

use anyhow::{Context, Result, bail};

use crate::run::Repository;

/// A running server. Dropped, it is killed; stopped, it must end cleanly.
pub(crate) struct Server {
    child: Child,
    // Kept open, so that the server can go on printing.
    _output: BufReader<ChildStdout>,
    address: String,
}

impl Server {
    /// Starts `imprint serve` with further arguments and waits until it says where it listens.
    pub(crate) fn start(
        repository: &Repository,
        imprint: &Path,
        arguments: &[&str],
    ) -> Result<Self> {
        let mut command = repository.command(imprint);
        command
            .args(["serve", "--listen", "127.0.0.1:0"])
            .args(arguments)
            // What others compute is compared with the dequantised model.
            .env("IMPRINT_ENGINE_ACTIVATIONS", "f32")
            .stdout(Stdio::piped());
        let mut child = command.spawn().context("the server does not start")?;
        let mut output = BufReader::new(child.stdout.take().context("the server has no stdout")?);
        let mut line = String::new();
        loop {
            line.clear();
            if output
                .read_line(&mut line)
                .context("the server's stdout broke")?
                == 0
            {
                bail!("the server ended before it was ready: {}", child.wait()?);
            }
            if let Some(address) = address(&line) {
                return Ok(Self {
                    child,
                    _output: output,
                    address,
                });
            }
        }
    }

    /// `host:port`.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Asks it to end, as an operator would, and waits for it.
    pub(crate) fn stop(mut self) -> Result<()> {
        let asked = Command::new("kill")
            .args(["-TERM", &self.child.id().to_string()])
            .status()?;
        if !asked.success() {
            bail!("the server was gone already");
        }
        let status = self.child.wait()?;
        if !status.success() {
            bail!("the server ended with {status}");
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Ended already after `stop`; then both fail, and that is right.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The loopback address in a line, if one is there.
fn address(line: &str) -> Option<String> {
    let (_, rest) = line.split_once("127.0.0.1:")?;
    let port: String = rest.chars().take_while(char::is_ascii_digit).collect();
    (!port.is_empty()).then(|| format!("127.0.0.1:{port}"))
}

#[cfg(test)]
mod tests;
