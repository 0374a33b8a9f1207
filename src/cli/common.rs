//! What several commands share: model options, errors, output.

use std::fmt::Display;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::builder::PossibleValuesParser;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};

use crate::adapter::Chosen;
use crate::chat::Style;
use crate::engine::{self, ActivationMode, Engine, Loading, Options};
use crate::experts::trace::Trace;
use crate::experts::{Cache, Counters};
use crate::gguf::{self, Gguf};
use crate::kernels::Kernels;
use crate::model::{KvKind, Routing};
use crate::perplexity::{Chunks, Estimate};
use crate::plan::fit::usual_context;
use crate::plan::memory::{Memory, in_kib, share_out};
use crate::plan::{Shape, Size};
use crate::quant::BlockType;
use crate::store::{self, Entry};
use crate::tensor::{fault, warm};
use crate::threads::CpuSet;
use crate::tokenizer::Tokenizer;

/// Options of every command that loads a model.
#[derive(Args, Clone, Debug)]
pub struct ModelArgs {
    /// Model: a file (GGUF; the first one of a split model), or a name from `fewbit list`
    #[arg(short, long, value_name = "FILE")]
    pub model: PathBuf,
    /// LoRA adapter (PEFT's folder, or GGUF), with a scale if need be; may be given several times
    #[arg(long, value_name = "FILE[:SCALE]")]
    lora: Vec<Chosen>,
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// How many threads work.
#[derive(Args, Clone, Debug)]
pub struct ThreadArgs {
    /// Threads [default: one a fast core that the process may use]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
}

impl ThreadArgs {
    /// The number asked for.
    pub fn count(&self) -> Option<usize> {
        self.threads.map(usize::from)
    }
}

/// How the model is run.
#[derive(Args, Clone, Debug)]
pub struct EngineArgs {
    #[command(flatten)]
    threads: ThreadArgs,
    /// CPUs to keep the threads on, one each: a list such as 0-3,8 or a mask such as 0xff (Linux)
    #[arg(long, value_name = "CPUS")]
    cpu_mask: Option<CpuSet>,
    /// Kernels, of those that the CPU can run [default: the widest]
    #[arg(long, value_name = "NAME", value_parser = kernel_names())]
    kernels: Option<String>,
    /// How quantized weights meet the activations: f32 is the exact, slow reference
    #[arg(long, value_enum, default_value_t = Activations::Int8)]
    activations: Activations,
    /// How keys and values of the context are kept [default: f16; f32 where all else is exact]
    #[arg(long, value_enum, value_name = "TYPE")]
    kv: Option<Kv>,
    /// Memory that the model may take, such as 12GiB: where it needs more, experts are read from disk as they
    /// are needed; auto is what the system has to spare
    #[arg(long, value_name = "SIZE", default_value_t = Memory::Auto)]
    memory: Memory,
    /// Map the file even if it does not fit into memory
    #[arg(long, conflicts_with = "no_mmap")]
    mmap: bool,
    /// Read the weights into memory of the program's own instead of mapping the file
    #[arg(long)]
    no_mmap: bool,
    /// Keep the weights from being swapped out or dropped
    #[arg(long)]
    mlock: bool,
    /// How experts are chosen where some have to be read from disk: exact, or cached:SHARE (cached:0.1, say), which prefers
    /// one that is in memory if its score is lower by no more than that share of their spread; faster, other results
    #[arg(long, value_name = "HOW", default_value = "exact", value_parser = routing)]
    routing: Routing,
}

fn routing(text: &str) -> Result<Routing, String> {
    let share = || text.strip_prefix("cached:")?.parse::<f32>().ok();
    match (text, share()) {
        ("exact", _) => Ok(Routing::Exact),
        (_, Some(share)) if (0.0..=1.0).contains(&share) => Ok(Routing::Cached(share)),
        _ => Err("must be exact, or cached: and a share from 0 to 1".to_owned()),
    }
}

/// Wrong usage that shows only after the arguments are parsed: the command exits with 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub &'static str);

/// A count of at least `least`.
pub fn at_least(least: usize) -> impl Fn(&str) -> Result<usize, String> + Clone {
    move |text| {
        let count = text.parse().ok().filter(|&count| count >= least);
        count.ok_or_else(|| format!("must be a whole number, {least} or more"))
    }
}

/// A share of a whole.
pub fn share(text: &str) -> Result<f64, String> {
    let share = text
        .parse()
        .ok()
        .filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "must be a number from 0 to 1".to_owned())
}

