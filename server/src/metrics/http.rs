//! `GET /metrics` over plain HTTP/1.1, on an address of its own.
//!
//! One answer a connection, few connections at once, each ended after a while: who asks slowly keeps nobody else. No keys are
//! asked for: nothing that is told names a session, a tenant or a text. Start at [`serve`].

use std::{convert::Infallible, future::ready, sync::Arc, time::Duration};

use hyper::{
    Method, Request, Response, StatusCode, body::Incoming, header, server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::Semaphore};

use super::Metrics;

/// Connections at once; more wait to be taken.
const CONNECTIONS: usize = 16;
/// How long a connection may take from its beginning to its end.
const PATIENCE: Duration = Duration::from_secs(5);
/// What a request's head may take.
const HEAD_BYTES: usize = 16 << 10;
/// Rest after a connection that could not be taken, as when the process is out of file descriptors.
const REST: Duration = Duration::from_millis(100);

/// Answers for as long as the task is not aborted.
pub async fn serve(listener: TcpListener, metrics: Arc<Metrics>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // Nobody closes the semaphore.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(REST).await;
            continue;
        };
        let metrics = Arc::clone(&metrics);
        tokio::spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                ready(Ok::<_, Infallible>(answer(&request, &metrics)))
            });
            let connection = http1::Builder::new()
                .keep_alive(false)
                .max_buf_size(HEAD_BYTES)
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .serve_connection(TokioIo::new(stream), service);
            // Who went away or was too slow gets nothing more, and nobody else is to be told.
            drop(tokio::time::timeout(PATIENCE, connection).await);
            drop(place);
        });
    }
}

fn answer<T>(request: &Request<T>, metrics: &Metrics) -> Response<String> {
    let (status, body) = if request.uri().path() != "/metrics" {
        (StatusCode::NOT_FOUND, "there is /metrics\n".to_owned())
    } else if !matches!(*request.method(), Method::GET | Method::HEAD) {
        (StatusCode::METHOD_NOT_ALLOWED, "GET it\n".to_owned())
    } else {
        (StatusCode::OK, metrics.text())
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"),
    );
    response
}
