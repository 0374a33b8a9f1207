//! Attention of the queries that share a KV head, with the softmax taken a block of positions at a time.
//!
//! Blocks lie at absolute positions and are met in ascending order, so that a token's result depends on its
//! own position alone, and not on how its prompt was cut. Under the running maximum `m` of the scores
//!
//! ```text
//! total = total · e^(m' − m) + Σ e^(s − m)        m': the maximum before the block
//! mixed = mixed · e^(m' − m) + Σ e^(s − m) · v    attention = mixed / total at the end
//! ```
//!
//! There is a kernel for each phase. In both, keys and values of any type are expanded to f32 in the core's
//! own cache, once for all the queries that meet there.
//!
//! A prompt (`tile`) has queries enough to fill registers with: lanes are queries (tokens × heads), and
//! scores and sums are matrix products in which a key's or a value's elements are broadcast. No lane ever
//! meets another, and the softmax needs no sums across lanes:
//!
//! ```text
//! scores [position][query] = K [position][dim] · Qᵀ [dim][query]
//! mixed  [dim][query]     += Vᵀ [dim][position] · weights [position][query]
//! ```
//!
//! Generation (`segment`) has the few heads of one token. Lanes are elements of keys and values, and the
//! positions are cut into segments, again absolute, that are tasks of their own: a long context keeps many
//! threads busy, and `merge` adds up the segments in ascending order whoever computed them.

// Iterators would bring closures, which need not be inlined: see the module `lanes`.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::floats::exp;
use super::lanes::Simd;
use crate::quant::{BlockQ4_0, BlockQ8_0, BlockType, F16};
use crate::tensor::Rows;

/// Positions of a block of the softmax.
const BLOCK: usize = 64;

/// Positions of a segment of a token's context; a multiple of a block.
pub const SEGMENT: usize = 512;

/// Positions whose keys or values are expanded at a time for a single token: a panel of the innermost cache.
const STEP: usize = 16;

/// What a KV head holds of a timeline, from position 0 on.
#[derive(Clone, Copy)]
pub struct Head<'a> {
    /// A key a position, rotated.
    pub keys: Rows<'a>,
    /// A value a position.
    pub values: Rows<'a>,
}

/// The queries of consecutive tokens that meet one KV head.
#[derive(Clone, Copy)]
pub struct Queries<'a> {
    /// `[tokens][group][width(head_dim)]`, rotated, times 1/√head_dim, filled up with zeros.
    pub q: &'a [f32],
    /// Query heads a KV head.
    pub group: usize,
    /// Position of the first token.
    pub position: usize,
    /// A token sees so many positions, its own included; `None`: all.
    pub window: Option<usize>,
}

impl Queries<'_> {
    /// The positions that token `index` sees.
    pub fn seen(&self, index: usize) -> Range<usize> {
        let end = self.position + index + 1;
        let start = self.window.map_or(0, |window| end.saturating_sub(window));
        start..end
    }
}

/// Floats that a vector of `dim` takes in the kernels' buffers: whole registers.
pub fn width(dim: usize) -> usize {
    dim.next_multiple_of(16)
}

/// Floats that a segment's result takes: for each head `width(dim)` sums, then the maximum, the total, and
/// what fills up a register.
pub fn partial_len(group: usize, dim: usize) -> usize {
    group * (width(dim) + 16)
}

/// Working memory of one thread.
#[derive(Default)]
pub struct Scratch(Vec<Line>);

/// A cache line of floats.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

impl Scratch {
    /// Buffers of so many floats, each a multiple of 16, on cache lines of their own. What they hold is
    /// left open.
    pub fn buffers<const N: usize>(&mut self, lens: [usize; N]) -> [&mut [f32]; N] {
        let lines = lens.iter().sum::<usize>() / 16;
        if self.0.len() < lines {
            self.0.resize(lines, Line([0.0; 16]));
        }
        let mut rest: &mut [f32] = bytemuck::cast_slice_mut(&mut self.0);
        lens.map(|len| {
            debug_assert!(len.is_multiple_of(16));
            rest.split_off_mut(..len).expect("the lines were counted")
        })
    }
}

