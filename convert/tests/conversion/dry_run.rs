//! `--dry-run`: figures from metadata alone, and the same as the conversion's.

use std::fs;
use std::process::Command;

use fewbit_convert::Options;
use fewbit_convert::dry_run::DryRun;
use fewbit_convert::recipe::Mix;
use fewbit_convert::round::Round;
use fewbit_convert::round::estimate::{self, Work};
use indicatif::ProgressBar;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::common;

/// `config.json` of Mixtral-8x7B-v0.1, as published.
const MIXTRAL_8X7B: &str = r#"{
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
    "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "output_router_logits": false, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02, "sliding_window": null, "tie_word_embeddings": false,
    "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": true, "vocab_size": 32000
}"#;

fn command(arguments: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_fewbit-convert"))
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn mixtral_has_46_7_billion_parameters_of_which_12_9_work() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), MIXTRAL_8X7B).unwrap();
    let run = DryRun::new(
        folder.path(),
        &Options::new(Mix::Q4_K_M),
        4096,
        None,
        &ProgressBar::hidden(),
    )
    .unwrap();
    let figures = run.json();
    assert_eq!(figures["params_total"], 46_702_792_704_u64);
    assert_eq!(figures["params_active"], 12_879_925_248_u64);
    assert_eq!(figures["tensors"].as_array().unwrap().len(), 3 + 32 * 10);
    // 32 layers · 2 · 8 heads · 128 values · 4096 positions · 2 bytes.
    let weights: u64 = figures["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t["bytes"].as_u64().unwrap())
        .sum();
    let kv_cache = 32 * 2 * 8 * 128 * 4096 * 2;
    assert!(
        run.ram_bytes() > weights + kv_cache && run.ram_bytes() < weights + kv_cache + 500_000_000
    );

    let text = run.to_string();
    for part in [
        "46.7 B in all, 12.9 B at work",
        "context of 4096",
        "KV cache 536.9 MB",
        "file        about 28.",
    ] {
        assert!(text.contains(part), "no {part:?} in:\n{text}");
    }
}

#[test]
fn tensors_are_listed_with_the_recipes_types() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), MIXTRAL_8X7B).unwrap();
    let figures = DryRun::new(
        folder.path(),
        &Options::new(Mix::Q4_K_M),
        512,
        None,
        &ProgressBar::hidden(),
    )
    .unwrap()
    .json();
    let tensor = |name: &str| {
        figures["tensors"]
            .as_array()
            .unwrap()
            .iter()
            .find(|tensor| tensor["name"] == name)
            .unwrap()
            .clone()
    };
    assert_eq!(
        tensor("blk.31.ffn_down_exps.weight"),
        json!({
            "name": "blk.31.ffn_down_exps.weight", "type": "Q6_K", "shape": [14336, 4096, 8],
            "bytes": 14336_u64 / 256 * 210 * 4096 * 8,
        })
    );
    assert_eq!(tensor("blk.0.ffn_gate_inp.weight")["type"], "F32");
    assert_eq!(tensor("blk.4.ffn_down_exps.weight")["type"], "Q4_K");
}

#[test]
fn the_time_of_rounding_is_told_and_wider_windows_take_longer() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), MIXTRAL_8X7B).unwrap();
    let run = |round| {
        let mut options = Options::new(Mix::Q4_K_M);
        (options.round, options.threads) = (round, 2);
        DryRun::new(folder.path(), &options, 512, None, &ProgressBar::hidden()).unwrap()
    };
    assert_eq!(run(Round::Ggml).json()["round_seconds"], Value::Null);
    let [best, gptq] = [Round::Best, Round::Gptq].map(run);
    let seconds = |run: &DryRun| run.json()["round_seconds"].as_f64().unwrap();
    assert!(seconds(&best) > 60.0 && seconds(&gptq) > seconds(&best));
    assert!(gptq.to_string().contains("by gptq on 2 threads"), "{gptq}");

    let work = [Work {
        kind: fewbit::quant::BlockType::Q4_K,
        columns: 4096,
        rows: 4096,
        experts: 1,
    }];
    let [narrow, wide] = [256, 4096].map(|width| estimate::seconds(Round::Gptq, &work, width));
    assert!(narrow < wide, "{narrow} {wide}");
}

#[test]
fn a_longer_context_takes_more_ram_and_no_more_file() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), MIXTRAL_8X7B).unwrap();
    let run = |ctx| {
        DryRun::new(
            folder.path(),
            &Options::new(Mix::Q5_K_M),
            ctx,
            None,
            &ProgressBar::hidden(),
        )
        .unwrap()
    };
    let (short, long) = (run(4096), run(32768));
    assert_eq!(
        long.ram_bytes() - short.ram_bytes(),
        7 * 32 * 2 * 8 * 128 * 4096 * 2
    );
    assert_eq!(long.file_bytes(), short.file_bytes());
}

