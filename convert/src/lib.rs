//! Turns checkpoints into quantized GGUF files.

pub mod recipe;
