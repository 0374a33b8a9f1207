//! The forward pass: against transformers, against itself cut and spread differently, and
//! variants of the graph against each other.

use std::sync::Arc;

use fewbit::engine::{ActivationMode, Engine, Options, Session};
use fewbit::gguf::{self, TensorDecl, Value, names};
use fewbit::kernels::{Kernels, Phase};
use fewbit::model::{KvCache, KvKind, Model, Placement, Slot, State, forward};
use fewbit::quant::BlockType;
use fewbit::threads::Pool;
use quant_tests::fixture::{self, LANGUAGES, Parts};
use safetensors::SafeTensors;

fn exact() -> Options {
    Options {
        activations: ActivationMode::F32,
        ..Options::default()
    }
}

/// The logits after every token of `tokens`, one row a token.
fn logits(engine: &Arc<Engine>, tokens: &[u32]) -> Vec<f32> {
    logits_in_parts(engine, tokens, &[])
}

/// The same, the prompt cut at `cuts`.
fn logits_in_parts(engine: &Arc<Engine>, tokens: &[u32], cuts: &[usize]) -> Vec<f32> {
    let mut session: Session = engine.session(tokens.len()).unwrap();
    let mut all = Vec::new();
    let ends = cuts.iter().copied().chain([tokens.len()]);
    let mut start = 0;
    for end in ends {
        session
            .score(&tokens[start..end], 0, |_, row| all.extend_from_slice(row))
            .unwrap();
        start = end;
    }
    all
}

fn prompt(engine: &Arc<Engine>, language: &str, len: usize) -> Vec<u32> {
    let text = fixture::text(language);
    let start: String = text.chars().take(20 * len).collect();
    let mut tokens = engine.tokenizer().encode_with_bos(&start, false).unwrap();
    assert!(tokens.len() >= len);
    tokens.truncate(len);
    tokens
}

fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

