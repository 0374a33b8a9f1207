//! Bad input gets one clear line and leaves nothing under the output's name.

use std::fs;
use std::path::Path;
use std::process::Command;

use fewbit_convert::recipe::Mix;
use fewbit_convert::{Error, Options};
use safetensors::Dtype;
use serde_json::json;

use crate::common::*;

fn q4() -> Options {
    Options::new(Mix::Q4_K_M)
}

/// A dense model with something changed about it, and the message of its conversion.
fn failure_of(change: impl FnOnce(&mut serde_json::Value, &mut Weights)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let (mut config, mut model) = (config(0), random_model(0));
    change(&mut config, &mut model);
    write_hf(&dir.path().join("m"), &config, Dtype::F32, &model);
    failure(&dir.path().join("m"), &q4())
}

fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
}

#[test]
fn a_truncated_shard_names_file_tensor_and_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let shards = write_sharded(
        &dir.path().join("m"),
        &config(4),
        Dtype::BF16,
        &random_model(4),
    );
    let whole = fs::metadata(&shards[1]).unwrap().len();
    fs::File::options()
        .write(true)
        .open(&shards[1])
        .unwrap()
        .set_len(whole - 1)
        .unwrap();
    let message = failure(&dir.path().join("m"), &q4());
    assert_says(
        &message,
        &[
            "model-00002-of-00002.safetensors",
            "truncated",
            &whole.to_string(),
            &(whole - 1).to_string(),
        ],
    );
    assert_says(&message, &["tensor "]);
}

#[test]
fn a_missing_shard_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let shards = write_sharded(
        &dir.path().join("m"),
        &config(0),
        Dtype::BF16,
        &random_model(0),
    );
    fs::remove_file(&shards[0]).unwrap();
    assert_says(
        &failure(&dir.path().join("m"), &q4()),
        &["model-00001-of-00002.safetensors", "missing", "index.json"],
    );
}

#[test]
fn a_missing_tensor_is_named() {
    let message = failure_of(|_, model| {
        model.remove("model.layers.1.self_attn.v_proj.weight");
    });
    assert_says(
        &message,
        &["model.layers.1.self_attn.v_proj.weight", "missing"],
    );
}

#[test]
fn a_wrong_shape_is_named_with_the_expected_one() {
    let message = failure_of(|config, _| config["intermediate_size"] = json!(FFN / 2));
    let (expected, found) = (
        format!("[{HIDDEN}, {}]", FFN / 2),
        format!("[{HIDDEN}, {FFN}]"),
    );
    assert_says(
        &message,
        &["layers.0.mlp.down_proj.weight", &expected, &found],
    );
}

#[test]
fn a_tensor_without_a_place_is_named() {
    let message = failure_of(|_, model| {
        model.insert(
            "model.layers.0.self_attn.q_proj.bias".into(),
            (vec![HIDDEN], vec![0.0; HIDDEN]),
        );
    });
    assert_says(
        &message,
        &["model.layers.0.self_attn.q_proj.bias", "no place"],
    );
}

#[test]
fn a_weight_that_is_not_finite_is_named_with_row_and_column() {
    for (value, says) in [
        (f32::NAN, "NaN"),
        (f32::INFINITY, "inf"),
        (f32::NEG_INFINITY, "-inf"),
    ] {
        let change = |_: &mut _, model: &mut Weights| {
            model
                .get_mut("model.layers.1.mlp.up_proj.weight")
                .unwrap()
                .1[7 * HIDDEN + 3] = value;
        };
        assert_says(
            &failure_of(change),
            &["blk.1.ffn_up.weight", says, "row 7", "column 3"],
        );
    }
}

#[test]
fn a_weight_beyond_f16_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = random_model(0);
    model.get_mut("lm_head.weight").unwrap().1[5] = 70000.0;
    write_hf(&dir.path().join("m"), &config(0), Dtype::F32, &model);
    let message = failure(&dir.path().join("m"), &Options::new(Mix::F16));
    assert_says(
        &message,
        &["output.weight", "row 0", "column 5", "F16", "choose BF16"],
    );
    converted(&dir.path().join("m"), Mix::BF16);
}

