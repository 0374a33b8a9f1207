//! The tensors of the graph: their names in each layout, and their shapes.

use crate::config::ModelConfig;
use crate::recipe::visiting_order;

/// What a tensor is in the graph.
#[allow(missing_docs)] // the table below says what each of them is
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    TokenEmbd,
    OutputNorm,
    Output,
    RopeFreqs,
    AttnNorm,
    AttnQ,
    AttnK,
    AttnV,
    AttnOutput,
    FfnNorm,
    Router,
    Gate,
    Up,
    Down,
    GateExperts,
    UpExperts,
    DownExperts,
}

/// A tensor that a configuration calls for.
#[derive(Clone, Debug)]
pub struct Expected {
    /// What it is.
    pub role: Role,
    /// Of which layer (0 for those that belong to none).
    pub layer: usize,
    /// Its GGUF name.
    pub name: String,
    /// Extents, fastest first: `[columns, rows, experts]`.
    pub shape: Vec<usize>,
}

impl Role {
    /// Its name in GGUF.
    fn gguf_name(self, layer: usize) -> String {
        use fewbit::gguf::names::*;
        let part = match self {
            Role::TokenEmbd => return TOKEN_EMBD.to_owned(),
            Role::OutputNorm => return OUTPUT_NORM.to_owned(),
            Role::Output => return OUTPUT.to_owned(),
            Role::RopeFreqs => return ROPE_FREQS.to_owned(),
            Role::GateExperts => return experts(layer, FFN_GATE),
            Role::UpExperts => return experts(layer, FFN_UP),
            Role::DownExperts => return experts(layer, FFN_DOWN),
            Role::AttnNorm => ATTN_NORM,
            Role::AttnQ => ATTN_Q,
            Role::AttnK => ATTN_K,
            Role::AttnV => ATTN_V,
            Role::AttnOutput => ATTN_OUTPUT,
            Role::FfnNorm => FFN_NORM,
            Role::Router => FFN_GATE_INP,
            Role::Gate => FFN_GATE,
            Role::Up => FFN_UP,
            Role::Down => FFN_DOWN,
        };
        block(layer, part)
    }

    /// Its names in Hugging Face's layout and in Mistral's, without the layer's prefix and ".weight".
    /// Those of experts hold `{}` for the expert's number.
    const fn stems(self) -> [&'static str; 2] {
        match self {
            Role::TokenEmbd => ["model.embed_tokens", "tok_embeddings"],
            Role::OutputNorm => ["model.norm", "norm"],
            Role::Output => ["lm_head", "output"],
            Role::RopeFreqs => ["", ""], // computed, stored in no checkpoint
            Role::AttnNorm => ["input_layernorm", "attention_norm"],
            Role::AttnQ => ["self_attn.q_proj", "attention.wq"],
            Role::AttnK => ["self_attn.k_proj", "attention.wk"],
            Role::AttnV => ["self_attn.v_proj", "attention.wv"],
            Role::AttnOutput => ["self_attn.o_proj", "attention.wo"],
            Role::FfnNorm => ["post_attention_layernorm", "ffn_norm"],
            Role::Router => ["block_sparse_moe.gate", "feed_forward.gate"],
            Role::Gate => ["mlp.gate_proj", "feed_forward.w1"],
            Role::Up => ["mlp.up_proj", "feed_forward.w3"],
            Role::Down => ["mlp.down_proj", "feed_forward.w2"],
            Role::GateExperts => [
                "block_sparse_moe.experts.{}.w1",
                "feed_forward.experts.{}.w1",
            ],
            Role::UpExperts => [
                "block_sparse_moe.experts.{}.w3",
                "feed_forward.experts.{}.w3",
            ],
            Role::DownExperts => [
                "block_sparse_moe.experts.{}.w2",
                "feed_forward.experts.{}.w2",
            ],
        }
    }

    /// Extents, fastest first.
    pub fn shape(self, c: &ModelConfig) -> Vec<usize> {
        match self {
            Role::TokenEmbd | Role::Output => vec![c.hidden, c.vocab],
            Role::OutputNorm | Role::AttnNorm | Role::FfnNorm => vec![c.hidden],
            Role::RopeFreqs => vec![c.head_dim / 2],
            Role::AttnQ => vec![c.hidden, c.heads * c.head_dim],
            Role::AttnK | Role::AttnV => vec![c.hidden, c.kv_heads * c.head_dim],
            Role::AttnOutput => vec![c.heads * c.head_dim, c.hidden],
            Role::Router => vec![c.hidden, c.experts],
            Role::Gate | Role::Up => vec![c.hidden, c.ffn],
            Role::Down => vec![c.ffn, c.hidden],
            Role::GateExperts | Role::UpExperts => vec![c.hidden, c.ffn, c.experts],
            Role::DownExperts => vec![c.ffn, c.hidden, c.experts],
        }
    }

    /// Whether llama.cpp's converter writes it as F32 whatever the checkpoint holds: norms, and the
    /// router, whose rounding would change which experts are chosen.
    pub fn stays_f32(self) -> bool {
        matches!(
            self,
            Role::OutputNorm | Role::AttnNorm | Role::FfnNorm | Role::RopeFreqs | Role::Router
        )
    }

    /// Whether the tensor belongs to a layer.
    fn in_layer(self) -> bool {
        !matches!(
            self,
            Role::TokenEmbd | Role::OutputNorm | Role::Output | Role::RopeFreqs
        )
    }
}

impl Expected {
    fn new(role: Role, layer: usize, config: &ModelConfig) -> Expected {
        Expected {
            role,
            layer,
            name: role.gguf_name(layer),
            shape: role.shape(config),
        }
    }

    /// Its name in a Hugging Face checkpoint; `expert` counts for experts only.
    pub fn hf_name(&self, expert: usize) -> String {
        self.checkpoint_name(0, "model.layers", expert)
    }

    /// Its name in one of Mistral's own checkpoints; `expert` counts for experts only.
    pub fn mistral_name(&self, expert: usize) -> String {
        self.checkpoint_name(1, "layers", expert)
    }

    fn checkpoint_name(&self, column: usize, layers: &str, expert: usize) -> String {
        let stem = self.role.stems()[column].replace("{}", &expert.to_string());
        if self.role.in_layer() {
            format!("{layers}.{}.{stem}.weight", self.layer)
        } else {
            format!("{stem}.weight")
        }
    }
}

/// All tensors that a configuration calls for, in the order in which llama-quantize visits and writes them.
pub fn expected(config: &ModelConfig) -> Vec<Expected> {
    use Role::*;
    let mut all = vec![TokenEmbd, OutputNorm];
    if !config.tied_embeddings {
        all.push(Output);
    }
    if config
        .rope_scaling
        .frequency_divisors(config.rope_theta, config.head_dim)
        .is_some()
    {
        all.push(RopeFreqs);
    }
    let attention = [AttnNorm, AttnQ, AttnK, AttnV, AttnOutput, FfnNorm];
    let feed_forward: &[Role] = if config.experts > 0 {
        &[Router, GateExperts, UpExperts, DownExperts]
    } else {
        &[Gate, Up, Down]
    };
    let mut tensors: Vec<Expected> = all
        .into_iter()
        .map(|role| Expected::new(role, 0, config))
        .collect();
    for layer in 0..config.layers {
        let roles = attention.iter().chain(feed_forward);
        tensors.extend(roles.map(|&role| Expected::new(role, layer, config)));
    }
    tensors.sort_by(|a, b| visiting_order(&a.name).cmp(&visiting_order(&b.name)));
    tensors
}
