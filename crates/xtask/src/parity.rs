//! What others' tools say: buf of the contract; torch, transformers and peft of our numbers.
//!
//! On demand: their wheels are gigabytes, and buf needs Node.js. The checks are the scripts in `python/`. Start at `CHECKS`.

use std::{cell::OnceCell, fs, process::Command};

use anyhow::{Context, Result};

use crate::{
    ci::default_model,
    python::Venv,
    run::{self, Part, Repository},
    server::Server,
};

/// The linter of the contract, as npm knows it.
const BUF: &str = "@bufbuild/buf@1.75.0";

/// The checks in their order.
const CHECKS: &[Part<Parity>] = &[
    ("contract", Parity::contract),
    ("peft", Parity::peft),
    ("architectures", Parity::architectures),
    ("train", Parity::train),
    ("eval", Parity::eval),
];

/// The names of the checks.
pub(crate) fn names() -> Vec<&'static str> {
    CHECKS.iter().map(|(name, _)| *name).collect()
}

/// Runs the checks, only those named if any is.
pub(crate) fn run(repository: Repository, only: &[String]) -> Result<()> {
    run::parts(
        CHECKS,
        &Parity {
            repository,
            venv: OnceCell::new(),
        },
        only,
    )
}

/// What the checks share: made once, by the first check that needs it.
struct Parity {
    repository: Repository,
    venv: OnceCell<Venv>,
}

impl Parity {
    /// The contract, linted by buf with its standard rules.
    fn contract(&self) -> Result<()> {
        let mut buf = self.repository.command("npm");
        buf.args([
            "exec",
            "--yes",
            "--package",
            BUF,
            "--",
            "buf",
            "lint",
            "proto",
        ]);
        run::run(&mut buf)
    }

    /// An exported adapter, loaded by peft onto the model in transformers, against the server's log-probabilities.
    fn peft(&self) -> Result<()> {
        let server = Server::start(&self.repository, self.repository.imprint()?, &[])?;
        let mut check = self.script("peft_torch.py")?;
        run::run(check.arg(server.address()).arg(default_model()?))?;
        server.stop()
    }

    /// Tiny random models of every architecture: transformers' log-probabilities against the server's.
    fn architectures(&self) -> Result<()> {
        let folder = self.repository.target.join("parity-models");
        if folder.is_dir() {
            fs::remove_dir_all(&folder)?;
        }
        run::run(self.script("architectures.py")?.arg("make").arg(&folder))?;
        for case in fs::read_dir(&folder)? {
            let case = case?.path();
            let model = case
                .to_str()
                .context("the target folder's name is no UTF-8")?;
            let server = Server::start(
                &self.repository,
                self.repository.imprint()?,
                &["--model", model, "--generator", "none"],
            )?;
            run::run(
                self.script("architectures.py")?
                    .arg("check")
                    .arg(&case)
                    .arg(server.address()),
            )?;
            server.stop()?;
        }
        Ok(())
    }

    /// Loss and gradients of one training step on tiny models, with every read-out, against torch's autograd.
    fn train(&self) -> Result<()> {
        let folder = self.repository.target.join("parity-train");
        if folder.is_dir() {
            fs::remove_dir_all(&folder)?;
        }
        run::run(self.script("train_torch.py")?.arg("make").arg(&folder))?;
        for case in fs::read_dir(&folder)? {
            let case = case?.path();
            let mut train = Command::new(self.repository.imprint()?);
            train.args(["train", "--model"]).arg(case.join("base"));
            train.arg("--config").arg(case.join("recipe.toml"));
            train.arg("--probe").arg(case.join("batch.json"));
            run::run(train.arg("--out").arg(case.join("out")))?;
            run::run(self.script("train_torch.py")?.arg("check").arg(&case))?;
        }
        Ok(())
    }

    /// Answer likelihoods of an evaluation, with the context in the prompt and without: transformers' against ours.
    fn eval(&self) -> Result<()> {
        let rows = self.repository.target.join("parity-eval.jsonl");
        let report = self.repository.target.join("parity-eval.json");
        run::run(self.script("eval_reference.py")?.arg("make").arg(&rows))?;
        let mut eval = self.repository.command(self.repository.imprint()?);
        eval.args(["eval", "run", "--task", "squad", "--questions", "2"])
            .args(["--methods", "none,in_context"])
            .arg("--data")
            .arg(&rows)
            .arg("--json")
            .arg(&report);
        run::run(&mut eval)?;
        run::run(
            self.script("eval_reference.py")?
                .arg("check")
                .arg(&report)
                .arg(default_model()?),
        )
    }

    fn script(&self, name: &str) -> Result<Command> {
        let mut python = self.venv()?.python();
        python.arg(self.repository.root.join("crates/xtask/python").join(name));
        Ok(python)
    }

    fn venv(&self) -> Result<&Venv> {
        if let Some(made) = self.venv.get() {
            return Ok(made);
        }
        let made = Venv::make(&self.repository, "parity-venv")?;
        made.install(&[
            "torch>=2.6",
            "transformers>=4.55",
            "peft>=0.17",
            "tokenizers",
            "numpy>=2",
            "safetensors>=0.5",
            "gguf>=0.17",
        ])?;
        made.install_client()?;
        Ok(self.venv.get_or_init(|| made))
    }
}
