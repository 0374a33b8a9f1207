//! Searches for the scale and minimum of a sub-block, and for the scale of its scales.
//!
//! A sub-block of weights `x` is to be written as `scale·q − min` with whole levels `q`. For
//! given levels the best scale and minimum are a weighted least-squares line, in closed form;
//! for a given line the best levels are the nearest ones. What is hard is that the two depend
//! on each other. [`fit_affine`] tries a fixed grid of line slopes, rounds the weights to
//! levels with each, solves for the line that suits those levels best, and keeps the line with
//! the least weighted error. The searches without a minimum, [`fit_scales`] and
//! [`fit_by_descent`], go on from rounded levels by coordinate descent: move one level, keep
//! the move if the optimal error falls.
//!
//! The results equal ggml's to the bit (`make_qkx2_quants`, `make_qkx3_quants`,
//! `make_qp_quants`, `make_q3_quants`), so the order of every sum and the grouping of every
//! product below is part of the format: `w * x * q` is not `w * (x * q)`.

use crate::quant::search::{
    NEGLIGIBLE, SMALL, choose, largest_magnitude, nearest_int, nearest_whole,
};

/// Lines `scale·level − min` for as many sub-blocks as there are lanes.
pub(in crate::quant) struct AffineFits<const LANES: usize> {
    pub scales: [f32; LANES],
    /// What is subtracted; never negative.
    pub mins: [f32; LANES],
    /// Where the levels came from: `per_unit·(x − base)`, rounded.
    per_unit: [f32; LANES],
    base: [f32; LANES],
    /// Whether that was a candidate (1), or the line that the search set out from (0); as wide as a float, for the vectors.
    candidate: [u32; LANES],
    grid: AffineGrid,
}

impl<const LANES: usize> AffineFits<LANES> {
    /// The levels that the line of a lane was fitted to, whole numbers from 0 to the highest; `x` is the lane's sub-block.
    #[inline(always)]
    pub fn levels<const N: usize>(&self, lane: usize, x: &[f32; N]) -> [u8; N] {
        let (per_unit, base) = (self.per_unit[lane], self.base[lane]);
        match self.candidate[lane] != 0 {
            true => each!(i: N => self.grid.round_candidate(per_unit * (x[i] - base)) as u8),
            false => each!(i: N => self.grid.round(per_unit * (x[i] - base)) as u8),
        }
    }
}

/// What a deviation of a weight from its line costs.
#[derive(Clone, Copy)]
pub(in crate::quant) enum Cost {
    Absolute,
    Squared,
}

impl Cost {
    #[inline(always)]
    fn of(self, deviation: f32) -> f32 {
        match self {
            Cost::Absolute => deviation.abs(),
            Cost::Squared => deviation * deviation,
        }
    }
}

/// Candidates of [`fit_affine`]: candidate `i` in `0..=last` spreads the sub-block's range over
/// `max_level + first + step·i` levels.
#[derive(Clone, Copy)]
pub(in crate::quant) struct AffineGrid {
    pub max_level: u8,
    pub first: f32,
    pub step: f32,
    pub last: u8,
    pub cost: Cost,
    /// Whether a quotient beyond the reach of [`nearest_int`] becomes the nearest level or, as
    /// the bits fall, any. Such quotients come from ranges near the smallest f32 only.
    pub saturate: bool,
}

impl AffineGrid {
    /// The grid that goes with importance weights, the same for every type.
    pub const fn weighted(max_level: u8) -> Self {
        AffineGrid {
            max_level,
            first: -0.9,
            step: 0.05,
            last: 36,
            cost: Cost::Squared,
            saturate: true,
        }
    }

    /// The level nearest to `value`.
    #[inline(always)]
    fn round(&self, value: f32) -> f32 {
        clip(nearest_int(value) as f32, f32::from(self.max_level))
    }

    /// The level nearest to `value`, for the candidates.
    #[inline(always)]
    fn round_candidate(&self, value: f32) -> f32 {
        if self.saturate {
            nearest_int(clip(value, f32::from(self.max_level))) as f32
        } else {
            self.round(value)
        }
    }
}

