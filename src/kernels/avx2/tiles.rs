//! Tile products for AVX2 and AVX-VNNI: see [`crate::kernels::tiles`] for the idea.
//!
//! A register holds four columns of 8 rows. Two of them go against [`TOKENS`] tokens at a time,
//! whose sums of products stay in registers while the columns of a weight scale pass:
//!
//! ```text
//!               rows 0–7    rows 8–15      12 sums of products
//! token 0  q ──► multiply    multiply       2 registers of codes, 1 of q broadcast,
//!   …                                       1 for a product on its way
//! token 5  q ──► multiply    multiply
//! ```
//!
//! That is all 16 registers: the sums of terms in f32 wait in the output, in the first cache.
//!
//! Without VNNI, products of pairs are added in 16 bits for as long as they fit, and only then
//! widened: `2 · 15 · 127 · 8 < 2¹⁵`, so codes of four bits are widened once for 32 columns.
//! It is `2 · 31 · 127 · 4` for codes of five bits and `2 · 63 · 127 · 2` for codes of six.

use std::arch::x86_64::*;
use std::ops::Range;

use super::multiply::{Multiply, REGISTERS, ROWS};
use super::panels::{self, Fill};
use super::{load_f32, load_i16, store_f32, twice_each};
use crate::kernels::Activation;
use crate::kernels::activations::{SCALE_LEN, SUM_LEN};
use crate::kernels::tiles::{
    Panel, STRETCH, TILE_ROWS, Tile, each_stretch, has_fine_scales, has_minima,
};
use crate::quant::{
    BlockIQ4NL, BlockIQ4XS, BlockMXFP4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K,
    BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, BlockType,
};
use crate::tensor::Rows;

/// Tokens that are multiplied at a time.
const TOKENS: usize = 6;
/// Activation scales in a stretch.
const SCALES: usize = STRETCH / SCALE_LEN;
/// Sums of activations in a stretch.
const SUMS: usize = STRETCH / SUM_LEN;

