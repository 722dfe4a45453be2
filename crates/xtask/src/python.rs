//! Virtual environments under cargo's target folder.
//!
//! Start at `Venv::make`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use crate::run::{self, Repository};

/// A virtual environment with the Python client and its test tools.
pub(crate) struct Venv {
    folder: PathBuf,
    root: PathBuf,
}

impl Venv {
    /// Makes it under the target folder, or takes the one that is there.
    pub(crate) fn make(repository: &Repository, name: &str) -> Result<Self> {
        let folder = repository.target.join(name);
        if !folder.join("bin/pip").is_file() {
            run::run(
                repository
                    .command("python3")
                    .args(["-m", "venv", "--clear"])
                    .arg(&folder),
            )?;
        }
        Ok(Self {
            folder,
            root: repository.root.clone(),
        })
    }

    /// Where it lies.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its Python, to run in the repository's root.
    pub(crate) fn python(&self) -> Command {
        let mut python = Command::new(self.folder.join("bin/python"));
        python
            .current_dir(&self.root)
            .env("PYTHONDONTWRITEBYTECODE", "1");
        python
    }

    /// Installs packages from wheels, as PyPI has them today.
    pub(crate) fn install(&self, packages: &[&str]) -> Result<()> {
        let pip = [
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--prefer-binary",
        ];
        run::run(self.python().args(pip).args(packages))
    }

    /// Builds and installs the Python client as it is now, with what its tests need.
    pub(crate) fn install_client(&self) -> Result<()> {
        self.install(&["./client/python[test]"])
    }
}
