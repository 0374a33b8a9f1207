//! `fewbit calibrate`: what a model's matrices are given, for the converter.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Context;
use serde_json::json;

use super::common::{
    EngineArgs, STDOUT, at_least, bytes, chunks_of, file_stem, note, print_json, progress,
};
use crate::calibrate::journal::{Fingerprint, Journal, State};
use crate::calibrate::sensitivity::{self, Sensitivity};
use crate::calibrate::{Coverage, Options, Plan, STARVED};
use crate::gguf::names;
use crate::perplexity::Chunks;

/// Options of `fewbit calibrate`.
#[derive(clap::Args)]
pub struct Args {
    /// Model to watch: the unquantized one, or its Q8_0; it is run with f32 activations
    #[arg(short, long, value_name = "REF.gguf")]
    pub(super) model: PathBuf,
    /// Text to run it on; not the one that results are judged on
    #[arg(short = 'f', long = "file", value_name = "TEXT", required = true)]
    texts: Vec<PathBuf>,
    /// File to write: an imatrix for fewbit-convert and llama-quantize
    #[arg(short, long, value_name = "STATS.gguf")]
    output: PathBuf,
    /// Tokens of a chunk
    #[arg(short, long, visible_alias = "ctx-size", value_name = "N", default_value_t = 512, allow_negative_numbers = true, value_parser = at_least(4))]
    ctx: usize,
    /// Chunks of each text at most
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = at_least(1))]
    chunks: Option<usize>,
    /// Second moments too, which `fewbit-convert --round gptq` needs
    #[arg(long)]
    moments: bool,
    /// Columns whose moments with each other are kept; a multiple of 256, or 0 for whole rows
    #[arg(long, value_name = "N", default_value_t = 256, requires = "moments", value_parser = width)]
    width: usize,
    /// Measure what rounding each group of matrices costs, which `fewbit-convert --fit` needs
    #[arg(long)]
    sensitivity: bool,
    /// Layers of a group for --sensitivity [default: an eighth of the model's]
    #[arg(long, value_name = "LAYERS", requires = "sensitivity", allow_negative_numbers = true, value_parser = at_least(1))]
    band: Option<usize>,
    /// Chunks that --sensitivity runs for each group, spread over the text
    #[arg(long, value_name = "N", default_value_t = 8, requires = "sensitivity", allow_negative_numbers = true, value_parser = at_least(1))]
    sensitivity_chunks: usize,
    /// Replace STATS.gguf if it exists
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    engine: EngineArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn width(text: &str) -> Result<usize, String> {
    let width = text.parse::<usize>().ok();
    match width.filter(|width| width.is_multiple_of(256)) {
        Some(0) => Ok(usize::MAX),
        Some(width) => Ok(width),
        None => Err("must be a multiple of 256, or 0".to_owned()),
    }
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let output = args.output.display();
    anyhow::ensure!(
        args.force || !args.output.exists(),
        "{output}: exists: choose another name, or replace it with --force"
    );
    let engine = args.engine.load_base(&args.model, args.ctx)?;
    let texts: Vec<Chunks> = args
        .texts
        .iter()
        .map(|path| chunks_of(engine.tokenizer(), path, args.ctx, args.chunks))
        .collect::<Result<_, _>>()?;
    let chunks: Vec<Vec<u32>> = texts
        .iter()
        .flat_map(|text| (0..text.len()).map(|index| text.tokens(index)))
        .collect();
    let count = chunks.len();

    let names: Vec<String> = args.texts.iter().map(|text| file_stem(text)).collect();
    let options = Options {
        width: args.moments.then_some(args.width),
        dataset: names.join(", "),
        chunk_size: args.ctx,
    };
    let how = args.sensitivity.then(|| sensitivity::Options {
        band: args.band.unwrap_or(engine.shape().layers.div_ceil(8)),
        chunks: args.sensitivity_chunks,
    });
    let fingerprint = Fingerprint::new(&args.model, &chunks, &options, how);
    let journal = Journal::new(&args.output, fingerprint);
    let state = journal.state().unwrap_or_default();
    if state.layers > 0 {
        note(format_args!(
            "{output}: goes on after {} layers that an earlier run has counted",
            state.layers
        ));
    }
    let sensitivity = match (how, state.sensitivity) {
        (None, _) => None,
        (_, Some(known)) => Some(known),
        (Some(how), None) => {
            let steps = sensitivity::steps(&engine, how) as u64;
            let bar = progress(steps, "groups {wide_bar} {pos}/{len} {eta}");
            let found = sensitivity::measure(&engine, &texts, how, || bar.inc(1))?;
            let state = State::measured(found.clone());
            journal
                .record(&state, &[])
                .with_context(|| format!("{output}: cannot write beside it"))?;
            Some(found)
        }
    };
    let plan = Plan::new(&engine, count, options, sensitivity.as_ref())?;
    let file_bytes = plan.file_bytes();
    if args.moments && !args.json {
        note(format_args!(
            "{output}: {} to be written",
            bytes(file_bytes)
        ));
    }
    let steps = (count * engine.shape().layers) as u64;
    let bar = progress(steps, "layers {wide_bar} {percent} % {eta}");
    let coverage = plan.run(&engine, chunks, &args.output, &journal, || bar.inc(1))?;
    drop(bar);

    if args.json {
        let starved: Vec<_> = coverage
            .starved()
            .map(|(layer, expert, tokens)| {
                let tensor = names::experts(layer, names::FFN_DOWN);
                json!({"tensor": tensor, "expert": expert, "tokens": tokens})
            })
            .collect();
        let mut report = json!({
            "tokens": coverage.tokens,
            "chunks": count,
            "file_bytes": file_bytes,
            "starved": starved,
        });
        if let Some(sensitivity) = &sensitivity {
            let groups = sensitivity.groups().iter();
            let groups = groups.map(|group| json!({"tensors": group.tensors, "kld": group.kld}));
            report["sensitivity"] = groups.collect();
        }
        return print_json(&report);
    }
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "{output}: {count} chunks, {} tokens, {}",
        coverage.tokens,
        bytes(file_bytes)
    )
    .and_then(|()| report(&mut out, &coverage))
    .and_then(|()| most_sensitive(&mut out, sensitivity.as_ref()))
    .context(STDOUT)
}

