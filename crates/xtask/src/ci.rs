//! Everything that has to hold before a change is kept.
//!
//! Each stage is one function over what the stages share; any stage can run alone. Start at `STAGES`.

use std::{cell::OnceCell, env, path::PathBuf};

use anyhow::{Context, Result, bail};

use crate::{
    cuda,
    python::Venv,
    run::{self, Part, Repository},
    server::Server,
};

/// The stages in their order.
const STAGES: &[Part<Ci>] = &[
    ("fmt", Ci::fmt),
    ("clippy", Ci::clippy),
    ("doc", Ci::doc),
    ("cuda", Ci::cuda),
    ("model", Ci::model),
    ("test", Ci::test),
    ("python", Ci::python),
    ("peft", Ci::peft),
    ("demo", Ci::demo),
];

/// The names of the stages.
pub(crate) fn names() -> Vec<&'static str> {
    STAGES.iter().map(|(name, _)| *name).collect()
}

/// Runs the stages, only those named if any is.
pub(crate) fn run(repository: Repository, only: &[String]) -> Result<()> {
    run::parts(
        STAGES,
        &Ci {
            repository,
            venv: OnceCell::new(),
        },
        only,
    )
}

/// What the stages share: made once, by the first stage that needs it.
struct Ci {
    repository: Repository,
    venv: OnceCell<Venv>,
}

impl Ci {
    fn fmt(&self) -> Result<()> {
        run::run(&mut self.repository.cargo("fmt --all --check"))?;
        // Outside the workspace, and too large to be built here.
        let peer = "fmt --check --manifest-path crates/bench/peers/mistralrs/Cargo.toml";
        run::run(&mut self.repository.cargo(peer))
    }

    fn clippy(&self) -> Result<()> {
        run::run(
            &mut self
                .repository
                .cargo("clippy --workspace --all-targets --locked -- -D warnings"),
        )
    }

    fn doc(&self) -> Result<()> {
        let mut doc = self
            .repository
            .cargo("doc --workspace --no-deps --document-private-items --locked");
        run::run(doc.env("RUSTDOCFLAGS", "-D warnings"))
    }

    /// The kernels as machine code for sm_90a, embedded; what they compute is tested by `test`, on the software device. Of what trains on
    /// a GPU the types: candle's kernels take nvcc many minutes, so they are not compiled.
    fn cuda(&self) -> Result<()> {
        let toolkit = cuda::toolkit(&self.repository)?;
        let mut clippy = self
            .repository
            .cargo("clippy --workspace --all-targets --locked --features cuda/cuda,server/cuda,server/cuda-train -- -D warnings");
        clippy.envs(cuda::empty_nvcc(&self.repository, &toolkit)?);
        run::run(clippy.env("CUDA_HOME", toolkit))
    }

    /// Fetches the default model into the cache, or finds it there. Nothing after this needs a network but pip.
    fn model(&self) -> Result<()> {
        run::run(
            self.repository
                .command(self.repository.imprint()?)
                .args(["model", "pull"]),
        )?;
        default_model().map(drop)
    }

    fn test(&self) -> Result<()> {
        let mut test = self
            .repository
            .cargo("test --workspace --locked --no-fail-fast");
        run::run(test.env("IMPRINT_TEST_MODEL", default_model()?))
    }

    /// The Python client: its types, then its tests against the real server, which they start themselves.
    fn python(&self) -> Result<()> {
        let venv = self.venv()?;
        let folder = self.repository.root.join("client/python");
        let config = folder.join("pyproject.toml");
        let mypy = || {
            let mut mypy = venv.python();
            mypy.args(["-m", "mypy", "--config-file"])
                .arg(&config)
                .arg("--cache-dir")
                .arg(venv.folder().join("mypy"));
            mypy
        };
        // From inside client/python, `-p imprint` would find the sources, which hold no messages.
        run::run(mypy().args(["-p", "imprint"]).current_dir(venv.folder()))?;
        run::run(
            mypy()
                .args([folder.join("tests"), folder.join("examples")])
                .current_dir(venv.folder()),
        )?;
        let mut pytest = venv.python();
        pytest
            .args(["-m", "pytest", "-p", "no:cacheprovider"])
            .arg(&folder);
        run::run(
            pytest
                .env("IMPRINT_BIN", self.repository.imprint()?)
                .env_remove("IMPRINT_ENDPOINT"),
        )
    }

    /// An exported adapter, judged by numpy: W + scale B A in a plain forward gives the server's log-probabilities.
    fn peft(&self) -> Result<()> {
        let server = Server::start(&self.repository, self.repository.imprint()?, &[])?;
        let mut check = self.venv()?.python();
        check.arg(
            self.repository
                .root
                .join("crates/xtask/python/peft_numpy.py"),
        );
        run::run(check.arg(server.address()).arg(default_model()?))?;
        server.stop()
    }

    /// The README's first command, in the dev profile.
    fn demo(&self) -> Result<()> {
        run::run(
            self.repository
                .command(self.repository.imprint()?)
                .args(["demo", "--json"]),
        )
    }

    fn venv(&self) -> Result<&Venv> {
        if let Some(made) = self.venv.get() {
            return Ok(made);
        }
        let made = Venv::make(&self.repository, "ci-venv")?;
        made.install(&["numpy>=2", "safetensors>=0.5", "gguf>=0.17"])?;
        made.install_client()?;
        Ok(self.venv.get_or_init(|| made))
    }
}

/// The default model's file in the cache, or what IMPRINT_TEST_MODEL names.
pub(crate) fn default_model() -> Result<PathBuf> {
    let path = match (
        env::var_os("IMPRINT_TEST_MODEL"),
        env::var_os("IMPRINT_HOME"),
        env::var_os("HOME"),
    ) {
        (Some(file), _, _) => PathBuf::from(file),
        (None, Some(home), _) => PathBuf::from(home).join(CACHED),
        (None, None, user) => PathBuf::from(user.context("HOME is not set")?)
            .join(".cache/imprint")
            .join(CACHED),
    };
    if !path.is_file() {
        bail!(
            "the default model is not at {}: run the stage `model` first",
            path.display()
        );
    }
    Ok(path)
}

const CACHED: &str = "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf";
