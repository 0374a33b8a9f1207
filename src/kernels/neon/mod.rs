//! NEON (ARMv8 and later), in three levels: 16 codes a register.
//!
//! ```text
//! codes     16 × 8 bit, signed      q      16 × 8 bit, signed
//!      └── a level's products: 4 sums of 4, 32 bit ──┘
//!          4 groups of 16 (or of 32) columns folded into one register, a sum to a lane
//!          cvt, fma with 4 × (weight scale · activation scale): 4 lanes of f32
//! ```
//!
//! | table          | needs                  | generation      | a prompt               |
//! |----------------|------------------------|-----------------|------------------------|
//! | `neon`         | nothing more           | `smull`, `smlal`| the same dots          |
//! | `neon-dotprod` | FEAT_DotProd           | `sdot`          | tiles of `sdot`        |
//! | `neon-i8mm`    | FEAT_DotProd, FEAT_I8MM| `sdot`          | tiles of `smmla`       |
//!
//! These kernels were checked under emulation and by counting instructions; no figure of speed
//! stands behind any choice here.

use std::arch::aarch64::*;
use std::arch::is_aarch64_feature_detected;

use super::tiles::Tile;
use super::{DotRows, Kernels, loud};
use crate::quant::{
    BF16, BlockIQ4NL, BlockIQ4XS, BlockMXFP4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K,
    BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, BlockType, F16, F32,
};
use dots::{dot_coarse, dot_fine, dot_small};
use floats::{dot_decoded, dot_floats};
pub(super) use lanes::Neon;
use multiply::{Multiply, Sdot, Smull};

mod activations;
mod codes;
mod dots;
mod floats;
mod lanes;
mod multiply;
mod tiles;

static NEON: Kernels = table::<Smull>("neon", exact_tile_of_floats);
static DOTPROD: Kernels = table::<Sdot>("neon-dotprod", tiles::tile::<tiles::ByLane>);
static I8MM: Kernels = table::<Sdot>("neon-i8mm", tiles::tile::<tiles::TwoByTwo>);

const fn table<M: Multiply>(name: &'static str, tile: fn(BlockType) -> Option<Tile>) -> Kernels {
    Kernels {
        name,
        dot: dot::<M>,
        dot_streams: |_| None,
        tile,
        packs: false,
        exact,
        exact_tile,
        add_loud: |rows, loud, out| loud::add(rows, loud, out),
        quantize: activations::quantize,
        floats: &super::floats::NEON,
    }
}

/// The tables that this CPU can run, the widest last.
pub fn kernels() -> impl Iterator<Item = &'static Kernels> {
    let dotprod = is_aarch64_feature_detected!("dotprod");
    let i8mm = dotprod && is_aarch64_feature_detected!("i8mm");
    [(true, &NEON), (dotprod, &DOTPROD), (i8mm, &I8MM)]
        .into_iter()
        .filter_map(|(runs, table)| runs.then_some(table))
}

/// Makes a safe function of a table out of a function that needs the CPU's features.
macro_rules! entry {
    ($inner:expr) => {
        |rows, x, out| {
            // SAFETY: every aarch64 has NEON, and tables are only handed out where the CPU has
            // what they need beyond it.
            unsafe { $inner(rows, x, out) }
        }
    };
}
fn dot<M: Multiply>(kind: BlockType) -> DotRows {
    match kind {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => exact(kind),
        BlockType::Q4_0 => entry!(dot_small::<M, BlockQ4_0>),
        BlockType::Q4_1 => entry!(dot_small::<M, BlockQ4_1>),
        BlockType::Q5_0 => entry!(dot_small::<M, BlockQ5_0>),
        BlockType::Q5_1 => entry!(dot_small::<M, BlockQ5_1>),
        BlockType::Q8_0 => entry!(dot_small::<M, BlockQ8_0>),
        BlockType::IQ4_NL => entry!(dot_small::<M, BlockIQ4NL>),
        BlockType::MXFP4 => entry!(dot_small::<M, BlockMXFP4>),
        BlockType::Q4_K => entry!(dot_coarse::<M, BlockQ4K>),
        BlockType::Q5_K => entry!(dot_coarse::<M, BlockQ5K>),
        BlockType::IQ4_XS => entry!(dot_coarse::<M, BlockIQ4XS>),
        BlockType::Q2_K => entry!(dot_fine::<M, BlockQ2K>),
        BlockType::Q3_K => entry!(dot_fine::<M, BlockQ3K>),
        BlockType::Q6_K => entry!(dot_fine::<M, BlockQ6K>),
    }
}

fn exact(kind: BlockType) -> DotRows {
    match kind {
        BlockType::F32 => entry!(dot_floats::<F32>),
        BlockType::F16 => entry!(dot_floats::<F16>),
        BlockType::BF16 => entry!(dot_floats::<BF16>),
        _ => entry!(dot_decoded),
    }
}

/// The tile product in f32: rows are decoded once for all tokens.
fn exact_tile(_: BlockType) -> Option<Tile> {
    Some(|rows, x, out| super::tiles::decoded(rows, x.x, out, entry!(dot_floats::<F32>)))
}

/// Tiles for floats alone: of the base level's dots, unpacking is a sixth (Q4_K) to two fifths (Q5_K) of
/// the instructions, and the loads and stores of a panel would take a part of that back.
fn exact_tile_of_floats(kind: BlockType) -> Option<Tile> {
    match kind {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => exact_tile(kind),
        _ => None,
    }
}

macro_rules! load {
    ($($name:ident: $from:ty => $to:ty, $intrinsic:ident;)*) => {$(
        #[inline]
        #[target_feature(enable = "neon")]
        fn $name(from: &$from) -> $to {
            // SAFETY: the array is as long as the register, and the load takes any alignment.
            unsafe { $intrinsic(from.as_ptr().cast()) }
        }
    )*};
}
use load;

load! {
    load_u8: [u8; 16] => uint8x16_t, vld1q_u8;
    load_i8: [i8; 16] => int8x16_t, vld1q_s8;
    load_i16: [i16; 8] => int16x8_t, vld1q_s16;
    load_f32: [f32; 4] => float32x4_t, vld1q_f32;
}

#[inline]
#[target_feature(enable = "neon")]
fn store_f32(to: &mut [f32; 4], v: float32x4_t) {
    // SAFETY: the array is as long as the register, and the store takes any alignment.
    unsafe { vst1q_f32(to.as_mut_ptr(), v) }
}

/// A half's bits.
#[inline]
fn half_bits(half: F16) -> u16 {
    u16::from_le_bytes(bytemuck::cast(half))
}

/// Four halves in f32.
#[inline]
#[target_feature(enable = "neon")]
fn widen_halves(halves: [F16; 4]) -> float32x4_t {
    let bits = vcreate_u16(u64::from_le_bytes(bytemuck::cast(halves)));
    vcvt_f32_f16(vreinterpret_f16_u16(bits))
}

/// A half in f32.
#[inline]
#[target_feature(enable = "neon")]
fn widen_half(half: F16) -> f32 {
    let bits = vdup_n_u16(half_bits(half));
    vgetq_lane_f32::<0>(vcvt_f32_f16(vreinterpret_f16_u16(bits)))
}
