//! Synthetic files: whole, readable, and with weights that behave.

use std::fs;
use std::path::Path;

use fewbit::gguf::{self, Gguf};
use fewbit::quant::BlockType;
use fewbit_convert::Error;
use fewbit_convert::config::ModelConfig;
use fewbit_convert::recipe::Mix;
use fewbit_convert::synth::{Options, Preset, synth};
use indicatif::ProgressBar;

/// Mixtral's graph, small.
fn tiny() -> ModelConfig {
    ModelConfig {
        vocab: 512,
        context: 512,
        hidden: 256,
        layers: 2,
        ffn: 512,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        ..Preset::Mixtral8x7b.config()
    }
}

fn options(config: ModelConfig, mix: Mix) -> Options {
    Options {
        name: "test".to_owned(),
        config,
        mix,
        seed: 7,
        zipf: 0.0,
        force: false,
    }
}

fn write(path: &Path, options: &Options) -> Gguf {
    synth(path, options, &ProgressBar::hidden()).unwrap();
    gguf::read(path).unwrap()
}

/// All weights of a tensor.
fn decoded(path: &Path, file: &Gguf, name: &str) -> Vec<f32> {
    let tensor = file.tensors.iter().find(|t| t.name == name).unwrap();
    let bytes = &fs::read(path).unwrap()[tensor.offset as usize..][..tensor.bytes as usize];
    let columns = tensor.shape[0];
    let mut weights = vec![0.0; tensor.shape.iter().product()];
    let rows = bytes.chunks_exact(tensor.kind.row_bytes(columns).unwrap());
    for (bytes, weights) in rows.zip(weights.chunks_exact_mut(columns)) {
        tensor.kind.decode_row(bytes, weights);
    }
    weights
}

#[test]
fn every_mix_gives_finite_weights_of_the_announced_deviation() {
    let folder = tempfile::tempdir().unwrap();
    for mix in Mix::all() {
        let path = folder.path().join(mix.name());
        let file = write(&path, &options(tiny(), mix));
        for (name, expected) in [
            ("token_embd.weight", 1.0),
            ("output.weight", 1.0 / 16.0),
            ("blk.0.attn_q.weight", 1.0 / 16.0),
            ("blk.1.ffn_gate_exps.weight", 1.0 / 16.0),
            ("blk.1.ffn_down_exps.weight", 1.0 / (512.0_f32 * 4.0).sqrt()),
            ("blk.0.ffn_gate_inp.weight", 1.0 / 16.0),
        ] {
            let weights = decoded(&path, &file, name);
            assert!(weights.iter().all(|w| w.is_finite()), "{mix} {name}");
            let count = weights.len() as f64;
            let mean = weights.iter().map(|&w| f64::from(w)).sum::<f64>() / count;
            let deviation =
                (weights.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>() / count).sqrt() as f32;
            assert!(
                (deviation / expected - 1.0).abs() < 0.06,
                "{mix} {name}: {deviation}, not {expected}"
            );
            assert!(
                mean.abs() < 0.1 * f64::from(expected),
                "{mix} {name}: mean {mean}"
            );
        }
        assert!(
            decoded(&path, &file, "blk.1.ffn_norm.weight")
                .iter()
                .all(|&w| w == 1.0)
        );
        assert_eq!(
            file.metadata
                .require_strings("tokenizer.ggml.tokens")
                .unwrap()
                .len(),
            512
        );
    }
}

#[test]
fn bytes_depend_on_the_seed_and_not_on_threads() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = |threads: usize, seed: u64| {
        let path = folder.path().join(format!("{threads}-{seed}.gguf"));
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            write(
                &path,
                &Options {
                    seed,
                    force: true,
                    ..options(tiny(), Mix::Q4_K_M)
                },
            )
        });
        fs::read(path).unwrap()
    };
    assert!(bytes(1, 7) == bytes(3, 7));
    assert!(bytes(1, 7) != bytes(1, 8));
}

