//! AVX2 (with FMA and F16C): 32 codes a register.
//!
//! Weights meet activations 32 columns at a time, which is a block of the 32-weight types and a
//! stripe of a super-block, and the span of one activation scale:
//!
//! ```text
//! codes     32 × 8 bit, without sign     q      32 × 8 bit, signed
//!      └──────── maddubs: 16 sums of 2 products, 16 bit ────────┘
//!                 − the same for the offset of the codes
//!                 madd with 1: 8 sums of 4 products, 32 bit
//!                 cvt, fma with (weight scale · activation scale): 8 lanes of f32
//! ```
//!
//! `maddubs` saturates where a pair of products leaves 16 bits. Here it never does: codes
//! without a sign stay below 64, and `2 · 63 · 127 < 2¹⁵`. Codes that need all 8 bits (Q8_0 and
//! the tables of IQ4) come with their sign, which is moved over to the activation:
//! `|code| ≤ 128`, and `2 · 128 · 127 = 32512` still fits, as activations keep to −127..=127.
//!
//! A row has several accumulators, so that chains of additions overlap; which block or stripe
//! goes to which is fixed.

use std::arch::x86_64::*;

use half::f16;

use super::activations::{SCALE_LEN, SUM_LEN, inverse_scale};
use super::scalar::decode_pieces;
use super::tiles::{self, Tile};
use super::x86::{SuperBlock, as_blocks, broadcast_f16, each_row, entry, load_16};
use super::{Activation, DotRows, Kernels};
use crate::quant::{
    BF16, Block, BlockIQ4NL, BlockIQ4XS, BlockMXFP4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1,
    BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, BlockType, F16, F32, IQ4_VALUES,
    MXFP4_DOUBLED,
};
use crate::tensor::Rows;

static KERNELS: Kernels = Kernels {
    name: "avx2",
    dot,
    tile,
    exact,
    exact_tile,
    quantize,
    axpy_f16,
};

/// The AVX2 table, if this CPU can run it.
pub fn kernels() -> Option<&'static Kernels> {
    let runs = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    runs.then_some(&KERNELS)
}

pub(super) fn dot(kind: BlockType) -> DotRows {
    match kind {
        BlockType::F32 => entry!(dot_floats::<F32>),
        BlockType::F16 => entry!(dot_floats::<F16>),
        BlockType::BF16 => entry!(dot_floats::<BF16>),
        BlockType::Q4_0 => entry!(dot_blocks::<BlockQ4_0>),
        BlockType::Q4_1 => entry!(dot_blocks::<BlockQ4_1>),
        BlockType::Q5_0 => entry!(dot_blocks::<BlockQ5_0>),
        BlockType::Q5_1 => entry!(dot_blocks::<BlockQ5_1>),
        BlockType::Q8_0 => entry!(dot_blocks::<BlockQ8_0>),
        BlockType::IQ4_NL => entry!(dot_blocks::<BlockIQ4NL>),
        BlockType::MXFP4 => entry!(dot_blocks::<BlockMXFP4>),
        BlockType::Q2_K => entry!(dot_super_blocks::<BlockQ2K>),
        BlockType::Q3_K => entry!(dot_super_blocks::<BlockQ3K>),
        BlockType::Q4_K => entry!(dot_super_blocks::<BlockQ4K>),
        BlockType::Q5_K => entry!(dot_super_blocks::<BlockQ5K>),
        BlockType::Q6_K => entry!(dot_super_blocks::<BlockQ6K>),
        BlockType::IQ4_XS => entry!(dot_super_blocks::<BlockIQ4XS>),
    }
}

pub(super) fn tile(kind: BlockType) -> Option<Tile> {
    match kind {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => exact_tile(kind),
        _ => None,
    }
}

/// The tile product in f32: rows are decoded once for all tokens.
pub(super) fn exact_tile(_: BlockType) -> Option<Tile> {
    Some(|rows, x, out| tiles::decoded(rows, x, out, entry!(dot_floats::<F32>)))
}

pub(super) fn exact(kind: BlockType) -> DotRows {
    match kind {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => dot(kind),
        _ => entry!(dot_decoded),
    }
}

