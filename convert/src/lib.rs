//! Turns checkpoints into quantized GGUF files.
//!
//! - [`checkpoint`]: four layouts of input come to one table of tensors
//! - [`config`], [`metadata`], [`vocab`]: what goes into the output's metadata
//! - [`sentencepiece`], [`tokenizer_json`], [`tekken`]: the files that a vocabulary comes in
//! - [`recipe`], [`plan`]: a type for every tensor; the output, laid out
//! - [`imatrix`], [`encode`]: rows in, blocks out; [`moments`], [`round`]: better ones; [`fit`]: types for a size
//! - [`merge`]: LoRA adapters, added to the weights on their way
//! - [`pipeline`], [`journal`]: reading, encoding and writing at once, in bounded memory; going on after a cut
//! - [`dry_run`]: what a conversion would give; [`synth`]: files of random weights, for benchmarks
//! - [`export`]: a GGUF file back to a Hugging Face checkpoint
//! - [`cli`]: the command line

mod bounded;
pub mod checkpoint;
pub mod cli;
pub mod config;
mod disk;
pub mod dry_run;
pub mod encode;
mod error;
pub mod export;
pub mod fit;
pub mod imatrix;
pub mod journal;
pub mod merge;
pub mod metadata;
pub mod moments;
mod output;
pub mod pipeline;
pub mod plan;
pub mod recipe;
pub mod round;
pub mod sentencepiece;
pub mod synth;
pub mod tekken;
pub mod tokenizer_json;
pub mod vocab;

pub use error::{Error, Result};
pub use pipeline::{Options, Report, convert};
