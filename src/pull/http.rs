//! Requests: TLS without C, redirects that do not carry the token away, retries.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, Response, StatusCode, Uri, header};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::{Error, Watch};

/// Redirects that are followed.
const REDIRECTS: usize = 8;
/// Waiting that a server may ask for.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long a connection may take, and may stand still.
const CONNECT: Duration = Duration::from_secs(20);
const STALL: Duration = Duration::from_secs(60);
/// Bytes of an answer that is read as text at most.
const TEXT: u64 = 64 << 20;

/// How requests are made.
pub(super) struct Http {
    agent: Agent,
    tls: Result<(), &'static str>,
    token: Option<Token>,
    retry: Retry,
}

/// A secret for one host.
struct Token {
    secret: String,
    /// Scheme, host and port that it is for.
    origin: Origin,
}

type Origin = (String, String, Option<u16>);

/// How often, and after how long, a failed request is made again.
#[derive(Clone, Copy, Debug)]
pub struct Retry {
    /// Attempts that follow a failure before which nothing came.
    pub attempts: u32,
    /// The wait before the first of them; it doubles each time.
    pub wait: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            attempts: 6,
            wait: Duration::from_secs(1),
        }
    }
}

/// Counts failures in a row.
pub(super) struct Patience {
    retry: Retry,
    failures: u32,
}

impl Patience {
    /// Something came: count anew.
    pub(super) fn renew(&mut self) {
        self.failures = 0;
    }

    /// Waits before the next attempt; gives `error` back where there is none.
    pub(super) fn wait(&mut self, error: Error, watch: &dyn Watch) -> Result<(), Error> {
        let asked = match &error {
            Error::Status { retry_after, .. } => *retry_after,
            _ => None,
        };
        if !error.is_passing() || self.failures >= self.retry.attempts {
            return Err(error);
        }
        let wait = self.retry.wait * 2u32.pow(self.failures.min(6));
        let wait = asked.unwrap_or(wait).min(PATIENCE);
        self.failures += 1;
        watch.retry(&error, wait);
        thread::sleep(wait);
        Ok(())
    }
}

