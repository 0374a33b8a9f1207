//! Every block type against ggml: encoding and decoding are equal to the bit.
//!
//! `cargo test -p quant-tests --features ggml --test conformance_blocks -- --nocapture`
//!
//! With `FEWBIT_WRITE_GOLDEN=1` the golden file that `blocks.rs` reads is written anew.
#![cfg(feature = "ggml")]

use fewbit::quant::BlockType;
use ggml_sys_bindings as ggml;
use quant_tests::rows::{Importance, Shape, SplitMix64};

mod golden_blocks;

/// Row lengths, and how many rows of each are compared for a shape and an importance.
const ROWS: [(usize, u64); 5] = [(256, 64), (512, 24), (768, 16), (2048, 8), (4096, 4)];

/// Without and with each kind of importance.
fn importances() -> impl Iterator<Item = Option<Importance>> {
    std::iter::once(None).chain(Importance::ALL.map(Some))
}

fn ours(kind: BlockType, row: &[f32], importance: Option<&[f32]>) -> Vec<u8> {
    let mut bytes = vec![0; kind.row_bytes(row.len()).expect("blocks fill the row")];
    kind.encoder().expect("the type has an encoder")(row, importance, &mut bytes);
    bytes
}

fn theirs(kind: BlockType, row: &[f32], importance: Option<&[f32]>) -> Vec<u8> {
    ggml::quantize_row(kind.id(), row, importance)
}

fn ours_decoded(kind: BlockType, bytes: &[u8]) -> Vec<f32> {
    let mut row = vec![0.0; bytes.len() / kind.block_bytes() * kind.block_len()];
    kind.decode_row(bytes, &mut row);
    row
}

/// ggml decodes everything but F32, which needs none.
fn theirs_decoded(kind: BlockType, bytes: &[u8]) -> Vec<f32> {
    let float = |bytes: &[u8; 4]| f32::from_le_bytes(*bytes);
    let floats = || bytes.as_chunks().0.iter().map(float).collect();
    ggml::dequantize_row(kind.id(), bytes).unwrap_or_else(floats)
}

/// Says where two rows of blocks part.
fn assert_blocks_equal(kind: BlockType, ours: &[u8], theirs: &[u8], case: &dyn Fn() -> String) {
    assert_eq!(ours.len(), theirs.len());
    let blocks = ours
        .chunks(kind.block_bytes())
        .zip(theirs.chunks(kind.block_bytes()));
    for (i, (ours, theirs)) in blocks.enumerate() {
        assert!(
            ours == theirs,
            "{kind}, {}, block {i}:\nours {ours:02x?}\nggml {theirs:02x?}",
            case()
        );
    }
}

/// Bit for bit, but any NaN is a NaN.
fn assert_weights_equal(kind: BlockType, bytes: &[u8]) {
    let (ours, theirs) = (ours_decoded(kind, bytes), theirs_decoded(kind, bytes));
    assert_eq!(ours.len(), theirs.len());
    for (i, (&a, &b)) in ours.iter().zip(&theirs).enumerate() {
        assert!(
            a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(),
            "{kind}: weight {i} of {bytes:02x?}: ours {a:e}, ggml {b:e}"
        );
    }
}

#[test]
fn the_oracle_does_not_contract() {
    assert!(
        !ggml::contracts_multiply_add(),
        "ggml was compiled with fused multiply-adds, its blocks are not the reference: \
         build without -Ctarget-cpu"
    );
}

#[test]
fn rows_have_the_size_of_ggml_rows() {
    for &kind in BlockType::ALL {
        assert_eq!(
            kind.row_bytes(1024),
            Some(ggml::row_bytes(kind.id(), 1024)),
            "{kind}"
        );
    }
}

fn encodes_as_ggml(kind: BlockType) {
    let mut rows = 0;
    for shape in Shape::ALL {
        for importance in importances() {
            for (cols, count) in ROWS {
                for seed in 0..count {
                    let row = shape.row(cols, seed);
                    let weights = importance.map(|importance| importance.row(cols, seed));
                    let weights = weights.as_deref();
                    let case = || format!("{shape:?} × {importance:?}, {cols} cols, seed {seed}");
                    let bytes = ours(kind, &row, weights);
                    assert_blocks_equal(kind, &bytes, &theirs(kind, &row, weights), &case);
                    assert_weights_equal(kind, &bytes);
                    rows += 1;
                }
            }
        }
    }
    println!("{kind}: {rows} rows encoded and decoded as ggml does");
}

/// Blocks of random bytes: every level, every scale, infinities and NaN among them.
fn decodes_as_ggml(kind: BlockType) {
    let mut random = SplitMix64::new(7);
    for _ in 0..4000 {
        let bytes: Vec<u8> = (0..4 * kind.block_bytes())
            .map(|_| random.next_u64() as u8)
            .collect();
        assert_weights_equal(kind, &bytes);
    }
}

