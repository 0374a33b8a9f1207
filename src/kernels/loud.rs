//! Loud columns: those few activations of a row that are kept out of its codes.
//!
//! Behind a norm, one or two channels of a model carry a third of a row's energy, and always the
//! same ones. The group of 32 that holds one has its scale set by it, and its other 31 columns are
//! left with a few steps. So up to [`LOUD`] columns a row stay in f32: their codes are 0, their
//! groups take their scales from the rest, and their products are added at the end,
//!
//! ```text
//! row · x = Σ over groups s · (scale · Σ code·q − minimum · Σ q)  +  Σ over loud columns weight · x
//! ```
//!
//! Which columns those are depends on the row alone: greedily, the one without which the sum of
//! the groups' squared maxima, to which the noise of rounding is proportional, falls furthest;
//! as long as it falls by a `WORTH`th. (Of two in one group that are equally loud, neither is
//! found: a model has few such channels, and they seldom meet.)

use arrayvec::ArrayVec;

use super::Activation;
use super::activations::SCALE_LEN;
use super::tiles::{Panel, STRETCH, TILE_ROWS, has_fine_scales, has_minima};
use super::unpack::{GROUP, Unpack};
use crate::quant::{
    BlockIQ4NL, BlockIQ4XS, BlockMXFP4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K,
    BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, BlockType,
};
use crate::tensor::Rows;

/// The most loud columns that any row has.
pub const LOUD: usize = 8;

/// A row has at most one loud column for so many: each costs the same, however short a row is.
pub const COLUMNS_A_LOUD: usize = 256;

/// A column is only kept apart if that takes such a part of the noise of its row.
const WORTH: f32 = 64.0;

/// An activation that is kept out of the codes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loud {
    /// Its column.
    pub column: u32,
    /// The activation.
    pub x: f32,
}

/// The loud columns of a row, in ascending order.
pub type LoudColumns = ArrayVec<Loud, LOUD>;

/// Adds the products of loud columns: `out[r] += Σ rows[r][column] · x`.
pub type AddLoud = fn(rows: Rows<'_>, loud: &[Loud], out: &mut [f32]);

/// Finds the loud columns of a row. `gains` is scratch, as long as the row has groups.
pub(super) fn find(x: &[f32], gains: &mut [f32], loud: &mut LoudColumns) {
    loud.clear();
    let (groups, _) = x.as_chunks::<SCALE_LEN>();
    let mut noise = 0.0;
    for (gain, group) in gains.iter_mut().zip(groups) {
        let (first, second) = loudest_two(group);
        // Anything larger is damage, and has to stay where it is seen.
        let ordinary = first < LARGEST;
        noise += if ordinary { first * first } else { 0.0 };
        *gain = if ordinary {
            first * first - second * second
        } else {
            0.0
        };
    }
    let worth = noise / WORTH;
    let most = LOUD.min(x.len() / COLUMNS_A_LOUD);
    while loud.len() < most {
        let mut best = 0;
        for (g, gain) in gains.iter().enumerate() {
            if *gain > gains[best] {
                best = g;
            }
        }
        if !(gains[best] > 0.0 && gains[best] >= worth) {
            break;
        }
        let mut rest = groups[best];
        let start = best * SCALE_LEN;
        for loud in &*loud {
            if let Some(x) = rest.get_mut((loud.column as usize).wrapping_sub(start)) {
                *x = 0.0;
            }
        }
        let (loudest, _) = loudest_two(&rest);
        let at = rest.iter().position(|x| x.abs() == loudest);
        let at = at.expect("the largest is one of them");
        loud.push(Loud {
            column: (start + at) as u32,
            x: rest[at],
        });
        rest[at] = 0.0;
        let (first, second) = loudest_two(&rest);
        gains[best] = first * first - second * second;
    }
    loud.sort_unstable_by_key(|loud| loud.column);
}

/// Activations from here on are not loud but broken.
const LARGEST: f32 = (1u64 << 60) as f32;

/// The largest magnitude and the one after it; 0 for what is no number.
#[inline]
fn loudest_two(group: &[f32; SCALE_LEN]) -> (f32, f32) {
    const LANES: usize = 8;
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let smaller = |a: f32, b: f32| if a < b { a } else { b };
    let (mut first, mut second) = ([0.0; LANES], [0.0; LANES]);
    for eight in group.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            let x = larger(eight[lane].abs(), 0.0);
            second[lane] = larger(second[lane], smaller(x, first[lane]));
            first[lane] = larger(x, first[lane]);
        }
    }
    for half in [4, 2, 1] {
        for lane in 0..half {
            let other = lane + half;
            let between = smaller(first[lane], first[other]);
            second[lane] = larger(larger(second[lane], second[other]), between);
            first[lane] = larger(first[lane], first[other]);
        }
    }
    (first[0], second[0])
}

