//! Hugging Face's layouts: experts stored apart (`block_sparse_moe.experts.E.w1`) or fused
//! (`mlp.experts.gate_up_proj`), and the dense models of the family.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use fewbit::quant::BlockType;

use super::names::{Expected, Role, expected};
use super::shards::{Shards, Stored, block_type};
use super::{Checkpoint, Hyperparameters, RowOrder, Slab, Source, Tensor};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::metadata;

pub(super) fn open(folder: &Path, files: &[PathBuf]) -> Result<Checkpoint> {
    let config = ModelConfig::from_hf(&super::config_path(folder, "config.json")?)?;
    let index = folder.join("model.safetensors.index.json");
    let shards = if index.is_file() {
        Shards::from_index(&index)?
    } else {
        Shards::from_files(files)?
    };
    let mut binder = Binder::new(folder, &config, &shards);
    let tensors = expected(&config)
        .iter()
        .map(|e| binder.bind_hf(e))
        .collect::<Result<Vec<_>>>()?;
    // Buffers that old versions saved, and the head that tied embeddings make superfluous.
    let superfluous = |name: &str| {
        name.ends_with("rotary_emb.inv_freq")
            || (config.tied_embeddings && name == "lm_head.weight")
    };
    binder.refuse_leftovers(superfluous)?;
    assemble(folder, &config, shards, tensors)
}

/// Puts the parts of a folder's checkpoint together.
pub(super) fn assemble(
    folder: &Path,
    config: &ModelConfig,
    shards: Shards,
    tensors: Vec<Tensor>,
) -> Result<Checkpoint> {
    let mut metadata = metadata::from_config(&metadata::model_name(folder), config);
    for (key, value) in crate::vocab::from_checkpoint(folder)? {
        metadata.insert(key, value);
    }
    Ok(Checkpoint {
        path: folder.to_owned(),
        files: shards.files,
        metadata,
        tensors,
        hyperparameters: Hyperparameters {
            layers: config.layers,
            experts: config.experts,
            heads: config.heads,
            kv_heads: config.kv_heads,
        },
    })
}

/// Finds expected tensors in shards and remembers which were taken.
pub(super) struct Binder<'a> {
    folder: &'a Path,
    config: &'a ModelConfig,
    shards: &'a Shards,
    taken: HashSet<String>,
}

impl<'a> Binder<'a> {
    pub(super) fn new(folder: &'a Path, config: &'a ModelConfig, shards: &'a Shards) -> Self {
        Binder {
            folder,
            config,
            shards,
            taken: HashSet::new(),
        }
    }

    fn bind_hf(&mut self, e: &Expected) -> Result<Tensor> {
        let fused_stem = format!("model.layers.{}.mlp.experts", e.layer);
        let gate_up = format!("{fused_stem}.gate_up_proj");
        match e.role {
            Role::GateExperts | Role::UpExperts | Role::DownExperts
                if self.shards.tensors.contains_key(&gate_up) =>
            {
                self.bind_fused(e, &gate_up, &format!("{fused_stem}.down_proj"))
            }
            Role::AttnQ | Role::AttnK => {
                let order = RowOrder::Interleave {
                    head_dim: self.config.head_dim,
                };
                self.bind(e, order, |e, expert| e.hf_name(expert))
            }
            Role::Router => {
                let renamed = format!("model.layers.{}.mlp.gate.weight", e.layer);
                let by_new_name = self.shards.tensors.contains_key(&renamed);
                self.bind(e, RowOrder::Stored, |e, _| {
                    if by_new_name {
                        renamed.clone()
                    } else {
                        e.hf_name(0)
                    }
                })
            }
            _ => self.bind(e, RowOrder::Stored, |e, expert| e.hf_name(expert)),
        }
    }

    /// Binds a tensor that is stored whole or, with three extents, as one matrix an expert.
    pub(super) fn bind(
        &mut self,
        e: &Expected,
        order: RowOrder,
        name: impl Fn(&Expected, usize) -> String,
    ) -> Result<Tensor> {
        if e.role == Role::RopeFreqs {
            let divisors = self
                .config
                .rope_scaling
                .frequency_divisors(self.config.rope_theta, self.config.head_dim);
            let divisors = divisors.expect("expected only where there are some");
            return Ok(Tensor {
                name: e.name.clone(),
                shape: e.shape.clone(),
                kind: BlockType::F32,
                source: Source::Computed(divisors),
            });
        }
        let matrix: Vec<usize> = e.shape.iter().take(2).rev().copied().collect();
        let mut slabs = Vec::new();
        let mut kind = None;
        for expert in 0..e.shape.get(2).copied().unwrap_or(1) {
            let name = name(e, expert);
            let stored = self.take(&name)?;
            self.check_shape(&name, stored, &matrix)?;
            kind = Some(self.same_type(&name, stored, kind)?);
            slabs.push(Slab {
                file: stored.file,
                offset: stored.offset,
            });
        }
        Ok(tensor(e, kind.expect("at least one slab"), slabs, order))
    }

