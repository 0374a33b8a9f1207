//! Models that people ask about, in the types that they are found in: what `fewbit doctor` forecasts before anything is
//! downloaded.
//!
//! Bytes are those of files that `fewbit-convert` (and llama-quantize) writes; a test of `fewbit doctor` compares them
//! with the converter's own plan.

use super::{ARCHITECTURE, Shape, Weight};
use crate::gguf::names;
use crate::quant::BlockType;

/// A model in several types.
#[derive(Debug)]
pub struct Known {
    /// Its name.
    pub name: &'static str,
    /// Parameters that work on a token, the whole embedding included.
    pub params_active: u64,
    /// The types, from few bits to many.
    pub types: [Typed; 5],
    layers: usize,
    hidden: usize,
    ffn: usize,
    heads: usize,
    kv_heads: usize,
    experts: (usize, usize),
    vocab: usize,
    context: usize,
    /// Whether the embedding is the output head too.
    tied: bool,
}

/// A model's weights in a type.
#[derive(Debug)]
pub struct Typed {
    /// The type, or mix of types, by llama.cpp's name.
    pub name: &'static str,
    /// The type that most of the weights have.
    pub base: BlockType,
    /// Bytes of all but the feed-forward parts.
    pub dense_bytes: u64,
    /// Bytes of the feed-forward parts (of all experts).
    pub ffn_bytes: u64,
}

const fn types(bytes: [(u64, u64); 5]) -> [Typed; 5] {
    const NAMES: [(&str, BlockType); 5] = [
        ("Q3_K_M", BlockType::Q3_K),
        ("Q4_K_M", BlockType::Q4_K),
        ("Q5_K_M", BlockType::Q5_K),
        ("Q6_K", BlockType::Q6_K),
        ("Q8_0", BlockType::Q8_0),
    ];
    const fn typed((name, base): (&'static str, BlockType), (dense, ffn): (u64, u64)) -> Typed {
        Typed {
            name,
            base,
            dense_bytes: dense,
            ffn_bytes: ffn,
        }
    }
    [
        typed(NAMES[0], bytes[0]),
        typed(NAMES[1], bytes[1]),
        typed(NAMES[2], bytes[2]),
        typed(NAMES[3], bytes[3]),
        typed(NAMES[4], bytes[4]),
    ]
}

const MISTRAL_7B: Known = Known {
    name: "Mistral 7B",
    params_active: 7_248_023_552,
    types: types([
        (835_731_456, 2_686_451_712),
        (958_939_136, 3_413_114_880),
        (1_135_099_904, 4_000_317_440),
        (1_322_270_720, 4_624_220_160),
        (1_712_340_992, 5_989_466_112),
    ]),
    layers: 32,
    hidden: 4096,
    ffn: 14336,
    heads: 32,
    kv_heads: 8,
    experts: (1, 1),
    vocab: 32768,
    context: 32768,
    tied: false,
};

/// The models, large ones first.
pub const MODELS: [Known; 5] = [
    Known {
        name: "Mixtral 8x22B",
        params_active: 39_161_468_928,
        types: types([
            (3_375_783_936, 64_424_509_440),
            (3_683_278_848, 81_914_757_120),
            (3_972_685_824, 96_007_618_560),
            (4_560_936_960, 110_981_283_840),
            (5_682_388_992, 143_747_186_688),
        ]),
        layers: 56,
        hidden: 6144,
        ffn: 16384,
        heads: 48,
        experts: (8, 2),
        context: 65536,
        ..MISTRAL_7B
    },
    Known {
        name: "Mixtral 8x7B",
        params_active: 12_879_925_248,
        types: types([
            (1_054_097_408, 21_491_613_696),
            (1_142_808_576, 27_304_919_040),
            (1_226_301_440, 32_002_539_520),
            (1_386_315_776, 36_993_761_280),
            (1_709_850_624, 47_915_728_896),
        ]),
        experts: (8, 2),
        vocab: 32000,
        ..MISTRAL_7B
    },
    MISTRAL_7B,
    Known {
        name: "SmolLM2 1.7B",
        params_active: 1_711_376_384,
        types: types([
            (283_779_072, 574_619_648),
            (322_445_312, 731_381_760),
            (366_485_504, 857_210_880),
            (413_278_208, 990_904_320),
            (535_175_168, 1_283_457_024),
        ]),
        layers: 24,
        hidden: 2048,
        ffn: 8192,
        heads: 32,
        kv_heads: 32,
        vocab: 49152,
        context: 8192,
        tied: true,
        ..MISTRAL_7B
    },
    Known {
        name: "SmolLM2 135M",
        params_active: 134_515_008,
        types: types([
            (46_824_192, 44_900_352),
            (49_049_856, 54_618_624),
            (50_611_968, 59_705_856),
            (58_422_528, 78_174_720),
            (58_422_528, 84_602_880),
        ]),
        layers: 30,
        hidden: 576,
        ffn: 1536,
        heads: 9,
        kv_heads: 3,
        vocab: 49152,
        context: 8192,
        tied: true,
        ..MISTRAL_7B
    },
];

impl Known {
    /// The extents.
    pub fn shape(&self) -> Shape {
        Shape {
            arch: ARCHITECTURE.to_owned(),
            layers: self.layers,
            hidden: self.hidden,
            ffn: self.ffn,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.hidden / self.heads,
            experts: self.experts.0,
            experts_used: self.experts.1,
            vocab: self.vocab,
            context: self.context,
        }
    }

    /// Parameters that each token of a prompt is multiplied with: neither the embedding nor the output head, which
    /// only the last token meets.
    pub fn params_prompt(&self) -> u64 {
        let tables = if self.tied { 1 } else { 2 };
        self.params_active - (tables * self.vocab * self.hidden) as u64
    }

    /// Weights that take as many bytes as those of the type do, with feed-forward parts as large as each other.
    pub fn weights<'a>(&self, typed: &Typed, names: &'a [String]) -> Vec<Weight<'a>> {
        let weight = |name, bytes| Weight {
            name,
            shape: &[],
            bytes,
        };
        let ffn = typed.ffn_bytes / self.layers as u64;
        let layers = names.iter().map(|name| weight(name, ffn));
        layers
            .chain([weight(names::OUTPUT, typed.dense_bytes)])
            .collect()
    }

    /// Names for [`Known::weights`].
    pub fn names(&self) -> Vec<String> {
        let name = |layer| match self.experts.0 {
            1 => names::block(layer, names::FFN_GATE),
            _ => names::experts(layer, names::FFN_GATE),
        };
        (0..self.layers).map(name).collect()
    }
}
