//! Questions to the file system: is there room, is it written.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Fails if the file system of `output` has no room for `needed` more bytes.
pub fn require(output: &Path, needed: u64) -> Result<()> {
    match available(&folder_of(output)) {
        Some(available) if available < needed => Err(Error::NoSpace {
            path: output.to_owned(),
            needed,
            available,
        }),
        _ => Ok(()), // where the system does not say, the write itself will
    }
}

/// Brings a rename in the folder of `path` to the disk.
pub fn sync_folder_of(path: &Path) -> Result<()> {
    let folder = folder_of(path);
    File::open(&folder)
        .and_then(|f| f.sync_all())
        .map_err(Error::io("write to disk", &folder))
}

fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Bytes that a file system has free for this user.
fn available(folder: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(folder).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}
