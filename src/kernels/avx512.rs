//! AVX-512 (F, BW, VL, VNNI): 64 codes a register.
//!
//! ```text
//! codes     64 × 8 bit, without sign     q      64 × 8 bit, signed
//!      └── vpdpbusd: 16 sums of 4 products, 32 bit, on top of − offset · Σ q ──┘
//!          cvt, fma with (weight scale · activation scale): 16 lanes of f32
//! ```
//!
//! `vpdpbusd` wants one side without a sign and cannot saturate: all weights are taken without
//! one, too large by an offset, and the offset's share is taken off where the sum starts.
//!
//! Small blocks come in pairs. The last block of a row with an odd number of them is paired with
//! a block of zeros that meets activations of zero.
//!
//! Dot products of floats are those of AVX2: they wait for memory.

use std::arch::x86_64::*;

use bytemuck::Zeroable;

use super::x86::{SuperBlock, each_four, each_row, entry, half_bits, load_16, prefetch_ahead};
use super::{
    Activation, DotRows, DotStreams, Kernels, STREAMS, Sums, Tile, avx2, avx512_tiles, floats,
};
use crate::quant::{
    Block, BlockIQ4NL, BlockIQ4XS, BlockMXFP4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K,
    BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, BlockType, F16, IQ4_VALUES, MXFP4_DOUBLED,
};
use crate::tensor::Rows;

static KERNELS: Kernels = Kernels {
    name: "avx512",
    dot,
    dot_streams,
    tile,
    exact: avx2::exact,
    exact_tile,
    add_loud: avx2::add_loud,
    quantize: avx2::quantize,
    floats: &floats::AVX512,
};

/// The AVX-512 table, if this CPU can run it.
pub fn kernels() -> Option<&'static Kernels> {
    let runs = avx2::kernels().is_some()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni");
    runs.then_some(&KERNELS)
}

fn dot(kind: BlockType) -> DotRows {
    match kind {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => avx2::exact(kind),
        BlockType::Q4_0 => entry!(dot_blocks::<BlockQ4_0>),
        BlockType::Q4_1 => entry!(dot_blocks::<BlockQ4_1>),
        BlockType::Q5_0 => entry!(dot_blocks::<BlockQ5_0>),
        BlockType::Q5_1 => entry!(dot_blocks::<BlockQ5_1>),
        BlockType::Q8_0 => entry!(dot_blocks::<BlockQ8_0>),
        BlockType::IQ4_NL => entry!(dot_blocks::<BlockIQ4NL>),
        BlockType::MXFP4 => entry!(dot_blocks::<BlockMXFP4>),
        BlockType::Q2_K => entry!(dot_super_blocks::<BlockQ2K>),
        BlockType::Q3_K => entry!(dot_super_blocks::<BlockQ3K>),
        BlockType::Q4_K => entry!(dot_super_blocks::<BlockQ4K>),
        BlockType::Q5_K => entry!(dot_super_blocks::<BlockQ5K>),
        BlockType::Q6_K => entry!(dot_super_blocks::<BlockQ6K>),
        BlockType::IQ4_XS => entry!(dot_super_blocks::<BlockIQ4XS>),
    }
}

fn dot_streams(kind: BlockType) -> Option<DotStreams> {
    Some(match kind {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => return None,
        BlockType::Q4_0 => entry!(stream_blocks::<BlockQ4_0>),
        BlockType::Q4_1 => entry!(stream_blocks::<BlockQ4_1>),
        BlockType::Q5_0 => entry!(stream_blocks::<BlockQ5_0>),
        BlockType::Q5_1 => entry!(stream_blocks::<BlockQ5_1>),
        BlockType::Q8_0 => entry!(stream_blocks::<BlockQ8_0>),
        BlockType::IQ4_NL => entry!(stream_blocks::<BlockIQ4NL>),
        BlockType::MXFP4 => entry!(stream_blocks::<BlockMXFP4>),
        BlockType::Q2_K => entry!(stream_super_blocks::<BlockQ2K>),
        BlockType::Q3_K => entry!(stream_super_blocks::<BlockQ3K>),
        BlockType::Q4_K => entry!(stream_super_blocks::<BlockQ4K>),
        BlockType::Q5_K => entry!(stream_super_blocks::<BlockQ5K>),
        BlockType::Q6_K => entry!(stream_super_blocks::<BlockQ6K>),
        BlockType::IQ4_XS => entry!(stream_super_blocks::<BlockIQ4XS>),
    })
}

