//! Tile products for AVX-512 (F, BW, VL, VNNI): see [`crate::kernels::tiles`] for the idea.
//!
//! A register holds four columns of 16 rows, so a tile is two registers wide. Against them go
//! [`TOKENS`] tokens, whose sums stay in registers while 32 columns pass:
//!
//! ```text
//!               rows 0–15   rows 16–31      12 sums of products  (integers)
//! token 0  q ──► vpdpbusd    vpdpbusd       12 sums of terms     (f32)
//!   …                                        2 registers of codes, 1 of q broadcast
//! token 5  q ──► vpdpbusd    vpdpbusd
//! ```
//!
//! What limits a tile are the two pipes that multiply: `vpdpbusd` and every multiplication in f32
//! share them, while conversions, additions and loads run beside them. A sum of products
//! over 32 columns costs 8 `vpdpbusd`, and two multiplications more, by the row's scale and by the
//! token's, would be a fifth of the time. So there is only one: a token's scale is one of
//! [`Span::STEPS`] steps times a power of two. The scales of a panel's rows are kept
//! times each step, and the power of two is added to their exponents as an integer.

use std::arch::x86_64::*;

use super::panels::Fill;
use crate::kernels::Tokens;
use crate::kernels::activations::SCALE_LEN;
use crate::kernels::packed::{SPANS, Span, Stretch};
use crate::kernels::tiles::{
    Fours, Panel, STRETCH, TILE_ROWS, Tile, each_stretch, has_fine_scales, has_minima, offset,
};
use crate::kernels::unpack::GROUP;
use crate::quant::{
    BlockIQ4NL, BlockIQ4XS, BlockMXFP4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K,
    BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, BlockType,
};
use crate::tensor::Rows;

/// Tokens that are multiplied at a time.
const TOKENS: usize = 6;
/// From so many tokens on it pays to multiply the scales with each step beforehand.
const FEW_TOKENS: usize = 16;

