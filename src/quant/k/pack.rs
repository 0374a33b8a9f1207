//! How 6-bit scales and the levels' bits are packed into bytes.

use bytemuck::{Pod, Zeroable};

use super::Super;

/// Eight 6-bit scales and eight 6-bit minima in twelve bytes, as in Q4_K and Q5_K.
///
/// ```text
/// byte        bits 7 6              5 4 3 2 1 0
/// 0 + i       scale 4+i, bits 5 4   scale i
/// 4 + i       min 4+i, bits 5 4     min i
///             bits 7 6 5 4          3 2 1 0
/// 8 + i       min 4+i, bits 3–0     scale 4+i, bits 3–0        i in 0..4
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct ScalesAndMins8(pub [u8; 12]);

impl ScalesAndMins8 {
    /// Packs scales and minima, each below 64. (The first four are not masked: a degenerate
    /// scale above 63 spills into its neighbour as it does in ggml.)
    #[inline(always)]
    pub fn pack(scales: &[u8; 8], mins: &[u8; 8]) -> Self {
        let mut bytes = [0; 12];
        for i in 0..4 {
            bytes[i] = scales[i] | (scales[4 + i] >> 4) << 6;
            bytes[4 + i] = mins[i] | (mins[4 + i] >> 4) << 6;
            bytes[8 + i] = scales[4 + i] & 15 | mins[4 + i] << 4;
        }
        ScalesAndMins8(bytes)
    }

    /// The scales and the minima.
    #[inline(always)]
    pub fn unpack(&self) -> ([u8; 8], [u8; 8]) {
        (each!(i: 8 => self.get(i).0), each!(i: 8 => self.get(i).1))
    }

    /// Scale and minimum `i`.
    #[inline(always)]
    pub fn get(&self, i: usize) -> (u8, u8) {
        let [a, b, c] = [self.0[i % 4], self.0[4 + i % 4], self.0[8 + i % 4]];
        if i < 4 {
            (a & 63, b & 63)
        } else {
            (c & 15 | (a >> 6) << 4, c >> 4 | (b >> 6) << 4)
        }
    }
}

/// Sixteen signed 6-bit scales in twelve bytes, as in Q3_K. A scale is stored plus 32.
///
/// ```text
/// byte        bits 7 6 5 4                    3 2 1 0
/// i           scale 8+i, bits 3–0             scale i, bits 3–0               i in 0..8
///             bits 7 6    5 4    3 2    1 0
/// 8 + i       bits 5 4 of the scales 12+i, 8+i, 4+i, i                        i in 0..4
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Scales16(pub [u8; 12]);

impl Scales16 {
    /// Packs scales that are stored plus 32, each below 64.
    #[inline(always)]
    pub fn pack(stored: &[u8; 16]) -> Self {
        let mut bytes = [0; 12];
        for (i, &scale) in stored.iter().enumerate() {
            bytes[i % 8] |= (scale & 15) << (4 * (i / 8));
            bytes[8 + i % 4] |= (scale >> 4) << (2 * (i / 4));
        }
        Scales16(bytes)
    }

    /// The scales, from −32 to 31.
    #[inline(always)]
    pub fn unpack(&self) -> [i8; 16] {
        each!(i: 16 => self.get(i))
    }

    /// Scale `i`.
    #[inline(always)]
    pub fn get(&self, i: usize) -> i8 {
        let low = self.0[i % 8] >> (4 * (i / 8)) & 15;
        let high = self.0[8 + i % 4] >> (2 * (i / 4)) & 3;
        (low | high << 4) as i8 - 32
    }
}

/// Packs the low two bits of each level: byte `32·h + l` holds those of weight `l` of the
/// stripes `4·h` (lowest) to `4·h + 3` (highest).
#[inline(always)]
pub(in crate::quant) fn pack_2_bits(levels: &Super<u8>) -> [u8; 64] {
    let low = |i: usize, k: usize| (levels[i / 32 * 128 + i % 32 + 32 * k] & 3) << (2 * k);
    each!(i: 64 => low(i, 0) | low(i, 1) | low(i, 2) | low(i, 3))
}

/// Packs the low four bits of each level, a byte for each pair of weights `DISTANCE` apart: the
/// first `DISTANCE` bytes hold the first `2 · DISTANCE` weights, and so on.
#[inline(always)]
pub(in crate::quant) fn pack_4_bits<const DISTANCE: usize>(levels: &Super<u8>) -> [u8; 128] {
    each!(i: 128 => {
        let first = i / DISTANCE * 2 * DISTANCE + i % DISTANCE;
        levels[first] & 15 | levels[first + DISTANCE] << 4
    })
}

/// Packs one bit of each level: bit `j` of byte `l` is bit `bit` of weight `l` of stripe `j`.
#[inline(always)]
pub(in crate::quant) fn pack_bit(levels: &Super<u8>, bit: u8) -> [u8; 32] {
    let mut bytes = [0; 32];
    for j in 0..8 {
        for l in 0..32 {
            bytes[l] |= (levels[32 * j + l] >> bit & 1) << j;
        }
    }
    bytes
}
