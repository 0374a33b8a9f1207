//! Where pulled models live on this machine, and what they are called.
//!
//! A model's name is its file's, without extension and split number: `SmolLM2-135M-Instruct-Q4_K_M`. Where two
//! repositories hold files of one name, the folders tell them apart: `org/repo/NAME`, which is also how the
//! files lie below [`folder`].

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::gguf::SplitName;

/// Folders below the models' that are looked through.
const DEPTH: usize = 6;
/// Names that a wrong one is compared with and that are shown.
const NEAR: usize = 3;
/// How alike a name must be to be shown (Jaro-Winkler, 1 is the same).
const ALIKE: f64 = 0.75;

/// Where fewbit keeps what it keeps: `$FEWBIT_HOME`, or a folder of its own among the user's data (`$XDG_DATA_HOME`,
/// `~/.local/share`; on Windows `%LOCALAPPDATA%`). `None` where the user has no home.
pub fn home() -> Option<PathBuf> {
    let path = |variable: &str| {
        let value = env::var_os(variable).filter(|value| !value.is_empty())?;
        Some(PathBuf::from(value))
    };
    if let Some(home) = path("FEWBIT_HOME") {
        return Some(home);
    }
    let data = match cfg!(windows) {
        true => path("LOCALAPPDATA"),
        false => path("XDG_DATA_HOME")
            .filter(|folder| folder.is_absolute())
            .or_else(|| Some(env::home_dir()?.join(".local/share"))),
    };
    Some(data?.join("fewbit"))
}

/// Where models are put: the folder `models` of [`home`].
pub fn folder() -> Option<PathBuf> {
    Some(home()?.join("models"))
}

/// A model that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it is called.
    pub name: String,
    /// Its files: the splits in order, or a checkpoint's.
    pub files: Vec<PathBuf>,
    /// Bytes in all.
    pub bytes: u64,
    /// When the last of its files was written.
    pub modified: SystemTime,
    /// Splits of it that are not there.
    pub missing: usize,
    /// The folder, where it is a checkpoint and no GGUF file.
    pub checkpoint: Option<PathBuf>,
}

impl Entry {
    /// What a command that loads it is given: the file (the first of a split model), or the folder.
    pub fn path(&self) -> &Path {
        self.checkpoint.as_deref().unwrap_or(&self.files[0])
    }
}

/// The models in `folder` and below it, the latest first; none where there is no such folder.
///
/// # Errors
/// When a folder cannot be read.
pub fn list(folder: &Path) -> io::Result<Vec<Entry>> {
    let mut found = Found::default();
    match fs::metadata(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        _ => found.search(folder, DEPTH)?,
    }
    let mut entries: Vec<Entry> = found.ggufs.into_values().collect();
    entries.extend(found.checkpoints);
    // Where names are the same, the folders tell.
    let mut same: BTreeMap<String, usize> = BTreeMap::new();
    for entry in &entries {
        *same.entry(entry.name.to_lowercase()).or_default() += 1;
    }
    for entry in &mut entries {
        if same[&entry.name.to_lowercase()] > 1 {
            entry.name = long_name(folder, entry);
        }
    }
    entries.sort_by(|a, b| {
        Reverse(a.modified)
            .cmp(&Reverse(b.modified))
            .then_with(|| a.name.cmp(&b.name))
    });
    Ok(entries)
}

/// The name with the folders that lead to it.
fn long_name(folder: &Path, entry: &Entry) -> String {
    let above = match &entry.checkpoint {
        Some(checkpoint) => checkpoint.parent(),
        None => entry.files[0].parent(),
    };
    let above = above.and_then(|above| above.strip_prefix(folder).ok());
    let parts = above.into_iter().flat_map(Path::components);
    let parts = parts.map(|part| part.as_os_str().to_string_lossy().into_owned());
    let mut parts: Vec<String> = parts.collect();
    let short = entry.name.rsplit('/').next().unwrap_or(&entry.name);
    parts.push(short.to_owned());
    parts.join("/")
}

