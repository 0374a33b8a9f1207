//! The recipe: which block type each tensor gets.
//!
//! A [`Mix`] is what `--type` names. It has a base type, and rules that give the matrices which
//! suffer most from rounding (`attn_v`, `attn_output`, `ffn_down`, the output head) a better one.
//! The mixes are llama.cpp's (`llama_tensor_get_type_impl` in its `llama-quant.cpp`), so that a
//! file made here has the types of one made by llama-quantize, tensor for tensor. `RULES`
//! states them as a table; [`assign`] walks a model's tensors with it.
//!
//! What stands outside the table:
//!
//! - Norms, biases and the router are not quantized; they keep the type they come in.
//! - The output head (or `token_embd`, where there is no head and it serves as one) takes Q6_K,
//!   or Q8_0 where the base is Q8_0 or its blocks do not fill the row.
//! - With exactly 8 experts, `attn_k` and `attn_v` take Q8_0: shared by all experts, they are
//!   too small for anything less to pay off.
//! - A tensor that `--tensor-type` names takes that type and does not count as one of its kind
//!   when the rules speak of the first few.
//! - Blocks that do not fill a tensor's rows make way for smaller ones ([`fallback`]).

use std::fmt;
use std::str::FromStr;

use fewbit::quant::BlockType::{self, *};
use regex::Regex;

/// What `--type` names: one of llama.cpp's mixes, under the names of llama-quantize.
///
/// The name of a block type stands for the mix on that base (`Q4_0` still has a Q6_K output
/// head). To give every matrix one type, say so: `--type Q4_K_S --tensor-type .=Q4_K`.
#[allow(non_camel_case_types)] // the field's own names
#[allow(missing_docs)] // the table says what each of them is
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mix {
    F32,
    F16,
    BF16,
    Q8_0,
    Q6_K,
    Q5_K_M,
    Q5_K_S,
    Q5_1,
    Q5_0,
    Q4_K_M,
    Q4_K_S,
    Q4_1,
    Q4_0,
    IQ4_NL,
    IQ4_XS,
    Q3_K_L,
    Q3_K_M,
    Q3_K_S,
    Q2_K,
}

/// Where a rule applies; the first rule that does gives the type.
#[derive(Clone, Copy, Debug)]
enum Where {
    Everywhere,
    /// The first `n` layers.
    First(usize),
    /// The first `1/n` of the layers.
    Part(usize),
    /// As `Part`, in a file that is made with an imatrix.
    PartGuided(usize),
    /// As `Part`, in a file that is made without one.
    PartUnguided(usize),
    /// The first and the last eighth of the layers and every third between: errors made early
    /// spread, errors made late are not healed any more.
    Sensitive,
    /// At least 4 query heads share a key-value head, so the matrix is small.
    SharedHeads,
    /// Exactly 8 experts.
    EightExperts,
    /// Any other number of experts, dense models included.
    NotEightExperts,
}
use Where::*;

/// A mix as data: its number in `general.file_type`, its base and its exceptions.
struct Rules {
    mix: Mix,
    name: &'static str,
    file_type: u32,
    base: BlockType,
    attn_v: &'static [(Where, BlockType)],
    attn_output: &'static [(Where, BlockType)],
    ffn_down: &'static [(Where, BlockType)],
}