/// The tile product for a type, if it is one of integers.
pub(super) fn tile<M: Multiply>(kind: BlockType) -> Option<Tile> {
    /// Depth: see [`Multiply::dots`]; the columns of a weight scale, in fours; minima.
    macro_rules! entry {
        ($block:ty, $depth:literal, $fours:literal, $minima:literal) => {
            Some(|rows, x, out| {
                // SAFETY: tables are only handed out where the CPU has the features.
                unsafe { tile_rows::<M, $block, $depth, $fours, $minima>(rows, x.x, out) }
            })
        };
    }
    match kind {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => None,
        BlockType::Q4_0 => entry!(BlockQ4_0, 8, 8, false),
        BlockType::Q4_1 => entry!(BlockQ4_1, 8, 8, true),
        BlockType::Q5_0 => entry!(BlockQ5_0, 4, 8, false),
        BlockType::Q5_1 => entry!(BlockQ5_1, 4, 8, true),
        BlockType::Q8_0 => entry!(BlockQ8_0, 0, 8, false),
        BlockType::Q2_K => entry!(BlockQ2K, 8, 4, true),
        BlockType::Q3_K => entry!(BlockQ3K, 8, 4, false),
        BlockType::Q4_K => entry!(BlockQ4K, 8, 8, true),
        BlockType::Q5_K => entry!(BlockQ5K, 4, 8, true),
        BlockType::Q6_K => entry!(BlockQ6K, 2, 4, false),
        BlockType::IQ4_NL => entry!(BlockIQ4NL, 0, 8, false),
        BlockType::IQ4_XS => entry!(BlockIQ4XS, 0, 8, false),
        BlockType::MXFP4 => entry!(BlockMXFP4, 0, 8, false),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn tile_rows<M: Multiply, B: Fill, const DEPTH: usize, const FOURS: usize, const MINIMA: bool>(
    rows: Rows<'_>,
    x: &[Activation<'_>],
    out: &mut [[f32; TILE_ROWS]],
) {
    const {
        assert!(FOURS == if has_fine_scales(B::TYPE) { 4 } else { 8 });
        assert!(MINIMA == has_minima(B::TYPE));
        assert!((DEPTH == 0) == B::OFFSET.is_none());
    }
    let raised = B::OFFSET.map_or(M::RAISED, |offset| offset as u8);
    let offset = i32::from(raised);
    each_stretch::<B>(
        rows,
        x,
        out,
        raised,
        // SAFETY: this function has the features.
        |panel, stretch| unsafe { panels::fill(panel, stretch, M::RAISED) },
        |panel, columns, out| multiply::<M, DEPTH, FOURS, MINIMA>(panel, offset, &columns, x, out),
    );
}

/// Adds the products of a panel with all tokens; a weight scale covers `FOURS` fours of columns.
#[target_feature(enable = "avx2,fma,f16c")]
fn multiply<M: Multiply, const DEPTH: usize, const FOURS: usize, const MINIMA: bool>(
    panel: &Panel,
    offset: i32,
    columns: &Range<usize>,
    x: &[Activation<'_>],
    out: &mut [[f32; TILE_ROWS]],
) {
    let mut factors = [[Factors::ZERO; TOKENS]; 2];
    let fill = |index: usize, factors: &mut [Factors; TOKENS]| {
        for (factors, x) in factors.iter_mut().zip(x.iter().skip(index * TOKENS)) {
            factors.fill::<FOURS, MINIMA>(x, offset, columns);
        }
    };
    fill(0, &mut factors[0]);
    for (index, (x, out)) in x.chunks(TOKENS).zip(out.chunks_mut(TOKENS)).enumerate() {
        // One block ahead: what was just stored is slow to be broadcast.
        fill(index + 1, &mut factors[(index + 1) % 2]);
        let factors = &factors[index % 2];
        macro_rules! with {
            ($($tokens:literal)*) => {
                match x.len() {
                    $($tokens => {
                        let mut q = [&[][..]; $tokens];
                        for (q, x) in q.iter_mut().zip(x) {
                            *q = x.q[columns.clone()].as_chunks::<SCALE_LEN>().0;
                        }
                        let (factors, _) = factors.split_first_chunk().expect("as many");
                        let out: &mut [_; $tokens] = out.try_into().expect("as many");
                        for first_row in (0..TILE_ROWS).step_by(REGISTERS * ROWS) {
                            // SAFETY: this function has the features, and M the table's.
                            unsafe {
                                block::<M, DEPTH, FOURS, MINIMA, $tokens>(
                                    panel, first_row, factors, q, out,
                                );
                            }
                        }
                    })*
                    _ => unreachable!("blocks hold up to six tokens"),
                }
            };
        }
        with!(1 2 3 4 5 6);
    }
}

/// What a token's stretch is multiplied with beside its codes.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Factors {
    /// `−offset · Σ q` for each weight scale.
    starts: [i32; SUMS],
    /// `s · Σ q` for each minimum.
    s_sums: [f32; SUMS],
    /// The scales.
    s: [f32; SCALES],
}

impl Factors {
    const ZERO: Self = Self {
        starts: [0; SUMS],
        s_sums: [0.0; SUMS],
        s: [0.0; SCALES],
    };

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn fill<const FOURS: usize, const MINIMA: bool>(
        &mut self,
        x: &Activation<'_>,
        offset: i32,
        columns: &Range<usize>,
    ) {
        let scales = &x.scales[columns.start / SCALE_LEN..columns.end / SCALE_LEN];
        let sums = &x.sums[columns.start / SUM_LEN..columns.end / SUM_LEN];
        let mut padded = [0; SUMS];
        let sums = match (scales.first_chunk(), sums.first_chunk()) {
            (Some(scales), Some(sums)) => {
                self.s = *scales;
                sums
            }
            _ => {
                self.s[..scales.len()].copy_from_slice(scales);
                padded[..sums.len()].copy_from_slice(sums);
                &padded
            }
        };
        let (s, sums) = (load_f32(&self.s), load_i16(sums));
        // 16 sums over 16 columns, or 8 over 32.
        let (sums, s) = if FOURS == 4 {
            let low = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(sums));
            let high = _mm256_cvtepi16_epi32(_mm256_extracti128_si256::<1>(sums));
            ([low, high], twice_each(s))
        } else {
            let sums = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
            ([sums, _mm256_setzero_si256()], [s, _mm256_setzero_ps()])
        };
        for half in 0..2 {
            let starts = _mm256_mullo_epi32(sums[half], _mm256_set1_epi32(-offset));
            self.starts.as_chunks_mut().0[half] = bytemuck::cast::<_, [i32; 8]>(starts);
            if MINIMA {
                let s_sums = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[half]), s[half]);
                store_f32(&mut self.s_sums.as_chunks_mut().0[half], s_sums);
            }
        }
    }
}

