//! Better bits in the same blocks: rounding by what the output loses.
//!
//! A row `w` of a matrix meets inputs `x`; if `ŵ` is written in its place, the output is off by
//! `(w − ŵ)·x`, in the mean square by `(w − ŵ)ᵀ H (w − ŵ)` with the inputs' second moments
//! `H = Σ x xᵀ` (`quadratic`). ggml's encoders see the diagonal of `H` at most, and round each weight to
//! the level next to it. Here (`refine`) their scales are where it begins:
//!
//! 1. Error feedback: weights are rounded one after the other, and each takes up what the ones before it
//!    have lost, as far as their inputs go together (GPTQ, arXiv 2210.17323; in the form of LDLQ,
//!    arXiv 2307.13304).
//! 2. Descent: level by level, scale by scale, and the units of the scales, each move is made that lowers the
//!    quadratic form, the others held.
//!
//! Without moments (`best`) the form is diagonal: step 1 is left out then, and step 2 refits scales, minima and their
//! units, in Q4_K, Q5_K and Q4_1; in others ggml's choice is as good.
//!
//! An expert that saw few tokens of the calibration text leans on its layer's average ([`AVERAGE_TOKENS`]).

pub mod estimate;
mod quadratic;
mod refine;

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use fewbit::quant::{BlockType, Grid};
use rayon::prelude::*;

use crate::checkpoint::Tensor;
use crate::error::Result;
use crate::imatrix::Imatrix;
use crate::moments::Moments;
use quadratic::Quadratic;
pub use quadratic::RawWindow;

/// What an expert's statistics are mixed with, in tokens: its layer's average has as much say as so many tokens of its own.
pub const AVERAGE_TOKENS: f64 = 32.0;

/// Where an expert saw as many tokens, its layer's average has no say.
pub const ENOUGH_TOKENS: f64 = 1024.0;

/// How weights are rounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Round {
    /// As llama-quantize does, bit for bit.
    #[default]
    Ggml,
    /// Scales and levels refitted together, inputs taken as independent.
    Best,
    /// The same by the inputs' second moments, with error feedback.
    Gptq,
}

impl FromStr for Round {
    type Err = String;
    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name {
            "ggml" => Ok(Self::Ggml),
            "best" => Ok(Self::Best),
            "gptq" => Ok(Self::Gptq),
            _ => Err("must be ggml, best or gptq".to_owned()),
        }
    }
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ggml => "ggml",
            Self::Best => "best",
            Self::Gptq => "gptq",
        })
    }
}

/// Whether refitted scales and minima gain in a type by an imatrix alone: `quant-tests/ladder/bed.md` has the figures.
fn gains_by_refits(kind: BlockType) -> bool {
    matches!(kind, BlockType::Q4_1 | BlockType::Q4_K | BlockType::Q5_K)
}

/// Rounds the rows of one tensor.
pub struct Rounder<'a> {
    kind: BlockType,
    grid: Grid,
    columns: usize,
    /// Mean squares of the inputs, `columns` for each expert; all 1 where nothing is known.
    importance: Vec<f32>,
    moments: Option<(&'a Moments, String)>,
    /// Of the experts `first..first + ready.len()`: those that the rows at hand belong to.
    first: usize,
    ready: Vec<Quadratic>,
}

impl<'a> Rounder<'a> {
    /// A rounder for `tensor` in blocks of `kind`; `None` where ggml's way is all there is: types that are not taken
    /// apart, and without moments all but Q4_K, Q5_K and Q4_1. Of the token embedding, whose rows are looked up, all columns count alike.
    ///
    /// # Errors
    /// If moments do not fit the tensor.
    pub fn new(
        round: Round,
        kind: BlockType,
        tensor: &Tensor,
        imatrix: &Imatrix,
        moments: Option<&'a Moments>,
    ) -> Result<Option<Self>> {
        let grid = match (round, Grid::of(kind)) {
            (Round::Ggml, _) | (_, None) => return Ok(None),
            (Round::Best, _) if !gains_by_refits(kind) => return Ok(None),
            (_, Some(grid)) => grid,
        };
        let experts = tensor.shape.get(2).copied().unwrap_or(1);
        let importance = imatrix.smoothed(tensor)?;
        let importance = importance.unwrap_or_else(|| vec![1.0; tensor.columns() * experts]);
        let moments = match moments {
            Some(moments) => moments.of(tensor)?.map(|name| (moments, name)),
            None => None,
        };
        Ok(Some(Self {
            kind,
            grid,
            columns: tensor.columns(),
            importance,
            moments,
            first: 0,
            ready: Vec::new(),
        }))
    }

    /// Goes on with blocks of another type; what was made ready stays so if sub-blocks are as long.
    pub fn change_kind(&mut self, kind: BlockType, grid: Grid) {
        if grid.sub != self.grid.sub {
            self.ready.clear();
        }
        (self.kind, self.grid) = (kind, grid);
    }

    /// Makes ready what the rows of `experts` need, and forgets what those before them needed.
    ///
    /// # Errors
    /// If moments cannot be read, or are no moments.
    pub fn prepare(&mut self, experts: Range<usize>) -> Result<()> {
        let known = self.first..self.first + self.ready.len();
        if !known.contains(&experts.start) {
            (self.first, self.ready) = (experts.start, Vec::new());
        } else {
            self.ready.drain(..experts.start - known.start);
            self.first = experts.start;
        }
        for expert in self.first + self.ready.len()..experts.end {
            let diagonal = &self.importance[expert * self.columns..][..self.columns];
            self.ready.push(match &self.moments {
                None => Quadratic::diagonal(diagonal),
                Some((moments, name)) => {
                    let windows = moments.read(name, expert)?;
                    let windows = windows.into_par_iter();
                    let windows = windows.map(|window| window.prepare(self.grid.sub));
                    Quadratic::new(windows.collect())
                }
            });
        }
        Ok(())
    }

