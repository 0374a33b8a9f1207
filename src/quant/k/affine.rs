//! What Q4_K and Q5_K share: eight sub-blocks of 32 with scale and minimum.

use bytemuck::{Zeroable, cast_ref};

use super::pack::ScalesAndMins8;
use super::search::{AffineGrid, fit_affine, fit_scales};
use super::{ABREAST, SUPER_BLOCK, Super, round_to_line, share_of_max, sub_blocks};
use crate::quant::F16;
use crate::quant::search::{importance_weights, sum_of_lanes, sum_of_squares, transposed};

/// The highest 6-bit scale or minimum.
pub(super) const MAX_SCALE: u8 = 63;

/// Sub-blocks of super-blocks that are encoded side by side.
const LANES: usize = 8 * ABREAST;

/// A super-block before its levels are packed.
#[derive(Clone, Copy, Zeroable)]
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
    pub fn encode(x: [&Super<f32>; ABREAST], grid: &AffineGrid) -> [Self; ABREAST] {
        let subs = sub_blocks_of(x);
        let lanes = transposed(&subs);
        let mut squares = [0.0; LANES];
        for x in &lanes {
            for s in 0..LANES {
                squares[s] += x[s] * x[s];
            }
        }
        let rms: [f32; LANES] = each!(s: LANES => (squares[s] / 32.0).sqrt());
        let weights = each!(i: 32 => each!(s: LANES => rms[s] + lanes[i][s].abs()));
        let fits = fit_affine(&lanes, &weights, grid);
        let clipped = |levels: [u8; 8]| -> [u8; 8] { each!(j: 8 => levels[j].min(MAX_SCALE)) };
        each!(i: ABREAST => {
            let (d, scales) = share_of_max(&own(&fits.scales, i), MAX_SCALE);
            let (dmin, mins) = share_of_max(&own(&fits.mins, i), MAX_SCALE);
            let scales = ScalesAndMins8::pack(&clipped(scales), &clipped(mins));
            let searched = |j: usize| fits.levels(8 * i + j, &subs[8 * i + j]);
            Self::round(x[i], d, dmin, scales, grid.max_level, searched)
        })
    }

    /// Encodes with importance: it weighs each weight, and each sub-block's sum of it weighs
    /// the sub-block's scale and minimum in the choice of their units. Scales above `clip` are
    /// clipped; there are such where a degenerate sub-block has a negative scale.
    #[inline(always)] // as above
    pub fn encode_weighted(
        x: [&Super<f32>; ABREAST],
        importance: [&Super<f32>; ABREAST],
        max_level: u8,
        clip: u8,
    ) -> [Self; ABREAST] {
        let subs = sub_blocks_of(x);
        let (lanes, importance) = (transposed(&subs), transposed(&sub_blocks_of(importance)));
        let squares: [f32; ABREAST] = each!(i: ABREAST => sum_of_squares(x[i]));
        let variance: [f32; LANES] = each!(s: LANES => 2.0 * squares[s / 8] / SUPER_BLOCK as f32);
        let weights: [[f32; LANES]; 32] =
            each!(i: 32 => importance_weights(&lanes[i], &importance[i], &variance));
        let weight_sums = sum_of_lanes(&weights);
        let fits = fit_affine(&lanes, &weights, &AffineGrid::weighted(max_level));
        let clipped = |levels: [u8; 8]| -> [u8; 8] { each!(j: 8 => levels[j].min(clip)) };
        each!(i: ABREAST => {
            let weight_sums = own(&weight_sums, i);
            let (d, scales) = fit_scales(&own(&fits.scales, i), &weight_sums, MAX_SCALE);
            let (dmin, mins) = fit_scales(&own(&fits.mins, i), &weight_sums, MAX_SCALE);
            let (d, dmin) = (F16::from_f32(d), F16::from_f32(dmin));
            let scales = ScalesAndMins8::pack(&clipped(scales), &clipped(mins));
            let searched = |j: usize| fits.levels(8 * i + j, &subs[8 * i + j]);
            Self::round(x[i], d, dmin, scales, max_level, searched)
        })
    }

    /// Rounds the weights to the lines that the packed scales and minima draw. Where a scale
    /// came out as zero the `searched` levels stay: they decode to the same.
    #[inline(always)]
    fn round(
        x: &Super<f32>,
        d: F16,
        dmin: F16,
        scales: ScalesAndMins8,
        max_level: u8,
        searched: impl Fn(usize) -> [u8; 32],
    ) -> Self {
        let mut levels = [0; SUPER_BLOCK];
        let (scale_levels, min_levels) = scales.unpack();
        for (j, (x, levels)) in sub_blocks::<32>(x, &mut levels).enumerate() {
            let scale = d.to_f32() * f32::from(scale_levels[j]);
            let min = dmin.to_f32() * f32::from(min_levels[j]);
            *levels = match scale != 0.0 {
                true => round_to_line(x, scale, min, max_level),
                false => searched(j),
            };
        }
        Affine8 {
            d,
            dmin,
            scales,
            levels,
        }
    }
}

#[inline(always)]
fn sub_blocks_of(x: [&Super<f32>; ABREAST]) -> [[f32; 32]; LANES] {
    let subs: [&[[f32; 32]; 8]; ABREAST] = x.map(cast_ref);
    each!(s: LANES => subs[s / 8][s % 8])
}

/// Of the lanes those of super-block `i`.
#[inline(always)]
fn own(lanes: &[f32; LANES], i: usize) -> [f32; 8] {
    each!(j: 8 => lanes[8 * i + j])
}
