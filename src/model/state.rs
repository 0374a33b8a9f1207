//! What a forward pass writes: the KV cache of a timeline, and scratch.

use half::f16;

use super::Config;
use crate::kernels::Activations;
use crate::kernels::experts::Routes;

/// Keys and values of one timeline, f16, rotated already.
///
/// `[layer][kv_head][position][head_dim]`, so that a head's keys lie side by side.
pub struct KvCache {
    k: Vec<f16>,
    v: Vec<f16>,
    capacity: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Positions in use.
    pub len: usize,
}

impl KvCache {
    /// An empty cache for `capacity` positions. Memory is touched only as positions are used.
    pub fn new(config: &Config, capacity: usize) -> Self {
        let shape = &config.shape;
        let size = shape.layers * shape.kv_heads * shape.head_dim * capacity;
        let (kv_heads, head_dim) = (shape.kv_heads, shape.head_dim);
        Self {
            k: vec![f16::ZERO; size],
            v: vec![f16::ZERO; size],
            capacity,
            kv_heads,
            head_dim,
            len: 0,
        }
    }

    /// Positions that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    fn at(&self, layer: usize, head: usize, position: usize) -> usize {
        ((layer * self.kv_heads + head) * self.capacity + position) * self.head_dim
    }

    /// Stores the key and value of all heads (`kv_heads · head_dim` each) at `position`.
    pub(super) fn store(&mut self, layer: usize, position: usize, k: &[f32], v: &[f32]) {
        use half::slice::HalfFloatSliceExt;
        let heads = k
            .chunks_exact(self.head_dim)
            .zip(v.chunks_exact(self.head_dim));
        for (head, (k, v)) in heads.enumerate() {
            let at = self.at(layer, head, position);
            self.k[at..at + self.head_dim].convert_from_f32_slice(k);
            self.v[at..at + self.head_dim].convert_from_f32_slice(v);
        }
    }

    /// The key at `position`.
    pub(super) fn key(&self, layer: usize, head: usize, position: usize) -> &[f16] {
        let at = self.at(layer, head, position);
        &self.k[at..at + self.head_dim]
    }

    /// The value at `position`.
    pub(super) fn value(&self, layer: usize, head: usize, position: usize) -> &[f16] {
        let at = self.at(layer, head, position);
        &self.v[at..at + self.head_dim]
    }
}

/// Scratch of the forward pass, allocated once for batches of up to `batch` tokens.
pub struct State {
    /// Tokens that fit in one pass.
    pub batch: usize,
    /// Residual stream, `[tokens, hidden]`.
    pub(super) x: Vec<f32>,
    /// Normed input of attention and of the feed-forward part, `[tokens, hidden]`.
    pub(super) normed: Activations,
    /// Queries, `[tokens, heads · head_dim]`.
    pub(super) q: Vec<f32>,
    /// Keys, `[tokens, kv_heads · head_dim]`.
    pub(super) k: Vec<f32>,
    /// Values, `[tokens, kv_heads · head_dim]`.
    pub(super) v: Vec<f32>,
    /// Attention's output before its projection, `[tokens, heads · head_dim]`.
    pub(super) mixed: Vec<f32>,
    /// The same, quantized.
    pub(super) attended: Activations,
    /// The experts of each token with their weights, `[tokens, experts used]`.
    pub(super) chosen: Vec<(usize, f32)>,
    /// The same, grouped by expert.
    pub(super) routes: Routes,
    /// Gated hidden activations, `[tokens · experts used, ffn]`.
    pub(super) hidden: Activations,
    /// Input of the output head, `[outputs, hidden]`.
    pub(super) last: Activations,
    /// Cosines and sines, `[tokens, rope dims / 2]` pairs.
    pub(super) turns: Vec<(f32, f32)>,
    /// `[outputs, vocab]`, one row for each token whose logits were asked for, in their order.
    pub logits: Vec<f32>,
}

impl State {
    /// Scratch for up to `batch` tokens a pass.
    pub fn new(config: &Config, batch: usize) -> Self {
        let shape = &config.shape;
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
            mixed: vec![0.0; batch * q_dim],
            attended: Activations::new(batch, q_dim),
            chosen: vec![(0, 1.0); batch * used],
            routes: Routes::default(),
            hidden: Activations::new(batch * used, shape.ffn),
            last: Activations::new(batch, shape.hidden),
            turns: vec![(0.0, 0.0); batch * config.rope.dims / 2],
            logits: Vec::new(),
        }
    }
}