/// Every mix. The order is that of [`Mix`], from many bits to few.
#[rustfmt::skip]
const RULES: [Rules; 19] = {
    const fn rules(
        mix: Mix,
        name: &'static str,
        file_type: u32,
        base: BlockType,
        attn_v: &'static [(Where, BlockType)],
        attn_output: &'static [(Where, BlockType)],
        ffn_down: &'static [(Where, BlockType)],
    ) -> Rules {
        Rules { mix, name, file_type, base, attn_v, attn_output, ffn_down }
    }
    [
        //    mix                    id  base    attn_v, attn_output, ffn_down
        rules(Mix::F32,    "F32",     0, F32,    &[], &[], &[]),
        rules(Mix::F16,    "F16",     1, F16,    &[], &[], &[]),
        rules(Mix::BF16,   "BF16",   32, BF16,   &[], &[], &[]),
        rules(Mix::Q8_0,   "Q8_0",    7, Q8_0,   &[], &[], &[]),
        rules(Mix::Q6_K,   "Q6_K",   18, Q6_K,   &[], &[], &[]),
        rules(Mix::Q5_K_M, "Q5_K_M", 17, Q5_K,   &[(Sensitive, Q6_K)],
                                                 &[],
                                                 &[(Sensitive, Q6_K)]),
        rules(Mix::Q5_K_S, "Q5_K_S", 16, Q5_K,   &[], &[], &[]),
        rules(Mix::Q5_1,   "Q5_1",    9, Q5_1,   &[], &[], &[]),
        rules(Mix::Q5_0,   "Q5_0",    8, Q5_0,   &[], &[],
                                                 &[(PartGuided(8), Q5_1)]),
        rules(Mix::Q4_K_M, "Q4_K_M", 15, Q4_K,   &[(Sensitive, Q6_K)],
                                                 &[(EightExperts, Q5_K)],
                                                 &[(Sensitive, Q6_K)]),
        rules(Mix::Q4_K_S, "Q4_K_S", 14, Q4_K,   &[(First(4), Q5_K)],
                                                 &[(EightExperts, Q5_K)],
                                                 &[(Part(8), Q5_K)]),
        rules(Mix::Q4_1,   "Q4_1",    3, Q4_1,   &[], &[], &[]),
        rules(Mix::Q4_0,   "Q4_0",    2, Q4_0,   &[], &[],
                                                 &[(PartGuided(8), Q4_1)]),
        rules(Mix::IQ4_NL, "IQ4_NL", 25, IQ4_NL, &[(SharedHeads, Q5_K)],
                                                 &[(EightExperts, Q5_K)],
                                                 &[(PartUnguided(8), Q5_K)]),
        rules(Mix::IQ4_XS, "IQ4_XS", 30, IQ4_XS, &[(SharedHeads, Q5_K)],
                                                 &[(EightExperts, Q5_K)],
                                                 &[(PartUnguided(8), Q5_K)]),
        rules(Mix::Q3_K_L, "Q3_K_L", 13, Q3_K,   &[(Everywhere, Q5_K)],
                                                 &[(NotEightExperts, Q5_K)],
                                                 &[(Everywhere, Q5_K)]),
        rules(Mix::Q3_K_M, "Q3_K_M", 12, Q3_K,   &[(First(2), Q5_K), (Everywhere, Q4_K)],
                                                 &[(EightExperts, Q5_K), (NotEightExperts, Q4_K)],
                                                 &[(Part(16), Q5_K), (Everywhere, Q4_K)]),
        rules(Mix::Q3_K_S, "Q3_K_S", 11, Q3_K,   &[],
                                                 &[(EightExperts, Q5_K)],
                                                 &[]),
        rules(Mix::Q2_K,   "Q2_K",   10, Q2_K,   &[(SharedHeads, Q4_K), (Everywhere, Q3_K)],
                                                 &[(EightExperts, Q5_K), (NotEightExperts, Q3_K)],
                                                 &[(Everywhere, Q3_K)]),
    ]
};

impl Mix {
    /// Every mix, from many bits to few.
    pub fn all() -> impl Iterator<Item = Self> {
        RULES.iter().map(|rules| rules.mix)
    }

    /// llama-quantize's name, e.g. `Q4_K_M`.
    pub fn name(self) -> &'static str {
        self.rules().name
    }

    /// The type of every matrix that has no better one.
    pub fn base(self) -> BlockType {
        self.rules().base
    }

    fn rules(self) -> &'static Rules {
        &RULES[self as usize]
    }
}

/// The mix's number under the metadata key `general.file_type` (`llama_ftype` in llama.h).
pub fn ftype_id(mix: Mix) -> u32 {
    mix.rules().file_type
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Mix {
    type Err = UnknownMix;

    /// Accepts the names in any case, and as llama-quantize does `Q3_K`, `Q4_K`, `Q5_K` for the
    /// medium mixes.
    fn from_str(name: &str) -> Result<Self, UnknownMix> {
        let medium = matches!(&*name.to_ascii_uppercase(), "Q3_K" | "Q4_K" | "Q5_K");
        let full = format!("{name}{}", if medium { "_M" } else { "" });
        Mix::all()
            .find(|mix| mix.name().eq_ignore_ascii_case(&full))
            .ok_or_else(|| UnknownMix(name.to_owned()))
    }
}

/// No mix has this name.
#[derive(Debug, Clone, thiserror::Error)]
#[error("unknown type {0:?}; one of {list}", list = Mix::all().map(Mix::name).collect::<Vec<_>>().join(", "))]
pub struct UnknownMix(pub String);

/// What the rules need to know of a model.
#[derive(Clone, Copy, Debug)]
pub struct RecipeModel {
    /// Layers (`llama.block_count`).
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Experts a layer; 0 or 1 in a dense model.
    pub experts: usize,
    /// Whether an imatrix guides the encoding.
    pub imatrix: bool,
}

/// A tensor as the recipe sees it.
#[derive(Clone, Copy, Debug)]
pub struct RecipeTensor<'a> {
    /// GGUF name, e.g. `blk.0.attn_v.weight`.
    pub name: &'a str,
    /// Extents, fastest first: `[columns, rows, experts]`.
    pub shape: &'a [usize],
    /// The type that it keeps if it is not to be quantized.
    pub source: BlockType,
}

