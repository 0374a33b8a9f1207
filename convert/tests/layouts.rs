//! The layouts of checkpoints, each read as what it is.

mod common;

use common::*;
use fewbit_convert::recipe::Mix;
use safetensors::Dtype;

#[test]
fn experts_stored_apart_are_merged_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let model = random_model(4);
    write_hf(&dir.path().join("m"), &config(4), Dtype::F32, &model);
    let (_, gguf) = converted(&dir.path().join("m"), Mix::F32);
    for (part, stored) in [("gate", "w1"), ("up", "w3"), ("down", "w2")] {
        let merged: Vec<f32> = (0..4)
            .flat_map(|e| {
                model[&format!("model.layers.1.block_sparse_moe.experts.{e}.{stored}.weight")]
                    .1
                    .clone()
            })
            .collect();
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
