//! Block types: how rows of weights are stored in few bits.
//!
//! A tensor's row is a sequence of blocks; a block holds a fixed number of weights in a fixed
//! number of bytes ([`Block`]). Which block a tensor's rows are made of is its [`BlockType`],
//! with ggml's names and ids, so that a file made here opens in llama.cpp and one made there
//! opens here, bit for bit. Decoding and encoding give the bits of ggml's reference functions
//! (`dequantize_row_*`, `quantize_row_*_ref` and, with importance weights, `quantize_*`).

use std::fmt;
use std::str::FromStr;

/// How a tensor's rows are stored, under ggml's names and ids.
#[allow(non_camel_case_types)] // the field's own names
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum BlockType {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    IQ4_NL = 20,
    IQ4_XS = 23,
    BF16 = 30,
    MXFP4 = 39,
}

/// A block of weights as it lies in a file: `#[repr(C)]`, alignment 1, little-endian.
pub trait Block: bytemuck::Pod {
    /// The type whose rows are made of these blocks.
    const TYPE: BlockType;
    /// Weights in a block.
    const LEN: usize;

    /// Writes the block's `LEN` weights into `weights` (exactly `LEN` long).
    fn decode(&self, weights: &mut [f32]);
}

/// A block that can be encoded.
pub trait Encode: Block {
    /// Encodes one whole row: `row.len() == blocks.len() * LEN`.
    ///
    /// `importance` (as long as the row) holds one non-negative weight a column, an imatrix
    /// row of this tensor (mean squared activation of the column); `None` takes ggml's reference function, `Some`
    /// its imatrix variant. Both are bit-equal to ggml.
    fn encode_row(row: &[f32], importance: Option<&[f32]>, blocks: &mut [Self]);
}

impl BlockType {
    /// Weights in a block.
    pub fn block_len(self) -> usize {
        todo!()
    }
    /// Bytes in a block.
    pub fn block_bytes(self) -> usize {
        todo!()
    }
    /// Bytes of a row of `cols` weights; `None` where blocks do not fill the row or on overflow.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        let _ = cols;
        todo!()
    }
    /// Bits a weight takes, the block's scales included.
    pub fn bits_per_weight(self) -> f64 {
        todo!()
    }
    /// ggml's name, e.g. `Q4_K`.
    pub fn name(self) -> &'static str {
        todo!()
    }
    /// ggml's id, as stored in a GGUF file.
    pub fn id(self) -> u32 {
        self as u32
    }
    /// The type with ggml's id, if it is one of ours.
    pub fn from_id(id: u32) -> Option<Self> {
        let _ = id;
        todo!()
    }
    /// Name of any ggml type id, ours or not (for error messages): `Some("IQ2_XXS")` for 16.
    pub fn name_of_id(id: u32) -> Option<&'static str> {
        let _ = id;
        todo!()
    }
    /// All types, in the order of their ids.
    pub const ALL: &'static [BlockType] = &[];
    /// Decodes one row: `bytes` is exactly `row_bytes(weights.len())` long.
    ///
    /// # Panics
    /// If the lengths do not fit together.
    pub fn decode_row(self, bytes: &[u8], weights: &mut [f32]) {
        let _ = (bytes, weights);
        todo!()
    }
    /// The row encoder, where there is one (MXFP4 is decoded only). Takes the row, the
    /// importance weights and the bytes to fill; panics if lengths do not fit together.
    pub fn encoder(self) -> Option<RowEncoder> {
        todo!()
    }
}

/// Encodes one row: weights, importance, bytes to fill.
pub type RowEncoder = fn(&[f32], Option<&[f32]>, &mut [u8]);

impl fmt::Display for BlockType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for BlockType {
    type Err = UnknownType;
    /// Accepts ggml's names in any case (`q4_k`, `Q4_K`).
    fn from_str(name: &str) -> Result<Self, UnknownType> {
        Self::ALL
            .iter()
            .copied()
            .find(|t| t.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| UnknownType(name.to_owned()))
    }
}

/// No block type has this name.
#[derive(Debug, Clone, thiserror::Error)]
#[error("unknown block type {0:?}")]
pub struct UnknownType(pub String);
