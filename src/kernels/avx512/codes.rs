//! The codes and scales of super-blocks, 64 codes to a register.

use std::arch::x86_64::*;

use super::dots::by_halves;
use super::{load_u8, load_u8_32};
use crate::kernels::x86::{SuperBlock, half_bits, load_16};
use crate::quant::{BlockIQ4XS, BlockQ2K, BlockQ3K, BlockQ4K, BlockQ5K, BlockQ6K, F16, IQ4_VALUES};

/// A super-block whose stripes of 32 columns have a scale each.
pub(super) trait Stripes: SuperBlock {
    /// The codes are this much too large.
    const OFFSET: u8;
    /// The stripe of each lane of the two registers of sums.
    const PLACES: [[i32; 16]; 2];

    /// The codes of four stripes, and of the other four, in two registers each that meet in the same sums.
    ///
    /// # Safety
    /// The CPU has AVX-512 F, BW and VL.
    unsafe fn codes(&self) -> [[__m512i; 2]; 2];

    /// Activations in the order of the codes.
    ///
    /// # Safety
    /// The CPU has AVX-512 F, BW and VL.
    unsafe fn arranged(q: [__m512i; 4]) -> [[__m512i; 2]; 2];

    /// The scales and minima of block `index` of up to four rows.
    ///
    /// # Safety
    /// The CPU has AVX-512 F and BW, and F16C, and rows have the block.
    unsafe fn heads<const N: usize>(rows: &[&[Self]; N], index: usize) -> Heads<N>;
}

/// The scales and minima of `N` super-blocks, four at most.
pub(super) struct Heads<const N: usize> {
    /// Of each the eight scales, and the eight minima behind them, as signed bytes.
    pub(super) eights: [__m128i; N],
    /// Of each the unit of the scales, and that of the minima.
    pub(super) units: [[f32; 2]; N],
}

/// A super-block with a scale for each 16 columns.
pub(super) trait Quarters: SuperBlock {
    /// The codes are this much too large.
    const OFFSET: u8;

    /// The codes of 64 columns at a time, in order.
    ///
    /// # Safety
    /// The CPU has AVX-512 F, BW and VL.
    unsafe fn codes(&self) -> [__m512i; 4];
}

/// Two halves in lanes 0 and 1.
#[inline]
#[target_feature(enable = "f16c")]
pub(super) fn two_halves(a: F16, b: F16) -> __m128 {
    let both = u32::from(half_bits(a)) | u32::from(half_bits(b)) << 16;
    _mm_cvtph_ps(_mm_cvtsi32_si128(both as i32))
}

/// Four pieces of 16 bytes.
#[inline]
#[target_feature(enable = "avx2,avx512f")]
pub(super) fn four_pieces([a, b, c, d]: [&[u8; 16]; 4]) -> __m512i {
    let ab = _mm256_set_m128i(load_16(b), load_16(a));
    let cd = _mm256_set_m128i(load_16(d), load_16(c));
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(ab), cd)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn masked(bytes: __m512i, mask: u8) -> __m512i {
    _mm512_and_si512(bytes, _mm512_set1_epi8(mask as i8))
}

/// The low nibbles, and the high ones.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn nibbles(bytes: __m512i) -> [__m512i; 2] {
    [masked(bytes, 15), masked(_mm512_srli_epi16::<4>(bytes), 15)]
}

/// A table of values for four bits, each plus 128.
pub(super) type Table = [u8; 16];

pub(super) const IQ4: Table = plus_128(&IQ4_VALUES);

pub(super) const fn plus_128(values: &[i8; 16]) -> Table {
    let mut table = [0; 16];
    let mut i = 0;
    while i < 16 {
        table[i] = (values[i] as u8) ^ 0x80;
        i += 1;
    }
    table
}

#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw")]
pub(super) fn look_up(table: &Table, [first, second]: [__m512i; 2]) -> [__m512i; 2] {
    let table = _mm512_broadcast_i32x4(load_16(table));
    [
        _mm512_shuffle_epi8(table, first),
        _mm512_shuffle_epi8(table, second),
    ]
}

