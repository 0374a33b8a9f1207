//! Byte-level BPE: the `tokenizers` crate's model and pre-tokenizers, built from a GGUF file's lists.
//!
//! Each byte is written as one printable character (GPT-2's alphabet), a text is cut into words by regular
//! expressions, and the characters of each word are merged in the order of the list. What differs from
//! vocabulary to vocabulary is the cutting; GGUF names it in `tokenizer.ggml.pre`.

use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

use tokenizers::models::bpe::{self, BPE};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use super::Error;
use super::vocab::{TokenKind, Vocab};
use crate::gguf::Metadata;

/// How a vocabulary cuts texts into words.
#[derive(Debug)]
struct PreTokenizer {
    names: &'static [&'static str],
    /// Applied one after the other; what matches and what lies between become words of their own.
    patterns: &'static [&'static str],
    /// Whether a word that is a token as a whole becomes that token, whatever the merges say.
    ignore_merges: bool,
    adds_bos: bool,
}

/// GPT-2's words: contractions, letters, digits, other marks (each with a space in front), white space.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3's: any mark may lead a word, digits go by threes, line ends stay with the marks before them.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2's: as Llama 3's, with single digits.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Tekken's: as Llama 3's, with single digits, no contractions, and a cut before capitals inside words.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Names and behaviour as in llama.cpp.
const PRE_TOKENIZERS: [PreTokenizer; 6] = [
    PreTokenizer {
        names: &["default"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        ignore_merges: false,
        adds_bos: false,
    },
    PreTokenizer {
        names: &[
            "gpt-2",
            "phi-2",
            "olmo",
            "mpt",
            "jais",
            "trillion",
            "granite-docling",
        ],
        patterns: &[GPT2],
        ignore_merges: false,
        adds_bos: false,
    },
    PreTokenizer {
        names: &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
        ],
        patterns: &[r"\p{N}", GPT2],
        ignore_merges: false,
        adds_bos: false,
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"],
        patterns: &[LLAMA3],
        ignore_merges: true,
        adds_bos: true,
    },
    PreTokenizer {
        names: &["qwen2", "stablelm2", "deepseek-r1-qwen"],
        patterns: &[QWEN2],
        ignore_merges: false,
        adds_bos: false,
    },
    PreTokenizer {
        names: &["tekken"],
        patterns: &[TEKKEN],
        ignore_merges: true,
        adds_bos: true,
    },
];

/// The name in `tokenizer.ggml.pre` of the pre-tokenizer that cuts by `patterns`, one after the other.
pub fn pre_tokenizer_name(patterns: &[impl AsRef<str>]) -> Option<&'static str> {
    PRE_TOKENIZERS
        .iter()
        .find(|pre| {
            pre.patterns
                .iter()
                .copied()
                .eq(patterns.iter().map(AsRef::as_ref))
        })
        .map(|pre| pre.names[0])
}

/// The patterns of the pre-tokenizer with that name.
pub fn pre_tokenizer_patterns(name: &str) -> Option<&'static [&'static str]> {
    PRE_TOKENIZERS
        .iter()
        .find(|pre| pre.names.contains(&name))
        .map(|pre| pre.patterns)
}

#[derive(Debug)]
pub(super) struct ByteLevel {
    model: tokenizers::Tokenizer,
    adds_bos: bool,
}

