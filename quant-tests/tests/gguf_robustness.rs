//! The gate for damaged files: truncated anywhere, or with any header byte changed, a file is
//! read or refused with a message that names it; it never panics and never makes the reader
//! allocate without bound. One test alone in its process, so that the peak is its own.

use std::fs;
use std::path::{Path, PathBuf};

use fewbit::gguf::{self, Array, Metadata, TensorDecl, names};
use fewbit::quant::BlockType;
use quant_tests::allocator::{self, CountingAllocator};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// A small model with every kind of value and several types, and the length of its header.
fn write_model(path: &Path) -> usize {
    let tokens: Vec<String> = (0..200).map(|i| format!("token {i}")).collect();
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", "llama");
    metadata.insert("general.alignment", 32_u32);
    metadata.insert("llama.block_count", 2_u32);
    metadata.insert("llama.rope.freq_base", 1e6_f32);
    metadata.insert("tokenizer.ggml.tokens", tokens);
    metadata.insert("tokenizer.ggml.scores", vec![-1.0_f32; 200]);
    metadata.insert("tokenizer.ggml.token_type", vec![1_i32; 200]);
    metadata.insert("tokenizer.ggml.add_bos_token", true);
    metadata.insert(
        "nested",
        vec![Array::from(vec![1_u8]), Array::from(vec![2.0_f64])],
    );

    let mut decls = vec![(names::TOKEN_EMBD.to_owned(), BlockType::Q4_K, vec![256, 20])];
    for layer in 0..2 {
        decls.push((
            names::block(layer, names::ATTN_NORM),
            BlockType::F32,
            vec![256],
        ));
        decls.push((
            names::block(layer, names::ATTN_Q),
            BlockType::Q6_K,
            vec![256, 4],
        ));
        decls.push((
            names::experts(layer, names::FFN_UP),
            BlockType::Q8_0,
            vec![256, 3, 2],
        ));
        decls.push((
            names::expert(layer, names::FFN_DOWN, 0),
            BlockType::BF16,
            vec![256, 2],
        ));
    }
    let decls: Vec<TensorDecl> = decls
        .into_iter()
        .map(|(name, kind, shape)| TensorDecl { name, kind, shape })
        .collect();
    let zeros = vec![0; 1 << 16];
    let tensors: Vec<_> = decls
        .iter()
        .map(|decl| (decl.clone(), &zeros[..decl.bytes().unwrap() as usize]))
        .collect();
    gguf::write_whole(path, &metadata, &tensors).unwrap();
    gguf::read(path).unwrap().tensors[0].offset as usize
}

/// Reads a damaged file; a refusal is one line that names the file. Returns whether it was read.
fn survives(path: &Path, bytes: &[u8], damage: &str) -> bool {
    fs::write(path, bytes).unwrap();
    match gguf::read(path) {
        Ok(model) => {
            for tensor in &model.tensors {
                assert!(
                    tensor.offset + tensor.bytes <= bytes.len() as u64,
                    "{damage}: {tensor:?}"
                );
            }
            true
        }
        Err(error) => {
            let message = error.to_string();
            assert!(
                message.contains(path.to_str().unwrap()),
                "{damage}: {message}"
            );
            assert!(!message.contains('\n'), "{damage}: {message}");
            false
        }
    }
}

#[test]
fn damaged_files_are_read_or_refused_in_bounded_memory() {
    let folder = tempfile::TempDir::new().unwrap();
    let path: PathBuf = folder.path().join("model.gguf");
    let header = write_model(&path);
    let whole = fs::read(&path).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(1);

    for _ in 0..200 {
        let end = rng.random_range(0..whole.len());
        let read = survives(&path, &whole[..end], &format!("cut at {end}"));
        // Only the padding after the last tensor can be missed.
        assert!(!read || whole.len() - end < 32, "cut at {end}");
    }

    let mut read = 0;
    for _ in 0..2000 {
        let at = rng.random_range(0..header);
        let change = rng.random_range(1..=255_u8);
        let mut bytes = whole.clone();
        bytes[at] ^= change;
        read += usize::from(survives(&path, &bytes, &format!("byte {at} ^ {change}")));
    }
    // Letters of strings and numbers of arrays may change unseen; lengths, types and places may not.
    assert!((1..2000).contains(&read), "{read} of 2000 were read");

    let peak = allocator::peak();
    assert!(
        peak < 16 << 20,
        "{peak} bytes were allocated at a time for files of {} bytes",
        whole.len()
    );
}
