//! [`Engine`], the loaded model, and [`Session`], one timeline with its KV cache.
//!
//! Everything above (chat, perplexity, bench) sees only these two: tokens in, logits out as
//! slices. An engine is shared by any number of sessions; the pool and the scratch memory are
//! the engine's, and forward passes take turns.

mod session;
mod walk;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use sha2::{Digest, Sha256};

use crate::adapter::{self, Adapter, Chosen};
use crate::experts::trace::{Head, Trace};
use crate::experts::{Cache, policy};
use crate::gguf::{self, Gguf, names};
use crate::kernels::{Kernels, Phase};
use crate::model::{self, KvCache, KvKind, Lora, Model, Placement, Routing, Slot, State, forward};
use crate::plan::fit::{Fit, TooLittle};
use crate::plan::memory::{self, Memory, Needs};
use crate::plan::{self, Shape, Weight};
use crate::quant::BlockType;
use crate::tensor::direct;
use crate::threads::{self, CpuSet, Pool};
use crate::tokenizer::{self, Tokenizer};

pub use session::Session;
pub use walk::{Stand, Walk};

/// Why a model cannot be loaded or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file does not make a model.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// An adapter cannot be read, or is another model's.
    #[error(transparent)]
    Adapter(#[from] adapter::Error),
    /// Weights cannot be read while the model runs.
    #[error(transparent)]
    Weights(#[from] direct::Error),
    /// The model does not fit into the memory that it may take.
    #[error("{}: {source}", file.display())]
    TooLittle {
        /// The file.
        file: PathBuf,
        /// What it needs.
        source: TooLittle,
    },
    /// Memory cannot be locked.
    #[error("{}: cannot lock the weights in memory: {source}; raise the limit (ulimit -l), or go without --mlock", file.display())]
    Lock {
        /// The file.
        file: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
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
    /// The threads cannot be kept on the CPUs asked for.
    #[error(
        "cannot keep threads on the CPUs {cpus:?}: {source}; --cpu-mask must name CPUs that the process may use"
    )]
    Cpus {
        /// Numbers of the CPUs.
        cpus: Vec<usize>,
        /// The system's reason.
        source: std::io::Error,
    },
    /// More threads are asked for than CPUs to keep them on.
    #[error(
        "{threads} threads cannot each have one of {cpus} CPUs; give fewer with --threads, or more with --cpu-mask"
    )]
    Crowded {
        /// Threads asked for.
        threads: usize,
        /// CPUs asked for.
        cpus: usize,
    },
    /// Keys and values cannot be kept so.
    #[error("{}: heads of {head_dim} values are no whole blocks of {kind}; give --kv f16", file.display())]
    Kv {
        /// The file.
        file: PathBuf,
        /// What was asked for.
        kind: BlockType,
        /// Values of a head.
        head_dim: usize,
    },
    /// There is no memory for a context.
    #[error("a context of {context} tokens needs {:.1} GB for keys and values: {source}; give a smaller --ctx or fewer bits by --kv", *bytes as f64 / 1e9)]
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

/// Where weights are put.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Loading {
    /// In the mapped file, if all fit; else in memory of our own, with a cache of experts.
    #[default]
    Fitting,
    /// In the mapped file, whether they fit or not.
    Mapped,
    /// In memory of our own, experts in a cache if not all fit.
    Read,
}

/// How to load a model.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Threads; `None` for one each of `cpus`, or one a fast physical core that the process may use.
    pub threads: Option<usize>,
    /// CPUs to keep the threads on, one each: the pool's and the one that loads the engine.
    pub cpus: Option<CpuSet>,
    /// Kernels by name; `None` for the widest that the CPU has.
    pub kernels: Option<String>,
    /// How quantized rows meet the activations.
    pub activations: ActivationMode,
    /// How keys and values are kept; `None` for the usual way ([`plan::Shape::kv_type`]), and f32 where all else
    /// is exact.
    pub kv: Option<KvKind>,
    /// What the model may take. Where it takes more, experts are read from disk as they are needed.
    pub memory: Memory,
    /// Where the weights are put, within that memory.
    pub loading: Loading,
    /// Whether all that is in memory after loading is kept from being swapped or dropped.
    pub lock: bool,
    /// How experts are chosen.
    pub routing: Routing,
    /// LoRA adapters that correct the model.
    pub lora: Vec<Chosen>,
    /// Tokens of context to plan the memory for; `None` for the usual number, or fewer where those do not fit.
    pub context: Option<usize>,
}

