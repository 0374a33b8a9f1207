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
//! scales f32 × cols/32      max |x| / 127 over 32 columns, rounded up to 4 significant bits
//! sums   i16 × cols/16      Σ q over 16 columns: what a block's minimum or offset is multiplied with
//! loud   8 at most          columns that are kept apart, in f32, their codes being 0: see `loud`
//! ```
//!
//! A scale of 4 significant bits is a power of two times one of eight steps, 1, 1⅛ … 1⅞. So tiles can
//! keep the weights' scales times each step at hand, and the power of two costs them no
//! multiplication; the codes' own rounding grows by a twelfth at most.

use super::Kernels;
use super::loud::{self, Loud, LoudColumns};
use crate::threads::Pool;

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
    /// The columns that are kept out of the codes, in ascending order.
    pub loud: &'a [Loud],
}

impl<'a> Activation<'a> {
    /// A row that only meets F32, F16 and BF16 rows.
    pub fn in_f32(x: &'a [f32]) -> Self {
        Self {
            x,
            q: &[],
            scales: &[],
            sums: &[],
            loud: &[],
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
    loud: Vec<LoudColumns>,
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
            loud: vec![LoudColumns::new(); capacity],
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
            loud: &self.loud[index],
        }
    }

    /// Sets the number of rows and fills them: `write(i, x)` writes row `i`'s activations,
    /// which are then quantized, loud columns apart. Rows are independent and spread over the pool.
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
            let (mut part, loud) = unsafe { (parts.columns(row, 0, cols), parts.loud(row)) };
            write(row, part.x);
            if coded {
                part.quantize_apart(kernels, loud);
            }
        });
    }

    /// Sets the number of rows, to be filled through [`Activations::parts`], where no column is
    /// kept apart.
    pub(crate) fn resize(&mut self, rows: usize) {
        assert!(rows * self.cols <= self.x.len(), "{rows} rows do not fit");
        self.rows = rows;
        self.loud[..rows].iter_mut().for_each(LoudColumns::clear);
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
            loud: self.loud.as_mut_ptr(),
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
    loud: *mut LoudColumns,
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

    /// Where the loud columns of row `row` go.
    ///
    /// # Safety
    /// It is borrowed once at a time.
    unsafe fn loud(&self, row: usize) -> &'a mut LoudColumns {
        assert!(row < self.rows);
        // SAFETY: inside the storage, which is borrowed exclusively for 'a; the caller keeps
        // borrows apart.
        unsafe { &mut *self.loud.add(row) }
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
    /// Quantizes a whole row, its loud columns apart.
    fn quantize_apart(&mut self, kernels: &Kernels, loud: &mut LoudColumns) {
        loud::find(self.x, self.scales, loud);
        for loud in &*loud {
            self.x[loud.column as usize] = 0.0;
        }
        self.quantize(kernels);
        for loud in &*loud {
            self.x[loud.column as usize] = loud.x;
        }
    }

    /// Quantizes what `x` holds.
    pub(crate) fn quantize(&mut self, kernels: &Kernels) {
        if !self.q.is_empty() {
            (kernels.quantize)(self.x, self.q, self.scales, self.sums);
        }
    }
}

/// Quantizes a row, or whole groups of 32 columns of one: `q = round(x / scale)`, halves rounded
/// to even, with the scale of each 32 columns (below), and the sum of each 16 codes. The arithmetic that
/// every instruction set repeats bit for bit.
///
/// A group that holds a NaN or an infinity gets it as its scale, and codes of 0: the dot
/// product is then NaN, not a number that hides it.
pub fn quantize(x: &[f32], q: &mut [i8], scales: &mut [f32], sums: &mut [i16]) {
    let groups = x.chunks_exact(SCALE_LEN).zip(q.chunks_exact_mut(SCALE_LEN));
    let sums = sums.chunks_exact_mut(SCALE_LEN / SUM_LEN);
    for ((x, q), (scale, sums)) in groups.zip(scales.iter_mut().zip(sums)) {
        // Without their signs, floats are ordered as their bits are, with NaN at the top.
        let max = x.iter().fold(0, |max, x| x.abs().to_bits().max(max));
        let inverse;
        (*scale, inverse) = scale_of(f32::from_bits(max));
        for (q, x) in q.iter_mut().zip(x) {
            *q = (x * inverse).round_ties_even() as i8; // NaN becomes 0
        }
        for (sum, q) in sums.iter_mut().zip(q.chunks_exact(SUM_LEN)) {
            *sum = q.iter().map(|&q| i16::from(q)).sum();
        }
    }
}

/// Activations below this are taken for zeros.
const MIN_MAX: f32 = 127.0 / MAX_SCALE;
/// Scales from here on (2⁶⁰) are those of damage, and make a product NaN in tiles.
pub(super) const MAX_SCALE: f32 = (1u64 << 60) as f32;

/// The scale of activations of at most `max`, and what they are multiplied with to become
/// codes: `max / 127`, rounded up to 4 significant bits, and its inverse. Where the activations
/// are not finite, or all below 10⁻¹⁶, the inverse is 0, and so are the codes.
#[inline]
pub(super) fn scale_of(max: f32) -> (f32, f32) {
    const LOW_BITS: u32 = (1 << 20) - 1;
    let scale = max / 127.0;
    if !scale.is_finite() {
        return (scale, 0.0);
    }
    if max < MIN_MAX {
        return (0.0, 0.0);
    }
    let scale = f32::from_bits((scale.to_bits() + LOW_BITS) & !LOW_BITS);
    (scale, 1.0 / scale)
}
