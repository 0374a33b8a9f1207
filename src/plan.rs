//! Sizes from metadata alone: parameters in all and at work, bytes, the RAM that a context needs.
//!
//! Nothing here needs a file: the runtime plans from a GGUF file's tensor table, the converter
//! from the one that it is going to write.

pub mod fit;
pub mod known;
pub mod memory;

use std::fmt;

use crate::gguf::names::{self, Experts};
use crate::gguf::{Error, Metadata, TensorDecl, TensorInfo};
use crate::quant::BlockType;

/// The architecture that is read: the graph that Mixtral, Mistral, Llama and SmolLM2 share.
pub const ARCHITECTURE: &str = "llama";

/// Tokens of a prompt that are taken through the layers at once; scratch is sized for it.
pub const PROMPT_BATCH: usize = 512;

/// The types of keys and values that can be asked for.
pub const KV_TYPES: [BlockType; 3] = [BlockType::F16, BlockType::Q8_0, BlockType::Q4_0];

/// What scratch may take: a model so wide that [`PROMPT_BATCH`] tokens need more gets fewer at once. No
/// model of the family comes near.
pub const SCRATCH_LIMIT: u64 = 768 << 20;

/// A number of bytes, shown in powers of ten: `26.44 GB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl Size {
    /// The next larger size that is shown exactly.
    pub fn rounded_up(self) -> Self {
        let unit = (1..=4).map(|power| 1000_u64.pow(power));
        match unit.take_while(|&unit| unit <= self.0).last() {
            None => self,
            Some(unit) => Self(self.0.div_ceil(unit / 100) * (unit / 100)),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 < 1000 {
            return write!(f, "{} B", self.0);
        }
        let (mut value, mut units) = (self.0 as f64 / 1000.0, ["kB", "MB", "GB", "TB"].iter());
        let mut unit = units.next().expect("there are some");
        // 999.995 would be shown as 1000.00.
        while value >= 999.995 {
            let Some(larger) = units.next() else { break };
            (value, unit) = (value / 1000.0, larger);
        }
        write!(f, "{value:.2} {unit}")
    }
}

/// A model's extents. All are at least 1 and bounded, so that products of a few of them
/// with a context fit into `u64`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// `general.architecture`.
    pub arch: String,
    /// Transformer blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the feed-forward part (of one expert).
    pub ffn: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head, the same for queries, keys and values; even.
    pub head_dim: usize,
    /// Experts a layer; 1 for a dense model.
    pub experts: usize,
    /// Experts that work on a token; 1 for a dense model.
    pub experts_used: usize,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Context that the model was trained for.
    pub context: usize,
}

impl Shape {
    /// Reads the extents, with llama.cpp's defaults for absent keys.
    ///
    /// # Errors
    /// If a key is missing, of another type or out of bounds, or the architecture is not
    /// [`ARCHITECTURE`].
    pub fn from_metadata(metadata: &Metadata) -> Result<Self, Error> {
        const ARCH_KEY: &str = "general.architecture";
        let arch = metadata.require_str(ARCH_KEY)?.to_owned();
        if arch != ARCHITECTURE {
            let problem = format!(
                "is {arch:?}; only {ARCHITECTURE:?} is supported (Mixtral, Mistral, Llama, SmolLM2)"
            );
            return Err(metadata.error(ARCH_KEY, problem));
        }
        let layers = require(metadata, "llama.block_count", 1 << 10)?;
        let hidden = require(metadata, "llama.embedding_length", 1 << 17)?;
        let ffn = require(metadata, "llama.feed_forward_length", 1 << 20)?;
        let context = require(metadata, "llama.context_length", 1 << 30)?;
        let heads = require(metadata, HEADS_KEY, MAX_HEADS)?;
        let kv_heads = optional(metadata, KV_HEADS_KEY, MAX_HEADS)?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            let problem = format!("is {kv_heads}, which does not divide {HEADS_KEY} ({heads})");
            return Err(metadata.error(KV_HEADS_KEY, problem));
        }
        let head_dim = head_dim(metadata, hidden, heads)?;

