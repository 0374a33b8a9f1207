//! The endpoints: OpenAI's, and llama.cpp's small ones.

mod chat;
mod completions;
mod embeddings;
mod format;
mod reply;
mod request;
mod tokens;

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{Router, http::Uri};
use serde_json::{Value, json};

use super::app::App;
use super::error::ApiError;
use super::page;
use crate::plan::Sizes;

/// All routes.
pub fn router(app: Arc<App>) -> Router {
    let paths: [(&str, MethodRouter<Arc<App>>); 10] = [
        ("/models", get(models)),
        ("/models/{name}", get(model)),
        ("/chat/completions", post(chat::complete)),
        ("/completions", post(completions::complete)),
        ("/embeddings", post(embeddings::embed)),
        ("/tokenize", post(tokens::tokenize)),
        ("/detokenize", post(tokens::detokenize)),
        ("/health", get(health)),
        ("/metrics", get(metrics)),
        ("/props", get(props)),
    ];
    let mut router = Router::new();
    for (path, method) in paths {
        let method = method.fallback(wrong_method);
        // With and without the version, as clients have it.
        router = router.route(&format!("/v1{path}"), method.clone());
        router = router.route(path, method);
    }
    router
        .merge(page::router())
        .fallback(nothing_there)
        .with_state(app)
}

async fn wrong_method(uri: Uri) -> ApiError {
    let message = format!("{} takes another method", uri.path());
    ApiError::status(StatusCode::METHOD_NOT_ALLOWED, message)
}

async fn nothing_there(uri: Uri) -> ApiError {
    let message = format!("there is nothing at {}", uri.path());
    ApiError::status(StatusCode::NOT_FOUND, message)
}

async fn health() -> Response {
    Json(json!({"status": "ok"})).into_response()
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(CONTENT_TYPE, kind)], app.metrics.text()).into_response()
}

async fn models(State(app): State<Arc<App>>) -> Response {
    Json(json!({"object": "list", "data": [describe(&app)]})).into_response()
}

async fn model(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    match name == app.config.name {
        true => Ok(Json(describe(&app)).into_response()),
        false => {
            let message = format!("there is no model {name}, but {}", app.config.name);
            Err(ApiError::status(StatusCode::NOT_FOUND, message))
        }
    }
}

/// The model as OpenAI lists it; under `meta`, what llama.cpp tells of it.
fn describe(app: &App) -> Value {
    let shape = app.engine.shape();
    let tensors = &app.engine.gguf().tensors;
    let sizes = Sizes::of(shape.experts, shape.experts_used, tensors);
    json!({
        "id": app.config.name,
        "object": "model",
        "created": app.created,
        "owned_by": "fewbit",
        "meta": {
            "n_ctx": app.share.context,
            "n_ctx_train": shape.context,
            "n_vocab": shape.vocab,
            "n_embd": shape.hidden,
            "n_params": sizes.params_total(),
            "size": sizes.bytes_total(),
        },
    })
}

/// What the chat page asks for first.
async fn props(State(app): State<Arc<App>>) -> Response {
    Json(json!({
        "model": app.config.name,
        "context": app.share.context,
        "slots": app.share.slots,
        "template": app.template.name(),
        "settings": app.config.settings,
        "version": env!("CARGO_PKG_VERSION"),
    }))
    .into_response()
}
