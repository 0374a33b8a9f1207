//! Floats: blocks of a single weight, and the half-precision scales of all other blocks.

use bytemuck::{Pod, Zeroable};
use half::slice::HalfFloatSliceExt;

use super::{Block, BlockType, Encode};

/// An IEEE 754 binary32, at any address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct F32([u8; 4]);

/// An IEEE 754 binary16, at any address: a weight, or a block's scale.
///
/// ```text
/// bit 15 14     10 9            0
///     ┌─┬─────────┬──────────────┐
///     │s│ exponent│   mantissa   │   bias 15
///     └─┴─────────┴──────────────┘
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct F16([u8; 2]);

/// A bfloat16, at any address: the upper half of a binary32.
///
/// ```text
/// bit 15 14           7 6       0
///     ┌─┬──────────────┬─────────┐
///     │s│   exponent   │ mantissa│   bias 127
///     └─┴──────────────┴─────────┘
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct BF16([u8; 2]);

const _: () = assert!(size_of::<F32>() == 4 && size_of::<F16>() == 2 && size_of::<BF16>() == 2);

impl F16 {
    /// The nearest half, ties to even; from 65520 on an infinity. Every NaN becomes the quiet
    /// one without payload, as in ggml (`half` would keep the payload).
    #[inline]
    pub fn from_f32(value: f32) -> Self {
        let half = if value.is_nan() {
            half::f16::NAN.copysign(half::f16::from_f32(value))
        } else {
            half::f16::from_f32(value)
        };
        F16(half.to_le_bytes())
    }

    /// The same value in single precision; exact.
    #[inline]
    pub fn to_f32(self) -> f32 {
        half::f16::from_le_bytes(self.0).to_f32()
    }
}

impl BF16 {
    /// The nearest bfloat16, ties to even; a NaN is made quiet and keeps its upper payload.
    #[inline]
    pub fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = if value.is_nan() {
            bits | 0x0040_0000
        } else {
            bits + 0x7fff + (bits >> 16 & 1)
        };
        BF16(((rounded >> 16) as u16).to_le_bytes())
    }

    /// The same value in single precision; exact.
    #[inline]
    pub fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes(self.0)) << 16)
    }
}

impl Block for F32 {
    const TYPE: BlockType = BlockType::F32;
    const LEN: usize = 1;

    #[inline]
    fn decode(&self, weights: &mut [f32]) {
        weights[0] = f32::from_le_bytes(self.0);
    }
}

impl Encode for F32 {
    fn encode_row(row: &[f32], _importance: Option<&[f32]>, blocks: &mut [Self]) {
        for (block, weight) in blocks.iter_mut().zip(row) {
            *block = F32(weight.to_le_bytes());
        }
    }
}

impl Block for F16 {
    const TYPE: BlockType = BlockType::F16;
    const LEN: usize = 1;

    #[inline]
    fn decode(&self, weights: &mut [f32]) {
        weights[0] = self.to_f32();
    }
}

impl Encode for F16 {
    fn encode_row(row: &[f32], _importance: Option<&[f32]>, blocks: &mut [Self]) {
        for (block, &weight) in blocks.iter_mut().zip(row) {
            *block = F16::from_f32(weight);
        }
    }
}

/// Decodes a row many halves at a time, where the CPU can.
///
/// # Panics
/// If `bytes` are not two a weight.
pub(super) fn decode_f16_row(bytes: &[u8], weights: &mut [f32]) {
    const AT_ONCE: usize = 64;
    assert_eq!(bytes.len(), 2 * weights.len(), "two bytes a weight");
    let (halves, _) = bytes.as_chunks::<2>();
    for (halves, weights) in halves.chunks(AT_ONCE).zip(weights.chunks_mut(AT_ONCE)) {
        // The file's may lie at odd addresses.
        let mut aligned = [half::f16::ZERO; AT_ONCE];
        for (aligned, half) in aligned.iter_mut().zip(halves) {
            *aligned = half::f16::from_le_bytes(*half);
        }
        aligned[..halves.len()].convert_to_f32_slice(weights);
    }
}

impl Block for BF16 {
    const TYPE: BlockType = BlockType::BF16;
    const LEN: usize = 1;

    #[inline]
    fn decode(&self, weights: &mut [f32]) {
        weights[0] = self.to_f32();
    }
}

impl Encode for BF16 {
    fn encode_row(row: &[f32], _importance: Option<&[f32]>, blocks: &mut [Self]) {
        for (block, &weight) in blocks.iter_mut().zip(row) {
            *block = BF16::from_f32(weight);
        }
    }
}
