//! `fewbit bench`: prompt and decode speed, with the machine's limits beside them.

use std::io::Write;

use serde_json::json;

use super::common::{ModelArgs, file_type, peak_rss_bytes, print_json, reset_peak_rss};
use crate::bench::{Test, Times};
use crate::kernels::limits::Limits;
use crate::plan::{Group, Sizes};

/// Options of `fewbit bench`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens of the prompt test; 0 for none
    #[arg(short = 'p', long, value_name = "N", default_value_t = 512, value_parser = tokens)]
    prompt: usize,
    /// Tokens of the decode test; 0 for none
    #[arg(short = 'n', long, value_name = "N", default_value_t = 64, value_parser = tokens)]
    generate: usize,
    /// Tokens in the context before the decode test
    #[arg(short, long, value_name = "N", default_value_t = 0, value_parser = tokens)]
    depth: usize,
    /// Repetitions; the median counts
    #[arg(short, long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    repetitions: u16,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// A number of tokens that a test may have.
fn tokens(text: &str) -> Result<usize, String> {
    const MAX: usize = 1 << 24;
    let tokens = text.parse().map_err(|error| format!("{error}"))?;
    (tokens <= MAX)
        .then_some(tokens)
        .ok_or_else(|| format!("at most {MAX} tokens"))
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let engine = args.model.load()?;
    let shape = engine.shape();
    let sizes = Sizes::of(shape.experts, shape.experts_used, &engine.gguf().tensors);
    let tests = [
        Test::Prompt(args.prompt),
        Test::Generate {
            tokens: args.generate,
            depth: args.depth,
        },
    ];
    let before = Limits::measure(engine.pool());
    // The measurement's own buffer is not the model's.
    reset_peak_rss();
    let times = tests
        .into_iter()
        .filter(|test| test.tokens() > 0)
        .map(|test| Times::measure(&engine, test, usize::from(args.repetitions)))
        .collect::<Result<Vec<_>, _>>()?;
    let peak_rss = peak_rss_bytes();
    let limits = before.best(Limits::measure(engine.pool()));

    let rows: Vec<Row> = times
        .iter()
        .map(|times| Row::new(times, &sizes, limits))
        .collect();
    if args.json {
        let results: Vec<_> = rows.iter().map(Row::to_json).collect();
        return print_json(&json!({
            "model": args.model.model,
            "type": file_type(engine.gguf()),
            "threads": engine.pool().threads(),
            "kernels": engine.kernels(),
            "limits": {"read_gb_s": limits.read_gb_s, "int8_gop_s": limits.int8_gop_s},
            "results": results,
            "peak_rss_bytes": peak_rss,
        }));
    }
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{} ({}, {:.2} GB), {} kernels, {} threads",
        args.model.model.display(),
        file_type(engine.gguf()),
        sizes.bytes_total() as f64 / 1e9,
        engine.kernels(),
        engine.pool().threads()
    )?;
    writeln!(
        out,
        "{:<10} {:>10} {:>19} {:>9} {:>9} {:>16}",
        "test", "tok/s", "range", "GB/s", "GOP/s", "share of limit"
    )?;
    for row in &rows {
        let figure =
            |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
        writeln!(
            out,
            "{:<10} {:>10.2} {:>19} {:>9} {:>9} {:>15.1}%",
            row.test,
            row.tok_s,
            format!("{:.2} – {:.2}", row.range.0, row.range.1),
            figure(row.gb_s),
            figure(row.gop_s),
            100.0 * row.share
        )?;
    }
    writeln!(
        out,
        "limits of the machine: {:.1} GB/s read, {:.0} GOP/s int8",
        limits.read_gb_s, limits.int8_gop_s
    )?;
    Ok(())
}

/// A line of the table.
struct Row {
    test: String,
    tok_s: f64,
    range: (f64, f64),
    gb_s: Option<f64>,
    gop_s: Option<f64>,
    share: f64,
}

impl Row {
    fn new(times: &Times, sizes: &Sizes, limits: Limits) -> Self {
        let (tok_s, range, test) = (times.tok_s(), times.tok_s_range(), times.test.to_string());
        match times.test {
            Test::Prompt(tokens) => {
                let params = |group| sizes.group(group).params as f64;
                let head = head_params(sizes) as f64;
                let body =
                    sizes.params_active() as f64 - params(Group::Embedding) - params(Group::Output);
                let gop_s = 2.0 * (body + head / tokens as f64) * tok_s / 1e9;
                Self {
                    test,
                    tok_s,
                    range,
                    gb_s: None,
                    gop_s: Some(gop_s),
                    share: gop_s / limits.int8_gop_s,
                }
            }
            Test::Generate { .. } => {
                let gb_s = sizes.active_bytes_per_token() as f64 * tok_s / 1e9;
                Self {
                    test,
                    tok_s,
                    range,
                    gb_s: Some(gb_s),
                    gop_s: None,
                    share: gb_s / limits.read_gb_s,
                }
            }
        }
    }

    fn to_json(&self) -> serde_json::Value {
        json!({
            "test": self.test,
            "tok_s": self.tok_s,
            "tok_s_min": self.range.0,
            "tok_s_max": self.range.1,
            "gb_s": self.gb_s,
            "gop_s": self.gop_s,
            "share_of_limit": self.share,
        })
    }
}

/// Parameters of the output head; those of the embedding where the two are tied.
fn head_params(sizes: &Sizes) -> u64 {
    match sizes.group(Group::Output).params {
        0 => sizes.group(Group::Embedding).params,
        params => params,
    }
}
