//! Keys and values in fewer bits: what it costs, and that it changes nothing else.

use std::sync::Arc;

use fewbit::engine::{ActivationMode, Engine, Options};
use fewbit::gguf::Value;
use fewbit::model::KvKind;
use quant_tests::fixture::{self, ModelFile, Parts};

const KINDS: [KvKind; 4] = [KvKind::F32, KvKind::F16, KvKind::Q8_0, KvKind::Q4_0];

fn load(file: &ModelFile, kind: KvKind, threads: usize) -> Arc<Engine> {
    file.load(&Options {
        threads: Some(threads),
        kv: Some(kind),
        ..Options::default()
    })
}

fn tokens(engine: &Engine, language: &str, len: usize) -> Vec<u32> {
    let text: String = fixture::text(language).chars().take(20 * len).collect();
    let mut tokens = engine.tokenizer().encode_with_bos(&text, false).unwrap();
    tokens.truncate(len);
    tokens
}

/// Logits after every token of a prompt, cut at `cuts`.
fn prompted(engine: &Arc<Engine>, tokens: &[u32], cuts: &[usize]) -> Vec<f32> {
    let mut session = engine.session(tokens.len()).unwrap();
    let mut all = Vec::new();
    let mut start = 0;
    for end in cuts.iter().copied().chain([tokens.len()]) {
        let part = &tokens[start..end];
        let visit = |_, row: &[f32]| all.extend_from_slice(row);
        session.score(part, 0, visit).unwrap();
        start = end;
    }
    all
}

/// Logits after every token, generated one by one.
fn stepped(engine: &Arc<Engine>, tokens: &[u32]) -> Vec<f32> {
    let mut session = engine.session(tokens.len()).unwrap();
    let step = |&token| session.step(token).unwrap().to_vec();
    tokens.iter().flat_map(step).collect()
}

/// Mean KL divergence of the rows of `q` from those of `p`.
fn divergence(p: &[f32], q: &[f32], vocab: usize) -> f64 {
    let log_softmax = |row: &[f32]| -> Vec<f64> {
        let max = row.iter().fold(f32::NEG_INFINITY, |max, &x| max.max(x));
        let sum: f64 = row.iter().map(|x| f64::from(x - max).exp()).sum();
        let shift = f64::from(max) + sum.ln();
        row.iter().map(|&x| f64::from(x) - shift).collect()
    };
    let rows = p.chunks_exact(vocab).zip(q.chunks_exact(vocab));
    let divergences = rows.map(|(p, q)| {
        let (p, q) = (log_softmax(p), log_softmax(q));
        let terms = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q));
        terms.sum::<f64>()
    });
    divergences.sum::<f64>() / (p.len() / vocab) as f64
}

#[test]
fn fewer_bits_cost_little_and_in_their_order() {
    let file = fixture::tiny_mixtral("F32");
    let exact = load(&file, KvKind::F32, 2);
    let (tokens, vocab) = (tokens(&exact, "en", 600), exact.shape().vocab);
    let reference = prompted(&exact, &tokens, &[]);
    let cost = |kind| {
        let engine = load(&file, kind, 2);
        let cost = divergence(&reference, &prompted(&engine, &tokens, &[]), vocab);
        println!("{kind:?}: mean KL divergence {cost:.1e}");
        cost
    };
    let [none, f16, q8_0, q4_0] = KINDS.map(cost);
    assert_eq!(none, 0.0);
    assert!(f16 < 1e-6 && f16 < q8_0, "{f16}");
    assert!(q8_0 < 2e-4 && q8_0 < q4_0, "{q8_0}");
    assert!(q4_0 < 3e-2, "{q4_0}");
}

