//! `fewbit ladder`: several files of one model side by side, on one or several texts.

mod plot;
mod report;

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use serde_json::{Map, Value, json};

use super::common::{
    CHUNKS_BAR, EngineArgs, STDOUT, Vocabulary, at_least, bytes, check_base, chunks_of, figure,
    file_stem, plus_minus, print_json, progress,
};
use crate::bench::{Test, Times};
use crate::engine::Engine;
use crate::perplexity::{Base, Chunks, Divergence, Estimate, Kept, Tally, score};
use crate::plan::Sizes;
use plot::{Plot, Point};
use report::{Content, Report, markdown};

/// Options of `fewbit ladder`.
#[derive(clap::Args)]
pub struct Args {
    /// Models to compare, GGUF
    #[arg(required = true, value_name = "MODEL")]
    pub(super) models: Vec<PathBuf>,
    /// Text to score; several give a column each
    #[arg(short = 'f', long = "file", value_name = "TEXT", required = true)]
    texts: Vec<PathBuf>,
    /// What to measure divergence from: a model, run with f32 activations, or a base that --save-base wrote
    #[arg(long, value_name = "REF.gguf")]
    pub(super) base: Option<PathBuf>,
    /// Keep the base's distributions in this file: their top tokens, the others' mass, and draws from these
    #[arg(long, value_name = "FILE", requires = "base")]
    save_base: Option<PathBuf>,
    /// Tokens of a chunk; its second half is scored
    #[arg(short, long, visible_alias = "ctx-size", value_name = "N", default_value_t = 512, allow_negative_numbers = true, value_parser = at_least(4))]
    ctx: usize,
    /// Chunks of each text to score at most
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = at_least(1))]
    chunks: Option<usize>,
    /// Write a report too: the table (.md), the plot (.svg) or both (.html); may be given several times
    #[arg(long, value_name = "REPORT")]
    out: Vec<PathBuf>,
    #[command(flatten)]
    engine: EngineArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Tokens generated to measure speed.
const SPEED_TEST: Test = Test::Generate {
    tokens: 32,
    depth: 0,
    repeats: 0.0,
};

/// Metadata key of the divergence that `fewbit-convert --fit` has promised.
const PREDICTED_KEY: &str = "fewbit.fit.kld";

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let reports = args.out.iter().map(|path| Report::create(path));
    let reports = reports.collect::<Result<Vec<_>, _>>()?;
    // All files and texts before the first is scored, so that a wrong one is told in time.
    let saved = match &args.base {
        Some(path) if Base::is_one(path) => Some(Base::read(path)?),
        _ => None,
    };
    let heads = args.models.iter().map(|path| Vocabulary::read(path));
    let heads = heads.collect::<Result<Vec<_>, _>>()?;
    let reference = match &args.base {
        Some(path) if saved.is_none() => Some(Vocabulary::read(path)?),
        _ => None,
    };
    for head in &heads {
        check_base(reference.as_ref().unwrap_or(&heads[0]), head)?;
    }
    let texts = args
        .texts
        .iter()
        .map(|path| chunks_of(heads[0].tokenizer(), path, args.ctx, args.chunks))
        .collect::<Result<Vec<_>, _>>()?;

    let base = match (saved, &args.base) {
        (Some(saved), _) => Some(saved),
        (None, Some(path)) => Some(run_base(&args, path, &texts)?),
        (None, None) => None,
    };
    let kept: Vec<Option<&Kept>> = match &base {
        Some(base) => {
            let kept = texts
                .iter()
                .map(|chunks| base.text(chunks, heads[0].rows()).map(Some));
            kept.collect::<Result<_, _>>()?
        }
        None => vec![None; texts.len()],
    };
    if let (Some(path), Some(base)) = (&args.save_base, &base) {
        base.save(path)?;
    }
    // One model after the other, so that memory holds one.
    let mut rungs = Vec::new();
    for path in &args.models {
        let engine = args.engine.load(path, Some(args.ctx))?;
        let mut rung = Rung::new(&engine)?;
        for ((path, chunks), base) in args.texts.iter().zip(&texts).zip(&kept) {
            rung.columns.push(score_text(&engine, chunks, *base, path)?);
        }
        rung.tok_s = Times::measure(&engine, SPEED_TEST, 3)?.tok_s();
        rungs.push(rung);
    }

    // Hours may lie behind the figures: they are printed whatever becomes of the reports, and
    // the reports are written whoever reads the print.
    let table = table(&args.texts, &rungs);
    let printed = print(&args, &rungs, &table);
    let content = Content {
        about: about(&args, base.as_ref()),
        table,
        plot: plot(&rungs),
    };
    for report in reports {
        report.finish(&content)?;
    }
    printed
}

