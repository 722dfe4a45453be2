//! AdapterService: what can be taken away.
//!
//! Start at [`Service`].

use std::{sync::Arc, time::Instant};

use engine::{Command, Event};
use imprint_proto::v1::{
    self, adapter_service_server::AdapterService, export_adapter_response::Message,
};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, async_trait};

use super::{Shared, at, count};
use crate::{
    edge::{deadline, tenant},
    engine_thread::Reply,
    status::Error,
};

/// Bytes of a piece.
const PIECE: usize = 64 << 10;
/// Pieces that wait for the reader.
const PIECES: usize = 4;

/// The service.
pub struct Service(pub Arc<Shared>);

#[async_trait]
impl AdapterService for Service {
    type ExportAdapterStream = ReceiverStream<Result<v1::ExportAdapterResponse, Status>>;

    async fn export_adapter(
        &self,
        request: Request<v1::ExportAdapterRequest>,
    ) -> Result<Response<Self::ExportAdapterStream>, Status> {
        let (tenant, deadline) = (tenant(&request)?, deadline(&request));
        let session = self
            .0
            .sessions
            .get(&tenant, &request.get_ref().session_id)?;
        let place = self.0.requests.take(&tenant)?;
        let request = self.0.request_id();
        let command = Command::Export {
            request,
            session: session.id,
        };
        // Late, it is exported for nobody: nothing of the session changes.
        let reply = async {
            let mut replies = self.0.engine.request(command, Instant::now(), 1).await?;
            Ok::<_, Error>(replies.recv().await)
        };
        let reply = tokio::select! {
            reply = reply => reply?,
            () = at(deadline) => return Err(Error::Deadline("exporting").into()),
        };
        let exported = match reply {
            Some(Reply::Event(exported @ Event::Exported { .. })) => exported,
            Some(Reply::Event(Event::Failed { error, .. })) => {
                return Err(Error::Request(error).into());
            }
            Some(Reply::Overloaded) => return Err(Error::Busy { what: "requests" }.into()),
            Some(Reply::Event(_)) => {
                return Err(Error::Internal("the engine answered something else").into());
            }
            None => return Err(Error::EngineStopped.into()),
        };
        let Event::Exported {
            config_json,
            safetensors,
            rank,
            version,
            digest,
            ..
        } = exported
        else {
            return Err(Error::Internal("the engine answered something else").into());
        };
        let finished = v1::ExportFinished {
            adapter_version: version.0,
            state_digest: digest.to_string(),
            rank: count(rank),
        };
        let files = [
            ("adapter_config.json", config_json),
            ("adapter_model.safetensors", safetensors),
        ];
        let (pieces, receiver) = mpsc::channel(PIECES + 1);
        // One place is kept for an error: a slow reader learns that its time is over.
        let last = pieces.clone().try_reserve_owned();
        let last = last.map_err(|_| Error::Internal("a new queue is full"))?;
        let user = session.user();
        tokio::spawn(async move {
            let late = tokio::select! {
                () = send(&pieces, files, finished) => None,
                () = at(deadline) => Some(Error::Deadline("the reader is slow")),
            };
            if let Some(late) = late {
                last.send(Err(late.into()));
            }
            drop((user, place));
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// Sends the files piece by piece, and the end; stops if the reader has gone.
async fn send(
    pieces: &mpsc::Sender<Result<v1::ExportAdapterResponse, Status>>,
    files: [(&str, Vec<u8>); 2],
    finished: v1::ExportFinished,
) {
    let send = async |message| {
        let message = Some(message);
        let sent = pieces.send(Ok(v1::ExportAdapterResponse { message })).await;
        sent.is_ok()
    };
    for (name, bytes) in files {
        let file = v1::ExportedFile {
            name: name.to_owned(),
            size: bytes.len() as u64,
            sha256: hex(&Sha256::digest(&bytes)),
        };
        if !send(Message::File(file)).await {
            return;
        }
        for piece in bytes.chunks(PIECE) {
            if !send(Message::Data(piece.to_vec())).await {
                return;
            }
        }
    }
    send(Message::Finished(finished)).await;
}

/// Bytes in hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
