//! IQ4_NL and IQ4_XS: four bits that index a table of unevenly spaced values.

use bytemuck::{Pod, Zeroable};

use super::float::F16;
use super::legacy::{pack_nibbles, unpack_nibbles};
use super::search::{
    NEGLIGIBLE, importance_weights, inverse, largest_magnitude, nearest_int, sum_of_squares,
};
use super::{Block, BlockType, Encode};

/// The values that four bits stand for (the table is part of the format): dense near zero,
/// where most weights are.
pub const IQ4_VALUES: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// Where the nearest value changes from one to the next, and by how much.
const STEPS: [(f32, f32); 15] = {
    let mut steps = [(0.0, 0.0); 15];
    let mut i = 0;
    while i < 15 {
        let (low, high) = (IQ4_VALUES[i] as f32, IQ4_VALUES[i + 1] as f32);
        steps[i] = ((low + high) / 2.0, high - low);
        i += 1;
    }
    steps
};

/// 32 weights of 4 bits: `w = d·value[q]`.
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
pub struct BlockIQ4NL {
    pub d: F16,
    pub qs: [u8; 16],
}

/// 256 weights of 4 bits, a 6-bit scale for each 32 of them: `w = d·(s − 32)·value[q]`.
///
/// ```text
/// byte 0   2          4          8                                       136
///      ┌───┬──────────┬──────────┬─────────┬─────────┬─ ─ ─ ─ ─┬─────────┐
///      │ d │ scales_h │ scales_l │ weights │ weights │         │ weights │
///      │   │  8 × 2   │  8 × 4   │  0..32  │ 32..64  │         │224..256 │
///      └───┴──────────┴──────────┴─────────┴─────────┴─ ─ ─ ─ ─┴─────────┘
/// scale i: low bits in nibble i of scales_l, high bits at 2·i of scales_h
/// within 32 weights: byte j holds weight j low, weight j + 16 high
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
#[allow(missing_docs)] // the picture above
pub struct BlockIQ4XS {
    pub d: F16,
    pub scales_h: [u8; 2],
    pub scales_l: [u8; 4],
    pub qs: [[u8; 16]; 8],
}

const _: () = assert!(size_of::<BlockIQ4NL>() == 18 && size_of::<BlockIQ4XS>() == 136);

#[inline]
fn decode_group(scale: f32, qs: &[u8; 16], weights: &mut [f32]) {
    for (weight, index) in weights.iter_mut().zip(unpack_nibbles(qs)) {
        *weight = scale * f32::from(IQ4_VALUES[usize::from(index)]);
    }
}

/// Index of the value nearest to `x`, the upper one of two as near; the highest for a NaN. Comparisons, since vectors have no tables.
#[inline(always)]
fn nearest_index(x: f32) -> u8 {
    let mut index = 0;
    for (middle, _) in STEPS {
        index += if x < middle { 0 } else { 1 };
    }
    index
}

/// The value at [`nearest_index`]; whole numbers, so that the sum is exact.
#[inline(always)]
fn nearest_value(x: f32) -> f32 {
    let mut value = f32::from(IQ4_VALUES[0]);
    for (middle, step) in STEPS {
        value += if x < middle { 0.0 } else { step };
    }
    value
}

/// Indices of 32 weights at a scale, packed.
#[inline(always)]
fn encode_group(scale: f32, x: &[f32; 32]) -> [u8; 16] {
    let inverse_scale = inverse(scale);
    pack_nibbles(&each!(i: 32 => nearest_index(inverse_scale * x[i])))
}

/// The scale of 32 weights with the least weighted error: the largest weight is put at −127 as
/// a start, then at each of −134..=−120.
#[inline(always)]
fn group_scale(x: &[f32; 32], weights: &[f32; 32]) -> f32 {
    /// One for each try, see [`search`](super::search).
    const LANES: usize = 16;
    let largest = largest_magnitude(x);
    if largest.abs() < NEGLIGIBLE {
        return 0.0;
    }
    let lowest = f32::from(IQ4_VALUES[0]);
    let inverse_scales: [f32; LANES] = each!(lane: LANES => match lane {
        0 => 1.0 / (-largest / lowest),
        _ => (lane as f32 - 8.0 + lowest) / largest,
    });
    let mut sum_wqx = [0.0; LANES];
    let mut sum_wqq = [0.0; LANES];
    for (&x, &w) in x.iter().zip(weights) {
        for lane in 0..LANES {
            let q = nearest_value(inverse_scales[lane] * x);
            let wq = w * q;
            sum_wqx[lane] += wq * x;
            sum_wqq[lane] += wq * q;
        }
    }
    let mut scale = 0.0;
    // The error falls as (Σwqx)² / Σwq² grows.
    let mut best = 0.0;
    for (lane, (wqx, wqq)) in sum_wqx.into_iter().zip(sum_wqq).enumerate() {
        if wqq > 0.0 && (lane == 0 || wqx * wqx > best * wqq) {
            scale = wqx / wqq;
            best = scale * wqx;
        }
    }
    scale
}