/// The attention of a tile of tokens: `out [tokens][group][width] = softmax(q · K) · V`, each token over the
/// positions that it sees. `head` holds the tile's own keys and values already.
#[inline(always)]
pub(super) fn tile<S: Simd, const W: usize>(
    s: S,
    head: &Head<'_>,
    queries: &Queries<'_>,
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let dim = head.keys.cols;
    let width = width(dim);
    let rows = queries.q.len() / width;
    let tokens = rows / queries.group;
    let lanes = rows.next_multiple_of(16);
    let [q, panel, scores, mixed, maxima, totals, starts, ends] = scratch.buffers([
        width * lanes,
        BLOCK * width,
        BLOCK * lanes,
        width * lanes,
        lanes,
        lanes,
        lanes,
        lanes,
    ]);
    transposed(s, queries.q, rows, width, q, lanes);
    mixed.fill(0.0);
    totals.fill(0.0);
    maxima.fill(f32::MIN);
    let (first, last) = (queries.seen(0), queries.seen(tokens - 1));
    for block in first.start / BLOCK..last.end.div_ceil(BLOCK) {
        let start = first.start.max(block * BLOCK);
        let end = last.end.min((block + 1) * BLOCK);
        let n = end - start;
        expand(s, head.keys.slice(start..end), panel, width);
        scores[..n * lanes].fill(0.0);
        let keys = Factor {
            x: panel,
            row: width,
            col: 1,
        };
        let q = Matrix {
            x: &*q,
            row: lanes,
            rows: dim,
        };
        multiply::<S, f32, W>(s, (n, lanes), keys, q, scores, lanes);
        if last.start > start || first.end < end {
            for lane in 0..lanes {
                let seen = queries.seen((lane / queries.group).min(tokens - 1));
                starts[lane] = seen.start.saturating_sub(start) as f32;
                ends[lane] = seen.end.saturating_sub(start) as f32;
            }
            hide(s, &mut scores[..n * lanes], lanes, starts, ends);
        }
        weigh(s, &mut scores[..n * lanes], lanes, maxima, totals, mixed);
        expand(s, head.values.slice(start..end), panel, width);
        let values = Factor {
            x: panel,
            row: 1,
            col: width,
        };
        let weights = Matrix {
            x: &*scores,
            row: lanes,
            rows: n,
        };
        multiply::<S, f32, W>(s, (width, lanes), values, weights, mixed, lanes);
    }
    for lane in (0..lanes).step_by(16) {
        let total = s.load(sixteen(totals, lane));
        for d in (0..width).step_by(16) {
            let mut square = [s.splat(0.0); 16];
            for i in 0..16 {
                square[i] = s.div(s.load(sixteen(mixed, (d + i) * lanes + lane)), total);
            }
            s.transpose(&mut square);
            for i in 0..16.min(rows - lane) {
                s.store(square[i], sixteen_mut(out, (lane + i) * width + d));
            }
        }
    }
}

/// Gives the scores `[positions][lanes]` that a lane does not see the weight 0: those before `starts` and
/// from `ends` on.
#[inline(always)]
fn hide<S: Simd>(s: S, scores: &mut [f32], lanes: usize, starts: &[f32], ends: &[f32]) {
    let nothing = s.splat(f32::NEG_INFINITY);
    for p in 0..scores.len() / lanes {
        let position = s.splat(p as f32);
        for lane in (0..lanes).step_by(16) {
            let at = p * lanes + lane;
            let score = s.load(sixteen(scores, at));
            let (start, end) = (s.load(sixteen(starts, lane)), s.load(sixteen(ends, lane)));
            let score = s.below(position, end, score, nothing);
            s.store(
                s.below(position, start, nothing, score),
                sixteen_mut(scores, at),
            );
        }
    }
}

