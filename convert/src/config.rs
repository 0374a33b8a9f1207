//! A model's configuration, from `config.json` (Hugging Face) or `params.json` (Mistral).

use std::path::Path;

use serde::Deserialize;
use serde_json::Value as Json;

use crate::checkpoint::{MAX_TREE_BYTES, read_json};
use crate::error::{Error, Result};

/// What the graph needs to know of a model; every count is checked to be positive and to fit together.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Pieces in the vocabulary.
    pub vocab: usize,
    /// Longest context that it was trained for.
    pub context: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Width of the feed-forward layer (of one expert).
    pub ffn: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Whether the configuration names `head_dim`: then it goes into the metadata.
    pub head_dim_given: bool,
    /// Experts a layer; 0 for dense models.
    pub experts: usize,
    /// Experts that work on a token.
    pub experts_used: usize,
    /// ε of the RMS norms.
    pub rms_eps: f32,
    /// Base of the rotary embedding's frequencies.
    pub rope_theta: f32,
    /// How those frequencies are scaled.
    pub rope_scaling: RopeScaling,
    /// Tokens that attention looks back, where that is limited.
    pub sliding_window: Option<u32>,
    /// Whether the output head is the token embedding.
    pub tied_embeddings: bool,
}

/// Scaling of rotary frequencies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Positions divided by a factor.
    Linear(f32),
    /// Llama 3: long wavelengths divided by a factor, short ones kept, a ramp between.
    Llama3 {
        /// By which long wavelengths are divided.
        factor: f32,
        /// `original_context / low_freq_factor` is the shortest "long" wavelength.
        low_freq_factor: f32,
        /// `original_context / high_freq_factor` is the longest "short" wavelength.
        high_freq_factor: f32,
        /// Context of the pre-training.
        original_context: f32,
    },
}

impl RopeScaling {
    /// The divisors of the frequencies that llama.cpp keeps as tensor `rope_freqs.weight`, `head_dim / 2` of them;
    /// nothing where none is needed.
    pub fn frequency_divisors(&self, theta: f32, head_dim: usize) -> Option<Vec<f32>> {
        let RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context,
        } = *self
        else {
            return None;
        };
        let (longest_short, shortest_long) = (
            original_context / high_freq_factor,
            original_context / low_freq_factor,
        );
        let divisor = |i: usize| {
            let frequency = 1.0 / theta.powf(i as f32 / head_dim as f32);
            let wavelength = std::f32::consts::TAU / frequency;
            if wavelength < longest_short {
                1.0
            } else if wavelength > shortest_long {
                factor
            } else {
                let ramp = (original_context / wavelength - low_freq_factor)
                    / (high_freq_factor - low_freq_factor);
                1.0 / ((1.0 - ramp) / factor + ramp)
            }
        };
        Some((0..head_dim).step_by(2).map(divisor).collect())
    }
}

/// `config.json`, as transformers 4 and 5 write it.
#[derive(Deserialize)]
struct HfConfig {
    model_type: String,
    vocab_size: usize,
    #[serde(default = "default_context")]
    max_position_embeddings: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    intermediate_size: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    num_local_experts: Option<usize>,
    num_experts_per_tok: Option<usize>,
    rms_norm_eps: f32,
    rope_theta: Option<f32>,
    rope_scaling: Option<RopeJson>,
    rope_parameters: Option<RopeJson>,
    sliding_window: Option<u32>,
    tie_word_embeddings: Option<bool>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    partial_rotary_factor: Option<f32>,
    quantization_config: Option<Json>,
}

#[derive(Deserialize)]
struct RopeJson {
    /// transformers 5 and late 4.
    rope_type: Option<String>,
    /// Early 4.
    r#type: Option<String>,
    rope_theta: Option<f32>,
    factor: Option<f32>,
    low_freq_factor: Option<f32>,
    high_freq_factor: Option<f32>,
    original_max_position_embeddings: Option<f32>,
}

fn default_context() -> usize {
    2048
}

