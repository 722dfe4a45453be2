//! Compiles the .proto files with protox (no protoc binary) and writes the descriptor set for reflection.

use std::{env, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=imprint");
    let files = ["types", "session", "context", "generation", "model"]
        .map(|name| format!("imprint/v1/{name}.proto"));
    let descriptors = protox::compile(files, ["."])?;
    let mut out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    out.push("imprint.bin");
    fs::write(&out, prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
