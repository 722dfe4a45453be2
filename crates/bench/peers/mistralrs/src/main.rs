//! mistral.rs behind imprint's contract: an engine whose sessions keep their context as text and put it into every prompt.
//!
//! A peer that `imprint bench serve --endpoint` measures with the load of our own server, and an engine for models that imprint's
//! own forward does not know. One tenant; nothing is kept when it ends.
//!
//!     cargo run --release --manifest-path crates/bench/peers/mistralrs/Cargo.toml -- MODEL.gguf

mod answers;
mod contexts;
mod service;

use std::{
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
};

use anyhow::Result;
use clap::Parser;
use imprint_proto::v1::{
    self as v1, context_service_server::ContextServiceServer,
    generation_service_server::GenerationServiceServer, model_service_server::ModelServiceServer,
    session_service_server::SessionServiceServer,
};

use crate::{
    answers::Answers,
    contexts::{Bounds, Contexts},
    service::Service,
};

/// mistral.rs behind imprint's contract; contexts stand in the prompts.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// A GGUF file, or a folder or repository with safetensors.
    model: String,
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:50051")]
    listen: SocketAddr,
    /// Sequences that run at once.
    #[arg(long, default_value_t = 16)]
    running: usize,
    /// Sessions at most.
    #[arg(long, default_value_t = 1024)]
    sessions: usize,
    /// Bytes of text of a session at most.
    #[arg(long, default_value_t = 256 * 1024)]
    session_bytes: usize,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    let answers = Answers::load(&args.model, args.running).await?;
    let path = Path::new(&args.model);
    let name = path
        .file_stem()
        .map_or(args.model.as_str().into(), |stem| stem.to_string_lossy());
    let model = v1::Model {
        name: name.into_owned(),
        architecture: "mistral.rs".to_owned(),
        context_length: answers.context_length(),
        ..v1::Model::default()
    };
    let bounds = Bounds {
        sessions: args.sessions,
        bytes: args.session_bytes,
        chunks: args.session_bytes / 8,
    };
    let service = Service {
        contexts: Arc::new(Mutex::new(Contexts::new(model.name.clone(), bounds))),
        answers: Arc::new(answers),
        model,
    };

    eprintln!("listening on http://{}", args.listen);
    tonic::transport::Server::builder()
        .add_service(ModelServiceServer::new(service.clone()))
        .add_service(SessionServiceServer::new(service.clone()))
        .add_service(ContextServiceServer::new(service.clone()))
        .add_service(GenerationServiceServer::new(service))
        .serve_with_shutdown(args.listen, async { drop(tokio::signal::ctrl_c().await) })
        .await?;
    Ok(())
}
