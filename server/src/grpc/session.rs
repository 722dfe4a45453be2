//! SessionService: who carries an imprint.
//!
//! Checks labels, lifetimes, windows and masks; the sessions themselves are in `sessions`. Start at [`Service`].

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use imprint_proto::v1::{self, session_service_server::SessionService};
use prost::Message;
use tokio::sync::oneshot;
use tonic::{Request, Response, Status, async_trait};

use super::{Shared, at, count, duration, strategy, timestamp};
use crate::{
    edge::{deadline, tenant},
    sessions::{About, Page, Session, Wanted},
    status::{Error, Violation, echo},
};

/// Labels of a session.
const LABELS: usize = 64;
/// Bytes of a label's key.
const LABEL_KEY: usize = 63;
/// Bytes of a label's value.
const LABEL_VALUE: usize = 256;
/// Bytes of a client's name for a request.
const REQUEST_ID: usize = 128;
/// Bytes of a page of sessions, unless the first is larger: clients read messages of 4 MiB by default.
const PAGE_BYTES: usize = 1 << 20;
/// Bytes that stand before a session in a page, at most.
const FRAME: usize = 8;
/// The shortest time to live.
const SHORTEST: Duration = Duration::from_secs(1);

/// The service.
pub struct Service(pub Arc<Shared>);

impl Service {
    fn message(&self, session: &Session) -> v1::Session {
        let progress = session.progress().borrow().clone();
        let newest = progress.newest;
        let about = session.about().clone();
        v1::Session {
            session_id: session.name.clone(),
            model: self.0.model.clone(),
            strategy: strategy(session.strategy).into(),
            window: count(session.window),
            labels: about.labels.into_iter().collect(),
            ttl: about.ttl.map(duration),
            create_time: Some(timestamp(session.created)),
            update_time: Some(timestamp(about.used_time)),
            expire_time: about
                .ttl
                .and_then(|ttl| about.used_time.checked_add(ttl))
                .map(timestamp),
            adapter_version: progress.version(),
            state_digest: newest
                .map(|newest| newest.digest.to_string())
                .unwrap_or_default(),
            accepted_seq: progress.accepted,
            applied_seq: progress.applied(),
            context_tokens: newest.map_or(0, |newest| newest.tokens as u64),
            documents: count(session.document_count()),
            state_bytes: newest.map_or(0, |newest| newest.state_bytes as u64),
            trace_bytes: newest.map_or(0, |newest| newest.trace_bytes as u64),
            core_bytes: newest.map_or(0, |newest| newest.core_bytes as u64),
            forked_from: session.forked_from.clone().unwrap_or_default(),
        }
    }

    fn wanted(&self, request: &v1::CreateSessionRequest) -> Result<Wanted, Error> {
        self.0.check_model(&request.model)?;
        let generator = self
            .0
            .engine
            .model()
            .generator
            .as_ref()
            .ok_or(Error::NoGenerator)?;
        let mut violations = Vec::new();
        let strategy = match v1::Strategy::try_from(request.strategy) {
            Ok(v1::Strategy::Unspecified) => generator.strategy,
            Ok(v1::Strategy::Concat) => engine::Strategy::Concat,
            Ok(v1::Strategy::Parallel) => engine::Strategy::Parallel,
            Ok(v1::Strategy::Sequential) => engine::Strategy::Sequential,
            Err(_) => {
                violations.push(Violation::new(
                    "strategy",
                    format!("is {}, which is none", request.strategy),
                ));
                generator.strategy
            }
        };
        if request.request_id.len() > REQUEST_ID {
            violations.push(Violation::new(
                "request_id",
                format!("has more than {REQUEST_ID} bytes"),
            ));
        }
        let window = if request.window == 0 {
            generator.window
        } else {
            request.window as usize
        };
        let context = self.0.engine.model().context_length;
        if window > context {
            violations.push(Violation::new(
                "window",
                format!("is {window}, more than the model's {context}"),
            ));
        }
        let labels = labels("labels", &request.labels, &mut violations);
        let ttl = ttl("ttl", request.ttl, &mut violations);
        if violations.is_empty() {
            Ok(Wanted {
                strategy,
                window,
                labels,
                ttl,
            })
        } else {
            Err(Error::Invalid(violations))
        }
    }
}

