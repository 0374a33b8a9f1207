//! Small random checkpoints in every layout.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use fewbit::gguf::{self, Gguf};
use fewbit_convert::recipe::Mix;
use fewbit_convert::{Error, Options, Report};
use half::bf16;
use indicatif::ProgressBar;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

pub const HIDDEN: usize = 256;
pub const FFN: usize = 512;
pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const HEAD_DIM: usize = 64;
/// That of the fixture, whose tokenizer goes along.
pub const VOCAB: usize = 1280;
pub const LAYERS: usize = 2;

/// A tensor: extents slowest first, and its weights (all of them exact in BF16).
pub type Weights = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// A model under Hugging Face's published names, experts apart; 0 experts make it dense.
pub fn random_model(experts: usize) -> Weights {
    let mut rng = ChaCha8Rng::seed_from_u64(experts as u64);
    let mut model = Weights::new();
    let mut add = |name: String, shape: &[usize]| {
        let n = shape.iter().product();
        let weight = |_| bf16::from_f32(rng.random_range(-0.1..0.1)).to_f32();
        model.insert(name, (shape.to_vec(), (0..n).map(weight).collect()));
    };
    add("model.embed_tokens.weight".into(), &[VOCAB, HIDDEN]);
    add("model.norm.weight".into(), &[HIDDEN]);
    add("lm_head.weight".into(), &[VOCAB, HIDDEN]);
    for layer in 0..LAYERS {
        let mut add = |name: String, shape: &[usize]| {
            add(format!("model.layers.{layer}.{name}.weight"), shape)
        };
        add("input_layernorm".into(), &[HIDDEN]);
        add("self_attn.q_proj".into(), &[HEADS * HEAD_DIM, HIDDEN]);
        add("self_attn.k_proj".into(), &[KV_HEADS * HEAD_DIM, HIDDEN]);
        add("self_attn.v_proj".into(), &[KV_HEADS * HEAD_DIM, HIDDEN]);
        add("self_attn.o_proj".into(), &[HIDDEN, HEADS * HEAD_DIM]);
        add("post_attention_layernorm".into(), &[HIDDEN]);
        if experts == 0 {
            add("mlp.gate_proj".into(), &[FFN, HIDDEN]);
            add("mlp.up_proj".into(), &[FFN, HIDDEN]);
            add("mlp.down_proj".into(), &[HIDDEN, FFN]);
        } else {
            add("block_sparse_moe.gate".into(), &[experts, HIDDEN]);
        }
        for expert in 0..experts {
            add(
                format!("block_sparse_moe.experts.{expert}.w1"),
                &[FFN, HIDDEN],
            );
            add(
                format!("block_sparse_moe.experts.{expert}.w3"),
                &[FFN, HIDDEN],
            );
            add(
                format!("block_sparse_moe.experts.{expert}.w2"),
                &[HIDDEN, FFN],
            );
        }
    }
    model
}

/// The configuration that goes with [`random_model`].
pub fn config(experts: usize) -> serde_json::Value {
    let mut config = json!({
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": VOCAB,
        "max_position_embeddings": 1024,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": null,
        "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
    });
    if experts > 0 {
        config["architectures"] = json!(["MixtralForCausalLM"]);
        config["model_type"] = json!("mixtral");
        config["num_local_experts"] = json!(experts);
        config["num_experts_per_tok"] = json!(2);
    }
    config
}

/// Writes weights into one safetensors file.
pub fn write_shard(path: &Path, dtype: Dtype, weights: &Weights) {
    let encode = |values: &[f32]| -> Vec<u8> {
        match dtype {
            Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::BF16 => values
                .iter()
                .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
                .collect(),
            Dtype::F16 => values
                .iter()
                .flat_map(|v| half::f16::from_f32(*v).to_le_bytes())
                .collect(),
            other => panic!("no encoding for {other:?}"),
        }
    };
    let data: Vec<(&String, &Vec<usize>, Vec<u8>)> = weights
        .iter()
        .map(|(name, (shape, values))| (name, shape, encode(values)))
        .collect();
    let views = data.iter().map(|(name, shape, bytes)| {
        (
            name.as_str(),
            TensorView::new(dtype, (*shape).clone(), bytes).expect("shape and bytes fit"),
        )
    });
    safetensors::serialize_to_file(views, None, path).expect("written");
}

