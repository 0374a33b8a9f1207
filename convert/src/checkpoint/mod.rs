//! Checkpoints: which GGUF tensors they hold and where the rows of each lie.
//!
//! Four layouts come to one form. A [`Tensor`] carries its GGUF name and shape and a [`Source`]:
//! slabs of rows in files (one an expert where experts are stored apart), and what is to be done
//! with their order. Rows are read by position, chunk by chunk; nothing is mapped.

mod gguf;
mod hf;
mod mistral;
pub mod names;
mod rows;
pub mod shards;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use fewbit::gguf::Metadata;
use fewbit::quant::BlockType;
use serde::de::DeserializeOwned;

pub(crate) use self::gguf::HEADER_MEMORY;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::recipe::{self, RecipeTensor};

/// A checkpoint, opened: everything but the weights is read and checked.
#[derive(Debug)]
pub struct Checkpoint {
    /// The folder or GGUF file.
    pub path: PathBuf,
    /// Files that hold the weights.
    pub files: Vec<InputFile>,
    /// Metadata of the output, but for its file type.
    pub metadata: Metadata,
    /// Tensors of the output, in the order in which they are written.
    pub tensors: Vec<Tensor>,
    /// What llama.cpp's recipes depend on.
    pub hyperparameters: Hyperparameters,
}

/// The counts that decide over a tensor's type.
#[derive(Clone, Copy, Debug)]
pub struct Hyperparameters {
    /// Decoder layers.
    pub layers: usize,
    /// Experts a layer; 0 for dense models.
    pub experts: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
}

/// A file that weights are read from.
#[derive(Debug)]
pub struct InputFile {
    /// Where it is.
    pub path: PathBuf,
    /// It, opened.
    pub file: File,
    /// Its length in bytes.
    pub len: u64,
    /// Nanoseconds between 1970 and its last change (they fit until 2554): a conversion that resumes must find the same file.
    pub modified: u64,
}

/// A tensor of the output.
#[derive(Debug)]
pub struct Tensor {
    /// Its GGUF name.
    pub name: String,
    /// Extents, fastest first: `[columns, rows, experts]`.
    pub shape: Vec<usize>,
    /// Its type in the GGUF file that llama.cpp's converter would hand to llama-quantize:
    /// that of the stored rows, but F32 for norms and routers.
    pub kind: BlockType,
    /// Where its rows come from.
    pub source: Source,
}

/// Where a tensor's rows come from.
#[derive(Debug)]
pub enum Source {
    /// From files.
    Stored {
        /// Type of the rows as they lie.
        kind: BlockType,
        /// Slabs of equally many consecutive rows, in order.
        slabs: Vec<Slab>,
        /// The order of rows within a slab.
        order: RowOrder,
    },
    /// Computed: a single row.
    Computed(Vec<f32>),
}

/// Consecutive rows in a file.
#[derive(Clone, Copy, Debug)]
pub struct Slab {
    /// Index into [`Checkpoint::files`].
    pub file: usize,
    /// The first byte, from the start of the file.
    pub offset: u64,
}

/// The order of rows within a slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    /// As stored.
    Stored,
    /// Hugging Face stores query and key rows for a rotary embedding that pairs dimension i with i + d/2;
    /// GGUF pairs 2i with 2i + 1. So stored row `half·d/2 + i` of a head becomes row `2i + half`.
    Interleave {
        /// Rows of a head: d.
        head_dim: usize,
    },
    /// Stored with rows and columns exchanged, as some fused checkpoints do: element (row, column) lies
    /// at `column · stride + row`, counted in elements.
    Transposed {
        /// Elements between two stored rows.
        stride: usize,
    },
}

impl Checkpoint {
    /// Opens a folder of safetensors or a GGUF file.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let found = fs::metadata(path).map_err(Error::io("open", path))?;
        if !found.is_dir() {
            if path.extension().is_some_and(|e| e == "safetensors") {
                let what = "a checkpoint is the folder that holds this file and its config.json: name the folder";
                return Err(Error::input(path, what));
            }
            if path.extension().is_some_and(is_pickle) {
                return Err(Error::input(path, PICKLE_REMEDY));
            }
            return gguf::open(path);
        }
        // Folders may hold both layouts, and an index is no sign that its shards were downloaded.
        let shards = files_named(path, "model", "safetensors")?;
        let consolidated = files_named(path, "consolidated", "safetensors")?;
        let indexed = path.join("model.safetensors.index.json").is_file();
        if !shards.is_empty() || (indexed && consolidated.is_empty()) {
            return hf::open(path, &shards);
        }
        if !consolidated.is_empty() {
            return mistral::open(path, &consolidated);
        }
        if let Some(pickle) = any_pickle(path)? {
            return Err(Error::input(&pickle, PICKLE_REMEDY));
        }
        let what = "holds neither model*.safetensors nor consolidated*.safetensors: name the folder of a downloaded checkpoint";
        Err(Error::input(path, what))
    }

    /// Bytes of all rows as they are stored.
    pub fn stored_bytes(&self) -> u64 {
        self.tensors.iter().map(Tensor::stored_bytes).sum()
    }
}

