//! `imprint ingest`: a text file or standard input becomes a document of a session.
//!
//! The text is cut into chunks of equal size at character borders, so the same file is cut the same
//! way again: a resumed document is sent from its first chunk, the server compares what it has and
//! applies only what is new. Without `--resume` a document of the same name is an error, never a
//! second copy. Start at [`run`].

use std::{path::Path, time::Duration};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt as _};

use super::{Failure, IngestArgs, Output, view};
use crate::{Client, Ingest, IngestOptions, v1::CreateSessionRequest};

pub(super) async fn run(
    client: &Client,
    args: &IngestArgs,
    output: &mut Output,
) -> Result<(), Failure> {
    let from_stdin = args.file == Path::new("-");
    if args.resume && args.session == "new" {
        return Err(Failure::Usage(
            "a new session has nothing to resume".to_owned(),
        ));
    }
    let document = match (&args.document, from_stdin) {
        (Some(name), _) => name.clone(),
        (None, true) if args.resume => {
            return Err(Failure::Usage(
                "--resume needs the --document that broke off".to_owned(),
            ));
        }
        (None, true) => String::new(),
        (None, false) => file_name(&args.file)?,
    };
    if from_stdin {
        let text = Chunks::new(tokio::io::stdin(), "standard input", args.chunk_bytes);
        return ingest(client, args, &document, text, None, output).await;
    }
    let name = args.file.display().to_string();
    let input = |source| Failure::Input {
        name: name.clone(),
        source,
    };
    let file = tokio::fs::File::open(&args.file).await.map_err(input)?;
    let size = file.metadata().await.map_err(input)?.len();
    let text = Chunks::new(file, &name, args.chunk_bytes);
    ingest(client, args, &document, text, Some(size), output).await
}

async fn ingest<R: AsyncRead + Unpin>(
    client: &Client,
    args: &IngestArgs,
    document: &str,
    mut text: Chunks<R>,
    size: Option<u64>,
    output: &mut Output,
) -> Result<(), Failure> {
    // Reads before it creates anything: what cannot be read leaves no empty session behind.
    let Some(mut chunk) = text.next().await? else {
        return Err(Failure::Usage(format!("{} holds no text", text.name)));
    };
    let session_id = match args.session.as_str() {
        "new" => {
            client
                .create_session(CreateSessionRequest::default())
                .await?
                .session_id
        }
        session => session.to_owned(),
    };
    let first_seq = first_seq(client, &session_id, document, args.resume).await?;
    let mut stream = client
        .ingest(
            &session_id,
            IngestOptions {
                first_seq,
                ..IngestOptions::default()
            },
        )
        .await?;
    stream.document(document);
    let bar = progress(size);
    let (mut chunks, mut bytes) = (0_u64, 0_u64);
    loop {
        let next = text.next().await?;
        let length = chunk.len() as u64;
        match next {
            Some(_) => stream.text(chunk).await?,
            None => stream.last_text(chunk).await?,
        };
        chunks += 1;
        bytes += length;
        bar.inc(length);
        tell(&mut stream, &bar, output)?;
        match next {
            Some(next) => chunk = next,
            None => break,
        }
    }
    bar.set_message("reading on");
    let applied = stream.finish().await?;
    tell(&mut stream, &bar, output)?;
    bar.finish_and_clear();
    let session = client.get_session(&session_id).await?;
    if output.json() {
        return Ok(output.document(&json!({
            "session_id": session_id,
            "document_id": document,
            "chunks": chunks,
            "duplicates": stream.duplicates(),
            "bytes": bytes,
            "applied": applied.as_ref().map(view::applied),
            "session": view::session(&session),
        }))?);
    }
    let again = match stream.duplicates() {
        0 => String::new(),
        duplicates => format!(" ({duplicates} of {chunks} chunks were there before)"),
    };
    output.line(format!(
        "{session_id}: version {}, {} context tokens; {} of text sent{again}",
        session.adapter_version,
        session.context_tokens,
        view::bytes(bytes),
    ))?;
    Ok(())
}

