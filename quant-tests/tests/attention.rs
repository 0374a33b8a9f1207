//! Attention by every table of kernels that this machine offers, held against arithmetic in f64.

use fewbit::kernels::Kernels;
use fewbit::kernels::attention::{Head, Queries, SEGMENT, Scratch, partial_len, width};
use fewbit::quant::BlockType;
use fewbit::tensor::Rows;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

/// Of values in −2..2, the scores being up to some 30 (1e-6 of which is lost in a weight).
const TOLERANCE: f64 = 4e-5;

/// Keys or values of a head: as they are stored, and what they stand for.
struct Vectors {
    kind: BlockType,
    dim: usize,
    bytes: Vec<u8>,
    meant: Vec<f64>,
}

impl Vectors {
    fn random(kind: BlockType, dim: usize, positions: usize, rng: &mut ChaCha8Rng) -> Self {
        let size = kind.row_bytes(dim).unwrap();
        let mut bytes = vec![0; positions * size];
        let mut meant = Vec::new();
        for row in bytes.chunks_exact_mut(size) {
            let x = random(dim, 2.0, rng);
            kind.encoder().unwrap()(&x, None, row);
            let mut decoded = vec![0.0; dim];
            kind.decode_row(row, &mut decoded);
            meant.extend(decoded.into_iter().map(f64::from));
        }
        Vectors {
            kind,
            dim,
            bytes,
            meant,
        }
    }

    fn rows(&self) -> Rows<'_> {
        Rows::new(self.kind, self.dim, &self.bytes).unwrap()
    }

    fn meant(&self, position: usize) -> &[f64] {
        &self.meant[position * self.dim..(position + 1) * self.dim]
    }
}

fn random(len: usize, size: f32, rng: &mut ChaCha8Rng) -> Vec<f32> {
    (0..len)
        .map(|_| size * rng.random_range(-1.0..1.0f32))
        .collect()
}

/// Queries in rows of whole registers.
fn random_queries(rows: usize, dim: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
    let mut q = vec![0.0; rows * width(dim)];
    for row in q.chunks_exact_mut(width(dim)) {
        row[..dim].copy_from_slice(&random(dim, 0.7, rng));
    }
    q
}

/// What a query gets in f64.
fn expected(q: &[f32], k: &Vectors, v: &Vectors, seen: std::ops::Range<usize>) -> Vec<f64> {
    let score = |p: usize| -> f64 {
        let products = k.meant(p).iter().zip(q).map(|(k, q)| k * f64::from(*q));
        products.sum()
    };
    let scores: Vec<f64> = seen.clone().map(score).collect();
    let max = scores.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let total: f64 = weights.iter().sum();
    let sum = |d: usize| -> f64 {
        let terms = seen.clone().zip(&weights).map(|(p, w)| w * v.meant(p)[d]);
        terms.sum()
    };
    (0..k.dim).map(|d| sum(d) / total).collect()
}

fn tile(kernels: &Kernels, head: &Head<'_>, queries: &Queries<'_>) -> Vec<f32> {
    // Another shape before leaves something behind in the buffers.
    let mut scratch = Scratch::default();
    scratch.buffers([4096])[0].fill(f32::NAN);
    let mut out = vec![f32::NAN; queries.q.len()];
    (kernels.floats.attend_tile)(head, queries, &mut scratch, &mut out);
    out
}

