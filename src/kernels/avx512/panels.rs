//! Panels of tile products, filled with AVX-512: see [`crate::kernels::tiles`].
//!
//! Sixteen rows at a time, and 16 bytes of each, still packed, are turned so that a register
//! holds the same four bytes of every row. Shifts and masks then make codes of all rows at once,
//! in the very layout that a panel has:
//!
//! ```text
//! row 0    b0 b1 b2 b3 │ b4 … │ b8 … │ b12 …        register 0   row 0: b0–b3 │ row 1: b0–b3 │ …
//! row 1    b0 b1 b2 b3 │ b4 … │ b8 … │ b12 …   ──►  register 1   row 0: b4–b7 │ row 1: b4–b7 │ …
//!   …                                               register 2   …
//! row 15   …                                        register 3   …
//! ```
//!
//! So turning is paid for on packed bytes, which are half as many as the codes or fewer. Scales
//! that are packed are turned and unpacked in the same way.

use std::arch::x86_64::*;

use crate::kernels::tiles::{Fours, Panel, TILE_ROWS};
use crate::kernels::unpack::{GROUP, Unpack};
use crate::kernels::x86::{half_bits, load_16};
use crate::quant::{
    BlockIQ4NL, BlockIQ4XS, BlockMXFP4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K,
    BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, IQ4_VALUES, MXFP4_DOUBLED,
};

/// Rows that are turned at a time.
const ROWS: usize = 16;

/// A block that panels are filled from.
pub(super) trait Fill: Unpack {
    /// Fills a panel from the stretches of a tile's rows, all of the same length.
    ///
    /// # Safety
    /// The CPU has AVX-512 F, BW, VL and F16C.
    unsafe fn fill(panel: &mut Panel, stretch: &[&[Self]; TILE_ROWS]);
}

/// Where the codes, scales and minima of some columns of 16 rows go.
struct Place<'a> {
    codes: &'a mut [Fours],
    scales: &'a mut [[f32; TILE_ROWS]],
    minima: &'a mut [[f32; TILE_ROWS]],
    first_row: usize,
}

impl Place<'_> {
    /// Four columns, from `4 · four` on.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn put(&mut self, four: usize, codes: __m512i) {
        let place = &mut self.codes[four][self.first_row..][..ROWS];
        // SAFETY: sixteen fours of bytes are as long as the register.
        unsafe { _mm512_storeu_si512(place.as_mut_ptr().cast(), codes) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn put_scales(&mut self, group: usize, scales: __m512) {
        store(&mut self.scales[group], self.first_row, scales);
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn put_minima(&mut self, group: usize, minima: __m512) {
        store(&mut self.minima[group], self.first_row, minima);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(to: &mut [f32; TILE_ROWS], first_row: usize, values: __m512) {
    let to = &mut to[first_row..][..ROWS];
    // SAFETY: sixteen floats are as long as the register.
    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), values) }
}

/// Implements [`Fill`]: `$fill` puts the codes, scales and minima of a block of 16 rows.
macro_rules! fill {
    ($($block:ty, |$rows:ident, $place:ident| $fill:block)*) => {$(
        impl Fill for $block {
            #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl")]
            unsafe fn fill(panel: &mut Panel, stretch: &[&[Self]; TILE_ROWS]) {
                #[inline]
                #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl")]
                fn fill($rows: &[&$block; ROWS], mut $place: Place<'_>) {
                    $fill
                }
                each_block(panel, stretch, |rows, place| fill(rows, place));
            }
        }
    )*};
}

