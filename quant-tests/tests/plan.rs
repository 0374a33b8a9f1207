//! Sizes from metadata alone, against the published models' figures.

use fewbit::gguf::{Metadata, TensorDecl, Value};
use fewbit::plan::{Group, Shape, Sizes};
use fewbit::quant::BlockType;

fn metadata(pairs: &[(&str, u32)]) -> Metadata {
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", "llama");
    for &(key, value) in pairs {
        metadata.insert(format!("llama.{key}"), value);
    }
    metadata
}

fn mixtral_8x7b() -> Metadata {
    metadata(&[
        ("block_count", 32),
        ("context_length", 32768),
        ("embedding_length", 4096),
        ("feed_forward_length", 14336),
        ("attention.head_count", 32),
        ("attention.head_count_kv", 8),
        ("expert_count", 8),
        ("expert_used_count", 2),
        ("vocab_size", 32000),
    ])
}

fn mixtral_8x22b() -> Metadata {
    metadata(&[
        ("block_count", 56),
        ("context_length", 65536),
        ("embedding_length", 6144),
        ("feed_forward_length", 16384),
        ("attention.head_count", 48),
        ("attention.head_count_kv", 8),
        ("expert_count", 8),
        ("expert_used_count", 2),
        ("vocab_size", 32768),
    ])
}

fn mistral_7b() -> Metadata {
    let mut metadata = mixtral_8x7b();
    metadata.remove("llama.expert_count");
    metadata.remove("llama.expert_used_count");
    metadata
}

/// Sizes of a model of which every tensor has one type.
fn sizes(shape: &Shape, tied: bool, kind: BlockType) -> Sizes {
    let decl = |(name, shape)| TensorDecl { name, kind, shape };
    let tensors: Vec<TensorDecl> = shape.tensors(tied).into_iter().map(decl).collect();
    Sizes::of(shape.experts, shape.experts_used, &tensors)
}

#[test]
fn mixtral_8x7b_has_46_7_billion_parameters_and_12_9_at_work() {
    let shape = Shape::from_metadata(&mixtral_8x7b()).unwrap();
    assert_eq!((shape.head_dim, shape.kv_heads), (128, 8));
    assert!(shape.is_moe());
    let sizes = sizes(&shape, false, BlockType::F16);
    assert_eq!(sizes.params_total(), 46_702_792_704);
    assert_eq!(sizes.params_active(), 12_879_925_248);
}

#[test]
fn mixtral_8x22b_has_141_billion_parameters_and_39_at_work() {
    let shape = Shape::from_metadata(&mixtral_8x22b()).unwrap();
    let sizes = sizes(&shape, false, BlockType::F16);
    assert_eq!(format!("{:.1}", sizes.params_total() as f64 / 1e9), "140.6");
    assert_eq!(format!("{:.1}", sizes.params_active() as f64 / 1e9), "39.2");
}

#[test]
fn mistral_7b_has_7_24_billion_parameters_all_at_work() {
    let shape = Shape::from_metadata(&mistral_7b()).unwrap();
    assert!(!shape.is_moe());
    let sizes = sizes(&shape, false, BlockType::F16);
    assert_eq!(sizes.params_total(), 7_241_732_096);
    assert_eq!(sizes.params_active(), sizes.params_total());
    assert_eq!(sizes.group(Group::Experts).params, 0);
    assert_eq!(
        sizes.group(Group::FeedForward).params,
        32 * 3 * 4096 * 14336
    );
}

#[test]
fn experts_are_96_6_percent_of_mixtral_and_attention_2_9() {
    let shape = Shape::from_metadata(&mixtral_8x7b()).unwrap();
    let sizes = sizes(&shape, false, BlockType::F16);
    let share = |group| 100.0 * sizes.group(group).params as f64 / sizes.params_total() as f64;
    assert_eq!(format!("{:.1}", share(Group::Experts)), "96.6");
    assert_eq!(format!("{:.1}", share(Group::Attention)), "2.9");
    assert_eq!(sizes.group(Group::Other).params, 0);
}

#[test]
fn one_mixtral_expert_is_99_mb_at_4_5_bits() {
    let shape = Shape::from_metadata(&mixtral_8x7b()).unwrap();
    let sizes = sizes(&shape, false, BlockType::Q4_K);
    assert_eq!(sizes.group(Group::Experts).bytes / (32 * 8), 99_090_432);
}

#[test]
fn a_decoded_token_reads_the_used_experts_and_one_embedding_row() {
    let shape = Shape::from_metadata(&mixtral_8x7b()).unwrap();
    let sizes = sizes(&shape, false, BlockType::F16);
    let row = 2 * 4096;
    let expected = 2 * sizes.params_active() - sizes.group(Group::Embedding).bytes + row;
    assert_eq!(sizes.active_bytes_per_token(), expected);
}

#[test]
fn a_tied_embedding_is_read_whole_as_the_output_head() {
    let shape = Shape::from_metadata(&mistral_7b()).unwrap();
    let sizes = sizes(&shape, true, BlockType::F16);
    assert_eq!(sizes.active_bytes_per_token(), sizes.bytes_total());
}