/// Files on the way to becoming entries.
#[derive(Default)]
struct Found {
    /// By folder, name and number of splits.
    ggufs: BTreeMap<(PathBuf, String, usize), Entry>,
    checkpoints: Vec<Entry>,
}

impl Found {
    fn search(&mut self, folder: &Path, depth: usize) -> io::Result<()> {
        let mut paths = Vec::new();
        for entry in fs::read_dir(folder)? {
            paths.push(entry?.path());
        }
        paths.sort();
        let mut weights = Vec::new();
        for path in &paths {
            if path.is_dir() {
                if depth > 0 {
                    self.search(path, depth - 1)?;
                }
                continue;
            }
            match path.extension().and_then(|extension| extension.to_str()) {
                Some(extension) if extension.eq_ignore_ascii_case("gguf") => self.add(folder, path),
                Some("safetensors") => weights.push(path.clone()),
                _ => {}
            }
        }
        let config = ["config.json", "params.json"].map(|name| folder.join(name));
        if !weights.is_empty() && config.iter().any(|config| config.is_file()) {
            let name = folder.file_name().unwrap_or_default().to_string_lossy();
            let mut entry = Entry {
                name: name.into_owned(),
                files: Vec::new(),
                bytes: 0,
                modified: SystemTime::UNIX_EPOCH,
                missing: 0,
                checkpoint: Some(folder.to_owned()),
            };
            weights.into_iter().for_each(|path| entry.take(path));
            self.checkpoints.push(entry);
        }
        Ok(())
    }

    fn add(&mut self, folder: &Path, path: &Path) {
        let split = SplitName::of(path);
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let (name, count) = match &split {
            Some(split) => (split.prefix.clone(), split.count),
            None => (stem.into_owned(), 1),
        };
        let key = (folder.to_owned(), name.clone(), count);
        let entry = self.ggufs.entry(key).or_insert_with(|| Entry {
            name,
            files: Vec::new(),
            bytes: 0,
            modified: SystemTime::UNIX_EPOCH,
            missing: count,
            checkpoint: None,
        });
        entry.take(path.to_owned());
        entry.missing = entry.missing.saturating_sub(1);
    }
}

impl Entry {
    fn take(&mut self, path: PathBuf) {
        if let Ok(about) = fs::metadata(&path) {
            self.bytes += about.len();
            let written = about.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            self.modified = self.modified.max(written);
        }
        self.files.push(path);
    }
}

/// No model, or more than one, is called so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unknown {
    /// None; perhaps one of these was meant.
    #[error("no file and no pulled model is called {name:?}{}; `fewbit list` shows all, `fewbit pull` gets one", or_near(.near))]
    None {
        /// What was asked for.
        name: String,
        /// Names like it, the likest first.
        near: Vec<String>,
    },
    /// Several.
    #[error("{name:?} is the name of several models: {}", .all.join(", "))]
    Several {
        /// What was asked for.
        name: String,
        /// Their names.
        all: Vec<String>,
    },
}

fn or_near(names: &[String]) -> String {
    match names {
        [] => String::new(),
        names => format!("; near it: {}", names.join(", ")),
    }
}

