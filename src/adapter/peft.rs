//! Adapters as PEFT saves them.
//!
//! `adapter_config.json` says rank, alpha and what else was done; `adapter_model.safetensors` holds, for a module,
//! `base_model.model.MODULE.lora_A.weight` `[rank, columns]` and `….lora_B.weight` `[rows, rank]`. The product counts
//! `alpha / rank`, or with `use_rslora` `alpha / √rank` (<https://arxiv.org/abs/2312.03732>).

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::Deserialize;
use serde_json::Value as Json;

use super::{Error, Pair, Target, check};
use crate::gguf::names;
use crate::plan::Shape;
use crate::quant::BlockType;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// Longest of either: an adapter of every expert of Mixtral 8x22B has a table of 2 MB.
const MAX_CONFIG: u64 = 4 << 20;
const MAX_TABLE: u64 = 64 << 20;

/// What `adapter_config.json` says.
#[derive(Deserialize)]
struct Config {
    peft_type: String,
    lora_alpha: f32,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    lora_bias: bool,
    bias: Option<String>,
    #[serde(default)]
    alpha_pattern: Option<HashMap<String, f32>>,
    modules_to_save: Option<Json>,
    target_parameters: Option<Json>,
}

pub(super) fn read(path: &Path, shape: &Shape) -> Result<(Vec<PathBuf>, Vec<Pair>), Error> {
    let folder = match path.is_dir() {
        true => path,
        false => path.parent().unwrap_or(Path::new("")),
    };
    let config = config(&folder.join(CONFIG))?;
    let weights = match path.is_dir() {
        true => folder.join(WEIGHTS),
        false => path.to_owned(),
    };
    if path.is_dir() && !weights.exists() && folder.join("adapter_model.bin").exists() {
        let problem = "holds adapter_model.bin, which is not read; save it as safetensors";
        return Err(Error::wrong(folder, problem));
    }
    let mut file = File::open(&weights).map_err(Error::io("open it", &weights))?;
    let (table, start) = table(&weights, &mut file)?;
    let table = table.tensors();

    let mut halves: BTreeMap<String, [Option<&TensorInfo>; 2]> = BTreeMap::new();
    for (name, info) in &table {
        let (module, half) = half(name).ok_or_else(|| {
            let problem = format!(
                "tensor {name} is no part of a low-rank correction (lora_A.weight, lora_B.weight); this kind of adapter is not computed"
            );
            Error::wrong(&weights, problem)
        })?;
        halves.entry(module.to_owned()).or_default()[half] = Some(*info);
    }
    let mut pairs = Vec::new();
    for (module, halves) in halves {
        let [Some(a), Some(b)] = halves else {
            let problem = format!("module {module} has one of lora_A and lora_B only");
            return Err(Error::wrong(&weights, problem));
        };
        let Some(target) = target(&module, shape) else {
            let problem =
                format!("corrects {module}, which is no matrix that can be corrected here");
            return Err(Error::wrong(&weights, problem));
        };
        let (&[a0, a1], &[b0, b1]) = (&a.shape[..], &b.shape[..]) else {
            let problem = format!(
                "module {module} has matrices of {:?} and {:?}",
                a.shape, b.shape
            );
            return Err(Error::wrong(&weights, problem));
        };
        let rank = check(&weights, shape, target, [a0, a1], [b0, b1])?;
        let mut matrix = |info: &TensorInfo| floats(&weights, &mut file, start, &module, info);
        let (a, mut b) = (matrix(a)?, matrix(b)?);
        if let Target::Layer(_, names::ATTN_Q | names::ATTN_K) = target {
            b = interleaved(&b, rank, shape.head_dim);
        }
        let alpha = config.alpha(&module);
        pairs.push(Pair {
            target,
            rank,
            a,
            b,
            scale: match config.use_rslora {
                true => alpha / (rank as f32).sqrt(),
                false => alpha / rank as f32,
            },
        });
    }
    Ok((vec![folder.join(CONFIG), weights], pairs))
}

fn config(path: &Path) -> Result<Config, Error> {
    let wrong = |problem: String| Err(Error::wrong(path, problem));
    let len = fs::metadata(path)
        .map_err(Error::io("open it", path))?
        .len();
    if len > MAX_CONFIG {
        return wrong(format!("{len} bytes are no adapter's configuration"));
    }
    let text = fs::read(path).map_err(Error::io("read it", path))?;
    let config: Config = match serde_json::from_slice(&text) {
        Ok(config) => config,
        Err(error) => return wrong(error.to_string()),
    };
    let says = |value: &Option<Json>| match value {
        None | Some(Json::Null) => false,
        Some(Json::Array(items)) => !items.is_empty(),
        Some(_) => true,
    };
    let pattern = config.alpha_pattern.iter().flatten().map(|(key, _)| key);
    let is_plain =
        |key: &&String| !key.contains(|c: char| !(c.is_alphanumeric() || "._".contains(c)));
    let refused = [
        (
            config.peft_type != "LORA",
            "peft_type: only LORA is computed",
        ),
        (
            config.use_dora,
            "use_dora: magnitudes are not computed; merge the adapter with PEFT",
        ),
        (
            config.fan_in_fan_out,
            "fan_in_fan_out: no matrix of this family lies that way",
        ),
        (
            config.lora_bias || config.bias.as_ref().is_some_and(|bias| bias != "none"),
            "bias: the graph has none; merge the adapter with PEFT",
        ),
        (
            says(&config.modules_to_save),
            "modules_to_save: it replaces whole matrices; merge the adapter with PEFT",
        ),
        (
            says(&config.target_parameters),
            "target_parameters: corrections of fused experts are not computed; train with target_modules",
        ),
        (
            !pattern.clone().all(|key| is_plain(&key)),
            "alpha_pattern: regular expressions are not read",
        ),
        (
            !config.lora_alpha.is_finite(),
            "lora_alpha: must be a number",
        ),
    ];
    match refused.iter().find(|(refused, _)| *refused) {
        Some((_, problem)) => wrong((*problem).to_owned()),
        None => Ok(config),
    }
}

