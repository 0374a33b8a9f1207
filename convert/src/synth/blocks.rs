//! Random blocks faster than an encoder makes them.
//!
//! Encoding takes a core a second for 30 MB of Q4_K, so every weight is not encoded anew. A
//! [`Pool`] holds a thousand chunks of normal weights, each properly encoded; a matrix is a random
//! sequence of them. Every block is what an encoder gives for normal weights, and rows
//! differ from one another, which is all that a benchmark can see.

use std::f32::consts::TAU;

use fewbit::quant::BlockType;
use rand::rngs::ChaCha8Rng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;

/// Weights that are dealt together: a whole number of blocks of every type.
pub const CHUNK: usize = 256;

/// Chunks in a pool: a power of two, few enough to stay in a core's cache.
const CHUNKS: usize = 1024;

/// Bytes that one stream of random numbers fills, and one thread at a time.
const PIECE_CHUNKS: usize = 4096;

/// Standard normal weights for all pools of a file.
pub struct Normals(Vec<f32>);

impl Normals {
    pub fn new(seed: u64) -> Self {
        Self(normals(seed, u64::MAX, CHUNKS * CHUNK, 1.0))
    }
}

/// `count` independent normal numbers of deviation `sigma`, by Box and Muller.
pub fn normals(seed: u64, stream: u64, count: usize, sigma: f32) -> Vec<f32> {
    let mut rng = stream_of(seed, stream);
    // In (0, 1], so that the logarithm is finite.
    let mut uniform = || ((rng.next_u32() >> 8) + 1) as f32 / (1 << 24) as f32;
    let mut numbers = Vec::with_capacity(count + 1);
    while numbers.len() < count {
        let radius = sigma * (-2.0 * uniform().ln()).sqrt();
        let angle = TAU * uniform();
        numbers.extend([radius * angle.cos(), radius * angle.sin()]);
    }
    numbers.truncate(count);
    numbers
}

/// The numbers from 0 to `count` - 1 in a random order.
pub fn ranks(seed: u64, stream: u64, count: usize) -> Vec<usize> {
    let mut ranks: Vec<usize> = (0..count).collect();
    ranks.shuffle(&mut stream_of(seed, stream | 1 << 39));
    ranks
}

/// Chunks of normal weights in blocks of one type.
pub struct Pool {
    bytes: Vec<u8>,
    chunk_bytes: usize,
}

impl Pool {
    /// Encodes weights of such a mean and deviation `sigma` in blocks of `kind`, which must have an encoder.
    pub fn new(kind: BlockType, mean: f32, sigma: f32, normals: &Normals) -> Self {
        let encode = kind
            .encoder()
            .expect("recipes name types that can be written");
        let chunk_bytes = kind.row_bytes(CHUNK).expect("a chunk holds whole blocks");
        let mut bytes = vec![0; CHUNKS * chunk_bytes];
        bytes
            .par_chunks_mut(chunk_bytes)
            .zip(normals.0.par_chunks(CHUNK))
            .for_each(|(encoded, normals)| {
                let weights: Vec<f32> = normals.iter().map(|x| mean + sigma * x).collect();
                encode(&weights, None, encoded);
            });
        Self { bytes, chunk_bytes }
    }

    /// Bytes of a chunk.
    pub fn chunk_bytes(&self) -> usize {
        self.chunk_bytes
    }

    /// Fills `out`, a whole number of chunks, with random ones. What they are depends on seed,
    /// tensor and part, not on the number of threads.
    pub fn deal(&self, seed: u64, tensor: u64, part: u64, out: &mut [u8]) {
        let pieces = out.par_chunks_mut(PIECE_CHUNKS * self.chunk_bytes);
        pieces.enumerate().for_each(|(piece, out)| {
            let mut rng = stream_of(seed, tensor << 40 | part << 20 | piece as u64);
            for out in out.chunks_exact_mut(self.chunk_bytes) {
                let chunk = rng.next_u32() as usize % CHUNKS;
                out.copy_from_slice(&self.bytes[chunk * self.chunk_bytes..][..self.chunk_bytes]);
            }
        });
    }
}

/// One of many independent sequences of random numbers under a seed.
fn stream_of(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    rng
}
