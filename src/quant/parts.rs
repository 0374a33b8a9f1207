//! Blocks taken apart into scales and levels, and put together again: for encoders that choose
//! these otherwise than ggml does.
//!
//! In all these types a weight is `scale · value[level] − min`, with one scale (and one minimum, or none)
//! for each sub-block. [`Grid`] says what a type allows, [`Parts`] holds a block's choice.

use bytemuck::{Zeroable, pod_read_unaligned};

use super::k::{pack_2_bits, pack_4_bits, pack_bit};
use super::legacy::{pack_fifth_bits, pack_nibbles};
use super::{
    BlockIQ4NL, BlockIQ4XS, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1,
    BlockQ5K, BlockQ6K, BlockType, F16, IQ4_VALUES, Scales16, ScalesAndMins8,
};

/// Most weights of a block, and most sub-blocks.
const MOST: (usize, usize) = (256, 16);

/// What the blocks of a type can hold.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    /// What the levels `0..values.len()` stand for, in ascending order.
    pub values: &'static [f32],
    /// Weights that share a scale.
    pub sub: usize,
    /// How scales are kept.
    pub scales: Scales,
    /// Whether there are minima.
    pub mins: bool,
}

/// How the scales of a type's sub-blocks are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scales {
    /// The block is one sub-block: `d` is its scale and `dmin` its minimum, of either sign.
    Own,
    /// `d` times a whole number of this range; minima are `dmin` times one from 0 to 63.
    Shared {
        /// The lowest.
        low: i8,
        /// The highest.
        high: i8,
    },
}

/// A block's scales and levels. Of the arrays as much is in use as the type's blocks have.
#[derive(Clone, Copy, Debug)]
pub struct Parts {
    /// The scale, or the unit of the scales.
    pub d: F16,
    /// The minimum, or the unit of the minima.
    pub dmin: F16,
    /// Each sub-block's scale, in units of `d`; 1 where there is but one.
    pub scales: [i8; MOST.1],
    /// Each sub-block's minimum, in units of `dmin`; 1 where there is but one, 0 in types without.
    pub mins: [u8; MOST.1],
    /// Each weight's index into [`Grid::values`].
    pub levels: [u8; MOST.0],
}

const fn whole<const N: usize>(first: i32) -> [f32; N] {
    let mut values = [0.0; N];
    let mut i = 0;
    while i < N {
        values[i] = (first + i as i32) as f32;
        i += 1;
    }
    values
}

static FOUR_BITS: [f32; 16] = whole(0);
static FOUR_BITS_SIGNED: [f32; 16] = whole(-8);
static FIVE_BITS: [f32; 32] = whole(0);
static FIVE_BITS_SIGNED: [f32; 32] = whole(-16);
static THREE_BITS_SIGNED: [f32; 8] = whole(-4);
static SIX_BITS_SIGNED: [f32; 64] = whole(-32);

static IQ4: [f32; 16] = {
    let mut values = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        values[i] = IQ4_VALUES[i] as f32;
        i += 1;
    }
    values
};

