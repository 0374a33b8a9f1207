//! Codes and scales as NEON's kernels take them, type by type.
//!
//! A code is signed. For some types it is cheaper to leave it too large or too small by a
//! constant ([`Codes::OFFSET`]), which is then taken off a sum of products by way of the sum of
//! the activations.
//!
//! Where a level's topmost bit is stored apart from the others, `sli` puts a mask of ones above
//! them if the bit is clear: that is the two's complement of the level less the bit's worth.

use std::arch::aarch64::*;

use super::{load, load_f32, load_i8, load_u8, widen_halves};
use crate::quant::{
    Block, BlockIQ4NL, BlockIQ4XS, BlockMXFP4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K,
    BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, F16, IQ4_VALUES, MXFP4_DOUBLED,
};

/// A block, or a super-block, of which 32 codes at a time are made into two registers.
pub(super) trait Codes: Block {
    /// The codes are this much too large.
    const OFFSET: i8 = 0;

    /// The codes of columns `32·stripe..32·stripe + 32`, in order.
    ///
    /// # Safety
    /// The CPU has NEON.
    unsafe fn codes(&self, stripe: usize) -> [int8x16_t; 2];
}

/// A block of 32 weights with a scale and, perhaps, a minimum.
pub(super) trait SmallBlock: Codes {
    /// Whether there is a minimum.
    const MINIMUM: bool = false;

    /// The scales of four blocks.
    ///
    /// # Safety
    /// The CPU has NEON.
    unsafe fn scales(four: [&Self; 4]) -> float32x4_t;

    /// The minima of four blocks, negative.
    ///
    /// # Safety
    /// The CPU has NEON.
    unsafe fn offsets(_four: [&Self; 4]) -> float32x4_t {
        // SAFETY: the caller's.
        unsafe { vdupq_n_f32(0.0) }
    }
}

/// A block of 256 weights with scales (and, perhaps, minima) in units of its own.
pub(super) trait SuperBlock: Codes {
    /// Whether there are minima.
    const MINIMA: bool = false;

    /// The unit of the scales.
    fn d(&self) -> F16;

    /// The unit of the minima.
    fn dmin(&self) -> F16 {
        F16::default()
    }

    /// The scales and the minima: of each 16 columns, or of each 32 in the lower half.
    ///
    /// # Safety
    /// The CPU has NEON.
    unsafe fn scales_and_minima(&self) -> (int8x16_t, int8x16_t);
}

load! {
    load_pair: [u8; 32] => uint8x16x2_t, vld1q_u8_x2;
    load_signed_pair: [i8; 32] => int8x16x2_t, vld1q_s8_x2;
}

/// 32 bytes in two registers.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn halves(bytes: &[i8; 32]) -> [int8x16_t; 2] {
    let pair = load_signed_pair(bytes);
    [pair.0, pair.1]
}

/// Stripe `index` of packed bytes, 32 to a stripe.
#[inline]
#[target_feature(enable = "neon")]
fn stripe(bytes: &[u8], index: usize) -> [uint8x16_t; 2] {
    let pair = load_pair(&bytes.as_chunks().0[index]);
    [pair.0, pair.1]
}

/// `bytes` shifted by `places` to the right.
#[inline]
#[target_feature(enable = "neon")]
fn shifted(bytes: uint8x16_t, places: usize) -> uint8x16_t {
    vshlq_u8(bytes, vdupq_n_s8(-(places as i8)))
}

/// The bits of `mask` of each byte, after a shift by `places` to the right.
#[inline]
#[target_feature(enable = "neon")]
fn bits([a, b]: [uint8x16_t; 2], places: usize, mask: u8) -> [uint8x16_t; 2] {
    let bits = |bytes| {
        let bytes = match places {
            0 => bytes,
            _ => shifted(bytes, places),
        };
        match mask == 0xff >> places {
            true => bytes,
            false => vandq_u8(bytes, vdupq_n_u8(mask)),
        }
    };
    [bits(a), bits(b)]
}

#[inline]
#[target_feature(enable = "neon")]
fn signed([a, b]: [uint8x16_t; 2]) -> [int8x16_t; 2] {
    [vreinterpretq_s8_u8(a), vreinterpretq_s8_u8(b)]
}

/// 32 levels of four bits: the low nibbles of 16 bytes, then the high ones.
#[inline]
#[target_feature(enable = "neon")]
fn nibbles(qs: &[u8; 16]) -> [uint8x16_t; 2] {
    let qs = load_u8(qs);
    [vandq_u8(qs, vdupq_n_u8(15)), vshrq_n_u8::<4>(qs)]
}

/// What four bits stand for in a table.
#[inline]
#[target_feature(enable = "neon")]
fn look_up(table: &[i8; 16], [a, b]: [uint8x16_t; 2]) -> [int8x16_t; 2] {
    let table = load_i8(table);
    [vqtbl1q_s8(table, a), vqtbl1q_s8(table, b)]
}

