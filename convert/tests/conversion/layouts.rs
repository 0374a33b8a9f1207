//! The layouts of checkpoints, each read as what it is.

use std::path::Path;

use fewbit::gguf::{self, Gguf, Metadata, TensorDecl, Value, write_whole};
use fewbit::quant::BlockType;
use fewbit_convert::Options;
use fewbit_convert::recipe::Mix;
use safetensors::Dtype;
use serde_json::json;

use crate::common::*;

/// Layer `n`'s experts under a name with the expert's number in place of `{}`, one after the other.
fn stacked(model: &Weights, experts: usize, name: &str) -> Vec<f32> {
    (0..experts)
        .flat_map(|e| model[&name.replace("{}", &e.to_string())].1.clone())
        .collect()
}

/// transformers 5's layout: gate above up in one tensor, experts stacked.
fn fused(model: &Weights, experts: usize) -> Weights {
    let mut fused: Weights = model
        .clone()
        .into_iter()
        .filter(|(name, _)| !name.contains("block_sparse_moe"))
        .collect();
    for layer in 0..LAYERS {
        let moe = format!("model.layers.{layer}.block_sparse_moe");
        let mlp = format!("model.layers.{layer}.mlp");
        fused.insert(
            format!("{mlp}.gate.weight"),
            model[&format!("{moe}.gate.weight")].clone(),
        );
        let expert = |e: usize, w: &str| model[&format!("{moe}.experts.{e}.{w}.weight")].1.clone();
        let gate_up = (0..experts)
            .flat_map(|e| [expert(e, "w1"), expert(e, "w3")].concat())
            .collect();
        fused.insert(
            format!("{mlp}.experts.gate_up_proj"),
            (vec![experts, 2 * FFN, HIDDEN], gate_up),
        );
        let down = (0..experts).flat_map(|e| expert(e, "w2")).collect();
        fused.insert(
            format!("{mlp}.experts.down_proj"),
            (vec![experts, HIDDEN, FFN], down),
        );
    }
    fused
}

/// Exchanges the last two extents of all tensors with three.
fn transposed(mut model: Weights) -> Weights {
    for (shape, values) in model.values_mut().filter(|(shape, _)| shape.len() == 3) {
        let (rows, columns) = (shape[1], shape[2]);
        let matrices = values.chunks_exact(rows * columns);
        *values = matrices
            .flat_map(|m| (0..rows * columns).map(|i| m[i % rows * columns + i / rows]))
            .collect();
        shape.swap(1, 2);
    }
    model
}

/// Row `2i + half` of a head is stored row `half·d/2 + i`.
fn interleaved(values: &[f32]) -> Vec<f32> {
    let heads = values.chunks_exact(HEAD_DIM * HIDDEN);
    let row =
        |head: &[f32], r: usize| head[(r % 2 * HEAD_DIM / 2 + r / 2) * HIDDEN..][..HIDDEN].to_vec();
    heads
        .flat_map(|head| (0..HEAD_DIM).flat_map(|r| row(head, r)).collect::<Vec<_>>())
        .collect()
}

/// Mistral's names and order of rows.
fn mistral(model: &Weights) -> Weights {
    let renames = [
        ("model.embed_tokens", "tok_embeddings"),
        ("lm_head", "output"),
        ("model.norm", "norm"),
        ("model.", ""),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attention.wq"),
        ("self_attn.k_proj", "attention.wk"),
        ("self_attn.v_proj", "attention.wv"),
        ("self_attn.o_proj", "attention.wo"),
        ("block_sparse_moe", "feed_forward"),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.down_proj", "feed_forward.w2"),
        ("mlp.up_proj", "feed_forward.w3"),
    ];
    let rename = |(name, (shape, values)): (&String, &(Vec<usize>, Vec<f32>))| {
        let values = if name.contains("q_proj") || name.contains("k_proj") {
            interleaved(values)
        } else {
            values.clone()
        };
        (
            renames
                .iter()
                .fold(name.clone(), |name, (from, to)| name.replace(from, to)),
            (shape.clone(), values),
        )
    };
    model.iter().map(rename).collect()
}

