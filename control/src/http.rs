//! `/metrics`, `/healthz`, `/readyz`. A slow or greedy client costs a bounded amount.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::core::{Control, lock};
use crate::metrics::Exporter;

/// Connections at a time; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 64;
/// Request head, bytes.
const MAX_HEAD: usize = 16 * 1024;
/// Time for a request head.
const HEAD_TIME: Duration = Duration::from_secs(5);
/// Longest life of a connection, keep-alive included.
const LIFE: Duration = Duration::from_secs(120);

type Answer = Response<Full<Bytes>>;

/// Serves until cancelled.
pub async fn serve(listener: TcpListener, control: Arc<Mutex<Control>>, exporter: Arc<Exporter>) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // A closed semaphore cannot be: it lives here.
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) => {
                // Out of descriptors, most likely: let some connections end first.
                tracing::warn!(error = %e, "HTTP connection refused");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let control = Arc::clone(&control);
        let exporter = Arc::clone(&exporter);
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let answer = answer(&request, &control, &exporter);
                async move { Ok::<_, Infallible>(answer) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIME)
                .max_buf_size(MAX_HEAD)
                .max_headers(64)
                .serve_connection(TokioIo::new(stream), service);
            // A client that breaks the protocol or the limits is its own punishment.
            let _ = tokio::time::timeout(LIFE, connection).await;
            drop(permit);
        });
    }
}

/// Binds the listener.
///
/// # Errors
/// The address is in use or not ours.
pub fn bind(addr: SocketAddr) -> std::io::Result<std::net::TcpListener> {
    let listener = std::net::TcpListener::bind(addr)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn answer(
    request: &Request<Incoming>,
    control: &Arc<Mutex<Control>>,
    exporter: &Exporter,
) -> Answer {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut r = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
        r.headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return r;
    }
    match request.uri().path() {
        "/metrics" => match exporter.scrape() {
            Ok(body) => respond(StatusCode::OK, Exporter::content_type(), body),
            Err(e) => text(StatusCode::INTERNAL_SERVER_ERROR, &format!("{e}\n")),
        },
        "/healthz" => match lock(control).problem() {
            None => text(StatusCode::OK, "ok\n"),
            Some(what) => text(StatusCode::SERVICE_UNAVAILABLE, &format!("{what}\n")),
        },
        "/readyz" => ready(&lock(control)),
        "/" => text(StatusCode::OK, "esplanade: /metrics /healthz /readyz\n"),
        _ => text(StatusCode::NOT_FOUND, "not found\n"),
    }
}

/// Ready: a configuration runs and the workers do. A refused reload does not change that, but is shown.
fn ready(control: &Control) -> Answer {
    let problem = control.problem();
    let ready = control.is_ready() && problem.is_none();
    let body = serde_json::json!({ "ready": ready, "problem": problem, "last_reload": control.last_reload() });
    let status = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    respond(status, "application/json", format!("{body}\n").into_bytes())
}

fn text(status: StatusCode, body: &str) -> Answer {
    respond(
        status,
        "text/plain; charset=utf-8",
        body.as_bytes().to_vec(),
    )
}

fn respond(status: StatusCode, kind: &'static str, body: Vec<u8>) -> Answer {
    let mut r = Response::new(Full::new(Bytes::from(body)));
    *r.status_mut() = status;
    r.headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    r.headers_mut()
        .insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    r
}
