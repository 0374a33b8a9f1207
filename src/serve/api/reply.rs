//! Events → what OpenAI's clients read, whole or as a stream.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Json;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::serve::app::{App, seconds};
use crate::serve::error::ApiError;
use crate::serve::job::{Chosen, Done, Event, Finish, Likely, News};

/// Which of the two forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
}

/// What is known of a reply before its first token.
pub struct Reply {
    app: Arc<App>,
    id: String,
    created: u64,
    form: Form,
    choices: Vec<Choice>,
    logprobs: bool,
    usage: bool,
}

/// A text so far.
#[derive(Default)]
struct Choice {
    text: String,
    tokens: Vec<Chosen>,
    done: Option<Done>,
    /// Whether the stream has told its beginning.
    begun: bool,
    /// Bytes of the tokens that a stream has told the probabilities of.
    told: usize,
}

impl Reply {
    /// A reply of as many texts as `beginnings`, each of which begins so.
    pub fn new(app: &Arc<App>, id: &str, form: Form, beginnings: Vec<String>) -> Self {
        let prefix = match form {
            Form::Chat => "chatcmpl",
            Form::Completion => "cmpl",
        };
        let choice = |text| Choice {
            text,
            ..Choice::default()
        };
        Self {
            app: Arc::clone(app),
            id: format!("{prefix}-{id}"),
            created: seconds(SystemTime::now()),
            form,
            choices: beginnings.into_iter().map(choice).collect(),
            logprobs: false,
            usage: false,
        }
    }

    /// Tells the probabilities of tokens.
    pub fn with_logprobs(mut self, logprobs: bool) -> Self {
        self.logprobs = logprobs;
        self
    }

    /// Ends a stream with what it took.
    pub fn with_usage(mut self, usage: bool) -> Self {
        self.usage = usage;
        self
    }

    /// The answer when all of it is there.
    pub async fn whole(
        mut self,
        mut events: UnboundedReceiver<Event>,
    ) -> Result<Response, ApiError> {
        while let Some(Event { choice, news }) = events.recv().await {
            let choice = &mut self.choices[choice];
            match news {
                News::Text { text, tokens } => {
                    choice.text += &text;
                    choice.tokens.extend(tokens);
                }
                News::Done(done) => choice.done = Some(done),
                News::Failed(message) => return Err(ApiError::failed(message)),
            }
        }
        let mut choices = Vec::new();
        for (index, choice) in self.choices.iter().enumerate() {
            let Some(done) = &choice.done else {
                return Err(gone());
            };
            let text = &choice.text[..];
            let mut value = json!({"index": index});
            match self.form {
                Form::Chat => {
                    value["message"] =
                        json!({"role": "assistant", "content": text, "refusal": null});
                }
                Form::Completion => value["text"] = text.into(),
            }
            value["logprobs"] = self.logprobs(&choice.tokens, 0);
            value["finish_reason"] = reason(&done.finish).into();
            choices.push(value);
        }
        let mut whole = self.head(false, choices);
        whole["usage"] = self.usage();
        whole["timings"] = self.timings();
        Ok(Json(whole).into_response())
    }

    /// The answer as it comes: server-sent events.
    pub fn stream(self, events: UnboundedReceiver<Event>) -> Response {
        let state = Some((self, events));
        let events = stream::unfold(state, |state| async move {
            let (mut reply, mut events) = state?;
            loop {
                let Some(event) = events.recv().await else {
                    // The worker is gone, or has told everything.
                    let whole = reply.choices.iter().all(|choice| choice.done.is_some());
                    let last = match whole {
                        true => reply.end(),
                        false => vec![data(&gone().json())],
                    };
                    return Some((last, None));
                };
                if let News::Failed(message) = event.news {
                    let last = vec![data(&ApiError::failed(message).json())];
                    return Some((last, None));
                }
                let chunks = reply.chunks(event);
                if !chunks.is_empty() {
                    let chunks = chunks.iter().map(data).collect();
                    return Some((chunks, Some((reply, events))));
                }
            }
        });
        let events = events.flat_map(|chunks: Vec<sse::Event>| {
            stream::iter(chunks.into_iter().map(Ok::<_, Infallible>))
        });
        let alive = KeepAlive::new().interval(Duration::from_secs(10));
        Sse::new(events).keep_alive(alive).into_response()
    }

    /// What a stream tells of an event.
    fn chunks(
        &mut self,
        Event {
            choice: index,
            news,
        }: Event,
    ) -> Vec<Value> {
        let choice = &mut self.choices[index];
        let mut chunks = Vec::new();
        let mut deltas = Vec::new();
        if self.form == Form::Chat && !std::mem::replace(&mut choice.begun, true) {
            deltas.push((
                json!({"role": "assistant", "content": ""}),
                Vec::new(),
                None,
            ));
        }
        match news {
            News::Text { text, tokens } => {
                // A completion that echoes its prompt begins with it.
                let begun = std::mem::replace(&mut choice.begun, true);
                let text = match self.form {
                    Form::Completion if !begun => std::mem::take(&mut choice.text) + &text,
                    _ => text,
                };
                deltas.push((json!({"content": text}), tokens, None));
            }
            News::Done(done) => {
                deltas.push((json!({}), Vec::new(), Some(reason(&done.finish))));
                choice.done = Some(done);
            }
            News::Failed(_) => {}
        }
        for (delta, tokens, finish) in deltas {
            let mut value = json!({"index": index});
            match self.form {
                Form::Chat => value["delta"] = delta,
                Form::Completion => {
                    value["text"] = delta.get("content").unwrap_or(&"".into()).clone()
                }
            }
            let told = self.choices[index].told;
            value["logprobs"] = self.logprobs(&tokens, told);
            self.choices[index].told += self.bytes(&tokens);
            value["finish_reason"] = finish.into();
            let mut chunk = self.head(true, vec![value]);
            if self.usage {
                chunk["usage"] = Value::Null;
            }
            if finish.is_some() && self.choices.iter().all(|choice| choice.done.is_some()) {
                chunk["timings"] = self.timings();
            }
            chunks.push(chunk);
        }
        chunks
    }