macro_rules! stripes {
    ($($block:ty, $offset:literal, $places:expr, $arranged:ident, |$b:ident| $codes:expr, $heads:ident;)*) => {$(
        impl Stripes for $block {
            const OFFSET: u8 = $offset;
            const PLACES: [[i32; 16]; 2] = $places;

            #[inline]
            #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl")]
            unsafe fn codes(&self) -> [[__m512i; 2]; 2] {
                let $b = self;
                $codes
            }

            #[inline]
            #[target_feature(enable = "avx512f")]
            unsafe fn arranged(q: [__m512i; 4]) -> [[__m512i; 2]; 2] {
                $arranged(q)
            }

            #[inline]
            #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl")]
            unsafe fn heads<const N: usize>(rows: &[&[Self]; N], index: usize) -> Heads<N> {
                let mut heads = [&[0; 16]; N];
                for (head, row) in heads.iter_mut().zip(rows) {
                    // SAFETY: the caller's.
                    let bytes = bytemuck::bytes_of(unsafe { row.get_unchecked(index) });
                    *head = bytes.first_chunk().expect("a super-block is longer");
                }
                $heads(heads)
            }
        }
    )*};
}

stripes! {
    BlockQ4K, 0, INTERLEAVED, even_and_odd, |b| interleaved(&b.qs), six_bit_heads;
    BlockQ5K, 0, INTERLEAVED, even_and_odd, |b| with_stripe_fifths(interleaved(&b.qs), &b.qh),
        six_bit_heads;
    BlockIQ4XS, 128, IN_ORDER, in_order, |b| looked_up(bytemuck::cast_ref(&b.qs)), iq4_heads;
}

/// See [`interleaved`].
const INTERLEAVED: [[i32; 16]; 2] = [
    [0, 0, 4, 4, 0, 0, 4, 4, 2, 2, 6, 6, 2, 2, 6, 6],
    [1, 1, 5, 5, 1, 1, 5, 5, 3, 3, 7, 7, 3, 3, 7, 7],
];

/// See [`looked_up`].
const IN_ORDER: [[i32; 16]; 2] = [
    [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3],
    [4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7],
];

/// See [`interleaved`].
#[inline]
#[target_feature(enable = "avx512f")]
fn even_and_odd([a, b, c, d]: [__m512i; 4]) -> [[__m512i; 2]; 2] {
    const EVEN: i32 = 0b01_00_01_00;
    const ODD: i32 = 0b11_10_11_10;
    [
        by_eights(
            _mm512_shuffle_i64x2::<EVEN>(a, b),
            _mm512_shuffle_i64x2::<EVEN>(c, d),
        ),
        by_eights(
            _mm512_shuffle_i64x2::<ODD>(a, b),
            _mm512_shuffle_i64x2::<ODD>(c, d),
        ),
    ]
}

/// See [`looked_up`].
#[inline]
#[target_feature(enable = "avx512f")]
fn in_order([a, b, c, d]: [__m512i; 4]) -> [[__m512i; 2]; 2] {
    [by_halves(a, b), by_halves(c, d)]
}

/// The first 8 bytes of each 16 of two registers in turns, and the others. (This goes to more of Zen 4's pipes than
/// moving 16 bytes does.)
#[inline]
#[target_feature(enable = "avx512f")]
fn by_eights(a: __m512i, b: __m512i) -> [__m512i; 2] {
    [_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)]
}

/// The heads of Q4_K and Q5_K: two units in halves, then scales and minima as
/// [`ScalesAndMins8`](crate::quant::k::ScalesAndMins8) has them, those of all blocks at once.
#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl")]
fn six_bit_heads<const N: usize>(heads: [&[u8; 16]; N]) -> Heads<N> {
    // Bytes 4 to 7 are scales, 8 to 11 minima: of the first four stripes in the low six bits, of the others
    // two bits at the top, their nibbles being in bytes 12 to 15.
    let all = lanes(heads);
    let places = |bytes: [i32; 4]| {
        _mm512_broadcast_i32x4(_mm_setr_epi32(bytes[0], bytes[1], bytes[2], bytes[3]))
    };
    const NONE: i32 = -1;
    let [scales, minima, nibbles] = [0x0706_0504, 0x0b0a_0908, 0x0f0e_0d0c];
    let low = _mm512_shuffle_epi8(all, places([scales, nibbles, minima, nibbles]));
    let low = _mm512_srlv_epi32(low, places([0, 0, 0, 4]));
    let low = _mm512_and_si512(
        low,
        places([0x3f3f_3f3f, 0x0f0f_0f0f, 0x3f3f_3f3f, 0x0f0f_0f0f]),
    );
    let high = _mm512_shuffle_epi8(all, places([NONE, scales, NONE, minima]));
    let high = _mm512_and_si512(_mm512_srli_epi16::<2>(high), _mm512_set1_epi8(0x30));
    Heads {
        eights: of_lanes(_mm512_or_si512(low, high)),
        units: units(all),
    }
}

