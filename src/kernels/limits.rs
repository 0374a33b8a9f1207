//! The machine's own limits, measured: how fast it streams memory and multiplies 8-bit integers.
//!
//! Speeds mean something beside these. Decode reads every active weight once a token, so its
//! limit is the read bandwidth; a prompt multiplies each weight with many tokens, so its limit
//! is the peak of the widest 8-bit multiply-add that the CPU has.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::tensor::direct;
use crate::threads::Pool;

/// What the machine can do with a given number of threads.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Streaming read, GB/s (10⁹ bytes).
    pub read_gb_s: f64,
    /// 8-bit multiply-adds, 10⁹ operations a second, a multiply-add counted as two.
    pub int8_gop_s: f64,
}

impl Limits {
    /// Measures both with all threads of `pool`; takes about half a second.
    pub fn measure(pool: &Pool) -> Self {
        Self {
            read_gb_s: read_bandwidth(pool),
            int8_gop_s: int8_peak(pool),
        }
    }

    /// The better of two measurements of each.
    pub fn best(self, other: Self) -> Self {
        Self {
            read_gb_s: self.read_gb_s.max(other.read_gb_s),
            int8_gop_s: self.int8_gop_s.max(other.int8_gop_s),
        }
    }
}

/// Bytes streamed by a bandwidth measurement: far more than any cache holds.
const STREAM: usize = 512 << 20;
/// Bytes that a thread claims at a time, and reads in one stream or in four side by side: on some CPUs one alone does
/// not keep a core's share of the memory's requests under way.
const CHUNK: usize = 4 << 20;

/// GB/s with all threads of `pool`: the best of several passes over a large buffer, by every loop that we know to be
/// fast somewhere; in huge pages, as a file that is in memory has them. (Pages of 4 KiB cost a Zen 4 a third of the speed of
/// one thread.)
pub fn read_bandwidth(pool: &Pool) -> f64 {
    // Ones, so that every page is really there and not the one page of zeros.
    let mut buffer = direct::memory(STREAM).expect("memory for a measurement");
    buffer.fill(1);
    let buffer: &[u64] = bytemuck::cast_slice(&buffer);
    let mut best = Duration::MAX;
    for read in readers() {
        for _ in 0..4 {
            let start = Instant::now();
            pool.run(STREAM / CHUNK, &|chunk| {
                read(&buffer[chunk * (CHUNK / 8)..(chunk + 1) * (CHUNK / 8)]);
            });
            best = best.min(start.elapsed());
        }
    }
    STREAM as f64 / best.as_secs_f64() / 1e9
}

/// Functions that read a chunk.
fn readers() -> Vec<fn(&[u64])> {
    #[allow(unused_mut)]
    let mut readers: Vec<fn(&[u64])> = vec![read_plain::<1>, read_plain::<4>];
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has the feature.
            readers.push(|words| unsafe { x86::read_256(words) });
        }
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the CPU has the feature.
            readers.push(|words| unsafe { x86::read_512(words) });
        }
    }
    readers
}

/// Reads `STREAMS` streams side by side, as wide as the compiler makes it. (A Zen 4 is fastest with one.)
fn read_plain<const STREAMS: usize>(words: &[u64]) {
    let mut seen = [[0u64; 8]; STREAMS];
    let part = words.len() / STREAMS;
    for line in (0..part).step_by(8) {
        for (stream, seen) in seen.iter_mut().enumerate() {
            let words = &words[stream * part + line..][..8];
            for (seen, word) in seen.iter_mut().zip(words) {
                *seen |= word;
            }
        }
    }
    black_box(seen);
}

/// Multiply-adds a thread makes between two looks at the clock.
const ROUNDS: usize = 1 << 20;

/// GOP/s with all threads of `pool`: the best of several bursts.
pub fn int8_peak(pool: &Pool) -> f64 {
    let (burst, operations) = int8_burst();
    let mut best = Duration::MAX;
    for _ in 0..8 {
        let start = Instant::now();
        pool.run(4 * pool.threads(), &|_| burst());
        best = best.min(start.elapsed());
    }
    (4 * pool.threads()) as f64 * operations / best.as_secs_f64() / 1e9
}

