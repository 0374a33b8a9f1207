//! `fewbit pull`: download a model.

use std::cell::RefCell;
use std::time::Duration;

use indicatif::ProgressBar;
use serde_json::json;

use super::common::{bytes, model_folder, models_in, note, print_json, progress};
use crate::pull::{self, Error, NoSource, Options, Source, Watch};

/// Options of `fewbit pull`.
#[derive(clap::Args)]
pub struct Args {
    /// hf:ORG/REPOSITORY:TYPE (hf:ORG/REPOSITORY alone tells the types), hf:ORG/REPOSITORY/FILE.gguf, or a URL
    #[arg(value_name = "SOURCE", value_parser = source)]
    source: Source,
    /// SHA-256 that the file of a plain URL must have
    #[arg(long, value_name = "HEX")]
    sha256: Option<String>,
    /// The repository's checkpoint (safetensors and what belongs to it), for fewbit-convert
    #[arg(long)]
    checkpoint: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn source(text: &str) -> Result<Source, NoSource> {
    text.parse()
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let folder = model_folder()?;
    let options = Options {
        sha256: args.sha256,
        checkpoint: args.checkpoint,
        ..Options::from_environment(folder.clone())
    };
    let bar = Bar::default();
    let pulled = pull::pull(&args.source, &options, &bar)?;
    drop(bar);
    let entries = models_in(&folder)?;
    let entry = entries.iter().find(|entry| match &pulled.checkpoint {
        Some(_) => entry.checkpoint == pulled.checkpoint,
        None => entry.files.contains(&pulled.files[0]),
    });
    let name = entry.map(|entry| entry.name.as_str());
    if args.json {
        return print_json(&json!({
            "name": name,
            "path": pulled.checkpoint.as_ref().unwrap_or(&pulled.files[0]),
            "files": pulled.files,
            "sha256": pulled.sha256,
            "bytes": pulled.bytes,
            "downloaded_bytes": pulled.downloaded,
        }));
    }
    let path = pulled.checkpoint.as_ref().unwrap_or(&pulled.files[0]);
    let came = match pulled.downloaded {
        0 => "was there already".to_owned(),
        _ => bytes(pulled.bytes),
    };
    let checked = match pulled.sha256.iter().all(Option::is_some) {
        true => ", SHA-256 as announced",
        false => "",
    };
    note(format_args!("{}: {came}{checked}", path.display()));
    match (&pulled.checkpoint, name) {
        (Some(folder), _) => note(format_args!(
            "fewbit-convert {} OUT.gguf --type Q4_K_M   makes a file to run of it",
            folder.display()
        )),
        (None, Some(name)) => note(format_args!("fewbit chat -m {name}")),
        (None, None) => {}
    }
    Ok(())
}

/// A progress bar for each file.
#[derive(Default)]
struct Bar(RefCell<Option<ProgressBar>>);

impl Watch for Bar {
    fn begin(&self, name: &str, bytes: Option<u64>, there: u64) {
        const KNOWN: &str = "{msg} {wide_bar} {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}  {eta}";
        const UNKNOWN: &str = "{msg} {spinner} {decimal_bytes}  {decimal_bytes_per_sec}";
        let bar = progress(
            bytes.unwrap_or(0),
            match bytes {
                Some(_) => KNOWN,
                None => UNKNOWN,
            },
        );
        // What an earlier run fetched is no speed of this one.
        let bar = bar.with_position(there).with_message(name.to_owned());
        bar.reset_eta();
        self.0.replace(Some(bar));
    }

    fn advance(&self, bytes: u64) {
        if let Some(bar) = &*self.0.borrow() {
            bar.inc(bytes);
        }
    }

    fn retry(&self, error: &Error, wait: Duration) {
        let line = format!(
            "fewbit: {error}; trying again in {} s",
            wait.as_secs_f64().ceil()
        );
        match &*self.0.borrow() {
            Some(bar) => bar.suspend(|| note(&line)),
            None => note(&line),
        }
    }
}
