//! What a forward pass writes: the KV cache of a timeline, and scratch.

use std::ops::Range;

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use memmap2::MmapMut;

use super::Config;
use crate::kernels::Activations;
use crate::kernels::experts::Routes;
use crate::plan::PROMPT_BATCH;
use crate::quant::BlockType;
use crate::tensor::Rows;

/// How keys and values are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvKind {
    /// In 16 bits, as every engine of the family does.
    F16,
    /// In 32 bits, for exact references.
    F32,
}

impl KvKind {
    /// The type of a row of values.
    fn block_type(self) -> BlockType {
        match self {
            Self::F16 => BlockType::F16,
            Self::F32 => BlockType::F32,
        }
    }

    /// Bytes of a value.
    pub fn bytes(self) -> usize {
        self.block_type().block_bytes()
    }
}

/// Keys and values of one timeline, keys rotated already.
///
/// `[layer][kv_head][position][head_dim]`, so that a head's keys are rows that follow each
/// other, as kernels want them.
pub struct KvCache {
    /// Anonymous pages: the system provides one when it is first written.
    k: MmapMut,
    v: MmapMut,
    kind: KvKind,
    capacity: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Positions in use.
    pub len: usize,
}

impl KvCache {
    /// An empty cache for `capacity` positions.
    ///
    /// # Errors
    /// When the system has no room for it.
    pub fn new(config: &Config, kind: KvKind, capacity: usize) -> std::io::Result<Self> {
        let shape = &config.shape;
        let extents = [shape.layers, shape.kv_heads, shape.head_dim, kind.bytes()];
        let bytes = extents
            .into_iter()
            .try_fold(capacity, usize::checked_mul)
            .filter(|&bytes| bytes <= isize::MAX as usize)
            .ok_or(std::io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            k: MmapMut::map_anon(bytes.max(1))?,
            v: MmapMut::map_anon(bytes.max(1))?,
            kind,
            capacity,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            len: 0,
        })
    }

    /// Positions that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The bytes of a head's vectors at `positions`, the same in both maps.
    fn at(&self, layer: usize, head: usize, positions: Range<usize>) -> Range<usize> {
        assert!(positions.end <= self.capacity);
        let vector = (layer * self.kv_heads + head) * self.capacity;
        let bytes = self.head_dim * self.kind.bytes();
        (vector + positions.start) * bytes..(vector + positions.end) * bytes
    }

    /// Stores the key and value of all heads (`kv_heads · head_dim` each) at `position`.
    pub(super) fn store(&mut self, layer: usize, position: usize, k: &[f32], v: &[f32]) {
        let heads = k
            .chunks_exact(self.head_dim)
            .zip(v.chunks_exact(self.head_dim));
        for (head, (k, v)) in heads.enumerate() {
            let at = self.at(layer, head, position..position + 1);
            for (map, x) in [(&mut self.k, k), (&mut self.v, v)] {
                let bytes = &mut map[at.clone()];
                match self.kind {
                    KvKind::F16 => {
                        let bits: &mut [u16] = bytemuck::cast_slice_mut(bytes);
                        bits.reinterpret_cast_mut::<f16>().convert_from_f32_slice(x);
                    }
                    KvKind::F32 => bytes.copy_from_slice(bytemuck::cast_slice(x)),
                }
            }
        }
    }

    /// A head's keys at `positions`.
    pub(super) fn keys(&self, layer: usize, head: usize, positions: Range<usize>) -> Rows<'_> {
        self.rows(&self.k[self.at(layer, head, positions)])
    }

    /// A head's values at `positions`.
    pub(super) fn values(&self, layer: usize, head: usize, positions: Range<usize>) -> Rows<'_> {
        self.rows(&self.v[self.at(layer, head, positions)])
    }

    fn rows<'a>(&self, bytes: &'a [u8]) -> Rows<'a> {
        Rows::new(self.kind.block_type(), self.head_dim, bytes).expect("whole vectors")
    }
}

/// What scratch may take; no model of the family comes near.
const SCRATCH_LIMIT: u64 = 768 << 20;

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
