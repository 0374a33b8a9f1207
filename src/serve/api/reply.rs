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
use crate::serve::tools::{Call, Sorter};

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
    /// Choices that share a prompt.
    each: usize,
    logprobs: bool,
    calls: bool,
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
    /// Tells calls of tools from text.
    sorter: Sorter,
}

impl Reply {
    /// A reply of `each` texts to every prompt; those to a prompt begin with its one of `beginnings`.
    pub fn new(app: &Arc<App>, id: &str, form: Form, beginnings: Vec<String>, each: usize) -> Self {
        let prefix = match form {
            Form::Chat => "chatcmpl",
            Form::Completion => "cmpl",
        };
        let choice = |text| Choice {
            text,
            ..Choice::default()
        };
        let texts = (beginnings.into_iter()).flat_map(|text| std::iter::repeat_n(text, each));
        Self {
            app: Arc::clone(app),
            id: format!("{prefix}-{id}"),
            created: seconds(SystemTime::now()),
            form,
            choices: texts.map(choice).collect(),
            each,
            logprobs: false,
            calls: false,
            usage: false,
        }
    }

    /// Tells the probabilities of tokens.
    pub fn with_logprobs(mut self, logprobs: bool) -> Self {
        self.logprobs = logprobs;
        self
    }

    /// Looks for calls of tools.
    pub fn with_calls(mut self, calls: bool) -> Self {
        self.calls = calls;
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
                News::Embedding(_) => {}
            }
        }
        let mut choices = Vec::new();
        for (index, choice) in self.choices.iter().enumerate() {
            let Some(done) = &choice.done else {
                return Err(ApiError::ending());
            };
            let mut value = json!({"index": index});
            let mut finish = reason(&done.finish);
            match self.form {
                Form::Completion => value["text"] = choice.text[..].into(),
                Form::Chat => {
                    let mut sorter = Sorter::default();
                    let (text, calls) = match self.calls {
                        false => (choice.text.clone(), Vec::new()),
                        true => {
                            let text = sorter.push(&choice.text);
                            let (rest, calls) = sorter.finish();
                            (text + &rest, calls)
                        }
                    };
                    let mut message =
                        json!({"role": "assistant", "content": text, "refusal": null});
                    if !calls.is_empty() {
                        finish = "tool_calls";
                        message["tool_calls"] = self.calls(index, &calls, false);
                        if text.is_empty() {
                            message["content"] = Value::Null;
                        }
                    }
                    value["message"] = message;
                }
            }
            value["logprobs"] = self.logprobs(&choice.tokens, 0);
            value["finish_reason"] = finish.into();
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
                        false => vec![data(&ApiError::ending().json())],
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
        let calls = self.calls;
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
                    Form::Chat if calls => choice.sorter.push(&text),
                    _ => text,
                };
                deltas.push((json!({"content": text}), tokens, None));
            }
            News::Done(done) => {
                let mut finish = reason(&done.finish);
                choice.done = Some(done);
                let (text, calls) = choice.sorter.finish();
                if !text.is_empty() {
                    deltas.push((json!({"content": text}), Vec::new(), None));
                }
                if !calls.is_empty() {
                    finish = "tool_calls";
                    let calls = self.calls(index, &calls, true);
                    deltas.push((json!({"tool_calls": calls}), Vec::new(), None));
                }
                deltas.push((json!({}), Vec::new(), Some(finish)));
            }
            News::Failed(_) | News::Embedding(_) => {}
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

    /// Calls as clients read them. Mistral's templates want names of nine letters and digits.
    fn calls(&self, choice: usize, calls: &[Call], chunk: bool) -> Value {
        let number = self.id.bytes().fold(choice as u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3)
        });
        let call = |(index, call): (usize, &Call)| {
            let name = number.wrapping_add((index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
            let mut value = json!({
                "id": format!("{:09x}", name >> 28),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            });
            if chunk {
                value["index"] = index.into();
            }
            value
        };
        calls.iter().enumerate().map(call).collect()
    }

    fn usage(&self) -> Value {
        let done = |choice: &Choice| choice.done.clone();
        let tokens: usize = self
            .choices
            .iter()
            .filter_map(done)
            .map(|done| done.tokens)
            .sum();
        // The choices of a prompt share it: the first one has read it.
        let prompts = self
            .choices
            .chunks(self.each)
            .filter_map(|choices| done(&choices[0]));
        let (prompt, cached) = prompts.fold((0, 0), |(prompt, cached), done| {
            (prompt + done.prompt_tokens, cached + done.cached_tokens)
        });
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
