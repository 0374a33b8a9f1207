//! What the kernels for AVX2 and AVX-512 have in common: how rows are taken, and the scales of
//! super-blocks.

use std::arch::x86_64::*;
use std::sync::OnceLock;

use super::{Activation, STREAMS, Sums};
use crate::quant::{Block, BlockIQ4XS, BlockQ2K, BlockQ3K, BlockQ4K, BlockQ5K, BlockQ6K, F16};
use crate::tensor::Rows;

/// Makes a safe function of a table out of a function that needs the CPU's features.
macro_rules! entry {
    ($inner:expr) => {
        |rows, x, out| {
            // SAFETY: tables are only handed out where the CPU has the features.
            unsafe { $inner(rows, x, out) }
        }
    };
}
pub(super) use entry;

/// `out[r] = dot(row r)`, one row after the other.
#[inline(always)]
pub(super) fn each_row<B: Block>(
    rows: Rows<'_>,
    out: &mut [f32],
    dot: impl Fn([&[B]; 1]) -> [f32; 1],
) {
    for (index, out) in out.iter_mut().enumerate() {
        [*out] = dot([bytemuck::cast_slice(rows.row(index))]);
    }
}

/// `out[t][run][r] = dot(row r of each run, x[t])`: one row of each run at a time, for all tokens while it
/// is in the first cache.
#[inline(always)]
pub(super) fn each_four<B: Block>(
    rows: [Rows<'_>; STREAMS],
    x: &[Activation<'_>],
    out: &mut [Sums],
    dot: impl Fn([&[B]; STREAMS], Activation<'_>) -> [f32; STREAMS],
) {
    for index in 0..rows[0].len() {
        let four = rows.map(|rows| bytemuck::cast_slice(rows.row(index)));
        for (x, out) in x.iter().zip(&mut *out) {
            for (out, sum) in out.iter_mut().zip(dot(four, *x)) {
                out[index] = sum;
            }
        }
    }
}

/// How far ahead of the block in hand dot products ask for memory, in bytes, where `rows` rows are gone through
/// side by side. At the rate of one core this is a little more than what arrives in the time that
/// memory takes to answer; the CPU's own prefetchers stop at the end of each page of 4 KiB. Zen 4 loses lines
/// that it was asked for earlier.
pub(super) fn ahead(rows: usize) -> usize {
    static AHEAD: OnceLock<usize> = OnceLock::new();
    let four = *AHEAD.get_or_init(|| if is_zen_4() { 384 } else { 2048 });
    if rows == 1 { 2 * four } else { four }
}

/// Whether this is AMD's family 19h with AVX-512.
fn is_zen_4() -> bool {
    let vendor = __cpuid(0);
    let amd = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes)
        == [*b"Auth", *b"enti", *b"cAMD"];
    let signature = __cpuid(1).eax;
    let family = (signature >> 8 & 0xf) + (signature >> 20 & 0xff);
    amd && family == 0x19 && is_x86_feature_detected!("avx512f")
}

/// Asks for what lies `ahead` bytes after `block`, as long as the block is: once for each whole line of it. Another
/// one for what is left would ask for most lines twice, which costs a Zen 4 a tenth of the speed; those that
/// are missed its own prefetchers bring.
#[inline(always)]
pub(super) fn prefetch<T>(block: &T, ahead: usize) {
    let start = std::ptr::from_ref(block).cast::<i8>();
    let start = start.wrapping_add(ahead);
    let lines = const {
        if size_of::<T>() < 64 {
            1
        } else {
            size_of::<T>() / 64
        }
    };
    for line in 0..lines {
        let at = line * size_of::<T>() / lines;
        // SAFETY: a prefetch reads nothing and may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(at)) };
    }
}

/// A block of 256 weights with scales (and, perhaps, minima) in units of its own.
pub(super) trait SuperBlock: Block {
    /// Whether there are minima.
    const MINIMA: bool = false;

    /// The unit of the scales.
    fn d(&self) -> F16;

    /// The unit of the minima.
    fn dmin(&self) -> F16 {
        F16::default()
    }

    /// Scale and minimum of each 16 columns, as signed bytes.
    ///
    /// # Safety
    /// The CPU has AVX2.
    unsafe fn scales_and_minima(&self) -> (__m128i, __m128i);
}

impl SuperBlock for BlockQ2K {
    const MINIMA: bool = true;

    #[inline]
    fn d(&self) -> F16 {
        self.d
    }

    #[inline]
    fn dmin(&self) -> F16 {
        self.dmin
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn scales_and_minima(&self) -> (__m128i, __m128i) {
        let both = load_16(&self.scales);
        let nibble = _mm_set1_epi8(15);
        let minima = _mm_and_si128(_mm_srli_epi16::<4>(both), nibble);
        (_mm_and_si128(both, nibble), minima)
    }
}

impl SuperBlock for BlockQ3K {
    #[inline]
    fn d(&self) -> F16 {
        self.d
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn scales_and_minima(&self) -> (__m128i, __m128i) {
        let (low, high) = low_8_high_4(&self.scales.0);
        let two = |bits: u32| u64::from(bits & 0x0303_0303) << 4;
        let first = low & NIBBLES | two(high) | two(high >> 2) << 32;
        let second = low >> 4 & NIBBLES | two(high >> 4) | two(high >> 6) << 32;
        let stored = _mm_set_epi64x(second as i64, first as i64);
        (_mm_sub_epi8(stored, _mm_set1_epi8(32)), _mm_setzero_si128())
    }
}

impl SuperBlock for BlockQ4K {
    const MINIMA: bool = true;

    #[inline]
    fn d(&self) -> F16 {
        self.d
    }

    #[inline]
    fn dmin(&self) -> F16 {
        self.dmin
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn scales_and_minima(&self) -> (__m128i, __m128i) {
        eight_scales_and_minima(&self.scales.0)
    }
}

impl SuperBlock for BlockQ5K {
    const MINIMA: bool = true;

    #[inline]
    fn d(&self) -> F16 {
        self.d
    }

    #[inline]
    fn dmin(&self) -> F16 {
        self.dmin
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn scales_and_minima(&self) -> (__m128i, __m128i) {
        eight_scales_and_minima(&self.scales.0)
    }
}

impl SuperBlock for BlockQ6K {
    #[inline]
    fn d(&self) -> F16 {
        self.d
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn scales_and_minima(&self) -> (__m128i, __m128i) {
        let scales = load_16(bytemuck::cast_ref(&self.scales));
        (scales, _mm_setzero_si128())
    }
}

impl SuperBlock for BlockIQ4XS {
    #[inline]
    fn d(&self) -> F16 {
        self.d
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn scales_and_minima(&self) -> (__m128i, __m128i) {
        let stored = _mm_cvtsi64_si128(self.stored_scales() as i64);
        let scales = _mm_sub_epi8(stored, _mm_set1_epi8(32));
        (_mm_unpacklo_epi8(scales, scales), _mm_setzero_si128())
    }
}

const NIBBLES: u64 = 0x0f0f_0f0f_0f0f_0f0f;

/// The eight scales and eight minima of Q4_K and Q5_K, each twice: they cover 32 columns.
#[inline]
#[target_feature(enable = "avx2")]
fn eight_scales_and_minima(packed: &[u8; 12]) -> (__m128i, __m128i) {
    // Bytes 0 to 3 are scales, 4 to 7 minima: of the first four sub-blocks in the low six bits,
    // of the others two bits at the top, their nibbles being in bytes 8 to 11.
    let (low, nibbles) = low_8_high_4(packed);
    let nibbles = u64::from(nibbles) | u64::from(nibbles) << 28;
    let first = low & 0x3f3f_3f3f_3f3f_3f3f;
    let others = low >> 2 & 0x3030_3030_3030_3030 | nibbles & NIBBLES;
    let (first, others) = (
        _mm_cvtsi64_si128(first as i64),
        _mm_cvtsi64_si128(others as i64),
    );
    let all = _mm_unpacklo_epi32(first, others);
    (_mm_unpacklo_epi8(all, all), _mm_unpackhi_epi8(all, all))
}

#[inline]
fn low_8_high_4(bytes: &[u8; 12]) -> (u64, u32) {
    let [a, b, c] = bytemuck::cast::<[u8; 12], [[u8; 4]; 3]>(*bytes).map(u32::from_le_bytes);
    (u64::from(a) | u64::from(b) << 32, c)
}

/// A half's bits.
#[inline]
pub(super) fn half_bits(half: F16) -> u16 {
    u16::from_le_bytes(bytemuck::cast(half))
}

/// A half in 8 lanes of f32.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn broadcast_f16(half: F16) -> __m256 {
    _mm256_cvtph_ps(_mm_set1_epi16(half_bits(half) as i16))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load_16(from: &[u8; 16]) -> __m128i {
    // SAFETY: the array is as long as the register, and the load takes any alignment.
    unsafe { _mm_loadu_si128(from.as_ptr().cast()) }
}
