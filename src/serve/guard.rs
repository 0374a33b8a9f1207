//! Who may use the server.
//!
//! A server on the loopback address without a key trusts the programs of its machine, but not the web pages in its
//! browser: these can send requests to any address. So a request that a page sends must come from the server's own
//! page or from an origin that was allowed, and its `Host` must name the loopback (a page whose own name was made to
//! point there would be told by it).

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, ORIGIN};
use axum::http::{HeaderMap, HeaderName, Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use tower_http::cors::{AllowOrigin, CorsLayer};

use super::app::App;
use super::error::ApiError;

/// What the guard knows.
#[derive(Clone)]
struct Guard {
    app: Arc<App>,
    /// Whether anyone on this machine may use the server.
    open: bool,
}

/// Paths that need no key: a page asks for the key itself.
const PUBLIC: [&str; 6] = [
    "/",
    "/page.css",
    "/page.js",
    "/markdown.js",
    "/health",
    "/v1/health",
];

/// `router` behind the guard; `open` where anyone on this machine may use it.
pub fn around(router: Router, app: &Arc<App>, open: bool) -> Router {
    let guard = Guard {
        app: Arc::clone(app),
        open,
    };
    let router = router.layer(middleware::from_fn_with_state(guard, check));
    match cors(&app.config.origins) {
        Some(cors) => router.layer(cors),
        None => router,
    }
}

/// What browsers are told about other origins; nothing unless asked for.
fn cors(origins: &[String]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let allowed = match origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(origins.iter().filter_map(|origin| origin.parse().ok())),
    };
    let headers: [HeaderName; 2] = [AUTHORIZATION, CONTENT_TYPE];
    let methods = [Method::GET, Method::POST];
    Some(
        CorsLayer::new()
            .allow_origin(allowed)
            .allow_methods(methods)
            .allow_headers(headers),
    )
}

async fn check(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    let refusal = refusal(&guard, request.uri().path(), request.headers());
    let response = match refusal {
        None => next.run(request).await,
        Some(error) => error.into_response(),
    };
    let metrics = &guard.app.metrics;
    match response.status() {
        StatusCode::TOO_MANY_REQUESTS => metrics.rejected.add(1),
        status if status.is_server_error() => metrics.failed.add(1),
        status if status.is_client_error() => metrics.refused.add(1),
        _ => metrics.succeeded.add(1),
    }
    response
}

fn refusal(guard: &Guard, path: &str, headers: &HeaderMap) -> Option<ApiError> {
    let text = |name: HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or(""));
    let forbidden = |message: String| Some(ApiError::status(StatusCode::FORBIDDEN, message));
    let host = text(HOST).unwrap_or_default();
    if guard.open && !is_loopback(host) {
        return forbidden(format!(
            "a server without --api-key on this machine's own address does not answer to the name {host:?}"
        ));
    }
    let origins = &guard.app.config.origins;
    if let Some(origin) = text(ORIGIN) {
        let own = origin
            .split_once("://")
            .is_some_and(|(_, name)| name == host);
        let allowed = |allowed: &String| allowed == "*" || allowed == origin;
        if !own && !origins.iter().any(allowed) {
            return forbidden(format!(
                "pages of {origin} may not use this server; it can be started with --cors {origin}"
            ));
        }
    }
    let Some(key) = &guard.app.config.key else {
        return None;
    };
    let sent = text(AUTHORIZATION).and_then(|value| value.strip_prefix("Bearer "));
    if PUBLIC.contains(&path) || sent.is_some_and(|sent| same(sent.trim(), key)) {
        return None;
    }
    Some(ApiError {
        code: Some("invalid_api_key"),
        ..ApiError::status(StatusCode::UNAUTHORIZED, "the API key is missing or wrong")
    })
}

/// Whether `host`, as a client names it, is the loopback.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next(),
        None => host.split(':').next(),
    };
    let name = name.unwrap_or_default();
    let address = name.parse::<std::net::IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

/// Whether two keys are the same, in a time that does not tell how much of them is.
fn same(a: &str, b: &str) -> bool {
    let differences = a
        .bytes()
        .zip(b.bytes())
        .fold(0, |all, (a, b)| all | (a ^ b));
    std::hint::black_box(differences) == 0 && a.len() == b.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_loopback() {
        for host in [
            "localhost",
            "LOCALHOST:80",
            "127.0.0.1:8080",
            "127.9.9.9",
            "[::1]:8080",
            "[::1]",
        ] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "",
            "example.org",
            "localhost.example.org",
            "192.168.0.1:80",
            "[::2]",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn keys_are_the_same_or_not() {
        assert!(same("secret", "secret"));
        assert!(!same("secret", "secreT") && !same("secret", "secre") && !same("", "secret"));
    }
}
