//! K-quants: super-blocks of 256 weights whose scales are quantized in turn.
//!
//! A super-block is cut into sub-blocks of 16 or 32 weights. Each sub-block has a scale of few
//! bits (and, for the types that can lie off centre, a minimum of as many), in units of the
//! super-block's own f16 scale:
//!
//! ```text
//! type   sub-blocks   a weight is                           bits a weight
//! Q2_K   16 × 16      d·scale·q − dmin·min    q in 0..4      2.625
//! Q3_K   16 × 16      d·scale·q               q in −4..4     3.4375
//! Q4_K    8 × 32      d·scale·q − dmin·min    q in 0..16     4.5
//! Q5_K    8 × 32      d·scale·q − dmin·min    q in 0..32     5.5
//! Q6_K   16 × 16      d·scale·q               q in −32..32   6.5625
//! ```
//!
//! Encoding goes the same way for all of them: a search finds each sub-block's scale (and
//! minimum) in f32 ([`search`]), these are rounded to whole steps of the super-block's, and
//! the weights are then rounded once more, to the line that the rounded scales draw.
//!
//! The levels `q` are stored in stripes: stripe `j` is the 32 weights from `32·j` on, and a
//! byte holds the bits of weights at the same place of several stripes. So a vector of 32
//! bytes, shifted and masked, is a stripe.

mod affine;
mod pack;
mod q2;
mod q3;
mod q4;
mod q5;
mod q6;
mod search;

pub use pack::{Scales16, ScalesAndMins8};
pub(super) use pack::{pack_2_bits, pack_4_bits, pack_bit};
pub use q2::BlockQ2K;
pub use q3::BlockQ3K;
pub use q4::BlockQ4K;
pub use q5::BlockQ5K;
pub use q6::BlockQ6K;
pub(super) use search::{AffineGrid, fit_affine};

use std::array::from_fn;

use super::F16;
use super::search::nearest_int;

/// Weights in a super-block.
pub const SUPER_BLOCK: usize = 256;

/// The weights, or their importance, or their levels of a super-block.
type Super<T> = [T; SUPER_BLOCK];

/// The `blocks` super-blocks of a row, and their importance.
#[inline(always)]
fn super_blocks_of<'a>(
    row: &'a [f32],
    importance: Option<&'a [f32]>,
    blocks: usize,
) -> (&'a [Super<f32>], Option<&'a [Super<f32>]>) {
    assert_eq!(row.len(), blocks * SUPER_BLOCK, "the blocks hold the row");
    let importance = importance.map(|importance| {
        assert_eq!(importance.len(), row.len(), "one importance a weight");
        importance.as_chunks().0
    });
    (row.as_chunks().0, importance)
}

/// Encodes a row, super-block by super-block.
#[inline(always)]
fn encode_each<B>(
    row: &[f32],
    importance: Option<&[f32]>,
    blocks: &mut [B],
    encode: impl Fn(&Super<f32>, Option<&Super<f32>>) -> B,
) {
    let (rows, importance) = super_blocks_of(row, importance, blocks.len());
    // `encode` is called in one place, so that it is inlined there.
    for (i, (block, x)) in blocks.iter_mut().zip(rows).enumerate() {
        *block = encode(x, importance.map(|importance| &importance[i]));
    }
}

/// Super-blocks that [`encode_abreast`] takes at once: with eight sub-blocks each they fill the widest vectors.
const ABREAST: usize = 2;

/// Encodes a row, [`ABREAST`] super-blocks at a time.
#[inline(always)]
fn encode_abreast<B>(
    row: &[f32],
    importance: Option<&[f32]>,
    blocks: &mut [B],
    encode: impl Fn([&Super<f32>; ABREAST], Option<[&Super<f32>; ABREAST]>) -> [B; ABREAST],
) {
    let (rows, importance) = super_blocks_of(row, importance, blocks.len());
    for (i, blocks) in blocks.chunks_mut(ABREAST).enumerate() {
        // A row's last blocks may be fewer; the first of them stands in for the others.
        let at: [usize; ABREAST] = from_fn(|j| ABREAST * i + if j < blocks.len() { j } else { 0 });
        let encoded = encode(
            at.map(|at| &rows[at]),
            importance.map(|importance| at.map(|at| &importance[at])),
        );
        for (block, encoded) in blocks.iter_mut().zip(encoded) {
            *block = encoded;
        }
    }
}

/// The stripes of a block that is to be decoded into `weights`.
fn stripes_mut(weights: &mut [f32]) -> &mut [[f32; 32]] {
    assert_eq!(weights.len(), SUPER_BLOCK, "a super-block has 256 weights");
    weights.as_chunks_mut().0
}

/// The sub-blocks of `N` weights, each with the place of its levels.
#[inline(always)]
fn sub_blocks<'a, const N: usize>(
    x: &'a Super<f32>,
    levels: &'a mut Super<u8>,
) -> impl Iterator<Item = (&'a [f32; N], &'a mut [u8; N])> {
    x.as_chunks().0.iter().zip(levels.as_chunks_mut().0)
}

/// Rounds weights to the levels of the line `scale·q − min`.
#[inline(always)]
fn round_to_line<const N: usize>(x: &[f32; N], scale: f32, min: f32, max_level: u8) -> [u8; N] {
    each!(i: N => nearest_int((x[i] + min) / scale).clamp(0, i32::from(max_level)) as u8)
}

/// Rounds weights to `scale·q` with `q` in `−half..half`; the levels are `q + half`.
#[inline(always)]
fn round_to_scale<const N: usize>(x: &[f32; N], scale: f32, half: i8) -> [u8; N] {
    let half = i32::from(half);
    each!(i: N => (nearest_int(x[i] / scale).clamp(-half, half - 1) + half) as u8)
}

/// Writes values as whole shares of their maximum: the unit is `max / max_level`.
#[inline(always)]
fn share_of_max<const N: usize>(values: &[f32; N], max_level: u8) -> (F16, [u8; N]) {
    let max = values
        .iter()
        .fold(0.0, |max, &v| if v > max { v } else { max });
    let per_unit = if max > 0.0 {
        f32::from(max_level) / max
    } else {
        0.0
    };
    let unit = F16::from_f32(max / f32::from(max_level));
    (unit, each!(i: N => nearest_int(per_unit * values[i]) as u8))
}