/// The threads that `options` ask for.
fn start_pool(options: &Options) -> Result<Pool, Error> {
    let Some(cpus) = &options.cpus else {
        let threads = options.threads.unwrap_or_else(threads::default_count);
        return Pool::new(threads).map_err(|source| Error::Threads { threads, source });
    };
    let cpus = cpus.cpus();
    let threads = options.threads.unwrap_or(cpus.len());
    let Some(cpus) = cpus.get(..threads.max(1)) else {
        let cpus = cpus.len();
        return Err(Error::Crowded { threads, cpus });
    };
    Pool::pinned(cpus).map_err(|source| {
        let cpus = cpus.to_vec();
        Error::Cpus { cpus, source }
    })
}

/// How sessions keep keys and values: what runs exactly, or has no rounding of its own, keeps them exactly
/// too.
fn kv_kind(gguf: &Gguf, shape: &Shape, options: &Options) -> KvKind {
    let is_rounded = |tensor: &gguf::TensorInfo| {
        let part = names::parse(&tensor.name).map(|name| name.part);
        let is_small = matches!(
            part,
            None | Some(names::ATTN_NORM | names::FFN_NORM | names::FFN_GATE_INP)
        );
        !is_small && tensor.kind != BlockType::F32
    };
    let exact = options.activations == ActivationMode::F32 || !gguf.tensors.iter().any(is_rounded);
    options.kv.unwrap_or(match exact {
        true => KvKind::F32,
        false => KvKind::usual(shape),
    })
}

/// A file's tensors as plans see them, and what adapters add to them.
pub fn weights_with<'a>(
    tensors: &'a [gguf::TensorInfo],
    adapters: &[(Adapter, f32)],
) -> impl Iterator<Item = Weight<'a>> {
    let corrections = Weight {
        name: "adapters",
        shape: &[],
        bytes: adapters.iter().map(|(adapter, _)| adapter.bytes()).sum(),
    };
    tensors.iter().map(Weight::from).chain([corrections])
}

/// What goes where in the memory that `options` allow; `None` where nobody said how much that is, and the
/// system does not say either or leaves too little: the file is then mapped, and the system does what it can.
fn fit(
    gguf: &Gguf,
    shape: &Shape,
    kv: KvKind,
    adapters: &[(Adapter, f32)],
    options: &Options,
) -> Result<Option<Fit>, Error> {
    let Some(memory) = options.memory.bytes() else {
        return Ok(None);
    };
    if options.loading == Loading::Mapped {
        return Ok(None);
    }
    match Fit::new(
        shape,
        weights_with(&gguf.tensors, adapters),
        memory,
        options.context,
        kv.block_type(),
    ) {
        Ok(fit) => Ok(Some(fit)),
        Err(_) if options.memory == Memory::Auto => Ok(None),
        Err(source) => {
            let file = gguf.files[0].clone();
            Err(Error::TooLittle { file, source })
        }
    }
}

