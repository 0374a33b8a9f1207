//! Kernels one by one, on one thread, each beside the limit of the machine that bounds it.
//!
//!     cargo bench -p quant-tests                        # everything
//!     cargo bench -p quant-tests -- decode/avx512/Q4_K  # what matches
//!
//! - `decode/TABLE/TYPE/memory`: the dot products of a generated token, rows streamed from memory;
//!   the limit is the read bandwidth.
//! - `decode/TABLE/TYPE/cache`: the same from the second cache, where arithmetic is the limit.
//! - `prompt/TABLE/TYPE`: a tile of rows with 128 tokens; the limit is the int8 peak. An element is
//!   a multiplication or an addition.
//! - `quantize/TABLE`: activations to 8 bits.
//!
//! The share that is printed after each figure is that of the fastest sample.

use std::hint::black_box;
use std::ops::Deref;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};
use fewbit::kernels::activations::{SCALE_LEN, SUM_LEN};
use fewbit::kernels::limits::Limits;
use fewbit::kernels::{
    Activations, Batch, Kernels, Phase, STREAMS, Storage, TILE_ROWS, TILE_TOKENS,
};
use fewbit::quant::BlockType;
use fewbit::tensor::{Rows, direct};
use fewbit::threads::Pool;
use quant_tests::rows::SplitMix64;

/// Columns of a row: Mixtral's width.
const COLS: usize = 4096;
/// Rows that no cache holds.
const MEMORY: usize = 256 << 20;
/// Rows that the second cache holds.
const CACHE: usize = 256 << 10;

const TYPES: [BlockType; 15] = {
    use BlockType::*;
    [
        Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4, F16,
        BF16,
    ]
};

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(700))
        .without_plots()
        .configure_from_args();
    let pool = Pool::new(1).expect("one thread");
    let limits = Limits::measure(&pool);
    println!(
        "limits, one thread: {:.1} GB/s read, {:.0} GOP/s int8",
        limits.read_gb_s, limits.int8_gop_s
    );
    // Scalar code is there for its results.
    for kernels in Kernels::available().into_iter().skip(1) {
        decode(&mut criterion, kernels, limits.read_gb_s);
        prompt(&mut criterion, kernels, limits.int8_gop_s);
        quantize(&mut criterion, kernels);
    }
    criterion.final_summary();
}

/// Rows of random blocks: kernels take the same time whatever is in them, but for scales that are
/// denormal or no number, which are rare enough.
fn random_bytes(len: usize) -> Vec<u8> {
    let mut random = SplitMix64::new(1);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend_from_slice(&random.next_u64().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// The same in pages as large as those of a file that is in memory.
fn in_huge_pages(bytes: Vec<u8>) -> impl Deref<Target = [u8]> {
    let mut map = direct::memory(bytes.len()).expect("memory");
    map.copy_from_slice(&bytes);
    map
}

/// `tokens` rows of activations.
fn activations(kernels: &Kernels, tokens: usize) -> Activations {
    let pool = Pool::new(1).expect("one thread");
    let mut activations = Activations::new(tokens, COLS);
    activations.fill(&pool, kernels, tokens, |token, x| {
        let mut random = SplitMix64::new(token as u64);
        x.fill_with(|| random.normal());
    });
    activations
}

/// Measures `work` and prints the share of `limit` that its fastest sample reaches; `amount` and
/// `limit` are in the same unit, a call and a nanosecond.
fn measure(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    amount: f64,
    limit: Option<f64>,
    mut work: impl FnMut(),
) {
    let mut best = f64::INFINITY;
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|calls| {
            let start = Instant::now();
            (0..calls).for_each(|_| work());
            let time = start.elapsed();
            best = best.min(time.as_nanos() as f64 / calls as f64);
            time
        });
    });
    if best.is_finite() {
        let rate = amount / best;
        let share = limit.map_or(String::new(), |limit| {
            format!(", {:.0} % of the limit", 100.0 * rate / limit)
        });
        println!("{:24}fastest: {rate:.1} G/s{share}", "");
    }
}

fn decode(criterion: &mut Criterion, kernels: &Kernels, limit: f64) {
    let bytes = in_huge_pages(random_bytes(MEMORY));
    let x = activations(kernels, 1);
    let mut group = criterion.benchmark_group(format!("decode/{}", kernels.name));
    for kind in TYPES {
        let stride = kind.row_bytes(COLS).expect("blocks fill the row");
        for (place, size, limit) in [("memory", MEMORY, Some(limit)), ("cache", CACHE, None)] {
            let rows = Rows::new(kind, COLS, &bytes[..size / stride * stride]).expect("whole rows");
            // As the forward pass goes through a matrix: four streams, side by side.
            let quarter = rows.len() / STREAMS;
            let mut out = [[[0.0; TILE_ROWS]; STREAMS]];
            group.throughput(Throughput::BytesDecimal(
                (STREAMS * quarter * stride) as u64,
            ));
            let (name, amount) = (
                format!("{kind}/{place}"),
                (STREAMS * quarter * stride) as f64,
            );
            measure(&mut group, &name, amount, limit, || {
                for start in (0..quarter).step_by(TILE_ROWS) {
                    let end = (start + TILE_ROWS).min(quarter);
                    let run = |k| rows.slice(k * quarter + start..k * quarter + end);
                    let runs: [Rows; STREAMS] = std::array::from_fn(run);
                    kernels.dots(&runs, &[x.row(0)], black_box(&mut out));
                }
            });
        }
    }
}

fn prompt(criterion: &mut Criterion, kernels: &Kernels, limit: f64) {
    let bytes = random_bytes(TILE_ROWS * COLS * 4);
    let x = activations(kernels, TILE_TOKENS);
    let pool = Pool::new(1).expect("one thread");
    let mut storage = Storage::default();
    let batch = Batch::of(&pool, kernels, Phase::Prompt, &x, &mut storage);
    let x = batch.chunks(0..TILE_TOKENS).next().expect("one chunk");
    let mut out = vec![[0.0; TILE_ROWS]; TILE_TOKENS];
    let mut group = criterion.benchmark_group(format!("prompt/{}", kernels.name));
    for kind in TYPES {
        let stride = kind.row_bytes(COLS).expect("blocks fill the row");
        let rows = Rows::new(kind, COLS, &bytes[..TILE_ROWS * stride]).expect("whole rows");
        let operations = 2 * TILE_ROWS * COLS * TILE_TOKENS;
        group.throughput(Throughput::Elements(operations as u64));
        measure(
            &mut group,
            &kind.to_string(),
            operations as f64,
            Some(limit),
            || {
                kernels.product(rows, x, black_box(&mut out));
            },
        );
    }
}

fn quantize(criterion: &mut Criterion, kernels: &Kernels) {
    let mut random = SplitMix64::new(7);
    let x: Vec<f32> = (0..COLS).map(|_| random.normal()).collect();
    let (mut q, mut scales, mut sums) = (
        vec![0; COLS],
        vec![0.0; COLS / SCALE_LEN],
        vec![0; COLS / SUM_LEN],
    );
    let mut group = criterion.benchmark_group("quantize");
    group.throughput(Throughput::BytesDecimal(4 * COLS as u64));
    measure(&mut group, kernels.name, 4.0 * COLS as f64, None, || {
        (kernels.quantize)(&x, black_box(&mut q), &mut scales, &mut sums);
    });
}
