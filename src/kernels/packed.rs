//! Tokens of a prompt in the order in which tiles go through them.
//!
//! A tile passes all its tokens for each stretch of columns, and asks for nothing but their codes and
//! what is added to a sum of them. Where the instruction set's tiles read packed tokens
//! ([`Kernels::packs`]), these lie a cache line for 32 columns, and lines follow each other as tiles
//! read them, so that one address serves for all and the next lines are always those behind:
//!
//! ```text
//! chunk of tokens      stretch of 256 columns     token           span of 32 columns: 64 B
//! ┌──────────────┬─    ┌────────────────────┬─    ┌─────────┬─    ┌────┬────┬────┬────┬─ ─┬────┐
//! │ up to 256    │ ──► │ 0                  │ ──► │ 0       │ ──► │ 0  │ 1  │ 2  │ 3  │   │ 7  │
//! └──────────────┴─    └────────────────────┴─    └─────────┴─    └────┴────┴────┴────┴─ ─┴────┘
//! ```

use std::ops::Range;

use bytemuck::Zeroable;

use super::activations::{MAX_SCALE, SCALE_LEN, SUM_LEN};
use super::linear::FEW_TOKENS;
use super::tiles::STRETCH;
use super::{Activation, Activations, Kernels, Phase, TILE_TOKENS};
use crate::threads::Pool;

/// Spans of a stretch.
pub(super) const SPANS: usize = STRETCH / SCALE_LEN;
/// Stretches of tokens that a task packs.
const TASK: usize = 32;

/// Thirty-two columns of a token: codes and all that goes with them in one cache line.
#[derive(Clone, Copy, Zeroable)]
#[repr(C, align(64))]
pub struct Span {
    /// The codes.
    pub q: [i8; SCALE_LEN],
    /// The scale is `(1 + step / 8) · 2^exponent`; [`STEPS`](Self::STEPS) where it is not finite.
    /// Private, since unchecked accesses rely on its being no more.
    step: u32,
    /// The exponent, at the place that it has among the bits of an f32.
    pub exponent: i32,
    /// `−Σ q`.
    pub minus_sum: i32,
    /// `scale · Σ q`.
    pub scaled_sum: f32,
    /// `−Σ q` of each half.
    pub minus_sums: [i32; 2],
    /// `scale · Σ q` of each half.
    pub scaled_sums: [f32; 2],
}

const _: () = assert!(size_of::<Span>() == 64);

impl Span {
    /// Steps of a scale from one power of two to the next.
    pub const STEPS: usize = 8;

    /// The step, [`STEPS`](Self::STEPS) at most.
    #[inline]
    pub fn step(&self) -> u32 {
        self.step
    }

    fn new(q: &[i8; SCALE_LEN], scale: f32, sums: &[i16; 2]) -> Self {
        const ONE: u32 = 1.0f32.to_bits();
        let bits = scale.to_bits();
        let (step, exponent) = if scale == 0.0 {
            (0, 0)
        } else if scale < MAX_SCALE {
            let step = bits >> 20 & (Self::STEPS as u32 - 1);
            (step, (bits & 0x7f80_0000) as i32 - ONE as i32)
        } else {
            (Self::STEPS as u32, 0)
        };
        let sums = sums.map(i32::from);
        Self {
            q: *q,
            step,
            exponent,
            minus_sum: -(sums[0] + sums[1]),
            scaled_sum: scale * (sums[0] + sums[1]) as f32,
            minus_sums: sums.map(|sum| -sum),
            scaled_sums: sums.map(|sum| scale * sum as f32),
        }
    }
}

/// A stretch of a token; what lies beyond the last column is undefined.
pub type Stretch = [Span; SPANS];

/// Where tokens are packed, to be used again.
#[derive(Default)]
pub struct Storage(Vec<Stretch>);