    /// Experts in two tensors a layer, gate above up in the first of them. transformers 5 stores rows as
    /// `Linear` does, `[E, 2·ffn, hidden]`; where the extents are exchanged, rows and columns are.
    fn bind_fused(&mut self, e: &Expected, gate_up: &str, down: &str) -> Result<Tensor> {
        let ModelConfig {
            hidden,
            ffn,
            experts,
            ..
        } = *self.config;
        let stored = self.take(gate_up)?;
        // A square gate_up says nothing; then down is not square.
        let transposed = match self.shards.tensors.get(down) {
            Some(down) if hidden == 2 * ffn => down.shape == [experts, ffn, hidden],
            _ => stored.shape == [experts, hidden, 2 * ffn],
        };
        if !transposed {
            self.check_shape(gate_up, stored, &[experts, 2 * ffn, hidden])?;
        }
        // The slab of an expert, its first element, and the distance of two stored rows, in elements.
        let (name, stored, slab, first, stride) = match e.role {
            Role::DownExperts => {
                let stored = self.take(down)?;
                let shape = if transposed {
                    [experts, ffn, hidden]
                } else {
                    [experts, hidden, ffn]
                };
                self.check_shape(down, stored, &shape)?;
                (down, stored, ffn * hidden, 0, hidden)
            }
            role => {
                let half = if role == Role::GateExperts { 0 } else { ffn };
                let first = if transposed { half } else { half * hidden };
                (gate_up, stored, 2 * ffn * hidden, first, 2 * ffn)
            }
        };
        let kind = self.same_type(name, stored, None)?;
        let bytes = kind.block_bytes();
        let slabs = (0..experts)
            .map(|expert| Slab {
                file: stored.file,
                offset: stored.offset + ((expert * slab + first) * bytes) as u64,
            })
            .collect();
        let order = if transposed {
            RowOrder::Transposed { stride }
        } else {
            RowOrder::Stored
        };
        Ok(tensor(e, kind, slabs, order))
    }

    fn take(&mut self, name: &str) -> Result<&'a Stored> {
        let Some(stored) = self.shards.tensors.get(name) else {
            return Err(Error::MissingTensor {
                path: self.folder.to_owned(),
                tensor: name.to_owned(),
            });
        };
        self.taken.insert(name.to_owned());
        Ok(stored)
    }

    fn path(&self, stored: &Stored) -> &'a Path {
        &self.shards.files[stored.file].path
    }

    fn check_shape(&self, name: &str, stored: &Stored, expected: &[usize]) -> Result<()> {
        if stored.shape == expected {
            return Ok(());
        }
        Err(Error::Shape {
            path: self.path(stored).to_owned(),
            tensor: name.to_owned(),
            expected: expected.to_vec(),
            found: stored.shape.clone(),
        })
    }

    /// The tensor's type, which must be a float and that of the slabs before it.
    fn same_type(
        &self,
        name: &str,
        stored: &Stored,
        before: Option<BlockType>,
    ) -> Result<BlockType> {
        let path = self.path(stored);
        let Some(kind) = block_type(stored.dtype) else {
            let what = format!(
                "tensor {name} is {:?}: take a checkpoint in BF16, F16 or F32",
                stored.dtype
            );
            return Err(Error::input(path, what));
        };
        match before {
            Some(before) if before != kind => Err(Error::input(
                path,
                format!("tensor {name} is {kind}, the experts before it are {before}"),
            )),
            _ => Ok(kind),
        }
    }

    /// Fails on tensors that nothing took: a model with more in it than the graph would convert to nonsense.
    pub(super) fn refuse_leftovers(&self, superfluous: impl Fn(&str) -> bool) -> Result<()> {
        let mut left: Vec<&String> = self
            .shards
            .tensors
            .keys()
            .filter(|n| !self.taken.contains(*n) && !superfluous(n))
            .collect();
        left.sort();
        match left.first() {
            None => Ok(()),
            Some(name) => {
                let what = format!(
                    "tensor {name} ({} such) has no place in the Mixtral, Mistral and Llama graphs as configured",
                    left.len()
                );
                Err(Error::input(self.path(&self.shards.tensors[*name]), what))
            }
        }
    }
}

fn tensor(e: &Expected, stored: BlockType, slabs: Vec<Slab>, order: RowOrder) -> Tensor {
    Tensor {
        name: e.name.clone(),
        shape: e.shape.clone(),
        kind: if e.role.stays_f32() {
            BlockType::F32
        } else {
            stored
        },
        source: Source::Stored {
            kind: stored,
            slabs,
            order,
        },
    }
}
