//! `fewbit serve`: a server for OpenAI's clients.
//!
//! Connections and requests live on a tokio runtime; the model lives on one thread of its own, the worker, which
//! owns the sessions and writes all texts in one pass. Between the two go jobs and events; neither waits for the
//! other.

mod api;
mod app;
mod error;
mod guard;
mod job;
mod listen;
mod metrics;
mod page;
mod tools;
mod worker;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

pub use listen::Ended;
pub use worker::Share;

use app::App;
use metrics::Metrics;
use worker::Worker;

use crate::chat::Template;
use crate::engine::Engine;
use crate::sampler::Settings;

/// What the operator chooses.
#[derive(Clone, Debug)]
pub struct Config {
    /// The model's name in answers.
    pub name: String,
    /// How tokens are chosen where a request does not say.
    pub settings: Settings,
    /// Tokens of an answer at most.
    pub limit: Option<usize>,
    /// Texts that may wait for a slot.
    pub queue: usize,
    /// What clients must send as `Authorization: Bearer …`.
    pub key: Option<String>,
    /// Web origins whose pages may use the server; `*` for all.
    pub origins: Vec<String>,
    /// Bytes of a request's body at most.
    pub body_limit: usize,
    /// Connections at most.
    pub connections: usize,
    /// How long a client may take to send a request's head, then its body, and to take what it is sent.
    pub patience: Duration,
    /// How long requests may go on when the server is told to end.
    pub grace: Duration,
}

/// Why the server does not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model.
    #[error(transparent)]
    Engine(#[from] crate::engine::Error),
    /// The model's chat template.
    #[error(transparent)]
    Chat(#[from] crate::chat::Error),
    /// The address.
    #[error("cannot listen on {address}: {source}; give another --port or --host")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The runtime cannot start, or signals cannot be received.
    #[error("cannot start the server: {0}")]
    Runtime(std::io::Error),
    /// The thread that runs the model is gone.
    #[error("the thread that runs the model ended: this is a fault of fewbit")]
    Worker,
}

/// Serves on `address` until a signal ends it: once for the requests at hand to be finished, twice for none. `load`
/// runs on the thread that will run the model; `ready` is told the address, with the port that was chosen for port 0.
///
/// # Errors
/// See [`Error`].
pub fn serve(
    address: SocketAddr,
    config: Config,
    load: impl FnOnce() -> Result<(Arc<Engine>, Share), Error> + Send + 'static,
    template: impl FnOnce(&Engine) -> Result<Template, crate::chat::Error>,
    ready: impl FnOnce(SocketAddr),
) -> Result<Ended, Error> {
    let listen = |source| Error::Listen { address, source };
    // Before the model is loaded: that takes longer.
    let listener = TcpListener::bind(address).map_err(listen)?;
    let bound = listener.local_addr().map_err(listen)?;
    let metrics = Arc::new(Metrics::default());
    let (worker, engine, share) = Worker::start(load, Arc::clone(&metrics))?;
    let template = template(&engine)?;
    let open = bound.ip().is_loopback() && config.key.is_none();
    let app = App::new(engine, template, config, share, metrics, worker.jobs);
    let app = Arc::new(app);
    let router = guard::around(api::router(Arc::clone(&app)), &app, open);

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(4)
        .thread_name("http")
        .enable_all()
        .build()
        .map_err(Error::Runtime)?;
    let limits = listen::Limits::of(&app.config);
    drop(app);
    let ended = runtime.block_on(async move {
        let served = listen::serve(listener, router, limits, || ready(bound));
        tokio::select! {
            ended = served => ended,
            _ = worker.ended => Err(Error::Worker),
        }
    });
    // With the last connection goes the last way to the worker, which then ends.
    runtime.shutdown_timeout(Duration::from_secs(1));
    if worker.thread.join().is_err() {
        return Err(Error::Worker);
    }
    ended
}
