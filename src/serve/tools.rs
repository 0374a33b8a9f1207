//! Tools that a model may call, in Mistral's format: `[TOOL_CALLS] [{"name": …, "arguments": {…}}]`.
//!
//! Templates that know tools (Mixtral 8x22B, Mistral 7B v0.3) are given them as they are. To others they are told in
//! the system message, and calls and results are written as text; such models call them well only where they must
//! (`tool_choice`), under a grammar.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use crate::answer::certain;
use crate::chat::{Message, Template};
use crate::tokenizer::Tokenizer;

/// What begins calls; a control token where the vocabulary has it.
pub const MARK: &str = "[TOOL_CALLS]";

/// Tools of a request, and whether they must be called.
pub struct Tools {
    /// As the request has them: `{"type": "function", "function": {…}}`.
    list: Vec<Value>,
    functions: Vec<Function>,
    must: bool,
    /// Whether several may be called at once.
    parallel: bool,
}

#[derive(Clone, Deserialize)]
struct Function {
    name: String,
    #[serde(default)]
    parameters: Option<Value>,
}

/// A function that the model calls.
#[derive(Debug, PartialEq)]
pub struct Call {
    /// Its name.
    pub name: String,
    /// Its arguments: a JSON object as text.
    pub arguments: String,
}

impl Tools {
    /// The tools of a request; none where it has none or forbids them.
    ///
    /// # Errors
    /// Where they are no functions, or the choice names none of them.
    pub fn of(
        tools: Option<Vec<Value>>,
        choice: Option<&Value>,
        parallel: bool,
    ) -> Result<Option<Self>, ApiError> {
        let list = tools.unwrap_or_default();
        let function = |(index, tool): (usize, &Value)| {
            let function = tool.get("function").cloned().unwrap_or_default();
            Function::deserialize(function)
                .map_err(|error| ApiError::field(format!("tools[{index}].function"), error))
        };
        let mut functions = list
            .iter()
            .enumerate()
            .map(function)
            .collect::<Result<Vec<_>, _>>()?;
        let mut must = false;
        match choice {
            None => {}
            Some(Value::String(choice)) => match &choice[..] {
                "auto" => {}
                "none" => return Ok(None),
                "required" => must = true,
                _ => {
                    let problem = "must be auto, none, required, or a function";
                    return Err(ApiError::field("tool_choice", problem));
                }
            },
            Some(choice) => {
                must = true;
                let name = &choice["function"]["name"];
                functions.retain(|function| *name == function.name);
            }
        }
        if functions.is_empty() {
            return match must {
                true => Err(ApiError::field("tool_choice", "there is no such tool")),
                false => Ok(None),
            };
        }
        Ok(Some(Self {
            list,
            functions,
            must,
            parallel,
        }))
    }

    /// What the template is given: messages and tools.
    pub fn prompt(
        &self,
        template: &Template,
        mut messages: Vec<Message>,
    ) -> (Vec<Message>, &[Value]) {
        if template.knows_tools() {
            return (messages, &self.list);
        }
        let list = Value::from(
            self.list
                .iter()
                .map(|tool| tool["function"].clone())
                .collect::<Vec<_>>(),
        );
        let told = format!(
            "You can call these functions: {list}\nTo call some, answer with nothing but \
             {MARK} [{{\"name\": \"…\", \"arguments\": {{…}}}}]"
        );
        match messages
            .first_mut()
            .filter(|message| message.role == "system")
        {
            Some(system) => system.content = format!("{}\n\n{told}", system.content),
            None => messages.insert(0, Message::system(told)),
        }
        (messages, &[])
    }

