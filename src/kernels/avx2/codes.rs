//! The codes and scales of each type, 32 codes to a register.

use std::arch::x86_64::*;

use super::{load_i8, load_u8};
use crate::kernels::x86::{half_bits, load_16};
use crate::quant::{
    Block, BlockIQ4NL, BlockIQ4XS, BlockMXFP4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K,
    BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, F16, IQ4_VALUES, MXFP4_DOUBLED,
};

/// A block, or a super-block, of which 32 codes at a time are made into a register.
pub(super) trait Codes: Block {
    /// The codes are without a sign, below 64, and this much too large; `None`: they are signed.
    const OFFSET: Option<i8>;

    /// The codes of columns `32·stripe..32·stripe + 32`, in order.
    ///
    /// # Safety
    /// The CPU has AVX2.
    unsafe fn codes(&self, stripe: usize) -> __m256i;
}

/// A block of 32 weights with a scale and, perhaps, a minimum.
pub(super) trait SmallBlock: Codes {
    /// Whether there is a minimum.
    const MINIMUM: bool = false;

    /// The codes of two blocks: the first halves of both, then the second halves.
    ///
    /// # Safety
    /// The CPU has AVX2.
    unsafe fn pair(first: &Self, second: &Self) -> [__m256i; 2];

    /// The scales of up to 8 blocks, a lane a block, and any numbers behind:
    /// `weight = scale · code − minimum`.
    ///
    /// # Safety
    /// The CPU has AVX2 and F16C.
    unsafe fn scales(blocks: &[Self]) -> __m256;

    /// The minima's negatives likewise, and zeros behind.
    ///
    /// # Safety
    /// The CPU has AVX2 and F16C.
    unsafe fn offsets(_blocks: &[Self]) -> __m256 {
        bytemuck::Zeroable::zeroed()
    }
}

/// 32 levels of four bits: the low nibbles of 16 bytes, then the high ones.
#[inline]
#[target_feature(enable = "avx2")]
fn nibbles(qs: &[u8; 16]) -> __m256i {
    let twice = _mm256_broadcastsi128_si256(load_16(qs));
    let shifts = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);
    _mm256_and_si256(_mm256_srlv_epi32(twice, shifts), _mm256_set1_epi8(15))
}

/// 32 levels of each of two blocks: the low nibbles of both, then the high ones.
#[inline]
#[target_feature(enable = "avx2")]
fn nibble_pair(first: &[u8; 16], second: &[u8; 16]) -> [__m256i; 2] {
    let both = _mm256_set_m128i(load_16(second), load_16(first));
    let nibble = _mm256_set1_epi8(15);
    let high = _mm256_srli_epi16::<4>(both);
    [
        _mm256_and_si256(both, nibble),
        _mm256_and_si256(high, nibble),
    ]
}

/// 32 bytes of each of two blocks: the first halves of both, then the second halves.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn by_halves(first: &[i8; 32], second: &[i8; 32]) -> [__m256i; 2] {
    let first: &[[u8; 16]; 2] = bytemuck::cast_ref(first);
    let second: &[[u8; 16]; 2] = bytemuck::cast_ref(second);
    [
        _mm256_set_m128i(load_16(&second[0]), load_16(&first[0])),
        _mm256_set_m128i(load_16(&second[1]), load_16(&first[1])),
    ]
}

/// 16 in each byte whose bit is set, of two blocks: their first halves, then their second halves.
#[inline]
#[target_feature(enable = "avx2")]
fn fifth_bit_pair(first: [u8; 4], second: [u8; 4]) -> [__m256i; 2] {
    let (first, second) = (u32::from_le_bytes(first), u32::from_le_bytes(second));
    let both = _mm256_set1_epi64x((u64::from(first) | u64::from(second) << 32) as i64);
    // The bytes that the first halves' bits are in: two of each block.
    let bytes = _mm256_setr_epi64x(
        0,
        0x0101_0101_0101_0101,
        0x0404_0404_0404_0404,
        0x0505_0505_0505_0505,
    );
    let next = _mm256_add_epi8(bytes, _mm256_set1_epi8(2));
    [
        of_bits(_mm256_shuffle_epi8(both, bytes)),
        of_bits(_mm256_shuffle_epi8(both, next)),
    ]
}

