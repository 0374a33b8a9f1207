//! Texts ⇄ ids: golden ids of SentencePiece and of the `tokenizers` package on the committed sample, and
//! what happens to vocabularies that are broken.

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

fn metadata_of(path: &str) -> Metadata {
    Metadata::from_iter(fewbit_convert::vocab::from_checkpoint(&fixture(path)).unwrap())
}

fn of_checkpoint(path: &str) -> Tokenizer {
    Tokenizer::from_metadata(&metadata_of(path)).unwrap()
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
    // A piece that reaches over a space is found as well.
    let tokenizer =
        Tokenizer::from_metadata(&sentencepiece(&[&spaces[..], &[("c▁", -0.5)]].concat())).unwrap();
    let split = |text: &str| pieces(&tokenizer, &tokenizer.encode(text, false).unwrap()).join(" ");
    assert_eq!(split("bc ab"), "▁ b c▁ ab");
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

#[test]
fn fixture_gives_the_ids_of_sentencepiece() {
    let tokenizer = of_checkpoint("tiny-mixtral");
    let mut cases: Vec<Golden> = golden("golden/tiny-mixtral-tokens.json");
    cases.extend(golden::<Vec<Golden>>("golden/tiny-mixtral-sample.json"));
    assert!(cases.len() > 100);
    for Golden { text, ids } in cases {
        assert_eq!(tokenizer.encode(&text, false).unwrap(), ids, "{text:?}");
        // SentencePiece writes a space as `▁`, so a `▁` of the text comes back as a space.
        assert_eq!(tokenizer.decode(&ids, false), text.replace('▁', " "));
    }
}

#[test]
fn byte_level_vocabularies_give_the_ids_of_tokenizers() {
    #[derive(serde::Deserialize)]
    struct Case {
        pre: String,
        text: String,
        ids: Vec<u32>,
    }
    let mut metadata = metadata_of("byte-bpe");
    assert_eq!(metadata.str("tokenizer.ggml.pre").unwrap(), Some("smollm"));
    let cases: Vec<Case> = golden("golden/byte-bpe-tokens.json");
    for pre in ["smollm", "llama-bpe", "tekken", "gpt-2"] {
        metadata.insert("tokenizer.ggml.pre", Value::String(pre.into()));
        let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
        let cases: Vec<_> = cases.iter().filter(|case| case.pre == pre).collect();
        assert!(cases.len() > 100);
        for Case { text, ids, .. } in cases {
            assert_eq!(
                &tokenizer.encode(text, true).unwrap(),
                ids,
                "{pre}: {text:?}"
            );
            assert_eq!(&tokenizer.decode(ids, true), text);
        }
    }
}

#[test]
fn streamed_text_equals_decoded_text() {
    let texts: Vec<String> = golden("text/tokenizer-sample.json");
    for tokenizer in [of_checkpoint("tiny-mixtral"), of_checkpoint("byte-bpe")] {
        for text in &texts {
            let ids = tokenizer.encode(text, true).unwrap();
            let mut stream = tokenizer.stream().at_start();
            let mut streamed: String = ids.iter().map(|&id| stream.push(id)).collect();
            streamed += &stream.finish();
            assert_eq!(streamed, tokenizer.decode(&ids, false));
        }
    }
}

#[test]
fn control_tokens_are_found_only_on_demand() {
    let tokenizer = of_checkpoint("byte-bpe");
    let start = tokenizer.id("<|im_start|>").unwrap();
    let text = "a<|im_start|>b";
    let with = tokenizer.encode(text, true).unwrap();
    assert_eq!(with.iter().filter(|&&id| id == start).count(), 1);
    let without = tokenizer.encode(text, false).unwrap();
    assert!(!without.contains(&start));
    assert_eq!(tokenizer.decode(&without, false), text);
    assert_eq!(tokenizer.decode(&with, false), "ab");
    assert_eq!(tokenizer.decode(&with, true), text);
    assert!(tokenizer.is_end(tokenizer.id("<|im_end|>").unwrap()));
    assert!(tokenizer.is_end(tokenizer.id("<|endoftext|>").unwrap()));
    assert!(!tokenizer.is_end(start));

    let tokenizer = of_checkpoint("tiny-mixtral");
    let ids = tokenizer.encode_with_bos("<s>hi</s>x", true).unwrap();
    // After a control token a text starts anew, with its space.
    let expected = [
        &[1, 1],
        &tokenizer.encode("hi", false).unwrap()[..],
        &[2],
        &tokenizer.encode("x", false).unwrap()[..],
    ];
    assert_eq!(ids, expected.concat());
    assert_eq!(tokenizer.kind(2), Some(TokenKind::Control));
}

#[test]
fn user_defined_tokens_are_never_cut() {
    let mut metadata = sentencepiece(&[("▁", -1.0), ("a", -2.0), ("b", -3.0), ("ab", -1.0)]);
    let Some(Value::Array(Array::String(tokens))) = metadata.get("tokenizer.ggml.tokens").cloned()
    else {
        panic!()
    };
    let Some(Value::Array(Array::I32(kinds))) = metadata.get("tokenizer.ggml.token_type").cloned()
    else {
        panic!()
    };
    let mut kinds = kinds;
    *kinds.last_mut().unwrap() = TokenKind::UserDefined as i32;
    metadata.insert("tokenizer.ggml.token_type", Value::Array(Array::I32(kinds)));
    let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
    let last = tokens.len() as u32 - 1;
    assert_eq!(tokenizer.encode("abab", false).unwrap(), [last, last]);
}

/// Changes one key of a good vocabulary and returns what is said about it.
fn complaint(checkpoint: &str, key: &str, change: impl FnOnce(&mut Metadata)) -> String {
    let mut metadata = metadata_of(checkpoint);
    change(&mut metadata);
    let error = Tokenizer::from_metadata(&metadata).unwrap_err().to_string();
    assert!(error.contains(key), "{error:?} does not name {key}");
    error
}

#[test]
fn broken_vocabularies_are_refused_by_key() {
    let spm = "tiny-mixtral";
    let bpe = "byte-bpe";
    let key = "tokenizer.ggml.model";
    let error = complaint(spm, key, |m| m.insert(key, Value::String("bert".into())));
    assert!(
        error.contains("bert") && error.contains("llama") && error.contains("gpt2"),
        "{error}"
    );
    complaint(spm, key, |m| drop(m.remove(key)));
    let key = "tokenizer.ggml.pre";
    let error = complaint(bpe, key, |m| m.insert(key, Value::String("falcon".into())));
    assert!(
        error.contains("falcon") && error.contains("smollm") && error.contains("tekken"),
        "{error}"
    );
    let key = "tokenizer.ggml.tokens";
    complaint(spm, key, |m| drop(m.remove(key)));
    complaint(spm, key, |m| {
        m.insert(key, Value::Array(Array::String(Vec::new())))
    });
    let key = "tokenizer.ggml.scores";
    complaint(spm, key, |m| {
        m.insert(key, Value::Array(Array::F32(vec![0.0; 3])))
    });
    let count = metadata_of(spm)
        .require_strings("tokenizer.ggml.tokens")
        .unwrap()
        .len();
    complaint(spm, key, |m| {
        m.insert(key, Value::Array(Array::F32(vec![f32::NAN; count])))
    });
    let key = "tokenizer.ggml.token_type";
    complaint(spm, key, |m| {
        m.insert(key, Value::Array(Array::I32(vec![1; 3])))
    });
    complaint(spm, key, |m| {
        m.insert(key, Value::Array(Array::I32(vec![77; count])))
    });
    complaint(spm, "tokenizer.ggml.tokens", |m| {
        m.insert(key, Value::Array(Array::I32(vec![6; count])))
    });
    let key = "tokenizer.ggml.bos_token_id";
    complaint(spm, key, |m| m.insert(key, Value::U32(count as u32)));
    let key = "tokenizer.ggml.merges";
    complaint(bpe, key, |m| drop(m.remove(key)));
    for merge in [
        "",
        " ",
        "a",
        "a b c",
        "nowhere b",
        "a nowhere",
        "\u{120}the \u{120}the",
    ] {
        let error = complaint(bpe, key, |m| {
            m.insert(key, Value::Array(Array::String(vec![merge.into()])))
        });
        assert!(error.contains(&format!("{merge:?}")), "{error}");
    }
}

#[test]
fn a_megabyte_takes_seconds() {
    let prose = std::fs::read_to_string(fixture("text/en.txt")).unwrap();
    let mut prose = prose.repeat((1 << 20) / prose.len() + 1);
    prose.truncate(
        (0..=1 << 20)
            .rev()
            .find(|&at| prose.is_char_boundary(at))
            .unwrap(),
    );
    for tokenizer in [of_checkpoint("tiny-mixtral"), of_checkpoint("byte-bpe")] {
        for text in [
            prose.as_str(),
            &"x".repeat(1 << 18),
            &" ".repeat(1 << 18),
            &"\n ".repeat(1 << 17),
        ] {
            let start = std::time::Instant::now();
            let ids = tokenizer.encode(text, false).unwrap();
            let seconds = start.elapsed().as_secs_f64();
            println!("{} bytes, {} tokens: {seconds:.2} s", text.len(), ids.len());
            // Quadratic merging would take minutes.
            assert!(seconds < 30.0, "{} bytes took {seconds} s", text.len());
            assert_eq!(tokenizer.decode(&ids, false), text);
        }
    }
}