/// Turns a block's scores `[positions][lanes]` into weights under the new maximum, and brings what was summed
/// under the former one, `totals` and `mixed [width][lanes]`, under it.
#[inline(always)]
fn weigh<S: Simd>(
    s: S,
    scores: &mut [f32],
    lanes: usize,
    maxima: &mut [f32],
    totals: &mut [f32],
    mixed: &mut [f32],
) {
    for lane in (0..lanes).step_by(16) {
        let former = s.load(sixteen(maxima, lane));
        let mut max = former;
        for p in (0..scores.len()).step_by(lanes) {
            max = s.max(s.load(sixteen(scores, p + lane)), max);
        }
        s.store(max, sixteen_mut(maxima, lane));
        let shrink = exp(s, s.sub(former, max));
        for d in (0..mixed.len()).step_by(lanes) {
            let sum = s.load(sixteen(mixed, d + lane));
            s.store(s.mul(sum, shrink), sixteen_mut(mixed, d + lane));
        }
        let mut total = s.mul(s.load(sixteen(totals, lane)), shrink);
        for p in (0..scores.len()).step_by(lanes) {
            let weight = exp(s, s.sub(s.load(sixteen(scores, p + lane)), max));
            s.store(weight, sixteen_mut(scores, p + lane));
            total = s.add(total, weight);
        }
        s.store(total, sixteen_mut(totals, lane));
    }
}

/// A token's attention to the positions of segment `index` that it sees, to be merged: see [`partial_len`].
/// `queries` is of one token; it sees at least one position of the segment.
#[inline(always)]
pub(super) fn segment<S: Simd, const W: usize, const P: usize>(
    s: S,
    head: &Head<'_>,
    queries: &Queries<'_>,
    index: usize,
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let (group, width) = (queries.group, width(head.keys.cols));
    let [panel, scores] = scratch.buffers([STEP * width, group * BLOCK]);
    let row = width + 16;
    out.fill(0.0);
    for head in 0..group {
        out[head * row + width] = f32::MIN;
    }
    let seen = queries.seen(0);
    let start = seen.start.max(index * SEGMENT);
    let end = seen.end.min((index + 1) * SEGMENT);
    for block in start / BLOCK..end.div_ceil(BLOCK) {
        let (start, end) = (start.max(block * BLOCK), end.min((block + 1) * BLOCK));
        scores.fill(f32::NEG_INFINITY);
        for from in (start..end).step_by(STEP) {
            let keys = head.keys.slice(from..end.min(from + STEP));
            let scores = &mut scores[from - start..];
            match halves(keys) {
                Some(keys) => score::<S, F16, P>(s, queries, keys, scores),
                None => score::<S, f32, P>(s, queries, expanded(s, keys, panel, width), scores),
            }
        }
        for (scores, out) in scores
            .chunks_exact_mut(BLOCK)
            .zip(out.chunks_exact_mut(row))
        {
            weigh_one(s, scores, out, width);
        }
        for from in (start..end).step_by(STEP) {
            let values = head.values.slice(from..end.min(from + STEP));
            let weights = Factor {
                x: &scores[from - start..],
                row: BLOCK,
                col: 1,
            };
            match halves(values) {
                Some(values) => multiply::<S, F16, W>(s, (group, width), weights, values, out, row),
                None => {
                    let values = expanded(s, values, panel, width);
                    multiply::<S, f32, W>(s, (group, width), weights, values, out, row);
                }
            }
        }
    }
}

/// The rows of F16 vectors of whole registers, which are widened as they are loaded: few queries meet them,
/// and expanding them would cost more.
#[inline(always)]
fn halves(rows: Rows<'_>) -> Option<Matrix<'_, F16>> {
    let fits = rows.kind == BlockType::F16 && rows.cols.is_multiple_of(16);
    fits.then(|| Matrix {
        x: bytemuck::cast_slice(rows.bytes),
        row: rows.cols,
        rows: rows.len(),
    })
}

/// The rows of any type, expanded into `panel`.
#[inline(always)]
fn expanded<'a, S: Simd>(
    s: S,
    rows: Rows<'_>,
    panel: &'a mut [f32],
    width: usize,
) -> Matrix<'a, f32> {
    expand(s, rows, panel, width);
    Matrix {
        x: panel,
        row: width,
        rows: rows.len(),
    }
}

/// The scores of one token's queries and a step's keys, `[group]` rows of [`BLOCK`].
#[inline(always)]
fn score<S: Simd, T: Element, const P: usize>(
    s: S,
    queries: &Queries<'_>,
    keys: Matrix<'_, T>,
    scores: &mut [f32],
) {
    let (group, width) = (queries.group, keys.row);
    for first in (0..group).step_by(4) {
        let q = &queries.q[first * width..];
        let scores = &mut scores[first * BLOCK..];
        match group - first {
            1 => dots::<S, T, 1, P>(s, q, keys, scores),
            2 => dots::<S, T, 2, P>(s, q, keys, scores),
            3 => dots::<S, T, 3, P>(s, q, keys, scores),
            _ => dots::<S, T, 4, P>(s, q, keys, scores),
        }
    }
}

