//! Tensor names of the llama graph, dense and with experts.
//!
//! A block's tensors are `blk.{layer}.{part}.weight`; merged experts append `_exps` to the
//! part, and files from before April 2024 hold one tensor an expert,
//! `blk.{layer}.{part}.{expert}.weight`.

/// Token embedding, `[hidden, vocab]`.
pub const TOKEN_EMBD: &str = "token_embd.weight";
/// Norm before the output head, `[hidden]`.
pub const OUTPUT_NORM: &str = "output_norm.weight";
/// Output head, `[hidden, vocab]`; absent where it is tied to the embedding.
pub const OUTPUT: &str = "output.weight";
/// Factors of the rotary frequencies (Llama 3.1), `[head_dim / 2]`.
pub const ROPE_FREQS: &str = "rope_freqs.weight";

/// Norm before attention, `[hidden]`.
pub const ATTN_NORM: &str = "attn_norm";
/// Query projection, `[hidden, heads · head_dim]`.
pub const ATTN_Q: &str = "attn_q";
/// Key projection, `[hidden, kv_heads · head_dim]`.
pub const ATTN_K: &str = "attn_k";
/// Value projection, `[hidden, kv_heads · head_dim]`.
pub const ATTN_V: &str = "attn_v";
/// Attention's output projection, `[heads · head_dim, hidden]`.
pub const ATTN_OUTPUT: &str = "attn_output";
/// Norm before the feed-forward part, `[hidden]`.
pub const FFN_NORM: &str = "ffn_norm";
/// Router, `[hidden, experts]`.
pub const FFN_GATE_INP: &str = "ffn_gate_inp";
/// Gate projection, `[hidden, ffn]` (an expert's, where there are experts).
pub const FFN_GATE: &str = "ffn_gate";
/// Up projection, `[hidden, ffn]`.
pub const FFN_UP: &str = "ffn_up";
/// Down projection, `[ffn, hidden]`.
pub const FFN_DOWN: &str = "ffn_down";

/// Name of a block's tensor: `block(3, ATTN_Q)` is `blk.3.attn_q.weight`.
pub fn block(layer: usize, part: &str) -> String {
    format!("blk.{layer}.{part}.weight")
}

/// Name of the merged experts' tensor: `experts(3, FFN_UP)` is `blk.3.ffn_up_exps.weight`.
pub fn experts(layer: usize, part: &str) -> String {
    format!("blk.{layer}.{part}_exps.weight")
}

/// Name of one expert's tensor in old files: `expert(3, FFN_UP, 7)` is `blk.3.ffn_up.7.weight`.
pub fn expert(layer: usize, part: &str, expert: usize) -> String {
    format!("blk.{layer}.{part}.{expert}.weight")
}

/// The part that is multiplied with the same activations as `part` and stands for both where these
/// are described: queries for keys and values, gate for up; others for themselves.
pub fn same_input(part: &str) -> &str {
    match part {
        ATTN_K | ATTN_V => ATTN_Q,
        FFN_UP => FFN_GATE,
        part => part,
    }
}

/// A block's tensor name, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockName<'a> {
    /// Index of the layer.
    pub layer: usize,
    /// The part, without `_exps`: [`ATTN_Q`], [`FFN_DOWN`], …
    pub part: &'a str,
    /// Which experts the tensor holds.
    pub experts: Experts,
}

/// Which experts a block's tensor holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Experts {
    /// It belongs to no expert.
    None,
    /// One, in a file from before experts were merged.
    One(usize),
    /// All, one after the other in the third dimension.
    All,
}

/// Takes a name `blk.{layer}.….weight` apart; `None` for every other name.
pub fn parse(name: &str) -> Option<BlockName<'_>> {
    let inner = name.strip_prefix("blk.")?.strip_suffix(".weight")?;
    let (layer, part) = inner.split_once('.')?;
    let layer = layer.parse().ok()?;
    let (part, experts) = match part.split_once('.') {
        Some((part, expert)) => (part, Experts::One(expert.parse().ok()?)),
        None => match part.strip_suffix("_exps") {
            Some(part) => (part, Experts::All),
            None => (part, Experts::None),
        },
    };
    Some(BlockName {
        layer,
        part,
        experts,
    })
}
