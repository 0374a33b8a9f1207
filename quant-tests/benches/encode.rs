//! Encoders one by one, on one thread: weights a second, as F32 rows and from F16 through the converter's [`Job`].
//!
//!     cargo bench -p quant-tests --bench encode            # everything
//!     cargo bench -p quant-tests --bench encode -- Q4_K    # what matches
//!
//! - `encode/TYPE/plain` and `encode/TYPE/importance`: rows of 4096 normal weights.
//! - `convert/TYPE`: the same with all around it, as `fewbit-convert` calls it (a pool of one thread).

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput};
use fewbit::quant::BlockType;
use fewbit_convert::encode::Job;
use quant_tests::rows::SplitMix64;

/// Columns of a row: Mixtral's width.
const COLS: usize = 4096;
const ROWS: usize = 64;

const TYPES: [BlockType; 13] = {
    use BlockType::*;
    [
        F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS,
    ]
};

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500))
        .without_plots()
        .configure_from_args();
    let mut random = SplitMix64::new(1);
    let mut normal = || 0.02 * random.normal();
    let weights: Vec<f32> = (0..ROWS * COLS).map(|_| normal()).collect();
    let importance: Vec<f32> = (0..COLS).map(|_| normal().powi(2)).collect();
    let mut halves = vec![0; 2 * weights.len()];
    let f16 = BlockType::F16.encoder().expect("F16 is written");
    f16(&weights, None, &mut halves);

    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let pool = pool.expect("one thread");
    for kind in TYPES {
        let encoder = kind.encoder().expect("a type that is written");
        let mut bytes = vec![0; ROWS * kind.row_bytes(COLS).expect("whole blocks")];
        let row_bytes = bytes.len() / ROWS;
        let mut group = criterion.benchmark_group(format!("encode/{kind}"));
        group.throughput(Throughput::Elements(weights.len() as u64));
        for (name, importance) in [("plain", None), ("importance", Some(&importance[..]))] {
            group.bench_function(name, |bench| {
                bench.iter(|| {
                    let rows = weights.chunks_exact(COLS);
                    for (row, bytes) in rows.zip(bytes.chunks_exact_mut(row_bytes)) {
                        encoder(black_box(row), importance, bytes);
                    }
                });
            });
        }
        group.finish();
        let mut group = criterion.benchmark_group("convert");
        group.throughput(Throughput::Elements(weights.len() as u64));
        let job = Job {
            from: BlockType::F16,
            to: kind,
            columns: COLS,
            first_row: 0,
            rows_per_expert: ROWS,
            importance: None,
            rounder: None,
            corrections: None,
        };
        group.bench_function(kind.name(), |bench| {
            bench.iter(|| pool.install(|| job.encode(black_box(&halves), &mut bytes)));
        });
        group.finish();
    }
}
