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
                // Rows of a head are interleaved in pairs.
                let unit = match order {
                    RowOrder::Interleave { .. } => 2,
                    _ => 1,
                };
                (rows / slabs.len(), unit)
            }
            Source::Computed(_) => (rows, 1),
        };
        let step = (CHUNK_WEIGHTS / self.columns() / unit * unit).max(unit);
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
                let half = head_dim / 2;
                let mut stored = Vec::new();
                let mut rest = bytes.as_mut_slice();
                let mut row = first;
                while !rest.is_empty() {
                    // What the chunk holds of a head: as many rows of its first half as of its second.
                    let (head, within) = (row / head_dim, row % head_dim);
                    let rows = (head_dim - within).min(rest.len() / row_bytes);
                    let (part, after) = rest.split_at_mut(rows * row_bytes);
                    stored.resize(part.len() / 2, 0);
                    for parity in 0..2 {
                        let from = head * head_dim + parity * half + within / 2;
                        self.read_at(slab, from * row_bytes, &mut stored)?;
                        let to = part.chunks_exact_mut(row_bytes).skip(parity).step_by(2);
                        for (from, to) in stored.chunks_exact(row_bytes).zip(to) {
                            to.copy_from_slice(from);
                        }
                    }
                    row += rows;
                    rest = after;
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