#[test]
fn a_complete_checkpoints_file_has_the_announced_length() {
    let folder = tempfile::tempdir().unwrap();
    for experts in [0, 8] {
        let model = folder.path().join(format!("{experts}-experts"));
        common::write_hf(
            &model,
            &common::config(experts),
            Dtype::BF16,
            &common::random_model(experts),
        );
        for mix in [Mix::Q4_K_M, Mix::Q8_0, Mix::F16] {
            let announced = DryRun::new(
                &model,
                &Options::new(mix),
                4096,
                None,
                &ProgressBar::hidden(),
            )
            .unwrap();
            let (file, gguf) = common::converted(&model, mix);
            assert_eq!(
                announced.file_bytes(),
                fs::metadata(file).unwrap().len(),
                "{experts} experts, {mix}"
            );
            let figures = announced.json();
            for (announced, written) in figures["tensors"]
                .as_array()
                .unwrap()
                .iter()
                .zip(&gguf.tensors)
            {
                assert_eq!(announced["name"], written.name);
                assert_eq!(announced["type"], written.kind.name());
                assert_eq!(announced["bytes"], written.bytes);
            }
        }
    }
}

#[test]
fn json_is_one_object_and_the_missing_tokenizer_is_told_apart_from_it() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), MIXTRAL_8X7B).unwrap();
    let output = command(&[
        "--dry-run",
        folder.path().to_str().unwrap(),
        "--json",
        "--type",
        "Q5_K_M",
        "--ctx",
        "512",
    ]);
    assert_eq!(output.status.code(), Some(0));
    let figures: Value = serde_json::from_slice(&output.stdout).unwrap();
    let keys: Vec<&String> = figures.as_object().unwrap().keys().collect();
    assert_eq!(
        keys,
        [
            "params_total",
            "params_active",
            "file_bytes",
            "ram_bytes",
            "kv_bytes_by_type",
            "plan",
            "tensors"
        ]
    );
    // 32 layers, 8 heads of 128 keys and 128 values, 512 tokens; 8.5 and 4.5 bits a value in blocks.
    let values = 32 * 8 * 256 * 512;
    let costs = json!({"F16": values * 2, "Q8_0": values * 17 / 16, "Q4_0": values * 9 / 16});
    assert_eq!(figures["kv_bytes_by_type"], costs);
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("without the tokenizer")
    );
}

#[test]
fn a_broken_tokenizer_is_no_missing_one() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), MIXTRAL_8X7B).unwrap();
    fs::write(folder.path().join("tokenizer.json"), "{").unwrap();
    let refused = DryRun::new(
        folder.path(),
        &Options::new(Mix::Q4_K_M),
        512,
        None,
        &ProgressBar::hidden(),
    )
    .unwrap_err();
    assert!(refused.to_string().contains("tokenizer.json"), "{refused}");
}

#[test]
fn what_falls_back_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = common::config(0);
    config["hidden_size"] = json!(192);
    config["head_dim"] = json!(48);
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let text = DryRun::new(
        folder.path(),
        &Options::new(Mix::Q4_K_S),
        512,
        None,
        &ProgressBar::hidden(),
    )
    .unwrap()
    .to_string();
    assert!(
        text.contains("blk.0.attn_q.weight and 1 more: 192 columns"),
        "{text}"
    );
}

#[test]
fn a_folder_without_configuration_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let output = command(&["--dry-run", folder.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        error.contains("config.json") && error.lines().count() == 1,
        "{error}"
    );
}

#[test]
fn only_a_conversion_needs_an_output_and_a_type() {
    assert_eq!(command(&["somewhere"]).status.code(), Some(2));
    assert_eq!(command(&["somewhere", "out.gguf"]).status.code(), Some(2));
    assert_eq!(
        command(&["somewhere", "out.gguf", "--type", "Q4_K_M", "--ctx", "512"])
            .status
            .code(),
        Some(2)
    );
    assert_eq!(command(&[]).status.code(), Some(2));
    assert_eq!(
        command(&[
            "synth",
            "mixtral-8x7b",
            "out.gguf",
            "--type",
            "Q4_K_M",
            "--layers",
            "0"
        ])
        .status
        .code(),
        Some(2)
    );
    assert_eq!(
        command(&["synth", "gpt-2", "out.gguf", "--type", "Q4_K_M"])
            .status
            .code(),
        Some(2)
    );
}
