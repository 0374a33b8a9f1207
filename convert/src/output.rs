//! A file on its way to its name: it grows as `OUT.partial`, under a lock, and becomes `OUT` in one step when it is whole.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use fewbit::gguf::with_suffix;
use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::disk;
use crate::error::{Error, Result};

/// An output that is being written.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    partial: PathBuf,
    force: bool,
    /// Held until the file has its name; file systems exist that have no locks.
    _lock: Option<File>,
}

impl Output {
    /// Whether a file may be written under this name; asked before anything else, since reading inputs takes time.
    ///
    /// # Errors
    /// If it is a folder, or exists and `force` does not say that it may be replaced.
    pub fn check(path: &Path, force: bool) -> Result<()> {
        match fs::symlink_metadata(path) {
            Err(_) => Ok(()),
            Ok(_) if path.is_dir() => Err(Error::OutputIsFolder(path.to_owned())),
            Ok(_) if force => Ok(()),
            Ok(_) => Err(Error::Exists(path.to_owned())),
        }
    }

    /// Fails if writing under this name would destroy one of `inputs`: as the file itself, or as one of those beside it.
    pub fn refuse_inputs<'a>(path: &Path, inputs: impl Iterator<Item = &'a Path>) -> Result<()> {
        let partial = with_suffix(path, ".partial");
        let journal = with_suffix(&partial, ".json");
        let record = with_suffix(&journal, ".new");
        let identity = |path: &Path| fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
        let written = [path.to_owned(), partial, journal, record];
        let written = written.map(|path| (identity(&path), path));
        for input in inputs {
            let input = identity(input);
            if let Some((_, path)) = written.iter().find(|(w, _)| w.is_some() && *w == input) {
                return Err(Error::OutputIsInput(path.clone()));
            }
        }
        Ok(())
    }

    /// Creates the partial file, or takes up that of an earlier run, and holds it against other writers of the same output.
    pub fn claim(path: &Path, force: bool) -> Result<Output> {
        let partial = with_suffix(path, ".partial");
        let lock = loop {
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&partial)
                .map_err(Error::io("create", &partial))?;
            let locked = match file.try_lock() {
                Ok(()) => true,
                Err(fs::TryLockError::WouldBlock) => {
                    let what = "another conversion is writing this file";
                    return Err(Error::input(&partial, what));
                }
                Err(fs::TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => false,
                Err(fs::TryLockError::Error(e)) => return Err(Error::io("lock", &partial)(e)),
            };
            // Who held the lock before may have renamed or removed the file since it was opened here.
            let held = file.metadata().map_err(Error::io("open", &partial))?;
            let named = fs::metadata(&partial);
            if named.is_ok_and(|named| (named.dev(), named.ino()) == (held.dev(), held.ino())) {
                break locked.then_some(file);
            }
        };
        let output = Output {
            path: path.to_owned(),
            partial,
            force,
            _lock: lock,
        };
        // Another run may have finished meanwhile.
        if let Err(error) = Output::check(path, force) {
            output.discard_empty();
            return Err(error);
        }
        Ok(output)
    }

    /// Where to write.
    pub fn partial(&self) -> &Path {
        &self.partial
    }

    /// Gives the whole file its name and brings that to the disk.
    ///
    /// # Errors
    /// Without `force` also if a file of this name has come up; it is then kept.
    pub fn finish(self) -> Result<()> {
        let (from, to) = (&self.partial, &self.path);
        let renamed = if self.force {
            fs::rename(from, to)
        } else {
            match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
                Err(rustix::io::Errno::EXIST) => return Err(Error::Exists(to.clone())),
                // Not every file system can tell; then the question and the rename are two steps.
                Err(
                    rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::NOTSUP,
                ) => {
                    Output::check(to, false)?;
                    fs::rename(from, to)
                }
                other => other.map_err(io::Error::from),
            }
        };
        renamed.map_err(Error::io("rename the finished file to", to))?;
        disk::sync_folder_of(to)
    }

    /// Removes what was written.
    pub fn discard(self) {
        let _ = fs::remove_file(&self.partial); // an error before this one is the one to report
    }

    /// Removes the partial file if nothing is in it.
    fn discard_empty(self) {
        if fs::metadata(&self.partial).is_ok_and(|found| found.len() == 0) {
            self.discard();
        }
    }
}
