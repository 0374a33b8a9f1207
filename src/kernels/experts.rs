//! The feed-forward layer in two phases, dense or with experts.
//!
//! (a) Gate and up rows together, SwiGLU in the epilogue, the result quantized in place.
//! (b) Down rows, weighted by the router and added to the residual, experts in ascending order.
//!
//! Tokens are grouped by expert ([`Routes`]), so that each weight row is read once a batch; the
//! activations themselves stay where they are and are found through the routes.

use std::ops::Range;

use super::linear::{Cut, Dots, Out, Runs, TileProducts, multiply};
use super::low_rank::{Corrections, Inner, add_down};
use super::{Activations, Batch, Kernels, Phase, Storage, TILE_ROWS};
use crate::experts::Visit;
use crate::tensor::Rows;
use crate::tensor::direct::Error;
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

    /// The token and the weight of the route at `index`.
    pub fn route(&self, index: usize) -> (usize, f32) {
        self.routes[index]
    }

    /// Number of experts, active or not.
    pub fn experts(&self) -> usize {
        self.starts.len().saturating_sub(1)
    }

    /// The expert of each route, by index.
    pub(super) fn expert_of(&self) -> Vec<usize> {
        let routes_of = |expert| self.of(expert).map(move |_| expert);
        (0..self.experts()).flat_map(routes_of).collect()
    }

    /// The routes of `expert`, by index.
    pub fn of(&self, expert: usize) -> Range<usize> {
        self.starts[expert]..self.starts[expert + 1]
    }
}

/// `residual[t] += Σ weight · down(silu(gate(x[t])) · up(x[t]))` over the experts of each token,
/// which come in portions where they have to be read first. The sums do not depend on how.
///
/// `hidden` is scratch for one row of `ffn` columns a route, and tokens of a prompt are packed in `storage`, those of
/// `x` and of `hidden`; `residual` holds `x.len()` rows of
/// as many columns as `x`. The experts' matrices are corrected by `corrections`, one entry an expert, or
/// none at all.
///
/// # Errors
/// When an expert cannot be read; `residual` then holds something in between.
#[allow(clippy::too_many_arguments)] // the layer's own: where, how, weights, routes, buffers
pub fn feed_forward(
    pool: &Pool,
    kernels: &Kernels,
    phase: Phase,
    mut experts: Visit<'_>,
    corrections: &Corrections,
    routes: &Routes,
    x: &Activations,
    hidden: &mut Activations,
    storage: &mut [Storage; 2],
    residual: &mut [f32],
) -> Result<(), Error> {
    hidden.resize(routes.len());
    let layer = Layer {
        pool,
        kernels,
        phase,
        routes,
        corrections: Inner::new(pool, kernels, corrections, routes, x),
    };
    let [of_x, of_hidden] = storage;
    let row = |&(token, _): &(usize, f32)| x.row(token);
    let rows = routes.routes.iter().map(row).collect();
    let groups = routes.active().map(|expert| routes.of(expert));
    let x_batch = Batch::new(pool, kernels, phase, rows, groups, of_x);
    while let Some(portion) = experts.portion()? {
        layer.gate(&portion.gates, &x_batch, hidden);
        let rows = (0..routes.len()).map(|route| hidden.row(route)).collect();
        let groups = portion.downs.iter().map(|&(expert, _)| routes.of(expert));
        let batch = Batch::new(pool, kernels, phase, rows, groups, of_hidden);
        layer.down(&portion.downs, &batch, x.len(), residual);
    }
    let residual = &mut residual[..x.len() * x.cols()];
    add_down(pool, kernels, corrections, routes, hidden, residual);
    Ok(())
}

/// How and for whom the experts of a layer work.
struct Layer<'a> {
    pool: &'a Pool,
    kernels: &'a Kernels,
    phase: Phase,
    routes: &'a Routes,
    /// Of gate and up.
    corrections: Option<Inner<'a>>,
}

