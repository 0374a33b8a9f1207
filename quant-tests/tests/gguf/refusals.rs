//! What a file may not be, each refusal with its place.

use super::*;

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
    let words = [
        "model.gguf",
        "metadata key a",
        "too much memory",
        "2147483648",
    ];
    assert_says(&message, &words);
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