fn tile(kind: BlockType) -> Option<Tile> {
    avx512_tiles::tile(kind).or_else(|| exact_tile(kind))
}

/// The tile product in f32.
fn exact_tile(_: BlockType) -> Option<Tile> {
    Some(entry!(avx2::tile_512))
}

/// Two small blocks of a row, of which 64 codes are made.
trait Pair: Block {
    /// The codes are this much too large.
    const OFFSET: u8;
    /// Whether there is a minimum.
    const MINIMUM: bool = false;

    /// The codes of both, in the order of the columns.
    ///
    /// # Safety
    /// The CPU has AVX-512 F, BW and VL.
    unsafe fn codes(pair: &[Self; 2]) -> __m512i;

    /// The two scales, in lanes 0 and 1.
    ///
    /// # Safety
    /// The CPU has F16C.
    unsafe fn scales(pair: &[Self; 2]) -> __m128;

    /// The two minima's negatives, in lanes 0 and 1, the others being 0.
    ///
    /// # Safety
    /// The CPU has F16C.
    unsafe fn offsets(_pair: &[Self; 2]) -> __m128 {
        __m128::zeroed()
    }
}

/// A super-block of which 64 codes at a time are made.
trait Quarters: SuperBlock {
    /// The codes are this much too large.
    const OFFSET: u8;

