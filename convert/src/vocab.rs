//! The tokenizer's metadata, from what a checkpoint folder holds.
//!
//! The vocabulary comes from the first of these that is there: `tokenizer.model` (SentencePiece),
//! `tokenizer.json`, `tekken.json`. `added_tokens.json` and `tokenizer_config.json` add tokens and say
//! which begin and end a text; `chat_template.jinja` or `tokenizer_config.json` hold the chat template.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use fewbit::gguf::{Array, Value};
use fewbit::tokenizer::TokenKind;
use serde_json::Value as Json;

use crate::checkpoint::{MAX_TREE_BYTES, read_json};
use crate::error::{Error, Result};
use crate::{sentencepiece, tekken, tokenizer_json};

/// A token of the vocabulary.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// As the vocabulary writes it.
    pub text: String,
    /// Of SentencePiece vocabularies: higher is merged first.
    pub score: f32,
    /// What it is for.
    pub kind: TokenKind,
}

/// How a vocabulary makes tokens of a text.
#[derive(Clone, Debug, PartialEq)]
pub enum Model {
    /// By scores.
    SentencePiece {
        /// Whether a text gets a space in front.
        add_space_prefix: bool,
    },
    /// By merges, each "left right", in words that the pre-tokenizer of that name cuts.
    ByteLevel {
        /// `tokenizer.ggml.pre`.
        pre: &'static str,
        /// First is merged first.
        merges: Vec<String>,
    },
}

/// A tokenizer between the files that it comes in and the metadata that it becomes.
#[derive(Clone, Debug, PartialEq)]
pub struct Vocabulary {
    /// How it works.
    pub model: Model,
    /// In the order of their ids.
    pub tokens: Vec<Token>,
    /// Begins a text.
    pub bos: Option<u32>,
    /// Ends a text.
    pub eos: Option<u32>,
    /// Stands for what no other token covers.
    pub unk: Option<u32>,
    /// Fills up batches.
    pub pad: Option<u32>,
    /// Whether BOS is put in front of a text.
    pub add_bos: bool,
    /// Whether EOS is put behind it.
    pub add_eos: bool,
}

/// The most tokens that a vocabulary may have: four times as many as the largest that exist.
pub const MAX_TOKENS: usize = 1 << 20;

/// Largest `tokenizer.model`, `tokenizer.json` and `tekken.json` that are read. Gemma's `tokenizer.json`, of 256,000
/// pieces, has 33 MB.
pub(crate) const MAX_BYTES: u64 = 64 << 20;

/// Longest piece that merges are sought for; SentencePiece's trainer makes none above 16 characters unless told to.
const MAX_MERGED_BYTES: usize = 256;

/// Scores of tokens that no merge makes, as llama.cpp's converter writes them.
const ADDED_SCORE: f32 = -1000.0;
const PAD_SCORE: f32 = -10000.0;

/// SentencePiece models by the names they have in folders; Mistral's own carry a version.
const SENTENCEPIECE_NAMES: [&str; 4] = [
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer.model.v2",
    "tokenizer.model.v1",
];

/// Whether a checkpoint folder holds a file that a vocabulary is read from.
pub fn is_present(dir: &Path) -> bool {
    let others = ["tokenizer.json", "tekken.json"];
    let mut names = SENTENCEPIECE_NAMES.iter().chain(&others);
    names.any(|name| dir.join(name).is_file())
}

/// All tokenizer metadata of a checkpoint folder, the chat template included.
pub fn from_checkpoint(dir: &Path) -> Result<Vec<(String, Value)>> {
    let here = |name: &str| Some(dir.join(name)).filter(|path| path.is_file());
    let mut vocabulary = if let Some(path) = SENTENCEPIECE_NAMES.iter().find_map(|name| here(name))
    {
        sentencepiece::read(&path)?.into()
    } else if let Some(path) = here("tokenizer.json") {
        tokenizer_json::read(&path)?
    } else if let Some(path) = here("tekken.json") {
        tekken::read(&path)?
    } else {
        return Err(Error::input(
            dir,
            "has no tokenizer: download tokenizer.model, tokenizer.json or tekken.json of this model into it",
        ));
    };

    if let Some(path) = here("added_tokens.json") {
        let added: HashMap<String, u32> = read_json(&path, MAX_TREE_BYTES)?;
        let mut added: Vec<_> = added.into_iter().collect();
        added.sort_by_key(|&(_, id)| id);
        for (text, id) in added {
            vocabulary.add_token(&path, id, text, false)?;
        }
    }
    let config = optional_json(here("config.json").or_else(|| here("params.json")))?;
    let settings_path = dir.join("tokenizer_config.json");
    let settings = optional_json(here("tokenizer_config.json"))?;
    vocabulary.apply_settings(&settings_path, &settings, &config)?;
    if let Some(size) = config["vocab_size"].as_u64() {
        vocabulary.pad_to(dir, size)?;
    }

    let mut metadata = vocabulary.into_metadata(dir)?;
    if let Some(template) = chat_template(here("chat_template.jinja"), &settings)? {
        metadata.push((fewbit::chat::TEMPLATE_KEY.into(), Value::String(template)));
    }
    Ok(metadata)
}

