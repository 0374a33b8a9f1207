//! What requests have in common.

use std::sync::Arc;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::sampler::Settings;
use crate::serve::app::App;
use crate::serve::error::ApiError;

/// Likely tokens beside each that a request may ask for, as OpenAI has it.
pub const MOST_LIKELY: usize = 20;
/// Texts that one request may ask for.
const MOST_CHOICES: usize = 128;

/// A JSON object, whatever the content type says.
pub struct Object(pub Map<String, Value>);

impl FromRequest<Arc<App>> for Object {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let body = read(request.into_body(), app.config.body_limit);
        let body = tokio::time::timeout(app.config.patience, body).await;
        let slow = |_| {
            let message = "the request's body came too slowly";
            ApiError::status(StatusCode::REQUEST_TIMEOUT, message)
        };
        let body = body.map_err(slow)??;
        let value = serde_json::from_slice(&body);
        match value.map_err(|error| ApiError::bad(format!("the body is no JSON: {error}")))? {
            Value::Object(object) => Ok(Self(object)),
            _ => Err(ApiError::bad("the body is no JSON object")),
        }
    }
}

async fn read(body: Body, limit: usize) -> Result<Bytes, ApiError> {
    let too_large = || {
        let message = format!("the body has more than {limit} bytes");
        ApiError::status(StatusCode::PAYLOAD_TOO_LARGE, message)
    };
    if body.size_hint().lower() > limit as u64 {
        return Err(too_large());
    }
    axum::body::to_bytes(body, limit).await.map_err(|error| {
        let source = std::error::Error::source(&error);
        match source.is_some_and(|source| source.is::<http_body_util::LengthLimitError>()) {
            true => too_large(),
            false => ApiError::bad(format!("the body is cut off: {error}")),
        }
    })
}

impl Object {
    /// The fields that `T` has; the others do not matter. A field that is null is as good as absent.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        let object = self.0.iter().filter(|(_, value)| !value.is_null());
        let object: Map<String, Value> = object
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        serde_path_to_error::deserialize(Value::Object(object)).map_err(|error| {
            let path = error.path().to_string();
            match path == "." {
                true => ApiError::bad(error.inner().to_string()),
                false => ApiError::field(path, error.inner()),
            }
        })
    }
}

/// A string or several.
#[derive(Deserialize)]
#[serde(untagged)]
pub enum Strings {
    One(String),
    Many(Vec<String>),
}

/// Fields of every request for text.
#[derive(Deserialize)]
pub struct Common {
    #[serde(default)]
    pub stream: bool,
    #[serde(default)]
    pub stream_options: StreamOptions,
    n: Option<i64>,
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    stop: Option<Strings>,
    seed: Option<i64>,
}

#[derive(Default, Deserialize)]
pub struct StreamOptions {
    #[serde(default)]
    pub include_usage: bool,
}

impl Common {
    /// Texts that are wanted.
    pub fn choices(&self) -> Result<usize, ApiError> {
        let n = self.n.unwrap_or(1);
        let range = 1..=MOST_CHOICES as i64;
        match range.contains(&n) {
            true => Ok(n as usize),
            false => Err(ApiError::field(
                "n",
                format!("must be within 1 and {MOST_CHOICES}"),
            )),
        }
    }

    /// Tokens to write at most; -1 is as good as none.
    pub fn limit(&self) -> Result<Option<usize>, ApiError> {
        let (limit, name) = match self.max_completion_tokens {
            Some(limit) => (Some(limit), "max_completion_tokens"),
            None => (self.max_tokens, "max_tokens"),
        };
        match limit {
            None | Some(-1) => Ok(None),
            Some(limit) => usize::try_from(limit)
                .map(Some)
                .map_err(|_| ApiError::field(name, "must be 0 or more")),
        }
    }

    /// Strings that end the text.
    pub fn stops(&self) -> Vec<String> {
        match &self.stop {
            None => Vec::new(),
            Some(Strings::One(stop)) => vec![stop.clone()],
            Some(Strings::Many(stops)) => stops.clone(),
        }
    }

    /// How each of the `choices` texts is drawn: what the request says, and the server's settings for the rest.
    pub fn settings(
        &self,
        object: &Object,
        defaults: &Settings,
        seed: u64,
        choices: usize,
    ) -> Result<Vec<Settings>, ApiError> {
        let mut fields = object.0.clone();
        fields.remove("seed");
        let settings = defaults.with(&fields);
        let settings = settings.map_err(|error| ApiError::field(error.field, error.problem))?;
        let seed = match self.seed {
            None | Some(-1) => seed,
            Some(seed) => seed as u64,
        };
        let seeds = (0..choices as u64).map(|choice| seed.wrapping_add(choice));
        let settings = seeds.map(|seed| Settings {
            seed,
            ..settings.clone()
        });
        Ok(settings.collect())
    }
}

/// Texts or tokens, one or several.
#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected a string, a list of strings, or tokens"
)]
pub enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    SeveralTokens(Vec<Vec<u32>>),
}

impl Prompts {
    /// The tokens of each; `field` is where they stand in the request.
    pub async fn read(
        self,
        app: &Arc<App>,
        field: &'static str,
    ) -> Result<Vec<Vec<u32>>, ApiError> {
        let prompts = blocking(app, |app| {
            let tokenizer = app.engine.tokenizer();
            let encode = |text: String| Ok(tokenizer.encode_with_bos(&text, true)?);
            match self {
                Self::Text(text) => Ok(vec![encode(text)?]),
                Self::Texts(texts) => texts.into_iter().map(encode).collect(),
                Self::Tokens(tokens) => Ok(vec![tokens]),
                Self::SeveralTokens(prompts) => Ok(prompts),
            }
        });
        let prompts = prompts.await?;
        let vocab = app.engine.shape().vocab;
        let outside = |token: &&u32| **token as usize >= vocab;
        if let Some(token) = prompts.iter().flatten().find(outside) {
            let problem = format!("token {token} is outside the vocabulary of {vocab}");
            return Err(ApiError::field(field, problem));
        }
        if prompts.is_empty() || prompts.iter().any(Vec::is_empty) {
            return Err(ApiError::field(field, "is empty"));
        }
        Ok(prompts)
    }
}

/// Does work that takes longer than others should wait: long texts, templates, grammars.
pub async fn blocking<T: Send + 'static>(
    app: &Arc<App>,
    work: impl FnOnce(&App) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let app = Arc::clone(app);
    let done = tokio::task::spawn_blocking(move || work(&app)).await;
    done.map_err(|error| ApiError::failed(error.to_string()))?
}
