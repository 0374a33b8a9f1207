//! LoRA adapters: at run time as if merged into the weights, in both forms of file, alone and in company.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use fewbit::adapter::{Adapter, Chosen};
use fewbit::chat::{Style, Template};
use fewbit::conversation::{Conversation, Event, FileError};
use fewbit::engine::{ActivationMode, Engine, Options, Turn};
use fewbit::gguf::{self, Metadata, TensorDecl, Value, names};
use fewbit::plan::Shape;
use fewbit::plan::memory::Memory;
use fewbit::quant::BlockType;
use fewbit::sampler::Settings;
use fewbit_convert::Options as Conversion;
use quant_tests::fixture::{self, ModelFile, Parts, binary};
use quant_tests::rows::SplitMix64;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value as Json, json};
use tempfile::TempDir;

/// A correction before it is written: the module of transformers, and A and B in its order of rows.
#[derive(Clone)]
struct Low {
    module: String,
    rank: usize,
    /// `[rank, columns]`.
    a: Vec<f32>,
    /// `[rows, rank]`.
    b: Vec<f32>,
}

/// The extents of the fixture, and of its dense variant.
fn shape(file: &ModelFile) -> Shape {
    Shape::from_metadata(&gguf::read(&file.path).unwrap().metadata).unwrap()
}

/// Corrections of every matrix that can have one, ranks of all kinds.
fn corrections(shape: &Shape, seed: u64, size: f32) -> Vec<Low> {
    let mut random = SplitMix64::new(seed);
    let (hidden, ffn) = (shape.hidden, shape.ffn);
    let (q, kv) = (
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
    );
    let mut all = Vec::new();
    let mut add = |module: String, rows: usize, columns: usize, rank: usize| {
        let mut values = |count: usize| (0..count).map(|_| size * random.normal()).collect();
        all.push(Low {
            module,
            rank,
            a: values(rank * columns),
            b: values(rows * rank),
        });
    };
    for layer in 0..shape.layers {
        let of = |module: &str| format!("model.layers.{layer}.{module}");
        add(of("self_attn.q_proj"), q, hidden, 4);
        add(of("self_attn.k_proj"), kv, hidden, 3);
        add(of("self_attn.v_proj"), kv, hidden, 8);
        add(of("self_attn.o_proj"), hidden, q, 1);
        if shape.is_moe() {
            add(of("block_sparse_moe.gate"), shape.experts, hidden, 2);
            for expert in 0..shape.experts {
                let of = |matrix| of(&format!("block_sparse_moe.experts.{expert}.{matrix}"));
                add(of("w1"), ffn, hidden, 4);
                add(of("w2"), hidden, ffn, 4);
                add(of("w3"), ffn, hidden, 4);
            }
        } else {
            add(of("mlp.gate_proj"), ffn, hidden, 4);
            add(of("mlp.up_proj"), ffn, hidden, 16);
            add(of("mlp.down_proj"), hidden, ffn, 5);
        }
    }
    add("lm_head".to_owned(), shape.vocab, hidden, 2);
    all
}

/// A folder as PEFT saves it.
fn peft(corrections: &[Low], config: Json) -> TempDir {
    let folder = TempDir::new().unwrap();
    let mut tensors = BTreeMap::new();
    for low in corrections {
        let columns = low.a.len() / low.rank;
        let rows = low.b.len() / low.rank;
        let name = |half: &str| format!("base_model.model.{}.lora_{half}.weight", low.module);
        tensors.insert(name("A"), (vec![low.rank, columns], &low.a));
        tensors.insert(name("B"), (vec![rows, low.rank], &low.b));
    }
    let views = tensors.iter().map(|(name, (shape, values))| {
        let bytes = bytemuck::cast_slice(values);
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap();
        (name.clone(), view)
    });
    let path = folder.path().join("adapter_model.safetensors");
    safetensors::serialize_to_file(views, None, &path).unwrap();
    fs::write(
        folder.path().join("adapter_config.json"),
        config.to_string(),
    )
    .unwrap();
    folder
}

