//! What works on floats between the matrix products, and the table of it that an instruction set has.
//!
//! `eˣ` is computed as ever: `x = n · ln 2 + r` with a whole `n` and `|r| ≤ ln 2 / 2`, a polynomial for
//! `eʳ`, and `n` added to its exponent. The polynomial is `1 + r + r² · p(r)` with the coefficients of
//! `p` that minimise the greatest relative error (Remez exchange: 3e-9, a twentieth of a rounding).

use super::attention::{self, Head, Queries, Scratch};
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::lanes::{Scalar, Simd};
#[cfg(target_arch = "aarch64")]
use super::neon::Neon;

/// Kernels of floats for one instruction set.
pub struct Floats {
    /// `out = gate · sigmoid(gate) · up`, all of one length.
    pub swiglu: fn(gate: &[f32], up: &[f32], out: &mut [f32]),
    /// RMS norm: `out = x / √(mean(x²) + ε) · weight`, all of one length.
    pub norm: fn(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]),
    /// Rotates each pair `(x[2i], x[2i + 1])` of a head by the angle of which `turns[i]` holds cosine and
    /// sine; what lies behind the last pair stays.
    pub turn: fn(x: &mut [f32], turns: &[(f32, f32)]),
    /// Multiplies a head with a normalised Hadamard matrix: see `hadamard`.
    pub hadamard: fn(x: &mut [f32]),
    /// Attention in a prompt: see `attention::tile`.
    pub attend_tile: fn(&Head<'_>, &Queries<'_>, &mut Scratch, out: &mut [f32]),
    /// Attention of one token to a segment of its context: see `attention::segment`.
    pub attend_segment: fn(&Head<'_>, &Queries<'_>, index: usize, &mut Scratch, out: &mut [f32]),
    /// The attention of one head out of its segments: see `attention::merge`.
    pub merge: fn(partials: &[f32], stride: usize, out: &mut [f32]),
}

/// Makes the table of an instruction set out of its [`Simd`] and the features that it needs. `wide` is the
/// number of registers in a row of a product, `keys` that of keys which meet the queries at a time: as many
/// as leave all sums in registers.
macro_rules! table {
    ($d:tt $simd:ident, wide $wide:literal, keys $keys:literal $(, $features:literal)?) => {{
        macro_rules! entry {
            ($inner:expr, ($d($name:ident: $type:ty),*)) => {{
                $(#[target_feature(enable = $features)])?
                fn entry($d($name: $type),*) {
                    // SAFETY: this function is compiled with the features.
                    let simd = unsafe { <$simd as Simd>::new() };
                    $inner(simd, $d($name),*)
                }
                |$d($name),*| {
                    #[allow(unused_unsafe)] // plain Rust needs no features
                    // SAFETY: tables are only handed out where the CPU has the features.
                    unsafe { entry($d($name),*) }
                }
            }};
        }
        Floats {
            swiglu: entry!(swiglu, (gate: &[f32], up: &[f32], out: &mut [f32])),
            norm: entry!(norm, (x: &[f32], weight: &[f32], eps: f32, out: &mut [f32])),
            turn: entry!(turn, (x: &mut [f32], turns: &[(f32, f32)])),
            hadamard: entry!(hadamard, (x: &mut [f32])),
            attend_tile: entry!(
                attention::tile::<_, $wide>,
                (head: &Head<'_>, queries: &Queries<'_>, scratch: &mut Scratch, out: &mut [f32])
            ),
            attend_segment: entry!(
                attention::segment::<_, $wide, $keys>,
                (head: &Head<'_>, queries: &Queries<'_>, index: usize, scratch: &mut Scratch, out: &mut [f32])
            ),
            merge: entry!(attention::merge, (partials: &[f32], stride: usize, out: &mut [f32])),
        }
    }};
}

/// In plain Rust.
pub(super) static SCALAR: Floats = table!($ Scalar, wide 1, keys 1);

/// With AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
pub(super) static AVX2: Floats = table!($ Avx2, wide 1, keys 1, "avx2,fma,f16c");

/// With AVX-512 F besides.
#[cfg(target_arch = "x86_64")]
pub(super) static AVX512: Floats = table!($ Avx512, wide 4, keys 4, "avx2,fma,f16c,avx512f");

/// With NEON.
#[cfg(target_arch = "aarch64")]
pub(super) static NEON: Floats = table!($ Neon, wide 1, keys 1, "neon");

/// `eˣ` to 1.5 units in the last place; 0 below −87.33, where it is no normal number; NaN for NaN.
#[inline(always)]
pub(super) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    // The lowest x whose power of e is a normal number, and the lowest whose power overflows.
    const LOW: f32 = -87.336_54;
    const HIGH: f32 = 88.722_84;
    // Added to a float below 2²², it rounds to a whole number, which then are the float's low bits.
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³
    // ln 2 in two parts; the first has 9 bits, so that its product with n is exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    const P: [f32; 5] = [
        0.499_999_94,
        0.166_665_21,
        0.041_668_39,
        0.008_368_745,
        0.001_381_454,
    ];
    let t = s.mul_add(x, s.splat(std::f32::consts::LOG2_E), s.splat(ROUND));
    let n = s.sub(t, s.splat(ROUND));
    let r = s.mul_add(n, s.splat(-LN_2[0]), x);
    let r = s.mul_add(n, s.splat(-LN_2[1]), r);
    let mut p = s.splat(P[4]);
    for i in [3, 2, 1, 0] {
        p = s.mul_add(p, r, s.splat(P[i]));
    }
    let power = s.add(s.mul_add(s.mul(r, r), p, r), s.splat(1.0));
    let power = s.add_to_exponent(power, t);
    let power = s.below(x, s.splat(HIGH), power, s.splat(f32::INFINITY));
    // 0 for what is low, NaN for NaN, which is below nothing.
    let low = s.max(s.splat(LOW), x);
    s.below(s.splat(LOW), x, power, s.sub(low, low))
}

