//! How codes meet activations: with AVX2 alone, or with AVX-VNNI.
//!
//! ```text
//! codes     32 × 8 bit, without sign     q      32 × 8 bit, signed
//!      └──────── maddubs: 16 sums of 2 products, 16 bit ────────┘  ┐
//!                madd with 1: 8 sums of 4 products, 32 bit         ┘ vpdpbusd
//! ```
//!
//! `maddubs` saturates where a pair of products leaves 16 bits. Here it never does: activations
//! keep to −127..=127 and codes without a sign stay below 64, so a pair is at most
//! `2 · 63 · 127 = 16002` (and two pairs of codes below 32 fit as well); codes that need all 8 bits come with their sign, which is moved over
//! to the activation, and `2 · 128 · 127 = 32512` still fits. `vpdpbusd` cannot saturate.

use std::arch::asm;
use std::arch::x86_64::*;

use super::load_u8;
use crate::kernels::tiles::Fours;

/// Registers of rows that are multiplied at a time: 16 rows.
pub(super) const REGISTERS: usize = 2;

/// Rows of a register: each takes four columns of 8 bits.
pub(super) const ROWS: usize = 8;

/// A way to multiply codes with activations, exactly.
pub(super) trait Multiply {
    /// What codes with a sign are raised by in a panel.
    const RAISED: u8;

    /// The products of twice 32 codes, of which `offset` is taken off, in sums of eight: of four, and of
    /// the four at their place in the other register. Codes without a sign are below 32; `None`: the
    /// codes have a sign.
    ///
    /// # Safety
    /// The CPU has AVX2 (and AVX-VNNI, where that is what multiplies).
    unsafe fn dot_two(codes: [__m256i; 2], offset: Option<i8>, q: [__m256i; 2]) -> __m256i;

    /// The dot products of 16 rows, from `first_row` on, with `T` tokens over `N` fours of
    /// columns, on top of `starts`.
    ///
    /// `DEPTH` products of pairs fit into 16 bits together; 0: the codes have a sign and come
    /// raised by [`Multiply::RAISED`].
    ///
    /// # Safety
    /// As for [`Multiply::dot_two`]; `first_row` is 0 or 16.
    unsafe fn dots<const DEPTH: usize, const N: usize, const T: usize>(
        codes: &[Fours; N],
        first_row: usize,
        q: [&[[i8; 4]; N]; T],
        starts: [i32; T],
    ) -> [[__m256i; REGISTERS]; T];
}

/// The products of 32 codes, of which `offset` is taken off, in sums of two; `None`: the codes
/// have a sign.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn pairs(codes: __m256i, offset: Option<i8>, q: __m256i) -> __m256i {
    match offset {
        None => _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(q, codes)),
        Some(0) => _mm256_maddubs_epi16(codes, q),
        Some(offset) => _mm256_sub_epi16(
            _mm256_maddubs_epi16(codes, q),
            _mm256_maddubs_epi16(_mm256_set1_epi8(offset), q),
        ),
    }
}

/// AVX2's own instructions.
pub(super) struct Maddubs;

