//! GGUF files: what is written is read back, and what is wrong is named with its place.

use std::fs;
use std::path::{Path, PathBuf};

use fewbit::gguf::{self, Array, Gguf, Layout, Metadata, TensorDecl, Value, Writer, names};
use fewbit::quant::BlockType;
use proptest::prelude::*;
use tempfile::TempDir;

// ── Files made by hand ──────────────────────────────────────────────────────────────────

fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

/// A pair with a value of the type `id`.
fn pair(key: &str, id: u32, value: &[u8]) -> Vec<u8> {
    [&string(key), &id.to_le_bytes()[..], value].concat()
}

fn array(id: u32, count: u64, items: &[u8]) -> Vec<u8> {
    [&id.to_le_bytes()[..], &count.to_le_bytes(), items].concat()
}

fn tensor(name: &str, shape: &[u64], id: u32, offset: u64) -> Vec<u8> {
    let mut bytes = string(name);
    bytes.extend((shape.len() as u32).to_le_bytes());
    shape
        .iter()
        .for_each(|extent| bytes.extend(extent.to_le_bytes()));
    bytes.extend(id.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

/// A file of these parts with `data` zero bytes of tensor data.
fn file(version: u32, pairs: &[Vec<u8>], tensors: &[Vec<u8>], data: usize) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((pairs.len() as u64).to_le_bytes());
    bytes.extend(pairs.concat());
    bytes.extend(tensors.concat());
    bytes.resize(bytes.len().next_multiple_of(32) + data, 0);
    bytes
}

fn parse(bytes: &[u8]) -> Result<Gguf, gguf::Error> {
    gguf::parse(bytes, bytes.len() as u64, Path::new("model.gguf"))
}

/// The message with which these bytes are refused; it must name the file.
fn refusal(bytes: &[u8]) -> String {
    let message = parse(bytes).expect_err("refused").to_string();
    assert!(message.starts_with("model.gguf: "), "{message}");
    assert!(!message.contains('\n'), "{message}");
    message
}

/// Asserts that the message contains every one of the words.
#[track_caller]
fn assert_says(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
}

const F32: u32 = 0;
const U32: u32 = 4;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

// ── Round trips ─────────────────────────────────────────────────────────────────────────

fn every_type() -> Metadata {
    let nested = vec![
        Array::from(vec![1_u16, 2]),
        Array::from(Vec::<String>::new()),
    ];
    [
        ("u8", Value::from(u8::MAX)),
        ("i8", i8::MIN.into()),
        ("u16", u16::MAX.into()),
        ("i16", i16::MIN.into()),
        ("u32", u32::MAX.into()),
        ("i32", i32::MIN.into()),
        ("f32", 1e-5_f32.into()),
        ("bool", true.into()),
        ("string", "größer 🦀".into()),
        ("empty", "".into()),
        ("u64", u64::MAX.into()),
        ("i64", i64::MIN.into()),
        ("f64", f64::MIN_POSITIVE.into()),
        ("u8s", vec![0_u8, 255].into()),
        ("i8s", vec![-128_i8, 127].into()),
        ("u16s", vec![0_u16, 65535].into()),
        ("i16s", vec![i16::MIN, i16::MAX].into()),
        ("u32s", vec![0_u32, u32::MAX].into()),
        ("i32s", vec![i32::MIN, i32::MAX].into()),
        ("f32s", vec![-0.0_f32, f32::INFINITY].into()),
        ("bools", vec![true, false, true].into()),
        ("strings", Value::from(["<s>", "", "▁a"].as_slice())),
        ("u64s", vec![u64::MAX].into()),
        ("i64s", vec![i64::MIN].into()),
        ("f64s", vec![0.1_f64].into()),
        ("none", Vec::<f32>::new().into()),
        ("nested", nested.into()),
    ]
    .into_iter()
    .collect()
}

fn decl(name: &str, kind: BlockType, shape: &[usize]) -> TensorDecl {
    TensorDecl {
        name: name.to_owned(),
        kind,
        shape: shape.to_vec(),
    }
}

/// Bytes that differ from place to place.
fn pattern(len: u64) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

fn write(path: &Path, metadata: &Metadata, decls: &[TensorDecl]) -> Vec<Vec<u8>> {
    let data: Vec<Vec<u8>> = decls
        .iter()
        .map(|decl| pattern(decl.bytes().unwrap()))
        .collect();
    let tensors: Vec<_> = decls
        .iter()
        .cloned()
        .zip(data.iter().map(Vec::as_slice))
        .collect();
    gguf::write_whole(path, metadata, &tensors).unwrap();
    data
}

fn temporary(name: &str) -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join(name);
    (folder, path)
}

