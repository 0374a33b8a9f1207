//! fewbit runs Mixtral-family models in few bits on ordinary computers.
//!
//! The modules stand in the order of the data's way, from a file's bytes to a session's
//! tokens; each uses only those above it:
//!
//! - [`quant`]: block types: layout, encode, decode
//! - [`gguf`]: bytes ⇄ metadata and tensor table
//! - [`store`]: where pulled models live, and their names
//! - [`tokenizer`], [`plan`]: text ⇄ ids; sizes from metadata alone
//! - [`tensor`], [`adapter`]: mapped file → typed rows; LoRA adapters
//! - [`experts`]: where experts live
//! - [`threads`], [`kernels`]: the pool; dot products and matrix products, one file an instruction set
//! - [`model`]: configuration, weights, state, the forward pass
//! - [`engine`]: [`Engine`](engine::Engine), the loaded model, and
//!   [`Session`](engine::Session), one timeline with its KV cache
//! - [`sampler`], [`draft`], [`generation`]: from logits to a token; guesses of the next ones; a session's tokens
//! - [`answer`]: the text of these tokens, up to a stop string
//! - `grammar`: texts that follow a JSON Schema or a grammar (feature `grammar`)
//! - [`chat`], [`perplexity`], [`bench`](mod@bench): what is built on those two
//! - [`conversation`]: turns and the session that holds them; kept in files
//! - `serve`: a server for OpenAI's clients (feature `serve`)
//! - `pull`: downloads (feature `pull`)
//! - [`calibrate`]: what the matrices of a model are given, counted into a file for the converter
//! - [`cli`]: one file a command

#[cfg(target_endian = "big")]
compile_error!("GGUF files are little-endian and are mapped as they are");

pub mod adapter;
pub mod answer;
pub mod bench;
pub mod calibrate;
pub mod chat;
pub mod cli;
pub mod conversation;
pub mod draft;
pub mod engine;
pub mod experts;
pub mod generation;
pub mod gguf;
#[cfg(feature = "grammar")]
pub mod grammar;
pub mod kernels;
pub mod model;
pub mod perplexity;
pub mod plan;
#[cfg(feature = "pull")]
pub mod pull;
pub mod quant;
pub mod sampler;
#[cfg(feature = "serve")]
pub mod serve;
pub mod store;
pub mod tensor;
pub mod threads;
pub mod tokenizer;
