//! The quantizer of activations.

use std::arch::aarch64::*;

use super::load_f32;
use crate::kernels::activations::{SCALE_LEN, SUM_LEN, scale_of};

/// See [`crate::kernels::activations::quantize`], whose bits this gives.
pub(super) fn quantize(x: &[f32], q: &mut [i8], scales: &mut [f32], sums: &mut [i16]) {
    #[target_feature(enable = "neon")]
    fn inner(x: &[f32], q: &mut [i8], scales: &mut [f32], sums: &mut [i16]) {
        let (x, q) = (x.as_chunks::<SCALE_LEN>().0, q.as_chunks_mut().0);
        let sums = sums.as_chunks_mut::<{ SCALE_LEN / SUM_LEN }>().0;
        for ((x, q), (scale, sums)) in x.iter().zip(q).zip(scales.iter_mut().zip(sums)) {
            *scale = quantize_32(x, q, sums);
        }
    }
    // SAFETY: every aarch64 has NEON.
    unsafe { inner(x, q, scales, sums) }
}

/// Quantizes a group and returns its scale.
#[inline]
#[target_feature(enable = "neon")]
fn quantize_32(x: &[f32; 32], q: &mut [i8; 32], sums: &mut [i16; 2]) -> f32 {
    let fours = x.as_chunks().0;
    let mut x = [vdupq_n_f32(0.0); 8];
    let mut max = vdupq_n_u32(0);
    for k in 0..8 {
        x[k] = load_f32(&fours[k]);
        // Without their signs, floats are ordered as their bits are, with NaN at the top.
        max = vmaxq_u32(max, vreinterpretq_u32_f32(vabsq_f32(x[k])));
    }
    let max = f32::from_bits(vmaxvq_u32(max));

    // Rounds halves to even; a NaN becomes 0.
    let (scale, inverse) = scale_of(max);
    let round = |k: usize| vcvtnq_s32_f32(vmulq_n_f32(x[k], inverse));
    let narrow = |k: usize| vqmovn_high_s32(vqmovn_s32(round(k)), round(k + 1));
    for (half, sum) in sums.iter_mut().enumerate() {
        let codes = vqmovn_high_s16(vqmovn_s16(narrow(4 * half)), narrow(4 * half + 2));
        let q: &mut [i8; 16] = &mut q.as_chunks_mut().0[half];
        // SAFETY: the array is as long as the register, and the store takes any alignment.
        unsafe { vst1q_s8(q.as_mut_ptr(), codes) };
        *sum = vaddlvq_s8(codes);
    }
    scale
}
