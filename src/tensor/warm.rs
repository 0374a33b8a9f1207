//! Bringing a file into memory before it is needed.
//!
//! A mapped file that is not in memory comes in by page faults, small and one after the other. Reading it
//! once beforehand, in large pieces and with several threads, is several times as fast.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::direct::{READ, READERS, read_at};

/// Places at which a file is looked at to see whether it is in memory.
#[cfg(target_os = "linux")]
const SAMPLES: u64 = 256;

/// Reads `files` through the page cache, unless nearly all of them is there; `progress` gets bytes
/// that were read. Where one cannot be read, the rest is left: a fault will tell.
pub fn warm(files: &[PathBuf], progress: &(dyn Fn(u64) + Sync)) {
    for path in files {
        let Ok(file) = File::open(path) else { return };
        let Ok(len) = file.metadata().map(|data| data.len()) else {
            return;
        };
        if is_in_memory(&file, len) {
            progress(len);
            continue;
        }
        let next = AtomicUsize::new(0);
        let reader = || -> io::Result<()> {
            let mut buffer = vec![0; READ];
            loop {
                let start = next.fetch_add(1, Ordering::Relaxed) as u64 * READ as u64;
                if start >= len {
                    return Ok(());
                }
                let count = read_at(&file, &mut buffer, start)?;
                progress(count as u64);
                if count == 0 {
                    return Ok(());
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..READERS {
                scope.spawn(reader);
            }
        });
    }
}

/// Whether a file is in memory, judged by single bytes all over it that are read only if that takes no disk.
#[cfg(target_os = "linux")]
fn is_in_memory(file: &File, len: u64) -> bool {
    use rustix::io::{Errno, IoSliceMut, ReadWriteFlags, preadv2};
    let misses = (0..SAMPLES).filter(|sample| {
        let mut byte = [0];
        let offset = (u128::from(len) * u128::from(*sample) / u128::from(SAMPLES)) as u64;
        let buffers = &mut [IoSliceMut::new(&mut byte)];
        preadv2(file, buffers, offset, ReadWriteFlags::NOWAIT) == Err(Errno::AGAIN)
    });
    misses.count() as u64 <= SAMPLES / 50
}

#[cfg(not(target_os = "linux"))]
fn is_in_memory(_: &File, _: u64) -> bool {
    false
}
