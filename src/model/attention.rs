//! Attention of one batch over the KV caches of its slots.

use half::slice::HalfBitsSliceExt;

use super::{Config, KvCache, Row};
use crate::kernels::{Activation, Kernels};
use crate::quant::BlockType;
use crate::tensor::Rows;
use crate::threads::Pool;

/// Positions of a block of the online softmax. Blocks lie at absolute positions, so that a
/// token's sum does not depend on how its prompt was cut.
const BLOCK: usize = 64;

/// Rotates the pairs of every head in `x` (`heads · head_dim`) by `turns`.
pub(super) fn rotate(x: &mut [f32], head_dim: usize, turns: &[(f32, f32)]) {
    for head in x.chunks_exact_mut(head_dim) {
        for (pair, &(cos, sin)) in head.chunks_exact_mut(2).zip(turns) {
            let (a, b) = (pair[0], pair[1]);
            pair[0] = a * cos - b * sin;
            pair[1] = a * sin + b * cos;
        }
    }
}

/// `mixed[t, h] = Σ softmax(q[t, h] · k / √head_dim) · v` over the positions that token `t` sees.
#[allow(clippy::too_many_arguments)] // the operands of the formula
pub(super) fn attend(
    pool: &Pool,
    kernels: &Kernels,
    config: &Config,
    layer: usize,
    rows: &[Row],
    caches: &[&mut KvCache],
    q: &[f32],
    mixed: &mut [f32],
) {
    let shape = &config.shape;
    let (dim, group) = (shape.head_dim, shape.heads / shape.kv_heads);
    let scale = 1.0 / (dim as f32).sqrt();
    let used = rows.len() * shape.heads * dim;
    // One task a token and KV head: its query heads read the same keys and values.
    pool.chunks(&mut mixed[..used], group * dim, |task, mixed| {
        let (row, kv_head) = (&rows[task / shape.kv_heads], task % shape.kv_heads);
        let cache = &*caches[row.slot];
        let queries = &q[task * group * dim..(task + 1) * group * dim];
        let end = row.position + 1;
        let start = config
            .sliding_window
            .map_or(0, |window| end.saturating_sub(window));
        let mut heads: Vec<Online> = (0..group).map(|_| Online::default()).collect();
        mixed.fill(0.0);
        for block in start / BLOCK..end.div_ceil(BLOCK) {
            let positions = start.max(block * BLOCK)..end.min((block + 1) * BLOCK);
            for (head, (query, out)) in queries
                .chunks_exact(dim)
                .zip(mixed.chunks_exact_mut(dim))
                .enumerate()
            {
                let mut scores = [0.0; BLOCK];
                let scores = &mut scores[..positions.len()];
                let keys = cache.keys(layer, kv_head, positions.clone());
                kernels.dot_rows(keys, Activation::in_f32(query), scores);
                scores.iter_mut().for_each(|score| *score *= scale);
                heads[head].absorb(scores, out);
                let values = cache.values(layer, kv_head, positions.clone());
                add_weighted(kernels, scores, values, out);
            }
        }
        for (head, out) in heads.iter().zip(mixed.chunks_exact_mut(dim)) {
            out.iter_mut().for_each(|out| *out /= head.sum);
        }
    });
}

/// `out += Σ weights[p] · values[p]`, in the order of the positions.
fn add_weighted(kernels: &Kernels, weights: &[f32], values: Rows<'_>, out: &mut [f32]) {
    for (position, &weight) in weights.iter().enumerate() {
        let value = values.row(position);
        match values.kind {
            BlockType::F16 => {
                let bits: &[u16] = bytemuck::cast_slice(value);
                (kernels.axpy_f16)(weight, bits.reinterpret_cast(), out);
            }
            _ => {
                let value: &[f32] = bytemuck::cast_slice(value);
                out.iter_mut()
                    .zip(value)
                    .for_each(|(out, value)| *out += weight * value);
            }
        }
    }
}

/// The running maximum and sum of a softmax that sees its scores a block at a time.
struct Online {
    max: f32,
    sum: f32,
}

impl Default for Online {
    fn default() -> Self {
        Self {
            max: f32::NEG_INFINITY,
            sum: 0.0,
        }
    }
}

impl Online {
    /// Turns a block's scores into weights relative to the maximum so far; `out`, summed under
    /// the former maximum, is rescaled to the new one.
    fn absorb(&mut self, scores: &mut [f32], out: &mut [f32]) {
        let max = scores.iter().fold(self.max, |max, &score| max.max(score));
        if max > self.max {
            let shrink = (self.max - max).exp();
            self.sum *= shrink;
            out.iter_mut().for_each(|out| *out *= shrink);
            self.max = max;
        }
        for score in scores {
            *score = (*score - max).exp();
            self.sum += *score;
        }
    }
}