impl Grid {
    /// The grid of a type; `None` for those that are not taken apart (floats, 8 bits, Q2_K, MXFP4).
    pub fn of(kind: BlockType) -> Option<Grid> {
        let own = |values: &'static [f32], mins| Grid {
            values,
            sub: 32,
            scales: Scales::Own,
            mins,
        };
        let shared = |values: &'static [f32], sub, low, high, mins| Grid {
            values,
            sub,
            scales: Scales::Shared { low, high },
            mins,
        };
        Some(match kind {
            BlockType::Q4_0 => own(&FOUR_BITS_SIGNED, false),
            BlockType::Q4_1 => own(&FOUR_BITS, true),
            BlockType::Q5_0 => own(&FIVE_BITS_SIGNED, false),
            BlockType::Q5_1 => own(&FIVE_BITS, true),
            BlockType::IQ4_NL => own(&IQ4, false),
            BlockType::Q3_K => shared(&THREE_BITS_SIGNED, 16, -32, 31, false),
            BlockType::Q4_K => shared(&FOUR_BITS, 32, 0, 63, true),
            BlockType::Q5_K => shared(&FIVE_BITS, 32, 0, 63, true),
            BlockType::Q6_K => shared(&SIX_BITS_SIGNED, 16, -128, 127, false),
            BlockType::IQ4_XS => shared(&IQ4, 32, -32, 31, false),
            _ => return None,
        })
    }

    /// The level whose value is nearest to `x`; of two as near the lower. A NaN gets some level.
    #[inline(always)]
    pub fn nearest(&self, x: f32) -> u8 {
        let top = self.values.len() - 1;
        if self.values[1] - self.values[0] == 1.0 {
            // Ties to even, as ggml rounds: no matter, since a tie is as far either way.
            let level = (x - self.values[0]).round_ties_even();
            return level.clamp(0.0, top as f32) as u8;
        }
        let above = |pair: &[f32]| u8::from(x > 0.5 * (pair[0] + pair[1]));
        self.values.windows(2).map(above).sum()
    }
}

impl Parts {
    /// Takes apart one block of `kind`.
    ///
    /// # Panics
    /// If there is no [`Grid`] of the type, or `bytes` is not one block.
    pub fn of(kind: BlockType, bytes: &[u8]) -> Self {
        let grid = Grid::of(kind).expect("a type that is taken apart");
        let mut parts = Self {
            d: F16::default(),
            dmin: F16::default(),
            scales: [1; MOST.1],
            mins: [u8::from(grid.mins); MOST.1],
            levels: [0; MOST.0],
        };
        let negative = |m: F16| F16::from_f32(-m.to_f32());
        match kind {
            BlockType::Q4_0 => parts.d = pod_read_unaligned::<BlockQ4_0>(bytes).d,
            BlockType::Q5_0 => parts.d = pod_read_unaligned::<BlockQ5_0>(bytes).d,
            BlockType::IQ4_NL => parts.d = pod_read_unaligned::<BlockIQ4NL>(bytes).d,
            BlockType::Q4_1 => {
                let block: BlockQ4_1 = pod_read_unaligned(bytes);
                (parts.d, parts.dmin) = (block.d, negative(block.m));
            }
            BlockType::Q5_1 => {
                let block: BlockQ5_1 = pod_read_unaligned(bytes);
                (parts.d, parts.dmin) = (block.d, negative(block.m));
            }
            BlockType::Q3_K => {
                let block: BlockQ3K = pod_read_unaligned(bytes);
                (parts.d, parts.scales) = (block.d, block.scales.unpack());
            }
            BlockType::Q4_K => {
                let block: BlockQ4K = pod_read_unaligned(bytes);
                parts.set_affine(block.d, block.dmin, &block.scales);
            }
            BlockType::Q5_K => {
                let block: BlockQ5K = pod_read_unaligned(bytes);
                parts.set_affine(block.d, block.dmin, &block.scales);
            }
            BlockType::Q6_K => {
                let block: BlockQ6K = pod_read_unaligned(bytes);
                (parts.d, parts.scales) = (block.d, block.scales);
            }
            _ => {
                let block: BlockIQ4XS = pod_read_unaligned(bytes);
                parts.d = block.d;
                for (i, scale) in parts.scales[..8].iter_mut().enumerate() {
                    *scale = block.scale(i) as i8;
                }
            }
        }
        // A decoded weight lies on the grid, whose nearest point is so itself.
        let mut weights = [0.0; MOST.0];
        let weights = &mut weights[..kind.block_len()];
        kind.decode_row(bytes, weights);
        for (i, (level, weight)) in parts.levels.iter_mut().zip(weights).enumerate() {
            let (scale, min) = (parts.d.to_f32() * f32::from(parts.scales[i / grid.sub]), {
                parts.dmin.to_f32() * f32::from(parts.mins[i / grid.sub])
            });
            *level = grid.nearest((*weight + min) / scale);
        }
        parts
    }

