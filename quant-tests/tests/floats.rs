//! The kernels of floats of every table that this machine offers, held against arithmetic in f64.

use fewbit::kernels::Kernels;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

/// Lengths with and without a rest behind the last sixteen.
const LENGTHS: [usize; 9] = [1, 2, 15, 16, 17, 31, 32, 100, 4096];

/// Distance of `found` from `expected` in units in the last place of `expected` as f32.
fn ulps(found: f32, expected: f64) -> f64 {
    let near = expected as f32;
    if near.is_infinite() || near == 0.0 {
        return if found == near { 0.0 } else { f64::INFINITY };
    }
    let unit = f64::from(f32::from_bits(near.abs().to_bits() + 1)) - f64::from(near.abs());
    (f64::from(found) - expected).abs() / unit
}

fn random(len: usize, size: f32, rng: &mut ChaCha8Rng) -> Vec<f32> {
    (0..len)
        .map(|_| size * rng.random_range(-1.0..1.0f32))
        .collect()
}

#[test]
fn swiglu_is_right_to_a_few_units_for_every_gate() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    // Every 1009th float that is neither NaN nor infinite, of both signs.
    let gates: Vec<f32> = (0..0x7f80_0000u32)
        .step_by(1009)
        .flat_map(|bits| [f32::from_bits(bits), -f32::from_bits(bits)])
        .chain(random(100_000, 100.0, &mut rng))
        .collect();
    let ones = vec![1.0; gates.len()];
    for kernels in Kernels::available() {
        let mut out = vec![f32::NAN; gates.len()];
        (kernels.floats.swiglu)(&gates, &ones, &mut out);
        for (&gate, &out) in gates.iter().zip(&out) {
            let expected = f64::from(gate) / (1.0 + (-f64::from(gate)).exp());
            // Where e^-gate overflows, the tiny result becomes 0.
            let gone = gate < -88.0 && out == 0.0;
            // A result that is no normal number has fewer bits.
            let small = expected.abs() < f64::from(f32::MIN_POSITIVE)
                && (f64::from(out) - expected).abs() < 1e-44;
            assert!(
                gone || small || ulps(out, expected) <= 4.0,
                "{}: silu({gate:e}) = {out:e}, not {expected:e}",
                kernels.name
            );
        }
    }
}

#[test]
fn swiglu_takes_any_length_and_hides_no_nan() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for len in LENGTHS {
        let (gate, up) = (random(len, 10.0, &mut rng), random(len, 3.0, &mut rng));
        for kernels in Kernels::available() {
            let mut out = vec![f32::NAN; len];
            (kernels.floats.swiglu)(&gate, &up, &mut out);
            for ((&gate, &up), &out) in gate.iter().zip(&up).zip(&out) {
                let (gate, up) = (f64::from(gate), f64::from(up));
                let expected = gate / (1.0 + (-gate).exp()) * up;
                assert!(
                    ulps(out, expected) <= 5.0,
                    "{} {len}: {out} {expected}",
                    kernels.name
                );
            }
            let mut odd = gate.clone();
            odd[len / 2] = f32::from_bits(0x7fc0_0155); // a NaN with a payload
            (kernels.floats.swiglu)(&odd, &up, &mut out);
            for (i, out) in out.iter().enumerate() {
                assert_eq!(out.is_nan(), i == len / 2, "{} {len}: {i}", kernels.name);
            }
        }
    }
}

#[test]
fn norms_are_those_of_f64() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for len in LENGTHS {
        for size in [1e-18, 1e-3, 1.0, 1e18] {
            let mut x = random(len, size, &mut rng);
            x[len / 3] *= 100.0; // a loud channel
            let weight = random(len, 2.0, &mut rng);
            let eps = 1e-5 * size * size;
            let squares: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            let scale = 1.0 / (squares / len as f64 + f64::from(eps)).sqrt();
            for kernels in Kernels::available() {
                let mut out = vec![f32::NAN; len];
                (kernels.floats.norm)(&x, &weight, eps, &mut out);
                for ((&x, &weight), &out) in x.iter().zip(&weight).zip(&out) {
                    let expected = f64::from(x) * scale * f64::from(weight);
                    assert!(
                        ulps(out, expected) <= 2.0 || expected.abs() < 1e-30,
                        "{} {len} {size}: {out} {expected}",
                        kernels.name
                    );
                }
            }
        }
    }
}

#[test]
fn a_hadamard_matrix_keeps_products_and_undoes_itself() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for len in [2, 6, 32, 64, 96, 128, 160] {
        let (a, b) = (random(len, 2.0, &mut rng), random(len, 2.0, &mut rng));
        for kernels in Kernels::available() {
            let turned = |x: &[f32]| {
                let mut x = x.to_vec();
                (kernels.floats.hadamard)(&mut x);
                x
            };
            let (p, q) = (turned(&a), turned(&b));
            let dot = |a: &[f32], b: &[f32]| -> f32 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
            assert!(
                (dot(&a, &b) - dot(&p, &q)).abs() < 1e-4,
                "{} {len}",
                kernels.name
            );
            for (back, a) in turned(&p).iter().zip(&a) {
                assert!((back - a).abs() < 1e-5, "{} {len}", kernels.name);
            }
            // One loud channel is spread over its part.
            let mut loud = vec![0.0; len];
            loud[len - 1] = 1.0;
            let part = 1 << len.trailing_zeros();
            for (i, x) in turned(&loud).into_iter().enumerate() {
                let there = i >= len - part;
                let size = if there {
                    1.0 / (part as f32).sqrt()
                } else {
                    0.0
                };
                assert!((x.abs() - size).abs() < 1e-6, "{} {len}", kernels.name);
            }
        }
    }
}

#[test]
fn pairs_turn_by_their_angle_and_the_rest_stays() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for (len, pairs) in [(2, 1), (64, 32), (128, 64), (80, 20), (6, 2)] {
        let x = random(len, 2.0, &mut rng);
        let angles: Vec<f64> = (0..pairs).map(|_| rng.random_range(-3.0..3.0)).collect();
        let turns: Vec<(f32, f32)> = angles
            .iter()
            .map(|angle| (angle.cos() as f32, angle.sin() as f32))
            .collect();
        for kernels in Kernels::available() {
            let mut turned = x.clone();
            (kernels.floats.turn)(&mut turned, &turns);
            for (i, angle) in angles.iter().enumerate() {
                let (a, b) = (f64::from(x[2 * i]), f64::from(x[2 * i + 1]));
                let expected = [
                    a * angle.cos() - b * angle.sin(),
                    a * angle.sin() + b * angle.cos(),
                ];
                for (found, expected) in turned[2 * i..].iter().zip(expected) {
                    assert!(
                        (f64::from(*found) - expected).abs() < 1e-6,
                        "{}",
                        kernels.name
                    );
                }
            }
            assert_eq!(turned[2 * pairs..], x[2 * pairs..]);
        }
    }
}
