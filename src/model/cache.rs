//! The KV cache of a timeline.
//!
//! What each kind costs, as the mean KL divergence from keys and values in f32 (SmolLM2-135M, weights in F32, three
//! chunks of 1024 English tokens), and what rotating by a Hadamard matrix before rounding saves:
//!
//! | kind | not rotated | keys rotated | values too |
//! |------|-------------|--------------|------------|
//! | F16  | 3.4e-7      |              |            |
//! | Q8_0 | 3.7e-4      | 1.2e-4       | 1.1e-4     |
//! | Q4_0 | 0.114       | 0.034        | 0.033      |
//!
//! At 4096 positions all three are equally fast on two cores; F16 is the usual kind because it costs nothing that
//! can be seen, Q8_0 the one for long contexts, of which it takes half the memory.

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use memmap2::MmapMut;

use super::Config;
use crate::kernels::Kernels;
use crate::kernels::attention::Head;
use crate::plan::Shape;
use crate::quant::BlockType;
use crate::tensor::Rows;
use crate::threads::Pool;

/// How keys and values are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvKind {
    /// In 32 bits, for exact references.
    F32,
    /// In 16 bits, as every engine of the family does.
    F16,
    /// In blocks of 8 bits, 8.5 with their scales.
    Q8_0,
    /// In blocks of 4 bits, 4.5 with their scales.
    Q4_0,
}

impl KvKind {
    /// The kind for models of that shape where nobody asks for another.
    pub fn usual(shape: &Shape) -> Self {
        let all = [Self::F32, Self::F16, Self::Q8_0, Self::Q4_0];
        let usual = |kind: &Self| kind.block_type() == shape.kv_type();
        all.into_iter().find(usual).expect("a kind of its own")
    }

    /// The type of a key's or value's row.
    pub fn block_type(self) -> BlockType {
        match self {
            Self::F32 => BlockType::F32,
            Self::F16 => BlockType::F16,
            Self::Q8_0 => BlockType::Q8_0,
            Self::Q4_0 => BlockType::Q4_0,
        }
    }

    /// Whether vectors go through a Hadamard matrix before they are rounded: what loud channels hold is then
    /// spread over all, and blocks of few bits lose less.
    pub(super) fn is_spread(self) -> bool {
        matches!(self, Self::Q8_0 | Self::Q4_0)
    }
}

/// Tokens whose keys and values are stored before another thread would have woken.
const FEW: usize = 4;

/// Keys and values of one timeline, keys rotated already.
///
/// `[layer][kv_head][keys, values][position][head_dim]`, so that a head's keys are rows that follow each
/// other, as kernels want them.
pub struct KvCache {
    /// Anonymous pages: the system provides one when it is first written.
    map: MmapMut,
    kind: KvKind,
    capacity: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Bytes of a key, and of a value.
    row: usize,
    /// Positions in use.
    pub len: usize,
}