fn config(alpha: f32) -> Json {
    json!({"peft_type": "LORA", "r": 8, "lora_alpha": alpha, "bias": "none", "use_rslora": false,
        "target_modules": ["q_proj"], "alpha_pattern": {}, "modules_to_save": null})
}

/// The GGUF tensor that a module is in, and the expert.
fn tensor_of(module: &str, moe: bool) -> (String, Option<usize>) {
    if module == "lm_head" {
        return (names::OUTPUT.to_owned(), None);
    }
    let mut parts = module.strip_prefix("model.layers.").unwrap().split('.');
    let layer = parts.next().unwrap().parse().unwrap();
    let last = parts.clone().next_back().unwrap();
    let part = match last {
        "q_proj" => names::ATTN_Q,
        "k_proj" => names::ATTN_K,
        "v_proj" => names::ATTN_V,
        "o_proj" => names::ATTN_OUTPUT,
        "gate" => names::FFN_GATE_INP,
        "w1" | "gate_proj" => names::FFN_GATE,
        "w2" | "down_proj" => names::FFN_DOWN,
        "w3" | "up_proj" => names::FFN_UP,
        other => panic!("{other}"),
    };
    match (moe && last.starts_with('w'), parts.nth(2)) {
        (true, expert) => (
            names::experts(layer, part),
            Some(expert.unwrap().parse().unwrap()),
        ),
        _ => (names::block(layer, part), None),
    }
}

/// Where row `row` of transformers' query or key projection stands in a GGUF file: halves of a head alternate there.
fn gguf_row(row: usize, head_dim: usize) -> usize {
    let (head, inside) = (row / head_dim, row % head_dim);
    let (half, index) = (inside / (head_dim / 2), inside % (head_dim / 2));
    head * head_dim + 2 * index + half
}

/// B with its rows as the GGUF file has them.
fn gguf_b(low: &Low, shape: &Shape) -> Vec<f32> {
    if !low.module.ends_with("q_proj") && !low.module.ends_with("k_proj") {
        return low.b.clone();
    }
    let mut b = vec![0.0; low.b.len()];
    for (row, values) in low.b.chunks(low.rank).enumerate() {
        let at = gguf_row(row, shape.head_dim) * low.rank;
        b[at..at + low.rank].copy_from_slice(values);
    }
    b
}

/// The same as llama.cpp's converter writes it: experts' matrices in one tensor.
fn as_gguf(corrections: &[Low], shape: &Shape, alpha: f32, kind: BlockType) -> (TempDir, PathBuf) {
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)> = BTreeMap::new();
    for low in corrections {
        let (name, expert) = tensor_of(&low.module, shape.is_moe());
        let extents = [
            vec![low.a.len() / low.rank, low.rank],
            vec![low.rank, low.b.len() / low.rank],
        ];
        let values = [low.a.clone(), gguf_b(low, shape)];
        for ((half, mut extents), values) in ["lora_a", "lora_b"].iter().zip(extents).zip(values) {
            if expert.is_some() {
                extents.push(shape.experts);
            }
            let entry = tensors.entry(format!("{name}.{half}"));
            let (_, all) = entry.or_insert_with(|| (extents, Vec::new()));
            all.extend(values);
        }
    }
    let metadata: Metadata = [
        ("general.architecture", Value::String("llama".into())),
        ("general.type", Value::String("adapter".into())),
        ("adapter.type", Value::String("lora".into())),
        ("adapter.lora.alpha", Value::F32(alpha)),
    ]
    .into_iter()
    .collect();
    let tensors: Vec<_> = tensors
        .into_iter()
        .map(|(name, (shape, values))| {
            let mut bytes = vec![0; kind.row_bytes(values.len()).unwrap()];
            kind.encoder().unwrap()(&values, None, &mut bytes);
            (TensorDecl { name, kind, shape }, bytes)
        })
        .collect();
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(decl, bytes)| (decl.clone(), &bytes[..]))
        .collect();
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("adapter.gguf");
    gguf::write_whole(&path, &metadata, &tensors).unwrap();
    (folder, path)
}

