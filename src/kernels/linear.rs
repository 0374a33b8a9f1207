//! Matrix times activations, spread over the pool.

use std::marker::PhantomData;
use std::ops::Range;

use arrayvec::ArrayVec;

use super::{
    Activations, Batch, Kernels, Phase, STREAMS, Storage, Sums, TILE_ROWS, TILE_TOKENS, Tokens,
};
use crate::tensor::{Matrix, Rows};
use crate::threads::Pool;

/// What a product does with its output.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Into {
    /// `out = W · x`.
    Set,
    /// `out += W · x`.
    Add,
}

/// Computes several products of the same activations in one task space: for each
/// `(matrix, out)`, `out[t, r] = matrix[r] · x[t]` (or adds it), `out` holding `x.len()` rows
/// of `matrix.rows`. Every output depends on its own row and token (and on the phase) alone.
/// Tokens of a prompt are packed in `storage`.
pub fn linear(
    pool: &Pool,
    kernels: &Kernels,
    phase: Phase,
    x: &Activations,
    into: Into,
    products: &mut [(&Matrix, &mut [f32])],
    storage: &mut Storage,
) {
    let products: Vec<_> = products
        .iter_mut()
        .map(|(matrix, out)| {
            let rows = matrix.all();
            let cut = Cut::of_outputs(kernels, phase, rows);
            (rows, cut, Out::new(out, x.len(), rows.len()))
        })
        .collect();
    let batch = Batch::of(pool, kernels, phase, x, storage);
    let tasks = products.iter().map(|(_, cut, _)| cut.tasks()).sum();
    pool.run(tasks, &|mut task| {
        let (rows, cut, out) = products
            .iter()
            .find(|(_, cut, _)| {
                let found = task < cut.tasks();
                task -= if found { 0 } else { cut.tasks() };
                found
            })
            .expect("tasks were counted over the same products");
        let write = |token, range: Range<usize>, sums: &[f32]| {
            // SAFETY: tasks take disjoint ranges of rows.
            let out = unsafe { out.columns(token, range.start, range.len()) };
            match into {
                Into::Set => out.copy_from_slice(&sums[..out.len()]),
                Into::Add => out.iter_mut().zip(sums).for_each(|(out, sum)| *out += *sum),
            }
        };
        multiply(
            kernels,
            phase,
            *rows,
            cut.parts(task),
            &batch,
            0..x.len(),
            write,
        );
    });
}

/// Multiplies each part of `rows` with a group of a batch, and hands out `(token, part, products)`.
pub(super) fn multiply(
    kernels: &Kernels,
    phase: Phase,
    rows: Rows<'_>,
    parts: Parts,
    batch: &Batch<'_>,
    group: Range<usize>,
    mut write: impl FnMut(usize, Range<usize>, &[f32]),
) {
    match phase {
        Phase::Prompt => {
            let mut products = TileProducts::new();
            for part in parts {
                for some in batch.chunks(group.clone()) {
                    let sums = products.compute(kernels, rows.slice(part.clone()), some);
                    for (token, sums) in (some.first..).zip(sums) {
                        write(token, part.clone(), sums);
                    }
                }
            }
        }
        Phase::Generate => {
            let runs: Runs<'_> = parts.iter().map(|part| rows.slice(part.clone())).collect();
            let mut dots = Dots::new();
            for some in batch.chunks(group) {
                let sums = dots.compute(kernels, &runs, some);
                for (token, sums) in (some.first..).zip(sums) {
                    for (part, sums) in parts.iter().zip(sums) {
                        write(token, part.clone(), sums);
                    }
                }
            }
        }
    }
}

/// Rows from which on tasks are larger.
const MANY_ROWS: usize = 4096;

/// How the rows of a matrix are cut into tasks: into sections of which each task takes a part, so that a
/// thread whose tasks follow each other streams memory from as many places as there are sections.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    rows: usize,
    /// Rows of a section (but for the last): a multiple of `part`.
    section: usize,
    /// Rows of a part (but for the last of a section).
    part: usize,
}

/// The rows of a task, a range a section.
pub(super) type Parts = ArrayVec<Range<usize>, STREAMS>;

impl Cut {
    /// `sections` sections in parts of `part` rows.
    pub(super) fn new(rows: usize, sections: usize, part: usize) -> Self {
        let section = rows.div_ceil(sections).next_multiple_of(part);
        Self {
            rows,
            section,
            part,
        }
    }

