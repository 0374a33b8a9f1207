//! How far a matrix's outputs are off in each type: a share of their mean square.

use fewbit::quant::{BlockType, Grid, RowEncoder};
use rayon::prelude::*;

use crate::checkpoint::{Checkpoint, Source, Tensor};
use crate::error::{Error, Result};
use crate::imatrix::Imatrix;
use crate::moments::Moments;
use crate::round::{RawWindow, Round, Rounder};

/// Rows of a matrix that are encoded to see; at least [`EXPERT_ROWS`] of an expert.
const ROWS: usize = 48;
const EXPERT_ROWS: usize = 8;

/// Types that a matrix may get where they fill its rows, or [`SMALL`] where they do not.
const LARGE: [BlockType; 7] = [
    BlockType::Q2_K,
    BlockType::Q3_K,
    BlockType::IQ4_XS,
    BlockType::Q4_K,
    BlockType::Q5_K,
    BlockType::Q6_K,
    BlockType::Q8_0,
];
const SMALL: [BlockType; 6] = [
    BlockType::IQ4_NL,
    BlockType::Q4_0,
    BlockType::Q4_1,
    BlockType::Q5_0,
    BlockType::Q5_1,
    BlockType::Q8_0,
];

/// What is needed to measure losses.
pub struct Losses<'a> {
    /// Whose matrices.
    pub checkpoint: &'a Checkpoint,
    /// How they will be rounded.
    pub round: Round,
    /// By what.
    pub imatrix: &'a Imatrix,
    /// By what else.
    pub moments: Option<&'a Moments>,
    /// The type that sensitivities were measured with.
    pub degraded: BlockType,
}

/// A matrix's losses, as shares.
#[derive(Clone, Debug)]
pub struct Measured {
    /// In the type that sensitivities were measured with, rounded plainly.
    pub degraded: f64,
    /// In each type that it may get.
    pub by_type: Vec<(BlockType, f64)>,
}

/// The form that errors are measured by.
enum Form {
    /// Inputs' mean squares.
    Diagonal(Vec<f32>),
    /// Their second moments.
    Windows(Vec<RawWindow>),
}

impl Form {
    /// `eᵀ H e`.
    fn of(&self, errors: &[f32]) -> f64 {
        match self {
            Self::Diagonal(weights) => {
                let terms = errors.iter().zip(weights);
                terms.map(|(e, w)| f64::from(e * e * w)).sum()
            }
            Self::Windows(windows) => windows.iter().map(|window| window.cost(errors)).sum(),
        }
    }
}

/// Sampled rows of an expert.
struct Sample {
    expert: usize,
    rows: Vec<Vec<f32>>,
    form: Form,
}