/// Clips `value` to `0..=top`; NaN becomes 0.
#[inline(always)]
fn clip(value: f32, top: f32) -> f32 {
    let value = if value > 0.0 { value } else { 0.0 };
    if value < top { value } else { top }
}

/// Fits each sub-block by a line over levels, weighted. Weight `i` of the sub-block in lane `s` is `x[i][s]`.
///
/// For levels `q` the least-squares line solves the normal equations
///
/// ```text
/// │ Σwq²  Σwq │ │  scale │   │ Σwqx │
/// │ Σwq   Σw  │ │ −min   │ = │ Σwx  │
/// ```
///
/// and where it would add rather than subtract, the line is forced through zero.
///
/// Each sum runs along a sub-block, in order, and one addition waits for the other. So all
/// sub-blocks go in step, a lane each, and the compiler makes vectors of the lanes.
#[inline(always)] // the grid is a constant of each caller
pub(in crate::quant) fn fit_affine<const N: usize, const LANES: usize>(
    x: &[[f32; LANES]; N],
    weights: &[[f32; LANES]; N],
    grid: &AffineGrid,
) -> AffineFits<LANES> {
    let top = f32::from(grid.max_level);

    let (mut low, mut high) = (x[0], x[0]);
    let mut sum_w = weights[0];
    let mut sum_wx: [f32; LANES] = each!(s: LANES => sum_w[s] * x[0][s]);
    for (x, w) in x.iter().zip(weights).skip(1) {
        for s in 0..LANES {
            low[s] = if x[s] < low[s] { x[s] } else { low[s] };
            high[s] = if x[s] > high[s] { x[s] } else { high[s] };
            sum_w[s] += w[s];
            sum_wx[s] += w[s] * x[s];
        }
    }
    let lowest = low;
    let low: [f32; LANES] = each!(s: LANES => if low[s] > 0.0 { 0.0 } else { low[s] });
    // A flat sub-block is its minimum.
    let flat: [bool; LANES] = each!(s: LANES => high[s] == low[s]);

    // The best lines so far. An offset is a negated minimum.
    let mut offset = low;
    let per_unit: [f32; LANES] = each!(s: LANES => top / (high[s] - offset[s]));
    let mut scale: [f32; LANES] = each!(s: LANES => 1.0 / per_unit[s]);
    let mut least = [0.0; LANES];
    for (x, w) in x.iter().zip(weights) {
        for s in 0..LANES {
            let q = grid.round(per_unit[s] * (x[s] - offset[s]));
            least[s] += w[s] * grid.cost.of(scale[s] * q + offset[s] - x[s]);
        }
    }
    // Where their levels came from.
    let (mut from_per_unit, mut from_base, mut candidates) = (per_unit, offset, [0; LANES]);

    for candidate in 0..=grid.last {
        let steps = grid.first + grid.step * f32::from(candidate) + top;
        // The grid moves with the offset of the best line.
        let per_unit: [f32; LANES] = each!(s: LANES => steps / (high[s] - offset[s]));
        let mut small = true;
        for s in 0..LANES {
            let (above, below) = ((high[s] - offset[s]).abs(), (lowest[s] - offset[s]).abs());
            let reach = if above > below { above } else { below };
            small &= flat[s] | ((per_unit[s] * reach).abs() < SMALL);
        }
        let tried = match small {
            true => Candidate::new(
                x,
                weights,
                &per_unit,
                &offset,
                #[inline(always)]
                |q| clip(nearest_whole(q), top),
            ),
            false => Candidate::new(
                x,
                weights,
                &per_unit,
                &offset,
                #[inline(always)]
                |q| grid.round_candidate(q),
            ),
        };
        let (mut new_scale, mut new_offset, mut determinants) =
            ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        for s in 0..LANES {
            let (wq, wqq, wqx) = (tried.sum_wq[s], tried.sum_wqq[s], tried.sum_wqx[s]);
            let determinant = sum_w[s] * wqq - wq * wq;
            determinants[s] = determinant;
            let line = (sum_w[s] * wqx - sum_wx[s] * wq) / determinant;
            let shift = (wqq * sum_wx[s] - wq * wqx) / determinant;
            let through_zero = wqx / wqq;
            let adds = shift > 0.0;
            new_scale[s] = if adds { through_zero } else { line };
            new_offset[s] = if adds { 0.0 } else { shift };
        }
        let mut error = [0.0; LANES];
        for ((x, w), q) in x.iter().zip(weights).zip(&tried.levels) {
            for s in 0..LANES {
                error[s] += w[s] * grid.cost.of(new_scale[s] * q[s] + new_offset[s] - x[s]);
            }
        }
        for s in 0..LANES {
            let better = (determinants[s] > 0.0) & (error[s] < least[s]);
            from_per_unit[s] = choose(better, per_unit[s], from_per_unit[s]);
            from_base[s] = choose(better, offset[s], from_base[s]);
            candidates[s] |= u32::from(better);
            least[s] = choose(better, error[s], least[s]);
            scale[s] = choose(better, new_scale[s], scale[s]);
            offset[s] = choose(better, new_offset[s], offset[s]);
        }
    }

    for s in 0..LANES {
        if flat[s] {
            (scale[s], offset[s]) = (0.0, low[s]);
            (from_per_unit[s], from_base[s]) = (0.0, 0.0);
        }
    }
    AffineFits {
        scales: scale,
        mins: each!(s: LANES => -offset[s]),
        per_unit: from_per_unit,
        base: from_base,
        candidate: candidates,
        grid: *grid,
    }
}

