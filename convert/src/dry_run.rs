//! `--dry-run`: what a conversion would give, before a weight is read or even downloaded.
//!
//! Everything follows from metadata: the tensors from the checkpoint's table or, where there are no
//! weights yet, from its configuration; their types from the recipe; the file's length from
//! its layout; the RAM from the model's extents.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, DirEntry};
use std::path::{Path, PathBuf};

use fewbit::gguf::TensorDecl;
use fewbit::plan::Group;
use fewbit::plan::fit::{Fit, TooLittle};
use fewbit::quant::BlockType;
use indicatif::ProgressBar;
use serde_json::json;

use crate::checkpoint::names::expected;
use crate::checkpoint::{self, Checkpoint, Hyperparameters, RowOrder, Source, Tensor};
use crate::error::{Error, Result};
use crate::fit::Fitted;
use crate::imatrix::Imatrix;
use crate::metadata;
use crate::moments::Moments;
use crate::pipeline::Options;
use crate::plan::Plan;
use crate::recipe::Mix;
use crate::round::Round;
use crate::round::estimate::{self, Work};
use crate::vocab;

/// What a conversion would give.
#[derive(Debug)]
pub struct DryRun {
    path: PathBuf,
    mix: Mix,
    ctx: usize,
    /// What goes where in the memory asked for.
    fit: Option<std::result::Result<Fit, TooLittle>>,
    tensors: Vec<TensorDecl>,
    plan: Plan,
    /// The types that were chosen for a size.
    fitted: Option<Fitted>,
    /// How weights are rounded, and threads and seconds that it will take where that is much.
    rounding: Option<(Round, usize, f64)>,
    /// Whether the file's length leaves out a tokenizer that is not there yet.
    without_tokenizer: bool,
}

impl DryRun {
    /// Plans the conversion of `input`, a checkpoint's folder (its configuration is enough) or a GGUF file, and
    /// running its result with a context of `ctx` tokens, in `memory` bytes if there are so many to say.
    ///
    /// # Errors
    /// As in the conversion, where what is there does not fit together.
    pub fn new(
        input: &Path,
        options: &Options,
        ctx: usize,
        memory: Option<u64>,
        progress: &ProgressBar,
    ) -> Result<Self> {
        let (mut checkpoint, without_tokenizer) = if input.is_dir() && !has_weights(input)? {
            from_config(input)?
        } else {
            (Checkpoint::open(input)?, false)
        };
        let imatrix = options.imatrix.as_deref().map(Imatrix::read).transpose()?;
        if options.fit.is_some() && checkpoint.files.is_empty() {
            return Err(Error::FitWithoutWeights(input.to_owned()));
        }
        let fitted = options.fitted(&mut checkpoint, progress)?;
        let promise = fitted.as_ref().map(|fitted| fitted.kld);
        let options = &options.with(fitted.as_ref());
        let plan = Plan::new(&mut checkpoint, options, imatrix.as_ref(), promise)?;
        let tensors: Vec<TensorDecl> = checkpoint
            .tensors
            .into_iter()
            .zip(&plan.kinds)
            .map(|(Tensor { name, shape, .. }, &kind)| TensorDecl { name, kind, shape })
            .collect();
        let rounding = rounding(options, &tensors)?;
        let fit = memory.map(|memory| {
            let shape = &plan.shape;
            Fit::new(shape, &tensors, memory, Some(ctx), shape.kv_type())
        });
        Ok(Self {
            path: input.to_owned(),
            mix: options.mix,
            ctx,
            fit,
            tensors,
            plan,
            fitted,
            rounding,
            without_tokenizer,
        })
    }

    /// Length of the file; that of all but the tokenizer, where this is not there yet.
    pub fn file_bytes(&self) -> u64 {
        self.plan.layout.file_bytes()
    }

    /// RAM that keeps weights, KV cache and scratch resident.
    pub fn ram_bytes(&self) -> u64 {
        self.plan
            .shape
            .ram_bytes(self.plan.sizes.bytes_total(), self.ctx)
    }