/// Calls `fill` for each block of each 16 rows.
#[inline(always)]
fn each_block<B: Unpack>(
    panel: &mut Panel,
    stretch: &[&[B]; TILE_ROWS],
    fill: impl Fn(&[&B; ROWS], Place<'_>),
) {
    let scale_len = if crate::kernels::tiles::has_fine_scales(B::TYPE) {
        GROUP
    } else {
        2 * GROUP
    };
    for first_row in [0, ROWS] {
        let rows: &[&[B]; ROWS] = stretch[first_row..].first_chunk().expect("two of 16 rows");
        assert!(rows.iter().all(|row| row.len() == rows[0].len()));
        for b in 0..rows[0].len() {
            let mut blocks = [&rows[0][0]; ROWS];
            for (block, row) in blocks.iter_mut().zip(rows) {
                // SAFETY: all rows are as long (asserted above).
                *block = unsafe { row.get_unchecked(b) };
            }
            let scales = b * B::LEN / scale_len..(b + 1) * B::LEN / scale_len;
            let place = Place {
                codes: &mut panel.codes[b * B::LEN / 4..(b + 1) * B::LEN / 4],
                scales: &mut panel.scales[scales.clone()],
                minima: &mut panel.minima[scales],
                first_row,
            };
            fill(&blocks, place);
        }
    }
}

/// Turns 16 bytes of each row: register `c` holds bytes `4·c..4·c + 4` of every row.
macro_rules! turn {
    ($rows:expr, |$row:ident| $bytes:expr) => {{
        let rows = $rows;
        let bytes = |r: usize| {
            let $row = &rows[r];
            load_16($bytes)
        };
        turn([
            every_fourth(bytes(0), bytes(4), bytes(8), bytes(12)),
            every_fourth(bytes(1), bytes(5), bytes(9), bytes(13)),
            every_fourth(bytes(2), bytes(6), bytes(10), bytes(14)),
            every_fourth(bytes(3), bytes(7), bytes(11), bytes(15)),
        ])
    }};
}

#[inline]
#[target_feature(enable = "avx512f")]
fn every_fourth(a: __m128i, b: __m128i, c: __m128i, d: __m128i) -> __m512i {
    // By two pairs: an insertion into half a register costs half as much.
    let pair = |low, high| _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), high);
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(pair(a, b)), pair(c, d))
}

/// Transposes within each 128 bits: register `k` holds the rows `k`, `4 + k`, `8 + k`, `12 + k`.
#[inline]
#[target_feature(enable = "avx512f")]
fn turn([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
    let (ab_high, cd_high) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
    [
        _mm512_unpacklo_epi64(ab, cd),
        _mm512_unpackhi_epi64(ab, cd),
        _mm512_unpacklo_epi64(ab_high, cd_high),
        _mm512_unpackhi_epi64(ab_high, cd_high),
    ]
}

/// One half of each row, widened.
macro_rules! halves {
    ($rows:ident, |$row:ident| $half:expr) => {{
        let mut halves = [0; ROWS];
        for (half, $row) in halves.iter_mut().zip($rows) {
            *half = half_bits($half);
        }
        // SAFETY: the array is as long as the register, and the load takes any alignment.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(halves.as_ptr().cast()) })
    }};
}

/// The bits of `mask` of each byte, moved down (up, where `down` is negative).
#[inline]
#[target_feature(enable = "avx512f")]
fn bits(bytes: __m512i, down: i32, mask: u8) -> __m512i {
    let moved = if down >= 0 {
        _mm512_srl_epi32(bytes, _mm_cvtsi32_si128(down))
    } else {
        _mm512_sll_epi32(bytes, _mm_cvtsi32_si128(-down))
    };
    _mm512_and_si512(moved, _mm512_set1_epi8(mask as i8))
}

/// What four bits stand for in a table, plus 128.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn look_up(table: &[i8; 16], levels: __m512i) -> __m512i {
    let table = _mm512_broadcast_i32x4(load_16(bytemuck::cast_ref(table)));
    let values = _mm512_shuffle_epi8(table, levels);
    _mm512_xor_si512(values, _mm512_set1_epi8(-128))
}

/// Puts 32 columns of nibbles: 16 low ones, then the high ones; `code(c, levels)` makes codes of
/// the levels of columns `4·c..4·c + 4`.
macro_rules! put_nibbles {
    ($place:ident, $first:expr, $turned:expr, |$c:ident, $levels:ident| $code:expr) => {
        for (c, packed) in $turned.into_iter().enumerate() {
            for (half, down) in [(0, 0), (1, 4)] {
                let ($c, $levels) = (4 * half + c, bits(packed, down, 15));
                $place.put($first + $c, $code);
            }
        }
    };
}

/// Adds 16 to the levels of columns `4·c..4·c + 4` whose bit in `high` is set.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn with_fifth_bits(levels: __m512i, high: __m512i, c: usize) -> __m512i {
    let each_byte = _mm512_set1_epi32(0x0101_0101 * (c as i32 / 2));
    let dwords = _mm512_set4_epi32(0x0c0c_0c0c, 0x0808_0808, 0x0404_0404, 0);
    let spread = _mm512_shuffle_epi8(high, _mm512_add_epi8(dwords, each_byte));
    let bit = if c.is_multiple_of(2) {
        0x0804_0201
    } else {
        0x8040_2010_u32
    };
    let set = _mm512_test_epi8_mask(spread, _mm512_set1_epi32(bit as i32));
    _mm512_mask_add_epi8(levels, set, levels, _mm512_set1_epi8(16))
}

/// The four bytes of each row.
macro_rules! words {
    ($rows:ident, |$row:ident| $word:expr) => {{
        let mut words = [[0; 4]; ROWS];
        for (word, $row) in words.iter_mut().zip($rows) {
            *word = $word;
        }
        // SAFETY: the array is as long as the register, and the load takes any alignment.
        unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
    }};
}

