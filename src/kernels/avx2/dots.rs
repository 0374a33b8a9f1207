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
//! Rows of small blocks go side by side, and each gives the bits that it gives alone; for super-blocks,
//! which need more registers, that gained nothing.

use std::arch::x86_64::*;
use std::hint::black_box;

use super::codes::{Codes, SmallBlock, by_halves};
use super::multiply::{Multiply, pairs};
use super::{load_f32, load_i8, load_i16, load_u8, sum_lanes};
use crate::kernels::activations::SCALE_LEN;
use crate::kernels::x86::{SuperBlock, ahead, broadcast_f16, each_four, each_row, prefetch};
use crate::kernels::{Activation, STREAMS, Sums};
use crate::tensor::Rows;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dot_blocks<M: Multiply, B: SmallBlock>(
    rows: Rows<'_>,
    x: Activation<'_>,
    out: &mut [f32],
) {
    each_row::<B>(rows, out, |row| small_blocks::<M, B, 1>(row, x));
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn stream_blocks<M: Multiply, B: SmallBlock>(
    rows: [Rows<'_>; STREAMS],
    x: &[Activation<'_>],
    out: &mut [Sums],
) {
    each_four::<B>(rows, x, out, |four, x| {
        by_twos(four, |two| small_blocks::<M, B, 2>(two, x))
    });
}

/// Two rows at a time: sixteen registers hold no more.
#[inline(always)]
fn by_twos<R: Copy>(
    [a, b, c, d]: [R; STREAMS],
    dot: impl Fn([R; 2]) -> [f32; 2],
) -> [f32; STREAMS] {
    let ([a, b], [c, d]) = (dot([a, b]), dot([c, d]));
    [a, b, c, d]
}

/// Dots rows of small blocks, side by side, with an activation: eight blocks at a time, the rest in pairs.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn small_blocks<M: Multiply, B: SmallBlock, const N: usize>(
    rows: [&[B]; N],
    x: Activation<'_>,
) -> [f32; N] {
    let mut acc = [[_mm256_setzero_ps(); 2]; N];
    let (q, q_rest) = x.q.as_chunks::<{ 8 * SCALE_LEN }>();
    let (s, s_rest) = x.scales.as_chunks::<8>();
    let (sums, sums_rest) = x.sums.as_chunks::<16>();
    let n = q.len();
    let (s, sums) = (&s[..n], &sums[..n]);
    let ahead = ahead(N);
    let eights = rows.map(|row| &row.as_chunks::<8>().0[..n]);
    for i in 0..n {
        add_blocks::<M, B, N, 8>(&mut acc, eights, i, &q[i], &s[i], &sums[i], ahead);
    }
    let rest = rows.map(|row| &row[8 * n..][..s_rest.len()]);
    for first in (0..s_rest.len()).step_by(2) {
        let some = first..(first + 2).min(s_rest.len());
        let (mut pairs, mut q) = ([[B::zeroed(); 2]; N], [0; 2 * SCALE_LEN]);
        for (pair, row) in pairs.iter_mut().zip(rest) {
            pair[..some.len()].copy_from_slice(&row[some.clone()]);
        }
        let columns = first * SCALE_LEN..some.end * SCALE_LEN;
        q[..columns.len()].copy_from_slice(&q_rest[columns]);
        let (mut s, mut sums) = ([0.0; 8], [0; 16]);
        s[..some.len()].copy_from_slice(&s_rest[some.clone()]);
        sums[..2 * some.len()].copy_from_slice(&sums_rest[2 * first..2 * some.end]);
        let pairs = pairs.each_ref().map(std::slice::from_ref);
        add_blocks::<M, B, N, 2>(&mut acc, pairs, 0, &q, &s, &sums, ahead);
    }
    let mut out = [0.0; N];
    for (out, [a, b]) in out.iter_mut().zip(acc) {
        *out = sum_lanes(_mm256_add_ps(a, b));
    }
    out
}

/// Adds the dot products of the `K` blocks at `index` of each row; the scales and sums beyond the last are 0.
///
/// A pair of blocks is two registers of codes, of their first halves and of their second halves: the low
/// nibbles and the high ones. So one register of sums serves the pair, four lanes a block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_blocks<M: Multiply, B: SmallBlock, const N: usize, const K: usize>(
    acc: &mut [[__m256; 2]; N],
    rows: [&[[B; K]]; N],
    index: usize,
    q: &[i8],
    s: &[f32; 8],
    sums: &[i16; 16],
    ahead: usize,
) {
    let (s, sums) = (load_f32(s), load_i16(sums));
    let sums = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
    let s_sums = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), s);
    // Those of the first blocks of all pairs, then those of the second ones.
    let order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    let mut factors = [_mm256_setzero_ps(); N];
    for r in 0..N {
        let blocks = &rows[r][index];
        prefetch(blocks, ahead);
        // SAFETY: this function has the features.
        let (scales, offsets) = unsafe { (B::scales(blocks), B::offsets(blocks)) };
        if B::MINIMUM {
            acc[r][0] = _mm256_fmadd_ps(offsets, s_sums, acc[r][0]);
        }
        factors[r] = _mm256_permutevar8x32_ps(_mm256_mul_ps(scales, s), order);
    }
    let q = q.as_chunks::<{ 2 * SCALE_LEN }>().0;
    macro_rules! pairs {
        ($($p:literal)*) => {$(if 2 * $p < K {
            let [first, second] = q[$p].as_chunks::<SCALE_LEN>().0 else { unreachable!() };
            let q = by_halves(first, second);
            for r in 0..N {
                let blocks = &rows[r][index];
                let (first, second) = (&blocks[2 * $p], &blocks[2 * $p + 1]);
                // SAFETY: this function has the features, and M the table's.
                let dot = unsafe { M::dot_two(B::pair(first, second), B::OFFSET, q) };
                let factor = _mm256_permute_ps::<{ 0b01_01_01_01 * $p }>(factors[r]);
                let sum = acc[r][$p % 2];
                acc[r][$p % 2] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), factor, sum);
            }
        })*};
    }
    pairs!(0 1 2 3);
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
    let ahead = ahead(1);
    for (((block, q), s), sums) in row.iter().zip(q).zip(scales).zip(sums) {
        prefetch(block, ahead);
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
