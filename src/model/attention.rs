//! Attention of one batch over the KV caches of its slots: what is a task, and where results go.

use std::cell::RefCell;

use super::{Config, KvCache, Span};
use crate::kernels::attention::{Queries, SEGMENT, Scratch, partial_len, width};
use crate::kernels::{Activations, Kernels, Phase};
use crate::threads::Pool;

/// Queries, tokens times heads of a KV head, that a tile of a prompt has at most: 64 lanes are four registers
/// of the widest kind, and their sums stay in the second cache.
const TILE_QUERIES: usize = 64;

/// A layer's part of the batch: what the tasks of its attention read.
pub(super) struct Attention<'a> {
    pub(super) config: &'a Config,
    pub(super) layer: usize,
    /// The slots' parts, in their order.
    pub(super) spans: &'a [Span],
    /// The slots' caches, which hold the batch's own keys and values already.
    pub(super) caches: &'a [&'a mut KvCache],
    /// `[tokens, heads · head_dim]`, before their rotation.
    pub(super) q: &'a [f32],
    /// Cosines and sines, `[tokens, rope dims / 2]` pairs.
    pub(super) turns: &'a [(f32, f32)],
}

/// A thread's own memory.
#[derive(Default)]
struct Buffers {
    queries: Scratch,
    work: Scratch,
}

thread_local! {
    /// Of each thread of the pool, which knows nothing of attention: they grow to what the model needs.
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

impl Attention<'_> {
    /// `out[t, h] = Σ softmax(q[t, h] · k / √head_dim) · v` over the positions that token `t` sees. `results`
    /// is scratch: one result a task.
    pub(super) fn compute(
        &self,
        pool: &Pool,
        kernels: &Kernels,
        phase: Phase,
        results: &mut Vec<f32>,
        out: &mut Activations,
    ) {
        match phase {
            Phase::Prompt => self.tiles(pool, kernels, results, out),
            Phase::Generate => self.segments(pool, kernels, results, out),
        }
    }

    /// A task a KV head and tile of tokens.
    fn tiles(&self, pool: &Pool, kernels: &Kernels, results: &mut Vec<f32>, out: &mut Activations) {
        let shape = &self.config.shape;
        let (dim, heads, group) = (shape.head_dim, shape.kv_heads, self.group());
        let width = width(dim);
        let most = (TILE_QUERIES / group).max(1);
        let tiles: Vec<Span> = self.spans.iter().flat_map(|span| span.cut(most)).collect();
        let len = most * group * width;
        let results = room(results, tiles.len() * heads * len);
        pool.chunks(results, len, |task, result| {
            let (tile, head) = (&tiles[task / heads], task % heads);
            BUFFERS.with_borrow_mut(|Buffers { queries, work }| {
                let queries = self.queries(kernels, tile, head, queries);
                let head = self.caches[tile.slot].head(self.layer, head);
                let result = &mut result[..tile.tokens * group * width];
                (kernels.floats.attend_tile)(&head, &queries, work, result);
            });
        });

        let results = &*results;
        // Where each token's result lies: its tile and its place there.
        let places = tiles.iter().enumerate();
        let places: Vec<(usize, usize)> = places
            .flat_map(|(index, tile)| (0..tile.tokens).map(move |t| (index, t)))
            .collect();
        out.fill(pool, kernels, places.len(), |t, out| {
            let (tile, place) = places[t];
            for (h, out) in out.chunks_exact_mut(dim).enumerate() {
                let task = tile * heads + h / group;
                let at = task * len + (place * group + h % group) * width;
                out.copy_from_slice(&results[at..at + dim]);
                self.restore(kernels, tiles[tile].slot, out);
            }
        });
    }

    /// A task a KV head, token and segment of its context.
    fn segments(
        &self,
        pool: &Pool,
        kernels: &Kernels,
        results: &mut Vec<f32>,
        out: &mut Activations,
    ) {
        let shape = &self.config.shape;
        let (dim, heads, group) = (shape.head_dim, shape.kv_heads, self.group());
        let tokens: Vec<Span> = self.spans.iter().flat_map(|span| span.cut(1)).collect();
        // The segments of all tokens, and which of them are a token's.
        let (mut segments, mut starts) = (Vec::new(), vec![0]);
        for (t, token) in tokens.iter().enumerate() {
            let end = token.position + 1;
            let window = self.config.sliding_window.unwrap_or(end);
            let first = end.saturating_sub(window) / SEGMENT;
            segments.extend((first..end.div_ceil(SEGMENT)).map(|segment| (t, segment)));
            starts.push(segments.len());
        }
        let len = partial_len(group, dim);
        let results = room(results, segments.len() * heads * len);
        pool.chunks(results, len, |task, result| {
            let ((t, segment), head) = (segments[task / heads], task % heads);
            let token = &tokens[t];
            BUFFERS.with_borrow_mut(|Buffers { queries, work }| {
                let queries = self.queries(kernels, token, head, queries);
                let head = self.caches[token.slot].head(self.layer, head);
                (kernels.floats.attend_segment)(&head, &queries, segment, work, result);
            });
        });

        let results = &*results;
        out.fill(pool, kernels, tokens.len(), |t, out| {
            let partials = &results[starts[t] * heads * len..starts[t + 1] * heads * len];
            for (h, out) in out.chunks_exact_mut(dim).enumerate() {
                let at = h / group * len + h % group * partial_len(1, dim);
                (kernels.floats.merge)(&partials[at..], heads * len, out);
                self.restore(kernels, tokens[t].slot, out);
            }
        });
    }

    /// Query heads a KV head.
    fn group(&self) -> usize {
        self.config.shape.heads / self.config.shape.kv_heads
    }

    /// The queries of `span` that meet KV head `head`, in `buffer`: rotated, spread as the keys are, scaled.
    fn queries<'a>(
        &self,
        kernels: &Kernels,
        span: &Span,
        head: usize,
        buffer: &'a mut Scratch,
    ) -> Queries<'a> {
        let (dim, group) = (self.config.shape.head_dim, self.group());
        let pairs = self.config.rope.dims / 2;
        let scale = 1.0 / (dim as f32).sqrt();
        let width = width(dim);
        let [q] = buffer.buffers([span.tokens * group * width]);
        for (index, q) in q.chunks_exact_mut(width).enumerate() {
            let (t, h) = (span.row + index / group, head * group + index % group);
            let (q, rest) = q.split_at_mut(dim);
            let from = t * self.config.shape.heads * dim + h * dim;
            q.copy_from_slice(&self.q[from..from + dim]);
            (kernels.floats.turn)(q, &self.turns[t * pairs..(t + 1) * pairs]);
            if self.caches[span.slot].kind().is_spread() {
                (kernels.floats.hadamard)(q);
            }
            q.iter_mut().for_each(|q| *q *= scale);
            rest.fill(0.0);
        }
        Queries {
            q,
            group,
            position: span.position,
            window: self.config.sliding_window,
        }
    }

    /// Undoes to a head's result what was done to the values of its slot.
    fn restore(&self, kernels: &Kernels, slot: usize, out: &mut [f32]) {
        if self.caches[slot].kind().is_spread() {
            (kernels.floats.hadamard)(out);
        }
    }
}

/// The first `len` floats of a buffer, which grows if it has to.
fn room(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}