/// The sixteen bytes of `bytes` from `start` on.
#[inline(always)]
fn sixteen(bytes: &[u8], start: usize) -> &[u8; 16] {
    bytes[start..].first_chunk().expect("inside the block")
}

/// Signed byte `i` of each lane, times a unit.
#[inline]
#[target_feature(enable = "avx512f")]
fn signed_byte(bytes: __m512i, i: usize, unit: __m512) -> __m512 {
    let top = _mm512_sll_epi32(bytes, _mm_cvtsi32_si128(24 - 8 * i as i32));
    _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(top)), unit)
}

/// The halves at the bottom and at the top of each lane, widened.
#[inline]
#[target_feature(enable = "avx512f")]
fn two_halves(lanes: __m512i) -> [__m512; 2] {
    [
        _mm512_cvtph_ps(_mm512_cvtepi32_epi16(lanes)),
        _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(lanes))),
    ]
}

/// Scales and minima of Q4_K and Q5_K, whose first 16 bytes, turned, are `head`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn put_eight(place: &mut Place<'_>, head: [__m512i; 4]) {
    let [units, a, b, c] = head;
    let [d, dmin] = two_halves(units);
    // As in `ScalesAndMins8`.
    let scales = [
        bits(a, 0, 63),
        _mm512_or_si512(bits(c, 0, 15), bits(a, 2, 0x30)),
    ];
    let minima = [
        bits(b, 0, 63),
        _mm512_or_si512(bits(c, 4, 15), bits(b, 2, 0x30)),
    ];
    for g in 0..8 {
        place.put_scales(g, signed_byte(scales[g / 4], g % 4, d));
        place.put_minima(g, signed_byte(minima[g / 4], g % 4, dmin));
    }
}

