//! The tokenizer's metadata, from `tokenizer.model` or `tokenizer.json`.

use std::path::Path;

use fewbit::gguf::Value;

/// Why a tokenizer cannot be taken along.
#[derive(Debug, thiserror::Error)]
pub enum Error {}

/// All tokenizer metadata of a checkpoint folder, the chat template included.
pub fn from_checkpoint(_dir: &Path) -> Result<Vec<(String, Value)>, Error> {
    Ok(Vec::new())
}
