//! Activations in 8 bits.

use std::arch::x86_64::*;

use super::load_f32;
use crate::kernels::activations::{SCALE_LEN, SUM_LEN, scale_of};

/// See [`crate::kernels::activations::quantize`], whose bits this gives.
pub(in crate::kernels) fn quantize(x: &[f32], q: &mut [i8], scales: &mut [f32], sums: &mut [i16]) {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn inner(x: &[f32], q: &mut [i8], scales: &mut [f32], sums: &mut [i16]) {
        let (x, q) = (x.as_chunks::<SCALE_LEN>().0, q.as_chunks_mut().0);
        let sums = sums.as_chunks_mut::<{ SCALE_LEN / SUM_LEN }>().0;
        for ((x, q), (scale, sums)) in x.iter().zip(q).zip(scales.iter_mut().zip(sums)) {
            *scale = quantize_32(x, q, sums);
        }
    }
    // SAFETY: the table is only handed out where the CPU has the features.
    unsafe { inner(x, q, scales, sums) }
}

/// Quantizes a group and returns its scale.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn quantize_32(x: &[f32; 32], q: &mut [i8; 32], sums: &mut [i16; 2]) -> f32 {
    let x: [__m256; 4] = std::array::from_fn(|k| load_f32(&x.as_chunks().0[k]));
    let magnitude = _mm256_set1_epi32(i32::MAX);
    let [a, b, c, d] = x.map(|x| _mm256_and_si256(_mm256_castps_si256(x), magnitude));
    let max = _mm256_max_epi32(_mm256_max_epi32(a, b), _mm256_max_epi32(c, d));
    let max = _mm_max_epi32(
        _mm256_castsi256_si128(max),
        _mm256_extracti128_si256::<1>(max),
    );
    let max = _mm_max_epi32(max, _mm_unpackhi_epi64(max, max));
    let max = _mm_max_epi32(max, _mm_shuffle_epi32::<1>(max));
    let max = f32::from_bits(_mm_cvtsi128_si32(max) as u32);

    let (scale, inverse) = scale_of(max);
    if inverse == 0.0 {
        (*q, *sums) = ([0; 32], [0; 2]);
        return scale;
    }
    let inverse = _mm256_set1_ps(inverse);
    let [a, b, c, d] = x.map(|x| _mm256_cvtps_epi32(_mm256_mul_ps(x, inverse)));
    // Packing goes half by half of the registers: the permutation puts the columns in order.
    let codes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let codes = _mm256_permutevar8x32_epi32(codes, order);
    // SAFETY: the array is as long as the register, and the store takes any alignment.
    unsafe { _mm256_storeu_si256(q.as_mut_ptr().cast(), codes) };

    // Four sums of 8 codes, each code plus 128.
    let unsigned = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
    let eights = _mm256_sad_epu8(unsigned, _mm256_setzero_si256());
    let sixteens = _mm256_add_epi64(eights, _mm256_unpackhi_epi64(eights, eights));
    let bias = 128 * SUM_LEN as i32;
    sums[0] = (_mm256_extract_epi32::<0>(sixteens) - bias) as i16;
    sums[1] = (_mm256_extract_epi32::<4>(sixteens) - bias) as i16;
    scale
}
