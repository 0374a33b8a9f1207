//! `/v1/chat/completions`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use serde_json::Value;

use super::format;
use super::reply::{Form, Reply};
use super::request::{Common, MOST_LIKELY, Object, blocking};
use crate::chat::Message;
use crate::grammar::Grammar;
use crate::serve::app::{App, Wish};
use crate::serve::error::ApiError;
use crate::serve::job::{Purpose, Text, Writer};
use crate::serve::tools::{Tools, as_text};

#[derive(Deserialize)]
struct Fields {
    messages: Vec<Turn>,
    #[serde(default)]
    logprobs: bool,
    top_logprobs: Option<usize>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    #[serde(default = "yes")]
    parallel_tool_calls: bool,
}

fn yes() -> bool {
    true
}

/// A message as OpenAI has it.
#[derive(Deserialize)]
struct Turn {
    role: Role,
    content: Option<Content>,
    tool_calls: Option<Vec<Value>>,
    tool_call_id: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    #[serde(alias = "developer")]
    System,
    User,
    Assistant,
    #[serde(alias = "function")]
    Tool,
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected a string, or a list of parts of type text"
)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Part {
    Text { text: String },
}

impl From<Turn> for Message {
    fn from(turn: Turn) -> Self {
        let content = match turn.content {
            None => String::new(),
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                let text = |Part::Text { text }: &Part| text.clone();
                parts.iter().map(text).collect()
            }
        };
        // OpenAI writes arguments as text, templates expect an object.
        let mut tool_calls = turn.tool_calls.unwrap_or_default();
        for call in &mut tool_calls {
            let arguments = call.pointer_mut("/function/arguments");
            if let Some(arguments) = arguments
                && let Some(object) = arguments
                    .as_str()
                    .and_then(|text| serde_json::from_str(text).ok())
            {
                *arguments = object;
            }
        }
        let role = match turn.role {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        };
        Message {
            tool_calls,
            tool_call_id: turn.tool_call_id,
            ..Message::new(role, content)
        }
    }
}

/// Answers a conversation.
pub async fn complete(State(app): State<Arc<App>>, object: Object) -> Result<Response, ApiError> {
    let common: Common = object.parse()?;
    let fields: Fields = object.parse()?;
    if fields.top_logprobs.is_some_and(|count| count > MOST_LIKELY) {
        let problem = format!("must be within 0 and {MOST_LIKELY}");
        return Err(ApiError::field("top_logprobs", problem));
    }
    let tools = Tools::of(
        fields.tools,
        fields.tool_choice.as_ref(),
        fields.parallel_tool_calls,
    )?;
    let calls = tools.is_some();
    let grammar = match tools
        .as_ref()
        .and_then(|tools| tools.grammar(app.engine.tokenizer()))
    {
        Some(calls) => Some(Grammar::Lark(calls)),
        None => format::of(&object)?,
    };
    let (id, seed) = app.next();
    let choices = common.choices()?;
    let settings = common.settings(&object, &app.config.settings, seed, choices)?;
    let limit = common.limit()?;
    let stops = common.stops();
    let likely = fields.logprobs.then(|| fields.top_logprobs.unwrap_or(0));

    let messages: Vec<Message> = fields.messages.into_iter().map(Message::from).collect();
    let events = blocking(&app, move |app| {
        let (tokenizer, template) = (app.engine.tokenizer(), &app.template);
        let (messages, tools) = match &tools {
            Some(tools) => tools.prompt(template, messages),
            None => (messages, &[][..]),
        };
        let messages = if template.knows_tools() {
            messages
        } else {
            as_text(messages)
        };
        let prompt = Arc::new(template.prompt_ids_with(tokenizer, &messages, tools)?);
        let wish = |settings| {
            let writer = Writer {
                limit: limit.unwrap_or(usize::MAX),
                sampler: app.sampler(settings, grammar.as_ref())?,
                text: Text {
                    lead: Some(app.lead.clone()),
                    stops: stops.clone(),
                    special: calls,
                },
                likely,
            };
            Ok(Wish::new(
                Arc::clone(&prompt),
                Purpose::Text(Box::new(writer)),
            ))
        };
        let wishes = settings
            .into_iter()
            .map(wish)
            .collect::<Result<_, ApiError>>()?;
        app.submit(wishes)
    });
    let events = events.await?;
    let reply = Reply::new(&app, &id, Form::Chat, vec![String::new()], choices)
        .with_logprobs(fields.logprobs)
        .with_calls(calls)
        .with_usage(common.stream_options.include_usage);
    match common.stream {
        true => Ok(reply.stream(events)),
        false => reply.whole(events).await,
    }
}
