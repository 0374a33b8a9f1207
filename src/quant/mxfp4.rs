//! MXFP4: the OCP microscaling format of 4-bit floats with a shared power of two.
//! Specification: OCP Microscaling Formats (MX) v1.0, sections 5.3.3 and 5.4.1.

use bytemuck::{Pod, Zeroable};

use super::legacy::unpack_nibbles;
use super::{Block, BlockType};

/// Twice the values of E2M1 (sign, two bits of exponent, one of mantissa): whole numbers.
pub const MXFP4_DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// 32 weights of 4 bits: `w = 2^(e − 127)·E2M1(q)`.
///
/// ```text
/// byte 0   1                                   17
///      ┌───┬─────┬─────┬─────┬─ ─ ─ ─ ─ ┬─────┐
///      │ e │16│ 0│17│ 1│18│ 2│          │31│15│   qs[j]: weight j low, weight j + 16 high
///      └───┴─────┴─────┴─────┴─ ─ ─ ─ ─ ┴─────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
#[allow(missing_docs)] // the picture above
pub struct BlockMXFP4 {
    pub e: u8,
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockMXFP4>() == 17);

impl BlockMXFP4 {
    /// 2^(e − 128), the scale of doubled values. As in ggml, 255 (the specification's NaN) is
    /// no special case.
    #[inline]
    pub fn scale(&self) -> f32 {
        f32::from_bits(match self.e {
            0 | 1 => 0x0020_0000 << self.e, // denormal
            _ => u32::from(self.e - 1) << 23,
        })
    }
}

impl Block for BlockMXFP4 {
    const TYPE: BlockType = BlockType::MXFP4;
    const LEN: usize = 32;

    #[inline]
    fn decode(&self, weights: &mut [f32]) {
        let scale = self.scale();
        for (weight, index) in weights.iter_mut().zip(unpack_nibbles(&self.qs)) {
            *weight = f32::from(MXFP4_DOUBLED[usize::from(index)]) * scale;
        }
    }
}
