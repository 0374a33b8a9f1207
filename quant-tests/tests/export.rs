//! The way back: a GGUF file exported as a checkpoint holds what the checkpoint held, and converts to the same file again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use fewbit::gguf::{Value, names};
use fewbit::tokenizer::{TokenKind, Tokenizer};
use fewbit_convert::export::{Dtype, Options, export};
use fewbit_convert::{Error, Options as Conversion, convert};
use indicatif::ProgressBar;
use quant_tests::fixture::{self, ModelFile, Parts};
use safetensors::SafeTensors;
use serde_json::{Value as Json, json};
use tempfile::TempDir;

fn exported(model: &Path, options: &Options) -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    // The converter takes a model's name from its folder.
    let out = folder.path().join("tiny-mixtral");
    export(model, &out, options, &ProgressBar::hidden()).unwrap();
    (folder, out)
}

fn assert_same_file(a: &ModelFile, b: &ModelFile) {
    let (a, b) = (fs::read(&a.path).unwrap(), fs::read(&b.path).unwrap());
    let difference = a.iter().zip(&b).position(|(a, b)| a != b);
    assert_eq!((a.len(), difference), (b.len(), None));
}

fn json_of(path: PathBuf) -> Json {
    serde_json::from_slice(&fs::read(&path).unwrap()).unwrap()
}

/// Names of files in a folder.
fn files(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[test]
fn a_model_comes_back_byte_for_byte() {
    let first = fixture::tiny_mixtral("F32");
    let (_kept, out) = exported(&first.path, &Options::new(Dtype::F32));
    let wanted = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ];
    assert_eq!(files(&out), wanted);
    assert_same_file(&first, &fixture::converted(&out, "F32"));
}

#[test]
fn files_of_limited_size_have_an_index() {
    let first = fixture::tiny_mixtral("F32");
    let options = Options {
        shard_bytes: 3_000_000,
        ..Options::new(Dtype::F32)
    };
    let (_kept, out) = exported(&first.path, &options);
    let index = json_of(out.join("model.safetensors.index.json"));
    let shards: Vec<String> = files(&out)
        .into_iter()
        .filter(|name| name.ends_with(".safetensors"))
        .collect();
    assert!(shards.len() > 5, "{shards:?}");
    let weights = index["weight_map"].as_object().unwrap();
    assert!(
        shards
            .iter()
            .all(|shard| weights.values().any(|of| of == shard.as_str()))
    );
    for shard in &shards {
        let bytes = fs::read(out.join(shard)).unwrap();
        let names = SafeTensors::deserialize(&bytes).unwrap();
        let names = names
            .names()
            .into_iter()
            .all(|name| weights[name] == shard.as_str());
        assert!(names && bytes.len() < 3_100_000);
    }
    assert_eq!(index["metadata"]["total_size"], 4 * fixture_weights());
    assert_same_file(&first, &fixture::converted(&out, "F32"));
}

fn fixture_weights() -> u64 {
    let bytes = fs::read(fixture::path("tiny-mixtral/model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let count = |(_, view): (&str, safetensors::tensor::TensorView<'_>)| {
        view.shape().iter().product::<usize>()
    };
    tensors.iter().map(count).sum::<usize>() as u64
}

#[test]
fn the_tensors_are_those_of_the_checkpoint_that_was_converted() {
    let model = fixture::tiny_mixtral("F32");
    let (_kept, out) = exported(&model.path, &Options::new(Dtype::Bf16));
    let bytes = [
        fs::read(fixture::path("tiny-mixtral/model.safetensors")).unwrap(),
        fs::read(out.join("model.safetensors")).unwrap(),
    ];
    let [wanted, found] = bytes
        .each_ref()
        .map(|bytes| SafeTensors::deserialize(bytes).unwrap());
    let mut names = [wanted.names(), found.names()];
    names.iter_mut().for_each(|names| names.sort());
    assert_eq!(names[0], names[1]);
    for name in &names[0] {
        let (wanted, found) = (wanted.tensor(name).unwrap(), found.tensor(name).unwrap());
        assert_eq!(
            (wanted.dtype(), wanted.shape()),
            (found.dtype(), found.shape()),
            "{name}"
        );
        assert!(wanted.data() == found.data(), "{name}");
    }
    // And what goes with them says the same.
    let original = json_of(fixture::path("tiny-mixtral/config.json"));
    let config = json_of(out.join("config.json"));
    for (key, value) in config.as_object().unwrap() {
        assert_eq!(value, &original[key], "{key}");
    }
    assert_eq!(config["rms_norm_eps"], 1e-5);
}

#[test]
fn a_quantized_file_is_decoded() {
    let model = fixture::tiny_mixtral("Q4_K_M");
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("out");
    let report = export(
        &model.path,
        &out,
        &Options::new(Dtype::F32),
        &ProgressBar::hidden(),
    )
    .unwrap();
    assert!(report.decoded > 20, "{}", report.decoded);
    let exact = Parts::read(&fixture::converted(&model.path, "F32").path);
    let again = Parts::read(&fixture::converted(&out, "F32").path);
    assert_eq!(exact.tensors.len(), again.tensors.len());
    for ((a, x), (b, y)) in exact.tensors.iter().zip(&again.tensors) {
        assert!(a.name == b.name && x == y, "{}", a.name);
    }
}

/// The fixture's checkpoint with its files changed by `change`.
fn checkpoint_with(change: impl Fn(&Path)) -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let to = folder.path().join("tiny-mixtral");
    fs::create_dir(&to).unwrap();
    for name in files(&fixture::path("tiny-mixtral")) {
        fs::copy(fixture::path("tiny-mixtral").join(&name), to.join(&name)).unwrap();
    }
    change(&to);
    (folder, to)
}

