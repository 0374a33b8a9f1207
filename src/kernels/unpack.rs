//! Blocks as whole numbers: what a dot product in integers is made of, and a panel of a tile.
//!
//! Every integer type says the same thing in its own packing: a weight is a small whole number
//! on a line that is drawn for its group of 16 columns (or of 32, or for the whole block),
//!
//! ```text
//! weight = scale · code − minimum
//!
//! type            codes                    minimum
//! Q4_0            −8..8                    0
//! Q5_0            −16..16                  0
//! Q8_0            −128..128                0
//! Q4_1, Q5_1      0..16, 0..32             −m
//! Q2_K, Q4_K      0..4, 0..16              dmin · min
//! Q5_K            0..32                    dmin · min
//! Q3_K, Q6_K      −4..4, −32..32           0
//! IQ4_NL, IQ4_XS  the table's values       0
//! MXFP4           twice E2M1's values      0
//! ```
//!
//! and a dot product with activations `x = s · q` is, for each group,
//! `s · (scale · Σ code·q − minimum · Σ q)`.

use super::activations::SUM_LEN;
use crate::quant::{
    Block, BlockIQ4NL, BlockIQ4XS, BlockMXFP4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K,
    BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, IQ4_VALUES, MXFP4_DOUBLED,
    unpack_five_bits, unpack_nibbles,
};

/// Columns that [`Unpack::unpack`] gives a scale and a minimum of their own: as many as a sum
/// of activations covers.
pub const GROUP: usize = SUM_LEN;

/// A block that can be stated as whole numbers.
pub trait Unpack: Block {
    /// Writes the block's `LEN` codes in the order of the columns, and a scale and a minimum
    /// for each [`GROUP`] of them: `weight = scale · code − minimum`, in f32 and in this order
    /// the very weight that [`Block::decode`] gives.
    fn unpack(&self, codes: &mut [i8], scales: &mut [f32], minima: &mut [f32]);

    /// The weight of one column, as [`Block::decode`] gives it.
    fn weight(&self, column: usize) -> f32;
}

/// Implements [`Unpack`] for blocks of 32 with one scale: the codes, the scale, the minimum, the code
/// of one column.
macro_rules! unpack_32 {
    ($block:ty, |$b:ident| $codes:expr, $scale:expr, $minimum:expr, |$column:ident| $code:expr) => {
        impl Unpack for $block {
            #[inline]
            fn unpack(&self, codes: &mut [i8], scales: &mut [f32], minima: &mut [f32]) {
                let $b = self;
                codes.copy_from_slice(&$codes);
                scales.fill($scale);
                minima.fill($minimum);
            }

            #[inline]
            fn weight(&self, $column: usize) -> f32 {
                let $b = self;
                $scale * f32::from($code) - $minimum
            }
        }
    };
}

unpack_32!(
    BlockQ4_0,
    |b| unpack_nibbles(&b.qs).map(|level| level as i8 - 8),
    b.d.to_f32(),
    0.0,
    |column| nibble(&b.qs, column) as i8 - 8
);
unpack_32!(
    BlockQ4_1,
    |b| unpack_nibbles(&b.qs).map(|level| level as i8),
    b.d.to_f32(),
    -b.m.to_f32(),
    |column| nibble(&b.qs, column)
);
unpack_32!(
    BlockQ5_0,
    |b| unpack_five_bits(b.qh, &b.qs).map(|level| level as i8 - 16),
    b.d.to_f32(),
    0.0,
    |column| five_bits(b.qh, &b.qs, column) as i8 - 16
);
unpack_32!(
    BlockQ5_1,
    |b| unpack_five_bits(b.qh, &b.qs).map(|level| level as i8),
    b.d.to_f32(),
    -b.m.to_f32(),
    |column| five_bits(b.qh, &b.qs, column)
);
unpack_32!(BlockQ8_0, |b| b.qs, b.d.to_f32(), 0.0, |column| b.qs
    [column]);
unpack_32!(
    BlockIQ4NL,
    |b| unpack_nibbles(&b.qs).map(|index| IQ4_VALUES[usize::from(index)]),
    b.d.to_f32(),
    0.0,
    |column| IQ4_VALUES[usize::from(nibble(&b.qs, column))]
);
unpack_32!(
    BlockMXFP4,
    |b| unpack_nibbles(&b.qs).map(|index| MXFP4_DOUBLED[usize::from(index)]),
    b.scale(),
    0.0,
    |column| MXFP4_DOUBLED[usize::from(nibble(&b.qs, column))]
);

/// Level `column` of 32 in [`unpack_nibbles`]' order.
#[inline]
fn nibble(qs: &[u8; 16], column: usize) -> u8 {
    qs[column % 16] >> (column / 16 * 4) & 15
}

