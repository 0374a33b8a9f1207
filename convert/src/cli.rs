//! The command line of `fewbit-convert`.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use fewbit::adapter::Chosen;
use fewbit::cli::generate;
use fewbit::gguf::with_suffix;
use fewbit::plan::memory::Memory;
use fewbit::quant::BlockType;
use indicatif::{ProgressBar, ProgressStyle};
use regex::Regex;
use serde_json::json;

use crate::dry_run::DryRun;
use crate::error::{Error, Result};
use crate::export::{self, Dtype, export};
use crate::fit::{self, Target, tensor_type};
use crate::imatrix::Thin;
use crate::pipeline::{Options, Report, convert};
use crate::recipe::Mix;
use crate::round::Round;
use crate::synth::{self, Preset};

#[derive(Parser)]
#[command(name = "fewbit-convert", version, max_term_width = 100)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    convert: Option<ConvertArgs>,
}

#[derive(Subcommand)]
enum Command {
    Synth(SynthArgs),
    Export(ExportArgs),
    /// Shell completions and man pages
    Generate(generate::Args),
}

/// Quantizes a checkpoint into one GGUF file.
///
/// Takes a folder of safetensors as it was downloaded (Mixtral, Mistral, Llama; Hugging Face's layouts or
/// Mistral's own), or a GGUF file. A run that was cut off goes on when it is called again with the same arguments.
#[derive(Args)]
struct ConvertArgs {
    /// Folder of the checkpoint, or a GGUF file
    checkpoint: PathBuf,
    /// File to write
    #[arg(required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// Recipe: Q4_K_M, Q5_K_M, Q8_0 and so on, as llama-quantize names them
    #[arg(
        long = "type",
        value_name = "TYPE",
        required_unless_present_any = ["dry_run", "fit", "bpw"]
    )]
    mix: Option<Mix>,
    /// Importance matrix (GGUF or legacy) that guides the encoding
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// How weights are rounded: ggml (as llama-quantize, bit for bit), best (scales, minima and levels
    /// refitted together by the imatrix, in Q4_K, Q5_K and Q4_1), gptq (the same with error feedback, by the moments of `fewbit calibrate --moments`)
    #[arg(long, value_name = "HOW", default_value_t = Round::Ggml)]
    round: Round,
    /// LoRA adapter (PEFT's folder, or GGUF), added to the weights, with a scale if need be; may be given several times
    #[arg(long, value_name = "FILE[:SCALE]")]
    lora: Vec<Chosen>,
    /// Another block type for the matrices with a name that matches; the first that matches counts
    #[arg(long = "tensor-type", value_name = "REGEX=TYPE", value_parser = tensor_type)]
    tensor_types: Vec<(Regex, BlockType)>,
    /// The same from a file, one a line: after those of --tensor-type
    #[arg(long, value_name = "FILE")]
    tensor_type_file: Option<PathBuf>,
    /// Choose each matrix's type so that the file has this size (such as 24GiB) and loses least, by the statistics of
    /// `fewbit calibrate --sensitivity`; the types are also written to OUTPUT.types, for --tensor-type-file
    #[arg(long, value_name = "SIZE", value_parser = size)]
    fit: Option<u64>,
    /// The same for so many bits per weight, such as 4.5
    #[arg(long, value_name = "BITS", conflicts_with = "fit", value_parser = bits)]
    bpw: Option<f64>,
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
    /// Write nothing; print parameters, bytes and RAM (a folder that holds only config.json is
    /// enough; TYPE is Q4_K_M unless given)
    #[arg(long)]
    dry_run: bool,
    /// Context in tokens that --dry-run counts RAM for
    #[arg(
        short = 'c',
        long,
        value_name = "N",
        default_value_t = 4096,
        requires = "dry_run"
    )]
    ctx: usize,
    /// Memory that --dry-run plans to run the file in, such as 12GiB
    #[arg(long, value_name = "SIZE", requires = "dry_run")]
    memory: Option<Memory>,
    /// Print one JSON object on stdout instead of the summary
    #[arg(long)]
    json: bool,
}

/// Writes a file of random weights with the shapes of a real model, for benchmarks
#[derive(Args)]
struct SynthArgs {
    /// mixtral-8x7b, mixtral-8x22b, mistral-7b or llama-2-7b
    model: Preset,
    /// File to write
    output: PathBuf,
    /// Recipe, as in a conversion
    #[arg(long = "type", value_name = "TYPE")]
    mix: Mix,
    /// Layers [default: the model's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    layers: Option<u16>,
    /// Equal seeds give equal files
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// How routers choose: even, or zipf:S, where the expert of rank r is chosen about r^-S as often as the first
    #[arg(long, value_name = "HOW", default_value = "even", value_parser = routing)]
    routing: f32,
    /// Replace OUTPUT if it exists
    #[arg(long)]
    force: bool,
    /// Threads that draw blocks [default: one a logical CPU]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Print one JSON object on stdout instead of the summary
    #[arg(long)]
    json: bool,
}

