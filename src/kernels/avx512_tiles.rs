//! Tile products for AVX-512 (F, BW, VL, VNNI): see [`super::tiles`] for the idea.
//!
//! A register holds four columns of 16 rows, so a tile is two registers wide. Against them go
//! [`TOKENS`] tokens, whose sums stay in registers while 32 columns pass:
//!
//! ```text
//!               rows 0–15   rows 16–31      12 sums of products  (integers)
//! token 0  q ──► vpdpbusd    vpdpbusd       12 sums of terms     (f32)
//!   …                                        2 registers of codes, 1 of q broadcast
//! token 5  q ──► vpdpbusd    vpdpbusd
//! ```
//!
//! Each load of codes serves six products and each broadcast two, which is less than the two
//! loads a cycle that the multipliers of the fastest cores leave room for.

use std::arch::x86_64::*;
use std::ops::Range;

use super::Activation;
use super::activations::{SCALE_LEN, SUM_LEN};
use super::avx512_panels::Fill;
use super::tiles::{
    Fours, Panel, STRETCH, TILE_ROWS, Tile, each_stretch, has_fine_scales, has_minima, offset,
};
use crate::quant::{
    BlockIQ4NL, BlockIQ4XS, BlockMXFP4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K,
    BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, BlockType,
};
use crate::tensor::Rows;

/// Tokens that are multiplied at a time.
const TOKENS: usize = 6;
/// Activation scales in a stretch.
const SCALES: usize = STRETCH / SCALE_LEN;
/// Sums of activations in a stretch.
const SUMS: usize = STRETCH / SUM_LEN;

/// The tile product for a type, if it is one of integers.
pub(super) fn tile(kind: BlockType) -> Option<Tile> {
    macro_rules! entry {
        ($block:ty) => {
            Some(|rows, x, out| {
                // SAFETY: tables are only handed out where the CPU has the features.
                unsafe { tile_rows::<$block>(rows, x, out) }
            })
        };
    }
    match kind {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => None,
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

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn tile_rows<B: Fill>(rows: Rows<'_>, x: &[Activation<'_>], out: &mut [[f32; TILE_ROWS]]) {
    let multiply = match (has_fine_scales(B::TYPE), has_minima(B::TYPE)) {
        (false, false) => multiply::<1, false>,
        (false, true) => multiply::<1, true>,
        (true, false) => multiply::<2, false>,
        (true, true) => multiply::<2, true>,
    };
    each_stretch::<B>(
        rows,
        out,
        // SAFETY: this function has the features.
        |panel, stretch| unsafe { B::fill(panel, stretch) },
        |panel, columns, out| multiply(panel, offset(B::TYPE), &columns, x, out),
    );
}

/// Adds the products of a panel with all tokens; a weight scale covers `32 / FINE` columns.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn multiply<const FINE: usize, const MINIMA: bool>(
    panel: &Panel,
    offset: u8,
    columns: &Range<usize>,
    x: &[Activation<'_>],
    out: &mut [[f32; TILE_ROWS]],
) {
    let mut factors = [[Factors::ZERO; TOKENS]; 2];
    let fill = |index: usize, factors: &mut [Factors; TOKENS]| {
        for (factors, x) in factors.iter_mut().zip(x.iter().skip(index * TOKENS)) {
            factors.fill::<FINE, MINIMA>(x, offset, columns);
        }
    };
    fill(0, &mut factors[0]);
    for (index, (x, out)) in x.chunks(TOKENS).zip(out.chunks_mut(TOKENS)).enumerate() {
        // One block ahead: what was just stored is slow to be broadcast.
        fill(index + 1, &mut factors[(index + 1) % 2]);
        let factors = &factors[index % 2];
        macro_rules! with {
            ($($tokens:literal)*) => {
                match x.len() {
                    $($tokens => {
                        let mut q = [&[][..]; $tokens];
                        for (q, x) in q.iter_mut().zip(x) {
                            *q = x.q[columns.clone()].as_chunks::<SCALE_LEN>().0;
                        }
                        let (factors, _) = factors.split_first_chunk().expect("as many");
                        let out = out.try_into().expect("as many");
                        block::<$tokens, FINE, MINIMA>(panel, factors, q, out)
                    })*
                    _ => unreachable!("blocks hold up to six tokens"),
                }
            };
        }
        with!(1 2 3 4 5 6);
    }
}

/// What a token's stretch is multiplied with beside its codes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Factors {
    /// `−offset · Σ q` for each weight scale.
    starts: [i32; SUMS],
    /// `s · Σ q` for each minimum.
    s_sums: [f32; SUMS],
    /// The scales.
    s: [f32; SCALES],
}

