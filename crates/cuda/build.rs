//! Compiles kernels/*.cu to sm_90a machine code, only under the feature `cuda`.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// One file of machine code each.
const FILES: [&str; 7] = [
    "attention",
    "cores",
    "draw",
    "factor",
    "norm",
    "quant",
    "rows",
];

fn main() {
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let nvcc = env::var_os("CUDA_HOME").map_or_else(
        || PathBuf::from("nvcc"),
        |home| Path::new(&home).join("bin/nvcc"),
    );
    for name in FILES {
        // `-arch=sm_90a` would add a pass for compute_90.
        let status = Command::new(&nvcc)
            .args([
                "-cubin",
                "-O3",
                "-std=c++17",
                "-gencode=arch=compute_90a,code=sm_90a",
            ])
            .arg(format!("kernels/{name}.cu"))
            .arg("-o")
            .arg(out.join(format!("{name}.cubin")))
            .status();
        match status {
            Ok(status) if status.success() => {}
            Ok(status) => panic!(
                "{} of kernels/{name}.cu ended with {status}",
                nvcc.display()
            ),
            Err(error) => panic!(
                "{} does not start ({error}): set CUDA_HOME to a CUDA 13 toolkit, or make one with `cargo xtask cuda-toolkit`",
                nvcc.display()
            ),
        }
    }
}
