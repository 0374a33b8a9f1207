//! Rows of floats, and of any type decoded to floats.

use std::arch::x86_64::*;

use super::{load_f32, load_u8, sum_four};
use crate::kernels::Activation;
use crate::kernels::scalar::decode_pieces;
use crate::kernels::x86::load_16;
use crate::quant::{BF16, F16, F32};
use crate::tensor::Rows;

/// A float of which eight are widened to f32 at a time.
pub(super) trait Float: bytemuck::Pod {
    /// Eight of them in f32; exact.
    ///
    /// # Safety
    /// The CPU has AVX2 and F16C.
    unsafe fn widen(eight: &[Self; 8]) -> __m256;
}

impl Float for F32 {
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn widen(eight: &[Self; 8]) -> __m256 {
        _mm256_castsi256_ps(load_u8(bytemuck::cast_ref(eight)))
    }
}

impl Float for f32 {
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn widen(eight: &[Self; 8]) -> __m256 {
        load_f32(eight)
    }
}

impl Float for F16 {
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn widen(eight: &[Self; 8]) -> __m256 {
        _mm256_cvtph_ps(load_16(bytemuck::cast_ref(eight)))
    }
}

impl Float for BF16 {
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn widen(eight: &[Self; 8]) -> __m256 {
        let wide = _mm256_cvtepu16_epi32(load_16(bytemuck::cast_ref(eight)));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
    }
}

/// Products of floats in 4 × 8 lanes: column `i` goes to lane `i mod 32`.
#[derive(Clone, Copy)]
struct FloatSum([__m256; 4]);

impl FloatSum {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new() -> Self {
        Self([_mm256_setzero_ps(); 4])
    }

    /// Adds `Σ w·x`; the rest behind the last 32 columns is filled up with zeros.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn add<W: Float>(&mut self, w: &[W], x: &[f32]) {
        let ((w, w_rest), (x, x_rest)) = (w.as_chunks::<32>(), x.as_chunks::<32>());
        for (w, x) in w.iter().zip(x) {
            self.add_32(w, x);
        }
        if !x_rest.is_empty() {
            let (mut w, mut x) = ([W::zeroed(); 32], [0.0; 32]);
            w[..w_rest.len()].copy_from_slice(w_rest);
            x[..x_rest.len()].copy_from_slice(x_rest);
            self.add_32(&w, &x);
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn add_32<W: Float>(&mut self, w: &[W; 32], x: &[f32; 32]) {
        let (w, x) = (w.as_chunks().0, x.as_chunks().0);
        for k in 0..4 {
            // SAFETY: this function has the features.
            let w = unsafe { W::widen(&w[k]) };
            self.0[k] = _mm256_fmadd_ps(w, load_f32(&x[k]), self.0[k]);
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn sum(self) -> f32 {
        sum_four(self.0)
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dot_floats<W: Float>(rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
    for (index, out) in out.iter_mut().enumerate() {
        let mut sum = FloatSum::new();
        sum.add::<W>(bytemuck::cast_slice(rows.row(index)), x.x);
        *out = sum.sum();
    }
}

/// Dots rows of any type with the activations in f32.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dot_decoded(rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
    for (index, out) in out.iter_mut().enumerate() {
        let mut sum = FloatSum::new();
        decode_pieces(rows, index, x.x, |weights, x| sum.add(weights, x));
        *out = sum.sum();
    }
}
