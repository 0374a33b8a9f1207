//! Loud columns: which they are, and that every product has them.

use fewbit::kernels::activations::SCALE_LEN;
use fewbit::kernels::{Activation, Activations, COLUMNS_A_LOUD, Kernels, LOUD, Phase};
use fewbit::quant::BlockType;
use fewbit::tensor::Rows;
use fewbit::threads::Pool;
use quant_tests::products::products;
use rand::rngs::ChaCha8Rng;
use rand::{Rng, RngExt, SeedableRng};

/// Rows of activations as a model's are filled.
fn filled(kernels: &Kernels, cols: usize, x: &[f32]) -> Activations {
    let rows = x.len() / cols;
    let mut activations = Activations::new(rows, cols);
    activations.fill(&Pool::new(1).unwrap(), kernels, rows, |row, to| {
        to.copy_from_slice(&x[row * cols..(row + 1) * cols]);
    });
    activations
}

/// Activations without loud columns: signs and magnitudes vary little.
fn even(cols: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
    let sign = |rng: &mut ChaCha8Rng| if rng.random_ratio(1, 2) { 1.0 } else { -1.0 };
    (0..cols)
        .map(|_| sign(rng) * rng.random_range(0.9..1.0f32))
        .collect()
}

fn columns(x: Activation<'_>) -> Vec<usize> {
    x.loud.iter().map(|loud| loud.column as usize).collect()
}

#[test]
fn the_loudest_columns_are_kept_apart_and_no_others() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for cols in [32, 768, 4096, 14336] {
        let most = LOUD.min(cols / COLUMNS_A_LOUD);
        for count in (0..LOUD + 3).filter(|&count| count <= cols / SCALE_LEN) {
            let mut x = even(cols, &mut rng);
            let mut groups: Vec<usize> = (0..cols / SCALE_LEN).collect();
            let mut loud: Vec<usize> = Vec::new();
            for _ in 0..count {
                let group = groups.swap_remove(rng.random_range(0..groups.len()));
                loud.push(group * SCALE_LEN + rng.random_range(0..SCALE_LEN));
                x[loud[loud.len() - 1]] = -100.0 - loud.len() as f32;
            }
            for kernels in Kernels::available() {
                let activations = filled(kernels, cols, &x);
                let row = activations.row(0);
                let found = columns(row);
                assert_eq!(row.x, x, "the activations themselves are left alone");
                assert_eq!(found.len(), count.min(most), "{cols} columns: {found:?}");
                assert!(found.is_sorted());
                for entry in row.loud {
                    let column = entry.column as usize;
                    assert!(loud.contains(&column), "column {column} is not loud");
                    assert_eq!((entry.x, row.q[column]), (x[column], 0));
                }
            }
        }
    }
}

#[test]
fn a_group_takes_its_scale_from_what_is_left() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut x = even(768, &mut rng);
    x[300] = 200.0;
    for kernels in Kernels::available() {
        let activations = filled(kernels, 768, &x);
        let row = activations.row(0);
        assert_eq!(columns(row), [300]);
        for (i, (&x, &q)) in x.iter().zip(row.q).enumerate().filter(|(i, _)| *i != 300) {
            let error = (f32::from(q) * row.scales[i / SCALE_LEN] - x).abs();
            assert!(error < 1.0 / 127.0, "column {i}: {error}");
        }
    }
}

#[test]
fn silence_evenness_and_damage_have_no_loud_columns() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut damaged = even(768, &mut rng);
    (damaged[5], damaged[100], damaged[200]) = (f32::NAN, f32::NEG_INFINITY, 1e30);
    for x in [
        vec![0.0; 768],
        vec![-3.0; 768],
        even(768, &mut rng),
        damaged,
    ] {
        for kernels in Kernels::available() {
            let activations = filled(kernels, 768, &x);
            assert_eq!(columns(activations.row(0)), [0; 0]);
        }
    }
}

#[test]
fn every_table_finds_the_same() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for _ in 0..50 {
        // Any bits at all; then ordinary activations of very different size.
        let any: Vec<f32> = (0..768).map(|_| f32::from_bits(rng.random())).collect();
        let mixed: Vec<f32> = (0..768)
            .map(|_| rng.random_range(-1.0..1.0f32) * (rng.random_range(-4.0..4.0f32)).exp())
            .collect();
        for x in [any, mixed] {
            let scalar = filled(Kernels::available()[0], 768, &x);
            for kernels in Kernels::available() {
                let other = filled(kernels, 768, &x);
                let (a, b) = (scalar.row(0), other.row(0));
                assert_eq!(a.loud, b.loud, "{}", kernels.name);
                assert_eq!((a.q, a.sums), (b.q, b.sums), "{}", kernels.name);
            }
        }
    }
}

#[test]
fn products_have_the_loud_columns_wherever_they_lie() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let kinds = BlockType::ALL.iter().filter(|kind| kind.block_len() > 1);
    for &kind in kinds {
        for (cols, tokens) in [(256, 5), (768, 9), (4096, 3), (20480, 2)] {
            let mut bytes = vec![0; 7 * kind.row_bytes(cols).unwrap()];
            rng.fill_bytes(&mut bytes);
            // Exponents of f16 (and of MXFP4) in the middle of their range, wherever they are.
            bytes
                .iter_mut()
                .for_each(|byte| *byte = *byte & 0x83 | 0x2c);
            let rows = Rows::new(kind, cols, &bytes).unwrap();
            let mut x = Vec::new();
            for token in 0..tokens {
                let mut row = even(cols, &mut rng);
                for k in 0..LOUD {
                    // Some side by side, some 64 stretches of 256 apart.
                    let column = [token, 97 * k, 16384 * (k / 2) + 255 * (k % 2)][k % 3];
                    row[column % cols] = 300.0 - k as f32;
                }
                x.extend(row);
            }
            for kernels in Kernels::available() {
                let x = filled(kernels, cols, &x);
                let x: Vec<_> = (0..tokens).map(|token| x.row(token)).collect();
                for phase in [Phase::Prompt, Phase::Generate] {
                    let out = products(kernels, phase, rows, &x);
                    for (x, out) in x.iter().zip(&out) {
                        assert!(!x.loud.is_empty());
                        for (r, &out) in out[..7].iter().enumerate() {
                            let mut weights = vec![0.0; cols];
                            rows.decode(r, &mut weights);
                            let (mut sum, mut size) = (0.0, 0.0);
                            for (i, &weight) in weights.iter().enumerate() {
                                let seen = f64::from(x.q[i]) * f64::from(x.scales[i / SCALE_LEN]);
                                sum += f64::from(weight) * seen;
                                size += (f64::from(weight) * seen).abs();
                            }
                            for loud in x.loud {
                                let weight = weights[loud.column as usize];
                                sum += f64::from(weight) * f64::from(loud.x);
                                size += f64::from(weight * loud.x).abs();
                            }
                            let error = (f64::from(out) - sum).abs();
                            assert!(
                                error <= 1e-5 * size,
                                "{} {kind} {cols} {phase:?}: {} for {sum}",
                                kernels.name,
                                out
                            );
                        }
                    }
                }
            }
        }
    }
}
