//! Sixteen f32 side by side, as each instruction set has them.
//!
//! Kernels of floats (norms, SwiGLU, softmax, attention) are written once, generic over [`Simd`],
//! and compiled for every instruction set by [`super::floats`]. A lane goes through the same operations
//! whichever lane it is and whatever the others hold, so that a result does not depend on where in a
//! register it was computed. Scalar rounds a product before it adds it, the others do not.
//!
//! A value of an implementing type proves that the CPU has its features, which is what makes its methods
//! safe. They are inlined into functions that are compiled with those features; a call that is not
//! inlined there would be slow, so the generic code keeps to loops over ranges, without closures.

// Iterators would bring closures, which need not be inlined: see the module `lanes`.
#![allow(clippy::needless_range_loop)]

use crate::quant::F16;

/// An instruction set's sixteen lanes.
pub(super) trait Simd: Copy {
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen f64.
    type D: Copy;

    /// # Safety
    /// The CPU has the features.
    unsafe fn new() -> Self;
    /// `x` in all lanes.
    fn splat(self, x: f32) -> Self::F;
    /// Sixteen floats.
    fn load(self, from: &[f32; 16]) -> Self::F;
    /// Stores the lanes.
    fn store(self, v: Self::F, to: &mut [f32; 16]);
    /// `a + b`.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a − b`.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a · b`.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a · b + c`.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a` where `a > b`, else `b`: `b` where one is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `yes` where `a < b`, else `no`: `no` where one is NaN.
    fn below(self, a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F;
    /// Adds the low bits of `t`, an integer, to the exponent of `v`.
    fn add_to_exponent(self, v: Self::F, t: Self::F) -> Self::F;
    /// Sixteen halves.
    fn halves(self, from: &[F16; 16]) -> Self::F;
    /// A half in all lanes.
    fn half(self, x: F16) -> Self::F;
    /// Sixteen signed bytes.
    fn bytes(self, from: &[i8; 16]) -> Self::F;
    /// The sum of all lanes: the upper half is added to the lower one until one is left.
    fn sum(self, v: Self::F) -> f32;
    /// No squares.
    fn zeros(self) -> Self::D;
    /// Adds the squares of the lanes.
    fn add_squares(self, v: Self::F, to: Self::D) -> Self::D;
    /// The sum of all lanes, in the order of [`Simd::sum`].
    fn sum_doubles(self, v: Self::D) -> f64;

    /// Lane `i` of `rows[j]` becomes lane `j` of row `i`.
    #[inline(always)]
    fn transpose(self, rows: &mut [Self::F; 16]) {
        let mut from = [[0.0; 16]; 16];
        for i in 0..16 {
            self.store(rows[i], &mut from[i]);
        }
        for i in 0..16 {
            let mut to = [0.0; 16];
            for j in 0..16 {
                to[j] = from[j][i];
            }
            rows[i] = self.load(&to);
        }
    }

    /// The sums of sixteen registers, each in the order of [`Simd::sum`].
    #[inline(always)]
    fn sums(self, mut v: [Self::F; 16]) -> [f32; 16] {
        self.transpose(&mut v);
        let mut half = 8;
        while half > 0 {
            for i in 0..half {
                v[i] = self.add(v[i], v[i + half]);
            }
            half /= 2;
        }
        let mut sums = [0.0; 16];
        self.store(v[0], &mut sums);
        sums
    }
}

/// Plain Rust.
#[derive(Clone, Copy)]
pub(super) struct Scalar(());

/// Applies a formula to each lane.
macro_rules! each {
    (|$($v:ident),*| $formula:expr) => {{
        let mut out = [0.0; 16];
        for i in 0..16 {
            $(let $v = $v[i];)*
            out[i] = $formula;
        }
        out
    }};
}

/// Folds the upper half of an array onto the lower one until one element is left.
macro_rules! fold {
    ($v:ident) => {{
        let mut v = $v;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                v[i] += v[i + half];
            }
        }
        v[0]
    }};
}