#[test]
fn old_experts_of_one_tensor_each_count_like_merged_ones() {
    let shape = Shape::from_metadata(&mixtral_8x7b()).unwrap();
    let mut tensors = Vec::new();
    for (name, shape) in shape.tensors(false) {
        let kind = BlockType::F16;
        match name.strip_suffix("_exps.weight") {
            Some(part) => tensors.extend((0..8).map(|expert| TensorDecl {
                name: format!("{part}.{expert}.weight"),
                kind,
                shape: shape[..2].to_vec(),
            })),
            None => tensors.push(TensorDecl { name, kind, shape }),
        }
    }
    let sizes = Sizes::of(8, 2, &tensors);
    assert_eq!(sizes.params_total(), 46_702_792_704);
    assert_eq!(sizes.params_active(), 12_879_925_248);
}

#[test]
fn bits_per_weight_are_those_of_the_blocks() {
    let shape = Shape::from_metadata(&mixtral_8x7b()).unwrap();
    assert_eq!(sizes(&shape, false, BlockType::F16).bits_per_weight(), 16.0);
    let tensors = [TensorDecl {
        name: "output.weight".to_owned(),
        kind: BlockType::Q6_K,
        shape: vec![4096, 32000],
    }];
    assert_eq!(Sizes::of(1, 1, &tensors).bits_per_weight(), 6.5625);
    assert_eq!(Sizes::of(1, 1, &[] as &[TensorDecl]).bits_per_weight(), 0.0);
}

#[test]
fn mixtrals_kv_cache_takes_128_kib_a_token_in_f16() {
    let shape = Shape::from_metadata(&mixtral_8x7b()).unwrap();
    assert_eq!(shape.kv_bytes(1, BlockType::F16), 128 << 10);
    assert_eq!(shape.kv_bytes(32768, BlockType::F16), 4 << 30);
    assert_eq!(shape.kv_bytes(1, BlockType::Q8_0), 68 << 10);
    assert_eq!(shape.kv_bytes(1, BlockType::Q4_0), 36 << 10);
    let weights = 26_000_000_000;
    assert!(shape.ram_bytes(weights, 4096) > weights + shape.kv_bytes(4096, shape.kv_type()));
    assert_eq!(shape.ram_bytes(weights, usize::MAX), u64::MAX);
}

#[test]
fn the_vocabulary_is_counted_where_its_size_is_not_said() {
    let mut metadata = mistral_7b();
    metadata.remove("llama.vocab_size");
    metadata.insert(
        "tokenizer.ggml.tokens",
        Value::from(["a", "b", "c"].as_slice()),
    );
    assert_eq!(Shape::from_metadata(&metadata).unwrap().vocab, 3);
}

#[test]
fn a_head_width_of_its_own_is_taken() {
    let mut metadata = mistral_7b();
    metadata.insert("llama.embedding_length", 5120_u32);
    metadata.insert("llama.attention.key_length", 128_u32);
    metadata.insert("llama.attention.value_length", 128_u32);
    assert_eq!(Shape::from_metadata(&metadata).unwrap().head_dim, 128);
}

/// The message of the error that a changed Mixtral gives.
fn refusal(key: &str, value: impl Into<Value>) -> String {
    let mut metadata = mixtral_8x7b();
    metadata.insert(key, value);
    Shape::from_metadata(&metadata).unwrap_err().to_string()
}

#[test]
fn shapes_that_cannot_be_are_refused_by_key() {
    for (key, value, problem) in [
        ("llama.attention.head_count_kv", 7, "does not divide"),
        ("llama.attention.head_count", 24, "does not divide"),
        ("llama.attention.head_count", 0, "needs 1 to"),
        ("llama.attention.key_length", 127, "even"),
        ("llama.attention.value_length", 64, "not supported"),
        ("llama.expert_used_count", 9, "needs 1 to 8"),
        ("llama.block_count", 0, "needs 1 to"),
        ("llama.block_count", u32::MAX, "needs 1 to"),
        ("llama.embedding_length", 1 << 31, "needs 1 to"),
        ("llama.context_length", u32::MAX, "needs 1 to"),
    ] {
        let message = refusal(key, value);
        assert!(
            message.contains(key) && message.contains(problem),
            "{key} = {value}: {message}"
        );
    }
    let message = refusal("llama.block_count", "many");
    assert!(
        message.contains("llama.block_count") && message.contains("string"),
        "{message}"
    );
}

#[test]
fn another_architecture_is_refused_with_those_that_are_read() {
    let message = refusal("general.architecture", "gemma");
    assert!(
        message.contains("gemma") && message.contains("Mixtral"),
        "{message}"
    );
}

#[test]
fn a_missing_extent_is_named() {
    let mut metadata = mixtral_8x7b();
    metadata.remove("llama.feed_forward_length");
    let message = Shape::from_metadata(&metadata).unwrap_err().to_string();
    assert_eq!(
        message,
        "metadata key llama.feed_forward_length: is missing"
    );
}