/// The tile product for a type, if it is one of integers.
pub(super) fn tile(kind: BlockType) -> Option<Tile> {
    macro_rules! entry {
        ($block:ty) => {
            Some(|rows, x, out| {
                // SAFETY: tables are only handed out where the CPU has the features.
                unsafe { tile_rows::<$block>(rows, x, out) }
            })
        };
    }
    match kind {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => None,
        BlockType::Q4_0 => entry!(BlockQ4_0),
        BlockType::Q4_1 => entry!(BlockQ4_1),
        BlockType::Q5_0 => entry!(BlockQ5_0),
        BlockType::Q5_1 => entry!(BlockQ5_1),
        BlockType::Q8_0 => entry!(BlockQ8_0),
        BlockType::Q2_K => entry!(BlockQ2K),
        BlockType::Q3_K => entry!(BlockQ3K),
        BlockType::Q4_K => entry!(BlockQ4K),
        BlockType::Q5_K => entry!(BlockQ5K),
        BlockType::Q6_K => entry!(BlockQ6K),
        BlockType::IQ4_NL => entry!(BlockIQ4NL),
        BlockType::IQ4_XS => entry!(BlockIQ4XS),
        BlockType::MXFP4 => entry!(BlockMXFP4),
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn tile_rows<B: Fill>(rows: Rows<'_>, x: Tokens<'_>, out: &mut [[f32; TILE_ROWS]]) {
    let few = x.x.len() < FEW_TOKENS;
    let multiply = match (has_fine_scales(B::TYPE), has_minima(B::TYPE), few) {
        (false, false, false) => multiply::<1, false, false>,
        (false, false, true) => multiply::<1, false, true>,
        (false, true, false) => multiply::<1, true, false>,
        (false, true, true) => multiply::<1, true, true>,
        (true, false, false) => multiply::<2, false, false>,
        (true, false, true) => multiply::<2, false, true>,
        (true, true, false) => multiply::<2, true, false>,
        (true, true, true) => multiply::<2, true, true>,
    };
    let offset = offset(B::TYPE);
    // A power of two or none: sums are shifted by its exponent.
    const { assert!(has_minima(B::TYPE) == (self::offset(B::TYPE) == 0)) };
    debug_assert!(offset == 0 || offset.is_power_of_two());
    let shift = _mm512_set1_epi32(offset.trailing_zeros() as i32);
    let mut steps = Steps::new();
    each_stretch::<B>(
        rows,
        x.x,
        out,
        offset,
        // SAFETY: this function has the features.
        |panel, stretch| unsafe { B::fill(panel, stretch) },
        |panel, columns, out| {
            let spans = columns.len() / SCALE_LEN;
            let (groups, damaged) = if has_fine_scales(B::TYPE) {
                (2 * spans, prepare::<2>(panel, 2 * spans, offset))
            } else {
                (spans, prepare::<1>(panel, spans, offset))
            };
            if !few {
                steps.fill(&panel.scales[..groups]);
            }
            let first = columns.start / STRETCH * x.x.len();
            let tokens = &x.packed[first..first + x.x.len()];
            // The stretch after the next: the next one is on its way.
            let turns = (spans * tokens.len().div_ceil(TOKENS)).max(1);
            let mut ahead = Ahead::new(rows, columns.end + STRETCH, turns);
            multiply(panel, &steps, &shift, &mut ahead, spans, tokens, out);
            if damaged != 0 {
                for (r, sum) in out.iter_mut().flat_map(|out| out.iter_mut().enumerate()) {
                    if damaged >> r & 1 == 1 {
                        *sum = f32::NAN;
                    }
                }
            }
        },
    );
}

/// Pieces of rows that are asked for while a panel is multiplied, since rows lie apart and no CPU sees which piece
/// comes next. A few at a time: asked for all at once they would be waited for.
struct Ahead {
    /// The next row's piece, `bytes` long.
    piece: *const u8,
    bytes: usize,
    stride: usize,
    /// Rows that are left.
    left: u32,
    /// Rows that are due, and how many more with each turn, in 65536ths.
    due: u32,
    turn: u32,
}

impl Ahead {
    /// The stretch of every row that starts at `column`, in so many turns. Columns beyond the end are those of
    /// the rows that follow, which mostly are the next tile.
    #[inline]
    fn new(rows: Rows<'_>, column: usize, turns: usize) -> Self {
        let bytes = |columns: usize| columns / rows.kind.block_len() * rows.kind.block_bytes();
        let (tiles, start) = (column / rows.cols, column % rows.cols);
        let end = (start + STRETCH).min(rows.cols);
        let count = rows.len() as u32;
        let from = tiles * rows.len() * rows.stride + bytes(start);
        Self {
            piece: rows.bytes.as_ptr().wrapping_add(from),
            bytes: bytes(end) - bytes(start),
            stride: rows.stride,
            left: count,
            due: 0,
            turn: (count << 16).div_ceil(turns as u32),
        }
    }

    /// Asks for what is due.
    #[inline(always)]
    fn ask(&mut self) {
        self.due += self.turn;
        while self.due >= 1 << 16 && self.left > 0 {
            self.due -= 1 << 16;
            self.left -= 1;
            let ask = |byte| {
                let place = self.piece.wrapping_add(byte).cast();
                // SAFETY: a prefetch reads nothing and may name any address.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(place) }
            };
            // The last byte may lie in a line more.
            (0..self.bytes).step_by(64).for_each(ask);
            ask(self.bytes - 1);
            self.piece = self.piece.wrapping_add(self.stride);
        }
    }
}

/// Makes the first `groups` scales such as exponents can be added to: where one is zero, or next to
/// it, the codes become zeros instead. Returns the rows that have a scale that is no number, a
/// bit each.
#[inline]
#[target_feature(enable = "avx512f")]
fn prepare<const FINE: usize>(panel: &mut Panel, groups: usize, offset: u8) -> u32 {
    const SMALLEST: f32 = 1.0 / (1u64 << 63) as f32;
    const LARGEST: f32 = (1u64 << 63) as f32;
    let ordinary = |scale: __m512| {
        let size = _mm512_abs_ps(scale);
        let large_enough = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(size, _mm512_set1_ps(SMALLEST));
        _mm512_mask_cmp_ps_mask::<_CMP_LT_OQ>(large_enough, size, _mm512_set1_ps(LARGEST))
    };
    let mut damaged = 0;
    let codes = panel.codes.chunks_exact_mut(8 / FINE);
    for (scales, codes) in panel.scales[..groups].iter_mut().zip(codes) {
        let [low, high] = load_two(scales);
        if ordinary(low) & ordinary(high) == u16::MAX {
            continue;
        }
        for (r, scale) in scales.iter_mut().enumerate() {
            if scale.abs() < SMALLEST {
                *scale = SMALLEST;
                codes.iter_mut().for_each(|codes| codes[r] = [offset; 4]);
            } else if scale.is_nan() || scale.abs() >= LARGEST {
                damaged |= 1 << r;
            }
        }
    }
    damaged
}

/// The scales of a panel's rows times each step that a token's scale may have, the last being NaN.
#[repr(C, align(64))]
struct Steps([[[f32; TILE_ROWS]; Span::STEPS + 1]; STRETCH / GROUP]);

impl Steps {
    fn new() -> Self {
        Self([[[f32::NAN; TILE_ROWS]; Span::STEPS + 1]; STRETCH / GROUP])
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn fill(&mut self, scales: &[[f32; TILE_ROWS]]) {
        for (steps, scales) in self.0.iter_mut().zip(scales) {
            let scales = load_two(scales);
            for (times, factor) in steps[..Span::STEPS].iter_mut().zip(STEP_FACTORS) {
                let factor = _mm512_set1_ps(factor);
                store_two(times, scales.map(|scale| _mm512_mul_ps(scale, factor)));
            }
        }
    }
}

/// What the steps multiply with.
static STEP_FACTORS: [f32; Span::STEPS + 1] =
    [1.0, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875, f32::NAN];

/// Adds the products of a panel with the first `spans` spans of all tokens; a weight scale covers `32 / FINE` columns.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn multiply<const FINE: usize, const MINIMA: bool, const FEW: bool>(
    panel: &Panel,
    steps: &Steps,
    shift: &__m512i,
    ahead: &mut Ahead,
    spans: usize,
    mut tokens: &[Stretch],
    mut out: &mut [[f32; TILE_ROWS]],
) {
    while !tokens.is_empty() {
        // The last two blocks share what is left: one of a single token would leave the pipes waiting.
        let (block, blocks) = match tokens.len() {
            left if left > 2 * TOKENS => (TOKENS, (left - TOKENS - 1) / TOKENS),
            left => (left.div_ceil(left.div_ceil(TOKENS)), 1),
        };
        let (now, later) = tokens.split_at(block * blocks);
        let (sums, sums_later) = out.split_at_mut(now.len());
        macro_rules! with {
            ($($tokens:literal)*) => {
                match block {
                    $($tokens => {
                        let (now, sums) = (now.as_chunks().0, sums.as_chunks_mut().0);
                        multiply_blocks::<$tokens, FINE, MINIMA, FEW>(panel, steps, shift, ahead, spans, now, sums)
                    })*
                    _ => unreachable!("blocks hold up to six tokens"),
                }
            };
        }
        with!(1 2 3 4 5 6);
        (tokens, out) = (later, sums_later);
    }
}

/// The innermost loops, for blocks of `T` tokens. What is read next is asked for on the way: as many tokens as these,
/// which lie behind them, and what is `ahead`.
#[inline(never)] // a function of its own keeps the registers for these loops
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn multiply_blocks<const T: usize, const FINE: usize, const MINIMA: bool, const FEW: bool>(
    panel: &Panel,
    steps: &Steps,
    shift: &__m512i,
    ahead: &mut Ahead,
    spans: usize,
    blocks: &[[Stretch; T]],
    out: &mut [[[f32; TILE_ROWS]; T]],
) {
    assert!(spans <= SPANS);
    let shift = *shift;
    for (x, out) in blocks.iter().zip(out) {
        let mut sums = [[_mm512_setzero_ps(); 2]; T];
        for t in 0..T {
            sums[t] = load_two(&out[t]);
        }
        // A group is what a weight scale covers: a span or half of one.
        for g in 0..spans * FINE {
            // SAFETY: there are no more spans, and no more groups than a panel has (asserted above).
            let (x, codes, scales, steps, minima) = unsafe {
                (
                    std::array::from_fn::<&Span, T, _>(|t| x[t].get_unchecked(g / FINE)),
                    panel.codes.get_unchecked(g * 8 / FINE..(g + 1) * 8 / FINE),
                    panel.scales.get_unchecked(g),
                    steps.0.get_unchecked(g),
                    panel.minima.get_unchecked(g),
                )
            };
            let half = g % FINE;
            if half == 0 {
                ahead.ask();
                for x in x {
                    let next = (&raw const *x).wrapping_add(T * SPANS);
                    // A prefetch reads nothing and may name any address.
                    _mm_prefetch::<_MM_HINT_T0>(next.cast());
                }
            }
            let mut dots = [[_mm512_setzero_si512(); 2]; T];
            if !MINIMA {
                for t in 0..T {
                    let minus_sum = if FINE == 2 {
                        x[t].minus_sums[half]
                    } else {
                        x[t].minus_sum
                    };
                    // By a register of counts: with one count for all lanes a shift would take a multiplier's place.
                    dots[t] = [_mm512_sllv_epi32(_mm512_set1_epi32(minus_sum), shift); 2];
                }
            }
            for k in 0..8 / FINE {
                let codes = load_codes(&codes[k]);
                for t in 0..T {
                    let q: &[[i8; 4]; 8] = bytemuck::cast_ref(&x[t].q);
                    let four = _mm512_set1_epi32(bytemuck::cast(q[half * (8 / FINE) + k]));
                    dots[t][0] = _mm512_dpbusd_epi32(dots[t][0], codes[0], four);
                    dots[t][1] = _mm512_dpbusd_epi32(dots[t][1], codes[1], four);
                }
            }
            for t in 0..T {
                let step = x[t].step() as usize;
                let scales = if FEW {
                    // SAFETY: there are as many factors as steps.
                    let factor = _mm512_set1_ps(unsafe { *STEP_FACTORS.get_unchecked(step) });
                    load_two(scales).map(|scale| _mm512_mul_ps(scale, factor))
                } else {
                    // SAFETY: there are as many products as steps.
                    load_two(unsafe { steps.get_unchecked(step) })
                };
                let exponent = _mm512_set1_epi32(x[t].exponent);
                for b in 0..2 {
                    let scale = _mm512_add_epi32(_mm512_castps_si512(scales[b]), exponent);
                    let dot = _mm512_cvtepi32_ps(dots[t][b]);
                    sums[t][b] = _mm512_fmadd_ps(dot, _mm512_castsi512_ps(scale), sums[t][b]);
                }
            }
            if MINIMA {
                let minima = load_two(minima);
                for t in 0..T {
                    let scaled_sum = if FINE == 2 {
                        x[t].scaled_sums[half]
                    } else {
                        x[t].scaled_sum
                    };
                    let scaled_sum = _mm512_set1_ps(scaled_sum);
                    for b in 0..2 {
                        sums[t][b] = _mm512_fnmadd_ps(minima[b], scaled_sum, sums[t][b]);
                    }
                }
            }
        }
        for t in 0..T {
            store_two(&mut out[t], sums[t]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_two(to: &mut [f32; TILE_ROWS], values: [__m512; 2]) {
    // SAFETY: both halves lie in the array, and the store takes any alignment.
    unsafe {
        _mm512_storeu_ps(to.as_mut_ptr(), values[0]);
        _mm512_storeu_ps(to.as_mut_ptr().add(16), values[1]);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_two(from: &[f32; TILE_ROWS]) -> [__m512; 2] {
    // SAFETY: both halves lie in the array, and the load takes any alignment.
    unsafe {
        [
            _mm512_loadu_ps(from.as_ptr()),
            _mm512_loadu_ps(from.as_ptr().add(16)),
        ]
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_codes(from: &Fours) -> [__m512i; 2] {
    // SAFETY: both halves lie in the array, and the load takes any alignment.
    unsafe {
        [
            _mm512_loadu_si512(from.as_ptr().cast()),
            _mm512_loadu_si512(from.as_ptr().add(16).cast()),
        ]
    }
}
