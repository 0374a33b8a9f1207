//! `fewbit inspect`: what a GGUF file holds: metadata, tensors, parameters, an expert's slabs.

mod check;

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, bail};
use serde_json::json;

use super::common::{STDOUT, ThreadArgs, bytes, count, print_json};
use crate::gguf::{self, Gguf, TensorInfo, names};
use crate::plan::{Group, Shape, Sizes};
use check::Finding;

/// Options of `fewbit inspect`.
#[derive(clap::Args)]
pub struct Args {
    /// GGUF file (the first one of a split model), or a name from `fewbit list`
    pub(super) file: PathBuf,
    /// Decode every weight and report NaN and infinity; exit code 1 if there are any
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    threads: ThreadArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Metadata arrays up to this length are whole in the JSON output.
const JSON_ITEMS: usize = 16;

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let report = Report::of(gguf::read(&args.file)?)?;
    let findings = match args.check {
        true => Some(check::check(&report.gguf, args.threads.count())?),
        false => None,
    };
    if args.json {
        print_json(&report.to_json(findings.as_deref()))?;
    } else {
        let mut out = io::BufWriter::new(io::stdout().lock());
        report
            .print(&mut out, findings.as_deref())
            .and_then(|()| out.flush())
            .context(STDOUT)?;
    }
    match findings.as_deref() {
        None | Some([]) => Ok(()),
        Some(findings @ [first, ..]) => bail!(
            "{}: NaN or infinity in {} of {} tensors, first in {}; convert the model again",
            args.file.display(),
            findings.len(),
            report.gguf.tensors.len(),
            first.tensor
        ),
    }
}

/// A file and its figures.
struct Report {
    gguf: Gguf,
    /// Why it is not a model that fewbit runs, where it is none (an imatrix, another architecture).
    shape: Result<Shape, gguf::Error>,
    sizes: Sizes,
    file_bytes: u64,
}

impl Report {
    fn of(gguf: Gguf) -> anyhow::Result<Self> {
        let shape = Shape::from_metadata(&gguf.metadata);
        let (experts, used) = shape
            .as_ref()
            .map_or((1, 1), |shape| (shape.experts, shape.experts_used));
        let mut file_bytes = 0;
        for path in &gguf.files {
            let about = std::fs::metadata(path)
                .with_context(|| format!("{}: cannot read its length", path.display()))?;
            file_bytes += about.len();
        }
        Ok(Self {
            sizes: Sizes::of(experts, used, &gguf.tensors),
            gguf,
            shape,
            file_bytes,
        })
    }

    fn arch(&self) -> Option<&str> {
        self.gguf
            .metadata
            .str("general.architecture")
            .ok()
            .flatten()
    }

    fn to_json(&self, findings: Option<&[Finding]>) -> serde_json::Value {
        let tensor = |tensor: &TensorInfo| {
            json!({
                "name": tensor.name,
                "type": tensor.kind.name(),
                "shape": tensor.shape,
                "offset": tensor.offset,
                "bytes": tensor.bytes,
            })
        };
        let metadata = self.gguf.metadata.iter();
        let mut object = json!({
            "arch": self.arch(),
            "params_total": self.sizes.params_total(),
            "params_active": self.shape.is_ok().then(|| self.sizes.params_active()),
            "bits_per_weight": self.sizes.bits_per_weight(),
            "file_bytes": self.file_bytes,
            "tensors": self.gguf.tensors.iter().map(tensor).collect::<Vec<_>>(),
            "metadata": metadata
                .map(|(key, value)| (key.to_owned(), value.to_json(JSON_ITEMS)))
                .collect::<serde_json::Map<_, _>>(),
        });
        if let Some(findings) = findings {
            let tensors: Vec<_> = findings.iter().map(Finding::to_json).collect();
            object["check"] = json!({ "ok": findings.is_empty(), "tensors": tensors });
        }
        object
    }

    fn print(&self, out: &mut impl Write, findings: Option<&[Finding]>) -> io::Result<()> {
        self.print_totals(out)?;
        self.print_metadata(out)?;
        self.print_groups(out)?;
        self.print_slabs(out)?;
        self.print_tensors(out)?;
        match findings {
            None => Ok(()),
            Some([]) => writeln!(out, "\nCheck: every weight is finite"),
            Some(findings) => {
                writeln!(out, "\nCheck: not finite are")?;
                findings
                    .iter()
                    .try_for_each(|finding| writeln!(out, "  {finding}"))
            }
        }
    }

