//! Searches for the scale of a group of weights, and ggml's ways of rounding.
//!
//! A search tries a grid of inverse scales and keeps the one with the least weighted error.
//! Equality with ggml fixes the order of the additions within one group, but groups know nothing
//! of each other: so each group is a lane, the lanes advance together over the weights, and the
//! compiler makes vectors of them.

/// Below this magnitude a group of weights counts as zeros.
pub(super) const NEGLIGIBLE: f32 = 1e-15;

/// 1.5 · 2²³: after adding it, a float's last mantissa bit is worth 1.
const ROUNDER: f32 = 12_582_912.0;

/// The nearest integer, ties to even, for magnitudes up to 2²² − 1 (beyond, the low 23 bits of
/// what the addition left, as in ggml).
#[inline(always)]
pub(super) fn nearest_int(value: f32) -> i32 {
    let bits = (value + ROUNDER).to_bits();
    (bits & 0x007f_ffff) as i32 - 0x0040_0000
}

/// Magnitudes below this are safe for [`nearest_whole`].
pub(super) const SMALL: f32 = 2_097_152.0;

/// The same as [`nearest_int`], as a float, in fewer instructions; for magnitudes below [`SMALL`].
#[inline(always)]
pub(super) fn nearest_whole(value: f32) -> f32 {
    (value + ROUNDER) - ROUNDER
}

/// `new` or `old`, by bits: of a branch the compiler makes one in each lane.
#[inline(always)]
pub(super) fn choose(new_is_better: bool, new: f32, old: f32) -> f32 {
    let mask = 0_u32.wrapping_sub(u32::from(new_is_better));
    f32::from_bits(new.to_bits() & mask | old.to_bits() & !mask)
}

/// A C cast to `int` as x86 executes it: towards zero; `i32::MIN` where it does not fit.
#[inline(always)]
pub(super) fn truncate(value: f32) -> i32 {
    if value.abs() < 2_147_483_648.0 {
        value as i32
    } else {
        i32::MIN
    }
}

/// `1 / value`, and 0 for 0.
#[inline(always)]
pub(super) fn inverse(value: f32) -> f32 {
    if value != 0.0 { 1.0 / value } else { 0.0 }
}

/// The first value of the largest magnitude, with its sign; 0 for nothing but zeros.
#[inline(always)]
pub(super) fn largest_magnitude(values: &[f32]) -> f32 {
    // The magnitude first, in lanes, for which the order is no matter; then the sign.
    let mut lanes = [0.0f32; 16];
    let (whole, rest) = values.as_chunks::<16>();
    for values in whole {
        for lane in 0..16 {
            let value = values[lane].abs();
            lanes[lane] = if value > lanes[lane] {
                value
            } else {
                lanes[lane]
            };
        }
    }
    let mut largest = 0.0;
    for value in lanes.iter().chain(rest) {
        largest = if value.abs() > largest {
            value.abs()
        } else {
            largest
        };
    }
    let (mut positive, mut negative) = (false, false);
    for &value in values {
        positive |= value == largest;
        negative |= value == -largest;
    }
    match (positive, negative) {
        _ if largest == 0.0 => 0.0,
        (true, true) => *values
            .iter()
            .find(|value| value.abs() == largest)
            .expect("there is one"),
        (false, true) => -largest,
        _ => largest,
    }
}

/// Scales of as many groups as there are lanes, as [`fit_symmetric`] finds them.
pub(super) struct SymmetricFits<const LANES: usize> {
    pub scales: [f32; LANES],
    /// What the weights were multiplied by to come to their levels.
    per_unit: [f32; LANES],
    /// Groups of nothing but negligible weights.
    empty: [bool; LANES],
    half: i8,
}

impl<const LANES: usize> SymmetricFits<LANES> {
    /// The levels of a lane, plus `half`; zeros for weights that are all negligible.
    #[inline(always)]
    pub fn levels<const N: usize>(&self, lane: usize, x: &[f32; N]) -> [u8; N] {
        if self.empty[lane] {
            return [0; N];
        }
        let (per_unit, half) = (self.per_unit[lane], i32::from(self.half));
        each!(i: N => (nearest_int(per_unit * x[i]).clamp(-half, half - 1) + half) as u8)
    }
}