/// A block, or a super-block, of which 32 codes at a time are made into a register.
trait Codes: Block {
    /// The codes are without a sign, below 64, and this much too large; `None`: they are signed.
    const OFFSET: Option<i8>;

    /// The codes of columns `32·stripe..32·stripe + 32`, in order.
    ///
    /// # Safety
    /// The CPU has AVX2.
    unsafe fn codes(&self, stripe: usize) -> __m256i;
}

/// A block of 32 weights with a scale and, perhaps, a minimum, each given in all lanes.
trait SmallBlock: Codes {
    /// Whether there is a minimum.
    const MINIMUM: bool = false;

    /// `weight = scale · code − minimum`.
    ///
    /// # Safety
    /// The CPU has AVX2 and F16C.
    unsafe fn scale(&self) -> __m256;

    /// The minimum's negative.
    ///
    /// # Safety
    /// The CPU has AVX2 and F16C.
    unsafe fn offset(&self) -> __m256 {
        bytemuck::Zeroable::zeroed()
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn dot_blocks<B: SmallBlock>(rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
    each_row::<B>(rows, out, |row| small_blocks(row, x));
}

/// Dots a row of small blocks with an activation.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn small_blocks<B: SmallBlock>(row: &[B], x: Activation<'_>) -> f32 {
    let mut acc = [_mm256_setzero_ps(); 2];
    let (q, _) = x.q.as_chunks::<SCALE_LEN>();
    let (sums, _) = x.sums.as_chunks::<2>();
    for (((block, q), sums), &s) in row.iter().zip(q).zip(sums).zip(x.scales) {
        let q = load_i8(q);
        // SAFETY: this function has the features.
        let (codes, scale) = unsafe { (block.codes(0), block.scale()) };
        let dot = dot_codes::<B>(codes, q);
        let scale = _mm256_mul_ps(scale, _mm256_set1_ps(s));
        // Blocks take turns at the accumulators.
        acc = [acc[1], _mm256_fmadd_ps(dot, scale, acc[0])];
        if B::MINIMUM {
            // In lane 0 alone: a minimum counts once.
            let sums = _mm_cvtsi32_si128(bytemuck::cast(*sums));
            let sum = _mm_cvtepi32_ps(_mm_madd_epi16(sums, _mm_set1_epi16(1)));
            let s_sum = _mm_mul_ss(sum, _mm_set_ss(s));
            // SAFETY: this function has the features.
            let offset = unsafe { block.offset() };
            acc[1] = _mm256_fmadd_ps(offset, _mm256_zextps128_ps256(s_sum), acc[1]);
        }
    }
    sum_lanes(_mm256_add_ps(acc[0], acc[1]))
}

#[target_feature(enable = "avx2,fma,f16c")]
fn dot_super_blocks<B: Codes + SuperBlock>(rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
    each_row::<B>(rows, out, |row| super_blocks(row, x));
}

/// Dots a row of super-blocks with an activation.
///
/// A super-block's 16 scales, one for 16 columns, are made in two registers, times those of
/// the activations. The 8 lanes of a stripe's dot product take one for each 4 lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn super_blocks<B: Codes + SuperBlock>(row: &[B], x: Activation<'_>) -> f32 {
    let mut acc = [_mm256_setzero_ps(); 4];
    let (q, _) = x.q.as_chunks::<256>();
    let (scales, _) = x.scales.as_chunks::<8>();
    let (sums, _) = x.sums.as_chunks::<16>();
    let each_four = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    for (((block, q), s), sums) in row.iter().zip(q).zip(scales).zip(sums) {
        let (q, _) = q.as_chunks::<32>();
        let s = twice_each(load_f32(s));
        // SAFETY: this function has the features.
        let (scales, minima) = unsafe { block.scales_and_minima() };
        let scales = in_units(broadcast_f16(block.d()), scales);
        let scales = [
            _mm256_mul_ps(scales[0], s[0]),
            _mm256_mul_ps(scales[1], s[1]),
        ];
        for j in 0..8 {
            // SAFETY: this function has the features.
            let codes = unsafe { block.codes(j) };
            let dot = dot_codes::<B>(codes, load_i8(&q[j]));
            let lanes = _mm256_add_epi32(each_four, _mm256_set1_epi32(j as i32 % 4 * 2));
            let scale = _mm256_permutevar8x32_ps(scales[j / 4], lanes);
            acc[j % 4] = _mm256_fmadd_ps(dot, scale, acc[j % 4]);
        }
        if B::MINIMA {
            let sums = load_i16(sums);
            let low = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(sums));
            let high = _mm256_cvtepi16_epi32(_mm256_extracti128_si256::<1>(sums));
            let s_sums = [
                _mm256_mul_ps(_mm256_cvtepi32_ps(low), s[0]),
                _mm256_mul_ps(_mm256_cvtepi32_ps(high), s[1]),
            ];
            let minima = in_units(broadcast_f16(block.dmin()), minima);
            acc[0] = _mm256_fnmadd_ps(minima[0], s_sums[0], acc[0]);
            acc[1] = _mm256_fnmadd_ps(minima[1], s_sums[1], acc[1]);
        }
    }
    sum_four(acc)
}

