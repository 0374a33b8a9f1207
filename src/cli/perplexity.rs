//! `fewbit perplexity`: perplexity of a text, and divergence from a base model.

use std::io::{self, Write};
use std::path::PathBuf;

use serde_json::json;

use super::common::{
    CHUNKS_BAR, ModelArgs, STDOUT, Vocabulary, at_least, check_base, chunks_of, figure, plus_minus,
    print_json, progress,
};
use crate::perplexity::{Base, Divergence, Estimate, Tally, score};
use anyhow::Context;

/// Options of `fewbit perplexity`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub(super) model: ModelArgs,
    /// Text to score
    #[arg(short = 'f', long = "file", value_name = "TEXT")]
    text: PathBuf,
    /// Tokens of a chunk; its second half is scored
    #[arg(short, long, visible_alias = "ctx-size", value_name = "N", default_value_t = 512, allow_negative_numbers = true, value_parser = at_least(4))]
    ctx: usize,
    /// Chunks to score at most
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = at_least(1))]
    chunks: Option<usize>,
    /// Model to compare with, run with f32 activations, or a base that `fewbit ladder --save-base` wrote: KL
    /// divergence, Δp, same top token
    #[arg(long, value_name = "REF.gguf")]
    pub(super) base: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let saved = match &args.base {
        Some(path) if Base::is_one(path) => Some(Base::read(path)?),
        _ => None,
    };
    let live = args.base.as_deref().filter(|_| saved.is_none());
    if let Some(path) = live {
        let base = Vocabulary::read(path)?;
        check_base(&base, &Vocabulary::read(args.model.path())?)?;
    }
    let (base, engine) = args.model.load_beside(live, args.ctx)?;
    let chunks = chunks_of(engine.tokenizer(), &args.text, args.ctx, args.chunks)?;
    let kept = saved
        .as_ref()
        .map(|saved| saved.text(&chunks, engine.shape().vocab))
        .transpose()?;

    let mut session = engine.session(args.ctx)?;
    let mut base_session = base
        .as_ref()
        .map(|base| base.session(args.ctx))
        .transpose()?;
    let mut tally = Tally::default();
    let bar = progress(chunks.parts() as u64, CHUNKS_BAR).with_message("chunks");
    for index in 0..chunks.parts() {
        let scored = score(&mut session, &chunks, index)?;
        let base = base_session
            .as_mut()
            .map(|base| score(base, &chunks, index))
            .transpose()?;
        match kept {
            Some(kept) => tally.add_against(engine.pool(), &scored, kept),
            None => tally.add(engine.pool(), &scored, base.as_ref()),
        }
        bar.inc(1);
        if !bar.is_hidden() && tally.tokens() > 0 {
            bar.set_message(format!("PPL {:.4}", tally.perplexity().value));
        }
    }
    drop(bar);

    let ppl = tally.perplexity();
    let divergence = args.base.is_some().then(|| tally.divergence());
    if args.json {
        let mut report = json!({
            "model": args.model.model,
            "text": args.text,
            "ctx": args.ctx,
            "chunks": chunks.len(),
            "tokens": tally.tokens(),
            "ppl": ppl.value,
            "ppl_se": ppl.se,
        });
        if let Some(divergence) = &divergence {
            let object = report.as_object_mut().expect("it was made as one");
            object.extend(divergence.to_json());
        }
        return print_json(&report);
    }
    let mut out = std::io::stdout().lock();
    let scored = tally.tokens();
    writeln!(
        out,
        "{} chunks of {} tokens, {scored} scored",
        chunks.len(),
        args.ctx
    )
    .and_then(|()| writeln!(out, "PPL              {}", plus_minus(ppl, 4)))
    .and_then(|()| {
        divergence
            .iter()
            .try_for_each(|divergence| print(&mut out, divergence))
    })
    .context(STDOUT)
}

/// The comparison with the base, figure by figure.
fn print(out: &mut impl Write, d: &Divergence) -> io::Result<()> {
    writeln!(out, "PPL of the base  {}", plus_minus(d.base, 4))?;
    writeln!(out, "PPL / base       {}", plus_minus(d.ppl_ratio(), 6))?;
    writeln!(out, "PPL − base       {}", plus_minus(d.ppl_difference, 6))?;
    writeln!(out, "ln(PPL / base)   {}", plus_minus(d.ln_ratio, 6))?;
    writeln!(out, "correlation      {} %", percent(d.correlation, 2))?;
    writeln!(out, "\nKL divergence from the base, nats")?;
    writeln!(out, "  mean           {}", plus_minus(d.kld, 6))?;
    for (name, fraction) in KLD_PERCENTILES {
        writeln!(
            out,
            "  {name:<14} {}",
            figure(d.kld_percentile(fraction), 6)
        )?;
    }
    writeln!(out, "\nΔp of the true token, %")?;
    writeln!(out, "  mean           {}", plus_minus(percents(d.dp), 4))?;
    writeln!(
        out,
        "  RMS            {}",
        plus_minus(percents(d.dp_rms()), 4)
    )?;
    for (name, fraction) in DP_PERCENTILES {
        writeln!(
            out,
            "  {name:<14} {}",
            percent(d.dp_percentile(fraction), 4)
        )?;
    }
    writeln!(
        out,
        "\nsame top token   {} %",
        plus_minus(percents(d.same_top_estimate()), 3)
    )
}

fn percent(share: f64, digits: usize) -> String {
    figure(100.0 * share, digits)
}

fn percents(share: Estimate) -> Estimate {
    Estimate {
        value: 100.0 * share.value,
        se: 100.0 * share.se,
    }
}

/// The percentiles that llama-perplexity prints, the largest first.
const KLD_PERCENTILES: [(&str, f64); 11] = [
    ("maximum", 1.0),
    ("99.9 %", 0.999),
    ("99 %", 0.99),
    ("95 %", 0.95),
    ("90 %", 0.9),
    ("median", 0.5),
    ("10 %", 0.1),
    ("5 %", 0.05),
    ("1 %", 0.01),
    ("0.1 %", 0.001),
    ("minimum", 0.0),
];

const DP_PERCENTILES: [(&str, f64); 13] = [
    ("maximum", 1.0),
    ("99.9 %", 0.999),
    ("99 %", 0.99),
    ("95 %", 0.95),
    ("90 %", 0.9),
    ("75 %", 0.75),
    ("median", 0.5),
    ("25 %", 0.25),
    ("10 %", 0.1),
    ("5 %", 0.05),
    ("1 %", 0.01),
    ("0.1 %", 0.001),
    ("minimum", 0.0),
];
