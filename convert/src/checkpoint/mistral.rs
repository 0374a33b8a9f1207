//! Mistral's own layout: `params.json` and `consolidated*.safetensors`. Query and key rows are
//! stored for the interleaved rotary embedding already, as GGUF wants them.

use std::path::{Path, PathBuf};

use super::hf::{Binder, assemble};
use super::names::expected;
use super::shards::Shards;
use super::{Checkpoint, RowOrder};
use crate::config::ModelConfig;
use crate::error::Result;

pub(super) fn open(folder: &Path, consolidated: &[PathBuf]) -> Result<Checkpoint> {
    let config = ModelConfig::from_mistral(&super::config_path(folder, "params.json")?)?;
    let index = folder.join("consolidated.safetensors.index.json");
    let shards = if index.is_file() {
        Shards::from_index(&index)?
    } else {
        Shards::from_files(consolidated)?
    };
    let mut binder = Binder::new(folder, &config, &shards);
    let tensors = expected(&config)
        .iter()
        .map(|e| binder.bind(e, RowOrder::Stored, |e, expert| e.mistral_name(expert)))
        .collect::<Result<Vec<_>>>()?;
    binder.refuse_leftovers(|name| config.tied_embeddings && name == "output.weight")?;
    assemble(folder, &config, shards, tensors)
}
