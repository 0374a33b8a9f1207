//! Reads `tokenizer.json`, the format of Hugging Face's `tokenizers`.
//!
//! Two kinds of BPE come in it: byte-level ones, and SentencePiece's, where every byte has a token (`byte_fallback`) and merges
//! stand for scores. Which pre-tokenizer a byte-level one needs is told by its structure.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use fewbit::tokenizer::{TokenKind, pre_tokenizer_name, pre_tokenizer_patterns};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, SeqAccess, Visitor};
use serde_json::Value as Json;
use serde_json::value::RawValue;

use crate::bounded::{List, Map};
use crate::checkpoint::{MAX_TREE_BYTES, read_json};
use crate::error::{Error, Result};
use crate::vocab::{MAX_BYTES, MAX_TOKENS, Model, Token, Vocabulary, added_kind, pad_token};

#[derive(Deserialize)]
struct TokenizerJson {
    model: Box<RawValue>,
    #[serde(default)]
    added_tokens: List<AddedToken, MAX_TOKENS>,
    normalizer: Option<Box<RawValue>>,
    pre_tokenizer: Option<Box<RawValue>>,
    post_processor: Option<Box<RawValue>>,
}

/// The steps around a model; small, so that they are kept as trees.
struct Steps {
    normalizer: Json,
    pre_tokenizer: Json,
    post_processor: Json,
}

#[derive(Deserialize)]
struct ModelType {
    r#type: Option<String>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Bpe {
    vocab: Map<u32, MAX_TOKENS>,
    merges: List<Merge, MAX_MERGES>,
    unk_token: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
}

/// Most merges: SentencePiece's vocabularies have about two a token.
const MAX_MERGES: usize = 2 * MAX_TOKENS;

/// "left right": so written until version 0.20 of `tokenizers`, as `["left", "right"]` since. Nothing where it is no pair.
struct Merge(Option<String>);

impl Merge {
    fn of(left: &str, right: &str) -> Self {
        let piece = |piece: &str| !piece.is_empty() && !piece.contains(' ');
        Merge((piece(left) && piece(right)).then(|| format!("{left} {right}")))
    }
}

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct AnyForm;
        impl<'de> Visitor<'de> for AnyForm {
            type Value = Merge;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a pair of pieces")
            }

            fn visit_str<E>(self, text: &str) -> std::result::Result<Merge, E> {
                let pair = text.split_once(' ');
                Ok(pair.map_or(Merge(None), |(left, right)| Merge::of(left, right)))
            }

            fn visit_seq<A: SeqAccess<'de>>(
                self,
                mut seq: A,
            ) -> std::result::Result<Merge, A::Error> {
                let (left, right) = (seq.next_element::<String>()?, seq.next_element::<String>()?);
                let mut merge = match (left, right) {
                    (Some(left), Some(right)) => Merge::of(&left, &right),
                    _ => Merge(None),
                };
                while seq.next_element::<IgnoredAny>()?.is_some() {
                    merge = Merge(None);
                }
                Ok(merge)
            }
        }
        deserializer.deserialize_any(AnyForm)
    }
}