/// The F32 file with `alpha / rank · B · A` added to its weights.
fn merged(file: &ModelFile, corrections: &[Low], alpha: f32) -> ModelFile {
    let shape = shape(file);
    let mut parts = Parts::read(&file.path);
    for low in corrections {
        let (name, expert) = tensor_of(&low.module, shape.is_moe());
        let (_, bytes) = parts.tensor(&name);
        let columns = low.a.len() / low.rank;
        let rows = low.b.len() / low.rank;
        let weights: &mut [f32] = bytemuck::cast_slice_mut(bytes);
        let start = expert.unwrap_or(0) * rows * columns;
        let weights = &mut weights[start..start + rows * columns];
        let scale = f64::from(alpha) / low.rank as f64;
        for (row, b) in gguf_b(low, &shape).chunks(low.rank).enumerate() {
            for column in 0..columns {
                let product = b
                    .iter()
                    .enumerate()
                    .map(|(k, b)| f64::from(*b) * f64::from(low.a[k * columns + column]));
                let weight = &mut weights[row * columns + column];
                *weight = (f64::from(*weight) + scale * product.sum::<f64>()) as f32;
            }
        }
    }
    parts.write()
}

/// The fixture with its first expert for all tokens.
fn dense() -> ModelFile {
    let mut parts = Parts::read(&fixture::tiny_mixtral("F32").path);
    parts.metadata.remove("llama.expert_count");
    parts.metadata.remove("llama.expert_used_count");
    parts
        .tensors
        .retain(|(decl, _)| !decl.name.contains(names::FFN_GATE_INP));
    for (decl, bytes) in &mut parts.tensors {
        let Some(name) = names::parse(&decl.name) else {
            continue;
        };
        if name.experts == names::Experts::All {
            bytes.truncate(bytes.len() / decl.shape[2]);
            decl.name = names::block(name.layer, name.part);
            decl.shape.truncate(2);
        }
    }
    parts.write()
}

fn load(file: &ModelFile, lora: &[(&Path, f32)], options: Options) -> Arc<Engine> {
    let chosen = |(path, scale): &(&Path, f32)| Chosen {
        path: (*path).to_owned(),
        scale: *scale,
    };
    file.load(&Options {
        lora: lora.iter().map(chosen).collect(),
        ..options
    })
}

fn exact() -> Options {
    Options {
        activations: ActivationMode::F32,
        ..Options::default()
    }
}

fn prompt(engine: &Engine, len: usize) -> Vec<u32> {
    let text: String = fixture::text("en").chars().take(20 * len).collect();
    let mut tokens = engine.tokenizer().encode_with_bos(&text, false).unwrap();
    tokens.truncate(len);
    tokens
}

/// Logits after every token of a prompt, cut at `cuts`, and after three more, one by one.
fn logits(engine: &Arc<Engine>, cuts: &[usize]) -> Vec<f32> {
    const LEN: usize = 40;
    let tokens = prompt(engine, LEN + 3);
    let mut session = engine.session(LEN + 3).unwrap();
    let mut all = Vec::new();
    let mut start = 0;
    for end in cuts.iter().copied().chain([LEN]) {
        let part = &tokens[start..end];
        session
            .score(part, 0, |_, row| all.extend_from_slice(row))
            .unwrap();
        start = end;
    }
    for &token in &tokens[LEN..] {
        all.extend_from_slice(session.step(token).unwrap());
    }
    all
}

fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max)
}

