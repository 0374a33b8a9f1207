//! Types chosen for a size: what is measured is what rounding costs, and the file is what was promised.

use std::path::Path;
use std::sync::Arc;

use fewbit::calibrate::journal::{Fingerprint, Journal};
use fewbit::calibrate::sensitivity::{self, DEGRADED, Sensitivity};
use fewbit::calibrate::{Options, Plan};
use fewbit::engine::{self, ActivationMode, Engine};
use fewbit::gguf;
use fewbit::gguf::with_suffix;
use fewbit::perplexity::{Chunks, Tally, score};
use fewbit_convert::fit::{Target, read_list};
use fewbit_convert::recipe::Mix;
use fewbit_convert::{Error, Options as Conversion, Report, convert};
use indicatif::ProgressBar;
use quant_tests::fixture;

const CONTEXT: usize = 512;

fn exact(path: &Path) -> Arc<Engine> {
    let options = engine::Options {
        threads: Some(2),
        activations: ActivationMode::F32,
        ..Default::default()
    };
    Engine::load(path, &options).unwrap()
}

fn chunks(engine: &Engine, text: &str, count: usize) -> Chunks {
    Chunks::new(engine.tokenizer(), text, CONTEXT, Some(count)).unwrap()
}

/// Statistics of the beginning of the English text, with sensitivities or without.
fn calibrate(engine: &Arc<Engine>, output: &Path, sensitive: bool) -> Option<Sensitivity> {
    let chunks = chunks(engine, &fixture::text("en"), 20);
    let options = sensitivity::Options { band: 1, chunks: 4 };
    let measure = || sensitivity::measure(engine, std::slice::from_ref(&chunks), options, || ());
    let sensitivity = sensitive.then(|| measure().unwrap());
    let texts: Vec<_> = (0..chunks.len()).map(|i| chunks.tokens(i)).collect();
    let options = Options {
        width: None,
        dataset: "en".to_owned(),
        chunk_size: CONTEXT,
    };
    let journal = Journal::new(
        output,
        Fingerprint::new(engine.path(), &texts, &options, None),
    );
    let plan = Plan::new(engine, texts.len(), options, sensitivity.as_ref()).unwrap();
    plan.run(engine, texts, output, &journal, || ()).unwrap();
    sensitivity
}

fn run(input: &Path, output: &Path, options: &Conversion) -> Result<Report, Error> {
    convert(input, output, options, &ProgressBar::hidden())
}

/// Mean divergence of the file at `path` from `base`.
fn divergence(base: &Arc<Engine>, path: &Path, chunks: &Chunks) -> f64 {
    let engine = exact(path);
    let mut sessions = [&engine, base].map(|engine| engine.session(CONTEXT).unwrap());
    let mut tally = Tally::default();
    for part in 0..chunks.parts() {
        let [ours, theirs] = sessions.each_mut().map(|s| score(s, chunks, part).unwrap());
        tally.add(engine.pool(), &ours, Some(&theirs));
    }
    tally.divergence().kld.value
}

#[test]
fn a_group_s_sensitivity_is_the_divergence_of_the_file_in_which_it_is_rounded() {
    let file = fixture::tiny_mixtral("F32");
    let base = exact(&file.path);
    let dir = tempfile::tempdir().unwrap();
    let chunks = chunks(&base, &fixture::text("fr"), 2);
    let options = sensitivity::Options { band: 2, chunks: 2 };
    let all = sensitivity::measure(&base, std::slice::from_ref(&chunks), options, || ()).unwrap();
    let parts = ["token_embd", "output", "blk.0.attn_v", "ffn_down_exps"];
    for part in parts {
        let group = all
            .groups()
            .iter()
            .rfind(|group| group.tensors[0].contains(part));
        let group = group.unwrap_or_else(|| panic!("no group of {part}"));
        let path = dir.path().join(format!("{part}.gguf"));
        let mut options = Conversion::new(Mix::F32);
        for name in &group.tensors {
            let pattern = format!("^{}$", regex::escape(name));
            options.overrides.push((pattern.parse().unwrap(), DEGRADED));
        }
        run(&file.path, &path, &options).unwrap();
        let expected = divergence(&base, &path, &chunks);
        println!("{:?}: {} {expected}", group.tensors, group.kld);
        assert!(expected > 1e-5, "{part}: nothing was rounded");
        assert!((group.kld - expected).abs() < 0.03 * expected, "{part}");
    }
}

