//! Every tensor of the graph, bound by name, type and shape.

use std::collections::HashSet;

use super::{Config, Error};
use crate::experts::{Cache, Expert, Experts, policy};
use crate::gguf::{Gguf, TensorInfo, names};
use crate::plan::fit::Slots;
use crate::tensor::direct::Files;
use crate::tensor::{self, Extent, Mapped, Matrix};

/// The weights of a model.
pub struct Weights {
    /// `[vocab, hidden]`.
    pub token_embd: Matrix,
    /// `[hidden]`.
    pub output_norm: Vec<f32>,
    /// `[vocab, hidden]`; the embedding itself where the two are tied.
    pub output: Matrix,
    /// Llama 3's divisors of the rotary frequencies, `[rope dims / 2]`.
    pub rope_factors: Option<Vec<f32>>,
    /// One entry a layer.
    pub layers: Vec<Layer>,
    /// Feed-forward matrices of all layers.
    pub experts: Experts,
}

/// The weights of a layer, its experts apart.
#[derive(Clone)]
pub struct Layer {
    /// `[hidden]`.
    pub attn_norm: Vec<f32>,
    /// `[heads · head_dim, hidden]`.
    pub q: Matrix,
    /// `[kv_heads · head_dim, hidden]`.
    pub k: Matrix,
    /// `[kv_heads · head_dim, hidden]`.
    pub v: Matrix,
    /// `[hidden, heads · head_dim]`.
    pub o: Matrix,
    /// `[hidden]`.
    pub ffn_norm: Vec<f32>,
    /// `[experts, hidden]`; `None` in a dense model.
    pub router: Option<Matrix>,
}

impl Weights {
    /// Binds the tensors of `gguf`, and puts them where `placement` says.
    ///
    /// # Errors
    /// When a tensor is missing, has another shape than the metadata says, or is not part of
    /// the graph (its result would be silently wrong); when the files cannot be mapped or read, or
    /// there is no memory.
    pub fn bind(gguf: &Gguf, placement: Placement<'_>, config: &Config) -> Result<Self, Error> {
        let shape = &config.shape;
        let (hidden, vocab) = (shape.hidden, shape.vocab);
        let (q_dim, kv_dim) = (
            shape.heads * shape.head_dim,
            shape.kv_heads * shape.head_dim,
        );
        let experts = shape.is_moe().then_some(shape.experts);
        let source = match placement {
            Placement::Mapped => Source::Mapped(Mapped::open(gguf)?),
            Placement::Read | Placement::Cached { .. } => {
                Source::Files(Files::open(gguf).map_err(tensor::Error::from)?)
            }
        };
        let mut bind = Binder {
            gguf,
            source,
            experts,
            bound: HashSet::new(),
        };

        let token_embd = bind.matrix(names::TOKEN_EMBD, vocab, hidden)?;
        let output = match bind.has(names::OUTPUT) {
            true => bind.matrix(names::OUTPUT, vocab, hidden)?,
            false => token_embd.clone(),
        };
        let mut layers = Vec::new();
        let mut experts = Vec::new();
        for l in 0..shape.layers {
            let name = |part| names::block(l, part);
            layers.push(Layer {
                attn_norm: bind.vector(&name(names::ATTN_NORM), hidden)?,
                q: bind.matrix(&name(names::ATTN_Q), q_dim, hidden)?,
                k: bind.matrix(&name(names::ATTN_K), kv_dim, hidden)?,
                v: bind.matrix(&name(names::ATTN_V), kv_dim, hidden)?,
                o: bind.matrix(&name(names::ATTN_OUTPUT), hidden, q_dim)?,
                ffn_norm: bind.vector(&name(names::FFN_NORM), hidden)?,
                router: match shape.is_moe() {
                    true => Some(bind.matrix(&name(names::FFN_GATE_INP), shape.experts, hidden)?),
                    false => None,
                },
            });
            let gates = bind.experts(l, names::FFN_GATE, shape.ffn, hidden)?;
            let ups = bind.experts(l, names::FFN_UP, shape.ffn, hidden)?;
            let downs = bind.experts(l, names::FFN_DOWN, hidden, shape.ffn)?;
            let triples = gates.into_iter().zip(ups).zip(downs);
            let triples = triples.map(|((gate, up), down)| Expert { gate, up, down });
            experts.push(triples.collect::<Vec<_>>());
        }
        let output_norm = bind.vector(names::OUTPUT_NORM, hidden)?;
        let rope_factors = match bind.has(names::ROPE_FREQS) {
            true => Some(bind.vector(names::ROPE_FREQS, config.rope.dims / 2)?),
            false => None,
        };
        let source = bind.finish()?;
        let experts = match (source, placement) {
            (
                Source::Files(files),
                Placement::Cached {
                    slots,
                    policy,
                    is_short,
                },
            ) => {
                let cache = Cache::new(files, experts, slots, policy, is_short);
                Experts::Cached(cache.map_err(|source| tensor::Error::NoRoom {
                    file: gguf.files[0].clone(),
                    bytes: slots.bytes(),
                    source,
                })?)
            }
            (source, _) => Experts::Resident(source.all(&experts)?),
        };
        Ok(Self {
            token_embd,
            output_norm,
            output,
            rope_factors,
            layers,
            experts,
        })
    }