fn write_mistral(folder: &Path, experts: usize, model: &Weights) {
    let mut params = json!({
        "dim": HIDDEN, "n_layers": LAYERS, "head_dim": HEAD_DIM, "hidden_dim": FFN, "n_heads": HEADS,
        "n_kv_heads": KV_HEADS, "norm_eps": 1e-5, "vocab_size": VOCAB, "max_seq_len": 1024,
    });
    if experts > 0 {
        params["moe"] = json!({"num_experts": experts, "num_experts_per_tok": 2});
    }
    begin(folder, "params.json", &params);
    write_shard(
        &folder.join("consolidated.safetensors"),
        Dtype::BF16,
        &mistral(model),
    );
}

fn assert_same_tensors(a: &Gguf, b: &Gguf) {
    let names = |g: &Gguf| {
        g.tensors
            .iter()
            .map(|t| (t.name.clone(), t.kind, t.shape.clone()))
            .collect::<Vec<_>>()
    };
    assert_eq!(names(a), names(b));
    for tensor in &a.tensors {
        assert!(
            tensor_bytes(a, &tensor.name) == tensor_bytes(b, &tensor.name),
            "{} differs",
            tensor.name
        );
    }
}

#[test]
fn experts_stored_apart_are_merged_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let model = random_model(4);
    write_hf(&dir.path().join("m"), &config(4), Dtype::F32, &model);
    let (_, gguf) = converted(&dir.path().join("m"), Mix::F32);
    for (part, stored) in [("gate", "w1"), ("up", "w3"), ("down", "w2")] {
        let merged = stacked(
            &model,
            4,
            &format!("model.layers.1.block_sparse_moe.experts.{{}}.{stored}.weight"),
        );
        assert_eq!(
            tensor_weights(&gguf, &format!("blk.1.ffn_{part}_exps.weight")),
            merged
        );
    }
    assert_eq!(
        gguf.tensor("blk.1.ffn_down_exps.weight").unwrap().shape,
        [FFN, HIDDEN, 4]
    );
}

#[test]
fn query_and_key_rows_are_interleaved_within_their_heads() {
    let dir = tempfile::tempdir().unwrap();
    let model = random_model(0);
    write_hf(&dir.path().join("m"), &config(0), Dtype::F32, &model);
    let (_, gguf) = converted(&dir.path().join("m"), Mix::F32);
    for (part, stored) in [("q", "q_proj"), ("k", "k_proj")] {
        let stored = &model[&format!("model.layers.0.self_attn.{stored}.weight")].1;
        assert_eq!(
            tensor_weights(&gguf, &format!("blk.0.attn_{part}.weight")),
            interleaved(stored)
        );
    }
    let stored = &model["model.layers.0.self_attn.v_proj.weight"].1;
    assert_eq!(&tensor_weights(&gguf, "blk.0.attn_v.weight"), stored);
}

#[test]
fn all_layouts_of_the_same_mixtral_give_the_same_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let model = random_model(4);
    write_hf(&at("apart"), &config(4), Dtype::BF16, &model);
    write_sharded(&at("sharded"), &config(4), Dtype::BF16, &model);
    write_hf(&at("fused"), &config(4), Dtype::BF16, &fused(&model, 4));
    write_hf(
        &at("transposed"),
        &config(4),
        Dtype::BF16,
        &transposed(fused(&model, 4)),
    );
    write_mistral(&at("mistral"), 4, &model);
    let (_, apart) = converted(&at("apart"), Mix::Q4_K_M);
    for other in ["sharded", "fused", "transposed", "mistral"] {
        assert_same_tensors(&apart, &converted(&at(other), Mix::Q4_K_M).1);
    }
}

#[test]
fn both_layouts_of_the_same_dense_model_give_the_same_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let model = random_model(0);
    write_hf(&dir.path().join("hf"), &config(0), Dtype::BF16, &model);
    write_mistral(&dir.path().join("mistral"), 0, &model);
    let (_, hf) = converted(&dir.path().join("hf"), Mix::Q5_K_M);
    assert_same_tensors(&hf, &converted(&dir.path().join("mistral"), Mix::Q5_K_M).1);
}

