//! A CUDA toolkit that only compiles: from the machine, or from PyPI's wheels.
//!
//! No GPU and no driver are needed. Start at [`toolkit`].

use std::{env, fs, path::PathBuf};

use anyhow::{Context, Result, bail};

use crate::{
    python::Venv,
    run::{Repository, say},
};

/// nvcc, what it runs, and the headers that kernels include, as CUDA 13.0.2 has them: about 400 MB unpacked.
const WHEELS: &[&str] = &[
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
];

/// The toolkit's folder, for CUDA_HOME: what that names already, or wheels in a virtual environment under the target folder.
pub(crate) fn toolkit(repository: &Repository) -> Result<PathBuf> {
    if let Some(home) = env::var_os("CUDA_HOME").map(PathBuf::from) {
        if !home.join("bin/nvcc").is_file() {
            bail!("CUDA_HOME is {}, where no bin/nvcc is", home.display());
        }
        return Ok(home);
    }
    let venv = Venv::make(repository, "cuda-venv")?;
    let library = venv.folder().join("lib");
    let found = || -> Result<Option<PathBuf>> {
        for python in fs::read_dir(&library)? {
            let home = python?.path().join("site-packages/nvidia/cu13");
            if home.join("bin/nvcc").is_file() && home.join("include/nv/target").is_file() {
                return Ok(Some(home));
            }
        }
        Ok(None)
    };
    if found()?.is_none() {
        venv.install(WHEELS)?;
    }
    found()?.context("the wheels of the CUDA toolkit hold no nvcc")
}

/// Says where the toolkit is, as a line for a shell.
pub(crate) fn say_toolkit(repository: &Repository) -> Result<()> {
    say(&format!(
        "export CUDA_HOME={}",
        toolkit(repository)?.display()
    ))
}