    /// The same weights over the same memory, but for matrices in whose place `visit` puts others. It sees all that may
    /// be quantized, by name, those of several experts by the same; a tied head follows the embedding. `None`, and
    /// nothing is visited, where experts are not all in memory.
    ///
    /// # Errors
    /// Those of `visit`.
    pub fn varied<E>(
        &self,
        mut visit: impl FnMut(&str, &mut Matrix) -> Result<(), E>,
    ) -> Result<Option<Self>, E> {
        let Experts::Resident(experts) = &self.experts else {
            return Ok(None);
        };
        let (mut token_embd, mut output) = (self.token_embd.clone(), self.output.clone());
        let (mut layers, mut experts) = (self.layers.clone(), experts.clone());
        let tied = output.all().bytes.as_ptr() == token_embd.all().bytes.as_ptr();
        visit(names::TOKEN_EMBD, &mut token_embd)?;
        for (l, (layer, experts)) in layers.iter_mut().zip(&mut experts).enumerate() {
            let own = [
                (names::ATTN_Q, &mut layer.q),
                (names::ATTN_K, &mut layer.k),
                (names::ATTN_V, &mut layer.v),
                (names::ATTN_OUTPUT, &mut layer.o),
            ];
            for (part, matrix) in own {
                visit(&names::block(l, part), matrix)?;
            }
            let name = |part| match layer.router {
                Some(_) => names::experts(l, part),
                None => names::block(l, part),
            };
            for expert in experts {
                visit(&name(names::FFN_GATE), &mut expert.gate)?;
                visit(&name(names::FFN_UP), &mut expert.up)?;
                visit(&name(names::FFN_DOWN), &mut expert.down)?;
            }
        }
        match tied {
            true => output = token_embd.clone(),
            false => visit(names::OUTPUT, &mut output)?,
        }
        Ok(Some(Self {
            token_embd,
            output_norm: self.output_norm.clone(),
            output,
            rope_factors: self.rope_factors.clone(),
            layers,
            experts: Experts::Resident(experts),
        }))
    }
}

/// Where weights are put.
#[derive(Clone, Copy, Debug)]
pub enum Placement<'a> {
    /// In the mapped file, as they lie.
    Mapped,
    /// In memory of our own.
    Read,
    /// Experts in slots; everything else in memory of our own.
    Cached {
        /// The slots.
        slots: &'a Slots,
        /// Which expert gives up its own.
        policy: policy::Kind,
        /// Whether memory has become short, where that is to be asked before more is taken.
        is_short: Option<fn() -> bool>,
    },
}