impl Config {
    /// Alpha of a module: that of the pattern which its name ends in, or everybody's.
    fn alpha(&self, module: &str) -> f32 {
        let ends = |key: &str| module == key || module.ends_with(&format!(".{key}"));
        let mut own = self
            .alpha_pattern
            .iter()
            .flatten()
            .filter(|(key, _)| ends(key));
        own.next().map_or(self.lora_alpha, |(_, alpha)| *alpha)
    }
}

/// The module that a tensor belongs to, and whether it is A (0) or B (1).
fn half(name: &str) -> Option<(&str, usize)> {
    let name = name.strip_prefix("base_model.model.").unwrap_or(name);
    // Unsaved adapters carry their own name, "default" as a rule.
    let name = name.strip_suffix(".weight")?;
    let name = name.strip_suffix(".default").unwrap_or(name);
    match name.strip_suffix(".lora_A") {
        Some(module) => Some((module, 0)),
        None => Some((name.strip_suffix(".lora_B")?, 1)),
    }
}

/// The matrix that a module of transformers is.
fn target(module: &str, shape: &Shape) -> Option<Target> {
    if module == "lm_head" {
        return Some(Target::Output);
    }
    let module = module.strip_prefix("model.").unwrap_or(module);
    let (layer, module) = module.strip_prefix("layers.")?.split_once('.')?;
    let layer = layer.parse().ok()?;
    let part = match module {
        "self_attn.q_proj" => names::ATTN_Q,
        "self_attn.k_proj" => names::ATTN_K,
        "self_attn.v_proj" => names::ATTN_V,
        "self_attn.o_proj" => names::ATTN_OUTPUT,
        "mlp.gate_proj" => names::FFN_GATE,
        "mlp.up_proj" => names::FFN_UP,
        "mlp.down_proj" => names::FFN_DOWN,
        "block_sparse_moe.gate" => names::FFN_GATE_INP,
        // As transformers 5 calls it.
        "mlp.gate" if shape.is_moe() => names::FFN_GATE_INP,
        _ => {
            let (expert, matrix) = module
                .strip_prefix("block_sparse_moe.experts.")?
                .split_once('.')?;
            let part = match matrix {
                "w1" => names::FFN_GATE,
                "w2" => names::FFN_DOWN,
                "w3" => names::FFN_UP,
                _ => return None,
            };
            return Some(Target::Expert(layer, part, expert.parse().ok()?));
        }
    };
    Some(Target::Layer(layer, part))
}

/// The rows of B in GGUF's order: a head's two halves, which transformers rotates against each other, alternate.
fn interleaved(b: &[f32], rank: usize, head_dim: usize) -> Vec<f32> {
    let rows = b.len() / rank;
    let half = head_dim / 2;
    let stored = |row: usize| {
        let (head, inside) = (row / head_dim, row % head_dim);
        head * head_dim + inside % 2 * half + inside / 2
    };
    let row = |row: usize| &b[stored(row) * rank..(stored(row) + 1) * rank];
    (0..rows)
        .flat_map(|index| row(index).iter().copied())
        .collect()
}

/// The table of a safetensors file, checked to fill the file, and where its data starts.
fn table(path: &Path, file: &mut File) -> Result<(Metadata, u64), Error> {
    let len = file.metadata().map_err(Error::io("open it", path))?.len();
    let mut head = [0; 8];
    file.read_exact(&mut head)
        .map_err(Error::io("read it", path))?;
    let table = u64::from_le_bytes(head);
    if table > MAX_TABLE || table > len.saturating_sub(8) {
        let problem =
            format!("a table of {table} bytes in a file of {len}: no safetensors file, or cut off");
        return Err(Error::wrong(path, problem));
    }
    let mut bytes = vec![0; table as usize];
    file.read_exact(&mut bytes)
        .map_err(Error::io("read it", path))?;
    let metadata: Metadata = serde_json::from_slice(&bytes)
        .map_err(|error| Error::wrong(path, format!("no safetensors file: {error}")))?;
    let start = 8 + table;
    let end = start + metadata.data_len() as u64;
    if end > len {
        let problem = format!("ends at byte {len}, its tensors at {end}: cut off; copy it again");
        return Err(Error::wrong(path, problem));
    }
    Ok((metadata, start))
}

/// A tensor of floats, widened to f32.
fn floats(
    path: &Path,
    file: &mut File,
    start: u64,
    module: &str,
    info: &TensorInfo,
) -> Result<Vec<f32>, Error> {
    let kind = match info.dtype {
        Dtype::F32 => BlockType::F32,
        Dtype::F16 => BlockType::F16,
        Dtype::BF16 => BlockType::BF16,
        other => {
            let problem = format!("module {module} is {other:?}; F32, F16 and BF16 are read");
            return Err(Error::wrong(path, problem));
        }
    };
    let (begin, end) = info.data_offsets;
    let mut bytes = vec![0; end - begin];
    file.seek(SeekFrom::Start(start + begin as u64))
        .and_then(|_| file.read_exact(&mut bytes))
        .map_err(Error::io("read it", path))?;
    let mut values = vec![0.0; info.shape.iter().product()];
    kind.decode_row(&bytes, &mut values);
    Ok(values)
}