/// The dot product of 32 codes in 8 lanes of 4 columns each, as f32 (exact).
#[inline]
#[target_feature(enable = "avx2")]
fn dot_codes<B: Codes>(codes: __m256i, q: __m256i) -> __m256 {
    let pairs = match B::OFFSET {
        None => {
            let magnitudes = _mm256_sign_epi8(codes, codes);
            _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(q, codes))
        }
        Some(0) => _mm256_maddubs_epi16(codes, q),
        Some(offset) => _mm256_sub_epi16(
            _mm256_maddubs_epi16(codes, q),
            _mm256_maddubs_epi16(_mm256_set1_epi8(offset), q),
        ),
    };
    _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

/// Lanes 0 to 7 as 0 0 1 1 2 2 3 3 and 4 4 5 5 6 6 7 7.
#[inline]
#[target_feature(enable = "avx2")]
fn twice_each(v: __m256) -> [__m256; 2] {
    [
        _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)),
        _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7)),
    ]
}

/// Sixteen signed bytes times a unit.
#[inline]
#[target_feature(enable = "avx2")]
fn in_units(unit: __m256, bytes: __m128i) -> [__m256; 2] {
    let low = _mm256_cvtepi8_epi32(bytes);
    let high = _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes));
    [
        _mm256_mul_ps(_mm256_cvtepi32_ps(low), unit),
        _mm256_mul_ps(_mm256_cvtepi32_ps(high), unit),
    ]
}

/// The sum of 8 lanes: halves onto halves.
#[inline]
#[target_feature(enable = "avx2")]
fn sum_lanes(v: __m256) -> f32 {
    let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
}

/// The sum of all lanes of four registers.
#[inline]
#[target_feature(enable = "avx2")]
fn sum_four([a, b, c, d]: [__m256; 4]) -> f32 {
    sum_lanes(_mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d)))
}

macro_rules! load {
    ($($name:ident: $from:ty => $to:ty, $intrinsic:ident;)*) => {$(
        #[inline]
        #[target_feature(enable = "avx2")]
        fn $name(from: &$from) -> $to {
            // SAFETY: the array is as long as the register, and the load takes any alignment.
            unsafe { $intrinsic(from.as_ptr().cast()) }
        }
    )*};
}

load! {
    load_u8: [u8; 32] => __m256i, _mm256_loadu_si256;
    load_i8: [i8; 32] => __m256i, _mm256_loadu_si256;
    load_i16: [i16; 16] => __m256i, _mm256_loadu_si256;
    load_f32: [f32; 8] => __m256, _mm256_loadu_ps;
}

// Codes, type by type.

/// 32 levels of four bits: the low nibbles of 16 bytes, then the high ones.
#[inline]
#[target_feature(enable = "avx2")]
fn nibbles(qs: &[u8; 16]) -> __m256i {
    let qs = load_16(qs);
    let both = _mm256_set_m128i(_mm_srli_epi16::<4>(qs), qs);
    _mm256_and_si256(both, _mm256_set1_epi8(15))
}