/// `params.json`, as mistral-inference reads it.
#[derive(Deserialize)]
struct MistralParams {
    dim: usize,
    n_layers: usize,
    head_dim: usize,
    hidden_dim: usize,
    n_heads: usize,
    n_kv_heads: usize,
    norm_eps: f32,
    vocab_size: usize,
    rope_theta: Option<f32>,
    sliding_window: Option<u32>,
    #[serde(alias = "max_position_embeddings")]
    max_seq_len: Option<usize>,
    #[serde(default)]
    tied_embeddings: bool,
    moe: Option<MistralMoe>,
    vision_encoder: Option<Json>,
    quantization: Option<Json>,
}

#[derive(Deserialize)]
struct MistralMoe {
    num_experts: usize,
    num_experts_per_tok: usize,
}

impl ModelConfig {
    /// Reads a Hugging Face `config.json`.
    pub fn from_hf(path: &Path) -> Result<ModelConfig> {
        let c: HfConfig = read_json(path, MAX_TREE_BYTES)?;
        let refuse = |what: String| Err(Error::input(path, what));
        if !["mixtral", "mistral", "llama"].contains(&c.model_type.as_str()) {
            return refuse(format!(
                "model_type {:?} is none of mixtral, mistral, llama",
                c.model_type
            ));
        }
        if let Some(q) = &c.quantization_config {
            let method = q
                .get("quant_method")
                .and_then(Json::as_str)
                .unwrap_or("unknown");
            return refuse(format!(
                "weights are quantized already ({method}): take the original BF16 or F16 checkpoint"
            ));
        }
        if c.attention_bias == Some(true) || c.mlp_bias == Some(true) {
            return refuse(
                "attention_bias and mlp_bias are not part of the Mixtral, Mistral and Llama graphs"
                    .into(),
            );
        }
        if let Some(act) = c
            .hidden_act
            .as_deref()
            .filter(|a| *a != "silu" && *a != "swish")
        {
            return refuse(format!(
                "hidden_act {act:?}: only silu is part of these graphs"
            ));
        }
        if c.partial_rotary_factor.is_some_and(|f| f != 1.0) {
            return refuse(
                "partial_rotary_factor is not part of the Mixtral, Mistral and Llama graphs".into(),
            );
        }
        let mixtral = c.model_type == "mixtral";
        let (experts, experts_used) = match (c.num_local_experts, c.num_experts_per_tok) {
            (Some(n), Some(used)) if n > 0 => (n, used),
            _ if mixtral => (8, 2), // the defaults of transformers' MixtralConfig
            _ => (0, 0),
        };
        let default_theta = if mixtral { 1e6 } else { 1e4 };
        let rope = c.rope_parameters.as_ref().or(c.rope_scaling.as_ref());
        let config = ModelConfig {
            vocab: c.vocab_size,
            context: c.max_position_embeddings,
            hidden: c.hidden_size,
            layers: c.num_hidden_layers,
            ffn: c.intermediate_size,
            heads: c.num_attention_heads,
            kv_heads: c.num_key_value_heads.unwrap_or(if mixtral {
                8
            } else {
                c.num_attention_heads
            }),
            head_dim: c
                .head_dim
                .unwrap_or(c.hidden_size / c.num_attention_heads.max(1)),
            head_dim_given: c.head_dim.is_some(),
            experts,
            experts_used,
            rms_eps: c.rms_norm_eps,
            rope_theta: rope
                .and_then(|r| r.rope_theta)
                .or(c.rope_theta)
                .unwrap_or(default_theta),
            rope_scaling: rope.map_or(Ok(RopeScaling::None), |r| r.scaling(path))?,
            sliding_window: c.sliding_window,
            tied_embeddings: c.tie_word_embeddings.unwrap_or(false),
        };
        config.checked(path)
    }