/// See [`AddLoud`]. Rows of floats meet all activations in f32, and have none to add.
#[inline(always)] // to be compiled for the instruction set of its caller
pub(super) fn add(rows: Rows<'_>, loud: &[Loud], out: &mut [f32]) {
    match rows.kind {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => {}
        BlockType::Q4_0 => add_columns::<BlockQ4_0>(rows, loud, out),
        BlockType::Q4_1 => add_columns::<BlockQ4_1>(rows, loud, out),
        BlockType::Q5_0 => add_columns::<BlockQ5_0>(rows, loud, out),
        BlockType::Q5_1 => add_columns::<BlockQ5_1>(rows, loud, out),
        BlockType::Q8_0 => add_columns::<BlockQ8_0>(rows, loud, out),
        BlockType::Q2_K => add_columns::<BlockQ2K>(rows, loud, out),
        BlockType::Q3_K => add_columns::<BlockQ3K>(rows, loud, out),
        BlockType::Q4_K => add_columns::<BlockQ4K>(rows, loud, out),
        BlockType::Q5_K => add_columns::<BlockQ5K>(rows, loud, out),
        BlockType::Q6_K => add_columns::<BlockQ6K>(rows, loud, out),
        BlockType::IQ4_NL => add_columns::<BlockIQ4NL>(rows, loud, out),
        BlockType::IQ4_XS => add_columns::<BlockIQ4XS>(rows, loud, out),
        BlockType::MXFP4 => add_columns::<BlockMXFP4>(rows, loud, out),
    }
}

#[inline(always)]
fn add_columns<B: Unpack>(rows: Rows<'_>, loud: &[Loud], out: &mut [f32]) {
    for loud in loud {
        // The same place in every row: what its column means to a block is worked out once.
        let (block, column) = (loud.column as usize / B::LEN, loud.column as usize % B::LEN);
        for (index, out) in out.iter_mut().enumerate() {
            let row: &[B] = bytemuck::cast_slice(rows.row(index));
            *out += row[block].weight(column) * loud.x;
        }
    }
}

/// The loud columns of a tile's tokens, to be found by the stretch that they lie in.
pub(super) struct Tokens {
    /// The first entry of each list; stretches share one where there are more than lists.
    lists: [u32; Self::LISTS],
    entries: Vec<Entry>,
}

struct Entry {
    loud: Loud,
    token: u32,
    /// The list's next entry.
    next: u32,
}

impl Tokens {
    const LISTS: usize = 64;
    const END: u32 = u32::MAX;

    pub(super) fn new(x: &[Activation<'_>]) -> Self {
        let mut lists = [Self::END; Self::LISTS];
        let mut entries = Vec::with_capacity(x.iter().map(|x| x.loud.len()).sum());
        for (token, x) in x.iter().enumerate().rev() {
            for &loud in x.loud.iter().rev() {
                let list = &mut lists[loud.column as usize / STRETCH % Self::LISTS];
                let next = std::mem::replace(list, entries.len() as u32);
                let token = token as u32;
                entries.push(Entry { loud, token, next });
            }
        }
        Self { lists, entries }
    }

    /// Adds the products of those in the stretch that starts at column `start`, from a panel
    /// whose codes are raised by `raised`.
    #[inline(always)] // to be compiled for the instruction set of its caller
    pub(super) fn add<B: Unpack>(
        &self,
        panel: &Panel,
        start: usize,
        raised: u8,
        out: &mut [[f32; TILE_ROWS]],
    ) {
        let mut at = self.lists[start / STRETCH % Self::LISTS];
        while let Some(entry) = self.entries.get(at as usize) {
            at = entry.next;
            let column = (entry.loud.column as usize).wrapping_sub(start);
            if column >= STRETCH {
                continue;
            }
            let (x, out) = (entry.loud.x, &mut out[entry.token as usize]);
            let fours = &panel.codes[column / 4];
            let covered = if has_fine_scales(B::TYPE) {
                GROUP
            } else {
                SCALE_LEN
            };
            let (scales, minima) = (
                &panel.scales[column / covered],
                &panel.minima[column / covered],
            );
            // The code, moved to the top of its four, where taking off what it was raised by
            // makes it signed.
            let up = 24 - 8 * (column % 4) as u32;
            for r in 0..TILE_ROWS {
                let top = u32::from_le_bytes(fours[r]) << up;
                let code = top.wrapping_sub(u32::from(raised) << 24) as i32 >> 24;
                let mut weight = scales[r] * code as f32;
                if has_minima(B::TYPE) {
                    weight -= minima[r];
                }
                out[r] += x * weight;
            }
        }
    }
}
