//! The golden file of the blocks, `fixtures/golden/blocks.json`: what ggml made of rows that
//! `quant_tests::rows` generates. The conformance suite writes it, `blocks.rs` reads it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use fewbit::quant::BlockType;
use quant_tests::rows::{Importance, Shape, SplitMix64, fingerprint};
use serde::{Deserialize, Serialize};

/// Columns of a golden row.
const COLS: usize = 1024;
/// Rows behind each fingerprint.
const ROWS: u64 = 4;
/// Blocks of random bytes that are decoded, each of another scale.
const BLOCKS: usize = 4;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Golden {
    /// Type → case → fingerprint of the encoded rows.
    pub encoded: BTreeMap<String, BTreeMap<String, String>>,
    /// Type → fingerprint of the bits that blocks of random bytes decode to.
    pub decoded: BTreeMap<String, Vec<Decoded>>,
}

/// A block, in hexadecimal, and the first weights that it decodes to.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Decoded {
    pub block: String,
    pub weights: Vec<f32>,
    /// Fingerprint of all its weights, as little-endian floats.
    pub all: String,
}

/// An encoder: type, row, importance.
pub type Encode<'a> = &'a dyn Fn(BlockType, &[f32], Option<&[f32]>) -> Vec<u8>;
/// A decoder: type, blocks.
pub type Decode<'a> = &'a dyn Fn(BlockType, &[u8]) -> Vec<f32>;

impl Golden {
    pub fn path() -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/golden/blocks.json")
    }

    /// What an encoder and a decoder make of the golden rows and blocks.
    pub fn of(encode: Encode, decode: Decode) -> Self {
        let kinds = || BlockType::ALL.iter().copied();
        let name = |kind: BlockType| kind.name().to_owned();
        Golden {
            encoded: kinds()
                .filter(|kind| kind.encoder().is_some())
                .map(|kind| (name(kind), encoded(kind, encode)))
                .collect(),
            decoded: kinds()
                .map(|kind| (name(kind), decoded(kind, decode)))
                .collect(),
        }
    }
}

fn encoded(kind: BlockType, encode: Encode) -> BTreeMap<String, String> {
    let mut cases = BTreeMap::new();
    for shape in Shape::ALL {
        let plain = (0..ROWS).flat_map(|seed| encode(kind, &shape.row(COLS, seed), None));
        let bytes: Vec<u8> = plain.collect();
        cases.insert(format!("{shape:?}"), hex(fingerprint(&bytes)));

        let weighted = (0..ROWS)
            .zip(Importance::ALL)
            .flat_map(|(seed, importance)| {
                let importance = importance.row(COLS, seed);
                encode(kind, &shape.row(COLS, seed), Some(&importance))
            });
        let bytes: Vec<u8> = weighted.collect();
        cases.insert(format!("{shape:?} weighted"), hex(fingerprint(&bytes)));
    }
    cases
}

fn decoded(kind: BlockType, decode: Decode) -> Vec<Decoded> {
    let mut random = SplitMix64::new(kind.id().into());
    let mut blocks = Vec::new();
    while blocks.len() < BLOCKS {
        let block: Vec<u8> = (0..kind.block_bytes())
            .map(|_| random.next_u64() as u8)
            .collect();
        let weights = decode(kind, &block);
        // JSON has no infinities and no NaN.
        if weights.iter().all(|weight| weight.is_finite()) {
            let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
            blocks.push(Decoded {
                block: block.iter().map(|byte| format!("{byte:02x}")).collect(),
                weights: weights.iter().copied().take(4).collect(),
                all: hex(fingerprint(&bytes)),
            });
        }
    }
    blocks
}

fn hex(fingerprint: u64) -> String {
    format!("{fingerprint:016x}")
}
