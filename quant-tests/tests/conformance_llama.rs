//! Whole models against llama.cpp: our files load there, and its logits agree with ours.
//!
//! `cargo test -p quant-tests --features ggml --test conformance_llama -- --show-output`
//!
//! Both engines see the same tokens, in chunks of 512 that are scored as llama-perplexity does.
//! llama.cpp is set up as `ggml_sys_bindings::llama` says: keys and values in f16, as ours, and no
//! flash attention. It still rounds where fewbit does not: queries and attention weights to
//! f16, to meet the keys and values; activations to f16 or BF16, to meet rows of these types; and to
//! 8 bits with one scale for 256, to meet K-quants (fewbit: one for 32).
#![cfg(feature = "ggml")]

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fewbit::bench::ggml::Rival;
use fewbit::bench::{Test, Times};
use fewbit::engine::{ActivationMode, Engine, Options};
use fewbit::gguf;
use fewbit::perplexity::{Chunks, Estimate, Scored, Tally, score};
use fewbit::threads::Pool;
use fewbit::tokenizer::Tokenizer;
use fewbit_convert::config::ModelConfig;
use fewbit_convert::recipe::Mix;
use fewbit_convert::synth::{self, Preset, synth};
use ggml_sys_bindings::llama;
use quant_tests::fixture::{self, LANGUAGES, ModelFile};

/// Tokens of a chunk, as llama-perplexity's default.
const CONTEXT: usize = 512;

/// Threads of either engine.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| cores.get().min(2))
}

/// Both engines' threads spin while they wait: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static RUNNING: Mutex<()> = Mutex::new(());
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

fn load(path: &Path, activations: ActivationMode) -> Arc<Engine> {
    let options = Options {
        threads: Some(threads()),
        activations,
        ..Options::default()
    };
    Engine::load(path, &options).expect("the file loads")
}

/// Our logits on every chunk.
fn ours<'a>(path: &Path, activations: ActivationMode, texts: &'a [Chunks]) -> Vec<Scored<'a>> {
    let engine = load(path, activations);
    let mut session = engine.session(texts[0].context()).expect("the cache fits");
    let chunks = texts
        .iter()
        .flat_map(|text| (0..text.len()).map(move |i| (text, i)));
    chunks
        .map(|(text, i)| score(&mut session, text, i).expect("the chunk fits"))
        .collect()
}

/// llama.cpp's logits on every chunk.
fn theirs<'a>(path: &Path, texts: &'a [Chunks]) -> Vec<Scored<'a>> {
    let model = llama::Model::load(path).expect("llama.cpp loads the file");
    let settings = llama::Settings::exact(texts[0].context(), threads());
    let mut context = model.context(settings).expect("llama.cpp makes a context");
    let chunks = texts
        .iter()
        .flat_map(|text| (0..text.len()).map(move |i| (text, i)));
    chunks
        .map(|(text, i)| {
            let mut logits = context.logits(&text.tokens(i), text.scored().start);
            // What follows the last token is in the next chunk.
            logits.truncate(logits.len() - model.vocab_len());
            Scored::from_logits(text, i, logits)
        })
        .collect()
}

/// The same weights in F32: what the file says, without the rounding of activations (and far
/// faster than `ActivationMode::F32`, which decodes each row anew for every token).
fn decoded(path: &Path) -> ModelFile {
    fixture::converted(path, "F32")
}

fn compare(model: &[Scored<'_>], base: &[Scored<'_>]) -> Tally {
    let pool = Pool::new(1).expect("a pool");
    let mut tally = Tally::default();
    for (model, base) in model.iter().zip(base) {
        tally.add(&pool, model, Some(base));
    }
    tally
}

/// SmolLM2-135M-Instruct, most of it in Q4_1: dense, byte-level BPE, tied embeddings, rows that
/// K-quants do not fill.
fn smollm2() -> PathBuf {
    let path = std::env::var_os("FEWBIT_SMOLLM2").unwrap_or_else(|| {
        panic!("FEWBIT_SMOLLM2 names no file: `quant-tests/fetch-smollm2.sh scratch` fetches it")
    });
    path.into()
}

/// The fixture's held-out texts, the same number of chunks of each language.
fn fixture_texts(model: &Path, context: usize, chunks: usize) -> Vec<Chunks> {
    LANGUAGES
        .map(|language| text(model, language, context, chunks))
        .into()
}

/// The held-out text of a language in the tokens of `model`.
fn text(model: &Path, language: &str, context: usize, chunks: usize) -> Chunks {
    let tokenizer = Tokenizer::from_metadata(&gguf::read(model).expect("sound").metadata)
        .expect("the file has a vocabulary");
    Chunks::new(&tokenizer, &fixture::text(language), context, Some(chunks))
        .expect("the text is long enough")
}

