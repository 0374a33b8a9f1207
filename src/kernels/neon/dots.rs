//! Dot products of rows as they lie, with 8-bit activations.
//!
//! Columns are gone through 128 at a time (64 where a scale covers 16): the dot products of
//! four groups are folded into one register, a group to a lane, where four scales and four sums
//! of activations meet them.

use std::arch::aarch64::*;

use super::codes::{Codes, SmallBlock, SuperBlock, halves};
use super::multiply::Multiply;
use super::{load_f32, load_i16, widen_half};
use crate::kernels::Activation;
use crate::quant::F16;
use crate::tensor::Rows;

/// The dot product of rows of blocks of 32.
///
/// # Safety
/// The CPU has what `M` multiplies with.
#[target_feature(enable = "neon")]
pub(super) unsafe fn dot_small<M: Multiply, B: SmallBlock>(
    rows: Rows<'_>,
    x: Activation<'_>,
    out: &mut [f32],
) {
    for (index, out) in out.iter_mut().enumerate() {
        // SAFETY: the caller's.
        *out = unsafe { small_blocks::<M, B>(bytemuck::cast_slice(rows.row(index)), x) };
    }
}

#[inline]
#[target_feature(enable = "neon")]
unsafe fn small_blocks<M: Multiply, B: SmallBlock>(row: &[B], x: Activation<'_>) -> f32 {
    let mut acc = vdupq_n_f32(0.0);
    let (row, row_rest) = row.as_chunks::<4>();
    let (q, q_rest) = x.q.as_chunks::<32>().0.as_chunks::<4>();
    let (s, s_rest) = x.scales.as_chunks::<4>();
    let (sums, sums_rest) = x.sums.as_chunks::<8>();
    for (((four, q), s), sums) in row.iter().zip(q).zip(s).zip(sums) {
        // SAFETY: the caller's.
        acc = unsafe { add_four::<M, B>(acc, four, q, s, sums) };
    }
    if !row_rest.is_empty() {
        // Blocks of zeros that meet activations of zero.
        let (mut four, mut q, mut s, mut sums) = ([B::zeroed(); 4], [[0; 32]; 4], [0.0; 4], [0; 8]);
        four[..row_rest.len()].copy_from_slice(row_rest);
        q[..q_rest.len()].copy_from_slice(q_rest);
        s[..s_rest.len()].copy_from_slice(s_rest);
        sums[..sums_rest.len()].copy_from_slice(sums_rest);
        // SAFETY: the caller's.
        acc = unsafe { add_four::<M, B>(acc, &four, &q, &s, &sums) };
    }
    vaddvq_f32(acc)
}

/// Adds the dot products of four blocks.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn add_four<M: Multiply, B: SmallBlock>(
    acc: float32x4_t,
    four: &[B; 4],
    q: &[[i8; 32]; 4],
    s: &[f32; 4],
    sums: &[i16; 8],
) -> float32x4_t {
    // SAFETY: the caller's.
    let dot = |k: usize| unsafe { M::dot_32(four[k].codes(0), halves(&q[k])) };
    let dots = [dot(0), dot(1), dot(2), dot(3)];
    let sums = vpaddlq_s16(load_i16(sums));
    let dots = each_sum::<B>(dots, sums);
    let s = load_f32(s);
    // SAFETY: every aarch64 has NEON.
    let (scales, offsets) = unsafe { (B::scales(four.each_ref()), B::offsets(four.each_ref())) };
    let acc = vfmaq_f32(acc, vcvtq_f32_s32(dots), vmulq_f32(scales, s));
    if !B::MINIMUM {
        return acc;
    }
    vfmaq_f32(acc, offsets, vmulq_f32(vcvtq_f32_s32(sums), s))
}

/// The dot product of rows of super-blocks with a scale for each 32 columns.
///
/// # Safety
/// The CPU has what `M` multiplies with.
#[target_feature(enable = "neon")]
pub(super) unsafe fn dot_coarse<M: Multiply, B: SuperBlock>(
    rows: Rows<'_>,
    x: Activation<'_>,
    out: &mut [f32],
) {
    for (index, out) in out.iter_mut().enumerate() {
        let mut acc = [vdupq_n_f32(0.0); 2];
        each_super_block::<B>(rows.row(index), x, |block, q, s, sums| {
            // SAFETY: every aarch64 has NEON.
            let (scales, minima) = unsafe { block.scales_and_minima() };
            let scales = in_units(block.d(), vget_low_s8(scales));
            let minima = in_units(block.dmin(), vget_low_s8(minima));
            macro_rules! add_half {
                ($h:literal) => {
                    // SAFETY: the caller's.
                    let dot = |j: usize| unsafe { M::dot_32(block.codes(j), halves(&q[j])) };
                    let dots = [
                        dot(4 * $h),
                        dot(4 * $h + 1),
                        dot(4 * $h + 2),
                        dot(4 * $h + 3),
                    ];
                    let sums = vpaddlq_s16(sums[$h]);
                    let dots = vcvtq_f32_s32(each_sum::<B>(dots, sums));
                    acc[$h] = vfmaq_f32(acc[$h], dots, vmulq_f32(scales[$h], s[$h]));
                    if B::MINIMA {
                        let s_sums = vmulq_f32(vcvtq_f32_s32(sums), s[$h]);
                        acc[$h] = vfmsq_f32(acc[$h], minima[$h], s_sums);
                    }
                };
            }
            add_half!(0);
            add_half!(1);
        });
        *out = vaddvq_f32(vaddq_f32(acc[0], acc[1]));
    }
}

