//! Others on the same file, as processes beside ours: llama.cpp, and torch with the dequantised weights.
//!
//! The prebuilt library of the npm package `node-llama-cpp` is driven by `peers/llama_cpp.mjs`, torch by
//! `peers/torch_forward.py`, line by line: a request in JSON, an answer in JSON. They measure themselves, so no time of the
//! pipe counts. Start at `Peer::llama_cpp`.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context, Result, bail};
use engine::TokenId;
use serde::{Deserialize, Serialize};

/// The version whose prebuilt library is measured.
pub(crate) const VERSION: &str = "3.22.1";

const SCRIPT: &str = include_str!("../peers/llama_cpp.mjs");
const REQUANTISE: &str = include_str!("../peers/requantise.py");
const TORCH: &str = include_str!("../peers/torch_forward.py");

/// A GGUF format that llama.cpp may be faster with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// 8-bit codes.
    #[value(name = "q8_0")]
    Q8_0,
    /// 4-bit codes without minima.
    #[value(name = "q4_0")]
    Q4_0,
    /// The upper halves of 32-bit floats.
    #[value(name = "bf16")]
    Bf16,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Bf16 => "BF16",
        }
    }

    /// Writes a GGUF file's weights in this format into `folder`, unless they are there, with a Python that has gguf. `digest` names the
    /// weights.
    pub(crate) fn file(
        self,
        folder: &Path,
        gguf: &Path,
        digest: &str,
        python: &Path,
    ) -> Result<PathBuf> {
        let short = digest.get(..16).unwrap_or(digest);
        let out = folder.join(format!("{short}-{}.gguf", self.name()));
        if out.is_file() {
            return Ok(out);
        }
        let status = Command::new(python)
            .args(["-c", REQUANTISE])
            .arg(gguf)
            .arg(self.name())
            .arg(&out)
            .status()
            .with_context(|| format!("{} does not start", python.display()))?;
        if !status.success() {
            bail!("{} was not written: {status}", out.display());
        }
        Ok(out)
    }
}

/// A running peer.
pub(crate) struct Peer {
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
    Forward {
        dtype: &'a str,
        prompt: &'a [u32],
    },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Answer {
    Ready { ready: String },
    Timed { seconds: f64, tokens: usize },
    Error { error: String },
}

impl Peer {
    /// Installs llama.cpp into `folder`, unless it is there, and loads a GGUF file.
    pub(crate) fn llama_cpp(folder: &Path, gguf: &Path, threads: usize) -> Result<Self> {
        install(folder)?;
        let mut command = Command::new("node");
        command.current_dir(folder).arg("llama_cpp.mjs");
        Self::start(command, gguf, threads)
            .context("llama.cpp, which is driven by Node.js, does not start")
    }

    /// Loads a GGUF file's weights, dequantised, with a Python that has torch, transformers and gguf.
    pub(crate) fn torch(python: &Path, gguf: &Path, threads: usize) -> Result<Self> {
        let mut command = Command::new(python);
        command.args(["-c", TORCH]);
        Self::start(command, gguf, threads)
            .with_context(|| format!("torch with {} does not start", python.display()))
    }

    fn start(mut command: Command, gguf: &Path, threads: usize) -> Result<Self> {
        command
            .arg(fs::canonicalize(gguf)?)
            .arg(threads.to_string());
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let requests = child.stdin.take().context("it has no stdin")?;
        let answers = BufReader::new(child.stdout.take().context("it has no stdout")?);
        let mut peer = Self {
            child,
            requests,
            answers,
            name: String::new(),
        };
        match peer.answer()? {
            Answer::Ready { ready } => peer.name = ready,
            Answer::Timed { .. } | Answer::Error { .. } => {
                bail!("it said something else than that it is ready")
            }
        }
        Ok(peer)
    }

    /// Prompts read side by side: tokens a second.
    pub(crate) fn prefill(&mut self, prompts: &[&[TokenId]]) -> Result<f64> {
        let prompts: Vec<_> = prompts.iter().map(|prompt| ids(prompt)).collect();
        self.ask(&Request::Prefill { prompts: &prompts })
    }

    /// One forward of a prompt in torch, in `dtype` bf16 or f32: tokens a second.
    pub(crate) fn forward(&mut self, dtype: &str, prompt: &[TokenId]) -> Result<f64> {
        self.ask(&Request::Forward {
            dtype,
            prompt: &ids(prompt),
        })
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
            .context("a peer is gone")?;
        match self.answer()? {
            Answer::Timed { seconds, tokens } => Ok(tokens as f64 / seconds),
            Answer::Error { error } => bail!("a peer: {error}"),
            Answer::Ready { .. } => bail!("a peer is ready, but that was not the question"),
        }
    }

    fn answer(&mut self) -> Result<Answer> {
        let mut line = String::new();
        if self
            .answers
            .read_line(&mut line)
            .context("a peer's pipe broke")?
            == 0
        {
            bail!("a peer ended: {}", self.child.wait()?);
        }
        serde_json::from_str(&line).with_context(|| format!("a peer said {line:?}"))
    }
}

impl Drop for Peer {
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
