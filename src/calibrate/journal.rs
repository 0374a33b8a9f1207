//! What lets a calibration that was cut off go on where it stopped.
//!
//! While `STATS.partial` grows, `STATS.partial.state` holds, after each layer, what the run is made from, what
//! it has found so far, and the residual stream of every token. A later run that is made from the same takes it up.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use super::sensitivity::{self, Sensitivity};
use super::{Coverage, Options};
use crate::gguf::with_suffix;

/// Longest description that is read.
const MAX_HEAD: u64 = 16 << 20;

/// What a calibration is made from: two with equal fingerprints count the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fingerprint {
    version: String,
    model: PathBuf,
    len: u64,
    modified: u64,
    /// Of the texts' tokens.
    texts: u64,
    tokens: usize,
    options: Options,
    sensitivity: Option<sensitivity::Options>,
}

impl Fingerprint {
    /// That of running `texts` through the model in the file `model`.
    pub fn new(
        model: &Path,
        texts: &[Vec<u32>],
        options: &Options,
        sensitivity: Option<sensitivity::Options>,
    ) -> Self {
        let found = fs::metadata(model).ok();
        let modified = found.as_ref().and_then(|found| found.modified().ok());
        let modified = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let mut hasher = DefaultHasher::new();
        texts.hash(&mut hasher);
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            model: model.canonicalize().unwrap_or_else(|_| model.to_owned()),
            len: found.map_or(0, |found| found.len()),
            modified: modified.map_or(0, |time| time.as_nanos() as u64),
            texts: hasher.finish(),
            tokens: texts.iter().map(Vec::len).sum(),
            options: options.clone(),
            sensitivity,
        }
    }
}

/// What an earlier run has come to.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// What was measured before the first layer.
    pub sensitivity: Option<Sensitivity>,
    /// Layers that are done.
    pub layers: usize,
    /// Tensors of the partial file that lie whole on the disk.
    pub(super) tensors: usize,
    /// What experts saw in these layers.
    pub(super) coverage: Coverage,
}

impl State {
    /// Before the first layer, when this has been measured.
    pub fn measured(sensitivity: Sensitivity) -> Self {
        Self {
            sensitivity: Some(sensitivity),
            ..Self::default()
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Head {
    fingerprint: Fingerprint,
    state: State,
}

/// The journal beside a partial file.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    fingerprint: Fingerprint,
}

impl Journal {
    /// That of a calibration into `output`; nothing is read or written yet.
    pub fn new(output: &Path, fingerprint: Fingerprint) -> Self {
        Self {
            path: with_suffix(output, ".partial.state"),
            fingerprint,
        }
    }

    /// What a run with the same fingerprint has come to, if there was one.
    pub fn state(&self) -> Option<State> {
        self.open().map(|(state, _)| state)
    }

    fn open(&self) -> Option<(State, File)> {
        let mut file = File::open(&self.path).ok()?;
        let mut len = [0; 8];
        file.read_exact(&mut len).ok()?;
        let len = Some(u64::from_le_bytes(len)).filter(|&len| len <= MAX_HEAD)?;
        let mut head = Vec::new();
        (&mut file).take(len).read_to_end(&mut head).ok()?;
        let head: Head = serde_json::from_slice(&head).ok()?;
        (head.fingerprint == self.fingerprint).then_some((head.state, file))
    }

    /// The same with the residual streams after its layers, read into `x`; nothing if they are not there.
    pub(super) fn load(&self, x: &mut [f32]) -> Option<State> {
        let (state, mut file) = self.open()?;
        let rest = file.metadata().ok()?.len();
        let at = io::Seek::stream_position(&mut file).ok()?;
        if rest - at != 4 * x.len() as u64 {
            return None;
        }
        file.read_exact(bytemuck::cast_slice_mut(x)).ok()?;
        Some(state)
    }

    /// Records a state, with the residual streams after its layers.
    ///
    /// # Errors
    /// If it cannot be written; what was recorded before is then still there.
    pub fn record(&self, state: &State, x: &[f32]) -> io::Result<()> {
        let head = Head {
            fingerprint: self.fingerprint.clone(),
            state: state.clone(),
        };
        let head = serde_json::to_vec(&head)?;
        let new = with_suffix(&self.path, ".new");
        let mut file = File::create(&new)?;
        file.write_all(&(head.len() as u64).to_le_bytes())?;
        file.write_all(&head)?;
        file.write_all(bytemuck::cast_slice(x))?;
        file.sync_data()?;
        fs::rename(&new, &self.path)
    }

    /// Forgets everything.
    pub fn remove(&self) {
        // What is left behind is harmless: the next run finds another fingerprint, or the same work done.
        let _ = fs::remove_file(with_suffix(&self.path, ".new"));
        let _ = fs::remove_file(&self.path);
    }

    /// The file, for messages.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}