    /// The grammar (Lark) that calls must follow where there must be some.
    pub fn grammar(&self, tokenizer: &Tokenizer) -> Option<String> {
        if !self.must {
            return None;
        }
        let mut definitions = Map::new();
        let calls = self.functions.iter().enumerate().map(|(index, function)| {
            let mut parameters = function.parameters.clone();
            let parameters = parameters.get_or_insert_with(|| json!({"type": "object"}));
            lift(parameters, &format!("tool{index}-"), &mut definitions);
            json!({
                "type": "object",
                "properties": {"name": {"const": function.name}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": false,
            })
        });
        let calls: Vec<Value> = calls.collect();
        let most = if self.parallel { 16 } else { 1 };
        let schema = json!({
            "type": "array",
            "minItems": 1,
            "maxItems": most,
            "items": {"anyOf": calls},
            "$defs": definitions,
            "x-guidance": crate::grammar::separators(),
        });
        let mark = match tokenizer.id(MARK) {
            Some(id) => format!("<[{id}]>"),
            None => format!("\"{MARK} \""),
        };
        Some(format!("start: {mark} calls\ncalls: %json {schema}\n"))
    }
}

/// Messages as a template that knows no tools can write them.
pub fn as_text(messages: Vec<Message>) -> Vec<Message> {
    let text = |message: Message| {
        if !message.tool_calls.is_empty() {
            let calls = message
                .tool_calls
                .iter()
                .map(|call| call["function"].clone());
            let calls = Value::from(calls.collect::<Vec<_>>());
            return Message::assistant(format!("{MARK} {calls}"));
        }
        match message.role == "tool" {
            true => Message::user(format!("[TOOL_RESULTS] {}", message.content)),
            false => message,
        }
    };
    messages.into_iter().map(text).collect()
}

/// Moves a schema's own definitions to `definitions`, under names that begin with `prefix`.
fn lift(schema: &mut Value, prefix: &str, definitions: &mut Map<String, Value>) {
    rename(schema, prefix);
    for key in ["$defs", "definitions"] {
        let own = schema.as_object_mut().and_then(|schema| schema.remove(key));
        if let Some(Value::Object(own)) = own {
            definitions.extend(
                own.into_iter()
                    .map(|(name, value)| (format!("{prefix}{name}"), value)),
            );
        }
    }
}

/// Changes references accordingly.
fn rename(schema: &mut Value, prefix: &str) {
    match schema {
        Value::Array(items) => items.iter_mut().for_each(|item| rename(item, prefix)),
        Value::Object(fields) => {
            for (key, value) in fields {
                let name = value.as_str().filter(|_| key == "$ref").and_then(|path| {
                    path.strip_prefix("#/$defs/")
                        .or(path.strip_prefix("#/definitions/"))
                });
                match name {
                    Some(name) => *value = format!("#/$defs/{prefix}{name}").into(),
                    None => rename(value, prefix),
                }
            }
        }
        _ => {}
    }
}

/// An answer on its way: text for the reader, and calls, which are told when they are complete.
#[derive(Default)]
pub struct Sorter {
    held: String,
    calls: Option<String>,
}

impl Sorter {
    /// Takes text; returns what of it is for the reader.
    pub fn push(&mut self, text: &str) -> String {
        if let Some(calls) = &mut self.calls {
            *calls += text;
            return String::new();
        }
        self.held += text;
        if let Some(at) = self.held.find(MARK) {
            self.calls = Some(self.held.split_off(at + MARK.len()));
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let rest = self.held.split_off(certain(&self.held, &[MARK]));
        std::mem::replace(&mut self.held, rest)
    }

    /// Ends the answer: the last text, and the calls. What only begins like calls is text.
    pub fn finish(&mut self) -> (String, Vec<Call>) {
        let mut text = std::mem::take(&mut self.held);
        let Some(calls) = self.calls.take() else {
            return (text, Vec::new());
        };
        match read(&calls) {
            Some(calls) => (text, calls),
            None => {
                text += MARK;
                text += &calls;
                (text, Vec::new())
            }
        }
    }
}

/// The calls that a model wrote.
fn read(text: &str) -> Option<Vec<Call>> {
    #[derive(Deserialize)]
    struct Written {
        name: String,
        arguments: Value,
    }
    let calls: Vec<Written> = serde_json::from_str(text.trim()).ok()?;
    let call = |written: Written| Call {
        arguments: match written.arguments {
            Value::String(arguments) => arguments,
            arguments => arguments.to_string(),
        },
        name: written.name,
    };
    (!calls.is_empty()).then(|| calls.into_iter().map(call).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(pieces: &[&str]) -> (String, Vec<Call>) {
        let mut sorter = Sorter::default();
        let text: String = pieces.iter().map(|piece| sorter.push(piece)).collect();
        let (rest, calls) = sorter.finish();
        (text + &rest, calls)
    }

    #[test]
    fn calls_are_told_from_text() {
        let call = |name: &str, arguments: &str| Call {
            name: name.into(),
            arguments: arguments.into(),
        };
        let (text, calls) = sorted(&[
            "Wait. [TOOL",
            "_CALLS",
            "] [{\"name\": \"f\", \"argu",
            "ments\": {\"x\": 1}}]",
        ]);
        assert_eq!((&text[..], calls), ("Wait. ", vec![call("f", "{\"x\":1}")]));
        let (text, calls) = sorted(&[
            "[TOOL_CALLS][{\"name\":\"f\",\"arguments\":{}},{\"name\":\"g\",\"arguments\":\"{}\"}]",
        ]);
        assert_eq!(
            (&text[..], calls),
            ("", vec![call("f", "{}"), call("g", "{}")])
        );
    }

    #[test]
    fn what_only_looks_like_calls_is_text() {
        for text in [
            "a [TOOL_CAL",
            "[TOOL_CALLS] [{\"name\": \"f\"",
            "[TOOL_CALLS] []",
            "[TOOL] [1]",
        ] {
            let pieces: Vec<&str> = text.split_inclusive(' ').collect();
            assert_eq!(sorted(&pieces), (text.to_owned(), vec![]));
        }
    }

    #[test]
    fn definitions_move_with_their_references() {
        let mut schema = json!({
            "properties": {"a": {"$ref": "#/$defs/A"}},
            "$defs": {"A": {"items": {"$ref": "#/$defs/B"}}, "B": {}},
        });
        let mut definitions = Map::new();
        lift(&mut schema, "t-", &mut definitions);
        assert_eq!(
            schema,
            json!({"properties": {"a": {"$ref": "#/$defs/t-A"}}})
        );
        let expected = json!({"t-A": {"items": {"$ref": "#/$defs/t-B"}}, "t-B": {}});
        assert_eq!(Value::Object(definitions), expected);
    }
}