impl Simd for Scalar {
    type F = [f32; 16];
    type D = [f64; 16];

    #[inline(always)]
    unsafe fn new() -> Self {
        Self(())
    }

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 16] {
        [x; 16]
    }

    #[inline(always)]
    fn load(self, from: &[f32; 16]) -> [f32; 16] {
        *from
    }

    #[inline(always)]
    fn store(self, v: [f32; 16], to: &mut [f32; 16]) {
        *to = v;
    }

    #[inline(always)]
    fn add(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        each!(|a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        each!(|a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        each!(|a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        each!(|a, b| a / b)
    }

    #[inline(always)]
    fn mul_add(self, a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        each!(|a, b, c| a * b + c)
    }

    #[inline(always)]
    fn max(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        each!(|a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn below(self, a: [f32; 16], b: [f32; 16], yes: [f32; 16], no: [f32; 16]) -> [f32; 16] {
        each!(|a, b, yes, no| if a < b { yes } else { no })
    }

    #[inline(always)]
    fn add_to_exponent(self, v: [f32; 16], t: [f32; 16]) -> [f32; 16] {
        each!(|v, t| f32::from_bits(v.to_bits().wrapping_add(t.to_bits() << 23)))
    }

    #[inline(always)]
    fn halves(self, from: &[F16; 16]) -> [f32; 16] {
        each!(|from| from.to_f32())
    }

    #[inline(always)]
    fn half(self, x: F16) -> [f32; 16] {
        [x.to_f32(); 16]
    }

    #[inline(always)]
    fn bytes(self, from: &[i8; 16]) -> [f32; 16] {
        each!(|from| f32::from(from))
    }

    #[inline(always)]
    fn sum(self, v: [f32; 16]) -> f32 {
        fold!(v)
    }

    #[inline(always)]
    fn zeros(self) -> [f64; 16] {
        [0.0; 16]
    }

    #[inline(always)]
    fn add_squares(self, v: [f32; 16], to: [f64; 16]) -> [f64; 16] {
        each!(|v, to| f64::from(v) * f64::from(v) + to)
    }

    #[inline(always)]
    fn sum_doubles(self, v: [f64; 16]) -> f64 {
        fold!(v)
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Simd;
    use crate::kernels::x86::half_bits;
    use crate::quant::F16;

    /// Proof of AVX2, FMA and F16C: two registers of eight lanes.
    #[derive(Clone, Copy)]
    pub(in crate::kernels) struct Avx2(());

    /// Proof of AVX-512 F: one register.
    #[derive(Clone, Copy)]
    pub(in crate::kernels) struct Avx512(());

    /// Methods that are one intrinsic on each half.
    macro_rules! halves {
        ($($name:ident($($v:ident),*) $intrinsic:ident;)*) => {$(
            #[inline(always)]
            fn $name(self, $($v: [__m256; 2]),*) -> [__m256; 2] {
                // SAFETY: `self` proves the features.
                unsafe { [$intrinsic($($v[0]),*), $intrinsic($($v[1]),*)] }
            }
        )*};
    }

    impl Simd for Avx2 {
        type F = [__m256; 2];
        type D = [__m256d; 4];

        #[inline(always)]
        unsafe fn new() -> Self {
            Self(())
        }

        halves! {
            add(a, b) _mm256_add_ps;
            sub(a, b) _mm256_sub_ps;
            mul(a, b) _mm256_mul_ps;
            div(a, b) _mm256_div_ps;
            mul_add(a, b, c) _mm256_fmadd_ps;
            max(a, b) _mm256_max_ps;
        }

        #[inline(always)]
        fn splat(self, x: f32) -> [__m256; 2] {
            // SAFETY: `self` proves the features.
            unsafe { [_mm256_set1_ps(x); 2] }
        }

        #[inline(always)]
        fn load(self, from: &[f32; 16]) -> [__m256; 2] {
            // SAFETY: `self` proves the features; the array is as long as both registers.
            unsafe {
                [
                    _mm256_loadu_ps(from.as_ptr()),
                    _mm256_loadu_ps(from.as_ptr().add(8)),
                ]
            }
        }

        #[inline(always)]
        fn store(self, v: [__m256; 2], to: &mut [f32; 16]) {
            // SAFETY: `self` proves the features; the array is as long as both registers.
            unsafe {
                _mm256_storeu_ps(to.as_mut_ptr(), v[0]);
                _mm256_storeu_ps(to.as_mut_ptr().add(8), v[1]);
            }
        }

        #[inline(always)]
        fn below(
            self,
            a: [__m256; 2],
            b: [__m256; 2],
            yes: [__m256; 2],
            no: [__m256; 2],
        ) -> [__m256; 2] {
            // SAFETY: `self` proves the features.
            unsafe {
                let low = _mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0]);
                let high = _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1]);
                [
                    _mm256_blendv_ps(no[0], yes[0], low),
                    _mm256_blendv_ps(no[1], yes[1], high),
                ]
            }
        }

        #[inline(always)]
        fn add_to_exponent(self, v: [__m256; 2], t: [__m256; 2]) -> [__m256; 2] {
            let mut out = v;
            for i in 0..2 {
                // SAFETY: `self` proves the features.
                out[i] = unsafe {
                    let shift = _mm256_slli_epi32::<23>(_mm256_castps_si256(t[i]));
                    _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v[i]), shift))
                };
            }
            out
        }

        #[inline(always)]
        fn halves(self, from: &[F16; 16]) -> [__m256; 2] {
            // SAFETY: `self` proves the features; the array is as long as both loads.
            unsafe {
                let from = from.as_ptr();
                [
                    _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                    _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast())),
                ]
            }
        }

        #[inline(always)]
        fn half(self, x: F16) -> [__m256; 2] {
            // SAFETY: `self` proves the features.
            unsafe { [_mm256_cvtph_ps(_mm_set1_epi16(half_bits(x) as i16)); 2] }
        }

        #[inline(always)]
        fn bytes(self, from: &[i8; 16]) -> [__m256; 2] {
            // SAFETY: `self` proves the features; the array is as long as the load.
            unsafe {
                let bytes = _mm_loadu_si128(from.as_ptr().cast());
                let high = _mm_unpackhi_epi64(bytes, bytes);
                [
                    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high)),
                ]
            }
        }

        #[inline(always)]
        fn sum(self, v: [__m256; 2]) -> f32 {
            // SAFETY: `self` proves the features.
            unsafe {
                let v = _mm256_add_ps(v[0], v[1]);
                let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
                let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
                _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
            }
        }

        #[inline(always)]
        fn zeros(self) -> [__m256d; 4] {
            // SAFETY: `self` proves the features.
            unsafe { [_mm256_setzero_pd(); 4] }
        }

        #[inline(always)]
        fn add_squares(self, v: [__m256; 2], mut to: [__m256d; 4]) -> [__m256d; 4] {
            for i in 0..4 {
                // SAFETY: `self` proves the features.
                unsafe {
                    let four = match i % 2 {
                        0 => _mm256_castps256_ps128(v[i / 2]),
                        _ => _mm256_extractf128_ps::<1>(v[i / 2]),
                    };
                    let four = _mm256_cvtps_pd(four);
                    to[i] = _mm256_fmadd_pd(four, four, to[i]);
                }
            }
            to
        }

        #[inline(always)]
        fn sum_doubles(self, v: [__m256d; 4]) -> f64 {
            // SAFETY: `self` proves the features.
            unsafe {
                let v = [_mm256_add_pd(v[0], v[2]), _mm256_add_pd(v[1], v[3])];
                let v = _mm256_add_pd(v[0], v[1]);
                let v = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd::<1>(v));
                _mm_cvtsd_f64(_mm_add_sd(v, _mm_unpackhi_pd(v, v)))
            }
        }
    }

    /// Methods that are one intrinsic.
    macro_rules! whole {
        ($($name:ident($($v:ident),*) $intrinsic:ident;)*) => {$(
            #[inline(always)]
            fn $name(self, $($v: __m512),*) -> __m512 {
                // SAFETY: `self` proves the features.
                unsafe { $intrinsic($($v),*) }
            }
        )*};
    }

    impl Simd for Avx512 {
        type F = __m512;
        type D = [__m512d; 2];

        #[inline(always)]
        unsafe fn new() -> Self {
            Self(())
        }

        whole! {
            add(a, b) _mm512_add_ps;
            sub(a, b) _mm512_sub_ps;
            mul(a, b) _mm512_mul_ps;
            div(a, b) _mm512_div_ps;
            mul_add(a, b, c) _mm512_fmadd_ps;
            max(a, b) _mm512_max_ps;
        }

        #[inline(always)]
        fn splat(self, x: f32) -> __m512 {
            // SAFETY: `self` proves the features.
            unsafe { _mm512_set1_ps(x) }
        }

        #[inline(always)]
        fn load(self, from: &[f32; 16]) -> __m512 {
            // SAFETY: `self` proves the features; the array is as long as the register.
            unsafe { _mm512_loadu_ps(from.as_ptr()) }
        }

        #[inline(always)]
        fn store(self, v: __m512, to: &mut [f32; 16]) {
            // SAFETY: `self` proves the features; the array is as long as the register.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), v) }
        }

        #[inline(always)]
        fn below(self, a: __m512, b: __m512, yes: __m512, no: __m512) -> __m512 {
            // SAFETY: `self` proves the features.
            unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), no, yes) }
        }

        #[inline(always)]
        fn add_to_exponent(self, v: __m512, t: __m512) -> __m512 {
            // SAFETY: `self` proves the features.
            unsafe {
                let shift = _mm512_slli_epi32::<23>(_mm512_castps_si512(t));
                _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), shift))
            }
        }

        #[inline(always)]
        fn halves(self, from: &[F16; 16]) -> __m512 {
            // SAFETY: `self` proves the features; the array is as long as the load.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())) }
        }

        #[inline(always)]
        fn half(self, x: F16) -> __m512 {
            // SAFETY: `self` proves the features.
            unsafe { _mm512_cvtph_ps(_mm256_set1_epi16(half_bits(x) as i16)) }
        }

        #[inline(always)]
        fn bytes(self, from: &[i8; 16]) -> __m512 {
            // SAFETY: `self` proves the features; the array is as long as the load.
            unsafe {
                let bytes = _mm_loadu_si128(from.as_ptr().cast());
                _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))
            }
        }

        #[inline(always)]
        fn sum(self, v: __m512) -> f32 {
            // SAFETY: `self` proves the features.
            unsafe {
                let v = _mm512_add_ps(v, _mm512_shuffle_f32x4::<0b01_00_11_10>(v, v));
                let v = _mm512_add_ps(v, _mm512_shuffle_f32x4::<0b10_11_00_01>(v, v));
                let v = _mm512_castps512_ps128(v);
                let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
                _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
            }
        }

        #[inline(always)]
        fn zeros(self) -> [__m512d; 2] {
            // SAFETY: `self` proves the features.
            unsafe { [_mm512_setzero_pd(); 2] }
        }

        #[inline(always)]
        fn add_squares(self, v: __m512, to: [__m512d; 2]) -> [__m512d; 2] {
            // SAFETY: `self` proves the features.
            unsafe {
                let low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
                let high = _mm512_castps_pd(_mm512_shuffle_f32x4::<0b11_10_11_10>(v, v));
                let high = _mm512_cvtps_pd(_mm512_castps512_ps256(_mm512_castpd_ps(high)));
                [
                    _mm512_fmadd_pd(low, low, to[0]),
                    _mm512_fmadd_pd(high, high, to[1]),
                ]
            }
        }

        #[inline(always)]
        fn sum_doubles(self, v: [__m512d; 2]) -> f64 {
            // SAFETY: `self` proves the features.
            unsafe {
                let v = _mm512_add_pd(v[0], v[1]);
                let v = _mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd::<1>(v));
                let v = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd::<1>(v));
                _mm_cvtsd_f64(_mm_add_sd(v, _mm_unpackhi_pd(v, v)))
            }
        }

        #[inline(always)]
        fn sums(self, v: [__m512; 16]) -> [f32; 16] {
            let mut sums = [0.0; 16];
            // SAFETY: `self` proves the features; the array is as long as the register.
            unsafe {
                // Halves onto halves, each step for twice as many sums a register.
                let mut a = [_mm512_setzero_ps(); 8];
                for i in 0..8 {
                    let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(v[i], v[i + 8]);
                    let high = _mm512_shuffle_f32x4::<0b11_10_11_10>(v[i], v[i + 8]);
                    a[i] = _mm512_add_ps(low, high);
                }
                for i in 0..4 {
                    let low = _mm512_shuffle_f32x4::<0b10_00_10_00>(a[i], a[i + 4]);
                    let high = _mm512_shuffle_f32x4::<0b11_01_11_01>(a[i], a[i + 4]);
                    a[i] = _mm512_add_ps(low, high);
                }
                for i in 0..2 {
                    let low = _mm512_shuffle_ps::<0b01_00_01_00>(a[i], a[i + 2]);
                    let high = _mm512_shuffle_ps::<0b11_10_11_10>(a[i], a[i + 2]);
                    a[i] = _mm512_add_ps(low, high);
                }
                let low = _mm512_shuffle_ps::<0b10_00_10_00>(a[0], a[1]);
                let high = _mm512_shuffle_ps::<0b11_01_11_01>(a[0], a[1]);
                let all = _mm512_add_ps(low, high);
                // Lane by lane the sums of 0 2 1 3 8 10 9 11 4 6 5 7 12 14 13 15.
                let order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
                _mm512_storeu_ps(sums.as_mut_ptr(), _mm512_permutexvar_ps(order, all));
            }
            sums
        }

        #[inline(always)]
        fn transpose(self, rows: &mut [__m512; 16]) {
            let r = *rows;
            // SAFETY: `self` proves the features.
            unsafe {
                // 4 × 4 lanes within each quarter of four rows...
                let mut t = r;
                for i in (0..16).step_by(4) {
                    let a = _mm512_unpacklo_ps(r[i], r[i + 1]);
                    let b = _mm512_unpackhi_ps(r[i], r[i + 1]);
                    let c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]);
                    let d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
                    t[i] = _mm512_shuffle_ps::<0b01_00_01_00>(a, c);
                    t[i + 1] = _mm512_shuffle_ps::<0b11_10_11_10>(a, c);
                    t[i + 2] = _mm512_shuffle_ps::<0b01_00_01_00>(b, d);
                    t[i + 3] = _mm512_shuffle_ps::<0b11_10_11_10>(b, d);
                }
                // ... then 4 × 4 quarters of the rows i, i + 4, i + 8, i + 12.
                for i in 0..4 {
                    let a = _mm512_shuffle_f32x4::<0b10_00_10_00>(t[i], t[i + 4]);
                    let b = _mm512_shuffle_f32x4::<0b11_01_11_01>(t[i], t[i + 4]);
                    let c = _mm512_shuffle_f32x4::<0b10_00_10_00>(t[i + 8], t[i + 12]);
                    let d = _mm512_shuffle_f32x4::<0b11_01_11_01>(t[i + 8], t[i + 12]);
                    rows[i] = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, c);
                    rows[i + 4] = _mm512_shuffle_f32x4::<0b10_00_10_00>(b, d);
                    rows[i + 8] = _mm512_shuffle_f32x4::<0b11_01_11_01>(a, c);
                    rows[i + 12] = _mm512_shuffle_f32x4::<0b11_01_11_01>(b, d);
                }
            }
        }
    }
}
