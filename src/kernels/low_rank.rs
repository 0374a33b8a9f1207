//! Low-rank corrections of matrices: `y += B · (A · x)`, in f32.
//!
//! Products are those of F32 rows ([`Kernels::dot_rows`]), of which each output is a sum of its own in a fixed order,
//! whatever the phase, the batch or the number of threads.

use std::ops::Range;

use super::experts::Routes;
use super::{Activation, Activations, Kernels, TILE_ROWS};
use crate::experts::Expert;
use crate::quant::BlockType;
use crate::tensor::Rows;
use crate::threads::Pool;

/// A correction `B · A`, B with its scale.
#[derive(Clone, Debug, Default)]
pub struct LowRank {
    /// `[rank, columns]`.
    a: Vec<f32>,
    /// `[rows, rank]`.
    b: Vec<f32>,
    rank: usize,
}

impl LowRank {
    /// The sum of corrections `(rank, A, B, scale)` of one matrix; `None` if there are none.
    pub fn sum<'a>(
        corrections: impl IntoIterator<Item = (usize, &'a [f32], &'a [f32], f32)>,
    ) -> Option<Self> {
        let corrections: Vec<_> = corrections.into_iter().collect();
        let rank = corrections.iter().map(|(rank, ..)| rank).sum();
        let (first_rank, _, first, _) = corrections.first()?;
        let mut sum = Self {
            a: Vec::new(),
            b: Vec::with_capacity(first.len() / first_rank * rank),
            rank,
        };
        for (_, a, ..) in &corrections {
            sum.a.extend_from_slice(a);
        }
        // Side by side: row `r` of B is that of each correction, one after the other.
        for row in 0..first.len() / first_rank {
            for (rank, _, b, scale) in &corrections {
                let values = &b[row * rank..(row + 1) * rank];
                sum.b.extend(values.iter().map(|value| scale * value));
            }
        }
        Some(sum)
    }

    /// Rows of the matrix.
    fn len(&self) -> usize {
        self.b.len() / self.rank
    }

    fn a(&self, rows: Range<usize>) -> Rows<'_> {
        part(&self.a, self.a.len() / self.rank, rows)
    }

    fn b(&self, rows: Range<usize>) -> Rows<'_> {
        part(&self.b, self.rank, rows)
    }

    /// `out[t] += B · (A · x[t])` for all rows of `x`; `out` holds as many rows of the matrix's rows. `scratch` is made as
    /// long as it needs to be.
    pub fn add(
        &self,
        pool: &Pool,
        kernels: &Kernels,
        x: &Activations,
        out: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        let (tokens, rank, rows) = (x.len(), self.rank, self.len());
        scratch.resize(tokens * rank, 0.0);
        let step = divisor(rank, 8);
        pool.chunks(scratch, step, |index, inner| {
            let (token, start) = (index * step / rank, index * step % rank);
            let x = Activation::in_f32(x.row(token).x);
            kernels.dot_rows(self.a(start..start + step), x, inner);
        });
        let step = divisor(rows, 512);
        pool.chunks(&mut out[..tokens * rows], step, |index, out| {
            let (token, start) = (index * step / rows, index * step % rows);
            let inner = &scratch[token * rank..(token + 1) * rank];
            self.add_rows(kernels, start, inner, 1.0, out);
        });
    }

    /// The same for one row of activations, on the calling thread.
    pub fn add_one(&self, kernels: &Kernels, x: &[f32], out: &mut [f32]) {
        let mut inner = vec![0.0; self.rank];
        kernels.dot_rows(self.a(0..self.rank), Activation::in_f32(x), &mut inner);
        self.add_rows(kernels, 0, &inner, 1.0, out);
    }

    /// `out += weight · B[start..] · inner`, as many rows as `out` is long.
    fn add_rows(
        &self,
        kernels: &Kernels,
        start: usize,
        inner: &[f32],
        weight: f32,
        out: &mut [f32],
    ) {
        let mut sums = [0.0; TILE_ROWS];
        for (index, out) in out.chunks_mut(TILE_ROWS).enumerate() {
            let start = start + index * TILE_ROWS;
            let sums = &mut sums[..out.len()];
            let rows = self.b(start..start + out.len());
            kernels.dot_rows(rows, Activation::in_f32(inner), sums);
            out.iter_mut()
                .zip(sums)
                .for_each(|(out, sum)| *out += weight * *sum);
        }
    }
}

/// Rows of an f32 matrix.
fn part(values: &[f32], cols: usize, rows: Range<usize>) -> Rows<'_> {
    let bytes = bytemuck::cast_slice(&values[rows.start * cols..rows.end * cols]);
    Rows::new(BlockType::F32, cols, bytes).expect("whole rows")
}

/// The largest divisor of `count` that is at most `most`.
fn divisor(count: usize, most: usize) -> usize {
    (1..=most.min(count))
        .rev()
        .find(|step| count.is_multiple_of(*step))
        .unwrap_or(1)
}

/// Corrections of a layer's experts.
pub type Corrections = [Expert<Option<LowRank>>];