/// One token's attention as generation computes it, rows of `dim`.
fn segments(kernels: &Kernels, head: &Head<'_>, queries: &Queries<'_>) -> Vec<f32> {
    let (dim, len) = (head.keys.cols, partial_len(queries.group, head.keys.cols));
    let seen = queries.seen(0);
    let mut partials = Vec::new();
    for segment in seen.start / SEGMENT..seen.end.div_ceil(SEGMENT) {
        let mut partial = vec![f32::NAN; len];
        let mut scratch = Scratch::default();
        (kernels.floats.attend_segment)(head, queries, segment, &mut scratch, &mut partial);
        partials.extend(partial);
    }
    let mut out = vec![f32::NAN; queries.group * dim];
    for (h, out) in out.chunks_exact_mut(dim).enumerate() {
        (kernels.floats.merge)(&partials[h * partial_len(1, dim)..], len, out);
    }
    out
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// Head sizes, heads a KV head, and how keys and values are kept.
const SHAPES: [(usize, usize, BlockType); 12] = [
    (64, 1, BlockType::F16),
    (64, 3, BlockType::F32),
    (64, 3, BlockType::Q8_0),
    (128, 4, BlockType::F16),
    (128, 4, BlockType::F32),
    (128, 8, BlockType::Q8_0),
    (128, 4, BlockType::Q4_0),
    (96, 5, BlockType::Q4_0),
    (80, 6, BlockType::F16),
    (40, 7, BlockType::F16),
    (6, 2, BlockType::F32),
    (2, 70, BlockType::F16),
];

/// Position of the first token, tokens, window: one position, the borders of blocks and of segments, windows
/// that begin and end within blocks.
const PLACES: [(usize, usize, Option<usize>); 13] = [
    (0, 1, None),
    (0, 40, None),
    (62, 3, None),
    (63, 1, None),
    (64, 1, None),
    (500, 15, None),
    (511, 2, None),
    (1022, 5, None),
    (1100, 17, None),
    (700, 20, Some(100)),
    (100, 33, Some(1)),
    (1000, 13, Some(700)),
    (0, 9, Some(4)),
];

#[test]
fn attention_is_that_of_f64_in_both_phases_and_a_token_does_not_see_its_tile() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut worst = 0.0;
    for (dim, group, kind) in SHAPES {
        let [keys, values] = [0, 1].map(|_| Vectors::random(kind, dim, 1130, &mut rng));
        let head = Head {
            keys: keys.rows(),
            values: values.rows(),
        };
        let width = width(dim);
        for (position, tokens, window) in PLACES {
            let q = random_queries(tokens * group, dim, &mut rng);
            let queries = Queries {
                q: &q,
                group,
                position,
                window,
            };
            for kernels in Kernels::available() {
                let name = kernels.name;
                let together = tile(kernels, &head, &queries);
                for t in 0..tokens {
                    let one = Queries {
                        q: &q[t * group * width..(t + 1) * group * width],
                        position: position + t,
                        ..queries
                    };
                    let alone = tile(kernels, &head, &one);
                    let here = t * group * width..(t + 1) * group * width;
                    assert!(
                        same_bits(&alone, &together[here]),
                        "{name} {dim} {group} {kind}: token {t} of {tokens} at {position}"
                    );
                    if t % 4 > 0 && t + 1 < tokens {
                        continue; // f64 takes long
                    }
                    let generated = segments(kernels, &head, &one);
                    for h in 0..group.min(9) {
                        let q = &one.q[h * width..][..dim];
                        let expected = expected(q, &keys, &values, one.seen(0));
                        let found = alone[h * width..].iter().zip(&generated[h * dim..]);
                        for (expected, (&a, &b)) in expected.into_iter().zip(found) {
                            let error = (f64::from(a) - expected).abs();
                            let error = error.max((f64::from(b) - expected).abs());
                            worst = f64::max(worst, error);
                            assert!(
                                error < TOLERANCE,
                                "{name} {dim} {group} {kind}: token {t} of {tokens} at {position}, \
                                 window {window:?}, head {h}: {a} and {b} for {expected}"
                            );
                        }
                    }
                }
            }
        }
    }
    println!("largest error {worst:.1e}");
}

#[test]
fn very_different_scores_are_weighed_without_overflow() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let (dim, group) = (64, 4);
    let [keys, values] = [0, 1].map(|_| Vectors::random(BlockType::F32, dim, 600, &mut rng));
    let head = Head {
        keys: keys.rows(),
        values: values.rows(),
    };
    let mut q = random_queries(group, dim, &mut rng);
    q.iter_mut().for_each(|q| *q *= 1e4);
    let queries = Queries {
        q: &q,
        group,
        position: 599,
        window: None,
    };
    for kernels in Kernels::available() {
        let (a, b) = (
            tile(kernels, &head, &queries),
            segments(kernels, &head, &queries),
        );
        for h in 0..group {
            let expected = expected(&q[h * dim..(h + 1) * dim], &keys, &values, 0..600);
            for (d, expected) in expected.into_iter().enumerate() {
                let at = h * dim + d;
                assert!(
                    (f64::from(a[at]) - expected).abs() < 0.05,
                    "{}",
                    kernels.name
                );
                assert!(
                    (f64::from(b[at]) - expected).abs() < 0.05,
                    "{}",
                    kernels.name
                );
            }
        }
    }
}

#[test]
fn a_nan_among_the_keys_is_not_hidden() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let dim = 64;
    let mut keys = Vectors::random(BlockType::F32, dim, 100, &mut rng);
    let values = Vectors::random(BlockType::F32, dim, 100, &mut rng);
    keys.bytes[70 * 4 * dim..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let head = Head {
        keys: keys.rows(),
        values: values.rows(),
    };
    let q = random_queries(2, dim, &mut rng);
    for kernels in Kernels::available() {
        for (position, nan) in [(69, false), (70, true), (99, true)] {
            let queries = Queries {
                q: &q,
                group: 2,
                position,
                window: None,
            };
            let found = [
                tile(kernels, &head, &queries),
                segments(kernels, &head, &queries),
            ];
            for x in found.iter().flatten() {
                assert_eq!(x.is_nan(), nan, "{} at {position}", kernels.name);
            }
        }
    }
}
