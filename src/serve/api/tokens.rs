//! `/tokenize` and `/detokenize`, as llama.cpp's server has them.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};

use super::request::Object;
use crate::serve::app::App;
use crate::serve::error::ApiError;

#[derive(Deserialize)]
struct Text {
    content: String,
    /// Whether BOS comes first, where the vocabulary adds one.
    #[serde(default)]
    add_special: bool,
    /// Whether the names of control tokens become these tokens.
    #[serde(default = "yes")]
    parse_special: bool,
    #[serde(default)]
    with_pieces: bool,
}

#[derive(Deserialize)]
struct Tokens {
    tokens: Vec<u32>,
}

fn yes() -> bool {
    true
}

/// Text → tokens.
pub async fn tokenize(
    State(app): State<Arc<App>>,
    object: Object,
) -> Result<Json<Value>, ApiError> {
    let text: Text = object.parse()?;
    let tokenizer = app.engine.tokenizer();
    let ids = match text.add_special {
        true => tokenizer.encode_with_bos(&text.content, text.parse_special)?,
        false => tokenizer.encode(&text.content, text.parse_special)?,
    };
    if !text.with_pieces {
        return Ok(Json(json!({"tokens": ids})));
    }
    // A piece that is no text is told as bytes.
    let piece = |id: &u32| {
        let bytes = tokenizer.token_bytes(*id);
        let piece = std::str::from_utf8(bytes).map_or(json!(bytes), |text| json!(text));
        json!({"id": id, "piece": piece})
    };
    Ok(Json(
        json!({"tokens": ids.iter().map(piece).collect::<Vec<_>>()}),
    ))
}

/// Tokens → text.
pub async fn detokenize(
    State(app): State<Arc<App>>,
    object: Object,
) -> Result<Json<Value>, ApiError> {
    let Tokens { tokens } = object.parse()?;
    let text = app.engine.tokenizer().decode(&tokens, true);
    Ok(Json(json!({"content": text})))
}
