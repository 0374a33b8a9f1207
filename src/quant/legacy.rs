//! Blocks of 32 weights with one scale: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.
//!
//! `_0`: symmetric, `w = d·(q − half)`; `_1`: with a minimum, `w = d·q + m`.

use std::array::from_fn;

use bytemuck::{Pod, Zeroable};

use super::float::F16;
use super::k::{AffineGrid, fit_affine};
use super::search::{
    fit_symmetric, importance_weights, inverse, largest_magnitude, sum_of_squares, transposed,
    truncate,
};
use super::{Block, BlockType, Encode};

const LEN: usize = 32;

/// 32 weights of 4 bits: `w = d·(q − 8)`.
///
/// ```text
/// byte 0   2                                   18
///      ┌───┬─────┬─────┬─────┬─ ─ ─ ─ ─ ┬─────┐
///      │ d │16│ 0│17│ 1│18│ 2│          │31│15│   qs[j]: weight j low, weight j + 16 high
///      └───┴─────┴─────┴─────┴─ ─ ─ ─ ─ ┴─────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
#[allow(missing_docs)] // the picture above
pub struct BlockQ4_0 {
    pub d: F16,
    pub qs: [u8; 16],
}

/// 32 weights of 4 bits with a minimum: `w = d·q + m`.
///
/// ```text
/// byte 0   2   4                                   20
///      ┌───┬───┬─────┬─────┬─────┬─ ─ ─ ─ ─ ┬─────┐
///      │ d │ m │16│ 0│17│ 1│18│ 2│          │31│15│   qs[j]: weight j low, weight j + 16 high
///      └───┴───┴─────┴─────┴─────┴─ ─ ─ ─ ─ ┴─────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
#[allow(missing_docs)] // the picture above
pub struct BlockQ4_1 {
    pub d: F16,
    pub m: F16,
    pub qs: [u8; 16],
}

/// 32 weights of 5 bits: `w = d·(q − 16)`.
///
/// ```text
/// byte 0   2        6                             22
///      ┌───┬────────┬─────┬─────┬─ ─ ─ ─ ─ ┬─────┐
///      │ d │ qh[4]  │16│ 0│17│ 1│          │31│15│   qs[j]: weight j low, weight j + 16 high
///      └───┴────────┴─────┴─────┴─ ─ ─ ─ ─ ┴─────┘
///            bit j of the 32: the fifth bit of weight j
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
#[allow(missing_docs)] // the picture above
pub struct BlockQ5_0 {
    pub d: F16,
    pub qh: [u8; 4],
    pub qs: [u8; 16],
}

/// 32 weights of 5 bits with a minimum: `w = d·q + m`.
///
/// ```text
/// byte 0   2   4        8                             24
///      ┌───┬───┬────────┬─────┬─────┬─ ─ ─ ─ ─ ┬─────┐
///      │ d │ m │ qh[4]  │16│ 0│17│ 1│          │31│15│   qs[j]: weight j low, weight j + 16 high
///      └───┴───┴────────┴─────┴─────┴─ ─ ─ ─ ─ ┴─────┘
///                bit j of the 32: the fifth bit of weight j
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
#[allow(missing_docs)] // the picture above
pub struct BlockQ5_1 {
    pub d: F16,
    pub m: F16,
    pub qh: [u8; 4],
    pub qs: [u8; 16],
}

/// 32 weights of 8 bits: `w = d·q`.
///
/// ```text
/// byte 0   2                       34
///      ┌───┬───┬───┬─ ─ ─ ─ ─ ┬───┐
///      │ d │ 0 │ 1 │          │31 │   qs[j]: weight j, signed
///      └───┴───┴───┴─ ─ ─ ─ ─ ┴───┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
#[allow(missing_docs)] // the picture above
pub struct BlockQ8_0 {
    pub d: F16,
    pub qs: [i8; 32],
}

const _: () = assert!(
    size_of::<BlockQ4_0>() == 18
        && size_of::<BlockQ4_1>() == 20
        && size_of::<BlockQ5_0>() == 22
        && size_of::<BlockQ5_1>() == 24
        && size_of::<BlockQ8_0>() == 34
);

/// Packs the low four bits of 32 levels.
#[inline(always)]
pub(super) fn pack_nibbles(levels: &[u8; LEN]) -> [u8; LEN / 2] {
    each!(j: 16 => (levels[j] & 15) | levels[j + 16] << 4)
}

/// The 32 levels that [`pack_nibbles`] packed.
#[inline]
pub(crate) fn unpack_nibbles(qs: &[u8; LEN / 2]) -> [u8; LEN] {
    from_fn(|j| if j < 16 { qs[j] & 15 } else { qs[j - 16] >> 4 })
}

/// Packs the fifth bit of 32 levels.
#[inline(always)]
pub(super) fn pack_fifth_bits(levels: &[u8; LEN]) -> [u8; 4] {
    let bits = levels
        .iter()
        .rev()
        .fold(0u32, |bits, &level| bits << 1 | u32::from(level >> 4 & 1));
    bits.to_le_bytes()
}