/// A burst of the widest 8-bit multiply-adds, and how many operations it makes.
fn int8_burst() -> (fn(), f64) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni") {
            // SAFETY: the CPU has the features.
            return (
                || unsafe { x86::burst_vnni512(ROUNDS) },
                (ROUNDS * 64 * 2) as f64,
            );
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("avxvnni") {
            // SAFETY: the CPU has the features.
            return (
                || unsafe { x86::burst_vnni256(ROUNDS) },
                (ROUNDS * 32 * 2) as f64,
            );
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has the features.
            return (
                || unsafe { x86::burst_avx2(ROUNDS) },
                (ROUNDS * 32 * 2) as f64,
            );
        }
    }
    (burst_scalar, (ROUNDS * 2) as f64)
}

/// Plain multiply-adds, as many at a time as the compiler finds room for.
fn burst_scalar() {
    let mut sums = black_box([1i32; 16]);
    let factors = black_box([3i8; 16]);
    for _ in 0..ROUNDS / 16 {
        for (sum, factor) in sums.iter_mut().zip(factors) {
            *sum = sum.wrapping_mul(i32::from(factor)).wrapping_add(1);
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use crate::kernels::avx2::dpbusd;

    /// How far ahead lines are asked for, in bytes: what measured best on Zen 5. The hardware's own
    /// prefetchers stop at the end of a page.
    const AHEAD: usize = 2048;

    /// Reads 64 bytes at a time in four streams, and asks for lines ahead of them.
    #[target_feature(enable = "avx512f")]
    pub fn read_512(words: &[u64]) {
        let mut seen = [_mm512_setzero_si512(); 8];
        let quarter = words.len() / 4;
        for block in (0..quarter / 16 * 16).step_by(16) {
            for stream in 0..4 {
                let lines = words[stream * quarter + block..][..16].as_chunks::<8>().0;
                for (line, seen) in lines.iter().zip(&mut seen[2 * stream..]) {
                    let line = line.as_ptr();
                    // SAFETY: a line is 64 bytes; a prefetch may name any address.
                    let line = unsafe {
                        _mm_prefetch::<_MM_HINT_T0>(line.cast::<i8>().wrapping_add(AHEAD));
                        _mm512_loadu_si512(line.cast())
                    };
                    *seen = _mm512_or_si512(*seen, line);
                }
            }
        }
        black_box(seen);
    }

    /// The same with 32 bytes at a time.
    #[target_feature(enable = "avx2")]
    pub fn read_256(words: &[u64]) {
        let mut seen = [_mm256_setzero_si256(); 8];
        let quarter = words.len() / 4;
        for block in (0..quarter / 8 * 8).step_by(8) {
            for stream in 0..4 {
                let halves = words[stream * quarter + block..][..8].as_chunks::<4>().0;
                let line = halves.as_ptr().cast::<i8>();
                _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(AHEAD));
                for (half, seen) in halves.iter().zip(&mut seen[2 * stream..]) {
                    // SAFETY: half a line is 32 bytes.
                    let half = unsafe { _mm256_loadu_si256(half.as_ptr().cast()) };
                    *seen = _mm256_or_si256(*seen, half);
                }
            }
        }
        black_box(seen);
    }

    /// Independent sums: enough to hide the latency of two multipliers.
    const SUMS: usize = 16;

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn burst_vnni512(rounds: usize) {
        let (a, b) = (
            black_box(_mm512_set1_epi8(3)),
            black_box(_mm512_set1_epi8(5)),
        );
        let mut sums = [_mm512_setzero_si512(); SUMS];
        for _ in 0..rounds / SUMS {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        black_box(sums);
    }

    /// # Safety
    /// The CPU has AVX-VNNI.
    #[target_feature(enable = "avx2")]
    pub unsafe fn burst_vnni256(rounds: usize) {
        let (a, b) = (
            black_box(_mm256_set1_epi8(3)),
            black_box(_mm256_set1_epi8(5)),
        );
        let mut sums = [_mm256_setzero_si256(); 12];
        for _ in 0..rounds / 12 {
            for sum in &mut sums {
                // SAFETY: the caller's.
                *sum = unsafe { dpbusd(*sum, a, b) };
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx2")]
    pub fn burst_avx2(rounds: usize) {
        let (a, b) = (
            black_box(_mm256_set1_epi8(3)),
            black_box(_mm256_set1_epi8(5)),
        );
        let ones = black_box(_mm256_set1_epi16(1));
        let mut sums = [_mm256_setzero_si256(); 12];
        for _ in 0..rounds / 12 {
            for sum in &mut sums {
                let products = _mm256_maddubs_epi16(a, black_box(b));
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(products, ones));
            }
        }
        black_box(sums);
    }
}
