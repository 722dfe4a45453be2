//! The repository's own commands: `cargo xtask ci`, `cargo xtask parity`, `cargo xtask cuda-toolkit`.
//!
//! Runs other programs, computes nothing itself. Start at `ci::STAGES`.

mod ci;
mod cuda;
mod parity;
mod python;
mod run;
mod server;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::run::Repository;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The repository's own commands.")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Everything that has to hold before a change is kept; stops at the first failure.
    Ci {
        /// Only this stage (or these).
        #[arg(long, value_name = "STAGE", value_parser = ci::names())]
        only: Vec<String>,
    },
    /// What buf says of the contract, and torch, transformers and peft of our numbers. Downloads gigabytes; not part of ci.
    Parity {
        /// Only this check (or these).
        #[arg(long, value_name = "CHECK", value_parser = parity::names())]
        only: Vec<String>,
    },
    /// A CUDA toolkit to compile kernels with: what CUDA_HOME names, or wheels under the target folder. Prints the line that sets CUDA_HOME.
    CudaToolkit {
        /// Also what `--features cuda-train` wants: how candle's kernels are compiled, and libraries to link with that hold names alone.
        #[arg(long)]
        train: bool,
    },
}

fn main() -> Result<()> {
    let repository = Repository::find()?;
    match Arguments::parse().command {
        Command::Ci { only } => ci::run(repository, &only),
        Command::Parity { only } => parity::run(repository, &only),
        Command::CudaToolkit { train } => cuda::say_toolkit(&repository, train),
    }
}
