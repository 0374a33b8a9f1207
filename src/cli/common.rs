//! What several commands share: model options, errors, output.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use clap::{Args, ValueEnum};

use crate::engine::{ActivationMode, Engine, Options};
use crate::gguf::Gguf;
use crate::perplexity::Chunks;
use crate::quant::BlockType;
use crate::sampler::Settings;
use crate::tokenizer::Tokenizer;

/// Options of every command that loads a model.
#[derive(Args, Clone, Debug)]
pub struct ModelArgs {
    /// Model file (GGUF; the first one of a split model)
    #[arg(short, long, value_name = "FILE")]
    pub model: PathBuf,
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// How the model is run.
#[derive(Args, Clone, Debug)]
pub struct EngineArgs {
    /// Threads [default: one a core that the process may use]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Kernels: scalar, avx2, avx512 [default: the widest that the CPU has]
    #[arg(long, value_name = "NAME")]
    pub kernels: Option<String>,
    /// How quantized weights meet the activations: f32 is the exact, slow reference
    #[arg(long, value_enum, default_value_t = Activations::Int8)]
    pub activations: Activations,
}

/// See [`ActivationMode`].
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Activations {
    /// 8-bit codes with one scale for 32
    Int8,
    /// 32-bit floats
    F32,
}

/// How tokens are chosen.
#[derive(clap::Args, Clone, Debug)]
pub struct SamplingArgs {
    /// Temperature; 0 always takes the most likely token
    #[arg(long, visible_alias = "temperature", value_name = "T", default_value_t = Settings::default().temperature)]
    temp: f32,
    /// Draw from the K most likely tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = Settings::default().top_k)]
    top_k: usize,
    /// Draw from the most likely tokens that reach this probability
    #[arg(long, value_name = "P", default_value_t = Settings::default().top_p)]
    top_p: f32,
    /// Draw from tokens at least this likely relative to the best
    #[arg(long, value_name = "P", default_value_t = Settings::default().min_p)]
    min_p: f32,
    /// Penalty on recent tokens; 1 for none
    #[arg(long, value_name = "X", default_value_t = Settings::default().repeat_penalty)]
    repeat_penalty: f32,
    /// Recent tokens that the penalty looks at
    #[arg(long, value_name = "N", default_value_t = Settings::default().repeat_last)]
    repeat_last_n: usize,
    /// Seed of the draws [default: from the clock]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

impl SamplingArgs {
    /// The sampler's settings.
    pub fn settings(&self) -> Settings {
        let clock = || {
            std::time::UNIX_EPOCH
                .elapsed()
                .map_or(0, |time| time.as_nanos() as u64)
        };
        Settings {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            repeat_last: self.repeat_last_n,
            seed: self.seed.unwrap_or_else(clock),
        }
    }
}

impl ModelArgs {
    /// The model's file.
    pub fn path(&self) -> &Path {
        &self.model
    }

    /// Loads the model.
    pub fn load(&self) -> anyhow::Result<Arc<Engine>> {
        self.engine.load(&self.model)
    }
}

impl EngineArgs {
    /// Loads the model in `path`.
    pub fn load(&self, path: &Path) -> anyhow::Result<Arc<Engine>> {
        let activations = match self.activations {
            Activations::Int8 => ActivationMode::Int8,
            Activations::F32 => ActivationMode::F32,
        };
        self.load_with(path, activations)
    }

    /// Loads the model that others are measured against: it runs exactly, whatever it holds.
    pub fn load_base(&self, path: &Path) -> anyhow::Result<Arc<Engine>> {
        self.load_with(path, ActivationMode::F32)
    }

    fn load_with(&self, path: &Path, activations: ActivationMode) -> anyhow::Result<Arc<Engine>> {
        let options = Options {
            threads: self.threads.map(usize::from),
            kernels: self.kernels.clone(),
            activations,
        };
        Ok(Engine::load(path, &options)?)
    }
}

/// Cuts the text in `path` into chunks of `ctx` tokens, at most `limit` of them.
pub fn chunks_of(
    tokenizer: &Tokenizer,
    path: &Path,
    ctx: usize,
    limit: Option<usize>,
) -> anyhow::Result<Chunks> {
    let text = read_text(path)?;
    Chunks::new(tokenizer, &text, ctx, limit).with_context(|| path.display().to_string())
}

/// Checks that two files hold the same vocabulary, without which they cannot be compared.
pub fn check_base(base: &Engine, model: &Engine) -> anyhow::Result<()> {
    let (ours, theirs) = (model.shape().vocab, base.shape().vocab);
    anyhow::ensure!(
        ours == theirs,
        "{}: a vocabulary of {ours} tokens, {} has {theirs}: these are not one model",
        model.path().display(),
        base.path().display()
    );
    Ok(())
}

/// What kind of file it is, by `general.file_type`, or by the type that most bytes have.
pub fn file_type(gguf: &Gguf) -> String {
    let declared = gguf
        .metadata
        .u32("general.file_type")
        .ok()
        .flatten()
        .and_then(file_type_name);
    let prevalent = || {
        let bytes = |kind| {
            gguf.tensors
                .iter()
                .filter(|t| t.kind == kind)
                .map(|t| t.bytes)
                .sum::<u64>()
        };
        BlockType::ALL
            .iter()
            .copied()
            .max_by_key(|&kind| bytes(kind))
            .map_or("", BlockType::name)
    };
    declared.unwrap_or_else(prevalent).to_owned()
}

/// llama.cpp's `llama_ftype` by number.
fn file_type_name(id: u32) -> Option<&'static str> {
    Some(match id {
        0 => "F32",
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        7 => "Q8_0",
        8 => "Q5_0",
        9 => "Q5_1",
        10 => "Q2_K",
        11 => "Q3_K_S",
        12 => "Q3_K_M",
        13 => "Q3_K_L",
        14 => "Q4_K_S",
        15 => "Q4_K_M",
        16 => "Q5_K_S",
        17 => "Q5_K_M",
        18 => "Q6_K",
        25 => "IQ4_NL",
        30 => "IQ4_XS",
        32 => "BF16",
        _ => return None,
    })
}

/// Reads a text file whole.
fn read_text(path: &Path) -> anyhow::Result<String> {
    let bytes =
        std::fs::read(path).with_context(|| format!("{}: cannot read the text", path.display()))?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        anyhow::anyhow!(
            "{}: byte {at}: not UTF-8; convert the text first",
            path.display()
        )
    })
}

/// Writes one JSON object and a newline to standard output.
pub fn print_json(value: &serde_json::Value) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, value)?;
    writeln!(out)?;
    Ok(())
}

/// A progress bar over `len` steps on a terminal's standard error; none elsewhere.
pub fn progress(len: usize, what: &str) -> indicatif::ProgressBar {
    if !std::io::stderr().is_terminal() {
        return indicatif::ProgressBar::hidden();
    }
    let style = indicatif::ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}")
        .expect("the template is well-formed");
    indicatif::ProgressBar::new(len as u64)
        .with_style(style)
        .with_message(what.to_owned())
}

/// The process's peak resident memory, mapped pages included; `None` where the system does not say.
pub fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()
        .map(|kib| kib * 1024)
}

/// Lets [`peak_rss_bytes`] start again from what is resident now, where the system can.
pub fn reset_peak_rss() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}