fn some_tensors() -> Vec<TensorDecl> {
    vec![
        decl(names::TOKEN_EMBD, BlockType::Q4_0, &[32, 3]),
        decl(&names::block(0, names::ATTN_NORM), BlockType::F32, &[5]),
        decl(
            &names::experts(0, names::FFN_UP),
            BlockType::Q6_K,
            &[256, 2, 4],
        ),
        decl("four.dimensions", BlockType::BF16, &[1, 2, 3, 4]),
    ]
}

#[test]
fn every_value_type_is_read_back_in_order() {
    let (_folder, path) = temporary("model.gguf");
    write(&path, &every_type(), &[]);
    let read = gguf::read(&path).unwrap();
    assert_eq!(read.metadata, every_type());
    assert_eq!(read.metadata.file(), path);
}

#[test]
fn tensors_are_read_back_at_multiples_of_32() {
    let (_folder, path) = temporary("model.gguf");
    let decls = some_tensors();
    let data = write(&path, &every_type(), &decls);
    let file = fs::read(&path).unwrap();
    assert_eq!(file.len() % 32, 0);

    let read = gguf::read(&path).unwrap();
    assert_eq!(read.files, [path]);
    assert_eq!(read.tensors.len(), decls.len());
    for ((tensor, decl), data) in read.tensors.iter().zip(&decls).zip(&data) {
        assert_eq!(
            (&tensor.name, tensor.kind, &tensor.shape),
            (&decl.name, decl.kind, &decl.shape)
        );
        assert_eq!(tensor.offset % 32, 0);
        assert_eq!(
            &file[tensor.offset as usize..][..tensor.bytes as usize],
            data
        );
        assert_eq!(read.tensor(&tensor.name), Some(tensor));
    }
    assert_eq!(read.tensor("absent"), None);
    let experts = read.tensor("blk.0.ffn_up_exps.weight").unwrap();
    assert_eq!(
        (experts.columns(), experts.rows(), experts.row_bytes()),
        (256, 8, 210)
    );
}

#[test]
fn a_layout_tells_the_files_length_before_it_is_written() {
    let (_folder, path) = temporary("model.gguf");
    write(&path, &every_type(), &some_tensors());
    let layout = Layout::new(&every_type(), &some_tensors()).unwrap();
    assert_eq!(layout.file_bytes(), fs::metadata(&path).unwrap().len());
    let read = gguf::read(&path).unwrap();
    for (index, tensor) in read.tensors.iter().enumerate() {
        assert_eq!(
            (layout.tensor_offset(index), layout.tensor_bytes(index)),
            (tensor.offset, tensor.bytes)
        );
    }
}

#[test]
fn version_2_is_read() {
    let pairs = [
        pair("general.name", STRING, &string("old")),
        pair("n", U32, &7_u32.to_le_bytes()),
    ];
    let read = parse(&file(2, &pairs, &[tensor("a", &[8], F32, 0)], 32)).unwrap();
    assert_eq!(read.metadata.str("general.name").unwrap(), Some("old"));
    assert_eq!(read.metadata.u32("n").unwrap(), Some(7));
    assert_eq!(read.tensors[0].bytes, 32);
}

#[test]
fn another_alignment_is_honoured_in_reading() {
    let pairs = [pair("general.alignment", U32, &64_u32.to_le_bytes())];
    let mut bytes = file(
        3,
        &pairs,
        &[tensor("a", &[1], F32, 0), tensor("b", &[1], F32, 64)],
        0,
    );
    let data = bytes.len().next_multiple_of(64);
    bytes.resize(data + 68, 0);
    let read = parse(&bytes).unwrap();
    assert_eq!(read.tensors[0].offset, data as u64);
    assert_eq!(read.tensors[1].offset, data as u64 + 64);
}

#[test]
fn the_last_tensors_padding_may_be_missing() {
    let mut bytes = file(3, &[], &[tensor("a", &[1], F32, 0)], 0);
    bytes.extend([0; 4]);
    assert_eq!(parse(&bytes).unwrap().tensors[0].bytes, 4);
}

// ── What a file may not be ──────────────────────────────────────────────────────────────

