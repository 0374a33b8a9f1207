//! `fewbit inspect` as scripts and people see it: output, exit codes, errors.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use fewbit::gguf::{self, Metadata, TensorDecl, names};
use fewbit::plan::Shape;
use fewbit::quant::BlockType;
use tempfile::TempDir;

fn inspect(arguments: &[&str], file: &Path) -> Output {
    command(arguments, file).output().unwrap()
}

fn command(arguments: &[&str], file: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fewbit"));
    command.arg("inspect").args(arguments).arg(file);
    command
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

/// The one line that a failed command leaves on standard error.
#[track_caller]
fn failure(output: &Output) -> &str {
    assert_eq!(output.status.code(), Some(1));
    let line = std::str::from_utf8(&output.stderr)
        .unwrap()
        .strip_suffix('\n')
        .unwrap();
    assert!(!line.contains('\n'), "{line}");
    line
}

/// Metadata of a mixture of 4 experts, 2 of which work on a token.
fn small_mixture() -> Metadata {
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", "llama");
    for (key, value) in [
        ("block_count", 2_u32),
        ("context_length", 64),
        ("embedding_length", 32),
        ("feed_forward_length", 64),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("expert_count", 4),
        ("expert_used_count", 2),
        ("vocab_size", 10),
    ] {
        metadata.insert(format!("llama.{key}"), value);
    }
    metadata.insert("tokenizer.ggml.scores", vec![0.5_f32; 1000]);
    metadata
}

/// Writes a model of zeros with `kind` for its matrices, after `change` has seen the tensors.
fn write_model(
    folder: &Path,
    kind: BlockType,
    change: impl FnOnce(&mut Vec<(TensorDecl, Vec<u8>)>),
) -> PathBuf {
    let metadata = small_mixture();
    let shape = Shape::from_metadata(&metadata).unwrap();
    let mut tensors = Vec::new();
    for (name, shape) in shape.tensors(false) {
        let kind = if shape.len() == 1 {
            BlockType::F32
        } else {
            kind
        };
        let decl = TensorDecl { name, kind, shape };
        let zeros = vec![0; decl.bytes().unwrap() as usize];
        tensors.push((decl, zeros));
    }
    change(&mut tensors);
    write(&folder.join("model.gguf"), &metadata, &tensors)
}

fn write(path: &Path, metadata: &Metadata, tensors: &[(TensorDecl, Vec<u8>)]) -> PathBuf {
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(decl, data)| (decl.clone(), data.as_slice()))
        .collect();
    gguf::write_whole(path, metadata, &tensors).unwrap();
    path.to_owned()
}

#[test]
fn json_has_the_keys_that_scripts_rely_on() {
    let folder = TempDir::new().unwrap();
    let path = write_model(folder.path(), BlockType::Q8_0, |_| ());
    let output = inspect(&["--json"], &path);
    assert!(output.status.success());
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let keys: Vec<&String> = json.as_object().unwrap().keys().collect();
    let wanted = [
        "arch",
        "params_total",
        "params_active",
        "bits_per_weight",
        "file_bytes",
        "tensors",
        "metadata",
    ];
    assert_eq!(keys, wanted);
    assert_eq!(json["arch"], "llama");
    // Per layer: norms, four projections, router, 4 experts of 3 · 32 · 64; then embedding, norm, head.
    let expert = 3 * 32 * 64;
    let rest = 2 * (2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 32 * 4) + 2 * 320 + 32;
    assert_eq!(json["params_total"], 2 * 4 * expert + rest);
    assert_eq!(json["params_active"], 2 * 2 * expert + rest);
    assert_eq!(json["file_bytes"], std::fs::metadata(&path).unwrap().len());
    let read = gguf::read(&path).unwrap();
    assert_eq!(
        json["tensors"].as_array().unwrap().len(),
        read.tensors.len()
    );
    let first = &read.tensors[0];
    assert_eq!(
        json["tensors"][0],
        serde_json::json!({
            "name": "token_embd.weight", "type": "Q8_0", "shape": [32, 10],
            "offset": first.offset, "bytes": 10 * 34,
        })
    );
    assert_eq!(json["metadata"]["llama.expert_count"], 4);
    assert_eq!(json["metadata"]["tokenizer.ggml.scores"]["len"], 1000);
}

