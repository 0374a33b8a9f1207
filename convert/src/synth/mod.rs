//! Files of random weights with the shapes of real models, for benchmarks.
//!
//! Speed depends on shapes and types, not on what the weights say, so a benchmark needs no
//! download. But it needs weights that behave: activations that stay finite, experts that
//! are chosen about equally often. All weights are normal with mean 0, the norms are 1, and
//! deviations are chosen so that the residual stream keeps its order of magnitude (`deviation`).
//! Routing that is uneven, as trained routers' is, can be had with [`Options::zipf`].

mod blocks;
mod vocab;

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use fewbit::gguf::{Layout, TensorDecl, Writer};
use fewbit::quant::BlockType::{self, F32};
use indicatif::ProgressBar;

use self::blocks::{CHUNK, Normals, Pool};
use crate::checkpoint::names::{Expected, Role, expected};
use crate::config::{ModelConfig, RopeScaling};
use crate::disk;
use crate::error::Result;
use crate::metadata;
use crate::output::Output;
use crate::recipe::{self, Mix, RecipeModel, RecipeTensor};

/// Models whose shapes are known by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// Mixtral 8x7B (v0.1).
    Mixtral8x7b,
    /// Mixtral 8x22B (v0.3).
    Mixtral8x22b,
    /// Mistral 7B (v0.2).
    Mistral7b,
    /// Llama 2 7B.
    Llama2_7b,
}

