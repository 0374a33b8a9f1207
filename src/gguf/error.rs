//! What can be wrong with a GGUF file, each with its place.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Why a GGUF file could not be read or written. The message is one line that names the
/// file, the place in it and, where there is one, the remedy.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("{}cannot {action}: {cause}", In(path))]
    Io {
        /// The file.
        path: PathBuf,
        /// What was attempted, as an infinitive: "open the file".
        action: &'static str,
        /// The system's reason.
        cause: io::Error,
    },
    /// The file is something else, or a GGUF variant that is not read.
    #[error("{}{reason}", In(path))]
    NotGguf {
        /// The file.
        path: PathBuf,
        /// What it is instead, and the remedy.
        reason: String,
    },
    /// The file ends before what it announces.
    #[error(
        "{}byte {offset}: {what} needs {needed} bytes, but the file ends at byte {len}: \
         truncated or damaged; download or convert it again",
        In(path)
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Where `what` begins.
        offset: u64,
        /// The key, tensor or part of the header that is cut off.
        what: String,
        /// Bytes that it needs from `offset` on.
        needed: u64,
        /// The file's length.
        len: u64,
    },
    /// The header contradicts itself or the format.
    #[error("{}byte {offset}: {what}: {problem}", In(path))]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where in the file the trouble stands.
        offset: u64,
        /// The key, tensor or part of the header.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A metadata key is missing, of another type than needed, or out of bounds.
    #[error("{}metadata key {key}: {problem}", In(path))]
    Key {
        /// The file; empty for metadata that was built in memory.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The files of a split model do not belong together.
    #[error("{}{problem}", In(path))]
    Split {
        /// The split that is missing or wrong.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// What is to be written is not a valid file, or not the announced one.
    #[error("{}cannot write {what}: {problem}", In(path))]
    Write {
        /// The file; empty before there is one.
        path: PathBuf,
        /// The key or tensor.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// The file at the head of a message; nothing where there is no file.
struct In<'a>(&'a Path);

impl fmt::Display for In<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.as_os_str().is_empty() {
            return Ok(());
        }
        write!(f, "{}: ", self.0.display())
    }
}