/// Level `column` of [`unpack_five_bits`].
#[inline]
fn five_bits(qh: [u8; 4], qs: &[u8; 16], column: usize) -> u8 {
    let fifth = (u32::from_le_bytes(qh) >> column & 1) as u8;
    nibble(qs, column) | fifth << 4
}

/// Writes the codes of a super-block stripe by stripe: `code(j, l)` is that of column
/// `32·j + l`.
#[inline]
fn stripes(codes: &mut [i8], code: impl Fn(usize, usize) -> u8, offset: i8) {
    let (stripes, _) = codes.as_chunks_mut::<32>();
    for (j, stripe) in stripes.iter_mut().enumerate() {
        for (l, place) in stripe.iter_mut().enumerate() {
            *place = code(j, l) as i8 - offset;
        }
    }
}

/// Writes `unit · scale` for each group, where a scale covers as many groups as are needed to
/// use them all.
#[inline]
fn in_units<S: Copy>(unit: f32, scales: &[S], groups: &mut [f32])
where
    f32: From<S>,
{
    let covered = groups.len() / scales.len();
    for (groups, &scale) in groups.chunks_exact_mut(covered).zip(scales) {
        groups.fill(unit * f32::from(scale));
    }
}

/// The code of a super-block that has stripe `j`, place `l`: what [`Unpack`] is made of.
trait Striped {
    fn code(&self, j: usize, l: usize) -> u8;
}

/// A column's code.
#[inline]
fn code_of(block: &impl Striped, column: usize) -> f32 {
    f32::from(block.code(column / 32, column % 32))
}

impl Striped for BlockQ2K {
    #[inline]
    fn code(&self, j: usize, l: usize) -> u8 {
        self.qs[j / 4 * 32 + l] >> (j % 4 * 2) & 3
    }
}

impl Unpack for BlockQ2K {
    #[inline]
    fn unpack(&self, codes: &mut [i8], scales: &mut [f32], minima: &mut [f32]) {
        stripes(codes, |j, l| self.code(j, l), 0);
        in_units(self.d.to_f32(), &self.scales.map(|s| s & 15), scales);
        in_units(self.dmin.to_f32(), &self.scales.map(|s| s >> 4), minima);
    }

    #[inline]
    fn weight(&self, column: usize) -> f32 {
        let both = self.scales[column / 16];
        let scale = self.d.to_f32() * f32::from(both & 15);
        scale * code_of(self, column) - self.dmin.to_f32() * f32::from(both >> 4)
    }
}

impl Striped for BlockQ3K {
    #[inline]
    fn code(&self, j: usize, l: usize) -> u8 {
        let low = self.qs[j / 4 * 32 + l] >> (j % 4 * 2) & 3;
        low | (self.hmask[l] >> j & 1) << 2
    }
}

impl Unpack for BlockQ3K {
    #[inline]
    fn unpack(&self, codes: &mut [i8], scales: &mut [f32], minima: &mut [f32]) {
        stripes(codes, |j, l| self.code(j, l), 4);
        in_units(self.d.to_f32(), &self.scales.unpack(), scales);
        minima.fill(0.0);
    }

    #[inline]
    fn weight(&self, column: usize) -> f32 {
        let scale = self.d.to_f32() * f32::from(self.scales.get(column / 16));
        scale * (code_of(self, column) - 4.0)
    }
}

impl Striped for BlockQ4K {
    #[inline]
    fn code(&self, j: usize, l: usize) -> u8 {
        self.qs[j / 2 * 32 + l] >> (j % 2 * 4) & 15
    }
}

impl Unpack for BlockQ4K {
    #[inline]
    fn unpack(&self, codes: &mut [i8], scales: &mut [f32], minima: &mut [f32]) {
        stripes(codes, |j, l| self.code(j, l), 0);
        let (scale, min) = self.scales.unpack();
        in_units(self.d.to_f32(), &scale, scales);
        in_units(self.dmin.to_f32(), &min, minima);
    }

    #[inline]
    fn weight(&self, column: usize) -> f32 {
        let (scale, min) = self.scales.get(column / 32);
        let scale = self.d.to_f32() * f32::from(scale);
        scale * code_of(self, column) - self.dmin.to_f32() * f32::from(min)
    }
}

impl Striped for BlockQ5K {
    #[inline]
    fn code(&self, j: usize, l: usize) -> u8 {
        let low = self.qs[j / 2 * 32 + l] >> (j % 2 * 4) & 15;
        low | (self.qh[l] >> j & 1) << 4
    }
}

