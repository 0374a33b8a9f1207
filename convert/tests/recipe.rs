//! The recipe on the models that it is for. The expected types are llama-quantize's; the
//! conformance suite compares every mix with the real one.

use fewbit::quant::BlockType::{self, *};
use fewbit_convert::recipe::{self, Choice, Error, Mix, RecipeModel, RecipeTensor, assign};
use regex::Regex;

const MIXTRAL_8X7B: Model = Model {
    layers: 32,
    heads: 32,
    kv_heads: 8,
    experts: 8,
    hidden: 4096,
    ffn: 14336,
    tied: false,
};
const MIXTRAL_8X22B: Model = Model {
    layers: 56,
    heads: 48,
    kv_heads: 8,
    experts: 8,
    hidden: 6144,
    ffn: 16384,
    tied: false,
};
const MISTRAL_7B: Model = Model {
    experts: 0,
    ..MIXTRAL_8X7B
};
const LLAMA_2_7B: Model = Model {
    kv_heads: 32,
    ffn: 11008,
    ..MISTRAL_7B
};
const LLAMA_2_70B: Model = Model {
    layers: 80,
    heads: 64,
    hidden: 8192,
    ffn: 28672,
    ..MISTRAL_7B
};
const SMOLLM2_135M: Model = Model {
    layers: 30,
    heads: 9,
    kv_heads: 3,
    experts: 0,
    hidden: 576,
    ffn: 1536,
    tied: true,
};

#[test]
fn mixtral_q4_k_m_keeps_attention_near_8_bits_and_sensitive_down_projections_at_6() {
    expect(
        MIXTRAL_8X7B,
        Mix::Q4_K_M,
        "output Q6_K
         token_embd Q4_K
         attn_norm F32
         attn_q Q4_K
         attn_k Q8_0
         attn_v Q8_0
         attn_output Q5_K
         ffn_norm F32
         ffn_gate_inp F32
         ffn_gate_exps Q4_K
         ffn_up_exps Q4_K
         ffn_down_exps Q6_K:0-3,6,9,12,15,18,21,24,27-31 Q4_K:4-5,7-8,10-11,13-14,16-17,19-20,22-23,25-26",
    );
}

#[test]
fn mixtral_8x22b_counts_its_eighths_from_56_layers() {
    expect_parts(
        MIXTRAL_8X22B,
        Mix::Q5_K_M,
        "attn_v Q8_0
         attn_output Q5_K
         ffn_down_exps Q6_K:0-6,9,12,15,18,21,24,27,30,33,36,39,42,45,48-55 \
         Q5_K:7-8,10-11,13-14,16-17,19-20,22-23,25-26,28-29,31-32,34-35,37-38,40-41,43-44,46-47",
    );
    expect_parts(
        MIXTRAL_8X22B,
        Mix::Q4_K_S,
        "ffn_down_exps Q5_K:0-6 Q4_K:7-55\nattn_output Q5_K",
    );
}

#[test]
fn mixtral_at_3_bits_depends_on_the_mix() {
    expect_parts(
        MIXTRAL_8X7B,
        Mix::Q3_K_S,
        "attn_output Q5_K\nffn_down_exps Q3_K",
    );
    expect_parts(
        MIXTRAL_8X7B,
        Mix::Q3_K_M,
        "attn_output Q5_K\nffn_down_exps Q5_K:0-1 Q4_K:2-31",
    );
    // Not a slip: the large mix leaves attn_output at the base where there are 8 experts.
    expect_parts(
        MIXTRAL_8X7B,
        Mix::Q3_K_L,
        "attn_output Q3_K\nffn_down_exps Q5_K",
    );
}

#[test]
fn dense_models_raise_attn_v_by_layer() {
    expect_parts(
        LLAMA_2_7B,
        Mix::Q4_K_S,
        "attn_v Q5_K:0-3 Q4_K:4-31\nffn_down Q5_K:0-3 Q4_K:4-31",
    );
    expect_parts(
        LLAMA_2_7B,
        Mix::Q3_K_M,
        "attn_v Q5_K:0-1 Q4_K:2-31\nattn_output Q4_K\nffn_down Q5_K:0-1 Q4_K:2-31\nattn_k Q3_K",
    );
    expect_parts(
        LLAMA_2_7B,
        Mix::Q4_K_M,
        "attn_k Q4_K
         attn_v Q6_K:0-3,6,9,12,15,18,21,24,27-31 Q4_K:4-5,7-8,10-11,13-14,16-17,19-20,22-23,25-26
         attn_output Q4_K
         output Q6_K",
    );
}