/// The heads of IQ4_XS: a unit, the upper two bits of eight scales, their lower four bits.
#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl")]
fn iq4_heads<const N: usize>(heads: [&[u8; 16]; N]) -> Heads<N> {
    // A word for each scale.
    let all = lanes(heads);
    let places = |bytes: [i64; 2]| _mm512_broadcast_i32x4(_mm_set_epi64x(bytes[1], bytes[0]));
    let low = _mm512_shuffle_epi8(all, places([0x0505_0505_0404_0404, 0x0707_0707_0606_0606]));
    let low = _mm512_srlv_epi16(low, places([0x0004_0000_0004_0000; 2]));
    let high = _mm512_shuffle_epi8(all, places([0x0302_0302_0302_0302; 2]));
    let high = _mm512_srlv_epi16(high, places([0x0006_0004_0002_0000, 0x000e_000c_000a_0008]));
    let high = _mm512_and_si512(_mm512_slli_epi16::<4>(high), _mm512_set1_epi16(0x30));
    let scales = _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi16(15)), high);
    let scales = _mm512_sub_epi16(scales, _mm512_set1_epi16(32));
    Heads {
        eights: of_lanes(_mm512_packs_epi16(scales, _mm512_setzero_si512())),
        units: units(all),
    }
}

/// Up to four pieces of 16 bytes.
#[inline]
#[target_feature(enable = "avx2,avx512f")]
fn lanes<const N: usize>(pieces: [&[u8; 16]; N]) -> __m512i {
    let mut four = [pieces[0]; 4];
    four[..N].copy_from_slice(&pieces);
    match N {
        1 => _mm512_castsi128_si512(load_16(pieces[0])),
        _ => four_pieces(four),
    }
}

/// The pieces of 16 bytes of a register.
#[inline]
#[target_feature(enable = "avx512f")]
fn of_lanes<const N: usize>(lanes: __m512i) -> [__m128i; N] {
    let four = [
        _mm512_castsi512_si128(lanes),
        _mm512_extracti32x4_epi32::<1>(lanes),
        _mm512_extracti32x4_epi32::<2>(lanes),
        _mm512_extracti32x4_epi32::<3>(lanes),
    ];
    let mut out = [four[0]; N];
    out.copy_from_slice(&four[..N]);
    out
}

/// The two halves at the start of each 16 bytes.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512vl")]
fn units<const N: usize>(heads: __m512i) -> [[f32; 2]; N] {
    let places = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    let halves = _mm512_castsi512_si128(_mm512_permutexvar_epi32(places, heads));
    let mut units = [[0.0; 2]; 4];
    // SAFETY: the array is as long as the register.
    unsafe { _mm256_storeu_ps(units.as_mut_ptr().cast(), _mm256_cvtph_ps(halves)) };
    let mut out = [[0.0; 2]; N];
    out.copy_from_slice(&units[..N]);
    out
}

/// Two halves of a super-block's bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn halves(qs: &[u8; 128]) -> [__m512i; 2] {
    let [first, second] = qs.as_chunks::<64>().0 else {
        unreachable!()
    };
    [load_u8(first), load_u8(second)]
}

/// Codes where two stripes share 32 bytes: of the even stripes, and of the odd ones; stripes 0 and 4 in turns, 2 and
/// 6; 1 and 5, 3 and 7.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn interleaved(qs: &[u8; 128]) -> [[__m512i; 2]; 2] {
    let [a, b] = halves(qs);
    let [first, second] = by_eights(a, b);
    let (first, second) = (nibbles(first), nibbles(second));
    [[first[0], second[0]], [first[1], second[1]]]
}