/// 16 in each byte whose bit is set.
#[inline]
#[target_feature(enable = "avx2")]
fn fifth_bits(qh: [u8; 4]) -> __m256i {
    let spread = _mm256_shuffle_epi8(
        _mm256_set1_epi32(i32::from_le_bytes(qh)),
        _mm256_setr_epi64x(
            0,
            0x0101_0101_0101_0101,
            0x0202_0202_0202_0202,
            0x0303_0303_0303_0303,
        ),
    );
    of_bits(spread)
}

/// 16 in byte `i` where its bit `i % 8` is set.
#[inline]
#[target_feature(enable = "avx2")]
fn of_bits(bytes: __m256i) -> __m256i {
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
    _mm256_and_si256(set, _mm256_set1_epi8(16))
}

/// The levels of five bits of two blocks, likewise.
#[inline]
#[target_feature(enable = "avx2")]
fn five_bit_pair(
    [first, second]: [&[u8; 16]; 2],
    [first_fifths, second_fifths]: [[u8; 4]; 2],
) -> [__m256i; 2] {
    let [low, high] = nibble_pair(first, second);
    let [low_fifths, high_fifths] = fifth_bit_pair(first_fifths, second_fifths);
    [
        _mm256_or_si256(low, low_fifths),
        _mm256_or_si256(high, high_fifths),
    ]
}

/// What four bits stand for in a table, in two registers.
#[inline]
#[target_feature(enable = "avx2")]
fn look_up_pair(table: &[i8; 16], [a, b]: [__m256i; 2]) -> [__m256i; 2] {
    [look_up(table, a), look_up(table, b)]
}

/// What four bits stand for in a table.
#[inline]
#[target_feature(enable = "avx2")]
fn look_up(table: &[i8; 16], levels: __m256i) -> __m256i {
    let table = load_16(bytemuck::cast_ref(table));
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), levels)
}

/// The bits of `mask` of each byte, moved from `from` places up to `to` places up.
#[inline]
#[target_feature(enable = "avx2")]
fn bits(bytes: __m256i, from: usize, to: usize, mask: u8) -> __m256i {
    let moved = if from >= to {
        _mm256_srl_epi16(bytes, _mm_cvtsi32_si128((from - to) as i32))
    } else {
        _mm256_sll_epi16(bytes, _mm_cvtsi32_si128((to - from) as i32))
    };
    _mm256_and_si256(moved, _mm256_set1_epi8((mask << to) as i8))
}

/// Stripe `index` of packed bytes, 32 to a stripe.
#[inline]
#[target_feature(enable = "avx2")]
fn stripe(bytes: &[u8], index: usize) -> __m256i {
    load_u8(&bytes.as_chunks().0[index])
}

macro_rules! codes {
    ($($block:ty, $offset:expr, |$b:ident, $j:ident| $codes:expr;)*) => {$(
        impl Codes for $block {
            const OFFSET: Option<i8> = $offset;

            #[inline]
            #[target_feature(enable = "avx2")]
            unsafe fn codes(&self, $j: usize) -> __m256i {
                let $b = self;
                $codes
            }
        }
    )*};
}

