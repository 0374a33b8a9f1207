//! GGUF: the file format's header, metadata and tensor table, read and written.
//!
//! [`read`] opens a file (and, for `-00001-of-0000N` names, all its splits) and checks every
//! count, length, offset, dimension and type before it is used; [`Writer`] writes version 3
//! with the default alignment (32), streaming. Neither maps the file: a reader of weights
//! takes place and length of a tensor from its [`TensorInfo`].
//! Specification: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.
//!
//! ```text
//! "GGUF"  version u32  tensors u64  pairs u64
//! pairs × { key, type u32, value }                   strings: length u64, UTF-8
//! tensors × { name, n_dims u32, extents u64 × n_dims, type u32, offset u64 }
//! zeros up to a multiple of the alignment            offsets count from here
//! tensor data, each tensor at a multiple of the alignment
//! ```

mod error;
mod fingerprint;
mod metadata;
pub mod names;
mod read;
mod source;
mod split;
mod value;
mod write;

use std::collections::HashMap;
use std::path::PathBuf;

use crate::quant::BlockType;

pub use error::Error;
pub use metadata::Metadata;
pub use read::{parse, read, read_within};
pub use split::SplitName;
pub use value::{Array, Value};
pub use write::{Layout, TensorDecl, Writer, with_suffix, write_whole};

/// Alignment of tensor data where the file does not say otherwise (and always in files that we write).
pub const DEFAULT_ALIGNMENT: u64 = 32;

const MAGIC: [u8; 4] = *b"GGUF";
const KEY_ALIGNMENT: &str = "general.alignment";
/// Dimensions that a tensor may have in ggml.
const MAX_DIMS: usize = 4;

/// A tensor as the table describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Name, e.g. `blk.0.ffn_gate_exps.weight`.
    pub name: String,
    /// Type of its rows.
    pub kind: BlockType,
    /// Extents, fastest first, as in ggml: `[columns, rows, experts]`. 1 to 4 of them, none zero.
    pub shape: Vec<usize>,
    /// Index into [`Gguf::files`].
    pub file: usize,
    /// Offset of its first byte from the start of that file (checked: the whole tensor lies inside the file).
    pub offset: u64,
    /// Bytes it takes.
    pub bytes: u64,
}

impl TensorInfo {
    /// Weights in a row.
    pub fn columns(&self) -> usize {
        self.shape[0]
    }

    /// Rows, over all further dimensions.
    pub fn rows(&self) -> usize {
        self.shape[1..].iter().product()
    }

    /// Weights.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        (self.bytes / self.rows() as u64) as usize
    }
}

/// A GGUF file (all its splits): metadata and tensor table, checked.
#[derive(Clone, Debug)]
pub struct Gguf {
    /// The file, or its splits in order.
    pub files: Vec<PathBuf>,
    /// Metadata (of the first split).
    pub metadata: Metadata,
    /// All tensors, in the order of the files.
    pub tensors: Vec<TensorInfo>,
    /// Name → index into `tensors`.
    index: HashMap<String, usize>,
}

impl Gguf {
    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).map(|&index| &self.tensors[index])
    }
}

/// Bytes that a tensor takes; `None` if its blocks do not fill a row or the product overflows.
fn tensor_bytes(kind: BlockType, shape: &[usize]) -> Option<u64> {
    let (&columns, rest) = shape.split_first()?;
    let row = kind.row_bytes(columns)? as u64;
    rest.iter()
        .try_fold(row, |bytes, &extent| bytes.checked_mul(extent as u64))
}