    /// For products of which each row stands for itself: few enough rows a task to balance
    /// cores of different speed, and enough that claiming costs nothing (64 rows of 4096 four-bit
    /// weights are 147 KB; matrices of fewer than [`MANY_ROWS`] rows are cut finer).
    pub(super) fn of_outputs(kernels: &Kernels, phase: Phase, rows: Rows<'_>) -> Self {
        let streams = kernels.streams(phase, rows.kind);
        let finer = if rows.len() < MANY_ROWS { 1 } else { 2 };
        Self::new(
            rows.len(),
            streams,
            (finer * TILE_ROWS / streams).min(TILE_ROWS),
        )
    }

    pub(super) fn tasks(&self) -> usize {
        self.section.min(self.rows).div_ceil(self.part)
    }

    pub(super) fn parts(&self, task: usize) -> Parts {
        let starts = (task * self.part..self.rows).step_by(self.section);
        starts
            .map(|start| start..(start + self.part).min(self.rows))
            .collect()
    }
}

/// Tokens of generation that rows are multiplied with at a time.
pub(super) const FEW_TOKENS: usize = 16;

/// Runs of rows that are multiplied side by side.
pub(super) type Runs<'a> = ArrayVec<Rows<'a>, STREAMS>;

/// Storage on the stack for products: large, so that it is lent and not moved.
pub(super) struct Products<T, const TOKENS: usize>(ArrayVec<T, TOKENS>);

/// Products of a tile with a chunk of a prompt, `[tokens][rows]`.
pub(super) type TileProducts = Products<[f32; TILE_ROWS], TILE_TOKENS>;

/// Products of runs of rows with a chunk of generation, `[tokens][runs][rows]`.
pub(super) type Dots = Products<Sums, FEW_TOKENS>;

impl<T: Copy, const TOKENS: usize> Products<T, TOKENS> {
    #[inline]
    pub(super) fn new() -> Self {
        Self(ArrayVec::new_const())
    }

    /// Room for each token, still `zero`.
    #[inline]
    fn clear(&mut self, x: Tokens<'_>, zero: T) -> &mut [T] {
        self.0.clear();
        x.x.iter().for_each(|_| self.0.push(zero));
        &mut self.0
    }
}

impl TileProducts {
    /// Multiplies a tile with each of `x`.
    pub(super) fn compute(
        &mut self,
        kernels: &Kernels,
        rows: Rows<'_>,
        x: Tokens<'_>,
    ) -> &[[f32; TILE_ROWS]] {
        kernels.product(rows, x, self.clear(x, [0.0; TILE_ROWS]));
        &self.0
    }
}

impl Dots {
    /// Multiplies runs of rows with each of `x`.
    pub(super) fn compute(
        &mut self,
        kernels: &Kernels,
        runs: &[Rows<'_>],
        x: Tokens<'_>,
    ) -> &[Sums] {
        kernels.dots(runs, x.x, self.clear(x, [[0.0; TILE_ROWS]; STREAMS]));
        &self.0
    }
}

/// An output matrix `[tokens, rows]` that tasks write disjoint columns of.
pub(super) struct Out<'a> {
    data: *mut f32,
    tokens: usize,
    rows: usize,
    _borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: an `Out` only hands out disjoint parts (the contract of `columns`) of a slice that it
// borrows exclusively.
unsafe impl Sync for Out<'_> {}

impl<'a> Out<'a> {
    pub(super) fn new(out: &'a mut [f32], tokens: usize, rows: usize) -> Self {
        assert!(
            out.len() >= tokens * rows,
            "the output holds {tokens} x {rows}"
        );
        Self {
            data: out.as_mut_ptr(),
            tokens,
            rows,
            _borrow: PhantomData,
        }
    }

    /// Columns `start..start + len` of row `token`.
    ///
    /// # Safety
    /// No two parts alive at the same time overlap.
    #[allow(clippy::mut_from_ref)] // disjointness is the caller's contract
    pub(super) unsafe fn columns(&self, token: usize, start: usize, len: usize) -> &'a mut [f32] {
        assert!(token < self.tokens && start + len <= self.rows);
        // SAFETY: inside the slice (asserted here and in `new`), which is borrowed exclusively
        // for 'a; the caller keeps parts disjoint.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(token * self.rows + start), len) }
    }
}
