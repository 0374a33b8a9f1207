//! The output's metadata: the keys that llama.cpp's converter writes for the `llama` architecture.

use std::path::Path;

use fewbit::gguf::{Metadata, Value};

use crate::config::{ModelConfig, RopeScaling};

/// Version of the block types' layouts (`GGML_QNT_VERSION` in ggml.h).
const QUANTIZATION_VERSION: u32 = 2;

/// Metadata of a model that comes with a configuration, without tokenizer and file type.
pub fn from_config(name: &str, c: &ModelConfig) -> Metadata {
    let mut meta = Metadata::new();
    let mut put = |key: &str, value: Value| meta.insert(key, value);
    let count = |n: usize| Value::U32(n as u32);
    put("general.architecture", Value::String("llama".into()));
    put("general.type", Value::String("model".into()));
    put("general.name", Value::String(name.into()));
    put("llama.block_count", count(c.layers));
    put("llama.context_length", count(c.context));
    put("llama.embedding_length", count(c.hidden));
    put("llama.feed_forward_length", count(c.ffn));
    put("llama.attention.head_count", count(c.heads));
    put("llama.attention.head_count_kv", count(c.kv_heads));
    if let RopeScaling::Linear(factor) = c.rope_scaling {
        put("llama.rope.scaling.type", Value::String("linear".into()));
        put("llama.rope.scaling.factor", Value::F32(factor));
    }
    put("llama.rope.freq_base", Value::F32(c.rope_theta));
    put(
        "llama.attention.layer_norm_rms_epsilon",
        Value::F32(c.rms_eps),
    );
    if c.experts > 0 {
        put("llama.expert_count", count(c.experts));
        put("llama.expert_used_count", count(c.experts_used));
    }
    if c.head_dim_given {
        put("llama.attention.key_length", count(c.head_dim));
        put("llama.attention.value_length", count(c.head_dim));
    }
    put("llama.vocab_size", count(c.vocab));
    put("llama.rope.dimension_count", count(c.head_dim));
    // llama.cpp writes no such key for this architecture and ignores it; fewbit heeds it.
    if let Some(window) = c.sliding_window {
        put("llama.attention.sliding_window", Value::U32(window));
    }
    meta
}

/// Notes in the metadata how the weights are encoded.
pub fn set_encoding(meta: &mut Metadata, file_type: u32) {
    meta.insert(
        "general.quantization_version",
        Value::U32(QUANTIZATION_VERSION),
    );
    meta.insert("general.file_type", Value::U32(file_type));
}

/// A model's name from the folder that it was downloaded into.
pub fn model_name(folder: &Path) -> String {
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    crate::checkpoint::file_name(&folder)
}
