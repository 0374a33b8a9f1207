//! `fewbit list`: the models that were pulled.

use std::io::Write;
use std::time::UNIX_EPOCH;

use anyhow::Context;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::json;

use super::common::{STDOUT, bytes, file_type, model_folder, models_in, note, print_json};
use crate::gguf;
use crate::store::Entry;

/// Options of `fewbit list`.
#[derive(clap::Args)]
pub struct Args {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let folder = model_folder()?;
    let entries = models_in(&folder)?;
    if args.json {
        let model = |entry: &Entry| {
            let modified = entry.modified.duration_since(UNIX_EPOCH);
            json!({
                "name": entry.name,
                "path": entry.path(),
                "type": kind(entry),
                "bytes": entry.bytes,
                "modified": modified.map_or(0, |time| time.as_secs()),
            })
        };
        let models: Vec<_> = entries.iter().map(model).collect();
        return print_json(&json!({"folder": folder, "models": models}));
    }
    if entries.is_empty() {
        note(format_args!(
            "no models in {}; get one: fewbit pull hf:ORG/REPOSITORY:Q4_K_M",
            folder.display()
        ));
        return Ok(());
    }
    let width = |text: &str| text.chars().count();
    let names = entries.iter().map(|entry| width(&entry.name));
    let name_width = names.max().unwrap_or(0).max(4);
    let kinds: Vec<String> = entries.iter().map(kind).collect();
    let kind_width = kinds
        .iter()
        .map(|kind| width(kind))
        .max()
        .unwrap_or(0)
        .max(4);
    let mut out = std::io::stdout().lock();
    let mut print = || -> std::io::Result<()> {
        writeln!(
            out,
            "{:<name_width$}  {:<kind_width$}  {:>9}  when",
            "name", "type", "size"
        )?;
        for (entry, kind) in entries.iter().zip(&kinds) {
            writeln!(
                out,
                "{:<name_width$}  {kind:<kind_width$}  {:>9}  {}",
                entry.name,
                bytes(entry.bytes),
                when(entry)
            )?;
        }
        Ok(())
    };
    print().context(STDOUT)
}

/// The type of a file's weights, or what else it is.
fn kind(entry: &Entry) -> String {
    if entry.checkpoint.is_some() {
        return "safetensors".to_owned();
    }
    if entry.missing > 0 {
        return "incomplete".to_owned();
    }
    let Ok(gguf) = gguf::read(entry.path()) else {
        return "damaged".to_owned();
    };
    match gguf.metadata.str("general.type") {
        Ok(Some(kind)) if kind != "model" => kind.to_owned(),
        _ => file_type(&gguf),
    }
}

/// When it was written, in the user's time.
fn when(entry: &Entry) -> String {
    match Timestamp::try_from(entry.modified) {
        Ok(time) => {
            let time = time.to_zoned(TimeZone::system());
            time.strftime("%Y-%m-%d %H:%M").to_string()
        }
        Err(_) => "-".to_owned(),
    }
}
