//! LoRA adapters: low-rank corrections of a model's matrices, as two kinds of files hold them.
//!
//! A matrix `W [rows, columns]` is corrected to `W + scale · B · A`, `A [rank, columns]`, `B [rows, rank]` (Hu et al.,
//! <https://arxiv.org/abs/2106.09685>). [`Adapter::open`] reads what PEFT saves (a folder with `adapter_config.json` and
//! `adapter_model.safetensors`) or llama.cpp's GGUF form, checks every matrix against the model's extents, and brings
//! both into one shape: names and the order of rows as in GGUF, everything in f32.

mod gguf;
mod peft;

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::gguf::names;
use crate::plan::Shape;

/// Why a file is no adapter of the model. Each message is one line.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused.
    #[error("{}: cannot {action}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// A GGUF file is damaged.
    #[error(transparent)]
    Gguf(#[from] crate::gguf::Error),
    /// The adapter is damaged, of a kind that is not computed, or another model's.
    #[error("{}: {problem}", file.display())]
    Wrong {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

impl Error {
    fn io(action: &'static str, file: &Path) -> impl FnOnce(io::Error) -> Self {
        let file = file.to_owned();
        move |source| Self::Io {
            file,
            action,
            source,
        }
    }

    fn wrong(file: &Path, problem: impl Into<String>) -> Self {
        Self::Wrong {
            file: file.to_owned(),
            problem: problem.into(),
        }
    }
}

/// An adapter and how strong it is to be, as a command line says: `FILE` or `FILE:SCALE`.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    /// The adapter.
    pub path: PathBuf,
    /// Its corrections are multiplied with this.
    pub scale: f32,
}

impl FromStr for Chosen {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let scaled = text.rsplit_once(':').and_then(|(path, scale)| {
            let scale: f32 = scale.parse().ok()?;
            (scale.is_finite() && !path.is_empty()).then_some((path, scale))
        });
        let (path, scale) = scaled.unwrap_or((text, 1.0));
        Ok(Self {
            path: path.into(),
            scale,
        })
    }
}

/// A matrix of the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// A matrix of a layer: [`names::ATTN_Q`] to [`names::ATTN_OUTPUT`], [`names::FFN_GATE_INP`], or a dense model's
    /// [`names::FFN_GATE`], [`names::FFN_UP`], [`names::FFN_DOWN`].
    Layer(usize, &'static str),
    /// A matrix of an expert: layer, part, expert.
    Expert(usize, &'static str, usize),
    /// The output head.
    Output,
}

impl Target {
    /// The GGUF tensor that the matrix is, or is in.
    pub fn tensor(self) -> String {
        match self {
            Self::Layer(layer, part) => names::block(layer, part),
            Self::Expert(layer, part, _) => names::experts(layer, part),
            Self::Output => names::OUTPUT.to_owned(),
        }
    }

    /// Rows and columns in a model of `shape`; `None` where it has no such matrix.
    pub fn extents(self, shape: &Shape) -> Option<(usize, usize)> {
        let q = shape.heads * shape.head_dim;
        let kv = shape.kv_heads * shape.head_dim;
        let (hidden, ffn) = (shape.hidden, shape.ffn);
        let (layer, part) = match self {
            Self::Output => return Some((shape.vocab, hidden)),
            Self::Layer(layer, part) => (layer, part),
            Self::Expert(layer, part, expert) => {
                if expert >= shape.experts || !shape.is_moe() {
                    return None;
                }
                (layer, part)
            }
        };
        if layer >= shape.layers {
            return None;
        }
        let of_expert = matches!(self, Self::Expert(..));
        Some(match part {
            names::ATTN_Q => (q, hidden),
            names::ATTN_K | names::ATTN_V => (kv, hidden),
            names::ATTN_OUTPUT => (hidden, q),
            names::FFN_GATE_INP if shape.is_moe() => (shape.experts, hidden),
            names::FFN_GATE | names::FFN_UP if of_expert == shape.is_moe() => (ffn, hidden),
            names::FFN_DOWN if of_expert == shape.is_moe() => (hidden, ffn),
            _ => return None,
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Expert(_, _, expert) => write!(f, "{} (expert {expert})", self.tensor()),
            _ => f.write_str(&self.tensor()),
        }
    }
}

/// The correction `scale · B · A` of a matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// The matrix.
    pub target: Target,
    /// Rows of A, columns of B.
    pub rank: usize,
    /// `[rank, columns]`.
    pub a: Vec<f32>,
    /// `[rows, rank]`, rows in the order of the GGUF file.
    pub b: Vec<f32>,
    /// What the product is multiplied with.
    pub scale: f32,
}

/// An adapter of a model, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// Where it was read.
    pub path: PathBuf,
    /// The files that it was read from.
    pub files: Vec<PathBuf>,
    /// Its corrections; each matrix at most once.
    pub pairs: Vec<Pair>,
}

