//! `fewbit rm`: remove pulled models.

use std::fs;

use anyhow::Context;

use super::common::{bytes, model_folder, models_in, note};
use crate::store;

/// Options of `fewbit rm`.
#[derive(clap::Args)]
pub struct Args {
    /// Names, as `fewbit list` shows them
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
}

/// Runs the command: all names are looked up before anything is removed.
pub fn run(args: Args) -> anyhow::Result<()> {
    let folder = model_folder()?;
    let entries = models_in(&folder)?;
    let mut doomed = Vec::new();
    for name in &args.names {
        let entry = store::find(&folder, &entries, name)?;
        if !doomed.contains(&entry) {
            doomed.push(entry);
        }
    }
    for entry in doomed {
        for file in &entry.files {
            fs::remove_file(file)
                .with_context(|| format!("{}: cannot remove it", file.display()))?;
        }
        if let Some(checkpoint) = &entry.checkpoint {
            remove_small_files(checkpoint);
        }
        // The folders that it leaves empty.
        let above = entry.files[0].ancestors().skip(1);
        for above in above.take_while(|above| *above != folder) {
            if fs::remove_dir(above).is_err() {
                break;
            }
        }
        note(format_args!(
            "removed {}, {}",
            entry.name,
            bytes(entry.bytes)
        ));
    }
    Ok(())
}

/// What `fewbit pull --checkpoint` put beside the weights.
fn remove_small_files(checkpoint: &std::path::Path) {
    let files = fs::read_dir(checkpoint).into_iter().flatten().flatten();
    for path in files.map(|file| file.path()) {
        let extension = path.extension().and_then(|extension| extension.to_str());
        if matches!(extension, Some("json" | "model" | "jinja" | "txt")) {
            let _ = fs::remove_file(path); // the weights, which matter, are gone
        }
    }
}
