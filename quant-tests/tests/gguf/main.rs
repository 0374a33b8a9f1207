//! GGUF files: what is written is read back, and what is wrong is named with its place.

use std::fs;
use std::path::{Path, PathBuf};

use fewbit::gguf::{self, Array, Gguf, Layout, Metadata, TensorDecl, Value, Writer, names};
use fewbit::quant::BlockType;
use proptest::prelude::*;
use tempfile::TempDir;

mod metadata;
mod refusals;
mod round_trips;
mod splits;
mod writing;

fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

/// A pair with a value of the type `id`.
fn pair(key: &str, id: u32, value: &[u8]) -> Vec<u8> {
    [&string(key), &id.to_le_bytes()[..], value].concat()
}

fn array(id: u32, count: u64, items: &[u8]) -> Vec<u8> {
    [&id.to_le_bytes()[..], &count.to_le_bytes(), items].concat()
}

fn tensor(name: &str, shape: &[u64], id: u32, offset: u64) -> Vec<u8> {
    let mut bytes = string(name);
    bytes.extend((shape.len() as u32).to_le_bytes());
    shape
        .iter()
        .for_each(|extent| bytes.extend(extent.to_le_bytes()));
    bytes.extend(id.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

/// A file of these parts with `data` zero bytes of tensor data.
fn file(version: u32, pairs: &[Vec<u8>], tensors: &[Vec<u8>], data: usize) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((pairs.len() as u64).to_le_bytes());
    bytes.extend(pairs.concat());
    bytes.extend(tensors.concat());
    bytes.resize(bytes.len().next_multiple_of(32) + data, 0);
    bytes
}

fn parse(bytes: &[u8]) -> Result<Gguf, gguf::Error> {
    gguf::parse(bytes, bytes.len() as u64, Path::new("model.gguf"))
}

/// The message with which these bytes are refused; it must name the file.
fn refusal(bytes: &[u8]) -> String {
    let message = parse(bytes).expect_err("refused").to_string();
    assert!(message.starts_with("model.gguf: "), "{message}");
    assert!(!message.contains('\n'), "{message}");
    message
}

/// Asserts that the message contains every one of the words.
#[track_caller]
fn assert_says(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
}

const F32: u32 = 0;
const U32: u32 = 4;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

fn every_type() -> Metadata {
    let nested = vec![
        Array::from(vec![1_u16, 2]),
        Array::from(Vec::<String>::new()),
    ];
    [
        ("u8", Value::from(u8::MAX)),
        ("i8", i8::MIN.into()),
        ("u16", u16::MAX.into()),
        ("i16", i16::MIN.into()),
        ("u32", u32::MAX.into()),
        ("i32", i32::MIN.into()),
        ("f32", 1e-5_f32.into()),
        ("bool", true.into()),
        ("string", "größer 🦀".into()),
        ("empty", "".into()),
        ("u64", u64::MAX.into()),
        ("i64", i64::MIN.into()),
        ("f64", f64::MIN_POSITIVE.into()),
        ("u8s", vec![0_u8, 255].into()),
        ("i8s", vec![-128_i8, 127].into()),
        ("u16s", vec![0_u16, 65535].into()),
        ("i16s", vec![i16::MIN, i16::MAX].into()),
        ("u32s", vec![0_u32, u32::MAX].into()),
        ("i32s", vec![i32::MIN, i32::MAX].into()),
        ("f32s", vec![-0.0_f32, f32::INFINITY].into()),
        ("bools", vec![true, false, true].into()),
        ("strings", Value::from(["<s>", "", "▁a"].as_slice())),
        ("u64s", vec![u64::MAX].into()),
        ("i64s", vec![i64::MIN].into()),
        ("f64s", vec![0.1_f64].into()),
        ("none", Vec::<f32>::new().into()),
        ("nested", nested.into()),
    ]
    .into_iter()
    .collect()
}

fn decl(name: &str, kind: BlockType, shape: &[usize]) -> TensorDecl {
    TensorDecl {
        name: name.to_owned(),
        kind,
        shape: shape.to_vec(),
    }
}

/// Bytes that differ from place to place.
fn pattern(len: u64) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

fn write(path: &Path, metadata: &Metadata, decls: &[TensorDecl]) -> Vec<Vec<u8>> {
    let data: Vec<Vec<u8>> = decls
        .iter()
        .map(|decl| pattern(decl.bytes().unwrap()))
        .collect();
    let tensors: Vec<_> = decls
        .iter()
        .cloned()
        .zip(data.iter().map(Vec::as_slice))
        .collect();
    gguf::write_whole(path, metadata, &tensors).unwrap();
    data
}

fn temporary(name: &str) -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join(name);
    (folder, path)
}

fn some_tensors() -> Vec<TensorDecl> {
    vec![
        decl(names::TOKEN_EMBD, BlockType::Q4_0, &[32, 3]),
        decl(&names::block(0, names::ATTN_NORM), BlockType::F32, &[5]),
        decl(
            &names::experts(0, names::FFN_UP),
            BlockType::Q6_K,
            &[256, 2, 4],
        ),
        decl("four.dimensions", BlockType::BF16, &[1, 2, 3, 4]),
    ]
}
