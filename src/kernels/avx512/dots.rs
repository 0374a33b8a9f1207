//! Dot products of rows as they lie.
//!
//! A core that is to keep up with its memory has some thirty instructions for 128 weights, and what makes
//! sums into f32 and gives them their scale is not fewer for four products a lane than for eight. So
//! columns with one scale meet in four lanes of a register, whose sixteen hold four such groups:
//!
//! ```text
//! blocks of 32    first halves of four blocks  a0 │ b0 │ c0 │ d0   ─┐ vpdpbusd twice into the same sums,
//!                 second halves                a1 │ b1 │ c1 │ d1   ─┘ a scale for each four lanes
//! super-blocks    the same with four stripes of 32 columns, where a stripe has one scale;
//!                 64 columns in order, a scale for each four lanes, where 16 columns have one
//! ```
//!
//! The activations are brought into that order once for all rows that go side by side.

use std::arch::x86_64::*;

use super::codes::{Quarters, Stripes, two_halves};
use super::fours::Fours;
use super::{load_f32, load_f32_4, load_i8, load_i16, load_i16_8, load_i32};
use crate::kernels::activations::{SCALE_LEN, SUM_LEN};
use crate::kernels::x86::{ahead, each_four, each_row, prefetch};
use crate::kernels::{Activation, STREAMS, Sums};
use crate::quant::F16;
use crate::tensor::Rows;

/// Makes the functions of a table out of one that dots `N` rows of some blocks, side by side.
macro_rules! rows_and_streams {
    ($rows:ident, $streams:ident, $blocks:ident, $dot:ident) => {
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        pub(super) fn $rows<B: $blocks>(rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
            each_row::<B>(rows, out, |row| $dot(row, x));
        }

        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        pub(super) fn $streams<B: $blocks>(
            rows: [Rows<'_>; STREAMS],
            x: &[Activation<'_>],
            out: &mut [Sums],
        ) {
            each_four::<B>(rows, x, out, |four, x| $dot(four, x));
        }
    };
}

rows_and_streams!(dot_fours, stream_fours, Fours, fours);
rows_and_streams!(dot_stripes, stream_stripes, Stripes, stripes);
rows_and_streams!(dot_quarters, stream_quarters, Quarters, quarters);

/// Does something for each row. A loop would not be unrolled, and would keep the accumulators in memory.
macro_rules! unrolled {
    ($n:ident, |$r:ident| $body:block) => {
        unrolled!(@ $n, $r, $body, 0 1 2 3)
    };
    (@ $n:ident, $r:ident, $body:block, $($row:literal)*) => {
        $(if $row < $n {
            let $r = $row;
            $body
        })*
    };
}

/// Columns of four blocks.
const FOUR: usize = 4 * SCALE_LEN;

/// What four blocks meet.
struct FourCodes {
    /// The codes of the first halves of all blocks, and of the second halves.
    q: [__m512i; 2],
    /// Where the sums of products start, so that codes may be too large.
    start: __m512i,
    /// The four scales.
    scales: __m128,
    /// The sums of each block's codes, times its scale.
    sums: __m128,
}

impl FourCodes {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    fn new<B: Fours>(q: &[i8; FOUR], scales: __m128, sums: &[i16; FOUR / SUM_LEN]) -> Self {
        let [a, b] = q.as_chunks::<64>().0 else {
            unreachable!()
        };
        let q = by_halves(load_i8(a), load_i8(b));
        let sums = _mm_madd_epi16(load_i16_8(sums), _mm_set1_epi16(1));
        Self {
            q,
            start: start_of_sums(B::OFFSET, q),
            scales,
            sums: _mm_mul_ps(_mm_cvtepi32_ps(sums), scales),
        }
    }
}

/// The sums of a row: products, four lanes a block or stripe; minima, a lane a block.
#[derive(Clone, Copy)]
struct Accumulators(__m512, __m128);

/// Dots rows of small blocks, side by side, with an activation. A rest of fewer than four blocks is gone
/// through with the blocks before it, whose scales are then taken for zeros.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn fours<B: Fours, const N: usize>(rows: [&[B]; N], x: Activation<'_>) -> [f32; N] {
    let mut acc = [Accumulators(_mm512_setzero_ps(), _mm_setzero_ps()); N];
    let (q, q_rest) = x.q.as_chunks::<FOUR>();
    let (s, s_rest) = x.scales.as_chunks::<4>();
    let (sums, sums_rest) = x.sums.as_chunks::<{ FOUR / SUM_LEN }>();
    let n = q.len();
    let (s, sums) = (&s[..n], &sums[..n]);
    let mut row_fours = [[].as_slice(); N];
    for (fours, row) in row_fours.iter_mut().zip(rows) {
        *fours = &row.as_chunks::<4>().0[..n];
    }
    let ahead = ahead(N);
    for i in 0..n {
        let x = FourCodes::new::<B>(&q[i], load_f32_4(&s[i]), &sums[i]);
        unrolled!(N, |r| {
            // SAFETY: rows have `n` fours.
            let four = unsafe { row_fours[r].get_unchecked(i) };
            prefetch(four, ahead);
            acc[r] = add_four(acc[r], four, &x);
        });
    }
    let rest = s_rest.len();
    if rest > 0 {
        let (mut q, mut s, mut sums) = ([0; FOUR], [0.0; 4], [0; FOUR / SUM_LEN]);
        let from = 4 - rest;
        q[from * SCALE_LEN..].copy_from_slice(q_rest);
        s[from..].copy_from_slice(s_rest);
        sums[from * SCALE_LEN / SUM_LEN..].copy_from_slice(sums_rest);
        let x = FourCodes::new::<B>(&q, load_f32_4(&s), &sums);
        unrolled!(N, |r| {
            let mut few = [B::zeroed(); 4];
            let four = match rows[r].last_chunk() {
                Some(four) => four,
                None => {
                    few[from..].copy_from_slice(rows[r]);
                    &few
                }
            };
            acc[r] = add_four(acc[r], four, &x);
        });
    }
    let mut sums = [_mm512_setzero_ps(); N];
    for (sum, Accumulators(products, minima)) in sums.iter_mut().zip(acc) {
        *sum = match B::MINIMUM {
            true => _mm512_add_ps(products, _mm512_zextps128_ps512(minima)),
            false => products,
        };
    }
    sums_of_lanes(sums)
}

/// Adds the dot product of four blocks.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn add_four<B: Fours>(
    Accumulators(products, minima): Accumulators,
    four: &[B; 4],
    x: &FourCodes,
) -> Accumulators {
    // SAFETY: this function has the features.
    let four = unsafe { B::unpack(four) };
    let scales = _mm512_castps128_ps512(_mm_mul_ps(four.scales, x.scales));
    let scales = _mm512_permutexvar_ps(lanes_of_four(0, 1), scales);
    let minima = match B::MINIMUM {
        true => _mm_fmadd_ps(four.offsets, x.sums, minima),
        false => minima,
    };
    Accumulators(add_dot(products, x.start, four.codes, x.q, scales), minima)
}

