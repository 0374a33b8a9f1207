//! Importance matrices, in both forms, reach the encoder row by row.

use std::fs;
use std::path::Path;

use fewbit::gguf::with_suffix;
use fewbit::gguf::{self, Array, Metadata, TensorDecl, Value, write_whole};
use fewbit::quant::BlockType;
use fewbit_convert::Options;
use fewbit_convert::recipe::Mix;
use safetensors::Dtype;

use crate::common::*;

const DOWN: &str = "blk.0.ffn_down_exps.weight";

/// Sums of squares for 4 experts of `columns`, after `counts` tokens each.
fn write_imatrix(path: &Path, name: &str, columns: usize, sums: &[f32], counts: &[f32]) {
    let meta: Metadata = [
        ("general.type", Value::String("imatrix".into())),
        (
            "imatrix.datasets",
            Value::Array(Array::String(vec!["texts".into()])),
        ),
        ("imatrix.chunk_count", Value::U32(7)),
        ("imatrix.chunk_size", Value::U32(512)),
    ]
    .into_iter()
    .collect();
    let bytes = |v: &[f32]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let (sum_bytes, count_bytes) = (bytes(sums), bytes(counts));
    let decl = |suffix: &str, shape: Vec<usize>| TensorDecl {
        name: format!("{name}.{suffix}"),
        kind: BlockType::F32,
        shape,
    };
    let tensors = [
        (
            decl("in_sum2", vec![columns, counts.len()]),
            sum_bytes.as_slice(),
        ),
        (
            decl("counts", vec![1, counts.len()]),
            count_bytes.as_slice(),
        ),
    ];
    write_whole(path, &meta, &tensors).unwrap();
}

fn sums(experts: usize) -> Vec<f32> {
    (0..experts * FFN)
        .map(|i| 1.0 + (i * 37 % 101) as f32)
        .collect()
}

fn options(imatrix: &Path) -> Options {
    Options {
        imatrix: Some(imatrix.to_owned()),
        ..Options::new(Mix::Q4_K_S)
    }
}

#[test]
fn each_expert_is_encoded_with_its_own_mean_squares() {
    let dir = tempfile::tempdir().unwrap();
    let (input, imatrix) = (dir.path().join("m"), dir.path().join("stats.gguf"));
    let model = random_model(4);
    write_hf(&input, &config(4), Dtype::BF16, &model);
    let counts = [10.0, 3.0, 0.0, 7.0]; // the third expert saw no token: all columns weigh alike
    write_imatrix(&imatrix, DOWN, FFN, &sums(4), &counts);
    let output = dir.path().join("out.gguf");
    convert(&input, &output, &options(&imatrix)).unwrap();

    let gguf = gguf::read(&output).unwrap();
    let info = gguf.tensor(DOWN).unwrap();
    let encoder = info.kind.encoder().unwrap();
    let mut expected = vec![0; info.bytes as usize];
    for (row, bytes) in expected.chunks_exact_mut(info.row_bytes()).enumerate() {
        let expert = row / HIDDEN;
        let name = format!("model.layers.0.block_sparse_moe.experts.{expert}.w2.weight");
        let weights = &model[&name].1[row % HIDDEN * FFN..][..FFN];
        let mean = |&sum: &f32| {
            if counts[expert] > 0.0 {
                sum / counts[expert]
            } else {
                1.0
            }
        };
        let importance: Vec<f32> = sums(4)[expert * FFN..][..FFN].iter().map(mean).collect();
        encoder(weights, Some(&importance), bytes);
    }
    assert!(tensor_bytes(&gguf, DOWN) == expected);
    assert_eq!(
        gguf.metadata.u32("quantize.imatrix.entries_count").unwrap(),
        Some(1)
    );
    assert_eq!(
        gguf.metadata.u32("quantize.imatrix.chunks_count").unwrap(),
        Some(7)
    );
    assert_eq!(
        gguf.metadata.get("quantize.imatrix.dataset"),
        Some(&Value::String("texts".into()))
    );
}

#[test]
fn the_legacy_form_means_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("m");
    write_hf(&input, &config(4), Dtype::BF16, &random_model(4));
    let (modern, legacy) = (dir.path().join("stats.gguf"), dir.path().join("stats.dat"));
    write_imatrix(&modern, DOWN, FFN, &sums(4), &[4.0; 4]);
    let mut bytes = Vec::new();
    let mut put = |v: usize| bytes.extend_from_slice(&(v as i32).to_le_bytes());
    put(1);
    put(DOWN.len());
    bytes.extend_from_slice(DOWN.as_bytes());
    bytes.extend_from_slice(&4_i32.to_le_bytes());
    bytes.extend_from_slice(&(4 * FFN as i32).to_le_bytes());
    sums(4)
        .iter()
        .for_each(|v| bytes.extend_from_slice(&v.to_le_bytes()));
    fs::write(&legacy, &bytes).unwrap();
    let outputs = [&modern, &legacy].map(|imatrix| {
        let output = with_suffix(imatrix, ".out.gguf");
        convert(&input, &output, &options(imatrix)).unwrap();
        tensor_bytes(&gguf::read(&output).unwrap(), DOWN)
    });
    assert!(outputs[0] == outputs[1]);

    for cut in [0, 3, 5, 20, 60, bytes.len() - 1] {
        fs::write(&legacy, &bytes[..cut]).unwrap();
        let message = failure(&input, &options(&legacy));
        assert!(message.contains("stats.dat"), "{cut}: {message}");
    }
}

#[test]
fn an_imatrix_of_another_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (input, imatrix) = (dir.path().join("m"), dir.path().join("stats.gguf"));
    write_hf(&input, &config(4), Dtype::BF16, &random_model(4));
    write_imatrix(&imatrix, DOWN, FFN, &sums(8), &[1.0; 8]);
    let message = failure(&input, &options(&imatrix));
    assert!(
        message.contains(DOWN) && message.contains("another model"),
        "{message}"
    );

    write_imatrix(&imatrix, "model.other.weight", FFN, &sums(4), &[1.0; 4]);
    let message = failure(&input, &options(&imatrix));
    assert!(message.contains("none of the model's"), "{message}");

    write_imatrix(&imatrix, DOWN, FFN, &[f32::NAN; 4 * FFN], &[1.0; 4]);
    let message = failure(&input, &options(&imatrix));
    assert!(
        message.contains(DOWN) && message.contains("NaN"),
        "{message}"
    );
}
