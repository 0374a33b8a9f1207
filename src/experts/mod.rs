//! Where experts live: in the mapped file.
//!
//! The model asks for expert `e` of layer `l` and never for the place that it comes from. A
//! dense feed-forward part is one expert that every token takes with weight 1.

use crate::tensor::Matrix;

/// The three matrices of an expert: `down(silu(gate(x)) · up(x))`.
pub struct Expert {
    /// `[ffn rows, hidden columns]`.
    pub gate: Matrix,
    /// `[ffn rows, hidden columns]`.
    pub up: Matrix,
    /// `[hidden rows, ffn columns]`.
    pub down: Matrix,
}

/// All experts of a model.
pub struct Experts {
    layers: Vec<Vec<Expert>>,
}

impl Experts {
    /// Experts in a mapped file, by layer.
    pub fn mapped(layers: Vec<Vec<Expert>>) -> Self {
        Self { layers }
    }

    /// The experts of one layer.
    pub fn layer(&self, layer: usize) -> &[Expert] {
        &self.layers[layer]
    }
}
