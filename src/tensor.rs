//! A file's tensors as typed rows.
//!
//! A [`Matrix`] is a type, two extents and a range of bytes, and kernels read its rows as they lie.
//! The bytes are those of the file, mapped read-only and never copied; or, where a model is kept
//! to less memory than it takes, a copy that was read past the page cache ([`direct`]).

pub mod direct;
pub mod fault;
pub mod warm;

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{Mmap, MmapMut};

use direct::{Files, Piece};

use crate::gguf::{Gguf, TensorInfo};
use crate::quant::BlockType;

/// What can go wrong while a file is mapped or a tensor is looked up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened or mapped.
    #[error("{}: cannot map the file: {source}", file.display())]
    Map {
        /// The file.
        file: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is shorter than its own tensor table says (it shrank after it was read).
    #[error("{}: tensor {tensor} ends at byte {end}, the file at {len}: it was cut off; copy or convert it again", file.display())]
    Truncated {
        /// The file.
        file: PathBuf,
        /// The first tensor that does not fit.
        tensor: String,
        /// Where the tensor ends, in bytes.
        end: u64,
        /// The mapped length in bytes.
        len: u64,
    },
    /// There is no memory for a copy of the weights.
    #[error("{}: no memory for {:.2} GB of weights: {source}; give a smaller --memory, or --mmap", file.display(), *bytes as f64 / 1e9)]
    NoRoom {
        /// The file.
        file: PathBuf,
        /// Bytes asked for.
        bytes: u64,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file cannot be read.
    #[error(transparent)]
    Read(#[from] direct::Error),
}

/// Where a matrix lies in a model's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Type of the rows.
    pub kind: BlockType,
    /// Number of rows.
    pub rows: usize,
    /// Weights in a row.
    pub cols: usize,
    /// Bytes in a row.
    pub stride: usize,
    /// The file among [`Gguf::files`].
    pub file: usize,
    /// Byte of the file at which it begins.
    pub offset: u64,
}

impl Extent {
    /// The tensor's `shape[2]` matrices (one for a tensor of up to two extents), each of
    /// `shape[1]` rows of `shape[0]` columns.
    pub fn all(tensor: &TensorInfo) -> Vec<Self> {
        let extent = |axis: usize| tensor.shape.get(axis).copied().unwrap_or(1);
        let (cols, rows) = (extent(0), extent(1));
        let stride = tensor
            .kind
            .row_bytes(cols)
            .expect("the reader has checked that blocks fill the rows");
        (0..extent(2) * extent(3))
            .map(|index| Self {
                kind: tensor.kind,
                rows,
                cols,
                stride,
                file: tensor.file,
                offset: tensor.offset + (index * rows * stride) as u64,
            })
            .collect()
    }

    /// Bytes that the matrix takes.
    pub fn bytes(&self) -> usize {
        self.rows * self.stride
    }

    /// The rows that `bytes` hold.
    ///
    /// # Panics
    /// If `bytes` are not as many as the matrix takes.
    pub fn rows_in<'a>(&self, bytes: &'a [u8]) -> Rows<'a> {
        assert_eq!(bytes.len(), self.bytes());
        Rows {
            kind: self.kind,
            cols: self.cols,
            stride: self.stride,
            bytes,
        }
    }
}

/// The mapped bytes of a GGUF file and its splits.
pub struct Mapped {
    maps: Vec<Arc<Mmap>>,
}

impl Mapped {
    /// Maps every file of `gguf`.
    ///
    /// # Errors
    /// When a file cannot be mapped, or has become shorter than its tensor table says.
    pub fn open(gguf: &Gguf) -> Result<Self, Error> {
        let maps = gguf
            .files
            .iter()
            .map(|path| map(path))
            .collect::<Result<Vec<_>, _>>()?;
        for tensor in &gguf.tensors {
            let (end, len) = (tensor.offset + tensor.bytes, maps[tensor.file].len() as u64);
            if end > len {
                let file = gguf.files[tensor.file].clone();
                return Err(Error::Truncated {
                    file,
                    tensor: tensor.name.clone(),
                    end,
                    len,
                });
            }
        }
        Ok(Self { maps })
    }

    /// The matrix that lies there.
    pub fn matrix(&self, extent: Extent) -> Matrix {
        let start = extent.offset as usize;
        Matrix {
            extent,
            range: start..start + extent.bytes(),
            memory: Memory::Mapped(Arc::clone(&self.maps[extent.file])),
        }
    }
}

