//! Texts under grammars, drawn from noise: whatever the model finds likely, the text is what the grammar says.

use std::path::Path;

use fewbit::gguf::Metadata;
use fewbit::grammar::{Error, Grammar, Grammars};
use fewbit::sampler::{Sampler, Settings};
use fewbit::tokenizer::Tokenizer;
use serde_json::{Value, json};

fn tokenizer(checkpoint: &str) -> Tokenizer {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(checkpoint);
    let metadata = Metadata::from_iter(fewbit_convert::vocab::from_checkpoint(&path).unwrap());
    Tokenizer::from_metadata(&metadata).unwrap()
}

/// Both kinds of vocabulary: SentencePiece and bytes.
const VOCABULARIES: [&str; 2] = ["tiny-mixtral", "byte-bpe"];

/// A text of a model that finds everything equally likely but for noise; `None` if it is not over by 3000 tokens.
fn drawn(
    tokenizer: &Tokenizer,
    grammars: &Grammars,
    grammar: &Grammar,
    seed: u64,
) -> Option<String> {
    let settings = Settings {
        seed,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        temperature: 1.0,
        ..Settings::default()
    };
    let constraint = grammars.constraint(grammar).unwrap();
    let mut sampler = Sampler::new(settings).with_constraint(Some(constraint));
    let mut logits = vec![0.0; tokenizer.vocab_len()];
    let mut tokens = Vec::new();
    let mut state = seed;
    for _ in 0..3000 {
        for logit in &mut logits {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            *logit = (state >> 40) as f32 / (1u64 << 24) as f32 * 4.0;
        }
        // Texts of noise would go on for long.
        logits[tokenizer.eos().unwrap() as usize] = 8.0;
        let token = sampler.sample(&logits, &tokens);
        if tokenizer.is_end(token) {
            let mut stream = tokenizer.stream();
            let text: String = tokens.iter().map(|&token| stream.push(token)).collect();
            return Some(text + &stream.finish());
        }
        tokens.push(token);
    }
    None
}

#[test]
fn json_follows_its_schema() {
    let schema = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "kind": {"enum": ["cat", "dog"]},
            "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 120}, "maxItems": 3},
            "next": {"$ref": "#/$defs/spot"},
        },
        "required": ["name", "kind", "ages", "next"],
        "additionalProperties": false,
        "$defs": {"spot": {"type": "boolean"}},
    });
    for name in VOCABULARIES {
        let tokenizer = tokenizer(name);
        let grammars = Grammars::new(&tokenizer).unwrap();
        for seed in 0..20 {
            let text = drawn(
                &tokenizer,
                &grammars,
                &Grammar::Schema(schema.clone()),
                seed,
            )
            .unwrap();
            let value: Value =
                serde_json::from_str(&text).unwrap_or_else(|error| panic!("{text:?}: {error}"));
            assert!(
                value["name"].as_str().unwrap().chars().count() <= 8,
                "{text}"
            );
            assert!(
                ["cat", "dog"].contains(&value["kind"].as_str().unwrap()),
                "{text}"
            );
            let ages = value["ages"].as_array().unwrap();
            assert!(
                ages.len() <= 3 && ages.iter().all(|age| age.as_u64().unwrap() <= 120),
                "{text}"
            );
            assert!(
                value["next"].is_boolean() && value.as_object().unwrap().len() == 4,
                "{text}"
            );
        }
    }
}

#[test]
fn regular_expressions_and_grammars() {
    let date = regex::Regex::new(r"^(19|20)[0-9]{2}-[01][0-9]$").unwrap();
    let list = regex::Regex::new(r"^(red|green|ß)(, (red|green|ß)){0,3}\.$").unwrap();
    let gbnf = "root ::= item (\", \" item){0,3} [.]\nitem ::= \"red\" | \"green\" | \"ß\"";
    let lark = "start: ITEM (\", \" ITEM){0,3} \".\"\nITEM: \"red\" | \"green\" | \"ß\"";
    for name in VOCABULARIES {
        let tokenizer = tokenizer(name);
        let grammars = Grammars::new(&tokenizer).unwrap();
        for (grammar, expected) in [
            (Grammar::Regex("(19|20)[0-9]{2}-[01][0-9]".into()), &date),
            (Grammar::text(gbnf), &list),
            (Grammar::text(lark), &list),
        ] {
            for seed in 0..10 {
                let text = drawn(&tokenizer, &grammars, &grammar, seed).unwrap();
                assert!(expected.is_match(&text), "{text:?} of {grammar:?}");
            }
        }
    }
}

#[test]
fn what_cannot_be_followed_is_refused() {
    let grammars = Grammars::new(&tokenizer("byte-bpe")).unwrap();
    for grammar in [
        Grammar::Regex("(".into()),
        Grammar::text("start: \"a"),
        Grammar::text("root ::= other"),
        Grammar::text("root ::= \"a\" ("),
        Grammar::Schema(json!({"type": "none"})),
        Grammar::Schema(json!({"$ref": "#/nowhere"})),
        Grammar::Schema(json!({"type": "string", "minLength": 5, "maxLength": 3})),
    ] {
        let error = grammars.constraint(&grammar).err();
        let error = error.unwrap_or_else(|| panic!("{grammar:?} was accepted"));
        assert!(matches!(error, Error::Grammar(_)));
        assert!(!error.to_string().contains('\n'), "{error}");
    }
}
