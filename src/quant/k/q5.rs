//! Q5_K: 5.5 bits a weight.

use bytemuck::{Pod, Zeroable};

use super::affine::{Affine8, MAX_SCALE};
use super::pack::{ScalesAndMins8, pack_4_bits, pack_bit};
use super::search::{AffineGrid, Cost};
use super::{ABREAST, SUPER_BLOCK, encode_abreast, stripes_mut};
use crate::quant::{Block, BlockType, Encode, F16};

/// 256 weights in eight sub-blocks of 32, each `d·scale·q − dmin·min` with `q` in `0..32`.
///
/// ```text
///     0  2    4         16           48                                   176
///     ┌──┬────┬─────────┬────────────┬──────────────────────────────────────┐
///     │d │dmin│ scales  │ qh: 32 b.  │ qs: 4 × 32 bytes                     │
///     └──┴────┴─────────┴────────────┴──────────────────────────────────────┘
/// byte 32·p + l of qs     bits 7 6 5 4              3 2 1 0
///                         weight 64·p + 32 + l      weight 64·p + l         (low four bits)
/// byte l of qh            bit j: the fifth bit of weight 32·j + l
/// ```
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5K {
    /// The unit of the scales.
    pub d: F16,
    /// The unit of the minima.
    pub dmin: F16,
    /// Scale and minimum of each sub-block, 6 bits each.
    pub scales: ScalesAndMins8,
    /// The levels' highest bits.
    pub qh: [u8; 32],
    /// The levels' low four bits.
    pub qs: [u8; 128],
}

const _: () = assert!(size_of::<BlockQ5K>() == 176 && align_of::<BlockQ5K>() == 1);

/// The slopes tried where there is no importance.
const GRID: AffineGrid = AffineGrid {
    max_level: 31,
    first: -0.5,
    step: 0.1,
    last: 15,
    cost: Cost::Squared,
    saturate: false,
};

impl Block for BlockQ5K {
    const TYPE: BlockType = BlockType::Q5_K;
    const LEN: usize = SUPER_BLOCK;

    fn decode(&self, weights: &mut [f32]) {
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        let (scales, mins) = self.scales.unpack();
        let (qs, _) = self.qs.as_chunks::<32>();
        for (j, stripe) in stripes_mut(weights).iter_mut().enumerate() {
            let (scale, min) = (d * f32::from(scales[j]), dmin * f32::from(mins[j]));
            for ((weight, byte), high) in stripe.iter_mut().zip(qs[j / 2]).zip(self.qh) {
                let q = byte >> (4 * (j % 2)) & 15 | (high >> j & 1) << 4;
                *weight = scale * f32::from(q) - min;
            }
        }
    }
}

impl Encode for BlockQ5K {
    #[inline(always)]
    fn encode_row(row: &[f32], importance: Option<&[f32]>, blocks: &mut [Self]) {
        encode_abreast(
            row,
            importance,
            blocks,
            #[inline(always)]
            |x, importance| {
                let encoded = match importance {
                    None => Affine8::encode(x, &GRID),
                    Some(importance) => {
                        Affine8::encode_weighted(x, importance, GRID.max_level, MAX_SCALE)
                    }
                };
                each!(i: ABREAST => BlockQ5K {
                    d: encoded[i].d,
                    dmin: encoded[i].dmin,
                    scales: encoded[i].scales,
                    qh: pack_bit(&encoded[i].levels, 4),
                    qs: pack_4_bits::<32>(&encoded[i].levels),
                })
            },
        );
    }
}