/// `A · x` for gate and up of every route.
pub(super) struct Inner<'a> {
    experts: &'a Corrections,
    /// Gate's, then up's, a route.
    values: Vec<f32>,
    /// Values of gate, and of gate and up together, from one route to the next.
    stride: (usize, usize),
}

impl<'a> Inner<'a> {
    /// Computes it, for experts some of which have such corrections.
    pub(super) fn new(
        pool: &Pool,
        kernels: &Kernels,
        experts: &'a Corrections,
        routes: &Routes,
        x: &Activations,
    ) -> Option<Self> {
        let longest = |part: fn(&Expert<Option<LowRank>>) -> &Option<LowRank>| {
            let ranks = experts.iter().flat_map(part).map(|low| low.rank);
            ranks.max().unwrap_or(0)
        };
        let (gate, up) = (longest(|expert| &expert.gate), longest(|expert| &expert.up));
        let stride = gate + up;
        if stride == 0 {
            return None;
        }
        let expert_of = routes.expert_of();
        let mut values = vec![0.0; routes.len() * stride];
        pool.chunks(&mut values, stride, |route, values| {
            let x = Activation::in_f32(x.row(routes.route(route).0).x);
            let expert = &experts[expert_of[route]];
            let (gates, ups) = values.split_at_mut(gate);
            for (low, inner) in [(&expert.gate, gates), (&expert.up, ups)] {
                if let Some(low) = low {
                    kernels.dot_rows(low.a(0..low.rank), x, &mut inner[..low.rank]);
                }
            }
        });
        Some(Self {
            experts,
            values,
            stride: (gate, stride),
        })
    }

    /// Adds the corrections of rows `start..` to the products of gate and up of a route.
    pub(super) fn add(
        &self,
        kernels: &Kernels,
        expert: usize,
        route: usize,
        start: usize,
        gates: &mut [f32],
        ups: &mut [f32],
    ) {
        let (gate, stride) = self.stride;
        let inner = &self.values[route * stride..(route + 1) * stride];
        let expert = &self.experts[expert];
        for (low, inner, out) in [
            (&expert.gate, &inner[..gate], gates),
            (&expert.up, &inner[gate..], ups),
        ] {
            if let Some(low) = low {
                low.add_rows(kernels, start, &inner[..low.rank], 1.0, out);
            }
        }
    }
}

/// `residual[t] += weight · B · (A · hidden[route])` for down of every route, experts in ascending order.
pub(super) fn add_down(
    pool: &Pool,
    kernels: &Kernels,
    experts: &Corrections,
    routes: &Routes,
    hidden: &Activations,
    residual: &mut [f32],
) {
    let downs = experts.iter().flat_map(|expert| &expert.down);
    let Some(stride) = downs.clone().map(|low| low.rank).max() else {
        return;
    };
    let rows = downs.map(LowRank::len).next().expect("there is one");
    let expert_of = routes.expert_of();
    let mut inner = vec![0.0; routes.len() * stride];
    pool.chunks(&mut inner, stride, |route, inner| {
        if let Some(low) = &experts[expert_of[route]].down {
            let x = Activation::in_f32(hidden.row(route).x);
            kernels.dot_rows(low.a(0..low.rank), x, &mut inner[..low.rank]);
        }
    });
    // The routes of each token; those of lower experts come first.
    let tokens = residual.len() / rows;
    let mut of_token: Vec<Vec<usize>> = vec![Vec::new(); tokens];
    for route in 0..routes.len() {
        of_token[routes.route(route).0].push(route);
    }
    let step = divisor(rows, 512);
    pool.chunks(residual, step, |index, out| {
        let (token, start) = (index * step / rows, index * step % rows);
        for &route in &of_token[token] {
            let inner = &inner[route * stride..(route + 1) * stride];
            if let Some(low) = &experts[expert_of[route]].down {
                let weight = routes.route(route).1;
                low.add_rows(kernels, start, &inner[..low.rank], weight, out);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::scalar;

    #[test]
    fn a_sum_of_corrections_adds_each_times_its_scale() {
        let (a, b) = ([1.0, 2.0, 3.0], [1.0, -1.0]);
        let (c, d) = ([0.5, 0.0, 1.0, 1.0, 1.0, 0.0], [2.0, 1.0, 0.0, 4.0]);
        let low = LowRank::sum([(1, &a[..], &b[..], 0.5), (2, &c[..], &d[..], 2.0)]).unwrap();
        let x = [1.0, 10.0, 100.0];
        let mut out = [1000.0, 2000.0];
        low.add_one(&scalar::KERNELS, &x, &mut out);
        let (ax, cx) = (321.0, [100.5, 11.0]);
        let first = 0.5 * ax + 2.0 * (2.0 * cx[0] + cx[1]);
        let second = -0.5 * ax + 2.0 * 4.0 * cx[1];
        assert_eq!(out, [1000.0 + first, 2000.0 + second]);
        assert!(LowRank::sum([]).is_none());
    }

    #[test]
    fn steps_divide() {
        assert_eq!(
            [4096, 576, 32000, 7].map(|count| divisor(count, 512)),
            [512, 288, 500, 7]
        );
        assert_eq!(divisor(1009, 512), 1);
    }
}
