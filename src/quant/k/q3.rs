//! Q3_K: 3.4375 bits a weight.

use bytemuck::{Pod, Zeroable, cast_ref};

use super::pack::{Scales16, pack_2_bits, pack_bit};
use super::search::fit_by_descent;
use super::{SUPER_BLOCK, Super, encode_each, round_to_scale, stripes_mut, sub_blocks};
use crate::quant::search::{
    fit_symmetric, importance_weights, largest_magnitude, nearest_int, sum_of_lanes,
    sum_of_squares, transposed,
};
use crate::quant::{Block, BlockType, Encode, F16};

/// 256 weights in sixteen sub-blocks of 16, each `d·scale·q` with `q` in `−4..4`.
///
/// A level is stored plus 4, in three bits.
///
/// ```text
///     0            32                                 96        108 110
///     ┌────────────┬──────────────────────────────────┬──────────┬──┐
///     │ hmask      │ qs: 2 × 32 bytes                 │ scales   │d │
///     └────────────┴──────────────────────────────────┴──────────┴──┘
/// byte l of hmask         bit j: the third bit of weight 32·j + l
/// byte 32·h + l of qs     bits 7 6    5 4    3 2    1 0
///        weight 128·h + l +     96     64     32     0     (low two bits)
/// ```
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ3K {
    /// The levels' highest bits.
    pub hmask: [u8; 32],
    /// The levels' low two bits.
    pub qs: [u8; 64],
    /// Scale of each sub-block, 6 bits, signed.
    pub scales: Scales16,
    /// The unit of the scales.
    pub d: F16,
}

const _: () = assert!(size_of::<BlockQ3K>() == 110 && align_of::<BlockQ3K>() == 1);

/// Levels lie in `−HALF..HALF`.
const HALF: i8 = 4;
/// Scales lie in `−HALF_SCALE..HALF_SCALE`.
const HALF_SCALE: i8 = 32;

impl Block for BlockQ3K {
    const TYPE: BlockType = BlockType::Q3_K;
    const LEN: usize = SUPER_BLOCK;

    fn decode(&self, weights: &mut [f32]) {
        let d = self.d.to_f32();
        let scales = self.scales.unpack();
        let (qs, _) = self.qs.as_chunks::<32>();
        for (j, stripe) in stripes_mut(weights).iter_mut().enumerate() {
            let scales = [
                d * f32::from(scales[2 * j]),
                d * f32::from(scales[2 * j + 1]),
            ];
            for (l, weight) in stripe.iter_mut().enumerate() {
                let low = qs[j / 4][l] >> (2 * (j % 4)) & 3;
                let high = self.hmask[l] >> j & 1;
                *weight = scales[l / 16] * f32::from((low | high << 2) as i8 - HALF);
            }
        }
    }
}

impl Encode for BlockQ3K {
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

impl BlockQ3K {
    #[inline(always)]
    fn encode(x: &Super<f32>) -> Self {
        let (mut searched, mut scales) = ([0; SUPER_BLOCK], [0.0; 16]);
        for ((x, levels), scale) in sub_blocks::<16>(x, &mut searched).zip(&mut scales) {
            (*scale, *levels) = fit_by_descent(x, HALF);
        }
        let (searched, _) = searched.as_chunks();
        // The largest scale becomes −32, which has no positive counterpart.
        let largest = largest_magnitude(&scales);
        if largest == 0.0 {
            return Self::round(x, F16::from_f32(0.0), &[0; 16], |j| searched[j]);
        }
        let per_unit = f32::from(-HALF_SCALE) / largest;
        let stored = each!(i: 16 => {
            let scale = nearest_int(per_unit * scales[i]) as i8;
            (scale.clamp(-HALF_SCALE, HALF_SCALE - 1) + HALF_SCALE) as u8
        });
        Self::round(x, F16::from_f32(1.0 / per_unit), &stored, |j| searched[j])
    }

    #[inline(always)]
    fn encode_weighted(x: &Super<f32>, importance: &Super<f32>) -> Self {
        let (subs, importance): (&[[f32; 16]; 16], &[[f32; 16]; 16]) =
            (cast_ref(x), cast_ref(importance));
        let variance = [2.0 * sum_of_squares(x) / SUPER_BLOCK as f32; 16];
        let (lanes, importance) = (transposed(subs), transposed(importance));
        let weights = each!(i: 16 => importance_weights(&lanes[i], &importance[i], &variance));
        let fits = fit_symmetric(&lanes, &weights, HALF);
        // The scales are one group.
        let units = fit_symmetric(
            &transposed(&[fits.scales]),
            &transposed(&[sum_of_lanes(&weights)]),
            HALF_SCALE,
        );
        let stored = units.levels(0, &fits.scales);
        Self::round(x, F16::from_f32(units.scales[0]), &stored, |j| {
            fits.levels(j, &subs[j])
        })
    }

    /// Rounds the weights to multiples of the rounded scales. Where a scale came out as zero
    /// the `searched` levels stay: they decode to the same.
    #[inline(always)]
    fn round(
        x: &Super<f32>,
        d: F16,
        stored: &[u8; 16],
        searched: impl Fn(usize) -> [u8; 16],
    ) -> Self {
        let scales = Scales16::pack(stored);
        let mut levels = [0; SUPER_BLOCK];
        for (j, (x, levels)) in sub_blocks::<16>(x, &mut levels).enumerate() {
            let scale = d.to_f32() * f32::from(scales.get(j));
            *levels = match scale != 0.0 {
                true => round_to_scale(x, scale, HALF),
                false => searched(j),
            };
        }
        BlockQ3K {
            hmask: pack_bit(&levels, 2),
            qs: pack_2_bits(&levels),
            scales,
            d,
        }
    }
}