impl Losses<'_> {
    /// Losses of the tensor with this index.
    ///
    /// # Errors
    /// If rows or statistics cannot be read, or no type fills its rows.
    pub fn of(&self, index: usize) -> Result<Measured> {
        let tensor = &self.checkpoint.tensors[index];
        let samples = self.samples(tensor)?;
        let energy: f64 = samples
            .iter()
            .map(|sample| sample.sum(|row| row.to_vec()))
            .sum();
        let share = |loss: f64| if energy > 0.0 { loss / energy } else { 0.0 };
        let fills = |kind: &BlockType| kind.row_bytes(tensor.columns()).is_some();
        let kinds: Vec<BlockType> = match LARGE.iter().all(fills) {
            true => LARGE.to_vec(),
            false => SMALL.into_iter().filter(fills).collect(),
        };
        let kinds = if kinds.is_empty() {
            vec![BlockType::F16]
        } else {
            kinds
        };

        let degraded = match fills(&self.degraded) {
            true => {
                let encode = self.degraded.encoder().expect("checked when read");
                let plain = |sample: &Sample| {
                    sample.sum(|row| errors(self.degraded, row, |bytes| encode(row, None, bytes)))
                };
                samples.iter().map(plain).sum()
            }
            false => 0.0,
        };
        let losses = self.losses(tensor, &kinds, &samples)?;
        let by_type = kinds.into_iter().zip(losses.into_iter().map(share));
        Ok(Measured {
            degraded: share(degraded),
            by_type: by_type.collect(),
        })
    }

    /// What is lost in each of `kinds`.
    fn losses(&self, tensor: &Tensor, kinds: &[BlockType], samples: &[Sample]) -> Result<Vec<f64>> {
        let columns = tensor.columns();
        let importance = self.imatrix.of(tensor)?;
        // Types with sub-blocks of one length after each other: factoring moments takes longer than the rows.
        let mut order: Vec<usize> = (0..kinds.len()).collect();
        order.sort_by_key(|&index| Grid::of(kinds[index]).map(|grid| grid.sub));
        let mut losses = vec![0.0; kinds.len()];
        for sample in samples {
            let own = importance.map(|all| &all[sample.expert * columns..][..columns]);
            let mut ready: Option<Rounder<'_>> = None;
            for &index in &order {
                let kind = kinds[index];
                let encode: RowEncoder = kind.encoder().expect("all of these are written");
                let new = Rounder::new(self.round, kind, tensor, self.imatrix, self.moments)?;
                let rounder = match (new, ready.take(), Grid::of(kind)) {
                    (Some(_), Some(mut known), Some(grid)) => {
                        known.change_kind(kind, grid);
                        Some(known)
                    }
                    (new, _, _) => new,
                };
                ready = rounder;
                if let Some(rounder) = &mut ready {
                    rounder.prepare(sample.expert..sample.expert + 1)?;
                }
                losses[index] += sample.sum(|row| {
                    errors(kind, row, |bytes| match &ready {
                        Some(rounder) => rounder.encode_row(sample.expert, row, bytes),
                        None => encode(row, own, bytes),
                    })
                });
            }
        }
        Ok(losses)
    }

    /// Rows of each expert, evenly spread, with what their errors are measured by.
    fn samples(&self, tensor: &Tensor) -> Result<Vec<Sample>> {
        let rows = tensor.rows_per_expert();
        let experts = tensor.rows() / rows;
        let count = (ROWS / experts).max(EXPERT_ROWS).min(rows);
        let wanted = |expert: usize| (0..count).map(move |i| expert * rows + i * rows / count);
        let kind = match tensor.source {
            Source::Stored { kind, .. } => kind,
            Source::Computed(_) => BlockType::F32,
        };
        let row_bytes = kind
            .row_bytes(tensor.columns())
            .expect("checked when opened");
        let mut all: Vec<Vec<f32>> = Vec::new();
        let mut wanted: std::iter::Peekable<_> = (0..experts).flat_map(wanted).peekable();
        let mut bytes = Vec::new();
        for chunk in tensor.chunks() {
            if wanted.peek().is_none_or(|&row| row >= chunk.end) {
                continue;
            }
            let first = chunk.start;
            self.checkpoint
                .read_rows(tensor, chunk.clone(), &mut bytes)?;
            while let Some(row) = wanted.next_if(|&row| row < chunk.end) {
                let mut weights = vec![0.0; tensor.columns()];
                kind.decode_row(
                    &bytes[(row - first) * row_bytes..][..row_bytes],
                    &mut weights,
                );
                if let Some(column) = weights.iter().position(|weight| !weight.is_finite()) {
                    return Err(Error::NotFinite {
                        path: self.checkpoint.path.clone(),
                        tensor: tensor.name.clone(),
                        row: row as u64,
                        column,
                        value: weights[column],
                    });
                }
                all.push(weights);
            }
        }

        let smoothed = self.imatrix.smoothed(tensor)?;
        let moments = match self.moments {
            Some(moments) => moments.of(tensor)?.map(|name| (moments, name)),
            None => None,
        };
        let mut rows = all.into_iter();
        (0..experts)
            .map(|expert| {
                let columns = tensor.columns();
                let form = match (&moments, &smoothed) {
                    (Some((moments, name)), _) => Form::Windows(moments.read(name, expert)?),
                    (None, Some(squares)) => {
                        // An expert counts as often as it is asked.
                        let share = self.imatrix.share(&tensor.name, expert);
                        let own = &squares[expert * columns..][..columns];
                        Form::Diagonal(own.iter().map(|x| x * share).collect())
                    }
                    (None, None) => Form::Diagonal(vec![1.0; columns]),
                };
                Ok(Sample {
                    expert,
                    rows: rows.by_ref().take(count).collect(),
                    form,
                })
            })
            .collect()
    }
}

impl Sample {
    /// The cost of what `errors` makes of each row, summed.
    fn sum(&self, errors: impl Fn(&[f32]) -> Vec<f32> + Sync) -> f64 {
        let costs = self.rows.par_iter().map(|row| self.form.of(&errors(row)));
        // In order: the sum must not depend on threads.
        costs.collect::<Vec<f64>>().into_iter().sum()
    }
}

/// How far `row` is from what `encode` makes of it.
fn errors(kind: BlockType, row: &[f32], encode: impl FnOnce(&mut [u8])) -> Vec<f32> {
    let bytes = kind.row_bytes(row.len()).expect("its blocks fill the row");
    let mut encoded = vec![0; bytes];
    encode(&mut encoded);
    let mut decoded = vec![0.0; row.len()];
    kind.decode_row(&encoded, &mut decoded);
    row.iter().zip(decoded).map(|(w, d)| w - d).collect()
}