macro_rules! conformance {
    ($($test:ident: $kind:ident,)*) => {
        mod encode {
            $(#[test] fn $test() { super::encodes_as_ggml(fewbit::quant::BlockType::$kind); })*
        }
        mod decode {
            $(#[test] fn $test() { super::decodes_as_ggml(fewbit::quant::BlockType::$kind); })*
            #[test] fn mxfp4_as_ggml() { super::decodes_as_ggml(fewbit::quant::BlockType::MXFP4); }
        }

        #[test]
        fn every_type_is_compared() {
            let compared = [$(BlockType::$kind),*];
            for &kind in BlockType::ALL {
                assert_eq!(compared.contains(&kind), kind.encoder().is_some(), "{kind}");
            }
        }
    };
}

conformance! {
    f32_as_ggml: F32,
    f16_as_ggml: F16,
    bf16_as_ggml: BF16,
    q4_0_as_ggml: Q4_0,
    q4_1_as_ggml: Q4_1,
    q5_0_as_ggml: Q5_0,
    q5_1_as_ggml: Q5_1,
    q8_0_as_ggml: Q8_0,
    q2_k_as_ggml: Q2_K,
    q3_k_as_ggml: Q3_K,
    q4_k_as_ggml: Q4_K,
    q5_k_as_ggml: Q5_K,
    q6_k_as_ggml: Q6_K,
    iq4_nl_as_ggml: IQ4_NL,
    iq4_xs_as_ggml: IQ4_XS,
}

/// `quantize_row_*_ref`, but for IQ4_NL, whose reference function searches less than what
/// llama-quantize calls.
#[test]
fn without_importance_rows_are_those_of_the_reference_functions() {
    for &kind in BlockType::ALL {
        if kind == BlockType::IQ4_NL || kind.encoder().is_none() {
            continue;
        }
        for shape in Shape::ALL {
            let row = shape.row(1024, 3);
            if let Some(reference) = ggml::quantize_row_ref(kind.id(), &row) {
                let case = || format!("{shape:?}");
                assert_blocks_equal(kind, &ours(kind, &row, None), &reference, &case);
            }
        }
    }
}

/// Around every half, and around the middle between each two: one float below, it, one above.
#[test]
fn floats_round_to_halves_as_ggml_rounds_them() {
    let mut row = Vec::new();
    for bits in 0..=u16::MAX {
        let half = half::f16::from_bits(bits).to_f32();
        let middle = f32::from_bits(half.to_bits() | 1 << 12);
        for x in [half, middle] {
            let near = [x.to_bits().wrapping_sub(1), x.to_bits(), x.to_bits() + 1];
            row.extend(near.map(f32::from_bits));
        }
    }
    for kind in [BlockType::F16, BlockType::BF16] {
        let (ours, theirs) = (ours(kind, &row, None), theirs(kind, &row, None));
        let pairs = ours.chunks(2).zip(theirs.chunks(2));
        for (x, (ours, theirs)) in row.iter().zip(pairs) {
            let bits = x.to_bits();
            assert_eq!(ours, theirs, "{x:e} ({bits:#010x}) as {kind}");
        }
    }
}

#[test]
fn every_half_and_bfloat_decodes_as_ggml() {
    let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for kind in [BlockType::F16, BlockType::BF16] {
        let (ours, theirs) = (ours_decoded(kind, &bytes), theirs_decoded(kind, &bytes));
        for (i, (a, b)) in ours.iter().zip(&theirs).enumerate() {
            assert_eq!(a.to_bits(), b.to_bits(), "{kind} {i:#06x}");
        }
    }
}

#[test]
fn trained_rows_encode_as_ggml() -> anyhow::Result<()> {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/fixtures/tiny-mixtral/model.safetensors"
    );
    let file = std::fs::read(path)?;
    let tensors = safetensors::SafeTensors::deserialize(&file)?;
    let mut rows = 0;
    for (name, tensor) in tensors.tensors() {
        let &[_, cols] = tensor.shape() else { continue };
        assert_eq!(tensor.dtype(), safetensors::Dtype::BF16, "{name}");
        let mut weights = vec![0.0; tensor.data().len() / 2];
        BlockType::BF16.decode_row(tensor.data(), &mut weights);
        for (i, row) in weights.chunks(cols).enumerate().step_by(37) {
            let importance = Importance::Activations.row(cols, i as u64);
            for &kind in BlockType::ALL {
                if kind.encoder().is_none() || kind.row_bytes(cols).is_none() {
                    continue;
                }
                for importance in [None, Some(importance.as_slice())] {
                    let case = || format!("{name} row {i}, importance {}", importance.is_some());
                    let bytes = ours(kind, row, importance);
                    assert_blocks_equal(kind, &bytes, &theirs(kind, row, importance), &case);
                }
            }
            rows += 1;
        }
    }
    assert!(rows > 0, "{path} has matrices");
    println!("{rows} trained rows encoded as ggml does, in every type");
    Ok(())
}

#[test]
fn golden_file_holds_what_ggml_makes() -> anyhow::Result<()> {
    let golden = golden_blocks::Golden::of(&theirs, &theirs_decoded);
    let path = golden_blocks::Golden::path();
    if std::env::var_os("FEWBIT_WRITE_GOLDEN").is_some() {
        let mut text = serde_json::to_string_pretty(&golden)?;
        text.push('\n');
        std::fs::write(&path, text)?;
    }
    let committed: golden_blocks::Golden = serde_json::from_str(&std::fs::read_to_string(path)?)?;
    assert_eq!(committed, golden);
    Ok(())
}
