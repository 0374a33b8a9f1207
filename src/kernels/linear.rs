//! Matrix times activations, spread over the pool.

use std::marker::PhantomData;

use super::{Activations, Kernels};
use crate::tensor::Matrix;
use crate::threads::Pool;

/// Rows of a matrix that one task takes: small enough to balance cores of different speed,
/// large enough that claiming costs nothing (32 rows of 4096 four-bit weights are 74 KB).
pub(super) const ROWS: usize = 32;

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
/// of `matrix.rows`. Every output depends on its own row and token alone.
pub fn linear(
    pool: &Pool,
    kernels: &Kernels,
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
        .map(|(matrix, _)| matrix.rows.div_ceil(ROWS))
        .sum();
    pool.run(tasks, &|mut task| {
        let (matrix, out) = products
            .iter()
            .find(|(matrix, _)| {
                let own = matrix.rows.div_ceil(ROWS);
                let found = task < own;
                task -= if found { 0 } else { own };
                found
            })
            .expect("tasks were counted over the same products");
        let range = task * ROWS..((task + 1) * ROWS).min(matrix.rows);
        let rows = matrix.rows(range.clone());
        for token in 0..x.len() {
            // SAFETY: tasks take disjoint ranges of rows.
            let out = unsafe { out.columns(token, range.start, range.len()) };
            match into {
                Into::Set => kernels.dot_rows(rows, x.row(token), out),
                Into::Add => {
                    let mut sums = [0.0; ROWS];
                    let sums = &mut sums[..out.len()];
                    kernels.dot_rows(rows, x.row(token), sums);
                    out.iter_mut().zip(sums).for_each(|(out, sum)| *out += *sum);
                }
            }
        }
    });
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