/// Levels that are tried, and their sums.
struct Candidate<const N: usize, const LANES: usize> {
    levels: [[f32; LANES]; N],
    sum_wq: [f32; LANES],
    sum_wqq: [f32; LANES],
    sum_wqx: [f32; LANES],
}

impl<const N: usize, const LANES: usize> Candidate<N, LANES> {
    #[inline(always)]
    fn new(
        x: &[[f32; LANES]; N],
        weights: &[[f32; LANES]; N],
        per_unit: &[f32; LANES],
        offset: &[f32; LANES],
        round: impl Fn(f32) -> f32,
    ) -> Self {
        let mut levels = [[0.0; LANES]; N];
        let (mut sum_wq, mut sum_wqq, mut sum_wqx) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        for ((x, w), levels) in x.iter().zip(weights).zip(&mut levels) {
            for s in 0..LANES {
                let q = round(per_unit[s] * (x[s] - offset[s]));
                levels[s] = q;
                let wq = w[s] * q;
                sum_wq[s] += wq;
                sum_wqq[s] += wq * q;
                sum_wqx[s] += wq * x[s];
            }
        }
        Self {
            levels,
            sum_wq,
            sum_wqq,
            sum_wqx,
        }
    }
}

/// Fits non-negative values (a super-block's scales, or its minima) by `scale·level`, weighted.
///
/// Nine slopes around `max_level / max(values)` are tried, the best is refined by coordinate
/// descent. A negative value (a degenerate sub-block can have a negative scale) wraps around to
/// a high level, as it does in ggml.
#[inline(always)]
pub(super) fn fit_scales<const N: usize>(
    values: &[f32; N],
    weights: &[f32; N],
    max_level: u8,
) -> (f32, [u8; N]) {
    let mut max = 0.0;
    for &value in values {
        max = if max > value { max } else { value };
    }
    if max < NEGLIGIBLE {
        return (0.0, [0; N]);
    }
    let top = f32::from(max_level);
    let clipped = |value: f32| nearest_int(value).min(i32::from(max_level));

    let mut per_unit = top / max;
    let error_of = |scale: f32, level_of: &dyn Fn(f32) -> f32| {
        let mut error = 0.0;
        for (&value, &w) in values.iter().zip(weights) {
            let deviation = value - scale * level_of(value);
            error += w * deviation * deviation;
        }
        error
    };
    let mut least = error_of(1.0 / per_unit, &|v| {
        f32::from(nearest_int(per_unit * v) as u8)
    });
    for step in [-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0] {
        let candidate = (0.1 * step + top) / max;
        let error = error_of(1.0 / candidate, &|v| clipped(candidate * v) as f32);
        if error < least {
            (least, per_unit) = (error, candidate);
        }
    }

    let mut levels = [0; N];
    let (mut sum_wxq, mut sum_wqq) = (0.0, 0.0);
    for i in 0..N {
        let level = clipped(per_unit * values[i]);
        levels[i] = level as u8;
        let q = level as f32;
        sum_wxq += weights[i] * values[i] * q;
        sum_wqq += weights[i] * q * q;
    }
    for _ in 0..DESCENT_ROUNDS {
        let mut moved = false;
        for i in 0..N {
            let (x, w, q) = (values[i], weights[i], f32::from(levels[i]));
            // The sums without value i …
            let rest_wxq = sum_wxq - w * x * q;
            let rest_wqq = sum_wqq - w * q * q;
            if rest_wxq > 0.0 && rest_wqq > 0.0 {
                // … say which level suits it.
                let level = clipped(x * rest_wqq / rest_wxq);
                let q = level as f32;
                let new_wxq = rest_wxq + w * x * q;
                let new_wqq = rest_wqq + w * q * q;
                let better = new_wxq * new_wxq * sum_wqq > sum_wxq * sum_wxq * new_wqq;
                if better && level != i32::from(levels[i]) {
                    levels[i] = level as u8;
                    (sum_wxq, sum_wqq) = (new_wxq, new_wqq);
                    moved = true;
                }
            }
        }
        if !moved {
            break;
        }
    }
    let scale = if sum_wqq > 0.0 {
        sum_wxq / sum_wqq
    } else {
        0.0
    };
    (scale, levels)
}