impl Preset {
    /// Every preset.
    pub const ALL: [Self; 4] = [
        Self::Mixtral8x7b,
        Self::Mixtral8x22b,
        Self::Mistral7b,
        Self::Llama2_7b,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mixtral8x7b => "mixtral-8x7b",
            Self::Mixtral8x22b => "mixtral-8x22b",
            Self::Mistral7b => "mistral-7b",
            Self::Llama2_7b => "llama-2-7b",
        }
    }

    /// The configuration that the model was published with.
    pub fn config(self) -> ModelConfig {
        let mistral = ModelConfig {
            vocab: 32000,
            context: 32768,
            hidden: 4096,
            layers: 32,
            ffn: 14336,
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            head_dim_given: false,
            experts: 0,
            experts_used: 0,
            rms_eps: 1e-5,
            rope_theta: 1e6,
            rope_scaling: RopeScaling::None,
            sliding_window: None,
            tied_embeddings: false,
        };
        let mixtral = ModelConfig {
            experts: 8,
            experts_used: 2,
            ..mistral
        };
        match self {
            Self::Mistral7b => mistral,
            Self::Mixtral8x7b => mixtral,
            Self::Mixtral8x22b => ModelConfig {
                vocab: 32768,
                context: 65536,
                hidden: 6144,
                layers: 56,
                ffn: 16384,
                heads: 48,
                ..mixtral
            },
            Self::Llama2_7b => ModelConfig {
                context: 4096,
                ffn: 11008,
                kv_heads: 32,
                rope_theta: 1e4,
                ..mistral
            },
        }
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Preset {
    type Err = UnknownPreset;

    fn from_str(name: &str) -> std::result::Result<Self, UnknownPreset> {
        let known = Preset::ALL.into_iter().find(|preset| preset.name() == name);
        known.ok_or_else(|| UnknownPreset(name.to_owned()))
    }
}

/// No preset has this name.
#[derive(Debug, Clone, thiserror::Error)]
#[error("unknown model {0:?}; one of {list}", list = Preset::ALL.map(Preset::name).join(", "))]
pub struct UnknownPreset(pub String);

/// What is to be written.
#[derive(Clone, Debug)]
pub struct Options {
    /// `general.name` of the file.
    pub name: String,
    /// The model's extents. Rows must be multiples of 256 weights and embeddings not tied.
    pub config: ModelConfig,
    /// Recipe of the types.
    pub mix: Mix,
    /// Equal seeds give equal bytes.
    pub seed: u64,
    /// How uneven routing is: about `r^-zipf` for the expert of rank `r`, each layer with ranks of its own; 0 is even.
    pub zipf: f32,
    /// Replace an existing file.
    pub force: bool,
}

/// What was written.
#[derive(Debug)]
pub struct Report {
    /// The file.
    pub path: PathBuf,
    /// Its length.
    pub file_bytes: u64,
    /// Time that it took.
    pub elapsed: Duration,
}

/// Writes a file of random weights under the name `output`, whole or not at all.
///
/// `progress` gets the bytes written. Memory stays below 200 MB.
///
/// # Errors
/// If the file exists (and is not to be replaced), there is no room for it, or writing fails.
pub fn synth(output: &Path, options: &Options, progress: &ProgressBar) -> Result<Report> {
    let started = Instant::now();
    Output::check(output, options.force)?;
    let tensors = expected(&options.config);
    let kinds = types(options, &tensors)?;
    let layout = layout(options, &tensors, &kinds)?;
    let file_bytes = layout.file_bytes();
    disk::require(output, file_bytes)?;
    progress.set_length(file_bytes);

    let file = Output::claim(output, options.force)?;
    let weights = Weights::new(options);
    if let Err(error) = weights.write(file.partial(), layout, &tensors, &kinds, progress) {
        file.discard();
        return Err(error);
    }
    file.finish()?;
    Ok(Report {
        path: output.to_owned(),
        file_bytes,
        elapsed: started.elapsed(),
    })
}

fn types(options: &Options, tensors: &[Expected]) -> Result<Vec<BlockType>> {
    let ModelConfig {
        layers,
        heads,
        kv_heads,
        experts,
        ..
    } = options.config;
    let model = RecipeModel {
        layers,
        heads,
        kv_heads,
        experts,
        imatrix: false,
    };
    let tensors: Vec<RecipeTensor> = tensors
        .iter()
        .map(|t| RecipeTensor {
            name: &t.name,
            shape: &t.shape,
            source: F32,
        })
        .collect();
    let choices = recipe::assign(options.mix, &model, &[], &tensors)?;
    Ok(choices.iter().map(|choice| choice.kind).collect())
}

fn layout(options: &Options, tensors: &[Expected], kinds: &[BlockType]) -> Result<Layout> {
    let mut metadata = metadata::from_config(&options.name, &options.config);
    for (key, value) in vocab::dummy(options.config.vocab) {
        metadata.insert(key, value);
    }
    metadata::set_encoding(&mut metadata, recipe::ftype_id(options.mix));
    let decls: Vec<TensorDecl> = tensors
        .iter()
        .zip(kinds)
        .map(|(tensor, &kind)| TensorDecl {
            name: tensor.name.clone(),
            kind,
            shape: tensor.shape.clone(),
        })
        .collect();
    Ok(Layout::new(&metadata, &decls)?)
}

/// Standard deviation of a matrix's weights.
///
/// A matrix with rows of `columns` weights of deviation 1/√columns keeps the variance of what
/// it is multiplied with, and that is 1 after a norm. So queries, keys, gates, router and
/// output logits have variance 1. What is added to the residual stream is scaled down by
/// √(2·layers): the stream starts with variance 1 and ends below 2.
fn deviation(role: Role, config: &ModelConfig, columns: usize) -> f32 {
    let keep = 1.0 / (columns as f32).sqrt();
    match role {
        Role::TokenEmbd => 1.0,
        Role::AttnOutput | Role::Down | Role::DownExperts => {
            keep / (2.0 * config.layers as f32).sqrt()
        }
        _ => keep,
    }
}

/// What every embedding has in each column, beside its random part of deviation 1, where routing is uneven: a
/// direction that the residual stream keeps through all layers, so that routers can add a constant to a score.
const COMMON: f32 = 1.0;

/// A router's rows, made uneven: row by row a share of the common direction.
///
/// After a norm an input of layer `l` has the mean `COMMON / r` and varies by `σ / r` with `σ² = 1 + l / layers`
/// (what the layers before have added) and some `r`. So a row without a mean of its own, of variance
/// 1/columns, gives a score that varies by `σ / r`, and `b / columns` more in each column shifts it by `b · COMMON / r`. Scores
/// shifted by `s · ln w` and varying like Gumbel's distribution of scale `s` choose by weights `w`; its deviation is
/// `s · π/√6`.
fn skew_router(rows: &mut [f32], columns: usize, zipf: f32, layer: f32, ranks: &[usize]) {
    const GUMBEL: f32 = 1.282_55;
    let scale = (1.0 + layer).sqrt() / GUMBEL / COMMON;
    for (row, &rank) in rows.chunks_exact_mut(columns).zip(ranks) {
        let mean = row.iter().sum::<f32>() / columns as f32;
        let shift = -zipf * (rank as f32 + 1.0).ln() * scale / columns as f32;
        row.iter_mut().for_each(|weight| *weight += shift - mean);
    }
}

/// Weights on demand, determined by seed, tensor and place alone.
struct Weights<'a> {
    options: &'a Options,
    normals: Normals,
}

