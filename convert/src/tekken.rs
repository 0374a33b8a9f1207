//! Reads `tekken.json`, Mistral's own form of a byte-level BPE.
//!
//! It lists byte strings by rank; a merge is not listed but follows: of the neighbours whose concatenation is a
//! token, that of the lowest rank is merged first. Ids below `default_num_special_tokens` are control tokens.

use std::collections::HashMap;
use std::path::Path;

use base64::prelude::{BASE64_STANDARD as BASE64, Engine};
use fewbit::tokenizer::{TokenKind, piece_of_bytes, pre_tokenizer_name};
use serde::Deserialize;

use crate::bounded::List;
use crate::checkpoint::read_json;
use crate::error::{Error, Result};
use crate::vocab::{MAX_BYTES, MAX_TOKENS, Model, Token, Vocabulary};

#[derive(Deserialize)]
struct Tekken {
    config: Config,
    vocab: List<Entry, MAX_TOKENS>,
    #[serde(default)]
    special_tokens: List<Special, MAX_TOKENS>,
}

#[derive(Deserialize)]
struct Config {
    pattern: String,
    default_vocab_size: usize,
    default_num_special_tokens: usize,
}

#[derive(Deserialize)]
struct Entry {
    token_bytes: String,
}

#[derive(Deserialize)]
struct Special {
    rank: usize,
    token_str: String,
}

/// Longest token: the time to find its last merge grows with the square of its length.
const MAX_TOKEN_BYTES: usize = 1024;

/// The control tokens of files that do not list them (version 3).
const SPECIAL: [&str; 15] = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
];

/// Reads and checks `path`.
pub fn read(path: &Path) -> Result<Vocabulary> {
    let json: Tekken = read_json(path, MAX_BYTES)?;
    let Config {
        pattern,
        default_vocab_size: size,
        default_num_special_tokens: specials,
    } = json.config;
    let wrong = |what: String| Error::input(path, what);
    let pre = pre_tokenizer_name(&[&pattern]).ok_or_else(|| {
        wrong(format!(
            "config.pattern is {pattern:?}, not the known one of Tekken"
        ))
    })?;
    let ranks = size
        .checked_sub(specials)
        .filter(|&ranks| size <= MAX_TOKENS && ranks <= json.vocab.0.len());
    let ranks = ranks.ok_or_else(|| {
        wrong(format!(
            "config asks for {size} tokens, {specials} of them special, but vocab has {}: download it again",
            json.vocab.0.len()
        ))
    })?;

    let mut tokens: Vec<Token> = (0..specials)
        .map(|rank| Token {
            text: SPECIAL
                .get(rank)
                .map_or_else(|| format!("<SPECIAL_{rank}>"), |&text| text.to_owned()),
            score: 0.0,
            kind: if rank == 0 {
                TokenKind::Unknown
            } else {
                TokenKind::Control
            },
        })
        .collect();
    for Special { rank, token_str } in json.special_tokens.0 {
        let token = tokens
            .get_mut(rank)
            .ok_or_else(|| wrong(format!("special token {token_str:?} has rank {rank}")))?;
        token.text = token_str;
    }

    let mut bytes = Vec::with_capacity(ranks);
    for (rank, entry) in json.vocab.0[..ranks].iter().enumerate() {
        let decoded = BASE64
            .decode(&entry.token_bytes)
            .ok()
            .filter(|bytes| (1..=MAX_TOKEN_BYTES).contains(&bytes.len()));
        bytes.push(decoded.ok_or_else(|| {
            wrong(format!(
                "vocab: token_bytes of number {rank} is no base64 of 1 to {MAX_TOKEN_BYTES} bytes"
            ))
        })?);
    }
    let by_bytes: HashMap<&[u8], usize> = bytes
        .iter()
        .enumerate()
        .map(|(rank, bytes)| (bytes.as_slice(), rank))
        .collect();
    let mut merges = Vec::with_capacity(ranks);
    for (rank, token) in bytes
        .iter()
        .enumerate()
        .filter(|(_, token)| token.len() > 1)
    {
        let at = last_merge(token, rank, &by_bytes).ok_or_else(|| {
            wrong(format!(
                "vocab: no two earlier tokens make up number {rank}"
            ))
        })?;
        merges.push(format!(
            "{} {}",
            piece_of_bytes(&token[..at]),
            piece_of_bytes(&token[at..])
        ));
    }
    tokens.extend(bytes.iter().map(|bytes| Token {
        text: piece_of_bytes(bytes),
        score: 0.0,
        kind: TokenKind::Normal,
    }));

    let id = |text: &str| {
        tokens
            .iter()
            .take(specials)
            .position(|token| token.text == text)
            .map(|id| id as u32)
    };
    Ok(Vocabulary {
        model: Model::ByteLevel { pre, merges },
        bos: id("<s>"),
        eos: id("</s>"),
        unk: id("<unk>"),
        pad: id("<pad>"),
        add_bos: id("<s>").is_some(),
        add_eos: false,
        tokens,
    })
}

/// Where `token` parts into the two tokens that are merged into it: its bytes are merged with what has a lower rank,
/// until two parts are left.
fn last_merge(token: &[u8], rank: usize, ranks: &HashMap<&[u8], usize>) -> Option<usize> {
    let mut borders: Vec<usize> = (0..=token.len()).collect();
    while borders.len() > 3 {
        let (_, at) = (1..borders.len() - 1)
            .filter_map(|at| Some((*ranks.get(&token[borders[at - 1]..borders[at + 1]])?, at)))
            .filter(|&(merged, _)| merged < rank)
            .min()?;
        borders.remove(at);
    }
    Some(borders[1])
}