/// Fits `x` by `scale·q` with `q` in `−half..half`, weighting each weight by its square.
///
/// Returns the scale and the levels `q + half`; for weights that are all negligible, zeros.
#[inline(always)]
pub(super) fn fit_by_descent<const N: usize>(x: &[f32; N], half: i8) -> (f32, [u8; N]) {
    let largest = largest_magnitude(x);
    if largest.abs() < NEGLIGIBLE {
        return (0.0, [0; N]);
    }
    let clipped = |value: f32| nearest_int(value).clamp(-i32::from(half), i32::from(half) - 1);

    let per_unit = f32::from(-half) / largest;
    let mut levels = [0; N];
    let (mut sum_wxq, mut sum_wqq) = (0.0, 0.0);
    for (&x, level) in x.iter().zip(&mut levels) {
        *level = clipped(per_unit * x);
        let (w, q) = (x * x, *level as f32);
        sum_wxq += w * x * q;
        sum_wqq += w * q * q;
    }
    for _ in 0..DESCENT_ROUNDS {
        let mut moved = false;
        for (&x, level) in x.iter().zip(&mut levels) {
            let (w, q) = (x * x, *level as f32);
            let rest_wxq = sum_wxq - w * x * q;
            let rest_wqq = sum_wqq - w * q * q;
            if rest_wxq > 0.0 {
                let new_level = clipped(x * rest_wqq / rest_wxq);
                let q = new_level as f32;
                let new_wxq = rest_wxq + w * x * q;
                let new_wqq = rest_wqq + w * q * q;
                let better =
                    new_wqq > 0.0 && new_wxq * new_wxq * sum_wqq > sum_wxq * sum_wxq * new_wqq;
                if better && new_level != *level {
                    *level = new_level;
                    (sum_wxq, sum_wqq) = (new_wxq, new_wqq);
                    moved = true;
                }
            }
        }
        if !moved {
            break;
        }
    }
    let scale = if sum_wqq > 0.0 {
        sum_wxq / sum_wqq
    } else {
        0.0
    };
    (scale, each!(i: N => (levels[i] + i32::from(half)) as u8))
}

/// Coordinate descent goes over the levels at most so often.
const DESCENT_ROUNDS: usize = 5;
