//! Reads that leave nothing in the page cache.
//!
//! A model that is larger than memory must decide itself what is kept: bytes that the system keeps
//! as well are bytes less for experts. So files are read with `O_DIRECT`, which wants offsets,
//! lengths and buffers in whole units of [`ALIGN`]: a read is widened to those borders, and what
//! was wanted lies somewhere inside. Where a file system has no such reads, they go through the
//! page cache, and the system is told to forget them.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use memmap2::MmapMut;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

use crate::gguf::Gguf;

/// Unit of offsets, lengths and buffers. Disks have blocks of 512 or of 4096 bytes.
pub const ALIGN: usize = 4096;

/// Readers: enough to keep a queue at any disk.
pub const READERS: usize = 4;
/// Bytes of one read: several megabytes, as disks like them, and short enough that a needed read does not
/// wait long for one that was begun on suspicion.
pub const READ: usize = 4 << 20;

/// Memory to read into, in large pages where the system has them: a read of several megabytes is then one
/// request to the disk instead of one for every few hundred small pages, which nearly doubles its speed on some.
///
/// # Errors
/// When there is no such memory.
pub fn memory(bytes: usize) -> io::Result<MmapMut> {
    let map = MmapMut::map_anon(bytes.max(1))?;
    // Where there are no large pages, all works as well.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Ok(map)
}

/// Asks for one large page in place of the small ones under `len` bytes of `map` from `offset` on; whether it is
/// there now. What the memory holds stays as it is.
///
/// # Panics
/// If that is not within the map.
#[cfg(target_os = "linux")]
pub fn enlarge(map: &MmapMut, offset: usize, len: usize) -> bool {
    assert!(offset <= map.len() && len <= map.len() - offset);
    // SAFETY: the range is inside a mapping of our own; the advice moves its bytes to another page and changes
    // none of them.
    unsafe {
        let start = map.as_ptr().add(offset).cast_mut();
        libc::madvise(start.cast(), len, libc::MADV_COLLAPSE) == 0
    }
}

/// There is nothing to ask for.
#[cfg(not(target_os = "linux"))]
pub fn enlarge(_: &MmapMut, _: usize, _: usize) -> bool {
    true
}

/// Why bytes of a file cannot be had.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened.
    #[error("{}: cannot open the file: {source}", file.display())]
    Open {
        /// The file.
        file: PathBuf,
        /// The system's reason.
        source: Arc<io::Error>,
    },
    /// A read failed.
    #[error("{}: cannot read at byte {offset}: {source}; check the disk", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Where.
        offset: u64,
        /// The system's reason.
        source: Arc<io::Error>,
    },
    /// The file has become shorter than its own tensor table says.
    #[error("{}: ends before byte {end}, which held weights when the model was loaded: it was cut off meanwhile; copy or convert it again", file.display())]
    Shrunk {
        /// The file.
        file: PathBuf,
        /// The byte up to which there must be something.
        end: u64,
    },
}

/// A part of a file between two borders of [`ALIGN`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The file among those of the model.
    pub file: usize,
    /// The first byte: a multiple of [`ALIGN`].
    pub offset: u64,
    /// Bytes: a multiple of [`ALIGN`]. The last of them may lie beyond the file's end.
    pub len: usize,
    /// Of those, how many must be there.
    pub needed: usize,
}

impl Piece {
    /// What must be read for `len` bytes at `offset`.
    pub fn around(file: usize, offset: u64, len: u64) -> Self {
        let align = ALIGN as u64;
        let (start, end) = (offset / align * align, offset + len);
        Self {
            file,
            offset: start,
            len: (end.div_ceil(align) * align - start) as usize,
            needed: (end - start) as usize,
        }
    }

    /// The same in pieces of at most `most` bytes, a multiple of [`ALIGN`].
    pub fn cut(self, most: usize) -> impl Iterator<Item = Self> {
        debug_assert!(most > 0 && most.is_multiple_of(ALIGN));
        (0..self.len).step_by(most).map(move |start| Self {
            offset: self.offset + start as u64,
            len: most.min(self.len - start),
            needed: self.needed.saturating_sub(start).min(most),
            ..self
        })
    }
}

/// A model's files, open for such reads.
pub struct Files {
    files: Vec<(PathBuf, File)>,
    /// Why they go through the page cache, if they do.
    buffered: Option<String>,
}

