//! How long rounding will take here: each type is timed on made-up rows and moments.

use std::collections::HashMap;
use std::time::Instant;

use fewbit::quant::{BlockType, Grid};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

use super::quadratic::{Quadratic, RawWindow};
use super::{Round, refine};

/// Columns of the windows that are timed; the time of wider ones follows.
const WIDTH: usize = 256;

/// Weights that a type is timed on.
const WEIGHTS: usize = 32 << 10;

/// Matrices of a type.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// The type.
    pub kind: BlockType,
    /// Weights in a row.
    pub columns: usize,
    /// Rows, over all experts.
    pub rows: usize,
    /// Experts: each has moments of its own.
    pub experts: usize,
}

/// Seconds for one thread.
pub fn seconds(round: Round, work: &[Work], width: usize) -> f64 {
    let mut timed = HashMap::new();
    let of = |work: &Work| {
        let grid = Grid::of(work.kind)
            .filter(|_| round == Round::Gptq || super::gains_by_refits(work.kind));
        let Some(grid) = grid else {
            return 0.0;
        };
        let (factor, weight) = *timed
            .entry(work.kind)
            .or_insert_with(|| time(round, work.kind, &grid));
        let weights = (work.columns * work.rows) as f64;
        if round == Round::Best {
            return weights * weight;
        }
        // A window is factored in width³, and an error is carried to half a window of columns.
        let width = width.min(work.columns) as f64;
        let times = width / WIDTH as f64;
        let windows = (work.columns * work.experts) as f64 / width;
        let carried = 1.0 + CARRIED * (times - 1.0);
        windows * factor * times.powi(3) + weights * weight * carried
    };
    work.iter().map(of).sum()
}

/// What a window twice as wide adds to the time of a weight, as a share.
const CARRIED: f64 = 0.12;

/// Seconds to factor a window, and to round a weight.
fn time(round: Round, kind: BlockType, grid: &Grid) -> (f64, f64) {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut uniform = || random.random::<f32>() - 0.5;
    let mut moments = vec![0.0; WIDTH * WIDTH];
    for _ in 0..32 {
        let x: Vec<f32> = (0..WIDTH).map(|_| uniform()).collect();
        for (row, a) in moments.chunks_exact_mut(WIDTH).zip(&x) {
            row.iter_mut().zip(&x).for_each(|(sum, b)| *sum += a * b);
        }
    }
    let raw = RawWindow {
        start: 0,
        moments,
        len: WIDTH,
    };
    let started = Instant::now();
    let window = raw.prepare(grid.sub);
    let factor = started.elapsed().as_secs_f64();
    let form = match round {
        Round::Gptq => Quadratic::new(vec![window]),
        _ => Quadratic::diagonal(&[1.0; WIDTH]),
    };
    let row: Vec<f32> = (0..WIDTH).map(|_| uniform()).collect();
    let mut encoded = vec![0; kind.row_bytes(WIDTH).expect("whole blocks")];
    refine::encode_row(kind, grid, &form, &row, &mut encoded); // warms up
    let started = Instant::now();
    for _ in 0..WEIGHTS / WIDTH {
        refine::encode_row(kind, grid, &form, &row, &mut encoded);
    }
    (factor, started.elapsed().as_secs_f64() / WEIGHTS as f64)
}