/// 16 in each byte whose bit is set.
#[inline]
#[target_feature(enable = "avx2")]
fn fifth_bits(qh: [u8; 4]) -> __m256i {
    let spread = _mm256_shuffle_epi8(
        _mm256_set1_epi32(i32::from_le_bytes(qh)),
        _mm256_setr_epi64x(
            0,
            0x0101_0101_0101_0101,
            0x0202_0202_0202_0202,
            0x0303_0303_0303_0303,
        ),
    );
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    let set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
    _mm256_and_si256(set, _mm256_set1_epi8(16))
}

/// What four bits stand for in a table.
#[inline]
#[target_feature(enable = "avx2")]
fn look_up(table: &[i8; 16], levels: __m256i) -> __m256i {
    let table = load_16(bytemuck::cast_ref(table));
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), levels)
}

/// The bits of `mask` of each byte, moved from `from` places up to `to` places up.
#[inline]
#[target_feature(enable = "avx2")]
fn bits(bytes: __m256i, from: usize, to: usize, mask: u8) -> __m256i {
    let moved = if from >= to {
        _mm256_srl_epi16(bytes, _mm_cvtsi32_si128((from - to) as i32))
    } else {
        _mm256_sll_epi16(bytes, _mm_cvtsi32_si128((to - from) as i32))
    };
    _mm256_and_si256(moved, _mm256_set1_epi8((mask << to) as i8))
}

/// Stripe `index` of packed bytes, 32 to a stripe.
#[inline]
#[target_feature(enable = "avx2")]
fn stripe(bytes: &[u8], index: usize) -> __m256i {
    load_u8(&bytes.as_chunks().0[index])
}

macro_rules! codes {
    ($($block:ty, $offset:expr, |$b:ident, $j:ident| $codes:expr;)*) => {$(
        impl Codes for $block {
            const OFFSET: Option<i8> = $offset;

            #[inline]
            #[target_feature(enable = "avx2")]
            unsafe fn codes(&self, $j: usize) -> __m256i {
                let $b = self;
                $codes
            }
        }
    )*};
}

codes! {
    BlockQ4_0, Some(8), |b, _j| nibbles(&b.qs);
    BlockQ4_1, Some(0), |b, _j| nibbles(&b.qs);
    BlockQ5_0, Some(16), |b, _j| _mm256_or_si256(nibbles(&b.qs), fifth_bits(b.qh));
    BlockQ5_1, Some(0), |b, _j| _mm256_or_si256(nibbles(&b.qs), fifth_bits(b.qh));
    BlockQ8_0, None, |b, _j| load_i8(&b.qs);
    BlockIQ4NL, None, |b, _j| look_up(&IQ4_VALUES, nibbles(&b.qs));
    BlockMXFP4, None, |b, _j| look_up(&MXFP4_DOUBLED, nibbles(&b.qs));
    BlockQ2K, Some(0), |b, j| bits(stripe(&b.qs, j / 4), j % 4 * 2, 0, 3);
    BlockQ3K, Some(4), |b, j| _mm256_or_si256(
        bits(stripe(&b.qs, j / 4), j % 4 * 2, 0, 3),
        bits(load_u8(&b.hmask), j, 2, 1)
    );
    BlockQ4K, Some(0), |b, j| bits(stripe(&b.qs, j / 2), j % 2 * 4, 0, 15);
    BlockQ5K, Some(0), |b, j| _mm256_or_si256(
        bits(stripe(&b.qs, j / 2), j % 2 * 4, 0, 15),
        bits(load_u8(&b.qh), j, 4, 1)
    );
    BlockQ6K, Some(32), |b, j| _mm256_or_si256(
        bits(stripe(&b.ql, j / 4 * 2 + j % 2), j % 4 / 2 * 4, 0, 15),
        bits(stripe(&b.qh, j / 4), j % 4 * 2, 4, 3)
    );
    BlockIQ4XS, None, |b, j| look_up(&IQ4_VALUES, nibbles(&b.qs[j]));
}

