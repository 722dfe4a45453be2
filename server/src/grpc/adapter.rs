//! AdapterService: what can be taken away.
//!
//! Start at [`Service`].

use std::sync::Arc;

use engine::{Command, Event};
use imprint_proto::v1::{
    self, adapter_service_server::AdapterService, export_adapter_response::Message,
};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, async_trait};

use super::{Shared, count};
use crate::{edge::tenant, engine_thread::Reply, status::Error};

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
        let session = self
            .0
            .sessions
            .get(&tenant(&request)?, &request.get_ref().session_id)?;
        let permit = self.0.admit()?;
        let request = self.0.request_id();
        let mut replies = self
            .0
            .engine
            .request(
                Command::Export {
                    request,
                    session: session.id,
                },
                1,
            )
            .await?;
        let exported = match replies.recv().await {
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
        let (pieces, receiver) = mpsc::channel(PIECES);
        let user = session.user();
        tokio::spawn(async move {
            for (name, bytes) in [
                ("adapter_config.json", config_json),
                ("adapter_model.safetensors", safetensors),
            ] {
                let file = v1::ExportedFile {
                    name: name.to_owned(),
                    size: bytes.len() as u64,
                    sha256: hex(&Sha256::digest(&bytes)),
                };
                let head = std::iter::once(Message::File(file));
                for message in head.chain(
                    bytes
                        .chunks(PIECE)
                        .map(|piece| Message::Data(piece.to_vec())),
                ) {
                    if pieces
                        .send(Ok(v1::ExportAdapterResponse {
                            message: Some(message),
                        }))
                        .await
                        .is_err()
                    {
                        return; // the reader has gone
                    }
                }
            }
            let message = Some(Message::Finished(finished));
            drop(pieces.send(Ok(v1::ExportAdapterResponse { message })).await);
            drop((user, permit));
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// Bytes in hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
