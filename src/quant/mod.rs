//! Block types: how rows of weights are stored in few bits.
//!
//! A tensor's row is a sequence of blocks; a block holds a fixed number of weights in a fixed
//! number of bytes ([`Block`]). Which block a tensor's rows are made of is its [`BlockType`],
//! with ggml's names and ids, so that a file made here opens in llama.cpp and one made there
//! opens here, bit for bit. Decoding and encoding give the bits of ggml's reference functions
//! (`dequantize_row_*`, `quantize_row_*_ref` and, with importance weights, `quantize_*`).
//!
//! Whoever knows the block at compile time (a kernel) uses the structs; whoever learns it from
//! a file goes through [`BlockType`], whose methods look up one table.

use std::fmt;
use std::str::FromStr;

use multiversion::multiversion;

/// An array by index: `each!(i: 32 => x[i] * x[i])`. Unlike `array::map` and `from_fn`, whose closures are functions of their own, this
/// is compiled for the vectors of the function that it stands in ([`encode_blocks`]).
macro_rules! each {
    ($i:ident: $len:expr => $value:expr) => {{
        let mut all = [bytemuck::Zeroable::zeroed(); $len];
        for ($i, place) in all.iter_mut().enumerate() {
            *place = $value;
        }
        all
    }};
}

mod float;
mod iq4;
mod k;
mod legacy;
mod mxfp4;
mod parts;
mod search;

pub use float::{BF16, F16, F32};
pub use iq4::{BlockIQ4NL, BlockIQ4XS, IQ4_VALUES};
pub use k::{BlockQ2K, BlockQ3K, BlockQ4K, BlockQ5K, BlockQ6K, Scales16, ScalesAndMins8};
pub use legacy::{BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1, BlockQ8_0};
pub(crate) use legacy::{unpack_five_bits, unpack_nibbles};
pub use mxfp4::{BlockMXFP4, MXFP4_DOUBLED};
pub use parts::{Grid, Parts, Scales};

/// How a tensor's rows are stored, under ggml's names and ids.
#[allow(non_camel_case_types)] // the field's own names
#[allow(missing_docs)] // each is documented at its block
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
    /// row of this tensor (mean squared activation of the column); `None` takes ggml's reference
    /// function, `Some` its imatrix variant. Both are bit-equal to ggml.
    fn encode_row(row: &[f32], importance: Option<&[f32]>, blocks: &mut [Self]);
}

/// Encodes one row: weights, importance, bytes to fill.
pub type RowEncoder = fn(&[f32], Option<&[f32]>, &mut [u8]);

/// What [`BlockType`] knows of a block.
struct Traits {
    name: &'static str,
    len: usize,
    bytes: usize,
    decode_row: fn(&[u8], &mut [f32]),
    encode_row: Option<RowEncoder>,
}

impl Traits {
    const fn of<B: Encode>(name: &'static str) -> Self {
        Traits {
            encode_row: Some(encode_row::<B>),
            ..Self::decode_only::<B>(name)
        }
    }

    const fn decode_only<B: Block>(name: &'static str) -> Self {
        assert!(align_of::<B>() == 1, "a mapped row may start anywhere");
        Traits {
            name,
            len: B::LEN,
            bytes: size_of::<B>(),
            decode_row: decode_row::<B>,
            encode_row: None,
        }
    }
}

fn decode_row<B: Block>(bytes: &[u8], weights: &mut [f32]) {
    check_lengths::<B>(weights.len(), bytes.len());
    let blocks: &[B] = bytemuck::cast_slice(bytes);
    for (block, weights) in blocks.iter().zip(weights.chunks_exact_mut(B::LEN)) {
        block.decode(weights);
    }
}

fn encode_row<B: Encode>(row: &[f32], importance: Option<&[f32]>, bytes: &mut [u8]) {
    check_lengths::<B>(row.len(), bytes.len());
    if let Some(importance) = importance {
        assert_eq!(
            importance.len(),
            row.len(),
            "one importance weight a column"
        );
    }
    encode_blocks::<B>(row, importance, bytemuck::cast_slice_mut(bytes));
}

/// [`Encode::encode_row`], compiled once more for wide vectors. The searches go in step over lanes, each of which
/// adds in its own order, so the bits are the same; products and sums are never contracted. Everything on the way
/// down is inlined by force: what were called would be compiled for the narrowest vectors.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx+avx2+bmi1+bmi2+f16c",
    "x86_64+avx+avx2+bmi1+bmi2+f16c"
))]
fn encode_blocks<B: Encode>(row: &[f32], importance: Option<&[f32]>, blocks: &mut [B]) {
    B::encode_row(row, importance, blocks);
}

fn check_lengths<B: Block>(weights: usize, bytes: usize) {
    assert_eq!(
        B::TYPE.row_bytes(weights),
        Some(bytes),
        "{weights} weights do not lie in {bytes} bytes of {}",
        B::TYPE
    );
}