/// Fits each group by `scale·l` with levels `l` in `−half..half`: the least `Σ w·(x − scale·l)²`. Weight `i` of the
/// group in lane `s` is `x[i][s]`.
///
/// The inverse scales tried put the largest weight at `−(half + 0.1·step)`, steps −9..=9; for
/// the levels that each gives, the best scale is `Σ w·x·l / Σ w·l²`. This is ggml's
/// `make_qx_quants`.
#[inline(always)]
pub(super) fn fit_symmetric<const N: usize, const LANES: usize>(
    x: &[[f32; LANES]; N],
    weights: &[[f32; LANES]; N],
    half: i8,
) -> SymmetricFits<LANES> {
    let mut largest = [0.0f32; LANES];
    for x in x {
        for s in 0..LANES {
            let larger = x[s].abs() > largest[s].abs();
            largest[s] = if larger { x[s] } else { largest[s] };
        }
    }
    let (lowest, highest) = (f32::from(-half), f32::from(half - 1));
    let (mut scales, mut best, mut per_unit) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
    // The middle goes first, and counts whatever it is worth.
    for step in std::iter::once(0).chain((-9..=9).filter(|&step| step != 0)) {
        let tried: [f32; LANES] =
            each!(s: LANES => -(f32::from(half) + 0.1 * step as f32) / largest[s]);
        let (mut sum_wxl, mut sum_wll) = ([0.0; LANES], [0.0; LANES]);
        for (x, w) in x.iter().zip(weights) {
            for s in 0..LANES {
                // No larger than half + 0.9, since no weight is larger than the largest.
                let l = nearest_whole(tried[s] * x[s]);
                let l = if l > lowest { l } else { lowest };
                let l = if l < highest { l } else { highest };
                sum_wxl[s] += w[s] * x[s] * l;
                sum_wll[s] += w[s] * l * l;
            }
        }
        for s in 0..LANES {
            let (wxl, wll) = (sum_wxl[s], sum_wll[s]);
            // The error falls as (Σwxl)² / Σwl² grows.
            let better = (wll > 0.0) & (wxl * wxl > best[s] * wll);
            let scale = if step != 0 || wll != 0.0 {
                wxl / wll
            } else {
                0.0
            };
            let take = better | (step == 0);
            per_unit[s] = choose(take, tried[s], per_unit[s]);
            scales[s] = choose(take, scale, scales[s]);
            best[s] = choose(take, scale * wxl, best[s]);
        }
    }
    let empty = each!(s: LANES => largest[s].abs() < NEGLIGIBLE);
    SymmetricFits {
        scales: each!(s: LANES => if empty[s] { 0.0 } else { scales[s] }),
        per_unit,
        empty,
        half,
    }
}

/// Rows to columns.
#[inline(always)]
pub(super) fn transposed<const N: usize, const M: usize>(rows: &[[f32; N]; M]) -> [[f32; M]; N] {
    each!(i: N => each!(j: M => rows[j][i]))
}

/// What the error of each weight counts, by the importance of its column and its own size
/// against the `variance` of its surroundings.
#[inline(always)]
pub(super) fn importance_weights<const N: usize>(
    x: &[f32; N],
    importance: &[f32; N],
    variance: &[f32; N],
) -> [f32; N] {
    each!(i: N => importance[i] * (variance[i] + x[i] * x[i]).sqrt())
}

/// Sums along the lanes, each added in order.
#[inline(always)]
pub(super) fn sum_of_lanes<const N: usize, const LANES: usize>(
    rows: &[[f32; LANES]; N],
) -> [f32; LANES] {
    let mut sums = [0.0; LANES];
    for row in rows {
        for s in 0..LANES {
            sums[s] += row[s];
        }
    }
    sums
}

/// Σx², added in order.
#[inline(always)]
pub(super) fn sum_of_squares(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |sum, x| sum + x * x)
}
