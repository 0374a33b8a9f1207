//! Safetensors files: which tensor lies where.
//!
//! Only headers are read here; the format is eight bytes of length, a JSON table, the data
//! (<https://github.com/huggingface/safetensors#format>). Data is later read by position: a mapped
//! shard would count against the memory that a conversion may take.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use fewbit::quant::BlockType;
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::InputFile;
use crate::bounded::{List, Map};
use crate::error::{Error, Result};

/// Longest header of a shard that is read; those of Mixtral 8x22B's have 6 kB.
const MAX_HEADER_BYTES: u64 = 16 << 20;

/// What the headers of all shards may have together.
const MAX_HEADERS_BYTES: u64 = 64 << 20;

/// Most tensors of a checkpoint; Mixtral 8x22B has 1,739.
const MAX_TENSORS: usize = 1 << 18;

/// Largest index file; that of a checkpoint of 90,000 tensors has 9 MB.
const MAX_INDEX_BYTES: u64 = 16 << 20;

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
    /// Bytes of the headers read so far.
    header_bytes: u64,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Shards {
    /// Opens the shards that an index file names.
    pub fn from_index(index_path: &Path) -> Result<Shards> {
        let index: Index = super::read_json(index_path, MAX_INDEX_BYTES)?;
        let folder = index_path.parent().unwrap_or(Path::new("."));
        let mut by_shard: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, shard) in &index.weight_map {
            by_shard.entry(shard).or_default().push(tensor);
        }
        let mut shards = Shards {
            files: Vec::new(),
            tensors: HashMap::new(),
            header_bytes: 0,
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
            header_bytes: 0,
        };
        for path in paths {
            shards.add(path.as_ref())?;
        }
        Ok(shards)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let input = InputFile::open(path)?;
        let (header, data_start) = read_header(&input.file, path, input.len)?;
        self.header_bytes += data_start;
        let tensors = self.tensors.len() + header.offset_keys().len();
        if self.header_bytes > MAX_HEADERS_BYTES || tensors > MAX_TENSORS {
            let what = format!(
                "{tensors} tensors in headers of {} bytes up to this file: no checkpoint has so many",
                self.header_bytes
            );
            return Err(Error::input(path, what));
        }
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
    let wrong = |e: serde_json::Error| Error::input(path, format!("safetensors header: {e}"));
    serde_json::from_slice::<Bounds>(&bytes).map_err(wrong)?;
    let header = serde_json::from_slice(&bytes).map_err(wrong)?;
    Ok((header, 8 + header_len))
}

/// A header in which nothing is longer than it may be; only then it is parsed into a table, which buffers what it reads.
struct Bounds;

/// A tensor's description with nothing else in it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)] // read to be checked
struct Entry {
    dtype: Dtype,
    shape: List<u64, 4>,
    data_offsets: List<u64, 2>,
}

impl<'de> Deserialize<'de> for Bounds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(Bounds)
    }
}

impl<'de> Visitor<'de> for Bounds {
    type Value = Bounds;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Bounds, A::Error> {
        /// Notes that the writer of a file left in it.
        const MAX_NOTES: usize = 1 << 16;
        while let Some(key) = map.next_key::<String>()? {
            if key == "__metadata__" {
                map.next_value::<Option<Map<String, MAX_NOTES>>>()?;
            } else {
                map.next_value::<Entry>()
                    .map_err(|e| A::Error::custom(format!("tensor {key}: {e}")))?;
            }
        }
        Ok(Bounds)
    }
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