/// The type that a tensor gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The type of its rows.
    pub kind: BlockType,
    /// The type that the recipe meant, where its blocks do not fill the rows.
    pub fallback_from: Option<BlockType>,
}

/// Why a recipe does not fit a model.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A mixture's `ffn_*` tensor whose layer cannot be told.
    #[error("tensor {tensor}: its name gives no layer below {layers} (expected \"blk.N.…\")")]
    NoLayer {
        /// The tensor's name.
        tensor: String,
        /// Layers of the model.
        layers: usize,
    },
    /// A `--tensor-type` that matches no matrix.
    #[error(
        "--tensor-type {pattern}={kind}: no tensor that can be quantized has a name matching {pattern:?}"
    )]
    Unused {
        /// The regular expression.
        pattern: String,
        /// The type it was to give.
        kind: BlockType,
    },
    /// A `--tensor-type` that names a type without an encoder.
    #[error(
        "--tensor-type {pattern}={kind}: {kind} can be read but not written; choose another type"
    )]
    NoEncoder {
        /// The regular expression.
        pattern: String,
        /// The type it was to give.
        kind: BlockType,
    },
}

/// Chooses a type for every tensor, in the order given.
///
/// `overrides` are the `--tensor-type REGEX=TYPE` in the order of the command line: the first
/// expression found anywhere in a tensor's name decides. They apply to matrices that can be
/// quantized, in place of the mix's rules; the row-size fallback still comes after them.
pub fn assign(
    mix: Mix,
    model: &RecipeModel,
    overrides: &[(Regex, BlockType)],
    tensors: &[RecipeTensor],
) -> Result<Vec<Choice>, Error> {
    check_overrides(overrides, tensors)?;

    let has_head = tensors.iter().any(|t| Role::of(t.name) == Role::Output);
    let attn_v_of = tensors
        .iter()
        .filter(|t| Role::of(t.name) == Role::AttnV)
        .count();

    // The rules count matrices of a kind in the order in which llama-quantize visits them.
    let mut visits: Vec<usize> = (0..tensors.len()).collect();
    visits.sort_by_key(|&index| visiting_order(tensors[index].name));

    let mut choices: Vec<Choice> = tensors
        .iter()
        .map(|tensor| Choice {
            kind: tensor.source,
            fallback_from: None,
        })
        .collect();
    let (mut attn_v_seen, mut ffn_down_seen) = (0, 0);
    for visit in visits {
        let tensor = &tensors[visit];
        if !is_quantized(tensor) {
            continue;
        }
        let named = overrides
            .iter()
            .find(|(pattern, _)| pattern.is_match(tensor.name));
        let kind = if let Some(&(_, kind)) = named {
            kind
        } else if block_is_weight(mix.base()) {
            mix.base()
        } else {
            match Role::of(tensor.name) {
                Role::Output => head_type(mix, tensor),
                Role::TokenEmbd if !has_head => head_type(mix, tensor),
                Role::AttnV => {
                    let at = Place {
                        index: attn_v_seen,
                        of: attn_v_of,
                        model,
                    };
                    attn_v_seen += 1;
                    attn_v_type(mix, at)
                }
                Role::AttnK if model.experts == 8 => Q8_0,
                Role::AttnOutput => {
                    let at = Place {
                        index: 0,
                        of: 0,
                        model,
                    };
                    at.choose(mix.rules().attn_output, mix.base())
                }
                Role::FfnDown => {
                    // Expert tensors may be one a layer or one an expert: their names tell the layer.
                    let index = match model.experts {
                        0 | 1 => ffn_down_seen,
                        _ => layer_within(tensor.name, model.layers)?,
                    };
                    ffn_down_seen += 1;
                    let at = Place {
                        index,
                        of: model.layers,
                        model,
                    };
                    at.choose(mix.rules().ffn_down, mix.base())
                }
                Role::TokenEmbd | Role::AttnK | Role::Other => mix.base(),
            }
        };
        choices[visit] = fallback(kind, tensor.shape[0]);
    }
    Ok(choices)
}

/// What a tensor is to the recipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    TokenEmbd,
    AttnV,
    AttnK,
    AttnOutput,
    FfnDown,
    Output,
    /// `attn_q`, `ffn_gate`, `ffn_up`: always of the base type.
    Other,
}

