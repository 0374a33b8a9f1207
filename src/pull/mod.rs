//! Downloads: models from Hugging Face hubs and plain URLs.
//!
//! A file grows as `NAME.part` beside its name and gets that name when it is whole and its SHA-256 is the one that
//! the hub (or the user) says. What was cut off, by the network or the user, goes on from where it stopped.
//!
//! Requests go through `ureq`: blocking, small, and with rustls and graviola free of C and of OpenSSL. (hf-hub brings a
//! second asynchronous client and a cache layout of its own, and checks no hashes.)

mod http;
mod hub;
mod source;
mod transfer;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ureq::Body;
use ureq::http::{Response, StatusCode, Uri, header};

use http::Http;
pub use http::Retry;
pub use source::{HubSource, NoSource, Part, Source};

/// Where hubs are asked unless `HF_ENDPOINT` says otherwise.
pub const ENDPOINT: &str = "https://huggingface.co";

/// How to pull.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where models are put ([`crate::store::folder`]).
    pub folder: PathBuf,
    /// The hub.
    pub endpoint: String,
    /// What the hub knows the user by; it is sent nowhere else.
    pub token: Option<String>,
    /// The SHA-256 that a plain URL's file must have.
    pub sha256: Option<String>,
    /// The checkpoint (safetensors) and not a GGUF file.
    pub checkpoint: bool,
    /// What is done about failures that may pass.
    pub retry: Retry,
}

impl Options {
    /// Into `folder`, from the hub and with the token that the environment names (`HF_ENDPOINT`, `HF_TOKEN`).
    pub fn from_environment(folder: PathBuf) -> Self {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self {
            folder,
            endpoint: variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned()),
            token: variable("HF_TOKEN"),
            sha256: None,
            checkpoint: false,
            retry: Retry::default(),
        }
    }
}

/// Told what happens.
pub trait Watch {
    /// A file begins: its name, its length where that is known, and how much of it is there already.
    fn begin(&self, name: &str, bytes: Option<u64>, there: u64);
    /// So many bytes came.
    fn advance(&self, bytes: u64);
    /// `error` happened; the same is tried again after `wait`.
    fn retry(&self, error: &Error, wait: Duration);
}

/// What was pulled.
#[derive(Clone, Debug)]
pub struct Pulled {
    /// The files, the one to load first.
    pub files: Vec<PathBuf>,
    /// Their SHA-256, where one was known to compare with.
    pub sha256: Vec<Option<String>>,
    /// Bytes in all.
    pub bytes: u64,
    /// Bytes that came now; the others were there.
    pub downloaded: u64,
    /// The folder, for a checkpoint.
    pub checkpoint: Option<PathBuf>,
}

/// Why nothing was pulled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No address.
    #[error("{url}: not an address (http://HOST/… or https://HOST/…)")]
    Url {
        /// What there is instead.
        url: String,
    },
    /// A checksum that is none.
    #[error("--sha256 {0:?}: must be 64 hexadecimal digits")]
    Checksum(String),
    /// Something that holds for plain URLs only, or for hubs only.
    #[error("{0}")]
    Usage(&'static str),
    /// TLS cannot be spoken here.
    #[error("https needs a CPU with {needs}; download the file elsewhere")]
    Tls {
        /// What the CPU lacks.
        needs: &'static str,
    },
    /// The user's certificates cannot be read.
    #[error("{}: SSL_CERT_FILE: {problem}", file.display())]
    Certificates {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The connection failed or was cut.
    #[error("{url}: {source}")]
    Connection {
        /// The address.
        url: String,
        /// What happened.
        source: ureq::Error,
    },
    /// The file ended too early.
    #[error("{url}: cut off at byte {at} of {bytes}")]
    Cut {
        /// The address.
        url: String,
        /// Bytes that came.
        at: u64,
        /// Bytes there are.
        bytes: u64,
    },
    /// The server refused.
    #[error("{url}: {status}{hint}")]
    Status {
        /// The address.
        url: String,
        /// The status.
        status: StatusCode,
        /// What to do about it.
        hint: &'static str,
        /// How long the server asks to wait.
        retry_after: Option<Duration>,
    },
    /// The server's answer makes no sense.
    #[error("{url}: {problem}")]
    Answer {
        /// The address.
        url: String,
        /// What is wrong.
        problem: String,
    },
    /// The repository holds nothing that was asked for.
    #[error("{repository}: {problem}")]
    Missing {
        /// The repository.
        repository: String,
        /// What there is instead.
        problem: String,
    },
    /// The disk is too full.
    #[error("{}: {:.2} GB are needed and {:.2} GB free; make room, or set FEWBIT_HOME to another disk", folder.display(), *needed as f64 / 1e9, *free as f64 / 1e9)]
    Room {
        /// Where the files were to go.
        folder: PathBuf,
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// A file cannot be written.
    #[error("{}: cannot {action}: {source}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// Another process is pulling the same file.
    #[error("{}: another fewbit is pulling this file", file.display())]
    Busy {
        /// The file.
        file: PathBuf,
    },
    /// Another file has the name.
    #[error("{}: another file has this name ({found} bytes; {wanted} were asked for): `fewbit rm` it first", file.display())]
    Exists {
        /// The file.
        file: PathBuf,
        /// Its length.
        found: u64,
        /// The length of the one that was asked for.
        wanted: u64,
    },
    /// The file that came is not the one that was announced.
    #[error(
        "{url}: its SHA-256 is {found}, not {wanted}: damaged on its way or not this file; it was removed, pull again"
    )]
    Hash {
        /// The address.
        url: String,
        /// What came.
        found: String,
        /// What was to come.
        wanted: String,
    },
}

