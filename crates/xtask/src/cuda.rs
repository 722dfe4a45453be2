//! A CUDA toolkit that only compiles: from the machine, or from PyPI's wheels.
//!
//! No GPU and no driver are needed. What trains on a GPU takes candle's kernels and links the toolkit's libraries: these are stood in for
//! where they are not, by [`libraries`] to link, by [`empty_nvcc`] to check types. Start at [`toolkit`].

use std::{
    collections::BTreeSet,
    env,
    ffi::OsString,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{
    python::Venv,
    run::{self, Repository, say},
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

/// Says where the toolkit is, and what `cuda-train` wants to be built beside it, as lines for a shell.
pub(crate) fn say_toolkit(repository: &Repository, train: bool) -> Result<()> {
    let toolkit = toolkit(repository)?;
    say(&format!("export CUDA_HOME={}", toolkit.display()))?;
    if !train {
        return Ok(());
    }
    let libraries = libraries(repository, &toolkit)?;
    for (name, value) in candle(&toolkit, toolkit.join("bin/nvcc"), HOPPER)? {
        say(&format!("export {name}={}", value.display()))?;
    }
    say(&format!(
        "export LIBRARY_PATH={}${{LIBRARY_PATH:+:$LIBRARY_PATH}}",
        libraries.display()
    ))
}

/// The GPU that candle's kernels are compiled for, as candle's build names it.
const HOPPER: &str = "90";
/// The one that [`empty_nvcc`] compiles for: candle's build takes what it finds for the same GPU to be made.
const NONE: &str = "80";

/// What candle's CUDA backend asks of the environment: its compiler, the toolkit's version, the GPU that it is compiled for.
fn candle(toolkit: &Path, nvcc: PathBuf, gpu: &str) -> Result<[(&'static str, OsString); 3]> {
    let (major, minor) = version(toolkit)?;
    Ok([
        ("NVCC", nvcc.into()),
        ("CUDARC_CUDA_VERSION", format!("{major}0{minor}0").into()),
        ("CUDA_COMPUTE_CAP", gpu.into()),
    ])
}

/// The toolkit's major and minor version.
fn version(toolkit: &Path) -> Result<(u32, u32)> {
    let nvcc = toolkit.join("bin/nvcc");
    let text = run::output(Command::new(&nvcc).arg("--version"))?;
    let release = text.split("release ").nth(1).and_then(|rest| {
        let (major, rest) = rest.split_once('.')?;
        let minor = rest.split(|c: char| !c.is_ascii_digit()).next()?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    });
    release.with_context(|| format!("{} names no release", nvcc.display()))
}

/// What candle's CUDA backend asks for where only its types are checked: in nvcc's place a program that leaves empty files where nvcc's would
/// be.
pub(crate) fn empty_nvcc(
    repository: &Repository,
    toolkit: &Path,
) -> Result<[(&'static str, OsString); 3]> {
    let bin = repository.target.join("empty-nvcc/bin");
    fs::create_dir_all(&bin)?;
    let nvcc = bin.join("nvcc");
    fs::write(&nvcc, EMPTY_NVCC)?;
    fs::set_permissions(&nvcc, fs::Permissions::from_mode(0o755))?;
    candle(toolkit, nvcc, NONE)
}

const EMPTY_NVCC: &str = r#"#!/bin/sh
# `-o FILE` makes FILE; `--ptx --output-directory DIR ... NAME.cu` makes DIR/NAME.ptx.
out= folder= source=
while [ $# -gt 0 ]; do
    case "$1" in
        -o) out=$2; shift ;;
        --output-directory) folder=$2; shift ;;
        *.cu) source=$1 ;;
    esac
    shift
done
if [ -n "$folder" ]; then
    name=${source##*/}
    : > "$folder/${name%.cu}.ptx"
elif [ -n "$out" ]; then
    : > "$out"
fi
"#;

/// The libraries that candle's CUDA backend links: (name, the folder of cudarc that declares its functions, how these begin).
const LIBRARIES: &[(&str, &str, &str)] = &[
    ("cuda", "driver", "cu"),
    ("cublas", "cublas", "cublas"),
    ("cublasLt", "cublaslt", "cublasLt"),
    ("curand", "curand", "curand"),
    ("nvrtc", "nvrtc", "nvrtc"),
];

/// A folder of libraries to link with, which hold names alone: the machine that runs the program brings the real ones. None of them is
/// in the wheels of [`WHEELS`], and the driver's is on no machine without a GPU.
fn libraries(repository: &Repository, toolkit: &Path) -> Result<PathBuf> {
    let folder = repository.target.join("cuda-libraries");
    fs::create_dir_all(&folder)?;
    let (major, _) = version(toolkit)?;
    let sources = cudarc(repository)?;
    for (name, module, begin) in LIBRARIES {
        let declared = fs::read_to_string(sources.join(module).join("sys/mod.rs"))?;
        let functions: BTreeSet<&str> = declared
            .split("fn ")
            .skip(1)
            .filter_map(|rest| {
                rest.split(|c: char| !c.is_alphanumeric() && c != '_')
                    .next()
            })
            .filter(|function| function.starts_with(begin))
            .collect();
        let mut source = String::new();
        for function in functions {
            source.push_str(&format!("void {function}(void) {{}}\n"));
        }
        let file = folder.join(format!("{name}.c"));
        fs::write(&file, source)?;
        // cuRAND and the driver number their versions otherwise.
        let number = match *name {
            "cuda" => 1,
            "curand" => 10,
            _ => major,
        };
        let mut cc = Command::new("cc");
        cc.args(["-w", "-shared", "-fPIC", "-o"])
            .arg(folder.join(format!("lib{name}.so")))
            .arg(&file)
            .arg(format!("-Wl,-soname,lib{name}.so.{number}"));
        run::run(&mut cc)?;
    }
    // The runtime's is there, under its version's name.
    let runtime = folder.join("libcudart.so");
    if fs::symlink_metadata(&runtime).is_ok() {
        fs::remove_file(&runtime)?;
    }
    let versioned = format!("libcudart.so.{major}");
    let found = ["lib", "lib64"]
        .map(|lib| toolkit.join(lib).join(&versioned))
        .into_iter()
        .find(|file| file.is_file())
        .with_context(|| format!("{} has no {versioned}", toolkit.display()))?;
    symlink(found, runtime)?;
    Ok(folder)
}

/// Where the sources of the crate cudarc lie that is locked.
fn cudarc(repository: &Repository) -> Result<PathBuf> {
    let mut metadata = repository.cargo("metadata --locked --all-features --format-version 1");
    let metadata: serde_json::Value = serde_json::from_str(&run::output(&mut metadata)?)?;
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let manifest = packages
        .filter(|package| package["name"] == "cudarc")
        .find_map(|package| package["manifest_path"].as_str());
    let folder = manifest.and_then(|manifest| Path::new(manifest).parent());
    Ok(folder.context("no cudarc is locked")?.join("src"))
}