/// The trained fixture.
pub fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../quant-tests/fixtures/tiny-mixtral")
}

/// Makes a folder and puts a configuration and the fixture's tokenizer into it.
pub fn begin(folder: &Path, config_name: &str, config: &serde_json::Value) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join(config_name), config.to_string()).unwrap();
    for name in ["tokenizer.model", "tokenizer_config.json"] {
        fs::copy(fixture().join(name), folder.join(name)).unwrap();
    }
}

/// A checkpoint folder in one file.
pub fn write_hf(folder: &Path, config: &serde_json::Value, dtype: Dtype, weights: &Weights) {
    begin(folder, "config.json", config);
    write_shard(&folder.join("model.safetensors"), dtype, weights);
}

/// A checkpoint folder in two shards with an index; returns the paths of the shards.
pub fn write_sharded(
    folder: &Path,
    config: &serde_json::Value,
    dtype: Dtype,
    weights: &Weights,
) -> Vec<PathBuf> {
    begin(folder, "config.json", config);
    let mut halves = [Weights::new(), Weights::new()];
    let mut weight_map = serde_json::Map::new();
    for (i, (name, tensor)) in weights.iter().enumerate() {
        let shard = i * 2 / weights.len();
        halves[shard].insert(name.clone(), tensor.clone());
        weight_map.insert(
            name.clone(),
            json!(format!("model-0000{}-of-00002.safetensors", shard + 1)),
        );
    }
    let index = json!({"metadata": {}, "weight_map": weight_map});
    fs::write(
        folder.join("model.safetensors.index.json"),
        index.to_string(),
    )
    .unwrap();
    let write = |(i, half): (usize, &Weights)| {
        let path = folder.join(format!("model-0000{}-of-00002.safetensors", i + 1));
        write_shard(&path, dtype, half);
        path
    };
    halves.iter().enumerate().map(write).collect()
}

/// Converts without a progress bar, on two threads.
pub fn convert(input: &Path, output: &Path, options: &Options) -> Result<Report, Error> {
    let options = Options {
        threads: 2,
        ..options.clone()
    };
    fewbit_convert::convert(input, output, &options, &ProgressBar::hidden())
}

/// The message of a conversion that fails; checks that it is one line and that nothing is left under the output's name.
pub fn failure(input: &Path, options: &Options) -> String {
    let output = input.with_extension("out.gguf");
    let error = match convert(input, &output, options) {
        Ok(_) => panic!("the conversion of {} succeeds", input.display()),
        Err(error) => error.to_string(),
    };
    assert!(!error.contains('\n'), "{error}");
    assert!(!output.exists());
    error
}

/// Converts a folder into `OUT.gguf` beside it and reads that.
pub fn converted(folder: &Path, mix: Mix) -> (PathBuf, Gguf) {
    let output = folder.with_extension(format!("{mix}.gguf"));
    convert(folder, &output, &Options::new(mix)).unwrap();
    let gguf = gguf::read(&output).unwrap();
    (output, gguf)
}

/// The bytes of a tensor.
pub fn tensor_bytes(gguf: &Gguf, name: &str) -> Vec<u8> {
    let info = gguf
        .tensor(name)
        .unwrap_or_else(|| panic!("{name} is there"));
    let file = fs::read(&gguf.files[info.file]).unwrap();
    file[info.offset as usize..][..info.bytes as usize].to_vec()
}

/// The weights of a tensor.
pub fn tensor_weights(gguf: &Gguf, name: &str) -> Vec<f32> {
    let info = gguf
        .tensor(name)
        .unwrap_or_else(|| panic!("{name} is there"));
    let bytes = tensor_bytes(gguf, name);
    let mut weights = vec![0.0; info.elements()];
    let rows = bytes
        .chunks_exact(info.row_bytes())
        .zip(weights.chunks_exact_mut(info.columns()));
    rows.for_each(|(bytes, weights)| info.kind.decode_row(bytes, weights));
    weights
}
