//! What a conversion will write: every tensor's type, the whole file's layout, what falls back.

use fewbit::gguf::{Layout, TensorDecl, Value};
use fewbit::plan::{Shape, Sizes};
use fewbit::quant::BlockType;

use crate::checkpoint::{Checkpoint, Source};
use crate::error::{Error, Result};
use crate::fit;
use crate::imatrix::Imatrix;
use crate::metadata;
use crate::pipeline::Options;
use crate::recipe::{self, RecipeModel, RecipeTensor};

/// A conversion, decided upon but not begun.
#[derive(Debug)]
pub struct Plan {
    /// The output file.
    pub layout: Layout,
    /// Types of its tensors, in order.
    pub kinds: Vec<BlockType>,
    /// The model's extents, as the runtime will read them.
    pub shape: Shape,
    /// Parameters and bytes of the output's tensors.
    pub sizes: Sizes,
    /// Quantized matrices that the imatrix, where there is one, says nothing of.
    pub unweighed: usize,
    /// Tensors whose rows did not hold the blocks of the recipe.
    pub fallbacks: Vec<Fallback>,
}

/// A tensor that got another type than the recipe gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fallback {
    /// The tensor.
    pub tensor: String,
    /// Weights in its rows.
    pub columns: usize,
    /// The recipe's type, whose blocks do not fill them.
    pub from: BlockType,
    /// The type it got.
    pub to: BlockType,
}

impl Plan {
    /// Decides on the types of all tensors and lays the file out. The checkpoint's metadata goes into the layout; it is
    /// moved, since a vocabulary may be large. `promise` is the divergence that --fit expects of it.
    ///
    /// # Errors
    /// If the runtime would not take the model, the recipe or the imatrix does not fit, or quantized weights would have to be quantized again
    /// and `options` do not allow it.
    pub fn new(
        checkpoint: &mut Checkpoint,
        options: &Options,
        imatrix: Option<&Imatrix>,
        promise: Option<f64>,
    ) -> Result<Plan> {
        let mut meta = std::mem::take(&mut checkpoint.metadata);
        let shape = Shape::from_metadata(&meta).map_err(|e| match meta.file() {
            made if made.as_os_str().is_empty() => Error::input(&checkpoint.path, e.to_string()),
            _ => e.into(),
        })?;
        let of = &checkpoint.hyperparameters;
        let model = RecipeModel {
            layers: of.layers,
            heads: of.heads,
            kv_heads: of.kv_heads,
            experts: of.experts,
            imatrix: imatrix.is_some(),
        };
        let tensors: Vec<RecipeTensor> = checkpoint
            .tensors
            .iter()
            .map(|t| RecipeTensor {
                name: &t.name,
                shape: &t.shape,
                source: t.kind,
            })
            .collect();
        let choices = recipe::assign(options.mix, &model, &options.overrides, &tensors)?;

        let mut fallbacks = Vec::new();
        let (mut weighed, mut unweighed) = (0, 0);
        let mut decls = Vec::with_capacity(choices.len());
        for (tensor, choice) in checkpoint.tensors.iter().zip(&choices) {
            if let Some(imatrix) = imatrix
                && tensor.shape.len() > 1
            {
                match imatrix.of(tensor)? {
                    Some(_) => weighed += 1,
                    None if choice.kind.block_len() > 1 => unweighed += 1,
                    None => {}
                }
            }
            if let Source::Stored { kind, .. } = tensor.source
                && kind.block_len() > 1
                && choice.kind != kind
                && !options.allow_requantize
            {
                return Err(Error::Requantize {
                    path: checkpoint.path.clone(),
                    tensor: tensor.name.clone(),
                    kind,
                });
            }
            if let Some(from) = choice.fallback_from {
                let (tensor, columns) = (tensor.name.clone(), tensor.columns());
                fallbacks.push(Fallback {
                    tensor,
                    columns,
                    from,
                    to: choice.kind,
                });
            }
            decls.push(TensorDecl {
                name: tensor.name.clone(),
                kind: choice.kind,
                shape: tensor.shape.clone(),
            });
        }

        if let Some(imatrix) = imatrix
            && weighed == 0
        {
            return Err(imatrix.fits_nothing());
        }
        metadata::set_encoding(&mut meta, recipe::ftype_id(options.mix));
        if let Some(imatrix) = imatrix {
            imatrix.describe(&mut meta);
        }
        if let Some(kld) = promise {
            meta.insert(fit::KLD_KEY, Value::F32(kld as f32));
        }
        Ok(Plan {
            layout: Layout::new(&meta, &decls)?,
            kinds: choices.iter().map(|c| c.kind).collect(),
            sizes: Sizes::of(shape.experts, shape.experts_used, &decls),
            shape,
            unweighed,
            fallbacks,
        })
    }

    /// The fallbacks in lines for people, tensors of a kind together.
    pub fn fallback_lines(&self) -> Vec<String> {
        let mut groups: Vec<(&Fallback, usize)> = Vec::new();
        for fallback in &self.fallbacks {
            let same = |f: &Fallback| {
                part(&f.tensor) == part(&fallback.tensor)
                    && (f.columns, f.from, f.to) == (fallback.columns, fallback.from, fallback.to)
            };
            match groups.iter_mut().find(|(first, _)| same(first)) {
                Some((_, count)) => *count += 1,
                None => groups.push((fallback, 1)),
            }
        }
        let line = |(f, count): &(&Fallback, usize)| {
            let more = if *count > 1 {
                format!(" and {} more", count - 1)
            } else {
                String::new()
            };
            format!(
                "{}{more}: {} columns hold no whole {} blocks: {} instead",
                f.tensor, f.columns, f.from, f.to
            )
        };
        groups.iter().map(line).collect()
    }
}

/// A tensor's name without its layer.
fn part(name: &str) -> &str {
    let within = name
        .strip_prefix("blk.")
        .and_then(|rest| rest.split_once('.'));
    within.map_or(name, |(_, part)| part)
}
