//! The forward pass, on one screen.

use std::ops::Range;

use super::attention::Attention;
use super::moe::{Routing, choose_preferred};
use super::{KvCache, Layer, Model, Observer, Site, State};
use crate::experts::cache::{Cache, Guess};
use crate::kernels::experts::feed_forward;
use crate::kernels::linear::{Into, linear};
use crate::kernels::low_rank::LowRank;
use crate::kernels::{Activation, Activations, Kernels, Phase};
use crate::tensor::direct;
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

/// Tokens of the batch that follow each other in one timeline.
#[derive(Clone, Copy)]
pub(super) struct Span {
    /// Their timeline.
    pub(super) slot: usize,
    /// The first one's row in the batch.
    pub(super) row: usize,
    /// The first one's position in the timeline.
    pub(super) position: usize,
    /// How many there are.
    pub(super) tokens: usize,
}

impl Span {
    /// The same tokens in spans of at most `most`.
    pub(super) fn cut(self, most: usize) -> impl Iterator<Item = Self> {
        (0..self.tokens).step_by(most).map(move |start| Self {
            row: self.row + start,
            position: self.position + start,
            tokens: most.min(self.tokens - start),
            ..self
        })
    }
}

/// Runs a batch through the model: appends each slot's tokens to its cache and leaves the
/// wanted logits in `state.logits`. In either phase every token's result is the same bits
/// whatever else is in the batch and however a prompt is cut.
///
/// # Errors
/// When an expert cannot be read. The caches then count tokens whose keys and values they do not hold:
/// their length must be set back.
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
) -> Result<(), direct::Error> {
    let layers = 0..model.weights.layers.len();
    forward_part(model, pool, kernels, phase, state, slots, layers, None)
}

