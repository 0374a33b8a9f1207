//! Activations as kernels read them: f32, and 8 bits with one scale for each 32.
//!
//! One scale for 32 values, where ggml's K-quants use one for 256: a single loud channel then
//! coarsens its 31 neighbours only. Half of the divergence that a Q6_K model shows under one
//! scale for 256 comes from that rounding and not from the weights.
//!
//! A row of `cols` activations is kept as four arrays rather than as blocks, so that a kernel
//! loads 64 codes with one instruction and the scales of a super-block with another:
//!
//! ```text
//! x      f32 × cols         the activations themselves
//! q      i8  × cols         round(x / scale), in -127..=127
//! scales f32 × cols/32      max |x| / 127 over 32 columns
//! sums   i16 × cols/16      Σ q over 16 columns: what a block's minimum or offset is multiplied with
//! ```

use crate::threads::Pool;

use super::Kernels;

/// Columns that share a scale.
pub const SCALE_LEN: usize = 32;
/// Columns that share a sum.
pub const SUM_LEN: usize = 16;

/// One row of activations, borrowed.
#[derive(Clone, Copy)]
pub struct Activation<'a> {
    /// The activations in f32, `cols` long.
    pub x: &'a [f32],
    /// Their 8-bit codes, `cols` long; empty where `cols` is no multiple of 32.
    pub q: &'a [i8],
    /// One scale for each 32 codes.
    pub scales: &'a [f32],
    /// The sum of each 16 codes.
    pub sums: &'a [i16],
}

impl<'a> Activation<'a> {
    /// A row that only meets F32, F16 and BF16 rows.
    pub fn in_f32(x: &'a [f32]) -> Self {
        Self {
            x,
            q: &[],
            scales: &[],
            sums: &[],
        }
    }
}

/// Rows of activations, all of the same number of columns, in storage allocated once.
pub struct Activations {
    cols: usize,
    rows: usize,
    x: Vec<f32>,
    q: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<i16>,
}

impl Activations {
    /// Storage for `capacity` rows of `cols` activations.
    pub fn new(capacity: usize, cols: usize) -> Self {
        let coded = if cols.is_multiple_of(SCALE_LEN) {
            capacity * cols
        } else {
            0
        };
        Self {
            cols,
            rows: 0,
            x: vec![0.0; capacity * cols],
            q: vec![0; coded],
            scales: vec![0.0; coded / SCALE_LEN],
            sums: vec![0; coded / SUM_LEN],
        }
    }

    /// Columns of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Rows in use.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.rows
    }

    /// Row `index`.
    pub fn row(&self, index: usize) -> Activation<'_> {
        assert!(index < self.rows);
        let span = |len: usize| index * len..(index + 1) * len;
        if self.q.is_empty() {
            return Activation::in_f32(&self.x[span(self.cols)]);
        }
        Activation {
            x: &self.x[span(self.cols)],
            q: &self.q[span(self.cols)],
            scales: &self.scales[span(self.cols / SCALE_LEN)],
            sums: &self.sums[span(self.cols / SUM_LEN)],
        }
    }

    /// Sets the number of rows and fills them: `write(i, x)` writes row `i`'s activations,
    /// which are then quantized. Rows are independent and spread over the pool.
    pub fn fill(
        &mut self,
        pool: &Pool,
        kernels: &Kernels,
        rows: usize,
        write: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        let cols = self.cols;
        assert!(rows * cols <= self.x.len(), "{rows} rows do not fit");
        self.rows = rows;
        let coded = !self.q.is_empty();
        let parts = self.parts();
        pool.run(rows, &|row| {
            // SAFETY: each row is claimed by one task, and rows do not overlap.
            let mut part = unsafe { parts.columns(row, 0, cols) };
            write(row, part.x);
            if coded {
                part.quantize(kernels);
            }
        });
    }

    /// Sets the number of rows, to be filled through [`Activations::parts`].
    pub(crate) fn resize(&mut self, rows: usize) {
        assert!(rows * self.cols <= self.x.len(), "{rows} rows do not fit");
        self.rows = rows;
    }

    /// A handle through which several tasks fill disjoint columns of the rows.
    pub(crate) fn parts(&mut self) -> Parts<'_> {
        Parts {
            cols: self.cols,
            rows: self.rows,
            coded: !self.q.is_empty(),
            x: self.x.as_mut_ptr(),
            q: self.q.as_mut_ptr(),
            scales: self.scales.as_mut_ptr(),
            sums: self.sums.as_mut_ptr(),
            _storage: std::marker::PhantomData,
        }
    }
}