/// Ranks beyond this are damage.
const MAX_RANK: usize = 1 << 14;

impl Adapter {
    /// Reads the adapter in `path` (a folder of PEFT's, its `adapter_model.safetensors`, or a GGUF file) for a model of
    /// `shape`.
    ///
    /// # Errors
    /// When it cannot be read, is damaged, holds something else than low-rank corrections of matrices that the model
    /// has, or these have other extents.
    pub fn open(path: &Path, shape: &Shape) -> Result<Self, Error> {
        let is_peft = path.is_dir() || path.extension().is_some_and(|end| end == "safetensors");
        let (files, mut pairs) = match is_peft {
            true => peft::read(path, shape)?,
            false => gguf::read(path, shape)?,
        };
        pairs.sort_by_key(|pair| pair.target);
        if pairs.is_empty() {
            return Err(Error::wrong(path, "holds no corrections of any matrix"));
        }
        if let Some(two) = pairs.windows(2).find(|two| two[0].target == two[1].target) {
            let problem = format!("corrects {} twice", two[0].target);
            return Err(Error::wrong(path, problem));
        }
        let finite = |pair: &&Pair| pair.a.iter().chain(&pair.b).all(|value| value.is_finite());
        if let Some(pair) = pairs.iter().find(|pair| !finite(pair)) {
            let problem = format!("its matrices for {} hold NaN or infinity", pair.target);
            return Err(Error::wrong(path, problem));
        }
        Ok(Self {
            path: path.to_owned(),
            files,
            pairs,
        })
    }

    /// Reads all that were `chosen`, as [`open`](Self::open) does, each with how strong it is to be.
    ///
    /// # Errors
    /// Those of the first that fails.
    pub fn open_all(chosen: &[Chosen], shape: &Shape) -> Result<Vec<(Self, f32)>, Error> {
        let open = |chosen: &Chosen| Ok((Self::open(&chosen.path, shape)?, chosen.scale));
        chosen.iter().map(open).collect()
    }

    /// Bytes that the matrices take in memory.
    pub fn bytes(&self) -> u64 {
        let values = self.pairs.iter().map(|pair| pair.a.len() + pair.b.len());
        4 * values.sum::<usize>() as u64
    }
}

/// Checks the extents of A `[rank, columns]` and B `[rows, rank]` for `target`, before they are read; gives the rank.
fn check(
    file: &Path,
    shape: &Shape,
    target: Target,
    a: [usize; 2],
    b: [usize; 2],
) -> Result<usize, Error> {
    let Some((rows, columns)) = target.extents(shape) else {
        let problem = format!("corrects {target}, which this model does not have");
        return Err(Error::wrong(file, problem));
    };
    let rank = a[0];
    if a[1] != columns || b[0] != rows {
        let problem = format!(
            "corrects {target} of {} x {}, which is {rows} x {columns} here: an adapter of another model",
            b[0], a[1]
        );
        return Err(Error::wrong(file, problem));
    }
    if b[1] != rank || !(1..=MAX_RANK).contains(&rank) {
        let problem = format!("{target}: A of rank {rank} and B of rank {}", b[1]);
        return Err(Error::wrong(file, problem));
    }
    Ok(rank)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_behind_the_last_colon_is_the_scale() {
        for (text, path, scale) in [
            ("a.gguf", "a.gguf", 1.0),
            ("a.gguf:0.5", "a.gguf", 0.5),
            ("a.gguf:-1", "a.gguf", -1.0),
            ("C:\\a.gguf", "C:\\a.gguf", 1.0),
            ("a:b:2", "a:b", 2.0),
            ("a:inf", "a:inf", 1.0),
        ] {
            let chosen: Chosen = text.parse().unwrap();
            assert_eq!((chosen.path, chosen.scale), (path.into(), scale), "{text}");
        }
    }
}