macro_rules! small_block {
    ($($block:ty, |$b:ident| $scale:expr $(, offset $offset:expr)?;)*) => {$(
        impl SmallBlock for $block {
            #[inline]
            #[target_feature(enable = "avx2,f16c")]
            unsafe fn scale(&self) -> __m256 {
                let $b = self;
                $scale
            }

            $(
                const MINIMUM: bool = true;

                #[inline]
                #[target_feature(enable = "avx2,f16c")]
                unsafe fn offset(&self) -> __m256 {
                    let $b = self;
                    $offset
                }
            )?
        }
    )*};
}

small_block! {
    BlockQ4_0, |b| broadcast_f16(b.d);
    BlockQ4_1, |b| broadcast_f16(b.d), offset broadcast_f16(b.m);
    BlockQ5_0, |b| broadcast_f16(b.d);
    BlockQ5_1, |b| broadcast_f16(b.d), offset broadcast_f16(b.m);
    BlockQ8_0, |b| broadcast_f16(b.d);
    BlockIQ4NL, |b| broadcast_f16(b.d);
    BlockMXFP4, |b| _mm256_set1_ps(b.scale());
}

// Floats.

/// A float of which eight are widened to f32 at a time.
trait Float: bytemuck::Pod {
    /// # Safety
    /// The CPU has AVX2 and F16C.
    unsafe fn widen(eight: &[Self; 8]) -> __m256;
}

impl Float for F32 {
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn widen(eight: &[Self; 8]) -> __m256 {
        _mm256_castsi256_ps(load_u8(bytemuck::cast_ref(eight)))
    }
}

impl Float for f32 {
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn widen(eight: &[Self; 8]) -> __m256 {
        load_f32(eight)
    }
}

impl Float for F16 {
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn widen(eight: &[Self; 8]) -> __m256 {
        _mm256_cvtph_ps(load_16(bytemuck::cast_ref(eight)))
    }
}

impl Float for BF16 {
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn widen(eight: &[Self; 8]) -> __m256 {
        let wide = _mm256_cvtepu16_epi32(load_16(bytemuck::cast_ref(eight)));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
    }
}

/// Products of floats in 4 × 8 lanes: column `i` goes to lane `i mod 32`.
#[derive(Clone, Copy)]
struct FloatSum([__m256; 4]);

impl FloatSum {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new() -> Self {
        Self([_mm256_setzero_ps(); 4])
    }