#[test]
fn byte_level_vocabularies_come_back_too() {
    let (_kept, from) = checkpoint_with(|folder| {
        fs::remove_file(folder.join("tokenizer.model")).unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(fixture::path("byte-bpe").join(name), folder.join(name)).unwrap();
        }
    });
    let first = fixture::converted(&from, "F32");
    let (_kept, out) = exported(&first.path, &Options::new(Dtype::F32));
    assert_same_file(&first, &fixture::converted(&out, "F32"));
    let settings = json_of(out.join("tokenizer_config.json"));
    let original = json_of(from.join("tokenizer_config.json"));
    for key in ["bos_token", "eos_token", "chat_template"] {
        assert_eq!(settings[key], original[key], "{key}");
    }
}

#[test]
fn windows_scaling_and_tied_heads_come_back() {
    let changes: [fn(&mut Json); 3] = [
        |config| config["sliding_window"] = json!(512),
        |config| {
            config["model_type"] = json!("llama");
            config["rope_scaling"] = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
        },
        |config| {
            config["model_type"] = json!("llama");
            config["rope_scaling"] = json!({"rope_type": "linear", "factor": 2.5});
        },
    ];
    for (case, change) in changes.into_iter().enumerate() {
        // Dense where transformers' Mixtral has no such thing.
        let (_kept, from) = checkpoint_with(|folder| {
            let path = folder.join("config.json");
            let mut config = json_of(path.clone());
            change(&mut config);
            if config["model_type"] == "llama" {
                config.as_object_mut().unwrap().remove("num_local_experts");
                config
                    .as_object_mut()
                    .unwrap()
                    .remove("num_experts_per_tok");
                dense_weights(folder);
            }
            fs::write(path, config.to_string()).unwrap();
        });
        let first = fixture::converted(&from, "F32");
        let (_kept, out) = exported(&first.path, &Options::new(Dtype::F32));
        assert_same_file(&first, &fixture::converted(&out, "F32"));
        let config = json_of(out.join("config.json"));
        match case {
            0 => assert_eq!(config["sliding_window"], 512),
            1 => assert_eq!(config["rope_scaling"]["factor"], 8.0),
            _ => assert_eq!(config["rope_scaling"]["factor"], 2.5),
        }
    }
    let mut tied = Parts::read(&fixture::tiny_mixtral("F32").path);
    tied.tensors.retain(|(decl, _)| decl.name != names::OUTPUT);
    let (_kept, out) = exported(&tied.write().path, &Options::new(Dtype::Bf16));
    assert_eq!(
        json_of(out.join("config.json"))["tie_word_embeddings"],
        true
    );
    let bytes = fs::read(out.join("model.safetensors")).unwrap();
    assert!(
        SafeTensors::deserialize(&bytes)
            .unwrap()
            .tensor("lm_head.weight")
            .is_err()
    );
}

/// Keeps the first expert of each layer, as a dense model's feed-forward part.
fn dense_weights(folder: &Path) {
    let path = folder.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let mut kept = Vec::new();
    for (name, view) in all.iter() {
        let renamed = [("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")]
            .into_iter()
            .fold(name.to_owned(), |name, (from, to)| {
                name.replace(
                    &format!("block_sparse_moe.experts.0.{from}"),
                    &format!("mlp.{to}"),
                )
            });
        if !renamed.contains("block_sparse_moe") {
            kept.push((renamed, view));
        }
    }
    safetensors::serialize_to_file(kept, None, &path).unwrap();
}