/// Adds 16 to each of the codes of [`interleaved`] whose bit is set: bit `j` of byte `l` belongs to
/// column `l` of stripe `j`.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl")]
fn with_stripe_fifths(mut codes: [[__m512i; 2]; 2], bits: &[u8; 32]) -> [[__m512i; 2]; 2] {
    let bits = twice(bits);
    let sixteen = _mm512_set1_epi8(16);
    // Bits 0 and 4, 2 and 6 are brought to place 4; bits 1 and 5, 3 and 7.
    let even = _mm512_setr_epi32(4, 4, 0, 0, 4, 4, 0, 0, 2, 2, 30, 30, 2, 2, 30, 30);
    let odd = _mm512_setr_epi32(3, 3, 31, 31, 3, 3, 31, 31, 1, 1, 29, 29, 1, 1, 29, 29);
    for (at, bits) in by_eights(bits, bits).into_iter().enumerate() {
        for (codes, places) in codes.iter_mut().zip([even, odd]) {
            let fifths = _mm512_and_si512(_mm512_rolv_epi32(bits, places), sixteen);
            codes[at] = _mm512_or_si512(codes[at], fifths);
        }
    }
    codes
}

/// Codes where the two halves of a stripe share 16 bytes: of the first four stripes and of the others.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl")]
fn looked_up(qs: &[u8; 128]) -> [[__m512i; 2]; 2] {
    let [a, b] = halves(qs);
    [look_up(&IQ4, nibbles(a)), look_up(&IQ4, nibbles(b))]
}

macro_rules! quarters {
    ($($block:ty, $offset:literal, |$b:ident| $codes:expr;)*) => {$(
        impl Quarters for $block {
            const OFFSET: u8 = $offset;

            #[inline]
            #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl")]
            unsafe fn codes(&self) -> [__m512i; 4] {
                let $b = self;
                $codes
            }
        }
    )*};
}

quarters! {
    BlockQ2K, 0, |b| two_bits(&b.qs);
    BlockQ3K, 4, |b| with_third_bits(two_bits(&b.qs), &b.hmask);
    BlockQ6K, 32, |b| six_bits(&b.ql, &b.qh);
}

/// `low` in each word of the lower half, `high` in each of the upper: how far the two stripes
/// of a quarter are shifted.
#[inline]
#[target_feature(enable = "avx512f")]
fn two_words(low: i16, high: i16) -> __m512i {
    let low = _mm256_set1_epi16(low);
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), _mm256_set1_epi16(high))
}

/// 32 bytes in both halves.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn twice(bytes: &[u8; 32]) -> __m512i {
    _mm512_broadcast_i64x4(load_u8_32(bytes))
}

/// Codes where four stripes share 32 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn two_bits(qs: &[u8; 64]) -> [__m512i; 4] {
    let [a, b] = qs.as_chunks::<32>().0 else {
        unreachable!()
    };
    let (a, b) = (twice(a), twice(b));
    let (first, second) = (two_words(0, 2), two_words(4, 6));
    [
        masked(_mm512_srlv_epi16(a, first), 3),
        masked(_mm512_srlv_epi16(a, second), 3),
        masked(_mm512_srlv_epi16(b, first), 3),
        masked(_mm512_srlv_epi16(b, second), 3),
    ]
}

/// Adds 4 to each code whose bit is set: bit `j` of byte `l` belongs to column `l` of stripe `j`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn with_third_bits(mut codes: [__m512i; 4], bits: &[u8; 32]) -> [__m512i; 4] {
    let bits = twice(bits);
    for (k, codes) in codes.iter_mut().enumerate() {
        let bit = |j: usize| i16::from_le_bytes([1 << j; 2]);
        let set = _mm512_test_epi8_mask(bits, two_words(bit(2 * k), bit(2 * k + 1)));
        *codes = _mm512_mask_add_epi8(*codes, set, *codes, _mm512_set1_epi8(4));
    }
    codes
}

/// The codes of Q6_K: nibbles of four stripes in 64 bytes, and their upper two bits where
/// four stripes share 32 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn six_bits(ql: &[u8; 128], qh: &[u8; 64]) -> [__m512i; 4] {
    let [a, b] = halves(ql);
    let [qh_a, qh_b] = qh.as_chunks::<32>().0 else {
        unreachable!()
    };
    let (low_a, low_b, high_a, high_b) = (nibbles(a), nibbles(b), twice(qh_a), twice(qh_b));
    let (first, second) = (two_words(4, 2), two_words(0, 2));
    let with = |low, high| _mm512_or_si512(low, masked(high, 0x30));
    [
        with(low_a[0], _mm512_sllv_epi16(high_a, first)),
        with(low_a[1], _mm512_srlv_epi16(high_a, second)),
        with(low_b[0], _mm512_sllv_epi16(high_b, first)),
        with(low_b[1], _mm512_srlv_epi16(high_b, second)),
    ]
}