#[test]
fn text_shows_totals_groups_and_an_experts_slabs() {
    let folder = TempDir::new().unwrap();
    let path = write_model(folder.path(), BlockType::Q8_0, |_| ());
    let output = inspect(&[], &path);
    assert!(output.status.success());
    let text = stdout(&output);
    let gate = gguf::read(&path)
        .unwrap()
        .tensor(&names::experts(1, names::FFN_GATE))
        .unwrap()
        .offset;
    // One expert's gate is 64 rows of 34 bytes, and there are three such parts.
    for part in [
        "4 a layer, 2 work",
        &format!("Q8_0 2176 @ {gate}"),
        "6.53 kB",
        "router",
        "llama.block_count",
    ] {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
}

#[test]
fn a_sound_file_passes_the_check_in_every_type() {
    let folder = TempDir::new().unwrap();
    let tensors: Vec<_> = BlockType::ALL
        .iter()
        .map(|&kind| {
            let decl = TensorDecl {
                name: kind.name().to_owned(),
                kind,
                shape: vec![256, 300],
            };
            let zeros = vec![0; decl.bytes().unwrap() as usize];
            (decl, zeros)
        })
        .collect();
    assert!(tensors.len() > 10);
    let path = write(
        &folder.path().join("types.gguf"),
        &Metadata::new(),
        &tensors,
    );
    let output = inspect(&["--check"], &path);
    assert!(output.status.success());
    assert!(stdout(&output).contains("every weight is finite"));
    // Without an architecture it is no model, and is shown all the same.
    assert!(stdout(&output).contains("general.architecture: is missing"));
}

#[test]
fn the_check_reports_nan_and_infinity_by_tensor_and_row() {
    let folder = TempDir::new().unwrap();
    let decl = |name: &str, kind, shape: &[usize]| TensorDecl {
        name: name.to_owned(),
        kind,
        shape: shape.to_vec(),
    };
    // Row 1400 lies beyond the first chunk that is decoded at a time.
    let mut floats = vec![0.0_f32; 50 * 1500];
    floats[1400 * 50 + 7] = f32::NAN;
    floats[1499 * 50 + 49] = f32::NEG_INFINITY;
    let floats = floats.iter().flat_map(|x| x.to_le_bytes()).collect();
    // The scale of the third block, which is row 1's first, is a half-precision infinity.
    let mut blocks = vec![1; 4 * 18];
    blocks[2 * 18..][..2].copy_from_slice(&0x7c00_u16.to_le_bytes());
    let tensors = [
        (decl("sound", BlockType::F16, &[8]), vec![0; 16]),
        (decl("floats", BlockType::F32, &[50, 1500]), floats),
        (decl("blocks", BlockType::Q4_0, &[64, 2]), blocks),
    ];
    let path = write(&folder.path().join("bad.gguf"), &Metadata::new(), &tensors);
    let output = inspect(&["--check", "--json"], &path);
    let line = failure(&output);
    assert!(
        line.contains("bad.gguf") && line.contains("2 of 3 tensors") && line.contains("floats"),
        "{line}"
    );
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        json["check"],
        serde_json::json!({"ok": false, "tensors": [
            {"name": "floats", "nan": 1, "inf": 1, "row": 1400, "column": 7},
            {"name": "blocks", "nan": 0, "inf": 32, "row": 1, "column": 0},
        ]})
    );
    assert!(
        stdout(&inspect(&["--check"], &path))
            .contains("floats: 1 NaN, 1 infinite, the first in row 1400, column 7")
    );
}

#[test]
fn a_file_that_is_none_fails_with_one_line_that_names_it() {
    let folder = TempDir::new().unwrap();
    let absent = folder.path().join("absent.gguf");
    assert!(failure(&inspect(&[], &absent)).contains("absent.gguf"));
    let text = folder.path().join("text.gguf");
    std::fs::write(&text, "hello").unwrap();
    assert!(failure(&inspect(&["--json"], &text)).contains("not a GGUF file"));
    let cut = write_model(folder.path(), BlockType::F16, |_| ());
    std::fs::OpenOptions::new()
        .write(true)
        .open(&cut)
        .unwrap()
        .set_len(30_000)
        .unwrap();
    assert!(failure(&inspect(&["--check"], &cut)).contains("the file ends at byte 30000"));
}

#[test]
fn wrong_usage_exits_with_2() {
    assert_eq!(
        inspect(&["--nonsense"], Path::new("model.gguf"))
            .status
            .code(),
        Some(2)
    );
}

#[test]
fn a_reader_that_hangs_up_early_is_no_failure() {
    let folder = TempDir::new().unwrap();
    // More output than a pipe holds.
    let path = write_model(folder.path(), BlockType::F16, |tensors| {
        for index in 0..4000 {
            let decl = TensorDecl {
                name: format!("filler.{index}"),
                kind: BlockType::F32,
                shape: vec![1],
            };
            tensors.push((decl, vec![0; 4]));
        }
    });
    for arguments in [&[][..], &["--json"]] {
        let mut child = command(arguments, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut start = [0; 10];
        child.stdout.take().unwrap().read_exact(&mut start).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{:?}", output.stderr);
        assert!(output.stderr.is_empty());
    }
}