/// Calls a formula on sixteen lanes of several slices at a time; what is left over is filled up with zeros.
macro_rules! sixteen_at_a_time {
    ($s:ident, $out:ident, |$($x:ident),*| $formula:expr) => {{
        let (wholes, rest) = $out.as_chunks_mut::<16>();
        for (i, out) in wholes.iter_mut().enumerate() {
            $(let $x = $s.load(&$x.as_chunks::<16>().0[i]);)*
            $s.store($formula, out);
        }
        if !rest.is_empty() {
            let start = 16 * wholes.len();
            $(
                let mut last = [0.0; 16];
                last[..rest.len()].copy_from_slice(&$x[start..]);
                let $x = $s.load(&last);
            )*
            let mut last = [0.0; 16];
            $s.store($formula, &mut last);
            rest.copy_from_slice(&last[..rest.len()]);
        }
    }};
}

/// See [`Floats::swiglu`].
#[inline(always)]
fn swiglu<S: Simd>(s: S, gate: &[f32], up: &[f32], out: &mut [f32]) {
    sixteen_at_a_time!(s, out, |gate, up| {
        let power = exp(s, s.sub(s.splat(0.0), gate));
        s.mul(s.div(gate, s.add(s.splat(1.0), power)), up)
    });
}

/// See [`Floats::norm`].
#[inline(always)]
fn norm<S: Simd>(s: S, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    // In f64: thousands of squares, and every later number hangs on this one.
    let mut squares = s.zeros();
    let (wholes, rest) = x.as_chunks::<16>();
    for x in wholes {
        squares = s.add_squares(s.load(x), squares);
    }
    if !rest.is_empty() {
        let mut last = [0.0; 16];
        last[..rest.len()].copy_from_slice(rest);
        squares = s.add_squares(s.load(&last), squares);
    }
    let mean = s.sum_doubles(squares) / x.len() as f64;
    let scale = s.splat((1.0 / (mean + f64::from(eps)).sqrt()) as f32);
    sixteen_at_a_time!(s, out, |x, weight| s.mul(s.mul(x, scale), weight));
}

/// See [`Floats::turn`].
#[inline(always)]
fn turn<S: Simd>(_: S, x: &mut [f32], turns: &[(f32, f32)]) {
    for (pair, &(cos, sin)) in x.as_chunks_mut::<2>().0.iter_mut().zip(turns) {
        let [a, b] = *pair;
        *pair = [a * cos - b * sin, a * sin + b * cos];
    }
}

/// Multiplies `x` with a Hadamard matrix (Sylvester's) of the greatest power of two that divides its length,
/// part by part, times 1/√size: it keeps lengths and products, and is its own inverse. A loud channel is spread
/// over all, which then round to few bits alike.
#[inline(always)]
fn hadamard<S: Simd>(_: S, x: &mut [f32]) {
    let size = 1 << x.len().trailing_zeros();
    let mut half = 1;
    while half < size {
        for pair in x.chunks_exact_mut(2 * half) {
            let (a, b) = pair.split_at_mut(half);
            for (a, b) in a.iter_mut().zip(b) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    let scale = 1.0 / (size as f32).sqrt();
    x.iter_mut().for_each(|x| *x *= scale);
}
