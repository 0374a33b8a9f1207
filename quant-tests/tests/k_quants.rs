//! K-quants against golden values of ggml, and against themselves.
//!
//! The digests were taken from ggml's `quantize_q*_K` and `dequantize_row_q*_K` on the rows
//! that [`Rows`] makes; the conformance suite compares with ggml itself, on many more.

use fewbit::quant::{BlockType, Scales16, ScalesAndMins8};
use proptest::prelude::*;

const K_QUANTS: [BlockType; 5] = [
    BlockType::Q2_K,
    BlockType::Q3_K,
    BlockType::Q4_K,
    BlockType::Q5_K,
    BlockType::Q6_K,
];
const SUPER_BLOCK: usize = 256;

/// Rows of two super-blocks in which every sub-block of 16 has a nature of its own. Made of
/// basic operations only, so that every machine makes the same bits.
struct Rows(u64);

impl Rows {
    /// SplitMix64.
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// From 0 to 1.
    fn uniform(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / 16_777_216.0
    }

    /// Nearly normal.
    fn normal(&mut self) -> f32 {
        (0..12).fold(-6.0, |sum, _| sum + self.uniform())
    }

    fn weights(&mut self) -> Vec<f32> {
        let mut row = vec![0.0; 2 * SUPER_BLOCK];
        for sub_block in row.chunks_mut(16) {
            let nature = self.bits() % 8;
            let (size, centre) = (self.uniform(), self.normal());
            for weight in sub_block {
                *weight = match nature {
                    0 => 0.0,
                    1 => centre,
                    2 => size * self.uniform(),
                    3 => -size * self.uniform(),
                    4 => centre + 1e-3 * self.normal(),
                    5 => self.normal() * self.normal() * self.normal(),
                    _ => 0.02 * self.normal(),
                };
            }
        }
        row
    }

    fn importance(&mut self) -> Vec<f32> {
        let one_in = 1 + self.bits() % 4;
        let mut draw = || {
            let (some, value) = (self.bits().is_multiple_of(one_in), self.normal());
            if some { value * value } else { 0.0 }
        };
        (0..2 * SUPER_BLOCK).map(|_| draw()).collect()
    }

    /// A block of random bytes, its f16 units finite.
    fn block(&mut self, kind: BlockType) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..kind.block_bytes()).map(|_| self.bits() as u8).collect();
        let units: &[usize] = match kind {
            BlockType::Q2_K => &[80, 82],
            BlockType::Q3_K => &[108],
            BlockType::Q4_K | BlockType::Q5_K => &[0, 2],
            BlockType::Q6_K => &[208],
            other => panic!("{other} is no K-quant"),
        };
        for unit in units {
            bytes[unit + 1] &= 0b1011_1111;
        }
        bytes
    }
}

fn encode(kind: BlockType, row: &[f32], importance: Option<&[f32]>) -> Vec<u8> {
    let mut bytes = vec![0; kind.row_bytes(row.len()).unwrap()];
    kind.encoder().unwrap()(row, importance, &mut bytes);
    bytes
}

fn decode(kind: BlockType, bytes: &[u8]) -> Vec<f32> {
    let mut row = vec![0.0; bytes.len() / kind.block_bytes() * SUPER_BLOCK];
    kind.decode_row(bytes, &mut row);
    row
}

