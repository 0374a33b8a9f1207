//! LoRA adapters merged into the weights: `W + scale · B · A` in f32, row by row, before a row is encoded.

use fewbit::adapter::{Adapter, Chosen, Pair, Target};
use fewbit::plan::Shape;

use crate::checkpoint::{Checkpoint, Source, Tensor};
use crate::error::{Error, Result};

/// Opens adapters for a model of `shape`, each with its scale.
///
/// # Errors
/// If one is damaged or another model's, corrects a matrix that the checkpoint does not hold (a tied output head, which
/// is the embedding), or one that is quantized already and `allow_requantize` does not say that this may be done again.
pub fn open(
    chosen: &[Chosen],
    shape: &Shape,
    checkpoint: &Checkpoint,
    allow_requantize: bool,
) -> Result<Vec<(Adapter, f32)>> {
    let mut adapters = Vec::new();
    for chosen in chosen {
        let adapter = Adapter::open(&chosen.path, shape)?;
        for pair in &adapter.pairs {
            let name = pair.target.tensor();
            let Some(tensor) = checkpoint.tensors.iter().find(|tensor| tensor.name == name) else {
                let what = match pair.target {
                    Target::Output => "corrects the output head, which is the embedding in this model: use it at run time (fewbit run --lora)".to_owned(),
                    target => format!("corrects {target}, which the checkpoint does not hold"),
                };
                return Err(Error::input(&adapter.path, what));
            };
            if let Source::Stored { kind, .. } = tensor.source
                && kind.block_len() > 1
                && !allow_requantize
            {
                return Err(Error::Requantize {
                    path: checkpoint.path.clone(),
                    tensor: name,
                    kind,
                });
            }
        }
        adapters.push((adapter, chosen.scale));
    }
    Ok(adapters)
}

/// What adapters add to a tensor.
pub struct Corrections<'a> {
    rows_per_expert: usize,
    columns: usize,
    /// Those of each expert, or of the only matrix.
    experts: Vec<Vec<(&'a Pair, f32)>>,
}

impl<'a> Corrections<'a> {
    /// What `adapters` add to `tensor`; `None` if they leave it alone.
    pub fn of(adapters: &'a [(Adapter, f32)], tensor: &Tensor) -> Option<Self> {
        let mut experts = vec![Vec::new(); tensor.shape.get(2).copied().unwrap_or(1)];
        for (adapter, scale) in adapters {
            for pair in &adapter.pairs {
                if pair.target.tensor() == tensor.name {
                    let expert = match pair.target {
                        Target::Expert(_, _, expert) => expert,
                        _ => 0,
                    };
                    experts[expert].push((pair, pair.scale * scale));
                }
            }
        }
        experts.iter().any(|pairs| !pairs.is_empty()).then(|| Self {
            rows_per_expert: tensor.rows_per_expert(),
            columns: tensor.columns(),
            experts,
        })
    }

    /// Adds what belongs to row `row`, counted over all experts.
    pub fn add(&self, row: usize, weights: &mut [f32]) {
        let (expert, row) = (row / self.rows_per_expert, row % self.rows_per_expert);
        for (pair, scale) in &self.experts[expert] {
            let b = &pair.b[row * pair.rank..(row + 1) * pair.rank];
            for (b, a) in b.iter().zip(pair.a.chunks_exact(self.columns)) {
                let factor = scale * b;
                weights
                    .iter_mut()
                    .zip(a)
                    .for_each(|(weight, a)| *weight += factor * a);
            }
        }
    }
}
