//! `fewbit doctor`: what it says of this machine, and the sizes that its forecasts rest on.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use fewbit::plan::known::{Known, MODELS};
use fewbit::plan::{Group, Sizes};
use fewbit_convert::Options;
use fewbit_convert::dry_run::DryRun;
use indicatif::ProgressBar;
use quant_tests::fixture::{self, binary};
use serde_json::{Value as Json, json};
use tempfile::TempDir;

fn doctor(home: &Path, arguments: &[&str]) -> Output {
    Command::new(binary())
        .arg("doctor")
        .args(arguments)
        .env("FEWBIT_HOME", home)
        .output()
        .unwrap()
}

#[track_caller]
fn stdout(output: Output) -> String {
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{error}");
    String::from_utf8(output.stdout).unwrap()
}

/// A configuration from which the converter plans without weights.
fn config(known: &Known) -> Json {
    let shape = known.shape();
    let mut config = json!({
        "model_type": if shape.is_moe() { "mixtral" } else { "llama" },
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": known.name.starts_with("SmolLM2"),
    });
    if shape.is_moe() {
        config["num_local_experts"] = json!(shape.experts);
        config["num_experts_per_tok"] = json!(shape.experts_used);
    }
    config
}

#[test]
fn sizes_are_those_that_the_converter_plans() {
    for known in &MODELS {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("config.json"), config(known).to_string()).unwrap();
        for typed in &known.types {
            let options = Options::new(typed.name.parse().unwrap());
            let plan = DryRun::new(folder.path(), &options, 4096, None, &ProgressBar::hidden())
                .unwrap()
                .json();
            let sum = |groups: &[Group]| -> u64 {
                let tensors = plan["tensors"].as_array().unwrap().iter();
                let of =
                    tensors.filter(|t| groups.contains(&Group::of(t["name"].as_str().unwrap())));
                of.map(|tensor| tensor["bytes"].as_u64().unwrap()).sum()
            };
            let what = format!("{} {}", known.name, typed.name);
            let ffn = sum(&[Group::Experts, Group::FeedForward]);
            assert_eq!(typed.ffn_bytes, ffn, "{what}");
            assert_eq!(typed.dense_bytes, sum(&Group::ALL) - ffn, "{what}");
            assert_eq!(plan["params_active"], known.params_active, "{what}");
            // What the forecast gives to the plan of memory is as much.
            let names = known.names();
            let shape = known.shape();
            let sizes = Sizes::of(
                shape.experts,
                shape.experts_used,
                known.weights(typed, &names),
            );
            let total = typed.dense_bytes + typed.ffn_bytes;
            assert!(
                sizes.bytes_total().abs_diff(total) < shape.layers as u64,
                "{what}"
            );
        }
    }
}

#[test]
fn the_machine_and_what_runs_on_it() {
    let home = TempDir::new().unwrap();
    let report: Json = serde_json::from_str(&stdout(doctor(
        home.path(),
        &["--json", "--memory", "20GiB"],
    )))
    .unwrap();
    assert!(report["limits"]["read_gb_s"].as_f64().unwrap() > 0.1);
    assert!(report["limits"]["int8_gop_s"].as_f64().unwrap() > 0.1);
    assert!(report["disk"]["gb_s"].as_f64().unwrap() > 0.0);
    let available = report["kernels_available"].as_array().unwrap();
    assert!(available.contains(&report["kernels"]));
    let models = report["models"].as_array().unwrap();
    assert_eq!(models.len(), MODELS.len() * 5);
    let row = |model: &str, kind: &str| {
        let found = models
            .iter()
            .find(|row| row["model"] == model && row["type"] == kind);
        found.unwrap()
    };
    let fits = |model, kind| row(model, kind)["fits"].as_str().unwrap();
    assert_eq!(fits("SmolLM2 135M", "Q8_0"), "memory");
    assert_eq!(fits("Mixtral 8x7B", "Q3_K_M"), "disk");
    assert_eq!(fits("Mixtral 8x7B", "Q8_0"), "disk");
    let speed = |model, kind| row(model, kind)["tok_s"].as_f64().unwrap();
    assert!(speed("SmolLM2 135M", "Q4_K_M") > speed("SmolLM2 1.7B", "Q4_K_M"));
    assert!(speed("Mixtral 8x7B", "Q3_K_M") > speed("Mixtral 8x7B", "Q8_0"));
    // What was written to be read again is gone.
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);

    let report: Json = serde_json::from_str(&stdout(doctor(
        home.path(),
        &["--json", "--memory", "1GiB"],
    )))
    .unwrap();
    let large = report["models"]
        .as_array()
        .unwrap()
        .iter()
        .find(|row| row["model"] == "Mixtral 8x22B");
    let large = large.unwrap();
    assert_eq!(
        (&large["fits"], &large["tok_s"]),
        (&json!("no"), &Json::Null)
    );
}

#[test]
fn one_file_is_forecast() {
    let (home, model) = (TempDir::new().unwrap(), fixture::tiny_mixtral("Q4_K_M"));
    let path = model.path.to_str().unwrap();
    let report: Json =
        serde_json::from_str(&stdout(doctor(home.path(), &["--json", "-m", path]))).unwrap();
    let [row] = &report["models"].as_array().unwrap()[..] else {
        panic!("{report}");
    };
    assert_eq!(
        (&row["type"], &row["fits"]),
        (&json!("Q4_K_M"), &json!("memory"))
    );
    assert!(row["tok_s"].as_f64().unwrap() > 1.0);
    let text = stdout(doctor(home.path(), &["-m", path]));
    for word in [
        "CPU",
        "kernels",
        "limits",
        "disk",
        "GPU",
        "Q4_K_M",
        "in memory",
        "tok/s",
    ] {
        assert!(text.contains(word), "{word}: {text}");
    }
    assert_eq!(
        doctor(home.path(), &["-m", "nothing"]).status.code(),
        Some(1)
    );
}
