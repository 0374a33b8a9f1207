//! Text ⇄ token ids, from GGUF metadata, on the `tokenizers` crate.