/// [`forward`] through some layers only: those that begin with the first take up the embedding,
/// others what `state.x` holds; those that end with the last leave logits, others `state.x`. The
/// observer, where there is one, sees what the linears are given.
#[allow(clippy::too_many_arguments)] // the pass's own, and its part
pub(crate) fn forward_part(
    model: &Model,
    pool: &Pool,
    kernels: &Kernels,
    phase: Phase,
    state: &mut State,
    slots: Vec<Slot<'_>>,
    part: Range<usize>,
    mut observer: Option<Observer<'_>>,
) -> Result<(), direct::Error> {
    let (config, weights) = (&model.config, &model.weights);
    let shape = &config.shape;
    let hidden = shape.hidden;
    let kv_dim = shape.kv_heads * shape.head_dim;
    let (norm, eps) = (kernels.floats.norm, config.norm_eps);
    let s = state;

    // Which rows there are, and which of them need logits.
    let (mut spans, mut tokens, mut outputs, mut caches) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (slot, part) in slots.into_iter().enumerate() {
        let (row, position) = (tokens.len(), part.cache.len);
        spans.push(Span {
            slot,
            row,
            position,
            tokens: part.tokens.len(),
        });
        outputs.extend((part.logits_from..part.tokens.len()).map(|index| row + index));
        tokens.extend_from_slice(part.tokens);
        part.cache.len += part.tokens.len();
        assert!(part.cache.len <= part.cache.capacity(), "the cache is full");
        caches.push(part.cache);
    }
    let n = tokens.len();
    assert!(n <= s.batch, "a batch of {n} tokens where {} fit", s.batch);

    // x [n, hidden] = rows of the embedding
    if part.start == 0 {
        pool.chunks(&mut s.x[..n * hidden], hidden, |t, x| {
            weights.token_embd.all().decode(tokens[t] as usize, x)
        });
    }
    // turns [n, pairs] = cosines and sines of each position
    let pairs = config.rope.dims / 2;
    for span in &spans {
        let turns = &mut s.turns[span.row * pairs..(span.row + span.tokens) * pairs];
        pool.chunks(turns, pairs, |t, turns| {
            model.rope.turns(span.position + t, turns)
        });
    }

    if let Some(trace) = &mut s.trace {
        trace.begin(n, phase == Phase::Prompt);
    }
    if let Some(cache) = weights.experts.cache() {
        look_ahead(cache, model, phase, part.start, pool, kernels, n, s);
    }
    for l in part.clone() {
        let layer = &weights.layers[l];
        // q [n, heads · head_dim], k and v [n, kv_heads · head_dim] = norm(x) · Wᵀ
        s.normed.fill(pool, kernels, n, |t, out| {
            norm(row(&s.x, t, hidden), &layer.attn_norm, eps, out)
        });
        let products = &mut [
            (&layer.q, &mut s.q[..]),
            (&layer.k, &mut s.k[..]),
            (&layer.v, &mut s.v[..]),
        ];
        let storage = &mut s.packed[0];
        linear(
            pool,
            kernels,
            phase,
            &s.normed,
            Into::Set,
            products,
            storage,
        );
        let lora = model.lora.as_ref().map(|lora| &lora.layers[l]);
        if let Some(lora) = lora {
            let (low, outs) = ([&lora.q, &lora.k, &lora.v], [&mut s.q, &mut s.k, &mut s.v]);
            for (low, out) in low.into_iter().zip(outs) {
                add(pool, kernels, low, &s.normed, out, &mut s.inner);
            }
        }
        if let Some(see) = &mut observer {
            see(Site::Attention, &s.normed, None);
        }

        // k, rotated, and v into the caches
        for (span, cache) in spans.iter().zip(&mut caches) {
            let of = |cols: usize| span.row * cols..(span.row + span.tokens) * cols;
            let (k, v, turns) = (&s.k[of(kv_dim)], &s.v[of(kv_dim)], &s.turns[of(pairs)]);
            cache.store(pool, kernels, l, span.position, k, v, turns);
        }

        // x += attention(q, cache) · Woᵀ
        let attention = Attention {
            config,
            layer: l,
            spans: &spans,
            caches: &caches,
            q: &s.q,
            turns: &s.turns,
        };
        attention.compute(pool, kernels, phase, &mut s.results, &mut s.attended);
        linear(
            pool,
            kernels,
            phase,
            &s.attended,
            Into::Add,
            &mut [(&layer.o, &mut s.x[..])],
            &mut s.packed[0],
        );
        if let Some(lora) = lora {
            add(pool, kernels, &lora.o, &s.attended, &mut s.x, &mut s.inner);
        }
        if let Some(see) = &mut observer {
            see(Site::AttentionOutput, &s.attended, None);
        }

        // x += Σ weight · expert(norm(x)); dense is one expert of weight 1
        s.normed.fill(pool, kernels, n, |t, out| {
            norm(row(&s.x, t, hidden), &layer.ffn_norm, eps, out)
        });
        let used = shape.experts_used;
        if layer.router.is_some() {
            let normed = &s.normed;
            let preferred = preferred(model, phase, l);
            pool.chunks(&mut s.chosen[..n * used], used, |t, chosen| {
                choose_for(model, kernels, l, normed.row(t), preferred.as_ref(), chosen);
            });
        }
        s.routes.group(shape.experts, used, &s.chosen[..n * used]);
        let active: Vec<usize> = s.routes.active().collect();
        if let Some(trace) = &mut s.trace {
            trace.layer(&active);
        }
        // The visit first: it is compared with what was expected of it, which then makes place.
        let visit = weights.experts.visit(l, &active);
        if let Some(cache) = weights.experts.cache() {
            look_ahead(cache, model, phase, l + 1, pool, kernels, n, s);
        }
        feed_forward(
            pool,
            kernels,
            phase,
            visit,
            lora.map_or(&[], |lora| &lora.experts),
            &s.routes,
            &s.normed,
            &mut s.hidden,
            &mut s.packed,
            &mut s.x,
        )?;
        if let Some(see) = &mut observer {
            see(Site::FeedForward, &s.normed, Some(&s.routes));
            see(Site::Down, &s.hidden, Some(&s.routes));
        }
    }
    if part.end < weights.layers.len() {
        return Ok(());
    }

    // logits [outputs, vocab] = norm(x) · Wᵀ
    s.last.fill(pool, kernels, outputs.len(), |i, out| {
        norm(
            row(&s.x, outputs[i], hidden),
            &weights.output_norm,
            eps,
            out,
        );
    });
    if let Some(see) = &mut observer {
        see(Site::Output, &s.last, None);
    }
    s.logits.resize(outputs.len() * shape.vocab, 0.0);
    linear(
        pool,
        kernels,
        phase,
        &s.last,
        Into::Set,
        &mut [(&weights.output, &mut s.logits[..])],
        &mut s.packed[0],
    );
    if let Some(lora) = &model.lora {
        add(
            pool,
            kernels,
            &lora.output,
            &s.last,
            &mut s.logits,
            &mut s.inner,
        );
    }
    Ok(())
}

