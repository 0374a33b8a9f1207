//! `fewbit doctor`: what this machine has, and what would run on it how fast.

mod machine;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use serde_json::{Value as Json, json};

use super::common::{STDOUT, ThreadArgs, bytes, file_type, models_in, print_json};
use crate::gguf::{self, Gguf};
use crate::kernels::Kernels;
use crate::kernels::limits::Limits;
use crate::kernels::rates::Rates;
use crate::plan::fit::Fit;
use crate::plan::known::{Known, MODELS};
use crate::plan::memory::Memory;
use crate::plan::{Group, Shape, Sizes};
use crate::quant::BlockType;
use crate::store;
use crate::tensor::direct::Files;
use crate::threads::{self, Pool};
use machine::Machine;

/// Options of `fewbit doctor`.
#[derive(clap::Args)]
pub struct Args {
    /// What to expect of this model: a file, or a name from `fewbit list`
    #[arg(short, long, value_name = "FILE")]
    pub(super) model: Option<PathBuf>,
    /// Memory that a model may take, such as 12GiB; auto is what the system has to spare
    #[arg(long, value_name = "SIZE", default_value_t = Memory::Auto)]
    memory: Memory,
    #[command(flatten)]
    threads: ThreadArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// How long the disk is read.
const PROBE: Duration = Duration::from_millis(700);
/// Bytes written to have something to read, where there is no file: more than a disk's own cache.
const SCRATCH: usize = 256 << 20;
/// A pulled model is worth reading from this size on.
const LARGE: u64 = 64 << 20;

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let model = match &args.model {
        None => None,
        Some(path) => {
            let gguf = gguf::read(path)?;
            Some((Shape::from_metadata(&gguf.metadata)?, gguf))
        }
    };
    let threads = args.threads.count().unwrap_or_else(threads::default_count);
    let machine = Machine::look(threads);
    let memory = args.memory.bytes();
    let memory = memory.context("the system does not say what memory there is; give --memory")?;
    let disk = Disk::measure(model.as_ref().map(|(_, gguf)| gguf));
    let pool = Pool::new(threads).with_context(|| format!("cannot start {threads} threads"))?;
    let kernels = Kernels::best();
    let kinds = match &model {
        None => MODELS[0].types.iter().map(|typed| typed.base).collect(),
        Some((_, gguf)) => kinds_of(gguf),
    };
    let limits = Limits::measure(&pool);
    let rates = Rates::measure(&pool, kernels, &kinds);
    let limits = limits.best(Limits::measure(&pool));
    let speeds = Speeds {
        kinds,
        rates,
        disk: disk.as_ref().ok().map(|disk| disk.bytes_s),
        memory,
    };
    let rows: Vec<Row> = match &model {
        None => {
            let pairs = MODELS
                .iter()
                .flat_map(|known| known.types.iter().map(move |t| (known, t)));
            pairs
                .map(|(known, typed)| Row::known(known, typed, &speeds))
                .collect()
        }
        Some((shape, gguf)) => vec![Row::file(shape, gguf, &speeds)],
    };
    let report = Report {
        machine,
        kernels: kernels.name,
        threads,
        limits,
        disk,
        memory,
        rows,
    };
    match args.json {
        true => print_json(&report.json()),
        false => report.print(&mut std::io::stdout().lock()).context(STDOUT),
    }
}

/// The types of a file's matrices.
fn kinds_of(gguf: &Gguf) -> Vec<BlockType> {
    let mut kinds: Vec<BlockType> = Vec::new();
    for tensor in gguf.tensors.iter().filter(|tensor| tensor.shape.len() > 1) {
        if !kinds.contains(&tensor.kind) && tensor.kind.row_bytes(4096).is_some() {
            kinds.push(tensor.kind);
        }
    }
    kinds
}

/// How fast a disk is read.
struct Disk {
    bytes_s: f64,
    /// What was read.
    file: PathBuf,
    /// Why through the page cache, if so: the figure is then too high.
    buffered: bool,
}