impl Http {
    /// Requests of which those to `endpoint` carry the token.
    pub(super) fn new(endpoint: &str, token: Option<&str>, retry: Retry) -> Result<Self, Error> {
        let mut config = Agent::config_builder()
            .user_agent(concat!("fewbit/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::Never)
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(STALL))
            .timeout_per_read(Some(STALL));
        let tls = provider();
        if let Ok(provider) = &tls {
            let mut tls =
                TlsConfig::builder().unversioned_rustls_crypto_provider(Arc::clone(provider));
            if let Some(roots) = own_roots()? {
                tls = tls.root_certs(roots);
            }
            config = config.tls_config(tls.build());
        }
        let token = match token.filter(|token| !token.is_empty()) {
            None => None,
            Some(secret) => Some(Token {
                secret: secret.to_owned(),
                origin: origin(&parse(endpoint)?),
            }),
        };
        Ok(Self {
            agent: config.build().new_agent(),
            tls: tls.map(drop),
            token,
            retry,
        })
    }

    pub(super) fn patience(&self) -> Patience {
        Patience {
            retry: self.retry,
            failures: 0,
        }
    }

    /// GETs `url`, once, and follows redirects. The token goes to its own host only, whoever redirects.
    pub(super) fn get(
        &self,
        url: &str,
        headers: &[(header::HeaderName, String)],
    ) -> Result<Response<Body>, Error> {
        let mut at = parse(url)?;
        for _ in 0..REDIRECTS {
            if at.scheme_str() == Some("https") {
                self.tls.map_err(|needs| Error::Tls { needs })?;
            }
            let mut request = self.agent.get(at.clone());
            for (name, value) in headers {
                request = request.header(name, value);
            }
            if let Some(token) = self
                .token
                .as_ref()
                .filter(|token| token.origin == origin(&at))
            {
                let bearer = format!("Bearer {}", token.secret);
                request = request.header(header::AUTHORIZATION, bearer);
            }
            let response = request
                .call()
                .map_err(|error| Error::connection(&at.to_string(), error))?;
            match response.status() {
                StatusCode::MOVED_PERMANENTLY
                | StatusCode::FOUND
                | StatusCode::SEE_OTHER
                | StatusCode::TEMPORARY_REDIRECT
                | StatusCode::PERMANENT_REDIRECT => {
                    let location = text(response.headers(), header::LOCATION).unwrap_or_default();
                    let next = join(&at, location)?;
                    if at.scheme_str() == Some("https") && next.scheme_str() != Some("https") {
                        let problem = format!("redirects from https to {next}: refused");
                        return Err(Error::answer(&at, problem));
                    }
                    at = next;
                }
                status if status.is_success() => return Ok(response),
                status => return Err(Error::status(&at, status, response, self.token.is_some())),
            }
        }
        Err(Error::answer(
            &at,
            format!("{REDIRECTS} redirects in a row"),
        ))
    }

    /// GETs a text, again where it fails in passing.
    pub(super) fn text(&self, url: &str, watch: &dyn Watch) -> Result<(String, HeaderMap), Error> {
        let mut patience = self.patience();
        loop {
            let read = self.get(url, &[]).and_then(|response| {
                let (parts, mut body) = response.into_parts();
                let text = body.with_config().limit(TEXT).read_to_string();
                let text = text.map_err(|error| Error::connection(url, error))?;
                Ok((text, parts.headers))
            });
            match read {
                Ok(read) => return Ok(read),
                Err(error) => patience.wait(error, watch)?,
            }
        }
    }
}

/// A header as text.
pub(super) fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

pub(super) fn parse(url: &str) -> Result<Uri, Error> {
    let wrong = || Error::Url {
        url: url.to_owned(),
    };
    let uri: Uri = url.parse().map_err(|_| wrong())?;
    match (uri.scheme_str(), uri.host()) {
        (Some("http" | "https"), Some(host)) if !host.is_empty() => Ok(uri),
        _ => Err(wrong()),
    }
}

fn origin(uri: &Uri) -> Origin {
    let scheme = uri.scheme_str().unwrap_or_default().to_owned();
    let host = uri.host().unwrap_or_default().to_ascii_lowercase();
    let usual = match &*scheme {
        "https" => 443,
        _ => 80,
    };
    (scheme, host, uri.port_u16().or(Some(usual)))
}

/// The address that `location` is, seen from `at` (RFC 3986, 5.2, without dot segments).
fn join(at: &Uri, location: &str) -> Result<Uri, Error> {
    if location.is_empty() {
        return Err(Error::answer(
            at,
            "redirects without saying where".to_owned(),
        ));
    }
    if location.contains("://") && !location.starts_with('/') {
        return parse(location);
    }
    let scheme = at.scheme_str().unwrap_or("https");
    if let Some(rest) = location.strip_prefix("//") {
        return parse(&format!("{scheme}://{rest}"));
    }
    let authority = at.authority().map_or("", |authority| authority.as_str());
    let folder = at.path().rsplit_once('/').map_or("", |(folder, _)| folder);
    match location.starts_with('/') {
        true => parse(&format!("{scheme}://{authority}{location}")),
        false => parse(&format!("{scheme}://{authority}{folder}/{location}")),
    }
}

/// Cryptography for TLS; or what the CPU lacks for it.
fn provider() -> Result<Arc<rustls::crypto::CryptoProvider>, &'static str> {
    // What graviola asks of a CPU; it panics where that is not there.
    #[cfg(target_arch = "x86_64")]
    {
        let there = is_x86_feature_detected!("aes")
            && is_x86_feature_detected!("pclmulqdq")
            && is_x86_feature_detected!("ssse3")
            && is_x86_feature_detected!("avx")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("adx");
        match there {
            true => Ok(Arc::new(rustls_graviola::default_provider())),
            false => Err("AVX2, AES, BMI2 and ADX (Intel from 2014, AMD from 2017)"),
        }
    }
    #[cfg(target_arch = "aarch64")]
    {
        let there = std::arch::is_aarch64_feature_detected!("neon")
            && std::arch::is_aarch64_feature_detected!("aes")
            && std::arch::is_aarch64_feature_detected!("pmull")
            && std::arch::is_aarch64_feature_detected!("sha2");
        match there {
            true => Ok(Arc::new(rustls_graviola::default_provider())),
            false => Err("the cryptography extensions"),
        }
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    Err("x86-64 or aarch64")
}

/// The certificates in the file that `SSL_CERT_FILE` names, as behind a company's proxy; Mozilla's otherwise.
fn own_roots() -> Result<Option<RootCerts>, Error> {
    let Some(path) = std::env::var_os("SSL_CERT_FILE").filter(|path| !path.is_empty()) else {
        return Ok(None);
    };
    let failed = |problem: String| Error::Certificates {
        file: path.clone().into(),
        problem,
    };
    let pem = std::fs::read(&path).map_err(|error| failed(error.to_string()))?;
    let mut roots: Vec<Certificate<'static>> = Vec::new();
    for item in parse_pem(&pem) {
        if let PemItem::Certificate(root) = item.map_err(|error| failed(error.to_string()))? {
            roots.push(root);
        }
    }
    match roots.is_empty() {
        true => Err(failed("holds no certificate".to_owned())),
        false => Ok(Some(RootCerts::from(roots))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_joined() {
        let at = parse("https://hub.example/a/b?x=1").unwrap();
        for (location, joined) in [
            ("https://cdn.example/y?z", "https://cdn.example/y?z"),
            ("//cdn.example/y", "https://cdn.example/y"),
            ("/c/d?u=http://x", "https://hub.example/c/d?u=http://x"),
            ("d", "https://hub.example/a/d"),
        ] {
            assert_eq!(join(&at, location).unwrap().to_string(), joined);
        }
        assert!(join(&at, "").is_err());
        assert!(join(&at, "file:///etc/passwd").is_err());
    }

    #[test]
    fn a_port_and_a_scheme_belong_to_the_origin() {
        let of = |url: &str| origin(&parse(url).unwrap());
        assert_eq!(of("https://Hub.example/x"), of("https://hub.example:443/y"));
        assert_ne!(of("https://hub.example"), of("http://hub.example"));
        assert_ne!(of("https://hub.example"), of("https://hub.example:8443"));
        assert_ne!(of("https://hub.example"), of("https://hub.example.org"));
    }
}
