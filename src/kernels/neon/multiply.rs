//! How products of signed bytes are summed: one step of each level of NEON.
//!
//! The instructions beyond the base have no stable intrinsics yet (Rust 1.95); they are written
//! here as assembly, one a function, on registers alone.

use std::arch::aarch64::*;
use std::arch::asm;

/// A way to multiply signed bytes; the weights' side may go down to −128, the activations' side
/// stays within ±127.
pub(super) trait Multiply {
    /// The dot product of 16 columns, in four lanes that are yet to be summed; exact.
    ///
    /// # Safety
    /// The CPU has the level's instructions.
    unsafe fn dot_16(codes: int8x16_t, q: int8x16_t) -> int32x4_t;

    /// The dot product of 32 columns, in four lanes that are yet to be summed; exact.
    ///
    /// # Safety
    /// The CPU has the level's instructions.
    unsafe fn dot_32(codes: [int8x16_t; 2], q: [int8x16_t; 2]) -> int32x4_t;
}

/// Every ARMv8 has these: products of 16 bits, added in pairs (`2 · 128 · 127 < 2¹⁵`), then
/// widened.
pub(super) struct Smull;

/// FEAT_DotProd: four products summed into a lane of 32 bits.
pub(super) struct Sdot;

impl Multiply for Smull {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn dot_16(codes: int8x16_t, q: int8x16_t) -> int32x4_t {
        vpaddlq_s16(pairs(codes, q))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn dot_32(codes: [int8x16_t; 2], q: [int8x16_t; 2]) -> int32x4_t {
        vpadalq_s16(vpaddlq_s16(pairs(codes[0], q[0])), pairs(codes[1], q[1]))
    }
}

/// Eight sums of two products.
#[inline]
#[target_feature(enable = "neon")]
fn pairs(codes: int8x16_t, q: int8x16_t) -> int16x8_t {
    let low = vmull_s8(vget_low_s8(codes), vget_low_s8(q));
    vmlal_high_s8(low, codes, q)
}

impl Multiply for Sdot {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn dot_16(codes: int8x16_t, q: int8x16_t) -> int32x4_t {
        // SAFETY: the caller's.
        unsafe { sdot(vdupq_n_s32(0), codes, q) }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn dot_32(codes: [int8x16_t; 2], q: [int8x16_t; 2]) -> int32x4_t {
        // SAFETY: the caller's.
        unsafe {
            let first = sdot(vdupq_n_s32(0), codes[0], q[0]);
            sdot(first, codes[1], q[1])
        }
    }
}

/// Adds to each lane the products of its four columns.
///
/// # Safety
/// The CPU has FEAT_DotProd.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn sdot(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: works on registers alone; the CPU has the instruction (the caller's).
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {sums:v}.4s, {a:v}.16b, {b:v}.16b",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// Adds to each lane the products of its four columns with the four of lane `LANE` of `b`.
///
/// # Safety
/// The CPU has FEAT_DotProd.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn sdot_lane<const LANE: i32>(
    mut sums: int32x4_t,
    a: int8x16_t,
    b: int8x16_t,
) -> int32x4_t {
    const { assert!(0 <= LANE && LANE < 4) };
    // SAFETY: works on registers alone; the CPU has the instruction (the caller's).
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {sums:v}.4s, {a:v}.16b, {b:v}.4b[{lane}]",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            b = in(vreg) b,
            lane = const LANE,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// Adds the product of a matrix of 2 rows and 8 columns with the transpose of another:
/// `sums[2·i + j] += Σ a[8·i + k] · b[8·j + k]`.
///
/// # Safety
/// The CPU has FEAT_I8MM.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn smmla(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: works on registers alone; the CPU has the instruction (the caller's).
    unsafe {
        asm!(
            ".arch_extension i8mm",
            "smmla {sums:v}.4s, {a:v}.16b, {b:v}.16b",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}
