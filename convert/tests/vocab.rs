//! Vocabularies, from the files that checkpoints hold.

use std::fs;
use std::path::{Path, PathBuf};

use fewbit::gguf::Metadata;
use fewbit::tokenizer::{TokenKind, Tokenizer};
use fewbit_convert::vocab::from_checkpoint;
use fewbit_convert::{sentencepiece, tekken};
use serde_json::{Value as Json, json};
use tempfile::TempDir;

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../quant-tests/fixtures")
        .join(path)
}

/// A folder with these files.
fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

fn metadata(folder: &TempDir) -> Metadata {
    Metadata::from_iter(from_checkpoint(folder.path()).unwrap())
}

fn complaint(files: &[(&str, &[u8])]) -> String {
    from_checkpoint(folder(files).path())
        .unwrap_err()
        .to_string()
}

fn spm() -> Vec<u8> {
    fs::read(fixture("tiny-mixtral/tokenizer.model")).unwrap()
}

fn byte_bpe() -> Json {
    serde_json::from_slice(&fs::read(fixture("byte-bpe/tokenizer.json")).unwrap()).unwrap()
}

#[test]
fn truncated_sentencepiece_models_name_the_offset() {
    let whole = spm();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.model");
    let mut refused = 0;
    for len in (0..whole.len()).step_by(97) {
        fs::write(&path, &whole[..len]).unwrap();
        // A cut between two fields leaves a whole message.
        if let Err(error) = sentencepiece::read(&path) {
            let error = error.to_string();
            assert!(
                error.contains("tokenizer.model") && !error.contains('\n'),
                "{error}"
            );
            refused += 1;
        }
    }
    assert!(refused > whole.len() / 97 / 2);
    fs::write(&path, &whole[..1001]).unwrap();
    let error = sentencepiece::read(&path).unwrap_err().to_string();
    assert!(error.contains("at byte "), "{error}");
}

#[test]
fn flipped_bytes_in_sentencepiece_models_never_panic() {
    let whole = spm();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.model");
    for step in 0..2000usize {
        let mut bytes = whole.clone();
        let at = step * 7919 % bytes.len();
        bytes[at] ^= 1 << (step % 8);
        fs::write(&path, &bytes).unwrap();
        let _ = sentencepiece::read(&path);
    }
}

#[test]
fn scores_become_merges_best_piece_first() {
    let metadata = metadata(&folder(&[("tokenizer.model", &spm())]));
    let tokens = metadata.require_strings("tokenizer.ggml.tokens").unwrap();
    let scores = metadata.require_f32s("tokenizer.ggml.scores").unwrap();
    let merges = metadata.require_strings("tokenizer.ggml.merges").unwrap();
    assert!(!merges.is_empty());
    let score = |merge: &String| {
        let piece = merge.replacen(' ', "", 1);
        scores[tokens.iter().position(|token| *token == piece).unwrap()]
    };
    assert!(
        merges
            .windows(2)
            .all(|pair| score(&pair[0]) >= score(&pair[1]))
    );
}

#[test]
fn sentencepiece_vocabularies_come_back_from_tokenizer_json() {
    let original = metadata(&folder(&[("tokenizer.model", &spm())]));
    let tokens = original.require_strings("tokenizer.ggml.tokens").unwrap();
    let merges = original.require_strings("tokenizer.ggml.merges").unwrap();
    let vocab: serde_json::Map<String, Json> = tokens
        .iter()
        .enumerate()
        .map(|(id, token)| (token.clone(), json!(id)))
        .collect();
    let special = |id: usize| json!({"id": id, "content": tokens[id], "special": true});
    let json = json!({
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": true, "unk_token": "<unk>"},
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "added_tokens": [special(0), special(1), special(2)],
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]},
    });
    let settings = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}});
    let converted = metadata(&folder(&[
        ("tokenizer.json", json.to_string().as_bytes()),
        ("tokenizer_config.json", settings.to_string().as_bytes()),
    ]));
    for key in [
        "model",
        "tokens",
        "token_type",
        "bos_token_id",
        "eos_token_id",
        "unknown_token_id",
        "add_bos_token",
        "add_space_prefix",
    ] {
        let key = format!("tokenizer.ggml.{key}");
        assert_eq!(converted.get(&key), original.get(&key), "{key}");
    }
    let (original, converted) = (
        Tokenizer::from_metadata(&original).unwrap(),
        Tokenizer::from_metadata(&converted).unwrap(),
    );
    for language in ["en", "fr", "de", "es", "it"] {
        let text = fs::read_to_string(fixture(&format!("text/{language}.txt"))).unwrap();
        assert_eq!(
            original.encode(&text, false).unwrap(),
            converted.encode(&text, false).unwrap(),
            "{language}"
        );
    }
}

