//! Q2_K: 2.625 bits a weight.

use bytemuck::{Pod, Zeroable, cast_ref};

use super::pack::pack_2_bits;
use super::search::{AffineGrid, Cost, fit_affine, fit_scales};
use super::{
    SUPER_BLOCK, Super, encode_each, round_to_line, share_of_max, stripes_mut, sub_blocks,
};
use crate::quant::search::{importance_weights, sum_of_lanes, sum_of_squares, transposed};
use crate::quant::{Block, BlockType, Encode, F16};

/// 256 weights in sixteen sub-blocks of 16, each `d·scale·q − dmin·min` with `q` in `0..4`.
///
/// ```text
///     0              16                                 80 82   84
///     ┌──────────────┬──────────────────────────────────┬──┬────┐
///     │ scales       │ qs: 2 × 32 bytes                 │d │dmin│
///     └──────────────┴──────────────────────────────────┴──┴────┘
/// byte i of scales        bits 7 6 5 4    3 2 1 0
///                         min i           scale i
/// byte 32·h + l of qs     bits 7 6    5 4    3 2    1 0
///        weight 128·h + l +     96     64     32     0
/// ```
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ2K {
    /// Scale (low) and minimum (high) of each sub-block, 4 bits each.
    pub scales: [u8; 16],
    /// The levels.
    pub qs: [u8; 64],
    /// The unit of the scales.
    pub d: F16,
    /// The unit of the minima.
    pub dmin: F16,
}

const _: () = assert!(size_of::<BlockQ2K>() == 84 && align_of::<BlockQ2K>() == 1);

/// The highest 4-bit scale or minimum.
const MAX_SCALE: u8 = 15;

/// The slopes tried where there is no importance.
const GRID: AffineGrid = AffineGrid {
    max_level: 3,
    first: -0.5,
    step: 0.1,
    last: 15,
    cost: Cost::Absolute,
    saturate: false,
};

impl Block for BlockQ2K {
    const TYPE: BlockType = BlockType::Q2_K;
    const LEN: usize = SUPER_BLOCK;

    fn decode(&self, weights: &mut [f32]) {
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        let (qs, _) = self.qs.as_chunks::<32>();
        for (j, stripe) in stripes_mut(weights).iter_mut().enumerate() {
            let halves = stripe.as_chunks_mut::<16>().0.iter_mut();
            let bytes = qs[j / 4].as_chunks::<16>().0;
            for ((half, bytes), packed) in halves.zip(bytes).zip(&self.scales[2 * j..]) {
                let (scale, min) = (d * f32::from(packed & 15), dmin * f32::from(packed >> 4));
                for (weight, byte) in half.iter_mut().zip(bytes) {
                    let q = byte >> (2 * (j % 4)) & 3;
                    *weight = scale * f32::from(q) - min;
                }
            }
        }
    }
}

impl Encode for BlockQ2K {
    #[inline(always)]
    fn encode_row(row: &[f32], importance: Option<&[f32]>, blocks: &mut [Self]) {
        encode_each(
            row,
            importance,
            blocks,
            #[inline(always)]
            |x, importance| match importance {
                None => Self::encode(x),
                Some(importance) => Self::encode_weighted(x, importance),
            },
        );
    }
}

impl BlockQ2K {
    #[inline(always)]
    fn encode(x: &Super<f32>) -> Self {
        let subs: &[[f32; 16]; 16] = cast_ref(x);
        let lanes = transposed(subs);
        let weights = each!(i: 16 => each!(s: 16 => lanes[i][s].abs()));
        let fits = fit_affine(&lanes, &weights, &GRID);
        let (d, scales) = share_of_max(&fits.scales, MAX_SCALE);
        let (dmin, mins) = share_of_max(&fits.mins, MAX_SCALE);
        Self::round(x, d, dmin, &scales, &mins, |j| fits.levels(j, &subs[j]))
    }

    #[inline(always)]
    fn encode_weighted(x: &Super<f32>, importance: &Super<f32>) -> Self {
        let (subs, importance): (&[[f32; 16]; 16], &[[f32; 16]; 16]) =
            (cast_ref(x), cast_ref(importance));
        let variance = [sum_of_squares(x) / SUPER_BLOCK as f32; 16];
        let (lanes, importance) = (transposed(subs), transposed(importance));
        let weights: [[f32; 16]; 16] =
            each!(i: 16 => importance_weights(&lanes[i], &importance[i], &variance));
        let weight_sums = sum_of_lanes(&weights);
        let fits = fit_affine(&lanes, &weights, &AffineGrid::weighted(GRID.max_level));
        let (d, scales) = fit_scales(&fits.scales, &weight_sums, MAX_SCALE);
        let (dmin, mins) = fit_scales(&fits.mins, &weight_sums, MAX_SCALE);
        let (d, dmin) = (F16::from_f32(d), F16::from_f32(dmin));
        Self::round(x, d, dmin, &scales, &mins, |j| fits.levels(j, &subs[j]))
    }

    /// Rounds the weights to the lines that the rounded scales and minima draw. Where a scale
    /// came out as zero the `searched` levels stay: they decode to the same.
    #[inline(always)]
    fn round(
        x: &Super<f32>,
        d: F16,
        dmin: F16,
        scales: &[u8; 16],
        mins: &[u8; 16],
        searched: impl Fn(usize) -> [u8; 16],
    ) -> Self {
        let mut levels = [0; SUPER_BLOCK];
        let packed: [u8; 16] = each!(i: 16 => scales[i] | mins[i] << 4);
        for (j, (x, levels)) in sub_blocks::<16>(x, &mut levels).enumerate() {
            let packed = packed[j];
            let scale = d.to_f32() * f32::from(packed & 15);
            let min = dmin.to_f32() * f32::from(packed >> 4);
            *levels = match scale != 0.0 {
                true => round_to_line(x, scale, min, GRID.max_level),
                false => searched(j),
            };
        }
        BlockQ2K {
            scales: packed,
            qs: pack_2_bits(&levels),
            d,
            dmin,
        }
    }
}
