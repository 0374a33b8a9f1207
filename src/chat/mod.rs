//! Conversations → prompts: messages through the file's chat template.
//!
//! Templates are Jinja, rendered as transformers does (`trim_blocks`, `lstrip_blocks`, Python's string
//! methods, `raise_exception`, `strftime_now`, `tojson`). A file without one gets a template by what its
//! vocabulary and name tell ([`Style`]).
//!
//! **What a message says is never a control token.** The template's own `<|im_end|>` ends a turn; the same letters in
//! a message must not. Inside such letters a mark is set before rendering, a Unicode noncharacter that the conversation
//! does not use; the template otherwise sees the message as it is. The rendered text is cut at
//! control tokens, which broken letters do not match, and the mark is taken out of the stretches between.

mod styles;

use std::borrow::Cow;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value, context};
use serde::ser::Serialize;

pub use styles::Style;

use crate::gguf::{self, Metadata};
use crate::tokenizer::{self, Tokenizer};

/// The key under which a file keeps its template.
pub const TEMPLATE_KEY: &str = "tokenizer.chat_template";

/// Work that one rendering may do (minijinja's unit, about an instruction or 64 bytes): a conversation of
/// megabytes stays below, an endless template ends in a second.
const FUEL: u64 = 10_000_000;

/// Unicode's noncharacters, of which one is the mark.
const MARKS: std::ops::RangeInclusive<char> = '\u{FDD0}'..='\u{FDEF}';

/// What can go wrong between a conversation and its prompt.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file's template is no template; names file, key and line.
    #[error(transparent)]
    Metadata(#[from] gguf::Error),
    /// The template does not take this conversation, in its own words.
    #[error("the chat template refuses this conversation: {0}")]
    Refused(String),
    /// The template failed.
    #[error(
        "the chat template ({name}) failed: {problem}; another one can be chosen by name: {}",
        Style::names()
    )]
    Failed {
        /// The key, or the style's name.
        name: Cow<'static, str>,
        /// What went wrong, and in which line.
        problem: String,
    },
    /// The prompt could not be tokenized.
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// What is said.
    pub content: String,
    /// Tools that the assistant calls, as OpenAI writes them but for the arguments, which are an object:
    /// `{"id": …, "function": {"name": …, "arguments": {…}}}`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<serde_json::Value>,
    /// The call that a tool answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message {
            role: role.into(),
            content: content.into(),
            tool_calls: Vec::new(),
            tool_call_id: None,
        }
    }

    /// What the user says.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// What the model said.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }

    /// What the model is told in advance.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }
}

/// A chat template, compiled.
#[derive(Debug)]
pub struct Template {
    environment: Environment<'static>,
    /// Where it comes from.
    name: Cow<'static, str>,
    bos: String,
    eos: String,
}

impl Template {
    /// The file's template; where it has none, the style that fits its vocabulary and name.
    pub fn from_metadata(metadata: &Metadata, tokenizer: &Tokenizer) -> Result<Template, Error> {
        match metadata.str(TEMPLATE_KEY)? {
            None => Ok(Self::from_style(Style::of(metadata, tokenizer), tokenizer)),
            Some(source) => Self::compile(TEMPLATE_KEY.into(), source.to_owned(), tokenizer)
                .map_err(|error| {
                    let problem = format!(
                        "holds no valid Jinja template: {}; one can be chosen by name instead: {}",
                        describe(&error),
                        Style::names()
                    );
                    metadata.error(TEMPLATE_KEY, problem).into()
                }),
        }
    }

    /// A template of our own.
    pub fn from_style(style: Style, tokenizer: &Tokenizer) -> Template {
        Self::compile(style.name().into(), style.source().to_owned(), tokenizer)
            .expect("our templates compile")
    }