impl Vocabulary {
    /// Sets token `id`. One that is there already keeps its kind unless it was plain text, so that `<unk>` stays unknown.
    fn add_token(&mut self, path: &Path, id: u32, text: String, special: bool) -> Result<()> {
        let kind = added_kind(&text, special);
        let at = id as usize;
        if at >= MAX_TOKENS {
            return Err(Error::input(
                path,
                format!("gives {text:?} the id {id}: vocabularies are smaller"),
            ));
        }
        while self.tokens.len() <= at {
            let hole = pad_token(self.tokens.len());
            self.tokens.push(hole);
        }
        let token = &mut self.tokens[at];
        if token.text != text {
            *token = Token {
                text,
                score: ADDED_SCORE,
                kind,
            };
        } else if token.kind == TokenKind::Normal {
            token.kind = kind;
        }
        Ok(())
    }

    /// What `tokenizer_config.json` says of added tokens and of the ends of a text; where it says nothing of these, `config.json`.
    fn apply_settings(&mut self, path: &Path, settings: &Json, config: &Json) -> Result<()> {
        if let Some(added) = settings["added_tokens_decoder"].as_object() {
            for (id, token) in added {
                let (Ok(id), Some(text)) = (id.parse(), token["content"].as_str()) else {
                    return Err(Error::input(
                        path,
                        format!("added_tokens_decoder: entry {id:?} is no token"),
                    ));
                };
                self.add_token(
                    path,
                    id,
                    text.to_owned(),
                    token["special"].as_bool().unwrap_or(false),
                )?;
            }
        }
        for (role, id) in [
            ("bos", &mut self.bos),
            ("eos", &mut self.eos),
            ("unk", &mut self.unk),
            ("pad", &mut self.pad),
        ] {
            let named = &settings[format!("{role}_token")];
            let named = named.as_str().or(named["content"].as_str());
            if let Some(text) = named.filter(|text| !text.is_empty()) {
                let found = self.tokens.iter().position(|token| token.text == text);
                if found.is_none() && ["bos", "eos"].contains(&role) {
                    return Err(Error::input(
                        path,
                        format!(
                            "names {text:?} as {role}_token, which the vocabulary does not have"
                        ),
                    ));
                }
                // Fine-tunes often name a padding token that the vocabulary never got; nothing
                // here needs it.
                *id = found.map(|found| found as u32).or(*id);
            } else if id.is_none() {
                let number = &config[format!("{role}_token_id")];
                *id = number
                    .as_u64()
                    .or(number[0].as_u64())
                    .and_then(|id| u32::try_from(id).ok());
            }
        }
        self.add_bos =
            settings["add_bos_token"].as_bool().unwrap_or(self.add_bos) && self.bos.is_some();
        self.add_eos =
            settings["add_eos_token"].as_bool().unwrap_or(self.add_eos) && self.eos.is_some();
        Ok(())
    }

    /// Fills the vocabulary up to the rows that the embedding has.
    fn pad_to(&mut self, dir: &Path, size: u64) -> Result<()> {
        let have = self.tokens.len();
        if size < have as u64 {
            return Err(Error::input(
                dir,
                format!(
                    "the tokenizer has {have} tokens, but vocab_size is {size}: tokenizer and weights are of different models"
                ),
            ));
        }
        if size > MAX_TOKENS as u64 {
            return Err(Error::input(
                dir,
                format!("vocab_size is {size}, but the tokenizer has {have} tokens"),
            ));
        }
        self.tokens.extend((have..size as usize).map(pad_token));
        Ok(())
    }

    fn into_metadata(self, dir: &Path) -> Result<Vec<(String, Value)>> {
        let mut metadata = Vec::new();
        let mut put =
            |key: &str, value: Value| metadata.push((format!("tokenizer.ggml.{key}"), value));
        let strings = |items| Value::Array(Array::String(items));
        let merges = match &self.model {
            Model::SentencePiece { .. } => {
                put("model", Value::String("llama".into()));
                put("pre", Value::String("default".into()));
                merges_by_score(dir, &self.tokens)?
            }
            Model::ByteLevel { pre, merges } => {
                put("model", Value::String("gpt2".into()));
                put("pre", Value::String((*pre).into()));
                merges.clone()
            }
        };
        put(
            "tokens",
            strings(self.tokens.iter().map(|token| token.text.clone()).collect()),
        );
        if let Model::SentencePiece { .. } = self.model {
            put(
                "scores",
                Value::Array(Array::F32(
                    self.tokens.iter().map(|token| token.score).collect(),
                )),
            );
        }
        put(
            "token_type",
            Value::Array(Array::I32(
                self.tokens.iter().map(|token| token.kind as i32).collect(),
            )),
        );
        put("merges", strings(merges));
        let ids = [
            ("bos_token_id", self.bos),
            ("eos_token_id", self.eos),
            ("unknown_token_id", self.unk),
            ("padding_token_id", self.pad),
        ];
        for (key, id) in ids {
            if let Some(id) = id.filter(|&id| (id as usize) < self.tokens.len()) {
                put(key, Value::U32(id));
            }
        }
        put("add_bos_token", Value::Bool(self.add_bos));
        put("add_eos_token", Value::Bool(self.add_eos));
        if let Model::SentencePiece { add_space_prefix } = self.model {
            put("add_space_prefix", Value::Bool(add_space_prefix));
        }
        Ok(metadata)
    }
}