/// The groups that suffer most.
fn most_sensitive(out: &mut impl Write, sensitivity: Option<&Sensitivity>) -> io::Result<()> {
    let Some(sensitivity) = sensitivity else {
        return Ok(());
    };
    let mut groups: Vec<_> = sensitivity.groups().iter().collect();
    groups.sort_by(|a, b| b.kld.total_cmp(&a.kld));
    writeln!(
        out,
        "divergence when rounded to {}, the largest of {} groups:",
        sensitivity::DEGRADED,
        groups.len()
    )?;
    for group in groups.iter().take(5) {
        let (first, more) = (&group.tensors[0], group.tensors.len() - 1);
        let more = match more {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        writeln!(out, "  {:.5}  {first}{more}", group.kld)?;
    }
    Ok(())
}

/// What the experts saw.
fn report(out: &mut impl Write, coverage: &Coverage) -> io::Result<()> {
    let mut counts: Vec<u64> = coverage.experts.iter().flatten().copied().collect();
    counts.sort_unstable();
    let (Some(least), Some(most)) = (counts.first(), counts.last()) else {
        return Ok(());
    };
    let median = counts[counts.len() / 2];
    writeln!(
        out,
        "an expert saw {least} to {most} tokens, {median} in the middle"
    )?;
    for (layer, expert, tokens) in coverage.starved() {
        writeln!(
            out,
            "starved: layer {layer}, expert {expert}: {tokens} tokens, less than {STARVED}"
        )?;
    }
    Ok(())
}