/// A chat template's name.
pub fn style(name: &str) -> Result<Style, String> {
    Style::named(name).ok_or_else(|| format!("there are: {}", Style::names()))
}

fn kernel_names() -> PossibleValuesParser {
    let tables = Kernels::available();
    PossibleValuesParser::new(tables.iter().map(|kernels| kernels.name))
}

/// See [`ActivationMode`].
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Activations {
    /// 8-bit codes with one scale for 32
    Int8,
    /// 32-bit floats
    F32,
}

/// See [`KvKind`].
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Kv {
    /// 16-bit floats
    F16,
    /// Blocks of 8 bits
    #[value(name = "q8_0")]
    Q8_0,
    /// Blocks of 4 bits
    #[value(name = "q4_0")]
    Q4_0,
}

impl From<Kv> for KvKind {
    fn from(kv: Kv) -> Self {
        match kv {
            Kv::F16 => Self::F16,
            Kv::Q8_0 => Self::Q8_0,
            Kv::Q4_0 => Self::Q4_0,
        }
    }
}

impl ModelArgs {
    /// The model's file.
    pub fn path(&self) -> &Path {
        &self.model
    }

    /// Loads the model, to be run with a context of so many tokens (or the usual number).
    pub fn load(&self, context: Option<usize>) -> Result<Arc<Engine>, engine::Error> {
        self.engine.load_with(&self.model, self.options(context))
    }

    fn options(&self, context: Option<usize>) -> Options {
        Options {
            lora: self.lora.clone(),
            ..self.engine.options(context)
        }
    }

    /// What may be the names of pulled files.
    pub fn files(&mut self) -> Vec<&mut PathBuf> {
        let adapters = self.lora.iter_mut().map(|chosen| &mut chosen.path);
        [&mut self.model].into_iter().chain(adapters).collect()
    }

    /// Loads the model and, beside it, the one that it is measured against, which runs exactly, whatever it
    /// holds. They share the memory.
    pub fn load_beside(
        &self,
        base: Option<&Path>,
        context: usize,
    ) -> Result<(Option<Arc<Engine>>, Arc<Engine>), engine::Error> {
        let Some(base) = base else {
            return Ok((None, self.load(Some(context))?));
        };
        let mut base = (base, self.engine.exact(context));
        let mut model = (&*self.model, self.options(Some(context)));
        if let Some(memory) = self.engine.memory.bytes() {
            let needs = [
                Engine::needs(base.0, &base.1)?,
                Engine::needs(model.0, &model.1)?,
            ];
            match (share_out(memory, &needs), self.engine.memory) {
                (Some(shares), _) => {
                    base.1.memory = Memory::Bytes(shares[0]);
                    model.1.memory = Memory::Bytes(shares[1]);
                }
                // The first that finds too little says so.
                (None, Memory::Bytes(_)) => {
                    base.1.memory = Memory::Bytes(memory / 2);
                    model.1.memory = Memory::Bytes(memory / 2);
                }
                (None, Memory::Auto) => {}
            }
        }
        let base = self.engine.load_with(base.0, base.1)?;
        Ok((Some(base), self.engine.load_with(model.0, model.1)?))
    }
}

impl EngineArgs {
    /// Loads the model in `path`, to be run with a context of so many tokens (or the usual number).
    pub fn load(&self, path: &Path, context: Option<usize>) -> Result<Arc<Engine>, engine::Error> {
        self.load_with(path, self.options(context))
    }

    /// Loads a model that others are measured against: it runs exactly, whatever it holds.
    pub fn load_base(&self, path: &Path, context: usize) -> Result<Arc<Engine>, engine::Error> {
        self.load_with(path, self.exact(context))
    }