/// SentencePiece's scores as the list of merges that other readers of GGUF want: every split of a piece into two
/// pieces, best piece first; of one piece's splits, the one of the lower ids.
fn merges_by_score(dir: &Path, tokens: &[Token]) -> Result<Vec<String>> {
    /// Those of the largest vocabularies have a third.
    const MAX_MERGES_BYTES: usize = 64 << 20;
    let mut bytes = 0;
    let ids: HashMap<&str, usize> = (0..tokens.len())
        .filter(|&id| tokens[id].kind == TokenKind::Normal)
        .map(|id| (tokens[id].text.as_str(), id))
        .collect();
    let mut order: Vec<usize> = ids.values().copied().collect();
    order.sort_by(|&a, &b| tokens[b].score.total_cmp(&tokens[a].score).then(a.cmp(&b)));
    let mut merges = Vec::new();
    for id in order {
        let piece = &tokens[id].text;
        if piece.len() > MAX_MERGED_BYTES {
            continue; // its splits would be many and long, and no text needs them
        }
        let mut splits: Vec<(usize, usize)> = piece
            .char_indices()
            .skip(1)
            .filter_map(|(at, _)| Some((*ids.get(&piece[..at])?, *ids.get(&piece[at..])?)))
            .collect();
        splits.sort_unstable();
        bytes += splits.len() * (size_of::<String>() + piece.len() + 1);
        if bytes > MAX_MERGES_BYTES {
            let what =
                "the vocabulary's pieces have too many merges among them: no model has so many";
            return Err(Error::input(dir, what));
        }
        merges.extend(
            splits
                .into_iter()
                .map(|(left, right)| format!("{} {}", tokens[left].text, tokens[right].text)),
        );
    }
    Ok(merges)
}

impl From<sentencepiece::SpmModel> for Vocabulary {
    fn from(model: sentencepiece::SpmModel) -> Self {
        let token = |piece: sentencepiece::Piece| Token {
            text: piece.text,
            score: piece.score,
            kind: piece.kind,
        };
        Vocabulary {
            model: Model::SentencePiece {
                add_space_prefix: model.add_dummy_prefix,
            },
            tokens: model.pieces.into_iter().map(token).collect(),
            bos: model.bos,
            eos: model.eos,
            unk: model.unk,
            pad: model.pad,
            add_bos: model.bos.is_some(),
            add_eos: false,
        }
    }
}

/// The kind of a token that was added to a vocabulary. Many chat models' marks are not called special where they are added;
/// their form says what they are, and text must not be able to spell them.
pub(crate) fn added_kind(text: &str, special: bool) -> TokenKind {
    let mark = text.starts_with("<|") && text.ends_with("|>");
    if special || mark {
        TokenKind::Control
    } else {
        TokenKind::UserDefined
    }
}

/// What stands at an id that the tokenizer does not use.
pub(crate) fn pad_token(id: usize) -> Token {
    Token {
        text: format!("[PAD{id}]"),
        score: PAD_SCORE,
        kind: TokenKind::Unused,
    }
}

/// The template itself, or of several that one calls "default".
fn chat_template(file: Option<PathBuf>, settings: &Json) -> Result<Option<String>> {
    const MAX_BYTES: u64 = 4 << 20;
    if let Some(path) = file {
        let bytes = read_bounded(&path, MAX_BYTES)?;
        let text = String::from_utf8(bytes).map_err(|e| {
            Error::input(
                &path,
                format!("is no UTF-8 at byte {}", e.utf8_error().valid_up_to()),
            )
        })?;
        return Ok(Some(text));
    }
    let template = &settings["chat_template"];
    let named = |list: &Vec<Json>| {
        let found = list.iter().find(|entry| entry["name"] == "default")?;
        Some(found["template"].as_str()?.to_owned())
    };
    Ok(template
        .as_str()
        .map(str::to_owned)
        .or_else(|| template.as_array().and_then(named)))
}

fn optional_json(path: Option<PathBuf>) -> Result<Json> {
    path.map_or(Ok(Json::Null), |path| read_json(&path, MAX_TREE_BYTES))
}

/// A file's bytes, unless there are more than `max`.
pub(crate) fn read_bounded(path: &Path, max: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let mut bytes = Vec::new();
    file.take(max + 1)
        .read_to_end(&mut bytes)
        .map_err(Error::io("read", path))?;
    if bytes.len() as u64 > max {
        return Err(Error::input(
            path,
            format!("has more than {max} bytes: this is another kind of file"),
        ));
    }
    Ok(bytes)
}
