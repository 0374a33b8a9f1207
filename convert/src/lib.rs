//! Turns checkpoints into quantized GGUF files.
