//! Configuration, weights, state and the forward pass.

mod attention;
mod cache;
mod config;
mod forward;
mod lora;
mod moe;
mod observe;
mod state;
mod weights;

use std::path::PathBuf;

pub use cache::{KvCache, KvKind};
pub use config::{Config, RopeConfig};
use forward::Span;
pub(crate) use forward::forward_part;
pub use forward::{Slot, forward, hidden_states};
pub use lora::Lora;
pub use moe::Routing;
pub use observe::{Observer, Site};
pub use state::State;
pub use weights::{Layer, Placement, Weights};

use crate::gguf::{self, Gguf};
use crate::tensor::{self, Matrix};

/// Why a file does not make a model.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file itself, or its metadata.
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    /// The file's bytes.
    #[error(transparent)]
    Tensor(#[from] tensor::Error),
    /// A tensor that the graph needs is not there.
    #[error("{}: tensor {tensor} is missing: the file is incomplete or holds another architecture; convert it again", file.display())]
    Missing {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor has another shape than the metadata implies.
    #[error("{}: tensor {tensor} has the extents {found:?} where the metadata makes it {wanted:?}; convert it again", file.display())]
    Shape {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its extents, fastest first.
        found: Vec<usize>,
        /// What the metadata says.
        wanted: Vec<usize>,
    },
    /// A tensor that the graph does not use.
    #[error("{}: tensor {tensor} has no place in the graph that fewbit computes (Llama, Mistral, Mixtral): the result would be wrong", file.display())]
    Unknown {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
    },
}

/// A model: what the metadata says and the weights.
pub struct Model {
    /// The graph's numbers.
    pub config: Config,
    /// The tensors.
    pub weights: Weights,
    /// How experts are chosen.
    pub routing: Routing,
    /// Corrections of the matrices.
    pub lora: Option<Lora>,
    rope: Rope,
}

impl Model {
    /// Binds the tensors of `gguf`, mapped or read as `placement` says.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open(gguf: &Gguf, placement: Placement<'_>) -> Result<Self, Error> {
        let config = Config::from_metadata(&gguf.metadata)?;
        let weights = Weights::bind(gguf, placement, &config)?;
        let rope = Rope::new(&config.rope, weights.rope_factors.as_deref());
        Ok(Self {
            config,
            weights,
            routing: Routing::Exact,
            lora: None,
            rope,
        })
    }

    /// The same model with other weights in some places: see [`Weights::varied`].
    ///
    /// # Errors
    /// Those of `visit`.
    pub fn varied<E>(
        &self,
        visit: impl FnMut(&str, &mut Matrix) -> Result<(), E>,
    ) -> Result<Option<Self>, E> {
        let weights = self.weights.varied(visit)?;
        Ok(weights.map(|weights| Self {
            config: self.config.clone(),
            weights,
            routing: self.routing,
            lora: self.lora.clone(),
            rope: self.rope.clone(),
        }))
    }
}

/// The frequencies of the rotary embedding.
#[derive(Clone)]
struct Rope {
    /// Radians a position, for each pair of dimensions.
    frequencies: Vec<f64>,
}

impl Rope {
    fn new(config: &RopeConfig, factors: Option<&[f32]>) -> Self {
        let frequency = |pair: usize| {
            let exponent = -2.0 * pair as f64 / config.dims as f64;
            let factor = factors.map_or(1.0, |factors| f64::from(factors[pair]));
            f64::from(config.base).powf(exponent) / (f64::from(config.scale) * factor)
        };
        Self {
            frequencies: (0..config.dims / 2).map(frequency).collect(),
        }
    }

    /// Cosine and sine of every pair at `position`.
    fn turns(&self, position: usize, turns: &mut [(f32, f32)]) {
        for (turn, frequency) in turns.iter_mut().zip(&self.frequencies) {
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            *turn = (cos as f32, sin as f32);
        }
    }
}