#[test]
fn shared_key_value_heads_get_more_bits() {
    expect_parts(
        LLAMA_2_7B,
        Mix::Q2_K,
        "attn_v Q3_K\nattn_output Q3_K\nffn_down Q3_K",
    );
    expect_parts(
        MISTRAL_7B,
        Mix::Q2_K,
        "attn_v Q4_K\nattn_output Q3_K\nffn_down Q3_K",
    );
    expect_parts(LLAMA_2_7B, Mix::IQ4_XS, "attn_v IQ4_XS");
    expect_parts(MISTRAL_7B, Mix::IQ4_XS, "attn_v Q5_K");
    expect_parts(LLAMA_2_70B, Mix::Q3_K_S, "attn_v Q5_K\nattn_k Q3_K");
    expect_parts(LLAMA_2_70B, Mix::Q4_K_S, "attn_v Q5_K");
}

#[test]
fn an_imatrix_moves_the_first_down_projections() {
    let guided = |mix| summary(MISTRAL_7B, mix, true, &[]);
    assert!(guided(Mix::Q4_0).contains(&"ffn_down Q4_1:0-3 Q4_0:4-31".to_owned()));
    assert!(guided(Mix::Q5_0).contains(&"ffn_down Q5_1:0-3 Q5_0:4-31".to_owned()));
    assert!(guided(Mix::IQ4_NL).contains(&"ffn_down IQ4_NL".to_owned()));
    expect_parts(MISTRAL_7B, Mix::Q4_0, "ffn_down Q4_0\noutput Q6_K");
    expect_parts(MISTRAL_7B, Mix::IQ4_NL, "ffn_down Q5_K:0-3 IQ4_NL:4-31");
}

#[test]
fn rows_of_576_fall_back_to_blocks_of_32_and_the_tied_embedding_is_the_head() {
    expect(
        SMOLLM2_135M,
        Mix::Q4_K_M,
        "token_embd Q8_0
         attn_norm F32
         attn_q Q5_0
         attn_k Q5_0
         attn_v Q8_0:0-2,5,8,11,14,17,20,23,26-29 Q5_0:3-4,6-7,9-10,12-13,15-16,18-19,21-22,24-25
         attn_output Q5_0
         ffn_norm F32
         ffn_gate Q5_0
         ffn_up Q5_0
         ffn_down Q6_K:0-2,5,8,11,14,17,20,23,26-29 Q4_K:3-4,6-7,9-10,12-13,15-16,18-19,21-22,24-25",
    );
    // 576 is a multiple of 32: the head means Q6_K here, and falls back.
    expect_parts(SMOLLM2_135M, Mix::Q4_0, "token_embd Q8_0\nattn_q Q4_0");
}

#[test]
fn a_choice_tells_what_it_fell_back_from() {
    let fallback = |kind, cols| recipe::fallback(kind, cols);
    let to = |kind, from| Choice {
        kind,
        fallback_from: Some(from),
    };
    assert_eq!(
        fallback(Q4_K, 512),
        Choice {
            kind: Q4_K,
            fallback_from: None
        }
    );
    for (from, kind) in [
        (Q2_K, Q4_0),
        (Q3_K, Q4_0),
        (Q4_K, Q5_0),
        (Q5_K, Q5_1),
        (Q6_K, Q8_0),
        (IQ4_XS, IQ4_NL),
    ] {
        assert_eq!(fallback(from, 576), to(kind, from));
        assert_eq!(fallback(from, 100), to(F16, from));
    }
    for kind in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL] {
        assert_eq!(fallback(kind, 100), to(F16, kind));
    }
}

#[test]
fn the_first_override_that_matches_wins_and_still_falls_back() {
    let rules = [("ffn_.*_exps", Q3_K), ("blk\\.0\\.", Q8_0), ("ffn", Q2_K)];
    let types = summary(MIXTRAL_8X7B, Mix::Q4_K_M, false, &rules);
    assert!(types.contains(&"ffn_down_exps Q3_K".to_owned()));
    assert!(types.contains(&"attn_q Q8_0:0 Q4_K:1-31".to_owned()));
    assert!(
        types.contains(&"ffn_gate_inp F32".to_owned()),
        "the router stays as it is"
    );

    let types = summary(
        SMOLLM2_135M,
        Mix::Q8_0,
        false,
        &[("attn_q", Q6_K), ("attn_k", Q3_K)],
    );
    assert!(types.contains(&"attn_q Q8_0".to_owned()));
    assert!(types.contains(&"attn_k Q4_0".to_owned()));
}

