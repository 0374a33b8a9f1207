//! Tile products in f32, for rows of floats and for the exact path of all types; for AVX2, and
//! for AVX-512 with registers twice as wide.
//!
//! As in [`crate::kernels::tiles`], a tile's rows are unpacked once for all tokens, here to f32,
//! a stretch of [`STRETCH`] columns at a time into a panel `[column][row]`. Two registers of a
//! column's weights go against several tokens' activations, broadcast, whose sums stay in
//! registers while the stretch passes:
//!
//! ```text
//!                   rows 0–7   rows 8–15       (AVX-512: 0–15, 16–31)
//! token 0  x[c] ──► fma        fma
//!   …                                          2 sums a token
//! token 5  x[c] ──► fma        fma
//! ```
//!
//! A stretch's sum starts at 0 and is then added to that of the row, so that no chain of
//! additions is long: the error is at most `(STRETCH + cols / STRETCH) · 2⁻²⁴ · Σ |w·x|`, and a
//! few units of `2⁻²⁴` as a rule. A sum depends on its row and its token alone.

use std::arch::x86_64::*;
use std::ops::Range;

use super::floats::Float;
use super::turn;
use crate::kernels::Activation;
use crate::kernels::scalar::MAX_BLOCK;
use crate::kernels::tiles::TILE_ROWS;
use crate::quant::{BF16, BlockType, F16, F32};
use crate::tensor::Rows;

/// Columns that are unpacked at a time: 16 KB of weights.
const STRETCH: usize = 128;

/// A tile's rows over a stretch, in f32.
#[repr(C, align(64))]
struct Panel([[f32; TILE_ROWS]; STRETCH]);