impl Multiply for Maddubs {
    const RAISED: u8 = 0;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn dot_two(codes: [__m256i; 2], offset: Option<i8>, q: [__m256i; 2]) -> __m256i {
        let ones = _mm256_set1_epi16(1);
        let products = |codes: [__m256i; 2]| {
            let (a, b) = (
                _mm256_maddubs_epi16(codes[0], q[0]),
                _mm256_maddubs_epi16(codes[1], q[1]),
            );
            _mm256_add_epi16(a, b)
        };
        match offset {
            None => {
                // Two sums of these do not fit into 16 bits.
                let (a, b) = (pairs(codes[0], None, q[0]), pairs(codes[1], None, q[1]));
                _mm256_add_epi32(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones))
            }
            Some(0) => _mm256_madd_epi16(products(codes), ones),
            Some(offset) => {
                // The same for all rows: the compiler computes it once.
                let offset = products([_mm256_set1_epi8(offset); 2]);
                _mm256_madd_epi16(_mm256_sub_epi16(products(codes), offset), ones)
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn dots<const DEPTH: usize, const N: usize, const T: usize>(
        codes: &[Fours; N],
        first_row: usize,
        q: [&[[i8; 4]; N]; T],
        starts: [i32; T],
    ) -> [[__m256i; REGISTERS]; T] {
        let ones = _mm256_set1_epi16(1);
        let mut dots = start(starts);
        if DEPTH == 0 {
            // Three tokens at a time: magnitudes and signs take two registers more.
            for first in (0..T).step_by(3) {
                for k in 0..N {
                    let codes = load_codes(&codes[k], first_row);
                    let magnitudes = [_mm256_abs_epi8(codes[0]), _mm256_abs_epi8(codes[1])];
                    for t in first..(first + 3).min(T) {
                        let four = broadcast(&q[t][k]);
                        for r in 0..REGISTERS {
                            let signed = _mm256_sign_epi8(four, codes[r]);
                            let pairs = _mm256_maddubs_epi16(magnitudes[r], signed);
                            let fours = _mm256_madd_epi16(pairs, ones);
                            dots[t][r] = _mm256_add_epi32(dots[t][r], fours);
                        }
                    }
                }
            }
            return dots;
        }
        for some in (0..N).step_by(DEPTH) {
            let mut pairs = [[_mm256_setzero_si256(); REGISTERS]; T];
            for k in some..(some + DEPTH).min(N) {
                let codes = load_codes(&codes[k], first_row);
                for t in 0..T {
                    let four = broadcast(&q[t][k]);
                    for r in 0..REGISTERS {
                        let products = _mm256_maddubs_epi16(codes[r], four);
                        pairs[t][r] = _mm256_add_epi16(pairs[t][r], products);
                    }
                }
            }
            for t in 0..T {
                for r in 0..REGISTERS {
                    let fours = _mm256_madd_epi16(pairs[t][r], ones);
                    dots[t][r] = _mm256_add_epi32(dots[t][r], fours);
                }
            }
        }
        dots
    }
}

/// AVX-VNNI.
pub(super) struct Vnni;

impl Multiply for Vnni {
    const RAISED: u8 = 128;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn dot_two(codes: [__m256i; 2], offset: Option<i8>, q: [__m256i; 2]) -> __m256i {
        let zero = _mm256_setzero_si256();
        // SAFETY: the caller's.
        unsafe {
            match offset {
                None => {
                    let magnitudes = [_mm256_abs_epi8(codes[0]), _mm256_abs_epi8(codes[1])];
                    let signed = [
                        _mm256_sign_epi8(q[0], codes[0]),
                        _mm256_sign_epi8(q[1], codes[1]),
                    ];
                    let dot = dpbusd(zero, magnitudes[0], signed[0]);
                    dpbusd(dot, magnitudes[1], signed[1])
                }
                Some(0) => dpbusd(dpbusd(zero, codes[0], q[0]), codes[1], q[1]),
                Some(offset) => {
                    let offset = _mm256_set1_epi8(offset);
                    let offsets = dpbusd(dpbusd(zero, offset, q[0]), offset, q[1]);
                    let start = _mm256_sub_epi32(zero, offsets);
                    dpbusd(dpbusd(start, codes[0], q[0]), codes[1], q[1])
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn dots<const DEPTH: usize, const N: usize, const T: usize>(
        codes: &[Fours; N],
        first_row: usize,
        q: [&[[i8; 4]; N]; T],
        starts: [i32; T],
    ) -> [[__m256i; REGISTERS]; T] {
        let mut dots = start(starts);
        for k in 0..N {
            let codes = load_codes(&codes[k], first_row);
            for t in 0..T {
                let four = broadcast(&q[t][k]);
                for r in 0..REGISTERS {
                    // SAFETY: the caller's.
                    dots[t][r] = unsafe { dpbusd(dots[t][r], codes[r], four) };
                }
            }
        }
        dots
    }
}

/// `vpdpbusd` with 256 bits. As assembly, so that it is inlined in functions which AVX2 without
/// it shares.
///
/// # Safety
/// The CPU has AVX-VNNI.
#[inline]
#[target_feature(enable = "avx2")]
pub(in crate::kernels) unsafe fn dpbusd(mut sums: __m256i, codes: __m256i, q: __m256i) -> __m256i {
    // SAFETY: it works on registers alone.
    unsafe {
        asm!(
            "{{vex}} vpdpbusd {0}, {1}, {2}",
            inout(ymm_reg) sums,
            in(ymm_reg) codes,
            in(ymm_reg) q,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

#[inline]
#[target_feature(enable = "avx2")]
fn start<const T: usize>(starts: [i32; T]) -> [[__m256i; REGISTERS]; T] {
    let mut dots = [[_mm256_setzero_si256(); REGISTERS]; T];
    for t in 0..T {
        dots[t] = [_mm256_set1_epi32(starts[t]); REGISTERS];
    }
    dots
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_codes(fours: &Fours, first_row: usize) -> [__m256i; REGISTERS] {
    let rows = &fours[first_row..][..REGISTERS * ROWS];
    let registers = bytemuck::cast_slice::<_, [u8; 32]>(rows);
    [load_u8(&registers[0]), load_u8(&registers[1])]
}

#[inline]
#[target_feature(enable = "avx2")]
fn broadcast(four: &[i8; 4]) -> __m256i {
    _mm256_set1_epi32(bytemuck::cast(*four))
}
