//! One file on its way to the disk.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use ureq::http::{HeaderMap, StatusCode, header};

use super::http::{Http, text};
use super::{Error, Wanted, Watch};
use crate::gguf::with_suffix;

/// Bytes that are read at a time.
const PIECE: usize = 1 << 20;
/// Room that is left on a disk.
const SPARE: u64 = 64 << 20;

/// A file that is there.
pub(super) struct Got {
    pub(super) bytes: u64,
    pub(super) downloaded: u64,
    pub(super) sha256: Option<String>,
}

/// Fails if what is still to come does not fit on the disk.
pub(super) fn check_room(folder: &Path, wanted: &[Wanted]) -> Result<(), Error> {
    let missing = |wanted: &Wanted| {
        let path = folder.join(&wanted.path);
        let there = [path.clone(), with_suffix(&path, PART)].map(|path| length(&path));
        let there = there.into_iter().flatten().max().unwrap_or(0);
        wanted.bytes.unwrap_or(0).saturating_sub(there)
    };
    let needed: u64 = wanted.iter().map(missing).sum();
    match free(folder) {
        Some(free) if needed > 0 && needed + SPARE > free => Err(Error::Room {
            folder: folder.to_owned(),
            needed: needed + SPARE,
            free,
        }),
        _ => Ok(()),
    }
}

/// Bytes free for us where `folder` is, or is going to be.
fn free(folder: &Path) -> Option<u64> {
    #[cfg(target_os = "linux")]
    {
        let there = folder.ancestors().find(|folder| folder.is_dir())?;
        let disk = rustix::fs::statvfs(there).ok()?;
        Some(disk.f_bavail.saturating_mul(disk.f_frsize))
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = folder;
        None
    }
}

const PART: &str = ".part";
/// Beside a part: what its server calls this state of the file, so that a later run does not go on with another one.
const STATE: &str = ".part.etag";

fn length(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|about| about.len())
}

fn failed(file: &Path, action: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::File {
        file: file.to_owned(),
        action,
        source,
    }
}

/// Gets a file, or what is missing of it, unless it is there.
pub(super) fn get(
    http: &Http,
    wanted: &Wanted,
    folder: &Path,
    watch: &dyn Watch,
) -> Result<Got, Error> {
    let target = folder.join(&wanted.path);
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    if let Some(bytes) = length(&target) {
        return there(http, wanted, &target, bytes);
    }
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent).map_err(failed(parent, "make the folder"))?;
    }
    let mut part = Part::open(&target)?;
    let mut patience = http.patience();
    let mut total = wanted.bytes;
    let mut begun = false;
    loop {
        let before = part.len;
        let attempt = part.go_on(http, wanted, &mut total, &mut |part, total, came| {
            if !begun {
                begun = true;
                watch.begin(&name, total, part);
            }
            watch.advance(came);
        });
        match attempt {
            Ok(()) => break,
            Err(error) => {
                if part.len > before {
                    patience.renew();
                }
                patience.wait(error, watch)?;
            }
        }
    }
    let (bytes, downloaded) = (part.len, part.downloaded);
    let found = part.finish(&target, wanted)?;
    Ok(Got {
        bytes,
        downloaded,
        sha256: wanted.sha256.as_ref().map(|_| found),
    })
}

/// What `target`, which exists, is: the file that is wanted, or another of its name.
fn there(http: &Http, wanted: &Wanted, target: &Path, bytes: u64) -> Result<Got, Error> {
    // A name is given to what is whole only; a hub's hash was compared then.
    let (is_it, length) = match (wanted.bytes, &wanted.sha256) {
        (Some(length), _) => (length == bytes, length),
        (None, Some(sum)) => {
            let mut file = File::open(target).map_err(failed(target, "open it"))?;
            let (hash, _) = hash(&mut file).map_err(failed(target, "read it"))?;
            (hex(&hash.finalize()) == *sum, bytes)
        }
        (None, None) => {
            let response = http.get(&wanted.url, &[])?;
            let length = response.body().content_length().unwrap_or(0);
            (length == bytes, length)
        }
    };
    match is_it {
        true => Ok(Got {
            bytes,
            downloaded: 0,
            sha256: wanted.sha256.clone(),
        }),
        false => Err(Error::Exists {
            file: target.to_owned(),
            found: bytes,
            wanted: length,
        }),
    }
}

/// A file that grows.
struct Part {
    path: PathBuf,
    state: PathBuf,
    file: File,
    len: u64,
    hash: Sha256,
    /// Bytes that came in this run.
    downloaded: u64,
}