fn print(args: &Args, rungs: &[Rung], table: &[Vec<String>]) -> anyhow::Result<()> {
    if args.json {
        let rows: Vec<Value> = rungs.iter().flat_map(|rung| rung.to_json(args)).collect();
        let text = match &args.texts[..] {
            [text] => json!(text),
            texts => json!(texts),
        };
        return print_json(&json!({"base": args.base, "text": text, "rows": rows}));
    }
    let mut out = io::stdout().lock();
    out.write_all(markdown(table).as_bytes()).context(STDOUT)
}

/// Runs the base over all texts.
fn run_base(args: &Args, path: &Path, texts: &[Chunks]) -> anyhow::Result<Base> {
    let engine = args.engine.load_base(path, args.ctx)?;
    let parts = texts.iter().map(Chunks::parts).sum::<usize>();
    let bar = progress(parts as u64, CHUNKS_BAR).with_message("base");
    Ok(Base::of(&engine, texts, || bar.inc(1))?)
}

/// Runs a model over one text.
fn score_text(
    engine: &Arc<Engine>,
    chunks: &Chunks,
    base: Option<&Kept>,
    text: &Path,
) -> anyhow::Result<Column> {
    let mut session = engine.session(chunks.context())?;
    let mut tally = Tally::default();
    let what = format!("{} {}", file_stem(engine.path()), file_stem(text));
    let bar = progress(chunks.parts() as u64, CHUNKS_BAR).with_message(what);
    for index in 0..chunks.parts() {
        let scored = score(&mut session, chunks, index)?;
        match base {
            Some(base) => tally.add_against(engine.pool(), &scored, base),
            None => tally.add(engine.pool(), &scored, None),
        }
        bar.inc(1);
    }
    Ok(Column {
        chunks: chunks.len(),
        tokens: tally.tokens(),
        ppl: tally.perplexity(),
        divergence: base.map(|_| tally.divergence()),
    })
}

/// A model's line of the table.
struct Rung {
    path: PathBuf,
    file_bytes: u64,
    bits_per_weight: f64,
    tok_s: f64,
    /// The divergence that `fewbit-convert --fit` has promised.
    predicted: Option<f64>,
    /// One entry a text.
    columns: Vec<Column>,
}

/// A model's figures on one text.
struct Column {
    chunks: usize,
    tokens: usize,
    ppl: Estimate,
    divergence: Option<Divergence>,
}

impl Rung {
    fn new(engine: &Engine) -> anyhow::Result<Self> {
        let (gguf, shape) = (engine.gguf(), engine.shape());
        let file_bytes = gguf
            .files
            .iter()
            .filter_map(|file| file.metadata().ok())
            .map(|file| file.len())
            .sum();
        Ok(Self {
            path: engine.path().to_owned(),
            file_bytes,
            bits_per_weight: Sizes::of(shape.experts, shape.experts_used, &gguf.tensors)
                .bits_per_weight(),
            tok_s: 0.0,
            predicted: gguf.metadata.f32(PREDICTED_KEY)?.map(f64::from),
            columns: Vec::new(),
        })
    }

    /// One row a text.
    fn to_json<'a>(&'a self, args: &'a Args) -> impl Iterator<Item = Value> + 'a {
        self.columns.iter().zip(&args.texts).map(|(column, text)| {
            let mut row = Map::new();
            row.insert("model".into(), json!(self.path));
            row.insert("text".into(), json!(text));
            row.insert("ctx".into(), json!(args.ctx));
            row.insert("chunks".into(), json!(column.chunks));
            row.insert("tokens".into(), json!(column.tokens));
            row.insert("ppl".into(), json!(column.ppl.value));
            row.insert("ppl_se".into(), json!(column.ppl.se));
            row.extend(column.divergence.iter().flat_map(Divergence::to_json));
            if let Some(predicted) = self.predicted {
                row.insert("kld_predicted".into(), json!(predicted));
            }
            row.insert("file_bytes".into(), json!(self.file_bytes));
            row.insert("bits_per_weight".into(), json!(self.bits_per_weight));
            row.insert("tg_tok_s".into(), json!(self.tok_s));
            Value::Object(row)
        })
    }
}