    fn print_totals(&self, out: &mut impl Write) -> io::Result<()> {
        for path in &self.gguf.files {
            writeln!(out, "{}", path.display())?;
        }
        let sizes = &self.sizes;
        writeln!(
            out,
            "{}, {} tensors, {} parameters, {:.3} bits a weight, {}",
            self.arch().unwrap_or("no architecture"),
            self.gguf.tensors.len(),
            count(sizes.params_total()),
            sizes.bits_per_weight(),
            bytes(self.file_bytes),
        )?;
        match &self.shape {
            Ok(shape) => writeln!(
                out,
                "a token works with {} parameters and reads {}; its keys and values take {} as {}",
                count(sizes.params_active()),
                bytes(sizes.active_bytes_per_token()),
                bytes(shape.kv_bytes(1, shape.kv_type())),
                shape.kv_type(),
            ),
            Err(reason) => writeln!(out, "not a model that fewbit runs: {reason}"),
        }
    }

    fn print_metadata(&self, out: &mut impl Write) -> io::Result<()> {
        let metadata = &self.gguf.metadata;
        writeln!(out, "\nMetadata ({} keys)", metadata.len())?;
        let width = metadata
            .iter()
            .map(|(key, _)| key.len())
            .max()
            .unwrap_or(0)
            .min(48);
        metadata
            .iter()
            .try_for_each(|(key, value)| writeln!(out, "  {key:width$}  {value}"))
    }

    fn print_groups(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(
            out,
            "\nGroup           parameters        bytes  bits a weight"
        )?;
        for group in Group::ALL {
            let amount = self.sizes.group(group);
            if amount.params == 0 {
                continue;
            }
            let bits = 8.0 * amount.bytes as f64 / amount.params as f64;
            let (params, size) = (count(amount.params), bytes(amount.bytes));
            writeln!(out, "  {group:12} {params:>11} {size:>12} {bits:>14.3}")?;
        }
        Ok(())
    }

    /// Where one expert's weights lie, layer by layer.
    fn print_slabs(&self, out: &mut impl Write) -> io::Result<()> {
        let Some(shape) = self.shape.as_ref().ok().filter(|shape| shape.is_moe()) else {
            return Ok(());
        };
        writeln!(
            out,
            "\nExperts ({} a layer, {} work on a token): type, bytes of one expert @ offset of the first",
            shape.experts, shape.experts_used
        )?;
        writeln!(
            out,
            "  layer  {:28}  {:28}  {:28}  an expert",
            "gate", "up", "down"
        )?;
        for layer in 0..shape.layers {
            let mut total = 0;
            write!(out, "  {layer:5}")?;
            for part in [names::FFN_GATE, names::FFN_UP, names::FFN_DOWN] {
                let slab = self.slab(layer, part);
                total += slab.as_ref().map_or(0, |(_, bytes)| *bytes);
                let shown = slab.map_or("absent".to_owned(), |(tensor, bytes)| {
                    format!("{} {bytes} @ {}", tensor.kind, tensor.offset)
                });
                write!(out, "  {shown:28}")?;
            }
            writeln!(out, "  {}", bytes(total))?;
        }
        Ok(())
    }

    /// The tensor that begins with the first expert's part, and the bytes of one expert's.
    fn slab(&self, layer: usize, part: &str) -> Option<(&TensorInfo, u64)> {
        let merged = self.gguf.tensor(&names::experts(layer, part));
        let merged = merged.map(|tensor| {
            let experts = tensor.shape.get(2).copied().unwrap_or(1);
            (tensor, tensor.bytes / experts as u64)
        });
        merged.or_else(|| {
            let first = self.gguf.tensor(&names::expert(layer, part, 0))?;
            Some((first, first.bytes))
        })
    }

    fn print_tensors(&self, out: &mut impl Write) -> io::Result<()> {
        let tensors = &self.gguf.tensors;
        let splits = self.gguf.files.len() > 1;
        writeln!(
            out,
            "\nTensors ({}): name, type, shape, offset, bytes",
            tensors.len()
        )?;
        let width = tensors
            .iter()
            .map(|tensor| tensor.name.len())
            .max()
            .unwrap_or(0)
            .min(48);
        for tensor in tensors {
            let TensorInfo {
                name,
                kind,
                offset,
                bytes,
                ..
            } = tensor;
            let shape: Vec<String> = tensor.shape.iter().map(usize::to_string).collect();
            let shape = shape.join(" × ");
            write!(
                out,
                "  {name:width$}  {:7} {shape:20} {offset:>13} {bytes:>12}",
                kind.name()
            )?;
            match splits {
                true => writeln!(out, "  split {}", tensor.file + 1)?,
                false => writeln!(out)?,
            }
        }
        Ok(())
    }
}