impl Layer<'_> {
    /// (a): `hidden = silu(gate(x)) · up(x)`, each expert for its routes.
    fn gate(
        &self,
        experts: &[(usize, Rows<'_>, Rows<'_>)],
        x: &Batch<'_>,
        hidden: &mut Activations,
    ) {
        let Some((_, first, _)) = experts.first() else {
            return;
        };
        let (kernels, phase, routes) = (self.kernels, self.phase, self.routes);
        let parts = hidden.parts();
        // Gate and up are streamed side by side.
        let streams = kernels.streams(phase, first.kind);
        let cut = Cut::new(first.len(), streams.div_ceil(2), TILE_ROWS);
        self.pool.run(experts.len() * cut.tasks(), &|task| {
            let (expert, gate, up) = experts[task / cut.tasks()];
            let write = |route: usize, range: Range<usize>, gates: &[f32], ups: &[f32]| {
                // SAFETY: tasks differ in expert (and so in route) or in columns.
                let mut part = unsafe { parts.columns(route, range.start, range.len()) };
                let (gates, ups) = (&gates[..range.len()], &ups[..range.len()]);
                match &self.corrections {
                    None => (kernels.floats.swiglu)(gates, ups, part.x),
                    Some(corrections) => {
                        let mut corrected = [[0.0; TILE_ROWS]; 2];
                        let [a, b] = corrected.each_mut().map(|sums| &mut sums[..range.len()]);
                        a.copy_from_slice(gates);
                        b.copy_from_slice(ups);
                        corrections.add(kernels, expert, route, range.start, a, b);
                        (kernels.floats.swiglu)(a, b, part.x);
                    }
                }
                part.quantize(kernels);
            };
            let ranges = cut.parts(task % cut.tasks());
            match phase {
                Phase::Prompt => {
                    let (mut gates, mut ups) = (TileProducts::new(), TileProducts::new());
                    for range in ranges {
                        let (gate, up) = (gate.slice(range.clone()), up.slice(range.clone()));
                        for some in x.chunks(routes.of(expert)) {
                            let gates = gates.compute(kernels, gate, some);
                            let ups = ups.compute(kernels, up, some);
                            for ((route, gates), ups) in (some.first..).zip(gates).zip(ups) {
                                write(route, range.clone(), gates, ups);
                            }
                        }
                    }
                }
                Phase::Generate => {
                    let runs: Runs<'_> = ranges
                        .iter()
                        .flat_map(|range| [gate.slice(range.clone()), up.slice(range.clone())])
                        .collect();
                    let mut dots = Dots::new();
                    for some in x.chunks(routes.of(expert)) {
                        let sums = dots.compute(kernels, &runs, some);
                        for (route, sums) in (some.first..).zip(sums) {
                            for (range, sums) in ranges.iter().zip(sums.as_chunks::<2>().0) {
                                write(route, range.clone(), &sums[0], &sums[1]);
                            }
                        }
                    }
                }
            }
        });
    }

    /// (b): `residual += weight · down(hidden)`, each expert for its routes, one after the other.
    fn down(
        &self,
        experts: &[(usize, Rows<'_>)],
        hidden: &Batch<'_>,
        tokens: usize,
        residual: &mut [f32],
    ) {
        let Some((_, first)) = experts.first() else {
            return;
        };
        let (kernels, phase, routes) = (self.kernels, self.phase, self.routes);
        let out = Out::new(residual, tokens, first.len());
        let cut = Cut::of_outputs(kernels, phase, *first);
        // The tokens of one expert of a prompt stay in cache while all its rows pass; those of all experts would not.
        let together = match phase {
            Phase::Prompt => 1,
            Phase::Generate => experts.len(),
        };
        for experts in experts.chunks(together) {
            self.pool.run(cut.tasks(), &|task| {
                for &(expert, down) in experts {
                    let write = |route: usize, range: Range<usize>, sums: &[f32]| {
                        let (token, weight) = routes.routes[route];
                        // SAFETY: tasks take disjoint ranges of columns.
                        let out = unsafe { out.columns(token, range.start, range.len()) };
                        out.iter_mut()
                            .zip(sums)
                            .for_each(|(out, sum)| *out += weight * *sum);
                    };
                    let (parts, group) = (cut.parts(task), routes.of(expert));
                    multiply(kernels, phase, down, parts, hidden, group, write);
                }
            });
        }
    }
}
