//! The trained fixture.

use fewbit::quant::BlockType;
use fewbit_convert::recipe::Mix;

use crate::common::*;

/// Converts the fixture into a temporary folder.
fn convert_fixture(mix: Mix) -> (tempfile::TempDir, fewbit::gguf::Gguf) {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("tiny.gguf");
    convert(&fixture(), &output, &fewbit_convert::Options::new(mix)).unwrap();
    let gguf = fewbit::gguf::read(&output).unwrap();
    (dir, gguf)
}

#[test]
fn bf16_of_the_fixture_keeps_every_bit() {
    let (_dir, gguf) = convert_fixture(Mix::BF16);
    let shard = std::fs::read(fixture().join("model.safetensors")).unwrap();
    let stored = safetensors::SafeTensors::deserialize(&shard).unwrap();
    let bytes = |name: &str| stored.tensor(name).unwrap().data().to_vec();
    assert!(tensor_bytes(&gguf, "token_embd.weight") == bytes("model.embed_tokens.weight"));
    assert!(
        tensor_bytes(&gguf, "blk.2.attn_v.weight")
            == bytes("model.layers.2.self_attn.v_proj.weight")
    );
    let name = |e| format!("model.layers.1.block_sparse_moe.experts.{e}.w3.weight");
    let up: Vec<u8> = (0..8).flat_map(|e| bytes(&name(e))).collect();
    assert!(tensor_bytes(&gguf, "blk.1.ffn_up_exps.weight") == up);
}

#[test]
fn quantized_fixture_stays_near_its_weights() {
    let (_reference_dir, reference) = convert_fixture(Mix::F32);
    // Root mean square of the error over that of the weights.
    for (mix, bound) in [
        (Mix::Q8_0, 0.01),
        (Mix::Q5_K_M, 0.05),
        (Mix::Q4_K_M, 0.1),
        (Mix::Q4_0, 0.12),
    ] {
        let (_dir, gguf) = convert_fixture(mix);
        for tensor in &gguf.tensors {
            let (exact, near) = (
                tensor_weights(&reference, &tensor.name),
                tensor_weights(&gguf, &tensor.name),
            );
            let square = |v: f32| f64::from(v) * f64::from(v);
            let error: f64 = exact.iter().zip(&near).map(|(a, b)| square(a - b)).sum();
            let norm: f64 = exact.iter().map(|a| square(*a)).sum();
            assert!(
                error.sqrt() <= bound * norm.sqrt(),
                "{mix} {}: {}",
                tensor.name,
                (error / norm).sqrt()
            );
        }
        // With 8 experts, the matrices that all of them share are kept at 8 bits.
        assert_eq!(
            gguf.tensor("blk.0.attn_k.weight").unwrap().kind,
            BlockType::Q8_0
        );
    }
}