        let (experts, experts_used) = match metadata.usize(EXPERTS_KEY)? {
            None | Some(0) => (1, 1),
            Some(_) => {
                let experts = require(metadata, EXPERTS_KEY, 1 << 10)?;
                (experts, require(metadata, EXPERTS_USED_KEY, experts)?)
            }
        };
        let vocab = match optional(metadata, "llama.vocab_size", MAX_VOCAB)? {
            Some(vocab) => vocab,
            None => {
                let tokens = metadata.require_strings(TOKENS_KEY)?.len();
                within(metadata, TOKENS_KEY, tokens, MAX_VOCAB)?
            }
        };
        Ok(Self {
            arch,
            layers,
            hidden,
            ffn,
            heads,
            kv_heads,
            head_dim,
            experts,
            experts_used,
            vocab,
            context,
        })
    }

    /// Whether a router chooses among experts.
    pub fn is_moe(&self) -> bool {
        self.experts > 1
    }

    /// Names and extents (fastest first) of the tensors of such a model, experts merged;
    /// with `tied`, the embedding serves as output head.
    pub fn tensors(&self, tied: bool) -> Vec<(String, Vec<usize>)> {
        let (hidden, ffn, experts) = (self.hidden, self.ffn, self.experts);
        let q = self.heads * self.head_dim;
        let kv = self.kv_heads * self.head_dim;
        let mut tensors = vec![(names::TOKEN_EMBD.to_owned(), vec![hidden, self.vocab])];
        for layer in 0..self.layers {
            let mut block =
                |part, shape: &[usize]| tensors.push((names::block(layer, part), shape.to_vec()));
            block(names::ATTN_NORM, &[hidden]);
            block(names::ATTN_Q, &[hidden, q]);
            block(names::ATTN_K, &[hidden, kv]);
            block(names::ATTN_V, &[hidden, kv]);
            block(names::ATTN_OUTPUT, &[q, hidden]);
            block(names::FFN_NORM, &[hidden]);
            let feed_forward = [
                (names::FFN_GATE, [hidden, ffn]),
                (names::FFN_UP, [hidden, ffn]),
                (names::FFN_DOWN, [ffn, hidden]),
            ];
            if self.is_moe() {
                block(names::FFN_GATE_INP, &[hidden, experts]);
                for (part, [columns, rows]) in feed_forward {
                    tensors.push((names::experts(layer, part), vec![columns, rows, experts]));
                }
            } else {
                for (part, shape) in feed_forward {
                    block(part, &shape);
                }
            }
        }
        tensors.push((names::OUTPUT_NORM.to_owned(), vec![hidden]));
        if !tied {
            tensors.push((names::OUTPUT.to_owned(), vec![hidden, self.vocab]));
        }
        tensors
    }

    /// The type of keys and values where nobody asks for another.
    pub fn kv_type(&self) -> BlockType {
        BlockType::F16
    }

    /// Bytes of the KV cache: keys and values of `ctx` positions in every layer, as rows of `kind`, whose
    /// blocks must fill a head.
    pub fn kv_bytes(&self, ctx: usize, kind: BlockType) -> u64 {
        let row = kind.row_bytes(self.head_dim).unwrap_or(0);
        let rows = 2 * self.layers * self.kv_heads;
        (rows as u64)
            .saturating_mul(ctx as u64)
            .saturating_mul(row as u64)
    }

    /// What the KV cache of `ctx` positions takes in each type that it can be asked for and that fills a head.
    pub fn kv_costs(&self, ctx: usize) -> Vec<(BlockType, u64)> {
        let kinds = KV_TYPES.into_iter();
        let fills = |kind: &BlockType| kind.row_bytes(self.head_dim).is_some();
        let kinds = kinds.filter(fills);
        kinds.map(|kind| (kind, self.kv_bytes(ctx, kind))).collect()
    }

    /// Estimate of the scratch memory: what [`PROMPT_BATCH`] tokens keep between the steps of
    /// a layer in f32 (residual, norm, quantized copy, sum; queries, keys, values, attention's result;
    /// gate and up of each chosen expert), and one row of logits.
    pub fn scratch_bytes(&self) -> u64 {
        self.scratch_bytes_a_token() * PROMPT_BATCH as u64 + 4 * self.vocab as u64
    }

    /// What one token of a prompt keeps between the steps of a layer.
    pub fn scratch_bytes_a_token(&self) -> u64 {
        let attention = (2 * self.heads + 2 * self.kv_heads) * self.head_dim;
        4 * (4 * self.hidden + attention + 2 * self.experts_used * self.ffn) as u64
    }

    /// RAM that keeps everything resident: weights, the usual KV cache of `ctx` positions, scratch.
    pub fn ram_bytes(&self, weight_bytes: u64, ctx: usize) -> u64 {
        weight_bytes
            .saturating_add(self.kv_bytes(ctx, self.kv_type()))
            .saturating_add(self.scratch_bytes())
    }
}

