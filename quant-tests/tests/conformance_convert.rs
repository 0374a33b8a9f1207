//! fewbit-convert against llama-quantize: the same tensors in the same order, equal to the bit.
//!
//! `cargo test -p quant-tests --features ggml --test conformance_convert`
#![cfg(feature = "ggml")]

use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};

use fewbit::gguf::{self, Array, Gguf, Metadata, TensorDecl, Value, write_whole};
use fewbit::quant::BlockType;
use fewbit_convert::recipe::{Mix, ftype_id};
use fewbit_convert::{Options, convert};
use ggml_sys_bindings::sys;
use indicatif::ProgressBar;
use quant_tests::rows::SplitMix64;

/// An importance matrix as llama-quantize hands it on: values by tensor.
type Importances = Vec<(String, Vec<f32>)>;

/// What llama-quantize does with `input`.
fn llama_quantize(input: &Path, output: &Path, mix: Mix, importances: &Importances) {
    let path = |p: &Path| CString::new(p.to_str().expect("UTF-8")).expect("no zero byte");
    let (input, output) = (path(input), path(output));
    let names: Vec<CString> = importances
        .iter()
        .map(|(name, _)| CString::new(name.as_str()).expect("no zero byte"))
        .collect();
    let entry =
        |(name, (_, values)): (&CString, &(String, Vec<f32>))| sys::llama_model_imatrix_data {
            name: name.as_ptr(),
            data: values.as_ptr(),
            size: values.len(),
        };
    let mut entries: Vec<_> = names.iter().zip(importances).map(entry).collect();
    entries.push(sys::llama_model_imatrix_data {
        name: std::ptr::null(),
        data: std::ptr::null(),
        size: 0,
    });
    ggml_sys_bindings::log_errors_only();
    // SAFETY: the paths are C strings; the entries end with a null name and, like all that they point
    // to, outlive the call.
    let failed = unsafe {
        sys::llama_backend_init();
        let mut params = sys::llama_model_quantize_default_params();
        params.ftype = ftype_id(mix);
        params.nthread = 2;
        if !importances.is_empty() {
            params.imatrix = entries.as_ptr();
        }
        sys::llama_model_quantize(input.as_ptr(), output.as_ptr(), &params)
    };
    assert_eq!(failed, 0, "llama.cpp quantizes to {mix}");
}

fn ours(input: &Path, output: &Path, options: &Options) {
    let options = Options {
        force: true,
        ..options.clone()
    };
    convert(input, output, &options, &ProgressBar::hidden()).expect("converted");
}

/// Name, type, shape and bytes of every tensor, in the file's order.
fn tensors(path: &Path) -> Vec<(String, BlockType, Vec<usize>, Vec<u8>)> {
    let gguf: Gguf = gguf::read(path).expect("a sound file");
    let file = fs::read(path).expect("readable");
    let bytes = |t: &gguf::TensorInfo| file[t.offset as usize..][..t.bytes as usize].to_vec();
    gguf.tensors
        .iter()
        .map(|t| (t.name.clone(), t.kind, t.shape.clone(), bytes(t)))
        .collect()
}

fn assert_same_tensors(theirs: &Path, ours: &Path, mix: Mix) {
    let (theirs, ours) = (tensors(theirs), tensors(ours));
    assert_eq!(theirs.len(), ours.len(), "{mix}");
    for (theirs, ours) in theirs.iter().zip(&ours) {
        assert_eq!(
            (&theirs.0, theirs.1, &theirs.2),
            (&ours.0, ours.1, &ours.2),
            "{mix}"
        );
        assert!(theirs.3 == ours.3, "{mix}: bytes of {} differ", ours.0);
    }
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-mixtral")
}

#[test]
fn every_mix_of_a_mixtral_is_llama_quantizes_file_byte_for_byte() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    ours(&fixture(), &at("bf16.gguf"), &Options::new(Mix::BF16));
    for mix in Mix::all() {
        llama_quantize(&at("bf16.gguf"), &at("theirs.gguf"), mix, &Vec::new());
        let theirs = fs::read(at("theirs.gguf")).expect("readable");
        for input in [at("bf16.gguf"), fixture()] {
            ours(&input, &at("ours.gguf"), &Options::new(mix));
            assert_same_tensors(&at("theirs.gguf"), &at("ours.gguf"), mix);
            assert!(
                theirs == fs::read(at("ours.gguf")).expect("readable"),
                "{mix}: headers differ"
            );
        }
    }
}

#[test]
fn every_mix_with_an_imatrix_has_llama_quantizes_tensors() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    ours(&fixture(), &at("f32.gguf"), &Options::new(Mix::F32));
    let importances = write_imatrix(
        &at("imatrix.gguf"),
        &gguf::read(&at("f32.gguf")).expect("a sound file"),
    );
    for mix in Mix::all() {
        llama_quantize(&at("f32.gguf"), &at("theirs.gguf"), mix, &importances);
        let options = Options {
            imatrix: Some(at("imatrix.gguf")),
            ..Options::new(mix)
        };
        ours(&at("f32.gguf"), &at("ours.gguf"), &options);
        assert_same_tensors(&at("theirs.gguf"), &at("ours.gguf"), mix);
    }
}

