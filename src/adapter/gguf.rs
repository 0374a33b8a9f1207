//! Adapters as llama.cpp's `convert_lora_to_gguf.py` writes them.
//!
//! `general.type = "adapter"`, `adapter.type = "lora"`, `adapter.lora.alpha`; for a tensor `NAME` two of them,
//! `NAME.lora_a` `[columns, rank]` and `NAME.lora_b` `[rank, rows]` (extents fastest first), those of merged experts with
//! a third extent. The product counts `alpha / rank`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::{Error, Pair, Target, check};
use crate::gguf::names::{self, Experts};
use crate::gguf::{self, Gguf, TensorInfo};
use crate::plan::Shape;

pub(super) fn read(path: &Path, shape: &Shape) -> Result<(Vec<PathBuf>, Vec<Pair>), Error> {
    let gguf = gguf::read(path)?;
    let metadata = &gguf.metadata;
    if metadata.str("general.type")? != Some("adapter") {
        let problem = "is no adapter: general.type does not say so; give a model by --model";
        return Err(Error::wrong(path, problem));
    }
    let kind = metadata.require_str("adapter.type")?;
    if kind != "lora" {
        let problem = format!("is an adapter of type {kind:?}; lora is computed");
        return Err(metadata.error("adapter.type", problem).into());
    }
    let architecture = metadata.require_str("general.architecture")?;
    if architecture != shape.arch {
        let problem = format!("is {architecture:?}, the model's {:?}", shape.arch);
        return Err(metadata.error("general.architecture", problem).into());
    }
    if metadata.contains("adapter.alora.invocation_tokens") {
        let problem = "works from certain tokens on only (aLoRA), which is not computed";
        return Err(metadata
            .error("adapter.alora.invocation_tokens", problem)
            .into());
    }
    let alpha = metadata.require_f32("adapter.lora.alpha")?;

    let mut halves: BTreeMap<&str, [Option<&TensorInfo>; 2]> = BTreeMap::new();
    for tensor in &gguf.tensors {
        let name = tensor.name.as_str();
        let (base, half) = match (name.strip_suffix(".lora_a"), name.strip_suffix(".lora_b")) {
            (Some(base), _) => (base, 0),
            (_, Some(base)) => (base, 1),
            _ => {
                let problem = format!("tensor {name} is neither .lora_a nor .lora_b");
                return Err(Error::wrong(path, problem));
            }
        };
        halves.entry(base).or_default()[half] = Some(tensor);
    }
    let mut pairs = Vec::new();
    for (name, halves) in halves {
        let [Some(a), Some(b)] = halves else {
            let problem = format!("tensor {name} has one of .lora_a and .lora_b only");
            return Err(Error::wrong(path, problem));
        };
        let Some((target, experts)) = target(name, shape) else {
            let problem = format!("corrects {name}, which is no matrix of this model's graph");
            return Err(Error::wrong(path, problem));
        };
        let extent =
            |tensor: &TensorInfo, axis: usize| tensor.shape.get(axis).copied().unwrap_or(1);
        for tensor in [a, b] {
            if extent(tensor, 2) != experts || extent(tensor, 3) != 1 {
                let problem = format!(
                    "tensor {} has the extents {:?}; {experts} matrices are needed",
                    tensor.name, tensor.shape
                );
                return Err(Error::wrong(path, problem));
            }
        }
        for expert in 0..experts {
            let target = match target {
                Target::Expert(layer, part, _) => Target::Expert(layer, part, expert),
                target => target,
            };
            let extents = |tensor| [extent(tensor, 1), extent(tensor, 0)];
            let rank = check(path, shape, target, extents(a), extents(b))?;
            pairs.push(Pair {
                target,
                rank,
                a: matrix(&gguf, a, expert)?,
                b: matrix(&gguf, b, expert)?,
                scale: match alpha {
                    // As llama.cpp has it.
                    0.0 => 1.0,
                    alpha => alpha / rank as f32,
                },
            });
        }
    }
    Ok((gguf.files, pairs))
}

/// The matrix, or the first of the matrices, called `name`, and how many there are.
fn target(name: &str, shape: &Shape) -> Option<(Target, usize)> {
    if name == names::OUTPUT {
        return Some((Target::Output, 1));
    }
    let block = names::parse(name)?;
    let part = [
        names::ATTN_Q,
        names::ATTN_K,
        names::ATTN_V,
        names::ATTN_OUTPUT,
        names::FFN_GATE_INP,
        names::FFN_GATE,
        names::FFN_UP,
        names::FFN_DOWN,
    ]
    .into_iter()
    .find(|part| *part == block.part)?;
    match block.experts {
        Experts::None => Some((Target::Layer(block.layer, part), 1)),
        Experts::All => Some((Target::Expert(block.layer, part, 0), shape.experts)),
        Experts::One(_) => None,
    }
}

/// Matrix `index` of a tensor, decoded.
fn matrix(gguf: &Gguf, tensor: &TensorInfo, index: usize) -> Result<Vec<f32>, Error> {
    let file = &gguf.files[tensor.file];
    let (columns, stride) = (tensor.columns(), tensor.row_bytes());
    let rows = tensor.shape.get(1).copied().unwrap_or(1);
    let mut bytes = vec![0; rows * stride];
    let start = tensor.offset + (index * bytes.len()) as u64;
    let mut read = || {
        let mut file = File::open(file)?;
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(&mut bytes)
    };
    read().map_err(Error::io("read it", file))?;
    let mut values = vec![0.0; rows * columns];
    for (row, values) in bytes.chunks(stride).zip(values.chunks_mut(columns)) {
        tensor.kind.decode_row(row, values);
    }
    Ok(values)
}