    /// The codes of columns `64·quarter..64·quarter + 64`, in order.
    ///
    /// # Safety
    /// The CPU has AVX-512 F, BW and VL.
    unsafe fn codes(&self, quarter: usize) -> __m512i;
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn dot_blocks<B: Pair>(rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
    each_row::<B>(rows, out, |row| pairs(row, x));
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn stream_blocks<B: Pair>(rows: [Rows<'_>; STREAMS], x: &[Activation<'_>], out: &mut [Sums]) {
    each_four::<B>(rows, x, out, |four, x| pairs(four, x));
}

/// Dots rows of small blocks, side by side, with an activation.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn pairs<B: Pair, const N: usize>(rows: [&[B]; N], x: Activation<'_>) -> [f32; N] {
    let mut acc = [[_mm512_setzero_ps(); 2]; N];
    let (q, q_rest) = x.q.as_chunks::<64>();
    let (s, s_rest) = x.scales.as_chunks::<2>();
    let (sums, sums_rest) = x.sums.as_chunks::<4>();
    let n = q.len();
    let (s, sums) = (&s[..n], &sums[..n]);
    let rows_pairs = rows.map(|row| &row.as_chunks::<2>().0[..n]);
    for i in 0..n {
        for (acc, row) in acc.iter_mut().zip(rows_pairs) {
            prefetch_ahead::<N, _>(&row[i]);
            // Pairs take turns at the accumulators.
            *acc = [acc[1], add_pair(acc[0], &row[i], &q[i], &s[i], &sums[i])];
        }
    }
    if let [s] = s_rest {
        let (mut q, mut sums) = ([0; 64], [0; 4]);
        q[..32].copy_from_slice(q_rest);
        sums[..2].copy_from_slice(sums_rest);
        for (acc, row) in acc.iter_mut().zip(rows) {
            acc[0] = add_pair(acc[0], &[row[2 * n], B::zeroed()], &q, &[*s, 0.0], &sums);
        }
    }
    acc.map(|acc| _mm512_reduce_add_ps(_mm512_add_ps(acc[0], acc[1])))
}

/// Adds the dot product of a pair.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn add_pair<B: Pair>(
    acc: __m512,
    pair: &[B; 2],
    q: &[i8; 64],
    s: &[f32; 2],
    sums: &[i16; 4],
) -> __m512 {
    let q = load_i8(q);
    // SAFETY: this function has the features.
    let (codes, scales) = unsafe { (B::codes(pair), B::scales(pair)) };
    let s = _mm_castsi128_ps(_mm_cvtsi64_si128(bytemuck::cast(*s)));
    let scales = _mm512_castps128_ps512(_mm_mul_ps(scales, s));
    let each_eight = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    let scales = _mm512_permutexvar_ps(each_eight, scales);
    let dot = _mm512_dpbusd_epi32(start_of_sums(B::OFFSET, q), codes, q);
    let acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scales, acc);
    if !B::MINIMUM {
        return acc;
    }
    // The sums of a block's codes, in lanes 0 and 1, the others being 0.
    let sums = _mm_cvtsi64_si128(bytemuck::cast(*sums));
    let sums = _mm_cvtepi32_ps(_mm_madd_epi16(sums, _mm_set1_epi16(1)));
    // SAFETY: this function has the features.
    let offsets = unsafe { B::offsets(pair) };
    let s_sums = _mm512_zextps128_ps512(_mm_mul_ps(sums, s));
    _mm512_fmadd_ps(_mm512_zextps128_ps512(offsets), s_sums, acc)
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn dot_super_blocks<B: Quarters>(rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
    each_row::<B>(rows, out, |row| super_blocks(row, x));
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn stream_super_blocks<B: Quarters>(
    rows: [Rows<'_>; STREAMS],
    x: &[Activation<'_>],
    out: &mut [Sums],
) {
    each_four::<B>(rows, x, out, |four, x| super_blocks(four, x));
}

/// Dots rows of super-blocks, side by side, with an activation.
///
/// A super-block's 16 scales, one for 16 columns, are made in one register, times those of the
/// activations. The 16 lanes of a quarter's dot product take one for each 4 lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn super_blocks<B: Quarters, const N: usize>(rows: [&[B]; N], x: Activation<'_>) -> [f32; N] {
    let mut acc = [[_mm512_setzero_ps(); 2]; N];
    let (q, _) = x.q.as_chunks::<256>();
    let (scales, _) = x.scales.as_chunks::<8>();
    let (sums, _) = x.sums.as_chunks::<16>();
    let n = q.len();
    let (scales, sums) = (&scales[..n], &sums[..n]);
    let rows = rows.map(|row| &row[..n]);
    let each_twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    let each_four = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    for i in 0..n {
        let (q, _) = q[i].as_chunks::<64>();
        let s = _mm512_permutexvar_ps(each_twice, _mm512_castps256_ps512(load_f32(&scales[i])));
        let sums = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(load_i16(&sums[i])));
        let sums = _mm512_mul_ps(sums, s);
        // A loop over the rows would not be unrolled, and would keep the accumulators in memory.
        macro_rules! add {
            ($($r:literal)*) => {$(if $r < N {
                let (acc, block) = (&mut acc[$r], &rows[$r][i]);
                prefetch_ahead::<N, _>(block);
                // SAFETY: this function has the features.
                let (scales, minima) = unsafe { block.scales_and_minima() };
                let scales = _mm512_mul_ps(in_units(block.d(), scales), s);
                for k in 0..4 {
                    let q = load_i8(&q[k]);
                    // SAFETY: this function has the features.
                    let codes = unsafe { block.codes(k) };
                    let dot = _mm512_dpbusd_epi32(start_of_sums(B::OFFSET, q), codes, q);
                    let lanes = _mm512_add_epi32(each_four, _mm512_set1_epi32(4 * k as i32));
                    let scale = _mm512_permutexvar_ps(lanes, scales);
                    acc[k % 2] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, acc[k % 2]);
                }
                if B::MINIMA {
                    acc[0] = _mm512_fnmadd_ps(in_units(block.dmin(), minima), sums, acc[0]);
                }
            })*};
        }
        add!(0 1 2 3);
    }
    acc.map(|[a, b]| _mm512_reduce_add_ps(_mm512_add_ps(a, b)))
}

/// Where the sums of products start, so that codes may be too large: `−offset · Σ q` over the
/// 4 columns of each lane.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn start_of_sums(offset: u8, q: __m512i) -> __m512i {
    let zero = _mm512_setzero_si512();
    if offset == 0 {
        return zero;
    }
    let offset = _mm512_set1_epi8(offset as i8);
    _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, offset, q))
}

/// Sixteen signed bytes times a unit.
#[inline]
#[target_feature(enable = "avx2,avx512f")]
fn in_units(unit: F16, bytes: __m128i) -> __m512 {
    let unit = _mm512_cvtph_ps(_mm256_set1_epi16(half_bits(unit) as i16));
    _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), unit)
}

