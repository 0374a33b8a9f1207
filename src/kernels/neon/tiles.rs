//! Tile products for NEON with dot products or matrix products: see [`crate::kernels::tiles`]
//! for the idea. The panel is laid out in another way, as each level multiplies:
//!
//! ```text
//! by lane (sdot)                              two by two (smmla)
//! a register: 4 rows of 4 columns             a register: 2 rows of 8 columns
//! times 4 columns of a token                  times 8 columns of two tokens
//! = 4 rows of one token                       = 2 rows of two tokens
//! ```
//!
//! Eight rows go against four tokens: eight registers of sums of products, eight of sums of
//! terms in f32, and a few for what is just loaded stay in the 32 that there are. Codes are
//! signed and without an offset.
//!
//! One lane belongs to one row and one token, and its terms are added from the first column to
//! the last, so a result depends on nothing else.

use std::arch::aarch64::*;
use std::ops::Range;

use super::codes::{Codes, SmallBlock, SuperBlock};
use super::dots::in_units;
use super::multiply::{sdot_lane, smmla};
use super::{exact_tile, load, load_f32, load_i8, load_i16, store_f32};
use crate::kernels::activations::{SCALE_LEN, SUM_LEN};
use crate::kernels::tiles::{STRETCH, TILE_ROWS, Tile, has_fine_scales, has_minima};
use crate::kernels::unpack::GROUP;
use crate::kernels::{Activation, loud};
use crate::quant::{
    BlockIQ4NL, BlockIQ4XS, BlockMXFP4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K,
    BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, BlockType,
};
use crate::tensor::Rows;

/// The tile product for a type.
pub(super) fn tile<L: Level>(kind: BlockType) -> Option<Tile> {
    macro_rules! entry {
        ($block:ty) => {
            Some(|rows, x, out| {
                // SAFETY: tables are only handed out where the CPU has the level's instructions.
                unsafe { tile_rows::<L, $block>(rows, x.x, out) }
            })
        };
    }
    match kind {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => exact_tile(kind),
        BlockType::Q4_0 => entry!(BlockQ4_0),
        BlockType::Q4_1 => entry!(BlockQ4_1),
        BlockType::Q5_0 => entry!(BlockQ5_0),
        BlockType::Q5_1 => entry!(BlockQ5_1),
        BlockType::Q8_0 => entry!(BlockQ8_0),
        BlockType::Q2_K => entry!(BlockQ2K),
        BlockType::Q3_K => entry!(BlockQ3K),
        BlockType::Q4_K => entry!(BlockQ4K),
        BlockType::Q5_K => entry!(BlockQ5K),
        BlockType::Q6_K => entry!(BlockQ6K),
        BlockType::IQ4_NL => entry!(BlockIQ4NL),
        BlockType::IQ4_XS => entry!(BlockIQ4XS),
        BlockType::MXFP4 => entry!(BlockMXFP4),
    }
}

/// How a panel is laid out and multiplied.
pub(super) trait Level {
    /// Puts 16 columns of four rows in the level's order.
    ///
    /// # Safety
    /// The CPU has NEON.
    unsafe fn put(place: &mut [i8; 64], rows: [int8x16_t; 4]);

    /// Adds the products of eight rows, from group `first` on, with as many tokens as `out`
    /// holds, one to four. A weight scale covers `16 · STEP` columns; `q` are those of a
    /// stretch, of four tokens of which some may not count.
    ///
    /// # Safety
    /// The CPU has the level's instructions.
    unsafe fn multiply<const STEP: usize, const MINIMA: bool>(
        panel: &Panel,
        first: usize,
        factors: &Factors,
        q: [&[[i8; 16]]; 4],
        out: &mut [[f32; TILE_ROWS]],
    );
}

/// Rows whose codes stand together.
const GROUP_ROWS: usize = 4;
const GROUPS: usize = TILE_ROWS / GROUP_ROWS;
/// Tokens that are multiplied at a time.
const TOKENS: usize = 4;
/// Groups that are multiplied at a time.
const BLOCK_GROUPS: usize = 2;
/// Activation scales in a stretch.
const SCALES: usize = STRETCH / SCALE_LEN;
/// Sums of activations in a stretch.
const SUMS: usize = STRETCH / SUM_LEN;

