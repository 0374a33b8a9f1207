//! `fewbit ladder`: several files of one model side by side, on one or several texts.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use serde_json::{Map, Value, json};

use super::common::{
    CHUNKS_BAR, EngineArgs, STDOUT, at_least, bytes, check_base, chunks_of, figure, file_stem,
    plus_minus, print_json, progress,
};
use crate::bench::{Test, Times};
use crate::engine::Engine;
use crate::perplexity::{Chunks, Divergence, Estimate, Tally, score};
use crate::plan::Sizes;

/// Options of `fewbit ladder`.
#[derive(clap::Args)]
pub struct Args {
    /// Models to compare, GGUF
    #[arg(required = true, value_name = "MODEL")]
    models: Vec<PathBuf>,
    /// Text to score; several give a column each
    #[arg(short = 'f', long = "file", value_name = "TEXT", required = true)]
    texts: Vec<PathBuf>,
    /// Model to measure divergence from, run with f32 activations
    #[arg(long, value_name = "REF.gguf")]
    base: Option<PathBuf>,
    /// Tokens of a chunk; its second half is scored
    #[arg(short, long, visible_alias = "ctx-size", value_name = "N", default_value_t = 512, allow_negative_numbers = true, value_parser = at_least(4))]
    ctx: usize,
    /// Chunks of each text to score at most
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = at_least(1))]
    chunks: Option<usize>,
    /// Write the table to this file as well (Markdown)
    #[arg(long, value_name = "report.md")]
    out: Option<PathBuf>,
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

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let report = args.out.as_deref().map(Report::create).transpose()?;
    let (base, models) = args
        .engine
        .load_beside(args.base.as_deref(), &args.models, args.ctx)?;
    for model in &models {
        check_base(base.as_ref().unwrap_or(&models[0]), model)?;
    }
    // All texts before the first is scored, so that a wrong one is told in time.
    let texts = args
        .texts
        .iter()
        .map(|path| chunks_of(models[0].tokenizer(), path, args.ctx, args.chunks))
        .collect::<Result<Vec<_>, _>>()?;
    let mut rungs: Vec<Rung> = models.iter().map(Rung::new).collect();
    for (path, chunks) in args.texts.iter().zip(&texts) {
        let columns = score_text(base.as_ref(), &models, chunks, path)?;
        for (rung, column) in rungs.iter_mut().zip(columns) {
            rung.columns.push(column);
        }
    }
    for (rung, model) in rungs.iter_mut().zip(&models) {
        rung.tok_s = Times::measure(model, SPEED_TEST, 3)?.tok_s();
    }

    // Hours may lie behind the figures: they are printed whatever becomes of the report, and
    // the report is written whoever reads the print.
    let table = table(&args.texts, &rungs);
    let printed = print(&args, &rungs, &table);
    if let Some(report) = report {
        report.finish(&heading(&args), &table)?;
    }
    printed
}

fn print(args: &Args, rungs: &[Rung], table: &str) -> anyhow::Result<()> {
    if args.json {
        let rows: Vec<Value> = rungs.iter().flat_map(|rung| rung.to_json(args)).collect();
        let text = match &args.texts[..] {
            [text] => json!(text),
            texts => json!(texts),
        };
        return print_json(&json!({"base": args.base, "text": text, "rows": rows}));
    }
    let mut out = io::stdout().lock();
    out.write_all(table.as_bytes()).context(STDOUT)
}

/// Runs every model over one text, chunk by chunk beside the base, so that the base's logits
/// are computed once and never stored.
fn score_text(
    base: Option<&Arc<Engine>>,
    models: &[Arc<Engine>],
    chunks: &Chunks,
    path: &Path,
) -> anyhow::Result<Vec<Column>> {
    let context = chunks.context();
    let mut base = base.map(|base| base.session(context)).transpose()?;
    let mut sessions: Vec<_> = models
        .iter()
        .map(|model| model.session(context))
        .collect::<Result<_, _>>()?;
    let mut tallies: Vec<_> = models.iter().map(|_| Tally::default()).collect();
    let bar = progress(chunks.parts() as u64, CHUNKS_BAR).with_message(file_stem(path));
    for index in 0..chunks.parts() {
        let base = base
            .as_mut()
            .map(|base| score(base, chunks, index))
            .transpose()?;
        for (session, tally) in sessions.iter_mut().zip(&mut tallies) {
            let scored = score(session, chunks, index)?;
            tally.add(session.engine().pool(), &scored, base.as_ref());
        }
        bar.inc(1);
    }
    let column = |tally: Tally| Column {
        chunks: chunks.len(),
        tokens: tally.tokens(),
        ppl: tally.perplexity(),
        divergence: base.is_some().then(|| tally.divergence()),
    };
    Ok(tallies.into_iter().map(column).collect())
}