/// What a super-block of stripes meets.
struct StripeCodes {
    /// As [`Stripes::codes`] are.
    q: [[__m512i; 2]; 2],
    /// Where the sums of products start, so that codes may be too large.
    start: [__m512i; 2],
    /// The eight scales; the negatives of the sums of each stripe's codes, times its scale.
    scales_and_sums: __m512,
}

impl StripeCodes {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    fn new<B: Stripes>(q: &[i8; 256], scales: &[f32; 8], sums: &[i16; 16]) -> Self {
        let [a, b, c, d] = q.as_chunks::<64>().0 else {
            unreachable!()
        };
        // SAFETY: this function has the features.
        let q = unsafe { B::arranged([load_i8(a), load_i8(b), load_i8(c), load_i8(d)]) };
        let scales = load_f32(scales);
        let sums = _mm256_madd_epi16(load_i16(sums), _mm256_set1_epi16(-1));
        let sums = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), scales);
        let scales = _mm512_castps_pd(_mm512_castps256_ps512(scales));
        let both = _mm512_insertf64x4::<1>(scales, _mm256_castps_pd(sums));
        Self {
            q,
            start: [
                start_of_sums(B::OFFSET, q[0]),
                start_of_sums(B::OFFSET, q[1]),
            ],
            scales_and_sums: _mm512_castpd_ps(both),
        }
    }
}