    /// Rounds a row of `expert`, which was made ready.
    pub fn encode_row(&self, expert: usize, row: &[f32], encoded: &mut [u8]) {
        let form = &self.ready[expert - self.first];
        refine::encode_row(self.kind, &self.grid, form, row, encoded);
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::ChaCha8Rng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    const COLUMNS: usize = 512;

    /// Moments of inputs that go together, and rows to round.
    fn case(seed: u64) -> (Vec<f32>, Vec<Vec<f32>>) {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut uniform = move || random.random::<f32>() - 0.5;
        let mut moments = vec![0.0; COLUMNS * COLUMNS];
        for _ in 0..1000 {
            let shared: [f32; 16] = std::array::from_fn(|_| uniform());
            let x: Vec<f32> = (0..COLUMNS)
                .map(|i| shared[i * 7 % 16] * (1.0 + (i % 5) as f32) + 0.3 * uniform())
                .collect();
            for i in 0..COLUMNS {
                for j in 0..COLUMNS {
                    moments[i * COLUMNS + j] += x[i] * x[j];
                }
            }
        }
        let rows = (0..4).map(|_| (0..COLUMNS).map(|_| uniform()).collect());
        (moments, rows.collect())
    }

    /// `(w − ŵ)ᵀ H (w − ŵ)`.
    fn loss(moments: &[f32], kind: BlockType, row: &[f32], encoded: &[u8]) -> f64 {
        let mut decoded = vec![0.0; row.len()];
        kind.decode_row(encoded, &mut decoded);
        let errors: Vec<f64> = row
            .iter()
            .zip(&decoded)
            .map(|(w, d)| f64::from(w - d))
            .collect();
        let rows = moments.chunks_exact(COLUMNS).zip(&errors);
        rows.map(|(row, error)| {
            let row = row.iter().zip(&errors);
            error * row.map(|(m, e)| f64::from(*m) * e).sum::<f64>()
        })
        .sum()
    }

    fn windows(moments: &[f32], width: usize, sub: usize) -> Quadratic {
        let window = |start: usize| {
            let rows = moments.chunks_exact(COLUMNS).skip(start).take(width);
            let raw = RawWindow {
                start,
                moments: rows
                    .flat_map(|row| &row[start..start + width])
                    .copied()
                    .collect(),
                len: width,
            };
            raw.prepare(sub)
        };
        Quadratic::new((0..COLUMNS).step_by(width).map(window).collect())
    }

    #[test]
    fn the_more_is_known_of_the_inputs_the_less_is_lost() {
        let (moments, rows) = case(1);
        let importance: Vec<f32> = (0..COLUMNS).map(|i| moments[i * COLUMNS + i]).collect();
        for &kind in BlockType::ALL {
            let Some(grid) = Grid::of(kind) else { continue };
            let mut encoded = vec![0; kind.row_bytes(COLUMNS).unwrap()];
            let mut losses = [0.0; 4];
            // A diagonal form is judged by itself.
            let mut independent = vec![0.0; COLUMNS * COLUMNS];
            for (i, &importance) in importance.iter().enumerate() {
                independent[i * COLUMNS + i] = importance;
            }
            let mut by_diagonal = [0.0; 2];
            for row in &rows {
                kind.encoder().unwrap()(row, Some(&importance), &mut encoded);
                losses[0] += loss(&moments, kind, row, &encoded);
                by_diagonal[0] += loss(&independent, kind, row, &encoded);
                let forms = [
                    Quadratic::diagonal(&importance),
                    windows(&moments, 256, grid.sub),
                    windows(&moments, COLUMNS, grid.sub),
                ];
                for (form, total) in forms.iter().zip(&mut losses[1..]) {
                    refine::encode_row(kind, &grid, form, row, &mut encoded);
                    *total += loss(&moments, kind, row, &encoded);
                    if form.windows[0].order.is_empty() {
                        by_diagonal[1] += loss(&independent, kind, row, &encoded);
                    }
                }
            }
            let [_, _, narrow, wide] = losses.map(|loss| loss / losses[0]);
            let diagonal = by_diagonal[1] / by_diagonal[0];
            println!(
                "{kind}: diagonal {diagonal:.3}, 256 columns {narrow:.3}, whole rows {wide:.3}"
            );
            assert!(diagonal < 1.0, "{kind}: {diagonal}");
            assert!(narrow < 0.6, "{kind}: {narrow}");
            assert!(wide < 0.9 * narrow, "{kind}: {wide} {narrow}");
        }
    }

    #[test]
    fn moments_of_no_rank_and_rows_of_zeros_do_no_harm() {
        let zeros = vec![0.0; COLUMNS * COLUMNS];
        for &kind in BlockType::ALL {
            let Some(grid) = Grid::of(kind) else { continue };
            let form = windows(&zeros, 256, grid.sub);
            let mut encoded = vec![0; kind.row_bytes(COLUMNS).unwrap()];
            let row: Vec<f32> = (0..COLUMNS).map(|i| (i as f32 * 0.7).sin()).collect();
            for row in [&row, &vec![0.0; COLUMNS]] {
                refine::encode_row(kind, &grid, &form, row, &mut encoded);
                let mut decoded = vec![0.0; COLUMNS];
                kind.decode_row(&encoded, &mut decoded);
                let far = |(w, d): (&f32, &f32)| (w - d).abs() > 0.25;
                assert!(!row.iter().zip(&decoded).any(far), "{kind}");
            }
        }
    }
}
