//! `fewbit plan`: what goes where in so much memory, and the speed to expect.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use serde_json::json;

use super::common::{Kv, PROBE, STDOUT, ThreadArgs, at_least, figure, note, print_json};
use crate::adapter::{Adapter, Chosen};
use crate::engine::weights_with;
use crate::gguf;
use crate::kernels::limits::Limits;
use crate::model::KvKind;
use crate::plan::fit::Fit;
use crate::plan::memory::Memory;
use crate::plan::{Shape, Size};
use crate::tensor::direct::Files;
use crate::threads::{self, Pool};

/// Options of `fewbit plan`.
#[derive(clap::Args)]
pub struct Args {
    /// Model: a file (GGUF; the first one of a split model), or a name from `fewbit list`
    #[arg(short, long, value_name = "FILE")]
    pub(super) model: PathBuf,
    /// LoRA adapter (PEFT's folder, or GGUF) that the model will run with; may be given several times
    #[arg(long, value_name = "FILE[:SCALE]")]
    lora: Vec<Chosen>,
    /// Memory that the model may take, such as 12GiB; auto is what the system has to spare
    #[arg(long, value_name = "SIZE", default_value_t = Memory::Auto)]
    memory: Memory,
    /// Tokens of context [default: 4096, or as many as fit or the model was trained for]
    #[arg(short, long, visible_alias = "ctx-size", value_name = "N", allow_negative_numbers = true, value_parser = at_least(1))]
    ctx: Option<usize>,
    /// How keys and values of the context are kept [default: f16]
    #[arg(long, value_enum, value_name = "TYPE")]
    kv: Option<Kv>,
    #[command(flatten)]
    threads: ThreadArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let file = || args.model.display().to_string();
    let gguf = gguf::read(&args.model)?;
    let shape = Shape::from_metadata(&gguf.metadata)?;
    let kv = args.kv.map(KvKind::from);
    let kv = kv.map_or(shape.kv_type(), KvKind::block_type);
    let memory = args.memory.bytes();
    let memory = memory.context("the system does not say what memory there is; give --memory")?;
    let adapters = Adapter::open_all(&args.lora, &shape)?;
    let weights = weights_with(&gguf.tensors, &adapters);
    let fit = Fit::new(&shape, weights, memory, args.ctx, kv).with_context(file)?;

    let files = Files::open(&gguf)?;
    if let Some(reason) = files.buffered_because() {
        note(format_args!(
            "fewbit: reads go through the page cache: {reason}"
        ));
    }
    let disk = files.speed(PROBE)?;
    let threads = args.threads.count().unwrap_or_else(threads::default_count);
    let pool = Pool::new(threads).with_context(|| format!("cannot start {threads} threads"))?;
    let ram = Limits::measure(&pool).read_gb_s * 1e9;
    let speed = fit.tokens_per_second(disk, ram);

    let costs = shape.kv_costs(fit.context);

    let slots = fit.slots.as_ref();
    if args.json {
        let classes = slots.iter().flat_map(|slots| &slots.classes);
        let slot_bytes = classes.map(|class| class.slot_bytes).max();
        return print_json(&json!({
            "memory_bytes": memory,
            "mapped": slots.is_none(),
            "resident_bytes": fit.fixed_bytes(),
            "context": fit.context,
            "kv_bytes": fit.kv_bytes,
            "kv_bytes_by_type": costs
                .into_iter()
                .map(|(kind, bytes)| (kind.name(), bytes))
                .collect::<BTreeMap<_, _>>(),
            "slots": fit.slot_count(),
            "slot_bytes": slot_bytes,
            "experts": fit.experts,
            "disk_gb_s": disk / 1e9,
            "read_gb_s": ram / 1e9,
            "read_bytes_per_token": fit.read_bytes_per_token(),
            "tok_s": speed,
        }));
    }
    let mut out = std::io::stdout().lock();
    let costs: Vec<_> = costs
        .into_iter()
        .map(|(kind, bytes)| format!("{} {}", kind.name(), Size(bytes)))
        .collect();
    writeln!(out, "{fit}")
        .and_then(|()| {
            writeln!(
                out,
                "context     keys and values of {} tokens: {}",
                fit.context,
                costs.join(", ")
            )
        })
        .and_then(|()| {
            writeln!(
                out,
                "disk        {} GB/s, memory {} GB/s, measured now",
                figure(disk / 1e9, 2),
                figure(ram / 1e9, 1)
            )
        })
        .and_then(|()| {
            writeln!(
                out,
                "speed       {speed:.2} tok/s to expect, where the router chooses evenly"
            )
        })
        .context(STDOUT)
}