fn labels(
    field: &str,
    labels: &HashMap<String, String>,
    violations: &mut Vec<Violation>,
) -> BTreeMap<String, String> {
    if labels.len() > LABELS {
        violations.push(Violation::new(
            field,
            format!("are {}, more than {LABELS}", labels.len()),
        ));
    }
    for (key, value) in labels {
        if key.is_empty() || key.len() > LABEL_KEY {
            violations.push(Violation::new(
                field,
                format!("have a key that is not of 1 to {LABEL_KEY} bytes"),
            ));
        }
        if value.len() > LABEL_VALUE {
            violations.push(Violation::new(
                field,
                format!("have a value of more than {LABEL_VALUE} bytes"),
            ));
        }
    }
    labels.clone().into_iter().collect()
}

fn ttl(
    field: &str,
    ttl: Option<prost_types::Duration>,
    violations: &mut Vec<Violation>,
) -> Option<Duration> {
    let ttl = ttl?;
    match Duration::try_from(ttl) {
        // The last second that a timestamp can show is in the year 9999; half of that is enough for anybody.
        Ok(ttl) if ttl >= SHORTEST && ttl.as_secs() < 100_000_000_000 => Some(ttl),
        _ => {
            violations.push(Violation::new(
                field,
                "is not from one second to 3,000 years",
            ));
            None
        }
    }
}

fn checked(violations: Vec<Violation>) -> Result<(), Error> {
    if violations.is_empty() {
        Ok(())
    } else {
        Err(Error::Invalid(violations))
    }
}

impl Service {
    /// Runs the work to its end, also if the caller's time is over or the caller goes away meanwhile: no session is left half
    /// open. One that nobody was told of ends, unless it is to be `kept` for the caller who asks again.
    async fn whole(
        &self,
        deadline: Option<Instant>,
        kept: bool,
        work: impl Future<Output = Result<Arc<Session>, Error>> + Send + 'static,
    ) -> Result<Arc<Session>, Error> {
        let shared = Arc::clone(&self.0);
        let (done, mut answer) = oneshot::channel();
        tokio::spawn(async move {
            if let Err(Ok(session)) = done.send(work.await)
                && !kept
            {
                shared.sessions.delete(&session);
            }
        });
        let panicked = |_| Error::Internal("a session's opening panicked");
        tokio::select! {
            answer = &mut answer => answer.map_err(panicked)?,
            () = at(deadline) => {
                answer.close();
                // It may have come at the last moment.
                answer
                    .try_recv()
                    .unwrap_or(Err(Error::Deadline("the session is not open")))
            }
        }
    }
}

#[async_trait]
impl SessionService for Service {
    async fn create_session(
        &self,
        request: Request<v1::CreateSessionRequest>,
    ) -> Result<Response<v1::CreateSessionResponse>, Status> {
        let (tenant, deadline) = (tenant(&request)?, deadline(&request));
        let request = request.into_inner();
        let wanted = self.wanted(&request)?;
        let shared = Arc::clone(&self.0);
        let kept = !request.request_id.is_empty();
        let create = async move {
            let create = shared.sessions.create(&tenant, &request.request_id, wanted);
            create.await
        };
        let session = self.whole(deadline, kept, create).await?;
        Ok(Response::new(v1::CreateSessionResponse {
            session: Some(self.message(&session)),
        }))
    }

    async fn get_session(
        &self,
        request: Request<v1::GetSessionRequest>,
    ) -> Result<Response<v1::GetSessionResponse>, Status> {
        let session = self
            .0
            .sessions
            .get(&tenant(&request)?, &request.get_ref().session_id)?;
        Ok(Response::new(v1::GetSessionResponse {
            session: Some(self.message(&session)),
        }))
    }

    async fn list_sessions(
        &self,
        request: Request<v1::ListSessionsRequest>,
    ) -> Result<Response<v1::ListSessionsResponse>, Status> {
        let tenant = tenant(&request)?;
        let v1::ListSessionsRequest {
            page_size,
            page_token,
        } = request.into_inner();
        let Page { sessions, mut more } = self.0.sessions.list(&tenant, page_size, &page_token)?;
        let (mut messages, mut bytes, mut last) = (Vec::new(), 0_usize, None);
        for session in &sessions {
            let message = self.message(session);
            bytes = bytes.saturating_add(message.encoded_len() + FRAME);
            if bytes > PAGE_BYTES && last.is_some() {
                more = true;
                break;
            }
            messages.push(message);
            last = Some(session);
        }
        let next = last.filter(|_| more);
        Ok(Response::new(v1::ListSessionsResponse {
            sessions: messages,
            next_page_token: next
                .map(|last| self.0.sessions.page_behind(&tenant, last))
                .unwrap_or_default(),
        }))
    }