/// FNV-1a, 64 bits.
fn digest(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Digests of 200 encoded rows, 200 rows encoded with importance, and 200 decoded blocks.
fn digests(kind: BlockType) -> [u64; 3] {
    let (mut plain, mut weighted, mut decoded) = (vec![], vec![], vec![]);
    let mut rows = Rows(u64::from(kind.id()));
    for _ in 0..200 {
        let (row, importance) = (rows.weights(), rows.importance());
        plain.extend(encode(kind, &row, None));
        weighted.extend(encode(kind, &row, Some(&importance)));
        let weights = decode(kind, &rows.block(kind));
        decoded.extend(weights.into_iter().flat_map(f32::to_le_bytes));
    }
    [digest(plain), digest(weighted), digest(decoded)]
}

#[test]
fn q2_k_is_that_of_ggml() {
    assert_eq!(
        digests(BlockType::Q2_K),
        [
            0xd375_b06f_12db_9928,
            0x7e42_cdb6_b6c8_3519,
            0xc67e_7424_d42e_08a4
        ]
    );
}

#[test]
fn q3_k_is_that_of_ggml() {
    assert_eq!(
        digests(BlockType::Q3_K),
        [
            0xf4b9_6609_0c3b_a86b,
            0xe46d_06b1_ca33_77cb,
            0x650d_626b_3ec9_1965
        ]
    );
}

#[test]
fn q4_k_is_that_of_ggml() {
    assert_eq!(
        digests(BlockType::Q4_K),
        [
            0x6e85_ea4a_3ea8_7899,
            0x2872_c055_6d4d_54b6,
            0xfbb5_617d_c7d0_f1c1
        ]
    );
}

#[test]
fn q5_k_is_that_of_ggml() {
    assert_eq!(
        digests(BlockType::Q5_K),
        [
            0x5d26_617e_d491_daf7,
            0xe72b_9bb4_26d1_9ee0,
            0xfae0_57da_d53f_fea6
        ]
    );
}

#[test]
fn q6_k_is_that_of_ggml() {
    assert_eq!(
        digests(BlockType::Q6_K),
        [
            0xf89d_046a_e43d_2247,
            0x41eb_72f5_fdfa_e11d,
            0xcdaa_78f3_b033_7b07
        ]
    );
}

/// √(Σ w·(x − y)² / Σ w·x²)
fn relative_error(x: &[f32], y: &[f32], w: impl Fn(usize) -> f32) -> f32 {
    let (mut error, mut size) = (0.0, 0.0);
    for i in 0..x.len() {
        error += w(i) * (x[i] - y[i]) * (x[i] - y[i]);
        size += w(i) * x[i] * x[i];
    }
    (error / size).sqrt()
}

#[test]
fn each_bit_halves_the_error() {
    let mut rows = Rows(1);
    let row: Vec<f32> = (0..64 * SUPER_BLOCK).map(|_| rows.normal()).collect();
    let errors = K_QUANTS
        .map(|kind| relative_error(&row, &decode(kind, &encode(kind, &row, None)), |_| 1.0));
    for pair in errors.windows(2) {
        assert!((1.5..2.5).contains(&(pair[0] / pair[1])), "{errors:?}");
    }
}

#[test]
fn importance_lowers_the_error_where_it_counts() {
    let mut rows = Rows(2);
    for kind in K_QUANTS {
        let row: Vec<f32> = (0..64 * SUPER_BLOCK).map(|_| rows.normal()).collect();
        let importance: Vec<f32> = row.iter().map(|_| rows.normal().powi(4)).collect();
        let error = |importance: Option<&[f32]>, weights: &[f32]| {
            relative_error(&row, &decode(kind, &encode(kind, &row, importance)), |i| {
                weights[i]
            })
        };
        let (with, without) = (
            error(Some(&importance), &importance),
            error(None, &importance),
        );
        assert!(with < 0.97 * without, "{kind}: {with} against {without}");
    }
}

#[test]
fn super_blocks_do_not_know_of_each_other() {
    let mut rows = Rows(3);
    for kind in K_QUANTS {
        let (row, importance) = (rows.weights(), rows.importance());
        let (first, second) = row.split_at(SUPER_BLOCK);
        let (first_importance, second_importance) = importance.split_at(SUPER_BLOCK);
        let apart = [
            encode(kind, first, Some(first_importance)),
            encode(kind, second, Some(second_importance)),
        ];
        assert_eq!(
            encode(kind, &row, Some(&importance)),
            apart.concat(),
            "{kind}"
        );
        let apart = [encode(kind, first, None), encode(kind, second, None)];
        assert_eq!(encode(kind, &row, None), apart.concat(), "{kind}");
    }
}

#[test]
fn zeros_stay_zeros() {
    for kind in K_QUANTS {
        let zeros = [0.0; SUPER_BLOCK];
        for importance in [None, Some(&[1.0; SUPER_BLOCK][..]), Some(&zeros[..])] {
            assert_eq!(
                decode(kind, &encode(kind, &zeros, importance)),
                zeros,
                "{kind}"
            );
        }
    }
}

fn any_bits() -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec(any::<u32>().prop_map(f32::from_bits), SUPER_BLOCK)
}

/// Numbers with here and there a NaN or an infinity.
fn mostly_finite() -> impl Strategy<Value = Vec<f32>> {
    let value = prop_oneof![
        30 => -1.0f32..1.0,
        1 => Just(f32::NAN),
        1 => Just(f32::INFINITY),
        1 => Just(f32::NEG_INFINITY),
        1 => Just(f32::MAX),
        1 => Just(f32::from_bits(1)),
    ];
    prop::collection::vec(value, SUPER_BLOCK)
}

proptest! {
    #[test]
    fn no_weights_panic(
        row in prop_oneof![any_bits(), mostly_finite()],
        importance in prop_oneof![any_bits(), mostly_finite()],
    ) {
        for kind in K_QUANTS {
            decode(kind, &encode(kind, &row, None));
            decode(kind, &encode(kind, &row, Some(&importance)));
        }
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 210)) {
        for kind in K_QUANTS {
            decode(kind, &bytes[..kind.block_bytes()]);
        }
    }

    #[test]
    fn scales_and_mins_survive_packing(
        scales in prop::array::uniform8(0u8..64),
        mins in prop::array::uniform8(0u8..64),
    ) {
        prop_assert_eq!(ScalesAndMins8::pack(&scales, &mins).unpack(), (scales, mins));
    }

    #[test]
    fn signed_scales_survive_packing(scales in prop::array::uniform16(-32i8..32)) {
        let stored = scales.map(|scale| (scale + 32) as u8);
        prop_assert_eq!(Scales16::pack(&stored).unpack(), scales);
    }
}
