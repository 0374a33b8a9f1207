//! A vocabulary without training: every text has tokens, none means anything.

use std::iter;

use fewbit::gguf::{Array, Value};

/// SentencePiece's mark for a space.
const SPACE: char = '\u{2581}';

// Types of tokens, `llama_token_type` in llama.h.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const BYTE: i32 = 6;

/// Tokenizer metadata of a SentencePiece vocabulary with `size` pieces: three control tokens, the 256 bytes,
/// as many strings of small letters as fit, and at the end the printable ASCII characters.
///
/// # Panics
/// If `size` is too small for all but the strings (354).
pub fn dummy(size: usize) -> Vec<(&'static str, Value)> {
    let special = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)];
    let special = special.map(|(piece, kind)| (piece.to_owned(), kind));
    let bytes = (0..=255_u8).map(|byte| (format!("<0x{byte:02X}>"), BYTE));
    let characters: Vec<_> = iter::once(SPACE)
        .chain('!'..='~')
        .map(|character| (character.to_string(), NORMAL))
        .collect();
    let strings = size
        .checked_sub(3 + 256 + characters.len())
        .expect("a vocabulary holds bytes and characters");
    let strings = strings_of_letters()
        .map(|string| (string, NORMAL))
        .take(strings);

    let (pieces, kinds): (Vec<String>, Vec<i32>) = special
        .into_iter()
        .chain(bytes)
        .chain(strings)
        .chain(characters)
        .unzip();
    // As trained vocabularies have them: the later a piece, the later its parts are merged.
    let unscored = 3 + 256;
    let scores = (0..size).map(|id| {
        if id < unscored {
            0.0
        } else {
            -((id - unscored) as f32)
        }
    });
    vec![
        ("tokenizer.ggml.model", Value::String("llama".to_owned())),
        ("tokenizer.ggml.pre", Value::String("default".to_owned())),
        ("tokenizer.ggml.tokens", Value::Array(Array::String(pieces))),
        (
            "tokenizer.ggml.scores",
            Value::Array(Array::F32(scores.collect())),
        ),
        ("tokenizer.ggml.token_type", Value::Array(Array::I32(kinds))),
        ("tokenizer.ggml.unknown_token_id", Value::U32(0)),
        ("tokenizer.ggml.bos_token_id", Value::U32(1)),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
        ("tokenizer.ggml.add_bos_token", Value::Bool(true)),
        ("tokenizer.ggml.add_eos_token", Value::Bool(false)),
    ]
}

/// `▁a`, …, `▁z`, `aa`, …, `zz`, `▁aa`, …, `▁zz`, `aaa`, …: each but for its last letter is a piece too, so
/// that merging reaches it.
fn strings_of_letters() -> impl Iterator<Item = String> {
    (1_u32..).flat_map(|letters| {
        let bare = if letters == 1 { 0 } else { 26_u32.pow(letters) }; // single letters are characters
        let bare = (0..bare).map(move |number| word(number, letters));
        let spaced =
            (0..26_u32.pow(letters)).map(move |number| format!("{SPACE}{}", word(number, letters)));
        bare.chain(spaced)
    })
}

/// `number` in base 26, written in letters.
fn word(number: u32, letters: u32) -> String {
    (0..letters)
        .rev()
        .map(|place| (b'a' + (number / 26_u32.pow(place) % 26) as u8) as char)
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn pieces_are_unique_and_every_byte_and_character_has_one() {
        for size in [354, 400, 32000, 32768] {
            let Value::Array(Array::String(pieces)) = dummy(size).swap_remove(2).1 else {
                panic!("tokens are strings");
            };
            assert_eq!(pieces.len(), size);
            let pieces: HashSet<String> = pieces.into_iter().collect();
            assert_eq!(pieces.len(), size);
            for piece in ["<0x00>", "<0xFF>", "a", "~", "\u{2581}"] {
                assert!(pieces.contains(piece), "{piece} of {size}");
            }
        }
    }
}
