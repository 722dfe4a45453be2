//! Programs run from the repository's root, and what is said around them.
//!
//! A program's own output goes straight through; a failure ends everything. Start at `Repository`.

use std::{
    cell::OnceCell,
    env,
    ffi::OsStr,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// The checkout, and where its builds go.
pub(crate) struct Repository {
    /// The root folder.
    pub(crate) root: PathBuf,
    /// Cargo's target folder, absolute.
    pub(crate) target: PathBuf,
    cargo: PathBuf,
    imprint: OnceCell<PathBuf>,
}

impl Repository {
    /// Finds the checkout that this program was built from.
    pub(crate) fn find() -> Result<Self> {
        let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
        let root = crates
            .and_then(Path::parent)
            .context("xtask lies in crates/xtask")?
            .to_path_buf();
        // Cargo reads a relative CARGO_TARGET_DIR from where it is called; all is called from the root.
        let target = root.join(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()));
        let cargo = env::var_os("CARGO")
            .unwrap_or_else(|| "cargo".into())
            .into();
        Ok(Self {
            root,
            target,
            cargo,
            imprint: OnceCell::new(),
        })
    }

    /// A program that will run in the root, with cargo's target folder named.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(&self.root)
            .env("CARGO_TARGET_DIR", &self.target);
        command
    }

    /// Cargo, with its arguments split at spaces.
    pub(crate) fn cargo(&self, arguments: &str) -> Command {
        let mut command = self.command(&self.cargo);
        command.args(arguments.split_whitespace());
        command
    }

    /// Builds the program `imprint` with all tests, in the dev profile, once, and returns where it lies.
    ///
    /// One build serves every stage: cargo resolves other features without the tests, and would compile the dependencies twice.
    pub(crate) fn imprint(&self) -> Result<&Path> {
        if let Some(built) = self.imprint.get() {
            return Ok(built);
        }
        let mut build = self
            .cargo("test --workspace --locked --no-run --message-format json-render-diagnostics");
        let messages = output(&mut build)?;
        let built = messages
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .filter(|message| message["target"]["name"] == "imprint")
            .filter(|message| message["profile"]["test"] == false)
            .find_map(|message| message["executable"].as_str().map(PathBuf::from))
            .context("cargo built no program")?;
        Ok(self.imprint.get_or_init(|| built))
    }
}

/// Runs a program to its end. An error if it does not succeed.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let name = text(command);
    say(&format!("$ {name}"))?;
    let status = command
        .status()
        .with_context(|| format!("`{name}` does not start"))?;
    if !status.success() {
        bail!("`{name}` ended with {status}");
    }
    Ok(())
}

/// Runs a program to its end, for what it prints. An error if it does not succeed.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let name = text(command);
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("`{name}` does not start"))?;
    if !output.status.success() {
        bail!("`{name}` ended with {}", output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{name}` prints no UTF-8"))
}

/// A part of a command: its name, and what it does with what the parts share.
pub(crate) type Part<C> = (&'static str, fn(&C) -> Result<()>);

/// Runs parts one after another under headings, only those named if any is, and says how long each took.
pub(crate) fn parts<C>(parts: &[Part<C>], context: &C, only: &[String]) -> Result<()> {
    let mut times = Vec::new();
    for (name, part) in parts {
        if !only.is_empty() && !only.iter().any(|wanted| wanted == name) {
            continue;
        }
        say(&format!("\n==== {name} ===="))?;
        let start = Instant::now();
        part(context).with_context(|| {
            format!("{name} failed after {:.1} s", start.elapsed().as_secs_f64())
        })?;
        say(&format!(
            "==== {name}: {:.1} s ====",
            start.elapsed().as_secs_f64()
        ))?;
        times.push((*name, start.elapsed()));
    }
    let total: Duration = times.iter().map(|(_, time)| *time).sum();
    let each: Vec<_> = times
        .iter()
        .map(|(name, time)| format!("{name} {:.0} s", time.as_secs_f64()))
        .collect();
    say(&format!(
        "\nAll of it holds: {} (together {:.0} s).",
        each.join(", "),
        total.as_secs_f64()
    ))
}

/// Says something to the person, beside what programs print.
pub(crate) fn say(line: &str) -> Result<()> {
    writeln!(std::io::stderr(), "{line}").context("stderr is gone")
}

fn text(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}
