//! `/v1/chat/completions`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;

use super::reply::{Form, Reply};
use super::request::{Common, MOST_LIKELY, Object};
use crate::chat::Message;
use crate::serve::app::{App, Wish};
use crate::serve::error::ApiError;
use crate::serve::job::Text;

#[derive(Deserialize)]
struct Fields {
    messages: Vec<Message>,
    #[serde(default)]
    logprobs: bool,
    top_logprobs: Option<usize>,
}

/// Answers a conversation.
pub async fn complete(State(app): State<Arc<App>>, object: Object) -> Result<Response, ApiError> {
    let common: Common = object.parse()?;
    let Fields {
        messages,
        logprobs,
        top_logprobs,
    } = object.parse()?;
    if top_logprobs.is_some_and(|count| count > MOST_LIKELY) {
        let problem = format!("must be within 0 and {MOST_LIKELY}");
        return Err(ApiError::field("top_logprobs", problem));
    }
    let (id, seed) = app.next();
    let choices = common.choices()?;
    let settings = common.settings(&object, &app.config.settings, seed, choices)?;

    // A long conversation takes its time.
    let builder = Arc::clone(&app);
    let prompt = tokio::task::spawn_blocking(move || {
        let tokenizer = builder.engine.tokenizer();
        builder.template.prompt_ids(tokenizer, &messages)
    });
    let prompt = prompt
        .await
        .map_err(|error| ApiError::failed(error.to_string()))?;
    let prompt = Arc::new(prompt?);

    let limit = common.limit()?;
    let wishes = settings.into_iter().map(|settings| Wish {
        prompt: Arc::clone(&prompt),
        limit,
        settings,
        text: Text {
            lead: Some(app.lead.clone()),
            stops: common.stops(),
            special: false,
        },
        likely: logprobs.then(|| top_logprobs.unwrap_or(0)),
    });
    let events = app.submit(wishes.collect())?;
    let reply = Reply::new(&app, &id, Form::Chat, vec![String::new(); choices])
        .with_logprobs(logprobs)
        .with_usage(common.stream_options.include_usage);
    match common.stream {
        true => Ok(reply.stream(events)),
        false => reply.whole(events).await,
    }
}