/// Adds a panel's products with the tokens' activations, from `columns` on.
type Multiply = unsafe fn(&Panel, &Range<usize>, &[Activation<'_>], &mut [[f32; TILE_ROWS]]);

/// The tile product for AVX2.
///
/// # Safety
/// The CPU has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn tile(rows: Rows<'_>, x: &[Activation<'_>], out: &mut [[f32; TILE_ROWS]]) {
    tile_by(rows, x, out, multiply);
}

/// The tile product for AVX-512.
///
/// # Safety
/// The CPU has AVX2, FMA, F16C and AVX-512 F.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::kernels) unsafe fn tile_512(
    rows: Rows<'_>,
    x: &[Activation<'_>],
    out: &mut [[f32; TILE_ROWS]],
) {
    tile_by(rows, x, out, multiply_512);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn tile_by(rows: Rows<'_>, x: &[Activation<'_>], out: &mut [[f32; TILE_ROWS]], multiply: Multiply) {
    assert!((1..=TILE_ROWS).contains(&rows.len()));
    out.fill([0.0; TILE_ROWS]);
    match rows.kind {
        BlockType::F32 => tile_floats::<F32>(rows, x, out, multiply),
        BlockType::F16 => tile_floats::<F16>(rows, x, out, multiply),
        BlockType::BF16 => tile_floats::<BF16>(rows, x, out, multiply),
        _ => tile_decoded(rows, x, out, multiply),
    }
}

/// Rows of floats, as they lie.
#[target_feature(enable = "avx2,fma,f16c")]
fn tile_floats<W: Float>(
    rows: Rows<'_>,
    x: &[Activation<'_>],
    out: &mut [[f32; TILE_ROWS]],
    multiply: Multiply,
) {
    // Beyond the last row the last row stands again.
    let rows_of_floats: [&[W]; TILE_ROWS] =
        std::array::from_fn(|r| bytemuck::cast_slice(rows.row(r.min(rows.len() - 1))));
    add_products(rows_of_floats, 0, x, out, multiply);
}

/// Rows of any type: blocks are decoded first, a few at a time.
#[target_feature(enable = "avx2,fma,f16c")]
fn tile_decoded(
    rows: Rows<'_>,
    x: &[Activation<'_>],
    out: &mut [[f32; TILE_ROWS]],
    multiply: Multiply,
) {
    let mut weights = [[0.0; MAX_BLOCK]; TILE_ROWS];
    for start in (0..rows.cols).step_by(MAX_BLOCK) {
        let len = MAX_BLOCK.min(rows.cols - start);
        let bytes = |columns: usize| columns / rows.kind.block_len() * rows.kind.block_bytes();
        for (r, weights) in weights.iter_mut().enumerate().take(rows.len()) {
            let blocks = &rows.row(r)[bytes(start)..bytes(start + len)];
            rows.kind.decode_row(blocks, &mut weights[..len]);
        }
        let weights: [&[f32]; TILE_ROWS] = std::array::from_fn(|r| &weights[r][..len]);
        add_products(weights, start, x, out, multiply);
    }
}

/// Adds the products of rows, all of the same length, with the activations from column `first`
/// on.
#[target_feature(enable = "avx2,fma,f16c")]
fn add_products<W: Float>(
    rows: [&[W]; TILE_ROWS],
    first: usize,
    x: &[Activation<'_>],
    out: &mut [[f32; TILE_ROWS]],
    multiply: Multiply,
) {
    let mut panel = Panel([[0.0; TILE_ROWS]; STRETCH]);
    let cols = rows[0].len();
    for start in (0..cols).step_by(STRETCH) {
        let end = (start + STRETCH).min(cols);
        fill(&mut panel, rows.map(|row| &row[start..end]));
        // SAFETY: tables are only handed out where the CPU has the features.
        unsafe { multiply(&panel, &(first + start..first + end), x, out) };
    }
}

/// Fills a panel from the stretches of a tile's rows.
#[target_feature(enable = "avx2,fma,f16c")]
fn fill<W: Float>(panel: &mut Panel, stretch: [&[W]; TILE_ROWS]) {
    for (g, rows) in stretch.as_chunks::<8>().0.iter().enumerate() {
        for c in (0..rows[0].len()).step_by(8) {
            let mut eights = [_mm256_setzero_si256(); 8];
            for (eight, row) in eights.iter_mut().zip(rows) {
                let row = &row[c..];
                let mut padded = [W::zeroed(); 8];
                let floats = row.first_chunk().unwrap_or_else(|| {
                    padded[..row.len()].copy_from_slice(row);
                    &padded
                });
                // SAFETY: this function has the features.
                *eight = _mm256_castps_si256(unsafe { W::widen(floats) });
            }
            for (column, eight) in panel.0[c..].iter_mut().zip(turn(eights)) {
                let place = &mut column.as_chunks_mut::<8>().0[g];
                super::store_f32(place, _mm256_castsi256_ps(eight));
            }
        }
    }
}

/// Defines how a panel is multiplied: with registers of `$lanes` rows, and up to the last of
/// `$tokens` tokens at a time.
macro_rules! multiply {
    ($name:ident, $block:ident, $features:literal, $lanes:literal rows, $($tokens:literal)* tokens,
        $zero:ident, $load:ident, $set1:ident, $fmadd:ident, $add:ident, $store:ident) => {
        #[target_feature(enable = $features)]
        fn $name(
            panel: &Panel,
            columns: &Range<usize>,
            x: &[Activation<'_>],
            out: &mut [[f32; TILE_ROWS]],
        ) {
            const TOKENS: usize = [$($tokens),*].len();
            for (x, out) in x.chunks(TOKENS).zip(out.chunks_mut(TOKENS)) {
                match x.len() {
                    $($tokens => {
                        let mut stretches = [&[][..]; $tokens];
                        for (stretch, x) in stretches.iter_mut().zip(x) {
                            *stretch = &x.x[columns.clone()];
                        }
                        $block::<$tokens>(panel, stretches, out.try_into().expect("as many"));
                    })*
                    _ => unreachable!("chunks hold up to {TOKENS} tokens"),
                }
            }
        }

        #[target_feature(enable = $features)]
        fn $block<const T: usize>(
            panel: &Panel,
            x: [&[f32]; T],
            out: &mut [[f32; TILE_ROWS]; T],
        ) {
            for pair in 0..TILE_ROWS / (2 * $lanes) {
                let mut sums = [[$zero(); 2]; T];
                for (c, column) in panel.0.iter().enumerate().take(x[0].len()) {
                    let column = &column.as_chunks::<$lanes>().0[2 * pair..];
                    // SAFETY: the arrays are as long as the registers, and the loads take any
                    // alignment.
                    let w = unsafe { [$load(column[0].as_ptr()), $load(column[1].as_ptr())] };
                    for t in 0..T {
                        // SAFETY: all stretches are as long as the first.
                        let x = $set1(unsafe { *x[t].get_unchecked(c) });
                        for r in 0..2 {
                            sums[t][r] = $fmadd(w[r], x, sums[t][r]);
                        }
                    }
                }
                for t in 0..T {
                    let out = &mut out[t].as_chunks_mut::<$lanes>().0[2 * pair..];
                    for r in 0..2 {
                        // SAFETY: as for the weights.
                        unsafe {
                            let sum = $add($load(out[r].as_ptr()), sums[t][r]);
                            $store(out[r].as_mut_ptr(), sum);
                        }
                    }
                }
            }
        }
    };
}

multiply!(
    multiply, block, "avx2,fma", 8 rows, 1 2 3 4 5 6 tokens,
    _mm256_setzero_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_add_ps, _mm256_storeu_ps
);
multiply!(
    multiply_512, block_512, "avx2,fma,avx512f", 16 rows, 1 2 3 4 5 6 7 8 tokens,
    _mm512_setzero_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_add_ps, _mm512_storeu_ps
);