/// The 32 levels of five bits each.
#[inline]
pub(crate) fn unpack_five_bits(qh: [u8; 4], qs: &[u8; LEN / 2]) -> [u8; LEN] {
    let high = u32::from_le_bytes(qh);
    let low = unpack_nibbles(qs);
    from_fn(|j| low[j] + (high >> j & 1) as u8 * 16)
}

#[inline]
fn decode_symmetric(d: F16, half: i8, levels: [u8; LEN], weights: &mut [f32]) {
    let d = d.to_f32();
    for (weight, level) in weights.iter_mut().zip(levels) {
        *weight = f32::from(level as i8 - half) * d;
    }
}

#[inline]
fn decode_affine(d: F16, m: F16, levels: [u8; LEN], weights: &mut [f32]) {
    let (d, m) = (d.to_f32(), m.to_f32());
    for (weight, level) in weights.iter_mut().zip(levels) {
        *weight = f32::from(level) * d + m;
    }
}

/// Scale and levels `0..2·half` of a symmetric block: the weight of largest magnitude gets the
/// lowest level, which has no counterpart above.
#[inline(always)]
fn round_symmetric(half: i8, x: &[f32; LEN]) -> (F16, [u8; LEN]) {
    let d = largest_magnitude(x) / f32::from(-half);
    let id = inverse(d);
    let middle = f32::from(half) + 0.5;
    let levels = each!(i: LEN => (truncate(x[i] * id + middle) as i8).min(2 * half - 1) as u8);
    (F16::from_f32(d), levels)
}

/// Scale, minimum and levels `0..=top` of a block with a minimum.
#[inline(always)]
fn round_affine(top: i8, x: &[f32; LEN]) -> (F16, F16, [u8; LEN]) {
    let (min, max) = x.iter().fold((f32::MAX, f32::MIN), |(min, max), &x| {
        (if x < min { x } else { min }, if x > max { x } else { max })
    });
    let d = (max - min) / f32::from(top);
    let id = inverse(d);
    let levels = each!(i: LEN => (truncate((x[i] - min) * id + 0.5) as i8).min(top) as u8);
    (F16::from_f32(d), F16::from_f32(min), levels)
}

/// Encodes block by block by a scale. `make` gets the scale and the levels: those of [`round_symmetric`] without importance, with it those
/// of a search for the least weighted error, over [`ABREAST`] blocks at once.
#[inline(always)]
fn encode_symmetric<B>(
    half: i8,
    row: &[f32],
    importance: Option<&[f32]>,
    blocks: &mut [B],
    make: impl Fn(F16, [u8; LEN]) -> B,
) {
    let Some(importance) = importance else {
        for (block, x) in blocks.iter_mut().zip(row.as_chunks().0) {
            let (d, levels) = round_symmetric(half, x);
            *block = make(d, levels);
        }
        return;
    };
    let variance = [variance(row); ABREAST];
    let rows = row.as_chunks().0.chunks(ABREAST);
    let importance = importance.as_chunks().0.chunks(ABREAST);
    for (blocks, (x, importance)) in blocks.chunks_mut(ABREAST).zip(rows.zip(importance)) {
        let lanes = lanes_of(x);
        let importance = lanes_of(importance);
        let weights: [_; LEN] =
            each!(i: LEN => importance_weights(&lanes[i], &importance[i], &variance));
        let fits = fit_symmetric(&lanes, &weights, half);
        for (j, (block, x)) in blocks.iter_mut().zip(x).enumerate() {
            *block = make(F16::from_f32(fits.scales[j]), fits.levels(j, x));
        }
    }
}

/// The same by a scale and a minimum, [`round_affine`] without importance.
#[inline(always)]
fn encode_affine<B>(
    top: i8,
    row: &[f32],
    importance: Option<&[f32]>,
    blocks: &mut [B],
    make: impl Fn(F16, F16, [u8; LEN]) -> B,
) {
    let Some(importance) = importance else {
        for (block, x) in blocks.iter_mut().zip(row.as_chunks().0) {
            let (d, m, levels) = round_affine(top, x);
            *block = make(d, m, levels);
        }
        return;
    };
    let grid = AffineGrid::weighted(top as u8);
    let variance = [variance(row); ABREAST];
    let rows = row.as_chunks().0.chunks(ABREAST);
    let importance = importance.as_chunks().0.chunks(ABREAST);
    for (blocks, (x, importance)) in blocks.chunks_mut(ABREAST).zip(rows.zip(importance)) {
        let lanes = lanes_of(x);
        let importance = lanes_of(importance);
        let weights: [_; LEN] =
            each!(i: LEN => importance_weights(&lanes[i], &importance[i], &variance));
        let fits = fit_affine(&lanes, &weights, &grid);
        for (j, (block, x)) in blocks.iter_mut().zip(x).enumerate() {
            let (d, m) = (F16::from_f32(fits.scales[j]), F16::from_f32(-fits.mins[j]));
            *block = make(d, m, fits.levels(j, x));
        }
    }
}