#[test]
fn an_adapter_at_run_time_is_what_merged_weights_are() {
    for file in [fixture::tiny_mixtral("F32"), dense()] {
        let shape = shape(&file);
        let all = corrections(&shape, 1, 0.03);
        let folder = peft(&all, config(16.0));
        let (_kept, gguf) = as_gguf(&all, &shape, 16.0, BlockType::F32);
        let base = logits(&load(&file, &[], exact()), &[]);
        let found = logits(&load(&file, &[(folder.path(), 1.0)], exact()), &[]);
        let wanted = logits(&load(&merged(&file, &all, 16.0), &[], exact()), &[]);
        let (difference, change) = (
            max_difference(&found, &wanted),
            max_difference(&base, &wanted),
        );
        assert!(difference < 1e-4, "{difference}");
        // The corrections are no trifle.
        assert!(change > 0.5, "{change}");
        // And in the other form the same bits.
        assert!(logits(&load(&file, &[(&gguf, 1.0)], exact()), &[]) == found);
        let weights = folder.path().join("adapter_model.safetensors");
        assert!(logits(&load(&file, &[(&weights, 1.0)], exact()), &[]) == found);
    }
}

#[test]
fn each_matrix_is_corrected_by_itself() {
    let file = fixture::tiny_mixtral("F32");
    let shape = shape(&file);
    let base = logits(&load(&file, &[], exact()), &[]);
    for module in [
        "q_proj", "k_proj", "v_proj", "o_proj", "moe.gate", "w1", "w2", "w3", "lm_head",
    ] {
        let mut some = corrections(&shape, 2, 0.1);
        some.retain(|low| low.module.ends_with(module));
        let folder = peft(&some, config(8.0));
        let found = logits(&load(&file, &[(folder.path(), 1.0)], exact()), &[]);
        let wanted = logits(&load(&merged(&file, &some, 8.0), &[], exact()), &[]);
        let (difference, change) = (
            max_difference(&found, &wanted),
            max_difference(&base, &wanted),
        );
        assert!(
            difference < 2e-4 && change > 50.0 * difference,
            "{module}: {difference} of {change}"
        );
    }
}

#[test]
fn results_do_not_depend_on_company() {
    let file = fixture::tiny_mixtral("Q4_K_M");
    let folder = peft(&corrections(&shape(&file), 3, 0.05), config(16.0));
    let with = |options: Options| load(&file, &[(folder.path(), 1.0)], options);
    let one = |threads: usize| Options {
        threads: Some(threads),
        ..Options::default()
    };
    let engine = with(one(1));
    let alone = logits(&engine, &[]);
    assert!(logits(&engine, &[1, 7, 39]) == alone, "cuts");
    assert!(logits(&with(one(3)), &[]) == alone, "threads");
    let read = Options {
        memory: fewbit::plan::memory::Memory::Bytes(90 << 20),
        loading: fewbit::engine::Loading::Read,
        ..one(2)
    };
    assert!(logits(&with(read), &[]) == alone, "read");

    // Sessions of a batch, one token each.
    let tokens = prompt(&engine, 12);
    let fed = |len: usize| {
        let mut session = engine.session(64).unwrap();
        session.feed(&tokens[..len]).unwrap();
        session
    };
    let next = [tokens[5]];
    let alone: Vec<Vec<f32>> = (1..12)
        .map(|len| fed(len).step(next[0]).unwrap().to_vec())
        .collect();
    let mut sessions: Vec<_> = (1..12).map(fed).collect();
    let turns = sessions.iter_mut().map(|session| Turn {
        session,
        tokens: &next,
    });
    for result in engine.generate(&mut turns.collect::<Vec<_>>()) {
        result.unwrap();
    }
    for (session, alone) in sessions.iter().zip(&alone) {
        assert!(session.logits() == alone);
    }
}