/// Turns the scores of one head in a block into weights, as [`weigh`] does; `out` holds its sums, the maximum
/// and the total.
#[inline(always)]
fn weigh_one<S: Simd>(s: S, scores: &mut [f32], out: &mut [f32], width: usize) {
    let mut max = s.splat(out[width]);
    for p in (0..BLOCK).step_by(16) {
        max = s.max(s.load(sixteen(scores, p)), max);
    }
    let mut lanes = [0.0; 16];
    s.store(max, &mut lanes);
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] = if lanes[i + half] > lanes[i] {
                lanes[i + half]
            } else {
                lanes[i]
            };
        }
    }
    let max = s.splat(lanes[0]);
    let shrink = exp(s, s.sub(s.splat(out[width]), max));
    for d in (0..width).step_by(16) {
        let sum = s.load(sixteen(out, d));
        s.store(s.mul(sum, shrink), sixteen_mut(out, d));
    }
    let mut total = s.splat(0.0);
    for p in (0..BLOCK).step_by(16) {
        let weight = exp(s, s.sub(s.load(sixteen(scores, p)), max));
        s.store(weight, sixteen_mut(scores, p));
        total = s.add(total, weight);
    }
    out[width] = lanes[0];
    s.store(shrink, &mut lanes);
    out[width + 1] = out[width + 1] * lanes[0] + s.sum(total);
}

/// Adds up the segments' results of one head, `[segments][stride]`, in ascending order:
/// `out [dim] = Σ mixed / Σ total`, each under the greatest maximum.
#[inline(always)]
pub(super) fn merge<S: Simd>(s: S, partials: &[f32], stride: usize, out: &mut [f32]) {
    let width = width(out.len());
    let mut max = f32::MIN;
    for partial in partials.chunks(stride) {
        max = if partial[width] > max {
            partial[width]
        } else {
            max
        };
    }
    let mut total = 0.0;
    out.fill(0.0);
    for partial in partials.chunks(stride) {
        let mut shrink = [0.0; 16];
        s.store(exp(s, s.splat(partial[width] - max)), &mut shrink);
        for (out, mixed) in out.iter_mut().zip(partial) {
            *out += mixed * shrink[0];
        }
        total += partial[width + 1] * shrink[0];
    }
    for out in out {
        *out /= total;
    }
}

/// Expands rows into `panel [rows][width]`, filled up with zeros.
#[inline(always)]
fn expand<S: Simd>(s: S, rows: Rows<'_>, panel: &mut [f32], width: usize) {
    let vectors = rows
        .bytes
        .chunks_exact(rows.stride)
        .zip(panel.chunks_exact_mut(width));
    match rows.kind {
        BlockType::F16 => {
            for (row, out) in vectors {
                let row: &[F16] = bytemuck::cast_slice(row);
                let ((wholes, rest), out) = (row.as_chunks::<16>(), out.as_chunks_mut::<16>().0);
                for (halves, out) in wholes.iter().zip(&mut *out) {
                    s.store(s.halves(halves), out);
                }
                if !rest.is_empty() {
                    let mut last = [F16::default(); 16];
                    last[..rest.len()].copy_from_slice(rest);
                    s.store(s.halves(&last), &mut out[wholes.len()]);
                }
            }
        }
        BlockType::Q8_0 => {
            for (row, out) in vectors {
                let row: &[BlockQ8_0] = bytemuck::cast_slice(row);
                for (block, out) in row
                    .iter()
                    .zip(out.as_chunks_mut::<16>().0.as_chunks_mut::<2>().0)
                {
                    let [low, high] = block.qs.as_chunks::<16>().0 else {
                        unreachable!()
                    };
                    store_block(s, s.half(block.d), low, high, out);
                }
            }
        }
        BlockType::Q4_0 => {
            for (row, out) in vectors {
                let row: &[BlockQ4_0] = bytemuck::cast_slice(row);
                for (block, out) in row
                    .iter()
                    .zip(out.as_chunks_mut::<16>().0.as_chunks_mut::<2>().0)
                {
                    let (mut low, mut high) = ([0; 16], [0; 16]);
                    for k in 0..16 {
                        low[k] = (block.qs[k] & 15) as i8 - 8;
                        high[k] = (block.qs[k] >> 4) as i8 - 8;
                    }
                    store_block(s, s.half(block.d), &low, &high, out);
                }
            }
        }
        _ => {
            for (row, out) in vectors {
                let (weights, rest) = out.split_at_mut(rows.cols);
                rows.kind.decode_row(row, weights);
                rest.fill(0.0);
            }
        }
    }
}