/// Dots rows of super-blocks that have a scale for 32 columns, side by side, with an activation.
///
/// Eight scales and eight minima are made in one register, and multiplied there with all that goes with
/// them but for their units; the minima's half is added up as it is, in a register of its own whose other half
/// nobody reads.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn stripes<B: Stripes, const N: usize>(rows: [&[B]; N], x: Activation<'_>) -> [f32; N] {
    let mut products = [_mm512_setzero_ps(); N];
    let mut minima = products;
    let (q, scales, sums) = super_blocks_of(x);
    let n = q.len();
    let rows = first(rows, n);
    let places = B::PLACES.map(|places| load_i32(&places));
    let ahead = ahead(N);
    for i in 0..n {
        let x = StripeCodes::new::<B>(&q[i], &scales[i], &sums[i]);
        // SAFETY: this function has the features.
        let heads = unsafe { B::heads(&rows, i) };
        unrolled!(N, |r| {
            // SAFETY: rows have `n` blocks.
            let block = unsafe { rows[r].get_unchecked(i) };
            prefetch(block, ahead);
            // SAFETY: this function has the features.
            let codes = unsafe { block.codes() };
            let eight = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(heads.eights[r]));
            let terms = _mm512_mul_ps(eight, x.scales_and_sums);
            let mut sum = _mm512_setzero_ps();
            for half in 0..2 {
                let scales = _mm512_permutexvar_ps(places[half], terms);
                sum = add_dot(sum, x.start[half], codes[half], x.q[half], scales);
            }
            let [d, dmin] = heads.units[r];
            products[r] = _mm512_fmadd_ps(sum, _mm512_set1_ps(d), products[r]);
            if B::MINIMA {
                minima[r] = _mm512_fmadd_ps(terms, _mm512_set1_ps(dmin), minima[r]);
            }
        });
    }
    for (products, minima) in products.iter_mut().zip(minima) {
        if B::MINIMA {
            *products = _mm512_mask_add_ps(*products, 0xff00, *products, minima);
        }
    }
    sums_of_lanes(products)
}

/// What a super-block of quarters meets.
struct QuarterCodes {
    q: [__m512i; 4],
    /// Where the sums of products start, so that codes may be too large.
    start: [__m512i; 4],
    /// The scale of each 16 columns.
    scales: __m512,
    /// The sum of each 16 codes, times its scale.
    sums: __m512,
}

impl QuarterCodes {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    fn new<B: Quarters>(q: &[i8; 256], scales: &[f32; 8], sums: &[i16; 16]) -> Self {
        let mut codes = [_mm512_setzero_si512(); 4];
        let mut start = codes;
        for (k, q) in q.as_chunks::<64>().0.iter().enumerate() {
            codes[k] = load_i8(q);
            start[k] = start_of_sums(B::OFFSET, [codes[k]]);
        }
        let each_twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        let scales = _mm512_castps256_ps512(load_f32(scales));
        let scales = _mm512_permutexvar_ps(each_twice, scales);
        let sums = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(load_i16(sums)));
        Self {
            q: codes,
            start,
            scales,
            sums: _mm512_mul_ps(sums, scales),
        }
    }
}

/// Dots rows of super-blocks that have a scale for 16 columns, side by side, with an activation.
///
/// A super-block's 16 scales are made in one register, times those of the activations. The 16 lanes of a
/// quarter's dot product take one for each 4 lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn quarters<B: Quarters, const N: usize>(rows: [&[B]; N], x: Activation<'_>) -> [f32; N] {
    let mut acc = [_mm512_setzero_ps(); N];
    let (q, scales, sums) = super_blocks_of(x);
    let n = q.len();
    let rows = first(rows, n);
    let ahead = ahead(N);
    for i in 0..n {
        let x = QuarterCodes::new::<B>(&q[i], &scales[i], &sums[i]);
        unrolled!(N, |r| {
            // SAFETY: rows have `n` blocks.
            let block = unsafe { rows[r].get_unchecked(i) };
            prefetch(block, ahead);
            // SAFETY: this function has the features.
            let (codes, (scales, minima)) = unsafe { (block.codes(), block.scales_and_minima()) };
            let scales = _mm512_mul_ps(in_units(block.d(), scales), x.scales);
            for (k, codes) in codes.into_iter().enumerate() {
                let scales = _mm512_permutexvar_ps(lanes_of_four(4 * k as i32, 1), scales);
                acc[r] = add_dot(acc[r], x.start[k], [codes], [x.q[k]], scales);
            }
            if B::MINIMA {
                acc[r] = _mm512_fnmadd_ps(in_units(block.dmin(), minima), x.sums, acc[r]);
            }
        });
    }
    sums_of_lanes(acc)
}