impl Part {
    /// The part beside `target`, what an earlier run left included.
    fn open(target: &Path) -> Result<Self, Error> {
        let (path, state) = (with_suffix(target, PART), with_suffix(target, STATE));
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(failed(&path, "create it"))?;
        match file.try_lock() {
            // File systems exist that have no locks.
            Ok(()) | Err(TryLockError::Error(_)) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Busy {
                    file: target.to_owned(),
                });
            }
        }
        let (hash, len) = hash(&mut file).map_err(failed(&path, "read it"))?;
        Ok(Self {
            path,
            state,
            file,
            len,
            hash,
            downloaded: 0,
        })
    }

    /// Starts from nothing.
    fn clear(&mut self) -> Result<(), Error> {
        let failed = failed(&self.path, "write it");
        self.file.set_len(0).map_err(&failed)?;
        self.file.seek(SeekFrom::Start(0)).map_err(&failed)?;
        self.len = 0;
        self.hash = Sha256::new();
        let _ = fs::remove_file(&self.state); // absent, as a rule
        Ok(())
    }

    /// Makes one request for what is missing. `came(there, total, bytes)` is told of every piece.
    fn go_on(
        &mut self,
        http: &Http,
        wanted: &Wanted,
        total: &mut Option<u64>,
        came: &mut dyn FnMut(u64, Option<u64>, u64),
    ) -> Result<(), Error> {
        if total.is_some_and(|total| self.len > total) {
            self.clear()?;
        }
        if *total == Some(self.len) && self.len > 0 {
            came(self.len, *total, 0);
            return Ok(());
        }
        let known = fs::read_to_string(&self.state).ok();
        // Without a hash to compare with or the server's word, a part may be another file's.
        if self.len > 0 && known.is_none() && wanted.sha256.is_none() {
            self.clear()?;
        }
        let mut headers = Vec::new();
        if self.len > 0 {
            headers.push((header::RANGE, format!("bytes={}-", self.len)));
            headers.extend(known.map(|state| (header::IF_RANGE, state)));
        }
        let mut response = match http.get(&wanted.url, &headers) {
            // The part is as long as the file, or longer.
            Err(Error::Status { status, .. })
                if status == StatusCode::RANGE_NOT_SATISFIABLE && self.len > 0 =>
            {
                self.clear()?;
                http.get(&wanted.url, &[])?
            }
            response => response?,
        };
        let starts_at = match response.status() {
            StatusCode::PARTIAL_CONTENT => first_byte(response.headers()),
            _ => Some(0),
        };
        if starts_at != Some(self.len) {
            if starts_at != Some(0) {
                self.clear()?;
                response = http.get(&wanted.url, &[])?;
            }
            self.clear()?;
        }
        let rest = response.body().content_length();
        let announced = rest.map(|rest| self.len + rest);
        match (*total, announced) {
            (Some(total), Some(announced)) if total != announced => {
                return Err(Error::Answer {
                    url: super::bare(&wanted.url),
                    problem: format!("is {announced} bytes, not {total}: it changed; pull again"),
                });
            }
            (None, announced) => *total = announced,
            _ => {}
        }
        if self.len == 0
            && let Some(state) = state(response.headers())
        {
            fs::write(&self.state, state).map_err(failed(&self.state, "write it"))?;
        }
        came(self.len, *total, 0);
        let mut body = response.body_mut().as_reader();
        let mut piece = vec![0; PIECE];
        loop {
            let read = match body.read(&mut piece) {
                Ok(0) => break,
                Ok(read) => &piece[..read],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Error::connection(&wanted.url, ureq::Error::from(error))),
            };
            // No more than was announced: the disk is not the server's.
            if total.is_some_and(|total| self.len + read.len() as u64 > total) {
                break;
            }
            let failed = failed(&self.path, "write it");
            self.file.write_all(read).map_err(failed)?;
            self.hash.update(read);
            self.len += read.len() as u64;
            self.downloaded += read.len() as u64;
            came(self.len, *total, read.len() as u64);
        }
        match *total {
            Some(bytes) if bytes != self.len => Err(Error::Cut {
                url: super::bare(&wanted.url),
                at: self.len,
                bytes,
            }),
            _ => Ok(()),
        }
    }

    /// Compares the hash and gives the file its name.
    fn finish(self, target: &Path, wanted: &Wanted) -> Result<String, Error> {
        let found = hex(&self.hash.clone().finalize());
        if let Some(sum) = wanted.sha256.as_ref().filter(|sum| **sum != found) {
            let error = Error::Hash {
                url: super::bare(&wanted.url),
                found,
                wanted: sum.clone(),
            };
            self.discard();
            return Err(error);
        }
        self.file
            .sync_all()
            .map_err(failed(&self.path, "write it"))?;
        fs::rename(&self.path, target).map_err(failed(target, "give the file its name"))?;
        let _ = fs::remove_file(&self.state); // absent, where the server did not name the state
        if let Some(folder) = target.parent().and_then(|folder| File::open(folder).ok()) {
            let _ = folder.sync_all(); // not every file system can
        }
        Ok(found)
    }

    fn discard(self) {
        let _ = fs::remove_file(&self.path); // an error before this one is the one to report
        let _ = fs::remove_file(&self.state);
    }
}

/// The first byte that a partial answer holds: `Content-Range: bytes FIRST-LAST/LENGTH`.
fn first_byte(headers: &HeaderMap) -> Option<u64> {
    let range = text(headers, header::CONTENT_RANGE)?.strip_prefix("bytes ")?;
    range.split('-').next()?.trim().parse().ok()
}

/// What the server calls this state of the file; weak tags say nothing about bytes.
fn state(headers: &HeaderMap) -> Option<&str> {
    let tag = text(headers, header::ETAG).filter(|tag| !tag.starts_with("W/"));
    tag.or_else(|| text(headers, header::LAST_MODIFIED))
}

/// The hash so far and the length of what `file` holds from here on.
fn hash(file: &mut File) -> io::Result<(Sha256, u64)> {
    let (mut hash, mut len, mut piece) = (Sha256::new(), 0, vec![0; PIECE]);
    loop {
        let read = file.read(&mut piece)?;
        if read == 0 {
            return Ok((hash, len));
        }
        hash.update(&piece[..read]);
        len += read as u64;
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
