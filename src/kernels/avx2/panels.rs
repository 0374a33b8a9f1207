//! Panels of tile products, filled with AVX2: see [`crate::kernels::tiles`].
//!
//! Eight rows at a time, and 32 codes of each, as the dot products take them, are turned so that
//! a register holds the same four columns of every row. Scales are turned likewise.

use std::arch::x86_64::*;

use super::codes::{Codes, SmallBlock};
use super::multiply::ROWS;
use super::turn;
use crate::kernels::tiles::{Panel, STRETCH, TILE_ROWS, has_fine_scales, has_minima};
use crate::kernels::unpack::{GROUP, Unpack};
use crate::kernels::x86::{SuperBlock, broadcast_f16};
use crate::quant::{
    BlockIQ4NL, BlockIQ4XS, BlockMXFP4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K,
    BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0,
};

/// A line of a panel for one row: a scale, or a minimum, for each 32 columns of a stretch or for
/// each 16.
type Line = [f32; STRETCH / GROUP];

/// A block that panels are filled from.
pub(super) trait Fill: Codes + Unpack {
    /// The scales and minima of a row's stretch.
    ///
    /// # Safety
    /// The CPU has AVX2 and F16C.
    unsafe fn lines(stretch: &[Self]) -> (Line, Line);
}

/// Fills a panel from the stretches of a tile's rows, all of the same length; codes that have a
/// sign are raised by `raised`.
///
/// # Safety
/// The CPU has AVX2 and F16C.
#[target_feature(enable = "avx2,f16c")]
pub(super) unsafe fn fill<B: Fill>(panel: &mut Panel, stretch: &[&[B]; TILE_ROWS], raised: u8) {
    let stripes = B::LEN / 32;
    let raised = if B::OFFSET.is_none() { raised } else { 0 };
    let raised = _mm256_set1_epi8(raised as i8);
    for (rows, stretch) in stretch.as_chunks::<ROWS>().0.iter().enumerate() {
        assert!(stretch.iter().all(|row| row.len() == stretch[0].len()));
        let first_row = rows * ROWS;
        stretch.iter().for_each(|row| prefetch_next(row));
        for b in 0..stretch[0].len() {
            for j in 0..stripes {
                let mut codes = [_mm256_setzero_si256(); ROWS];
                for (codes, row) in codes.iter_mut().zip(stretch) {
                    // SAFETY: this function has the features.
                    *codes = _mm256_xor_si256(unsafe { row[b].codes(j) }, raised);
                }
                let fours = panel.codes[(b * stripes + j) * 8..][..8].iter_mut();
                for (fours, codes) in fours.zip(turn(codes)) {
                    let place = bytemuck::cast_slice_mut(&mut fours[first_row..][..ROWS]);
                    store(place, codes);
                }
            }
        }
        let mut scales = [[0.0; STRETCH / GROUP]; ROWS];
        let mut minima = scales;
        for ((scales, minima), row) in scales.iter_mut().zip(&mut minima).zip(stretch) {
            // SAFETY: this function has the features.
            (*scales, *minima) = unsafe { B::lines(row) };
        }
        put_lines::<B>(&mut panel.scales, first_row, &scales);
        if has_minima(B::TYPE) {
            put_lines::<B>(&mut panel.minima, first_row, &minima);
        }
    }
}

/// Asks for the next stretch of a row: the prefetchers lose their way among so many rows.
#[inline]
fn prefetch_next<B>(stretch: &[B]) {
    let bytes = size_of_val(stretch);
    for line in (0..bytes).step_by(64) {
        let next = stretch.as_ptr().cast::<i8>().wrapping_add(bytes + line);
        // SAFETY: a prefetch may point anywhere.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(next) };
    }
}

/// Turns the lines of eight rows.
#[inline]
#[target_feature(enable = "avx2")]
fn put_lines<B: Fill>(
    place: &mut [[f32; TILE_ROWS]; STRETCH / GROUP],
    first_row: usize,
    lines: &[Line; ROWS],
) {
    let parts = if has_fine_scales(B::TYPE) { 2 } else { 1 };
    for part in 0..parts {
        let mut turned = [_mm256_setzero_si256(); ROWS];
        for (turned, line) in turned.iter_mut().zip(lines) {
            *turned = super::load_u8(bytemuck::cast_ref(&line.as_chunks::<8>().0[part]));
        }
        for (place, scales) in place[part * 8..].iter_mut().zip(turn(turned)) {
            store(
                bytemuck::cast_slice_mut(&mut place[first_row..][..ROWS]),
                scales,
            );
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(to: &mut [[u8; 32]], v: __m256i) {
    // SAFETY: the array is as long as the register, and the store takes any alignment.
    unsafe { _mm256_storeu_si256(to[0].as_mut_ptr().cast(), v) }
}

macro_rules! fill {
    ($lines:ident: $($block:ty)*) => {$(
        impl Fill for $block {
            #[inline]
            #[target_feature(enable = "avx2,f16c")]
            unsafe fn lines(stretch: &[Self]) -> (Line, Line) {
                $lines(stretch)
            }
        }
    )*};
}

fill!(small_lines: BlockQ4_0 BlockQ4_1 BlockQ5_0 BlockQ5_1 BlockQ8_0 BlockIQ4NL BlockMXFP4);
fill!(super_lines: BlockQ2K BlockQ3K BlockQ4K BlockQ5K BlockQ6K BlockIQ4XS);

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn small_lines<B: SmallBlock>(stretch: &[B]) -> (Line, Line) {
    let zero = _mm256_setzero_ps();
    // SAFETY: this function has the features.
    let (scales, offsets) = unsafe { (B::scales(stretch), B::offsets(stretch)) };
    let minima = _mm256_sub_ps(zero, offsets);
    (
        bytemuck::cast([scales, zero]),
        bytemuck::cast([minima, zero]),
    )
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn super_lines<B: SuperBlock>(stretch: &[B]) -> (Line, Line) {
    let block = &stretch[0];
    // SAFETY: this function has the features.
    let (scales, minima) = unsafe { block.scales_and_minima() };
    let scales = in_units::<B>(broadcast_f16(block.d()), scales);
    let minima = if B::MINIMA {
        in_units::<B>(broadcast_f16(block.dmin()), minima)
    } else {
        [0.0; STRETCH / GROUP]
    };
    (scales, minima)
}

/// Sixteen signed bytes times a unit; every second one where they come in twos.
#[inline]
#[target_feature(enable = "avx2")]
fn in_units<B: SuperBlock>(unit: __m256, bytes: __m128i) -> Line {
    let bytes = if has_fine_scales(B::TYPE) {
        bytes
    } else {
        let even = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, -1, -1, -1, -1, -1, -1, -1, -1);
        _mm_shuffle_epi8(bytes, even)
    };
    bytemuck::cast(super::in_units(unit, bytes))
}