#[test]
fn prompt_and_steps_agree_with_every_kind() {
    let file = fixture::tiny_mixtral("Q4_K_M");
    for kind in KINDS {
        let engine = load(&file, kind, 2);
        let tokens = tokens(&engine, "fr", 150);
        let (p, q) = (prompted(&engine, &tokens, &[]), stepped(&engine, &tokens));
        let mean = divergence(&p, &q, engine.shape().vocab);
        println!("{kind:?}: mean KL divergence of single steps from the prompt {mean:.1e}");
        // A last bit that moves a value over a border of 16 levels makes no small difference: there it
        // is held to what the 4 bits themselves cost.
        let bound = if kind == KvKind::Q4_0 { 7e-3 } else { 1e-3 };
        assert!(mean.abs() < bound, "{kind:?}: {mean}");
    }
}

#[test]
fn threads_and_cuts_change_no_bit_with_any_kind() {
    let file = fixture::tiny_mixtral("Q4_0");
    for kind in KINDS {
        let (one, three) = (load(&file, kind, 1), load(&file, kind, 3));
        let tokens = tokens(&one, "de", 140);
        let whole = prompted(&one, &tokens, &[]);
        for cuts in [&[1][..], &[63, 64, 65], &[130]] {
            assert!(
                whole == prompted(&three, &tokens, cuts),
                "{kind:?} {cuts:?}"
            );
        }
        assert!(
            stepped(&one, &tokens[..30]) == stepped(&three, &tokens[..30]),
            "{kind:?}"
        );
    }
}

/// Segments of a long context are cut at absolute positions.
#[test]
fn threads_change_no_bit_of_a_step_far_into_a_context() {
    let file = fixture::tiny_mixtral("Q4_0");
    let after = |threads| {
        let engine = load(&file, KvKind::F16, threads);
        let tokens = tokens(&engine, "it", 1100);
        let mut session = engine.session(1101).unwrap();
        session.feed(&tokens).unwrap();
        session.step(5).unwrap().to_vec()
    };
    let one = after(1);
    assert!(one == after(2) && one == after(5));
}

#[test]
fn a_smaller_kind_takes_less_memory() {
    let file = fixture::tiny_mixtral("Q4_0");
    let shape = load(&file, KvKind::F16, 1).shape().clone();
    let bytes = KINDS.map(|kind| shape.kv_bytes(4096, kind.block_type()));
    let per_value = bytes.map(|b| b as f64 / shape.kv_bytes(4096, KvKind::F32.block_type()) as f64);
    assert_eq!(per_value, [1.0, 0.5, 34.0 / 128.0, 18.0 / 128.0]);
}

#[test]
fn exact_runs_keep_keys_and_values_exactly_unless_asked() {
    let file = fixture::tiny_mixtral("F16");
    let exact = Options {
        activations: ActivationMode::F32,
        ..Options::default()
    };
    let logits = |options: &Options| {
        let engine = file.load(options);
        prompted(&engine, &tokens(&engine, "es", 60), &[])
    };
    let with = |kind| {
        logits(&Options {
            kv: Some(kind),
            ..exact.clone()
        })
    };
    let usual = logits(&exact);
    assert!(usual == with(KvKind::F32));
    assert!(usual != with(KvKind::F16));
}

#[test]
fn heads_that_are_no_whole_blocks_are_refused_by_name() {
    let file = fixture::tiny_mixtral("F32");
    let mut parts = Parts::read(&file.path);
    // Four times as many heads of 16 values: no whole blocks.
    let wide = |parts: &Parts, key: &str| parts.metadata.u64(key).unwrap().unwrap();
    let (heads, kv_heads) = (
        "llama.attention.head_count",
        "llama.attention.head_count_kv",
    );
    for key in [heads, kv_heads] {
        let count = wide(&parts, key) as u32;
        parts.metadata.insert(key, Value::U32(4 * count));
    }
    for key in [
        "llama.attention.key_length",
        "llama.attention.value_length",
        "llama.rope.dimension_count",
    ] {
        parts.metadata.insert(key, Value::U32(16));
    }
    let file = parts.write();
    file.load(&Options::default());
    let options = Options {
        kv: Some(KvKind::Q8_0),
        ..Options::default()
    };
    let error = Engine::load(&file.path, &options)
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("variant.gguf") && error.contains("Q8_0") && error.contains("--kv"),
        "{error}"
    );
}