impl Error {
    fn connection(url: &str, source: ureq::Error) -> Self {
        Self::Connection {
            url: bare(url),
            source,
        }
    }

    fn answer(url: &Uri, problem: String) -> Self {
        Self::Answer {
            url: bare(&url.to_string()),
            problem,
        }
    }

    fn status(url: &Uri, status: StatusCode, response: Response<Body>, token: bool) -> Self {
        let hint = match (status, token) {
            (StatusCode::UNAUTHORIZED, false) => {
                ": there is none of this name, or it needs an account: check the name, set HF_TOKEN"
            }
            (StatusCode::UNAUTHORIZED, true) => {
                ": there is none of this name, or HF_TOKEN does not open it"
            }
            (StatusCode::FORBIDDEN, _) => {
                ": accept the model's terms on its page, and set HF_TOKEN to a token that may read it"
            }
            (StatusCode::NOT_FOUND, _) => ": there is none; check the name",
            (StatusCode::TOO_MANY_REQUESTS, _) => ": too many requests; try later",
            _ => "",
        };
        let after = http::text(response.headers(), header::RETRY_AFTER);
        Self::Status {
            url: bare(&url.to_string()),
            status,
            hint,
            retry_after: after
                .and_then(|seconds| seconds.parse().ok())
                .map(Duration::from_secs),
        }
    }

    /// Whether the same request may succeed later.
    fn is_passing(&self) -> bool {
        match self {
            Self::Cut { .. } => true,
            Self::Connection { source, .. } => !matches!(
                source,
                ureq::Error::BadUri(_)
                    | ureq::Error::Http(_)
                    | ureq::Error::Rustls(_)
                    | ureq::Error::Tls(_)
                    | ureq::Error::BodyExceedsLimit(_)
                    | ureq::Error::InvalidProxyUrl
            ),
            Self::Status { status, .. } => {
                status.is_server_error()
                    || [StatusCode::TOO_MANY_REQUESTS, StatusCode::REQUEST_TIMEOUT].contains(status)
            }
            _ => false,
        }
    }
}

/// An address without what may be secret in it: signatures stand in the query.
fn bare(url: &str) -> String {
    url.split('?').next().unwrap_or(url).to_owned()
}

/// A file to get.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wanted {
    url: String,
    /// Where below the folder it goes.
    path: PathBuf,
    /// Its length, where that is known beforehand.
    bytes: Option<u64>,
    /// Its SHA-256 in lower-case hexadecimal, where that is known.
    sha256: Option<String>,
}

/// Pulls `source`.
///
/// # Errors
/// See [`Error`]; what came by then is kept for the next time, unless it is known to be wrong.
pub fn pull(source: &Source, options: &Options, watch: &dyn Watch) -> Result<Pulled, Error> {
    let http = Http::new(&options.endpoint, options.token.as_deref(), options.retry)?;
    let wanted = match source {
        Source::Hub(_) if options.sha256.is_some() => {
            return Err(Error::Usage(
                "--sha256 is for plain URLs: a hub says itself what its files hash to",
            ));
        }
        Source::Hub(source) => hub::wanted(&http, source, options, watch)?,
        Source::Url(_) if options.checkpoint => {
            return Err(Error::Usage("--checkpoint is for repositories of a hub"));
        }
        Source::Url(url) => vec![plain(url, options)?],
    };
    transfer::check_room(&options.folder, &wanted)?;
    let mut pulled = Pulled {
        files: Vec::new(),
        sha256: Vec::new(),
        bytes: 0,
        downloaded: 0,
        checkpoint: None,
    };
    for wanted in &wanted {
        let got = transfer::get(&http, wanted, &options.folder, watch)?;
        pulled.files.push(options.folder.join(&wanted.path));
        pulled.sha256.push(got.sha256);
        pulled.bytes += got.bytes;
        pulled.downloaded += got.downloaded;
    }
    if options.checkpoint {
        let folder = pulled.files.first().and_then(|file| file.parent());
        pulled.checkpoint = folder.map(Path::to_owned);
    }
    Ok(pulled)
}

/// The file of a plain URL, which goes by the last part of its address.
fn plain(url: &str, options: &Options) -> Result<Wanted, Error> {
    let uri = http::parse(url)?;
    let name = uri.path().rsplit('/').next().unwrap_or_default();
    if name.len() < 2 || !source::is_inside(name) || name.contains('%') {
        return Err(Error::answer(
            &uri,
            "its last part is no plain file name".to_owned(),
        ));
    }
    let sha256 = options.sha256.as_deref().map(str::to_ascii_lowercase);
    if let Some(sum) = sha256.as_deref().filter(|sum| !is_sha256(sum)) {
        return Err(Error::Checksum(sum.to_owned()));
    }
    Ok(Wanted {
        url: url.to_owned(),
        path: name.into(),
        bytes: None,
        sha256,
    })
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit())
}
