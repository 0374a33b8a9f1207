//! What the kernels reach on this machine with rows of a type: the speeds that a model's can be forecast from.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::{Activations, Batch, Kernels, Phase, STREAMS, Storage, TILE_ROWS, TILE_TOKENS};
use crate::quant::BlockType;
use crate::tensor::Rows;
use crate::threads::Pool;

/// Speeds of all threads together.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// Rows in memory that are multiplied with one token, 10⁹ bytes a second: what generation does.
    pub decode_gb_s: f64,
    /// Tiles of rows multiplied with many tokens, 10⁹ operations a second, a multiply-add counted as two: what a
    /// prompt does.
    pub prompt_gop_s: f64,
}

/// Columns of the rows.
const COLS: usize = 4096;
/// Bytes of rows that generation goes through: far more than any cache holds.
const MEMORY: usize = 256 << 20;
/// A block of any type that is made of these bytes holds ordinary numbers.
const FILLING: u8 = 0x2d;
const PASSES: usize = 3;
/// Tiles that a thread multiplies in a pass.
const TILES: usize = 24;

impl Rates {
    /// Measures rows of each of `kinds`; takes about a quarter of a second for each.
    pub fn measure(pool: &Pool, kernels: &Kernels, kinds: &[BlockType]) -> Vec<Self> {
        let memory = vec![FILLING; MEMORY];
        let mut x = Activations::new(TILE_TOKENS, COLS);
        x.fill(pool, kernels, TILE_TOKENS, |token, x| {
            let wave = |i: usize| ((i * 37 + token * 11) % 101) as f32 / 50.0 - 1.0;
            x.iter_mut().enumerate().for_each(|(i, x)| *x = wave(i));
        });
        let rates = |&kind| Self {
            decode_gb_s: decode(pool, kernels, kind, &memory, &x),
            prompt_gop_s: prompt(pool, kernels, kind, &memory, &x),
        };
        kinds.iter().map(rates).collect()
    }
}

/// The best time of several passes.
fn best(mut pass: impl FnMut()) -> Duration {
    let time = |_| {
        let start = Instant::now();
        pass();
        start.elapsed()
    };
    (0..PASSES).map(time).min().expect("there are passes")
}

fn decode(pool: &Pool, kernels: &Kernels, kind: BlockType, memory: &[u8], x: &Activations) -> f64 {
    let stride = kind.row_bytes(COLS).expect("blocks fill the rows");
    // Each task takes four runs of rows, one of each quarter, as a matrix's do.
    let rows = MEMORY / stride / (STREAMS * TILE_ROWS) * (STREAMS * TILE_ROWS);
    let rows = Rows::new(kind, COLS, &memory[..rows * stride]).expect("whole rows");
    let quarter = rows.len() / STREAMS;
    let time = best(|| {
        pool.run(quarter / TILE_ROWS, &|task| {
            let run = |quarter_of: usize| {
                let start = quarter_of * quarter + task * TILE_ROWS;
                rows.slice(start..start + TILE_ROWS)
            };
            let runs: [Rows<'_>; STREAMS] = std::array::from_fn(run);
            let mut out = [[[0.0; TILE_ROWS]; STREAMS]];
            kernels.dots(&runs, &[x.row(0)], black_box(&mut out));
        });
    });
    rows.bytes.len() as f64 / time.as_secs_f64() / 1e9
}

fn prompt(pool: &Pool, kernels: &Kernels, kind: BlockType, memory: &[u8], x: &Activations) -> f64 {
    let stride = kind.row_bytes(COLS).expect("blocks fill the rows");
    let tasks = TILES * pool.threads();
    let mut storage = Storage::default();
    let batch = Batch::of(pool, kernels, Phase::Prompt, x, &mut storage);
    let x = batch.chunks(0..TILE_TOKENS).next().expect("one chunk");
    let time = best(|| {
        pool.run(tasks, &|task| {
            let start = task % TILES * TILE_ROWS * stride;
            let bytes = &memory[start..start + TILE_ROWS * stride];
            let rows = Rows::new(kind, COLS, bytes).expect("whole rows");
            let mut out = [[0.0; TILE_ROWS]; TILE_TOKENS];
            kernels.product(rows, x, black_box(&mut out));
        });
    });
    (2 * TILE_ROWS * COLS * TILE_TOKENS * tasks) as f64 / time.as_secs_f64() / 1e9
}