/// The table: all figures for one text; for several, perplexity and divergence of each side by side.
/// What --fit has promised stands beside what came of it.
fn table(texts: &[PathBuf], rungs: &[Rung]) -> Vec<Vec<String>> {
    let with_base = rungs[0].columns[0].divergence.is_some();
    let with_promise = with_base && rungs.iter().any(|rung| rung.predicted.is_some());
    let mut header = vec!["file".to_owned(), "bits/weight".into(), "size".into()];
    if let [_] = texts {
        header.push("PPL".into());
        if with_base {
            header.extend(["ln(PPL/base)", "mean KLD", "99.9 % KLD", "same top"].map(String::from));
        }
    } else {
        header.extend(texts.iter().map(|text| format!("PPL {}", file_stem(text))));
        if with_base {
            header.extend(texts.iter().map(|text| format!("KLD {}", file_stem(text))));
        }
    }
    if with_promise {
        header.push("predicted KLD".into());
    }
    header.push("tok/s".into());

    let mut lines = vec![header];
    for rung in rungs {
        let mut line = vec![
            file_stem(&rung.path),
            format!("{:.3}", rung.bits_per_weight),
            bytes(rung.file_bytes),
        ];
        line.extend(rung.columns.iter().map(|column| plus_minus(column.ppl, 3)));
        let divergences = || rung.columns.iter().filter_map(|c| c.divergence.as_ref());
        if let [_] = texts {
            line.extend(divergences().flat_map(|d| {
                [
                    plus_minus(d.ln_ratio, 4),
                    plus_minus(d.kld, 5),
                    figure(d.kld_percentile(0.999), 4),
                    format!("{:.2} %", 100.0 * d.same_top),
                ]
            }));
        } else {
            line.extend(divergences().map(|d| plus_minus(d.kld, 5)));
        }
        if with_promise {
            let promise = rung.predicted.map(|kld| figure(kld, 5));
            line.push(promise.unwrap_or_default());
        }
        line.push(format!("{:.1}", rung.tok_s));
        lines.push(line);
    }
    lines
}

fn plot(rungs: &[Rung]) -> Plot {
    let mean = |estimates: Vec<Estimate>| {
        let n = estimates.len() as f64;
        let sum = |part: fn(&Estimate) -> f64| estimates.iter().map(part).sum::<f64>();
        Estimate {
            value: sum(|e| e.value) / n,
            se: sum(|e| e.se * e.se).sqrt() / n,
        }
    };
    let divergences = |rung: &Rung| -> Option<Vec<(Estimate, f64)>> {
        let columns = rung.columns.iter().map(|column| column.divergence.as_ref());
        columns.map(|d| d.map(|d| (d.kld, d.base.value))).collect()
    };
    let point = |rung: &Rung| Point {
        name: file_stem(&rung.path),
        bits_per_weight: rung.bits_per_weight,
        ppl: mean(rung.columns.iter().map(|column| column.ppl).collect()),
        kld: divergences(rung).map(|all| mean(all.into_iter().map(|(kld, _)| kld).collect())),
    };
    let base_ppl = rungs.first().and_then(divergences);
    Plot {
        points: rungs.iter().map(point).collect(),
        base_ppl: base_ppl
            .map(|all| all.iter().map(|(_, ppl)| ppl).sum::<f64>() / all.len() as f64),
    }
}

/// What the figures were made from.
fn about(args: &Args, base: Option<&Base>) -> String {
    let texts: Vec<_> = args
        .texts
        .iter()
        .map(|text| text.display().to_string())
        .collect();
    let base = base.map_or(String::new(), |base| {
        format!(", divergence from {}", base.file().display())
    });
    let chunks = args
        .chunks
        .map_or(String::new(), |chunks| format!(", at most {chunks} chunks"));
    let activations = match args.engine.in_f32() {
        true => ", f32 activations",
        false => "",
    };
    format!(
        "Texts: {}; chunks of {} tokens, the second half of each scored{chunks}{base}{activations}.",
        texts.join(", "),
        args.ctx
    )
}