    /// Adds `Σ w·x`; the rest behind the last 32 columns is filled up with zeros.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn add<W: Float>(&mut self, w: &[W], x: &[f32]) {
        let ((w, w_rest), (x, x_rest)) = (w.as_chunks::<32>(), x.as_chunks::<32>());
        for (w, x) in w.iter().zip(x) {
            self.add_32(w, x);
        }
        if !x_rest.is_empty() {
            let (mut w, mut x) = ([W::zeroed(); 32], [0.0; 32]);
            w[..w_rest.len()].copy_from_slice(w_rest);
            x[..x_rest.len()].copy_from_slice(x_rest);
            self.add_32(&w, &x);
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn add_32<W: Float>(&mut self, w: &[W; 32], x: &[f32; 32]) {
        let (w, x) = (w.as_chunks().0, x.as_chunks().0);
        for k in 0..4 {
            // SAFETY: this function has the features.
            let w = unsafe { W::widen(&w[k]) };
            self.0[k] = _mm256_fmadd_ps(w, load_f32(&x[k]), self.0[k]);
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn sum(self) -> f32 {
        sum_four(self.0)
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn dot_floats<W: Float>(rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
    for (index, out) in out.iter_mut().enumerate() {
        let mut sum = FloatSum::new();
        sum.add::<W>(bytemuck::cast_slice(rows.row(index)), x.x);
        *out = sum.sum();
    }
}

/// Dots rows of any type with the activations in f32.
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_decoded(rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
    for (index, out) in out.iter_mut().enumerate() {
        let mut sum = FloatSum::new();
        decode_pieces(rows, index, x.x, |weights, x| sum.add(weights, x));
        *out = sum.sum();
    }
}

/// See [`Kernels::axpy_f16`].
pub(super) fn axpy_f16(a: f32, y: &[f16], acc: &mut [f32]) {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn inner(a: f32, y: &[F16], acc: &mut [f32]) {
        let ((y, y_rest), (acc, acc_rest)) = (y.as_chunks::<8>(), acc.as_chunks_mut::<8>());
        let wide_a = _mm256_set1_ps(a);
        for (y, acc) in y.iter().zip(acc) {
            // SAFETY: this function has the features.
            let y = unsafe { F16::widen(y) };
            store_f32(acc, _mm256_fmadd_ps(wide_a, y, load_f32(acc)));
        }
        for (y, acc) in y_rest.iter().zip(acc_rest) {
            *acc = a.mul_add(_mm256_cvtss_f32(broadcast_f16(*y)), *acc);
        }
    }
    // SAFETY: the table is only handed out where the CPU has the features.
    unsafe { inner(a, as_blocks(y), acc) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_f32(to: &mut [f32; 8], v: __m256) {
    // SAFETY: the array is as long as the register, and the store takes any alignment.
    unsafe { _mm256_storeu_ps(to.as_mut_ptr(), v) }
}

// Activations.

/// See [`super::activations::quantize`], whose bits this gives.
pub(super) fn quantize(x: &[f32], q: &mut [i8], scales: &mut [f32], sums: &mut [i16]) {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn inner(x: &[f32], q: &mut [i8], scales: &mut [f32], sums: &mut [i16]) {
        let (x, q) = (x.as_chunks::<SCALE_LEN>().0, q.as_chunks_mut().0);
        let sums = sums.as_chunks_mut::<{ SCALE_LEN / SUM_LEN }>().0;
        for ((x, q), (scale, sums)) in x.iter().zip(q).zip(scales.iter_mut().zip(sums)) {
            *scale = quantize_32(x, q, sums);
        }
    }
    // SAFETY: the table is only handed out where the CPU has the features.
    unsafe { inner(x, q, scales, sums) }
}

/// Quantizes a group and returns its scale.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn quantize_32(x: &[f32; 32], q: &mut [i8; 32], sums: &mut [i16; 2]) -> f32 {
    let x: [__m256; 4] = std::array::from_fn(|k| load_f32(&x.as_chunks().0[k]));
    let magnitude = _mm256_set1_epi32(i32::MAX);
    let [a, b, c, d] = x.map(|x| _mm256_and_si256(_mm256_castps_si256(x), magnitude));
    let max = _mm256_max_epi32(_mm256_max_epi32(a, b), _mm256_max_epi32(c, d));
    let max = _mm_max_epi32(
        _mm256_castsi256_si128(max),
        _mm256_extracti128_si256::<1>(max),
    );
    let max = _mm_max_epi32(max, _mm_unpackhi_epi64(max, max));
    let max = _mm_max_epi32(max, _mm_shuffle_epi32::<1>(max));
    let max = f32::from_bits(_mm_cvtsi128_si32(max) as u32);

    let inverse = inverse_scale(max);
    if inverse == 0.0 {
        (*q, *sums) = ([0; 32], [0; 2]);
        return max / 127.0;
    }
    let inverse = _mm256_set1_ps(inverse);
    let [a, b, c, d] = x.map(|x| _mm256_cvtps_epi32(_mm256_mul_ps(x, inverse)));
    // Packing goes half by half of the registers: the permutation puts the columns in order.
    let codes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let codes = _mm256_permutevar8x32_epi32(codes, order);
    // SAFETY: the array is as long as the register, and the store takes any alignment.
    unsafe { _mm256_storeu_si256(q.as_mut_ptr().cast(), codes) };

    // Four sums of 8 codes, each code plus 128.
    let unsigned = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
    let eights = _mm256_sad_epu8(unsigned, _mm256_setzero_si256());
    let sixteens = _mm256_add_epi64(eights, _mm256_unpackhi_epi64(eights, eights));
    let bias = 128 * SUM_LEN as i32;
    sums[0] = (_mm256_extract_epi32::<0>(sixteens) - bias) as i16;
    sums[1] = (_mm256_extract_epi32::<4>(sixteens) - bias) as i16;
    max / 127.0
}