impl BlockType {
    /// All types, in the order of their ids.
    pub const ALL: &'static [BlockType] = &[
        Self::F32,
        Self::F16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
        Self::IQ4_NL,
        Self::IQ4_XS,
        Self::BF16,
        Self::MXFP4,
    ];

    fn traits(self) -> &'static Traits {
        match self {
            Self::F32 => const { &Traits::of::<F32>("F32") },
            Self::F16 => {
                const {
                    &Traits {
                        decode_row: float::decode_f16_row,
                        ..Traits::of::<F16>("F16")
                    }
                }
            }
            Self::Q4_0 => const { &Traits::of::<BlockQ4_0>("Q4_0") },
            Self::Q4_1 => const { &Traits::of::<BlockQ4_1>("Q4_1") },
            Self::Q5_0 => const { &Traits::of::<BlockQ5_0>("Q5_0") },
            Self::Q5_1 => const { &Traits::of::<BlockQ5_1>("Q5_1") },
            Self::Q8_0 => const { &Traits::of::<BlockQ8_0>("Q8_0") },
            Self::Q2_K => const { &Traits::of::<BlockQ2K>("Q2_K") },
            Self::Q3_K => const { &Traits::of::<BlockQ3K>("Q3_K") },
            Self::Q4_K => const { &Traits::of::<BlockQ4K>("Q4_K") },
            Self::Q5_K => const { &Traits::of::<BlockQ5K>("Q5_K") },
            Self::Q6_K => const { &Traits::of::<BlockQ6K>("Q6_K") },
            Self::IQ4_NL => const { &Traits::of::<BlockIQ4NL>("IQ4_NL") },
            Self::IQ4_XS => const { &Traits::of::<BlockIQ4XS>("IQ4_XS") },
            Self::BF16 => const { &Traits::of::<BF16>("BF16") },
            Self::MXFP4 => const { &Traits::decode_only::<BlockMXFP4>("MXFP4") },
        }
    }

    /// Weights in a block.
    pub fn block_len(self) -> usize {
        self.traits().len
    }

    /// Bytes in a block.
    pub fn block_bytes(self) -> usize {
        self.traits().bytes
    }

    /// Bytes of a row of `cols` weights; `None` where blocks do not fill the row or on overflow.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        let Traits { len, bytes, .. } = self.traits();
        cols.is_multiple_of(*len)
            .then(|| (cols / len).checked_mul(*bytes))
            .flatten()
    }

    /// Bits a weight takes, the block's scales included.
    pub fn bits_per_weight(self) -> f64 {
        let Traits { len, bytes, .. } = self.traits();
        (bytes * 8) as f64 / *len as f64
    }

    /// ggml's name, e.g. `Q4_K`.
    pub fn name(self) -> &'static str {
        self.traits().name
    }

    /// ggml's id, as stored in a GGUF file.
    pub fn id(self) -> u32 {
        self as u32
    }

    /// The type with ggml's id, if it is one of ours.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.id() == id)
    }

    /// Name of any ggml type id, ours or not (for error messages): `Some("IQ2_XXS")` for 16.
    pub fn name_of_id(id: u32) -> Option<&'static str> {
        if let Some(kind) = Self::from_id(id) {
            return Some(kind.name());
        }
        Some(match id {
            4 => "Q4_2",
            5 => "Q4_3",
            9 => "Q8_1",
            15 => "Q8_K",
            16 => "IQ2_XXS",
            17 => "IQ2_XS",
            18 => "IQ3_XXS",
            19 => "IQ1_S",
            21 => "IQ3_S",
            22 => "IQ2_S",
            24 => "I8",
            25 => "I16",
            26 => "I32",
            27 => "I64",
            28 => "F64",
            29 => "IQ1_M",
            31 => "Q4_0_4_4",
            32 => "Q4_0_4_8",
            33 => "Q4_0_8_8",
            34 => "TQ1_0",
            35 => "TQ2_0",
            36 => "IQ4_NL_4_4",
            37 => "IQ4_NL_4_8",
            38 => "IQ4_NL_8_8",
            40 => "NVFP4",
            41 => "Q1_0",
            42 => "Q2_0",
            _ => return None,
        })
    }

    /// Decodes one row: `bytes` is exactly `row_bytes(weights.len())` long.
    ///
    /// # Panics
    /// If the lengths do not fit together.
    pub fn decode_row(self, bytes: &[u8], weights: &mut [f32]) {
        (self.traits().decode_row)(bytes, weights);
    }

    /// The row encoder, where there is one (MXFP4 is decoded only). Takes the row, the
    /// importance weights and the bytes to fill; panics if lengths do not fit together.
    pub fn encoder(self) -> Option<RowEncoder> {
        self.traits().encode_row
    }
}

impl fmt::Display for BlockType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
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
