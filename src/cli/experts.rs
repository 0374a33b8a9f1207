//! `fewbit experts`: what a cache of experts makes of recorded routing.

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use serde_json::json;

use super::common::{STDOUT, Usage, at_least, bytes, print_json, share, write_trace};
use crate::experts::generate::Chance;
use crate::experts::trace::Trace;

/// Options of `fewbit experts`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Replay routing that `fewbit run --trace-experts` has recorded: the hit rate of each policy
    Replay(ReplayArgs),
    /// Write a trace of routing by chance
    Generate(GenerateArgs),
}

#[derive(clap::Args)]
struct GenerateArgs {
    /// File to write
    trace: PathBuf,
    /// Layers
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    layers: u16,
    /// Experts a layer
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    experts: u16,
    /// Experts that a token takes
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1024))]
    used: u16,
    /// Tokens
    #[arg(short = 'n', long, value_name = "N", default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    tokens: u32,
    /// Skew: an expert's weight is its rank to the power of minus this; 0 is even
    #[arg(long, value_name = "S", default_value_t = 0.0, value_parser = skew)]
    zipf: f64,
    /// Share of a token's experts that the next one takes again, from 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    repeats: f64,
    /// Bytes of an expert [default: Mixtral 8x7B's in Q4_0]
    #[arg(
        long,
        value_name = "BYTES",
        default_value_t = 99_090_432,
        hide_default_value = true
    )]
    expert_bytes: u64,
    /// Equal seeds give equal traces
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

fn skew(text: &str) -> Result<f64, String> {
    let skew = text.parse().ok().filter(|skew| (0.0..=10.0).contains(skew));
    skew.ok_or_else(|| "must be a number from 0 to 10".to_owned())
}

#[derive(clap::Args)]
struct ReplayArgs {
    /// The trace
    trace: PathBuf,
    /// Experts that fit in memory
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = at_least(1))]
    slots: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    match args.command {
        Command::Replay(args) => replay(&args),
        Command::Generate(args) => generate(&args),
    }
}

fn generate(args: &GenerateArgs) -> anyhow::Result<()> {
    let chance = Chance {
        layers: args.layers.into(),
        experts: args.experts.into(),
        used: args.used.into(),
        tokens: args.tokens as usize,
        zipf: args.zipf,
        repeats: args.repeats,
        seed: args.seed,
    };
    if chance.used > chance.experts {
        anyhow::bail!(Usage("--used is more than --experts"));
    }
    write_trace(&args.trace, &chance.trace(args.expert_bytes))
}

fn replay(args: &ReplayArgs) -> anyhow::Result<()> {
    let file = || args.trace.display().to_string();
    let text = fs::read_to_string(&args.trace)
        .with_context(|| format!("{}: cannot read the trace", file()))?;
    let trace = Trace::from_text(&text).with_context(file)?;
    let outcomes = trace.replay(args.slots).with_context(file)?;
    let habits = trace.habits();
    if args.json {
        return print_json(
            &json!({"slots": args.slots, "policies": outcomes, "by_rank": habits.by_rank, "repeats": habits.repeats}),
        );
    }
    let mut out = std::io::stdout().lock();
    let ranks = habits.by_rank.iter().take(8);
    let ranks: Vec<_> = ranks.map(|share| format!("{:.0}", 100.0 * share)).collect();
    writeln!(
        out,
        "{} % of uses by the experts of a layer, the most used first; the next token takes {:.0} % of experts again",
        ranks.join(", "),
        100.0 * habits.repeats
    )
    .context(STDOUT)?;
    writeln!(out, "{:<12} {:>8} {:>14}", "policy", "hits", "read a token").context(STDOUT)?;
    for outcome in outcomes {
        writeln!(
            out,
            "{:<12} {:>6.1} % {:>14}",
            outcome.name,
            100.0 * outcome.hit_rate,
            bytes(outcome.read_bytes_per_token as u64)
        )
        .context(STDOUT)?;
    }
    Ok(())
}