/// llama.cpp's logits are ours, for a file that neither engine rounds activations to 8 bits for.
fn assert_same_model(name: &str, ours: &[Scored<'_>], theirs: &[Scored<'_>]) {
    let tally = compare(theirs, ours);
    let divergence = tally.divergence();
    println!(
        "{name}: {} positions, KL(ours ‖ llama.cpp) {:.2e} (at most {:.1e}), same top {:.3} %, \
         PPL ours {:.4}, llama.cpp {:.4}",
        tally.tokens(),
        divergence.kld.value,
        divergence.kld_percentile(1.0),
        100.0 * divergence.same_top,
        divergence.base.value,
        tally.perplexity().value,
    );
    assert!(divergence.kld.value < 1e-4, "{name}: divergence");
    assert!(divergence.same_top > 0.995, "{name}: top tokens");
    assert!(divergence.ln_ratio.value.abs() < 1e-3, "{name}: perplexity");
}

/// Against the model before it was quantized, our logits from a file are as near as llama.cpp's
/// from the same file.
///
/// Both hold the error of the weights, which is the same, and each its own of rounding the
/// activations. Where the two round alike (types whose activations llama.cpp, too, scales by
/// 32), the difference is chance: it may be against us by three of its standard errors, that
/// of the paired differences. What rounding alone costs is seen against the exact products of
/// the same file. There the mean hangs on the few positions at which a router's choice flips, so the
/// medians are compared, too: two of `n` such positions differ by chance by about `2/√n` of
/// their value, and twice that is allowed.
fn assert_as_near(name: &str, path: &Path, base: &[Scored<'_>], texts: &[Chunks]) {
    let exact = ours(&decoded(path).path, ActivationMode::F32, texts);
    let fast = ours(path, ActivationMode::Int8, texts);
    let rival = theirs(path, texts);
    let (ours, rivals, file) = (
        compare(&fast, base),
        compare(&rival, base),
        compare(&exact, base),
    );
    let (our_rounding, their_rounding) = (compare(&fast, &exact), compare(&rival, &exact));
    let difference = |a: &Tally, b: &Tally| {
        let pairs: Vec<f64> = a
            .divergences()
            .zip(b.divergences())
            .map(|(a, b)| a - b)
            .collect();
        Estimate::of_mean(pairs.into_iter())
    };
    let gap = difference(&ours, &rivals);
    let rounding_gap = difference(&our_rounding, &their_rounding);
    let mean = |tally: &Tally| tally.divergence().kld.value;
    let median = |tally: &Tally| tally.divergence().kld_percentile(0.5);
    println!(
        "{name}: KLD from F32: exact {:.6}, ours {:.6}, llama.cpp {:.6}, gap {:+.1e} ± {:.1e}; \
         from exact: ours {:.2e} (median {:.2e}), llama.cpp {:.2e} ({:.2e}), gap {:+.1e} ± {:.1e}; \
         PPL ours {:.4}, llama.cpp {:.4}",
        mean(&file),
        mean(&ours),
        mean(&rivals),
        gap.value,
        gap.se,
        mean(&our_rounding),
        median(&our_rounding),
        mean(&their_rounding),
        median(&their_rounding),
        rounding_gap.value,
        rounding_gap.se,
        ours.perplexity().value,
        rivals.perplexity().value,
    );
    assert!(
        gap.value <= 3.0 * gap.se,
        "{name}: farther from F32 than llama.cpp"
    );
    assert!(
        rounding_gap.value <= 3.0 * rounding_gap.se,
        "{name}: rounding costs more than llama.cpp's"
    );
    let chance = 4.0 / (ours.tokens() as f64).sqrt();
    assert!(
        median(&our_rounding) <= median(&their_rounding) * (1.0 + chance),
        "{name}: rounding mostly costs more than llama.cpp's"
    );
}

#[test]
fn every_mix_loads_in_llama_cpp() {
    let _alone = alone();
    let texts = fixture_texts(&fixture::tiny_mixtral("Q8_0").path, 128, 1);
    for mix in Mix::all() {
        let file = fixture::tiny_mixtral(mix.name());
        let exact = ours(&decoded(&file.path).path, ActivationMode::F32, &texts);
        let divergence = compare(&theirs(&file.path, &texts), &exact).divergence();
        println!(
            "{mix}: KL(exact ‖ llama.cpp) {:.2e}, same top {:.1} %",
            divergence.kld.value,
            100.0 * divergence.same_top
        );
        assert!(divergence.kld.value < 0.01, "{mix}: another model");
        // The reference of `--activations f32` says the same as the decoded weights.
        let reference = ours(&file.path, ActivationMode::F32, &texts[..1]);
        let kld = compare(&reference, &exact).divergence().kld.value;
        assert!(kld < 1e-8, "{mix}: {kld} from its decoded weights");
    }
}

#[test]
fn f32_and_f16_logits_of_the_fixture_are_llama_cpp_s() {
    let _alone = alone();
    for mix in ["F32", "F16"] {
        let file = fixture::tiny_mixtral(mix);
        let texts = fixture_texts(&file.path, CONTEXT, 3);
        assert_same_model(
            mix,
            &ours(&file.path, ActivationMode::Int8, &texts),
            &theirs(&file.path, &texts),
        );
    }
}

#[test]
fn quantized_fixtures_are_as_near_to_f32_as_in_llama_cpp() {
    let _alone = alone();
    let base = fixture::tiny_mixtral("F32");
    let texts = fixture_texts(&base.path, CONTEXT, 3);
    let base = ours(&base.path, ActivationMode::F32, &texts);
    for mix in ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"] {
        assert_as_near(mix, &fixture::tiny_mixtral(mix).path, &base, &texts);
    }
}

