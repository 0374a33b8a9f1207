//! The truth: plain Rust that every other instruction set is held against.
//!
//! A row of integer blocks is unpacked block by block ([`Unpack`]) and dotted in integers, one
//! group of 16 columns at a time, which is exact; a group's term
//!
//! ```text
//! s · (scale · Σ code·q − minimum · Σ q)        s, q: scale and codes of the activations
//! ```
//!
//! is then an f32. Term `g` of the row is added to lane `g mod 16`, and the lanes are summed at
//! the end, halves onto halves. Products in f32 go the same way, column `i` to lane `i mod 16`.
//! The order is fixed: a row's result depends on nothing but the row and the activations. It
//! also keeps sums short, so that a row of 14336 columns loses little to rounding.

use super::tiles::{self, TILE_ROWS, Tile};
use super::unpack::{GROUP, Unpack};
use super::{Activation, DotRows, Kernels, Tokens, activations, floats, loud};
use crate::quant::{
    BlockIQ4NL, BlockIQ4XS, BlockMXFP4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K,
    BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, BlockType,
};
use crate::tensor::Rows;

/// The scalar table.
pub static KERNELS: Kernels = Kernels {
    name: "scalar",
    dot,
    dot_streams: |_| None,
    tile,
    packs: false,
    exact: |_| dot_decoded,
    exact_tile: |_| Some(tile_decoded),
    add_loud: |rows, loud, out| loud::add(rows, loud, out),
    quantize: activations::quantize,
    floats: &floats::SCALAR,
};

/// Weights in the largest block: what a buffer for one block, or for several small ones, holds.
pub(super) const MAX_BLOCK: usize = 256;

fn dot(kind: BlockType) -> DotRows {
    match kind {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => dot_decoded,
        BlockType::Q4_0 => dot_rows::<BlockQ4_0>,
        BlockType::Q4_1 => dot_rows::<BlockQ4_1>,
        BlockType::Q5_0 => dot_rows::<BlockQ5_0>,
        BlockType::Q5_1 => dot_rows::<BlockQ5_1>,
        BlockType::Q8_0 => dot_rows::<BlockQ8_0>,
        BlockType::Q2_K => dot_rows::<BlockQ2K>,
        BlockType::Q3_K => dot_rows::<BlockQ3K>,
        BlockType::Q4_K => dot_rows::<BlockQ4K>,
        BlockType::Q5_K => dot_rows::<BlockQ5K>,
        BlockType::Q6_K => dot_rows::<BlockQ6K>,
        BlockType::IQ4_NL => dot_rows::<BlockIQ4NL>,
        BlockType::IQ4_XS => dot_rows::<BlockIQ4XS>,
        BlockType::MXFP4 => dot_rows::<BlockMXFP4>,
    }
}

fn tile(kind: BlockType) -> Option<Tile> {
    Some(match kind {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => tile_decoded,
        BlockType::Q4_0 => tiles::tile::<BlockQ4_0>,
        BlockType::Q4_1 => tiles::tile::<BlockQ4_1>,
        BlockType::Q5_0 => tiles::tile::<BlockQ5_0>,
        BlockType::Q5_1 => tiles::tile::<BlockQ5_1>,
        BlockType::Q8_0 => tiles::tile::<BlockQ8_0>,
        BlockType::Q2_K => tiles::tile::<BlockQ2K>,
        BlockType::Q3_K => tiles::tile::<BlockQ3K>,
        BlockType::Q4_K => tiles::tile::<BlockQ4K>,
        BlockType::Q5_K => tiles::tile::<BlockQ5K>,
        BlockType::Q6_K => tiles::tile::<BlockQ6K>,
        BlockType::IQ4_NL => tiles::tile::<BlockIQ4NL>,
        BlockType::IQ4_XS => tiles::tile::<BlockIQ4XS>,
        BlockType::MXFP4 => tiles::tile::<BlockMXFP4>,
    })
}

/// Dots rows of integer blocks with 8-bit activations.
fn dot_rows<B: Unpack>(rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
    let mut codes = [0; MAX_BLOCK];
    let (mut scales, mut minima) = ([0.0; MAX_BLOCK / GROUP], [0.0; MAX_BLOCK / GROUP]);
    let codes = &mut codes[..B::LEN];
    let (scales, minima) = (&mut scales[..B::LEN / GROUP], &mut minima[..B::LEN / GROUP]);
    let (q, _) = x.q.as_chunks::<GROUP>();
    for (index, out) in out.iter_mut().enumerate() {
        let blocks: &[B] = bytemuck::cast_slice(rows.row(index));
        let mut lanes = Lanes::default();
        for (b, block) in blocks.iter().enumerate() {
            block.unpack(codes, scales, minima);
            let (codes, _) = codes.as_chunks::<GROUP>();
            for (i, codes) in codes.iter().enumerate() {
                let g = b * (B::LEN / GROUP) + i;
                let weights = scales[i] * dot_codes(codes, &q[g]) as f32;
                let offset = minima[i] * f32::from(x.sums[g]);
                lanes.add(g, x.scales[g / 2] * (weights - offset));
            }
        }
        *out = lanes.sum();
    }
}

/// `Σ code·q` of a group; exact.
fn dot_codes(codes: &[i8; GROUP], q: &[i8; GROUP]) -> i32 {
    let product = |(&code, &q): (&i8, &i8)| i32::from(code) * i32::from(q);
    codes.iter().zip(q).map(product).sum()
}

/// Dots rows of any type with the activations in f32: each piece of a row is decoded, then
/// multiplied. The reference for what rounding activations to 8 bits costs.
fn dot_decoded(rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
    for (index, out) in out.iter_mut().enumerate() {
        let mut lanes = Lanes::default();
        decode_pieces(rows, index, x.x, |weights, x| {
            for (i, (weight, x)) in weights.iter().zip(x).enumerate() {
                lanes.add(i, weight * x);
            }
        });
        *out = lanes.sum();
    }
}

/// The tile product of rows of any type in f32.
fn tile_decoded(rows: Rows<'_>, x: Tokens<'_>, out: &mut [[f32; TILE_ROWS]]) {
    tiles::decoded(rows, x.x, out, dot_decoded);
}

/// Decodes a row into a buffer of 256 columns at a time (fewer at its end) and hands each
/// piece out together with its activations.
#[inline]
pub(super) fn decode_pieces(
    rows: Rows<'_>,
    index: usize,
    x: &[f32],
    mut use_piece: impl FnMut(&[f32], &[f32]),
) {
    let mut weights = [0.0; MAX_BLOCK];
    let piece_bytes = MAX_BLOCK / rows.kind.block_len() * rows.kind.block_bytes();
    for (bytes, x) in rows.row(index).chunks(piece_bytes).zip(x.chunks(MAX_BLOCK)) {
        let weights = &mut weights[..x.len()];
        rows.kind.decode_row(bytes, weights);
        use_piece(weights, x);
    }
}

/// Sixteen partial sums.
#[derive(Default)]
struct Lanes([f32; 16]);

impl Lanes {
    /// Adds term `index`.
    #[inline]
    fn add(&mut self, index: usize, term: f32) {
        self.0[index % 16] += term;
    }

    /// The sum of all: the upper half is added to the lower one until a single lane is left.
    fn sum(mut self) -> f32 {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                self.0[i] += self.0[i + half];
            }
        }
        self.0[0]
    }
}