/// Reads and checks `path`.
pub fn read(path: &Path) -> Result<Vocabulary> {
    let json: TokenizerJson = read_json(path, MAX_BYTES)?;
    let wrong = |e: serde_json::Error| Error::input(path, format!("model: {e}"));
    let ModelType { r#type: kind } = serde_json::from_str(json.model.get()).map_err(wrong)?;
    if let Some(kind) = kind.filter(|kind| kind != "BPE") {
        let what = format!("model.type is {kind:?}; the Mixtral family is BPE");
        return Err(Error::input(path, what));
    }
    let mut bpe: Bpe = serde_json::from_str(json.model.get()).map_err(wrong)?;
    let around = Steps {
        normalizer: tree(path, "normalizer", json.normalizer.as_deref())?,
        pre_tokenizer: tree(path, "pre_tokenizer", json.pre_tokenizer.as_deref())?,
        post_processor: tree(path, "post_processor", json.post_processor.as_deref())?,
    };
    let merges: Vec<String> = std::mem::take(&mut bpe.merges.0)
        .into_iter()
        .enumerate()
        .map(|(rank, merge)| {
            merge.0.ok_or_else(|| {
                Error::input(
                    path,
                    format!("model.merges: number {rank} is no pair of pieces"),
                )
            })
        })
        .collect::<Result<_>>()?;

    let mut tokens = tokens(path, &bpe, &json.added_tokens.0)?;
    let model = if bpe.byte_fallback {
        score_by_merges(&mut tokens, &merges);
        Model::SentencePiece {
            add_space_prefix: adds_space(&around),
        }
    } else {
        Model::ByteLevel {
            pre: pre_tokenizer(path, &around.pre_tokenizer)?,
            merges,
        }
    };
    let id = |text: &str| {
        tokens
            .iter()
            .position(|token| token.text == text)
            .map(|id| id as u32)
    };
    let bos = leading_token(&around.post_processor).and_then(|text| id(&text));
    Ok(Vocabulary {
        unk: bpe.unk_token.as_deref().and_then(id),
        bos,
        eos: None,
        pad: None,
        add_bos: bos.is_some(),
        add_eos: false,
        model,
        tokens,
    })
}

/// The vocabulary in the order of ids; holes are filled.
fn tokens(path: &Path, bpe: &Bpe, added: &[AddedToken]) -> Result<Vec<Token>> {
    let ids = bpe
        .vocab
        .0
        .values()
        .copied()
        .chain(added.iter().map(|token| token.id));
    let len = ids.max().map_or(0, |id| id as usize + 1);
    if len == 0 || len > MAX_TOKENS {
        return Err(Error::input(
            path,
            format!("model.vocab: ids up to {len}; vocabularies are smaller and not empty"),
        ));
    }
    let mut tokens: Vec<Token> = (0..len).map(pad_token).collect();
    for (text, &id) in &bpe.vocab.0 {
        let kind = if bpe.unk_token.as_deref() == Some(text) {
            TokenKind::Unknown
        } else if bpe.byte_fallback && is_byte(text) {
            TokenKind::Byte
        } else {
            TokenKind::Normal
        };
        let token = &mut tokens[id as usize];
        if token.kind != TokenKind::Unused {
            return Err(Error::input(
                path,
                format!(
                    "model.vocab: id {id} stands for {:?} and {text:?}",
                    token.text
                ),
            ));
        }
        *token = Token {
            text: text.clone(),
            score: 0.0,
            kind,
        };
    }
    for AddedToken {
        id,
        content,
        special,
    } in added
    {
        let token = &mut tokens[*id as usize];
        if !matches!(token.kind, TokenKind::Unknown | TokenKind::Byte) || token.text != *content {
            *token = Token {
                text: content.clone(),
                score: 0.0,
                kind: added_kind(content, *special),
            };
        }
    }
    Ok(tokens)
}

fn is_byte(text: &str) -> bool {
    let digits = text
        .strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// Scores in the merges' order: what is merged first gets the highest, pieces that no merge makes come last.
fn score_by_merges(tokens: &mut [Token], merges: &[String]) {
    let mut ranks: HashMap<String, usize> = HashMap::with_capacity(merges.len());
    for (rank, merge) in merges.iter().enumerate() {
        ranks.entry(merge.replacen(' ', "", 1)).or_insert(rank);
    }
    for token in tokens
        .iter_mut()
        .filter(|token| token.kind == TokenKind::Normal)
    {
        token.score = -(ranks.get(&token.text).copied().unwrap_or(merges.len()) as f32);
    }
}

/// Whether a text gets a space in front: by a normalizer that prepends `▁`, or by the pre-tokenizer of the newer files.
fn adds_space(json: &Steps) -> bool {
    steps(&json.normalizer, "normalizers")
        .iter()
        .any(|step| step["type"] == "Prepend")
        || steps(&json.pre_tokenizer, "pretokenizers")
            .iter()
            .any(|step| {
                step["type"] == "Metaspace"
                    && step["prepend_scheme"] != "never"
                    && step["add_prefix_space"] != false
            })
}

/// A part of the file as a tree.
fn tree(path: &Path, name: &str, part: Option<&RawValue>) -> Result<Json> {
    let text = part.map_or("null", RawValue::get);
    if text.len() as u64 > MAX_TREE_BYTES {
        let what = format!("{name}: {} bytes are too many", text.len());
        return Err(Error::input(path, what));
    }
    serde_json::from_str(text).map_err(|e| Error::input(path, format!("{name}: {e}")))
}

/// The steps of a sequence, or the single one.
fn steps<'j>(json: &'j Json, key: &str) -> Vec<&'j Json> {
    match json[key].as_array() {
        Some(steps) => steps
            .iter()
            .flat_map(|step| self::steps(step, key))
            .collect(),
        None => vec![json],
    }
}

/// The name of a byte-level pre-tokenizer, by the patterns that it cuts with.
fn pre_tokenizer(path: &Path, json: &Json) -> Result<&'static str> {
    let unsupported = |what: String| Error::input(path, format!("pre_tokenizer: {what}"));
    let mut patterns: Vec<&str> = Vec::new();
    let mut byte_level = false;
    for step in steps(json, "pretokenizers") {
        match step["type"].as_str() {
            Some("Split") => patterns.push(
                step["pattern"]["Regex"]
                    .as_str()
                    .ok_or_else(|| unsupported(format!("splits at {}", step["pattern"])))?,
            ),
            Some("Digits") if step["individual_digits"] == true => patterns.push(r"\p{N}"),
            Some("Digits") => patterns.push(r"\p{N}+"),
            Some("ByteLevel") => {
                if step["add_prefix_space"] == true {
                    return Err(unsupported(
                        "puts a space in front of texts, which GGUF's \"gpt2\" tokenizer cannot"
                            .into(),
                    ));
                }
                if step["use_regex"] != false {
                    patterns
                        .extend(pre_tokenizer_patterns("gpt-2").expect("the runtime has GPT-2's"));
                }
                byte_level = true;
            }
            _ => {
                return Err(unsupported(format!(
                    "step {} is not supported",
                    step["type"]
                )));
            }
        }
    }
    if !byte_level {
        return Err(unsupported("is not byte-level".into()));
    }
    pre_tokenizer_name(&patterns).ok_or_else(|| {
        unsupported(format!("cuts by {patterns:?}, which is none of the known ones (smollm, llama-bpe, qwen2, tekken, gpt-2)"))
    })
}

/// The token that the post-processor puts in front of a text.
fn leading_token(json: &Json) -> Option<String> {
    let template = steps(json, "processors")
        .into_iter()
        .find(|step| step["type"] == "TemplateProcessing")?;
    Some(
        template["single"][0]["SpecialToken"]["id"]
            .as_str()?
            .to_owned(),
    )
}
