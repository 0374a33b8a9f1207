//! The slots' memory.
//!
//! Reads past the page cache go straight into it, and there large pages pay: one read of several megabytes is one
//! request to the disk if it goes into a few of them, and several if it goes into a thousand small ones. On a
//! virtual disk that made 0.85 GB/s of 2.0. A system whose memory is in pieces does not give large pages at
//! the first touch, so each is asked for until it is there; and what lies on small ones is read through a
//! buffer that does not.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};

use memmap2::MmapMut;

use crate::tensor::direct;

/// Bytes of a large page. Where the system's are of another size, nothing is asked for.
const LARGE: usize = 2 << 20;
/// What is known of a large page: that it is there, or else how often it was asked for in vain.
const THERE: u8 = u8::MAX;
/// One is asked for so often, each time that something is read into it.
const TRIES: u8 = 4;

/// Memory that its user hands out: no two users have the same part unless both read.
pub struct Memory {
    map: MmapMut,
    /// The first large page's beginning.
    start: *mut u8,
    len: usize,
    /// What is known of each large page.
    pages: Vec<AtomicU8>,
}

// SAFETY: `start` points into `map`, which lives as long. Its bytes are handed out by `read` and
// `write` alone, whose callers keep them apart.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// `bytes` of it, none of them touched yet.
    ///
    /// # Errors
    /// When there is not so much.
    pub fn new(bytes: usize) -> io::Result<Self> {
        let pages = bytes.div_ceil(LARGE).max(1);
        let mut map = direct::memory((pages + 1) * LARGE)?;
        let first = map.as_ptr().align_offset(LARGE);
        let start = map[first..].as_mut_ptr();
        Ok(Self {
            map,
            start,
            len: pages * LARGE,
            pages: (0..pages).map(|_| AtomicU8::new(0)).collect(),
        })
    }

    /// Whether a range lies on large pages, after these were asked for.
    pub fn is_large(&self, range: &Range<usize>) -> bool {
        let mut all = true;
        for index in range.start / LARGE..range.end.div_ceil(LARGE) {
            let page = &self.pages[index];
            let tries = page.load(Ordering::Relaxed);
            if tries == THERE {
                continue;
            }
            if tries < TRIES && direct::enlarge(&self.map, self.offset(index), LARGE) {
                page.store(THERE, Ordering::Relaxed);
                continue;
            }
            all = false;
            // Another reader may ask at the same time: what is lost is a try.
            page.store(tries.saturating_add(1).min(TRIES), Ordering::Relaxed);
        }
        all
    }

    /// Where a large page begins in the map.
    fn offset(&self, page: usize) -> usize {
        (self.start as usize - self.map.as_ptr() as usize) + page * LARGE
    }

    /// # Safety
    /// Nobody writes the range while the result is alive.
    pub unsafe fn read(&self, range: Range<usize>) -> &[u8] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the mapping; not written, as the caller promises.
        unsafe { std::slice::from_raw_parts(self.start.add(range.start), range.len()) }
    }

    /// # Safety
    /// Nobody else has the range while the result is alive.
    #[allow(clippy::mut_from_ref)] // disjointness is the caller's contract
    pub unsafe fn write(&self, range: Range<usize>) -> &mut [u8] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the mapping; exclusive, as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_can_be_had_and_large_pages_change_nothing() {
        let memory = Memory::new(LARGE + 5000).unwrap();
        let range = LARGE - 3000..LARGE + 5000;
        // SAFETY: nobody else has this memory.
        unsafe { memory.write(range.clone()) }.fill(7);
        let before = memory.is_large(&range);
        // What is there stays there, whether the system has large pages to give or not.
        assert!(!before || memory.is_large(&range));
        // SAFETY: as above; it is only read from here on.
        let (written, rest) = unsafe { (memory.read(range), memory.read(0..LARGE - 3000)) };
        assert!(written.iter().all(|&byte| byte == 7));
        assert!(rest.iter().all(|&byte| byte == 0));
    }
}