/// A tile's rows over a stretch, unpacked, by groups of four rows.
#[repr(C, align(64))]
pub(super) struct Panel {
    /// 16 columns at a time, in the level's order.
    codes: [[[i8; 64]; STRETCH / 16]; GROUPS],
    /// The scale of each row, for each 32 columns or, where scales are fine, for each 16.
    scales: [[[f32; GROUP_ROWS]; STRETCH / GROUP]; GROUPS],
    /// The minima likewise.
    minima: [[[f32; GROUP_ROWS]; STRETCH / GROUP]; GROUPS],
}

/// What the stretches of four tokens are multiplied with beside their codes.
#[repr(C, align(64))]
pub(super) struct Factors {
    /// Their scales.
    s: [[f32; TOKENS]; SCALES],
    /// `s · Σ q` for each minimum.
    s_sums: [[f32; TOKENS]; SUMS],
}

/// A block that panels are filled from.
trait Fill: Codes {
    /// Puts the scales and minima of a block of four rows.
    ///
    /// # Safety
    /// The CPU has NEON.
    unsafe fn put_scales(four: [&Self; 4], scales: &mut [[f32; 4]], minima: &mut [[f32; 4]]);
}

#[target_feature(enable = "neon")]
unsafe fn tile_rows<L: Level, B: Fill>(
    rows: Rows<'_>,
    x: &[Activation<'_>],
    out: &mut [[f32; TILE_ROWS]],
) {
    assert!((1..=TILE_ROWS).contains(&rows.len()));
    let multiply = match (has_fine_scales(B::TYPE), has_minima(B::TYPE)) {
        (false, false) => multiply::<L, 2, false>,
        (false, true) => multiply::<L, 2, true>,
        (true, false) => multiply::<L, 1, false>,
        (true, true) => multiply::<L, 1, true>,
    };
    out.fill([0.0; TILE_ROWS]);
    let groups = rows.len().div_ceil(GROUP_ROWS);
    let mut panel = Panel {
        codes: [[[0; 64]; STRETCH / 16]; GROUPS],
        scales: [[[0.0; GROUP_ROWS]; STRETCH / GROUP]; GROUPS],
        minima: [[[0.0; GROUP_ROWS]; STRETCH / GROUP]; GROUPS],
    };
    for start in (0..rows.cols).step_by(STRETCH) {
        let columns = start..(start + STRETCH).min(rows.cols);
        for group in 0..groups {
            // Beyond the last row the last row stands again.
            let four = [0, 1, 2, 3].map(|r| {
                let row = rows.row((group * GROUP_ROWS + r).min(rows.len() - 1));
                &bytemuck::cast_slice::<u8, B>(row)[start / B::LEN..columns.end / B::LEN]
            });
            // SAFETY: the caller's.
            unsafe { fill_group::<L, B>(&mut panel, group, four) };
        }
        // SAFETY: the caller's.
        unsafe { multiply(&panel, groups, &columns, x, out) };
    }
    for (x, out) in x.iter().zip(out) {
        loud::add(rows, x.loud, &mut out[..rows.len()]);
    }
}

/// Fills a group of a panel from the stretches of its rows.
#[target_feature(enable = "neon")]
unsafe fn fill_group<L: Level, B: Fill>(panel: &mut Panel, group: usize, rows: [&[B]; 4]) {
    let chunks = B::LEN / 16;
    let scales = B::LEN / if has_fine_scales(B::TYPE) { 16 } else { 32 };
    for b in 0..rows[0].len() {
        let four = [&rows[0][b], &rows[1][b], &rows[2][b], &rows[3][b]];
        let codes = &mut panel.codes[group][b * chunks..(b + 1) * chunks];
        for (j, codes) in codes.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            // SAFETY: every aarch64 has NEON.
            let stripe = |r: usize| unsafe { four[r].codes(j) };
            let rows = [stripe(0), stripe(1), stripe(2), stripe(3)];
            for (half, place) in codes.iter_mut().enumerate() {
                let row = |r: usize| vsubq_s8(rows[r][half], vdupq_n_s8(B::OFFSET));
                // SAFETY: every aarch64 has NEON.
                unsafe { L::put(place, [row(0), row(1), row(2), row(3)]) };
            }
        }
        let places = b * scales..(b + 1) * scales;
        let minima = &mut panel.minima[group][places.clone()];
        // SAFETY: every aarch64 has NEON.
        unsafe { B::put_scales(four, &mut panel.scales[group][places], minima) };
    }
}