/// Writes a GGUF file's model as a Hugging Face checkpoint (safetensors), for training and for other servers
#[derive(Args)]
struct ExportArgs {
    /// GGUF file (the first one of a split model); what its quantization has lost does not come back
    input: PathBuf,
    /// Folder to make
    output: PathBuf,
    /// Type of the weights
    #[arg(long, value_name = "TYPE", value_enum, default_value = "bf16")]
    dtype: DtypeArg,
    /// Bytes of weights in a file at most, such as 5GB
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "5GB")]
    shard: u64,
    /// Threads that encode [default: one a logical CPU]
    #[arg(
        short,
        long,
        value_name = "N",
        default_value_t = 0,
        hide_default_value = true
    )]
    threads: usize,
    /// Print one JSON object on stdout instead of the summary
    #[arg(long)]
    json: bool,
}

/// See [`Dtype`].
#[derive(Clone, Copy, Debug, ValueEnum)]
enum DtypeArg {
    Bf16,
    F16,
    F32,
}

impl From<DtypeArg> for Dtype {
    fn from(dtype: DtypeArg) -> Self {
        match dtype {
            DtypeArg::Bf16 => Self::Bf16,
            DtypeArg::F16 => Self::F16,
            DtypeArg::F32 => Self::F32,
        }
    }
}

