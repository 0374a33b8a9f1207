//! What the output says of the model.

use fewbit::gguf::{Metadata, Value};
use fewbit_convert::recipe::Mix;
use safetensors::Dtype;
use serde_json::{Value as Json, json};

use crate::common::*;

fn metadata(change: impl FnOnce(&mut Json)) -> Metadata {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(0);
    change(&mut config);
    write_hf(
        &dir.path().join("tiny-llama"),
        &config,
        Dtype::BF16,
        &random_model(0),
    );
    converted(&dir.path().join("tiny-llama"), Mix::BF16)
        .1
        .metadata
}

#[test]
fn keys_are_those_of_llama_cpp() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(4);
    config["head_dim"] = json!(HEAD_DIM);
    config["sliding_window"] = json!(4096);
    write_hf(
        &dir.path().join("tiny-mixtral"),
        &config,
        Dtype::BF16,
        &random_model(4),
    );
    let (_, gguf) = converted(&dir.path().join("tiny-mixtral"), Mix::Q4_K_S);
    let expected = [
        ("general.architecture", Value::String("llama".into())),
        ("general.name", Value::String("tiny-mixtral".into())),
        ("general.file_type", Value::U32(14)),
        ("general.quantization_version", Value::U32(2)),
        ("llama.block_count", Value::U32(LAYERS as u32)),
        ("llama.context_length", Value::U32(1024)),
        ("llama.embedding_length", Value::U32(HIDDEN as u32)),
        ("llama.feed_forward_length", Value::U32(FFN as u32)),
        ("llama.attention.head_count", Value::U32(HEADS as u32)),
        ("llama.attention.head_count_kv", Value::U32(KV_HEADS as u32)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("llama.attention.key_length", Value::U32(HEAD_DIM as u32)),
        ("llama.attention.value_length", Value::U32(HEAD_DIM as u32)),
        ("llama.attention.sliding_window", Value::U32(4096)),
        ("llama.rope.freq_base", Value::F32(1e6)),
        ("llama.rope.dimension_count", Value::U32(HEAD_DIM as u32)),
        ("llama.vocab_size", Value::U32(VOCAB as u32)),
        ("llama.expert_count", Value::U32(4)),
        ("llama.expert_used_count", Value::U32(2)),
    ];
    for (key, value) in expected {
        assert_eq!(gguf.metadata.get(key), Some(&value), "{key}");
    }
}

#[test]
fn both_forms_of_rope_settings_mean_the_same() {
    let old = metadata(|c| c["rope_theta"] = json!(5e5));
    let new = metadata(|c| {
        c.as_object_mut().unwrap().remove("rope_theta");
        c["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 5e5});
    });
    assert_eq!(old, new);
    assert_eq!(old.get("llama.rope.freq_base"), Some(&Value::F32(5e5)));
}

#[test]
fn linear_rope_scaling_is_noted() {
    let meta = metadata(|c| c["rope_scaling"] = json!({"type": "linear", "factor": 4.0}));
    assert_eq!(
        meta.get("llama.rope.scaling.type"),
        Some(&Value::String("linear".into()))
    );
    assert_eq!(
        meta.get("llama.rope.scaling.factor"),
        Some(&Value::F32(4.0))
    );
}

#[test]
fn llama_3_rope_scaling_becomes_a_tensor_of_factors() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(0);
    config["rope_parameters"] = json!({
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    });
    write_hf(
        &dir.path().join("m"),
        &config,
        Dtype::BF16,
        &random_model(0),
    );
    let (_, gguf) = converted(&dir.path().join("m"), Mix::Q8_0);
    let factors = tensor_weights(&gguf, "rope_freqs.weight");
    assert_eq!(factors.len(), HEAD_DIM / 2);
    // Wavelengths below 8192/4 are kept, those above 8192/1 are divided by 8, between lies a ramp.
    for (i, &factor) in factors.iter().enumerate() {
        let wavelength = std::f64::consts::TAU * 5e5_f64.powf(2.0 * i as f64 / HEAD_DIM as f64);
        match factor {
            1.0 => assert!(wavelength < 2048.0, "{i}"),
            8.0 => assert!(wavelength > 8192.0, "{i}"),
            _ => {
                let ramp = (8192.0 / wavelength - 1.0) / 3.0;
                let expected = 1.0 / ((1.0 - ramp) / 8.0 + ramp);
                assert!(
                    (f64::from(factor) / expected - 1.0).abs() < 1e-4,
                    "{i}: {factor}, {expected}"
                );
            }
        }
    }
    assert!(factors.contains(&1.0) && factors.contains(&8.0));
}