    /// The end of a stream.
    fn end(&self) -> Vec<sse::Event> {
        let mut last = Vec::new();
        if self.usage {
            let mut chunk = self.head(true, Vec::new());
            chunk["usage"] = self.usage();
            last.push(data(&chunk));
        }
        last.push(sse::Event::default().data("[DONE]"));
        last
    }

    fn head(&self, chunk: bool, choices: Vec<Value>) -> Value {
        let object = match (self.form, chunk) {
            (Form::Chat, false) => "chat.completion",
            (Form::Chat, true) => "chat.completion.chunk",
            (Form::Completion, _) => "text_completion",
        };
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.app.config.name,
            "choices": choices,
        })
    }

    fn usage(&self) -> Value {
        let done = || {
            self.choices
                .iter()
                .filter_map(|choice| choice.done.as_ref())
        };
        // Choices of one prompt share it, those of several prompts follow each other.
        let prompt = done().map(|done| done.prompt_tokens).max().unwrap_or(0);
        let cached = done().map(|done| done.cached_tokens).min().unwrap_or(0);
        let tokens: usize = done().map(|done| done.tokens).sum();
        json!({
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        })
    }

    /// Speeds, as llama.cpp's server tells them.
    fn timings(&self) -> Value {
        let Some(done) = self.choices.first().and_then(|choice| choice.done.as_ref()) else {
            return Value::Null;
        };
        let read = done.prompt_tokens - done.cached_tokens;
        // The first token comes with the prompt.
        let written = done.tokens.saturating_sub(1);
        let (reading, writing) = (done.reading.as_secs_f64(), done.writing.as_secs_f64());
        let speed =
            |tokens: usize, time: f64| (tokens > 0 && time > 0.0).then(|| tokens as f64 / time);
        json!({
            "prompt_n": read,
            "prompt_ms": reading * 1e3,
            "prompt_per_second": speed(read, reading),
            "predicted_n": done.tokens,
            "predicted_ms": writing * 1e3,
            "predicted_per_second": speed(written, writing),
            "cache_n": done.cached_tokens,
        })
    }

    fn bytes(&self, tokens: &[Chosen]) -> usize {
        let tokenizer = self.app.engine.tokenizer();
        let bytes = |chosen: &Chosen| tokenizer.token_bytes(chosen.token.id).len();
        tokens.iter().map(bytes).sum()
    }

    /// What stands under `logprobs`; `offset` is where the text of the tokens begins.
    fn logprobs(&self, tokens: &[Chosen], mut offset: usize) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let tokenizer = self.app.engine.tokenizer();
        let text = |token: &Likely| {
            let bytes = tokenizer.token_bytes(token.id);
            String::from_utf8_lossy(bytes).into_owned()
        };
        // JSON has no infinity.
        let logprob = |token: &Likely| f64::from(token.logprob.max(-9999.0));
        match self.form {
            Form::Chat => {
                let one = |token: &Likely| {
                    json!({
                        "token": text(token),
                        "logprob": logprob(token),
                        "bytes": tokenizer.token_bytes(token.id),
                    })
                };
                let all = tokens.iter().map(|chosen| {
                    let mut value = one(&chosen.token);
                    value["top_logprobs"] = chosen.likely.iter().map(one).collect();
                    value
                });
                json!({"content": all.collect::<Vec<_>>(), "refusal": null})
            }
            Form::Completion => {
                let offsets = tokens.iter().map(|chosen| {
                    let start = offset;
                    offset += tokenizer.token_bytes(chosen.token.id).len();
                    start
                });
                let offsets: Vec<usize> = offsets.collect();
                let top = tokens.iter().map(|chosen| {
                    let pairs = chosen.likely.iter();
                    let pairs = pairs.map(|token| (text(token), json!(logprob(token))));
                    Value::Object(pairs.collect())
                });
                json!({
                    "tokens": tokens.iter().map(|chosen| text(&chosen.token)).collect::<Vec<_>>(),
                    "token_logprobs": tokens.iter().map(|chosen| logprob(&chosen.token)).collect::<Vec<_>>(),
                    "top_logprobs": top.collect::<Vec<_>>(),
                    "text_offset": offsets,
                })
            }
        }
    }
}

fn data(value: &Value) -> sse::Event {
    sse::Event::default().data(value.to_string())
}

fn reason(finish: &Finish) -> &'static str {
    match finish {
        Finish::End | Finish::Stop(_) => "stop",
        Finish::Length => "length",
    }
}

/// The worker went away before it was done.
fn gone() -> ApiError {
    let status = axum::http::StatusCode::SERVICE_UNAVAILABLE;
    ApiError::status(status, "the server is shutting down")
}
