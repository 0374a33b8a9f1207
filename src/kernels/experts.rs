//! The feed-forward layer in two phases, dense or with experts.
//!
//! (a) Gate and up rows together, SwiGLU in the epilogue, the result quantized in place.
//! (b) Down rows, weighted by the router and added to the residual, experts in ascending order.
//!
//! Tokens are grouped by expert ([`Routes`]), so that each weight row is read once a batch; the
//! activations themselves stay where they are and are found through the routes.

use std::ops::Range;

use super::linear::{Out, Product, chunks};
use super::{Activations, Kernels, Phase, TILE_ROWS};
use crate::experts::Expert;
use crate::threads::Pool;

/// Which token goes to which expert, with which weight, grouped by expert.
#[derive(Default)]
pub struct Routes {
    /// `(token, weight)`, grouped by expert in ascending order, tokens ascending within.
    routes: Vec<(usize, f32)>,
    /// `routes[starts[e]..starts[e + 1]]` belongs to expert `e`.
    starts: Vec<usize>,
}

impl Routes {
    /// Groups `chosen`, which holds `used` pairs `(expert, weight)` a token.
    pub fn group(&mut self, experts: usize, used: usize, chosen: &[(usize, f32)]) {
        self.starts.clear();
        self.starts.resize(experts + 1, 0);
        for &(expert, _) in chosen {
            self.starts[expert + 1] += 1;
        }
        for expert in 0..experts {
            self.starts[expert + 1] += self.starts[expert];
        }
        let mut next = self.starts.clone();
        self.routes.clear();
        self.routes.resize(chosen.len(), (0, 0.0));
        for (index, &(expert, weight)) in chosen.iter().enumerate() {
            self.routes[next[expert]] = (index / used, weight);
            next[expert] += 1;
        }
    }

    /// Number of routes: tokens times experts used.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.routes.len()
    }

    /// The experts that have tokens.
    pub fn active(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.starts.len() - 1).filter(|&expert| self.starts[expert] < self.starts[expert + 1])
    }

    /// The routes of `expert`, by index.
    fn of(&self, expert: usize) -> Range<usize> {
        self.starts[expert]..self.starts[expert + 1]
    }
}

/// `residual[t] += Σ weight · down(silu(gate(x[t])) · up(x[t]))` over the experts of each token.
///
/// `hidden` is scratch for one row of `ffn` columns a route; `residual` holds `x.len()` rows of
/// as many columns as `x`.
#[allow(clippy::too_many_arguments)] // the layer's own: where, how, weights, routes, buffers
pub fn feed_forward(
    pool: &Pool,
    kernels: &Kernels,
    phase: Phase,
    experts: &[Expert],
    routes: &Routes,
    x: &Activations,
    hidden: &mut Activations,
    residual: &mut [f32],
) {
    let active: Vec<usize> = routes.active().collect();
    let Some(&first) = active.first() else { return };
    let (ffn, width) = (experts[first].gate.rows, experts[first].down.rows);

    hidden.resize(routes.len());
    let parts = hidden.parts();
    let tiles = ffn.div_ceil(TILE_ROWS);
    pool.run(active.len() * tiles, &|task| {
        let (expert, start) = (active[task / tiles], task % tiles * TILE_ROWS);
        let range = start..(start + TILE_ROWS).min(ffn);
        let (gate, up) = (
            experts[expert].gate.rows(range.clone()),
            experts[expert].up.rows(range.clone()),
        );
        for some in chunks(routes.of(expert)) {
            let x = || some.clone().map(|route| x.row(routes.routes[route].0));
            let (mut gates, mut ups) = (Product::new(), Product::new());
            gates.compute(kernels, phase, gate, x());
            ups.compute(kernels, phase, up, x());
            for ((route, gates), ups) in some.clone().zip(&gates.sums).zip(&ups.sums) {
                // SAFETY: tasks differ in expert (and so in route) or in columns.
                let mut part = unsafe { parts.columns(route, start, range.len()) };
                (kernels.floats.swiglu)(&gates[..range.len()], &ups[..range.len()], part.x);
                part.quantize(kernels);
            }
        }
    });

    let hidden = &*hidden;
    let out = Out::new(residual, x.len(), width);
    pool.run(width.div_ceil(TILE_ROWS), &|task| {
        let range = task * TILE_ROWS..((task + 1) * TILE_ROWS).min(width);
        for &expert in &active {
            let down = experts[expert].down.rows(range.clone());
            for some in chunks(routes.of(expert)) {
                let mut downs = Product::new();
                downs.compute(
                    kernels,
                    phase,
                    down,
                    some.clone().map(|route| hidden.row(route)),
                );
                for (&(token, weight), sums) in routes.routes[some].iter().zip(&downs.sums) {
                    // SAFETY: tasks take disjoint ranges of columns.
                    let out = unsafe { out.columns(token, range.start, range.len()) };
                    out.iter_mut()
                        .zip(sums)
                        .for_each(|(out, sum)| *out += weight * *sum);
                }
            }
        }
    });
}