impl Factors {
    const ZERO: Self = Self {
        starts: [0; SUMS],
        s_sums: [0.0; SUMS],
        s: [0.0; SCALES],
    };

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    fn fill<const FINE: usize, const MINIMA: bool>(
        &mut self,
        x: &Activation<'_>,
        offset: u8,
        columns: &Range<usize>,
    ) {
        let scales = &x.scales[columns.start / SCALE_LEN..columns.end / SCALE_LEN];
        let sums = &x.sums[columns.start / SUM_LEN..columns.end / SUM_LEN];
        let mut some_sums = [0; SUMS];
        let sums = match (scales.first_chunk(), sums.first_chunk()) {
            (Some(scales), Some(sums)) => {
                self.s = *scales;
                sums
            }
            _ => {
                self.s[..scales.len()].copy_from_slice(scales);
                some_sums[..sums.len()].copy_from_slice(sums);
                &some_sums
            }
        };
        // SAFETY: the arrays are as long as the registers, and the loads take any alignment.
        let (s, sums) = unsafe {
            (
                _mm256_loadu_ps(self.s.as_ptr()),
                _mm256_loadu_si256(sums.as_ptr().cast()),
            )
        };
        // 16 sums over 16 columns, or 8 over 32.
        let (sums, s) = if FINE == 2 {
            let each_twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
            let s = _mm512_permutexvar_ps(each_twice, _mm512_castps256_ps512(s));
            (_mm512_cvtepi16_epi32(sums), s)
        } else {
            let sums = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
            (_mm512_zextsi256_si512(sums), _mm512_zextps256_ps512(s))
        };
        let starts = _mm512_mullo_epi32(sums, _mm512_set1_epi32(-i32::from(offset)));
        // SAFETY: as above.
        unsafe { _mm512_storeu_si512(self.starts.as_mut_ptr().cast(), starts) };
        if MINIMA {
            let s_sums = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), s);
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(self.s_sums.as_mut_ptr(), s_sums) };
        }
    }
}

/// The innermost loops, for `T` tokens.
#[inline(never)] // so that the compiler leaves the factors in memory, where they are broadcast from
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn block<const T: usize, const FINE: usize, const MINIMA: bool>(
    panel: &Panel,
    factors: &[Factors; T],
    q: [&[[i8; SCALE_LEN]]; T],
    out: &mut [[f32; TILE_ROWS]; T],
) {
    let mut sums = [[_mm512_setzero_ps(); 2]; T];
    for t in 0..T {
        sums[t] = load_two(&out[t]);
    }
    let codes = panel.codes.as_chunks::<{ SCALE_LEN / 4 }>().0.iter();
    let scales = panel.scales.as_chunks::<FINE>().0.iter();
    let minima = panel.minima.as_chunks::<FINE>().0.iter();
    for (g, ((codes, scales), minima)) in codes.zip(scales).zip(minima).take(q[0].len()).enumerate()
    {
        let mut terms = [[_mm512_setzero_ps(); 2]; T];
        for half in 0..FINE {
            let mut dots = [[_mm512_setzero_si512(); 2]; T];
            for t in 0..T {
                // SAFETY: there are `FINE` starts a group, and no more groups than in a stretch.
                let start = unsafe { *factors[t].starts.get_unchecked(g * FINE + half) };
                dots[t] = [_mm512_set1_epi32(start); 2];
            }
            for k in half * 8 / FINE..(half + 1) * 8 / FINE {
                let codes = load_codes(&codes[k]);
                for t in 0..T {
                    // SAFETY: all tokens have as many groups.
                    let q: &[[i8; 4]; 8] = bytemuck::cast_ref(unsafe { q[t].get_unchecked(g) });
                    let four = _mm512_set1_epi32(bytemuck::cast(q[k]));
                    dots[t][0] = _mm512_dpbusd_epi32(dots[t][0], codes[0], four);
                    dots[t][1] = _mm512_dpbusd_epi32(dots[t][1], codes[1], four);
                }
            }
            let scales = load_two(&scales[half]);
            for t in 0..T {
                for b in 0..2 {
                    let dot = _mm512_cvtepi32_ps(dots[t][b]);
                    terms[t][b] = if half == 0 {
                        _mm512_mul_ps(dot, scales[b])
                    } else {
                        _mm512_fmadd_ps(dot, scales[b], terms[t][b])
                    };
                }
            }
        }
        for t in 0..T {
            // SAFETY: no more groups than in a stretch.
            let s = _mm512_set1_ps(unsafe { *factors[t].s.get_unchecked(g) });
            for b in 0..2 {
                sums[t][b] = _mm512_fmadd_ps(terms[t][b], s, sums[t][b]);
            }
        }
        if MINIMA {
            for half in 0..FINE {
                let minima = load_two(&minima[half]);
                for t in 0..T {
                    // SAFETY: as for the starts.
                    let s_sum = unsafe { *factors[t].s_sums.get_unchecked(g * FINE + half) };
                    for b in 0..2 {
                        sums[t][b] = _mm512_fnmadd_ps(minima[b], _mm512_set1_ps(s_sum), sums[t][b]);
                    }
                }
            }
        }
    }
    for t in 0..T {
        // SAFETY: both halves lie in the array, and the store takes any alignment.
        unsafe {
            _mm512_storeu_ps(out[t].as_mut_ptr(), sums[t][0]);
            _mm512_storeu_ps(out[t].as_mut_ptr().add(16), sums[t][1]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_two(from: &[f32; TILE_ROWS]) -> [__m512; 2] {
    // SAFETY: both halves lie in the array, and the load takes any alignment.
    unsafe {
        [
            _mm512_loadu_ps(from.as_ptr()),
            _mm512_loadu_ps(from.as_ptr().add(16)),
        ]
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_codes(from: &Fours) -> [__m512i; 2] {
    // SAFETY: both halves lie in the array, and the load takes any alignment.
    unsafe {
        [
            _mm512_loadu_si512(from.as_ptr().cast()),
            _mm512_loadu_si512(from.as_ptr().add(16).cast()),
        ]
    }
}