/// Blocks side by side, [`ABREAST`] at most; where there are fewer, the first of them fills the other lanes.
#[inline(always)]
fn lanes_of(blocks: &[[f32; LEN]]) -> [[f32; ABREAST]; LEN] {
    let all = each!(j: ABREAST => blocks[if j < blocks.len() { j } else { 0 }]);
    transposed(&all)
}

/// Mean square of a row.
#[inline(always)]
fn variance(row: &[f32]) -> f32 {
    sum_of_squares(row) / row.len() as f32
}

/// Blocks whose searches go in step, a lane each.
const ABREAST: usize = 16;

impl Block for BlockQ4_0 {
    const TYPE: BlockType = BlockType::Q4_0;
    const LEN: usize = LEN;

    #[inline]
    fn decode(&self, weights: &mut [f32]) {
        decode_symmetric(self.d, 8, unpack_nibbles(&self.qs), weights);
    }
}

impl Encode for BlockQ4_0 {
    #[inline(always)]
    fn encode_row(row: &[f32], importance: Option<&[f32]>, blocks: &mut [Self]) {
        encode_symmetric(
            8,
            row,
            importance,
            blocks,
            #[inline(always)]
            |d, levels| BlockQ4_0 {
                d,
                qs: pack_nibbles(&levels),
            },
        );
    }
}

impl Block for BlockQ4_1 {
    const TYPE: BlockType = BlockType::Q4_1;
    const LEN: usize = LEN;

    #[inline]
    fn decode(&self, weights: &mut [f32]) {
        decode_affine(self.d, self.m, unpack_nibbles(&self.qs), weights);
    }
}

impl Encode for BlockQ4_1 {
    #[inline(always)]
    fn encode_row(row: &[f32], importance: Option<&[f32]>, blocks: &mut [Self]) {
        encode_affine(
            15,
            row,
            importance,
            blocks,
            #[inline(always)]
            |d, m, levels| BlockQ4_1 {
                d,
                m,
                qs: pack_nibbles(&levels),
            },
        );
    }
}

impl Block for BlockQ5_0 {
    const TYPE: BlockType = BlockType::Q5_0;
    const LEN: usize = LEN;

    #[inline]
    fn decode(&self, weights: &mut [f32]) {
        decode_symmetric(self.d, 16, unpack_five_bits(self.qh, &self.qs), weights);
    }
}

impl Encode for BlockQ5_0 {
    #[inline(always)]
    fn encode_row(row: &[f32], importance: Option<&[f32]>, blocks: &mut [Self]) {
        encode_symmetric(
            16,
            row,
            importance,
            blocks,
            #[inline(always)]
            |d, levels| BlockQ5_0 {
                d,
                qh: pack_fifth_bits(&levels),
                qs: pack_nibbles(&levels),
            },
        );
    }
}

impl Block for BlockQ5_1 {
    const TYPE: BlockType = BlockType::Q5_1;
    const LEN: usize = LEN;

    #[inline]
    fn decode(&self, weights: &mut [f32]) {
        decode_affine(self.d, self.m, unpack_five_bits(self.qh, &self.qs), weights);
    }
}

impl Encode for BlockQ5_1 {
    #[inline(always)]
    fn encode_row(row: &[f32], importance: Option<&[f32]>, blocks: &mut [Self]) {
        encode_affine(
            31,
            row,
            importance,
            blocks,
            #[inline(always)]
            |d, m, levels| BlockQ5_1 {
                d,
                m,
                qh: pack_fifth_bits(&levels),
                qs: pack_nibbles(&levels),
            },
        );
    }
}

impl Block for BlockQ8_0 {
    const TYPE: BlockType = BlockType::Q8_0;
    const LEN: usize = LEN;

    #[inline]
    fn decode(&self, weights: &mut [f32]) {
        let d = self.d.to_f32();
        for (weight, q) in weights.iter_mut().zip(self.qs) {
            *weight = f32::from(q) * d;
        }
    }
}

impl Encode for BlockQ8_0 {
    /// ggml's Q8_0 has no use for importance.
    #[inline(always)]
    fn encode_row(row: &[f32], _importance: Option<&[f32]>, blocks: &mut [Self]) {
        for (block, x) in blocks.iter_mut().zip(row.as_chunks::<LEN>().0) {
            let d = largest_magnitude(x).abs() / 127.0;
            let id = inverse(d);
            *block = BlockQ8_0 {
                d: F16::from_f32(d),
                qs: each!(i: LEN => round_half_away(x[i] * id) as i8),
            };
        }
    }
}

/// C's `roundf` and a cast to `int`. The addend is the float below ½, so that what lies just
/// below a tie is not lifted over it.
#[inline(always)]
fn round_half_away(value: f32) -> i32 {
    truncate(value + 0.499_999_97_f32.copysign(value))
}