/// Writes an imatrix for all matrices of the layers; every fourth expert saw no token.
fn write_imatrix(path: &Path, model: &Gguf) -> Importances {
    let mut rng = SplitMix64::new(7);
    let mut random = move || (rng.next_u64() >> 40) as f32 / (1 << 14) as f32 + 0.01;
    let mut importances = Importances::new();
    let mut written = Vec::new();
    for info in model
        .tensors
        .iter()
        .filter(|t| t.name.contains("attn_") || t.name.contains("_exps"))
    {
        let (columns, experts) = (info.columns(), info.shape.get(2).copied().unwrap_or(1));
        let sums: Vec<f32> = (0..columns * experts).map(|_| random()).collect();
        let counts: Vec<f32> = (0..experts)
            .map(|e| if e % 4 == 3 { 0.0 } else { (e + 5) as f32 })
            .collect();
        let value = |(i, &sum): (usize, &f32)| match counts[i / columns] {
            0.0 => 1.0,
            count => sum / count,
        };
        importances.push((
            info.name.clone(),
            sums.iter().enumerate().map(value).collect(),
        ));
        for (suffix, shape, values) in [
            ("in_sum2", vec![columns, experts], sums),
            ("counts", vec![1, experts], counts.clone()),
        ] {
            let decl = TensorDecl {
                name: format!("{}.{suffix}", info.name),
                kind: BlockType::F32,
                shape,
            };
            written.push((decl, bytes_of(&values)));
        }
    }
    let meta: Metadata = [
        ("general.type", Value::String("imatrix".into())),
        (
            "imatrix.datasets",
            Value::Array(Array::String(vec!["random".into()])),
        ),
        ("imatrix.chunk_count", Value::U32(1)),
        ("imatrix.chunk_size", Value::U32(512)),
    ]
    .into_iter()
    .collect();
    write(path, &meta, &written);
    importances
}

#[test]
fn dense_recipes_and_row_fallbacks_are_llama_quantizes() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    // Rows of 256 hold every block, those of 288 blocks of 32 only, those of 200 none.
    for (columns, tied) in [
        (256, false),
        (256, true),
        (288, false),
        (288, true),
        (200, false),
    ] {
        write_dense(&at("f32.gguf"), columns, tied);
        for mix in Mix::all() {
            llama_quantize(&at("f32.gguf"), &at("theirs.gguf"), mix, &Vec::new());
            ours(&at("f32.gguf"), &at("ours.gguf"), &Options::new(mix));
            assert_same_tensors(&at("theirs.gguf"), &at("ours.gguf"), mix);
        }
    }
}

/// A dense model of 16 layers whose matrices have a few random rows: enough for a quantizer.
fn write_dense(path: &Path, columns: usize, tied: bool) {
    const LAYERS: usize = 16;
    let mut rng = SplitMix64::new(columns as u64);
    let mut random = move || (rng.next_u64() >> 40) as f32 / (1 << 23) as f32 - 1.0;
    let meta: Metadata = [
        ("general.architecture", Value::String("llama".into())),
        ("llama.block_count", Value::U32(LAYERS as u32)),
        ("llama.context_length", Value::U32(512)),
        ("llama.embedding_length", Value::U32(columns as u32)),
        ("llama.feed_forward_length", Value::U32(columns as u32)),
        ("llama.attention.head_count", Value::U32(4)),
        ("llama.vocab_size", Value::U32(64)),
        ("llama.attention.head_count_kv", Value::U32(1)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
    ]
    .into_iter()
    .collect();
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: Vec<usize>| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| random()).collect();
        tensors.push((
            TensorDecl {
                name,
                kind: BlockType::F32,
                shape,
            },
            bytes_of(&values),
        ));
    };
    add("token_embd.weight".into(), vec![columns, 4]);
    add("output_norm.weight".into(), vec![columns]);
    if !tied {
        add("output.weight".into(), vec![columns, 4]);
    }
    for layer in 0..LAYERS {
        add(format!("blk.{layer}.attn_norm.weight"), vec![columns]);
        for part in [
            "attn_q",
            "attn_k",
            "attn_v",
            "attn_output",
            "ffn_gate",
            "ffn_up",
            "ffn_down",
        ] {
            add(format!("blk.{layer}.{part}.weight"), vec![columns, 4]);
        }
    }
    write(path, &meta, &tensors);
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn write(path: &Path, meta: &Metadata, tensors: &[(TensorDecl, Vec<u8>)]) {
    let borrowed: Vec<(TensorDecl, &[u8])> = tensors
        .iter()
        .map(|(d, b)| (d.clone(), b.as_slice()))
        .collect();
    write_whole(path, meta, &borrowed).expect("written");
}
