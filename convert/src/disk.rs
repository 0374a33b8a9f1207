//! Questions to the file system: is there room, is it written.

use std::ffi::CString;
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
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
    let path = CString::new(folder.as_os_str().as_bytes()).ok()?;
    let mut stat = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `path` is a C string and `stat` has room for the result.
    if unsafe { libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: statvfs returned 0, so it has filled `stat`.
    let stat = unsafe { stat.assume_init() };
    #[allow(clippy::unnecessary_cast)] // the fields' widths differ between systems
    Some(stat.f_bavail as u64 * stat.f_frsize as u64)
}
