//! The program `imprint-cuda`: checks and measures a device, without anything of a server in it.
//!
//! A few megabytes, so that it travels to a machine with a GPU. Start at [`Verb`].

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::Parser;
use cuda::{Device, Error, Libraries, bench, check};

/// Checks and measures imprint's kernels on a GPU
#[derive(Debug, Parser)]
#[command(name = "imprint-cuda", version)]
struct Arguments {
    /// The driver's library
    #[arg(long, default_value = "libcuda.so.1")]
    driver: PathBuf,
    /// cuBLAS
    #[arg(long, default_value = "libcublas.so.13")]
    cublas: PathBuf,
    /// Which device
    #[arg(long, default_value_t = 0)]
    device: i32,
    /// Sizes for a software device
    #[arg(long)]
    tiny: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Compare every kernel, read-outs, a random model and golden cases with their references; fails if one is off
    Check {
        /// The folder of the golden cases
        #[arg(long)]
        golden: Option<PathBuf>,
    },
    /// Measure decode, prefill, ingest, read-outs and swaps of a random 7B model, one line of JSON each
    Bench,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            // Nothing can be done if standard error is closed.
            drop(writeln!(io::stderr(), "imprint-cuda: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Whether everything held.
fn run(arguments: &Arguments) -> Result<bool, Error> {
    let libraries = Libraries {
        driver: arguments.driver.clone(),
        cublas: arguments.cublas.clone(),
    };
    let device = Device::open(&libraries, arguments.device)?;
    // A reader that went away ends nothing: the exit code still tells.
    let say = |line: String| drop(writeln!(io::stdout(), "{line}"));
    say(format!("{:?}", device.description()?));
    match &arguments.verb {
        Verb::Check { golden } => {
            let scale = if arguments.tiny {
                check::Scale::Tiny
            } else {
                check::Scale::Real
            };
            let (mut lines, mut wrong) = (0, 0);
            check::run(&device, scale, golden.as_deref(), &mut |line| {
                lines += 1;
                wrong += usize::from(!line.holds());
                let verdict = if line.holds() { "ok   " } else { "WRONG" };
                say(format!(
                    "{verdict} {:9.2e} (<= {:.0e}) {}",
                    line.error, line.tolerance, line.what
                ));
            })?;
            say(format!("{} passed, {wrong} failed", lines - wrong));
            Ok(wrong == 0 && lines > 0)
        }
        Verb::Bench => {
            let plan = if arguments.tiny {
                bench::Plan::tiny()
            } else {
                bench::Plan::mistral_7b()
            };
            bench::run(&device, &plan, &mut |figure| say(figure.json()))?;
            Ok(true)
        }
    }
}
