//! `config.json` and `generation_config.json`, from a GGUF file's metadata.

use fewbit::gguf::{Metadata, names};
use serde_json::{Map, Value as Json, json};

use crate::checkpoint::{Checkpoint, Source, Tensor};
use crate::config::{ModelConfig, RopeScaling};
use crate::error::{Error, Result};

/// The configuration that `checkpoint`, a GGUF file, is of; `head` says whether it has an output head of its own.
pub(super) fn of(checkpoint: &Checkpoint, head: bool) -> Result<ModelConfig> {
    let meta = &checkpoint.metadata;
    let shape = fewbit::plan::Shape::from_metadata(meta)?;
    let theta = meta.f32("llama.rope.freq_base")?.unwrap_or(10_000.0);
    let head_dim = shape.head_dim;
    let dims = meta
        .usize("llama.rope.dimension_count")?
        .unwrap_or(head_dim);
    if dims != head_dim {
        let problem = format!(
            "is {dims}: a part of each head's {head_dim} turns, which no configuration of this family says"
        );
        return Err(meta.error("llama.rope.dimension_count", problem).into());
    }
    let config = ModelConfig {
        vocab: shape.vocab,
        context: shape.context,
        hidden: shape.hidden,
        layers: shape.layers,
        ffn: shape.ffn,
        heads: shape.heads,
        kv_heads: shape.kv_heads,
        head_dim,
        head_dim_given: meta.contains("llama.attention.key_length"),
        experts: if shape.is_moe() { shape.experts } else { 0 },
        experts_used: if shape.is_moe() {
            shape.experts_used
        } else {
            0
        },
        rms_eps: meta.require_f32("llama.attention.layer_norm_rms_epsilon")?,
        rope_theta: theta,
        rope_scaling: rope_scaling(checkpoint, theta, head_dim)?,
        sliding_window: meta
            .u32("llama.attention.sliding_window")?
            .filter(|&window| window > 0),
        tied_embeddings: !head,
    };
    Ok(config)
}

/// Llama 3's parameters as they were published; a file holds what follows from them only.
const LLAMA3: [(f32, f32); 2] = [(8.0, 8192.0), (32.0, 8192.0)];

fn rope_scaling(checkpoint: &Checkpoint, theta: f32, head_dim: usize) -> Result<RopeScaling> {
    let meta = &checkpoint.metadata;
    let is_factors = |tensor: &&Tensor| tensor.name == names::ROPE_FREQS;
    if let Some(tensor) = checkpoint.tensors.iter().find(is_factors) {
        let factors = floats(checkpoint, tensor)?;
        let candidates = LLAMA3.map(|(factor, original_context)| RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context,
        });
        let near = |a: &f32, b: &f32| (a - b).abs() <= 1e-4 * b.abs();
        let fits = |scaling: &RopeScaling| {
            let divisors = scaling
                .frequency_divisors(theta, head_dim)
                .unwrap_or_default();
            divisors.len() == factors.len()
                && factors.iter().zip(&divisors).all(|(a, b)| near(a, b))
        };
        return candidates.into_iter().find(fits).ok_or_else(|| {
            let what = format!(
                "{}: these factors are not those of Llama 3.1 or 3.2, and a configuration cannot hold others",
                tensor.name
            );
            Error::input(&checkpoint.path, what)
        });
    }
    let factor = meta
        .f32("llama.rope.scaling.factor")?
        .filter(|&factor| factor != 0.0);
    match (meta.str("llama.rope.scaling.type")?, factor) {
        (Some("linear"), Some(factor)) => Ok(RopeScaling::Linear(factor)),
        (None | Some("none" | "linear"), _) => Ok(RopeScaling::None),
        (Some(other), _) => {
            let problem = format!("{other:?} is not written; none, linear and Llama 3's are");
            Err(meta.error("llama.rope.scaling.type", problem).into())
        }
    }
}