#[test]
fn synthetic_files_load_in_llama_cpp() {
    let _alone = alone();
    let dir = tempfile::tempdir().expect("a temporary folder");
    for preset in Preset::ALL {
        let published = preset.config();
        let path = dir.path().join(format!("{preset}.gguf"));
        let options = synth::Options {
            name: preset.name().to_owned(),
            config: ModelConfig {
                vocab: 512,
                hidden: 256,
                layers: 2,
                ffn: 512,
                heads: 8,
                kv_heads: 8 * published.kv_heads / published.heads.next_power_of_two(),
                head_dim: 32,
                ..published
            },
            mix: Mix::Q4_K_M,
            seed: 1,
            zipf: 0.0,
            force: false,
        };
        synth(&path, &options, &indicatif::ProgressBar::hidden()).expect("the file is written");
        let texts = [text(&path, "en", 128, 2)];
        let exact = ours(&decoded(&path).path, ActivationMode::F32, &texts);
        let kld = compare(&theirs(&path, &texts), &exact)
            .divergence()
            .kld
            .value;
        println!("{preset}: KL(exact ‖ llama.cpp) {kld:.2e}");
        assert!(kld < 0.01, "{preset}: another model");
    }
}

#[test]
fn smollm2_agrees_with_llama_cpp() {
    let _alone = alone();
    let source = smollm2();
    let base = decoded(&source);
    let texts = [text(&source, "en", CONTEXT, 2)];
    let reference = ours(&base.path, ActivationMode::F32, &texts);
    assert_same_model("SmolLM2 F32", &reference, &theirs(&base.path, &texts));
    {
        let half = fixture::converted(&source, "F16");
        let ours = ours(&half.path, ActivationMode::Int8, &texts);
        assert_same_model("SmolLM2 F16", &ours, &theirs(&half.path, &texts));
    }
    assert_as_near("SmolLM2 Q4_1", &source, &reference, &texts);
    for mix in ["Q8_0", "Q4_K_M"] {
        let file = fixture::converted(&source, mix);
        assert_as_near(&format!("SmolLM2 {mix}"), &file.path, &reference, &texts);
    }
}

/// `fewbit bench --against ggml`: both ways of the rival run what ours runs, and its threads are
/// there again after they slept.
#[test]
fn the_rival_runs_every_test_in_turns_with_us() {
    let _alone = alone();
    let file = fixture::tiny_mixtral("Q4_0");
    let engine = load(&file.path, ActivationMode::Int8);
    let rival = Rival::load(&file.path).unwrap();
    let generate = |depth| Test::Generate {
        tokens: 3,
        depth,
        repeats: 0.0,
    };
    for test in [Test::Prompt(40), generate(0), generate(33)] {
        let mut session = engine.session(test.context()).unwrap();
        let [mut in_place, mut repacked] = rival.runners(test.context(), threads()).unwrap();
        let order = RefCell::new(Vec::new());
        let in_turn = |name, time: anyhow::Result<Duration>| {
            order.borrow_mut().push(name);
            time
        };
        let times = Times::alternate(
            test,
            2,
            &mut [
                &mut |seed| in_turn("ours", Ok(test.run(&mut session, seed)?)),
                &mut |seed| in_turn("in place", Ok(in_place.run(test, seed)?)),
                &mut |seed| in_turn("repacked", Ok(repacked.run(test, seed)?)),
            ],
        )
        .unwrap();
        assert_eq!(
            order.into_inner(),
            ["ours", "in place", "repacked"].repeat(3)
        );
        assert!(times.iter().all(|times| times.tok_s().is_finite()));
    }
}
