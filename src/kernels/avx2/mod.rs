//! AVX2 (with FMA and F16C), and the same with AVX-VNNI: 32 codes a register.
//!
//! Weights meet activations 32 columns at a time, which is a block of the 32-weight types and a
//! stripe of a super-block, and the span of one activation scale:
//!
//! ```text
//! codes     32 × 8 bit      q      32 × 8 bit
//!      └──── 8 sums of products, 32 bit ──────┘      (how: multiply)
//!            cvt, fma with the scales: 8 lanes of f32
//! ```

use std::arch::x86_64::*;

use super::x86::entry;
use super::{DotRows, DotStreams, Kernels, Loud, Tile, loud};
use crate::quant::{
    BF16, BlockIQ4NL, BlockIQ4XS, BlockMXFP4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K,
    BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, BlockType, F16, F32,
};
use crate::tensor::Rows;
use dots::{dot_blocks, dot_super_blocks, stream_blocks};
use floats::{dot_decoded, dot_floats};
use multiply::{Maddubs, Multiply, Vnni};

mod activations;
mod codes;
mod dots;
mod float_tiles;
mod floats;
mod multiply;
mod panels;
mod tiles;

pub(super) use activations::quantize;
pub(super) use float_tiles::tile_512;
pub(super) use multiply::dpbusd;

static AVX2: Kernels = table::<Maddubs>("avx2");
static AVX_VNNI: Kernels = table::<Vnni>("avxvnni");

const fn table<M: Multiply>(name: &'static str) -> Kernels {
    Kernels {
        name,
        dot: dot::<M>,
        dot_streams: dot_streams::<M>,
        tile: tile::<M>,
        packs: false,
        exact,
        exact_tile,
        add_loud,
        quantize,
        floats: &super::floats::AVX2,
    }
}

/// See [`loud::add`].
pub(super) fn add_loud(rows: Rows<'_>, loud: &[Loud], out: &mut [f32]) {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn inner(rows: Rows<'_>, loud: &[Loud], out: &mut [f32]) {
        loud::add(rows, loud, out)
    }
    // SAFETY: the table is only handed out where the CPU has the features.
    unsafe { inner(rows, loud, out) }
}

/// The AVX2 table, if this CPU can run it.
pub fn kernels() -> Option<&'static Kernels> {
    let runs = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    runs.then_some(&AVX2)
}

/// The table of AVX2 with AVX-VNNI, if this CPU can run it.
pub fn vnni_kernels() -> Option<&'static Kernels> {
    let runs = kernels().is_some() && is_x86_feature_detected!("avxvnni");
    runs.then_some(&AVX_VNNI)
}

fn dot<M: Multiply>(kind: BlockType) -> DotRows {
    match kind {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => exact(kind),
        BlockType::Q4_0 => entry!(dot_blocks::<M, BlockQ4_0>),
        BlockType::Q4_1 => entry!(dot_blocks::<M, BlockQ4_1>),
        BlockType::Q5_0 => entry!(dot_blocks::<M, BlockQ5_0>),
        BlockType::Q5_1 => entry!(dot_blocks::<M, BlockQ5_1>),
        BlockType::Q8_0 => entry!(dot_blocks::<M, BlockQ8_0>),
        BlockType::IQ4_NL => entry!(dot_blocks::<M, BlockIQ4NL>),
        BlockType::MXFP4 => entry!(dot_blocks::<M, BlockMXFP4>),
        BlockType::Q2_K => entry!(dot_super_blocks::<BlockQ2K>),
        BlockType::Q3_K => entry!(dot_super_blocks::<BlockQ3K>),
        BlockType::Q4_K => entry!(dot_super_blocks::<BlockQ4K>),
        BlockType::Q5_K => entry!(dot_super_blocks::<BlockQ5K>),
        BlockType::Q6_K => entry!(dot_super_blocks::<BlockQ6K>),
        BlockType::IQ4_XS => entry!(dot_super_blocks::<BlockIQ4XS>),
    }
}

/// Small blocks only: for super-blocks sixteen registers are too few.
fn dot_streams<M: Multiply>(kind: BlockType) -> Option<DotStreams> {
    match kind {
        BlockType::Q4_0 => Some(entry!(stream_blocks::<M, BlockQ4_0>)),
        BlockType::Q4_1 => Some(entry!(stream_blocks::<M, BlockQ4_1>)),
        BlockType::Q5_0 => Some(entry!(stream_blocks::<M, BlockQ5_0>)),
        BlockType::Q5_1 => Some(entry!(stream_blocks::<M, BlockQ5_1>)),
        BlockType::Q8_0 => Some(entry!(stream_blocks::<M, BlockQ8_0>)),
        BlockType::IQ4_NL => Some(entry!(stream_blocks::<M, BlockIQ4NL>)),
        BlockType::MXFP4 => Some(entry!(stream_blocks::<M, BlockMXFP4>)),
        _ => None,
    }
}

fn tile<M: Multiply>(kind: BlockType) -> Option<Tile> {
    tiles::tile::<M>(kind).or_else(|| exact_tile(kind))
}

/// The dot product in f32.
pub(super) fn exact(kind: BlockType) -> DotRows {
    match kind {
        BlockType::F32 => entry!(dot_floats::<F32>),
        BlockType::F16 => entry!(dot_floats::<F16>),
        BlockType::BF16 => entry!(dot_floats::<BF16>),
        _ => entry!(dot_decoded),
    }
}

/// The tile product in f32.
fn exact_tile(_: BlockType) -> Option<Tile> {
    // SAFETY: tables are only handed out where the CPU has the features.
    Some(|rows, x, out| unsafe { float_tiles::tile(rows, x.x, out) })
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

#[inline]
#[target_feature(enable = "avx2")]
fn store_f32(to: &mut [f32; 8], v: __m256) {
    // SAFETY: the array is as long as the register, and the store takes any alignment.
    unsafe { _mm256_storeu_ps(to.as_mut_ptr(), v) }
}

/// Transposes 8 × 8 lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn turn(rows: [__m256i; 8]) -> [__m256i; 8] {
    let [a, b, c, d, e, f, g, h] = rows;
    let four = |a: __m256i, b: __m256i, c: __m256i, d: __m256i| {
        let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
        let (ab_high, cd_high) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
        [
            _mm256_unpacklo_epi64(ab, cd),
            _mm256_unpackhi_epi64(ab, cd),
            _mm256_unpacklo_epi64(ab_high, cd_high),
            _mm256_unpackhi_epi64(ab_high, cd_high),
        ]
    };
    let (low, high) = (four(a, b, c, d), four(e, f, g, h));
    let mut turned = [_mm256_setzero_si256(); 8];
    for k in 0..4 {
        turned[k] = _mm256_permute2x128_si256::<0x20>(low[k], high[k]);
        turned[4 + k] = _mm256_permute2x128_si256::<0x31>(low[k], high[k]);
    }
    turned
}
