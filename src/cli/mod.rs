//! The command line: one file a command.

mod bench;
mod calibrate;
mod chat;
mod common;
mod doctor;
mod experts;
pub mod generate;
mod inspect;
mod ladder;
mod list;
mod perplexity;
mod plan;
#[cfg(feature = "pull")]
mod pull;
mod rm;
mod run;
mod sampling;
#[cfg(feature = "serve")]
mod serve;
#[cfg(feature = "grammar")]
mod shape;

use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use common::{Usage, model_file, note};

/// Mixtral-family models in few bits on ordinary computers.
#[derive(Parser)]
#[command(name = "fewbit", version, long_version = LONG_VERSION, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const LONG_VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    " (",
    env!("FEWBIT_REVISION"),
    ")\ntarget ",
    env!("FEWBIT_TARGET"),
    "\ncompiled for ",
    env!("FEWBIT_TARGET_FEATURES"),
);

#[derive(Subcommand)]
enum Command {
    /// Complete a prompt
    Run(run::Args),
    /// A conversation in the terminal
    Chat(chat::Args),
    /// A server for OpenAI's clients, with a chat page
    #[cfg(feature = "serve")]
    Serve(serve::Args),
    /// Perplexity of a text, and divergence from a base model
    Perplexity(perplexity::Args),
    /// Several files of one model side by side: perplexity, divergence, size, speed
    Ladder(ladder::Args),
    /// What a model's matrices are given, counted for the converter: an imatrix, second moments
    Calibrate(calibrate::Args),
    /// What a GGUF file holds: metadata, tensors, parameters
    Inspect(inspect::Args),
    /// Download a model: from a Hugging Face hub, or any URL
    #[cfg(feature = "pull")]
    Pull(pull::Args),
    /// The models that were pulled; -m takes their names
    List(list::Args),
    /// Remove pulled models
    Rm(rm::Args),
    /// What goes where in so much memory, and the speed to expect
    Plan(plan::Args),
    /// What a cache of experts makes of recorded routing
    Experts(experts::Args),
    /// Prompt and decode speed, with the machine's limits beside them
    Bench(bench::Args),
    /// What this machine has, and what would run on it how fast
    Doctor(doctor::Args),
    /// Shell completions and man pages
    Generate(generate::Args),
}

/// Runs the command that the process's arguments name. Exit codes: 0 done (a reader that hangs
/// up early included), 1 failed with one line on standard error, 2 wrong usage.
pub fn main() -> ExitCode {
    let result = run(Cli::parse().command);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            note(format_args!("fewbit: {}", one_line(&error)));
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}

fn run(mut command: Command) -> anyhow::Result<()> {
    for model in command.models() {
        *model = model_file(model)?;
    }
    match command {
        Command::Run(args) => run::run(args),
        Command::Chat(args) => chat::run(args),
        #[cfg(feature = "serve")]
        Command::Serve(args) => serve::run(args),
        Command::Perplexity(args) => perplexity::run(args),
        Command::Ladder(args) => ladder::run(args),
        Command::Calibrate(args) => calibrate::run(args),
        Command::Inspect(args) => inspect::run(args),
        #[cfg(feature = "pull")]
        Command::Pull(args) => pull::run(args),
        Command::List(args) => list::run(args),
        Command::Rm(args) => rm::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Experts(args) => experts::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Generate(args) => generate::run(&args, Cli::command()).map_err(Into::into),
    }
}

impl Command {
    /// What on the command line names a model, and may be the name of a pulled one.
    fn models(&mut self) -> Vec<&mut PathBuf> {
        match self {
            Self::Run(args) => args.model.files(),
            Self::Chat(args) => args.model.files(),
            #[cfg(feature = "serve")]
            Self::Serve(args) => args.model.files(),
            Self::Perplexity(args) => {
                let base = args.base.iter_mut();
                base.chain(args.model.files()).collect()
            }
            Self::Ladder(args) => args.models.iter_mut().chain(&mut args.base).collect(),
            Self::Calibrate(args) => vec![&mut args.model],
            Self::Inspect(args) => vec![&mut args.file],
            Self::Plan(args) => vec![&mut args.model],
            Self::Bench(args) => args.model.files(),
            Self::Doctor(args) => args.model.iter_mut().collect(),
            #[cfg(feature = "pull")]
            Self::Pull(_) => Vec::new(),
            Self::List(_) | Self::Rm(_) | Self::Experts(_) | Self::Generate(_) => Vec::new(),
        }
    }
}

/// An error and its causes. Some name their cause themselves: none is told twice.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line
}

/// Whether the reader of our output has gone away, as `head` does when it has seen enough.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let io = cause
            .downcast_ref::<std::io::Error>()
            .map(std::io::Error::kind);
        let json = cause
            .downcast_ref::<serde_json::Error>()
            .and_then(serde_json::Error::io_error_kind);
        io.or(json) == Some(ErrorKind::BrokenPipe)
    })
}
