//! Dot products of rows as they lie.

use std::arch::x86_64::*;

use super::codes::{Codes, SmallBlock};
use super::multiply::Multiply;
use super::{in_units, load_f32, load_i8, load_i16, sum_four, sum_lanes, twice_each};
use crate::kernels::Activation;
use crate::kernels::activations::SCALE_LEN;
use crate::kernels::x86::{SuperBlock, broadcast_f16, each_row};
use crate::tensor::Rows;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dot_blocks<M: Multiply, B: SmallBlock>(
    rows: Rows<'_>,
    x: Activation<'_>,
    out: &mut [f32],
) {
    each_row::<B>(rows, out, |row| small_blocks::<M, B>(row, x));
}

/// Dots a row of small blocks with an activation.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn small_blocks<M: Multiply, B: SmallBlock>(row: &[B], x: Activation<'_>) -> f32 {
    let mut acc = [_mm256_setzero_ps(); 2];
    let (q, _) = x.q.as_chunks::<SCALE_LEN>();
    let (sums, _) = x.sums.as_chunks::<2>();
    for (((block, q), sums), &s) in row.iter().zip(q).zip(sums).zip(x.scales) {
        let q = load_i8(q);
        // SAFETY: this function has the features.
        let (codes, scale) = unsafe { (block.codes(0), block.scale()) };
        // SAFETY: this function has the features, and M the table's.
        let dot = _mm256_cvtepi32_ps(unsafe { M::dot(codes, B::OFFSET, q) });
        let scale = _mm256_mul_ps(scale, _mm256_set1_ps(s));
        // Blocks take turns at the accumulators.
        acc = [acc[1], _mm256_fmadd_ps(dot, scale, acc[0])];
        if B::MINIMUM {
            // In lane 0 alone: a minimum counts once.
            let sums = _mm_cvtsi32_si128(bytemuck::cast(*sums));
            let sum = _mm_cvtepi32_ps(_mm_madd_epi16(sums, _mm_set1_epi16(1)));
            let s_sum = _mm_mul_ss(sum, _mm_set_ss(s));
            // SAFETY: this function has the features.
            let offset = unsafe { block.offset() };
            acc[1] = _mm256_fmadd_ps(offset, _mm256_zextps128_ps256(s_sum), acc[1]);
        }
    }
    sum_lanes(_mm256_add_ps(acc[0], acc[1]))
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dot_super_blocks<M: Multiply, B: Codes + SuperBlock>(
    rows: Rows<'_>,
    x: Activation<'_>,
    out: &mut [f32],
) {
    each_row::<B>(rows, out, |row| super_blocks::<M, B>(row, x));
}

/// Dots a row of super-blocks with an activation.
///
/// A super-block's 16 scales, one for 16 columns, are made in two registers, times those of
/// the activations. The 8 lanes of a stripe's dot product take one for each 4 lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn super_blocks<M: Multiply, B: Codes + SuperBlock>(row: &[B], x: Activation<'_>) -> f32 {
    let mut acc = [_mm256_setzero_ps(); 4];
    let (q, _) = x.q.as_chunks::<256>();
    let (scales, _) = x.scales.as_chunks::<8>();
    let (sums, _) = x.sums.as_chunks::<16>();
    let each_four = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    for (((block, q), s), sums) in row.iter().zip(q).zip(scales).zip(sums) {
        let (q, _) = q.as_chunks::<32>();
        let s = twice_each(load_f32(s));
        // SAFETY: this function has the features.
        let (scales, minima) = unsafe { block.scales_and_minima() };
        let scales = in_units(broadcast_f16(block.d()), scales);
        let scales = [
            _mm256_mul_ps(scales[0], s[0]),
            _mm256_mul_ps(scales[1], s[1]),
        ];
        for j in 0..8 {
            // SAFETY: this function has the features.
            let codes = unsafe { block.codes(j) };
            // SAFETY: this function has the features, and M the table's.
            let dot = _mm256_cvtepi32_ps(unsafe { M::dot(codes, B::OFFSET, load_i8(&q[j])) });
            let lanes = _mm256_add_epi32(each_four, _mm256_set1_epi32(j as i32 % 4 * 2));
            let scale = _mm256_permutevar8x32_ps(scales[j / 4], lanes);
            acc[j % 4] = _mm256_fmadd_ps(dot, scale, acc[j % 4]);
        }
        if B::MINIMA {
            let sums = load_i16(sums);
            let low = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(sums));
            let high = _mm256_cvtepi16_epi32(_mm256_extracti128_si256::<1>(sums));
            let s_sums = [
                _mm256_mul_ps(_mm256_cvtepi32_ps(low), s[0]),
                _mm256_mul_ps(_mm256_cvtepi32_ps(high), s[1]),
            ];
            let minima = in_units(broadcast_f16(block.dmin()), minima);
            acc[0] = _mm256_fnmadd_ps(minima[0], s_sums[0], acc[0]);
            acc[1] = _mm256_fnmadd_ps(minima[1], s_sums[1], acc[1]);
        }
    }
    sum_four(acc)
}