fill! {
    BlockQ4_0, |rows, place| {
        put_nibbles!(place, 0, turn!(rows, |row| &row.qs), |_c, levels| levels);
        place.put_scales(0, halves!(rows, |row| row.d));
    }
    BlockQ4_1, |rows, place| {
        put_nibbles!(place, 0, turn!(rows, |row| &row.qs), |_c, levels| levels);
        place.put_scales(0, halves!(rows, |row| row.d));
        place.put_minima(0, negated(halves!(rows, |row| row.m)));
    }
    BlockQ5_0, |rows, place| {
        let high = words!(rows, |row| row.qh);
        put_nibbles!(place, 0, turn!(rows, |row| &row.qs), |c, levels| with_fifth_bits(levels, high, c));
        place.put_scales(0, halves!(rows, |row| row.d));
    }
    BlockQ5_1, |rows, place| {
        let high = words!(rows, |row| row.qh);
        put_nibbles!(place, 0, turn!(rows, |row| &row.qs), |c, levels| with_fifth_bits(levels, high, c));
        place.put_scales(0, halves!(rows, |row| row.d));
        place.put_minima(0, negated(halves!(rows, |row| row.m)));
    }
    BlockIQ4NL, |rows, place| {
        put_nibbles!(place, 0, turn!(rows, |row| &row.qs), |_c, levels| look_up(&IQ4_VALUES, levels));
        place.put_scales(0, halves!(rows, |row| row.d));
    }
    BlockMXFP4, |rows, place| {
        put_nibbles!(place, 0, turn!(rows, |row| &row.qs), |_c, levels| look_up(&MXFP4_DOUBLED, levels));
        let mut scales = [0.0; ROWS];
        for (scale, row) in scales.iter_mut().zip(rows) {
            *scale = row.scale();
        }
        // SAFETY: the array is as long as the register, and the load takes any alignment.
        place.put_scales(0, unsafe { _mm512_loadu_ps(scales.as_ptr()) });
    }
    BlockQ8_0, |rows, place| {
        for half in 0..2 {
            let codes = turn!(rows, |row| sixteen(bytemuck::cast_slice(&row.qs), 16 * half));
            for (c, codes) in codes.into_iter().enumerate() {
                place.put(4 * half + c, _mm512_xor_si512(codes, _mm512_set1_epi8(-128)));
            }
        }
        place.put_scales(0, halves!(rows, |row| row.d));
    }
    BlockQ4K, |rows, place| {
        put_eight(&mut place, turn!(rows, |row| sixteen(bytemuck::bytes_of(*row), 0)));
        for chunk in 0..8 {
            // 16 columns of a stripe, and those of the next stripe.
            let first = chunk / 2 * 16 + chunk % 2 * 4;
            for (c, packed) in turn!(rows, |row| sixteen(&row.qs, 16 * chunk)).into_iter().enumerate() {
                place.put(first + c, bits(packed, 0, 15));
                place.put(first + 8 + c, bits(packed, 4, 15));
            }
        }
    }
    BlockQ5K, |rows, place| {
        put_eight(&mut place, turn!(rows, |row| sixteen(bytemuck::bytes_of(*row), 0)));
        for half in 0..2 {
            let high = turn!(rows, |row| sixteen(&row.qh, 16 * half));
            for pair in 0..4 {
                let packed = turn!(rows, |row| sixteen(&row.qs, 32 * pair + 16 * half));
                let first = pair * 16 + half * 4;
                for c in 0..4 {
                    for (stripe, down) in [(2 * pair, 0), (2 * pair + 1, 4)] {
                        let fifth = bits(high[c], stripe as i32 - 4, 16);
                        let levels = _mm512_or_si512(bits(packed[c], down, 15), fifth);
                        place.put(first + stripe % 2 * 8 + c, levels);
                    }
                }
            }
        }
    }
    BlockQ6K, |rows, place| {
        let d = halves!(rows, |row| row.d);
        let scales = turn!(rows, |row| bytemuck::cast_ref(&row.scales));
        for g in 0..16 {
            place.put_scales(g, signed_byte(scales[g / 4], g % 4, d));
        }
        // Two halves of four stripes, a stripe 16 columns at a time.
        for (half, part) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let high = turn!(rows, |row| sixteen(&row.qh, 32 * half + 16 * part));
            for k in 0..2 {
                let low = turn!(rows, |row| sixteen(&row.ql, 64 * half + 32 * k + 16 * part));
                for c in 0..4 {
                    for (stripe, down) in [(k, 0), (k + 2, 4)] {
                        let top = bits(high[c], 2 * stripe as i32 - 4, 0x30);
                        let levels = _mm512_or_si512(bits(low[c], down, 15), top);
                        place.put(half * 32 + stripe * 8 + part * 4 + c, levels);
                    }
                }
            }
        }
    }
    BlockQ2K, |rows, place| {
        let (d, dmin) = (halves!(rows, |row| row.d), halves!(rows, |row| row.dmin));
        let both = turn!(rows, |row| &row.scales);
        for g in 0..16 {
            place.put_scales(g, signed_byte(bits(both[g / 4], 0, 15), g % 4, d));
            place.put_minima(g, signed_byte(bits(both[g / 4], 4, 15), g % 4, dmin));
        }
        for (half, part) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let packed = turn!(rows, |row| sixteen(&row.qs, 32 * half + 16 * part));
            for (c, packed) in packed.into_iter().enumerate() {
                for k in 0..4 {
                    let levels = bits(packed, 2 * k as i32, 3);
                    place.put(half * 32 + k * 8 + part * 4 + c, levels);
                }
            }
        }
    }
    BlockQ3K, |rows, place| {
        let d = halves!(rows, |row| row.d);
        let mut scales = [[0; 16]; ROWS];
        for (scales, row) in scales.iter_mut().zip(rows) {
            *scales = bytemuck::cast(row.scales.unpack());
        }
        let scales = turn!(&scales, |row| row);
        for g in 0..16 {
            place.put_scales(g, signed_byte(scales[g / 4], g % 4, d));
        }
        for part in 0..2 {
            let high = turn!(rows, |row| sixteen(&row.hmask, 16 * part));
            for half in 0..2 {
                let packed = turn!(rows, |row| sixteen(&row.qs, 32 * half + 16 * part));
                for c in 0..4 {
                    for k in 0..4 {
                        let top = bits(high[c], (4 * half + k) as i32 - 2, 4);
                        let levels = _mm512_or_si512(bits(packed[c], 2 * k as i32, 3), top);
                        place.put(half * 32 + k * 8 + part * 4 + c, levels);
                    }
                }
            }
        }
    }
    BlockIQ4XS, |rows, place| {
        let d = halves!(rows, |row| row.d);
        for g in 0..8 {
            put_nibbles!(place, 8 * g, turn!(rows, |row| &row.qs[g]), |_c, levels| look_up(&IQ4_VALUES, levels));
        }
        let mut scales = [[0; 16]; ROWS];
        for (scales, row) in scales.iter_mut().zip(rows) {
            for (g, scale) in scales[..8].iter_mut().enumerate() {
                *scale = row.scale(g) as u8;
            }
        }
        let scales = turn!(&scales, |row| row);
        for g in 0..8 {
            place.put_scales(g, signed_byte(scales[g / 4], g % 4, d));
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn negated(values: __m512) -> __m512 {
    _mm512_sub_ps(_mm512_setzero_ps(), values)
}
