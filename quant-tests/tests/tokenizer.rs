//! Texts ⇄ ids.

use fewbit::gguf::{Array, Metadata, Value};
use fewbit::tokenizer::{TokenKind, Tokenizer};

/// `<unk> <s> </s>`, the byte tokens, and `pieces` with their scores: a SentencePiece vocabulary as GGUF writes it.
fn sentencepiece(pieces: &[(&str, f32)]) -> Metadata {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).into();
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    let mut scores = vec![0.0; tokens.len()];
    let mut kinds = vec![TokenKind::Byte as i32; tokens.len()];
    kinds[0] = TokenKind::Unknown as i32;
    kinds[1] = TokenKind::Control as i32;
    kinds[2] = TokenKind::Control as i32;
    for &(piece, score) in pieces {
        tokens.push(piece.into());
        scores.push(score);
        kinds.push(TokenKind::Normal as i32);
    }
    Metadata::from_iter([
        ("tokenizer.ggml.model", Value::String("llama".into())),
        ("tokenizer.ggml.tokens", Value::Array(Array::String(tokens))),
        ("tokenizer.ggml.scores", Value::Array(Array::F32(scores))),
        ("tokenizer.ggml.token_type", Value::Array(Array::I32(kinds))),
    ])
}

fn pieces<'t>(tokenizer: &'t Tokenizer, ids: &[u32]) -> Vec<&'t str> {
    ids.iter().map(|&id| tokenizer.piece(id).unwrap()).collect()
}

#[test]
fn best_score_is_merged_first_and_the_leftmost_of_equals() {
    let spaces = [
        ("▁", -9.0),
        ("▁▁", -1e9),
        ("▁▁▁", -1e9),
        ("a", -5.0),
        ("b", -6.0),
        ("c", -7.0),
        ("bc", -1.0),
        ("ab", -2.0),
    ];
    let tokenizer = Tokenizer::from_metadata(&sentencepiece(&spaces)).unwrap();
    let split = |text: &str| pieces(&tokenizer, &tokenizer.encode(text, false).unwrap()).join(" ");
    assert_eq!(split("abc"), "▁ a bc");
    assert_eq!(split("aab"), "▁ a ab");
    assert_eq!(split("    "), "▁▁▁ ▁▁");
    assert_eq!(split("é"), "▁ <0xC3> <0xA9>");
    assert_eq!(split("<s>"), "▁ <0x3C> <0x73> <0x3E>");
    assert_eq!(split(""), "");
}

#[test]
fn streaming_never_splits_a_character() {
    let tokenizer = Tokenizer::from_metadata(&sentencepiece(&[("▁", -1.0)])).unwrap();
    let text = "e\u{301}🏳️‍🌈 ß";
    let ids = tokenizer.encode(text, false).unwrap();
    let mut stream = tokenizer.stream().at_start();
    let mut whole = String::new();
    for &id in &ids {
        let part = stream.push(id);
        assert!(!part.contains('\u{FFFD}'), "{part:?}");
        whole += &part;
    }
    assert_eq!(whole, text);
    assert_eq!(stream.finish(), "");

    let byte = |byte: u8| tokenizer.id(&format!("<0x{byte:02X}>")).unwrap();
    assert_eq!(stream.push(byte(0xE2)), "");
    assert_eq!(stream.push(byte(b'a')), "\u{FFFD}a");
    assert_eq!(stream.push(byte(0xF0)), "");
    assert_eq!(stream.finish(), "\u{FFFD}");
}

/// A text and its ids by SentencePiece, without BOS.
#[derive(serde::Deserialize)]
struct Golden {
    text: String,
    ids: Vec<u32>,
}

fn fixture(path: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(path)
}

fn golden<T: serde::de::DeserializeOwned>(path: &str) -> T {
    serde_json::from_slice(&std::fs::read(fixture(path)).unwrap()).unwrap()
}

fn of_checkpoint(path: &str) -> Tokenizer {
    let metadata = fewbit_convert::vocab::from_checkpoint(&fixture(path)).unwrap();
    Tokenizer::from_metadata(&Metadata::from_iter(metadata)).unwrap()
}

#[test]
fn fixture_gives_the_ids_of_sentencepiece() {
    let tokenizer = of_checkpoint("tiny-mixtral");
    let cases: Vec<Golden> = golden("golden/tiny-mixtral-tokens.json");
    assert!(!cases.is_empty());
    for Golden { text, ids } in cases {
        assert_eq!(tokenizer.encode(&text, false).unwrap(), ids, "{text:?}");
        // SentencePiece writes a space as `▁`, so a `▁` of the text comes back as a space.
        assert_eq!(tokenizer.decode(&ids, false), text.replace('▁', " "));
    }
}
