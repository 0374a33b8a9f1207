//! SentencePiece's BPE: characters are merged, best piece first.
//!
//! Of all neighbours whose concatenation is a piece, the pair that makes the piece with the best score is
//! merged, the leftmost of equals; then again, until no pair makes a piece. What is no piece in the
//! end is spelled out in byte tokens.
//!
//! Why this is not the `tokenizers` crate's BPE: that one ranks *pairs*, each at its own rank. SentencePiece
//! ranks *pieces*: every way to split a piece is worth the same, and so are pieces of equal score
//! (in Mistral's vocabulary all runs of spaces, at −1e9). Where such merges overlap, the leftmost wins
//! and which pair that is depends on the text: "   " as `▁▁`+`▁` or `▁`+`▁▁`. No order of pairs reproduces it,
//! and a character that is no piece of its own could not take part at all.
//!
//! Algorithm: Kudo and Richardson, SentencePiece (EMNLP 2018), section 3.1; O(n log n) with a heap.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap};
use std::ops::Range;

use super::vocab::{TokenKind, Vocab, same_length};
use super::{Error, SPACE};
use crate::gguf::Metadata;

#[derive(Debug)]
pub(super) struct SentencePiece {
    /// Higher is merged earlier; one a token.
    scores: Vec<f32>,
    /// The token of each byte; the unknown token where a byte has none.
    bytes: [u32; 256],
    /// Whether no piece has a `▁` after another character. Then no merge reaches over the start of a word, and each word
    /// can be merged by itself: the same ids from a queue that stays in the nearest cache.
    words_stand_alone: bool,
}

/// A stretch of the text that is one piece so far; merged-away ones are empty.
struct Symbol {
    start: usize,
    len: usize,
    prev: usize,
    next: usize,
}

/// Stands for "no neighbour".
const NONE: usize = usize::MAX;

/// Two neighbours whose concatenation is a piece.
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    /// Bytes of both: differs once one of them was merged with another.
    len: usize,
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        let rank = |pair: &Pair| Reverse(pair.left);
        self.score
            .total_cmp(&other.score)
            .then_with(|| rank(self).cmp(&rank(other)))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Pair {}

impl SentencePiece {
    pub(super) fn from_metadata(
        metadata: &Metadata,
        vocab: &Vocab,
    ) -> Result<SentencePiece, Error> {
        const SCORES: &str = "tokenizer.ggml.scores";
        let mut scores = metadata.require_f32s(SCORES)?;
        same_length(metadata, SCORES, scores.len(), vocab.len())?;
        if let Some(id) = scores.iter().position(|score| score.is_nan()) {
            return Err(metadata
                .error(SCORES, format!("is not a number at token {id}"))
                .into());
        }
        for score in &mut scores {
            *score += 0.0; // -0 and 0 are equal scores, also to total_cmp
        }

        let unknown = vocab.id_of_key(metadata, "tokenizer.ggml.unknown_token_id", Some(0))?;
        let unknown = unknown.filter(|&id| vocab.kind(id) == TokenKind::Unknown);
        let mut bytes = [0; 256];
        for (byte, token) in bytes.iter_mut().enumerate() {
            let piece = format!("<0x{byte:02X}>");
            let own = vocab
                .id(&piece)
                .filter(|&id| vocab.kind(id) == TokenKind::Byte);
            *token = own.or(unknown).ok_or_else(|| {
                let problem =
                    format!("has neither the byte token {piece:?} nor a token of type \"unknown\"");
                metadata.error("tokenizer.ggml.tokens", problem)
            })?;
        }
        let joins_words = |id: u32| {
            let mergeable = matches!(vocab.kind(id), TokenKind::Normal | TokenKind::Unused);
            mergeable
                && vocab
                    .piece(id)
                    .is_some_and(|piece| word_starts(piece).next().is_some())
        };
        let words_stand_alone = !(0..vocab.len() as u32).any(joins_words);
        Ok(SentencePiece {
            scores,
            bytes,
            words_stand_alone,
        })
    }

