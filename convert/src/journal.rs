//! The journal of a conversion: what lets one that was cut off go on where it stopped.
//!
//! While `OUT.gguf.partial` grows, `OUT.gguf.partial.json` says from which inputs, with which
//! options, and how many tensors lie whole on the disk. A later run with the same answers keeps them.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use fewbit::gguf::with_suffix;
use serde::{Deserialize, Serialize};

use crate::checkpoint::InputFile;
use crate::error::{Error, Result};

/// What a conversion is made from: two with equal fingerprints write equal files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Version of the program: encoders may change.
    pub version: String,
    /// Files that weights are read from, and the imatrix.
    pub inputs: Vec<InputPrint>,
    /// Types of the tensors, in order. Their names, shapes and the metadata stand in the partial file's header.
    pub types: Vec<String>,
    /// How weights are rounded.
    pub round: String,
    /// How strong the adapters are that are added to them.
    pub adapters: Vec<String>,
}

/// A file, as far as it can be told without reading it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputPrint {
    path: PathBuf,
    len: u64,
    modified: u64,
}

impl From<&InputFile> for InputPrint {
    fn from(input: &InputFile) -> Self {
        let path = input
            .path
            .canonicalize()
            .unwrap_or_else(|_| input.path.clone());
        InputPrint {
            path,
            len: input.len,
            modified: input.modified,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Entry {
    #[serde(flatten)]
    fingerprint: Fingerprint,
    tensors_done: usize,
}

/// The journal beside a partial file.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    fingerprint: Fingerprint,
}

impl Journal {
    /// The journal of the partial file `partial`; nothing is read or written yet.
    pub fn new(partial: &Path, fingerprint: Fingerprint) -> Journal {
        Journal {
            path: with_suffix(partial, ".json"),
            fingerprint,
        }
    }

    /// Tensors that a run with the same fingerprint has written whole; 0 if there was none.
    pub fn tensors_done(&self) -> usize {
        let entry = fs::read(&self.path)
            .ok()
            .and_then(|text| serde_json::from_slice::<Entry>(&text).ok());
        entry
            .filter(|e| e.fingerprint == self.fingerprint)
            .map_or(0, |e| e.tensors_done)
    }

    /// Records that the first `tensors_done` tensors lie whole on the disk (the caller has seen to that).
    pub fn record(&self, tensors_done: usize) -> Result<()> {
        let entry = Entry {
            fingerprint: self.fingerprint.clone(),
            tensors_done,
        };
        let text = serde_json::to_vec(&entry).expect("plain data");
        let new = with_suffix(&self.path, ".new");
        let write = || {
            let mut file = File::create(&new)?;
            file.write_all(&text)?;
            file.sync_data()?;
            fs::rename(&new, &self.path)
        };
        write().map_err(Error::io("write", &self.path))
    }

    /// Forgets everything.
    pub fn remove(&self) {
        // What is left behind is small and harmless: the next run finds another fingerprint, or the same work done.
        let _ = fs::remove_file(with_suffix(&self.path, ".new"));
        let _ = fs::remove_file(&self.path);
    }
}
