//! What can go wrong in a conversion, each said in one line: what, where, and the remedy.

use std::io;
use std::path::{Path, PathBuf};

/// An error of the converter.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused something.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// What was tried: "open", "read", "write" …
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// An input file does not hold what it must; `what` names the place and, where there is one, the remedy.
    #[error("{}: {what}", path.display())]
    Input {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A GGUF file could not be read, or the output's metadata could not be laid out.
    #[error(transparent)]
    Gguf(#[from] fewbit::gguf::Error),
    /// An adapter could not be read, or is another model's.
    #[error(transparent)]
    Adapter(#[from] fewbit::adapter::Error),
    /// A tensor's bytes reach past the end of its file.
    #[error("{}: truncated: tensor {tensor} needs bytes up to {needed}, the file has {present}: download it again", path.display())]
    Truncated {
        /// The shard.
        path: PathBuf,
        /// The first tensor that is cut.
        tensor: String,
        /// Where it ends.
        needed: u64,
        /// Length of the file.
        present: u64,
    },
    /// A shard that the index names is not there.
    #[error("{}: shard named by {index} is missing ({tensor} lies in it): download it into the same folder", path.display())]
    MissingShard {
        /// The shard.
        path: PathBuf,
        /// The index that names it.
        index: String,
        /// A tensor that lies in it.
        tensor: String,
    },
    /// A tensor that the configuration calls for is not there.
    #[error("{}: tensor {tensor} is missing: the download is incomplete, or its configuration is that of another model", path.display())]
    MissingTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor has another shape than the configuration says.
    #[error("{}: tensor {tensor} has shape {found:?}, the configuration calls for {expected:?}: take both from the same model", path.display())]
    Shape {
        /// The file it lies in.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Shape by the configuration, slowest extent first as in the checkpoint.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// A weight is NaN or infinite.
    #[error("{}: tensor {tensor} holds {value} at row {row}, column {column}: the checkpoint is damaged: download it again", path.display())]
    NotFinite {
        /// The input.
        path: PathBuf,
        /// The tensor, under its GGUF name.
        tensor: String,
        /// Row, counted over all experts.
        row: u64,
        /// Column.
        column: usize,
        /// NaN, inf or -inf.
        value: f32,
    },
    /// A finite weight is beyond what the target type, or the scales of its blocks, can hold.
    #[error(
        "tensor {tensor}, row {row}, column {column}: {value:e} is out of {kind}'s range: choose {} for it",
        if *kind == fewbit::quant::BlockType::BF16 { "F32" } else { "BF16 or F32" }
    )]
    TooLarge {
        /// The tensor, under its GGUF name.
        tensor: String,
        /// Row, counted over all experts.
        row: u64,
        /// Column.
        column: usize,
        /// The weight.
        value: f32,
        /// The target type.
        kind: fewbit::quant::BlockType,
    },
    /// The importance matrix does not fit the model.
    #[error("{}: {what}", path.display())]
    Imatrix {
        /// The imatrix file.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
    /// Rounding by what the output loses needs to know the inputs.
    #[error(
        "--round {round} goes by statistics of the inputs: give --imatrix (fewbit calibrate makes it)"
    )]
    NoStatistics {
        /// The rounding asked for.
        round: crate::round::Round,
    },
    /// Quantized weights would be quantized again.
    #[error("{}: {tensor} is already quantized ({kind}): convert from an F16, BF16 or F32 file, or accept the loss with --allow-requantize", path.display())]
    Requantize {
        /// The input.
        path: PathBuf,
        /// The first quantized tensor.
        tensor: String,
        /// Its type.
        kind: fewbit::quant::BlockType,
    },
    /// The output would replace a file.
    #[error("{}: exists: choose another name, or replace it with --force", .0.display())]
    Exists(PathBuf),
    /// The output is a folder.
    #[error("{}: is a folder: name the file to write", .0.display())]
    OutputIsFolder(PathBuf),
    /// The output, or a file that is written on the way to it, is one of the inputs.
    #[error("{}: is an input of this conversion: choose another name for the output", .0.display())]
    OutputIsInput(PathBuf),
    /// The file system has less room than the output takes.
    #[error("{}: needs {needed} bytes, the file system has {available} free: free {} more", path.display(), needed - available)]
    NoSpace {
        /// The output.
        path: PathBuf,
        /// Bytes that are still to be written.
        needed: u64,
        /// Bytes that are free.
        available: u64,
    },
    /// A size is asked for, and nothing says what rounding costs where.
    #[error(
        "--fit and --bpw go by what rounding costs where: give --imatrix FILE, made with fewbit calibrate --sensitivity"
    )]
    FitWithoutStatistics,
    /// A size is asked for, and there are no weights yet.
    #[error("{}: --fit and --bpw look at the weights, and there are none yet: download them", .0.display())]
    FitWithoutWeights(PathBuf),
    /// The size asked for is too small.
    #[error(
        "--fit: the file would take {needed} bytes at least, {budget} are asked for: ask for more"
    )]
    FitTooSmall {
        /// Bytes asked for.
        budget: u64,
        /// Bytes of the smallest file.
        needed: u64,
    },
    /// The recipe cannot be applied.
    #[error(transparent)]
    Recipe(#[from] crate::recipe::Error),
}

impl Error {
    /// For `map_err` on an I/O call.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io {
            action,
            path,
            source,
        }
    }

    /// An input file that does not hold what it must.
    pub fn input(path: &Path, what: impl Into<String>) -> Error {
        Error::Input {
            path: path.to_owned(),
            what: what.into(),
        }
    }
}

/// A result of the converter.
pub type Result<T> = std::result::Result<T, Error>;