impl KvCache {
    /// An empty cache for `capacity` positions.
    ///
    /// # Errors
    /// When the heads are no whole blocks of `kind`, or the system has no room for it.
    pub fn new(config: &Config, kind: KvKind, capacity: usize) -> std::io::Result<Self> {
        let shape = &config.shape;
        let row = kind.block_type().row_bytes(shape.head_dim);
        let row = row.ok_or(std::io::ErrorKind::InvalidInput)?;
        let bytes = [shape.layers, shape.kv_heads, 2, row]
            .into_iter()
            .try_fold(capacity, usize::checked_mul)
            .filter(|&bytes| bytes <= isize::MAX as usize)
            .ok_or(std::io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            map: MmapMut::map_anon(bytes.max(1))?,
            kind,
            capacity,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            row,
            len: 0,
        })
    }

    /// Positions that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// How keys and values are kept.
    pub fn kind(&self) -> KvKind {
        self.kind
    }

    /// Copies the keys and values of the first `tokens` positions of `other`, a cache of the same model and kind,
    /// and holds just these.
    ///
    /// # Panics
    /// If the caches differ in kind or heads, or either is too small.
    pub fn copy_from(&mut self, other: &Self, tokens: usize) {
        assert_eq!((self.kind, self.row), (other.kind, other.row));
        assert!(tokens <= other.len && tokens <= self.capacity);
        let (ours, theirs) = (self.capacity * self.row, other.capacity * other.row);
        let planes = self.map.chunks_exact_mut(ours.max(1));
        for (to, from) in planes.zip(other.map.chunks_exact(theirs.max(1))) {
            to[..tokens * self.row].copy_from_slice(&from[..tokens * self.row]);
        }
        self.len = tokens;
    }

    /// Bytes of the keys and values of so many positions; `None` where that is beyond counting.
    pub fn bytes_of(&self, tokens: usize) -> Option<u64> {
        let planes = self.map.len() / (self.capacity * self.row).max(1);
        (planes as u64)
            .checked_mul(self.row as u64)?
            .checked_mul(tokens as u64)
    }

    /// The keys and values in use, `[layer][kv_head][keys, values]`: a slice each, `[len][row]`.
    pub fn planes(&self) -> impl Iterator<Item = &[u8]> {
        let planes = self.map.chunks_exact((self.capacity * self.row).max(1));
        planes.map(|plane| &plane[..self.len * self.row])
    }

    /// The same to be filled, for `tokens` positions. They are in use when [`len`](Self::len) says so.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn planes_mut(&mut self, tokens: usize) -> impl Iterator<Item = &mut [u8]> {
        assert!(tokens <= self.capacity);
        let used = tokens * self.row;
        let planes = (self.map).chunks_exact_mut((self.capacity * self.row).max(1));
        planes.map(move |plane| &mut plane[..used])
    }

    /// Stores keys and values (`[tokens][kv_heads · head_dim]`) of the tokens from `position` on; keys are
    /// rotated by `turns [tokens][pairs]` first.
    #[allow(clippy::too_many_arguments)] // where, how, and what
    pub(super) fn store(
        &mut self,
        pool: &Pool,
        kernels: &Kernels,
        layer: usize,
        position: usize,
        k: &[f32],
        v: &[f32],
        turns: &[(f32, f32)],
    ) {
        let (row, dim, kv_dim) = (self.row, self.head_dim, self.kv_heads * self.head_dim);
        let tokens = k.len() / kv_dim;
        if tokens == 0 {
            return;
        }
        let pairs = turns.len() / tokens;
        assert!(position + tokens <= self.capacity);
        let (kind, floats) = (self.kind, kernels.floats);
        let head_bytes = 2 * self.capacity * row;
        let store = |head: usize, bytes: &mut [u8]| {
            let (keys, values) = bytes.split_at_mut(self.capacity * row);
            let mut vector = vec![0.0; dim];
            for t in 0..tokens {
                let from = t * kv_dim + head * dim;
                let to = (position + t) * row..(position + t + 1) * row;
                vector.copy_from_slice(&k[from..from + dim]);
                (floats.turn)(&mut vector, &turns[t * pairs..(t + 1) * pairs]);
                round(kernels, kind, &mut vector, &mut keys[to.clone()]);
                vector.copy_from_slice(&v[from..from + dim]);
                round(kernels, kind, &mut vector, &mut values[to]);
            }
        };
        let layer =
            &mut self.map[layer * self.kv_heads * head_bytes..][..self.kv_heads * head_bytes];
        match tokens {
            ..=FEW => (layer.chunks_exact_mut(head_bytes).enumerate())
                .for_each(|(head, bytes)| store(head, bytes)),
            _ => pool.chunks(layer, head_bytes, store),
        }
    }

    /// A head's keys and values.
    pub(super) fn head(&self, layer: usize, head: usize) -> Head<'_> {
        let bytes = self.capacity * self.row;
        let start = (layer * self.kv_heads + head) * 2 * bytes;
        let rows = |start: usize| {
            let kind = self.kind.block_type();
            Rows::new(kind, self.head_dim, &self.map[start..start + bytes]).expect("whole vectors")
        };
        Head {
            keys: rows(start),
            values: rows(start + bytes),
        }
    }
}

/// Stores a vector, which is used up, as `kind` has it.
fn round(kernels: &Kernels, kind: KvKind, vector: &mut [f32], bytes: &mut [u8]) {
    if kind.is_spread() {
        (kernels.floats.hadamard)(vector);
    }
    match kind {
        KvKind::F16 => {
            let bits: &mut [u16] = bytemuck::cast_slice_mut(bytes);
            bits.reinterpret_cast_mut::<f16>()
                .convert_from_f32_slice(vector);
        }
        _ => {
            let encode = kind.block_type().encoder().expect("each kind is encoded");
            encode(vector, None, bytes);
        }
    }
}