/// A small tensor's values.
fn floats(checkpoint: &Checkpoint, tensor: &Tensor) -> Result<Vec<f32>> {
    let Source::Stored { kind, .. } = tensor.source else {
        return Ok(Vec::new());
    };
    let mut bytes = Vec::new();
    checkpoint.read_rows(tensor, 0..tensor.rows(), &mut bytes)?;
    let mut values = vec![0.0; tensor.columns() * tensor.rows()];
    kind.decode_row(&bytes, &mut values);
    Ok(values)
}

/// A float as people write it: the shortest decimal number that is it.
fn number(value: f32) -> Json {
    let shortest: f64 = value.to_string().parse().expect("a float's own digits");
    json!(shortest)
}

/// The files, by name.
pub(super) fn files(
    checkpoint: &Checkpoint,
    c: &ModelConfig,
    dtype: &str,
) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let meta = &checkpoint.metadata;
    let (model_type, class) = match (c.experts, c.sliding_window) {
        (0, None) => ("llama", "LlamaForCausalLM"),
        (0, Some(_)) => ("mistral", "MistralForCausalLM"),
        _ => ("mixtral", "MixtralForCausalLM"),
    };
    if model_type != "llama" && c.rope_scaling != RopeScaling::None {
        let what =
            format!("scales its rotary frequencies, which a {model_type} of transformers does not");
        return Err(Error::input(&checkpoint.path, what));
    }
    let mut config = Map::new();
    let mut put = |key: &str, value: Json| config.insert(key.to_owned(), value);
    put("architectures", json!([class]));
    put("model_type", json!(model_type));
    for (key, id) in ids(meta)? {
        put(key, json!(id));
    }
    put("hidden_act", json!("silu"));
    put("hidden_size", json!(c.hidden));
    put("intermediate_size", json!(c.ffn));
    put("max_position_embeddings", json!(c.context));
    put("num_attention_heads", json!(c.heads));
    put("num_hidden_layers", json!(c.layers));
    put("num_key_value_heads", json!(c.kv_heads));
    if c.head_dim_given || c.head_dim * c.heads != c.hidden {
        put("head_dim", json!(c.head_dim));
    }
    if c.experts > 0 {
        put("num_local_experts", json!(c.experts));
        put("num_experts_per_tok", json!(c.experts_used));
    }
    put("rms_norm_eps", number(c.rms_eps));
    put("rope_theta", number(c.rope_theta));
    match c.rope_scaling {
        RopeScaling::None => {}
        RopeScaling::Linear(factor) => {
            put(
                "rope_scaling",
                json!({"rope_type": "linear", "factor": number(factor)}),
            );
        }
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context,
        } => {
            let scaling = json!({
                "rope_type": "llama3",
                "factor": number(factor),
                "low_freq_factor": number(low_freq_factor),
                "high_freq_factor": number(high_freq_factor),
                "original_max_position_embeddings": original_context as u64,
            });
            put("rope_scaling", scaling);
        }
    }
    if model_type != "llama" {
        put("sliding_window", json!(c.sliding_window));
    }
    put("tie_word_embeddings", json!(c.tied_embeddings));
    put("torch_dtype", json!(dtype));
    put("use_cache", json!(true));
    put("vocab_size", json!(c.vocab));
    let generation: Map<String, Json> = ids(meta)?
        .into_iter()
        .map(|(key, id)| (key.to_owned(), json!(id)))
        .collect();
    Ok(vec![
        ("config.json", pretty(&Json::Object(config))),
        ("generation_config.json", pretty(&Json::Object(generation))),
    ])
}

/// The tokens at the ends of texts, as configurations name them.
fn ids(meta: &Metadata) -> Result<Vec<(&'static str, u32)>> {
    let keys = [
        ("bos_token_id", "tokenizer.ggml.bos_token_id"),
        ("eos_token_id", "tokenizer.ggml.eos_token_id"),
        ("pad_token_id", "tokenizer.ggml.padding_token_id"),
    ];
    let mut ids = Vec::new();
    for (key, gguf) in keys {
        ids.extend(meta.u32(gguf)?.map(|id| (key, id)));
    }
    Ok(ids)
}

/// JSON as people read it.
pub(super) fn pretty(value: &Json) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(value).expect("plain data");
    text.push(b'\n');
    text
}
