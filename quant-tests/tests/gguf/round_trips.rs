//! What is written is read back; other versions and alignments are read.

use super::*;

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
