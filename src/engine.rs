//! [`Engine`], the loaded model, and [`Session`], one timeline with its KV cache.
//!
//! Everything above (chat, perplexity, bench) sees only these two: tokens in, logits out as
//! slices. An engine is shared by any number of sessions; the pool and the scratch memory are
//! the engine's, and forward passes take turns.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::gguf::{self, Gguf};
use crate::kernels::{Kernels, Phase};
use crate::model::{self, KvCache, KvKind, Model, Slot, State, forward};
use crate::plan;
use crate::threads::{self, Pool};
use crate::tokenizer::{self, Tokenizer};

/// Why a model cannot be loaded or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file does not make a model.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// The vocabulary in the file is unusable.
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    /// The kernels asked for do not exist on this CPU.
    #[error("no kernels named {name:?} on this CPU; there are: {}", available.join(", "))]
    Kernels {
        /// What was asked for.
        name: String,
        /// What there is.
        available: Vec<&'static str>,
    },
    /// The threads cannot be started.
    #[error("cannot start {threads} threads: {source}; give fewer with --threads")]
    Threads {
        /// Threads asked for.
        threads: usize,
        /// The system's reason.
        source: std::io::Error,
    },
    /// There is no memory for a context.
    #[error("a context of {context} tokens needs {:.1} GB for keys and values: {source}; give a smaller --ctx", *bytes as f64 / 1e9)]
    NoRoom {
        /// Tokens asked for.
        context: usize,
        /// Bytes of the KV cache.
        bytes: u64,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The vocabulary and the embedding do not fit together.
    #[error("{}: metadata key tokenizer.ggml.tokens: {tokens} tokens, the embedding has {rows} rows; convert it again", file.display())]
    Vocabulary {
        /// The file.
        file: PathBuf,
        /// Tokens of the vocabulary.
        tokens: usize,
        /// Rows of the embedding.
        rows: usize,
    },
    /// The model computes nonsense.
    #[error("{}: the logits after token {position} are not finite: the weights are damaged; `fewbit inspect --check` finds where", file.display())]
    NotFinite {
        /// The file.
        file: PathBuf,
        /// Position in the session.
        position: usize,
    },
    /// More tokens than the session has room for.
    #[error(
        "{wanted} tokens do not fit into the context of {capacity}; raise --ctx or shorten the text"
    )]
    ContextFull {
        /// Tokens that the session would hold.
        wanted: usize,
        /// Tokens that fit.
        capacity: usize,
    },
    /// A token outside the vocabulary.
    #[error("token {token} is outside the vocabulary of {vocab}")]
    Token {
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// A session needs at least one token to predict from.
    #[error("there is nothing to predict from: the prompt is empty")]
    Empty,
}

impl From<gguf::Error> for Error {
    fn from(error: gguf::Error) -> Self {
        Self::Model(error.into())
    }
}

/// How quantized rows meet the activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ActivationMode {
    /// As 8-bit codes with one scale for 32: fast.
    #[default]
    Int8,
    /// In f32, weights decoded, keys and values in f32 too: the exact reference, slow.
    F32,
}

/// How to load a model.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Threads; `None` for one a physical core that the process may use.
    pub threads: Option<usize>,
    /// Kernels by name; `None` for the widest that the CPU has.
    pub kernels: Option<String>,
    /// How quantized rows meet the activations.
    pub activations: ActivationMode,
}

/// A loaded, shareable model.
pub struct Engine {
    path: PathBuf,
    gguf: Gguf,
    model: Model,
    tokenizer: Tokenizer,
    kernels: Kernels,
    pool: Pool,
    /// Tokens that go through the model in one pass.
    batch: usize,
    /// How sessions keep keys and values.
    kv: KvKind,
    state: Mutex<State>,
}

impl Engine {
    /// Opens and maps `path`, and starts the threads.
    ///
    /// # Errors
    /// When the file is damaged or holds another architecture; each error names file, key or
    /// tensor.
    pub fn load(path: &Path, options: &Options) -> Result<Arc<Self>, Error> {
        let kernels = match &options.kernels {
            None => Kernels::best(),
            Some(name) => Kernels::named(name).ok_or_else(|| Error::Kernels {
                name: name.clone(),
                available: Kernels::available()
                    .iter()
                    .map(|kernels| kernels.name)
                    .collect(),
            })?,
        };
        let kernels = match options.activations {
            ActivationMode::Int8 => *kernels,
            ActivationMode::F32 => kernels.exact(),
        };
        let gguf = gguf::read(path)?;
        let model = Model::open(&gguf)?;
        let tokenizer = Tokenizer::from_metadata(&gguf.metadata)?;
        let (tokens, rows) = (tokenizer.vocab_len(), model.config.shape.vocab);
        if tokens != rows {
            let file = path.to_owned();
            return Err(Error::Vocabulary { file, tokens, rows });
        }
        // What runs exactly, or has no rounding of its own, keeps keys and values exactly too.
        let kv = match options.activations == ActivationMode::F32 || model.weights.are_f32() {
            true => KvKind::F32,
            false => KvKind::F16,
        };
        let state = State::new(&model.config);
        let batch = state.batch;
        let threads = options.threads.unwrap_or_else(threads::default_count);
        let pool = Pool::new(threads).map_err(|source| Error::Threads { threads, source })?;
        Ok(Arc::new(Self {
            path: path.to_owned(),
            gguf,
            model,
            tokenizer,
            kernels,
            pool,
            batch,
            kv,
            state: Mutex::new(state),
        }))
    }