/// Levels of four bits and a fifth, less 16: bit `j` of `qh` belongs to column `j`.
#[inline]
#[target_feature(enable = "neon")]
fn five_bits(qh: [u8; 4], qs: &[u8; 16]) -> [int8x16_t; 2] {
    let clear = vreinterpretq_u8_u32(vdupq_n_u32(!u32::from_le_bytes(qh)));
    let bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201));
    let [low, high] = nibbles(qs);
    let spread = |first: u64| {
        let index = vcombine_u8(
            vcreate_u8(first * 0x0101_0101_0101_0101),
            vcreate_u8((first + 1) * 0x0101_0101_0101_0101),
        );
        vtstq_u8(vqtbl1q_u8(clear, index), bit)
    };
    signed([
        vsliq_n_u8::<4>(low, spread(0)),
        vsliq_n_u8::<4>(high, spread(2)),
    ])
}

/// All ones in each byte whose bit `bit` is clear.
#[inline]
#[target_feature(enable = "neon")]
fn clear_bits([a, b]: [uint8x16_t; 2], bit: usize) -> [uint8x16_t; 2] {
    let bit = vdupq_n_u8(1 << bit);
    [vtstq_u8(vmvnq_u8(a), bit), vtstq_u8(vmvnq_u8(b), bit)]
}

/// Puts `masks` above the lowest `KEPT` bits of each byte.
#[inline]
#[target_feature(enable = "neon")]
fn below<const KEPT: i32>(masks: [uint8x16_t; 2], bytes: [uint8x16_t; 2]) -> [int8x16_t; 2] {
    signed([
        vsliq_n_u8::<KEPT>(bytes[0], masks[0]),
        vsliq_n_u8::<KEPT>(bytes[1], masks[1]),
    ])
}

/// Four lower bits and two upper ones, which come in their place.
#[inline]
#[target_feature(enable = "neon")]
fn six_bits(low: [uint8x16_t; 2], high: [uint8x16_t; 2]) -> [int8x16_t; 2] {
    signed([vorrq_u8(low[0], high[0]), vorrq_u8(low[1], high[1])])
}

/// The two bits of stripe `k` of four that share bytes, four places up.
#[inline]
#[target_feature(enable = "neon")]
fn upper_two([a, b]: [uint8x16_t; 2], k: usize) -> [uint8x16_t; 2] {
    let (places, mask) = (vdupq_n_s8(4 - 2 * k as i8), vdupq_n_u8(0x30));
    [
        vandq_u8(vshlq_u8(a, places), mask),
        vandq_u8(vshlq_u8(b, places), mask),
    ]
}

macro_rules! codes {
    ($($block:ty $(, less $offset:literal)?, |$b:ident, $j:ident| $codes:expr;)*) => {$(
        impl Codes for $block {
            $(const OFFSET: i8 = $offset;)?

            #[inline]
            #[target_feature(enable = "neon")]
            unsafe fn codes(&self, $j: usize) -> [int8x16_t; 2] {
                let $b = self;
                $codes
            }
        }
    )*};
}

codes! {
    BlockQ4_0, less 8, |b, _j| signed(nibbles(&b.qs));
    BlockQ4_1, |b, _j| signed(nibbles(&b.qs));
    BlockQ5_0, |b, _j| five_bits(b.qh, &b.qs);
    BlockQ5_1, less -16, |b, _j| five_bits(b.qh, &b.qs);
    BlockQ8_0, |b, _j| halves(&b.qs);
    BlockIQ4NL, |b, _j| look_up(&IQ4_VALUES, nibbles(&b.qs));
    BlockMXFP4, |b, _j| look_up(&MXFP4_DOUBLED, nibbles(&b.qs));
    BlockQ2K, |b, j| signed(bits(stripe(&b.qs, j / 4), j % 4 * 2, 3));
    BlockQ3K, |b, j| below::<2>(
        clear_bits(stripe(&b.hmask, 0), j),
        bits(stripe(&b.qs, j / 4), j % 4 * 2, 3)
    );
    BlockQ4K, |b, j| signed(bits(stripe(&b.qs, j / 2), j % 2 * 4, 15));
    BlockQ5K, less -16, |b, j| below::<4>(
        clear_bits(stripe(&b.qh, 0), j),
        bits(stripe(&b.qs, j / 2), j % 2 * 4, 15)
    );
    BlockQ6K, less 32, |b, j| six_bits(
        bits(stripe(&b.ql, j / 4 * 2 + j % 2), j % 4 / 2 * 4, 15),
        upper_two(stripe(&b.qh, j / 4), j % 4)
    );
    BlockIQ4XS, |b, j| look_up(&IQ4_VALUES, nibbles(&b.qs[j]));
}

