//! Where experts live: in the mapped file, or in a cache of slots that is filled from disk.
//!
//! The model asks for the experts of a layer that have tokens ([`Experts::visit`]) and never for the
//! place that they come from. It gets them in portions, as they arrive: of a mapped file everything
//! at once, of a [`Cache`] what is there already first, while the rest is being read. A dense
//! feed-forward part is one expert that every token takes with weight 1.

pub mod cache;
pub mod generate;
mod memory;
pub mod policy;
pub mod trace;

pub use cache::{Cache, Counters};

use crate::tensor::direct::Error;
use crate::tensor::{Extent, Matrix, Rows};

/// The three matrices of an expert: `down(silu(gate(x)) · up(x))`.
#[derive(Clone, Copy, Debug)]
pub struct Expert<T> {
    /// `[ffn rows, hidden columns]`.
    pub gate: T,
    /// `[ffn rows, hidden columns]`.
    pub up: T,
    /// `[hidden rows, ffn columns]`.
    pub down: T,
}

impl<T> Expert<T> {
    /// Gate, up and down.
    pub fn parts(&self) -> [&T; 3] {
        [&self.gate, &self.up, &self.down]
    }

    /// The same with each part turned into something else.
    pub fn map<'a, U>(&'a self, turn: impl Fn(&'a T) -> U) -> Expert<U> {
        Expert {
            gate: turn(&self.gate),
            up: turn(&self.up),
            down: turn(&self.down),
        }
    }
}

/// All experts of a model.
pub enum Experts {
    /// Matrices in memory (a mapped file's, as a rule), by layer.
    Resident(Vec<Vec<Expert<Matrix>>>),
    /// Slots in memory, filled from disk.
    Cached(Cache),
}

impl Experts {
    /// Bytes of an expert, by layer.
    pub fn layer_bytes(&self) -> Vec<u64> {
        let bytes = |extents: [&Extent; 3]| extents.map(|e| e.bytes() as u64).iter().sum();
        match self {
            Self::Resident(layers) => {
                let first = layers.iter().map(|experts| &experts[0]);
                first
                    .map(|expert| bytes(expert.parts().map(Matrix::extent)))
                    .collect()
            }
            Self::Cached(cache) => {
                let first = cache.layers().iter().map(|experts| &experts[0]);
                first.map(|expert| bytes(expert.parts())).collect()
            }
        }
    }

    /// The cache, where there is one.
    pub fn cache(&self) -> Option<&Cache> {
        match self {
            Self::Resident(_) => None,
            Self::Cached(cache) => Some(cache),
        }
    }

    /// The experts `active` (ascending) of a layer, in portions.
    pub fn visit<'a>(&'a self, layer: usize, active: &'a [usize]) -> Visit<'a> {
        match self {
            Self::Resident(layers) => Visit::Resident(Some((&layers[layer], active))),
            Self::Cached(cache) => Visit::Cached(cache.visit(layer, active)),
        }
    }
}

/// What can be computed now. Over a whole visit each active expert comes once in `gates` and, then
/// or later, once in `downs`: those in ascending order, since sums have a fixed order.
#[derive(Default)]
pub struct Portion<'a> {
    /// Experts with their gate and up rows.
    pub gates: Vec<(usize, Rows<'a>, Rows<'a>)>,
    /// Experts with their down rows, to be multiplied after `gates`.
    pub downs: Vec<(usize, Rows<'a>)>,
}

/// A layer's active experts on their way.
pub enum Visit<'a> {
    /// All of them are there.
    Resident(Option<(&'a [Expert<Matrix>], &'a [usize])>),
    /// Some of them may have to be read.
    Cached(cache::Visit<'a>),
}

impl Visit<'_> {
    /// The next portion, waited for; `None` after the last. What the one before held may be gone.
    ///
    /// # Errors
    /// When an expert cannot be read.
    pub fn portion(&mut self) -> Result<Option<Portion<'_>>, Error> {
        match self {
            Self::Resident(all) => Ok(all.take().map(|(experts, active)| {
                let expert = |&e: &usize| (e, &experts[e]);
                let gates = active.iter().map(expert);
                let downs = active.iter().map(expert);
                Portion {
                    gates: gates
                        .map(|(e, expert)| (e, expert.gate.all(), expert.up.all()))
                        .collect(),
                    downs: downs.map(|(e, expert)| (e, expert.down.all())).collect(),
                }
            })),
            Self::Cached(visit) => visit.portion(),
        }
    }
}
