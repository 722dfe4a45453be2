//! llama.cpp on the same file, as a process beside ours.
//!
//! The prebuilt library of the npm package `node-llama-cpp` is driven by `peers/llama_cpp.mjs`, line by line: a request
//! in JSON, an answer in JSON. It measures itself, so no time of the pipe counts. Start at `LlamaCpp::start`.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context, Result, bail};
use engine::TokenId;
use serde::{Deserialize, Serialize};

/// The version whose prebuilt library is measured.
pub(crate) const VERSION: &str = "3.22.1";

const SCRIPT: &str = include_str!("../peers/llama_cpp.mjs");

/// A running llama.cpp.
pub(crate) struct LlamaCpp {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// What it says of itself.
    pub(crate) name: String,
}

#[derive(Serialize)]
#[serde(tag = "op", rename_all = "lowercase")]
enum Request<'a> {
    Prefill {
        prompts: &'a [Vec<u32>],
    },
    Decode {
        prompt: &'a [u32],
        batch: usize,
        tokens: usize,
    },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Answer {
    Ready { ready: String },
    Timed { seconds: f64, tokens: usize },
    Error { error: String },
}

impl LlamaCpp {
    /// Installs it into `folder`, unless it is there, and loads a GGUF file.
    pub(crate) fn start(folder: &Path, gguf: &Path, threads: usize) -> Result<Self> {
        install(folder)?;
        let mut command = Command::new("node");
        command
            .current_dir(folder)
            .arg("llama_cpp.mjs")
            .arg(fs::canonicalize(gguf)?)
            .arg(threads.to_string());
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("node does not start: llama.cpp is driven by Node.js")?;
        let requests = child.stdin.take().context("node has no stdin")?;
        let answers = BufReader::new(child.stdout.take().context("node has no stdout")?);
        let mut peer = Self {
            child,
            requests,
            answers,
            name: String::new(),
        };
        match peer.answer()? {
            Answer::Ready { ready } => peer.name = ready,
            Answer::Timed { .. } | Answer::Error { .. } => {
                bail!("llama.cpp said something else than that it is ready")
            }
        }
        Ok(peer)
    }

    /// Prompts read side by side: tokens a second.
    pub(crate) fn prefill(&mut self, prompts: &[&[TokenId]]) -> Result<f64> {
        let prompts: Vec<_> = prompts.iter().map(|prompt| ids(prompt)).collect();
        self.ask(&Request::Prefill { prompts: &prompts })
    }

    /// `batch` answers of `tokens` tokens side by side, behind the same prompt: tokens a second of the decoding alone.
    pub(crate) fn decode(
        &mut self,
        prompt: &[TokenId],
        batch: usize,
        tokens: usize,
    ) -> Result<f64> {
        self.ask(&Request::Decode {
            prompt: &ids(prompt),
            batch,
            tokens,
        })
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "token counts are far below 2^52"
    )]
    fn ask(&mut self, request: &Request<'_>) -> Result<f64> {
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        self.requests
            .write_all(line.as_bytes())
            .context("llama.cpp is gone")?;
        match self.answer()? {
            Answer::Timed { seconds, tokens } => Ok(tokens as f64 / seconds),
            Answer::Error { error } => bail!("llama.cpp: {error}"),
            Answer::Ready { .. } => bail!("llama.cpp is ready, but that was not the question"),
        }
    }

    fn answer(&mut self) -> Result<Answer> {
        let mut line = String::new();
        if self
            .answers
            .read_line(&mut line)
            .context("llama.cpp's pipe broke")?
            == 0
        {
            bail!("llama.cpp ended: {}", self.child.wait()?);
        }
        serde_json::from_str(&line).with_context(|| format!("llama.cpp said {line:?}"))
    }
}

impl Drop for LlamaCpp {
    fn drop(&mut self) {
        // It may have ended by itself; there is nobody to tell.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ids(tokens: &[TokenId]) -> Vec<u32> {
    tokens.iter().map(|TokenId(id)| *id).collect()
}

/// Installs the package and the one prebuilt library that this machine can run; no install script runs.
fn install(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("{} cannot be made", folder.display()))?;
    fs::write(folder.join("llama_cpp.mjs"), SCRIPT)?;
    let installed = fs::read_to_string(folder.join("node_modules/node-llama-cpp/package.json"))
        .unwrap_or_default();
    let version =
        serde_json::from_str::<serde_json::Value>(&installed).unwrap_or_default()["version"]
            .clone();
    if version == VERSION
        && folder
            .join("node_modules/@node-llama-cpp/linux-x64")
            .is_dir()
    {
        return Ok(());
    }
    fs::write(
        folder.join("package.json"),
        "{\"name\":\"peers\",\"private\":true}\n",
    )?;
    let status = Command::new("npm")
        .current_dir(folder)
        .args([
            "install",
            "--no-save",
            "--omit=optional",
            "--ignore-scripts",
            "--no-audit",
            "--no-fund",
        ])
        .arg("--loglevel=error")
        .args([
            format!("node-llama-cpp@{VERSION}"),
            format!("@node-llama-cpp/linux-x64@{VERSION}"),
        ])
        .stdout(Stdio::null())
        .status()
        .context("npm does not start: llama.cpp comes as an npm package")?;
    if !status.success() {
        bail!("npm could not install node-llama-cpp {VERSION}: {status}");
    }
    Ok(())
}