/// `out += B · (A · x)`, where there is such a correction.
fn add(
    pool: &Pool,
    kernels: &Kernels,
    low: &Option<LowRank>,
    x: &Activations,
    out: &mut [f32],
    inner: &mut Vec<f32>,
) {
    if let Some(low) = low {
        low.add(pool, kernels, x, out, inner);
    }
}

/// Final hidden states, after the output norm, of the last batch's first `tokens` tokens: calls `visit(t, hidden)` for
/// each, in order.
pub fn hidden_states(
    model: &Model,
    kernels: &Kernels,
    state: &State,
    tokens: usize,
    mut visit: impl FnMut(usize, &[f32]),
) {
    let hidden = model.config.shape.hidden;
    let mut out = vec![0.0; hidden];
    for t in 0..tokens {
        let x = row(&state.x, t, hidden);
        (kernels.floats.norm)(
            x,
            &model.weights.output_norm,
            model.config.norm_eps,
            &mut out,
        );
        visit(t, &out);
    }
}

/// Tells the cache what the layers from `next` on will need: everything where so many tokens come that hardly an
/// expert can be without one; else what their routers choose with the residual as it is, before the layers
/// between have added their part.
#[allow(clippy::too_many_arguments)] // the pass's own, and where it stands
fn look_ahead(
    cache: &Cache,
    model: &Model,
    phase: Phase,
    next: usize,
    pool: &Pool,
    kernels: &Kernels,
    n: usize,
    s: &mut State,
) {
    let (config, layers) = (&model.config, &model.weights.layers[next..]);
    let (shape, norm) = (&config.shape, kernels.floats.norm);
    let Some(first) = layers.first() else {
        return cache.expect_nothing();
    };
    if first.router.is_none() || n * shape.experts_used >= MANY * shape.experts {
        return cache.expect(next, (0..shape.experts).collect());
    }
    let mut guess = |(l, layer): (usize, &Layer)| {
        let preferred = preferred(model, phase, l);
        s.last.fill(pool, kernels, n, |t, out| {
            let x = row(&s.x, t, shape.hidden);
            norm(x, &layer.ffn_norm, config.norm_eps, out);
        });
        let mut wanted = Vec::new();
        let mut chosen = vec![(0, 0.0); shape.experts_used];
        for t in 0..n {
            choose_for(
                model,
                kernels,
                l,
                s.last.row(t),
                preferred.as_ref(),
                &mut chosen,
            );
            let ranked = chosen.iter().enumerate();
            wanted.extend(ranked.map(|(rank, &(expert, weight))| (weight, Guess { expert, rank })));
        }
        // What is most certain first.
        wanted.sort_by(|(a, _), (b, _)| b.total_cmp(a));
        let mut guesses: Vec<Guess> = Vec::new();
        for (_, guess) in wanted {
            if !guesses.iter().any(|other| other.expert == guess.expert) {
                guesses.push(guess);
            }
        }
        guesses
    };
    let ahead = (next..).zip(layers).take(cache.sight());
    cache.guess(next, ahead.map(&mut guess).collect());
}

/// Layer `l`'s experts of a token with the normed row `x`.
fn choose_for(
    model: &Model,
    kernels: &Kernels,
    l: usize,
    x: Activation<'_>,
    preferred: Option<&(Vec<bool>, f32)>,
    chosen: &mut [(usize, f32)],
) {
    let Some(router) = &model.weights.layers[l].router else {
        return;
    };
    let scores = &mut [0.0; MAX_EXPERTS][..model.config.shape.experts];
    kernels.dot_rows(router.all(), x, scores);
    let lora = model.lora.as_ref().map(|lora| &lora.layers[l]);
    if let Some(low) = lora.and_then(|lora| lora.router.as_ref()) {
        low.add_one(kernels, x.x, scores);
    }
    choose_preferred(scores, preferred, chosen);
}

/// The experts of a layer that are preferred, and by how much, where some are.
fn preferred(model: &Model, phase: Phase, l: usize) -> Option<(Vec<bool>, f32)> {
    match (model.routing, model.weights.experts.cache()) {
        (Routing::Cached(margin), Some(cache)) if phase == Phase::Generate => {
            Some((cache.present(l), margin))
        }
        _ => None,
    }
}

/// Routes an expert from which on it is taken for certain that all experts have tokens.
const MANY: usize = 8;

/// Row `t` of a matrix of `cols` columns.
fn row<T>(matrix: &[T], t: usize, cols: usize) -> &[T] {
    &matrix[t * cols..(t + 1) * cols]
}
