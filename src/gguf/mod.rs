//! GGUF: the file format's header, metadata and tensor table, read and written.
//!
//! `read` opens a file (and, for `-00001-of-0000N` names, all its splits) and checks every
//! count, length, offset, dimension and type before it is used; `Writer` writes version 3
//! with the default alignment (32), streaming.
//! Specification: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::path::PathBuf;

use crate::quant::BlockType;

/// Alignment of tensor data where the file does not say otherwise (and always in files that we write).
pub const DEFAULT_ALIGNMENT: u64 = 32;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// A metadata array: typed, so that a vocabulary's scores are one `Vec<f32>`.
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// Key-value pairs in the order of the file.
///
/// Getters (to be written): `get(&str) -> Option<&Value>`, `insert`, `remove`, `iter`, and typed
/// ones that return `Result<Option<T>, Error>` (absent is `None`; wrong type is an error that names file and key;
/// any integer type that fits is accepted): `u32`, `u64`, `f32`, `bool`, `str`, `strings`, `f32s`, `i32s`; and
/// `require_*` forms or a helper for "missing key" errors.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
}

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

/// A GGUF file (all its splits): metadata and tensor table, checked.
#[derive(Clone, Debug)]
pub struct Gguf {
    /// The file, or its splits in order.
    pub files: Vec<PathBuf>,
    /// Metadata (of the first split).
    pub metadata: Metadata,
    /// All tensors, in the order of the files.
    pub tensors: Vec<TensorInfo>,
}