impl Unpack for BlockQ5K {
    #[inline]
    fn unpack(&self, codes: &mut [i8], scales: &mut [f32], minima: &mut [f32]) {
        stripes(codes, |j, l| self.code(j, l), 0);
        let (scale, min) = self.scales.unpack();
        in_units(self.d.to_f32(), &scale, scales);
        in_units(self.dmin.to_f32(), &min, minima);
    }

    #[inline]
    fn weight(&self, column: usize) -> f32 {
        let (scale, min) = self.scales.get(column / 32);
        let scale = self.d.to_f32() * f32::from(scale);
        scale * code_of(self, column) - self.dmin.to_f32() * f32::from(min)
    }
}

impl Striped for BlockQ6K {
    #[inline]
    fn code(&self, j: usize, l: usize) -> u8 {
        let (half, k) = (j / 4, j % 4);
        let low = self.ql[half * 64 + k % 2 * 32 + l] >> (k / 2 * 4) & 15;
        low | (self.qh[half * 32 + l] >> (k * 2) & 3) << 4
    }
}

impl Unpack for BlockQ6K {
    #[inline]
    fn unpack(&self, codes: &mut [i8], scales: &mut [f32], minima: &mut [f32]) {
        stripes(codes, |j, l| self.code(j, l), 32);
        in_units(self.d.to_f32(), &self.scales, scales);
        minima.fill(0.0);
    }

    #[inline]
    fn weight(&self, column: usize) -> f32 {
        let scale = self.d.to_f32() * f32::from(self.scales[column / 16]);
        scale * (code_of(self, column) - 32.0)
    }
}

impl Unpack for BlockIQ4XS {
    #[inline]
    fn unpack(&self, codes: &mut [i8], scales: &mut [f32], minima: &mut [f32]) {
        let (stripes, _) = codes.as_chunks_mut::<32>();
        for (stripe, qs) in stripes.iter_mut().zip(&self.qs) {
            *stripe = unpack_nibbles(qs).map(|index| IQ4_VALUES[usize::from(index)]);
        }
        let units: [i8; 8] = std::array::from_fn(|i| self.scale(i) as i8);
        in_units(self.d.to_f32(), &units, scales);
        minima.fill(0.0);
    }

    #[inline]
    fn weight(&self, column: usize) -> f32 {
        let scale = self.d.to_f32() * f32::from(self.scale(column / 32) as i8);
        let index = nibble(&self.qs[column / 32], column % 32);
        scale * f32::from(IQ4_VALUES[usize::from(index)])
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::ChaCha8Rng};

    use super::*;

    /// Random blocks (any bytes are some block) unpack to what they decode to.
    fn unpacks_as_it_decodes<B: Unpack>() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut bytes = vec![0; size_of::<B>() * 500];
        rng.fill_bytes(&mut bytes);
        let (mut codes, mut decoded) = (vec![0; B::LEN], vec![0.0; B::LEN]);
        let (mut scales, mut minima) = (vec![0.0; B::LEN / GROUP], vec![0.0; B::LEN / GROUP]);
        for block in bytemuck::cast_slice::<u8, B>(&bytes) {
            block.decode(&mut decoded);
            block.unpack(&mut codes, &mut scales, &mut minima);
            for (i, &weight) in decoded.iter().enumerate() {
                let (scale, minimum) = (scales[i / GROUP], minima[i / GROUP]);
                let stated = scale * f32::from(codes[i]) - minimum;
                assert!(
                    stated == weight || stated.is_nan() && weight.is_nan(),
                    "{} column {i}: {stated} for {weight}",
                    B::TYPE
                );
                let alone = block.weight(i);
                assert!(
                    alone == weight || alone.is_nan() && weight.is_nan(),
                    "{} column {i} alone: {alone} for {weight}",
                    B::TYPE
                );
            }
        }
    }

    #[test]
    fn blocks_unpack_as_they_decode() {
        unpacks_as_it_decodes::<BlockQ4_0>();
        unpacks_as_it_decodes::<BlockQ4_1>();
        unpacks_as_it_decodes::<BlockQ5_0>();
        unpacks_as_it_decodes::<BlockQ5_1>();
        unpacks_as_it_decodes::<BlockQ8_0>();
        unpacks_as_it_decodes::<BlockQ2K>();
        unpacks_as_it_decodes::<BlockQ3K>();
        unpacks_as_it_decodes::<BlockQ4K>();
        unpacks_as_it_decodes::<BlockQ5K>();
        unpacks_as_it_decodes::<BlockQ6K>();
        unpacks_as_it_decodes::<BlockIQ4NL>();
        unpacks_as_it_decodes::<BlockIQ4XS>();
        unpacks_as_it_decodes::<BlockMXFP4>();
    }
}
