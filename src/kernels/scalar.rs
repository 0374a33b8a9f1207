//! The truth: plain Rust that every other instruction set is held against.

use half::f16;

use super::{Activation, DotRows, Kernels, activations};
use crate::quant::BlockType;
use crate::tensor::Rows;

/// The scalar table.
pub static KERNELS: Kernels = Kernels {
    name: "scalar",
    dot,
    quantize: activations::quantize,
    dot_f16,
    axpy_f16,
};

fn dot(kind: BlockType) -> DotRows {
    let _ = kind;
    dot_decoded
}

/// Decodes each row and multiplies it with the activations in f32.
fn dot_decoded(rows: Rows<'_>, x: Activation<'_>, out: &mut [f32]) {
    let mut weights = vec![0.0; rows.cols];
    for (index, out) in out.iter_mut().enumerate() {
        rows.decode(index, &mut weights);
        *out = weights.iter().zip(x.x).map(|(w, x)| w * x).sum();
    }
}

fn dot_f16(x: &[f32], y: &[f16]) -> f32 {
    x.iter().zip(y).map(|(x, y)| x * y.to_f32()).sum()
}

fn axpy_f16(a: f32, y: &[f16], acc: &mut [f32]) {
    for (acc, y) in acc.iter_mut().zip(y) {
        *acc += a * y.to_f32();
    }
}
