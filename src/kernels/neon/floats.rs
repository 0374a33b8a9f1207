//! Products in f32: rows of floats, and rows that are decoded first.

use std::arch::aarch64::*;

use super::{load_f32, load_u8};
use crate::kernels::Activation;
use crate::kernels::scalar::decode_pieces;
use crate::quant::{BF16, F16, F32};
use crate::tensor::Rows;

/// A float of which sixteen are widened to f32 at a time.
pub(super) trait Float: bytemuck::Pod {
    /// # Safety
    /// The CPU has NEON.
    unsafe fn widen(sixteen: &[Self; 16]) -> [float32x4_t; 4];
}

impl Float for f32 {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn widen(sixteen: &[Self; 16]) -> [float32x4_t; 4] {
        let fours = sixteen.as_chunks().0;
        let load = |k: usize| load_f32(&fours[k]);
        [load(0), load(1), load(2), load(3)]
    }
}

impl Float for F32 {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn widen(sixteen: &[Self; 16]) -> [float32x4_t; 4] {
        let bytes: &[[u8; 16]; 4] = bytemuck::cast_ref(sixteen);
        let load = |k: usize| vreinterpretq_f32_u8(load_u8(&bytes[k]));
        [load(0), load(1), load(2), load(3)]
    }
}

impl Float for F16 {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn widen(sixteen: &[Self; 16]) -> [float32x4_t; 4] {
        let bytes: &[[u8; 16]; 2] = bytemuck::cast_ref(sixteen);
        let load = |k: usize| vreinterpretq_f16_u8(load_u8(&bytes[k]));
        let (a, b) = (load(0), load(1));
        [
            vcvt_f32_f16(vget_low_f16(a)),
            vcvt_high_f32_f16(a),
            vcvt_f32_f16(vget_low_f16(b)),
            vcvt_high_f32_f16(b),
        ]
    }
}

impl Float for BF16 {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn widen(sixteen: &[Self; 16]) -> [float32x4_t; 4] {
        let bytes: &[[u8; 16]; 2] = bytemuck::cast_ref(sixteen);
        let load = |k: usize| vreinterpretq_u16_u8(load_u8(&bytes[k]));
        let (a, b) = (load(0), load(1));
        [
            vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(a))),
            vreinterpretq_f32_u32(vshll_high_n_u16::<16>(a)),
            vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(b))),
            vreinterpretq_f32_u32(vshll_high_n_u16::<16>(b)),
        ]
    }
}

/// Products of floats in 4 × 4 lanes: column `i` goes to lane `i mod 16`.
#[derive(Clone, Copy)]
struct FloatSum([float32x4_t; 4]);

impl FloatSum {
    #[inline]
    #[target_feature(enable = "neon")]
    fn new() -> Self {
        Self([vdupq_n_f32(0.0); 4])
    }

    /// Adds `Σ w·x`; the rest behind the last 16 columns is filled up with zeros.
    #[inline]
    #[target_feature(enable = "neon")]
    fn add<W: Float>(&mut self, w: &[W], x: &[f32]) {
        let ((w, w_rest), (x, x_rest)) = (w.as_chunks::<16>(), x.as_chunks::<16>());
        for (w, x) in w.iter().zip(x) {
            self.add_16(w, x);
        }
        if !x_rest.is_empty() {
            let (mut w, mut x) = ([W::zeroed(); 16], [0.0; 16]);
            w[..w_rest.len()].copy_from_slice(w_rest);
            x[..x_rest.len()].copy_from_slice(x_rest);
            self.add_16(&w, &x);
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn add_16<W: Float>(&mut self, w: &[W; 16], x: &[f32; 16]) {
        // SAFETY: every aarch64 has NEON.
        let (w, x) = unsafe { (W::widen(w), f32::widen(x)) };
        for k in 0..4 {
            self.0[k] = vfmaq_f32(self.0[k], w[k], x[k]);
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn sum(self) -> f32 {
        let [a, b, c, d] = self.0;
        vaddvq_f32(vaddq_f32(vaddq_f32(a, b), vaddq_f32(c, d)))
    }
}

#[target_feature(enable = "neon")]
pub(super) fn dot_floats<W: Float>(rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
    for (index, out) in out.iter_mut().enumerate() {
        let mut sum = FloatSum::new();
        sum.add::<W>(bytemuck::cast_slice(rows.row(index)), x.x);
        *out = sum.sum();
    }
}

/// Dots rows of any type with the activations in f32.
#[target_feature(enable = "neon")]
pub(super) fn dot_decoded(rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
    for (index, out) in out.iter_mut().enumerate() {
        let mut sum = FloatSum::new();
        decode_pieces(rows, index, x.x, |weights, x| sum.add(weights, x));
        *out = sum.sum();
    }
}