impl<'a> Weights<'a> {
    /// Bytes that are made and then written at a time.
    const BUFFER: usize = 32 << 20;

    fn new(options: &'a Options) -> Self {
        Self {
            options,
            normals: Normals::new(options.seed),
        }
    }

    fn write(
        &self,
        path: &Path,
        layout: Layout,
        tensors: &[Expected],
        kinds: &[BlockType],
        progress: &ProgressBar,
    ) -> Result<()> {
        let mut writer = Writer::create(path, layout)?;
        let mut pools = HashMap::new();
        let mut buffer = Vec::new();
        let mut routers = 0;
        for (index, (tensor, &kind)) in tensors.iter().zip(kinds).enumerate() {
            progress.set_message(tensor.name.clone());
            let weights: usize = tensor.shape.iter().product();
            let sigma = deviation(tensor.role, &self.options.config, tensor.shape[0]);
            if tensor.shape.len() == 1 {
                let ones = vec![1.0_f32; weights];
                writer.write(bytemuck::cast_slice(&ones))?;
                continue;
            }
            if tensor.role == Role::Router {
                // Few weights that decide on much: each its own random number.
                let stream = (index as u64) << 40;
                let mut fresh = blocks::normals(self.options.seed, stream, weights, sigma);
                if self.options.zipf > 0.0 {
                    let [columns, experts] = tensor.shape[..] else {
                        unreachable!("a router is a matrix");
                    };
                    let ranks = blocks::ranks(self.options.seed, stream, experts);
                    let layers = self.options.config.layers as f32;
                    let layer = routers as f32 / layers;
                    skew_router(&mut fresh, columns, self.options.zipf, layer, &ranks);
                    routers += 1;
                }
                writer.write(bytemuck::cast_slice(&fresh))?;
                continue;
            }
            let mean = match tensor.role {
                Role::TokenEmbd if self.options.zipf > 0.0 => COMMON,
                _ => 0.0,
            };
            let pool = pools
                .entry((kind, sigma.to_bits(), mean.to_bits()))
                .or_insert_with(|| Pool::new(kind, mean, sigma, &self.normals));
            let chunks = weights / CHUNK;
            let chunks_at_once = Self::BUFFER / pool.chunk_bytes();
            for (part, first) in (0..chunks).step_by(chunks_at_once).enumerate() {
                let bytes = chunks_at_once.min(chunks - first) * pool.chunk_bytes();
                buffer.resize(bytes, 0);
                pool.deal(self.options.seed, index as u64, part as u64, &mut buffer);
                writer.write(&buffer)?;
                progress.inc(bytes as u64);
            }
        }
        Ok(writer.finish()?)
    }
}