/// The dot product of rows of super-blocks with a scale for each 16 columns.
///
/// # Safety
/// The CPU has what `M` multiplies with.
#[target_feature(enable = "neon")]
pub(super) unsafe fn dot_fine<M: Multiply, B: SuperBlock>(
    rows: Rows<'_>,
    x: Activation<'_>,
    out: &mut [f32],
) {
    for (index, out) in out.iter_mut().enumerate() {
        let mut acc = [vdupq_n_f32(0.0); 2];
        each_super_block::<B>(rows.row(index), x, |block, q, s, sums| {
            // SAFETY: every aarch64 has NEON.
            let (scales, minima) = unsafe { block.scales_and_minima() };
            let twice = |k: usize| match k % 2 {
                0 => vzip1q_f32(s[k / 2], s[k / 2]),
                _ => vzip2q_f32(s[k / 2], s[k / 2]),
            };
            let scales = [
                in_units(block.d(), vget_low_s8(scales)),
                in_units(block.d(), vget_high_s8(scales)),
            ];
            let minima = [
                in_units(block.dmin(), vget_low_s8(minima)),
                in_units(block.dmin(), vget_high_s8(minima)),
            ];
            macro_rules! add_quarter {
                ($k:literal) => {
                    // SAFETY: the caller's.
                    let [codes, more] = unsafe { [block.codes(2 * $k), block.codes(2 * $k + 1)] };
                    let (q, more_q) = (halves(&q[2 * $k]), halves(&q[2 * $k + 1]));
                    // SAFETY: the caller's.
                    let dots = unsafe {
                        [
                            M::dot_16(codes[0], q[0]),
                            M::dot_16(codes[1], q[1]),
                            M::dot_16(more[0], more_q[0]),
                            M::dot_16(more[1], more_q[1]),
                        ]
                    };
                    let sums = match $k % 2 {
                        0 => vmovl_s16(vget_low_s16(sums[$k / 2])),
                        _ => vmovl_high_s16(sums[$k / 2]),
                    };
                    let (i, s) = ($k % 2, twice($k));
                    let dots = vcvtq_f32_s32(each_sum::<B>(dots, sums));
                    acc[i] = vfmaq_f32(acc[i], dots, vmulq_f32(scales[$k / 2][i], s));
                    if B::MINIMA {
                        let s_sums = vmulq_f32(vcvtq_f32_s32(sums), s);
                        acc[i] = vfmsq_f32(acc[i], minima[$k / 2][i], s_sums);
                    }
                };
            }
            add_quarter!(0);
            add_quarter!(1);
            add_quarter!(2);
            add_quarter!(3);
        });
        *out = vaddvq_f32(vaddq_f32(acc[0], acc[1]));
    }
}

/// Calls `add` for each super-block of a row, with the codes of its activations, their scales
/// and their sums.
#[inline(always)]
fn each_super_block<B: SuperBlock>(
    row: &[u8],
    x: Activation<'_>,
    mut add: impl FnMut(&B, &[[i8; 32]; 8], [float32x4_t; 2], [int16x8_t; 2]),
) {
    let row: &[B] = bytemuck::cast_slice(row);
    let (q, _) = x.q.as_chunks::<32>().0.as_chunks::<8>();
    let (s, _) = x.scales.as_chunks::<4>().0.as_chunks::<2>();
    let (sums, _) = x.sums.as_chunks::<8>().0.as_chunks::<2>();
    for (((block, q), s), sums) in row.iter().zip(q).zip(s).zip(sums) {
        // SAFETY: every aarch64 has NEON.
        let (s, sums) = unsafe {
            (
                [load_f32(&s[0]), load_f32(&s[1])],
                [load_i16(&sums[0]), load_i16(&sums[1])],
            )
        };
        add(block, q, s, sums);
    }
}

/// The four dot products of four groups, of which each has its lanes summed and its codes'
/// offset taken off; `q_sums` are the sums of the activations.
#[inline]
#[target_feature(enable = "neon")]
fn each_sum<B: Codes>(dots: [int32x4_t; 4], q_sums: int32x4_t) -> int32x4_t {
    let [a, b, c, d] = dots;
    let sums = vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d));
    match B::OFFSET {
        0 => sums,
        offset => vmlsq_s32(sums, q_sums, vdupq_n_s32(i32::from(offset))),
    }
}

/// Eight signed bytes times a unit.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn in_units(unit: F16, bytes: int8x8_t) -> [float32x4_t; 2] {
    let (unit, wide) = (widen_half(unit), vmovl_s8(bytes));
    let low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
    let high = vcvtq_f32_s32(vmovl_high_s16(wide));
    [vmulq_n_f32(low, unit), vmulq_n_f32(high, unit)]
}
