//! Searches for the scale of a group of weights, and ggml's ways of rounding.
//!
//! A search tries a grid of inverse scales and keeps the one with the least weighted error.
//! Equality with ggml fixes the order of the additions within one try, but not the order of
//! the tries: so the tries are the lanes, which all advance together over the weights, and the
//! compiler makes vectors of them.

/// Below this magnitude a group counts as all zero.
pub(super) const ZERO: f32 = 1e-15;

/// 1.5 · 2²³: after adding it, a float's last mantissa bit is worth 1.
const ROUNDER: f32 = 12_582_912.0;

/// The nearest integer, ties to even, for magnitudes up to 2²² − 1 (beyond, the low 23 bits of
/// what the addition left, as in ggml).
#[inline]
pub(super) fn nearest_int(value: f32) -> i32 {
    let bits = (value + ROUNDER).to_bits();
    (bits & 0x007f_ffff) as i32 - 0x0040_0000
}

/// [`nearest_int`] as a float, for magnitudes up to 2²² − 1.
#[inline]
fn nearest(value: f32) -> f32 {
    (value + ROUNDER) - ROUNDER
}

/// A C cast to `int` as x86 executes it: towards zero; `i32::MIN` where it does not fit.
#[inline]
pub(super) fn truncate(value: f32) -> i32 {
    if value.abs() < 2_147_483_648.0 {
        value as i32
    } else {
        i32::MIN
    }
}

/// `1 / value`, and 0 for 0.
#[inline]
pub(super) fn inverse(value: f32) -> f32 {
    if value != 0.0 { 1.0 / value } else { 0.0 }
}

/// The weight of largest magnitude, the first of equals, and that magnitude.
#[inline]
pub(super) fn largest(weights: &[f32]) -> (f32, f32) {
    weights.iter().fold((0.0, 0.0), |(max, magnitude), &w| {
        if magnitude < w.abs() {
            (w, w.abs())
        } else {
            (max, magnitude)
        }
    })
}

/// Grid of [`symmetric`]: steps −9..=9 of 0.1 around the middle, and one that fills the vectors.
const STEPS: usize = 20;
const MIDDLE: usize = 9;
const TRIES: usize = 19;

/// Finds levels `l` in `-half..half` and a scale `d` that minimize `Σ w·(x − d·l)²`, stores
/// `l + half` (all 0 where the group is zero), and returns `d`.
///
/// `w` is the importance, or `x²` without one. The inverse scales tried are those that put the
/// weight of largest magnitude at `-(half + 0.1·step)`; for each the best `d` is
/// `Σ w·x·l / Σ w·l²`. This is ggml's `make_qx_quants` with `rmse_type` 1.
pub(super) fn symmetric(
    half: i32,
    x: &[f32],
    importance: Option<&[f32]>,
    levels: &mut [u8],
) -> f32 {
    let (max, magnitude) = largest(x);
    if magnitude < ZERO {
        levels.fill(0);
        return 0.0;
    }
    let limit = half as f32;
    let inverse_scales: [f32; STEPS] =
        std::array::from_fn(|i| -(limit + 0.1 * (i as f32 - MIDDLE as f32)) / max);

    let mut sum_wxl = [0f32; STEPS];
    let mut sum_wll = [0f32; STEPS];
    for (i, &x) in x.iter().enumerate() {
        let w = importance.map_or(x * x, |importance| importance[i]);
        let wx = w * x;
        for try_ in 0..STEPS {
            let l = nearest(inverse_scales[try_] * x);
            let l = if l > -limit { l } else { -limit };
            let l = if l < limit - 1.0 { l } else { limit - 1.0 };
            sum_wxl[try_] += wx * l;
            sum_wll[try_] += w * l * l;
        }
    }

    let mut chosen = MIDDLE;
    let mut scale = if sum_wll[MIDDLE] != 0.0 {
        sum_wxl[MIDDLE] / sum_wll[MIDDLE]
    } else {
        0.0
    };
    let mut best = scale * sum_wxl[MIDDLE];
    for try_ in (0..TRIES).filter(|&i| i != MIDDLE) {
        let (wxl, wll) = (sum_wxl[try_], sum_wll[try_]);
        if wll > 0.0 && wxl * wxl > best * wll {
            chosen = try_;
            scale = wxl / wll;
            best = scale * wxl;
        }
    }
    for (level, &x) in levels.iter_mut().zip(x) {
        let l = nearest_int(inverse_scales[chosen] * x).clamp(-half, half - 1);
        *level = (l + half) as u8;
    }
    scale
}

/// The weights of the error that ggml uses for its 32-blocks: importance · √(σ² + x²), with σ²
/// of the whole row (see [`mean_square`]).
#[inline]
pub(super) fn error_weights<const N: usize>(
    importance: &[f32],
    sigma2: f32,
    x: &[f32],
) -> [f32; N] {
    std::array::from_fn(|i| importance[i] * (sigma2 + x[i] * x[i]).sqrt())
}

/// Mean of the squares, added in order.
pub(super) fn mean_square(row: &[f32]) -> f32 {
    row.iter().fold(0.0, |sum, &x| sum + x * x) / row.len() as f32
}