/// Shared access to disjoint parts of [`Activations`].
#[derive(Clone, Copy)]
pub(crate) struct Parts<'a> {
    cols: usize,
    rows: usize,
    coded: bool,
    x: *mut f32,
    q: *mut i8,
    scales: *mut f32,
    sums: *mut i16,
    _storage: std::marker::PhantomData<&'a mut Activations>,
}

// SAFETY: a `Parts` only hands out disjoint parts (the contract of `columns`) of storage that it
// borrows exclusively.
unsafe impl Send for Parts<'_> {}
// SAFETY: as above.
unsafe impl Sync for Parts<'_> {}

impl<'a> Parts<'a> {
    /// Columns `start..start + len` of row `row`; `start` and `len` are multiples of 32 where
    /// the row is quantized.
    ///
    /// # Safety
    /// No two parts alive at the same time overlap.
    pub(crate) unsafe fn columns(&self, row: usize, start: usize, len: usize) -> Part<'a> {
        assert!(row < self.rows && start + len <= self.cols);
        let at = row * self.cols + start;
        let coded = if self.coded {
            assert!(at.is_multiple_of(SCALE_LEN) && len.is_multiple_of(SCALE_LEN));
            len
        } else {
            0
        };
        // SAFETY: the ranges lie inside the storage (asserted above), which is borrowed
        // exclusively for 'a; the caller keeps parts disjoint.
        unsafe {
            Part {
                x: std::slice::from_raw_parts_mut(self.x.add(at), len),
                q: std::slice::from_raw_parts_mut(
                    self.q.add(if self.coded { at } else { 0 }),
                    coded,
                ),
                scales: std::slice::from_raw_parts_mut(
                    self.scales.add(if self.coded { at / SCALE_LEN } else { 0 }),
                    coded / SCALE_LEN,
                ),
                sums: std::slice::from_raw_parts_mut(
                    self.sums.add(if self.coded { at / SUM_LEN } else { 0 }),
                    coded / SUM_LEN,
                ),
            }
        }
    }
}

/// A run of columns of one row, exclusively borrowed.
pub(crate) struct Part<'a> {
    pub(crate) x: &'a mut [f32],
    q: &'a mut [i8],
    scales: &'a mut [f32],
    sums: &'a mut [i16],
}

impl Part<'_> {
    /// Quantizes what `x` holds.
    pub(crate) fn quantize(&mut self, kernels: &Kernels) {
        if !self.q.is_empty() {
            (kernels.quantize)(self.x, self.q, self.scales, self.sums);
        }
    }
}

/// Quantizes a row, or whole groups of 32 columns of one: `q = round(x / scale)` with
/// `scale = max |x| / 127` over 32 columns, halves rounded to even, and the sum of each 16
/// codes. The arithmetic that every instruction set repeats bit for bit.
///
/// A group that holds a NaN or an infinity gets it as its scale, and codes of 0: the dot
/// product is then NaN, not a number that hides it. A group too small for `127 / max` to be
/// finite (below 4e-37) gets codes of 0.
pub fn quantize(x: &[f32], q: &mut [i8], scales: &mut [f32], sums: &mut [i16]) {
    let groups = x.chunks_exact(SCALE_LEN).zip(q.chunks_exact_mut(SCALE_LEN));
    let sums = sums.chunks_exact_mut(SCALE_LEN / SUM_LEN);
    for ((x, q), (scale, sums)) in groups.zip(scales.iter_mut().zip(sums)) {
        // Without their signs, floats are ordered as their bits are, with NaN at the top.
        let max = x.iter().fold(0, |max, x| x.abs().to_bits().max(max));
        let max = f32::from_bits(max);
        *scale = max / 127.0;
        let inverse = inverse_scale(max);
        for (q, x) in q.iter_mut().zip(x) {
            *q = (x * inverse).round_ties_even() as i8; // NaN becomes 0
        }
        for (sum, q) in sums.iter_mut().zip(q.chunks_exact(SUM_LEN)) {
            *sum = q.iter().map(|&q| i16::from(q)).sum();
        }
    }
}

/// What activations of at most `max` are multiplied with to become codes; 0 where there is no
/// finite number that would do.
#[inline]
pub(super) fn inverse_scale(max: f32) -> f32 {
    let inverse = 127.0 / max;
    if inverse.is_finite() { inverse } else { 0.0 }
}