const HEADS_KEY: &str = "llama.attention.head_count";
const KV_HEADS_KEY: &str = "llama.attention.head_count_kv";
const KEY_LENGTH_KEY: &str = "llama.attention.key_length";
const VALUE_LENGTH_KEY: &str = "llama.attention.value_length";
const EXPERTS_KEY: &str = "llama.expert_count";
const EXPERTS_USED_KEY: &str = "llama.expert_used_count";
const TOKENS_KEY: &str = "tokenizer.ggml.tokens";
const MAX_HEADS: usize = 1 << 10;
const MAX_HEAD_DIM: usize = 1 << 10;
const MAX_VOCAB: usize = 1 << 24;

/// The width of a head: given, or the hidden width shared out among the heads.
fn head_dim(metadata: &Metadata, hidden: usize, heads: usize) -> Result<usize, Error> {
    let shared = hidden / heads;
    let (key, dim) = match optional(metadata, KEY_LENGTH_KEY, MAX_HEAD_DIM)? {
        Some(dim) => (KEY_LENGTH_KEY, dim),
        None if hidden.is_multiple_of(heads) => (
            HEADS_KEY,
            within(metadata, HEADS_KEY, shared, MAX_HEAD_DIM)?,
        ),
        None => {
            let problem =
                format!("is {heads}, which does not divide the embedding length {hidden}");
            return Err(metadata.error(HEADS_KEY, problem));
        }
    };
    if !dim.is_multiple_of(2) {
        return Err(metadata.error(
            key,
            format!("gives heads of {dim} values; rotary positions need an even number"),
        ));
    }
    let value_dim = optional(metadata, VALUE_LENGTH_KEY, MAX_HEAD_DIM)?.unwrap_or(shared);
    if value_dim != dim {
        let problem = format!("values of {value_dim} beside keys of {dim} are not supported");
        return Err(metadata.error(VALUE_LENGTH_KEY, problem));
    }
    Ok(dim)
}

fn require(metadata: &Metadata, key: &str, max: usize) -> Result<usize, Error> {
    within(metadata, key, metadata.require_usize(key)?, max)
}

fn optional(metadata: &Metadata, key: &str, max: usize) -> Result<Option<usize>, Error> {
    metadata
        .usize(key)?
        .map(|value| within(metadata, key, value, max))
        .transpose()
}

fn within(metadata: &Metadata, key: &str, value: usize, max: usize) -> Result<usize, Error> {
    if (1..=max).contains(&value) {
        return Ok(value);
    }
    Err(metadata.error(key, format!("is {value}, needs 1 to {max}")))
}

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Group {
    /// Token embedding.
    Embedding,
    /// Query, key, value and output projections.
    Attention,
    /// Routers of the experts.
    Router,
    /// Gate, up and down projections of the experts.
    Experts,
    /// Gate, up and down projections of a dense model.
    FeedForward,
    /// Norms.
    Norms,
    /// Output head.
    Output,
    /// Anything else (rotary factors, biases).
    Other,
}

impl Group {
    /// All groups, in the order of the forward pass.
    pub const ALL: [Self; 8] = [
        Self::Embedding,
        Self::Attention,
        Self::Router,
        Self::Experts,
        Self::FeedForward,
        Self::Norms,
        Self::Output,
        Self::Other,
    ];

    /// The group of the tensor of this name.
    pub fn of(name: &str) -> Self {
        match name {
            names::TOKEN_EMBD => return Self::Embedding,
            names::OUTPUT => return Self::Output,
            names::OUTPUT_NORM => return Self::Norms,
            _ => {}
        }
        let Some(block) = names::parse(name) else {
            return Self::Other;
        };
        match (block.part, block.experts) {
            (names::ATTN_NORM | names::FFN_NORM, Experts::None) => Self::Norms,
            (names::ATTN_Q | names::ATTN_K | names::ATTN_V | names::ATTN_OUTPUT, Experts::None) => {
                Self::Attention
            }
            (names::FFN_GATE_INP, Experts::None) => Self::Router,
            (names::FFN_GATE | names::FFN_UP | names::FFN_DOWN, Experts::None) => Self::FeedForward,
            (names::FFN_GATE | names::FFN_UP | names::FFN_DOWN, _) => Self::Experts,
            _ => Self::Other,
        }
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Embedding => "embedding",
            Self::Attention => "attention",
            Self::Router => "router",
            Self::Experts => "experts",
            Self::FeedForward => "feed-forward",
            Self::Norms => "norms",
            Self::Output => "output",
            Self::Other => "other",
        })
    }
}

