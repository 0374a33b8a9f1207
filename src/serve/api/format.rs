//! What an answer must look like: `response_format`, or a grammar.

use serde::Deserialize;
use serde_json::Value;

use super::request::Object;
use crate::grammar::Grammar;
use crate::serve::error::ApiError;

#[derive(Deserialize)]
struct Fields {
    response_format: Option<Format>,
    json_schema: Option<Value>,
    grammar: Option<String>,
    regex: Option<String>,
}

#[derive(Deserialize)]
struct Format {
    #[serde(rename = "type")]
    kind: String,
    json_schema: Option<Named>,
    /// llama.cpp's place for it.
    schema: Option<Value>,
}

#[derive(Deserialize)]
struct Named {
    schema: Option<Value>,
}

/// The grammar that a request asks for: OpenAI's `response_format`, and beside it `json_schema` and `grammar` (GBNF or
/// Lark) as llama.cpp's server takes them, and `regex`.
///
/// # Errors
/// Where it asks for several, or for one that is not known.
pub fn of(object: &Object) -> Result<Option<Grammar>, ApiError> {
    let fields: Fields = object.parse()?;
    let format = match fields.response_format {
        None => None,
        Some(Format {
            kind,
            json_schema,
            schema,
        }) => match &kind[..] {
            "text" => None,
            "json_object" => Some(schema.map_or_else(Grammar::object, Grammar::Schema)),
            "json_schema" => {
                let schema = json_schema.and_then(|named| named.schema).or(schema);
                let missing = || ApiError::field("response_format.json_schema", "has no schema");
                Some(Grammar::Schema(schema.ok_or_else(missing)?))
            }
            _ => {
                let problem = "must be text, json_object or json_schema";
                return Err(ApiError::field("response_format.type", problem));
            }
        },
    };
    let wanted = [
        format,
        fields.json_schema.map(Grammar::Schema),
        fields
            .grammar
            .as_deref()
            .filter(|grammar| !grammar.is_empty())
            .map(Grammar::text),
        fields.regex.map(Grammar::Regex),
    ];
    let mut wanted = wanted.into_iter().flatten();
    match (wanted.next(), wanted.next()) {
        (_, Some(_)) => Err(ApiError::bad(
            "only one of response_format, json_schema, grammar and regex can be followed",
        )),
        (grammar, None) => Ok(grammar),
    }
}