/// Where matrices come from.
enum Source {
    Mapped(Mapped),
    Files(Files),
}

impl Source {
    fn matrix(&self, extent: Extent) -> Result<Matrix, tensor::Error> {
        match self {
            Self::Mapped(mapped) => Ok(mapped.matrix(extent)),
            Self::Files(files) => tensor::read(files, extent),
        }
    }

    /// The matrices of all experts.
    fn all(
        &self,
        experts: &[Vec<Expert<Extent>>],
    ) -> Result<Vec<Vec<Expert<Matrix>>>, tensor::Error> {
        let expert = |expert: &Expert<Extent>| {
            Ok(Expert {
                gate: self.matrix(expert.gate)?,
                up: self.matrix(expert.up)?,
                down: self.matrix(expert.down)?,
            })
        };
        let layer = |layer: &Vec<Expert<Extent>>| layer.iter().map(expert).collect();
        experts.iter().map(layer).collect()
    }
}

/// Finds tensors by name, checks their shapes, and remembers which were used.
struct Binder<'a> {
    gguf: &'a Gguf,
    source: Source,
    /// Experts a layer; `None` in a dense model.
    experts: Option<usize>,
    bound: HashSet<&'a str>,
}

impl<'a> Binder<'a> {
    fn has(&self, name: &str) -> bool {
        self.gguf.tensor(name).is_some()
    }

    /// The tensor called `name`, whose extents must be `shape` (trailing ones aside).
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<&'a TensorInfo, Error> {
        let file = || self.gguf.files[0].clone();
        let Some(tensor) = self.gguf.tensor(name) else {
            return Err(Error::Missing {
                file: file(),
                tensor: name.to_owned(),
            });
        };
        let extents = |shape: &[usize]| -> Vec<usize> {
            let len = shape
                .iter()
                .rposition(|&extent| extent != 1)
                .map_or(1, |last| last + 1);
            shape[..len].to_vec()
        };
        if extents(&tensor.shape) != extents(shape) {
            return Err(Error::Shape {
                file: self.gguf.files[tensor.file].clone(),
                tensor: name.to_owned(),
                found: tensor.shape.clone(),
                wanted: shape.to_vec(),
            });
        }
        self.bound.insert(&tensor.name);
        Ok(tensor)
    }

    fn extent(&mut self, name: &str, rows: usize, cols: usize) -> Result<Extent, Error> {
        let tensor = self.tensor(name, &[cols, rows])?;
        Ok(Extent::all(tensor).remove(0))
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<Matrix, Error> {
        let extent = self.extent(name, rows, cols)?;
        Ok(self.source.matrix(extent)?)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>, Error> {
        let mut weights = vec![0.0; len];
        self.matrix(name, 1, len)?.all().decode(0, &mut weights);
        Ok(weights)
    }

    /// One part of a layer's experts: merged, one tensor each (old files), or dense.
    fn experts(
        &mut self,
        layer: usize,
        part: &str,
        rows: usize,
        cols: usize,
    ) -> Result<Vec<Extent>, Error> {
        let Some(experts) = self.experts else {
            return Ok(vec![self.extent(&names::block(layer, part), rows, cols)?]);
        };
        if self.has(&names::expert(layer, part, 0)) {
            return (0..experts)
                .map(|e| self.extent(&names::expert(layer, part, e), rows, cols))
                .collect();
        }
        let tensor = self.tensor(&names::experts(layer, part), &[cols, rows, experts])?;
        Ok(Extent::all(tensor))
    }

    /// Refuses tensors that nothing has asked for: a bias, say, that the graph would ignore.
    fn finish(self) -> Result<Source, Error> {
        match self
            .gguf
            .tensors
            .iter()
            .find(|tensor| !self.bound.contains(tensor.name.as_str()))
        {
            None => Ok(self.source),
            Some(tensor) => Err(Error::Unknown {
                file: self.gguf.files[tensor.file].clone(),
                tensor: tensor.name.clone(),
            }),
        }
    }
}
