//! Q6_K: 6.5625 bits a weight.

use bytemuck::{Pod, Zeroable, cast_ref};

use super::pack::{pack_2_bits, pack_4_bits};
use super::{SUPER_BLOCK, Super, encode_each, round_to_scale, stripes_mut, sub_blocks};
use crate::quant::search::{NEGLIGIBLE, fit_symmetric, largest_magnitude, nearest_int, transposed};
use crate::quant::{Block, BlockType, Encode, F16};

/// 256 weights in sixteen sub-blocks of 16, each `d·scale·q` with `q` in `−32..32`.
///
/// A level is stored plus 32, in six bits.
///
/// ```text
///     0                               128                192       208 210
///     ┌────────────────────────────────┬──────────────────┬─────────┬──┐
///     │ ql: 2 × 64 bytes               │ qh: 2 × 32 bytes │ scales  │d │
///     └────────────────────────────────┴──────────────────┴─────────┴──┘
/// byte 64·h + l of ql     bits 7 6 5 4    3 2 1 0                l in 0..64
///        weight 128·h + l +         64          0     (low four bits)
/// byte 32·h + l of qh     bits 7 6    5 4    3 2    1 0          l in 0..32
///        weight 128·h + l +     96     64     32     0     (high two bits)
/// ```
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ6K {
    /// The levels' low four bits.
    pub ql: [u8; 128],
    /// The levels' high two bits.
    pub qh: [u8; 64],
    /// Scale of each sub-block.
    pub scales: [i8; 16],
    /// The unit of the scales.
    pub d: F16,
}

const _: () = assert!(size_of::<BlockQ6K>() == 210 && align_of::<BlockQ6K>() == 1);

/// Levels lie in `−HALF..HALF`.
const HALF: i8 = 32;

impl Block for BlockQ6K {
    const TYPE: BlockType = BlockType::Q6_K;
    const LEN: usize = SUPER_BLOCK;

    fn decode(&self, weights: &mut [f32]) {
        let d = self.d.to_f32();
        let (ql, _) = self.ql.as_chunks::<32>();
        let (qh, _) = self.qh.as_chunks::<32>();
        for (j, stripe) in stripes_mut(weights).iter_mut().enumerate() {
            let (h, k) = (j / 4, j % 4);
            let scales = [2 * j, 2 * j + 1].map(|i| d * f32::from(self.scales[i]));
            for (l, weight) in stripe.iter_mut().enumerate() {
                let low = ql[2 * h + k % 2][l] >> (4 * (k / 2)) & 15;
                let high = qh[h][l] >> (2 * k) & 3;
                *weight = scales[l / 16] * f32::from((low | high << 4) as i8 - HALF);
            }
        }
    }
}

impl Encode for BlockQ6K {
    #[inline(always)]
    fn encode_row(row: &[f32], importance: Option<&[f32]>, blocks: &mut [Self]) {
        encode_each(
            row,
            importance,
            blocks,
            #[inline(always)]
            |x, importance| match importance {
                // Without importance, large weights count more.
                None => Self::encode(x, &each!(i: SUPER_BLOCK => x[i] * x[i])),
                // With it, their size does not matter, unlike in the other types.
                Some(importance) => Self::encode(x, importance),
            },
        );
    }
}

impl BlockQ6K {
    #[inline(always)]
    fn encode(x: &Super<f32>, weights: &Super<f32>) -> Self {
        let (subs, weights): (&[[f32; 16]; 16], &[[f32; 16]; 16]) =
            (cast_ref(x), cast_ref(weights));
        let fits = fit_symmetric(&transposed(subs), &transposed(weights), HALF);
        let largest = largest_magnitude(&fits.scales);
        if largest.abs() < NEGLIGIBLE {
            return BlockQ6K::zeroed();
        }
        // The largest scale becomes −128, which has no positive counterpart.
        let per_unit = -128.0 / largest;
        let d = F16::from_f32(1.0 / per_unit);
        let scales: [i8; 16] =
            each!(i: 16 => nearest_int(per_unit * fits.scales[i]).min(127) as i8);
        let mut levels = [0; SUPER_BLOCK];
        for (j, (x, levels)) in sub_blocks::<16>(x, &mut levels).enumerate() {
            let scale = d.to_f32() * f32::from(scales[j]);
            *levels = match scale != 0.0 {
                true => round_to_scale(x, scale, HALF),
                false => fits.levels(j, x),
            };
        }
        let high = each!(i: SUPER_BLOCK => levels[i] >> 4);
        BlockQ6K {
            ql: pack_4_bits::<64>(&levels),
            qh: pack_2_bits(&high),
            scales,
            d,
        }
    }
}