/// A model's line of the table.
struct Rung {
    path: PathBuf,
    file_bytes: u64,
    bits_per_weight: f64,
    tok_s: f64,
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
    fn new(engine: &Arc<Engine>) -> Self {
        let (gguf, shape) = (engine.gguf(), engine.shape());
        let file_bytes = gguf
            .files
            .iter()
            .filter_map(|file| file.metadata().ok())
            .map(|file| file.len())
            .sum();
        Self {
            path: engine.path().to_owned(),
            file_bytes,
            bits_per_weight: Sizes::of(shape.experts, shape.experts_used, &gguf.tensors)
                .bits_per_weight(),
            tok_s: 0.0,
            columns: Vec::new(),
        }
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
            row.insert("file_bytes".into(), json!(self.file_bytes));
            row.insert("bits_per_weight".into(), json!(self.bits_per_weight));
            row.insert("tg_tok_s".into(), json!(self.tok_s));
            Value::Object(row)
        })
    }
}

/// The table in Markdown: all figures for one text; for several, perplexity and divergence of
/// each side by side.
fn table(texts: &[PathBuf], rungs: &[Rung]) -> String {
    let mut header = vec![
        "file".to_owned(),
        "bits/weight".to_owned(),
        "size".to_owned(),
    ];
    let with_base = rungs[0].columns[0].divergence.is_some();
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
    header.push("tok/s".into());

    let mut lines = vec![header];
    for rung in rungs {
        let mut line = vec![
            file_stem(&rung.path),
            format!("{:.3}", rung.bits_per_weight),
            bytes(rung.file_bytes),
        ];
        line.extend(rung.columns.iter().map(|column| plus_minus(column.ppl, 3)));
        if let [column] = &rung.columns[..] {
            if let Some(d) = &column.divergence {
                line.push(plus_minus(d.ln_ratio, 4));
                line.push(plus_minus(d.kld, 5));
                line.push(figure(d.kld_percentile(0.999), 4));
                line.push(format!("{:.2} %", 100.0 * d.same_top));
            }
        } else {
            let divergences = rung
                .columns
                .iter()
                .filter_map(|column| column.divergence.as_ref());
            line.extend(divergences.map(|d| plus_minus(d.kld, 5)));
        }
        line.push(format!("{:.1}", rung.tok_s));
        lines.push(line);
    }
    markdown(&lines)
}

/// A Markdown table, its columns padded so that it reads well in a terminal too.
fn markdown(lines: &[Vec<String>]) -> String {
    let width = |column: usize| {
        lines
            .iter()
            .map(|line| line[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
    let mut table = String::new();
    for (index, line) in lines.iter().enumerate() {
        for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
            // Names to the left, figures to the right.
            let _ = if column == 0 {
                write!(table, "| {cell:<width$} ")
            } else {
                write!(table, "| {cell:>width$} ")
            };
        }
        table.push_str("|\n");
        if index == 0 {
            for (column, width) in widths.iter().enumerate() {
                let _ = if column == 0 {
                    write!(table, "|:{:-<1$}", "", width + 1)
                } else {
                    write!(table, "|{:-<1$}:", "", width + 1)
                };
            }
            table.push_str("|\n");
        }
    }
    table
}

/// What the report's table was made from.
fn heading(args: &Args) -> String {
    let texts: Vec<_> = args
        .texts
        .iter()
        .map(|text| text.display().to_string())
        .collect();
    let base = args.base.as_ref().map_or(String::new(), |base| {
        format!(", divergence from {}", base.display())
    });
    let chunks = args
        .chunks
        .map_or(String::new(), |chunks| format!(", at most {chunks} chunks"));
    format!(
        "# Ladder\n\nTexts: {}; chunks of {} tokens, the second half of each scored{chunks}{base}.\n",
        texts.join(", "),
        args.ctx
    )
}

/// A report under way: a file beside the final one, made before the work begins so that a path
/// that cannot be written fails at once, and renamed when whole; deleted if it never is.
struct Report<'a> {
    path: &'a Path,
    partial: PathBuf,
    file: File,
}

impl<'a> Report<'a> {
    fn create(path: &'a Path) -> anyhow::Result<Self> {
        anyhow::ensure!(
            !path.is_dir(),
            "{}: is a folder; name a file for the report",
            path.display()
        );
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let file = File::create(&partial).with_context(|| cannot_write(path))?;
        Ok(Self {
            path,
            partial,
            file,
        })
    }

    fn finish(mut self, heading: &str, table: &str) -> anyhow::Result<()> {
        write!(self.file, "{heading}\n{table}")
            .and_then(|()| self.file.sync_all())
            .and_then(|()| std::fs::rename(&self.partial, self.path))
            .with_context(|| cannot_write(self.path))
    }
}

impl Drop for Report<'_> {
    fn drop(&mut self) {
        // Nothing is there any more once it has been renamed.
        let _ = std::fs::remove_file(&self.partial);
    }
}

fn cannot_write(path: &Path) -> String {
    format!("{}: cannot write the report", path.display())
}
