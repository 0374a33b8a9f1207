//! What Q4_K and Q5_K share: eight sub-blocks of 32 with scale and minimum.

use std::array::from_fn;

use bytemuck::{cast, cast_ref};

use super::pack::ScalesAndMins8;
use super::search::{AffineGrid, fit_affine, fit_scales};
use super::{SUPER_BLOCK, Super, round_to_line, share_of_max, sub_blocks, sum};
use crate::quant::F16;
use crate::quant::search::{importance_weights, sum_of_squares};

/// The highest 6-bit scale or minimum.
pub(super) const MAX_SCALE: u8 = 63;

/// A super-block before its levels are packed.
pub(super) struct Affine8 {
    pub d: F16,
    pub dmin: F16,
    pub scales: ScalesAndMins8,
    pub levels: Super<u8>,
}

impl Affine8 {
    /// Encodes without importance: large weights count more, and the largest scale and the
    /// largest minimum set the units of the others.
    #[inline(always)] // the grid is a constant of each caller
    pub fn encode(x: &Super<f32>, grid: &AffineGrid) -> Self {
        let subs: &[[f32; 32]; 8] = cast_ref(x);
        let weights = subs.each_ref().map(|x| {
            let rms = (sum_of_squares(x) / 32.0).sqrt();
            x.map(|x| rms + x.abs())
        });
        let fits = fit_affine(subs, &weights, grid);
        let (d, scales) = share_of_max(&fits.scales, MAX_SCALE);
        let (dmin, mins) = share_of_max(&fits.mins, MAX_SCALE);
        let clipped = |levels: [u8; 8]| levels.map(|level| level.min(MAX_SCALE));
        let scales = ScalesAndMins8::pack(&clipped(scales), &clipped(mins));
        Self::round(x, d, dmin, scales, cast(fits.levels), grid.max_level)
    }

    /// Encodes with importance: it weighs each weight, and each sub-block's sum of it weighs
    /// the sub-block's scale and minimum in the choice of their units. Scales above `clip` are
    /// clipped; there are such where a degenerate sub-block has a negative scale.
    #[inline(always)] // as above
    pub fn encode_weighted(
        x: &Super<f32>,
        importance: &Super<f32>,
        max_level: u8,
        clip: u8,
    ) -> Self {
        let (subs, importance): (&[[f32; 32]; 8], &[[f32; 32]; 8]) =
            (cast_ref(x), cast_ref(importance));
        let variance = 2.0 * sum_of_squares(x) / SUPER_BLOCK as f32;
        let weights = from_fn(|j| importance_weights(&subs[j], &importance[j], variance));
        let weight_sums = weights.each_ref().map(|weights| sum(weights));
        let fits = fit_affine(subs, &weights, &AffineGrid::weighted(max_level));
        let (d, scales) = fit_scales(&fits.scales, &weight_sums, MAX_SCALE);
        let (dmin, mins) = fit_scales(&fits.mins, &weight_sums, MAX_SCALE);
        let (d, dmin) = (F16::from_f32(d), F16::from_f32(dmin));
        let clipped = |levels: [u8; 8]| levels.map(|level| level.min(clip));
        let scales = ScalesAndMins8::pack(&clipped(scales), &clipped(mins));
        Self::round(x, d, dmin, scales, cast(fits.levels), max_level)
    }

    /// Rounds the weights to the lines that the packed scales and minima draw. Where a scale
    /// came out as zero the search's levels stay: they decode to the same.
    #[inline(always)]
    fn round(
        x: &Super<f32>,
        d: F16,
        dmin: F16,
        scales: ScalesAndMins8,
        mut levels: Super<u8>,
        max_level: u8,
    ) -> Self {
        let (scale_levels, min_levels) = scales.unpack();
        for (j, (x, levels)) in sub_blocks::<32>(x, &mut levels).enumerate() {
            let scale = d.to_f32() * f32::from(scale_levels[j]);
            let min = dmin.to_f32() * f32::from(min_levels[j]);
            if scale != 0.0 {
                *levels = round_to_line(x, scale, min, max_level);
            }
        }
        Affine8 {
            d,
            dmin,
            scales,
            levels,
        }
    }
}
