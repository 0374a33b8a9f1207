//! Block types without an oracle: golden rows, sizes and names, bounds of the error, and that
//! no bytes and no floats make them panic.

use fewbit::quant::BlockType;
use proptest::prelude::*;
use quant_tests::rows::{Importance, Shape};

mod golden_blocks;

fn encode(kind: BlockType, row: &[f32], importance: Option<&[f32]>) -> Vec<u8> {
    let mut bytes = vec![0; kind.row_bytes(row.len()).expect("blocks fill the row")];
    kind.encoder().expect("the type has an encoder")(row, importance, &mut bytes);
    bytes
}

fn decode(kind: BlockType, bytes: &[u8]) -> Vec<f32> {
    let mut row = vec![0.0; bytes.len() / kind.block_bytes() * kind.block_len()];
    kind.decode_row(bytes, &mut row);
    row
}

fn encodable() -> impl Iterator<Item = BlockType> {
    let kinds = BlockType::ALL.iter().copied();
    kinds.filter(|kind| kind.encoder().is_some())
}

#[test]
fn rows_encode_and_blocks_decode_as_ggml_did() {
    let path = golden_blocks::Golden::path();
    let golden = std::fs::read_to_string(&path).expect("the golden file is committed");
    let golden: golden_blocks::Golden = serde_json::from_str(&golden).expect("it is valid");
    let ours = golden_blocks::Golden::of(&encode, &decode);
    for (kind, cases) in &golden.encoded {
        for (case, fingerprint) in cases {
            assert_eq!(&ours.encoded[kind][case], fingerprint, "{kind}: {case}");
        }
    }
    assert_eq!(ours, golden);
}

#[test]
fn types_have_ggml_sizes() {
    let sizes = [
        (BlockType::F32, 1, 4),
        (BlockType::F16, 1, 2),
        (BlockType::Q4_0, 32, 18),
        (BlockType::Q4_1, 32, 20),
        (BlockType::Q5_0, 32, 22),
        (BlockType::Q5_1, 32, 24),
        (BlockType::Q8_0, 32, 34),
        (BlockType::Q2_K, 256, 84),
        (BlockType::Q3_K, 256, 110),
        (BlockType::Q4_K, 256, 144),
        (BlockType::Q5_K, 256, 176),
        (BlockType::Q6_K, 256, 210),
        (BlockType::IQ4_NL, 32, 18),
        (BlockType::IQ4_XS, 256, 136),
        (BlockType::BF16, 1, 2),
        (BlockType::MXFP4, 32, 17),
    ];
    assert_eq!(BlockType::ALL, sizes.map(|(kind, ..)| kind));
    for (kind, len, bytes) in sizes {
        assert_eq!(
            (kind.block_len(), kind.block_bytes()),
            (len, bytes),
            "{kind}"
        );
        assert_eq!(kind.row_bytes(2 * len), Some(2 * bytes), "{kind}");
        assert_eq!(kind.bits_per_weight(), 8.0 * bytes as f64 / len as f64);
    }
}

#[test]
fn a_row_that_blocks_do_not_fill_has_no_size() {
    assert_eq!(BlockType::Q4_K.row_bytes(255), None);
    assert_eq!(BlockType::Q4_K.row_bytes(256 + 32), None);
    assert_eq!(BlockType::Q8_0.row_bytes(33), None);
    assert_eq!(BlockType::Q4_K.row_bytes(0), Some(0));
}

#[test]
fn a_row_whose_size_overflows_has_none() {
    let cols = usize::MAX / 256 * 256;
    assert_eq!(BlockType::F32.row_bytes(cols), None);
    assert_eq!(BlockType::Q8_0.row_bytes(cols), None);
    assert_eq!(BlockType::Q4_0.row_bytes(cols), Some(cols / 32 * 18));
}

#[test]
fn types_are_found_by_name_and_by_id() {
    for &kind in BlockType::ALL {
        assert_eq!(BlockType::from_id(kind.id()), Some(kind));
        assert_eq!(BlockType::name_of_id(kind.id()), Some(kind.name()));
        assert_eq!(kind.name().parse::<BlockType>().unwrap(), kind);
        assert_eq!(
            kind.name().to_lowercase().parse::<BlockType>().unwrap(),
            kind
        );
        assert_eq!(format!("{kind}"), format!("{kind:?}"));
    }
    let ids: Vec<u32> = BlockType::ALL.iter().map(|kind| kind.id()).collect();
    assert!(ids.is_sorted());
}

