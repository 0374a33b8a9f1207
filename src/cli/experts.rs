//! `fewbit experts`: what a cache of experts makes of recorded routing.

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use serde_json::json;

use super::common::{STDOUT, at_least, bytes, print_json};
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
    let Command::Replay(args) = args.command;
    let file = || args.trace.display().to_string();
    let text = fs::read_to_string(&args.trace)
        .with_context(|| format!("{}: cannot read the trace", file()))?;
    let trace = Trace::from_text(&text).with_context(file)?;
    let outcomes = trace.replay(args.slots).with_context(file)?;
    if args.json {
        return print_json(&json!({"slots": args.slots, "policies": outcomes}));
    }
    let mut out = std::io::stdout().lock();
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