/// The scale of each group of 32 in a block. Without importance the error of a
/// weight counts its square.
#[inline(always)]
fn group_scales<const GROUPS: usize>(
    x: &[[f32; 32]; GROUPS],
    importance: Option<&[[f32; 32]; GROUPS]>,
) -> [f32; GROUPS] {
    let x_flat = x.as_flattened();
    let variance = sum_of_squares(x_flat) * (2.0 / x_flat.len() as f32);
    each!(i: GROUPS => {
        let weights = match importance {
            Some(importance) => importance_weights(&x[i], &importance[i], &[variance; 32]),
            None => each!(j: 32 => x[i][j] * x[i][j]),
        };
        group_scale(&x[i], &weights)
    })
}

/// Encodes block by block, each of `GROUPS` groups of 32 weights.
#[inline(always)]
fn encode_each<B, const GROUPS: usize>(
    row: &[f32],
    importance: Option<&[f32]>,
    blocks: &mut [B],
    encode: impl Fn(&[[f32; 32]; GROUPS], [f32; GROUPS]) -> B,
) {
    let groups = row.as_chunks().0.as_chunks().0;
    let importance = importance.map(|importance| importance.as_chunks().0.as_chunks().0);
    for (i, (block, x)) in blocks.iter_mut().zip(groups).enumerate() {
        let scales = group_scales(x, importance.map(|importance| &importance[i]));
        *block = encode(x, scales);
    }
}

impl Block for BlockIQ4NL {
    const TYPE: BlockType = BlockType::IQ4_NL;
    const LEN: usize = 32;

    #[inline]
    fn decode(&self, weights: &mut [f32]) {
        decode_group(self.d.to_f32(), &self.qs, weights);
    }
}

impl Encode for BlockIQ4NL {
    #[inline(always)]
    fn encode_row(row: &[f32], importance: Option<&[f32]>, blocks: &mut [Self]) {
        encode_each(
            row,
            importance,
            blocks,
            #[inline(always)]
            |[x], [d]| BlockIQ4NL {
                d: F16::from_f32(d),
                qs: encode_group(d, x),
            },
        );
    }
}

impl BlockIQ4XS {
    /// Scale of group `i`, in units of `d`: −32..32.
    #[inline]
    pub fn scale(&self, i: usize) -> i32 {
        let low = self.scales_l[i / 2] >> (4 * (i % 2)) & 15;
        let high = u16::from_le_bytes(self.scales_h) >> (2 * i) & 3;
        i32::from(low) + i32::from(high) * 16 - 32
    }

    /// All eight as they are stored, 32 too large, a byte each.
    #[inline]
    pub(crate) fn stored_scales(&self) -> u64 {
        let mut low = u64::from(u32::from_le_bytes(self.scales_l));
        low = (low | low << 16) & 0x0000_ffff_0000_ffff;
        low = (low | low << 8) & 0x00ff_00ff_00ff_00ff;
        low = (low | low << 4) & 0x0f0f_0f0f_0f0f_0f0f;
        let mut high = u64::from(u16::from_le_bytes(self.scales_h));
        high = (high | high << 24) & 0x0000_00ff_0000_00ff;
        high = (high | high << 12) & 0x000f_000f_000f_000f;
        high = (high | high << 6) & 0x0303_0303_0303_0303;
        low | high << 4
    }
}

impl Block for BlockIQ4XS {
    const TYPE: BlockType = BlockType::IQ4_XS;
    const LEN: usize = 256;

    #[inline]
    fn decode(&self, weights: &mut [f32]) {
        let d = self.d.to_f32();
        for (i, (qs, weights)) in self.qs.iter().zip(weights.chunks_exact_mut(32)).enumerate() {
            decode_group(d * self.scale(i) as f32, qs, weights);
        }
    }
}

impl Encode for BlockIQ4XS {
    #[inline(always)]
    fn encode_row(row: &[f32], importance: Option<&[f32]>, blocks: &mut [Self]) {
        encode_each(row, importance, blocks, with_rounded_scales);
    }
}

/// Rounds the groups' scales to multiples of `d`, which puts the largest at −32, and indexes
/// the weights at the rounded scales.
#[inline(always)]
fn with_rounded_scales(x: &[[f32; 32]; 8], scales: [f32; 8]) -> BlockIQ4XS {
    let d = -largest_magnitude(&scales) / 32.0;
    let inverse_d = inverse(d);
    let mut block = BlockIQ4XS {
        d: F16::from_f32(d),
        ..Zeroable::zeroed()
    };
    let mut scales_h = 0u16;
    for i in 0..8 {
        let level = nearest_int(inverse_d * scales[i]).clamp(-32, 31);
        block.qs[i] = encode_group(d * level as f32, &x[i]);
        let bits = (level + 32) as u8;
        block.scales_l[i / 2] |= (bits & 15) << (4 * (i % 2));
        scales_h |= u16::from(bits >> 4) << (2 * i);
    }
    block.scales_h = scales_h.to_le_bytes();
    block
}
