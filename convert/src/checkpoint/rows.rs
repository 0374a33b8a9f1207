//! Reading rows by position, in the order in which the output holds them.

use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::{Checkpoint, RowOrder, Slab, Source, Tensor};
use crate::error::{Error, Result};

/// Weights that are read, and encoded, at a time: 16 MiB as f32.
const CHUNK_WEIGHTS: usize = 4 << 20;

impl Tensor {
    /// Rows that are read at a time. Chunks end with a slab, so that a chunk is one stretch of one file.
    pub fn chunks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let rows = self.rows();
        let (slab, unit) = match &self.source {
            Source::Stored { slabs, order, .. } => {
                let unit = if let RowOrder::Interleave { head_dim } = order {
                    *head_dim
                } else {
                    1
                };
                (rows / slabs.len(), unit)
            }
            Source::Computed(_) => (rows, 1),
        };
        let step = (CHUNK_WEIGHTS / self.columns())
            .next_multiple_of(unit)
            .max(unit);
        (0..rows).step_by(slab).flat_map(move |first| {
            let end = first + slab;
            (first..end)
                .step_by(step)
                .map(move |row| row..(row + step).min(end))
        })
    }
}

impl Checkpoint {
    /// Reads a chunk of rows of a tensor (one of [`Tensor::chunks`]) into `bytes`, in the output's order and the stored type.
    pub fn read_rows(
        &self,
        tensor: &Tensor,
        chunk: Range<usize>,
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        let (kind, slabs, order) = match &tensor.source {
            Source::Stored { kind, slabs, order } => (*kind, slabs, *order),
            Source::Computed(values) => {
                bytes.clear();
                bytes.extend_from_slice(bytemuck::cast_slice(values));
                return Ok(());
            }
        };
        let row_bytes = kind
            .row_bytes(tensor.columns())
            .expect("checked when opened");
        let rows_per_slab = tensor.rows() / slabs.len();
        let slab = slabs[chunk.start / rows_per_slab];
        let first = chunk.start % rows_per_slab;
        bytes.resize(chunk.len() * row_bytes, 0);
        match order {
            RowOrder::Stored => self.read_at(slab, first * row_bytes, bytes),
            RowOrder::Interleave { head_dim } => {
                let mut stored = vec![0; bytes.len()];
                self.read_at(slab, first * row_bytes, &mut stored)?;
                let heads = stored.chunks_exact(head_dim * row_bytes);
                for (stored, head) in heads.zip(bytes.chunks_exact_mut(head_dim * row_bytes)) {
                    for (row, out) in head.chunks_exact_mut(row_bytes).enumerate() {
                        let from = (row % 2 * (head_dim / 2) + row / 2) * row_bytes;
                        out.copy_from_slice(&stored[from..from + row_bytes]);
                    }
                }
                Ok(())
            }
            RowOrder::Transposed { stride } => {
                let size = kind.block_bytes();
                let mut stored = vec![0; chunk.len() * size];
                for column in 0..tensor.columns() {
                    self.read_at(slab, (column * stride + first) * size, &mut stored)?;
                    for (row, weight) in stored.chunks_exact(size).enumerate() {
                        let to = row * row_bytes + column * size;
                        bytes[to..to + size].copy_from_slice(weight);
                    }
                }
                Ok(())
            }
        }
    }

    fn read_at(&self, slab: Slab, skip: usize, bytes: &mut [u8]) -> Result<()> {
        let input = &self.files[slab.file];
        input
            .file
            .read_exact_at(bytes, slab.offset + skip as u64)
            .map_err(Error::io("read", &input.path))
    }
}