impl Disk {
    /// Reads `model`, or the largest model that was pulled, or a file made for this and removed again.
    fn measure(model: Option<&Gguf>) -> anyhow::Result<Self> {
        if let Some(gguf) = model {
            return Self::of(gguf);
        }
        let folder = store::folder().unwrap_or_else(std::env::temp_dir);
        let entries = models_in(&folder).unwrap_or_default();
        let ready = entries
            .iter()
            .filter(|entry| entry.checkpoint.is_none() && entry.bytes >= LARGE);
        let largest = ready.max_by_key(|entry| entry.bytes);
        if let Some(gguf) = largest.and_then(|entry| gguf::read(entry.path()).ok()) {
            return Self::of(&gguf);
        }
        let there = folder.ancestors().find(|folder| folder.is_dir());
        let scratch = Scratch::write(there.unwrap_or(Path::new(".")))?;
        Self::of_files(&Files::of([&scratch.0])?)
    }

    fn of(gguf: &Gguf) -> anyhow::Result<Self> {
        Self::of_files(&Files::open(gguf)?)
    }

    fn of_files(files: &Files) -> anyhow::Result<Self> {
        Ok(Self {
            bytes_s: files.speed(PROBE)?,
            file: files.path(0).to_owned(),
            buffered: files.buffered_because().is_some(),
        })
    }
}

/// A file that is removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn write(folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join(format!(".fewbit-doctor-{}", std::process::id()));
        let failed = || format!("{}: cannot write a file to read again", path.display());
        let scratch = Self(path.clone());
        let mut file = File::create_new(&path).with_context(failed)?;
        // Nothing that a file system could leave out or make smaller.
        let mut state = 1u64;
        let mut piece = vec![0u64; 1 << 17];
        for _ in 0..SCRATCH / (8 * piece.len()) {
            for word in &mut piece {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                *word = state ^ (state >> 29);
            }
            file.write_all(bytemuck::cast_slice(&piece))
                .with_context(failed)?;
        }
        file.sync_all().with_context(failed)?;
        Ok(scratch)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0); // nobody is left to tell
    }
}

/// What forecasts are made from.
struct Speeds {
    kinds: Vec<BlockType>,
    /// One a kind.
    rates: Vec<Rates>,
    /// Bytes a second; `None` where it could not be measured.
    disk: Option<f64>,
    /// Bytes that a model may take.
    memory: u64,
}

impl Speeds {
    /// The rates of a type; of one that was not measured, those of the first.
    fn of(&self, kind: BlockType) -> Option<&Rates> {
        let index = self.kinds.iter().position(|&other| other == kind);
        self.rates.get(index.unwrap_or(0))
    }
}

/// What to expect of a model.
struct Row {
    model: String,
    kind: String,
    bytes: u64,
    /// Where it goes; `None` where it does not fit at all.
    fit: Option<Fit>,
    /// Tokens a second of generation.
    tok_s: Option<f64>,
    /// Tokens a second of a prompt, from memory.
    prompt_tok_s: Option<f64>,
    /// Bytes of weights that a token needs.
    active_bytes: u64,
}

impl Row {
    fn known(known: &Known, typed: &crate::plan::known::Typed, speeds: &Speeds) -> Self {
        let shape = known.shape();
        let names = known.names();
        let weights = known.weights(typed, &names);
        let fit = Fit::new(&shape, weights, speeds.memory, None, shape.kv_type()).ok();
        let used = typed.ffn_bytes * shape.experts_used as u64 / shape.experts as u64;
        let active_bytes = typed.dense_bytes + used;
        let rates = speeds.of(typed.base);
        let compute = rates.map(|rates| active_bytes as f64 / (rates.decode_gb_s * 1e9));
        let operations = 2.0 * known.params_prompt() as f64;
        let row = Self {
            model: known.name.to_owned(),
            kind: typed.name.to_owned(),
            bytes: typed.dense_bytes + typed.ffn_bytes,
            fit,
            tok_s: None,
            prompt_tok_s: rates.map(|rates| rates.prompt_gop_s * 1e9 / operations),
            active_bytes,
        };
        row.with_speed(compute, speeds)
    }