    /// Reads a Mistral `params.json`.
    pub fn from_mistral(path: &Path) -> Result<ModelConfig> {
        let p: MistralParams = read_json(path, MAX_TREE_BYTES)?;
        if p.vision_encoder.is_some() {
            return Err(Error::input(
                path,
                "vision_encoder: only text models are converted",
            ));
        }
        if p.quantization.is_some() {
            return Err(Error::input(
                path,
                "weights are quantized already: take the original BF16 or F16 checkpoint",
            ));
        }
        let (experts, experts_used) = p
            .moe
            .map_or((0, 0), |m| (m.num_experts, m.num_experts_per_tok));
        // Models with a sliding window are of the first generation, whose base went unsaid.
        let default_theta = if p.sliding_window.is_some() { 1e4 } else { 1e6 };
        let config = ModelConfig {
            vocab: p.vocab_size,
            context: p.max_seq_len.unwrap_or(32768),
            hidden: p.dim,
            layers: p.n_layers,
            ffn: p.hidden_dim,
            heads: p.n_heads,
            kv_heads: p.n_kv_heads,
            head_dim: p.head_dim,
            head_dim_given: true,
            experts,
            experts_used,
            rms_eps: p.norm_eps,
            rope_theta: p.rope_theta.unwrap_or(default_theta),
            rope_scaling: RopeScaling::None,
            sliding_window: p.sliding_window,
            tied_embeddings: p.tied_embeddings,
        };
        config.checked(path)
    }

    fn checked(self, path: &Path) -> Result<ModelConfig> {
        // Far above any model of the family; keeps products of two counts inside u64 and a row inside memory.
        const MOST: usize = 1 << 22;
        let counts = [
            ("vocabulary", self.vocab),
            ("context length", self.context),
            ("hidden size", self.hidden),
            ("layers", self.layers),
            ("feed-forward size", self.ffn),
            ("attention heads", self.heads),
            ("key-value heads", self.kv_heads),
            ("head dimension", self.head_dim),
        ];
        for (name, count) in counts {
            if count == 0 || (count > MOST && name != "context length") {
                return Err(Error::input(
                    path,
                    format!("{name}: {count} is out of range"),
                ));
            }
        }
        if self.layers > 4096 || self.experts > 4096 {
            return Err(Error::input(
                path,
                format!(
                    "{} layers of {} experts are out of range",
                    self.layers, self.experts
                ),
            ));
        }
        if u32::try_from(self.context).is_err() {
            let what = format!("context length: {} is out of range", self.context);
            return Err(Error::input(path, what));
        }
        for (name, value) in [
            ("rms_norm_eps", self.rms_eps),
            ("rope_theta", self.rope_theta),
        ] {
            if !(value.is_finite() && value > 0.0) {
                let what = format!("{name} is {value}: it must be a positive number");
                return Err(Error::input(path, what));
            }
        }
        if let RopeScaling::Llama3 {
            low_freq_factor: low,
            high_freq_factor: high,
            ..
        } = self.rope_scaling
            && low >= high
        {
            let what = format!("low_freq_factor {low} must be below high_freq_factor {high}");
            return Err(Error::input(path, what));
        }
        if self.experts == 1 {
            let what =
                "a single expert makes no Mixtral: take the dense model that it was made from";
            return Err(Error::input(path, what));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let (heads, kv) = (self.heads, self.kv_heads);
            return Err(Error::input(
                path,
                format!("{heads} attention heads cannot share {kv} key-value heads evenly"),
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(Error::input(
                path,
                format!(
                    "head dimension {} is odd: rotary embedding needs pairs",
                    self.head_dim
                ),
            ));
        }
        if self.experts_used > self.experts || (self.experts > 0 && self.experts_used == 0) {
            let (used, experts) = (self.experts_used, self.experts);
            return Err(Error::input(
                path,
                format!("{used} of {experts} experts a token is out of range"),
            ));
        }
        Ok(self)
    }
}

impl RopeJson {
    fn scaling(&self, path: &Path) -> Result<RopeScaling> {
        let needed = |value: Option<f32>, key: &str| {
            value
                .filter(|v| v.is_finite() && *v > 0.0)
                .ok_or_else(|| Error::input(path, format!("rope scaling lacks {key}")))
        };
        match self
            .rope_type
            .as_deref()
            .or(self.r#type.as_deref())
            .unwrap_or("default")
        {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear(needed(self.factor, "factor")?)),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: needed(self.factor, "factor")?,
                low_freq_factor: needed(self.low_freq_factor, "low_freq_factor")?,
                high_freq_factor: needed(self.high_freq_factor, "high_freq_factor")?,
                original_context: needed(
                    self.original_max_position_embeddings,
                    "original_max_position_embeddings",
                )?,
            }),
            other => Err(Error::input(
                path,
                format!("rope scaling {other:?} is none of default, linear, llama3"),
            )),
        }
    }
}