/// Keeps everything that the process has in memory there.
#[cfg(target_os = "linux")]
fn lock_memory() -> std::io::Result<()> {
    rustix::mm::mlockall(rustix::mm::MlockAllFlags::CURRENT)?;
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn lock_memory() -> std::io::Result<()> {
    Err(std::io::Error::other("there is a way on Linux only"))
}

/// A loaded, shareable model.
pub struct Engine {
    path: PathBuf,
    gguf: Gguf,
    model: Model,
    tokenizer: Tokenizer,
    /// The files of each adapter, and how strong it is.
    adapter_files: Vec<(Vec<PathBuf>, f32)>,
    /// Computed when first asked for, since files are read whole for it.
    fingerprint: OnceLock<[u8; 32]>,
    kernels: Kernels,
    pool: Pool,
    /// Tokens that go through the model in one pass.
    batch: usize,
    /// How sessions keep keys and values.
    kv: KvKind,
    /// What goes where.
    fit: Option<Fit>,
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
        let shape = Shape::from_metadata(&gguf.metadata)?;
        let kv = kv_kind(&gguf, &shape, options);
        let adapters = Adapter::open_all(&options.lora, &shape)?;
        let adapter_files = (adapters.iter())
            .map(|(adapter, scale)| (adapter.files.clone(), *scale))
            .collect();
        let fit = fit(&gguf, &shape, kv, &adapters, options)?;
        let placement = match fit.as_ref().and_then(|fit| fit.slots.as_ref()) {
            Some(slots) => Placement::Cached {
                slots,
                policy: policy::Kind::default(),
                // What nobody has promised may be taken by others before it is used.
                is_short: (options.memory == Memory::Auto).then_some(memory::is_short),
            },
            None if options.loading == Loading::Read => Placement::Read,
            None => Placement::Mapped,
        };
        let mut model = Model::open(&gguf, placement)?;
        model.routing = options.routing;
        model.lora = match adapters.is_empty() {
            true => None,
            false => Some(Lora::new(&model.config, &adapters)),
        };
        drop(adapters);
        if options.lock {
            lock_memory().map_err(|source| Error::Lock {
                file: path.to_owned(),
                source,
            })?;
        }
        let tokenizer = Tokenizer::from_metadata(&gguf.metadata)?;
        let (tokens, rows) = (tokenizer.vocab_len(), model.config.shape.vocab);
        if tokens != rows {
            let file = path.to_owned();
            return Err(Error::Vocabulary { file, tokens, rows });
        }
        let head_dim = shape.head_dim;
        if kv.block_type().row_bytes(head_dim).is_none() {
            let file = path.to_owned();
            let kind = kv.block_type();
            return Err(Error::Kv {
                file,
                kind,
                head_dim,
            });
        }
        let state = State::new(&model.config);
        let batch = state.batch;
        let pool = start_pool(options)?;
        Ok(Arc::new(Self {
            path: path.to_owned(),
            gguf,
            model,
            tokenizer,
            adapter_files,
            fingerprint: OnceLock::new(),
            kernels,
            pool,
            batch,
            kv,
            fit,
            state: Mutex::new(state),
        }))
    }

    /// What the model in `path` needs to be run so.
    ///
    /// # Errors
    /// When the file is damaged or holds another architecture, or an adapter cannot be read.
    pub fn needs(path: &Path, options: &Options) -> Result<Needs, Error> {
        let gguf = gguf::read(path)?;
        let shape = Shape::from_metadata(&gguf.metadata)?;
        let kv = kv_kind(&gguf, &shape, options).block_type();
        let adapters = Adapter::open_all(&options.lora, &shape)?;
        let weights = weights_with(&gguf.tensors, &adapters);
        Ok(Fit::needs(&shape, weights, options.context, kv))
    }

    /// The file that the model was loaded from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Metadata and tensor table of the file.
    pub fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    /// A hash (SHA-256) of what keys and values of a session are computed with: the model's file, told as
    /// [`Gguf::fingerprint`] does, and the adapters that correct it, their files whole.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn fingerprint(&self) -> std::io::Result<[u8; 32]> {
        if let Some(found) = self.fingerprint.get() {
            return Ok(*found);
        }
        let found = self.read_fingerprint()?;
        Ok(*self.fingerprint.get_or_init(|| found))
    }

    fn read_fingerprint(&self) -> std::io::Result<[u8; 32]> {
        let model = self.gguf.fingerprint()?;
        if self.adapter_files.is_empty() {
            return Ok(model);
        }
        let mut hash = Sha256::new();
        hash.update(model);
        for (files, scale) in &self.adapter_files {
            hash.update(scale.to_le_bytes());
            for file in files {
                hash.update(Sha256::digest(std::fs::read(file)?));
            }
        }
        Ok(hash.finalize().into())
    }

    /// The graph's numbers.
    pub fn config(&self) -> &model::Config {
        &self.model.config
    }

    /// Extents of the graph.
    pub fn shape(&self) -> &plan::Shape {
        &self.model.config.shape
    }

    /// What goes where in the memory that the model may take; `None` where that is not known.
    pub fn fit(&self) -> Option<&Fit> {
        self.fit.as_ref()
    }

    /// The cache of experts, where not all of them are in memory.
    pub fn expert_cache(&self) -> Option<&Cache> {
        self.model.weights.experts.cache()
    }

    /// From now on routing is recorded.
    pub fn start_trace(&self) {
        let layers = self.model.weights.experts.layer_bytes();
        self.lock().trace = Some(Trace::new(Head {
            experts: self.shape().experts,
            expert_bytes: layers,
        }));
    }

    /// What was recorded since [`start_trace`](Self::start_trace); nothing is any more.
    pub fn take_trace(&self) -> Option<Trace> {
        self.lock().trace.take()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How experts are chosen.
    pub fn routing(&self) -> Routing {
        self.model.routing
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
                bytes: self.shape().kv_bytes(context, self.kv.block_type()),
                source,
            })?;
        Ok(Session {
            cache,
            tokens: Vec::new(),
            logits: Vec::new(),
            engine: Arc::clone(self),
        })
    }

    /// Appends to each turn's session its tokens, by the kernels for single tokens, all sessions
    /// together: a row of weights is read once a pass for all of them. Each session then holds
    /// the logits after each of its tokens ([`Session::logits_after`]), the same bits as alone
    /// and one token at a time.
    ///
    /// The results are the turns', in their order, with the errors of [`Session::step`]; a turn
    /// that fails leaves its session as it was and does not concern the others. More tokens
    /// than the scratch memory holds (512, unless the model is very wide) take several passes.
    ///
    /// # Panics
    /// If a session is another engine's.
    pub fn generate(&self, turns: &mut [Turn<'_>]) -> Vec<Result<(), Error>> {
        let mut results: Vec<_> = turns
            .iter()
            .map(|Turn { session, tokens }| {
                assert!(
                    std::ptr::eq(self, &*session.engine),
                    "a session of another engine"
                );
                session.check(tokens)
            })
            .collect();
        let starts: Vec<usize> = turns.iter().map(|turn| turn.session.tokens.len()).collect();
        loop {
            // The next part of every turn that has one, as far as the pass has room.
            let mut room = self.batch;
            let (mut parts, mut slots) = (Vec::new(), Vec::new());
            for (index, turn) in turns.iter_mut().enumerate() {
                let done = turn.session.tokens.len() - starts[index];
                let part = &turn.tokens[done..][..(turn.tokens.len() - done).min(room)];
                if results[index].is_err() || part.is_empty() {
                    continue;
                }
                room -= part.len();
                parts.push((index, part));
                slots.push(Slot {
                    cache: &mut turn.session.cache,
                    tokens: part,
                    logits_from: 0,
                });
            }
            if slots.is_empty() {
                return results;
            }
            let state = match self.forward(Phase::Generate, slots) {
                Ok(state) => state,
                Err(error) => {
                    for (index, _) in parts {
                        turns[index].session.rewind(starts[index]);
                        results[index] = Err(error.clone().into());
                    }
                    continue;
                }
            };
            let mut rest = &state.logits[..];
            for (index, part) in parts {
                let (logits, others) = rest.split_at(part.len() * self.shape().vocab);
                rest = others;
                let session = &mut *turns[index].session;
                results[index] = session.check_logits(0, logits);
                if results[index].is_err() {
                    session.rewind(starts[index]);
                    continue;
                }
                if session.tokens.len() == starts[index] {
                    session.logits.clear();
                }
                session.tokens.extend_from_slice(part);
                session.logits.extend_from_slice(logits);
            }
        }
    }

    /// One forward pass; the guard gives access to the logits.
    fn forward(
        &self,
        phase: Phase,
        slots: Vec<Slot<'_>>,
    ) -> Result<MutexGuard<'_, State>, direct::Error> {
        let mut state = self.lock();
        forward(
            &self.model,
            &self.pool,
            &self.kernels,
            phase,
            &mut state,
            slots,
        )?;
        Ok(state)
    }
}

/// A session's part in [`Engine::generate`].
pub struct Turn<'a> {
    /// The timeline.
    pub session: &'a mut Session,
    /// Tokens to append: one that was chosen, and guesses of those to come after it.
    pub tokens: &'a [u32],
}
