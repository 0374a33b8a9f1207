//! Searches for the scale of a group of weights, and ggml's ways of rounding.
//!
//! A search tries a grid of inverse scales and keeps the one with the least weighted error.
//! Equality with ggml fixes the order of the additions within one try, but not the order of
//! the tries: so each try is a lane, the lanes advance together over the weights, and the
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
    let mut largest = 0.0f32;
    for &value in values {
        if value.abs() > largest.abs() {
            largest = value;
        }
    }
    largest
}

/// Fits `x` by `scale·l` with levels `l` in `−half..half`: the least `Σ w·(x − scale·l)²`.
/// Returns the scale and the levels `l + half`; for weights that are all negligible, zeros.
///
/// The inverse scales tried put the largest weight at `−(half + 0.1·step)`, steps −9..=9; for
/// the levels that each gives, the best scale is `Σ w·x·l / Σ w·l²`. This is ggml's
/// `make_qx_quants`.
#[inline(always)]
pub(super) fn fit_symmetric<const N: usize>(
    x: &[f32; N],
    weights: &[f32; N],
    half: i8,
) -> (f32, [u8; N]) {
    /// The steps, and one more that only fills the vectors.
    const LANES: usize = 20;
    const STEPS: usize = 19;
    const MIDDLE: usize = 9;

    let largest = largest_magnitude(x);
    if largest.abs() < NEGLIGIBLE {
        return (0.0, [0; N]);
    }
    let (lowest, highest) = (f32::from(-half), f32::from(half - 1));
    let inverse_scales: [f32; LANES] = std::array::from_fn(|lane| {
        let step = lane as f32 - MIDDLE as f32;
        -(f32::from(half) + 0.1 * step) / largest
    });

    let mut sum_wxl = [0.0; LANES];
    let mut sum_wll = [0.0; LANES];
    for (&x, &w) in x.iter().zip(weights) {
        let wx = w * x;
        for lane in 0..LANES {
            let l = nearest_int(inverse_scales[lane] * x) as f32;
            let l = if l > lowest { l } else { lowest };
            let l = if l < highest { l } else { highest };
            sum_wxl[lane] += wx * l;
            sum_wll[lane] += w * l * l;
        }
    }

    let mut chosen = MIDDLE;
    let mut scale = if sum_wll[MIDDLE] != 0.0 {
        sum_wxl[MIDDLE] / sum_wll[MIDDLE]
    } else {
        0.0
    };
    // The error falls as (Σwxl)² / Σwl² grows.
    let mut best = scale * sum_wxl[MIDDLE];
    for lane in (0..STEPS).filter(|&lane| lane != MIDDLE) {
        let (wxl, wll) = (sum_wxl[lane], sum_wll[lane]);
        if wll > 0.0 && wxl * wxl > best * wll {
            chosen = lane;
            scale = wxl / wll;
            best = scale * wxl;
        }
    }
    let half = i32::from(half);
    let levels = x.map(|x| {
        let level = nearest_int(inverse_scales[chosen] * x).clamp(-half, half - 1);
        (level + half) as u8
    });
    (scale, levels)
}

/// What the error of each weight counts, by the importance of its column and its own size
/// against the variance of its surroundings.
#[inline(always)]
pub(super) fn importance_weights<const N: usize>(
    x: &[f32; N],
    importance: &[f32; N],
    variance: f32,
) -> [f32; N] {
    std::array::from_fn(|i| importance[i] * (variance + x[i] * x[i]).sqrt())
}

/// Σx², added in order.
#[inline(always)]
pub(super) fn sum_of_squares(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |sum, x| sum + x * x)
}
