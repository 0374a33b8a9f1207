//! A GGUF file as a checkpoint: its tensors as they lie, old per-expert matrices merged.

use std::collections::BTreeMap;
use std::path::Path;

use fewbit::gguf::names::{self, Experts};
use fewbit::gguf::{self, Gguf, TensorInfo};

use super::{Checkpoint, Hyperparameters, InputFile, RowOrder, Slab, Source, Tensor};
use crate::error::{Error, Result};
use crate::recipe::visiting_order;

/// Memory for the headers of all files: the largest vocabularies need an eighth.
pub(crate) const HEADER_MEMORY: u64 = 64 << 20;

pub(super) fn open(path: &Path) -> Result<Checkpoint> {
    let gguf = gguf::read_within(path, HEADER_MEMORY)?;
    let hyperparameters = hyperparameters(path, &gguf)?;
    let mut tensors = tensors(path, &gguf, hyperparameters.experts)?;
    tensors.sort_by(|a, b| visiting_order(&a.name).cmp(&visiting_order(&b.name)));
    let files = gguf
        .files
        .iter()
        .map(|f| InputFile::open(f))
        .collect::<Result<_>>()?;
    let mut metadata = gguf.metadata;
    metadata.remove_arrangement();
    Ok(Checkpoint {
        path: path.to_owned(),
        files,
        metadata,
        tensors,
        hyperparameters,
    })
}

fn hyperparameters(path: &Path, gguf: &Gguf) -> Result<Hyperparameters> {
    let meta = &gguf.metadata;
    let architecture = meta.require_str("general.architecture")?;
    if architecture != "llama" {
        let what = format!(
            "general.architecture is {architecture:?}: only \"llama\" (Mixtral, Mistral, Llama) is converted"
        );
        return Err(Error::input(path, what));
    }
    let heads = meta.require_usize("llama.attention.head_count")?;
    Ok(Hyperparameters {
        layers: meta.require_usize("llama.block_count")?,
        experts: meta.usize("llama.expert_count")?.unwrap_or(0),
        heads,
        kv_heads: meta
            .usize("llama.attention.head_count_kv")?
            .unwrap_or(heads),
    })
}

fn tensors(path: &Path, gguf: &Gguf, experts: usize) -> Result<Vec<Tensor>> {
    if let Some(deep) = gguf.tensors.iter().find(|t| t.shape.len() > 3) {
        let what = format!(
            "tensor {}: shape {:?} has no place in the Mixtral, Mistral and Llama graphs, whose tensors have 1 to 3 extents",
            deep.name, deep.shape
        );
        return Err(Error::input(path, what));
    }
    /// At least a row is read at a time: this bounds the memory that it takes.
    const MAX_COLUMNS: usize = 1 << 22;
    if let Some(wide) = gguf.tensors.iter().find(|t| t.columns() > MAX_COLUMNS) {
        let what = format!(
            "tensor {}: rows of {} weights are out of range",
            wide.name,
            wide.columns()
        );
        return Err(Error::input(path, what));
    }
    let mut tensors = Vec::with_capacity(gguf.tensors.len());
    // Matrices of files from before April 2024, by the name of the tensor that they become.
    let mut apart: BTreeMap<String, Vec<(usize, &TensorInfo)>> = BTreeMap::new();
    for info in &gguf.tensors {
        match names::parse(&info.name) {
            Some(block) if let Experts::One(expert) = block.experts => {
                apart
                    .entry(names::experts(block.layer, block.part))
                    .or_default()
                    .push((expert, info));
            }
            _ => tensors.push(tensor(info.name.clone(), info.shape.clone(), &[info])),
        }
    }
    for (name, mut parts) in apart {
        parts.sort_by_key(|(expert, _)| *expert);
        if !parts.iter().map(|(expert, _)| *expert).eq(0..experts) {
            let what = format!(
                "holds {} experts of {name}, llama.expert_count says {experts}",
                parts.len()
            );
            return Err(Error::input(path, what));
        }
        let parts: Vec<&TensorInfo> = parts.into_iter().map(|(_, info)| info).collect();
        let first = parts[0];
        if let Some(other) = parts
            .iter()
            .find(|p| p.shape != first.shape || p.kind != first.kind)
        {
            let what = format!(
                "tensors {} ({} {:?}) and {} ({} {:?}) cannot be merged",
                first.name, first.kind, first.shape, other.name, other.kind, other.shape
            );
            return Err(Error::input(path, what));
        }
        let mut shape = first.shape.clone();
        shape.push(experts);
        tensors.push(tensor(name, shape, &parts));
    }
    Ok(tensors)
}

fn tensor(name: String, shape: Vec<usize>, parts: &[&TensorInfo]) -> Tensor {
    let kind = parts[0].kind;
    let slabs = parts
        .iter()
        .map(|p| Slab {
            file: p.file,
            offset: p.offset,
        })
        .collect();
    Tensor {
        name,
        shape,
        kind,
        source: Source::Stored {
            kind,
            slabs,
            order: RowOrder::Stored,
        },
    }
}