/// Stores the 32 weights of a block with a scale.
#[inline(always)]
fn store_block<S: Simd>(
    s: S,
    scale: S::F,
    low: &[i8; 16],
    high: &[i8; 16],
    out: &mut [[f32; 16]; 2],
) {
    s.store(s.mul(s.bytes(low), scale), &mut out[0]);
    s.store(s.mul(s.bytes(high), scale), &mut out[1]);
}

/// Transposes `x [rows][width]` into `out [width][lanes]`; the lanes behind the last row are 0.
#[inline(always)]
fn transposed<S: Simd>(s: S, x: &[f32], rows: usize, width: usize, out: &mut [f32], lanes: usize) {
    for lane in (0..lanes).step_by(16) {
        for d in (0..width).step_by(16) {
            let mut square = [s.splat(0.0); 16];
            for i in 0..16.min(rows - lane) {
                square[i] = s.load(sixteen(x, (lane + i) * width + d));
            }
            s.transpose(&mut square);
            for i in 0..16 {
                s.store(square[i], sixteen_mut(out, (d + i) * lanes + lane));
            }
        }
    }
}

/// A matrix whose elements are broadcast: element `(i, k)` is `x[i · row + k · col]`.
#[derive(Clone, Copy)]
struct Factor<'a> {
    x: &'a [f32],
    row: usize,
    col: usize,
}

/// `rows` rows that are loaded sixteen elements at a time, `row` elements apart.
#[derive(Clone, Copy)]
struct Matrix<'a, T> {
    x: &'a [T],
    row: usize,
    rows: usize,
}

/// What a [`Matrix`] holds.
trait Element: Copy {
    /// Sixteen elements as f32.
    ///
    /// # Safety
    /// There are sixteen from `from` on.
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::F;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const f32) -> S::F {
        // SAFETY: the caller's.
        s.load(unsafe { &*from.cast() })
    }
}

impl Element for F16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const F16) -> S::F {
        // SAFETY: the caller's.
        s.halves(unsafe { &*from.cast() })
    }
}

/// `c [rows][lanes] += a [rows][depth] · b [depth][lanes]`, each element a chain of sums in ascending order.
/// The rows of `c` are `c_row` apart; `lanes` is a multiple of 16.
#[inline(always)]
fn multiply<S: Simd, T: Element, const W: usize>(
    s: S,
    (rows, lanes): (usize, usize),
    a: Factor<'_>,
    b: Matrix<'_, T>,
    c: &mut [f32],
    c_row: usize,
) {
    let depth = b.rows;
    assert!(rows > 0 && depth > 0 && lanes.is_multiple_of(16));
    assert!(a.x.len() > (rows - 1) * a.row + (depth - 1) * a.col);
    assert!(b.x.len() >= (depth - 1) * b.row + lanes && c.len() >= (rows - 1) * c_row + lanes);
    let mut lane = 0;
    while lane < lanes {
        let wide = lanes - lane >= 16 * W;
        for row in (0..rows).step_by(4) {
            // SAFETY: rows `row..row + I` and lanes `lane..lane + 16 · W` (or 16) are inside, and the
            // matrices are as large as the assertions say.
            unsafe {
                let at = (row, lane);
                match (wide, rows - row) {
                    (true, 1) => product::<S, T, 1, W>(s, at, a, b, c, c_row),
                    (true, 2) => product::<S, T, 2, W>(s, at, a, b, c, c_row),
                    (true, 3) => product::<S, T, 3, W>(s, at, a, b, c, c_row),
                    (true, _) => product::<S, T, 4, W>(s, at, a, b, c, c_row),
                    (false, 1) => product::<S, T, 1, 1>(s, at, a, b, c, c_row),
                    (false, 2) => product::<S, T, 2, 1>(s, at, a, b, c, c_row),
                    (false, 3) => product::<S, T, 3, 1>(s, at, a, b, c, c_row),
                    (false, _) => product::<S, T, 4, 1>(s, at, a, b, c, c_row),
                }
            }
        }
        lane += if wide { 16 * W } else { 16 };
    }
}