    fn file(shape: &Shape, gguf: &Gguf, speeds: &Speeds) -> Self {
        let sizes = Sizes::of(shape.experts, shape.experts_used, &gguf.tensors);
        let fit = Fit::new(shape, &gguf.tensors, speeds.memory, None, shape.kv_type()).ok();
        // Seconds that a token's share of each tensor takes, in generation and in a prompt.
        let tied = sizes.group(Group::Output).bytes == 0;
        let (mut decode, mut prompt) = (0.0, 0.0);
        for tensor in &gguf.tensors {
            let group = Group::of(&tensor.name);
            let share = match group {
                Group::Experts => shape.experts_used as f64 / shape.experts as f64,
                Group::Embedding if !tied => continue,
                _ => 1.0,
            };
            let Some(rates) = speeds.of(tensor.kind) else {
                continue;
            };
            decode += share * tensor.bytes as f64 / (rates.decode_gb_s * 1e9);
            if !matches!(group, Group::Embedding | Group::Output) {
                prompt += share * 2.0 * tensor.elements() as f64 / (rates.prompt_gop_s * 1e9);
            }
        }
        let row = Self {
            model: super::common::file_stem(&gguf.files[0]),
            kind: file_type(gguf),
            bytes: sizes.bytes_total(),
            fit,
            tok_s: None,
            prompt_tok_s: Some(1.0 / prompt),
            active_bytes: sizes.active_bytes_per_token(),
        };
        row.with_speed(Some(decode), speeds)
    }

    /// With the speed of generation: `compute` seconds a token in memory, and what is read from disk.
    fn with_speed(mut self, compute: Option<f64>, speeds: &Speeds) -> Self {
        let read = self.fit.as_ref().map(Fit::read_bytes_per_token);
        self.tok_s =
            compute
                .zip(read)
                .and_then(|(compute, read)| match (read > 0.0, speeds.disk) {
                    (false, _) => Some(1.0 / compute),
                    (true, disk) => disk.map(|disk| 1.0 / (compute + read / disk)),
                });
        self
    }

    /// The share of the memory's speed that generation reaches.
    fn share(&self, limits: Limits) -> Option<f64> {
        let gb_s = self.active_bytes as f64 * self.tok_s? / 1e9;
        Some(gb_s / limits.read_gb_s)
    }

    fn place(&self) -> String {
        let Some(fit) = &self.fit else {
            return "too large".to_owned();
        };
        match &fit.slots {
            None => "in memory".to_owned(),
            Some(slots) => {
                let share = 100.0 * slots.count() as f64 / fit.experts as f64;
                let what = if fit.experts > fit_layers(fit) {
                    "experts"
                } else {
                    "layers"
                };
                format!("{share:.0} % of {what} in memory")
            }
        }
    }

    fn json(&self, limits: Limits) -> Json {
        let fits = match &self.fit {
            None => "no",
            Some(fit) if fit.slots.is_some() => "disk",
            Some(_) => "memory",
        };
        json!({
            "model": self.model,
            "type": self.kind,
            "weight_bytes": self.bytes,
            "fits": fits,
            "slots": self.fit.as_ref().map(Fit::slot_count),
            "experts": self.fit.as_ref().map(|fit| fit.experts),
            "read_bytes_per_token": self.fit.as_ref().map(Fit::read_bytes_per_token),
            "tok_s": self.tok_s,
            "prompt_tok_s": self.fit.as_ref().and(self.prompt_tok_s),
            "share_of_limit": self.share(limits),
        })
    }
}

/// Layers whose experts have slots.
fn fit_layers(fit: &Fit) -> usize {
    fit.slots.as_ref().map_or(0, |slots| slots.class_of.len())
}

/// All that is found out.
struct Report {
    machine: Machine,
    kernels: &'static str,
    threads: usize,
    limits: Limits,
    disk: anyhow::Result<Disk>,
    memory: u64,
    rows: Vec<Row>,
}

