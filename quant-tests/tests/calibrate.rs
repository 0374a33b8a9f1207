//! Statistics of the fixture: they are those of the inputs, and the converter makes better files of them.

use std::path::Path;
use std::sync::Arc;

use fewbit::calibrate::journal::{Fingerprint, Journal};
use fewbit::calibrate::{Coverage, Options, Plan};
use fewbit::engine::{self, ActivationMode, Engine};
use fewbit::gguf::{self, names};
use fewbit::model::Site;
use fewbit::perplexity::{Chunks, Tally, score};
use fewbit_convert::round::Round;
use fewbit_convert::{Options as Conversion, convert};
use quant_tests::fixture;

const CONTEXT: usize = 512;

fn exact(path: &Path, threads: usize) -> Arc<Engine> {
    let options = engine::Options {
        threads: Some(threads),
        activations: ActivationMode::F32,
        ..Default::default()
    };
    Engine::load(path, &options).unwrap()
}

/// Calibrates on the beginning of a text.
fn calibrate(engine: &Arc<Engine>, language: &str, chunks: usize, output: &Path) -> Coverage {
    let text = fixture::text(language);
    let chunks = Chunks::new(engine.tokenizer(), &text, CONTEXT, Some(chunks)).unwrap();
    let texts: Vec<_> = (0..chunks.len()).map(|i| chunks.tokens(i)).collect();
    let options = Options {
        width: Some(256),
        dataset: language.to_owned(),
        chunk_size: CONTEXT,
    };
    let journal = journal_of(engine, &texts, &options, output);
    let plan = Plan::new(engine, texts.len(), options, None).unwrap();
    plan.run(engine, texts, output, &journal, || ()).unwrap()
}

fn journal_of(engine: &Engine, texts: &[Vec<u32>], options: &Options, output: &Path) -> Journal {
    Journal::new(
        output,
        Fingerprint::new(engine.path(), texts, options, None),
    )
}

