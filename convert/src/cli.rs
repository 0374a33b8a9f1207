//! The command line of `fewbit-convert`.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use fewbit::quant::BlockType;
use indicatif::{ProgressBar, ProgressStyle};
use regex::Regex;
use serde_json::json;

use crate::error::Result;
use crate::pipeline::{Options, Report, convert};
use crate::recipe::Mix;

/// Quantizes a checkpoint into one GGUF file.
///
/// Takes a folder of safetensors as it was downloaded (Mixtral, Mistral, Llama; Hugging Face's layouts or
/// Mistral's own), or a GGUF file. A run that was cut off goes on when it is called again with the same arguments.
#[derive(Parser)]
#[command(name = "fewbit-convert", version, max_term_width = 100)]
struct Cli {
    /// Folder of the checkpoint, or a GGUF file
    checkpoint: PathBuf,
    /// File to write
    output: PathBuf,
    /// Recipe: Q4_K_M, Q5_K_M, Q8_0 and so on, as llama-quantize names them
    #[arg(long = "type", value_name = "TYPE")]
    mix: Mix,
    /// Importance matrix (GGUF or legacy) that guides the encoding
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// Another block type for the matrices with a name that matches; the first that matches counts
    #[arg(long = "tensor-type", value_name = "REGEX=TYPE", value_parser = tensor_type)]
    tensor_types: Vec<(Regex, BlockType)>,
    /// Accept weights that are quantized already (they lose twice)
    #[arg(long)]
    allow_requantize: bool,
    /// Replace OUTPUT if it exists
    #[arg(long)]
    force: bool,
    /// Threads that encode [default: one a logical CPU]
    #[arg(
        short,
        long,
        value_name = "N",
        default_value_t = 0,
        hide_default_value = true
    )]
    threads: usize,
    /// Seconds between two points from which a run that is cut off can go on
    #[arg(long, value_name = "SECONDS", default_value_t = 2, hide = true)]
    record_every: u64,
    /// Print one JSON object on stdout instead of the summary
    #[arg(long)]
    json: bool,
}

/// Runs the command that the process's arguments name: exit code 0 if it is done, 1 if it failed, 2 on wrong usage.
pub fn main() -> ExitCode {
    let cli = Cli::parse(); // leaves with code 2 by itself
    ignore_file_size_signal();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fewbit-convert: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let options = Options {
        overrides: cli.tensor_types.clone(),
        imatrix: cli.imatrix.clone(),
        threads: cli.threads,
        force: cli.force,
        allow_requantize: cli.allow_requantize,
        record_every: Duration::from_secs(cli.record_every),
        ..Options::new(cli.mix)
    };
    let progress = progress_bar();
    let result = convert(&cli.checkpoint, &cli.output, &options, &progress);
    progress.finish_and_clear();
    let report = result?;
    let text = if cli.json {
        as_json(&report)
    } else {
        summary(&report)
    };
    // Whoever closed the pipe does not want to read it.
    let _ = writeln!(io::stdout(), "{text}");
    Ok(())
}

fn summary(report: &Report) -> String {
    let mut lines = report.plan.fallback_lines();
    if report.tensors_kept > 0 {
        lines.push(format!(
            "went on after {} tensors that an earlier run had written",
            report.tensors_kept
        ));
    }
    let seconds = report.elapsed.as_secs_f64();
    lines.push(format!(
        "{}: {} bytes, {:.3} bits per weight, {seconds:.1} s, {:.2} GB/s read",
        report.path.display(),
        report.plan.layout.file_bytes(),
        report.plan.bits_per_weight(),
        report.bytes_read as f64 / 1e9 / seconds,
    ));
    lines.join("\n")
}

fn as_json(report: &Report) -> String {
    let seconds = report.elapsed.as_secs_f64();
    let fallbacks: Vec<_> = report
        .plan
        .fallbacks
        .iter()
        .map(|f| json!({"tensor": f.tensor, "columns": f.columns, "from": f.from.name(), "to": f.to.name()}))
        .collect();
    json!({
        "file": report.path.display().to_string(),
        "file_bytes": report.plan.layout.file_bytes(),
        "bits_per_weight": report.plan.bits_per_weight(),
        "seconds": seconds,
        "read_bytes": report.bytes_read,
        "gb_s": report.bytes_read as f64 / 1e9 / seconds,
        "tensors_kept": report.tensors_kept,
        "fallbacks": fallbacks,
    })
    .to_string()
}

fn progress_bar() -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = "{msg:32!} {wide_bar} {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}  {eta} left";
    let style = ProgressStyle::with_template(style).expect("a fixed template");
    ProgressBar::no_length().with_style(style)
}

/// Parses `REGEX=TYPE`; the last `=` separates.
fn tensor_type(argument: &str) -> std::result::Result<(Regex, BlockType), String> {
    let (pattern, kind) = argument.rsplit_once('=').ok_or("expected REGEX=TYPE")?;
    let pattern = Regex::new(pattern).map_err(|e| e.to_string())?;
    let kind = kind
        .parse()
        .map_err(|e: fewbit::quant::UnknownType| e.to_string())?;
    Ok((pattern, kind))
}

/// A file that grows beyond the shell's limit is then an error of `write` with a message, and does not end the process.
fn ignore_file_size_signal() {
    // SAFETY: no handler is installed, the signal is merely ignored.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}