#[test]
fn both_forms_of_merges_are_read() {
    let mut json = byte_bpe();
    let merges = |json: &Json| {
        let folder = folder(&[("tokenizer.json", json.to_string().as_bytes())]);
        metadata(&folder)
            .require_strings("tokenizer.ggml.merges")
            .unwrap()
            .to_vec()
    };
    let pairs = merges(&json);
    json["model"]["merges"] = json!(pairs);
    assert_eq!(merges(&json), pairs);
    json["model"]["merges"] = json!(
        pairs
            .iter()
            .map(|merge| merge.split(' ').collect::<Vec<_>>())
            .collect::<Vec<_>>()
    );
    assert_eq!(merges(&json), pairs);
}

#[test]
fn pre_tokenizers_are_told_by_their_structure() {
    let pre = |pre_tokenizer: Json| {
        let mut json = byte_bpe();
        json["pre_tokenizer"] = pre_tokenizer;
        from_checkpoint(folder(&[("tokenizer.json", json.to_string().as_bytes())]).path())
            .map(|pairs| {
                Metadata::from_iter(pairs)
                    .require_str("tokenizer.ggml.pre")
                    .unwrap()
                    .to_owned()
            })
            .map_err(|error| error.to_string())
    };
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": use_regex});
    let sequence = |steps: &[Json]| json!({"type": "Sequence", "pretokenizers": steps});
    let split = |name: &str| {
        let pattern = fewbit::tokenizer::pre_tokenizer_patterns(name).unwrap()[0];
        json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
    };
    assert_eq!(pre(bytes(true)).unwrap(), "gpt-2");
    assert_eq!(
        pre(sequence(&[
            json!({"type": "Digits", "individual_digits": true}),
            bytes(true)
        ]))
        .unwrap(),
        "smollm"
    );
    for name in ["llama-bpe", "qwen2", "tekken"] {
        assert_eq!(pre(sequence(&[split(name), bytes(false)])).unwrap(), name);
    }
    let unknown = json!({"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated"});
    let error = pre(sequence(&[unknown, bytes(false)])).unwrap_err();
    assert!(
        error.contains("[a-z]+") && error.contains("tokenizer.json"),
        "{error}"
    );
    assert!(
        pre(json!({"type": "Whitespace"}))
            .unwrap_err()
            .contains("Whitespace")
    );
}

#[test]
fn tekken_is_byte_level_with_merges_by_rank() {
    use base64::prelude::{BASE64_STANDARD, Engine};
    let mut vocab: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    vocab.extend(["th", "he", "the", "xx", "xxx"].map(|token| token.as_bytes().to_vec()));
    let entries: Vec<Json> = vocab
        .iter()
        .map(|bytes| json!({"token_bytes": BASE64_STANDARD.encode(bytes)}))
        .collect();
    let json = json!({
        "config": {
            "pattern": fewbit::tokenizer::pre_tokenizer_patterns("tekken").unwrap()[0],
            "default_vocab_size": 20 + vocab.len(),
            "default_num_special_tokens": 20,
        },
        "vocab": entries,
    });
    let folder = folder(&[("tekken.json", json.to_string().as_bytes())]);
    let metadata = metadata(&folder);
    assert_eq!(
        metadata.require_strings("tokenizer.ggml.merges").unwrap(),
        ["t h", "h e", "th e", "x x", "xx x"]
    );
    let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
    assert_eq!(tokenizer.bos(), Some(1));
    assert_eq!(
        tokenizer.id("[INST]").and_then(|id| tokenizer.kind(id)),
        Some(TokenKind::Control)
    );
    assert_eq!(tokenizer.piece(19), Some("<SPECIAL_19>"));
    let ids = tokenizer.encode("the hex", false).unwrap();
    let pieces: Vec<_> = ids.iter().map(|&id| tokenizer.piece(id).unwrap()).collect();
    assert_eq!(pieces, ["the", "Ġ", "he", "x"]);

    let mut broken = json.clone();
    broken["vocab"].as_array_mut().unwrap().remove(257);
    broken["config"]["default_vocab_size"] = json!(20 + vocab.len() - 1);
    fs::write(folder.path().join("tekken.json"), broken.to_string()).unwrap();
    assert!(
        tekken::read(&folder.path().join("tekken.json")).is_ok(),
        "the splits th+e and t+he are both fine"
    );
    broken["config"]["default_vocab_size"] = json!(1 << 30);
    fs::write(folder.path().join("tekken.json"), broken.to_string()).unwrap();
    assert!(
        tekken::read(&folder.path().join("tekken.json"))
            .unwrap_err()
            .to_string()
            .contains("tekken.json")
    );
}

