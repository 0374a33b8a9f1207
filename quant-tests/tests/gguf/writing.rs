//! Layouts and writers.

use super::*;

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
