//! What rounding costs: the tiles of a prompt and the dots of single tokens against exact products of
//! the same file, and against each other.
//!
//! On the fixture these are bounded. For the files of a folder (`make bed`) they are printed:
//!
//! `FEWBIT_BED=scratch/bed cargo test -p quant-tests --release --test rounding -- --ignored --show-output`

use std::path::{Path, PathBuf};
use std::sync::Arc;

use fewbit::engine::{ActivationMode, Engine, Options, Session};
use fewbit::perplexity::{Chunks, Estimate, Scored, Tally, score};
use quant_tests::fixture::{self, LANGUAGES};

const CONTEXT: usize = 512;

/// Mean divergences in nats.
struct Rounding {
    /// KL(exact ‖ prompt): what rounding costs where tokens go through tiles.
    prompt: Estimate,
    /// KL(exact ‖ steps): the same where they go one by one through dots.
    steps: Estimate,
    /// KL(prompt ‖ steps).
    apart: Estimate,
}

/// Measures a file on the first chunks of held-out texts.
fn rounding(path: &Path, languages: &[&str], chunks: usize) -> Rounding {
    let load = |activations| {
        let options = Options {
            activations,
            ..Options::default()
        };
        Engine::load(path, &options).unwrap_or_else(|error| panic!("{error}"))
    };
    let (fast, exact) = (load(ActivationMode::Int8), load(ActivationMode::F32));
    let session = |engine: &Arc<Engine>| engine.session(CONTEXT).unwrap();
    let (mut prompted, mut stepped, mut reference) =
        (session(&fast), session(&fast), session(&exact));
    let mut tallies: [Tally; 3] = Default::default();
    for language in languages {
        let text = fixture::text(language);
        let chunks = Chunks::new(fast.tokenizer(), &text, CONTEXT, Some(chunks)).unwrap();
        for index in 0..chunks.len() {
            let exact = score(&mut reference, &chunks, index).unwrap();
            let prompt = score(&mut prompted, &chunks, index).unwrap();
            let steps = score_by_steps(&mut stepped, &chunks, index);
            let pairs = [(&prompt, &exact), (&steps, &exact), (&steps, &prompt)];
            for (tally, (model, base)) in tallies.iter_mut().zip(pairs) {
                tally.add(fast.pool(), model, Some(base));
            }
        }
    }
    let [prompt, steps, apart] = tallies.map(|tally| tally.divergence().kld);
    Rounding {
        prompt,
        steps,
        apart,
    }
}

/// As `score`, by the kernels for single tokens.
fn score_by_steps<'a>(session: &mut Session, chunks: &'a Chunks, index: usize) -> Scored<'a> {
    session.rewind(0);
    let mut logits = Vec::new();
    for (position, token) in chunks.tokens(index).into_iter().enumerate() {
        let row = session.step(token).unwrap();
        if chunks.scored().contains(&position) {
            logits.extend_from_slice(row);
        }
    }
    Scored::from_logits(chunks, index, logits)
}

fn print(name: &str, rounding: &Rounding) {
    let figure = |estimate: Estimate| format!("{:.2e} ± {:.0e}", estimate.value, estimate.se);
    println!(
        "{name}: exact ‖ prompt {}, exact ‖ steps {}, prompt ‖ steps {}",
        figure(rounding.prompt),
        figure(rounding.steps),
        figure(rounding.apart)
    );
}

#[test]
fn prompts_and_single_steps_are_near_exact_products_and_nearer_each_other() {
    for mix in ["Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16"] {
        let file = fixture::tiny_mixtral(mix);
        // Thousands of positions: at one of a thousand the router's choice hangs on the last bits, and
        // another expert is worth a nat.
        let rounding = rounding(&file.path, &LANGUAGES, 4);
        print(mix, &rounding);
        assert!(rounding.prompt.value < 1e-3, "{mix}: prompt");
        assert!(rounding.steps.value < 1e-3, "{mix}: steps");
        assert!(rounding.apart.value.abs() < 1e-3, "{mix}: phases");
    }
}

#[test]
#[ignore = "needs FEWBIT_BED, a folder of models; minutes each"]
fn what_rounding_costs_on_the_bed() {
    let dir = std::env::var_os("FEWBIT_BED").expect("FEWBIT_BED names a folder of GGUF files");
    let entries = std::fs::read_dir(&dir).expect("the folder can be read");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "gguf")
    });
    files.sort();
    assert!(!files.is_empty(), "no GGUF files in {}", dir.display());
    for file in files {
        print(&file.display().to_string(), &rounding(&file, &["en"], 2));
    }
}
