//! Dot products of rows as they lie.
//!
//! A core that is to keep up with its memory has some ten instructions for 32 weights. So what
//! can be done for eight blocks, or for a super-block, at once is done so:
//!
//! ```text
//! blocks of 32    8 scales of weights × 8 of activations in one register, a lane a block;
//!                 the minima × 8 sums of activations likewise
//! super-blocks    sums of pairs in 16 bits × scales in 16 bits: the same instruction that
//!                 widens them; the unit once for the whole block
//! ```
//!
//! A row has several accumulators, so that chains of additions overlap; which block or stripe
//! goes to which is fixed.

use std::arch::x86_64::*;
use std::hint::black_box;

use super::codes::{Codes, SmallBlock};
use super::multiply::{Multiply, pairs};
use super::{load_f32, load_i8, load_i16, load_u8, sum_four, sum_lanes};
use crate::kernels::Activation;
use crate::kernels::activations::SCALE_LEN;
use crate::kernels::x86::{SuperBlock, broadcast_f16, each_row, prefetch_ahead};
use crate::tensor::Rows;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dot_blocks<M: Multiply, B: SmallBlock>(
    rows: Rows<'_>,
    x: Activation<'_>,
    out: &mut [f32],
) {
    each_row::<B>(rows, out, |[row]| [small_blocks::<M, B>(row, x)]);
}

/// Dots a row of small blocks with an activation: eight blocks at a time, the rest one by one.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn small_blocks<M: Multiply, B: SmallBlock>(row: &[B], x: Activation<'_>) -> f32 {
    let mut acc = [_mm256_setzero_ps(); 4];
    let (row, row_rest) = row.as_chunks::<8>();
    let (q, q_rest) = x.q.as_chunks::<{ 8 * SCALE_LEN }>();
    let (s, s_rest) = x.scales.as_chunks::<8>();
    let (sums, sums_rest) = x.sums.as_chunks::<16>();
    for (((blocks, q), s), sums) in row.iter().zip(q).zip(s).zip(sums) {
        prefetch_ahead::<1, _>(blocks);
        acc = add_blocks::<M, B, 8>(acc, blocks, q, s, sums);
    }
    let (q_rest, _) = q_rest.as_chunks::<SCALE_LEN>();
    let (sums_rest, _) = sums_rest.as_chunks::<2>();
    for (((block, q), s), sums) in row_rest.iter().zip(q_rest).zip(s_rest).zip(sums_rest) {
        let (mut one_s, mut one_sum) = ([0.0; 8], [0; 16]);
        one_s[0] = *s;
        one_sum[..2].copy_from_slice(sums);
        acc = add_blocks::<M, B, 1>(acc, &[*block], q, &one_s, &one_sum);
    }
    sum_four(acc)
}

/// Adds the dot product of up to eight blocks; the scales and sums beyond the last are 0.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_blocks<M: Multiply, B: SmallBlock, const N: usize>(
    mut acc: [__m256; 4],
    blocks: &[B; N],
    q: &[i8],
    s: &[f32; 8],
    sums: &[i16; 16],
) -> [__m256; 4] {
    let (s, sums) = (load_f32(s), load_i16(sums));
    // SAFETY: this function has the features.
    let factors = _mm256_mul_ps(unsafe { B::scales(blocks) }, s);
    let factors = [
        _mm256_permute2f128_ps::<0x00>(factors, factors),
        _mm256_permute2f128_ps::<0x11>(factors, factors),
    ];
    for (b, (block, q)) in blocks.iter().zip(q.as_chunks().0).enumerate() {
        // SAFETY: this function has the features, and M the table's.
        let dot = unsafe { M::dot(block.codes(0), B::OFFSET, load_i8(q)) };
        let factor = _mm256_permutevar_ps(factors[b / 4], _mm256_set1_epi32(b as i32 % 4));
        acc[b % 4] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), factor, acc[b % 4]);
    }
    if B::MINIMUM {
        let sums = _mm256_cvtepi32_ps(_mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
        // SAFETY: this function has the features.
        let offsets = unsafe { B::offsets(blocks) };
        acc[0] = _mm256_fmadd_ps(offsets, _mm256_mul_ps(sums, s), acc[0]);
    }
    acc
}

/// Word `j` of each half, in all words of that half.
static SPREAD: [[u8; 32]; 8] = {
    let mut spread = [[0; 32]; 8];
    let mut i = 0;
    while i < 8 * 32 {
        spread[i / 32][i % 32] = (i / 32 * 2 + i % 2) as u8;
        i += 1;
    }
    spread
};

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dot_super_blocks<B: Codes + SuperBlock>(
    rows: Rows<'_>,
    x: Activation<'_>,
    out: &mut [f32],
) {
    each_row::<B>(rows, out, |[row]| [super_blocks(row, x)]);
}

/// Dots a row of super-blocks with an activation.
///
/// The sums of pairs of a stripe, 8 for each 16 columns, meet the scale of those columns where
/// they are added in twos and widened. AVX-VNNI, which leaves sums of fours in 32 bits, would
/// need the scales in f32 and gain nothing.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn super_blocks<B: Codes + SuperBlock>(row: &[B], x: Activation<'_>) -> f32 {
    let mut acc = _mm256_setzero_ps();
    let (q, _) = x.q.as_chunks::<256>();
    let (scales, _) = x.scales.as_chunks::<8>();
    let (sums, _) = x.sums.as_chunks::<16>();
    // Scales of the first halves of all stripes, then of the second halves.
    let halves = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    // Hidden from the compiler, which would take two cheap shuffles for one.
    let spread = black_box(&SPREAD);
    for (((block, q), s), sums) in row.iter().zip(q).zip(scales).zip(sums) {
        prefetch_ahead::<1, _>(block);
        let (q, _) = q.as_chunks::<32>();
        // SAFETY: this function has the features.
        let (scales, minima) = unsafe { block.scales_and_minima() };
        let scales = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(scales, halves));
        let mut terms = [_mm256_setzero_ps(); 2];
        for j in 0..8 {
            // SAFETY: this function has the features.
            let codes = unsafe { block.codes(j) };
            let pairs = pairs(codes, B::OFFSET, load_i8(&q[j]));
            let scale = _mm256_shuffle_epi8(scales, load_u8(&spread[j]));
            let dot = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, scale));
            terms[j % 2] = _mm256_fmadd_ps(dot, _mm256_set1_ps(s[j]), terms[j % 2]);
        }
        let d = broadcast_f16(block.d());
        let mut sum = _mm256_mul_ps(_mm256_add_ps(terms[0], terms[1]), d);
        if B::MINIMA {
            let minima = _mm256_madd_epi16(_mm256_cvtepi8_epi16(minima), load_i16(sums));
            let minima = _mm256_mul_ps(_mm256_cvtepi32_ps(minima), load_f32(s));
            sum = _mm256_fnmadd_ps(minima, broadcast_f16(block.dmin()), sum);
        }
        // One addition from block to block: the compiler keeps this sum in memory.
        acc = _mm256_add_ps(acc, sum);
    }
    sum_lanes(acc)
}