/// Tokens in the order of their products, cut into chunks that tiles are multiplied with.
pub struct Batch<'a> {
    x: Vec<Activation<'a>>,
    /// In ascending order.
    chunks: Vec<Range<usize>>,
    packed: &'a [Stretch],
    /// Stretches of a token.
    stretches: usize,
}

/// A chunk of tokens.
#[derive(Clone, Copy)]
pub struct Tokens<'a> {
    /// The place of the first in the batch.
    pub first: usize,
    /// As they are.
    pub x: &'a [Activation<'a>],
    /// `[stretch][token]`, where tiles read packed tokens.
    pub packed: &'a [Stretch],
}

impl<'a> Batch<'a> {
    /// All rows of `x`, which meet the same rows.
    pub fn of(
        pool: &Pool,
        kernels: &Kernels,
        phase: Phase,
        x: &'a Activations,
        storage: &'a mut Storage,
    ) -> Self {
        let rows = (0..x.len()).map(|row| x.row(row)).collect();
        let group = std::iter::once(0..x.len());
        Self::new(pool, kernels, phase, rows, group, storage)
    }

    /// The tokens of `x`, all as long as each other. Groups, ranges in ascending order, meet the same rows.
    pub fn new(
        pool: &Pool,
        kernels: &Kernels,
        phase: Phase,
        x: Vec<Activation<'a>>,
        groups: impl Iterator<Item = Range<usize>>,
        storage: &'a mut Storage,
    ) -> Self {
        let most = match phase {
            Phase::Prompt => TILE_TOKENS,
            Phase::Generate => FEW_TOKENS,
        };
        let chunks = groups.flat_map(|group| chunks(group, most));
        let mut batch = Self {
            x,
            chunks: chunks.collect(),
            packed: &[],
            stretches: 0,
        };
        let cols = batch.x.first().map_or(0, |x| x.q.len());
        if phase == Phase::Prompt && kernels.packs && cols > 0 {
            batch.stretches = cols.div_ceil(STRETCH);
            batch.packed = batch.pack(pool, &mut storage.0);
        }
        batch
    }

    fn pack(&self, pool: &Pool, storage: &'a mut Vec<Stretch>) -> &'a [Stretch] {
        let len = self.x.len() * self.stretches;
        if storage.len() < len {
            // Not resized, which would copy what is there.
            *storage = bytemuck::zeroed_vec(len);
        }
        for chunk in &self.chunks {
            let x = &self.x[chunk.clone()];
            pool.chunks(&mut storage[self.places(chunk)], TASK, |task, places| {
                for (index, place) in (task * TASK..).zip(places) {
                    pack_stretch(&x[index % x.len()], index / x.len(), place);
                }
            });
        }
        &storage[..len]
    }

    /// Where the stretches of a chunk are packed.
    fn places(&self, chunk: &Range<usize>) -> Range<usize> {
        chunk.start * self.stretches..chunk.end * self.stretches
    }

    /// The chunks of a group.
    pub fn chunks(&self, group: Range<usize>) -> impl Iterator<Item = Tokens<'_>> {
        let first = self
            .chunks
            .partition_point(|chunk| chunk.start < group.start);
        let chunks = self.chunks[first..]
            .iter()
            .take_while(move |chunk| chunk.end <= group.end);
        chunks.map(|chunk| Tokens {
            first: chunk.start,
            x: &self.x[chunk.clone()],
            packed: &self.packed[self.places(chunk)],
        })
    }
}

fn pack_stretch(x: &Activation<'_>, stretch: usize, place: &mut Stretch) {
    let columns = stretch * STRETCH..((stretch + 1) * STRETCH).min(x.q.len());
    let q = x.q[columns.clone()].as_chunks().0;
    let scales = &x.scales[columns.start / SCALE_LEN..columns.end / SCALE_LEN];
    let sums = x.sums[columns.start / SUM_LEN..columns.end / SUM_LEN]
        .as_chunks()
        .0;
    for (((span, q), &scale), sums) in place.iter_mut().zip(q).zip(scales).zip(sums) {
        *span = Span::new(q, scale, sums);
    }
}