/// Adds the products of a panel with all tokens.
#[target_feature(enable = "neon")]
unsafe fn multiply<L: Level, const STEP: usize, const MINIMA: bool>(
    panel: &Panel,
    groups: usize,
    columns: &Range<usize>,
    x: &[Activation<'_>],
    out: &mut [[f32; TILE_ROWS]],
) {
    for (x, out) in x.chunks(TOKENS).zip(out.chunks_mut(TOKENS)) {
        let token = |t: usize| &x[t.min(x.len() - 1)];
        let tokens = [token(0), token(1), token(2), token(3)];
        let factors = Factors::of::<STEP, MINIMA>(tokens, columns);
        let q = tokens.map(|x| x.q[columns.clone()].as_chunks::<16>().0);
        for first in (0..groups).step_by(BLOCK_GROUPS) {
            // SAFETY: the caller's.
            unsafe { L::multiply::<STEP, MINIMA>(panel, first, &factors, q, out) };
        }
    }
}

impl Factors {
    #[inline]
    #[target_feature(enable = "neon")]
    fn of<const STEP: usize, const MINIMA: bool>(
        tokens: [&Activation<'_>; TOKENS],
        columns: &Range<usize>,
    ) -> Self {
        let (mut s, mut sums) = ([[0.0; SCALES]; TOKENS], [[0; SUMS]; TOKENS]);
        for (t, x) in tokens.into_iter().enumerate() {
            let some_s = &x.scales[columns.start / SCALE_LEN..columns.end / SCALE_LEN];
            let some_sums = &x.sums[columns.start / SUM_LEN..columns.end / SUM_LEN];
            match (some_s.first_chunk(), some_sums.first_chunk()) {
                (Some(whole_s), Some(whole_sums)) => (s[t], sums[t]) = (*whole_s, *whole_sums),
                _ => {
                    s[t][..some_s.len()].copy_from_slice(some_s);
                    sums[t][..some_sums.len()].copy_from_slice(some_sums);
                }
            }
        }
        let mut factors = Factors {
            s: [[0.0; TOKENS]; SCALES],
            s_sums: [[0.0; TOKENS]; SUMS],
        };
        for half in 0..2 {
            let s = |t: usize| load_f32(&s[t].as_chunks().0[half]);
            let sums = |t: usize| load_i16(&sums[t].as_chunks().0[half]);
            let times = |sums, s| vmulq_f32(vcvtq_f32_s32(sums), s);
            macro_rules! put {
                ($place:expr, |$t:ident| $four:expr) => {{
                    let four = |$t: usize| $four;
                    put_turned($place, [four(0), four(1), four(2), four(3)]);
                }};
            }
            put!(&mut factors.s.as_chunks_mut().0[half], |t| s(t));
            let (places, _) = factors.s_sums.as_chunks_mut::<4>();
            if MINIMA && STEP == 2 {
                put!(&mut places[half], |t| times(vpaddlq_s16(sums(t)), s(t)));
            } else if MINIMA {
                put!(&mut places[2 * half], |t| {
                    times(vmovl_s16(vget_low_s16(sums(t))), vzip1q_f32(s(t), s(t)))
                });
                put!(&mut places[2 * half + 1], |t| {
                    times(vmovl_high_s16(sums(t)), vzip2q_f32(s(t), s(t)))
                });
            }
        }
        factors
    }
}

/// Puts four rows of four as columns.
#[inline]
#[target_feature(enable = "neon")]
fn put_turned(to: &mut [[f32; 4]; 4], [a, b, c, d]: [float32x4_t; 4]) {
    // SAFETY: the array is as long as the four registers, and the store takes any alignment.
    unsafe { vst4q_f32(to.as_mut_ptr().cast(), float32x4x4_t(a, b, c, d)) }
}

/// Tiles of FEAT_DotProd.
pub(super) struct ByLane;

impl Level for ByLane {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn put(place: &mut [i8; 64], rows: [int8x16_t; 4]) {
        let row = |r: usize| vreinterpretq_s32_s8(rows[r]);
        let rows = int32x4x4_t(row(0), row(1), row(2), row(3));
        // SAFETY: the array is as long as the registers, and the store takes any alignment.
        unsafe { vst4q_s32(place.as_mut_ptr().cast(), rows) }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn multiply<const STEP: usize, const MINIMA: bool>(
        panel: &Panel,
        first: usize,
        factors: &Factors,
        q: [&[[i8; 16]]; 4],
        out: &mut [[f32; TILE_ROWS]],
    ) {
        macro_rules! with {
            ($($tokens:literal)*) => {
                match out.len() {
                    $($tokens => {
                        let out = out.try_into().expect("as many");
                        let q = *q.first_chunk().expect("four at least");
                        // SAFETY: the caller's.
                        unsafe {
                            by_lane::<$tokens, STEP, MINIMA>(panel, first, factors, q, out)
                        }
                    })*
                    _ => unreachable!("blocks hold up to four tokens"),
                }
            };
        }
        with!(1 2 3 4)
    }
}

/// The innermost loops of [`ByLane`], for `T` tokens.
///
/// # Safety
/// The CPU has FEAT_DotProd.
#[target_feature(enable = "neon")]
unsafe fn by_lane<const T: usize, const STEP: usize, const MINIMA: bool>(
    panel: &Panel,
    first: usize,
    factors: &Factors,
    q: [&[[i8; 16]]; T],
    out: &mut [[f32; TILE_ROWS]; T],
) {
    let first_row = first * GROUP_ROWS;
    let mut acc = [[vdupq_n_f32(0.0); BLOCK_GROUPS]; T];
    for t in 0..T {
        let out = out[t][first_row..].as_chunks().0;
        acc[t] = [load_f32(&out[0]), load_f32(&out[1])];
    }
    let codes = [&panel.codes[first], &panel.codes[first + 1]];
    for part in 0..q[0].len() / STEP {
        let mut dots = [[vdupq_n_s32(0); BLOCK_GROUPS]; T];
        for chunk in part * STEP..(part + 1) * STEP {
            let mut four = [vdupq_n_s8(0); T];
            for t in 0..T {
                four[t] = load_i8(&q[t][chunk]);
            }
            for g in 0..BLOCK_GROUPS {
                let fours = codes[g][chunk].as_chunks::<16>().0;
                for t in 0..T {
                    // SAFETY: the caller's.
                    unsafe {
                        dots[t][g] = sdot_lane::<0>(dots[t][g], load_i8(&fours[0]), four[t]);
                        dots[t][g] = sdot_lane::<1>(dots[t][g], load_i8(&fours[1]), four[t]);
                        dots[t][g] = sdot_lane::<2>(dots[t][g], load_i8(&fours[2]), four[t]);
                        dots[t][g] = sdot_lane::<3>(dots[t][g], load_i8(&fours[3]), four[t]);
                    }
                }
            }
        }
        for g in 0..BLOCK_GROUPS {
            let scales = load_f32(&panel.scales[first + g][part]);
            let minima = load_f32(&panel.minima[first + g][part]);
            for t in 0..T {
                let weights = vmulq_f32(vcvtq_f32_s32(dots[t][g]), scales);
                acc[t][g] = vfmaq_n_f32(acc[t][g], weights, factors.s[part * STEP / 2][t]);
                if MINIMA {
                    acc[t][g] = vfmsq_n_f32(acc[t][g], minima, factors.s_sums[part][t]);
                }
            }
        }
    }
    for t in 0..T {
        let out = out[t][first_row..].as_chunks_mut().0;
        store_f32(&mut out[0], acc[t][0]);
        store_f32(&mut out[1], acc[t][1]);
    }
}

/// Tiles of FEAT_I8MM.
pub(super) struct TwoByTwo;

impl Level for TwoByTwo {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn put(place: &mut [i8; 64], rows: [int8x16_t; 4]) {
        let row = |r: usize| vreinterpretq_s64_s8(rows[r]);
        let place: *mut i64 = place.as_mut_ptr().cast();
        // SAFETY: the array is as long as the registers, and the store takes any alignment.
        unsafe {
            vst2q_s64(place, int64x2x2_t(row(0), row(1)));
            vst2q_s64(place.add(4), int64x2x2_t(row(2), row(3)));
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn multiply<const STEP: usize, const MINIMA: bool>(
        panel: &Panel,
        first: usize,
        factors: &Factors,
        q: [&[[i8; 16]]; 4],
        out: &mut [[f32; TILE_ROWS]],
    ) {
        // SAFETY: the caller's.
        unsafe {
            match out.len() {
                1 | 2 => two_by_two::<1, STEP, MINIMA>(panel, first, factors, q, out),
                3 | 4 => two_by_two::<2, STEP, MINIMA>(panel, first, factors, q, out),
                _ => unreachable!("blocks hold up to four tokens"),
            }
        }
    }
}

/// Pairs of rows that are multiplied at a time.
const ROW_PAIRS: usize = BLOCK_GROUPS * GROUP_ROWS / 2;

/// The innermost loops of [`TwoByTwo`], for `P` pairs of tokens. In a register of sums stand
/// row 0 with token 0, row 0 with token 1, row 1 with token 0, row 1 with token 1.
///
/// # Safety
/// The CPU has FEAT_I8MM.
#[target_feature(enable = "neon")]
unsafe fn two_by_two<const P: usize, const STEP: usize, const MINIMA: bool>(
    panel: &Panel,
    first: usize,
    factors: &Factors,
    q: [&[[i8; 16]]; 4],
    out: &mut [[f32; TILE_ROWS]],
) {
    let first_row = first * GROUP_ROWS;
    let mut acc = [[vdupq_n_f32(0.0); ROW_PAIRS]; P];
    for (p, acc) in acc.iter_mut().enumerate() {
        // A token that does not count stands for another, and its sums go nowhere.
        let rows = |t: usize| &out[t.min(out.len() - 1)][first_row..];
        let (a, b) = (rows(2 * p), rows(2 * p + 1));
        for g in 0..BLOCK_GROUPS {
            let (a, b) = (load_f32(&a.as_chunks().0[g]), load_f32(&b.as_chunks().0[g]));
            (acc[2 * g], acc[2 * g + 1]) = (vzip1q_f32(a, b), vzip2q_f32(a, b));
        }
    }
    let codes = [&panel.codes[first], &panel.codes[first + 1]];
    for part in 0..q[0].len() / STEP {
        let mut dots = [[vdupq_n_s32(0); ROW_PAIRS]; P];
        for chunk in part * STEP..(part + 1) * STEP {
            let mut tokens = [[vdupq_n_s8(0); 2]; P];
            for p in 0..P {
                let a = vreinterpretq_s64_s8(load_i8(&q[2 * p][chunk]));
                let b = vreinterpretq_s64_s8(load_i8(&q[2 * p + 1][chunk]));
                tokens[p][0] = vreinterpretq_s8_s64(vzip1q_s64(a, b));
                tokens[p][1] = vreinterpretq_s8_s64(vzip2q_s64(a, b));
            }
            for r in 0..ROW_PAIRS {
                let pair: &[[i8; 16]; 2] = &codes[r / 2][chunk].as_chunks().0.as_chunks().0[r % 2];
                for p in 0..P {
                    // SAFETY: the caller's.
                    unsafe {
                        dots[p][r] = smmla(dots[p][r], load_i8(&pair[0]), tokens[p][0]);
                        dots[p][r] = smmla(dots[p][r], load_i8(&pair[1]), tokens[p][1]);
                    }
                }
            }
        }
        let (s, s_sums) = (&factors.s[part * STEP / 2], &factors.s_sums[part]);
        for g in 0..BLOCK_GROUPS {
            let scales = load_f32(&panel.scales[first + g][part]);
            let minima = load_f32(&panel.minima[first + g][part]);
            let scales = [vzip1q_f32(scales, scales), vzip2q_f32(scales, scales)];
            let minima = [vzip1q_f32(minima, minima), vzip2q_f32(minima, minima)];
            for p in 0..P {
                let (s, s_sums) = (
                    load_twice(&s.as_chunks().0[p]),
                    load_twice(&s_sums.as_chunks().0[p]),
                );
                for i in 0..2 {
                    let (acc, dots) = (&mut acc[p][2 * g + i], dots[p][2 * g + i]);
                    *acc = vfmaq_f32(*acc, vmulq_f32(vcvtq_f32_s32(dots), scales[i]), s);
                    if MINIMA {
                        *acc = vfmsq_f32(*acc, minima[i], s_sums);
                    }
                }
            }
        }
    }
    for (t, out) in out.iter_mut().enumerate() {
        let out = out[first_row..].as_chunks_mut().0;
        for g in 0..BLOCK_GROUPS {
            let (a, b) = (acc[t / 2][2 * g], acc[t / 2][2 * g + 1]);
            let rows = if t % 2 == 0 {
                vuzp1q_f32(a, b)
            } else {
                vuzp2q_f32(a, b)
            };
            store_f32(&mut out[g], rows);
        }
    }
}

load! {
    load_two: [f32; 2] => float32x2_t, vld1_f32;
}

/// Two floats, twice.
#[inline]
#[target_feature(enable = "neon")]
fn load_twice(two: &[f32; 2]) -> float32x4_t {
    let two = load_two(two);
    vcombine_f32(two, two)
}

macro_rules! fill {
    ($($block:ty),*; |$four:ident, $scales:ident, $minima:ident| $put:block) => {$(
        impl Fill for $block {
            #[inline]
            #[target_feature(enable = "neon")]
            unsafe fn put_scales(
                $four: [&Self; 4],
                $scales: &mut [[f32; 4]],
                $minima: &mut [[f32; 4]],
            ) $put
        }
    )*};
}

fill!(BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1, BlockQ8_0, BlockIQ4NL, BlockMXFP4;
|four, scales, minima| {
    // SAFETY: every aarch64 has NEON.
    let (units, offsets) = unsafe { (Self::scales(four), Self::offsets(four)) };
    store_f32(&mut scales[0], units);
    store_f32(&mut minima[0], vnegq_f32(offsets));
});

fill!(BlockQ4K, BlockQ5K, BlockIQ4XS; |four, scales, minima| {
    for (r, block) in four.into_iter().enumerate() {
        // SAFETY: every aarch64 has NEON.
        let (s, m) = unsafe { block.scales_and_minima() };
        put_row(scales, 0, r, in_units(block.d(), vget_low_s8(s)));
        if Self::MINIMA {
            put_row(minima, 0, r, in_units(block.dmin(), vget_low_s8(m)));
        }
    }
});

fill!(BlockQ2K, BlockQ3K, BlockQ6K; |four, scales, minima| {
    for (r, block) in four.into_iter().enumerate() {
        // SAFETY: every aarch64 has NEON.
        let (s, m) = unsafe { block.scales_and_minima() };
        put_row(scales, 0, r, in_units(block.d(), vget_low_s8(s)));
        put_row(scales, 8, r, in_units(block.d(), vget_high_s8(s)));
        if Self::MINIMA {
            put_row(minima, 0, r, in_units(block.dmin(), vget_low_s8(m)));
            put_row(minima, 8, r, in_units(block.dmin(), vget_high_s8(m)));
        }
    }
});

/// Puts eight scales of row `r`, from `start` on, where each has those of other rows beside it.
#[inline]
#[target_feature(enable = "neon")]
fn put_row(places: &mut [[f32; 4]], start: usize, r: usize, scales: [float32x4_t; 2]) {
    let mut eight = [[0.0; 4]; 2];
    store_f32(&mut eight[0], scales[0]);
    store_f32(&mut eight[1], scales[1]);
    for (place, scale) in places[start..].iter_mut().zip(eight.as_flattened()) {
        place[r] = *scale;
    }
}