fn floats(path: &Path, name: &str) -> Vec<f32> {
    let gguf = gguf::read(path).unwrap();
    let info = gguf
        .tensor(name)
        .unwrap_or_else(|| panic!("no tensor {name}"));
    let bytes = std::fs::read(path).unwrap();
    let bytes = &bytes[info.offset as usize..][..info.bytes as usize];
    let (values, _) = bytes.as_chunks::<4>();
    values.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// What layers walked one by one give the output head is what whole passes give it: the logits are the same bits.
#[test]
fn a_walk_through_the_layers_ends_where_a_pass_does() {
    let file = fixture::tiny_mixtral("F32");
    let engine = exact(&file.path, 2);
    let text = fixture::text("en");
    let tokens = engine.tokenizer().encode_with_bos(&text, false).unwrap();
    let texts = vec![tokens[..70].to_vec(), tokens[70..300].to_vec()];

    let mut heads = Vec::new();
    let mut walk = engine.walk(texts.clone()).unwrap();
    while walk.next_layer().is_some() {
        let mut see = |site, rows: &fewbit::kernels::Activations, _: Option<&_>| {
            if site == Site::Output {
                heads.push(rows.row(rows.len() - 1).x.to_vec());
            }
        };
        walk.step(&mut see, || ()).unwrap();
    }
    let mapped = fewbit::tensor::Mapped::open(engine.gguf()).unwrap();
    let output = engine.gguf().tensor(names::OUTPUT).unwrap();
    let output = mapped.matrix(fewbit::tensor::Extent::all(output).remove(0));
    assert_eq!(heads.len(), texts.len());
    for (head, text) in heads.iter().zip(&texts) {
        let mut session = engine.session(CONTEXT).unwrap();
        let logits = session.feed(text).unwrap();
        let mut row = vec![0.0; head.len()];
        for (index, logit) in logits.iter().enumerate() {
            output.all().decode(index, &mut row);
            let expected: f64 = row.iter().zip(head).map(|(a, b)| f64::from(a * b)).sum();
            assert!((expected - f64::from(*logit)).abs() < 1e-4, "{index}");
        }
    }
}

#[test]
fn sums_are_those_of_the_inputs_whatever_the_threads() {
    let file = fixture::tiny_mixtral("F32");
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = [1, 2].map(|threads| {
        let path = dir.path().join(format!("{threads}.gguf"));
        let coverage = calibrate(&exact(&file.path, threads), "en", 2, &path);
        (path, coverage)
    });
    assert!(
        std::fs::read(&one.0).unwrap() == std::fs::read(&two.0).unwrap(),
        "statistics depend on the number of threads"
    );

    let (path, coverage) = one;
    let engine = exact(&file.path, 1);
    let (shape, tokens) = (engine.shape(), 2 * CONTEXT as u64);
    assert_eq!(coverage.tokens, tokens);
    for layer in 0..shape.layers {
        let seen: u64 = coverage.experts[layer].iter().sum();
        assert_eq!(seen, tokens * shape.experts_used as u64);
        let counts = floats(&path, &(names::experts(layer, names::FFN_UP) + ".counts"));
        let expected: Vec<f32> = coverage.experts[layer].iter().map(|&c| c as f32).collect();
        assert_eq!(counts, expected);

        // Without a router's weight, the diagonal of the moments is the sum of the squares.
        let name = names::block(layer, names::ATTN_Q);
        let squares = floats(&path, &format!("{name}.in_sum2"));
        let moments = floats(&path, &format!("{name}.moments"));
        let width = moments.len() / shape.hidden;
        for (column, square) in squares.iter().enumerate() {
            let own = moments[column * width + column % width];
            assert!((own - square).abs() <= 1e-4 * square, "{name} {column}");
        }
        // A router's weight is below 1: no expert's moments reach the sums, and all of an expert's
        // rows are in them.
        let name = names::experts(layer, names::FFN_DOWN);
        let squares = floats(&path, &format!("{name}.in_sum2"));
        let moments = floats(&path, &format!("{name}.moments"));
        for (index, square) in squares.iter().enumerate() {
            let own = moments[index * width + index % shape.ffn % width];
            assert!(own <= square * 1.0001, "{name} {index}");
            assert!(own > 0.0 || *square == 0.0, "{name} {index}");
        }
    }
}

/// A run is cut off after each of the layers in turn, and the next goes on; the file is that of a run at once.
#[test]
fn a_calibration_that_was_cut_off_goes_on() {
    let file = fixture::tiny_mixtral("F32");
    let dir = tempfile::tempdir().unwrap();
    let [whole, cut] = ["whole", "cut"].map(|name| dir.path().join(name));
    let engine = exact(&file.path, 2);
    let coverage = calibrate(&engine, "en", 2, &whole);

    let text = fixture::text("en");
    let chunks = Chunks::new(engine.tokenizer(), &text, CONTEXT, Some(2)).unwrap();
    let texts: Vec<_> = (0..2).map(|i| chunks.tokens(i)).collect();
    let options = Options {
        width: Some(256),
        dataset: "en".to_owned(),
        chunk_size: CONTEXT,
    };
    let journal = journal_of(&engine, &texts, &options, &cut);
    let layers = engine.shape().layers;
    assert!(layers > 2);
    for layer in 1..layers {
        // A panic in the middle of a layer stands for a power cut.
        let mut left = 2 * layer + 1;
        let run = || {
            let plan = Plan::new(&engine, 2, options.clone(), None).unwrap();
            plan.run(&engine, texts.clone(), &cut, &journal, || {
                left -= 1;
                assert!(left > 0, "the power is gone");
            })
        };
        let run = std::panic::AssertUnwindSafe(run);
        assert!(std::panic::catch_unwind(run).is_err());
        assert_eq!(journal.state().unwrap().layers, layer);
        assert!(!cut.exists());
    }
    // Another text does not take it up.
    let others = journal_of(&engine, &texts[..1], &options, &cut);
    assert!(others.state().is_none());
    let plan = Plan::new(&engine, 2, options.clone(), None).unwrap();
    let again = plan.run(&engine, texts, &cut, &journal, || ()).unwrap();
    assert_eq!(
        (again.tokens, &again.experts),
        (coverage.tokens, &coverage.experts)
    );
    assert!(std::fs::read(&whole).unwrap() == std::fs::read(&cut).unwrap());
    let left = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(left, 2, "files are left behind");
}

/// Mean divergence from the F32 fixture on the end of the English text.
fn divergence(base: &Arc<Engine>, path: &Path) -> f64 {
    let engine = exact(path, 2);
    let text = fixture::text("en");
    let from = text.len() / 2;
    let from = (from..).find(|&at| text.is_char_boundary(at)).unwrap();
    let chunks = Chunks::new(base.tokenizer(), &text[from..], CONTEXT, Some(6)).unwrap();
    let (mut ours, mut theirs) = (
        engine.session(CONTEXT).unwrap(),
        base.session(CONTEXT).unwrap(),
    );
    let mut tally = Tally::default();
    for part in 0..chunks.parts() {
        let base = score(&mut theirs, &chunks, part).unwrap();
        let scored = score(&mut ours, &chunks, part).unwrap();
        tally.add(engine.pool(), &scored, Some(&base));
    }
    tally.divergence().kld.value
}

#[test]
fn rounding_by_what_is_lost_comes_nearer_to_the_model() {
    let file = fixture::tiny_mixtral("F32");
    let dir = tempfile::tempdir().unwrap();
    let stats = dir.path().join("stats.gguf");
    let base = exact(&file.path, 2);
    calibrate(&base, "en", 20, &stats);
    let mut ratios = Vec::new();
    for mix in ["Q3_K_M", "Q4_K_M", "IQ4_XS", "Q5_K_M"] {
        let [ggml, best, gptq] = [Round::Ggml, Round::Best, Round::Gptq].map(|round| {
            let path = dir.path().join(format!("{mix}-{round}.gguf"));
            let options = Conversion {
                imatrix: Some(stats.clone()),
                round,
                ..Conversion::new(mix.parse().unwrap())
            };
            let bar = indicatif::ProgressBar::hidden();
            convert(&file.path, &path, &options, &bar).unwrap();
            (
                divergence(&base, &path),
                std::fs::metadata(&path).unwrap().len(),
            )
        });
        println!(
            "{mix}: ggml {:.5}, best {:.5}, gptq {:.5}",
            ggml.0, best.0, gptq.0
        );
        assert!(ggml.1 == best.1 && ggml.1 == gptq.1, "{mix}: other sizes");
        ratios.push([best.0 / ggml.0, gptq.0 / ggml.0]);
    }
    let mean = |of: usize| ratios.iter().map(|r| r[of]).sum::<f64>() / ratios.len() as f64;
    assert!(mean(0) < 0.98, "best: {ratios:?}");
    assert!(ratios.iter().all(|r| r[0] < 1.01), "best: {ratios:?}");
    assert!(mean(1) < 0.9, "gptq: {ratios:?}");
    assert!(ratios.iter().all(|r| r[1] < 0.97), "gptq: {ratios:?}");
}