    /// Bytes of the KV cache by the type that keys and values can have.
    fn kv_bytes_by_type(&self) -> BTreeMap<&'static str, u64> {
        let costs = self.plan.shape.kv_costs(self.ctx).into_iter();
        costs.map(|(kind, bytes)| (kind.name(), bytes)).collect()
    }

    /// What makes a figure inexact.
    pub fn caveat(&self) -> Option<&'static str> {
        self.without_tokenizer
            .then_some("without the tokenizer, which is not there: about a megabyte more")
    }

    /// The figures as one object.
    pub fn json(&self) -> serde_json::Value {
        let tensor = |(index, tensor): (usize, &TensorDecl)| {
            json!({
                "name": tensor.name,
                "type": tensor.kind.name(),
                "shape": tensor.shape,
                "bytes": self.plan.layout.tensor_bytes(index),
            })
        };
        let fit = self.fit.as_ref().and_then(|fit| fit.as_ref().ok());
        let plan = fit.map(|fit| {
            json!({
                "memory_bytes": fit.memory,
                "resident_bytes": fit.fixed_bytes(),
                "kv_bytes": fit.kv_bytes,
                "slots": fit.slot_count(),
                "experts": fit.experts,
                "read_bytes_per_token": fit.read_bytes_per_token(),
            })
        });
        let mut figures = json!({
            "params_total": self.plan.sizes.params_total(),
            "params_active": self.plan.sizes.params_active(),
            "file_bytes": self.file_bytes(),
            "ram_bytes": self.ram_bytes(),
            "kv_bytes_by_type": self.kv_bytes_by_type(),
            "plan": plan,
            "tensors": self.tensors.iter().enumerate().map(tensor).collect::<Vec<_>>(),
        });
        if let Some(fitted) = &self.fitted {
            figures["kld_predicted"] = json!(fitted.kld);
        }
        if let Some((_, _, seconds)) = self.rounding {
            figures["round_seconds"] = json!(seconds);
        }
        figures
    }

    /// Tensors, parameters and bytes by group and type.
    fn rows(&self) -> BTreeMap<(Group, BlockType), (u64, u64, u64)> {
        let mut rows = BTreeMap::new();
        for (index, tensor) in self.tensors.iter().enumerate() {
            let row: &mut (u64, u64, u64) = rows
                .entry((Group::of(&tensor.name), tensor.kind))
                .or_default();
            row.0 += 1;
            row.1 += tensor
                .shape
                .iter()
                .map(|&extent| extent as u64)
                .product::<u64>();
            row.2 += self.plan.layout.tensor_bytes(index);
        }
        rows
    }
}

impl fmt::Display for DryRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (shape, sizes) = (&self.plan.shape, &self.plan.sizes);
        let about = if self.without_tokenizer { "about " } else { "" };
        match &self.fitted {
            None => writeln!(f, "{} as {}", self.path.display(), self.mix)?,
            Some(_) => writeln!(f, "{} in types to fit", self.path.display())?,
        }
        writeln!(
            f,
            "parameters  {} in all, {} at work on a token",
            params(sizes.params_total()),
            params(sizes.params_active())
        )?;
        writeln!(
            f,
            "file        {about}{}, {:.3} bits per weight",
            bytes(self.file_bytes()),
            sizes.bits_per_weight()
        )?;
        writeln!(
            f,
            "RAM         {} at a context of {}: weights {}, KV cache {}, scratch {}",
            bytes(self.ram_bytes()),
            self.ctx,
            bytes(sizes.bytes_total()),
            bytes(shape.kv_bytes(self.ctx, shape.kv_type())),
            bytes(shape.scratch_bytes())
        )?;
        let costs = shape.kv_costs(self.ctx).into_iter();
        let costs = costs.map(|(kind, size)| format!("{} {}", kind.name(), bytes(size)));
        let costs: Vec<_> = costs.collect();
        writeln!(
            f,
            "context     keys and values of {} tokens: {}",
            self.ctx,
            costs.join(", ")
        )?;
        if let Some((round, threads, seconds)) = self.rounding {
            let time = duration(seconds);
            writeln!(
                f,
                "rounding    about {time} by {round} on {threads} threads of this machine"
            )?;
        }
        writeln!(f)?;
        writeln!(
            f,
            "{:<13} {:<6} {:>7} {:>11} {:>10} {:>7}",
            "group", "type", "tensors", "parameters", "bytes", "share"
        )?;
        for ((group, kind), (count, weights, size)) in self.rows() {
            writeln!(
                f,
                "{group:<13} {:<6} {count:>7} {:>11} {:>10} {:>5.1} %",
                kind.name(),
                params(weights),
                bytes(size),
                100.0 * size as f64 / sizes.bytes_total() as f64
            )?;
        }
        if let Some(fitted) = &self.fitted {
            writeln!(f)?;
            for line in fitted.lines() {
                writeln!(f, "{line}")?;
            }
            write!(f, "predicted KLD {:.5}", fitted.kld)?;
        }
        for line in self.plan.fallback_lines() {
            write!(f, "\n{line}")?;
        }
        match &self.fit {
            None => {}
            Some(Ok(fit)) => write!(f, "\n{fit}")?,
            Some(Err(little)) => write!(f, "\nmemory      {little}")?,
        }
        if let Some(caveat) = self.caveat() {
            write!(f, "\nfile: {caveat}")?;
        }
        Ok(())
    }
}

