//! AVX-512 (F, BW, VL, VNNI): 64 codes a register.
//!
//! ```text
//! codes     64 × 8 bit, without sign     q      64 × 8 bit, signed
//!      └── vpdpbusd: 16 sums of products, 32 bit, on top of − offset · Σ q ──┘
//!          cvt, fma with (weight scale · activation scale): 16 lanes of f32
//! ```
//!
//! `vpdpbusd` wants one side without a sign and cannot saturate: all weights are taken without
//! one, too large by an offset, and the offset's share is taken off where the sum starts.
//!
//! Dot products of floats are those of AVX2: they wait for memory.

use std::arch::x86_64::*;

use super::x86::entry;
use super::{DotRows, DotStreams, Kernels, Tile, avx2, floats};
use crate::quant::{
    BlockIQ4NL, BlockIQ4XS, BlockMXFP4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K,
    BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, BlockType,
};
use dots::{dot_fours, dot_quarters, dot_stripes, stream_fours, stream_quarters, stream_stripes};

mod codes;
mod dots;
mod fours;
mod panels;
mod tiles;

static KERNELS: Kernels = Kernels {
    name: "avx512",
    dot,
    dot_streams,
    tile,
    packs: true,
    exact: avx2::exact,
    exact_tile,
    add_loud: avx2::add_loud,
    quantize: avx2::quantize,
    floats: &floats::AVX512,
};

/// The AVX-512 table, if this CPU can run it.
pub fn kernels() -> Option<&'static Kernels> {
    let runs = avx2::kernels().is_some()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni");
    runs.then_some(&KERNELS)
}

fn dot(kind: BlockType) -> DotRows {
    match kind {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => avx2::exact(kind),
        BlockType::Q4_0 => entry!(dot_fours::<BlockQ4_0>),
        BlockType::Q4_1 => entry!(dot_fours::<BlockQ4_1>),
        BlockType::Q5_0 => entry!(dot_fours::<BlockQ5_0>),
        BlockType::Q5_1 => entry!(dot_fours::<BlockQ5_1>),
        BlockType::Q8_0 => entry!(dot_fours::<BlockQ8_0>),
        BlockType::IQ4_NL => entry!(dot_fours::<BlockIQ4NL>),
        BlockType::MXFP4 => entry!(dot_fours::<BlockMXFP4>),
        BlockType::Q2_K => entry!(dot_quarters::<BlockQ2K>),
        BlockType::Q3_K => entry!(dot_quarters::<BlockQ3K>),
        BlockType::Q4_K => entry!(dot_stripes::<BlockQ4K>),
        BlockType::Q5_K => entry!(dot_stripes::<BlockQ5K>),
        BlockType::Q6_K => entry!(dot_quarters::<BlockQ6K>),
        BlockType::IQ4_XS => entry!(dot_stripes::<BlockIQ4XS>),
    }
}

fn dot_streams(kind: BlockType) -> Option<DotStreams> {
    Some(match kind {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => return None,
        BlockType::Q4_0 => entry!(stream_fours::<BlockQ4_0>),
        BlockType::Q4_1 => entry!(stream_fours::<BlockQ4_1>),
        BlockType::Q5_0 => entry!(stream_fours::<BlockQ5_0>),
        BlockType::Q5_1 => entry!(stream_fours::<BlockQ5_1>),
        BlockType::Q8_0 => entry!(stream_fours::<BlockQ8_0>),
        BlockType::IQ4_NL => entry!(stream_fours::<BlockIQ4NL>),
        BlockType::MXFP4 => entry!(stream_fours::<BlockMXFP4>),
        BlockType::Q2_K => entry!(stream_quarters::<BlockQ2K>),
        BlockType::Q3_K => entry!(stream_quarters::<BlockQ3K>),
        BlockType::Q4_K => entry!(stream_stripes::<BlockQ4K>),
        BlockType::Q5_K => entry!(stream_stripes::<BlockQ5K>),
        BlockType::Q6_K => entry!(stream_quarters::<BlockQ6K>),
        BlockType::IQ4_XS => entry!(stream_stripes::<BlockIQ4XS>),
    })
}

fn tile(kind: BlockType) -> Option<Tile> {
    tiles::tile(kind).or_else(|| exact_tile(kind))
}

/// The tile product in f32.
fn exact_tile(_: BlockType) -> Option<Tile> {
    // SAFETY: tables are only handed out where the CPU has the features.
    Some(|rows, x, out| unsafe { avx2::tile_512(rows, x.x, out) })
}

macro_rules! load {
    ($($name:ident: $from:ty => $to:ty, $intrinsic:ident;)*) => {$(
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
        fn $name(from: &$from) -> $to {
            // SAFETY: the array is as long as the register, and the load takes any alignment.
            unsafe { $intrinsic(from.as_ptr().cast()) }
        }
    )*};
}

load! {
    load_u8: [u8; 64] => __m512i, _mm512_loadu_si512;
    load_i8: [i8; 64] => __m512i, _mm512_loadu_si512;
    load_u8_32: [u8; 32] => __m256i, _mm256_loadu_si256;
    load_i16: [i16; 16] => __m256i, _mm256_loadu_si256;
    load_i32: [i32; 16] => __m512i, _mm512_loadu_si512;
    load_i16_8: [i16; 8] => __m128i, _mm_loadu_si128;
    load_f32: [f32; 8] => __m256, _mm256_loadu_ps;
    load_f32_4: [f32; 4] => __m128, _mm_loadu_ps;
}