    /// Whether activations are asked for in 32-bit floats.
    pub fn in_f32(&self) -> bool {
        matches!(self.activations, Activations::F32)
    }

    fn exact(&self, context: usize) -> Options {
        Options {
            activations: ActivationMode::F32,
            kv: None,
            routing: Routing::Exact,
            ..self.options(Some(context))
        }
    }

    fn options(&self, context: Option<usize>) -> Options {
        let activations = match self.activations {
            Activations::Int8 => ActivationMode::Int8,
            Activations::F32 => ActivationMode::F32,
        };
        Options {
            threads: self.threads.count(),
            cpus: self.cpu_mask.clone(),
            kernels: self.kernels.clone(),
            activations,
            kv: self.kv.map(KvKind::from),
            memory: self.memory,
            loading: match (self.mmap, self.no_mmap) {
                (true, _) => Loading::Mapped,
                (_, true) => Loading::Read,
                _ => Loading::Fitting,
            },
            lock: self.mlock,
            routing: self.routing,
            lora: Vec::new(),
            context,
        }
    }

    fn load_with(&self, path: &Path, options: Options) -> Result<Arc<Engine>, engine::Error> {
        fault::explain();
        let engine = Engine::load(path, &options)?;
        let cache = engine.expert_cache();
        let fits = engine.fit().is_some() && cache.is_none();
        if fits && options.loading == Loading::Fitting {
            bring_in(&engine);
        }
        if let Some(fit) = engine
            .fit()
            .filter(|_| cache.is_some() || options.memory != Memory::Auto)
        {
            note(fit);
        }
        if let Some(reason) = cache.and_then(Cache::buffered_because) {
            note(format_args!(
                "fewbit: reads go through the page cache: {reason}"
            ));
        }
        if engine.fit().is_none() && !self.mmap && options.memory == Memory::Auto {
            note(
                "fewbit: warning: with this context the model does not fit into memory, even with experts on disk: it is mapped, and slow",
            );
        }
        Ok(engine)
    }
}

/// The file that a command's argument means: the path, where there is something of this name; else the pulled
/// model that is called so. What is written like a path and is not there is left for whoever opens it to report.
pub fn model_file(argument: &Path) -> anyhow::Result<PathBuf> {
    let as_given = || Ok(argument.to_owned());
    if argument.exists() {
        return as_given();
    }
    let (Some(name), Some(folder)) = (argument.to_str(), store::folder()) else {
        return as_given();
    };
    let is_path = argument.is_absolute() || name.starts_with('.') || name.ends_with(".gguf");
    let entries = models_in(&folder)?;
    let entry = match store::find(&folder, &entries, name) {
        Ok(entry) => entry,
        Err(store::Unknown::None { .. }) if is_path => return as_given(),
        Err(error) => return Err(error.into()),
    };
    if let Some(checkpoint) = &entry.checkpoint {
        anyhow::bail!(
            "{}: is a checkpoint: `fewbit-convert {} OUT.gguf --type Q4_K_M` makes a file to run of it",
            entry.name,
            checkpoint.display()
        );
    }
    Ok(entry.path().to_owned())
}

/// The models in `folder`.
pub fn models_in(folder: &Path) -> anyhow::Result<Vec<Entry>> {
    store::list(folder).with_context(|| format!("{}: cannot list it", folder.display()))
}

/// Where models are put.
pub fn model_folder() -> anyhow::Result<PathBuf> {
    store::folder().context("there is no home folder to keep models in; set FEWBIT_HOME")
}

/// Reads a mapped file that is not in memory, with a progress bar. Small ones come in fast enough by themselves.
fn bring_in(engine: &Engine) {
    const SMALL: u64 = 256 << 20;
    let bytes = engine
        .gguf()
        .tensors
        .iter()
        .map(|tensor| tensor.bytes)
        .sum();
    if bytes < SMALL {
        return;
    }
    let bar = progress(bytes, "reading {wide_bar} {bytes}/{total_bytes} {eta}");
    warm::warm(&engine.gguf().files, &|read| bar.inc(read));
}