impl ByteLevel {
    pub(super) fn from_metadata(metadata: &Metadata, vocab: &Vocab) -> Result<ByteLevel, Error> {
        const PRE: &str = "tokenizer.ggml.pre";
        let name = metadata.str(PRE)?.unwrap_or("default");
        let pre = PRE_TOKENIZERS
            .iter()
            .find(|pre| pre.names.contains(&name))
            .ok_or_else(|| {
                let names: Vec<_> = PRE_TOKENIZERS
                    .iter()
                    .flat_map(|pre| pre.names)
                    .copied()
                    .collect();
                let problem = format!(
                    "names the pre-tokenizer {name:?}; supported are {}",
                    names.join(", ")
                );
                metadata.error(PRE, problem)
            })?;

        // Control tokens come from cuts alone: no text spells one by accident.
        let pieces = (0..vocab.len() as u32)
            .filter(|&id| !matches!(vocab.kind(id), TokenKind::Control | TokenKind::Unknown))
            .filter_map(|id| Some((vocab.piece(id)?.to_owned(), id)))
            .filter(|(piece, _)| !piece.is_empty());
        let model = BPE::builder()
            .vocab_and_merges(pieces.collect::<bpe::Vocab>(), merges(metadata, vocab)?)
            .ignore_merges(pre.ignore_merges)
            .build()
            .map_err(Error::Model)?;

        let mut steps = Vec::with_capacity(pre.patterns.len() + 1);
        for &pattern in pre.patterns {
            let pattern = SplitPattern::Regex(pattern.to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
                .map_err(Error::Model)?;
            steps.push(PreTokenizerWrapper::Split(split));
        }
        steps.push(PreTokenizerWrapper::ByteLevel(byte_level::ByteLevel::new(
            false, false, false,
        )));
        let mut model = tokenizers::Tokenizer::new(model);
        model.with_pre_tokenizer(Some(Sequence::new(steps)));
        Ok(ByteLevel {
            model,
            adds_bos: pre.adds_bos,
        })
    }

    /// Appends the ids of `text`. A byte that the vocabulary lacks is left out, as everywhere: there is no
    /// unknown token to stand for it.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), Error> {
        let encoding = self.model.encode_fast(text, false).map_err(Error::Model)?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    /// Whether such vocabularies begin a text with BOS where the file does not say.
    pub(super) fn adds_bos(&self) -> bool {
        self.adds_bos
    }
}

/// The list `tokenizer.ggml.merges`, each "left right", checked against the vocabulary.
fn merges(metadata: &Metadata, vocab: &Vocab) -> Result<Vec<(String, String)>, Error> {
    const MERGES: &str = "tokenizer.ggml.merges";
    let lines = metadata.require_strings(MERGES)?;
    let usable = |piece: &str| {
        vocab
            .id(piece)
            .is_some_and(|id| !matches!(vocab.kind(id), TokenKind::Control | TokenKind::Unknown))
    };
    let mut seen = HashSet::with_capacity(lines.len());
    let mut merges = Vec::with_capacity(lines.len());
    for (rank, line) in lines.iter().enumerate() {
        let wrong = |problem: String| {
            metadata.error(MERGES, format!("has {line:?} as number {rank}: {problem}"))
        };
        let (left, right) = line
            .split_once(' ')
            .filter(|(left, right)| !left.is_empty() && !right.is_empty() && !right.contains(' '))
            .ok_or_else(|| wrong("expected two pieces with one space between".into()))?;
        let merged = [left, right].concat();
        if let Some(piece) = [left, right, &merged]
            .into_iter()
            .find(|piece| !usable(piece))
        {
            return Err(wrong(format!("the vocabulary has no piece {piece:?}")).into());
        }
        // Of a merge that is listed twice, the first counts.
        if seen.insert((left, right)) {
            merges.push((left.to_owned(), right.to_owned()));
        }
    }
    Ok(merges)
}

/// GPT-2's alphabet: the printable characters of Latin-1 stand for their own bytes, the other bytes are
/// numbered on from U+0100.
static BYTE_OF_CHAR: LazyLock<HashMap<char, u8>> = LazyLock::new(|| {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let others = (0..=255).filter(|&byte| !printable(byte)).zip('\u{100}'..);
    (0..=255)
        .filter(|&byte| printable(byte))
        .map(|byte| (char::from(byte), byte))
        .chain(others.map(|(byte, c)| (c, byte)))
        .collect()
});

/// `bytes` in GPT-2's alphabet, as byte-level vocabularies write them.
pub fn piece_of_bytes(bytes: &[u8]) -> String {
    static CHAR_OF_BYTE: LazyLock<HashMap<u8, char>> =
        LazyLock::new(|| BYTE_OF_CHAR.iter().map(|(&c, &byte)| (byte, c)).collect());
    bytes.iter().map(|byte| CHAR_OF_BYTE[byte]).collect()
}

/// The bytes that a piece stands for; a character outside the alphabet stands for itself.
pub(super) fn bytes_of_piece(piece: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(piece.len());
    for c in piece.chars() {
        match BYTE_OF_CHAR.get(&c) {
            Some(&byte) => bytes.push(byte),
            None => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    bytes
}