#[test]
fn scales_and_several_adapters_add_up() {
    let file = fixture::tiny_mixtral("F32");
    let shape = shape(&file);
    let (one, two) = (corrections(&shape, 4, 0.02), corrections(&shape, 5, 0.02));
    let (first, second) = (peft(&one, config(8.0)), peft(&two, config(4.0)));
    let run = |lora: &[(&Path, f32)]| logits(&load(&file, lora, exact()), &[]);
    assert!(run(&[(first.path(), 0.0)]) == run(&[]));
    let both = run(&[(first.path(), 0.5), (second.path(), -2.0)]);
    let wanted = merged(&merged(&file, &one, 4.0), &two, -8.0);
    let wanted = logits(&load(&wanted, &[], exact()), &[]);
    let difference = max_difference(&both, &wanted);
    assert!(difference < 1e-4, "{difference}");
}

#[test]
fn scales_follow_the_configuration() {
    let file = fixture::tiny_mixtral("F32");
    let shape = shape(&file);
    let all = corrections(&shape, 6, 0.1);
    let scale = |config: Json, target: &str| {
        let folder = peft(&all, config);
        let adapter = Adapter::open(folder.path(), &shape).unwrap();
        let found = adapter
            .pairs
            .iter()
            .find(|pair| pair.target.tensor() == target);
        found.unwrap().scale
    };
    let (q, v) = ("blk.0.attn_q.weight", "blk.0.attn_v.weight");
    assert_eq!(scale(config(16.0), q), 4.0);
    let mut stabilized = config(16.0);
    stabilized["use_rslora"] = json!(true);
    assert_eq!(scale(stabilized, q), 8.0);
    let mut pattern = config(16.0);
    pattern["alpha_pattern"] = json!({"self_attn.v_proj": 4.0, "1.self_attn.q_proj": 2.0});
    assert_eq!((scale(pattern.clone(), v), scale(pattern, q)), (0.5, 4.0));
    let (_kept, path) = as_gguf(&all, &shape, 16.0, BlockType::BF16);
    let adapter = Adapter::open(&path, &shape).unwrap();
    assert_eq!(adapter.pairs.len(), all.len());
    assert!(
        adapter
            .pairs
            .iter()
            .all(|pair| pair.scale == 16.0 / pair.rank as f32)
    );
}

#[test]
fn what_is_no_adapter_of_the_model_is_refused_in_one_line() {
    let file = fixture::tiny_mixtral("F32");
    let shape = shape(&file);
    let all = corrections(&shape, 7, 0.1);
    let refused = |folder: &Path| {
        let line = Adapter::open(folder, &shape).unwrap_err().to_string();
        assert!(!line.contains('\n'), "{line}");
        line
    };
    let with = |change: &dyn Fn(&mut Vec<Low>)| {
        let mut some = all.clone();
        change(&mut some);
        refused(peft(&some, config(8.0)).path())
    };
    let line = with(&|some| {
        some[0].a.truncate(4 * 128);
    });
    assert!(
        line.contains("256 x 128, which is 256 x 256 here"),
        "{line}"
    );
    let line = with(&|some| some[0].module = "model.layers.9.self_attn.q_proj".into());
    assert!(
        line.contains("blk.9.attn_q.weight, which this model does not have"),
        "{line}"
    );
    let line = with(&|some| some[0].module = "model.layers.0.mlp.gate_proj".into());
    assert!(
        line.contains("blk.0.ffn_gate.weight, which this model does not have"),
        "{line}"
    );
    let line = with(&|some| some[0].module = "model.embed_tokens".into());
    assert!(line.contains("no matrix that can be corrected"), "{line}");
    let line = with(&|some| some[0].a[3] = f32::NAN);
    assert!(line.contains("blk.0.attn_q.weight hold NaN"), "{line}");
    let line = with(&Vec::clear);
    assert!(line.contains("no corrections"), "{line}");
    for (key, value) in [
        ("peft_type", json!("LOHA")),
        ("use_dora", json!(true)),
        ("bias", json!("all")),
        ("modules_to_save", json!(["lm_head"])),
        ("alpha_pattern", json!({"layers.[01].q": 3})),
        ("fan_in_fan_out", json!(true)),
    ] {
        let mut config = config(8.0);
        config[key] = value;
        let line = refused(peft(&all, config).path());
        assert!(line.contains(key), "{line}");
    }
    let folder = peft(&all, config(8.0));
    fs::remove_file(folder.path().join("adapter_config.json")).unwrap();
    assert!(refused(folder.path()).contains("adapter_config.json"));
    let folder = peft(&all, config(8.0));
    let weights = folder.path().join("adapter_model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() - 1]).unwrap();
    assert!(refused(folder.path()).contains("cut off"));
    fs::write(&weights, [0xff; 64]).unwrap();
    assert!(refused(folder.path()).contains("no safetensors file"));
    assert!(refused(&file.path).contains("is no adapter"));

    // An adapter of another model, at the command line.
    let model = dense();
    let folder = peft(&all, config(8.0));
    let output = Command::new(binary())
        .args(["run", "-n", "1", "-m"])
        .arg(&model.path)
        .arg("--lora")
        .arg(folder.path())
        .arg("The")
        .output()
        .unwrap();
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        (output.status.code(), line.lines().count()),
        (Some(1), 1),
        "{line}"
    );
    assert!(line.contains("which this model does not have"), "{line}");
}

