//! Matrix times activations, spread over the pool.

use std::marker::PhantomData;
use std::ops::Range;

use arrayvec::ArrayVec;

use super::{Activation, Activations, Kernels, Phase, TILE_ROWS, TILE_TOKENS};
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
///
/// A task takes [`TILE_ROWS`] rows: few enough to balance cores of different speed, and enough
/// that claiming costs nothing (32 rows of 4096 four-bit weights are 74 KB).
pub fn linear(
    pool: &Pool,
    kernels: &Kernels,
    phase: Phase,
    x: &Activations,
    into: Into,
    products: &mut [(&Matrix, &mut [f32])],
) {
    let products: Vec<_> = products
        .iter_mut()
        .map(|(matrix, out)| (*matrix, Out::new(out, x.len(), matrix.rows)))
        .collect();
    let tasks = products
        .iter()
        .map(|(matrix, _)| matrix.rows.div_ceil(TILE_ROWS))
        .sum();
    pool.run(tasks, &|mut task| {
        let (matrix, out) = products
            .iter()
            .find(|(matrix, _)| {
                let own = matrix.rows.div_ceil(TILE_ROWS);
                let found = task < own;
                task -= if found { 0 } else { own };
                found
            })
            .expect("tasks were counted over the same products");
        let range = task * TILE_ROWS..((task + 1) * TILE_ROWS).min(matrix.rows);
        let rows = matrix.rows(range.clone());
        for tokens in chunks(0..x.len()) {
            let mut product = Product::new();
            product.compute(
                kernels,
                phase,
                rows,
                tokens.clone().map(|token| x.row(token)),
            );
            for (token, sums) in tokens.zip(&product.sums) {
                // SAFETY: tasks take disjoint ranges of rows.
                let out = unsafe { out.columns(token, range.start, range.len()) };
                match into {
                    Into::Set => out.copy_from_slice(&sums[..out.len()]),
                    Into::Add => out.iter_mut().zip(sums).for_each(|(out, sum)| *out += *sum),
                }
            }
        }
    });
}

/// Cuts a range into ranges of at most [`TILE_TOKENS`], about as long as each other.
pub(super) fn chunks(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let (start, len) = (range.start, range.len());
    let chunks = len.div_ceil(TILE_TOKENS);
    (0..chunks).map(move |i| start + i * len / chunks..start + (i + 1) * len / chunks)
}

/// Storage on the stack for the product of a tile with up to [`TILE_TOKENS`] tokens.
pub(super) struct Product<'a> {
    x: ArrayVec<Activation<'a>, TILE_TOKENS>,
    /// The product, `[tokens][rows]`.
    pub(super) sums: ArrayVec<[f32; TILE_ROWS], TILE_TOKENS>,
}

impl<'a> Product<'a> {
    #[inline]
    pub(super) fn new() -> Self {
        Self {
            x: ArrayVec::new_const(),
            sums: ArrayVec::new_const(),
        }
    }

    /// Computes it.
    pub(super) fn compute(
        &mut self,
        kernels: &Kernels,
        phase: Phase,
        rows: Rows<'_>,
        x: impl Iterator<Item = Activation<'a>>,
    ) {
        self.x.clear();
        self.sums.clear();
        for x in x {
            self.x.push(x);
            self.sums.push([0.0; TILE_ROWS]);
        }
        kernels.product(phase, rows, &self.x, &mut self.sums);
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