#[test]
fn the_stored_type_does_not_show_in_the_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = random_model(0);
    // Few enough bits to be exact in all three.
    model
        .values_mut()
        .for_each(|(_, v)| v.iter_mut().for_each(|w| *w = (*w * 64.0).round() / 64.0));
    let quantized = [
        ("f32", Dtype::F32),
        ("f16", Dtype::F16),
        ("bf16", Dtype::BF16),
    ]
    .map(|(name, dtype)| {
        write_hf(&dir.path().join(name), &config(0), dtype, &model);
        converted(&dir.path().join(name), Mix::Q4_K_M).1
    });
    assert_same_tensors(&quantized[0], &quantized[1]);
    assert_same_tensors(&quantized[0], &quantized[2]);
}

#[test]
fn norms_and_router_stay_f32() {
    let dir = tempfile::tempdir().unwrap();
    write_hf(
        &dir.path().join("m"),
        &config(4),
        Dtype::BF16,
        &random_model(4),
    );
    let (_, gguf) = converted(&dir.path().join("m"), Mix::BF16);
    for tensor in &gguf.tensors {
        let stays = tensor.name.contains("norm") || tensor.name.contains("ffn_gate_inp");
        assert_eq!(
            tensor.kind,
            if stays {
                BlockType::F32
            } else {
                BlockType::BF16
            },
            "{}",
            tensor.name
        );
    }
}

#[test]
fn tied_embeddings_have_no_output_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let mut tied = config(0);
    tied["tie_word_embeddings"] = json!(true);
    let mut model = random_model(0);
    model.remove("lm_head.weight");
    write_hf(&dir.path().join("m"), &tied, Dtype::BF16, &model);
    let (_, gguf) = converted(&dir.path().join("m"), Mix::Q4_K_M);
    assert!(gguf.tensor("output.weight").is_none());
    assert_eq!(
        gguf.tensor("token_embd.weight").unwrap().kind,
        BlockType::Q6_K
    );
}

#[test]
fn a_gguf_source_gives_the_tensors_of_its_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    write_hf(
        &dir.path().join("m"),
        &config(4),
        Dtype::BF16,
        &random_model(4),
    );
    let (_, direct) = converted(&dir.path().join("m"), Mix::Q4_K_M);
    for mix in [Mix::F32, Mix::BF16] {
        let (intermediate, _) = converted(&dir.path().join("m"), mix);
        let output = dir.path().join(format!("by-{mix}.gguf"));
        convert(&intermediate, &output, &Options::new(Mix::Q4_K_M)).unwrap();
        let by_gguf = gguf::read(&output).unwrap();
        assert_same_tensors(&direct, &by_gguf);
        assert_eq!(by_gguf.metadata.u32("general.file_type").unwrap(), Some(15));
        assert_eq!(
            by_gguf.metadata.get("llama.rope.freq_base"),
            direct.metadata.get("llama.rope.freq_base")
        );
    }
}

#[test]
fn experts_of_old_gguf_files_are_merged() {
    let dir = tempfile::tempdir().unwrap();
    write_hf(
        &dir.path().join("m"),
        &config(4),
        Dtype::F32,
        &random_model(4),
    );
    let (_, merged) = converted(&dir.path().join("m"), Mix::F32);
    let mut tensors: Vec<(TensorDecl, Vec<u8>)> = Vec::new();
    for t in &merged.tensors {
        let bytes = tensor_bytes(&merged, &t.name);
        let decl = |name: String, shape: &[usize]| TensorDecl {
            name,
            kind: t.kind,
            shape: shape.to_vec(),
        };
        if t.shape.len() == 3 {
            let parts = bytes.chunks_exact(bytes.len() / 4).enumerate();
            let name = |e: usize| t.name.replace("_exps", &format!(".{e}"));
            tensors.extend(parts.map(|(e, part)| (decl(name(e), &t.shape[..2]), part.to_vec())));
        } else {
            tensors.push((decl(t.name.clone(), &t.shape), bytes));
        }
    }
    tensors.reverse(); // the order of an old file is not ours
    let old = dir.path().join("old.gguf");
    let borrowed: Vec<(TensorDecl, &[u8])> = tensors
        .iter()
        .map(|(d, b)| (d.clone(), b.as_slice()))
        .collect();
    write_whole(&old, &merged.metadata, &borrowed).unwrap();
    let output = dir.path().join("new.gguf");
    convert(&old, &output, &Options::new(Mix::Q4_K_M)).unwrap();
    assert_same_tensors(
        &converted(&dir.path().join("m"), Mix::Q4_K_M).1,
        &gguf::read(&output).unwrap(),
    );
}