#[test]
fn a_finite_weight_that_no_scale_can_hold_is_named_for_every_type() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = random_model(0);
    let name = "model.layers.0.self_attn.v_proj.weight";
    model.get_mut(name).unwrap().1[2 * HIDDEN + 9] = 4e37;
    write_hf(&dir.path().join("m"), &config(0), Dtype::BF16, &model);
    for mix in Mix::all() {
        if matches!(mix, Mix::BF16 | Mix::F32) {
            converted(&dir.path().join("m"), mix);
            continue;
        }
        let message = failure(&dir.path().join("m"), &Options::new(mix));
        let says = [
            "blk.0.attn_v.weight",
            "row 2",
            "column 9",
            "choose BF16 or F32",
        ];
        assert_says(&message, &says);
    }
}

#[test]
fn a_large_weight_that_fits_stays_finite_for_every_type() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = random_model(0);
    let name = "model.layers.0.self_attn.v_proj.weight";
    model.get_mut(name).unwrap().1[2 * HIDDEN + 9] = 60000.0;
    write_hf(&dir.path().join("m"), &config(0), Dtype::F32, &model);
    for mix in Mix::all() {
        let (_, gguf) = converted(&dir.path().join("m"), mix);
        let weights = tensor_weights(&gguf, "blk.0.attn_v.weight");
        assert!(weights.iter().all(|weight| weight.is_finite()), "{mix}");
        assert!(
            (weights[2 * HIDDEN + 9] / 60000.0 - 1.0).abs() < 0.1,
            "{mix}"
        );
    }
}

#[test]
fn a_weight_that_rounds_to_infinity_in_bf16_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = random_model(0);
    model.get_mut("lm_head.weight").unwrap().1[5] = f32::MAX;
    write_hf(&dir.path().join("m"), &config(0), Dtype::F32, &model);
    let message = failure(&dir.path().join("m"), &Options::new(Mix::BF16));
    assert_says(&message, &["output.weight", "column 5", "choose F32"]);
    converted(&dir.path().join("m"), Mix::F32);
}

#[test]
fn damaged_blocks_are_not_copied() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("m");
    write_hf(&folder, &config(0), Dtype::BF16, &random_model(0));
    let (path, gguf) = converted(&folder, Mix::Q8_0);
    let tensor = gguf.tensor("blk.1.attn_q.weight").unwrap();
    let mut bytes = fs::read(&path).unwrap();
    let at = tensor.offset as usize + tensor.row_bytes() * 3;
    bytes[at..at + 2].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let message = failure(&path, &Options::new(Mix::Q8_0));
    assert_says(&message, &["blk.1.attn_q.weight", "row 3"]);
}

#[test]
fn unsupported_models_are_refused_by_name() {
    let refused = [
        ("model_type", json!("qwen2"), "qwen2"),
        (
            "rope_scaling",
            json!({"rope_type": "yarn", "factor": 4.0}),
            "yarn",
        ),
        (
            "rope_scaling",
            json!({"type": "dynamic", "factor": 2.0}),
            "dynamic",
        ),
        ("quantization_config", json!({"quant_method": "awq"}), "awq"),
        ("attention_bias", json!(true), "attention_bias"),
        ("hidden_act", json!("gelu"), "gelu"),
        ("num_key_value_heads", json!(3), "3 key-value heads"),
        ("hidden_size", json!(0), "hidden size"),
        ("vocab_size", json!(-1), "config.json"),
        ("rms_norm_eps", json!(0.0), "rms_norm_eps"),
        ("rope_theta", json!(-1e4), "rope_theta"),
        (
            "max_position_embeddings",
            json!(1_u64 << 32),
            "context length",
        ),
        (
            "rope_scaling",
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8192}),
            "low_freq_factor",
        ),
    ];
    for (key, value, says) in refused {
        assert_says(
            &failure_of(|config, _| config[key] = value),
            &["config.json", says],
        );
    }
}

#[test]
fn what_the_runtime_would_refuse_is_not_converted() {
    // Sound by themselves, but beyond the bounds that the runtime has for heads and contexts.
    let message = failure_of(|config, _| config["max_position_embeddings"] = json!(2_000_000_000));
    assert_says(&message, &["llama.context_length", "2000000000", "/m: "]);
    let message = failure_of(|config, model| {
        config["head_dim"] = json!(2048);
        for layer in 0..LAYERS {
            for (name, heads) in [
                ("q_proj", HEADS),
                ("k_proj", KV_HEADS),
                ("v_proj", KV_HEADS),
            ] {
                let name = format!("model.layers.{layer}.self_attn.{name}.weight");
                let rows = heads * 2048;
                model.insert(name, (vec![rows, HIDDEN], vec![0.0; rows * HIDDEN]));
            }
            let name = format!("model.layers.{layer}.self_attn.o_proj.weight");
            let columns = HEADS * 2048;
            model.insert(name, (vec![HIDDEN, columns], vec![0.0; HIDDEN * columns]));
        }
    });
    assert_says(&message, &["llama.attention.key_length", "2048"]);
}