    /// Appends the ids of `text`, whose spaces are `▁` already.
    pub(super) fn encode(&self, vocab: &Vocab, text: &str, ids: &mut Vec<u32>) {
        let mut merge = Merge {
            model: self,
            vocab,
            text,
            symbols: Vec::new(),
            queue: BinaryHeap::new(),
            parts: HashMap::new(),
        };
        let mut start = 0;
        if self.words_stand_alone {
            for end in word_starts(text) {
                merge.encode(start..end, ids);
                start = end;
            }
        }
        merge.encode(start..text.len(), ids);
    }

    /// The token of `piece` if text can become it; unused pieces are stations on the way to others.
    fn token(&self, vocab: &Vocab, piece: &str) -> Option<u32> {
        vocab
            .id(piece)
            .filter(|&id| matches!(vocab.kind(id), TokenKind::Normal | TokenKind::Unused))
    }
}

/// Where a `▁` follows another character.
fn word_starts(text: &str) -> impl Iterator<Item = usize> {
    let chars = text.char_indices();
    chars
        .clone()
        .zip(chars.skip(1))
        .filter(|((_, before), (_, c))| *before != SPACE && *c == SPACE)
        .map(|(_, (at, _))| at)
}

/// One text's merging.
struct Merge<'a> {
    model: &'a SentencePiece,
    vocab: &'a Vocab,
    text: &'a str,
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Pair>,
    /// Unused pieces that came up, and the length of the left part that each was made of.
    parts: HashMap<&'a str, usize>,
}

impl<'a> Merge<'a> {
    /// Appends the ids of a range of the text that no merge leaves.
    fn encode(&mut self, range: Range<usize>, ids: &mut Vec<u32>) {
        self.merge(range);
        let mut at = 0;
        while let Some(symbol) = self.symbols.get(at) {
            self.write(&self.text[symbol.start..symbol.start + symbol.len], ids);
            at = symbol.next;
        }
    }

    fn merge(&mut self, range: Range<usize>) {
        let text = &self.text[range.clone()];
        let count = text.chars().count();
        self.symbols.clear();
        for (at, (start, c)) in text.char_indices().enumerate() {
            self.symbols.push(Symbol {
                start: range.start + start,
                len: c.len_utf8(),
                prev: at.wrapping_sub(1), // of the first: NONE
                next: if at + 1 < count { at + 1 } else { NONE },
            });
        }
        for right in 1..count {
            self.offer(right - 1, right);
        }
        while let Some(pair) = self.queue.pop() {
            let (left_len, right_len) = (self.symbols[pair.left].len, self.symbols[pair.right].len);
            if left_len == 0 || right_len == 0 || left_len + right_len != pair.len {
                continue; // one of them was merged with another since
            }
            let next = self.symbols[pair.right].next;
            self.symbols[pair.right].len = 0;
            let left = &mut self.symbols[pair.left];
            left.len = pair.len;
            left.next = next;
            let prev = left.prev;
            if next != NONE {
                self.symbols[next].prev = pair.left;
            }
            self.offer(prev, pair.left);
            self.offer(pair.left, next);
        }
    }

    /// Queues the neighbours `left` and `right` if they make a piece.
    fn offer(&mut self, left: usize, right: usize) {
        if left == NONE || right == NONE {
            return;
        }
        let (start, left_len) = (self.symbols[left].start, self.symbols[left].len);
        let len = left_len + self.symbols[right].len;
        let piece = &self.text[start..start + len];
        if let Some(id) = self.model.token(self.vocab, piece) {
            let score = self.model.scores[id as usize];
            self.queue.push(Pair {
                score,
                left,
                right,
                len,
            });
            if self.vocab.kind(id) == TokenKind::Unused {
                self.parts.insert(piece, left_len);
            }
        }
    }

    /// Appends the ids of one symbol: its token, or those of its parts, or its bytes.
    fn write(&self, piece: &str, ids: &mut Vec<u32>) {
        match self.model.token(self.vocab, piece) {
            Some(id) if self.vocab.kind(id) == TokenKind::Normal => ids.push(id),
            Some(id) => match self.parts.get(piece) {
                Some(&left) => {
                    self.write(&piece[..left], ids);
                    self.write(&piece[left..], ids);
                }
                None => ids.push(id),
            },
            None => ids.extend(piece.bytes().map(|byte| self.model.bytes[byte as usize])),
        }
    }
}
