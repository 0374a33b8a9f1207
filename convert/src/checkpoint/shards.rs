//! Safetensors files: which tensor lies where.
//!
//! Only headers are read here; the format is eight bytes of length, a JSON table, the data
//! (<https://github.com/huggingface/safetensors#format>). Data is later read by position: a mapped
//! shard would count against the memory that a conversion may take.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use fewbit::quant::BlockType;
use safetensors::Dtype;
use serde::Deserialize;

use super::InputFile;
use crate::error::{Error, Result};

/// Longest header that is read; the format's reference implementation refuses longer ones too.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A tensor in a shard.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Index of its shard in [`Shards::files`].
    pub file: usize,
    /// Its first byte, from the start of the shard.
    pub offset: u64,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Extents, slowest first.
    pub shape: Vec<usize>,
}

/// All shards of a checkpoint and the tensors in them.
#[derive(Debug)]
pub struct Shards {
    /// The shards, in the order of their names.
    pub files: Vec<InputFile>,
    /// Tensors by their names in the checkpoint.
    pub tensors: HashMap<String, Stored>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Shards {
    /// Opens the shards that an index file names.
    pub fn from_index(index_path: &Path) -> Result<Shards> {
        let index: Index = super::read_json(index_path)?;
        let folder = index_path.parent().unwrap_or(Path::new("."));
        let mut by_shard: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, shard) in &index.weight_map {
            by_shard.entry(shard).or_default().push(tensor);
        }
        let mut shards = Shards {
            files: Vec::new(),
            tensors: HashMap::new(),
        };
        for (shard, tensors) in &by_shard {
            if Path::new(shard).components().count() != 1 {
                return Err(Error::input(
                    index_path,
                    format!("names the shard {shard:?} outside of its folder"),
                ));
            }
            let path = folder.join(shard);
            if !path.exists() {
                return Err(Error::MissingShard {
                    index: super::file_name(index_path),
                    tensor: tensors[0].to_owned(),
                    path,
                });
            }
            shards.add(&path)?;
            if let Some(tensor) = tensors.iter().find(|t| !shards.tensors.contains_key(**t)) {
                return Err(Error::MissingTensor {
                    path,
                    tensor: (*tensor).to_owned(),
                });
            }
        }
        Ok(shards)
    }

    /// Opens the given shards.
    pub fn from_files<P: AsRef<Path>>(paths: &[P]) -> Result<Shards> {
        let mut shards = Shards {
            files: Vec::new(),
            tensors: HashMap::new(),
        };
        for path in paths {
            shards.add(path.as_ref())?;
        }
        Ok(shards)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let input = InputFile::open(path)?;
        let (header, data_start) = read_header(&input.file, path, input.len)?;
        let file = self.files.len();
        // In the order of the data, so that a truncated shard is reported with the first tensor that is cut.
        for name in header.offset_keys() {
            let info = header.info(&name).expect("a key of the same table");
            let (begin, end) = info.data_offsets;
            let needed = data_start + end as u64;
            if needed > input.len {
                return Err(Error::Truncated {
                    path: path.to_owned(),
                    tensor: name,
                    needed,
                    present: input.len,
                });
            }
            let stored = Stored {
                file,
                offset: data_start + begin as u64,
                dtype: info.dtype,
                shape: info.shape.clone(),
            };
            if let Some(other) = self.tensors.insert(name.clone(), stored) {
                let other = super::file_name(&self.files[other.file].path);
                return Err(Error::input(
                    path,
                    format!("tensor {name} lies in {other} too: remove one of the two"),
                ));
            }
        }
        self.files.push(input);
        Ok(())
    }
}

/// The table of a safetensors file and where its data starts.
fn read_header(file: &File, path: &Path, len: u64) -> Result<(safetensors::tensor::Metadata, u64)> {
    let mut prefix = [0; 8];
    if len < 8 {
        return Err(Error::input(
            path,
            format!("{len} bytes hold no safetensors header: download it again"),
        ));
    }
    file.read_exact_at(&mut prefix, 0)
        .map_err(Error::io("read", path))?;
    let header_len = u64::from_le_bytes(prefix);
    if header_len > MAX_HEADER_BYTES || header_len > len - 8 {
        return Err(Error::input(
            path,
            format!(
                "header of {header_len} bytes at offset 8 does not fit in a file of {len} bytes: not a safetensors file, or a truncated one"
            ),
        ));
    }
    let mut bytes = vec![0; header_len as usize];
    file.read_exact_at(&mut bytes, 8)
        .map_err(Error::io("read", path))?;
    let header = serde_json::from_slice(&bytes)
        .map_err(|e| Error::input(path, format!("safetensors header: {e}")))?;
    Ok((header, 8 + header_len))
}

/// The block type with the same bits, for the types that checkpoints hold weights in.
pub fn block_type(dtype: Dtype) -> Option<BlockType> {
    match dtype {
        Dtype::F32 => Some(BlockType::F32),
        Dtype::F16 => Some(BlockType::F16),
        Dtype::BF16 => Some(BlockType::BF16),
        _ => None,
    }
}