#[test]
fn a_single_expert_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(1);
    config["num_experts_per_tok"] = json!(1);
    write_hf(
        &dir.path().join("m"),
        &config,
        Dtype::BF16,
        &random_model(1),
    );
    assert_says(&failure(&dir.path().join("m"), &q4()), &["single expert"]);
}

#[test]
fn pickled_weights_are_refused_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["consolidated.00.pth", "pytorch_model.bin"] {
        let folder = dir.path().join(name.replace('.', "-"));
        begin(&folder, "params.json", &json!({}));
        fs::write(folder.join(name), b"PK").unwrap();
        assert_says(&failure(&folder, &q4()), &[name, "safetensors"]);
    }
}

#[test]
fn damaged_headers_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("m");
    write_hf(&folder, &config(0), Dtype::BF16, &random_model(0));
    let shard = folder.join("model.safetensors");
    let sound = fs::read(&shard).unwrap();
    let damaged = [
        ("empty", Vec::new()),
        ("seven bytes", sound[..7].to_vec()),
        (
            "endless header",
            [&u64::MAX.to_le_bytes(), &sound[8..]].concat(),
        ),
        (
            "header beyond the file",
            [&(sound.len() as u64).to_le_bytes(), &sound[8..]].concat(),
        ),
        ("no JSON", [&sound[..8], b"garbage!", &sound[16..]].concat()),
    ];
    for (what, bytes) in damaged {
        fs::write(&shard, bytes).unwrap();
        let message = failure(&folder, &q4());
        assert!(message.contains("model.safetensors"), "{what}: {message}");
    }
}

#[test]
fn an_existing_output_is_kept_unless_forced() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("m"), dir.path().join("out.gguf"));
    write_hf(&input, &config(0), Dtype::BF16, &random_model(0));
    fs::write(&output, "precious").unwrap();
    let error = convert(&input, &output, &q4()).unwrap_err();
    assert!(matches!(error, Error::Exists(_)));
    assert_eq!(fs::read(&output).unwrap(), b"precious");
    convert(
        &input,
        &output,
        &Options {
            force: true,
            ..q4()
        },
    )
    .unwrap();
    assert!(fs::read(&output).unwrap().starts_with(b"GGUF"));
}

#[test]
fn quantized_sources_need_permission() {
    let dir = tempfile::tempdir().unwrap();
    write_hf(
        &dir.path().join("m"),
        &config(0),
        Dtype::BF16,
        &random_model(0),
    );
    let (gguf, _) = converted(&dir.path().join("m"), Mix::Q8_0);
    assert_says(&failure(&gguf, &q4()), &["Q8_0", "--allow-requantize"]);
    let allowed = Options {
        allow_requantize: true,
        ..q4()
    };
    convert(&gguf, &dir.path().join("again.gguf"), &allowed).unwrap();
}

fn command(input: &Path, output: &Path, more: &[&str]) -> std::process::Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fewbit-convert"));
    command.arg(input).arg(output).args(more).output().unwrap()
}

#[test]
fn exit_codes_tell_failure_from_wrong_usage() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("m"), dir.path().join("out.gguf"));
    write_hf(&input, &config(0), Dtype::BF16, &random_model(0));
    let done = command(&input, &output, &["--type", "q4_k_m", "--json"]);
    assert_eq!(done.status.code(), Some(0));
    let report: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(report["file_bytes"], fs::metadata(&output).unwrap().len());
    let gguf = fewbit::gguf::read(&output).unwrap();
    let sizes = fewbit::plan::Sizes::of(1, 1, &gguf.tensors);
    assert_eq!(report["bits_per_weight"], sizes.bits_per_weight());
    assert!(done.stderr.is_empty());

    let failed = command(
        &dir.path().join("nowhere"),
        &output,
        &["--type", "Q4_K_M", "--force"],
    );
    assert_eq!(failed.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&failed.stderr).lines().count(), 1);
    assert_eq!(
        command(&input, &output, &["--type", "Q4_K_XXL"])
            .status
            .code(),
        Some(2)
    );
    assert_eq!(
        command(&input, &output, &["--type", "Q4_K_M", "--tensor-type", "("])
            .status
            .code(),
        Some(2)
    );
}
