//! Encoding a chunk of rows, all threads at it: stored bytes → f32 → blocks.

use std::path::Path;

use fewbit::quant::BlockType;
use rayon::prelude::*;

use crate::error::Error;
use crate::merge::Corrections;
use crate::round::Rounder;

/// Weights that a thread takes at a time, as whole rows.
const BATCH_WEIGHTS: usize = 32 << 10;

/// Where the largest weight of a row lies in here, no scale that follows from it leaves F16's range. Rows outside, and those
/// that an importance matrix weighs, are decoded again to see whether all is finite.
const SAFE_PEAKS: std::ops::RangeInclusive<f32> = 1e-15..=16384.0;

/// How a chunk of rows is encoded.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// Type of the rows as they are stored.
    pub from: BlockType,
    /// Type to encode them in.
    pub to: BlockType,
    /// Weights in a row.
    pub columns: usize,
    /// Index of the chunk's first row in its tensor.
    pub first_row: usize,
    /// Rows that share a row of importance weights.
    pub rows_per_expert: usize,
    /// Importance weights, `columns` for each expert.
    pub importance: Option<&'a [f32]>,
    /// What rounds the rows otherwise than ggml's encoder, made ready for their experts.
    pub rounder: Option<&'a Rounder<'a>>,
    /// What adapters add to the rows first.
    pub corrections: Option<&'a Corrections<'a>>,
}

/// A weight that cannot be encoded, by its place in the tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BadWeight {
    /// Row, counted over all experts.
    pub row: usize,
    /// Column.
    pub column: usize,
    /// The weight.
    pub value: f32,
}

impl BadWeight {
    /// As an error about `tensor` of the checkpoint in `path`, which was to be encoded as `kind`.
    pub fn error(self, path: &Path, tensor: &str, kind: BlockType) -> Error {
        let (tensor, row) = (tensor.to_owned(), self.row as u64);
        match self.value.is_finite() {
            true => Error::TooLarge {
                tensor,
                row,
                column: self.column,
                value: self.value,
                kind,
            },
            false => Error::NotFinite {
                path: path.to_owned(),
                tensor,
                row,
                column: self.column,
                value: self.value,
            },
        }
    }
}

impl Job<'_> {
    /// Encodes whole rows into `encoded`, whose former content is lost. The bytes do not depend on the number of threads.
    ///
    /// # Errors
    /// The first weight that is not finite, or that the target cannot hold: its own range is that of F16 or BF16, or that of its
    /// blocks' scales, which are F16.
    pub fn encode(&self, stored: &[u8], encoded: &mut Vec<u8>) -> Result<(), BadWeight> {
        let bytes = |kind: BlockType| kind.row_bytes(self.columns).expect("checked when planned");
        let (from_bytes, to_bytes) = (bytes(self.from), bytes(self.to));
        let rows = stored.len() / from_bytes;
        encoded.resize(rows * to_bytes, 0);
        let batch = (BATCH_WEIGHTS / self.columns).max(1);
        let bad = stored
            .par_chunks(batch * from_bytes)
            .zip(encoded.par_chunks_mut(batch * to_bytes))
            .enumerate()
            .map_init(
                || vec![0.0; self.columns],
                |weights, (index, (stored, encoded))| {
                    let rows = stored
                        .chunks_exact(from_bytes)
                        .zip(encoded.chunks_exact_mut(to_bytes));
                    for (i, (stored, encoded)) in rows.enumerate() {
                        self.encode_row(
                            self.first_row + index * batch + i,
                            stored,
                            weights,
                            encoded,
                        )?;
                    }
                    Ok(())
                },
            )
            .find_map_first(Result::err);
        bad.map_or(Ok(()), Err)
    }

    fn encode_row(
        &self,
        row: usize,
        stored: &[u8],
        weights: &mut [f32],
        encoded: &mut [u8],
    ) -> Result<(), BadWeight> {
        self.from.decode_row(stored, weights);
        if let Some(corrections) = self.corrections {
            corrections.add(row, weights);
        }
        let bad = |column: usize, weights: &[f32]| BadWeight {
            row,
            column,
            value: weights[column],
        };
        // As bits, without sign: NaN is above infinity, and that above all numbers.
        let peak = weights
            .iter()
            .fold(0, |peak, weight| peak.max(weight.to_bits() & 0x7fff_ffff));
        if !f32::from_bits(peak).is_finite() {
            let column = weights.iter().position(|weight| !weight.is_finite());
            return Err(bad(column.expect("the peak is one"), weights));
        }
        if self.from == self.to && self.corrections.is_none() {
            encoded.copy_from_slice(stored);
            return Ok(());
        }
        let expert = row / self.rows_per_expert;
        let importance = self
            .importance
            .map(|all| &all[expert * self.columns..][..self.columns]);
        match self.rounder {
            Some(rounder) => rounder.encode_row(expert, weights, encoded),
            None => {
                let encoder = self.to.encoder().expect("checked when planned");
                encoder(weights, importance, encoded);
            }
        }
        let peak = f32::from_bits(peak);
        if peak == 0.0 || importance.is_none() && SAFE_PEAKS.contains(&peak) {
            return Ok(());
        }
        let mut decoded = vec![0.0; self.columns];
        self.to.decode_row(encoded, &mut decoded);
        // Where sums of squares overflow, encoders may also come to a scale of 0 and lose the largest weights.
        let lost = |column: usize| {
            let weight = weights[column];
            importance.is_none()
                && weight.abs() > *SAFE_PEAKS.end()
                && weight.abs() == peak
                && (decoded[column] - weight).abs() > peak / 2.0
        };
        let bad_column = (0..self.columns).find(|&c| !decoded[c].is_finite() || lost(c));
        match bad_column {
            None => Ok(()),
            // Of a block with a bad scale, the largest weight is the one to name.
            Some(first) => {
                let block = first / self.to.block_len() * self.to.block_len();
                let columns = block..block + self.to.block_len();
                let largest = columns.max_by(|&a, &b| {
                    let size = |column: usize| weights[column].abs();
                    size(a).total_cmp(&size(b)).then(b.cmp(&a))
                });
                Err(bad(largest.expect("blocks hold weights"), weights))
            }
        }
    }
}