#[test]
fn f32_logits_are_those_of_transformers() {
    let golden = std::fs::read(fixture::path("golden/tiny-mixtral-logits.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&golden).unwrap();
    let model = fixture::tiny_mixtral("F32");
    let engine = model.load(&Options::default());
    for language in LANGUAGES {
        let words = |name: &str| -> Vec<[u8; 4]> {
            let tensor = golden.tensor(&format!("{language}.{name}")).unwrap();
            tensor.data().as_chunks().0.to_vec()
        };
        let tokens: Vec<u32> = words("tokens")
            .into_iter()
            .map(u32::from_le_bytes)
            .collect();
        let expected: Vec<f32> = words("logits")
            .into_iter()
            .map(f32::from_le_bytes)
            .collect();
        let difference = max_difference(&logits(&engine, &tokens), &expected);
        println!(
            "{language}: {} tokens, max |Δ| {difference:.2e}",
            tokens.len()
        );
        assert!(difference < 2e-3, "{language}: {difference}");
        let spread = max_difference(&expected, &vec![0.0; expected.len()]);
        assert!(spread > 1.0, "the golden logits say something");
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let model = fixture::tiny_mixtral("Q4_K_M");
    let with = |threads| {
        let engine = model.load(&Options {
            threads: Some(threads),
            ..Options::default()
        });
        logits(&engine, &prompt(&engine, "fr", 100))
    };
    let one = with(1);
    assert!(one == with(2), "two threads");
    assert!(one == with(5), "five threads");
}

#[test]
fn a_prompt_may_be_cut_anywhere_without_changing_a_bit() {
    for mix in ["Q4_K_M", "F16"] {
        let model = fixture::tiny_mixtral(mix);
        let engine = model.load(&Options::default());
        let tokens = prompt(&engine, "de", 600);
        let whole = logits(&engine, &tokens);
        for cuts in [&[1][..], &[64, 65, 66, 200], &[511], &[512], &[513], &[599]] {
            assert!(
                whole == logits_in_parts(&engine, &tokens, cuts),
                "{mix}, cut at {cuts:?}"
            );
        }
        let each: Vec<usize> = (1..100).collect();
        let head = &tokens[..100];
        assert!(
            whole[..100 * engine.shape().vocab] == logits_in_parts(&engine, head, &each)[..],
            "{mix}, one by one"
        );
    }
}

#[test]
fn a_rewound_session_goes_on_as_a_new_one() {
    let model = fixture::tiny_mixtral("Q8_0");
    let engine = model.load(&Options::default());
    let tokens = prompt(&engine, "es", 80);
    let mut session = engine.session(80).unwrap();
    session.feed(&tokens[..70]).unwrap();
    session.rewind(20);
    assert!(session.logits().is_empty());
    session.feed(&tokens[20..]).unwrap();
    let mut fresh = engine.session(80).unwrap();
    assert!(session.logits() == fresh.feed(&tokens).unwrap());
}

#[test]
fn one_tensor_an_expert_is_the_same_model() {
    let merged = fixture::tiny_mixtral("Q5_K_M");
    let parts = Parts::read(&merged.path).per_expert();
    let (merged, old) = (
        merged.load(&Options::default()),
        parts.write().load(&Options::default()),
    );
    assert!(old.gguf().tensors.len() > merged.gguf().tensors.len());
    let tokens = prompt(&merged, "it", 50);
    assert!(logits(&merged, &tokens) == logits(&old, &tokens));
}

#[test]
fn equal_experts_are_a_dense_model() {
    let file = fixture::tiny_mixtral("F32");
    let (mut equal, mut dense) = (Parts::read(&file.path), Parts::read(&file.path));
    dense
        .tensors
        .retain(|(decl, _)| !decl.name.contains("ffn_gate_inp"));
    dense.metadata.remove("llama.expert_count");
    dense.metadata.remove("llama.expert_used_count");
    for (decl, bytes) in &mut dense.tensors {
        if let Some(name) =
            names::parse(&decl.name).filter(|name| name.experts == names::Experts::All)
        {
            let name = names::block(name.layer, name.part);
            bytes.truncate(bytes.len() / decl.shape.pop().unwrap());
            decl.name = name;
        }
    }
    for (decl, bytes) in &mut equal.tensors {
        if decl.shape.len() == 3 {
            let first = bytes[..bytes.len() / decl.shape[2]].to_vec();
            *bytes = first.repeat(decl.shape[2]);
        }
    }
    let (equal, dense) = (
        equal.write().load(&Options::default()),
        dense.write().load(&Options::default()),
    );
    assert!(equal.shape().is_moe() && !dense.shape().is_moe());
    let tokens = prompt(&equal, "en", 50);
    let difference = max_difference(&logits(&equal, &tokens), &logits(&dense, &tokens));
    assert!(difference < 1e-3, "{difference}");
}

#[test]
fn a_tied_head_is_the_embedding() {
    let file = fixture::tiny_mixtral("F32");
    let (mut tied, mut copied) = (Parts::read(&file.path), Parts::read(&file.path));
    tied.tensors.retain(|(decl, _)| decl.name != names::OUTPUT);
    let embedding = copied.tensor(names::TOKEN_EMBD).1.clone();
    copied.tensor(names::OUTPUT).1 = embedding;
    let (tied, copied) = (
        tied.write().load(&Options::default()),
        copied.write().load(&Options::default()),
    );
    let tokens = prompt(&tied, "en", 20);
    assert!(logits(&tied, &tokens) == logits(&copied, &tokens));
}

#[test]
fn rope_factors_of_two_are_linear_scaling_by_two() {
    let file = fixture::tiny_mixtral("F32");
    let plain = file.load(&exact());
    let tokens = prompt(&plain, "en", 60);
    let rope = |change: &dyn Fn(&mut Parts)| {
        let mut parts = Parts::read(&file.path);
        change(&mut parts);
        logits(&parts.write().load(&exact()), &tokens)
    };
    let factors = |factor: f32| {
        move |parts: &mut Parts| {
            let shape = vec![32];
            let decl = TensorDecl {
                name: names::ROPE_FREQS.into(),
                kind: BlockType::F32,
                shape,
            };
            parts.tensors.push((
                decl,
                [factor; 32].iter().flat_map(|f| f.to_le_bytes()).collect(),
            ));
        }
    };
    let linear = rope(&|parts| {
        parts
            .metadata
            .insert("llama.rope.scaling.type", Value::String("linear".into()));
        parts
            .metadata
            .insert("llama.rope.scaling.factor", Value::F32(2.0));
    });
    assert!(
        logits(&plain, &tokens) == rope(&factors(1.0)),
        "factors of one change nothing"
    );
    assert!(linear == rope(&factors(2.0)));
    assert!(
        max_difference(&linear, &logits(&plain, &tokens)) > 0.1,
        "scaling does something"
    );
}

#[test]
fn a_sliding_window_forgets_what_lies_before_it() {
    let file = fixture::tiny_mixtral("F32");
    let with_window = |window: u32| {
        let mut parts = Parts::read(&file.path);
        parts
            .metadata
            .insert("llama.attention.sliding_window", Value::U32(window));
        parts.write().load(&Options::default())
    };
    let full = file.load(&Options::default());
    let vocab = full.shape().vocab;
    let tokens = prompt(&full, "en", 200);
    let (whole, windowed) = (logits(&full, &tokens), logits(&with_window(70), &tokens));
    assert!(
        whole[..70 * vocab] == windowed[..70 * vocab],
        "inside the window nothing changes"
    );
    assert!(whole[199 * vocab..] != windowed[199 * vocab..]);
    assert!(whole == logits(&with_window(200), &tokens));

    // Three layers of a window of 20 see 58 tokens: what came before makes no difference.
    let short = with_window(20);
    let mut other = tokens.clone();
    other[..100].reverse();
    let (a, b) = (logits(&short, &tokens), logits(&short, &other));
    assert!(a[99 * vocab..100 * vocab] != b[99 * vocab..100 * vocab]);
    assert!(a[160 * vocab..] == b[160 * vocab..]);
}

#[test]
fn a_tensor_that_the_graph_would_ignore_is_refused() {
    let file = fixture::tiny_mixtral("F32");
    let mut parts = Parts::read(&file.path);
    let decl = TensorDecl {
        name: "blk.0.attn_q.bias".into(),
        kind: BlockType::F32,
        shape: vec![256],
    };
    parts.tensors.push((decl, vec![0; 1024]));
    let file = parts.write();
    let error = Engine::load(&file.path, &Options::default())
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("blk.0.attn_q.bias") && error.contains("variant.gguf"),
        "{error}"
    );
}

#[test]
fn a_missing_or_misshapen_tensor_is_named() {
    let file = fixture::tiny_mixtral("F32");
    let error = |change: &dyn Fn(&mut Parts)| {
        let mut parts = Parts::read(&file.path);
        change(&mut parts);
        let file = parts.write();
        Engine::load(&file.path, &Options::default())
            .err()
            .unwrap()
            .to_string()
    };
    let missing = error(&|parts| {
        parts
            .tensors
            .retain(|(decl, _)| decl.name != "blk.1.attn_k.weight")
    });
    assert!(
        missing.contains("blk.1.attn_k.weight is missing"),
        "{missing}"
    );
    let misshapen = error(&|parts| parts.tensor("blk.1.attn_k.weight").0.shape.reverse());
    assert!(
        misshapen.contains("blk.1.attn_k.weight") && misshapen.contains("[128, 256]"),
        "{misshapen}"
    );
}

#[test]
fn what_does_not_fit_is_refused_and_leaves_the_session_as_it_was() {
    let model = fixture::tiny_mixtral("Q4_0");
    let engine = model.load(&Options::default());
    let mut session = engine.session(10).unwrap();
    assert!(session.feed(&[]).unwrap_err().to_string().contains("empty"));
    assert!(
        session
            .feed(&[1; 11])
            .unwrap_err()
            .to_string()
            .contains("11 tokens")
    );
    assert!(
        session
            .feed(&[1, 5000])
            .unwrap_err()
            .to_string()
            .contains("5000")
    );
    assert!(session.tokens().is_empty());
    session.feed(&[1, 2, 3]).unwrap();
    assert_eq!(session.tokens(), [1, 2, 3]);
}

/// Chat with several sessions at once gives each the bits that it would have alone.
#[test]
fn a_batch_of_several_timelines_changes_no_bit() {
    let file = fixture::tiny_mixtral("Q4_K_M");
    let gguf = gguf::read(&file.path).unwrap();
    let model = Model::open(&gguf, Placement::Mapped).unwrap();
    let engine = file.load(&Options::default());
    let (pool, kernels) = (Pool::new(2).unwrap(), Kernels::best());
    let vocab = engine.shape().vocab;
    let prompts =
        [("en", 9), ("fr", 40), ("it", 1)].map(|(language, len)| prompt(&engine, language, len));

    let mut state = State::new(&model.config);
    let mut caches: Vec<KvCache> = prompts
        .iter()
        .map(|_| KvCache::new(&model.config, KvKind::F16, 64).unwrap())
        .collect();
    for tail in [&[5u32, 6][..], &[7]] {
        // First the prompts together, then a few tokens more for each.
        let tokens: Vec<&[u32]> = prompts
            .iter()
            .map(|prompt| {
                if caches[0].len == 0 {
                    &prompt[..]
                } else {
                    tail
                }
            })
            .collect();
        let before: Vec<usize> = caches.iter().map(|cache| cache.len).collect();
        let slots = caches.iter_mut().zip(&tokens).map(|(cache, tokens)| Slot {
            cache,
            tokens,
            logits_from: 0,
        });
        forward(
            &model,
            &pool,
            kernels,
            Phase::Prompt,
            &mut state,
            slots.collect(),
        )
        .unwrap();
        let mut together = state.logits.chunks_exact(vocab);
        for ((prompt, tokens), before) in prompts.iter().zip(&tokens).zip(before) {
            let whole = if before == 0 {
                prompt.clone()
            } else {
                [prompt, *tokens].concat()
            };
            let alone = logits(&engine, &whole);
            for row in alone.chunks_exact(vocab).skip(before) {
                assert!(row == together.next().unwrap());
            }
        }
    }
}

#[test]
fn linear_scaling_brings_positions_together() {
    let file = fixture::tiny_mixtral("F32");
    let scaled = |factor: f32| {
        let mut parts = Parts::read(&file.path);
        parts
            .metadata
            .insert("llama.rope.scaling.type", Value::String("linear".into()));
        parts
            .metadata
            .insert("llama.rope.scaling.factor", Value::F32(factor));
        let engine = parts.write().load(&exact());
        logits(&engine, &prompt(&engine, "en", 40))
    };
    // Divided by 10⁹, all positions are one; divided by less, they are less so.
    let one = scaled(1e9);
    let [far, near] = [1.0, 4096.0].map(|factor| max_difference(&scaled(factor), &one));
    assert!(far > 0.5 && near < 0.05, "{far} {near}");
}

#[test]
fn damaged_weights_are_named_and_not_sampled_from() {
    let file = fixture::tiny_mixtral("F32");
    let mut parts = Parts::read(&file.path);
    parts.tensor(names::OUTPUT_NORM).1[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let file = parts.write();
    let engine = file.load(&Options::default());
    let mut session = engine.session(8).unwrap();
    let error = session.feed(&[1, 5]).unwrap_err().to_string();
    assert!(
        error.contains("variant.gguf") && error.contains("--check"),
        "{error}"
    );
    assert!(session.tokens().is_empty());
}

#[test]
fn a_context_takes_memory_only_as_it_fills_and_an_absurd_one_is_refused() {
    let file = fixture::tiny_mixtral("F16");
    let engine = file.load(&Options::default());
    let resident = || {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    };
    let before = resident();
    // 1.5 KiB a token.
    let mut session = engine.session(1 << 20).unwrap();
    session.feed(&[1, 2, 3]).unwrap();
    let taken = resident().saturating_sub(before);
    assert!(taken < 200 << 20, "{taken} bytes for three tokens");
    for context in [1 << 50, usize::MAX] {
        let error = engine.session(context).err().unwrap().to_string();
        assert!(error.contains("--ctx"), "{error}");
    }
}