/// Runs the command that the process's arguments name: exit code 0 if it is done, 1 if it failed, 2 on wrong usage.
pub fn main() -> ExitCode {
    let cli = Cli::parse(); // leaves with code 2 by itself
    ignore_file_size_signal();
    let done = match (&cli.command, &cli.convert) {
        (Some(Command::Generate(args)), _) => return run_generate(args),
        (Some(Command::Synth(args)), _) => run_synth(args),
        (Some(Command::Export(args)), _) => run_export(args),
        (None, Some(args)) => run_convert(args),
        (None, None) => unreachable!("clap asks for a checkpoint"),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fewbit-convert: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run_generate(args: &generate::Args) -> ExitCode {
    match generate::run(args, Cli::command()) {
        // Whoever closed the pipe does not want to read it.
        Err(generate::Error::Stdout(error)) if error.kind() == io::ErrorKind::BrokenPipe => {}
        Ok(()) => {}
        Err(error) => {
            eprintln!("fewbit-convert: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn run_convert(args: &ConvertArgs) -> Result<()> {
    let mut overrides = args.tensor_types.clone();
    if let Some(list) = &args.tensor_type_file {
        overrides.extend(fit::read_list(list)?);
    }
    let bytes = args.fit.map(Target::Bytes);
    let options = Options {
        overrides,
        fit: bytes.or(args.bpw.map(Target::BitsPerWeight)),
        imatrix: args.imatrix.clone(),
        lora: args.lora.clone(),
        round: args.round,
        threads: args.threads,
        force: args.force,
        allow_requantize: args.allow_requantize,
        record_every: Duration::from_secs(args.record_every),
        ..Options::new(args.mix.unwrap_or(Mix::Q4_K_M))
    };
    let output = match &args.output {
        Some(output) if !args.dry_run => output,
        _ => return dry_run(args, &options),
    };
    let progress = progress_bar();
    let result = convert(&args.checkpoint, output, &options, &progress);
    progress.finish_and_clear();
    let report = result?;
    print(if args.json {
        as_json(&report)
    } else {
        summary(&report)
    });
    Ok(())
}

fn dry_run(args: &ConvertArgs, options: &Options) -> Result<()> {
    let memory = args.memory.and_then(Memory::bytes);
    let progress = progress_bar();
    let run = DryRun::new(&args.checkpoint, options, args.ctx, memory, &progress);
    progress.finish_and_clear();
    let run = run?;
    if args.json {
        if let Some(caveat) = run.caveat() {
            eprintln!("fewbit-convert: file_bytes is {caveat}");
        }
        print(run.json());
    } else {
        print(run);
    }
    Ok(())
}

/// The exponent of Zipf's law.
fn routing(text: &str) -> std::result::Result<f32, String> {
    let zipf = || text.strip_prefix("zipf:")?.parse().ok();
    match text {
        "even" => Ok(0.0),
        _ => zipf()
            .filter(|zipf| (0.0..=10.0).contains(zipf))
            .ok_or_else(|| "must be even, or zipf: and a number from 0 to 10".to_owned()),
    }
}

fn run_synth(args: &SynthArgs) -> Result<()> {
    let mut config = args.model.config();
    config.layers = args.layers.map_or(config.layers, usize::from);
    let options = synth::Options {
        name: format!("{}, {} layers of random weights", args.model, config.layers),
        config,
        mix: args.mix,
        seed: args.seed,
        zipf: args.routing,
        force: args.force,
    };
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(args.threads.map_or(0, usize::from))
        .build()
        .map_err(|e| Error::io("start threads for", &args.output)(io::Error::other(e)))?;
    let progress = progress_bar();
    let result = pool.install(|| synth::synth(&args.output, &options, &progress));
    progress.finish_and_clear();
    let report = result?;
    let seconds = report.elapsed.as_secs_f64();
    let mb_s = report.file_bytes as f64 / 1e6 / seconds;
    if args.json {
        print(json!({
            "file": report.path.display().to_string(),
            "file_bytes": report.file_bytes,
            "seconds": seconds,
            "mb_s": mb_s,
        }));
    } else {
        print(format_args!(
            "{}: {} bytes, {seconds:.1} s, {mb_s:.0} MB/s",
            report.path.display(),
            report.file_bytes,
        ));
    }
    Ok(())
}

fn run_export(args: &ExportArgs) -> Result<()> {
    let options = export::Options {
        shard_bytes: args.shard,
        threads: args.threads,
        ..export::Options::new(args.dtype.into())
    };
    let progress = progress_bar();
    let result = export(&args.input, &args.output, &options, &progress);
    progress.finish_and_clear();
    let report = result?;
    let seconds = report.elapsed.as_secs_f64();
    if args.json {
        print(json!({
            "folder": report.path.display().to_string(),
            "files": report.shards,
            "weight_bytes": report.bytes,
            "decoded": report.decoded,
            "seconds": seconds,
        }));
        return Ok(());
    }
    if report.decoded > 0 {
        print(format_args!(
            "{} quantized tensors are decoded; what their quantization lost does not come back",
            report.decoded
        ));
    }
    print(format_args!(
        "{}: {} bytes of weights in {} files, {seconds:.1} s",
        report.path.display(),
        report.bytes,
        report.shards
    ));
    Ok(())
}

/// Prints to stdout. Whoever closed the pipe does not want to read it.
fn print(text: impl fmt::Display) {
    let _ = writeln!(io::stdout(), "{text}");
}

fn summary(report: &Report) -> String {
    let mut lines = report.plan.fallback_lines();
    if report.plan.unweighed > 0 {
        lines.push(format!(
            "{} matrices without importance weights in the imatrix",
            report.plan.unweighed
        ));
    }
    for thin in &report.thin {
        let Thin {
            tensor,
            expert,
            tokens,
            by_average,
        } = thin;
        let instead = match by_average {
            true => "leans on its layer's average",
            false => "nor did any of its layer: its columns count alike",
        };
        lines.push(format!(
            "{tensor}: expert {expert} saw {tokens} tokens, {instead}"
        ));
    }
    if report.tensors_kept > 0 {
        lines.push(format!(
            "went on after {} tensors that an earlier run had written",
            report.tensors_kept
        ));
    }
    if let Some(fitted) = &report.fitted {
        lines.extend(fitted.lines());
        lines.push(format!(
            "predicted KLD {:.5}; types in {}",
            fitted.kld,
            with_suffix(&report.path, ".types").display()
        ));
    }
    let seconds = report.elapsed.as_secs_f64();
    lines.push(format!(
        "{}: {} bytes, {:.3} bits per weight, {seconds:.1} s, {:.2} GB/s read",
        report.path.display(),
        report.plan.layout.file_bytes(),
        report.plan.sizes.bits_per_weight(),
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
    let leaning: Vec<_> = report
        .thin
        .iter()
        .map(|t| json!({"tensor": t.tensor, "expert": t.expert, "tokens": t.tokens, "by_average": t.by_average}))
        .collect();
    let mut figures = json!({
        "file": report.path.display().to_string(),
        "file_bytes": report.plan.layout.file_bytes(),
        "bits_per_weight": report.plan.sizes.bits_per_weight(),
        "seconds": seconds,
        "read_bytes": report.bytes_read,
        "gb_s": report.bytes_read as f64 / 1e9 / seconds,
        "without_importance": report.plan.unweighed,
        "leaning": leaning,
        "tensors_kept": report.tensors_kept,
        "fallbacks": fallbacks,
    });
    if let Some(fitted) = &report.fitted {
        figures["kld_predicted"] = json!(fitted.kld);
    }
    figures.to_string()
}

fn progress_bar() -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = "{msg:32!} {wide_bar} {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}  {eta} left";
    let style = ProgressStyle::with_template(style).expect("a fixed template");
    ProgressBar::no_length().with_style(style)
}

/// A number of bytes.
fn size(text: &str) -> std::result::Result<u64, String> {
    match text.parse() {
        Ok(Memory::Bytes(bytes)) => Ok(bytes),
        _ => Err("must be a size such as 24GiB or 5GB".to_owned()),
    }
}

/// A number of bits a weight.
fn bits(text: &str) -> std::result::Result<f64, String> {
    let bits = text.parse().ok().filter(|bits| (1.0..=32.0).contains(bits));
    bits.ok_or_else(|| "must be a number from 1 to 32".to_owned())
}

/// A file that grows beyond the shell's limit is then an error of `write` with a message, and does not end the process.
fn ignore_file_size_signal() {
    // SAFETY: no handler is installed, the signal is merely ignored.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}
