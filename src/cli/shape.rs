//! What a text must look like, and where it ends.

use std::path::PathBuf;

use anyhow::Context;

use super::common::Usage;
use crate::grammar::{Grammar, Grammars};
use crate::sampler::Constraint;
use crate::tokenizer::Tokenizer;

/// The form of a text.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Form of the text")]
pub struct ShapeArgs {
    /// JSON Schema that the text follows; {} for any JSON
    #[arg(long, value_name = "JSON", group = "form")]
    json_schema: Option<String>,
    /// Regular expression that matches the text from its beginning to its end
    #[arg(long, value_name = "REGEX", group = "form")]
    regex: Option<String>,
    /// Grammar that the text follows: llama.cpp's GBNF, or Lark
    #[arg(long, value_name = "TEXT", group = "form")]
    grammar: Option<String>,
    /// The same from a file
    #[arg(long, value_name = "FILE", group = "form")]
    grammar_file: Option<PathBuf>,
}

impl ShapeArgs {
    /// The constraint on a text, if one is asked for.
    pub fn constraint(&self, tokenizer: &Tokenizer) -> anyhow::Result<Option<Box<dyn Constraint>>> {
        let grammar = self.grammar()?;
        let constraint = |grammar| Grammars::new(tokenizer)?.constraint(&grammar);
        Ok(grammar.map(constraint).transpose()?)
    }

    /// The grammar that texts are to follow, if one is asked for.
    pub fn grammar(&self) -> anyhow::Result<Option<Grammar>> {
        Ok(Some(match self {
            Self {
                json_schema: Some(schema),
                ..
            } => {
                let schema = serde_json::from_str(schema);
                Grammar::Schema(schema.map_err(|_| Usage("--json-schema is no JSON"))?)
            }
            Self {
                regex: Some(regex), ..
            } => Grammar::Regex(regex.clone()),
            Self {
                grammar: Some(text),
                ..
            } => Grammar::text(text),
            Self {
                grammar_file: Some(path),
                ..
            } => {
                let text = std::fs::read_to_string(path);
                let problem = || format!("{}: cannot read the grammar", path.display());
                Grammar::text(&text.with_context(problem)?)
            }
            _ => return Ok(None),
        }))
    }
}
