//! `/v1/embeddings`: the mean of a text's final hidden states, of length 1.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};

use super::request::{Object, Prompts};
use crate::serve::app::{App, Wish};
use crate::serve::error::ApiError;
use crate::serve::job::{News, Purpose};

#[derive(Deserialize)]
struct Fields {
    input: Prompts,
    #[serde(default)]
    encoding_format: Encoding,
    dimensions: Option<usize>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Encoding {
    #[default]
    Float,
    Base64,
}

/// Embeds texts.
pub async fn embed(State(app): State<Arc<App>>, object: Object) -> Result<Json<Value>, ApiError> {
    let fields: Fields = object.parse()?;
    let hidden = app.engine.shape().hidden;
    if fields
        .dimensions
        .is_some_and(|dimensions| dimensions != hidden)
    {
        let problem = format!("the model has {hidden}");
        return Err(ApiError::field("dimensions", problem));
    }
    let inputs = fields.input.read(&app, "input").await?;
    let tokens: usize = inputs.iter().map(Vec::len).sum();
    let count = inputs.len();
    let wishes = inputs
        .into_iter()
        .map(|input| Wish::new(Arc::new(input), Purpose::Embedding));
    let mut events = app.submit(wishes.collect())?;
    let mut vectors = vec![None; count];
    while let Some(event) = events.recv().await {
        match event.news {
            News::Embedding(vector) => vectors[event.choice] = Some(unit(vector)),
            News::Failed(message) => return Err(ApiError::failed(message)),
            News::Text { .. } | News::Done(_) => {}
        }
    }
    let vectors: Option<Vec<Vec<f32>>> = vectors.into_iter().collect();
    let vectors = vectors.ok_or_else(ApiError::ending)?;
    let data = vectors.iter().enumerate().map(|(index, vector)| {
        let embedding = match fields.encoding_format {
            Encoding::Float => json!(vector),
            Encoding::Base64 => {
                let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
                json!(BASE64_STANDARD.encode(bytes))
            }
        };
        json!({"object": "embedding", "index": index, "embedding": embedding})
    });
    Ok(Json(json!({
        "object": "list",
        "model": app.config.name,
        "data": data.collect::<Vec<_>>(),
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    })))
}

/// The vector at length 1.
fn unit(mut vector: Vec<f32>) -> Vec<f32> {
    let squares: f64 = vector.iter().map(|&x| f64::from(x).powi(2)).sum();
    let length = squares.sqrt().max(f64::MIN_POSITIVE);
    vector
        .iter_mut()
        .for_each(|x| *x = (f64::from(*x) / length) as f32);
    vector
}