#[test]
fn rows_of_a_matrix_and_matrices_of_a_kind_differ() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    let file = write(&path, &options(tiny(), Mix::Q4_K_M));
    let up = |layer: usize| decoded(&path, &file, &format!("blk.{layer}.ffn_up_exps.weight"));
    let (first, second) = (up(0), up(1));
    assert!(first[..256] != first[256..512]);
    assert!(first != second);
}

#[test]
fn the_router_gives_each_expert_a_quarter_of_random_tokens() {
    // The real width of the router, everything else narrow.
    let config = ModelConfig {
        hidden: 4096,
        ffn: 256,
        vocab: 512,
        ..tiny()
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    let file = write(&path, &options(config, Mix::Q4_0));
    // Embeddings are as normal as hidden states are, and there are enough of them.
    let tokens = decoded(&path, &file, "token_embd.weight");
    for layer in 0..2 {
        let router = decoded(&path, &file, &format!("blk.{layer}.ffn_gate_inp.weight"));
        let mut chosen = [0_usize; 8];
        for token in tokens.chunks_exact(4096) {
            let dot = |row: &[f32]| row.iter().zip(token).map(|(a, b)| a * b).sum::<f32>();
            let mut logits: Vec<(f32, usize)> = router
                .chunks_exact(4096)
                .map(dot)
                .enumerate()
                .map(|(expert, logit)| (logit, expert))
                .collect();
            logits.sort_by(|a, b| b.0.total_cmp(&a.0));
            assert!(
                logits[0].0.abs() < 10.0,
                "logits of a softmax that still has a choice"
            );
            logits[..2]
                .iter()
                .for_each(|&(_, expert)| chosen[expert] += 1);
        }
        for count in chosen {
            let share = count as f64 / 512.0;
            assert!((0.20..=0.30).contains(&share), "{chosen:?}");
        }
    }
}

#[test]
fn an_existing_file_is_replaced_only_by_force() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    fs::write(&path, "precious").unwrap();
    let refused = synth(&path, &options(tiny(), Mix::Q8_0), &ProgressBar::hidden());
    assert!(matches!(refused, Err(Error::Exists(_))));
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    write(
        &path,
        &Options {
            force: true,
            ..options(tiny(), Mix::Q8_0)
        },
    );
    assert_eq!(
        fs::read_dir(folder.path()).unwrap().count(),
        1,
        "nothing beside the file"
    );
}

#[test]
fn presets_have_the_parameters_that_their_names_say() {
    let params = |preset: Preset| {
        let tensors = fewbit_convert::checkpoint::names::expected(&preset.config());
        tensors
            .iter()
            .map(|t| t.shape.iter().product::<usize>())
            .sum::<usize>()
    };
    assert_eq!(params(Preset::Mixtral8x7b), 46_702_792_704);
    assert_eq!(params(Preset::Mixtral8x22b), 140_630_071_296);
    assert_eq!(params(Preset::Mistral7b), 7_241_732_096);
    assert_eq!(params(Preset::Llama2_7b), 6_738_415_616);
    for preset in Preset::ALL {
        assert_eq!(preset.name().parse::<Preset>().unwrap(), preset);
        let ModelConfig { hidden, ffn, .. } = preset.config();
        assert!(
            hidden.is_multiple_of(256) && ffn.is_multiple_of(256),
            "no row falls back"
        );
    }
    assert!(
        "mixtral"
            .parse::<Preset>()
            .unwrap_err()
            .to_string()
            .contains("mixtral-8x7b")
    );
}

#[test]
fn types_follow_the_recipe() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    let file = write(&path, &options(tiny(), Mix::Q4_K_M));
    let kind = |name: &str| file.tensors.iter().find(|t| t.name == name).unwrap().kind;
    assert_eq!(kind("blk.0.attn_v.weight"), BlockType::Q8_0);
    assert_eq!(kind("blk.0.ffn_gate_exps.weight"), BlockType::Q4_K);
    assert_eq!(kind("output.weight"), BlockType::Q6_K);
}
