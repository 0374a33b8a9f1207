//! Q4_K: 4.5 bits a weight.

use bytemuck::{Pod, Zeroable};

use super::affine::Affine8;
use super::pack::{ScalesAndMins8, pack_4_bits};
use super::search::{AffineGrid, Cost};
use super::{ABREAST, SUPER_BLOCK, encode_abreast, stripes_mut};
use crate::quant::{Block, BlockType, Encode, F16};

/// 256 weights in eight sub-blocks of 32, each `d·scale·q − dmin·min` with `q` in `0..16`.
///
/// ```text
///     0  2    4         16                                    144
///     ┌──┬────┬─────────┬──────────────────────────────────────┐
///     │d │dmin│ scales  │ qs: 4 × 32 bytes                     │
///     └──┴────┴─────────┴──────────────────────────────────────┘
/// byte 32·p + l of qs     bits 7 6 5 4              3 2 1 0
///                         weight 64·p + 32 + l      weight 64·p + l
/// ```
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4K {
    /// The unit of the scales.
    pub d: F16,
    /// The unit of the minima.
    pub dmin: F16,
    /// Scale and minimum of each sub-block, 6 bits each.
    pub scales: ScalesAndMins8,
    /// The levels.
    pub qs: [u8; 128],
}

const _: () = assert!(size_of::<BlockQ4K>() == 144 && align_of::<BlockQ4K>() == 1);

/// The slopes tried where there is no importance.
const GRID: AffineGrid = AffineGrid {
    max_level: 15,
    first: -1.0,
    step: 0.1,
    last: 20,
    cost: Cost::Squared,
    saturate: false,
};

impl Block for BlockQ4K {
    const TYPE: BlockType = BlockType::Q4_K;
    const LEN: usize = SUPER_BLOCK;

    fn decode(&self, weights: &mut [f32]) {
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        let (scales, mins) = self.scales.unpack();
        let (qs, _) = self.qs.as_chunks::<32>();
        for (j, stripe) in stripes_mut(weights).iter_mut().enumerate() {
            let (scale, min) = (d * f32::from(scales[j]), dmin * f32::from(mins[j]));
            for (weight, byte) in stripe.iter_mut().zip(qs[j / 2]) {
                let q = byte >> (4 * (j % 2)) & 15;
                *weight = scale * f32::from(q) - min;
            }
        }
    }
}

impl Encode for BlockQ4K {
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
                        Affine8::encode_weighted(x, importance, GRID.max_level, u8::MAX)
                    }
                };
                each!(i: ABREAST => BlockQ4K {
                    d: encoded[i].d,
                    dmin: encoded[i].dmin,
                    scales: encoded[i].scales,
                    qs: pack_4_bits::<32>(&encoded[i].levels),
                })
            },
        );
    }
}
