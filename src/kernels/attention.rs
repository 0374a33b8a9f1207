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
//! A prompt ([`tile`]) has queries enough to fill registers with: lanes are queries (tokens × heads), and
//! scores and sums are matrix products in which a key's or a value's elements are broadcast. No lane ever
//! meets another, and the softmax needs no sums across lanes:
//!
//! ```text
//! scores [position][query] = K [position][dim] · Qᵀ [dim][query]
//! mixed  [dim][query]     += Vᵀ [dim][position] · weights [position][query]
//! ```
//!
//! Generation ([`segment`]) has the few heads of one token. Lanes are elements of keys and values, and the
//! positions are cut into segments, again absolute, that are tasks of their own: a long context keeps many
//! threads busy, and [`merge`] adds up the segments in ascending order whoever computed them.

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
        multiply::<S, W>(s, (n, dim, lanes), keys, q, lanes, scores, lanes);
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
        multiply::<S, W>(s, (width, n, lanes), values, scores, lanes, mixed, lanes);
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
            let n = STEP.min(end - from);
            expand(s, head.keys.slice(from..from + n), panel, width);
            let scores = &mut scores[from - start..];
            for first in (0..group).step_by(4) {
                let q = &queries.q[first * width..];
                let scores = &mut scores[first * BLOCK..];
                match group - first {
                    1 => dots::<S, 1, P>(s, q, panel, width, n, scores),
                    2 => dots::<S, 2, P>(s, q, panel, width, n, scores),
                    3 => dots::<S, 3, P>(s, q, panel, width, n, scores),
                    _ => dots::<S, 4, P>(s, q, panel, width, n, scores),
                }
            }
        }
        for (scores, out) in scores
            .chunks_exact_mut(BLOCK)
            .zip(out.chunks_exact_mut(row))
        {
            weigh_one(s, scores, out, width);
        }
        for from in (start..end).step_by(STEP) {
            let n = STEP.min(end - from);
            expand(s, head.values.slice(from..from + n), panel, width);
            let weights = Factor {
                x: &scores[from - start..],
                row: BLOCK,
                col: 1,
            };
            multiply::<S, W>(s, (group, n, width), weights, panel, width, out, row);
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
    match rows.kind {
        BlockType::F16 => {
            for i in 0..rows.len() {
                let row: &[F16] = bytemuck::cast_slice(rows.row(i));
                let (wholes, rest) = row.as_chunks::<16>();
                for j in 0..wholes.len() {
                    s.store(s.halves(&wholes[j]), sixteen_mut(panel, i * width + 16 * j));
                }
                if !rest.is_empty() {
                    let mut last = [F16::default(); 16];
                    last[..rest.len()].copy_from_slice(rest);
                    s.store(s.halves(&last), sixteen_mut(panel, (i + 1) * width - 16));
                }
            }
        }
        BlockType::Q8_0 => {
            for i in 0..rows.len() {
                let row: &[BlockQ8_0] = bytemuck::cast_slice(rows.row(i));
                for j in 0..row.len() {
                    let (scale, codes) = (s.splat(row[j].d.to_f32()), row[j].qs.as_chunks().0);
                    let at = i * width + 32 * j;
                    s.store(s.mul(s.bytes(&codes[0]), scale), sixteen_mut(panel, at));
                    s.store(
                        s.mul(s.bytes(&codes[1]), scale),
                        sixteen_mut(panel, at + 16),
                    );
                }
            }
        }
        BlockType::Q4_0 => {
            for i in 0..rows.len() {
                let row: &[BlockQ4_0] = bytemuck::cast_slice(rows.row(i));
                for j in 0..row.len() {
                    let scale = s.splat(row[j].d.to_f32());
                    let (mut low, mut high) = ([0; 16], [0; 16]);
                    for k in 0..16 {
                        low[k] = (row[j].qs[k] & 15) as i8 - 8;
                        high[k] = (row[j].qs[k] >> 4) as i8 - 8;
                    }
                    let at = i * width + 32 * j;
                    s.store(s.mul(s.bytes(&low), scale), sixteen_mut(panel, at));
                    s.store(s.mul(s.bytes(&high), scale), sixteen_mut(panel, at + 16));
                }
            }
        }
        _ => {
            for i in 0..rows.len() {
                let (weights, rest) = panel[i * width..(i + 1) * width].split_at_mut(rows.cols);
                rows.decode(i, weights);
                rest.fill(0.0);
            }
        }
    }
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

/// `c [rows][lanes] += a [rows][depth] · b [depth][lanes]`, each element a chain of sums in ascending order.
/// `b_row` and `c_row` are the distances of their rows; `lanes` is a multiple of 16.
#[inline(always)]
fn multiply<S: Simd, const W: usize>(
    s: S,
    (rows, depth, lanes): (usize, usize, usize),
    a: Factor<'_>,
    b: &[f32],
    b_row: usize,
    c: &mut [f32],
    c_row: usize,
) {
    assert!(rows > 0 && depth > 0 && lanes.is_multiple_of(16));
    assert!(a.x.len() > (rows - 1) * a.row + (depth - 1) * a.col);
    assert!(b.len() >= (depth - 1) * b_row + lanes && c.len() >= (rows - 1) * c_row + lanes);
    let (a_row, a_col) = (a.row, a.col);
    let mut lane = 0;
    while lane < lanes {
        let wide = lanes - lane >= 16 * W;
        for row in (0..rows).step_by(4) {
            // SAFETY: rows `row..row + I` and lanes `lane..lane + 16 · W` (or 16) are inside, and the
            // matrices are as large as the assertions say.
            unsafe {
                let a = a.x.as_ptr().add(row * a_row);
                let b = b.as_ptr().add(lane);
                let c = c.as_mut_ptr().add(row * c_row + lane);
                let n = rows - row;
                match (wide, n) {
                    (true, 1) => product::<S, 1, W>(s, depth, a, a_row, a_col, b, b_row, c, c_row),
                    (true, 2) => product::<S, 2, W>(s, depth, a, a_row, a_col, b, b_row, c, c_row),
                    (true, 3) => product::<S, 3, W>(s, depth, a, a_row, a_col, b, b_row, c, c_row),
                    (true, _) => product::<S, 4, W>(s, depth, a, a_row, a_col, b, b_row, c, c_row),
                    (false, 1) => product::<S, 1, 1>(s, depth, a, a_row, a_col, b, b_row, c, c_row),
                    (false, 2) => product::<S, 2, 1>(s, depth, a, a_row, a_col, b, b_row, c, c_row),
                    (false, 3) => product::<S, 3, 1>(s, depth, a, a_row, a_col, b, b_row, c, c_row),
                    (false, _) => product::<S, 4, 1>(s, depth, a, a_row, a_col, b, b_row, c, c_row),
                }
            }
        }
        lane += if wide { 16 * W } else { 16 };
    }
}

/// [`multiply`] for `I` rows and `W` registers of lanes, the sums in registers.
///
/// # Safety
/// The pointers are to matrices of that many rows, lanes and depth.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // three matrices
unsafe fn product<S: Simd, const I: usize, const W: usize>(
    s: S,
    depth: usize,
    a: *const f32,
    a_row: usize,
    a_col: usize,
    b: *const f32,
    b_row: usize,
    c: *mut f32,
    c_row: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut sums = [[s.splat(0.0); W]; I];
        for i in 0..I {
            for w in 0..W {
                sums[i][w] = s.load(&*c.add(i * c_row + 16 * w).cast());
            }
        }
        for k in 0..depth {
            let mut line = [s.splat(0.0); W];
            for w in 0..W {
                line[w] = s.load(&*b.add(k * b_row + 16 * w).cast());
            }
            for i in 0..I {
                let x = s.splat(*a.add(i * a_row + k * a_col));
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

/// `scores[i][p] = q[i] · keys[p]` for `I` heads and `n` positions; `P` keys are met at a time, so that
/// queries are loaded once for them. `scores` has rows of [`BLOCK`].
#[inline(always)]
fn dots<S: Simd, const I: usize, const P: usize>(
    s: S,
    q: &[f32],
    keys: &[f32],
    width: usize,
    n: usize,
    scores: &mut [f32],
) {
    const { assert!(P == 1 || P == 4 && I <= 4) };
    let (q, keys) = (&q[..I * width], &keys[..STEP * width]);
    for first in (0..n).step_by(P) {
        let mut sums = [[s.splat(0.0); P]; I];
        for d in (0..width).step_by(16) {
            let mut k = [s.splat(0.0); P];
            for p in 0..P {
                k[p] = s.load(sixteen(keys, (first + p) * width + d));
            }
            for i in 0..I {
                let q = s.load(sixteen(q, i * width + d));
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
