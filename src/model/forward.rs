//! The forward pass, on one screen.

use super::attention::{attend, rotate};
use super::moe::choose;
use super::{KvCache, Model, State};
use crate::kernels::experts::feed_forward;
use crate::kernels::linear::{Into, linear};
use crate::kernels::{Kernels, Phase};
use crate::threads::Pool;

/// Experts of a layer that the router's scratch holds; no file may have more.
pub(super) const MAX_EXPERTS: usize = 1 << 10;

/// One timeline's part of a batch.
pub struct Slot<'a> {
    /// Its keys and values; the batch's tokens follow what it holds.
    pub cache: &'a mut KvCache,
    /// Tokens to append.
    pub tokens: &'a [u32],
    /// Logits are wanted for `tokens[from..]`.
    pub logits_from: usize,
}

/// A token of the batch: its timeline and its position there.
#[derive(Clone, Copy)]
pub(super) struct Row {
    pub(super) slot: usize,
    pub(super) position: usize,
}

/// Runs a batch through the model: appends each slot's tokens to its cache and leaves the
/// wanted logits in `state.logits`. In either phase every token's result is the same bits
/// whatever else is in the batch and however a prompt is cut.
///
/// # Panics
/// If the batch is larger than `state.batch`, a cache is too small, or a token is outside the
/// vocabulary; the engine checks all three.
pub fn forward(
    model: &Model,
    pool: &Pool,
    kernels: &Kernels,
    phase: Phase,
    state: &mut State,
    slots: Vec<Slot<'_>>,
) {
    let (config, weights) = (&model.config, &model.weights);
    let shape = &config.shape;
    let (hidden, head_dim) = (shape.hidden, shape.head_dim);
    let (q_dim, kv_dim) = (shape.heads * head_dim, shape.kv_heads * head_dim);
    let s = state;

    // Which rows there are, and which of them need logits.
    let (mut rows, mut tokens, mut outputs, mut caches) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (
        slot,
        Slot {
            cache,
            tokens: new,
            logits_from,
        },
    ) in slots.into_iter().enumerate()
    {
        outputs.extend((logits_from..new.len()).map(|index| rows.len() + index));
        rows.extend((0..new.len()).map(|index| Row {
            slot,
            position: cache.len + index,
        }));
        tokens.extend_from_slice(new);
        assert!(
            cache.len + new.len() <= cache.capacity(),
            "the cache is full"
        );
        caches.push(cache);
    }
    let n = rows.len();
    assert!(n <= s.batch, "a batch of {n} tokens where {} fit", s.batch);
    for row in &rows {
        caches[row.slot].len = row.position + 1;
    }

    // x [n, hidden] = rows of the embedding
    pool.chunks(&mut s.x[..n * hidden], hidden, |t, x| {
        weights.token_embd.all().decode(tokens[t] as usize, x)
    });
    // turns [n, dims / 2] = cosines and sines of each position
    pool.chunks(
        &mut s.turns[..n * config.rope.dims / 2],
        config.rope.dims / 2,
        |t, turns| {
            model.rope.turns(rows[t].position, turns);
        },
    );

    for (l, layer) in weights.layers.iter().enumerate() {
        // q [n, heads · head_dim], k and v [n, kv_heads · head_dim] = norm(x) · Wᵀ
        s.normed.fill(pool, kernels, n, |t, out| {
            norm(row(&s.x, t, hidden), &layer.attn_norm, config.norm_eps, out)
        });
        let products = &mut [
            (&layer.q, &mut s.q[..]),
            (&layer.k, &mut s.k[..]),
            (&layer.v, &mut s.v[..]),
        ];
        linear(pool, kernels, phase, &s.normed, Into::Set, products);

        // RoPE, and the new keys and values into the caches
        let turns = &s.turns;
        pool.chunks(&mut s.q[..n * q_dim], q_dim, |t, q| {
            rotate(q, head_dim, row(turns, t, config.rope.dims / 2))
        });
        pool.chunks(&mut s.k[..n * kv_dim], kv_dim, |t, k| {
            rotate(k, head_dim, row(turns, t, config.rope.dims / 2))
        });
        for (t, &Row { slot, position }) in rows.iter().enumerate() {
            caches[slot].store(l, position, row(&s.k, t, kv_dim), row(&s.v, t, kv_dim));
        }

        // x += attention(q, cache) · Woᵀ
        attend(pool, kernels, config, l, &rows, &caches, &s.q, &mut s.mixed);
        s.attended.fill(pool, kernels, n, |t, out| {
            out.copy_from_slice(row(&s.mixed, t, q_dim))
        });
        linear(
            pool,
            kernels,
            phase,
            &s.attended,
            Into::Add,
            &mut [(&layer.o, &mut s.x[..])],
        );

        // x += Σ weight · expert(norm(x)); dense is one expert of weight 1
        s.normed.fill(pool, kernels, n, |t, out| {
            norm(row(&s.x, t, hidden), &layer.ffn_norm, config.norm_eps, out)
        });
        let used = shape.experts_used;
        if let Some(router) = &layer.router {
            let normed = &s.normed;
            pool.chunks(&mut s.chosen[..n * used], used, |t, chosen| {
                let scores = &mut [0.0; MAX_EXPERTS][..shape.experts];
                kernels.dot_rows(router.all(), normed.row(t), scores);
                choose(scores, chosen);
            });
        }
        s.routes.group(shape.experts, used, &s.chosen[..n * used]);
        feed_forward(
            pool,
            kernels,
            phase,
            weights.experts.layer(l),
            &s.routes,
            &s.normed,
            &mut s.hidden,
            &mut s.x,
        );
    }

    // logits [outputs, vocab] = norm(x) · Wᵀ
    s.last.fill(pool, kernels, outputs.len(), |i, out| {
        norm(
            row(&s.x, outputs[i], hidden),
            &weights.output_norm,
            config.norm_eps,
            out,
        );
    });
    s.logits.resize(outputs.len() * shape.vocab, 0.0);
    linear(
        pool,
        kernels,
        phase,
        &s.last,
        Into::Set,
        &mut [(&weights.output, &mut s.logits[..])],
    );
}

/// Row `t` of a matrix of `cols` columns.
fn row<T>(matrix: &[T], t: usize, cols: usize) -> &[T] {
    &matrix[t * cols..(t + 1) * cols]
}

/// RMS norm: `out = x / √(mean(x²) + ε) · weight`.
fn norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    // In f64: thousands of squares, and every later number hangs on this one.
    let squares: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    let scale = (1.0 / (squares / x.len() as f64 + f64::from(eps)).sqrt()) as f32;
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}