#[test]
fn scores_and_kinds_of_tokens_come_back_in_tokenizer_json_as_far_as_it_holds_them() {
    let model = fixture::tiny_mixtral("F32");
    let (_kept, out) = exported(&model.path, &Options::new(Dtype::Bf16));
    // Without tokenizer.model the converter reads tokenizer.json.
    fs::remove_file(out.join("tokenizer.model")).unwrap();
    let again = fixture::converted(&out, "F32");
    let tokenizer =
        |file: &ModelFile| Tokenizer::from_metadata(&Parts::read(&file.path).metadata).unwrap();
    let (ours, theirs) = (tokenizer(&model), tokenizer(&again));
    for language in fixture::LANGUAGES {
        let text: String = fixture::text(language).chars().take(4000).collect();
        assert_eq!(
            ours.encode_with_bos(&text, false).unwrap(),
            theirs.encode_with_bos(&text, false).unwrap(),
            "{language}"
        );
    }
    let tokens = json_of(out.join("tokenizer.json"));
    let special = tokens["added_tokens"].as_array().unwrap();
    assert_eq!(special.len(), 3, "{special:?}");
    assert_eq!(TokenKind::Control as i32, 3);
}

#[test]
fn what_cannot_be_exported_is_refused_and_leaves_nothing() {
    let model = fixture::tiny_mixtral("F32");
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("out");
    let refused = |model: &Path, options: &Options| {
        let error = export(model, &out, options, &ProgressBar::hidden()).unwrap_err();
        assert!(!out.exists());
        let line = error.to_string();
        assert!(!line.contains('\n'), "{line}");
        line
    };
    let plain = Options::new(Dtype::F16);
    let line = refused(&fixture::path("tiny-mixtral"), &plain);
    assert!(line.contains("is a folder"), "{line}");
    let changed = |change: &dyn Fn(&mut Parts)| {
        let mut parts = Parts::read(&model.path);
        change(&mut parts);
        parts.write()
    };
    let large = changed(&|parts| {
        let (_, bytes) = parts.tensor("blk.1.attn_q.weight");
        bytes[..4].copy_from_slice(&1e9f32.to_le_bytes());
    });
    let line = refused(&large.path, &plain);
    assert!(
        line.contains("blk.1.attn_q.weight") && line.contains("out of F16's range"),
        "{line}"
    );
    let extra = changed(&|parts| {
        let (mut decl, bytes) = parts.tensors[0].clone();
        decl.name = "blk.0.attn_q.bias".into();
        parts.tensors.push((decl, bytes));
    });
    let line = refused(&extra.path, &plain);
    assert!(line.contains("blk.0.attn_q.bias has no place"), "{line}");
    let merges = changed(&|parts| {
        parts.metadata.remove("tokenizer.ggml.merges");
    });
    let line = refused(&merges.path, &plain);
    assert!(line.contains("tokenizer.ggml.merges"), "{line}");
    let scaled = changed(&|parts| {
        parts
            .metadata
            .insert("llama.rope.scaling.type", Value::String("yarn".into()));
    });
    let line = refused(&scaled.path, &plain);
    assert!(line.contains("yarn"), "{line}");
    // A run that was cut off is taken up, and a folder that is there is never replaced.
    fs::write(
        folder
            .path()
            .join("out.partial/model-00001-of-00009.safetensors"),
        "rest",
    )
    .unwrap();
    export(&model.path, &out, &plain, &ProgressBar::hidden()).unwrap();
    assert_eq!(files(folder.path()), ["out"]);
    assert_eq!(files(&out).len(), 6);
    let error = export(&model.path, &out, &plain, &ProgressBar::hidden()).unwrap_err();
    assert!(
        matches!(error, Error::Input { .. }) && out.exists(),
        "{error}"
    );
}

#[test]
fn the_command_says_what_it_wrote() {
    let model = fixture::tiny_mixtral("Q8_0");
    let folder = TempDir::new().unwrap();
    let converter =
        fixture::binary().with_file_name(format!("fewbit-convert{}", std::env::consts::EXE_SUFFIX));
    let run = |arguments: &[&str]| {
        let mut command = Command::new(&converter);
        command
            .arg("export")
            .arg(&model.path)
            .arg(folder.path().join("out"));
        command.args(arguments).output().unwrap()
    };
    let output = run(&["--dtype", "f16", "--json"]);
    let report: Json = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["files"], 1);
    assert_eq!(report["weight_bytes"], 2 * fixture_weights());
    let output = run(&[]);
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        (output.status.code(), line.lines().count()),
        (Some(1), 1),
        "{line}"
    );
    // A conversion takes the checkpoint like any other.
    let mut options = Conversion::new("Q8_0".parse().unwrap());
    options.force = true;
    convert(
        &folder.path().join("out"),
        &folder.path().join("again.gguf"),
        &options,
        &ProgressBar::hidden(),
    )
    .unwrap();
}
