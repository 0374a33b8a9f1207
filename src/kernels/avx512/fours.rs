//! The codes and scales of blocks of 32 weights, four blocks at a time.

use std::arch::x86_64::*;

use bytemuck::Zeroable;

use super::codes::{IQ4, Table, four_pieces, look_up, nibbles, plus_128};
use super::load_u8;
use crate::kernels::x86::half_bits;
use crate::quant::{
    Block, BlockIQ4NL, BlockMXFP4, BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1, BlockQ8_0, F16,
    MXFP4_DOUBLED,
};

const MXFP4: Table = plus_128(&MXFP4_DOUBLED);

/// A block of 32 weights with a scale and, perhaps, a minimum.
pub(super) trait Fours: Block {
    /// The codes are this much too large.
    const OFFSET: u8;
    /// Whether there is a minimum.
    const MINIMUM: bool = false;

    /// Four blocks, unpacked.
    ///
    /// # Safety
    /// The CPU has AVX-512 F, BW and VL, and F16C.
    unsafe fn unpack(four: &[Self; 4]) -> Four;
}

/// Four blocks, unpacked.
#[derive(Clone, Copy)]
pub(super) struct Four {
    /// The codes of the first halves of all blocks, and of the second halves.
    pub(super) codes: [__m512i; 2],
    /// The four scales.
    pub(super) scales: __m128,
    /// The four minima's negatives.
    pub(super) offsets: __m128,
}

/// Four halves.
#[inline]
#[target_feature(enable = "f16c")]
fn four_halves(four: [F16; 4]) -> __m128 {
    let [a, b, c, d] = four.map(|half| u64::from(half_bits(half)));
    _mm_cvtph_ps(_mm_cvtsi64_si128((a | b << 16 | c << 32 | d << 48) as i64))
}

/// Four blocks of 16 to 32 bytes, as their first 64 bytes and their last 64 bytes, of which single words are picked:
/// what is apart in memory then costs one instruction, and not a load each.
struct Words([__m512i; 2]);

/// Which words are picked: see [`Words`].
#[repr(align(64))]
struct Places([u16; 32]);

impl Places {
    /// `N` runs of words, the next run from slot `8·n` on: of each of four blocks of `size` bytes the `len` bytes at
    /// an offset, `(offset, len)`.
    const fn new<const N: usize>(size: usize, runs: [(usize, usize); N]) -> Self {
        let mut places = [0; 32];
        let (mut slot, mut n) = (0, 0);
        while n < N {
            let (offset, len) = runs[n];
            let mut i = 0;
            while i < 4 * len / 2 {
                let byte = i / (len / 2) * size + offset + i % (len / 2) * 2;
                places[slot] = (if byte < 64 {
                    byte
                } else {
                    byte - (4 * size - 64) + 64
                } / 2) as u16;
                (slot, i) = (slot + 1, i + 1);
            }
            n += 1;
        }
        Self(places)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load(&self) -> __m512i {
        // SAFETY: the array is as long as the register.
        unsafe { _mm512_loadu_si512(self.0.as_ptr().cast()) }
    }
}

impl Words {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn of<B: Block>(four: &[B; 4]) -> Self {
        let bytes = bytemuck::bytes_of(four);
        let (Some(first), Some(last)) = (bytes.first_chunk(), bytes.last_chunk()) else {
            unreachable!("four blocks have 64 bytes")
        };
        Self([load_u8(first), load_u8(last)])
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn pick(&self, places: &Places) -> __m512i {
        _mm512_permutex2var_epi16(self.0[0], places.load(), self.0[1])
    }

    /// The same where all words are among the first 64 bytes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn pick_first(&self, places: &Places) -> __m512i {
        _mm512_permutexvar_epi16(places.load(), self.0[0])
    }
}

/// Adds 16 to each of the codes whose bit is set.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn with_fifth_bits([first, second]: [__m512i; 2], bits: [i64; 2]) -> [__m512i; 2] {
    let sixteen = _mm512_set1_epi8(16);
    [
        _mm512_mask_add_epi8(first, bits[0] as u64, first, sixteen),
        _mm512_mask_add_epi8(second, bits[1] as u64, second, sixteen),
    ]
}

/// Signed codes, each plus 128: first halves, and second halves.
#[inline]
#[target_feature(enable = "avx2,avx512f")]
fn eight_bits(four: [&[i8; 32]; 4]) -> [__m512i; 2] {
    let sign = _mm512_set1_epi8(-128);
    let halves = four.map(bytemuck::cast_ref::<[i8; 32], [[u8; 16]; 2]>);
    [
        _mm512_xor_si512(four_pieces(halves.map(|half| &half[0])), sign),
        _mm512_xor_si512(four_pieces(halves.map(|half| &half[1])), sign),
    ]
}