#[test]
fn an_overridden_matrix_does_not_count_among_the_first() {
    let types = summary(
        LLAMA_2_7B,
        Mix::Q4_K_S,
        false,
        &[("blk\\.[01]\\.attn_v", Q8_0)],
    );
    assert!(
        types.contains(&"attn_v Q8_0:0-1 Q5_K:2-5 Q4_K:6-31".to_owned()),
        "{types:#?}"
    );
}

#[test]
fn one_type_for_all_is_an_override() {
    for line in summary(LLAMA_2_7B, Mix::Q4_K_S, false, &[(".", Q4_K)]) {
        assert!(line.ends_with("F32") || line.ends_with(" Q4_K"), "{line}");
    }
}

#[test]
fn floating_point_mixes_leave_norms_alone_and_heed_overrides() {
    let types = summary(SMOLLM2_135M, Mix::BF16, false, &[("token_embd", Q8_0)]);
    assert!(types.contains(&"token_embd Q8_0".to_owned()));
    assert!(types.contains(&"attn_q BF16".to_owned()));
    assert!(types.contains(&"attn_norm F32".to_owned()));
}

#[test]
fn useless_overrides_are_named() {
    let error = try_types(MISTRAL_7B, Mix::Q4_K_M, &[("ffn_dwon", Q8_0)]).unwrap_err();
    assert!(matches!(&error, Error::Unused { pattern, .. } if pattern == "ffn_dwon"));
    let error = try_types(MISTRAL_7B, Mix::Q4_K_M, &[("norm", Q8_0)]).unwrap_err();
    assert!(
        matches!(error, Error::Unused { .. }),
        "norms are not quantized"
    );
    let error = try_types(MISTRAL_7B, Mix::Q4_K_M, &[("ffn_down", MXFP4)]).unwrap_err();
    assert!(error.to_string().contains("MXFP4"), "{error}");
}

