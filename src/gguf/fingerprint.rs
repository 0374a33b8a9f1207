//! What tells one file from another without reading all of it.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use sha2::{Digest, Sha256};

use super::Gguf;

/// Bytes from the middle of each tensor that count.
const SAMPLE: u64 = 64;
/// Bytes that are read at a time.
const PART: u64 = 1 << 16;

impl Gguf {
    /// A hash (SHA-256) of the header, as it is in the file, and of some bytes from the middle of each tensor: two files
    /// that share it hold the same model in the same types, unless somebody took pains. Reads a few megabytes at most.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn fingerprint(&self) -> io::Result<[u8; 32]> {
        let mut hash = Sha256::new();
        for (index, path) in self.files.iter().enumerate() {
            let mut file = File::open(path)?;
            let tensors = || self.tensors.iter().filter(|tensor| tensor.file == index);
            let header = tensors().map(|tensor| tensor.offset).min();
            let header = header.unwrap_or(u64::MAX);
            add(&mut hash, &mut file, header)?;
            for tensor in tensors() {
                let len = tensor.bytes.min(SAMPLE);
                let start = (tensor.bytes - len) / 2;
                file.seek(SeekFrom::Start(tensor.offset + start))?;
                add(&mut hash, &mut file, len)?;
            }
        }
        Ok(hash.finalize().into())
    }
}

/// Adds the next `len` bytes of `file`, or all that there are.
fn add(hash: &mut Sha256, file: &mut File, len: u64) -> io::Result<()> {
    let mut input = file.take(len);
    let mut part = vec![0; len.min(PART) as usize];
    loop {
        match input.read(&mut part)? {
            0 => return Ok(()),
            count => hash.update(&part[..count]),
        }
    }
}