#[test]
fn the_number_of_threads_does_not_show_in_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("m");
    write_hf(&input, &config(4), Dtype::BF16, &random_model(4));
    let bytes = [1, 3].map(|threads| {
        let output = dir.path().join(format!("{threads}.gguf"));
        let options = Options {
            threads,
            ..Options::new(Mix::Q5_K_M)
        };
        fewbit_convert::convert(&input, &output, &options, &indicatif::ProgressBar::hidden())
            .unwrap();
        std::fs::read(output).unwrap()
    });
    assert!(bytes[0] == bytes[1]);
}

#[test]
fn rows_that_hold_no_k_blocks_fall_back_and_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let meta: Metadata = [
        ("general.architecture", Value::String("llama".into())),
        ("llama.block_count", Value::U32(1)),
        ("llama.context_length", Value::U32(512)),
        ("llama.embedding_length", Value::U32(576)),
        ("llama.feed_forward_length", Value::U32(1536)),
        ("llama.attention.head_count", Value::U32(9)),
        ("llama.vocab_size", Value::U32(2)),
    ]
    .into_iter()
    .collect();
    let names = [
        "blk.0.attn_q.weight",
        "blk.0.attn_output.weight",
        "output.weight",
    ];
    let decl = |name: &str| TensorDecl {
        name: name.into(),
        kind: BlockType::F32,
        shape: vec![576, 2],
    };
    let bytes = vec![0; 576 * 2 * 4];
    let tensors = names.map(|name| (decl(name), bytes.as_slice()));
    let input = dir.path().join("in.gguf");
    write_whole(&input, &meta, &tensors).unwrap();
    let report = convert(
        &input,
        &dir.path().join("out.gguf"),
        &Options::new(Mix::Q4_K_M),
    )
    .unwrap();
    let lines = report.plan.fallback_lines();
    assert!(
        lines.contains(
            &"blk.0.attn_q.weight: 576 columns hold no whole Q4_K blocks: Q5_0 instead".to_owned()
        ),
        "{lines:?}"
    );
}

#[test]
fn of_two_layouts_the_one_that_was_downloaded_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("m");
    write_mistral(&folder, 0, &random_model(0));
    let index = json!({"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00003.safetensors"}});
    std::fs::write(folder.join("config.json"), config(0).to_string()).unwrap();
    std::fs::write(
        folder.join("model.safetensors.index.json"),
        index.to_string(),
    )
    .unwrap();
    converted(&folder, Mix::BF16);
}

#[test]
fn rows_of_a_head_may_be_read_in_parts() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("m");
    write_hf(&folder, &config(0), Dtype::BF16, &random_model(0));
    let checkpoint = fewbit_convert::checkpoint::Checkpoint::open(&folder).unwrap();
    let query = checkpoint
        .tensors
        .iter()
        .find(|t| t.name == "blk.0.attn_q.weight")
        .unwrap();
    let (mut whole, mut part, mut parts) = (Vec::new(), Vec::new(), Vec::new());
    let rows = query.rows();
    checkpoint.read_rows(query, 0..rows, &mut whole).unwrap();
    // Parts of a head, and such as begin in one and end in the next.
    for step in [2, 6, HEAD_DIM - 2, HEAD_DIM + 10] {
        parts.clear();
        for first in (0..rows).step_by(step) {
            let chunk = first..(first + step).min(rows);
            checkpoint.read_rows(query, chunk, &mut part).unwrap();
            parts.extend_from_slice(&part);
        }
        assert!(parts == whole, "{step}");
    }
}

#[test]
fn a_tensor_of_four_extents_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("m");
    write_hf(&folder, &config(0), Dtype::BF16, &random_model(0));
    let (_, gguf) = converted(&folder, Mix::F32);
    let path = dir.path().join("deep.gguf");
    let decl = TensorDecl {
        name: "blk.0.attn_q.weight".into(),
        kind: BlockType::F32,
        shape: vec![32, 2, 2, 2],
    };
    write_whole(&path, &gguf.metadata, &[(decl, &[0; 1024])]).unwrap();
    let message = failure(&path, &Options::new(Mix::Q8_0));
    assert!(
        message.contains("blk.0.attn_q.weight") && message.contains("[32, 2, 2, 2]"),
        "{message}"
    );
}
