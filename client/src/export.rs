//! An adapter taken out of a session: files received, checked, then put in place.
//!
//! Each file is written beside its final name and renamed only when all of them have arrived with
//! the announced size and SHA-256; a failed export leaves no file behind. Start at [`receive`].

use std::{
    io,
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};
use tokio::{fs, io::AsyncWriteExt as _};
use tonic::Streaming;

use crate::{
    Error,
    v1::{self, ExportAdapterResponse, ExportFinished, export_adapter_response::Message},
};

/// Files that an export may hold; PEFT's has two.
const MAX_FILES: usize = 16;

/// An adapter in the form of PEFT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// The files, in the order in which they came.
    pub files: Vec<ExportedFile>,
    /// The version that was exported.
    pub adapter_version: u64,
    /// Digest of its state, in hex.
    pub state_digest: String,
    /// Rank of the LoRA.
    pub rank: u32,
}

/// A file of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportedFile {
    /// Where it lies.
    pub path: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
    /// SHA-256 of its bytes, in hex.
    pub sha256: String,
}

/// A file that is being received.
struct Incoming {
    file: fs::File,
    announced: v1::ExportedFile,
    part: PathBuf,
    path: PathBuf,
    digest: Sha256,
    bytes: u64,
}

/// Writes the files of the stream into `folder`.
pub(crate) async fn receive(
    mut responses: Streaming<ExportAdapterResponse>,
    folder: &Path,
) -> Result<Export, Error> {
    fs::create_dir_all(folder).await.map_err(io_error(folder))?;
    let mut parts = Vec::new();
    let received = receive_parts(&mut responses, folder, &mut parts).await;
    match received {
        Ok(finished) => {
            let mut files = Vec::with_capacity(parts.len());
            for (part, file) in parts {
                fs::rename(&part, &file.path)
                    .await
                    .map_err(io_error(&file.path))?;
                files.push(file);
            }
            let ExportFinished {
                adapter_version,
                state_digest,
                rank,
            } = finished;
            Ok(Export {
                files,
                adapter_version,
                state_digest,
                rank,
            })
        }
        Err(error) => {
            for (part, _) in parts {
                // The first error is the one to tell of.
                let _ = fs::remove_file(part).await;
            }
            Err(error)
        }
    }
}

/// Receives into part files, which it lists in `parts` as it creates them.
async fn receive_parts(
    responses: &mut Streaming<ExportAdapterResponse>,
    folder: &Path,
    parts: &mut Vec<(PathBuf, ExportedFile)>,
) -> Result<ExportFinished, Error> {
    let mut incoming: Option<Incoming> = None;
    while let Some(response) = responses.message().await? {
        match response.message {
            Some(Message::File(announced)) => {
                if let Some(complete) = incoming.take() {
                    complete.close().await?;
                }
                if parts.len() == MAX_FILES {
                    return Err(Error::protocol("an export holds too many files"));
                }
                let opened = Incoming::open(folder, announced, parts).await?;
                incoming = Some(opened);
            }
            Some(Message::Data(data)) => match &mut incoming {
                Some(incoming) => incoming.write(&data).await?,
                None => return Err(Error::protocol("an export sent bytes before any file")),
            },
            Some(Message::Finished(finished)) => {
                if let Some(complete) = incoming.take() {
                    complete.close().await?;
                }
                return match responses.message().await? {
                    None => Ok(finished),
                    Some(_) => Err(Error::protocol("an export went on after `finished`")),
                };
            }
            None => return Err(Error::protocol("an export sent a message without content")),
        }
    }
    Err(Error::protocol("an export ended without `finished`"))
}

impl Incoming {
    async fn open(
        folder: &Path,
        announced: v1::ExportedFile,
        parts: &mut Vec<(PathBuf, ExportedFile)>,
    ) -> Result<Self, Error> {
        let name = &announced.name;
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        if name.is_empty() || name.len() > 128 || name.starts_with('.') || !name.bytes().all(plain)
        {
            return Err(Error::protocol(format!("an export names a file {name:?}")));
        }
        let path = folder.join(name);
        if parts.iter().any(|(_, file)| file.path == path) {
            return Err(Error::protocol(format!("an export holds {name} twice")));
        }
        let part = folder.join(format!(".{name}.part"));
        let file = fs::File::create(&part).await.map_err(io_error(&part))?;
        parts.push((
            part.clone(),
            ExportedFile {
                path: path.clone(),
                bytes: announced.size,
                sha256: announced.sha256.clone(),
            },
        ));
        Ok(Self {
            file,
            announced,
            part,
            path,
            digest: Sha256::new(),
            bytes: 0,
        })
    }

    async fn write(&mut self, data: &[u8]) -> Result<(), Error> {
        self.bytes += data.len() as u64;
        if self.bytes > self.announced.size {
            let what = format!("more than the announced {} bytes came", self.announced.size);
            return Err(self.integrity(what));
        }
        self.digest.update(data);
        self.file
            .write_all(data)
            .await
            .map_err(io_error(&self.part))
    }

    async fn close(mut self) -> Result<(), Error> {
        if self.bytes != self.announced.size {
            let what = format!(
                "{} of the announced {} bytes came",
                self.bytes, self.announced.size
            );
            return Err(self.integrity(what));
        }
        let digest = hex(&self.digest.finalize_reset());
        if !digest.eq_ignore_ascii_case(&self.announced.sha256) {
            let what = format!(
                "sha256 {} was announced, {digest} came",
                self.announced.sha256
            );
            return Err(self.integrity(what));
        }
        self.file.flush().await.map_err(io_error(&self.part))?;
        self.file.sync_all().await.map_err(io_error(&self.part))
    }

    fn integrity(&self, what: String) -> Error {
        Error::Integrity {
            file: self.path.display().to_string(),
            what,
        }
    }
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, source }
}

/// Bytes in lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