    async fn update_session(
        &self,
        request: Request<v1::UpdateSessionRequest>,
    ) -> Result<Response<v1::UpdateSessionResponse>, Status> {
        let tenant = tenant(&request)?;
        let v1::UpdateSessionRequest {
            session: wanted,
            update_mask,
        } = request.into_inner();
        let required = |field| Error::Invalid(vec![Violation::new(field, "is required")]);
        let wanted = wanted.ok_or_else(|| required("session"))?;
        let mask = update_mask
            .filter(|mask| !mask.paths.is_empty())
            .ok_or_else(|| required("update_mask"))?;
        let session = self.0.sessions.get(&tenant, &wanted.session_id)?;
        let mut violations = Vec::new();
        let mut change = (None, None);
        for path in &mask.paths {
            match path.as_str() {
                "labels" => {
                    change.0 = Some(labels("session.labels", &wanted.labels, &mut violations))
                }
                "ttl" => change.1 = Some(ttl("session.ttl", wanted.ttl, &mut violations)),
                _ => violations.push(Violation::new(
                    "update_mask",
                    format!("names `{}`; `labels` and `ttl` can be changed", echo(path)),
                )),
            }
        }
        checked(violations)?;
        {
            let mut about = session.about();
            if let Some(labels) = change.0 {
                about.labels = labels;
            }
            if let Some(ttl) = change.1 {
                about.ttl = ttl;
            }
        }
        Ok(Response::new(v1::UpdateSessionResponse {
            session: Some(self.message(&session)),
        }))
    }

    async fn delete_session(
        &self,
        request: Request<v1::DeleteSessionRequest>,
    ) -> Result<Response<v1::DeleteSessionResponse>, Status> {
        let session = self
            .0
            .sessions
            .get(&tenant(&request)?, &request.get_ref().session_id)?;
        self.0.sessions.delete(&session);
        Ok(Response::new(v1::DeleteSessionResponse {}))
    }

    async fn fork_session(
        &self,
        request: Request<v1::ForkSessionRequest>,
    ) -> Result<Response<v1::ForkSessionResponse>, Status> {
        let (tenant, deadline) = (tenant(&request)?, deadline(&request));
        let from = self
            .0
            .sessions
            .get(&tenant, &request.get_ref().session_id)?;
        let request = request.into_inner();
        let mut violations = Vec::new();
        let labels = labels("labels", &request.labels, &mut violations);
        let ttl = ttl("ttl", request.ttl, &mut violations);
        checked(violations)?;
        let shared = Arc::clone(&self.0);
        let place = self.0.requests.take(&tenant)?;
        let user = from.user();
        // Who writes is waited for here: a call that is late or gone leaves nothing behind.
        let writer = tokio::select! {
            biased;
            () = at(deadline) => return Err(Error::Deadline("nothing is copied").into()),
            writer = from.writer() => writer?,
        };
        let copy = shared
            .sessions
            .fork(&from, &writer, About::new(labels, ttl))?;
        drop(writer);
        let fork = async move {
            let fork = shared.sessions.forked(&from, copy).await;
            drop((user, place));
            fork
        };
        let fork = self.whole(deadline, false, fork).await?;
        Ok(Response::new(v1::ForkSessionResponse {
            session: Some(self.message(&fork)),
        }))
    }

    async fn list_documents(
        &self,
        request: Request<v1::ListDocumentsRequest>,
    ) -> Result<Response<v1::ListDocumentsResponse>, Status> {
        let session = self
            .0
            .sessions
            .get(&tenant(&request)?, &request.get_ref().session_id)?;
        let documents = session
            .documents()
            .into_iter()
            .map(|document| v1::Document {
                document_id: document.name,
                tokens: document.tokens as u64,
                complete: document.complete,
                first_seq: document.first_seq,
                last_seq: document.last_seq,
            });
        Ok(Response::new(v1::ListDocumentsResponse {
            documents: documents.collect(),
        }))
    }

    async fn forget_document(
        &self,
        request: Request<v1::ForgetDocumentRequest>,
    ) -> Result<Response<v1::ForgetDocumentResponse>, Status> {
        let session = self
            .0
            .sessions
            .get(&tenant(&request)?, &request.get_ref().session_id)?;
        let user = session.user();
        let late = at(deadline(&request));
        let forget = session.forget(&request.get_ref().document_id, late);
        let (version, digest) = forget.await?;
        drop(user);
        Ok(Response::new(v1::ForgetDocumentResponse {
            adapter_version: version.0,
            state_digest: digest.to_string(),
        }))
    }
}