#[test]
fn the_converter_merges_what_the_runtime_adds() {
    let file = fixture::tiny_mixtral("F32");
    let shape = shape(&file);
    let all = corrections(&shape, 8, 0.05);
    let folder = peft(&all, config(16.0));
    let wanted = merged(&file, &all, 16.0 * 0.5);
    let wanted = Parts::read(&wanted.path);
    let out = TempDir::new().unwrap();
    let convert = |input: &Path, mix: &str, requantize: bool| {
        let mut options = Conversion::new(mix.parse().unwrap());
        options.lora = vec![Chosen {
            path: folder.path().to_owned(),
            scale: 0.5,
        }];
        options.force = true;
        options.allow_requantize = requantize;
        let path = out.path().join("merged.gguf");
        fewbit_convert::convert(input, &path, &options, &indicatif::ProgressBar::hidden())
            .map(|_| path)
    };
    // From the checkpoint, whose query and key rows are moved on their way, and from a GGUF file.
    for input in [fixture::path("tiny-mixtral"), file.path.clone()] {
        let found = Parts::read(&convert(&input, "F32", false).unwrap());
        for ((found, values), (decl, wanted)) in found.tensors.iter().zip(&wanted.tensors) {
            assert_eq!(found, decl);
            let (values, wanted): (&[f32], &[f32]) =
                (bytemuck::cast_slice(values), bytemuck::cast_slice(wanted));
            let difference = max_difference(values, wanted);
            assert!(difference < 1e-6, "{}: {difference}", decl.name);
        }
    }
    // Quantized after merging: nearer to the merged weights than to the plain ones.
    let quantized = convert(&fixture::path("tiny-mixtral"), "Q8_0", false).unwrap();
    let runs = |path: &Path| {
        let engine = Engine::load(path, &exact()).unwrap();
        logits(&engine, &[])
    };
    let (found, plain) = (runs(&quantized), runs(&file.path));
    let exactly = logits(&load(&file, &[(folder.path(), 0.5)], exact()), &[]);
    // On average: where an expert is chosen otherwise, single logits are far off.
    let mean = |a: &[f32], b: &[f32]| {
        let sum: f32 = a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum();
        sum / a.len() as f32
    };
    assert!(mean(&found, &exactly) < 0.2 * mean(&plain, &exactly));

    let coarse = fixture::tiny_mixtral("Q8_0");
    let error = convert(&coarse.path, "Q8_0", false)
        .unwrap_err()
        .to_string();
    assert!(error.contains("already quantized"), "{error}");
    convert(&coarse.path, "Q8_0", true).unwrap();
    let error = convert(&dense().path, "F32", false)
        .unwrap_err()
        .to_string();
    assert!(error.contains("which this model does not have"), "{error}");
    let mut tied = Parts::read(&file.path);
    tied.tensors.retain(|(decl, _)| decl.name != names::OUTPUT);
    let error = convert(&tied.write().path, "F32", false)
        .unwrap_err()
        .to_string();
    assert!(error.contains("at run time"), "{error}");
}