macro_rules! fours {
    ($($block:ty, $offset:literal, $minimum:literal, |$four:ident| $unpacked:expr;)*) => {$(
        impl Fours for $block {
            const OFFSET: u8 = $offset;
            const MINIMUM: bool = $minimum;

            #[inline]
            #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl")]
            unsafe fn unpack($four: &[Self; 4]) -> Four {
                $unpacked
            }
        }
    )*};
}

fours! {
    BlockQ4_0, 8, false, |four| nibbles_and_scales(four);
    BlockIQ4NL, 128, false, |four| {
        let four = nibbles_and_scales(four);
        Four { codes: look_up(&IQ4, four.codes), ..four }
    };
    BlockQ4_1, 0, true, |four| {
        const NIBBLES: Places = Places::new(20, [(4, 16)]);
        const HEADS: Places = Places::new(20, [(0, 2), (2, 2)]);
        let words = Words::of(four);
        let heads = words.pick_first(&HEADS);
        Four {
            codes: nibbles(words.pick(&NIBBLES)),
            scales: halves_at::<0>(heads),
            offsets: halves_at::<1>(heads),
        }
    };
    BlockQ5_0, 16, false, |four| {
        const NIBBLES: Places = Places::new(22, [(6, 16)]);
        const HEADS: Places = Places::new(22, [(2, 2), (4, 2), (0, 2)]);
        let words = Words::of(four);
        let heads = words.pick(&HEADS);
        Four {
            codes: with_fifth_bits(nibbles(words.pick(&NIBBLES)), two_quads(heads)),
            scales: halves_at::<2>(heads),
            offsets: __m128::zeroed(),
        }
    };
    BlockQ5_1, 0, true, |four| {
        const NIBBLES: Places = Places::new(24, [(8, 16)]);
        const HEADS: Places = Places::new(24, [(4, 2), (6, 2), (0, 2), (2, 2)]);
        let words = Words::of(four);
        let heads = words.pick(&HEADS);
        Four {
            codes: with_fifth_bits(nibbles(words.pick(&NIBBLES)), two_quads(heads)),
            scales: halves_at::<2>(heads),
            offsets: halves_at::<3>(heads),
        }
    };
    BlockQ8_0, 128, false, |four| Four {
        codes: eight_bits(four.each_ref().map(|block| &block.qs)),
        scales: four_halves(four.each_ref().map(|block| block.d)),
        offsets: __m128::zeroed(),
    };
    BlockMXFP4, 128, false, |four| Four {
        codes: look_up(&MXFP4, nibbles(four_pieces(four.each_ref().map(|block| &block.qs)))),
        scales: _mm_setr_ps(four[0].scale(), four[1].scale(), four[2].scale(), four[3].scale()),
        offsets: __m128::zeroed(),
    };
}

/// Four blocks of a scale and 16 bytes.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512vl")]
fn nibbles_and_scales<B: Block>(four: &[B; 4]) -> Four {
    const { assert!(size_of::<B>() == 18) };
    const NIBBLES: Places = Places::new(18, [(2, 16)]);
    const SCALES: Places = Places::new(18, [(0, 2)]);
    let words = Words::of(four);
    Four {
        codes: nibbles(words.pick(&NIBBLES)),
        scales: halves_at::<0>(words.pick_first(&SCALES)),
        offsets: __m128::zeroed(),
    }
}

/// The four halves in quad `I` of a register.
#[inline]
#[target_feature(enable = "f16c,avx512f")]
fn halves_at<const I: i32>(words: __m512i) -> __m128 {
    let words = _mm512_castsi512_si256(words);
    let words = match I / 2 {
        0 => _mm256_castsi256_si128(words),
        _ => _mm256_extracti128_si256::<1>(words),
    };
    match I % 2 {
        0 => _mm_cvtph_ps(words),
        _ => _mm_cvtph_ps(_mm_unpackhi_epi64(words, words)),
    }
}

/// The first two quads of a register.
#[inline]
#[target_feature(enable = "avx2,avx512f")]
fn two_quads(words: __m512i) -> [i64; 2] {
    let words = _mm512_castsi512_si128(words);
    [_mm_cvtsi128_si64(words), _mm_extract_epi64::<1>(words)]
}