/// The entry called `name`: by its name, the end of its path from a folder on, or as it was pulled
/// (`hf:org/repo:TYPE`); capitals do not matter where no name is meant exactly.
///
/// # Errors
/// [`Unknown`].
pub fn find<'a>(folder: &Path, entries: &'a [Entry], name: &str) -> Result<&'a Entry, Unknown> {
    if let Some(entry) = entries.iter().find(|entry| entry.name == name) {
        return Ok(entry);
    }
    let wanted = name.strip_prefix("hf:").unwrap_or(name).to_lowercase();
    let wanted = wanted.trim_end_matches(".gguf");
    let is_called = |entry: &&Entry| {
        let long = long_name(folder, entry).to_lowercase();
        let ends = |wanted: &str| long == wanted || long.ends_with(&format!("/{wanted}"));
        let pulled = || {
            let (repository, kind) = wanted.rsplit_once(':')?;
            Some(long.starts_with(&format!("{repository}/")) && long.ends_with(kind))
        };
        ends(wanted) || pulled().unwrap_or(false)
    };
    let called: Vec<&Entry> = entries.iter().filter(is_called).collect();
    match called[..] {
        [entry] => Ok(entry),
        [] => {
            let score = |entry: &Entry| strsim::jaro_winkler(&entry.name.to_lowercase(), wanted);
            let mut near: Vec<(f64, &Entry)> = entries
                .iter()
                .map(|entry| (score(entry), entry))
                .filter(|(score, entry)| {
                    *score >= ALIKE || entry.name.to_lowercase().contains(wanted)
                })
                .collect();
            near.sort_by(|a, b| b.0.total_cmp(&a.0));
            let near = near.into_iter().take(NEAR);
            Err(Unknown::None {
                name: name.to_owned(),
                near: near.map(|(_, entry)| entry.name.clone()).collect(),
            })
        }
        _ => Err(Unknown::Several {
            name: name.to_owned(),
            all: called.iter().map(|entry| entry.name.clone()).collect(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_with(files: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in files {
            let path = folder.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "12345").unwrap();
        }
        folder
    }

    fn names(entries: &[Entry]) -> Vec<&str> {
        let mut names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
        names.sort();
        names
    }

    #[test]
    fn splits_are_one_model_and_equal_names_carry_their_folders() {
        let folder = folder_with(&[
            "a/one/model-Q4_0.gguf",
            "b/two/model-Q4_0.gguf",
            "b/two/big-Q8_0-00001-of-00003.gguf",
            "b/two/big-Q8_0-00002-of-00003.gguf",
            "b/two/half.gguf.part",
            "c/three/config.json",
            "c/three/model.safetensors",
        ]);
        let entries = list(folder.path()).unwrap();
        assert_eq!(
            names(&entries),
            ["a/one/model-Q4_0", "b/two/model-Q4_0", "big-Q8_0", "three"]
        );
        let big = entries.iter().find(|entry| entry.name == "big-Q8_0");
        let big = big.unwrap();
        assert_eq!((big.files.len(), big.bytes, big.missing), (2, 10, 1));
        assert!(big.path().ends_with("big-Q8_0-00001-of-00003.gguf"));
        let three = entries.iter().find(|entry| entry.name == "three").unwrap();
        assert!(three.path().ends_with("c/three"));
        assert!(list(&folder.path().join("nothing")).unwrap().is_empty());
    }

    #[test]
    fn a_model_is_found_by_what_people_call_it() {
        let folder = folder_with(&[
            "HuggingFaceTB/SmolLM2-135M-GGUF/SmolLM2-135M-Q8_0.gguf",
            "HuggingFaceTB/SmolLM2-135M-GGUF/SmolLM2-135M-Q4_0.gguf",
            "x/y/other-Q4_0.gguf",
        ]);
        let entries = list(folder.path()).unwrap();
        let find = |name: &str| find(folder.path(), &entries, name).map(|entry| entry.name.clone());
        for name in [
            "SmolLM2-135M-Q8_0",
            "smollm2-135m-q8_0",
            "SmolLM2-135M-Q8_0.gguf",
            "SmolLM2-135M-GGUF/SmolLM2-135M-Q8_0",
            "hf:HuggingFaceTB/SmolLM2-135M-GGUF:Q8_0",
            "HuggingFaceTB/SmolLM2-135M-GGUF:q8_0",
        ] {
            assert_eq!(find(name).as_deref(), Ok("SmolLM2-135M-Q8_0"), "{name}");
        }
        let wrong = find("SmolLM-135M-Q8").unwrap_err().to_string();
        assert!(wrong.contains("near it: SmolLM2-135M-Q8_0"), "{wrong}");
        let wrong = find("mixtral").unwrap_err().to_string();
        assert!(!wrong.contains("near"), "{wrong}");
        assert!(matches!(find("hf:x/y:Q8_0"), Err(Unknown::None { .. })));
    }
}