impl Role {
    fn of(name: &str) -> Self {
        match name {
            "output.weight" => Role::Output,
            "token_embd.weight" => Role::TokenEmbd,
            _ if name.contains("attn_v.weight") => Role::AttnV,
            _ if name.contains("attn_k.weight") => Role::AttnK,
            _ if name.contains("attn_output.weight") => Role::AttnOutput,
            _ if name.contains("ffn_down") => Role::FfnDown,
            _ => Role::Other,
        }
    }
}

/// Matrices named `*.weight` are quantized, except norms and the router (a few thousand weights
/// that decide where everything else goes).
pub(crate) fn is_quantized(tensor: &RecipeTensor) -> bool {
    tensor.shape.iter().skip(1).any(|&extent| extent > 1)
        && tensor.name.ends_with("weight")
        && !tensor.name.contains("_norm.weight")
        && !tensor.name.contains("ffn_gate_inp.weight")
}

/// A matrix's place among those of its kind.
#[derive(Clone, Copy)]
struct Place<'a> {
    index: usize,
    of: usize,
    model: &'a RecipeModel,
}

impl Place<'_> {
    fn choose(self, rules: &[(Where, BlockType)], base: BlockType) -> BlockType {
        rules
            .iter()
            .find(|(place, _)| self.is(*place))
            .map_or(base, |&(_, kind)| kind)
    }

    fn is(self, place: Where) -> bool {
        let Place { index, of, model } = self;
        match place {
            Everywhere => true,
            First(n) => index < n,
            Part(n) => index < of / n,
            PartGuided(n) => model.imatrix && index < of / n,
            PartUnguided(n) => !model.imatrix && index < of / n,
            Sensitive => index < of / 8 || index >= 7 * of / 8 || (index - of / 8) % 3 == 2,
            SharedHeads => model
                .heads
                .checked_div(model.kv_heads)
                .is_some_and(|share| share >= 4),
            EightExperts => model.experts == 8,
            NotEightExperts => model.experts != 8,
        }
    }
}

fn head_type(mix: Mix, tensor: &RecipeTensor) -> BlockType {
    let fits = tensor.shape[0].is_multiple_of(mix.base().block_len());
    if fits && mix.base() != Q8_0 {
        Q6_K
    } else {
        Q8_0
    }
}

fn attn_v_type(mix: Mix, at: Place) -> BlockType {
    if at.model.experts == 8 {
        return Q8_0;
    }
    // Llama 2 and 3 70B, known by their 80 layers: 8 heads share an attn_v.
    let is_70b = at.model.layers == 80 && at.model.heads != at.model.kv_heads;
    match at.choose(mix.rules().attn_v, mix.base()) {
        Q3_K | Q4_K if is_70b => Q5_K,
        kind => kind,
    }
}

/// The type for rows of `cols` weights: `kind` if its blocks fill them, else blocks of 32 with
/// at least as many bits, and F16 for rows that these do not fill either.
pub fn fallback(kind: BlockType, cols: usize) -> Choice {
    let fills = |kind: BlockType| cols.is_multiple_of(kind.block_len());
    if fills(kind) {
        return Choice {
            kind,
            fallback_from: None,
        };
    }
    let smaller = match kind {
        Q2_K | Q3_K => Q4_0,
        Q4_K => Q5_0,
        Q5_K => Q5_1,
        Q6_K => Q8_0,
        IQ4_XS => IQ4_NL,
        _ => F16,
    };
    Choice {
        kind: if fills(smaller) { smaller } else { F16 },
        fallback_from: Some(kind),
    }
}

fn block_is_weight(kind: BlockType) -> bool {
    kind.block_len() == 1
}

/// Sort key of llama-quantize's order: by layer (tensors outside the layers first), then by
/// name.
pub fn visiting_order(name: &str) -> (Option<usize>, &str) {
    (layer(name), name)
}

/// The N of `blk.N.…`.
fn layer(name: &str) -> Option<usize> {
    let (number, _) = name.strip_prefix("blk.")?.split_once('.')?;
    number.parse().ok()
}

fn layer_within(name: &str, layers: usize) -> Result<usize, Error> {
    layer(name)
        .filter(|&layer| layer < layers)
        .ok_or_else(|| Error::NoLayer {
            tensor: name.to_owned(),
            layers,
        })
}

fn check_overrides(
    overrides: &[(Regex, BlockType)],
    tensors: &[RecipeTensor],
) -> Result<(), Error> {
    for (pattern, kind) in overrides {
        let (pattern_text, kind) = (pattern.as_str().to_owned(), *kind);
        if kind.encoder().is_none() {
            return Err(Error::NoEncoder {
                pattern: pattern_text,
                kind,
            });
        }
        if !tensors
            .iter()
            .any(|t| is_quantized(t) && pattern.is_match(t.name))
        {
            return Err(Error::Unused {
                pattern: pattern_text,
                kind,
            });
        }
    }
    Ok(())
}