macro_rules! load {
    ($($name:ident: $from:ty => $to:ty, $intrinsic:ident;)*) => {$(
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
        fn $name(from: &$from) -> $to {
            // SAFETY: the array is as long as the register, and the load takes any alignment.
            unsafe { $intrinsic(from.as_ptr().cast()) }
        }
    )*};
}

load! {
    load_u8: [u8; 64] => __m512i, _mm512_loadu_si512;
    load_i8: [i8; 64] => __m512i, _mm512_loadu_si512;
    load_i8_32: [i8; 32] => __m256i, _mm256_loadu_si256;
    load_u8_32: [u8; 32] => __m256i, _mm256_loadu_si256;
    load_i16: [i16; 16] => __m256i, _mm256_loadu_si256;
    load_f32: [f32; 8] => __m256, _mm256_loadu_ps;
}

// Codes, type by type.

/// `low` in each word of the lower half, `high` in each of the upper: how far the two stripes
/// of a quarter are shifted.
#[inline]
#[target_feature(enable = "avx512f")]
fn by_halves(low: i16, high: i16) -> __m512i {
    let low = _mm256_set1_epi16(low);
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), _mm256_set1_epi16(high))
}

/// Stripe `index` of packed bytes, 32 to a stripe, in both halves.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn twice(bytes: &[u8], index: usize) -> __m512i {
    _mm512_broadcast_i64x4(load_u8_32(&bytes.as_chunks().0[index]))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn masked(bytes: __m512i, mask: u8) -> __m512i {
    _mm512_and_si512(bytes, _mm512_set1_epi8(mask as i8))
}

/// The low nibbles of 16 bytes, then the high ones; of `a`, then of `b`.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw")]
fn nibbles(a: &[u8; 16], b: &[u8; 16]) -> __m512i {
    let both = _mm512_castsi256_si512(_mm256_set_m128i(load_16(b), load_16(a)));
    let each_twice = _mm512_shuffle_i64x2::<0b01_01_00_00>(both, both);
    let shifts = _mm512_setr_epi64(
        0,
        0,
        0x0004_0004_0004_0004,
        0x0004_0004_0004_0004,
        0,
        0,
        0x0004_0004_0004_0004,
        0x0004_0004_0004_0004,
    );
    masked(_mm512_srlv_epi16(each_twice, shifts), 15)
}

/// Adds 16 to each code whose bit is set.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn with_fifth_bits(codes: __m512i, a: [u8; 4], b: [u8; 4]) -> __m512i {
    let bits = u64::from(u32::from_le_bytes(a)) | u64::from(u32::from_le_bytes(b)) << 32;
    _mm512_mask_add_epi8(codes, bits, codes, _mm512_set1_epi8(16))
}

/// Adds `value` to each code of quarter `k` whose bit is set: bit `j` of byte `l` belongs to
/// column `l` of stripe `j`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn with_stripe_bits(codes: __m512i, bits: &[u8; 32], k: usize, value: i8) -> __m512i {
    let bit = |j: usize| i16::from_le_bytes([1 << j; 2]);
    let set = _mm512_test_epi8_mask(twice(bits, 0), by_halves(bit(2 * k), bit(2 * k + 1)));
    _mm512_mask_add_epi8(codes, set, codes, _mm512_set1_epi8(value))
}

/// A table of values for four bits, each plus 128.
type Table = [u8; 16];

const IQ4: Table = plus_128(&IQ4_VALUES);
const MXFP4: Table = plus_128(&MXFP4_DOUBLED);

const fn plus_128(values: &[i8; 16]) -> Table {
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
fn look_up(table: &Table, levels: __m512i) -> __m512i {
    _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load_16(table)), levels)
}

/// Two halves in lanes 0 and 1.
#[inline]
#[target_feature(enable = "f16c")]
fn two_halves(a: F16, b: F16) -> __m128 {
    let both = u32::from(half_bits(a)) | u32::from(half_bits(b)) << 16;
    _mm_cvtph_ps(_mm_cvtsi32_si128(both as i32))
}

