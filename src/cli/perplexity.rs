//! `fewbit perplexity`: perplexity of a text, and divergence from a base model.

use std::io::Write;
use std::path::PathBuf;

use serde_json::json;

use super::common::{ModelArgs, check_base, chunks_of, print_json, progress};
use crate::perplexity::{Tally, score};

/// Options of `fewbit perplexity`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to score
    #[arg(short = 'f', long = "file", value_name = "TEXT")]
    text: PathBuf,
    /// Tokens of a chunk; its second half is scored
    #[arg(short, long, value_name = "N", default_value_t = 512)]
    ctx: usize,
    /// Chunks to score at most
    #[arg(long, value_name = "N")]
    chunks: Option<usize>,
    /// Model to compare with, run with f32 activations: KL divergence, Δp, same top token
    #[arg(long, value_name = "REF.gguf")]
    base: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let engine = args.model.load()?;
    let base = args
        .base
        .as_deref()
        .map(|path| args.model.engine.load_base(path))
        .transpose()?;
    if let Some(base) = &base {
        check_base(base, &engine)?;
    }
    let chunks = chunks_of(engine.tokenizer(), &args.text, args.ctx, args.chunks)?;

    let mut session = engine.session(args.ctx)?;
    let mut base_session = base
        .as_ref()
        .map(|base| base.session(args.ctx))
        .transpose()?;
    let mut tally = Tally::default();
    let bar = progress(chunks.parts(), "chunks");
    for index in 0..chunks.parts() {
        let scored = score(&mut session, &chunks, index)?;
        let base = base_session
            .as_mut()
            .map(|base| score(base, &chunks, index))
            .transpose()?;
        tally.add(engine.pool(), &scored, base.as_ref());
        bar.inc(1);
        bar.set_message(format!("PPL {:.4}", tally.perplexity().value));
    }
    bar.finish_and_clear();

    let ppl = tally.perplexity();
    let divergence = base.is_some().then(|| tally.divergence());
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
    writeln!(
        out,
        "{} chunks of {} tokens, {} scored",
        chunks.len(),
        args.ctx,
        tally.tokens()
    )?;
    writeln!(out, "PPL              {:.4} ± {:.4}", ppl.value, ppl.se)?;
    if let Some(d) = divergence {
        writeln!(
            out,
            "PPL of the base  {:.4} ± {:.4}",
            d.base.value, d.base.se
        )?;
        writeln!(
            out,
            "ln(PPL / base)   {:.6} ± {:.6}",
            d.ln_ratio.value, d.ln_ratio.se
        )?;
        writeln!(out, "\nKL divergence from the base, nats")?;
        writeln!(out, "  mean           {:.6} ± {:.6}", d.kld.value, d.kld.se)?;
        for (name, fraction) in KLD_PERCENTILES {
            writeln!(out, "  {name:<14} {:.6}", d.kld_percentile(fraction))?;
        }
        writeln!(out, "\nΔp of the true token, %")?;
        writeln!(
            out,
            "  mean           {:.4} ± {:.4}",
            100.0 * d.dp.value,
            100.0 * d.dp.se
        )?;
        writeln!(out, "  RMS            {:.4}", 100.0 * d.dp_rms)?;
        for (name, fraction) in DP_PERCENTILES {
            writeln!(out, "  {name:<14} {:.4}", 100.0 * d.dp_percentile(fraction))?;
        }
        writeln!(out, "\nsame top token   {:.3} %", 100.0 * d.same_top)?;
    }
    Ok(())
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