#[test]
fn a_conversation_in_a_file_belongs_to_the_adapters_it_was_held_with() {
    let file = fixture::tiny_mixtral("Q8_0");
    let adapter = peft(&corrections(&shape(&file), 3, 0.02), config(16.0));
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("chat.session");
    let conversation = |lora: &[(&Path, f32)]| {
        let engine = load(&file, lora, Options::default());
        let template = Template::from_style(Style::Plain, engine.tokenizer());
        let session = engine.session(64).unwrap();
        Conversation::new(session, template, Settings::greedy(), Default::default())
    };
    let mut held = conversation(&[(adapter.path(), 1.0)]);
    held.options.limit = 4;
    let mut go = |_: Event<'_>| ControlFlow::Continue(());
    held.ask("Hello.".into(), None, &mut go).unwrap();
    held.save(&path).unwrap();
    for other in [
        &[][..],
        &[(adapter.path(), 0.5)],
        &[(adapter.path(), 1.0); 2],
    ] {
        let error = conversation(other).load(&path).unwrap_err();
        assert!(matches!(error, FileError::Foreign { .. }), "{error}");
        assert!(error.to_string().contains("--lora"), "{error}");
    }
    let mut same = conversation(&[(adapter.path(), 1.0)]);
    same.load(&path).unwrap();
    assert_eq!(same.messages(), held.messages());
}

/// With experts on disk: the same bits, memory for the adapter in the plan, and guesses that know what it does to
/// the router.
#[test]
fn an_adapter_of_a_model_larger_than_memory() {
    let file = fixture::tiny_mixtral("Q8_0");
    let shape = shape(&file);
    let all = corrections(&shape, 9, 0.03);
    let bytes: usize = all.iter().map(|low| 4 * (low.a.len() + low.b.len())).sum();
    let folder = peft(&all, config(16.0));
    let options = |memory: u64, lora: &Path| Options {
        memory: Memory::Bytes(memory),
        context: Some(64),
        lora: vec![Chosen {
            path: lora.to_owned(),
            scale: 1.0,
        }],
        ..Options::default()
    };
    let plain = Options {
        lora: Vec::new(),
        ..options(1, folder.path())
    };
    let without = Engine::needs(&file.path, &plain).unwrap();
    let needs = Engine::needs(&file.path, &options(1, folder.path())).unwrap();
    assert_eq!(needs.least - without.least, bytes as u64);
    let refused = Engine::load(&file.path, &options(needs.least - 1, folder.path()));
    assert!(refused.err().unwrap().to_string().contains("at least"));

    let mapped = file.load(&options(needs.all, folder.path()));
    let streamed = file.load(&options(needs.least, folder.path()));
    assert!(mapped.expert_cache().is_none() && streamed.expert_cache().is_some());
    assert!(logits(&streamed, &[7]) == logits(&mapped, &[]));

    // Routers that are the adapter's work for the most part.
    let mut routers: Vec<Low> = all;
    routers.retain(|low| low.module.ends_with("gate"));
    let strong = |value: &mut f32| *value *= 10.0;
    routers
        .iter_mut()
        .for_each(|low| low.a.iter_mut().chain(&mut low.b).for_each(strong));
    let folder = peft(&routers, config(16.0));
    let engine = file.load(&options(needs.least, folder.path()));
    let mut session = engine.session(64).unwrap();
    for token in prompt(&engine, 60) {
        session.step(token).unwrap();
    }
    let accuracy = engine
        .expert_cache()
        .unwrap()
        .counters()
        .accuracy()
        .unwrap();
    assert!(accuracy > 0.6, "{accuracy}");
}