/// The innermost loops, for 16 rows and `T` tokens.
///
/// # Safety
/// The CPU has what `M` multiplies with.
#[inline(never)] // so that the compiler leaves the factors in memory, where they are broadcast from
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn block<
    M: Multiply,
    const DEPTH: usize,
    const FOURS: usize,
    const MINIMA: bool,
    const T: usize,
>(
    panel: &Panel,
    first_row: usize,
    factors: &[Factors; T],
    q: [&[[i8; SCALE_LEN]]; T],
    out: &mut [[f32; TILE_ROWS]; T],
) {
    let fine = SCALE_LEN / 4 / FOURS;
    let registers = first_row / ROWS..first_row / ROWS + REGISTERS;
    let codes = panel.codes.as_chunks::<{ SCALE_LEN / 4 }>().0;
    for (g, codes) in codes.iter().enumerate().take(q[0].len()) {
        let mut terms = [[_mm256_setzero_ps(); REGISTERS]; T];
        for half in 0..fine {
            let part = g * fine + half;
            let mut fours = [&[[0; 4]; FOURS]; T];
            let mut starts = [0; T];
            for t in 0..T {
                let all: &[[i8; 4]; SCALE_LEN / 4] = bytemuck::cast_ref(&q[t][g]);
                fours[t] = &all.as_chunks().0[half];
                starts[t] = factors[t].starts[part];
            }
            let codes = &codes.as_chunks().0[half];
            // SAFETY: the caller's.
            let dots = unsafe { M::dots::<DEPTH, FOURS, T>(codes, first_row, fours, starts) };
            let scales = &panel.scales[part].as_chunks().0[registers.clone()];
            for r in 0..REGISTERS {
                let scale = load_f32(&scales[r]);
                for t in 0..T {
                    let dot = _mm256_cvtepi32_ps(dots[t][r]);
                    terms[t][r] = if half == 0 {
                        _mm256_mul_ps(dot, scale)
                    } else {
                        _mm256_fmadd_ps(dot, scale, terms[t][r])
                    };
                }
            }
        }
        for t in 0..T {
            let s = _mm256_set1_ps(factors[t].s[g]);
            let out = &mut out[t].as_chunks_mut().0[registers.clone()];
            for r in 0..REGISTERS {
                let mut sum = _mm256_fmadd_ps(terms[t][r], s, load_f32(&out[r]));
                if MINIMA {
                    for half in 0..fine {
                        let part = g * fine + half;
                        let minima =
                            load_f32(&panel.minima[part].as_chunks().0[registers.start + r]);
                        let s_sum = _mm256_set1_ps(factors[t].s_sums[part]);
                        sum = _mm256_fnmadd_ps(minima, s_sum, sum);
                    }
                }
                store_f32(&mut out[r], sum);
            }
        }
    }
}
