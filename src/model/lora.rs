//! LoRA adapters on the way through the graph: where a matrix has corrections, their product is added to its own.

use super::Config;
use crate::adapter::{Adapter, Pair, Target};
use crate::experts::Expert;
use crate::gguf::names;
use crate::kernels::low_rank::LowRank;

/// The corrections of all adapters of a model, summed up by matrix.
#[derive(Clone)]
pub struct Lora {
    /// One entry a layer.
    pub(super) layers: Vec<LayerLora>,
    /// Of the output head.
    pub(super) output: Option<LowRank>,
}

/// The corrections of a layer's matrices.
#[derive(Clone)]
pub(super) struct LayerLora {
    pub(super) q: Option<LowRank>,
    pub(super) k: Option<LowRank>,
    pub(super) v: Option<LowRank>,
    pub(super) o: Option<LowRank>,
    pub(super) router: Option<LowRank>,
    /// Of each expert; a dense feed-forward part is one. Empty where none of them has any.
    pub(super) experts: Vec<Expert<Option<LowRank>>>,
}

impl Lora {
    /// The corrections of `adapters`, each multiplied with its scale.
    pub fn new(config: &Config, adapters: &[(Adapter, f32)]) -> Self {
        let shape = &config.shape;
        let of = |target: Target| {
            let pairs = adapters.iter().flat_map(|(adapter, scale)| {
                let found = adapter
                    .pairs
                    .iter()
                    .filter(move |pair| pair.target == target);
                found.map(move |pair| (pair, *scale))
            });
            LowRank::sum(pairs.map(|(pair, scale)| {
                let Pair { rank, a, b, .. } = pair;
                (*rank, &a[..], &b[..], pair.scale * scale)
            }))
        };
        let layer = |layer: usize| {
            let matrix = |part| of(Target::Layer(layer, part));
            let expert = |expert: usize| {
                let matrix = |part| match shape.is_moe() {
                    true => of(Target::Expert(layer, part, expert)),
                    false => of(Target::Layer(layer, part)),
                };
                Expert {
                    gate: matrix(names::FFN_GATE),
                    up: matrix(names::FFN_UP),
                    down: matrix(names::FFN_DOWN),
                }
            };
            let mut experts: Vec<_> = (0..shape.experts).map(expert).collect();
            let has_any =
                |expert: &Expert<Option<LowRank>>| expert.parts().into_iter().any(Option::is_some);
            if !experts.iter().any(has_any) {
                experts.clear();
            }
            LayerLora {
                q: matrix(names::ATTN_Q),
                k: matrix(names::ATTN_K),
                v: matrix(names::ATTN_V),
                o: matrix(names::ATTN_OUTPUT),
                router: matrix(names::FFN_GATE_INP),
                experts,
            }
        };
        Self {
            layers: (0..shape.layers).map(layer).collect(),
            output: of(Target::Output),
        }
    }
}
