//! The way back: a GGUF file to a checkpoint as Hugging Face's libraries read it, for training and for other servers.
//!
//! Names, the order of query and key rows and the experts' own matrices come back as transformers has them; quantized
//! weights are decoded. Tensor by tensor, in bounded memory, into `OUT.partial`, which becomes `OUT` when it is whole.

mod config;
mod shards;
mod tokenizer;

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fewbit::gguf::with_suffix;
use fewbit::quant::BlockType;
use indicatif::ProgressBar;

use crate::checkpoint::names::{Expected, Role, expected};
use crate::checkpoint::{Checkpoint, Source, Tensor};
use crate::config::ModelConfig;
use crate::disk;
use crate::encode::Job;
use crate::error::{Error, Result};
use shards::{Shards, Stored};

/// Bytes of weights in a file at most, but for a tensor that alone has more: what transformers writes.
const SHARD: u64 = 5_000_000_000;

/// Types that checkpoints hold weights in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// bfloat16
    Bf16,
    /// float16
    F16,
    /// float32
    F32,
}

impl Dtype {
    fn kind(self) -> BlockType {
        match self {
            Self::Bf16 => BlockType::BF16,
            Self::F16 => BlockType::F16,
            Self::F32 => BlockType::F32,
        }
    }

    /// As safetensors calls it.
    fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
            Self::F32 => "F32",
        }
    }

    /// As torch calls it.
    fn torch_name(self) -> &'static str {
        match self {
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
            Self::F32 => "float32",
        }
    }
}

/// What an export is asked to do.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Type of all weights.
    pub dtype: Dtype,
    /// Bytes of weights in a file at most.
    pub shard_bytes: u64,
    /// Threads that encode; 0 for one a logical CPU.
    pub threads: usize,
}

impl Options {
    /// Weights in `dtype`, in files as large as transformers makes them.
    pub fn new(dtype: Dtype) -> Self {
        Self {
            dtype,
            shard_bytes: SHARD,
            threads: 0,
        }
    }
}

/// What an export wrote.
#[derive(Debug)]
pub struct Report {
    /// The folder.
    pub path: PathBuf,
    /// Files of weights.
    pub shards: usize,
    /// Bytes of weights.
    pub bytes: u64,
    /// Matrices that were quantized and are decoded: what was lost does not come back.
    pub decoded: usize,
    /// Time that it took.
    pub elapsed: Duration,
}

/// Exports the GGUF file `input` into the new folder `output`.
///
/// # Errors
/// If the folder exists, the file is no model of the family or holds something that a checkpoint cannot say, a weight is
/// beyond the type's range, or the system refuses. Nothing is then left under the name `output`.
pub fn export(
    input: &Path,
    output: &Path,
    options: &Options,
    progress: &ProgressBar,
) -> Result<Report> {
    let started = Instant::now();
    if fs::symlink_metadata(output).is_ok() {
        let what = "exists: name a new folder";
        return Err(Error::input(output, what));
    }
    if input.is_dir() {
        let what = "is a folder: name a GGUF file; this is the way back from one";
        return Err(Error::input(input, what));
    }
    let checkpoint = Checkpoint::open(input)?;
    let has = |name: &str| checkpoint.tensors.iter().any(|tensor| tensor.name == name);
    let config = config::of(&checkpoint, has(fewbit::gguf::names::OUTPUT))?;
    let parts = parts(&checkpoint, &config)?;
    let files = [
        config::files(&checkpoint, &config, options.dtype.torch_name())?,
        tokenizer::files(&checkpoint)?,
    ]
    .concat();

    let size = options.dtype.kind().block_bytes();
    let stored: Vec<Stored> = parts
        .iter()
        .map(|part| Stored {
            name: part.name.clone(),
            shape: part.shape.clone(),
            bytes: (part.shape.iter().product::<usize>() * size) as u64,
        })
        .collect();
    let bytes = stored.iter().map(|stored| stored.bytes).sum();
    disk::require(output, bytes)?;

    let partial = with_suffix(output, ".partial");
    prepare(&partial)?;
    let mut shards = Shards::plan(&partial, options.dtype.name(), stored, options.shard_bytes);
    progress.set_length(bytes);
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(options.threads)
        .build();
    let pool = pool.map_err(|e| Error::io("start threads for", output)(io::Error::other(e)))?;
    for part in &parts {
        progress.set_message(part.tensor.name.clone());
        shards.begin()?;
        part.write(&checkpoint, options.dtype.kind(), &pool, &mut |encoded| {
            progress.inc(encoded.len() as u64);
            shards.write(encoded)
        })?;
    }
    let count = shards.finish()?;
    for (name, text) in files {
        let path = partial.join(name);
        fs::write(&path, text).map_err(Error::io("write", &path))?;
    }
    disk::sync_folder_of(&partial.join("config.json"))?;
    fs::rename(&partial, output).map_err(Error::io("rename the finished folder to", output))?;
    disk::sync_folder_of(output)?;
    let quantized = |tensor: &&Tensor| matches!(&tensor.source, Source::Stored { kind, .. } if kind.block_len() > 1);
    Ok(Report {
        path: output.to_owned(),
        shards: count,
        bytes,
        decoded: checkpoint.tensors.iter().filter(quantized).count(),
        elapsed: started.elapsed(),
    })
}