/// Shows the versions that came: for programs a line each, for people the last one beside the bar.
fn tell(stream: &mut Ingest, bar: &ProgressBar, output: &mut Output) -> Result<(), Failure> {
    for applied in stream.take_applied() {
        if output.json() {
            output.document(&json!({ "applied": view::applied(&applied) }))?;
        }
        bar.set_message(format!(
            "version {}, {} tokens",
            applied.adapter_version, applied.tokens
        ));
    }
    Ok(())
}

/// Where a document begins: `None` for one that the session does not have, else its first `seq`.
async fn first_seq(
    client: &Client,
    session_id: &str,
    document: &str,
    resume: bool,
) -> Result<Option<u64>, Failure> {
    if document.is_empty() {
        return Ok(None);
    }
    let documents = client.list_documents(session_id).await?;
    let known = documents
        .into_iter()
        .find(|known| known.document_id == document);
    match known {
        None => Ok(None),
        Some(known) if resume => Ok(Some(known.first_seq)),
        Some(_) => Err(Failure::Usage(format!(
            "the session has a document {document:?}: --resume goes on with it, --document gives another name"
        ))),
    }
}

/// The last part of a path, as a document's name.
fn file_name(path: &Path) -> Result<String, Failure> {
    match path.file_name().and_then(|name| name.to_str()) {
        Some(name) if name.len() <= 256 => Ok(name.to_owned()),
        _ => Err(Failure::Usage(format!(
            "{} gives no name for a document; give one by --document",
            path.display()
        ))),
    }
}

/// A bar of bytes where the size is known, else a counter; shown only on a terminal.
fn progress(size: Option<u64>) -> ProgressBar {
    let (bar, template) = match size {
        Some(size) => (
            ProgressBar::new(size),
            "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {msg}",
        ),
        None => (
            ProgressBar::no_length(),
            "{spinner} {bytes} {bytes_per_sec} {msg}",
        ),
    };
    bar.enable_steady_tick(Duration::from_millis(200));
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// A text in pieces of at most so many bytes, each cut at a character's border.
struct Chunks<R> {
    source: R,
    name: String,
    chunk_bytes: usize,
    pending: Vec<u8>, // read, not yet handed out: at most a chunk
    before: u64,      // bytes handed out
    at_end: bool,
}

impl<R: AsyncRead + Unpin> Chunks<R> {
    /// `chunk_bytes` is at least 4, so that every character fits.
    fn new(source: R, name: &str, chunk_bytes: u32) -> Self {
        let chunk_bytes = usize::try_from(chunk_bytes).unwrap_or(usize::MAX).max(4);
        Self {
            source,
            name: name.to_owned(),
            chunk_bytes,
            pending: Vec::new(),
            before: 0,
            at_end: false,
        }
    }

    /// The next piece, never empty; `None` at the end of the text.
    async fn next(&mut self) -> Result<Option<String>, Failure> {
        while !self.at_end && self.pending.len() < self.chunk_bytes {
            let room = (self.chunk_bytes - self.pending.len()) as u64;
            let read = (&mut self.source)
                .take(room)
                .read_to_end(&mut self.pending)
                .await;
            let read = read.map_err(|source| Failure::Input {
                name: self.name.clone(),
                source,
            })?;
            self.at_end = read == 0;
        }
        let whole = match std::str::from_utf8(&self.pending) {
            Ok(text) => text.len(),
            // A character that is cut by the chunk's end waits for the next piece.
            Err(error) if error.error_len().is_none() && !self.at_end => error.valid_up_to(),
            Err(error) => {
                let at = self.before + error.valid_up_to() as u64;
                return Err(Failure::NotText {
                    name: self.name.clone(),
                    at,
                });
            }
        };
        if whole == 0 {
            return Ok(None);
        }
        let rest = self.pending.split_off(whole);
        let piece = std::mem::replace(&mut self.pending, rest);
        self.before += whole as u64;
        let name = &self.name;
        let piece = String::from_utf8(piece).map_err(|error| Failure::NotText {
            name: name.clone(),
            at: error.utf8_error().valid_up_to() as u64,
        })?;
        Ok(Some(piece))
    }
}

#[cfg(test)]
mod tests;