/// Cuts a range into ranges of at most `most`, about as long as each other.
fn chunks(range: Range<usize>, most: usize) -> impl Iterator<Item = Range<usize>> {
    let (start, len) = (range.start, range.len());
    let chunks = len.div_ceil(most);
    (0..chunks).map(move |i| start + i * len / chunks..start + (i + 1) * len / chunks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::scalar;

    /// Kernels whose tiles read packed tokens, on any CPU.
    fn packing() -> Kernels {
        Kernels {
            packs: true,
            ..scalar::KERNELS
        }
    }

    #[test]
    fn a_chunk_holds_each_stretch_of_its_tokens_one_behind_the_other() {
        let (pool, kernels) = (Pool::new(2).unwrap(), packing());
        // Two stretches and a half, and a group that is more than a chunk.
        let (cols, tokens) = (640, TILE_TOKENS + 24);
        let mut x = Activations::new(tokens, cols);
        x.fill(&pool, &kernels, tokens, |token, x| {
            let wave = |i: usize| ((i * 37 + token * 11) % 101) as f32 / 50.0 - 1.0;
            x.iter_mut().enumerate().for_each(|(i, x)| *x = wave(i));
        });
        // Backwards, to see that the batch's order is its own; tokens 3 to 5 are in no group.
        let order: Vec<_> = (0..tokens).rev().map(|row| x.row(row)).collect();
        let groups = [0..3, 6..tokens];
        let mut storage = Storage::default();
        let batch = Batch::new(
            &pool,
            &kernels,
            Phase::Prompt,
            order,
            groups.clone().into_iter(),
            &mut storage,
        );
        let mut seen = Vec::new();
        for chunk in groups.into_iter().flat_map(|group| batch.chunks(group)) {
            assert_eq!(chunk.packed.len(), 3 * chunk.x.len());
            for (index, stretch) in chunk.packed.iter().enumerate() {
                let (number, token) = (index / chunk.x.len(), chunk.first + index % chunk.x.len());
                let x = x.row(tokens - 1 - token);
                let spans = x.q.chunks(SCALE_LEN).zip(x.scales).skip(number * SPANS);
                for (span, (q, &scale)) in stretch.iter().zip(spans) {
                    assert_eq!(span.q, q);
                    let step = 1.0 + span.step() as f32 / Span::STEPS as f32;
                    let power = f32::from_bits((span.exponent + 1f32.to_bits() as i32) as u32);
                    assert_eq!(step * power, scale);
                    let halves = q
                        .chunks(SUM_LEN)
                        .map(|q| q.iter().map(|&q| i32::from(q)).sum());
                    let halves: Vec<i32> = halves.collect();
                    assert_eq!(span.minus_sums.map(|sum| -sum), halves[..]);
                    assert_eq!(-span.minus_sum, halves[0] + halves[1]);
                }
            }
            seen.extend(chunk.first..chunk.first + chunk.x.len());
        }
        assert!(seen.into_iter().eq((0..3).chain(6..tokens)));
    }

    #[test]
    fn generation_packs_nothing() {
        let (pool, kernels) = (Pool::new(1).unwrap(), packing());
        let mut x = Activations::new(20, 64);
        x.fill(&pool, &kernels, 20, |_, x| x.fill(1.0));
        let mut storage = Storage::default();
        let batch = Batch::of(&pool, &kernels, Phase::Generate, &x, &mut storage);
        let chunks: Vec<_> = batch.chunks(0..20).collect();
        assert!(
            chunks
                .iter()
                .all(|chunk| chunk.packed.is_empty() && chunk.x.len() <= FEW_TOKENS)
        );
        assert_eq!(chunks.iter().map(|chunk| chunk.x.len()).sum::<usize>(), 20);
    }
}