impl Files {
    /// Opens every file of `gguf`.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub fn open(gguf: &Gguf) -> Result<Self, Error> {
        Self::of(&gguf.files)
    }

    /// Opens files, of whatever kind.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub fn of(paths: impl IntoIterator<Item = impl AsRef<Path>>) -> Result<Self, Error> {
        let mut files = Self {
            files: Vec::new(),
            buffered: None,
        };
        for path in paths {
            let path = path.as_ref().to_owned();
            let failed = |source| Error::Open {
                file: path.clone(),
                source: Arc::new(source),
            };
            let plain = File::open(&path).map_err(failed)?;
            let file = match open_direct(&path) {
                Ok(direct) => direct,
                Err(reason) => {
                    let reason = format!("{}: no O_DIRECT: {reason}", path.display());
                    files.buffered.get_or_insert(reason);
                    plain
                }
            };
            files.files.push((path, file));
        }
        Ok(files)
    }

    /// Why reads go through the page cache; `None` where they do not.
    pub fn buffered_because(&self) -> Option<&str> {
        self.buffered.as_deref()
    }

    /// The path of a file.
    pub fn path(&self, file: usize) -> &Path {
        &self.files[file].0
    }

    /// Bytes a second that come from the disk as experts are read: several threads read matrices of 32 MiB, piece by
    /// piece, here and there in the first file, for about `time`. (One long read would say more than experts get,
    /// where a disk or its host reads ahead.)
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn speed(&self, time: Duration) -> Result<f64, Error> {
        /// Pieces of a matrix, and matrices that are drawn.
        const PIECES: usize = 8;
        const MATRICES: usize = 1 << 12;
        let (path, file) = &self.files[0];
        let failed = |source| Error::Open {
            file: path.clone(),
            source: Arc::new(source),
        };
        let len = file.metadata().map_err(failed)?.len();
        let pieces: Vec<_> = Piece::around(0, 0, len).cut(READ).collect();
        let matrices = pieces.len().div_ceil(PIECES);
        // Other places each time: what was read a moment ago may come from some cache.
        let seed = SystemTime::now().duration_since(UNIX_EPOCH);
        let mut rng = ChaCha8Rng::seed_from_u64(seed.map_or(0, |since| since.as_nanos() as u64));
        let places: Vec<usize> = (0..MATRICES)
            .map(|_| rng.random_range(0..matrices))
            .collect();
        let start = Instant::now();
        let next = AtomicUsize::new(0);
        let reader = || {
            let mut buffer = memory(READ).map_err(failed)?;
            let mut bytes = 0;
            while start.elapsed() < time {
                let turn = next.fetch_add(1, Ordering::Relaxed);
                let place = places[turn / PIECES % MATRICES] * PIECES + turn % PIECES;
                let piece = pieces[place % pieces.len()];
                self.read(piece, &mut buffer)?;
                bytes += piece.needed;
            }
            Ok(bytes)
        };
        let bytes: Result<Vec<usize>, Error> = std::thread::scope(|scope| {
            let readers: Vec<_> = (0..READERS).map(|_| scope.spawn(reader)).collect();
            let join = |reader: std::thread::ScopedJoinHandle<'_, _>| reader.join();
            let results = readers.into_iter().map(join);
            results.map(|bytes| bytes.expect("no panic")).collect()
        });
        Ok(bytes?.into_iter().sum::<usize>() as f64 / start.elapsed().as_secs_f64())
    }

    /// Reads `piece` into the beginning of `buffer`, which lies at a multiple of [`ALIGN`].
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Shrunk`].
    pub fn read(&self, piece: Piece, buffer: &mut [u8]) -> Result<(), Error> {
        let buffer = &mut buffer[..piece.len];
        let (path, file) = &self.files[piece.file];
        let mut done = 0;
        while done < piece.needed {
            let offset = piece.offset + done as u64;
            match read_at(file, &mut buffer[done..], offset) {
                // Within a unit reads do not go on: either the file ends there, or it is read again.
                Ok(count) if count > 0 && done + count >= piece.needed => break,
                Ok(count) if count >= ALIGN => done += count / ALIGN * ALIGN,
                Ok(_) => {
                    return Err(Error::Shrunk {
                        file: path.clone(),
                        end: piece.offset + piece.needed as u64,
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(Error::Read {
                        file: path.clone(),
                        offset,
                        source: Arc::new(source),
                    });
                }
            }
        }
        if self.buffered.is_some() {
            forget(file, piece);
        }
        Ok(())
    }
}

/// Opens a file for reads past the page cache, and tries one.
#[cfg(target_os = "linux")]
fn open_direct(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    let mut page = MmapMut::map_anon(ALIGN)?;
    read_at(&file, &mut page, 0)?;
    Ok(file)
}

#[cfg(not(target_os = "linux"))]
fn open_direct(_: &Path) -> io::Result<File> {
    Err(io::Error::other("it exists on Linux only"))
}

#[cfg(unix)]
pub(super) fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, buffer, offset)
}

#[cfg(windows)]
pub(super) fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, buffer, offset)
}

/// Tells the system that a part of a file is not needed again. Nothing depends on its doing so.
#[cfg(target_os = "linux")]
fn forget(file: &File, piece: Piece) {
    let len = std::num::NonZeroU64::new(piece.len as u64);
    let _ = rustix::fs::fadvise(file, piece.offset, len, rustix::fs::Advice::DontNeed);
}

#[cfg(not(target_os = "linux"))]
fn forget(_: &File, _: Piece) {}

#[cfg(test)]
impl Files {
    /// One file, through the page cache.
    pub(crate) fn buffered(path: PathBuf) -> Self {
        let file = File::open(&path).expect("the test has made it");
        Self {
            files: vec![(path, file)],
            buffered: None,
        }
    }

    /// One file whose disk fails wherever it is read.
    pub(crate) fn failing() -> Self {
        // Nothing is mapped at low addresses, which reads answer with EIO.
        Self::buffered(PathBuf::from("/proc/self/mem"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn a_disk_that_fails_is_an_error_that_names_file_and_place() {
        let mut buffer = memory(ALIGN).unwrap();
        let piece = Piece::around(0, 5000, 10);
        let error = Files::failing().read(piece, &mut buffer).unwrap_err();
        let eio = io::Error::from_raw_os_error(libc::EIO);
        assert_eq!(
            error.to_string(),
            format!("/proc/self/mem: cannot read at byte 4096: {eio}; check the disk")
        );
    }

    #[test]
    fn a_piece_lies_between_borders_and_so_do_its_parts() {
        let piece = Piece::around(0, 5000, 20_000);
        assert_eq!(
            (piece.offset, piece.len, piece.needed),
            (4096, 24576, 20_904)
        );
        let parts: Vec<_> = piece.cut(8192).collect();
        let ends: Vec<_> = parts.iter().map(|p| (p.offset, p.len, p.needed)).collect();
        assert_eq!(
            ends,
            [(4096, 8192, 8192), (12288, 8192, 8192), (20480, 8192, 4520)]
        );
    }
}