/// How long the disk is read to learn its speed.
pub const PROBE: Duration = Duration::from_secs(1);

/// What a cache of experts did while tokens were generated.
pub struct CacheUse {
    counters: Counters,
    tokens: usize,
}

impl CacheUse {
    /// What was counted for `tokens` tokens.
    pub fn new(counters: Counters, tokens: usize) -> Self {
        Self { counters, tokens }
    }

    /// What `engine`'s cache, if it has one, did for `tokens` tokens since it had counted `before`.
    pub fn since(engine: &Engine, before: Option<Counters>, tokens: usize) -> Option<Self> {
        let counters = engine.expert_cache()?.counters() - before?;
        Some(Self::new(counters, tokens))
    }

    fn read_bytes_per_token(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.counters.read_bytes as f64 / self.tokens as f64)
    }

    /// As `fewbit run --json` shows it.
    pub fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "hit_rate": self.counters.hit_rate(),
            "read_bytes_per_token": self.read_bytes_per_token(),
            "wait_s": self.counters.waited.as_secs_f64(),
            "prefetch_accuracy": self.counters.accuracy(),
        })
    }
}

impl Display for CacheUse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let percent = |share: Option<f64>| 100.0 * share.unwrap_or(f64::NAN);
        write!(
            f,
            "{} % of experts in memory, {} a token from disk, {:.1} s waited, {} % guessed right",
            figure(percent(self.counters.hit_rate()), 0),
            bytes(self.read_bytes_per_token().unwrap_or(0.0) as u64),
            self.counters.waited.as_secs_f64(),
            figure(percent(self.counters.accuracy()), 0)
        )
    }
}

/// The context to run `engine` with: what was asked for, with a warning if the model was not
/// trained for as much.
pub fn context_of(engine: &Engine, asked: Option<usize>) -> usize {
    let trained = engine.shape().context;
    let usual = || {
        let planned = engine.fit().map(|fit| fit.context);
        planned.unwrap_or_else(|| usual_context(engine.shape()))
    };
    let context = asked.unwrap_or_else(usual);
    if context > trained {
        note(format_args!(
            "fewbit: warning: --ctx {context} is more than the {trained} tokens that the model was trained for"
        ));
    }
    context
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

/// A file's vocabulary, which tells whether two files can be compared.
pub struct Vocabulary {
    path: PathBuf,
    rows: usize,
    tokenizer: Tokenizer,
}

impl Vocabulary {
    /// Reads that of the model in `path`, and no weights.
    pub fn read(path: &Path) -> Result<Self, engine::Error> {
        let gguf = gguf::read(path)?;
        Ok(Self {
            path: path.to_owned(),
            rows: Shape::from_metadata(&gguf.metadata)?.vocab,
            tokenizer: Tokenizer::from_metadata(&gguf.metadata)?,
        })
    }

    /// Rows of the embedding.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// What cuts texts into its tokens.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }
}

/// Checks that two files hold the same vocabulary, without which they cannot be compared.
pub fn check_base(base: &Vocabulary, model: &Vocabulary) -> anyhow::Result<()> {
    let (file, reference) = (model.path.display(), base.path.display());
    let (ours, theirs) = (model.rows, base.rows);
    anyhow::ensure!(
        ours == theirs,
        "{file}: a vocabulary of {ours} tokens, {reference} has {theirs}: these are not one model"
    );
    let (ours, theirs) = (&model.tokenizer, &base.tokenizer);
    let count = ours.vocab_len().max(theirs.vocab_len()) as u32;
    if let Some(id) = (0..count).find(|&id| ours.piece(id) != theirs.piece(id)) {
        let piece = |tokenizer: &Tokenizer| tokenizer.piece(id).unwrap_or_default().to_owned();
        anyhow::bail!(
            "{file}: token {id} is {:?}, in {reference} it is {:?}: these are not one model",
            piece(ours),
            piece(theirs)
        );
    }
    let first = |tokenizer: &Tokenizer| tokenizer.bos().filter(|_| tokenizer.adds_bos());
    let (ours, theirs) = (first(ours), first(theirs));
    let name = |bos: Option<u32>| bos.map_or("no BOS".to_owned(), |id| format!("token {id}"));
    anyhow::ensure!(
        ours == theirs,
        "{file}: a text begins with {}, in {reference} with {}: convert both from one checkpoint",
        name(ours),
        name(theirs)
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
pub fn read_text(path: &Path) -> anyhow::Result<String> {
    let bytes =
        std::fs::read(path).with_context(|| format!("{}: cannot read the text", path.display()))?;
    utf8(bytes, path.display())
}

/// The text in `bytes`, which came from `source`.
pub fn utf8(bytes: Vec<u8>, source: impl Display) -> anyhow::Result<String> {
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        anyhow::anyhow!("{source}: byte {at}: not UTF-8; convert the text first")
    })
}

/// What failed where standard output cannot be written.
pub const STDOUT: &str = "standard output: cannot write";

/// Writes a trace of routing.
pub fn write_trace(path: &Path, trace: &Trace) -> anyhow::Result<()> {
    std::fs::write(path, trace.to_text()?)
        .with_context(|| format!("{}: cannot write the trace", path.display()))
}

/// Writes one JSON object and a newline to standard output.
pub fn print_json(value: &serde_json::Value) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, value).context(STDOUT)?;
    writeln!(out).context(STDOUT)
}