#[test]
fn a_file_of_a_size_asked_for_loses_less_than_the_mix_of_that_size() {
    let file = fixture::tiny_mixtral("F32");
    let base = exact(&file.path);
    let dir = tempfile::tempdir().unwrap();
    let stats = dir.path().join("stats.gguf");
    calibrate(&base, &stats, true);
    let text = fixture::text("en");
    let from = text.len() / 2;
    let from = (from..).find(|&at| text.is_char_boundary(at)).unwrap();
    let held_out = chunks(&base, &text[from..], 6);

    for mix in ["Q3_K_M", "Q4_K_M", "Q5_K_M"] {
        let [stock, fitted, again] =
            ["stock", "fitted", "again"].map(|name| dir.path().join(format!("{mix}-{name}.gguf")));
        let mut options = Conversion {
            imatrix: Some(stats.clone()),
            ..Conversion::new(mix.parse().unwrap())
        };
        run(&file.path, &stock, &options).unwrap();
        let size = |path: &Path| std::fs::metadata(path).unwrap().len();
        let budget = size(&stock);
        options.fit = Some(Target::Bytes(budget));
        let report = run(&file.path, &fitted, &options).unwrap();
        let promised = report.fitted.unwrap().kld;
        let [of_stock, found] = [&stock, &fitted].map(|p| divergence(&base, p, &held_out));
        println!("{mix}: {of_stock:.5}, fitted {found:.5}, promised {promised:.5}");
        assert!(size(&fitted) <= budget && size(&fitted) > budget - budget / 100);
        assert!(found < 0.97 * of_stock, "{mix}: {found} {of_stock}");
        assert!(
            (0.6..1.7).contains(&(found / promised)),
            "{mix}: {found} {promised}"
        );

        // The list leads to the same tensors.
        options.fit = None;
        options.overrides = read_list(&with_suffix(&fitted, ".types")).unwrap();
        run(&file.path, &again, &options).unwrap();
        let tensors = |path: &Path| {
            let gguf = gguf::read(path).unwrap();
            let start = gguf
                .tensors
                .iter()
                .map(|tensor| tensor.offset)
                .min()
                .unwrap();
            std::fs::read(path).unwrap().split_off(start as usize)
        };
        assert!(tensors(&fitted) == tensors(&again), "{mix}");
    }
}

#[test]
fn bits_a_weight_are_kept_and_what_is_missing_is_named() {
    let file = fixture::tiny_mixtral("F32");
    let base = exact(&file.path);
    let dir = tempfile::tempdir().unwrap();
    let [stats, plain, output] = ["stats", "plain", "out"].map(|name| dir.path().join(name));
    calibrate(&base, &stats, true);
    calibrate(&base, &plain, false);
    let mut options = Conversion {
        imatrix: Some(stats),
        fit: Some(Target::BitsPerWeight(4.75)),
        force: true,
        ..Conversion::new(Mix::Q4_K_M)
    };
    // What the command line gives stays.
    options.overrides = vec![("attn_v".parse().unwrap(), fewbit::quant::BlockType::Q8_0)];
    let report = run(&file.path, &output, &options).unwrap();
    let bits = report.plan.sizes.bits_per_weight();
    assert!(bits <= 4.75 && bits > 4.70, "{bits}");
    let gguf = gguf::read(&output).unwrap();
    let kind = |name: &str| gguf.tensor(name).unwrap().kind;
    assert_eq!(kind("blk.0.attn_v.weight"), fewbit::quant::BlockType::Q8_0);

    let fails = |change: &dyn Fn(&mut Conversion), words: &str| {
        let mut options = options.clone();
        change(&mut options);
        let error = run(&file.path, &output, &options).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    fails(&|o| o.fit = Some(Target::Bytes(1 << 20)), "bytes at least");
    fails(&|o| o.imatrix = None, "calibrate --sensitivity");
    fails(
        &|o| o.imatrix = Some(plain.clone()),
        "calibrate --sensitivity",
    );
}
