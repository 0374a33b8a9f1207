//! Products of a tile of rows with many tokens: what a prompt is computed with.
//!
//! A prompt multiplies each weight with many tokens, so that unpacking it for every token, as
//! the dots do, would cost more than the multiplication. Here a tile of [`TILE_ROWS`] rows is
//! unpacked once, a stretch of `STRETCH` columns at a time, into a `Panel` that stays in the
//! core's first cache, and the panel is multiplied with every token:
//!
//! ```text
//!              a stretch of 256 columns                     panel: [column / 4][row][column % 4]
//!            ┌──────────┬──────────┬─ ─               ┌────────────┬────────────┬─ ─
//!  32 rows   │ packed   │          │       unpack     │ row 0      │ row 1      │   32 rows
//!            │ blocks   │          │      ───────►    │ c0 c1 c2 c3│ c0 c1 c2 c3│
//!            └──────────┴──────────┴─ ─               ├────────────┼────────────┼─ ─
//!                                                     │ c4 …       │            │   64 fours
//!                                                     └────────────┴────────────┴─ ─
//! ```
//!
//! Four columns of a row fill the 32-bit lane that an instruction for dot products sums into. So
//! a register holds several rows and no columns: sums need no folding at the end, the rows'
//! scales are a register, and four codes of a token, broadcast, meet them all. A kernel keeps the
//! sums of a block of rows and tokens in registers while it goes through the 32 columns that
//! share an activation's scale, then adds them, scaled, in f32:
//!
//! ```text
//! out[token][row] += s · (scale · Σ code·q) − minimum · (s · Σ q)
//! ```
//!
//! One lane of f32 belongs to one row and one token, and its terms are added from the first
//! column to the last: the result depends on nothing but the row and the token, whatever tile,
//! block or batch they are in. (It differs from that of the dots by rounding in f32, since those
//! add in another order.)
//!
//! Codes are stored without a sign, too large by an offset of the type's; the sums of products
//! start at `−offset · Σ q`. Rows and columns beyond the end are codes that meet nothing.

use super::activations::{SCALE_LEN, SUM_LEN};
use super::scalar::MAX_BLOCK;
use super::unpack::{GROUP, Unpack};
use super::{Activation, DotRows, Tokens, loud};
use crate::quant::BlockType;
use crate::tensor::Rows;

/// Rows of a tile.
pub const TILE_ROWS: usize = 32;

/// Tokens that callers multiply at a time: enough to make unpacking cheap, few enough for their
/// sums to stay in cache.
pub const TILE_TOKENS: usize = 256;

/// Columns that are unpacked at a time.
pub(super) const STRETCH: usize = 256;

/// `out[t][r] = rows[r] · x[t]` for at most [`TILE_ROWS`] rows; what lies beyond the last row is
/// left undefined.
pub type Tile = fn(rows: Rows<'_>, x: Tokens<'_>, out: &mut [[f32; TILE_ROWS]]);

/// Four columns of each row of a tile.
pub(super) type Fours = [[u8; 4]; TILE_ROWS];

/// A tile's rows over a stretch, unpacked.
#[repr(C, align(64))]
pub(super) struct Panel {
    /// `codes[column / 4][row][column % 4]`, each plus [`offset`].
    pub(super) codes: [Fours; STRETCH / 4],
    /// The scale of each row, for each 32 columns or, where [`has_fine_scales`], for each 16.
    pub(super) scales: [[f32; TILE_ROWS]; STRETCH / GROUP],
    /// The minima likewise, where [`has_minima`].
    pub(super) minima: [[f32; TILE_ROWS]; STRETCH / GROUP],
}

impl Panel {
    pub(super) fn new() -> Self {
        Self {
            codes: [[[0; 4]; TILE_ROWS]; STRETCH / 4],
            scales: [[0.0; TILE_ROWS]; STRETCH / GROUP],
            minima: [[0.0; TILE_ROWS]; STRETCH / GROUP],
        }
    }
}

/// By how much the codes of a type are raised to have no sign.
pub(super) const fn offset(kind: BlockType) -> u8 {
    match kind {
        BlockType::Q4_0 => 8,
        BlockType::Q5_0 => 16,
        BlockType::Q3_K => 4,
        BlockType::Q6_K => 32,
        BlockType::Q8_0 | BlockType::IQ4_NL | BlockType::IQ4_XS | BlockType::MXFP4 => 128,
        _ => 0,
    }
}

/// Whether a scale covers 16 columns and not 32.
pub(super) const fn has_fine_scales(kind: BlockType) -> bool {
    matches!(kind, BlockType::Q2_K | BlockType::Q3_K | BlockType::Q6_K)
}

/// Whether there are minima.
pub(super) const fn has_minima(kind: BlockType) -> bool {
    use BlockType::{Q2_K, Q4_1, Q4_K, Q5_1, Q5_K};
    matches!(kind, Q4_1 | Q5_1 | Q2_K | Q4_K | Q5_K)
}