impl Report {
    fn warnings(&self) -> Vec<String> {
        let mut warnings = self.machine.warnings(self.threads);
        if self.kernels == "scalar" {
            warnings.push(
                "no kernels for this CPU: everything runs in scalar code, far slower".to_owned(),
            );
        }
        match &self.disk {
            Ok(disk) if disk.buffered => warnings.push(format!(
                "{}: its file system has no O_DIRECT: models larger than memory are read through the page cache",
                disk.file.display()
            )),
            Ok(_) => {}
            Err(error) => warnings.push(format!("the disk was not measured: {error:#}")),
        }
        warnings
    }

    fn json(&self) -> Json {
        let disk = self.disk.as_ref().ok();
        let available: Vec<_> = Kernels::available()
            .iter()
            .map(|kernels| kernels.name)
            .collect();
        json!({
            "cpu": self.machine.cpu_json(),
            "kernels": self.kernels,
            "kernels_available": available,
            "threads": self.threads,
            "memory": self.machine.memory_json(self.memory),
            "limits": {"read_gb_s": self.limits.read_gb_s, "int8_gop_s": self.limits.int8_gop_s},
            "disk": disk.map(|disk| json!({"gb_s": disk.bytes_s / 1e9, "path": disk.file, "direct": !disk.buffered})),
            "gpus": self.machine.gpus,
            "gpu_used": false,
            "warnings": self.warnings(),
            "models": self.rows.iter().map(|row| row.json(self.limits)).collect::<Vec<_>>(),
        })
    }

    fn print(&self, out: &mut impl Write) -> std::io::Result<()> {
        let machine = &self.machine;
        writeln!(out, "CPU         {}", machine.cpu_line())?;
        let available: Vec<_> = Kernels::available()
            .iter()
            .map(|kernels| kernels.name)
            .collect();
        writeln!(
            out,
            "kernels     {} (of {}), {} threads",
            self.kernels,
            available.join(", "),
            self.threads
        )?;
        writeln!(
            out,
            "memory      {}, {} for a model",
            machine.memory_line(),
            bytes(self.memory)
        )?;
        writeln!(
            out,
            "limits      {:.1} GB/s read, {:.0} GOP/s int8, measured now with {} threads",
            self.limits.read_gb_s, self.limits.int8_gop_s, self.threads
        )?;
        if let Ok(disk) = &self.disk {
            let folder = disk.file.parent().unwrap_or(Path::new("/"));
            writeln!(
                out,
                "disk        {:.2} GB/s read, {}",
                disk.bytes_s / 1e9,
                folder.display()
            )?;
        }
        match &machine.gpus[..] {
            [] => writeln!(out, "GPU         none seen")?,
            gpus => writeln!(out, "GPU         {}: not used yet", gpus.join("; "))?,
        }
        for warning in self.warnings() {
            writeln!(out, "warning     {warning}")?;
        }
        writeln!(
            out,
            "\n{:<15} {:<7} {:>9}  {:<24} {:>8} {:>9} {:>10}",
            "model", "type", "weights", "where", "tok/s", "of limit", "prompt/s"
        )?;
        let figure = |value: Option<f64>| match value {
            None => "-".to_owned(),
            Some(value) if value < 10.0 => format!("{value:.2}"),
            Some(value) => format!("{value:.0}"),
        };
        let mut before = "";
        for row in &self.rows {
            let name = if row.model == before { "" } else { &row.model };
            before = &row.model;
            let share = row
                .share(self.limits)
                .map(|share| format!("{:.0} %", 100.0 * share));
            writeln!(
                out,
                "{name:<15} {:<7} {:>9}  {:<24} {:>8} {:>9} {:>10}",
                row.kind,
                bytes(row.bytes),
                row.place(),
                figure(row.tok_s),
                share.unwrap_or_else(|| "-".to_owned()),
                figure(row.fit.as_ref().and(row.prompt_tok_s))
            )?;
        }
        writeln!(
            out,
            "\nForecasts from what the kernels reach now, with a context of up to 4096 tokens; `fewbit bench -m FILE` measures."
        )
    }
}