#[test]
fn added_tokens_and_padding_fill_the_embedding() {
    let model = spm();
    let count = sentencepiece::read(&fixture("tiny-mixtral/tokenizer.model"))
        .unwrap()
        .pieces
        .len();
    let added = json!({"<|im_start|>": count, "<word>": count + 1}).to_string();
    let settings = json!({
        "eos_token": "<|im_start|>",
        "added_tokens_decoder": {"0": {"content": "<unk>", "special": true}, (count + 2).to_string(): {"content": "[X]", "special": true}},
        "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}],
    })
    .to_string();
    let config = json!({"vocab_size": count + 5}).to_string();
    let files: [(&str, &[u8]); 4] = [
        ("tokenizer.model", &model),
        ("added_tokens.json", added.as_bytes()),
        ("tokenizer_config.json", settings.as_bytes()),
        ("config.json", config.as_bytes()),
    ];
    let metadata = metadata(&folder(&files));
    assert_eq!(
        metadata.str("tokenizer.chat_template").unwrap(),
        Some("yes")
    );
    let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
    assert_eq!(tokenizer.vocab_len(), count + 5);
    let kind = |piece: &str| tokenizer.id(piece).and_then(|id| tokenizer.kind(id));
    assert_eq!(kind("<unk>"), Some(TokenKind::Unknown));
    assert_eq!(kind("<|im_start|>"), Some(TokenKind::Control));
    assert_eq!(kind("<word>"), Some(TokenKind::UserDefined));
    assert_eq!(kind("[X]"), Some(TokenKind::Control));
    assert_eq!(
        kind(&format!("[PAD{}]", count + 4)),
        Some(TokenKind::Unused)
    );
    assert_eq!(tokenizer.eos(), Some(count as u32));

    let config = json!({"vocab_size": 100}).to_string();
    let error = complaint(&[
        ("tokenizer.model", &model),
        ("config.json", config.as_bytes()),
    ]);
    assert!(error.contains("vocab_size is 100"), "{error}");
    let config = json!({"vocab_size": 1u64 << 40}).to_string();
    complaint(&[
        ("tokenizer.model", &model),
        ("config.json", config.as_bytes()),
    ]);
    let settings = json!({"bos_token": "<nowhere>"}).to_string();
    let error = complaint(&[
        ("tokenizer.model", &model),
        ("tokenizer_config.json", settings.as_bytes()),
    ]);
    assert!(
        error.contains("<nowhere>") && error.contains("tokenizer_config.json"),
        "{error}"
    );
}

#[test]
fn a_padding_token_that_the_vocabulary_lacks_is_ignored() {
    let model = spm();
    let settings = json!({"pad_token": "[PAD]", "bos_token": "", "unk_token": {"content": ""}});
    let settings = settings.to_string();
    let metadata = metadata(&folder(&[
        ("tokenizer.model", &model),
        ("tokenizer_config.json", settings.as_bytes()),
    ]));
    assert!(!metadata.contains("tokenizer.ggml.padding_token_id"));
    let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), Some(2)));
}

#[test]
fn folders_without_a_tokenizer_are_told_what_to_get() {
    let error = complaint(&[]);
    assert!(
        error.contains("tokenizer.model") && error.contains("tokenizer.json"),
        "{error}"
    );
    let error = complaint(&[(
        "tokenizer.json",
        br#"{"model": {"type": "Unigram", "vocab": []}}"#,
    )]);
    assert!(error.contains("Unigram"), "{error}");
}