codes! {
    BlockQ4_0, Some(8), |b, _j| nibbles(&b.qs);
    BlockQ4_1, Some(0), |b, _j| nibbles(&b.qs);
    BlockQ5_0, Some(16), |b, _j| _mm256_or_si256(nibbles(&b.qs), fifth_bits(b.qh));
    BlockQ5_1, Some(0), |b, _j| _mm256_or_si256(nibbles(&b.qs), fifth_bits(b.qh));
    BlockQ8_0, None, |b, _j| load_i8(&b.qs);
    BlockIQ4NL, None, |b, _j| look_up(&IQ4_VALUES, nibbles(&b.qs));
    BlockMXFP4, None, |b, _j| look_up(&MXFP4_DOUBLED, nibbles(&b.qs));
    BlockQ2K, Some(0), |b, j| bits(stripe(&b.qs, j / 4), j % 4 * 2, 0, 3);
    BlockQ3K, Some(4), |b, j| _mm256_or_si256(
        bits(stripe(&b.qs, j / 4), j % 4 * 2, 0, 3),
        bits(load_u8(&b.hmask), j, 2, 1)
    );
    BlockQ4K, Some(0), |b, j| bits(stripe(&b.qs, j / 2), j % 2 * 4, 0, 15);
    BlockQ5K, Some(0), |b, j| _mm256_or_si256(
        bits(stripe(&b.qs, j / 2), j % 2 * 4, 0, 15),
        bits(load_u8(&b.qh), j, 4, 1)
    );
    BlockQ6K, Some(32), |b, j| _mm256_or_si256(
        bits(stripe(&b.ql, j / 4 * 2 + j % 2), j % 4 / 2 * 4, 0, 15),
        bits(stripe(&b.qh, j / 4), j % 4 * 2, 4, 3)
    );
    BlockIQ4XS, None, |b, j| look_up(&IQ4_VALUES, nibbles(&b.qs[j]));
}

/// A half of each of up to 8 blocks, widened; zeros behind.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn halves<B>(blocks: &[B], half: impl Fn(&B) -> F16) -> __m256 {
    // Put together as whole numbers: the units for vectors have more to do.
    let mut words = [0; 2];
    for (i, block) in blocks.iter().enumerate() {
        words[i / 4] |= i64::from(half_bits(half(block))) << (i % 4 * 16);
    }
    _mm256_cvtph_ps(_mm_set_epi64x(words[1], words[0]))
}

macro_rules! small_block {
    ($($block:ty, scale $d:ident $(, offset $m:ident)?, |$first:ident, $second:ident| $pair:expr;)*) => {$(
        impl SmallBlock for $block {
            #[inline]
            #[target_feature(enable = "avx2")]
            unsafe fn pair($first: &Self, $second: &Self) -> [__m256i; 2] {
                $pair
            }

            #[inline]
            #[target_feature(enable = "avx2,f16c")]
            unsafe fn scales(blocks: &[Self]) -> __m256 {
                halves(blocks, |block| block.$d)
            }

            $(
                const MINIMUM: bool = true;

                #[inline]
                #[target_feature(enable = "avx2,f16c")]
                unsafe fn offsets(blocks: &[Self]) -> __m256 {
                    halves(blocks, |block| block.$m)
                }
            )?
        }
    )*};
}

small_block! {
    BlockQ4_0, scale d, |a, b| nibble_pair(&a.qs, &b.qs);
    BlockQ4_1, scale d, offset m, |a, b| nibble_pair(&a.qs, &b.qs);
    BlockQ5_0, scale d, |a, b| five_bit_pair([&a.qs, &b.qs], [a.qh, b.qh]);
    BlockQ5_1, scale d, offset m, |a, b| five_bit_pair([&a.qs, &b.qs], [a.qh, b.qh]);
    BlockQ8_0, scale d, |a, b| by_halves(&a.qs, &b.qs);
    BlockIQ4NL, scale d, |a, b| look_up_pair(&IQ4_VALUES, nibble_pair(&a.qs, &b.qs));
}

impl SmallBlock for BlockMXFP4 {
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn pair(first: &Self, second: &Self) -> [__m256i; 2] {
        look_up_pair(&MXFP4_DOUBLED, nibble_pair(&first.qs, &second.qs))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn scales(blocks: &[Self]) -> __m256 {
        let mut exponents = 0;
        for (i, block) in blocks.iter().enumerate() {
            exponents |= i64::from(block.e) << (8 * i);
        }
        // 2^(e − 128): below e = 2 a number without the leading bit.
        let e = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(exponents));
        let normal = _mm256_slli_epi32::<23>(_mm256_sub_epi32(e, _mm256_set1_epi32(1)));
        let small = _mm256_sllv_epi32(_mm256_set1_epi32(0x0020_0000), e);
        let is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e);
        _mm256_castsi256_ps(_mm256_blendv_epi8(normal, small, is_small))
    }
}
