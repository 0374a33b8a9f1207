//! Sixteen f32 side by side, for the kernels of floats.

// Iterators would bring closures, which need not be inlined: see the module `lanes`.
#![allow(clippy::needless_range_loop)]

use std::arch::aarch64::*;

use super::floats::Float;
use super::widen_half;
use crate::kernels::lanes::Simd;
use crate::quant::F16;

/// Proof of NEON: four registers.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Neon(());

/// Methods that are one intrinsic on each quarter.
macro_rules! quarters {
    ($($name:ident($($v:ident),*) $quarter:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, $($v: [float32x4_t; 4]),*) -> [float32x4_t; 4] {
            let mut out = self.splat(0.0);
            for i in 0..4 {
                $(let $v = $v[i];)*
                // SAFETY: `self` proves NEON.
                out[i] = unsafe { $quarter };
            }
            out
        }
    )*};
}

impl Simd for Neon {
    type F = [float32x4_t; 4];
    type D = [float64x2_t; 8];

    #[inline(always)]
    unsafe fn new() -> Self {
        Self(())
    }

    quarters! {
        add(a, b) vaddq_f32(a, b);
        sub(a, b) vsubq_f32(a, b);
        mul(a, b) vmulq_f32(a, b);
        div(a, b) vdivq_f32(a, b);
        mul_add(a, b, c) vfmaq_f32(c, a, b);
        // Not `fmax`, which gives a NaN whichever side has it.
        max(a, b) vbslq_f32(vcgtq_f32(a, b), a, b);
        below(a, b, yes, no) vbslq_f32(vcltq_f32(a, b), yes, no);
        add_to_exponent(v, t) {
            let shift = vshlq_n_u32::<23>(vreinterpretq_u32_f32(t));
            vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(v), shift))
        };
    }

    #[inline(always)]
    fn splat(self, x: f32) -> [float32x4_t; 4] {
        // SAFETY: `self` proves NEON.
        unsafe { [vdupq_n_f32(x); 4] }
    }

    #[inline(always)]
    fn load(self, from: &[f32; 16]) -> [float32x4_t; 4] {
        // SAFETY: `self` proves NEON.
        unsafe { f32::widen(from) }
    }

    #[inline(always)]
    fn store(self, v: [float32x4_t; 4], to: &mut [f32; 16]) {
        for i in 0..4 {
            // SAFETY: `self` proves NEON; the array is as long as the four registers.
            unsafe { vst1q_f32(to.as_mut_ptr().add(4 * i), v[i]) }
        }
    }

    #[inline(always)]
    fn half(self, x: F16) -> [float32x4_t; 4] {
        // SAFETY: `self` proves NEON.
        self.splat(unsafe { widen_half(x) })
    }

    #[inline(always)]
    fn halves(self, from: &[F16; 16]) -> [float32x4_t; 4] {
        // SAFETY: `self` proves NEON.
        unsafe { F16::widen(from) }
    }

    #[inline(always)]
    fn bytes(self, from: &[i8; 16]) -> [float32x4_t; 4] {
        // SAFETY: `self` proves NEON; the array is as long as the load.
        unsafe {
            let bytes = vld1q_s8(from.as_ptr());
            let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                vcvtq_f32_s32(vmovl_high_s16(low)),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                vcvtq_f32_s32(vmovl_high_s16(high)),
            ]
        }
    }

    #[inline(always)]
    fn sum(self, v: [float32x4_t; 4]) -> f32 {
        // SAFETY: `self` proves NEON.
        unsafe {
            let v = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
            let v = vadd_f32(vget_low_f32(v), vget_high_f32(v));
            vget_lane_f32::<0>(v) + vget_lane_f32::<1>(v)
        }
    }

    #[inline(always)]
    fn zeros(self) -> [float64x2_t; 8] {
        // SAFETY: `self` proves NEON.
        unsafe { [vdupq_n_f64(0.0); 8] }
    }

    #[inline(always)]
    fn add_squares(self, v: [float32x4_t; 4], mut to: [float64x2_t; 8]) -> [float64x2_t; 8] {
        for i in 0..4 {
            // SAFETY: `self` proves NEON.
            unsafe {
                let (low, high) = (vcvt_f64_f32(vget_low_f32(v[i])), vcvt_high_f64_f32(v[i]));
                to[2 * i] = vfmaq_f64(to[2 * i], low, low);
                to[2 * i + 1] = vfmaq_f64(to[2 * i + 1], high, high);
            }
        }
        to
    }

    #[inline(always)]
    fn sum_doubles(self, mut v: [float64x2_t; 8]) -> f64 {
        // SAFETY: `self` proves NEON.
        unsafe {
            for half in [4, 2, 1] {
                for i in 0..half {
                    v[i] = vaddq_f64(v[i], v[i + half]);
                }
            }
            vgetq_lane_f64::<0>(v[0]) + vgetq_lane_f64::<1>(v[0])
        }
    }
}
