//! Memory does not grow with the checkpoint.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;

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

/// The peak of resident memory, mapped pages included, over all children of this process so far.
fn peak_of_children() -> u64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: `usage` has room for the result, which is read only if the call succeeded.
    let usage = unsafe {
        assert_eq!(
            libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr()),
            0
        );
        usage.assume_init()
    };
    usage.ru_maxrss as u64 * if cfg!(target_os = "macos") { 1 } else { 1024 }
}

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
    assert!(command.status().unwrap().success());
    assert!(fs::metadata(&output).unwrap().len() > stored / 2);
    let peak = peak_of_children();
    assert!(
        peak < 256 << 20 && peak < stored / 2,
        "{} MiB for {} MiB of weights",
        peak >> 20,
        stored >> 20
    );
}