macro_rules! pair {
    ($($block:ty, $offset:literal, |$a:ident, $b:ident| $codes:expr, $scales:expr
        $(, offsets $offsets:expr)?;)*) => {$(
        impl Pair for $block {
            const OFFSET: u8 = $offset;

            #[inline]
            #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl")]
            unsafe fn codes([$a, $b]: &[Self; 2]) -> __m512i {
                $codes
            }

            #[inline]
            #[target_feature(enable = "f16c")]
            unsafe fn scales([$a, $b]: &[Self; 2]) -> __m128 {
                $scales
            }

            $(
                const MINIMUM: bool = true;

                #[inline]
                #[target_feature(enable = "f16c")]
                unsafe fn offsets([$a, $b]: &[Self; 2]) -> __m128 {
                    $offsets
                }
            )?
        }
    )*};
}

pair! {
    BlockQ4_0, 8, |a, b| nibbles(&a.qs, &b.qs), two_halves(a.d, b.d);
    BlockQ4_1, 0, |a, b| nibbles(&a.qs, &b.qs), two_halves(a.d, b.d),
        offsets two_halves(a.m, b.m);
    BlockQ5_0, 16, |a, b| with_fifth_bits(nibbles(&a.qs, &b.qs), a.qh, b.qh),
        two_halves(a.d, b.d);
    BlockQ5_1, 0, |a, b| with_fifth_bits(nibbles(&a.qs, &b.qs), a.qh, b.qh),
        two_halves(a.d, b.d), offsets two_halves(a.m, b.m);
    BlockQ8_0, 128, |a, b| eight_bits(&a.qs, &b.qs), two_halves(a.d, b.d);
    BlockIQ4NL, 128, |a, b| look_up(&IQ4, nibbles(&a.qs, &b.qs)), two_halves(a.d, b.d);
    BlockMXFP4, 128, |a, b| look_up(&MXFP4, nibbles(&a.qs, &b.qs)),
        _mm_setr_ps(a.scale(), b.scale(), 0.0, 0.0);
}

/// Signed codes of two blocks, each plus 128.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn eight_bits(a: &[i8; 32], b: &[i8; 32]) -> __m512i {
    let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(load_i8_32(a)), load_i8_32(b));
    _mm512_xor_si512(both, _mm512_set1_epi8(-128))
}

macro_rules! quarters {
    ($($block:ty, $offset:literal, |$b:ident, $k:ident| $codes:expr;)*) => {$(
        impl Quarters for $block {
            const OFFSET: u8 = $offset;

            #[inline]
            #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl")]
            unsafe fn codes(&self, $k: usize) -> __m512i {
                let $b = self;
                $codes
            }
        }
    )*};
}

quarters! {
    BlockQ2K, 0, |b, k| two_bits(&b.qs, k);
    BlockQ3K, 4, |b, k| with_stripe_bits(two_bits(&b.qs, k), &b.hmask, k, 4);
    BlockQ4K, 0, |b, k| four_bits(&b.qs, k);
    BlockQ5K, 0, |b, k| with_stripe_bits(four_bits(&b.qs, k), &b.qh, k, 16);
    BlockQ6K, 32, |b, k| six_bits(&b.ql, &b.qh, k);
    BlockIQ4XS, 128, |b, k| look_up(&IQ4, nibbles(&b.qs[2 * k], &b.qs[2 * k + 1]));
}

/// Quarter `k` where four stripes share 32 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn two_bits(qs: &[u8; 64], k: usize) -> __m512i {
    let shift = (k % 2 * 4) as i16;
    masked(
        _mm512_srlv_epi16(twice(qs, k / 2), by_halves(shift, shift + 2)),
        3,
    )
}

/// Quarter `k` where two stripes share 32 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn four_bits(qs: &[u8; 128], k: usize) -> __m512i {
    masked(_mm512_srlv_epi16(twice(qs, k), by_halves(0, 4)), 15)
}

/// Quarter `k` of Q6_K: nibbles of two neighbouring stripes, and their upper two bits where
/// four stripes share 32 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn six_bits(ql: &[u8; 128], qh: &[u8; 64], k: usize) -> __m512i {
    let (low, high) = (load_u8(&ql.as_chunks().0[k / 2]), twice(qh, k / 2));
    let (low, high) = if k.is_multiple_of(2) {
        (low, _mm512_sllv_epi16(high, by_halves(4, 2)))
    } else {
        (
            _mm512_srli_epi16::<4>(low),
            _mm512_srlv_epi16(high, by_halves(0, 2)),
        )
    };
    _mm512_or_si512(masked(low, 15), masked(high, 0x30))
}