#[test]
fn truncated_header_names_the_offset() {
    let bytes = file(
        3,
        &[pair("general.name", STRING, &string("mixtral"))],
        &[],
        0,
    );
    assert_says(
        &refusal(&bytes[..10]),
        &["byte 8", "ends at byte 10", "truncated"],
    );
    // The string's seven bytes stand from byte 56 on.
    assert_says(
        &refusal(&bytes[..60]),
        &[
            "metadata key general.name",
            "byte 56",
            "7 bytes",
            "ends at byte 60",
            "download or convert it again",
        ],
    );
}

#[test]
fn truncated_data_names_the_tensor_and_what_it_needs() {
    let bytes = file(
        3,
        &[],
        &[tensor("token_embd.weight", &[64, 2], F32, 0)],
        512,
    );
    let cut = bytes.len() - 100;
    let message = refusal(&bytes[..cut]);
    assert_says(
        &message,
        &[
            "tensor token_embd.weight",
            "512 bytes",
            &format!("ends at byte {cut}"),
            "download",
        ],
    );
}

#[test]
fn other_files_are_told_by_their_first_bytes() {
    for (start, said) in [
        (&b""[..], "empty"),
        (b"GG", "begins with \"GG\""),
        (b"\x80\x02}q", "begins with \"\\x80\\x02}q\""),
        (b"PK\x03\x04", "safetensors"),
        (b"version https://git-lfs", "git lfs pull"),
        (b"<!DOCTYPE html>", "web page"),
        (b"lmggxxxx", "older than GGUF"),
    ] {
        assert_says(&refusal(start), &[said]);
    }
}

#[test]
fn versions_and_byte_orders_that_are_not_read_are_named_with_the_remedy() {
    assert_says(
        &refusal(&file(1, &[], &[], 0)),
        &["version 1", "original checkpoint"],
    );
    assert_says(&refusal(&file(4, &[], &[], 0)), &["version 4", "2 and 3"]);
    assert_says(
        &refusal(&file(3_u32.swap_bytes(), &[], &[], 0)),
        &["big-endian", "gguf_convert_endian.py"],
    );
}