/// The codes, scales and sums that each super-block meets.
type SuperBlocks<'a> = (&'a [[i8; 256]], &'a [[f32; 8]], &'a [[i16; 16]]);

/// Activations in super-blocks: as many codes, scales and sums.
#[inline(always)]
fn super_blocks_of(x: Activation<'_>) -> SuperBlocks<'_> {
    let q = x.q.as_chunks().0;
    let (scales, sums) = (x.scales.as_chunks().0, x.sums.as_chunks().0);
    (q, &scales[..q.len()], &sums[..q.len()])
}

/// The first `n` blocks of each row.
#[inline(always)]
fn first<B, const N: usize>(mut rows: [&[B]; N], n: usize) -> [&[B]; N] {
    for row in &mut rows {
        *row = &row[..n];
    }
    rows
}

/// The sum of all lanes of each of up to four registers, in the same order whichever it is.
#[inline]
#[target_feature(enable = "avx2,avx512f")]
fn sums_of_lanes<const N: usize>(v: [__m512; N]) -> [f32; N] {
    let mut four = [_mm512_setzero_ps(); 4];
    four[..N].copy_from_slice(&v);
    let [a, b, c, d] = four;
    let add_pairs = |a, b| _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let (ab, cd) = (add_pairs(a, b), add_pairs(c, d));
    let abcd = _mm512_add_ps(
        _mm512_shuffle_ps::<0b01_00_01_00>(ab, cd),
        _mm512_shuffle_ps::<0b11_10_11_10>(ab, cd),
    );
    let abcd = _mm256_add_ps(
        _mm512_castps512_ps256(abcd),
        _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(abcd))),
    );
    let abcd = _mm_add_ps(
        _mm256_castps256_ps128(abcd),
        _mm256_extractf128_ps::<1>(abcd),
    );
    let mut sums = [0.0; 4];
    // SAFETY: the array is as long as the register.
    unsafe { _mm_storeu_ps(sums.as_mut_ptr(), abcd) };
    let mut out = [0.0; N];
    out.copy_from_slice(&sums[..N]);
    out
}

/// Adds products of codes, four columns a lane of each register, times a scale for each lane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn add_dot<const M: usize>(
    acc: __m512,
    start: __m512i,
    codes: [__m512i; M],
    q: [__m512i; M],
    scales: __m512,
) -> __m512 {
    let mut dot = start;
    for m in 0..M {
        dot = _mm512_dpbusd_epi32(dot, codes[m], q[m]);
    }
    _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scales, acc)
}

/// Where the sums of products start, so that codes may be too large: `−offset · Σ q` over the
/// columns of each lane.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn start_of_sums<const M: usize>(offset: u8, q: [__m512i; M]) -> __m512i {
    let zero = _mm512_setzero_si512();
    if offset == 0 {
        return zero;
    }
    let mut sums = zero;
    for q in q {
        sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(offset as i8), q);
    }
    _mm512_sub_epi32(zero, sums)
}

/// The first 16 bytes of each 32 of two registers, and the others.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn by_halves(a: __m512i, b: __m512i) -> [__m512i; 2] {
    [
        _mm512_shuffle_i64x2::<0b10_00_10_00>(a, b),
        _mm512_shuffle_i64x2::<0b11_01_11_01>(a, b),
    ]
}

/// Four lanes `first`, four lanes `first + step`, and so on.
#[inline]
#[target_feature(enable = "avx512f")]
fn lanes_of_four(first: i32, step: i32) -> __m512i {
    let groups = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    let steps = _mm512_mullo_epi32(groups, _mm512_set1_epi32(step));
    _mm512_add_epi32(steps, _mm512_set1_epi32(first))
}

/// Sixteen signed bytes times a unit.
#[inline]
#[target_feature(enable = "avx2,f16c,avx512f")]
fn in_units(unit: F16, bytes: __m128i) -> __m512 {
    let unit = _mm512_broadcastss_ps(two_halves(unit, F16::default()));
    _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), unit)
}