    fn set_affine(&mut self, d: F16, dmin: F16, packed: &ScalesAndMins8) {
        (self.d, self.dmin) = (d, dmin);
        let (scales, mins) = packed.unpack();
        self.scales[..8].copy_from_slice(&scales.map(|scale| scale as i8));
        self.mins[..8].copy_from_slice(&mins);
    }

    /// Puts a block of `kind` together.
    ///
    /// # Panics
    /// As [`Parts::of`].
    pub fn write(&self, kind: BlockType, bytes: &mut [u8]) {
        let Self { d, dmin, .. } = *self;
        let all = &self.levels;
        let few: &[u8; 32] = all.first_chunk().expect("a block has 32 levels");
        let m = F16::from_f32(-dmin.to_f32());
        let first = |scales: &[i8; MOST.1]| -> [u8; 8] { std::array::from_fn(|i| scales[i] as u8) };
        let affine = || {
            let mins = std::array::from_fn(|i| self.mins[i]);
            ScalesAndMins8::pack(&first(&self.scales), &mins)
        };
        let qs = pack_nibbles(few);
        match kind {
            BlockType::Q4_0 => bytes.copy_from_slice(bytemuck::bytes_of(&BlockQ4_0 { d, qs })),
            BlockType::IQ4_NL => bytes.copy_from_slice(bytemuck::bytes_of(&BlockIQ4NL { d, qs })),
            BlockType::Q4_1 => {
                bytes.copy_from_slice(bytemuck::bytes_of(&BlockQ4_1 { d, m, qs }));
            }
            BlockType::Q5_0 => {
                let qh = pack_fifth_bits(few);
                bytes.copy_from_slice(bytemuck::bytes_of(&BlockQ5_0 { d, qh, qs }));
            }
            BlockType::Q5_1 => {
                let qh = pack_fifth_bits(few);
                bytes.copy_from_slice(bytemuck::bytes_of(&BlockQ5_1 { d, m, qh, qs }));
            }
            BlockType::Q3_K => bytes.copy_from_slice(bytemuck::bytes_of(&BlockQ3K {
                hmask: pack_bit(all, 2),
                qs: pack_2_bits(all),
                scales: Scales16::pack(&self.scales.map(|scale| (scale + 32) as u8)),
                d,
            })),
            BlockType::Q4_K => bytes.copy_from_slice(bytemuck::bytes_of(&BlockQ4K {
                d,
                dmin,
                scales: affine(),
                qs: pack_4_bits::<32>(all),
            })),
            BlockType::Q5_K => bytes.copy_from_slice(bytemuck::bytes_of(&BlockQ5K {
                d,
                dmin,
                scales: affine(),
                qh: pack_bit(all, 4),
                qs: pack_4_bits::<32>(all),
            })),
            BlockType::Q6_K => bytes.copy_from_slice(bytemuck::bytes_of(&BlockQ6K {
                ql: pack_4_bits::<64>(all),
                qh: pack_2_bits(&all.map(|level| level >> 4)),
                scales: self.scales,
                d,
            })),
            BlockType::IQ4_XS => {
                let mut block = BlockIQ4XS {
                    d,
                    ..Zeroable::zeroed()
                };
                let mut high = 0_u16;
                for i in 0..8 {
                    let bits = (self.scales[i] + 32) as u8;
                    block.scales_l[i / 2] |= (bits & 15) << (4 * (i % 2));
                    high |= u16::from(bits >> 4) << (2 * i);
                    let (groups, _) = all.as_chunks::<32>();
                    block.qs[i] = pack_nibbles(&groups[i]);
                }
                block.scales_h = high.to_le_bytes();
                bytes.copy_from_slice(bytemuck::bytes_of(&block));
            }
            _ => panic!("{kind} blocks are not taken apart"),
        }
    }
}