    /// The file that the model was loaded from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Metadata and tensor table of the file.
    pub fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    /// The graph's numbers.
    pub fn config(&self) -> &model::Config {
        &self.model.config
    }

    /// Extents of the graph.
    pub fn shape(&self) -> &plan::Shape {
        &self.model.config.shape
    }

    /// The vocabulary.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Name of the kernels in use.
    pub fn kernels(&self) -> &'static str {
        self.kernels.name
    }

    /// The thread pool, for work beside the forward pass (measuring the machine's limits, say).
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// An empty timeline with room for `context` tokens.
    ///
    /// # Errors
    /// When there is no memory for its KV cache.
    pub fn session(self: &Arc<Self>, context: usize) -> Result<Session, Error> {
        let cache =
            KvCache::new(&self.model.config, self.kv, context).map_err(|source| Error::NoRoom {
                context,
                bytes: self.shape().kv_bytes(context, self.kv.bytes()),
                source,
            })?;
        Ok(Session {
            cache,
            tokens: Vec::new(),
            logits: Vec::new(),
            engine: Arc::clone(self),
        })
    }

    /// One forward pass; the guard gives access to the logits.
    fn forward(&self, phase: Phase, slots: Vec<Slot<'_>>) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        forward(
            &self.model,
            &self.pool,
            &self.kernels,
            phase,
            &mut state,
            slots,
        );
        state
    }
}

/// One timeline: the tokens so far, their keys and values, and the logits of the last one.
pub struct Session {
    engine: Arc<Engine>,
    cache: KvCache,
    tokens: Vec<u32>,
    logits: Vec<f32>,
}

impl Session {
    /// The model that this is a session of.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// The tokens so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens that fit.
    pub fn capacity(&self) -> usize {
        self.cache.capacity()
    }

    /// Logits after the last token, one a vocabulary entry; empty before the first, and after
    /// a [`rewind`](Self::rewind).
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Appends a prompt and returns the logits after its last token. They are the same bits
    /// however a prompt is cut into calls.
    ///
    /// # Errors
    /// [`Error::ContextFull`], [`Error::Token`], and [`Error::Empty`] where `tokens` is empty;
    /// [`Error::NotFinite`] where the weights are damaged. The session is then unchanged.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<&[f32], Error> {
        let last = tokens.len().checked_sub(1).ok_or(Error::Empty)?;
        self.score(tokens, last, |_, _| {})?;
        Ok(&self.logits)
    }

    /// Appends a token that was generated, by the kernels for single tokens, and returns the
    /// logits after it. They differ from those of [`feed`](Self::feed) by rounding.
    ///
    /// # Errors
    /// As [`feed`](Self::feed).
    pub fn step(&mut self, token: u32) -> Result<&[f32], Error> {
        self.append(Phase::Generate, &[token], 0, |_, _| {})?;
        Ok(&self.logits)
    }

    /// Appends a prompt and calls `visit(i, logits)` for each index `i >= from` with the logits
    /// after `tokens[i]`, in order. The last logits are kept as by [`feed`](Self::feed).
    /// The engine is busy while `visit` runs: it must not feed another session of it.
    ///
    /// # Errors
    /// As [`feed`](Self::feed).
    pub fn score(
        &mut self,
        tokens: &[u32],
        from: usize,
        visit: impl FnMut(usize, &[f32]),
    ) -> Result<(), Error> {
        self.append(Phase::Prompt, tokens, from, visit)
    }

    fn append(
        &mut self,
        phase: Phase,
        tokens: &[u32],
        from: usize,
        mut visit: impl FnMut(usize, &[f32]),
    ) -> Result<(), Error> {
        let vocab = self.engine.shape().vocab;
        let wanted = self.tokens.len() + tokens.len();
        if tokens.is_empty() {
            return Err(Error::Empty);
        }
        if wanted > self.capacity() {
            return Err(Error::ContextFull {
                wanted,
                capacity: self.capacity(),
            });
        }
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocab) {
            return Err(Error::Token { token, vocab });
        }
        let from = from.min(tokens.len() - 1);
        let engine = Arc::clone(&self.engine);
        let mut start = 0;
        for part in tokens.chunks(engine.batch) {
            let logits_from = from.saturating_sub(start).min(part.len());
            let slot = Slot {
                cache: &mut self.cache,
                tokens: part,
                logits_from,
            };
            let state = engine.forward(phase, vec![slot]);
            for (index, logits) in (start + logits_from..).zip(state.logits.chunks_exact(vocab)) {
                if !logits.iter().all(|logit| logit.is_finite()) {
                    let position = self.tokens.len() + index;
                    self.cache.len = self.tokens.len();
                    let file = engine.path.clone();
                    return Err(Error::NotFinite { file, position });
                }
                visit(index, logits);
            }
            start += part.len();
            if start == tokens.len() {
                self.logits.clear();
                let last = state.logits.len() - vocab;
                self.logits.extend_from_slice(&state.logits[last..]);
            }
        }
        self.tokens.extend_from_slice(tokens);
        Ok(())
    }

    /// Forgets all but the first `len` tokens; the logits are gone until the next
    /// [`feed`](Self::feed).
    pub fn rewind(&mut self, len: usize) {
        self.tokens.truncate(len);
        self.cache.len = self.tokens.len();
        self.logits.clear();
    }
}