/// A tensor as sizes see it.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a> {
    /// Name, e.g. `blk.0.attn_q.weight`.
    pub name: &'a str,
    /// Extents, fastest first.
    pub shape: &'a [usize],
    /// Bytes it takes.
    pub bytes: u64,
}

impl<'a> From<&'a TensorInfo> for Weight<'a> {
    fn from(tensor: &'a TensorInfo) -> Self {
        Self {
            name: &tensor.name,
            shape: &tensor.shape,
            bytes: tensor.bytes,
        }
    }
}

impl<'a> From<&'a TensorDecl> for Weight<'a> {
    /// A declaration whose blocks do not fill its rows, which [`crate::gguf::Layout::new`]
    /// refuses, counts no bytes.
    fn from(tensor: &'a TensorDecl) -> Self {
        Self {
            name: &tensor.name,
            shape: &tensor.shape,
            bytes: tensor.bytes().unwrap_or(0),
        }
    }
}

/// Parameters and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// Parameters.
    pub params: u64,
    /// Bytes they take.
    pub bytes: u64,
}

/// What a model's tensors amount to.
#[derive(Clone, Debug)]
pub struct Sizes {
    groups: [Amount; Group::ALL.len()],
    /// Bytes of one row of the embedding.
    embedding_row: u64,
    /// Experts a layer, and those of them that work on a token.
    experts: (u64, u64),
}

impl Sizes {
    /// Adds up tensors; of `experts` experts a layer `experts_used` work on a token (1 and 1
    /// for a dense model, or where a file does not say).
    pub fn of<'a>(
        experts: usize,
        experts_used: usize,
        tensors: impl IntoIterator<Item = impl Into<Weight<'a>>>,
    ) -> Self {
        let mut sizes = Self {
            groups: Default::default(),
            embedding_row: 0,
            experts: (experts.max(1) as u64, experts_used.max(1) as u64),
        };
        for weight in tensors {
            let Weight { name, shape, bytes } = weight.into();
            let group = Group::of(name);
            let amount = &mut sizes.groups[group as usize];
            amount.params += shape.iter().map(|&extent| extent as u64).product::<u64>();
            amount.bytes += bytes;
            if group == Group::Embedding {
                let rows: u64 = shape.iter().skip(1).map(|&extent| extent as u64).product();
                sizes.embedding_row = bytes / rows;
            }
        }
        sizes
    }

    /// Parameters and bytes of a group.
    pub fn group(&self, group: Group) -> Amount {
        self.groups[group as usize]
    }

    /// All parameters.
    pub fn params_total(&self) -> u64 {
        self.groups.iter().map(|amount| amount.params).sum()
    }

    /// Parameters that belong to one token's way: everything, the whole embedding and the
    /// router included, but of the experts only those that are used. (So counted, Mixtral
    /// 8x7B has the 12.9 B that its makers announced.)
    pub fn params_active(&self) -> u64 {
        let experts = self.group(Group::Experts).params;
        self.params_total() - experts + self.used(experts)
    }

    /// Bytes of all tensors, without header and padding.
    pub fn bytes_total(&self) -> u64 {
        self.groups.iter().map(|amount| amount.bytes).sum()
    }

    /// Bytes of weights that are read to decode one token: attention, router, norms, the used
    /// experts (or the dense feed-forward part), the output head, and one row of the
    /// embedding (all of it where it is the output head too).
    pub fn active_bytes_per_token(&self) -> u64 {
        let embedding = self.group(Group::Embedding).bytes;
        let experts = self.group(Group::Experts).bytes;
        let tied = self.group(Group::Output).bytes == 0;
        let embedding_read = if tied { embedding } else { self.embedding_row };
        self.bytes_total() - embedding + embedding_read - experts + self.used(experts)
    }

    /// Bits that a weight takes on average, scales included; 0 without weights.
    pub fn bits_per_weight(&self) -> f64 {
        match self.params_total() {
            0 => 0.0,
            params => 8.0 * self.bytes_total() as f64 / params as f64,
        }
    }

    /// The share of the experts' parameters or bytes that works on a token.
    fn used(&self, of_experts: u64) -> u64 {
        let (experts, used) = self.experts;
        (u128::from(of_experts) * u128::from(used) / u128::from(experts)) as u64
    }
}
