//! Texts that follow a grammar: JSON Schema, regular expressions, Lark and GBNF, by the crate llguidance.
//!
//! It tells before each token which of the vocabulary may come next; the sampler rules the others out
//! ([`Constraint`]). What is left keeps the probabilities that the model gives it.

mod gbnf;

use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::sampler::Constraint;
use crate::tokenizer::{TokenKind, Tokenizer};

/// What a text must be.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// JSON that this schema allows.
    Schema(Value),
    /// What this regular expression matches from its beginning to its end.
    Regex(String),
    /// What the rule `start` of this grammar derives (Lark, as llguidance has it).
    Lark(String),
    /// What the rule `root` of this grammar derives (GBNF, as llama.cpp has it).
    Gbnf(String),
}

/// Why a grammar cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is wrong, or asks for what cannot be done.
    #[error("the grammar cannot be used: {0}")]
    Grammar(String),
    /// The vocabulary is unfit.
    #[error("no grammar can be used with this vocabulary: {0}")]
    Vocabulary(String),
}

impl Grammar {
    /// Any JSON object.
    pub fn object() -> Self {
        Self::Schema(json!({"type": "object"}))
    }

    /// A grammar in text: GBNF where it has GBNF's sign `::=`, else Lark.
    pub fn text(grammar: &str) -> Self {
        match grammar.contains("::=") {
            true => Self::Gbnf(grammar.to_owned()),
            false => Self::Lark(grammar.to_owned()),
        }
    }

    fn compile(&self) -> Result<TopLevelGrammar, Error> {
        Ok(match self {
            Self::Schema(schema) => {
                let mut schema = schema.clone();
                if let Some(schema) = schema.as_object_mut() {
                    schema.entry("x-guidance").or_insert_with(separators);
                }
                TopLevelGrammar::from_json_schema(schema)
            }
            Self::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Self::Lark(grammar) => TopLevelGrammar::from_lark(grammar.clone()),
            Self::Gbnf(grammar) => {
                TopLevelGrammar::from_lark(gbnf::to_lark(grammar).map_err(Error::Grammar)?)
            }
        })
    }
}

/// Grammars over one vocabulary.
pub struct Grammars {
    factory: ParserFactory,
    ends: Vec<u32>,
}

impl Grammars {
    /// Arranges a vocabulary for grammars: some tens of milliseconds.
    ///
    /// # Errors
    /// Where it has no token that ends a text.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, Error> {
        let vocabulary = |problem: String| Error::Vocabulary(problem);
        let ends = tokenizer.ends().to_vec();
        let Some(&end) = tokenizer.eos().as_ref().or(ends.first()) else {
            return Err(vocabulary("no token ends a text".into()));
        };
        let word = |id: u32| {
            let bytes = tokenizer.token_bytes(id);
            match tokenizer.kind(id) {
                Some(TokenKind::Normal | TokenKind::UserDefined | TokenKind::Byte) => {
                    bytes.to_vec()
                }
                // What is no text can come only where a grammar names it.
                _ => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat(),
            }
        };
        let count = tokenizer.vocab_len() as u32;
        let words: Vec<Vec<u8>> = (0..count).map(word).collect();
        let trie = TokTrie::from(&TokRxInfo::new(count, end), &words).with_eos_tokens(&ends);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let factory = ParserFactory::new_simple(&environment);
        let mut factory = factory.map_err(|error| vocabulary(error.to_string()))?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Self { factory, ends })
    }

    /// A constraint at the beginning of a text.
    ///
    /// # Errors
    /// Where the grammar is wrong.
    pub fn constraint(&self, grammar: &Grammar) -> Result<Box<dyn Constraint>, Error> {
        let wrong = |error: String| Error::Grammar(one_line(&error));
        let parser = self.factory.create_parser(grammar.compile()?);
        let mut matcher = Matcher::new(Ok(parser.map_err(|error| wrong(format!("{error:#}")))?));
        // The first mask shows what compiling alone does not.
        let mask = matcher.compute_mask_or_eos();
        let mask = mask.map_err(|error| wrong(format!("{error:#}")))?;
        if mask.is_zero() {
            return Err(wrong("nothing can be derived from it".into()));
        }
        Ok(Box::new(Following {
            matcher,
            ends: self.ends.clone(),
        }))
    }
}

/// JSON as models have mostly seen it: a space after commas and colons, and no others, of which a model that is lost
/// would write for ever. (llguidance's extension of JSON Schema.)
pub fn separators() -> Value {
    json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "})
}

/// The first line with something on it, and where in the grammar.
fn one_line(message: &str) -> String {
    let lines = message.lines().map(str::trim);
    let lines: Vec<&str> = lines.filter(|line| !line.is_empty()).collect();
    lines.join("; ")
}

/// A text on its way through a grammar.
struct Following {
    matcher: Matcher,
    ends: Vec<u32>,
}

impl Constraint for Following {
    fn rule_out(&mut self, scores: &mut [f32]) {
        // A text whose grammar gives up (it has limits) ends.
        let mask = self.matcher.compute_mask_or_eos().ok();
        for (token, score) in (0..).zip(scores) {
            let allowed = match &mask {
                Some(mask) => mask.is_allowed(token),
                None => self.ends.contains(&token),
            };
            if !allowed {
                *score = f32::NEG_INFINITY;
            }
        }
    }

    fn accept(&mut self, token: u32) {
        if !self.ends.contains(&token) {
            // A failure shows in the next mask.
            let _ = self.matcher.consume_token(token);
        }
    }
}
