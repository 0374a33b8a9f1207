//! Encoding a chunk of rows, all threads at it: stored bytes → f32 → blocks.

use fewbit::quant::BlockType;
use rayon::prelude::*;

/// Weights that a thread takes at a time, as whole rows.
const BATCH_WEIGHTS: usize = 32 << 10;

/// How a chunk of rows is encoded.
#[derive(Clone, Copy, Debug)]
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

impl Job<'_> {
    /// Encodes whole rows into `encoded`, whose former content is lost. The bytes do not depend on the number of threads.
    ///
    /// # Errors
    /// The first weight that is not finite, or that F16 cannot hold where that is the target.
    pub fn encode(&self, stored: &[u8], encoded: &mut Vec<u8>) -> Result<(), BadWeight> {
        let bytes = |kind: BlockType| kind.row_bytes(self.columns).expect("checked when planned");
        let (from_bytes, to_bytes) = (bytes(self.from), bytes(self.to));
        let rows = stored.len() / from_bytes;
        encoded.resize(rows * to_bytes, 0);
        if self.from == self.to && self.from.block_len() > 1 {
            encoded.copy_from_slice(stored);
            return Ok(());
        }
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
        /// From here on, f16 rounds to infinity.
        const F16_OVERFLOW: f32 = 65520.0;
        let limit = if self.to == BlockType::F16 {
            F16_OVERFLOW
        } else {
            f32::INFINITY
        };
        self.from.decode_row(stored, weights);
        // One pass without branches first: nearly all rows are sound. NaN compares false.
        let sound = |weight: &f32| weight.abs() < limit;
        if !weights.iter().fold(true, |all, weight| all & sound(weight)) {
            let column = weights
                .iter()
                .position(|weight| !sound(weight))
                .expect("one is bad");
            return Err(BadWeight {
                row,
                column,
                value: weights[column],
            });
        }
        if self.from == self.to {
            encoded.copy_from_slice(stored);
            return Ok(());
        }
        let expert = row / self.rows_per_expert;
        let importance = self
            .importance
            .map(|all| &all[expert * self.columns..][..self.columns]);
        let encoder = self.to.encoder().expect("checked when planned");
        encoder(weights, importance, encoded);
        Ok(())
    }
}