/// Goes through the columns of a tile: `unpack(panel, stretch)` fills the panel from the
/// stretch of each row, with codes raised by `raised`; `multiply(panel, columns, out)` adds its
/// products with the tokens' codes; then those with their loud columns are added.
#[inline(always)]
pub(super) fn each_stretch<B: Unpack>(
    rows: Rows<'_>,
    x: &[Activation<'_>],
    out: &mut [[f32; TILE_ROWS]],
    raised: u8,
    mut unpack: impl FnMut(&mut Panel, &[&[B]; TILE_ROWS]),
    mut multiply: impl FnMut(&mut Panel, std::ops::Range<usize>, &mut [[f32; TILE_ROWS]]),
) {
    assert!((1..=TILE_ROWS).contains(&rows.len()));
    out.fill([0.0; TILE_ROWS]);
    // Beyond the last row the last row stands again.
    let rows_of_blocks: [&[B]; TILE_ROWS] =
        std::array::from_fn(|r| bytemuck::cast_slice(rows.row(r.min(rows.len() - 1))));
    let mut panel = Panel::new();
    let loud = loud::Tokens::new(x);
    for start in (0..rows.cols).step_by(STRETCH) {
        let columns = start..(start + STRETCH).min(rows.cols);
        let stretch = rows_of_blocks.map(|row| &row[start / B::LEN..columns.end / B::LEN]);
        unpack(&mut panel, &stretch);
        multiply(&mut panel, columns, out);
        loud.add::<B>(&panel, start, raised, out);
    }
}

/// Fills a panel block by block through [`Unpack`].
pub(super) fn unpack_stretch<B: Unpack>(panel: &mut Panel, stretch: &[&[B]; TILE_ROWS]) {
    let mut codes = [0; MAX_BLOCK];
    let (mut scales, mut minima) = ([0.0; MAX_BLOCK / GROUP], [0.0; MAX_BLOCK / GROUP]);
    let groups = B::LEN / GROUP;
    let step = if has_fine_scales(B::TYPE) { 1 } else { 2 };
    for (r, row) in stretch.iter().enumerate() {
        for (b, block) in row.iter().enumerate() {
            block.unpack(
                &mut codes[..B::LEN],
                &mut scales[..groups],
                &mut minima[..groups],
            );
            let fours = codes[..B::LEN].as_chunks::<4>().0;
            let places = &mut panel.codes[b * B::LEN / 4..];
            for (place, four) in places.iter_mut().zip(fours) {
                place[r] = four.map(|code| (code as u8).wrapping_add(offset(B::TYPE)));
            }
            for (i, g) in (0..groups).step_by(step).enumerate() {
                let place = b * groups / step + i;
                panel.scales[place][r] = scales[g];
                panel.minima[place][r] = minima[g];
            }
        }
    }
}

/// The truth: plain Rust, in the order that every instruction set keeps to.
pub(super) fn tile<B: Unpack>(rows: Rows<'_>, x: Tokens<'_>, out: &mut [[f32; TILE_ROWS]]) {
    let x = x.x;
    let step = if has_fine_scales(B::TYPE) { 1 } else { 2 };
    let raised = offset(B::TYPE);
    each_stretch::<B>(
        rows,
        x,
        out,
        raised,
        unpack_stretch,
        |panel, columns, out| {
            for (x, out) in x.iter().zip(out) {
                let q = x.q[columns.clone()].as_chunks::<4>().0;
                let sums = &x.sums[columns.start / SUM_LEN..columns.end / SUM_LEN];
                let scales = &x.scales[columns.start / SCALE_LEN..columns.end / SCALE_LEN];
                for (i, sums) in sums.chunks_exact(step).enumerate() {
                    let s = scales[i * step / 2];
                    let sum: i32 = sums.iter().map(|&sum| i32::from(sum)).sum();
                    let mut dots = [-i32::from(offset(B::TYPE)) * sum; TILE_ROWS];
                    let fours = i * step * GROUP / 4..(i + 1) * step * GROUP / 4;
                    for (codes, q) in panel.codes[fours.clone()].iter().zip(&q[fours]) {
                        for (dot, codes) in dots.iter_mut().zip(codes) {
                            *dot += dot_four(codes, q);
                        }
                    }
                    for (r, dot) in dots.into_iter().enumerate() {
                        out[r] += s * (panel.scales[i][r] * dot as f32);
                        if has_minima(B::TYPE) {
                            out[r] -= panel.minima[i][r] * (s * sum as f32);
                        }
                    }
                }
            }
        },
    );
}

fn dot_four(codes: &[u8; 4], q: &[i8; 4]) -> i32 {
    let product = |(&code, &q): (&u8, &i8)| i32::from(code) * i32::from(q);
    codes.iter().zip(q).map(product).sum()
}

/// Bytes of weights in f32 that are kept while all tokens pass: what the second cache holds
/// beside the tokens.
const DECODED: usize = 256 << 10;

/// The tile product in f32, for floats and for the exact path: a few rows are decoded at a time
/// and dotted with every token by `dot`, the dot product of F32 rows.
///
/// Each result is that of the dot product of that row and token, in the same order.
pub(super) fn decoded(
    rows: Rows<'_>,
    x: &[Activation<'_>],
    out: &mut [[f32; TILE_ROWS]],
    dot: DotRows,
) {
    let some = (DECODED / (4 * rows.cols)).clamp(1, TILE_ROWS);
    let mut weights = vec![0.0; some.min(rows.len()) * rows.cols];
    for start in (0..rows.len()).step_by(some) {
        let end = (start + some).min(rows.len());
        let weights = &mut weights[..(end - start) * rows.cols];
        for (r, weights) in (start..end).zip(weights.chunks_exact_mut(rows.cols)) {
            rows.decode(r, weights);
        }
        let decoded = Rows {
            kind: BlockType::F32,
            cols: rows.cols,
            stride: 4 * rows.cols,
            bytes: bytemuck::cast_slice(weights),
        };
        for (x, out) in x.iter().zip(&mut *out) {
            dot(decoded, *x, &mut out[start..end]);
        }
    }
}