macro_rules! small_block {
    ($($block:ty, |$a:ident, $b:ident, $c:ident, $d:ident| $scales:expr
        $(, offsets $offsets:expr)?;)*) => {$(
        impl SmallBlock for $block {
            #[inline]
            #[target_feature(enable = "neon")]
            unsafe fn scales([$a, $b, $c, $d]: [&Self; 4]) -> float32x4_t {
                $scales
            }

            $(
                const MINIMUM: bool = true;

                #[inline]
                #[target_feature(enable = "neon")]
                unsafe fn offsets([$a, $b, $c, $d]: [&Self; 4]) -> float32x4_t {
                    $offsets
                }
            )?
        }
    )*};
}

small_block! {
    BlockQ4_0, |a, b, c, d| widen_halves([a.d, b.d, c.d, d.d]);
    BlockQ4_1, |a, b, c, d| widen_halves([a.d, b.d, c.d, d.d]), offsets widen_halves([a.m, b.m, c.m, d.m]);
    BlockQ5_0, |a, b, c, d| widen_halves([a.d, b.d, c.d, d.d]);
    BlockQ5_1, |a, b, c, d| widen_halves([a.d, b.d, c.d, d.d]), offsets widen_halves([a.m, b.m, c.m, d.m]);
    BlockQ8_0, |a, b, c, d| widen_halves([a.d, b.d, c.d, d.d]);
    BlockIQ4NL, |a, b, c, d| widen_halves([a.d, b.d, c.d, d.d]);
    BlockMXFP4, |a, b, c, d| load_f32(&[a.scale(), b.scale(), c.scale(), d.scale()]);
}

macro_rules! super_block {
    ($($block:ty $(, minima $dmin:ident)?, |$b:ident| $scales:expr;)*) => {$(
        impl SuperBlock for $block {
            #[inline]
            fn d(&self) -> F16 {
                self.d
            }

            $(
                const MINIMA: bool = true;

                #[inline]
                fn dmin(&self) -> F16 {
                    self.$dmin
                }
            )?

            #[inline]
            #[target_feature(enable = "neon")]
            unsafe fn scales_and_minima(&self) -> (int8x16_t, int8x16_t) {
                let $b = self;
                $scales
            }
        }
    )*};
}

super_block! {
    BlockQ2K, minima dmin, |b| {
        let [scales, minima] = nibbles(&b.scales);
        (vreinterpretq_s8_u8(scales), vreinterpretq_s8_u8(minima))
    };
    BlockQ3K, |b| {
        let (low, high) = low_8_high_4(&b.scales.0);
        let two = |bits: u32| u64::from(bits & 0x0303_0303) << 4;
        let first = low & NIBBLES | two(high) | two(high >> 2) << 32;
        let second = low >> 4 & NIBBLES | two(high >> 4) | two(high >> 6) << 32;
        let stored = vcombine_s8(vcreate_s8(first), vcreate_s8(second));
        (vsubq_s8(stored, vdupq_n_s8(32)), vdupq_n_s8(0))
    };
    BlockQ4K, minima dmin, |b| eight_scales_and_minima(&b.scales.0);
    BlockQ5K, minima dmin, |b| eight_scales_and_minima(&b.scales.0);
    BlockQ6K, |b| (load_i8(&b.scales), vdupq_n_s8(0));
    BlockIQ4XS, |b| {
        let stored = lower_half(b.stored_scales());
        (vsubq_s8(stored, vdupq_n_s8(32)), vdupq_n_s8(0))
    };
}

const NIBBLES: u64 = 0x0f0f_0f0f_0f0f_0f0f;

/// The eight scales and eight minima of Q4_K and Q5_K.
#[inline]
#[target_feature(enable = "neon")]
fn eight_scales_and_minima(packed: &[u8; 12]) -> (int8x16_t, int8x16_t) {
    // Bytes 0 to 3 are scales, 4 to 7 minima: of the first four sub-blocks in the low six bits,
    // of the others two bits at the top, their nibbles being in bytes 8 to 11.
    let (low, nibbles) = low_8_high_4(packed);
    let six = |first: u32, nibbles: u32| {
        let others = first >> 2 & 0x3030_3030 | nibbles & 0x0f0f_0f0f;
        lower_half(u64::from(first & 0x3f3f_3f3f) | u64::from(others) << 32)
    };
    (
        six(low as u32, nibbles),
        six((low >> 32) as u32, nibbles >> 4),
    )
}

/// Eight bytes in the lower half of a register.
#[inline]
#[target_feature(enable = "neon")]
fn lower_half(bytes: u64) -> int8x16_t {
    vcombine_s8(vcreate_s8(bytes), vcreate_s8(0))
}

#[inline]
fn low_8_high_4(bytes: &[u8; 12]) -> (u64, u32) {
    let [a, b, c] = bytemuck::cast::<[u8; 12], [[u8; 4]; 3]>(*bytes).map(u32::from_le_bytes);
    (u64::from(a) | u64::from(b) << 32, c)
}