    fn compile(
        name: Cow<'static, str>,
        source: String,
        tokenizer: &Tokenizer,
    ) -> Result<Template, minijinja::Error> {
        let mut environment = Environment::new();
        environment.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()?,
        );
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(FUEL));
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        environment.add_filter("parsed", parsed);
        environment.add_template_owned(name.clone(), source)?;
        let text = |id: Option<u32>| {
            id.and_then(|id| tokenizer.piece(id))
                .unwrap_or_default()
                .to_owned()
        };
        Ok(Template {
            environment,
            name,
            bos: text(tokenizer.bos()),
            eos: text(tokenizer.eos()),
        })
    }

    /// Where the template comes from: [`TEMPLATE_KEY`], or the name of a [`Style`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it can be given tools.
    pub fn knows_tools(&self) -> bool {
        let template = self.environment.get_template(&self.name);
        template.is_ok_and(|template| template.source().contains("tools"))
    }

    /// The prompt as text, up to where the assistant speaks.
    pub fn render(&self, messages: &[Message]) -> Result<String, Error> {
        self.render_with(messages, &[])
    }

    /// The same where the model may call `tools`: `{"type": "function", "function": {…}}`.
    pub fn render_with(
        &self,
        messages: &[Message],
        tools: &[serde_json::Value],
    ) -> Result<String, Error> {
        let template = self
            .environment
            .get_template(&self.name)
            .map_err(|error| self.failed(&error))?;
        let variables = context! {
            messages => Value::from(minijinja::value::Serde(messages)),
            bos_token => &self.bos,
            eos_token => &self.eos,
            add_generation_prompt => true,
            tools => (!tools.is_empty()).then(|| Value::from(minijinja::value::Serde(tools))),
        };
        template
            .render(variables)
            .map_err(|error| match refusal(&error) {
                Some(message) => Error::Refused(message),
                None => self.failed(&error),
            })
    }

    /// The prompt as ids, up to where the assistant speaks, with one BOS where the vocabulary adds one.
    /// What messages say is text, whatever it looks like.
    pub fn prompt_ids(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
    ) -> Result<Vec<u32>, Error> {
        self.prompt_ids_with(tokenizer, messages, &[])
    }

    /// The same where the model may call `tools`; what they say is text too.
    pub fn prompt_ids_with(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        tools: &[serde_json::Value],
    ) -> Result<Vec<u32>, Error> {
        let conversation = serde_json::to_string(&(messages, tools)).expect("messages are JSON");
        let mark = MARKS.clone().find(|&mark| !conversation.contains(mark));
        let mark = mark.ok_or_else(|| {
            Error::Refused("it uses all of Unicode's noncharacters U+FDD0 to U+FDEF".into())
        })?;
        let broken = |text: &str| tokenizer.break_control(text, mark);
        let marked: Vec<Message> = messages
            .iter()
            .map(|m| Message {
                role: broken(&m.role),
                content: broken(&m.content),
                tool_calls: m
                    .tool_calls
                    .iter()
                    .map(|call| break_all(call, &broken))
                    .collect(),
                tool_call_id: m.tool_call_id.as_deref().map(broken),
            })
            .collect();
        let tools: Vec<_> = tools.iter().map(|tool| break_all(tool, &broken)).collect();
        let mut ids = tokenizer.encode_broken(&self.render_with(&marked, &tools)?, mark)?;
        if let Some(bos) = tokenizer.bos().filter(|_| tokenizer.adds_bos())
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// The white space (ASCII) that the template writes between a prompt and its answer. A
    /// model has learnt to begin with it; the answer itself begins after it. Empty where none
    /// is written or the template does not tell.
    pub fn lead(&self) -> String {
        let asked = [Message::user("?")];
        let answered = [Message::user("?"), Message::assistant("!")];
        let (Ok(prompt), Ok(text)) = (self.render(&asked), self.render(&answered)) else {
            return String::new();
        };
        let rest = text.strip_prefix(&prompt).unwrap_or_default();
        let lead = rest.split('!').next().unwrap_or_default();
        match lead.bytes().all(|byte| byte.is_ascii_whitespace()) {
            true => lead.to_owned(),
            false => String::new(),
        }
    }

    fn failed(&self, error: &minijinja::Error) -> Error {
        Error::Failed {
            name: self.name.clone(),
            problem: describe(error),
        }
    }
}

/// `value` with every text in it changed by `broken`.
fn break_all(value: &serde_json::Value, broken: &impl Fn(&str) -> String) -> serde_json::Value {
    use serde_json::Value as Json;
    match value {
        Json::String(text) => broken(text).into(),
        Json::Array(items) => items.iter().map(|item| break_all(item, broken)).collect(),
        Json::Object(fields) => {
            let fields = fields.iter();
            let fields = fields.map(|(key, value)| (broken(key), break_all(value, broken)));
            Json::Object(fields.collect())
        }
        other => other.clone(),
    }
}

/// One line: what, and in which line of the template.
fn describe(error: &minijinja::Error) -> String {
    let what = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    match error.line() {
        Some(line) => format!("{what} (its line {line})"),
        None => what,
    }
}

/// What a template said to `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

fn refusal(error: &minijinja::Error) -> Option<String> {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if let Some(Refusal(message)) = error.downcast_ref() {
            return Some(message.clone());
        }
        source = error.source();
    }
    None
}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(
        minijinja::Error::new(ErrorKind::InvalidOperation, message.clone())
            .with_source(Refusal(message)),
    )
}

/// The local time in strftime's terms.
fn strftime_now(format: String) -> Result<String, minijinja::Error> {
    jiff::fmt::strtime::format(&format, &jiff::Zoned::now()).map_err(|error| {
        minijinja::Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now({format:?}): {error}"),
        )
    })
}

/// What `text` says as JSON; itself where it is none. (Our own, for results of tools.)
fn parsed(text: String) -> Value {
    let value = serde_json::from_str(&text);
    let value = value.unwrap_or(serde_json::Value::String(text));
    Value::from(minijinja::value::Serde(value))
}

/// Python's `json.dumps`: a space after `,` and `:`, nothing escaped for HTML; `indent` as there.
fn to_json(value: &Value, options: minijinja::value::Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Accepted because templates pass them; their defaults are what is done.
    let _: Option<Value> = options.get("ensure_ascii")?;
    let _: Option<Value> = options.get("separators")?;
    options.assert_all_used()?;
    let mut json = Vec::new();
    let written = match indent {
        Some(width) => {
            let indent = " ".repeat(width.min(64));
            let style = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(
                &mut json, style,
            ))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(
            &mut json, Spaced,
        )),
    };
    written.map_err(|error| {
        minijinja::Error::new(ErrorKind::BadSerialization, "tojson failed").with_source(error)
    })?;
    Ok(Value::from_safe_string(
        String::from_utf8(json).expect("JSON is UTF-8"),
    ))
}

/// serde_json's compact form with Python's separators.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}