/// Writes a line to standard error. That nobody can read it is no reason to stop.
pub fn note(line: impl Display) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// A progress bar on standard error, drawn on a terminal only, and gone when dropped: after an
/// error too. `template` is indicatif's.
pub fn progress(len: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("the template is well-formed");
    ProgressBar::new(len)
        .with_style(style)
        .with_finish(ProgressFinish::AndClear)
}

/// Template of a bar over the chunks of a text.
pub const CHUNKS_BAR: &str = "{msg} {wide_bar} {pos}/{len} {eta}";

/// A file's name without folder and extension, as tables and greetings show it.
pub fn file_stem(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default();
    stem.to_string_lossy().into_owned()
}

/// A number of parameters: `46.70 B`.
pub fn count(number: u64) -> String {
    scaled(number, &["", " k", " M", " B", " T"])
}

/// A number of bytes, in powers of ten: `26.44 GB`.
pub fn bytes(number: u64) -> String {
    Size(number).to_string()
}

fn scaled(number: u64, units: &[&str]) -> String {
    if number < 1000 {
        return format!("{number}{}", units[0]);
    }
    let mut value = number as f64;
    let mut unit = 0;
    // 999.995 would be shown as 1000.00.
    while value >= 999.995 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{value:.2}{}", units[unit])
}

/// Tokens a second; `None` where there was nothing to time.
pub fn speed(tokens: usize, time: Duration) -> Option<f64> {
    (tokens > 0).then(|| tokens as f64 / time.as_secs_f64().max(1e-9))
}

/// A figure; `-` where it is undefined (an error estimated from one value, say).
pub fn figure(value: f64, digits: usize) -> String {
    match value.is_nan() {
        true => "-".to_owned(),
        false => format!("{value:.digits$}"),
    }
}

/// A value and its standard error: `6.0731 ± 0.0412`.
pub fn plus_minus(estimate: Estimate, digits: usize) -> String {
    let Estimate { value, se } = estimate;
    format!("{} ± {}", figure(value, digits), figure(se, digits))
}

/// The process's peak resident memory, mapped pages included; `None` where the system does not say.
pub fn peak_rss_bytes() -> Option<u64> {
    status_bytes("VmHWM:")
}

/// Resident memory of the process's own: scratch, keys and values, not the mapped file.
pub fn own_rss_bytes() -> Option<u64> {
    status_bytes("RssAnon:")
}

/// A size that Linux says of this process.
fn status_bytes(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    in_kib(&status, key)
}

/// Lets [`peak_rss_bytes`] start again from what is resident now, where the system can.
pub fn reset_peak_rss() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}