/// Reads the matrix that lies there into memory of its own.
///
/// # Errors
/// When it cannot be read, or there is no memory for it.
pub fn read(files: &Files, extent: Extent) -> Result<Matrix, Error> {
    let (len, file) = (extent.bytes(), files.path(extent.file));
    let piece = Piece::around(extent.file, extent.offset, len as u64);
    let mut memory = direct::memory(piece.len).map_err(|source| Error::NoRoom {
        file: file.to_owned(),
        bytes: piece.len as u64,
        source,
    })?;
    files.read(piece, &mut memory)?;
    let start = (extent.offset - piece.offset) as usize;
    Ok(Matrix {
        extent,
        range: start..start + len,
        memory: Memory::Own(Arc::new(memory)),
    })
}

fn map(path: &Path) -> Result<Arc<Mmap>, Error> {
    let failed = |source| Error::Map {
        file: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    // SAFETY: the mapping is read-only and private to this process's view. Another process that
    // writes to the file changes weights under us, which every type here tolerates (any bytes
    // decode to some number); one that shortens it is the user's to avoid, as for any program
    // that maps its data.
    let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
    Ok(Arc::new(map))
}

/// Rows of weights as they lie in the file.
#[derive(Clone)]
pub struct Matrix {
    extent: Extent,
    range: Range<usize>,
    memory: Memory,
}

/// What a matrix is a part of.
#[derive(Clone)]
enum Memory {
    Mapped(Arc<Mmap>),
    Own(Arc<MmapMut>),
}

impl Matrix {
    /// The same rows in blocks of another type, in memory of their own: `fill` gets these rows, and the bytes of
    /// one and of all of the new. `None` where blocks of that type do not fill the rows.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn recoded(
        &self,
        kind: BlockType,
        fill: impl FnOnce(Rows<'_>, usize, &mut [u8]),
    ) -> std::io::Result<Option<Self>> {
        let Some(stride) = kind.row_bytes(self.extent.cols) else {
            return Ok(None);
        };
        let extent = Extent {
            kind,
            stride,
            offset: 0,
            ..self.extent
        };
        let mut memory = MmapMut::map_anon(extent.bytes().max(1))?;
        fill(self.all(), stride, &mut memory[..extent.bytes()]);
        Ok(Some(Self {
            extent,
            range: 0..extent.bytes(),
            memory: Memory::Own(Arc::new(memory)),
        }))
    }

    /// Type, rows, columns, and where they lie.
    pub fn extent(&self) -> &Extent {
        &self.extent
    }

    /// Number of rows (a linear layer's outputs).
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.extent.rows
    }

    /// All rows.
    pub fn all(&self) -> Rows<'_> {
        let memory: &[u8] = match &self.memory {
            Memory::Mapped(map) => map,
            Memory::Own(memory) => memory,
        };
        self.extent.rows_in(&memory[self.range.clone()])
    }

    /// The rows of `range`.
    pub fn rows(&self, range: Range<usize>) -> Rows<'_> {
        self.all().slice(range)
    }
}

/// A run of rows, borrowed: what kernels work on.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// Type of the rows.
    pub kind: BlockType,
    /// Weights in a row.
    pub cols: usize,
    /// Bytes in a row.
    pub stride: usize,
    /// The rows' bytes, one after the other.
    pub bytes: &'a [u8],
}

impl<'a> Rows<'a> {
    /// Rows over `bytes`; `None` where `bytes` is no whole number of rows.
    pub fn new(kind: BlockType, cols: usize, bytes: &'a [u8]) -> Option<Self> {
        let stride = kind.row_bytes(cols).filter(|&stride| stride > 0)?;
        bytes.len().is_multiple_of(stride).then_some(Self {
            kind,
            cols,
            stride,
            bytes,
        })
    }

    /// Number of rows.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.bytes.len() / self.stride
    }

    /// The rows of `range`.
    pub fn slice(&self, range: Range<usize>) -> Self {
        Self {
            bytes: &self.bytes[range.start * self.stride..range.end * self.stride],
            ..*self
        }
    }

    /// The bytes of row `index`.
    pub fn row(&self, index: usize) -> &'a [u8] {
        &self.bytes[index * self.stride..(index + 1) * self.stride]
    }

    /// Decodes row `index` into `weights` (`cols` long).
    pub fn decode(&self, index: usize, weights: &mut [f32]) {
        self.kind.decode_row(self.row(index), weights);
    }
}
