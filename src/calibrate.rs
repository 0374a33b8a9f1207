//! What a model's matrices are given, counted into a file that the converter reads.
//!
//! The file is llama.cpp's imatrix in GGUF: for each matrix and expert the sum of the squares of
//! every input column (`<weight>.in_sum2`, `[columns, experts]`) and the number of tokens
//! (`<weight>.counts`, `[1, experts]`); `llama-quantize` takes it, as `fewbit-convert` takes
//! llama-imatrix's.
//!
//! On request there are second moments too, which error feedback needs: `<weight>.moments`, F32
//! `[width, columns, experts]`. Columns are cut into windows of `width`, and row `c` of an expert
//! holds `Σ p² · x[c] · x[k]` over the tokens for the columns `k` of the window that `c` lies in; `p` is the
//! router's weight, since an expert's error reaches the residual stream `p` times (1 without
//! experts). Matrices with the same input share an entry ([`names::same_input`]). Programs that
//! know nothing of moments pass over them.
//!
//! On request the divergence when one group of matrices is rounded stands in the metadata ([`sensitivity`]).
//!
//! Layers are walked one by one ([`Walk`](crate::engine::Walk)), each written when it is done: memory holds one
//! layer's statistics and the residual stream of every token. A run that is cut off goes on from there ([`journal`]).

pub mod journal;
pub mod sensitivity;
mod sums;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::engine::{self, Engine};
use crate::gguf::{self, Layout, Metadata, TensorDecl, Value, Writer, names, with_suffix};
use crate::model::Site;
use crate::plan::Shape;
use journal::{Journal, State};
use sensitivity::Sensitivity;
use sums::Sums;

/// Tokens below which an expert's statistics say little: as many as a window of moments has columns.
pub const STARVED: u64 = 256;

/// Metadata key of the width of the windows of moments.
pub const WIDTH_KEY: &str = "fewbit.moments.width";

