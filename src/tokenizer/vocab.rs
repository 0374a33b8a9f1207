//! The list of tokens: pieces, kinds, scores, and the bytes that each stands for.

use std::collections::HashMap;

use super::{Error, SPACE, bpe};
use crate::gguf::Metadata;

/// What a token is for; the numbers are those of `tokenizer.ggml.token_type` and of SentencePiece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum TokenKind {
    /// A stretch of text.
    Normal = 1,
    /// What no other token covers.
    Unknown = 2,
    /// A mark that no text contains: begin, end, roles.
    Control = 3,
    /// A stretch of text that is never cut.
    UserDefined = 4,
    /// Never produced.
    Unused = 5,
    /// One byte, `<0x00>` to `<0xFF>`.
    Byte = 6,
}

impl TokenKind {
    /// The kind with that number.
    pub fn from_number(number: i32) -> Option<TokenKind> {
        Some(match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            // 0 is "undefined": llama.cpp never prints such a token.
            0 | 5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }
}

#[derive(Debug)]
pub(super) struct Vocab {
    pieces: Vec<String>,
    kinds: Vec<TokenKind>,
    bytes: Vec<Vec<u8>>,
    ids: HashMap<String, u32>,
}

impl Vocab {
    pub(super) fn from_metadata(metadata: &Metadata, sentencepiece: bool) -> Result<Vocab, Error> {
        const TOKENS: &str = "tokenizer.ggml.tokens";
        const TYPES: &str = "tokenizer.ggml.token_type";

        let pieces = metadata.require_strings(TOKENS)?.to_vec();
        if pieces.is_empty() {
            return Err(metadata.error(TOKENS, "is empty").into());
        }
        let kinds = match metadata.i32s(TYPES)? {
            None => vec![TokenKind::Normal; pieces.len()],
            Some(numbers) => {
                same_length(metadata, TYPES, numbers.len(), pieces.len())?;
                let kind = |(id, &number): (usize, &i32)| {
                    TokenKind::from_number(number).ok_or_else(|| {
                        metadata.error(
                            TYPES,
                            format!("says {number} of token {id}; types go from 0 to 6"),
                        )
                    })
                };
                numbers
                    .iter()
                    .enumerate()
                    .map(kind)
                    .collect::<Result<_, _>>()?
            }
        };

        let mut ids = HashMap::with_capacity(pieces.len());
        for (id, piece) in pieces
            .iter()
            .enumerate()
            .filter(|(_, piece)| !piece.is_empty())
        {
            if let Some(first) = ids.insert(piece.clone(), id as u32) {
                let problem = format!("has {piece:?} twice, as tokens {first} and {id}");
                return Err(metadata.error(TOKENS, problem).into());
            }
        }

        let mut bytes = Vec::with_capacity(pieces.len());
        for (id, (piece, &kind)) in pieces.iter().zip(&kinds).enumerate() {
            bytes.push(match kind {
                TokenKind::Byte => {
                    let byte = byte_of_piece(piece).ok_or_else(|| {
                        let problem = format!(
                            "has {piece:?} as byte token {id}; expected a form like \"<0x0A>\""
                        );
                        metadata.error(TOKENS, problem)
                    })?;
                    vec![byte]
                }
                TokenKind::Control | TokenKind::Unknown => piece.clone().into_bytes(),
                _ if sentencepiece => piece.replace(SPACE, " ").into_bytes(),
                TokenKind::UserDefined => piece.clone().into_bytes(),
                TokenKind::Normal | TokenKind::Unused => bpe::bytes_of_piece(piece),
            });
        }
        Ok(Vocab {
            pieces,
            kinds,
            bytes,
            ids,
        })
    }

    pub(super) fn len(&self) -> usize {
        self.pieces.len()
    }

    pub(super) fn piece(&self, id: u32) -> Option<&str> {
        self.pieces.get(id as usize).map(String::as_str)
    }

    pub(super) fn id(&self, piece: &str) -> Option<u32> {
        self.ids.get(piece).copied()
    }

    /// Panics outside the vocabulary, as does [`bytes`](Self::bytes).
    pub(super) fn kind(&self, id: u32) -> TokenKind {
        self.kinds[id as usize]
    }

    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        &self.bytes[id as usize]
    }

    /// The id that `key` holds, checked; `default` where the key is absent.
    pub(super) fn id_of_key(
        &self,
        metadata: &Metadata,
        key: &str,
        default: Option<u32>,
    ) -> Result<Option<u32>, Error> {
        match metadata.u32(key)? {
            Some(id) if id as usize >= self.len() => {
                let problem = format!("is {id}, but there are only {} tokens", self.len());
                Err(metadata.error(key, problem).into())
            }
            Some(id) => Ok(Some(id)),
            None => Ok(default),
        }
    }
}

/// The error of a list beside `tokenizer.ggml.tokens` that is not as long.
pub(super) fn same_length(
    metadata: &Metadata,
    key: &str,
    found: usize,
    tokens: usize,
) -> Result<(), Error> {
    if found == tokens {
        return Ok(());
    }
    let problem = format!("has {found} entries for {tokens} tokens");
    Err(metadata.error(key, problem).into())
}

/// `<0x0A>` → 10.
fn byte_of_piece(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2)
        .then(|| u8::from_str_radix(digits, 16).ok())
        .flatten()
}