#[test]
fn an_expert_tensor_beyond_the_last_layer_is_named() {
    let model = RecipeModel {
        layers: 4,
        heads: 4,
        kv_heads: 4,
        experts: 8,
        imatrix: false,
    };
    for name in ["blk.4.ffn_down_exps.weight", "ffn_down_exps.weight"] {
        let tensor = RecipeTensor {
            name,
            shape: &[256, 256, 8],
            source: F16,
        };
        let error = assign(Mix::Q4_K_M, &model, &[], &[tensor]).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn layers_count_by_number_whatever_the_order_of_the_file() {
    let tensors = LLAMA_2_7B.tensors();
    let types = |tensors: &[(String, Vec<usize>)]| {
        let mut named: Vec<(String, BlockType)> = tensors
            .iter()
            .zip(choose(LLAMA_2_7B, tensors, Mix::Q4_K_S, false, &[]).unwrap())
            .map(|((name, _), choice)| (name.clone(), choice.kind))
            .collect();
        named.sort();
        named
    };
    let reversed: Vec<_> = tensors.iter().rev().cloned().collect();
    assert_eq!(types(&tensors), types(&reversed));
}

#[test]
fn names_and_numbers_are_those_of_llama_quantize() {
    for mix in Mix::all() {
        assert_eq!(mix.name().to_lowercase().parse::<Mix>().unwrap(), mix);
        assert_eq!(format!("{mix:?}"), mix.name());
    }
    assert_eq!("q4_k".parse::<Mix>().unwrap(), Mix::Q4_K_M);
    assert_eq!("Q3_K".parse::<Mix>().unwrap(), Mix::Q3_K_M);
    assert_eq!(recipe::ftype_id(Mix::Q4_K_M), 15);
    assert_eq!(recipe::ftype_id(Mix::IQ4_XS), 30);
    let error = "Q7_K".parse::<Mix>().unwrap_err().to_string();
    assert!(
        error.contains("Q7_K") && error.contains("Q4_K_M"),
        "{error}"
    );
}

#[derive(Clone, Copy)]
struct Model {
    layers: usize,
    heads: usize,
    kv_heads: usize,
    experts: usize,
    hidden: usize,
    ffn: usize,
    tied: bool,
}

impl Model {
    fn tensors(self) -> Vec<(String, Vec<usize>)> {
        let Model {
            layers,
            heads,
            kv_heads,
            experts,
            hidden,
            ffn,
            tied,
        } = self;
        let kv = hidden / heads * kv_heads;
        let mut tensors = vec![];
        if !tied {
            tensors.push(("output.weight".to_owned(), vec![hidden, 32000]));
        }
        tensors.push(("token_embd.weight".to_owned(), vec![hidden, 32000]));
        for layer in 0..layers {
            let mut push = |part: &str, shape: &[usize]| {
                tensors.push((format!("blk.{layer}.{part}.weight"), shape.to_vec()));
            };
            push("attn_norm", &[hidden]);
            push("attn_q", &[hidden, hidden]);
            push("attn_k", &[hidden, kv]);
            push("attn_v", &[hidden, kv]);
            push("attn_output", &[hidden, hidden]);
            push("ffn_norm", &[hidden]);
            if experts > 0 {
                push("ffn_gate_inp", &[hidden, experts]);
                push("ffn_gate_exps", &[hidden, ffn, experts]);
                push("ffn_up_exps", &[hidden, ffn, experts]);
                push("ffn_down_exps", &[ffn, hidden, experts]);
            } else {
                push("ffn_gate", &[hidden, ffn]);
                push("ffn_up", &[hidden, ffn]);
                push("ffn_down", &[ffn, hidden]);
            }
        }
        tensors
    }
}

type Overrides<'a> = &'a [(&'a str, BlockType)];

fn choose(
    model: Model,
    tensors: &[(String, Vec<usize>)],
    mix: Mix,
    imatrix: bool,
    overrides: Overrides,
) -> Result<Vec<Choice>, Error> {
    let Model {
        layers,
        heads,
        kv_heads,
        experts,
        ..
    } = model;
    let tensors: Vec<RecipeTensor> = tensors
        .iter()
        .map(|(name, shape)| RecipeTensor {
            name,
            shape,
            source: F32,
        })
        .collect();
    let overrides: Vec<(Regex, BlockType)> = overrides
        .iter()
        .map(|&(regex, kind)| (Regex::new(regex).unwrap(), kind))
        .collect();
    assign(
        mix,
        &RecipeModel {
            layers,
            heads,
            kv_heads,
            experts,
            imatrix,
        },
        &overrides,
        &tensors,
    )
}

fn try_types(model: Model, mix: Mix, overrides: Overrides) -> Result<Vec<Choice>, Error> {
    choose(model, &model.tensors(), mix, false, overrides)
}

type LayersByType = Vec<(BlockType, Vec<usize>)>;

/// One line a kind of tensor, in the model's order: the type if it is one, else each with its layers.
fn summary(model: Model, mix: Mix, imatrix: bool, overrides: Overrides) -> Vec<String> {
    let tensors = model.tensors();
    let choices = choose(model, &tensors, mix, imatrix, overrides).unwrap();
    let mut parts: Vec<(&str, LayersByType)> = vec![];
    for ((name, _), choice) in tensors.iter().zip(&choices) {
        let mut fields = name.trim_end_matches(".weight").split('.');
        let part = fields.next_back().unwrap();
        let layer = fields.next_back().map_or(0, |layer| layer.parse().unwrap());
        let at = parts
            .iter()
            .position(|(name, _)| *name == part)
            .unwrap_or_else(|| {
                parts.push((part, vec![]));
                parts.len() - 1
            });
        let types = &mut parts[at].1;
        match types.iter_mut().find(|(kind, _)| *kind == choice.kind) {
            Some((_, layers)) => layers.push(layer),
            None => types.push((choice.kind, vec![layer])),
        }
    }
    parts
        .iter()
        .map(|(part, types)| match &types[..] {
            [(kind, _)] => format!("{part} {kind}"),
            _ => {
                let types = types
                    .iter()
                    .map(|(kind, layers)| format!(" {kind}:{}", ranges(layers)));
                format!("{part}{}", types.collect::<String>())
            }
        })
        .collect()
}

/// `[0, 1, 2, 5]` as `0-2,5`.
fn ranges(layers: &[usize]) -> String {
    layers
        .chunk_by(|a, b| a + 1 == *b)
        .map(|run| match run {
            [one] => one.to_string(),
            _ => format!("{}-{}", run[0], run[run.len() - 1]),
        })
        .collect::<Vec<_>>()
        .join(",")
}

fn lines(text: &str) -> Vec<String> {
    text.lines().map(|line| line.trim().to_owned()).collect()
}

fn expect(model: Model, mix: Mix, expected: &str) {
    assert_eq!(summary(model, mix, false, &[]), lines(expected), "{mix}");
}

fn expect_parts(model: Model, mix: Mix, expected: &str) {
    let types = summary(model, mix, false, &[]);
    for line in lines(expected) {
        assert!(types.contains(&line), "{mix}: no {line:?} in {types:#?}");
    }
}
