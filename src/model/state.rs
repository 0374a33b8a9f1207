//! Scratch of the forward pass.

use super::Config;
use crate::experts::trace::Trace;
use crate::kernels::experts::Routes;
use crate::kernels::{Activations, Storage};
use crate::plan::{PROMPT_BATCH, SCRATCH_LIMIT};

/// Scratch of the forward pass, allocated once for batches of up to `batch` tokens.
pub struct State {
    /// Tokens that fit in one pass.
    pub batch: usize,
    /// Residual stream, `[tokens, hidden]`.
    pub(crate) x: Vec<f32>,
    /// Normed input of attention and of the feed-forward part, `[tokens, hidden]`.
    pub(super) normed: Activations,
    /// Queries, `[tokens, heads · head_dim]`.
    pub(super) q: Vec<f32>,
    /// Keys, `[tokens, kv_heads · head_dim]`.
    pub(super) k: Vec<f32>,
    /// Values, `[tokens, kv_heads · head_dim]`.
    pub(super) v: Vec<f32>,
    /// What each task of attention leaves; as large as the longest context so far needs.
    pub(super) results: Vec<f32>,
    /// Attention's output before its projection, `[tokens, heads · head_dim]`.
    pub(super) attended: Activations,
    /// The experts of each token with their weights, `[tokens, experts used]`.
    pub(super) chosen: Vec<(usize, f32)>,
    /// The same, grouped by expert.
    pub(super) routes: Routes,
    /// Gated hidden activations, `[tokens · experts used, ffn]`.
    pub(super) hidden: Activations,
    /// Where tokens of a prompt are packed; as large as the longest prompt so far needs.
    pub(super) packed: [Storage; 2],
    /// Input of the output head, `[outputs, hidden]`.
    pub(super) last: Activations,
    /// Cosines and sines, `[tokens, rope dims / 2]` pairs.
    pub(super) turns: Vec<(f32, f32)>,
    /// Between the two matrices of a correction, `[tokens, rank]`; as long as adapters need.
    pub(super) inner: Vec<f32>,
    /// The routing, where it is recorded.
    pub(crate) trace: Option<Trace>,
    /// `[outputs, vocab]`, one row for each token whose logits were asked for, in their order.
    pub logits: Vec<f32>,
}

impl State {
    /// Scratch for up to [`PROMPT_BATCH`] tokens a pass; for fewer where that would take more
    /// than 768 MiB.
    pub fn new(config: &Config) -> Self {
        let shape = &config.shape;
        let batch =
            (SCRATCH_LIMIT / shape.scratch_bytes_a_token()).clamp(1, PROMPT_BATCH as u64) as usize;
        let (q_dim, kv_dim) = (
            shape.heads * shape.head_dim,
            shape.kv_heads * shape.head_dim,
        );
        let used = shape.experts_used;
        Self {
            batch,
            x: vec![0.0; batch * shape.hidden],
            normed: Activations::new(batch, shape.hidden),
            q: vec![0.0; batch * q_dim],
            k: vec![0.0; batch * kv_dim],
            v: vec![0.0; batch * kv_dim],
            results: Vec::new(),
            attended: Activations::new(batch, q_dim),
            chosen: vec![(0, 1.0); batch * used],
            routes: Routes::default(),
            hidden: Activations::new(batch * used, shape.ffn),
            packed: Default::default(),
            last: Activations::new(batch, shape.hidden),
            turns: vec![(0.0, 0.0); batch * config.rope.dims / 2],
            inner: Vec::new(),
            trace: None,
            logits: Vec::new(),
        }
    }
}
