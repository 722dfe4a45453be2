//! `imprint session`, `export` and `forget`: what becomes of sessions and of what they hold.
//!
//! Start at [`session`].

use std::time::Duration;

use serde_json::json;

use super::{
    Align, ExportArgs, Failure, ForgetArgs, GivenArgs, Output, SessionAction, table, view,
};
use crate::{
    Client,
    client::duration,
    v1::{self, CreateSessionRequest, Document, ForkSessionRequest, Session},
};

pub(super) async fn session(
    client: &Client,
    action: SessionAction,
    output: &mut Output,
) -> Result<(), Failure> {
    match action {
        SessionAction::Ls => list(&client.list_sessions().await?, output),
        SessionAction::Show { session } => {
            let documents = client.list_documents(&session).await?;
            show(&client.get_session(&session).await?, &documents, output)
        }
        SessionAction::Rm { sessions } => {
            for session in sessions {
                client.delete_session(&session).await?;
                if output.json() {
                    output.document(&json!({"deleted": session}))?;
                } else {
                    output.line(format!("{session} is gone"))?;
                }
            }
            Ok(())
        }
        SessionAction::Fork { session, given } => {
            let GivenArgs { labels, ttl } = given;
            let request = ForkSessionRequest {
                session_id: session,
                labels: labels.into_iter().collect(),
                ttl: ttl.map(Duration::from_secs).map(duration),
            };
            created(&client.fork_session(request).await?, output)
        }
        SessionAction::Create {
            model,
            strategy,
            window,
            request_id,
            given,
        } => {
            let GivenArgs { labels, ttl } = given;
            let strategy = strategy.map_or(v1::Strategy::Unspecified, v1::Strategy::from);
            let request = CreateSessionRequest {
                model,
                strategy: strategy.into(),
                window,
                labels: labels.into_iter().collect(),
                ttl: ttl.map(Duration::from_secs).map(duration),
                request_id,
            };
            created(&client.create_session(request).await?, output)
        }
    }
}

pub(super) async fn export(
    client: &Client,
    args: &ExportArgs,
    output: &mut Output,
) -> Result<(), Failure> {
    let export = client.export_adapter(&args.session, &args.out).await?;
    if output.json() {
        let files = export
            .files
            .iter()
            .map(|file| json!({"path": file.path, "bytes": file.bytes, "sha256": file.sha256}));
        output.document(&json!({
            "files": files.collect::<Vec<_>>(),
            "adapter_version": export.adapter_version,
            "state_digest": export.state_digest,
            "rank": export.rank,
        }))?;
        return Ok(());
    }
    for file in &export.files {
        output.line(format!(
            "{}  {}",
            file.path.display(),
            view::bytes(file.bytes)
        ))?;
    }
    output.line(format!(
        "version {} of {} as a LoRA of rank {}",
        export.adapter_version, args.session, export.rank
    ))?;
    Ok(())
}

pub(super) async fn forget(
    client: &Client,
    args: &ForgetArgs,
    output: &mut Output,
) -> Result<(), Failure> {
    let forgotten = client
        .forget_document(&args.session, &args.document)
        .await?;
    if output.json() {
        output.document(&json!({
            "forgotten": args.document,
            "adapter_version": forgotten.adapter_version,
            "state_digest": forgotten.state_digest,
        }))?;
    } else {
        let version = forgotten.adapter_version;
        output.line(format!(
            "{} is forgotten from version {version} on",
            args.document
        ))?;
    }
    Ok(())
}

fn list(sessions: &[Session], output: &mut Output) -> Result<(), Failure> {
    if output.json() {
        let sessions: Vec<_> = sessions.iter().map(view::session).collect();
        output.document(&json!({ "sessions": sessions }))?;
        return Ok(());
    }
    let rows: Vec<[String; 6]> = sessions
        .iter()
        .map(|session| {
            [
                session.session_id.clone(),
                session.model.clone(),
                session.adapter_version.to_string(),
                session.context_tokens.to_string(),
                session.documents.to_string(),
                session
                    .update_time
                    .as_ref()
                    .map_or_else(String::new, ToString::to_string),
            ]
        })
        .collect();
    let columns = [
        ("SESSION", Align::Left),
        ("MODEL", Align::Left),
        ("VERSION", Align::Right),
        ("TOKENS", Align::Right),
        ("DOCUMENTS", Align::Right),
        ("USED", Align::Left),
    ];
    output.line(table(columns, &rows))?;
    Ok(())
}

fn show(session: &Session, documents: &[Document], output: &mut Output) -> Result<(), Failure> {
    if output.json() {
        let documents: Vec<_> = documents.iter().map(view::document).collect();
        output.document(&json!({"session": view::session(session), "documents": documents}))?;
        return Ok(());
    }
    let time = |time: &Option<prost_types::Timestamp>| {
        time.as_ref()
            .map_or_else(|| "-".to_owned(), ToString::to_string)
    };
    let mut labels: Vec<String> = session
        .labels
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    labels.sort();
    for (name, value) in [
        ("session", session.session_id.clone()),
        ("model", session.model.clone()),
        ("strategy", view::strategy(session.strategy()).to_owned()),
        ("window", format!("{} tokens", session.window)),
        ("version", session.adapter_version.to_string()),
        ("digest", session.state_digest.clone()),
        ("context", format!("{} tokens", session.context_tokens)),
        (
            "seq",
            format!(
                "{} accepted, {} applied",
                session.accepted_seq, session.applied_seq
            ),
        ),
        ("state", view::bytes(session.state_bytes)),
        ("traces", view::bytes(session.trace_bytes)),
        ("core", view::bytes(session.core_bytes)),
        (
            "labels",
            if labels.is_empty() {
                "-".to_owned()
            } else {
                labels.join(" ")
            },
        ),
        ("created", time(&session.create_time)),
        ("used", time(&session.update_time)),
        ("ends", time(&session.expire_time)),
    ] {
        output.line(format!("{name:<9} {value}"))?;
    }
    if !session.forked_from.is_empty() {
        output.line(format!("forked    {}", session.forked_from))?;
    }
    if documents.is_empty() {
        return Ok(());
    }
    let rows: Vec<[String; 4]> = documents
        .iter()
        .map(|document| {
            [
                document.document_id.clone(),
                document.tokens.to_string(),
                if document.complete {
                    "complete"
                } else {
                    "open"
                }
                .to_owned(),
                format!("{}-{}", document.first_seq, document.last_seq),
            ]
        })
        .collect();
    let columns = [
        ("DOCUMENT", Align::Left),
        ("TOKENS", Align::Right),
        ("STATE", Align::Left),
        ("SEQ", Align::Left),
    ];
    output.line("")?;
    output.line(table(columns, &rows))?;
    Ok(())
}

fn created(session: &Session, output: &mut Output) -> Result<(), Failure> {
    if output.json() {
        output.document(&view::session(session))?;
    } else {
        output.line(&session.session_id)?;
    }
    Ok(())
}