/// Why a model cannot be calibrated.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model, or what it computes.
    #[error(transparent)]
    Engine(#[from] engine::Error),
    /// The file of statistics.
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    /// Weights are to be degraded that are not all in memory.
    #[error("{}: experts are read as they are needed, which a measure of their sensitivity cannot work with: give --mmap", file.display())]
    NotResident {
        /// The model.
        file: PathBuf,
    },
    /// There is no memory for a group's degraded weights.
    #[error("{}: no memory for degraded weights: {source}; give fewer layers with --band", file.display())]
    NoRoom {
        /// The model.
        file: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// What lets a later run go on cannot be written.
    #[error("{}: cannot write: {source}", path.display())]
    Journal {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The finished file cannot get its name.
    #[error("{}: cannot rename the finished file: {source}", path.display())]
    Rename {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// What to count, and where it comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Columns of a window of second moments, a row's at most; `None` for none.
    pub width: Option<usize>,
    /// Name of the text, as it stands in the file.
    pub dataset: String,
    /// Tokens of a chunk, as it stands in the file.
    pub chunk_size: usize,
}

/// Tokens that each expert saw.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Coverage {
    /// All tokens.
    pub tokens: u64,
    /// By layer and expert; empty in a dense model.
    pub experts: Vec<Vec<u64>>,
}

impl Coverage {
    /// Experts that saw less than [`STARVED`] tokens: layer, expert, tokens.
    pub fn starved(&self) -> impl Iterator<Item = (usize, usize, u64)> + '_ {
        self.experts.iter().enumerate().flat_map(|(layer, counts)| {
            let few = counts.iter().copied().enumerate();
            few.filter(|&(_, count)| count < STARVED)
                .map(move |(expert, count)| (layer, expert, count))
        })
    }
}

/// Matrices with the same input.
struct Group {
    site: Site,
    /// Their names; moments stand under the first.
    names: Vec<String>,
    columns: usize,
    /// Whether each expert has its own statistics.
    routed: bool,
    /// Whether llama.cpp's imatrix has sums of squares of them.
    squares: bool,
    /// Whether moments are of use: a router is never quantized.
    moments: bool,
}

/// The matrices of a layer.
fn groups(shape: &Shape, layer: usize) -> Vec<Group> {
    let block = |part: &&str| names::block(layer, part);
    let expert = |part: &&str| match shape.is_moe() {
        true => names::experts(layer, part),
        false => names::block(layer, part),
    };
    let group = |site, names: Vec<String>, columns| Group {
        site,
        names,
        columns,
        routed: false,
        squares: true,
        moments: true,
    };
    let qkv = [names::ATTN_Q, names::ATTN_K, names::ATTN_V];
    let gate_up = [names::FFN_GATE, names::FFN_UP];
    let mut groups = vec![
        group(
            Site::Attention,
            qkv.iter().map(block).collect(),
            shape.hidden,
        ),
        group(
            Site::AttentionOutput,
            vec![block(&names::ATTN_OUTPUT)],
            shape.heads * shape.head_dim,
        ),
    ];
    if shape.is_moe() {
        groups.push(Group {
            moments: false,
            ..group(
                Site::FeedForward,
                vec![block(&names::FFN_GATE_INP)],
                shape.hidden,
            )
        });
    }
    groups.push(Group {
        routed: true,
        ..group(
            Site::FeedForward,
            gate_up.iter().map(expert).collect(),
            shape.hidden,
        )
    });
    groups.push(Group {
        routed: true,
        ..group(Site::Down, vec![expert(&names::FFN_DOWN)], shape.ffn)
    });
    groups
}

/// The output head, which llama-imatrix leaves out unless told otherwise: of it there are moments only.
fn head(engine: &Engine) -> Group {
    let name = match engine.gguf().tensor(names::OUTPUT) {
        Some(_) => names::OUTPUT,
        None => names::TOKEN_EMBD,
    };
    Group {
        site: Site::Output,
        names: vec![name.to_owned()],
        columns: engine.shape().hidden,
        routed: false,
        squares: false,
        moments: true,
    }
}

impl Group {
    fn experts(&self, shape: &Shape) -> usize {
        if self.routed { shape.experts } else { 1 }
    }

    /// Width of its windows.
    fn width(&self, options: &Options) -> Option<usize> {
        let width = options.width.filter(|_| self.moments)?;
        Some(width.min(self.columns))
    }

    /// Its tensors, in the order of [`Group::write`].
    fn declare(&self, shape: &Shape, options: &Options, decls: &mut Vec<TensorDecl>) {
        let experts = self.experts(shape);
        let mut declare = |name: &str, what: &str, shape: Vec<usize>| {
            decls.push(TensorDecl {
                name: format!("{name}.{what}"),
                kind: crate::quant::BlockType::F32,
                shape,
            });
        };
        if self.squares {
            for name in &self.names {
                declare(name, "in_sum2", vec![self.columns, experts]);
                declare(name, "counts", vec![1, experts]);
            }
        }
        if let Some(width) = self.width(options) {
            declare(
                &self.names[0],
                "moments",
                vec![width, self.columns, experts],
            );
        }
    }

    fn write(&self, sums: &Sums, writer: &mut Writer) -> Result<(), gguf::Error> {
        if self.squares {
            let squares: Vec<f32> = sums.squares.iter().map(|&sum| sum as f32).collect();
            let counts: Vec<f32> = sums.counts.iter().map(|&count| count as f32).collect();
            for _ in &self.names {
                writer.write(bytemuck::cast_slice(&squares))?;
                writer.write(bytemuck::cast_slice(&counts))?;
            }
        }
        // In pieces: a layer's moments may be hundreds of megabytes.
        sums.moments
            .chunks(1 << 20)
            .try_for_each(|some| writer.write(bytemuck::cast_slice(some)))
    }
}

/// A calibration, decided upon but not begun.
pub struct Plan {
    layout: Layout,
    options: Options,
}

impl Plan {
    /// Lays the file out.
    ///
    /// # Errors
    /// If a file like this cannot be.
    pub fn new(
        engine: &Engine,
        chunks: usize,
        options: Options,
        sensitivity: Option<&Sensitivity>,
    ) -> Result<Self, Error> {
        let mut meta = Metadata::new();
        let dataset = gguf::Array::String(vec![options.dataset.clone()]);
        meta.insert("general.type", Value::String("imatrix".into()));
        meta.insert("imatrix.datasets", Value::Array(dataset));
        meta.insert("imatrix.chunk_count", Value::U32(chunks as u32));
        let size = Value::U32(options.chunk_size as u32);
        meta.insert("imatrix.chunk_size", size);
        if let Some(width) = options.width {
            meta.insert(WIDTH_KEY, Value::U32(width as u32));
        }
        if let Some(sensitivity) = sensitivity {
            sensitivity.describe(&mut meta);
        }
        let mut decls = Vec::new();
        let shape = engine.shape();
        for layer in 0..shape.layers {
            for group in groups(shape, layer) {
                group.declare(shape, &options, &mut decls);
            }
        }
        head(engine).declare(shape, &options, &mut decls);
        Ok(Self {
            layout: Layout::new(&meta, &decls)?,
            options,
        })
    }

    /// Bytes of the file.
    pub fn file_bytes(&self) -> u64 {
        self.layout.file_bytes()
    }

    /// Runs `texts` through the model and writes `path`, beside it first and renamed when whole. What `journal` has of an
    /// earlier run is not done again. `progress` is called once a text and layer.
    ///
    /// # Errors
    /// See [`Error`]; what is whole is then kept for a later run, unless the weights are damaged.
    pub fn run(
        self,
        engine: &Arc<Engine>,
        texts: Vec<Vec<u32>>,
        path: &Path,
        journal: &Journal,
        mut progress: impl FnMut(),
    ) -> Result<Coverage, Error> {
        let partial = with_suffix(path, ".partial");
        let (shape, count) = (engine.shape(), texts.len());
        let tokens = texts.iter().map(|text| text.len() as u64).sum();
        let mut walk = engine.walk(texts)?;
        let mut state = State::default();
        walk.resume(|x| {
            state = journal.load(x).unwrap_or_default();
            state.layers
        });
        let resumed = (state.layers > 0)
            .then(|| Writer::resume(&partial, self.layout.clone(), state.tensors).ok());
        let mut writer = match resumed.flatten() {
            Some(writer) => writer,
            None => {
                walk.resume(|_| 0); // which needs no streams: the first layer takes up the embedding
                state = State {
                    sensitivity: journal.state().and_then(|saved| saved.sensitivity),
                    ..State::default()
                };
                Writer::create(&partial, self.layout)?
            }
        };
        state.coverage.tokens = tokens;
        for _ in 0..state.layers * count {
            progress();
        }

        while let Some(layer) = walk.next_layer() {
            let mut groups = groups(shape, layer);
            if layer + 1 == shape.layers {
                groups.push(head(engine));
            }
            let new = |group: &Group| {
                let width = group.width(&self.options);
                Sums::new(group.columns, group.experts(shape), width)
            };
            let mut sums: Vec<Sums> = groups.iter().map(new).collect();
            let mut observe = |site, rows: &_, routes: Option<&_>| {
                for (group, sums) in groups.iter().zip(&mut sums) {
                    if group.site == site {
                        sums.add(engine.pool(), rows, routes.filter(|_| group.routed));
                    }
                }
            };
            if let Err(error) = walk.step(&mut observe, &mut progress) {
                if matches!(error, engine::Error::NotFinite { .. }) {
                    let _ = fs::remove_file(&partial); // of no use to a later run
                    journal.remove();
                }
                return Err(error.into());
            }
            for (group, sums) in groups.iter().zip(&mut sums) {
                sums.mirror();
                group.write(sums, &mut writer)?;
                if group.site == Site::Down && shape.is_moe() {
                    state.coverage.experts.push(sums.counts.clone());
                }
            }
            let (layers, x) = walk.streams();
            if layers < shape.layers {
                writer.sync()?;
                (state.layers, state.tensors) = (layers, writer.tensors_done());
                let recorded = journal.record(&state, x);
                recorded.map_err(|source| Error::Journal {
                    path: journal.path().to_owned(),
                    source,
                })?;
            }
        }
        writer.finish()?;
        fs::rename(&partial, path).map_err(|source| Error::Rename {
            path: path.to_owned(),
            source,
        })?;
        journal.remove();
        Ok(state.coverage)
    }
}