/// What rounding otherwise than ggml will take: threads and seconds.
fn rounding(options: &Options, tensors: &[TensorDecl]) -> Result<Option<(Round, usize, f64)>> {
    if options.round == Round::Ggml {
        return Ok(None);
    }
    let moments = match &options.imatrix {
        Some(path) => Moments::open(path)?,
        None => None,
    };
    let width = moments.map_or(USUAL_WIDTH, |moments| moments.width());
    let matrices = tensors.iter().filter(|tensor| tensor.shape.len() > 1);
    let work = matrices.map(|tensor| Work {
        kind: tensor.kind,
        columns: tensor.shape[0],
        rows: tensor.shape[1..].iter().product(),
        experts: tensor.shape.get(2).copied().unwrap_or(1),
    });
    let work: Vec<Work> = work.collect();
    let cpus = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if options.threads > 0 {
        options.threads
    } else {
        cpus()
    };
    let seconds = estimate::seconds(options.round, &work, width) / threads as f64;
    Ok(Some((options.round, threads, seconds)))
}

/// Columns of a window of moments that `fewbit calibrate` makes unless told otherwise.
const USUAL_WIDTH: usize = 256;

/// `2.5 hours` for 9000.
fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 90.0 => format!("{s:.0} seconds"),
        s if s < 5400.0 => format!("{:.0} minutes", s / 60.0),
        s => format!("{:.1} hours", s / 3600.0),
    }
}

/// Whether a folder holds any file of weights (an index alone is none).
fn has_weights(folder: &Path) -> Result<bool> {
    let is_weights = |file: &DirEntry| {
        file.path()
            .extension()
            .is_some_and(|extension| extension == "safetensors")
    };
    let mut files = fs::read_dir(folder).map_err(Error::io("list", folder))?;
    Ok(files.any(|file| file.is_ok_and(|file| is_weights(&file))))
}

/// A checkpoint of which there is only the configuration, and whether its tokenizer is missing too.
fn from_config(folder: &Path) -> Result<(Checkpoint, bool)> {
    let config = checkpoint::config_of(folder)?;
    let mut metadata = metadata::from_config(&metadata::model_name(folder), &config);
    // The tokenizer may be missing: its size is then all that is not known.
    let without_tokenizer = !vocab::is_present(folder);
    if !without_tokenizer {
        for (key, value) in vocab::from_checkpoint(folder)? {
            metadata.insert(key, value);
        }
    }
    let tensor = |e: checkpoint::names::Expected| Tensor {
        name: e.name,
        shape: e.shape,
        // Only what is not quantized keeps this type, and that is F32 whatever the checkpoint holds.
        kind: BlockType::F32,
        source: Source::Stored {
            kind: BlockType::F32,
            slabs: Vec::new(),
            order: RowOrder::Stored,
        },
    };
    let checkpoint = Checkpoint {
        path: folder.to_owned(),
        files: Vec::new(),
        metadata,
        tensors: expected(&config).into_iter().map(tensor).collect(),
        hyperparameters: Hyperparameters {
            layers: config.layers,
            experts: config.experts,
            heads: config.heads,
            kv_heads: config.kv_heads,
        },
    };
    Ok((checkpoint, without_tokenizer))
}

/// `46.7 B` for 46,702,792,704.
fn params(count: u64) -> String {
    scaled(count, ["", " K", " M", " B", " T"])
}

/// `26.4 GB` for 26,442,000,000.
fn bytes(count: u64) -> String {
    scaled(count, [" B", " kB", " MB", " GB", " TB"])
}

fn scaled(count: u64, units: [&str; 5]) -> String {
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    let decimals = usize::from(unit > 0);
    format!("{value:.decimals$}{}", units[unit])
}
