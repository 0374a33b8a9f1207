//! `/v1/completions`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;

use super::reply::{Form, Reply};
use super::request::{Common, MOST_LIKELY, Object};
use crate::serve::app::{App, Wish};
use crate::serve::error::ApiError;
use crate::serve::job::Text;

#[derive(Deserialize)]
struct Fields {
    prompt: Prompts,
    #[serde(default)]
    echo: bool,
    suffix: Option<String>,
    best_of: Option<i64>,
    logprobs: Option<usize>,
}

/// Texts or tokens, one or several.
#[derive(Deserialize)]
#[serde(untagged)]
enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    SeveralTokens(Vec<Vec<u32>>),
}

/// Goes on where prompts end.
pub async fn complete(State(app): State<Arc<App>>, object: Object) -> Result<Response, ApiError> {
    let common: Common = object.parse()?;
    let fields: Fields = object.parse()?;
    if fields.suffix.is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::field(
            "suffix",
            "text cannot be filled in before other text",
        ));
    }
    let n = common.choices()?;
    if fields.best_of.is_some_and(|best| best != n as i64) {
        return Err(ApiError::field("best_of", "must be absent, or equal to n"));
    }
    if fields.logprobs.is_some_and(|count| count > MOST_LIKELY) {
        let problem = format!("must be within 0 and {MOST_LIKELY}");
        return Err(ApiError::field("logprobs", problem));
    }
    if fields.echo && fields.logprobs.is_some() {
        return Err(ApiError::field("echo", "cannot be combined with logprobs"));
    }
    let builder = Arc::clone(&app);
    let prompts = tokio::task::spawn_blocking(move || prompts(&builder, fields.prompt));
    let prompts = prompts
        .await
        .map_err(|error| ApiError::failed(error.to_string()))??;

    let (id, seed) = app.next();
    let settings = common.settings(&object, &app.config.settings, seed, n)?;
    let limit = common.limit()?;
    let (mut wishes, mut beginnings) = (Vec::new(), Vec::new());
    for prompt in prompts.into_iter().map(Arc::new) {
        let echoed = match fields.echo {
            true => app.engine.tokenizer().decode(&prompt, false),
            false => String::new(),
        };
        for settings in settings.clone() {
            beginnings.push(echoed.clone());
            wishes.push(Wish {
                prompt: Arc::clone(&prompt),
                limit,
                settings,
                text: Text {
                    stops: common.stops(),
                    ..Text::default()
                },
                likely: fields.logprobs,
            });
        }
    }
    let events = app.submit(wishes)?;
    let reply = Reply::new(&app, &id, Form::Completion, beginnings)
        .with_logprobs(fields.logprobs.is_some())
        .with_usage(common.stream_options.include_usage);
    match common.stream {
        true => Ok(reply.stream(events)),
        false => reply.whole(events).await,
    }
}

/// The tokens of each prompt.
fn prompts(app: &App, prompts: Prompts) -> Result<Vec<Vec<u32>>, ApiError> {
    let tokenizer = app.engine.tokenizer();
    let encode = |text: String| Ok(tokenizer.encode_with_bos(&text, true)?);
    let prompts = match prompts {
        Prompts::Text(text) => vec![encode(text)?],
        Prompts::Texts(texts) => texts
            .into_iter()
            .map(encode)
            .collect::<Result<_, ApiError>>()?,
        Prompts::Tokens(tokens) => vec![tokens],
        Prompts::SeveralTokens(prompts) => prompts,
    };
    let vocab = app.engine.shape().vocab;
    if let Some(token) = prompts
        .iter()
        .flatten()
        .find(|&&token| token as usize >= vocab)
    {
        let problem = format!("token {token} is outside the vocabulary of {vocab}");
        return Err(ApiError::field("prompt", problem));
    }
    if prompts.is_empty() || prompts.iter().any(Vec::is_empty) {
        return Err(ApiError::field("prompt", "is empty"));
    }
    Ok(prompts)
}