#[test]
fn unknown_types_are_named_where_ggml_names_them() {
    assert_eq!(BlockType::from_id(16), None);
    assert_eq!(BlockType::name_of_id(16), Some("IQ2_XXS"));
    assert_eq!(BlockType::name_of_id(1000), None);
    let error = "Q9_X".parse::<BlockType>().unwrap_err();
    assert_eq!(error.to_string(), "unknown block type \"Q9_X\"");
}

#[test]
#[should_panic(expected = "256 weights do not lie in 143 bytes of Q4_K")]
fn rows_of_the_wrong_size_are_refused() {
    BlockType::Q4_K.decode_row(&[0; 143], &mut [0.0; 256]);
}

/// Root of the mean squared error, relative to that of the weights.
fn relative_error(kind: BlockType, rows: &[Vec<f32>]) -> f64 {
    let (mut error, mut energy) = (0.0, 0.0);
    for row in rows {
        let decoded = decode(kind, &encode(kind, row, None));
        for (&x, y) in row.iter().zip(decoded) {
            error += f64::from(x - y).powi(2);
            energy += f64::from(x).powi(2);
        }
    }
    (error / energy).sqrt()
}

/// A grid of 2ᵇ levels over ±4σ has steps of 8σ/2ᵇ and errors of a step/√12. Blocks fit their
/// scale to their own few weights, so they must do better.
#[test]
fn errors_stay_below_those_of_a_plain_grid() {
    let rows: Vec<_> = (0..16).map(|seed| Shape::Normal.row(1024, seed)).collect();
    let mut errors = Vec::new();
    for (kind, bits) in [
        (BlockType::F32, 24),
        (BlockType::F16, 11),
        (BlockType::BF16, 8),
        (BlockType::Q8_0, 8),
        (BlockType::Q6_K, 6),
        (BlockType::Q5_1, 5),
        (BlockType::Q5_0, 5),
        (BlockType::Q5_K, 5),
        (BlockType::Q4_1, 4),
        (BlockType::Q4_0, 4),
        (BlockType::Q4_K, 4),
        (BlockType::IQ4_NL, 4),
        (BlockType::IQ4_XS, 4),
        (BlockType::Q3_K, 3),
        (BlockType::Q2_K, 2),
    ] {
        let error = relative_error(kind, &rows);
        let grid = 8.0 / 2f64.powi(bits) / 12f64.sqrt();
        assert!(error < grid, "{kind}: {error} against {grid}");
        errors.push((bits, error));
    }
    for (a, b) in errors
        .iter()
        .flat_map(|a| errors.iter().map(move |b| (a, b)))
    {
        assert!(
            a.0 <= b.0 || a.1 < b.1,
            "{} bits err {}, {} bits {}",
            a.0,
            a.1,
            b.0,
            b.1
        );
    }
}

#[test]
fn importance_lowers_the_weighted_error() {
    for kind in encodable() {
        let (mut plain, mut weighted) = (0.0, 0.0);
        for seed in 0..16 {
            let row = Shape::Normal.row(1024, seed);
            let importance = Importance::Activations.row(1024, seed);
            let error = |bytes: &[u8]| -> f64 {
                let decoded = decode(kind, bytes);
                let errors = row.iter().zip(&decoded).zip(&importance);
                errors
                    .map(|((x, y), w)| f64::from(w * (x - y) * (x - y)))
                    .sum()
            };
            plain += error(&encode(kind, &row, None));
            weighted += error(&encode(kind, &row, Some(&importance)));
        }
        let has_search = kind.block_len() > 1 && kind != BlockType::Q8_0;
        if has_search {
            assert!(weighted < plain, "{kind}: {weighted} against {plain}");
        } else {
            assert_eq!(weighted, plain, "{kind} has no use for importance");
        }
    }
}

/// Any bits: denormals, infinities and NaN as likely as their share of all floats, or more.
fn any_float() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => any::<u32>().prop_map(f32::from_bits),
        1 => Just(f32::NAN),
        1 => Just(f32::INFINITY),
        1 => Just(f32::NEG_INFINITY),
        2 => -1.0f32..1.0,
        1 => (0u32..0x0080_0000).prop_map(f32::from_bits),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_decode(bytes in prop::collection::vec(any::<u8>(), 512)) {
        for &kind in BlockType::ALL {
            let whole = bytes.len() / kind.block_bytes() * kind.block_bytes();
            decode(kind, &bytes[..whole]);
        }
    }

    #[test]
    fn any_floats_encode(
        row in prop::collection::vec(any_float(), 256),
        importance in prop::collection::vec(any_float(), 256),
    ) {
        for kind in encodable() {
            for importance in [None, Some(importance.as_slice())] {
                decode(kind, &encode(kind, &row, importance));
            }
        }
    }
}