/// The configuration of a folder, weights or not.
pub fn config_of(folder: &Path) -> Result<ModelConfig> {
    if folder.join("config.json").is_file() {
        ModelConfig::from_hf(&folder.join("config.json"))
    } else if folder.join("params.json").is_file() {
        ModelConfig::from_mistral(&folder.join("params.json"))
    } else {
        Err(Error::input(
            folder,
            "holds neither config.json nor params.json: download it into the same folder",
        ))
    }
}

impl InputFile {
    /// Opens a file for reading by position.
    pub fn open(path: &Path) -> Result<InputFile> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let found = file.metadata().map_err(Error::io("open", path))?;
        if !found.is_file() {
            return Err(Error::input(path, "is no regular file"));
        }
        let modified = found
            .modified()
            .ok()
            .and_then(|t| t.duration_since(UNIX_EPOCH).ok());
        let modified = modified.map_or(0, |d| d.as_nanos() as u64);
        Ok(InputFile {
            path: path.to_owned(),
            file,
            len: found.len(),
            modified,
        })
    }
}

impl Tensor {
    /// Weights in a row.
    pub fn columns(&self) -> usize {
        self.shape[0]
    }

    /// Rows, over all experts.
    pub fn rows(&self) -> usize {
        self.shape[1..].iter().product()
    }

    /// Rows of one expert: those that share a row of importance weights.
    pub fn rows_per_expert(&self) -> usize {
        self.shape.get(1).copied().unwrap_or(1)
    }

    /// Whether it is one of the matrices that recipes quantize.
    pub fn is_quantized(&self) -> bool {
        let Self {
            name, shape, kind, ..
        } = self;
        recipe::is_quantized(&RecipeTensor {
            name,
            shape,
            source: *kind,
        })
    }

    /// Bytes that it takes in blocks of `kind`; `None` where these do not fill its rows.
    pub fn bytes_as(&self, kind: BlockType) -> Option<u64> {
        let row = kind.row_bytes(self.columns())?;
        Some(row as u64 * self.rows() as u64)
    }

    /// Bytes that its rows take in the checkpoint.
    pub fn stored_bytes(&self) -> u64 {
        match &self.source {
            Source::Stored { kind, .. } => {
                kind.row_bytes(self.columns()).expect("checked when opened") as u64
                    * self.rows() as u64
            }
            Source::Computed(_) => 0,
        }
    }
}

/// The configuration that a layout needs.
fn config_path(folder: &Path, name: &str) -> Result<PathBuf> {
    let path = folder.join(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(Error::input(
        &path,
        "is missing: download it into the same folder",
    ))
}

/// Largest file that is parsed into a tree, which takes many times its bytes; the longest settings of tokenizers have a
/// tenth.
pub(crate) const MAX_TREE_BYTES: u64 = 4 << 20;

/// Reads and parses a JSON file of at most `max` bytes.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path, max: u64) -> Result<T> {
    let bytes = fs::metadata(path).map_err(Error::io("open", path))?.len();
    if bytes > max {
        return Err(Error::input(
            path,
            format!("{bytes} bytes are too many for a JSON file of a checkpoint"),
        ));
    }
    let text = fs::read(path).map_err(Error::io("read", path))?;
    serde_json::from_slice(&text).map_err(|e| Error::input(path, e.to_string()))
}

/// A path's last part, for messages.
pub(crate) fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or(path.as_os_str())
        .to_string_lossy()
        .into_owned()
}

const PICKLE_REMEDY: &str = "pickled weights (.pth, .pt, .bin) can run code and are not read: download the safetensors \
                             files of this model, or convert them once with transformers' save_pretrained";

fn is_pickle(extension: &std::ffi::OsStr) -> bool {
    ["pth", "pt", "bin"].iter().any(|e| extension == *e)
}

fn any_pickle(folder: &Path) -> Result<Option<PathBuf>> {
    let mut found: Vec<PathBuf> = list(folder)?
        .into_iter()
        .filter(|p| p.extension().is_some_and(is_pickle) && file_name(p) != "training_args.bin")
        .collect();
    found.sort();
    Ok(found.into_iter().next())
}

/// Files of a folder by prefix and extension, sorted by name.
fn files_named(folder: &Path, prefix: &str, extension: &str) -> Result<Vec<PathBuf>> {
    let fits = |p: &PathBuf| {
        file_name(p).starts_with(prefix) && p.extension().is_some_and(|e| e == extension)
    };
    let mut found: Vec<PathBuf> = list(folder)?.into_iter().filter(fits).collect();
    found.sort();
    Ok(found)
}

fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(Error::io("list", folder))?;
    entries
        .map(|e| e.map(|e| e.path()).map_err(Error::io("list", folder)))
        .collect()
}