/// Makes the folder, or takes up that of a run that was cut off; its weights are written anew.
fn prepare(partial: &Path) -> Result<()> {
    fs::create_dir_all(partial).map_err(Error::io("make the folder", partial))?;
    let entries = fs::read_dir(partial).map_err(Error::io("list", partial))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_some_and(|end| end == "safetensors") {
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

/// A tensor of the checkpoint that is written, and where its rows come from.
struct Part<'a> {
    name: String,
    /// Slowest extent first.
    shape: Vec<usize>,
    tensor: &'a Tensor,
    /// Rows of the tensor, over all experts.
    rows: Range<usize>,
    /// Rows of a head, where the halves of one alternate and are to be taken apart.
    head_dim: Option<usize>,
}

/// What is written, in order.
fn parts<'a>(checkpoint: &'a Checkpoint, config: &ModelConfig) -> Result<Vec<Part<'a>>> {
    let mut parts = Vec::new();
    let expected = expected(config);
    for e in &expected {
        // Follows from the configuration.
        if e.role == Role::RopeFreqs {
            continue;
        }
        let found = checkpoint
            .tensors
            .iter()
            .find(|tensor| tensor.name == e.name);
        let tensor = found.ok_or_else(|| Error::MissingTensor {
            path: checkpoint.path.clone(),
            tensor: e.name.clone(),
        })?;
        if tensor.shape != e.shape {
            return Err(Error::Shape {
                path: checkpoint.path.clone(),
                tensor: e.name.clone(),
                expected: e.shape.clone(),
                found: tensor.shape.clone(),
            });
        }
        parts.extend(parts_of(e, tensor, config));
    }
    let known = |tensor: &&Tensor| !expected.iter().any(|e| e.name == tensor.name);
    match checkpoint.tensors.iter().find(known) {
        None => Ok(parts),
        Some(tensor) => {
            let what = format!(
                "tensor {} has no place in a checkpoint of the Mixtral, Mistral and Llama graphs",
                tensor.name
            );
            Err(Error::input(&checkpoint.path, what))
        }
    }
}

fn parts_of<'a>(e: &Expected, tensor: &'a Tensor, config: &ModelConfig) -> Vec<Part<'a>> {
    let experts = tensor.shape.get(2).copied().unwrap_or(1);
    let rows = tensor.rows() / experts;
    let head_dim = matches!(e.role, Role::AttnQ | Role::AttnK).then_some(config.head_dim);
    let part = |expert: usize| Part {
        name: e.hf_name(expert),
        shape: tensor.shape.iter().take(2).rev().copied().collect(),
        tensor,
        rows: expert * rows..(expert + 1) * rows,
        head_dim,
    };
    (0..experts).map(part).collect()
}

/// Weights that are read at a time, as whole rows (of whole heads, where these are taken apart).
const CHUNK_WEIGHTS: usize = 4 << 20;

impl Part<'_> {
    /// Reads, decodes and encodes the rows, and hands them out chunk by chunk.
    fn write(
        &self,
        checkpoint: &Checkpoint,
        to: BlockType,
        pool: &rayon::ThreadPool,
        write: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let Source::Stored { kind, .. } = self.tensor.source else {
            unreachable!("a GGUF file's tensors are stored");
        };
        let columns = self.tensor.columns();
        let row_bytes = kind.row_bytes(columns).expect("checked when opened");
        let unit = self.head_dim.unwrap_or(1);
        let step = (CHUNK_WEIGHTS / columns / unit * unit).max(unit);
        let (mut stored, mut encoded) = (Vec::new(), Vec::new());
        let starts = self.rows.clone().step_by(step);
        for rows in starts.map(|start| start..(start + step).min(self.rows.end)) {
            checkpoint.read_rows(self.tensor, rows.clone(), &mut stored)?;
            if let Some(head_dim) = self.head_dim {
                stored = halves_apart(&stored, row_bytes, head_dim);
            }
            let job = Job {
                from: kind,
                to,
                columns,
                first_row: rows.start,
                rows_per_expert: self.tensor.rows_per_expert(),
                importance: None,
                rounder: None,
                corrections: None,
            };
            let done = pool.install(|| job.encode(&stored, &mut encoded));
            done.map_err(|bad| bad.error(&checkpoint.path, &self.tensor.name, to))?;
            write(&encoded)?;
        }
        Ok(())
    }
}

/// Rows of whole heads in the order of transformers: of GGUF's rows `2i` and `2i + 1` of a head, one belongs to its first
/// half and one to its second.
fn halves_apart(rows: &[u8], row_bytes: usize, head_dim: usize) -> Vec<u8> {
    let mut apart = Vec::with_capacity(rows.len());
    for head in rows.chunks(head_dim * row_bytes) {
        for half in 0..2 {
            let of_half = head.chunks(row_bytes).skip(half).step_by(2);
            of_half.for_each(|row| apart.extend_from_slice(row));
        }
    }
    apart
}