#[test]
fn counts_beyond_the_file_are_refused_before_they_are_believed() {
    let mut bytes = file(3, &[], &[], 0);
    bytes[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_says(&refusal(&bytes), &["18446744073709551615 tensors"]);
    bytes[8..16].fill(0);
    bytes[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_says(&refusal(&bytes), &["18446744073709551615 metadata keys"]);
    for kind in 0..=12 {
        let many = array(kind, u64::MAX / 2, &[]);
        assert_says(
            &refusal(&file(3, &[pair("a", ARRAY, &many)], &[], 0)),
            &["metadata key a", "array of"],
        );
    }
    let long = u64::MAX.to_le_bytes();
    assert_says(
        &refusal(&file(3, &[pair("a", STRING, &long)], &[], 0)),
        &["metadata key a", "string of"],
    );
}

#[test]
fn a_long_file_does_not_buy_a_header_of_unlimited_memory() {
    let (_folder, path) = temporary("model.gguf");
    let items = 2_u64 << 30;
    let bytes = file(3, &[pair("a", ARRAY, &array(0, items, &[]))], &[], 0);
    fs::write(&path, bytes).unwrap();
    let sparse = fs::OpenOptions::new().write(true).open(&path).unwrap();
    sparse.set_len(2 * items).unwrap();
    let message = gguf::read(&path).unwrap_err().to_string();
    assert_says(&message, &["model.gguf", "metadata key a", "512 MiB"]);
}

#[test]
fn value_types_that_do_not_exist_are_named() {
    assert_says(
        &refusal(&file(3, &[pair("a", 13, &[0; 8])], &[], 0)),
        &["metadata key a", "value type 13"],
    );
    let strange = array(77, 1, &[0; 8]);
    assert_says(
        &refusal(&file(3, &[pair("a", ARRAY, &strange)], &[], 0)),
        &["metadata key a", "value type 77"],
    );
}

#[test]
fn arrays_are_followed_to_a_limited_depth() {
    let nest = |depth| (0..depth).fold(array(0, 1, &[7]), |inner, _| array(ARRAY, 1, &inner));
    assert!(parse(&file(3, &[pair("a", ARRAY, &nest(3))], &[], 0)).is_ok());
    assert_says(
        &refusal(&file(3, &[pair("a", ARRAY, &nest(4))], &[], 0)),
        &["metadata key a", "4 deep"],
    );
    assert_says(
        &refusal(&file(3, &[pair("a", ARRAY, &nest(10_000))], &[], 0)),
        &["4 deep"],
    );
}

#[test]
fn strings_must_be_utf_8_and_bools_0_or_1() {
    let bad = [&2_u64.to_le_bytes()[..], b"a\xff"].concat();
    // Magic, version and counts take 24 bytes, key and type 13, the length 8: "a" is byte 45.
    assert_says(
        &refusal(&file(3, &[pair("a", STRING, &bad)], &[], 0)),
        &["byte 46", "metadata key a", "UTF-8"],
    );
    assert_says(
        &refusal(&file(3, &[pair("a", 7, &[2])], &[], 0)),
        &["byte 37", "metadata key a", "bool is 2"],
    );
    let bools = array(7, 3, &[0, 1, 9]);
    assert_says(
        &refusal(&file(3, &[pair("a", ARRAY, &bools)], &[], 0)),
        &["byte 51", "bool is 9"],
    );
}

#[test]
fn keys_and_tensors_may_stand_once() {
    let twice = [pair("a", 0, &[1]), pair("a", 0, &[2])];
    assert_says(
        &refusal(&file(3, &twice, &[], 0)),
        &["metadata key a", "twice", "byte 38"],
    );
    let twice = [tensor("t", &[8], F32, 0), tensor("t", &[8], F32, 32)];
    assert_says(&refusal(&file(3, &[], &twice, 64)), &["tensor t", "twice"]);
}

#[test]
fn names_have_a_limited_length() {
    let long = "x".repeat(70_000);
    assert_says(
        &refusal(&file(3, &[pair(&long, 0, &[1])], &[], 0)),
        &["key number 0", "70000", "65535"],
    );
}

#[test]
fn shapes_that_cannot_be_are_refused() {
    for (shape, id, said) in [
        (&[][..], F32, "0 dimensions"),
        (&[1, 1, 1, 1, 1], F32, "5 dimensions"),
        (&[8, 0], F32, "zero"),
        (&[1 << 40, 1 << 40], F32, "overflows"),
        (&[u64::MAX / 2, 2], F32, "overflows"),
        (&[33], 2, "not filled by Q4_0 blocks of 32"),
        (&[128, 4], 12, "not filled by Q4_K blocks of 256"),
    ] {
        assert_says(
            &refusal(&file(3, &[], &[tensor("t", shape, id, 0)], 64)),
            &["tensor t", "byte", said],
        );
    }
}

#[test]
fn types_that_are_not_read_are_named() {
    let message = refusal(&file(3, &[], &[tensor("t", &[256], 16, 0)], 256));
    assert_says(&message, &["tensor t", "IQ2_XXS", "requantize"]);
    assert_says(
        &refusal(&file(3, &[], &[tensor("t", &[256], 999, 0)], 256)),
        &["tensor t", "999"],
    );
}

#[test]
fn alignments_that_cannot_be_are_refused() {
    for alignment in [0_u32, 1, 4, 33, 48, 1 << 21, u32::MAX] {
        let pairs = [pair("general.alignment", U32, &alignment.to_le_bytes())];
        assert_says(
            &refusal(&file(3, &pairs, &[], 0)),
            &["general.alignment", &alignment.to_string(), "power of two"],
        );
    }
    let pairs = [pair("general.alignment", STRING, &string("32"))];
    assert_says(
        &refusal(&file(3, &pairs, &[], 0)),
        &["general.alignment", "string"],
    );
}

#[test]
fn tensors_lie_aligned_side_by_side_in_the_file() {
    assert_says(
        &refusal(&file(3, &[], &[tensor("t", &[1], F32, 4)], 64)),
        &["tensor t", "offset 4", "alignment 32"],
    );
    let overlapping = [tensor("a", &[16], F32, 0), tensor("b", &[8], F32, 32)];
    assert_says(
        &refusal(&file(3, &[], &overlapping, 64)),
        &["tensor b", "inside tensor a"],
    );
    let huge = u64::MAX - 31;
    assert_says(
        &refusal(&file(3, &[], &[tensor("t", &[8], F32, huge)], 64)),
        &["tensor t", "overflows"],
    );
    let beyond = tensor("t", &[8], F32, 1 << 40);
    assert_says(
        &refusal(&file(3, &[], &[beyond], 64)),
        &["tensor t", "truncated"],
    );
}

#[test]
fn folders_and_absent_files_are_named() {
    let (folder, path) = temporary("absent.gguf");
    assert_says(
        &gguf::read(&path).unwrap_err().to_string(),
        &["absent.gguf", "cannot open"],
    );
    assert_says(
        &gguf::read(folder.path()).unwrap_err().to_string(),
        &["not a regular file"],
    );
}

// ── Splits ──────────────────────────────────────────────────────────────────────────────

/// Writes a model of three splits, one tensor each; returns the first's path.
fn write_splits(folder: &Path, tensors_said: i32) -> PathBuf {
    for number in 0..3_u16 {
        let mut metadata = Metadata::new();
        if number == 0 {
            metadata.insert("general.name", "split");
        }
        metadata.insert("split.no", number);
        metadata.insert("split.tensors.count", tensors_said);
        // The writer makes single files only: the count is patched in after its layout check.
        metadata.insert("split.count", 1_u16);
        let path = split(folder, usize::from(number) + 1);
        write(
            &path,
            &metadata,
            &[decl(&format!("t{number}"), BlockType::F32, &[8])],
        );
        patch(&path, "split.count", 3);
    }
    split(folder, 1)
}

fn split(folder: &Path, number: usize) -> PathBuf {
    folder.join(format!("model-{number:05}-of-00003.gguf"))
}

/// Sets the u16 value of a key in place.
fn patch(path: &Path, key: &str, value: u16) {
    let mut bytes = fs::read(path).unwrap();
    let at = bytes
        .windows(key.len())
        .position(|window| window == key.as_bytes())
        .unwrap();
    bytes[at + key.len() + 4..][..2].copy_from_slice(&value.to_le_bytes());
    fs::write(path, bytes).unwrap();
}

fn read_refusal(path: &Path) -> String {
    gguf::read(path).expect_err("refused").to_string()
}

#[test]
fn the_first_split_brings_the_others() {
    let folder = TempDir::new().unwrap();
    let read = gguf::read(&write_splits(folder.path(), 3)).unwrap();
    assert_eq!(
        read.files,
        [1, 2, 3].map(|number| split(folder.path(), number))
    );
    assert_eq!(read.metadata.str("general.name").unwrap(), Some("split"));
    for (number, tensor) in read.tensors.iter().enumerate() {
        assert_eq!(
            (tensor.name.as_str(), tensor.file),
            (format!("t{number}").as_str(), number)
        );
    }
    assert_eq!(read.tensor("t2").unwrap().file, 2);
}

#[test]
fn another_split_than_the_first_is_refused_naming_the_first() {
    let folder = TempDir::new().unwrap();
    write_splits(folder.path(), 3);
    let message = read_refusal(&split(folder.path(), 2));
    assert_says(
        &message,
        &[
            "model-00002-of-00003.gguf",
            "split 2 of 3",
            "model-00001-of-00003.gguf",
        ],
    );
}

#[test]
fn a_missing_split_is_named() {
    let folder = TempDir::new().unwrap();
    let first = write_splits(folder.path(), 3);
    fs::remove_file(split(folder.path(), 3)).unwrap();
    assert_says(
        &read_refusal(&first),
        &["model-00003-of-00003.gguf", "missing", "split 3 of 3"],
    );
}

#[test]
fn splits_of_different_models_are_refused() {
    let folder = TempDir::new().unwrap();
    let first = write_splits(folder.path(), 4);
    assert_says(
        &read_refusal(&first),
        &["split.tensors.count", "is 4", "hold 3"],
    );

    let first = write_splits(folder.path(), 3);
    patch(&split(folder.path(), 2), "split.no", 2);
    assert_says(
        &read_refusal(&first),
        &["model-00002-of-00003.gguf", "split.no", "needs 1"],
    );

    let first = write_splits(folder.path(), 3);
    patch(&split(folder.path(), 2), "split.count", 4);
    assert_says(
        &read_refusal(&first),
        &[
            "model-00002-of-00003.gguf",
            "split.count",
            "not of one model",
        ],
    );

    let first = write_splits(folder.path(), 3);
    fs::copy(split(folder.path(), 2), split(folder.path(), 3)).unwrap();
    patch(&split(folder.path(), 3), "split.no", 2);
    assert_says(
        &read_refusal(&first),
        &["model-00003-of-00003.gguf", "tensor t1", "twice"],
    );
}

#[test]
fn a_renamed_split_is_refused() {
    let folder = TempDir::new().unwrap();
    let first = write_splits(folder.path(), 3);
    let renamed = folder.path().join("model.gguf");
    fs::copy(&first, &renamed).unwrap();
    assert_says(
        &read_refusal(&renamed),
        &["model.gguf", "split 1 of 3", "-00001-of-00003.gguf"],
    );

    let alone = folder.path().join("other-00001-of-00002.gguf");
    write(&alone, &Metadata::new(), &[]);
    assert_says(
        &read_refusal(&alone),
        &["named as split 1 of 2", "split.count"],
    );
}

// ── Metadata ────────────────────────────────────────────────────────────────────────────

#[test]
fn integers_of_any_type_are_taken_where_they_fit() {
    let metadata = every_type();
    assert_eq!(metadata.u32("u8").unwrap(), Some(255));
    assert_eq!(metadata.usize("u16").unwrap(), Some(65535));
    assert_eq!(metadata.u64("u64").unwrap(), Some(u64::MAX));
    assert_eq!(metadata.u32("absent").unwrap(), None);
    assert_says(
        &metadata.u32("u64").unwrap_err().to_string(),
        &["metadata key u64", "18446744073709551615 (u64)"],
    );
    assert_says(
        &metadata.u32("i8").unwrap_err().to_string(),
        &["metadata key i8", "-128"],
    );
    assert_eq!(metadata.i32s("u16s").unwrap(), Some(vec![0, 65535]));
    assert_says(
        &metadata.i32s("u32s").unwrap_err().to_string(),
        &["u32s", "array of u32"],
    );
}

#[test]
fn wrong_types_and_missing_keys_name_file_and_key() {
    let (_folder, path) = temporary("model.gguf");
    write(&path, &every_type(), &[]);
    let metadata = gguf::read(&path).unwrap().metadata;
    let file = path.to_str().unwrap();
    assert_says(
        &metadata.f32("string").unwrap_err().to_string(),
        &[file, "metadata key string", "floating-point"],
    );
    assert_says(
        &metadata.bool("u8").unwrap_err().to_string(),
        &[file, "metadata key u8", "bool"],
    );
    assert_says(
        &metadata.strings("f32s").unwrap_err().to_string(),
        &[file, "f32s", "array of strings"],
    );
    assert_says(
        &metadata.require_str("absent").unwrap_err().to_string(),
        &[file, "metadata key absent", "missing"],
    );
    assert_eq!(metadata.f32("f64").unwrap(), Some(0.0));
    assert_eq!(metadata.f32s("f64s").unwrap(), Some(vec![0.1]));
    assert_eq!(
        metadata.require_strings("strings").unwrap(),
        ["<s>", "", "▁a"]
    );
}

#[test]
fn inserting_replaces_in_place_and_removing_keeps_the_order() {
    let mut metadata: Metadata = [("a", 1_u32), ("b", 2), ("c", 3)].into_iter().collect();
    metadata.insert("a", "first");
    assert_eq!(metadata.remove("b"), Some(Value::U32(2)));
    let keys: Vec<&str> = metadata.iter().map(|(key, _)| key).collect();
    assert_eq!(keys, ["a", "c"]);
    assert_eq!(metadata.len(), 2);
}

#[test]
fn values_are_shown_on_one_short_line() {
    assert_eq!(Value::from(1e-5_f32).to_string(), "1e-5");
    assert_eq!(Value::from("a\nb").to_string(), r#""a\nb""#);
    assert_eq!(Value::from(vec![1_u8, 2]).to_string(), "[1, 2]");
    assert_eq!(
        Value::from(vec![0_i32; 32000]).to_string(),
        "[0, 0, 0, 0, …] (32000 × i32)"
    );
    let template = "{% for m in messages %}\n".repeat(100);
    let shown = Value::from(template).to_string();
    assert!(
        shown.chars().count() < 100 && shown.ends_with("… (2400 bytes)"),
        "{shown}"
    );
}

#[test]
fn json_keeps_numbers_short_and_arrays_abbreviated() {
    assert_eq!(Value::from(1e-5_f32).to_json(8).to_string(), "0.00001");
    assert_eq!(Value::from(f32::NAN).to_json(8), serde_json::Value::Null);
    assert_eq!(
        Value::from(u64::MAX).to_json(8).to_string(),
        "18446744073709551615"
    );
    assert_eq!(
        Value::from(vec![true, false]).to_json(8),
        serde_json::json!([true, false])
    );
    let long = Value::from(vec![7_u8; 9]).to_json(8);
    assert_eq!(
        long,
        serde_json::json!({"type": "u8", "len": 9, "first": [7, 7, 7, 7]})
    );
}

// ── Writing ─────────────────────────────────────────────────────────────────────────────

/// The message with which a layout is refused.
fn layout_refusal(metadata: &Metadata, decls: &[TensorDecl]) -> String {
    Layout::new(metadata, decls)
        .expect_err("refused")
        .to_string()
}

#[test]
fn layouts_that_no_reader_would_take_are_refused() {
    let none = Metadata::new();
    let twice = [
        decl("t", BlockType::F32, &[1]),
        decl("t", BlockType::F32, &[1]),
    ];
    assert_says(&layout_refusal(&none, &twice), &["tensor t", "twice"]);
    for (name, shape) in [
        ("", &[32][..]),
        (&"n".repeat(64), &[32]),
        ("t", &[]),
        ("t", &[32, 0]),
        ("t", &[33]),
    ] {
        assert_says(
            &layout_refusal(&none, &[decl(name, BlockType::Q8_0, shape)]),
            &["cannot write tensor"],
        );
    }
    let aligned = [("general.alignment", 64_u32)].into_iter().collect();
    assert_says(
        &layout_refusal(&aligned, &[]),
        &["general.alignment", "64", "32"],
    );
    let split = [("split.count", 2_u16)].into_iter().collect();
    assert_says(&layout_refusal(&split, &[]), &["split.count"]);
}

#[test]
fn the_arrangement_of_a_read_file_can_be_taken_out() {
    let mut metadata: Metadata = [
        ("general.alignment", 64_u32),
        ("general.x", 1),
        ("split.count", 2),
        ("split.no", 0),
    ]
    .into_iter()
    .collect();
    metadata.remove_arrangement();
    assert_eq!(metadata, [("general.x", 1_u32)].into_iter().collect());
    assert!(Layout::new(&metadata, &[]).is_ok());
}

#[test]
fn a_writer_takes_a_tensors_bytes_in_any_pieces_but_no_more() {
    let (_folder, path) = temporary("model.gguf");
    let decls = [
        decl("a", BlockType::F32, &[3]),
        decl("b", BlockType::F32, &[1]),
    ];
    let mut writer = Writer::create(&path, Layout::new(&Metadata::new(), &decls).unwrap()).unwrap();
    writer.write(&[1; 5]).unwrap();
    assert_eq!(writer.tensors_done(), 0);
    assert_says(
        &writer.write(&[0; 8]).unwrap_err().to_string(),
        &["model.gguf", "tensor a", "8 bytes", "7 are left"],
    );
    writer.write(&[2; 7]).unwrap();
    assert_eq!(writer.tensors_done(), 1);
    writer.write(&[3; 4]).unwrap();
    assert_says(
        &writer.write(&[0]).unwrap_err().to_string(),
        &["model.gguf", "follow the last tensor"],
    );
    writer.finish().unwrap();

    let read = gguf::read(&path).unwrap();
    let bytes = fs::read(&path).unwrap();
    assert_eq!(
        bytes[read.tensors[0].offset as usize..][..12],
        [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]
    );
    assert_eq!(bytes[read.tensors[1].offset as usize..][..4], [3; 4]);
}

#[test]
fn an_unfinished_file_is_not_called_finished() {
    let (_folder, path) = temporary("model.gguf");
    let layout = Layout::new(&Metadata::new(), &[decl("a", BlockType::F32, &[3])]).unwrap();
    let mut writer = Writer::create(&path, layout).unwrap();
    writer.write(&[1; 5]).unwrap();
    assert_says(
        &writer.finish().unwrap_err().to_string(),
        &["model.gguf", "tensor a", "5 of 12"],
    );
}

#[test]
fn a_resumed_file_equals_one_written_in_one_go() {
    let (folder, path) = temporary("model.gguf");
    let decls = some_tensors();
    let data = write(&path, &every_type(), &decls);
    let whole = fs::read(&path).unwrap();

    for done in 0..=decls.len() {
        let partial = folder.path().join("partial");
        let layout = Layout::new(&every_type(), &decls).unwrap();
        let mut writer = Writer::create(&partial, layout.clone()).unwrap();
        for data in &data[..done] {
            writer.write(data).unwrap();
        }
        if let Some(next) = data.get(done) {
            writer.write(&next[..next.len() / 2]).unwrap();
        }
        writer.sync().unwrap();
        drop(writer);

        let mut writer = Writer::resume(&partial, layout, done).unwrap();
        assert_eq!(writer.tensors_done(), done);
        for data in &data[done..] {
            writer.write(data).unwrap();
        }
        writer.finish().unwrap();
        assert!(
            fs::read(&partial).unwrap() == whole,
            "resumed after {done} tensors"
        );
    }
}

#[test]
fn resuming_refuses_a_file_that_is_not_the_announced_one() {
    let (_folder, path) = temporary("model.gguf");
    let decls = some_tensors();
    write(&path, &every_type(), &decls);
    let other = Layout::new(&Metadata::new(), &decls).unwrap();
    let refused = |layout, done| {
        Writer::resume(&path, layout, done)
            .err()
            .expect("refused")
            .to_string()
    };
    assert_says(&refused(other, 1), &["model.gguf", "header", "start anew"]);

    let layout = Layout::new(&every_type(), &decls).unwrap();
    assert_says(&refused(layout.clone(), 9), &["model.gguf", "start anew"]);
    let length = layout.tensor_offset(2) - 1;
    fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(length)
        .unwrap();
    assert_says(
        &refused(layout, 2),
        &["model.gguf", "bytes long", "start anew"],
    );
}

#[test]
fn a_file_is_never_left_half_written_under_its_final_name() {
    let (folder, path) = temporary("model.gguf");
    let short = [(decl("a", BlockType::F32, &[3]), &[0_u8; 5][..])];
    let message = gguf::write_whole(&path, &Metadata::new(), &short)
        .unwrap_err()
        .to_string();
    assert_says(&message, &["tensor a", "5 of 12"]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

// ── Names ───────────────────────────────────────────────────────────────────────────────

#[test]
fn names_are_taken_apart_as_they_are_put_together() {
    use names::{ATTN_Q, BlockName, Experts, FFN_DOWN, FFN_GATE_INP};
    let parsed = |layer, part, experts| {
        Some(BlockName {
            layer,
            part,
            experts,
        })
    };
    assert_eq!(
        names::parse(&names::block(31, ATTN_Q)),
        parsed(31, ATTN_Q, Experts::None)
    );
    assert_eq!(
        names::parse("blk.0.ffn_gate_inp.weight"),
        parsed(0, FFN_GATE_INP, Experts::None)
    );
    assert_eq!(
        names::parse(&names::experts(7, FFN_DOWN)),
        parsed(7, FFN_DOWN, Experts::All)
    );
    assert_eq!(
        names::parse(&names::expert(7, FFN_DOWN, 3)),
        parsed(7, FFN_DOWN, Experts::One(3))
    );
    for other in [
        names::TOKEN_EMBD,
        names::ROPE_FREQS,
        "blk.x.attn_q.weight",
        "blk.1.attn_q.bias",
        "blk.1.a.b.weight",
    ] {
        assert_eq!(names::parse(other), None, "{other}");
    }
}

// ── Anything at all ─────────────────────────────────────────────────────────────────────

proptest! {
    #[test]
    fn arbitrary_bytes_are_refused_with_a_message(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        if parse(&bytes).is_ok() {
            prop_assert!(bytes.starts_with(b"GGUF"));
        }
    }

    #[test]
    fn arbitrary_bytes_after_a_valid_start_are_refused_or_read(
        tensors in 0..4_u64,
        pairs in 0..4_u64,
        rest in proptest::collection::vec(prop_oneof![Just(0_u8), 0..16_u8, any::<u8>()], 0..400),
    ) {
        let mut bytes = file(3, &[], &[], 0);
        bytes.truncate(8);
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(pairs.to_le_bytes());
        bytes.extend(rest);
        match parse(&bytes) {
            Ok(read) => {
                prop_assert_eq!(read.metadata.len() as u64, pairs);
                for tensor in &read.tensors {
                    prop_assert!(tensor.offset + tensor.bytes <= bytes.len() as u64);
                }
            }
            Err(error) => prop_assert!(error.to_string().starts_with("model.gguf: ")),
        }
    }

    #[test]
    fn arrays_of_numbers_and_strings_are_read_back(
        floats in proptest::collection::vec(-1e30_f32..1e30, 0..50),
        strings in proptest::collection::vec(".{0,12}", 0..20),
    ) {
        let (_folder, path) = temporary("model.gguf");
        let mut metadata = Metadata::new();
        metadata.insert("floats", floats);
        metadata.insert("strings", strings);
        gguf::write_whole(&path, &metadata, &[]).unwrap();
        prop_assert_eq!(gguf::read(&path).unwrap().metadata, metadata);
    }
}
