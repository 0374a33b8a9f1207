//! `/v1/completions`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;

use super::format;
use super::reply::{Form, Reply};
use super::request::{Common, MOST_LIKELY, Object, Prompts, blocking};
use crate::serve::app::{App, Wish};
use crate::serve::error::ApiError;
use crate::serve::job::{Purpose, Text, Writer};

#[derive(Deserialize)]
struct Fields {
    prompt: Prompts,
    #[serde(default)]
    echo: bool,
    suffix: Option<String>,
    best_of: Option<i64>,
    logprobs: Option<usize>,
}

/// Goes on where prompts end.
pub async fn complete(State(app): State<Arc<App>>, object: Object) -> Result<Response, ApiError> {
    let common: Common = object.parse()?;
    let fields: Fields = object.parse()?;
    if fields.suffix.is_some_and(|suffix| !suffix.is_empty()) {
        let problem = "text cannot be filled in before other text";
        return Err(ApiError::field("suffix", problem));
    }
    let n = common.choices()?;
    if fields.best_of.is_some_and(|best| best != n as i64) {
        let problem = "must be absent, or equal to n";
        return Err(ApiError::field("best_of", problem));
    }
    if fields.logprobs.is_some_and(|count| count > MOST_LIKELY) {
        let problem = format!("must be within 0 and {MOST_LIKELY}");
        return Err(ApiError::field("logprobs", problem));
    }
    if fields.echo && fields.logprobs.is_some() {
        return Err(ApiError::field("echo", "cannot be combined with logprobs"));
    }
    let prompts = fields.prompt.read(&app, "prompt").await?;
    let beginnings = prompts.iter().map(|prompt| match fields.echo {
        true => app.engine.tokenizer().decode(prompt, false),
        false => String::new(),
    });
    let beginnings: Vec<String> = beginnings.collect();

    let (id, seed) = app.next();
    let settings = common.settings(&object, &app.config.settings, seed, n)?;
    let limit = common.limit()?;
    let (stops, likely) = (common.stops(), fields.logprobs);
    let grammar = format::of(&object)?;
    let events = blocking(&app, move |app| {
        let mut wishes = Vec::new();
        for prompt in prompts.into_iter().map(Arc::new) {
            for settings in settings.clone() {
                let writer = Writer {
                    limit: limit.unwrap_or(usize::MAX),
                    sampler: app.sampler(settings, grammar.as_ref())?,
                    text: Text {
                        stops: stops.clone(),
                        ..Text::default()
                    },
                    likely,
                };
                let purpose = Purpose::Text(Box::new(writer));
                wishes.push(Wish::new(Arc::clone(&prompt), purpose));
            }
        }
        app.submit(wishes)
    });
    let events = events.await?;
    let reply = Reply::new(&app, &id, Form::Completion, beginnings, n)
        .with_logprobs(fields.logprobs.is_some())
        .with_usage(common.stream_options.include_usage);
    match common.stream {
        true => Ok(reply.stream(events)),
        false => reply.whole(events).await,
    }
}
