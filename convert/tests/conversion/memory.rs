//! Memory does not grow with the checkpoint.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::common::*;

/// A checkpoint of zeros whose files take no room: a dense layer with 32,000 rows of 4096 weights in its
/// embeddings, about 600 MB in all.
fn write_sparse(folder: &Path) -> u64 {
    let (hidden, ffn, vocab) = (4096, 4096, 32000);
    let mut config = config(0);
    config["hidden_size"] = json!(hidden);
    config["intermediate_size"] = json!(ffn);
    config["vocab_size"] = json!(vocab);
    config["num_hidden_layers"] = json!(1);
    begin(folder, "config.json", &config);
    let head = hidden / HEADS;
    let layer = "model.layers.0";
    let shapes = [
        ("model.embed_tokens".to_owned(), vec![vocab, hidden]),
        ("model.norm".to_owned(), vec![hidden]),
        ("lm_head".to_owned(), vec![vocab, hidden]),
        (format!("{layer}.input_layernorm"), vec![hidden]),
        (format!("{layer}.self_attn.q_proj"), vec![hidden, hidden]),
        (
            format!("{layer}.self_attn.k_proj"),
            vec![KV_HEADS * head, hidden],
        ),
        (
            format!("{layer}.self_attn.v_proj"),
            vec![KV_HEADS * head, hidden],
        ),
        (format!("{layer}.self_attn.o_proj"), vec![hidden, hidden]),
        (format!("{layer}.post_attention_layernorm"), vec![hidden]),
        (format!("{layer}.mlp.gate_proj"), vec![ffn, hidden]),
        (format!("{layer}.mlp.up_proj"), vec![ffn, hidden]),
        (format!("{layer}.mlp.down_proj"), vec![hidden, ffn]),
    ];
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in shapes {
        let begin = end;
        end += 2 * shape.iter().product::<usize>();
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]});
        header.insert(format!("{name}.weight"), entry);
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = File::create(folder.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes())
        .unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len((8 + header.len() + end) as u64).unwrap();
    end as u64
}

/// Runs a command to its end; the peak of its resident memory, mapped pages included (what the kernel reports after the
/// end would count the memory of this process, which it was forked from).
fn peak_of(command: &mut Command) -> u64 {
    let mut child = command.spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    let done = loop {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        if let Some(kib) = line.and_then(|line| line.trim().strip_suffix(" kB")) {
            peak = kib.trim().parse::<u64>().unwrap() << 10;
        }
        if let Some(done) = child.try_wait().unwrap() {
            break done;
        }
        thread::sleep(Duration::from_millis(1));
    };
    assert!(done.success());
    peak
}

#[cfg(target_os = "linux")]
#[test]
fn a_checkpoint_larger_than_the_memory_bound_stays_below_it() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("m"), dir.path().join("out.gguf"));
    let stored = write_sparse(&input);
    let mut command = Command::new(env!("CARGO_BIN_EXE_fewbit-convert"));
    command
        .arg(&input)
        .arg(&output)
        .args(["--type", "Q8_0", "--threads", "2"]);
    let peak = peak_of(&mut command);
    assert!(peak > 1 << 20, "it was seen");
    assert!(fs::metadata(&output).unwrap().len() > stored / 2);
    assert!(
        peak < 256 << 20 && peak < stored / 2,
        "{} MiB for {} MiB of weights",
        peak >> 20,
        stored >> 20
    );
}

/// The message of a conversion in 384 MiB of address space, where it must fail with one line.
fn failure_in_little_memory(input: &Path, more: &[&Path]) -> String {
    let output = Command::new("sh")
        .args(["-c", "ulimit -v 393216; exec \"$@\"", "sh"])
        .arg(env!("CARGO_BIN_EXE_fewbit-convert"))
        .arg(input)
        .arg(input.with_extension("gguf"))
        .args(["--type", "Q8_0", "--threads", "1"])
        .args(more)
        .env("MALLOC_ARENA_MAX", "1")
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    said
}

/// `count` zeros of a JSON list.
fn zeros(count: usize) -> String {
    let mut text = "0,".repeat(count);
    text.pop();
    text
}

#[cfg(target_os = "linux")]
#[test]
fn endless_lists_take_no_memory() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("m");
    write_hf(
        &folder,
        &config(0),
        safetensors::Dtype::BF16,
        &random_model(0),
    );

    let imatrix = dir.path().join("stats.dat");
    let mut bytes = (1_i32 << 20).to_le_bytes().to_vec();
    for entry in 0..1 << 20 {
        bytes.extend_from_slice(&4_i32.to_le_bytes());
        bytes.extend_from_slice(&i32::to_le_bytes(entry)); // its name
        bytes.extend_from_slice(&[0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    }
    fs::write(&imatrix, bytes).unwrap();
    let said = failure_in_little_memory(&folder, &[Path::new("--imatrix"), &imatrix]);
    assert!(said.contains("too many"), "{said}");

    fs::remove_file(folder.join("tokenizer.model")).unwrap();
    let tokenizer = folder.join("tokenizer.json");
    for (text, says) in [
        (
            format!(
                r#"{{"model": {{"type": "BPE", "vocab": {{}}, "merges": [[{}]]}}}}"#,
                zeros(24 << 20)
            ),
            "model: ",
        ),
        (
            format!(
                r#"{{"model": {{"type": "BPE", "vocab": {{}}, "merges": []}}, "normalizer": [{}]}}"#,
                zeros(24 << 20)
            ),
            "normalizer: ",
        ),
    ] {
        fs::write(&tokenizer, text).unwrap();
        let said = failure_in_little_memory(&folder, &[]);
        assert!(
            said.contains("tokenizer.json") && said.contains(says),
            "{said}"
        );
    }

    let header = format!(
        r#"{{"a": {{"dtype": "F32", "shape": [{}], "data_offsets": [0, 0]}}}}"#,
        zeros(7 << 20)
    );
    let shard = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    fs::write(folder.join("model.safetensors"), shard).unwrap();
    let said = failure_in_little_memory(&folder, &[]);
    assert!(said.contains("more than 4"), "{said}");

    fs::write(folder.join("config.json"), format!("[{}]", zeros(8 << 20))).unwrap();
    let said = failure_in_little_memory(&folder, &[]);
    assert!(
        said.contains("config.json") && said.contains("too many"),
        "{said}"
    );
}