/// [`multiply`] for `I` rows and `W` registers of lanes from `(row, lane)` on, the sums in registers.
///
/// # Safety
/// The matrices hold them.
#[inline(always)]
unsafe fn product<S: Simd, T: Element, const I: usize, const W: usize>(
    s: S,
    (row, lane): (usize, usize),
    a: Factor<'_>,
    b: Matrix<'_, T>,
    c: &mut [f32],
    c_row: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let (x, col) = (a.x.as_ptr().add(row * a.row), a.col);
        let lines = b.x.as_ptr().add(lane);
        let c = c.as_mut_ptr().add(row * c_row + lane);
        let mut sums = [[s.splat(0.0); W]; I];
        for i in 0..I {
            for w in 0..W {
                sums[i][w] = f32::load(s, c.add(i * c_row + 16 * w));
            }
        }
        for k in 0..b.rows {
            let mut line = [s.splat(0.0); W];
            for w in 0..W {
                line[w] = T::load(s, lines.add(k * b.row + 16 * w));
            }
            for i in 0..I {
                let x = s.splat(*x.add(i * a.row + k * col));
                for w in 0..W {
                    sums[i][w] = s.mul_add(x, line[w], sums[i][w]);
                }
            }
        }
        for i in 0..I {
            for w in 0..W {
                s.store(sums[i][w], &mut *c.add(i * c_row + 16 * w).cast());
            }
        }
    }
}

/// `scores[i][p] = q[i] · keys[p]` for `I` heads; `P` keys are met at a time, so that queries are loaded once
/// for them. `scores` has rows of [`BLOCK`].
#[inline(always)]
fn dots<S: Simd, T: Element, const I: usize, const P: usize>(
    s: S,
    q: &[f32],
    keys: Matrix<'_, T>,
    scores: &mut [f32],
) {
    const { assert!(P == 1 || P == 4 && I <= 4) };
    let (n, width) = (keys.rows, keys.row);
    assert!(n > 0 && keys.x.len() >= n * width && width.is_multiple_of(16));
    assert!(q.len() >= I * width && scores.len() >= (I - 1) * BLOCK + n);
    for first in (0..n).step_by(P) {
        let mut sums = [[s.splat(0.0); P]; I];
        for d in (0..width).step_by(16) {
            let mut k = [s.splat(0.0); P];
            for p in 0..P {
                // Behind the last key, it is met again.
                let key = (first + p).min(n - 1);
                // SAFETY: there are `n` keys of `width` elements.
                k[p] = unsafe { T::load(s, keys.x.as_ptr().add(key * width + d)) };
            }
            for i in 0..I {
                // SAFETY: there are `I` queries of `width` elements.
                let q = unsafe { f32::load(s, q.as_ptr().add(i * width + d)) };
                for p in 0..P {
                    sums[i][p] = s.mul_add(q, k[p], sums[i][p]);
                }
            }
        }
        if P == 1 {
            for i in 0..I {
                scores[i * BLOCK + first] = s.sum(sums[i][0]);
            }
        } else {
            let mut all = [s.splat(0.0); 16];
            for i in 0..I {
                for p in 0..P {
                    all[i * P + p] = sums[i][p];
                }
            }
            let all = s.sums(all);
            for i in 0..I {
                for p in 0..P.min(n - first) {
                    scores[i * BLOCK + first + p] = all[i * P + p];
                }
            }
        }
    }
}

/// Sixteen floats from `at` on.
#[inline(always)]
fn sixteen(x: &[f32], at: usize) -> &[f32; 16] {
    x[at..].first_chunk().expect("buffers are whole registers")
}

/// Sixteen floats from `at` on.
#[inline(always)]
fn sixteen_mut(x: &mut [f32], at: usize) -> &mut [f32; 16] {
    x[at..]
        .first_chunk_mut()
        .expect("buffers are whole registers")
}
